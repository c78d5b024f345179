"""The command `refinedet weights pull`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from refinedet_cli.cli.downloads import downloads
from refinedet_cli.cli.options import OUTPUT, JsonOpt, OfflineOpt, QuietOpt, WeightsArg
from refinedet_cli.cli.output import Output
from refinedet_cli.errors import UsageError

if TYPE_CHECKING:
    from refinedet_cli.zoo.inventory import Model


def weights_pull(
    name: WeightsArg,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Write the checkpoint there as well, to take it to another machine.",
            show_default="only the cache has it",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    offline: OfflineOpt = False,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Fetch a model from the Hugging Face Hub, so that it can be used without a network afterwards.

    It goes into the Hub's usual cache. Where it is there already, the Hub is asked whether the branch has moved on, and
    the file is checked against its SHA-256; it is fetched again if it is old or damaged. Private repositories need a
    login: hf auth login, or HF_TOKEN.
    """
    output = Output(json=json, quiet=quiet)
    with downloads(output, offline=offline):
        model = _pull(output, name)
    if out is not None:
        _write(model.path, out)
    place = {"name": name, "path": model.path, "copy": out, "bytes": model.bytes, "sha256": model.sha256}
    where = model.path if out is None else out
    output.result(place, Text(f"{name}: {model.bytes / 1e6:.1f} MB at {where}"), Text(f"SHA-256 {model.sha256}"))


def _pull(output: Output, name: str) -> Model:
    from refinedet_cli.zoo.hub import pull
    from refinedet_cli.zoo.inventory import describe

    def tell() -> None:
        output.note(f"{name}: the Hub could not be asked whether it has a newer state; this is the one in the cache")

    return describe(pull(name, tell), name, "file")


def _write(path: Path, copy: Path) -> None:
    from refinedet_cli.data.files import write_whole

    content = path.read_bytes()
    if copy.is_dir():
        raise UsageError(f"--out {copy} is a folder", f"name the file, such as {copy / 'model.safetensors'}")
    if copy.is_file() and copy.read_bytes() != content:
        raise UsageError(f"--out {copy} exists and is another file", "delete it, or choose another name")
    write_whole(copy, content)
