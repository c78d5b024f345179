"""The command `refinedet weights import`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from refinedet_cli.cli.options import MODEL, OUTPUT, JsonOpt, QuietOpt
from refinedet_cli.cli.output import Output
from refinedet_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from refinedet_cli.core.config import Classes
    from refinedet_cli.zoo.importers.convert import Imported

_LONGEST_LIST = 1 << 20
_BACKGROUND = ("background", "__background__")
_STEP = 64


def weights_import(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A .pth or .pt of PyTorch, a .safetensors, or a .caffemodel.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE.safetensors",
            help="Where to write the checkpoint.",
            show_default="FILE's name, in the current folder",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            metavar="voc|coco|NAMES",
            help="What the outputs stand for, without background: voc, coco, a text file with one name a line, or a "
            "COCO JSON, whose categories are taken by rising id.",
            show_default="voc for 20 classes, coco for 80, else class1, class2, ...",
            rich_help_panel=MODEL,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            "--size",
            min=_STEP,
            metavar="PX",
            help="Side of the input, a multiple of 64; the weights alone do not tell it.",
            show_default="320 or 512 if it is in the name, else 320",
            rich_help_panel=MODEL,
        ),
    ] = None,
    channel_order: Annotated[
        Literal["rgb", "bgr"] | None,
        typer.Option(
            "--channel-order",
            help="Order of the input's colours, should the project's own code have fed another.",
            show_default="that of the project's code",
            rich_help_panel=MODEL,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what it is, and write nothing.", rich_help_panel=OUTPUT)
    ] = False,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Turn the weights of another project into a checkpoint of this tool that computes the same.

    Known are the RefineDets of luuuyi/RefineDet.PyTorch (and copies of it), dd604/refinedet.pytorch,
    lzx1413/PytorchSSD and the official Caffe code, and the SSD300 of amdegroot/ssd.pytorch and of torchvision. Names
    and shapes of the tensors tell which it is.

    Nothing in the file is ever run. What it does not tell is assumed from the project's code, and said; the checkpoint
    keeps it, with the file's SHA-256. Weights of a backbone alone need no import: train --backbone-weights takes them.
    """
    from refinedet_cli.zoo.importers.convert import convert
    from refinedet_cli.zoo.importers.weight_file import read_weight_file

    output = Output(json=json, quiet=quiet)
    if size is not None and size % _STEP:
        raise UsageError(f"--size {size} is not a multiple of {_STEP}", "320 and 512 are those of the paper")
    target = Path(f"{file.stem}.safetensors") if out is None else out
    if not dry_run:
        _refuse_taken(target, named=out is not None)
    names = None if classes is None else _read_classes(classes, output)
    done = convert(read_weight_file(file), classes=names, size=size, channel_order=channel_order)
    if dry_run:
        output.result(_document(done, None), _table(done, None))
        return
    sha256 = _save(done, target)
    output.result(_document(done, target, sha256), _table(done, target))
    output.note(f"refinedet detect PICTURES --weights {target} --out found")


def _refuse_taken(target: Path, *, named: bool) -> None:
    if target.is_dir():
        raise UsageError(f"--out {target} is a folder", f"name the file, such as {target / 'model.safetensors'}")
    if target.suffix != ".safetensors":
        raise UsageError(f"--out {target}: a checkpoint ends in .safetensors", f"such as {target.stem}.safetensors")
    if target.exists():
        cure = "delete it, or choose another name" if named else "choose another name with --out"
        raise UsageError(f"{target} exists and is not replaced", cure)


def _save(done: Imported, target: Path) -> str:
    from refinedet_cli.data.files import make_folder
    from refinedet_cli.zoo.checkpoint import file_sha256

    make_folder(target.parent)
    done.save(target)
    return file_sha256(target)


def _read_classes(given: str, output: Output) -> Classes:
    from refinedet_cli.zoo.importers.class_names import CLASS_LISTS, numbered

    if given in CLASS_LISTS:
        return CLASS_LISTS[given]
    path = Path(given)
    if not path.is_file():
        raise UsageError(f"--classes {given!r}: there is no such file", "give voc, coco, or a file with the names")
    if path.suffix.lower() == ".json":
        return _coco_classes(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = file.read(_LONGEST_LIST).splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file", "write one class name a line, as UTF-8") from None
    names = [line.strip() for line in lines if line.strip()]
    if names and names[0].lower() in _BACKGROUND:
        output.note(f"{path}: {names[0]!r} in its first line is left out: background comes by itself")
        del names[0]
    if not names:
        raise DataError(f"{path}: no class names in it", "write one class name a line")
    return numbered(tuple(names))


def _coco_classes(path: Path) -> Classes:
    from refinedet_cli.core.config import Classes
    from refinedet_cli.data.coco import list_entries, load_document
    from refinedet_cli.data.json_entries import category_names

    names = category_names(list_entries(path, load_document(path), "categories"), path)
    ids = tuple(sorted(names))
    return Classes(names=tuple(names[i] for i in ids), category_ids=ids)


def _document(done: Imported, target: Path | None, sha256: str | None = None) -> dict[str, Any]:
    from refinedet_cli.core.config import to_dict

    return {
        "file": done.file.path,
        "file_kind": done.file.kind,
        "file_sha256": done.file.sha256,
        "project": done.project,
        "network": done.about,
        "tensors": len(done.file.tensors),
        "tensors_left_out": done.left_out,
        "assumed": done.assumed,
        "config": to_dict(done.config),
        "out": target,
        "sha256": sha256,
    }


def _table(done: Imported, target: Path | None) -> Table:
    title = "Recognised" if target is None else "Imported"
    table = Table(title=f"{title} {done.file.path.name}", title_justify="left", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("figure", overflow="fold")
    for what, figure in _rows(done):
        table.add_row(what, figure)
    if target is not None:
        table.add_row("written", f"{target}, {target.stat().st_size / 1e6:.1f} MB")
    return table


def _rows(done: Imported) -> Iterator[tuple[str, str]]:
    from refinedet_cli.core.words import counted

    names, size = done.config.classes.names, done.config.preprocess
    left_out = f", {done.left_out} of them not needed" if done.left_out else ""
    yield "from", done.project
    yield "file", f"{done.file.kind}, {len(done.file.tensors):,} tensors{left_out}"
    yield "its SHA-256", done.file.sha256
    yield "network", done.about
    mean = ", ".join(f"{value:.4g}" for value in size.mean)
    order = "" if size.channel_order == "rgb" else ", turned to BGR"
    yield "input", f"{size.width} x {size.height} px, RGB less ({mean}){order}"
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    yield counted(len(names), "class", "classes"), shown
    for place, sentence in enumerate(done.assumed):
        yield "" if place else "assumed", sentence
