"""The command line: registers the commands and turns every way to end into an exit code.

Beside the codes of `refinedet_cli.errors`: 0 done, 1 a bug (with its traceback), 130 interrupted, and 141 when the
reader of a pipe went away, which is what a shell reports for any program stopped so.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from refinedet_cli import __version__
from refinedet_cli.cli.anchors import anchors
from refinedet_cli.cli.bench import bench
from refinedet_cli.cli.data_check import data_check
from refinedet_cli.cli.data_convert import data_convert
from refinedet_cli.cli.data_split import data_split
from refinedet_cli.cli.data_stats import data_stats
from refinedet_cli.cli.detect import detect
from refinedet_cli.cli.eval import evaluate
from refinedet_cli.cli.export import export
from refinedet_cli.cli.output import current_invocation, invocation, write_document, write_error
from refinedet_cli.cli.train import train
from refinedet_cli.cli.weights_import import weights_import
from refinedet_cli.cli.weights_info import weights_info
from refinedet_cli.cli.weights_list import weights_list
from refinedet_cli.cli.weights_pull import weights_pull
from refinedet_cli.cli.weights_push import weights_push
from refinedet_cli.engine.memory import is_out_of_memory
from refinedet_cli.errors import RefineDetError, ToldElsewhere
from refinedet_cli.files import DISK_ERRNOS

PROGRAM = "refinedet"
INTERRUPTED = 130
PIPE_CLOSED = 141
_USAGE, _DATA, _DEVICE = 2, 4, 6

# The words that scripts compare; the codes are those of `refinedet_cli.errors`.
_TYPES = {
    1: "bug",
    _USAGE: "usage",
    3: "config",
    _DATA: "data",
    5: "checkpoint",
    _DEVICE: "device",
    7: "gate",
    8: "partial",
    INTERRUPTED: "interrupted",
}

app = typer.Typer(
    name=PROGRAM,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def examples(*lines: str) -> str:
    """Lay out example command lines as the epilog of a help page."""
    # Typer makes one paragraph of neighbouring lines.
    return "\n\n".join(["[bold]Examples[/bold]", *(_literal(line) for line in lines)])


def prose(command: Callable[..., None]) -> str:
    """Turn a command's docstring into help whose paragraphs fill the width of the terminal."""
    # Typer would keep the line breaks of the source.
    return "\n\n".join(" ".join(part.split()) for part in _literal(inspect.getdoc(command) or "").split("\n\n"))


def _literal(text: str) -> str:
    """Keep square brackets from being read as markup."""
    return text.replace("[", r"\[")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Train, run and measure RefineDet object detectors."""


def _group(name: str, summary: str) -> typer.Typer:
    group = typer.Typer(name=name, help=summary, no_args_is_help=True, rich_markup_mode="rich")
    app.add_typer(group)
    return group


def _register(group: typer.Typer, name: str, command: Callable[..., None], *lines: str) -> None:
    """Add a command, its docstring as help and command lines as examples."""
    group.command(name, help=prose(command), epilog=examples(*lines))(command)


_register(
    app,
    "anchors",
    anchors,
    "refinedet anchors --dataset signs",
    "refinedet anchors --dataset signs --weights runs/signs/best.safetensors --visualize --out anchors",
)
_register(
    app,
    "bench",
    bench,
    "refinedet bench runs/signs/best.safetensors runs/signs/best.safetensors:bf16 --dataset signs/test.json",
    "refinedet bench best.safetensors best.onnx best.xml --source photos --threads 4 --out speed --json",
)
data_app = _group("data", "Check, convert, split and describe data sets.")
_register(
    data_app,
    "check",
    data_check,
    "refinedet data check signs",
    "refinedet data check signs/train.json --val signs/val.json --strict --out findings",
)
_register(
    data_app,
    "convert",
    data_convert,
    "refinedet data convert signs --to yolo --out signs-yolo",
    "refinedet data convert VOCdevkit/VOC2007:trainval --to coco --out voc07 --picture-files stay --json",
)
_register(
    data_app,
    "split",
    data_split,
    "refinedet data split signs --parts train=0.8,val=0.1,test=0.1 --out signs-split",
    "refinedet data split frames.json --parts train=0.7,val=0.3 --group '^(.*)_[0-9]+[.]jpg$' --out frames --seed 1",
)
_register(
    data_app,
    "stats",
    data_stats,
    "refinedet data stats signs",
    "refinedet data stats VOCdevkit/VOC2007:trainval --preset refinedet512_vgg16 --out figures --json",
)
_register(
    app,
    "detect",
    detect,
    "refinedet detect photos --out found",
    "refinedet detect street.jpg park.jpg --out found --weights runs/signs/best.safetensors --score 0.5 --json",
)
_register(
    app,
    "eval",
    evaluate,
    "refinedet eval --dataset signs/test.json --weights runs/signs/best.safetensors",
    "refinedet eval --dataset VOCdevkit --split test --postprocess caffe --out scores --json",
)
_register(
    app,
    "export",
    export,
    "refinedet export --weights runs/signs/best.safetensors --out shipped",
    "refinedet export --weights runs/signs --precision int8 --calibrate signs/train --dataset signs --out shipped",
)
_register(
    app,
    "train",
    train,
    "refinedet train --data signs --out runs/signs",
    "refinedet train --data signs/train.json --val signs/val.json --out runs/signs --set train.epochs=30",
)
weights_app = _group("weights", "List, fetch, import, publish and describe weights.")
_register(
    weights_app,
    "import",
    weights_import,
    "refinedet weights import RefineDet512_VOC_final.pth",
    "refinedet weights import ships.pth --classes ships.txt --size 512 --out ships.safetensors --json",
)
_register(
    weights_app,
    "info",
    weights_info,
    "refinedet weights info refinedet320_mobilenetv2",
    "refinedet weights info runs/signs --json",
)
_register(
    weights_app,
    "list",
    weights_list,
    "refinedet weights list",
    "refinedet weights list --json",
)
_register(
    weights_app,
    "pull",
    weights_pull,
    "refinedet weights pull acme/signs",
    "refinedet weights pull acme/signs@v2:night.safetensors --out night.safetensors",
)
_register(
    weights_app,
    "push",
    weights_push,
    "refinedet weights push runs/signs acme/signs --licence apache-2.0 --dry-run",
    "refinedet weights push --all-bundled acme --private",
)


def all_commands() -> dict[str, Callable[..., None]]:
    """Every command by the words that call it, such as ``detect`` or ``data check``."""
    found = {command.name or "": command.callback for command in app.registered_commands}
    for group in app.registered_groups:
        if group.typer_instance is not None:
            commands = group.typer_instance.registered_commands
            found |= {f"{group.typer_instance.info.name} {command.name}": command.callback for command in commands}
    return {name: callback for name, callback in found.items() if callback is not None}


@dataclass(frozen=True)
class Failure:
    """How a command ended when it did not succeed."""

    code: int
    message: str
    hint: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Returns:
        One of the documented exit codes. With ``--json`` stdout holds exactly one JSON document, whatever the code.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    options = args[: args.index("--")] if "--" in args else args
    with invocation(_command_name(args), json="--json" in options, arguments=args):
        try:
            return _invoke(args or ["--help"])
        except BrokenPipeError:
            return PIPE_CLOSED
        except ToldElsewhere as told:
            return told.exit_code
        except KeyboardInterrupt:
            failure = Failure(INTERRUPTED, "interrupted")
        except typer.TyperException as error:
            if _is_help(error):
                return _USAGE
            failure = _expected(error) or _bug(error)
        except Exception as error:  # the last stop: what is not the user's doing is shown as a bug
            failure = _expected(error) or _bug(error)
        return _report(failure)


def run() -> None:
    """Run as the program ``refinedet``: like `main`, and leave with the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A file name may hold bytes, and a class name letters, that the terminal has no form for.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    code = main()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = PIPE_CLOSED
    if code == PIPE_CLOSED:
        # Python flushes once more on its way out; let that go nowhere instead of complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def _command_name(args: Sequence[str]) -> str | None:
    words = [arg for arg in args if not arg.startswith("-")]
    known = all_commands()
    return next((name for name in (" ".join(words[:1]), " ".join(words[:2])) if name in known), None)


