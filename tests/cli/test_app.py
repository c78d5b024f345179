"""Every way a command can end, and the promises that hold for all commands."""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer

import refinedet_cli
from refinedet_cli import errors
from refinedet_cli.cli import app as app_module
from refinedet_cli.cli.output import Output

TOP_LEVEL = ("anchors", "bench", "data", "detect", "eval", "export", "train", "weights")
COMMANDS = tuple(app_module.all_commands())
PROBE = "import sys; {}; print(*sorted({{'torch', 'torchvision', 'numpy', 'PIL', 'matplotlib'}} & set(sys.modules)))"


def _refinedet() -> str:
    """The installed program, of the environment that runs the tests."""
    program = Path(sys.executable).with_name("refinedet")
    if not program.exists():
        pytest.skip("the project is not installed: pip install -e .")
    return str(program)


@pytest.fixture
def ending(monkeypatch):
    """Replace the commands by one, called detect, that ends as the test says."""

    def prepare(end):
        app = typer.Typer(pretty_exceptions_enable=False)

        @app.callback()
        def root() -> None:
            pass

        @app.command("detect")
        def detect(
            score: float = 0.3,
            json_: bool = typer.Option(False, "--json"),
        ) -> None:
            end(Output(json=json_))

        monkeypatch.setattr(app_module, "app", app)

    return prepare


def _raising(error):
    def end(_output):
        raise error

    return end


def _os_error(number, name=None):
    return OSError(number, os.strerror(number), name)


