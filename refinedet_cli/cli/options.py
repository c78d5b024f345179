"""The options that commands share: one name, one meaning and one default each.

A default stands in the signature of the command, because Typer reads it there; it is the one written beside the alias
below, and a test compares all commands. None means "not given": the config, or for runtime options the command,
decides.
Paths are not checked here: who opens a file says what is wrong with it, with the right exit code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.models import OptionInfo

from refinedet_cli.cli.output import current_invocation
from refinedet_cli.core.presets import PRESETS
from refinedet_cli.errors import UsageError

MODEL = "Model"
DATA = "Data"
RUNTIME = "Runtime"
OUTPUT = "Output"

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
PrecisionName = Literal["auto", "fp32", "bf16"]
SplitName = Literal["train", "val", "test"]


def complete_preset(incomplete: str) -> list[str]:
    """List the presets whose name begins as typed, for shell completion."""
    return [name for name in PRESETS if name.startswith(incomplete)]


def refuse_file(out: Path | None) -> None:
    """Refuse a file where --out takes a folder, before anything is done.

    Raises:
        UsageError: names it.
    """
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file", "name a folder")


def remarks_on_split(sources: Sequence[str], split: SplitName, root: Path | None) -> list[str]:
    """Say where --split was given and chooses nothing.

    Args:
        sources: what --dataset names.
        split: the part that --split names, given or not.
        root: as given with --root.

    Raises:
        UsageError: a source names another part.
        DataError: one does not exist, or is of a format that is not read.
    """
    if not any(argument.split("=")[0] == "--split" for argument in current_invocation().arguments):
        return []
    from refinedet_cli.data.source import describe_source

    remarks = []
    for source in sources:
        described = describe_source(source, root)
        if described.part is not None and described.part != split:
            raise UsageError(f"--split {split} contradicts {source}, which names the part", "leave one of the two out")
        if described.part is None and not described.splits:
            remarks.append(f"--split {split} chooses nothing: {source} has no parts, and all of it is taken")
    return remarks


def read_folder(text: str) -> Path:
    """Read the value of --out.

    Raises:
        UsageError: it is empty, which would stand for the current folder.
    """
    if not text:
        raise UsageError("--out is empty", "name a folder; . is the current one")
    return Path(text)


def read_batch(text: str | None) -> int | Literal["auto"] | None:
    """Read the value of --batch where it may be auto.

    Raises:
        UsageError: it is neither that nor a number from 1 on.
    """
    if text is None or text == "auto":
        return text  # type: ignore[return-value]
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--batch {text!r} is no number of pictures", "give a whole number from 1 on, or auto")
    return int(text)


# Model ---------------------------------------------------------------------------------------------------------------

# = None
WeightsOpt = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="NAME|FILE|ORG/REPO",
        help=r"A checkpoint or the folder of a run; the name of a bundled model; or org/repo\[@revision]\[:file] on "
        "the Hugging Face Hub, downloaded once. train also takes none.",
        show_default="the bundled detector",
        rich_help_panel=MODEL,
    ),
]
# required
WeightsArg = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE|ORG/REPO",
        help=r"A checkpoint or the folder of a run; the name of a bundled model; or org/repo\[@revision]\[:file] on "
        "the Hugging Face Hub.",
        show_default=False,
    ),
]
# = False
OfflineOpt = Annotated[
    bool,
    typer.Option(
        "--offline",
        help="Never use the network; weights of the Hugging Face Hub must be in the cache, as with HF_HUB_OFFLINE=1.",
        rich_help_panel=MODEL,
    ),
]
# = None
BackboneWeightsOpt = Annotated[
    str | None,
    typer.Option(
        "--backbone-weights",
        metavar="imagenet|FILE|NAME",
        help="Start from ImageNet weights of the backbone instead of a detector: imagenet downloads the published "
        r"ones once; or a file, or org/repo\[@revision]\[:file] on the Hugging Face Hub.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
# = None
PresetOpt = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="Detector and recipe to start from: " + ", ".join(PRESETS) + ".",
        show_default="that of the weights",
        autocompletion=complete_preset,
        rich_help_panel=MODEL,
    ),
]
# = None
ConfigOpt = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        help="A run file: data, start, and settings that override the preset; or the config.json of a run.",
        rich_help_panel=MODEL,
    ),
]
# = None
SetOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="One setting by its dotted name, such as loss.neg_ratio=3; overrides --config. Repeatable.",
        rich_help_panel=MODEL,
    ),
]
# = 0.3
ScoreOpt = Annotated[
    float,
    typer.Option(
        "--score",
        min=0.0,
        max=1.0,
        help="Detections that score lower are neither drawn nor written.",
        rich_help_panel=MODEL,
    ),
]
# = None
MultiScaleOpt = Annotated[
    str | None,
    typer.Option(
        "--multi-scale",
        metavar="voc|coco|FILE.toml",
        help="Look at each picture in several sizes, mirrored too, and vote: slower by the factor that is said.",
        show_default="one look",
        rich_help_panel=MODEL,
    ),
]
# = None
TileOpt = Annotated[
    int | None,
    typer.Option(
        "--tile",
        min=32,
        metavar="SIZE",
        help="Look at larger pictures in overlapping tiles of so many pixels, and at the whole too: for small objects "
        "in large pictures. A side of one to two times the detector's input is usual.",
        show_default="no tiles",
        rich_help_panel=MODEL,
    ),
]
# = None
TileOverlapOpt = Annotated[
    float | None,
    typer.Option(
        "--tile-overlap",
        min=0.0,
        max=0.5,
        metavar="SHARE",
        help="How much of a tile its neighbour sees too; small objects should fit into it.",
        show_default="0.2",
        rich_help_panel=MODEL,
    ),
]

# = None
PostprocessOpt = Annotated[
    Literal["paper", "caffe"] | None,
    typer.Option(
        "--postprocess",
        help="paper: 400 candidates a picture, 200 kept; caffe: 1000 a class, 500 kept.",
        show_default="that of the weights",
        rich_help_panel=MODEL,
    ),
]

# Data ----------------------------------------------------------------------------------------------------------------

# required
SourcesArg = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCES",
        help="Pictures, folders, glob patterns, or - for a list of paths on standard input.",
        show_default=False,
    ),
]
# = None
DataOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="A COCO JSON, a folder with splits, a VOC folder, a YOLO data.yaml, or coco, voc2007, voc2012; "
        "DATA:PART takes that part, as voc2007:trainval. Repeat to join several.",
        show_default="that of --config",
        rich_help_panel=DATA,
    ),
]
# required
DataArg = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="A COCO JSON, a folder with splits, a VOC folder, a YOLO data.yaml, or coco, voc2007, voc2012; "
        "DATA:PART takes that part.",
        show_default=False,
    ),
]
# required
DatasetOpt = Annotated[
    list[str],
    typer.Option(
        "--dataset",
        metavar="DATA",
        help="A COCO JSON, a folder with splits, a VOC folder, a YOLO data.yaml, or coco, voc2007, voc2012; "
        "DATA:PART takes that part, as voc2007:trainval. Repeat to join several.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
# = None
ValOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--val",
        metavar="DATA",
        help="Data to validate on, repeated to join several; none trains on everything and validates nothing.",
        show_default="that of --data, or 15 % of it held out",
        rich_help_panel=DATA,
    ),
]
# = None
ImagesOpt = Annotated[
    Path | None,
    typer.Option(
        "--images",
        metavar="DIR",
        help="Folder of the pictures that an annotation file names.",
        show_default="beside the file",
        rich_help_panel=DATA,
    ),
]
# = None
RootOpt = Annotated[
    Path | None,
    typer.Option(
        "--root",
        metavar="DIR",
        help="Folder in which coco, voc2007 and voc2012 are looked up.",
        show_default="$REFINEDET_DATA, or ./datasets",
        rich_help_panel=DATA,
    ),
]
# = "val"
SplitOpt = Annotated[
    SplitName,
    typer.Option("--split", help="Which part of the data, unless DATA:PART names it.", rich_help_panel=DATA),
]

# Runtime -------------------------------------------------------------------------------------------------------------

# = "auto"
DeviceOpt = Annotated[
    DeviceName,
    typer.Option("--device", help="Where to compute; auto takes the fastest there is.", rich_help_panel=RUNTIME),
]
# = None
PrecisionOpt = Annotated[
    PrecisionName | None,
    typer.Option(
        "--precision",
        help="Number format of the network; auto is bf16 where the device computes it natively.",
        show_default="of the config when training, auto for detect, fp32 otherwise",
        rich_help_panel=RUNTIME,
    ),
]
# = None
BatchOpt = Annotated[
    int | None,
    typer.Option(
        "--batch",
        min=1,
        metavar="N",
        help="Pictures computed together.",
        show_default="of the config when training, else to fit the device",
        rich_help_panel=RUNTIME,
    ),
]
# = None; its own type, since only training can look for one
TrainBatchOpt = Annotated[
    str | None,
    typer.Option(
        "--batch",
        metavar="N|auto",
        help="Pictures of one training step; auto tries which is the largest that fits the device and is of use.",
        show_default="of the config",
        rich_help_panel=RUNTIME,
    ),
]
# = None
WorkersOpt = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=0,
        metavar="N",
        help="Processes that read pictures; results do not depend on it.",
        show_default="to fit the machine",
        rich_help_panel=RUNTIME,
    ),
]
# = None
SeedOpt = Annotated[
    int | None,
    typer.Option(
        "--seed",
        min=0,
        metavar="N",
        help="Every random draw derives from it.",
        show_default="of the config",
        rich_help_panel=RUNTIME,
    ),
]

# Output --------------------------------------------------------------------------------------------------------------


def out_folder(help_text: str = "Folder for everything written.", *, default: str | None = None) -> OptionInfo:
    """Make the option --out of a command that writes into a folder.

    Args:
        help_text: what the folder is.
        default: what happens without it; None says nothing.
    """
    option: OptionInfo = typer.Option(
        "--out",
        parser=read_folder,
        metavar="DIR",
        help=help_text,
        show_default=default or False,
        rich_help_panel=OUTPUT,
    )
    return option


# required where it is not optional
OutOpt = Annotated[Path, out_folder()]
# = None
OptionalOutOpt = Annotated[Path | None, out_folder(default="nothing is written")]
# = False
JsonOpt = Annotated[
    bool,
    typer.Option("--json", help="Write the result as one JSON document.", rich_help_panel=OUTPUT),
]
# = False
QuietOpt = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress and no remarks; warnings stay.", rich_help_panel=OUTPUT),
]