def _invoke(args: list[str]) -> int:
    """Run Typer without its own ideas of how to end: its exceptions arrive here."""
    try:
        code = app(args, prog_name=PROGRAM, standalone_mode=False)
    except SystemExit as leave:
        # Typer answers a closed pipe this way; else it is shell completion, which has said all it wants to.
        if isinstance(leave.__context__, BrokenPipeError):
            raise leave.__context__ from None
        raise
    except typer.Abort as abort:
        # Typer takes any EOFError for an aborted prompt; a truncated file read by a command is not one.
        if isinstance(abort.__cause__, EOFError):
            raise abort.__cause__ from None
        raise KeyboardInterrupt from None
    if code == INTERRUPTED:
        # Typer turns the interrupt into this code.
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _is_help(error: typer.TyperException) -> bool:
    """Tell whether a group was called without a command: its help, which is the answer, has been printed."""
    # Typer asks so too, for the class is not its to give away.
    return type(error).__name__ == "NoArgsIsHelpError"


def _expected(error: Exception) -> Failure | None:
    """Explain a failure that is not a bug."""
    if isinstance(error, RefineDetError):
        return Failure(error.exit_code, error.message, error.hint)
    if isinstance(error, typer.TyperException):
        path = getattr(getattr(error, "ctx", None), "command_path", PROGRAM)
        message = re.sub(r"\s*\n\s*", " ", error.format_message()).replace(": Value error, ", ": ")
        return Failure(error.exit_code, message, f"see {path} --help")
    if is_out_of_memory(error):
        first_line = str(error).strip().partition("\n")[0] or "out of memory"
        return Failure(_DEVICE, first_line, "lower --batch, or choose another --device")
    # Any other OSError that arrives here is a bug.
    if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
        place = f"{error.filename}: " if error.filename is not None else ""
        return Failure(_DATA, f"{place}{error.strerror}", "check permissions and free space, or choose another place")
    return None


def _bug(error: Exception) -> Failure:
    traceback.print_exception(error, file=sys.stderr)
    return Failure(1, f"{type(error).__name__}: {error}", "this is a bug: please report it with the lines above")


def _report(failure: Failure) -> int:
    """Tell a failure on stderr and, with ``--json``, in the one document that stdout holds."""
    write_error(failure.message, failure.hint)
    current = current_invocation()
    if current.json and not current.answered:
        error = {
            "code": failure.code,
            "type": _TYPES.get(failure.code, "bug"),
            "message": failure.message,
            "hint": failure.hint,
        }
        try:
            write_document({"error": error})
        except BrokenPipeError:
            return PIPE_CLOSED
    return failure.code