ENDINGS = [
    (errors.UsageError("m", "h"), 2, "usage"),
    (errors.ConfigError("m", "h"), 3, "config"),
    (errors.DataError("m", "h"), 4, "data"),
    (errors.CheckpointError("m", "h"), 5, "checkpoint"),
    (errors.DeviceError("m", "h"), 6, "device"),
    (errors.GateError("m", "h"), 7, "gate"),
    (errors.PartialError("m", "h"), 8, "partial"),
    (torch.OutOfMemoryError("m"), 6, "device"),
    (RuntimeError("MPS backend out of memory (tried m)"), 6, "device"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: m"), 6, "device"),
    (MemoryError(), 6, "device"),
    (_os_error(errno.ENOSPC, "m"), 4, "data"),
    (_os_error(errno.EACCES, "m"), 4, "data"),
    (typer.BadParameter("m"), 2, "usage"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (typer.Abort(), 130, "interrupted"),
    (RuntimeError("m"), 1, "bug"),
    (EOFError("m"), 1, "bug"),
    (_os_error(errno.ENOENT, "m"), 1, "bug"),
]


@pytest.mark.parametrize(("error", "code", "kind"), ENDINGS, ids=lambda v: type(v).__name__)
def test_every_ending_has_its_code_and_one_document(error, code, kind, ending, run):
    ending(_raising(error))

    text = run("detect")
    assert text.code == code
    assert text.stdout == ""
    assert text.stderr.count("error: ") == 1
    assert ("Traceback" in text.stderr) == (kind == "bug")

    as_json = run("detect", "--json")
    document = json.loads(as_json.stdout)
    assert as_json.code == document["error"]["code"] == code
    assert document["schema_version"] == 1
    assert document["command"] == "detect"
    assert document["error"]["type"] == kind
    assert set(document["error"]) == {"code", "type", "message", "hint"}


def test_message_and_hint_have_a_line_each(ending, run):
    ending(_raising(errors.DataError("a.json: no [images]", "write some")))
    assert run("detect") == (4, "", "error: a.json: no [images]\nhint: write some\n")
    assert json.loads(run("detect", "--json").stdout)["error"]["hint"] == "write some"


def test_no_hint_is_null(ending, run):
    ending(_raising(errors.DataError("a.json is empty")))
    assert run("detect") == (4, "", "error: a.json is empty\n")
    assert json.loads(run("detect", "--json").stdout)["error"]["hint"] is None


def test_out_of_memory_names_the_cure(ending, run):
    ending(_raising(torch.OutOfMemoryError("CUDA out of memory.\nTried to")))
    assert run("detect") == (6, "", "error: CUDA out of memory.\nhint: lower --batch, or choose another --device\n")


def test_a_result_stays_the_only_document_when_a_command_then_fails(ending, run):
    def partly(output):
        output.result({"done": 3})
        raise errors.PartialError("1 of 4 pictures could not be read")

    ending(partly)
    code, stdout, stderr = run("detect", "--json")
    assert code == 8
    assert json.loads(stdout) == {"schema_version": 1, "command": "detect", "done": 3}
    assert stderr == "error: 1 of 4 pictures could not be read\n"


def test_exit_codes_chosen_by_a_command_arrive(ending, run):
    ending(_raising(typer.Exit(8)))
    assert run("detect") == (8, "", "")


@pytest.mark.parametrize(
    ("argv", "command", "words"),
    [
        (["detect", "--nonsense"], "detect", "--nonsense"),
        (["detect", "--score", "high"], "detect", "--score"),
        (["fly"], None, "fly"),
    ],
)
def test_usage_errors_are_told_alike(argv, command, words, ending, run):
    ending(lambda output: output.result({}))
    code, stdout, stderr = run(*argv)
    assert (code, stdout) == (2, "")
    message, hint = stderr.splitlines()
    assert message.startswith("error: ")
    assert words in message
    assert hint == f"hint: see {' '.join(['refinedet', *([command] if command else [])])} --help"

    code, stdout, _ = run(*argv, "--json")
    document = json.loads(stdout)
    assert code == document["error"]["code"] == 2
    assert document["command"] == command
    assert words in document["error"]["message"]


def test_an_option_after_two_dashes_is_no_option(ending, run):
    ending(lambda output: output.result({}))
    assert run("detect", "--", "--json").stdout == ""


def test_version(run):
    assert run("--version") == (0, f"refinedet {refinedet_cli.__version__}\n", "")


def test_without_arguments_the_help_is_shown(run):
    assert run() == run("--help")
    assert run().code == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_its_examples(command, run):
    code, stdout, stderr = run(*command.split(), "--help")
    assert (code, stderr) == (0, "")
    assert f"Usage: refinedet {command}" in stdout
    calls = re.findall(rf"\brefinedet {command}(?= )", f"{' '.join(stdout.split())} ")
    assert len(calls) >= 3  # the usage line and two examples
    assert "--json" in stdout
    assert "--quiet" in stdout


def test_help_keeps_brackets_and_fills_its_lines(monkeypatch, run):
    def detect() -> None:
        """Do [bold] things.

        A paragraph
        of two lines, in [0, 1].
        """

    app = typer.Typer()
    app.callback()(lambda: None)
    app.command("detect", help=app_module.prose(detect), epilog=app_module.examples("refinedet detect a[b].jpg"))(
        detect
    )
    monkeypatch.setattr(app_module, "app", app)
    stdout = run("detect", "--help").stdout
    for line in ("Do [bold] things.", "A paragraph of two lines, in [0, 1].", "refinedet detect a[b].jpg"):
        assert line in stdout


@pytest.mark.parametrize("command", ["detect", "train", "weights info"])
def test_help_tells_how_to_name_weights_on_the_hub(command, run):
    assert "org/repo[@revision][:file]" in run(*command.split(), "--help").stdout


@pytest.mark.parametrize(
    "call",
    [
        ("detect", "photos", "--out", ""),
        ("data", "split", "photos", "--parts", "train=1", "--out="),
    ],
)
def test_an_empty_out_is_not_the_current_folder(call, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*call) == (2, "", "error: --out is empty\nhint: name a folder; . is the current one\n")
    assert list(tmp_path.iterdir()) == []


def _commands():
    """Every command by the words that call it, those of groups too."""
    found = {}
    for name, command in typer.main.get_command(app_module.app).commands.items():
        inner = getattr(command, "commands", None)
        found |= {name: command} if inner is None else {f"{name} {word}": entry for word, entry in inner.items()}
    assert sorted(found) == sorted(COMMANDS)
    return found


def test_the_commands_are_those_that_are_documented(root):
    groups = typer.main.get_command(app_module.app).commands
    assert tuple(sorted(groups)) == TOP_LEVEL
    readme = (root / "README.md").read_text()
    assert [name for name in COMMANDS if not re.search(rf"\b{name}\b", readme)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_accepted_by_their_command(command):
    lines = [line.replace(r"\[", "[") for line in _commands()[command].epilog.split("\n\n")[1:]]
    assert len(lines) == 2
    for line in lines:
        program, *words = shlex.split(line)
        name = words[: len(command.split())]
        assert (program, " ".join(name)) == ("refinedet", command)
        _commands()[command].make_context(command, words[len(name) :])


def test_a_wrong_example_would_be_noticed():
    with pytest.raises(typer.TyperException, match="--outt"):
        _commands()["detect"].make_context("detect", ["photos", "--outt", "found"])


def _contradictions(commands):
    """Options that mean different things, or have different defaults, in two commands."""
    seen, found = {}, []
    for name, command in commands.items():
        for option in command.params:
            if option.param_type_name != "option" or option.required:
                continue
            said = (option.default, tuple(option.opts), option.multiple)
            first = seen.setdefault(option.opts[0], (name, said))
            if first[1] != said:
                found.append((option.opts[0], first, (name, said)))
    return found


def test_an_option_has_one_default_in_all_commands():
    assert _contradictions(_commands()) == []


def test_two_defaults_would_be_noticed():
    app = typer.Typer()

    @app.command()
    def one(score: float = 0.3) -> None:
        pass

    @app.command()
    def two(score: float = 0.5) -> None:
        pass

    assert [name for name, *_ in _contradictions(typer.main.get_command(app).commands)] == ["--score"]


@pytest.mark.parametrize("function", app_module.all_commands().values())
def test_commands_are_functions_of_their_own_files(function):
    assert inspect.getmodule(function).__name__.startswith("refinedet_cli.cli.")


def _loaded_after(statement):
    done = subprocess.run([sys.executable, "-c", PROBE.format(statement)], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_command_line_loads_nothing_heavy():
    assert _loaded_after("import refinedet_cli.cli.app") == []


def test_the_probe_for_heavy_imports_can_fail():
    assert "numpy" in _loaded_after("import refinedet_cli.cli.app, numpy")


def test_help_answers_at_once():
    program, times = _refinedet(), []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([program, "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    # 0.3 s is the promise on an idle machine; the rest is for busy ones. Importing torch alone takes longer.
    assert min(times) < 0.8, f"best of five: {min(times):.2f} s"


def test_a_closed_pipe_is_no_complaint():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([_refinedet(), "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_closed_pipe_inside_a_command_is_no_complaint(ending, run):
    ending(_raising(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    stdout, stderr = sys.stdout, sys.stderr
    try:
        assert run("detect") == (141, "", "")
    finally:
        sys.stdout, sys.stderr = stdout, stderr


def test_the_program_leaves_with_the_code():
    done = subprocess.run([_refinedet(), "fly", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["type"] == "usage"


def test_shell_completion_offers_commands():
    environment = {**os.environ, "_REFINEDET_COMPLETE": "complete_bash", "COMP_WORDS": "refinedet ", "COMP_CWORD": "1"}
    done = subprocess.run([_refinedet()], env=environment, capture_output=True, text=True, check=False)
    assert sorted(done.stdout.split()) == list(TOP_LEVEL)


@pytest.mark.parametrize("group", ["data", "weights"])
def test_a_group_alone_shows_its_help_and_is_no_success(run, group):
    code, stdout, stderr = run(group)
    assert (code, stderr) == (2, "")
    assert f"refinedet {group} [OPTIONS] COMMAND" in stdout
