"""From someone else's weights to a checkpoint of ours that computes the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from refinedet_cli import __version__
from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes, DetectorConfig
from refinedet_cli.core.presets import VOC_CLASSES
from refinedet_cli.core.words import counted
from refinedet_cli.errors import CheckpointError, UsageError
from refinedet_cli.zoo.backbone_layouts import BACKBONE_LAYOUTS, find_layout
from refinedet_cli.zoo.checkpoint import save_checkpoint
from refinedet_cli.zoo.importers import torchvision_ssd
from refinedet_cli.zoo.importers.class_names import COCO_CLASSES, guessed_classes
from refinedet_cli.zoo.importers.layouts import DETECTOR_LAYOUTS, DetectorLayout, size_in_name
from refinedet_cli.zoo.importers.weight_file import WeightFile

_DEFAULT_SIZE = 320
_COUNTER = "num_batches_tracked"
_SSD = "torchvision (ssd300_vgg16)"
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """Weights in our form.

    Attributes:
        project: whose they were.
        about: their network, for people.
        config: of the detector that computes what theirs does.
        tensors: its state, float32.
        left_out: how many tensors of the file are not among them.
        assumed: what is not in the file, one sentence each.
        file: where they came from.
    """

    project: str
    about: str
    config: DetectorConfig
    tensors: Mapping[str, Tensor]
    left_out: int
    assumed: tuple[str, ...]
    file: WeightFile

    @property
    def provenance(self) -> dict[str, Any]:
        """What a checkpoint records of its origin."""
        return {
            "preset": self.config.preset,
            "imported": {
                "tool_version": __version__,
                "project": self.project,
                "network": self.about,
                "file": self.file.path.name,
                "sha256": self.file.sha256,
                "tensors": len(self.file.tensors),
                "tensors_left_out": self.left_out,
                "assumed": list(self.assumed),
            },
        }

    def save(self, path: Path) -> None:
        """Write the checkpoint, whole.

        Raises:
            CheckpointError: a weight is not finite.
            OSError: the file system refused.
        """
        save_checkpoint(path, self.config, self.tensors, self.provenance)


def convert(
    file: WeightFile,
    *,
    classes: Classes | None = None,
    size: int | None = None,
    channel_order: Literal["rgb", "bgr"] | None = None,
) -> Imported:
    """Recognise weights and bring them into our form.

    Args:
        file: what `read_weight_file` has read.
        classes: of the detector, in the order of its outputs, without background; None takes those of VOC for 20 and of
            COCO for 80, else numbers them.
        size: side of its input in px, a multiple of 64; None goes by the name of the file or network, else 320.
        channel_order: of its input; None goes by what the project's code feeds.

    Returns:
        `Imported`; every tensor of the file is used, or counted in ``left_out``.

    Raises:
        CheckpointError: the weights are of no known detector, or of one that is not the known one throughout.
        UsageError: there are not as many classes as the weights have, or they are for one input size alone.
    """
    if file.tensors.keys() >= set(torchvision_ssd.SIGNS):
        done = _ssd(file, classes, size)
    else:
        layout = next((one for one in DETECTOR_LAYOUTS if file.tensors.keys() >= set(one.signs)), None)
        _refuse_relatives(file)
        if layout is None:
            raise _unknown(file)
        done = _refinedet(file, layout, classes, size)
    unusable = next((n for n, t in done.tensors.items() if not bool(t.isfinite().all())), None)
    if unusable is not None:
        raise CheckpointError(f"{file.path}: {unusable} is not finite", "the file is damaged; get it again")
    if channel_order is None or channel_order == done.config.preprocess.channel_order:
        return done
    config = replace(done.config, preprocess=replace(done.config.preprocess, channel_order=channel_order))
    return replace(done, config=config, assumed=(*done.assumed, f"input is {channel_order.upper()}, as asked for"))


# RefineDet -----------------------------------------------------------------------------------------------------------


def _refinedet(file: WeightFile, layout: DetectorLayout, classes: Classes | None, size: int | None) -> Imported:
    outputs = _count_classes(file, layout)
    classes, about_classes = _classes(file, classes, outputs - 1)
    side, about_size = _side(file, size, layout)
    config = layout.config(classes, side)
    own = {
        name: tensor for name, tensor in file.tensors.items() if not name.startswith((*layout.repeated, *layout.unused))
    }
    _check_repeated(file, layout)
    given = _renamed(layout, own)
    fault = _fault(given, _state(config), layout)
    if fault is not None:
        raise CheckpointError(
            f"{file.path}: looks like {layout.project} ({layout.about}), but {fault}",
            "is the file whole, and of an unchanged network?",
        )
    return Imported(
        project=layout.project,
        about=layout.about,
        config=config,
        tensors=given,
        left_out=len(file.tensors) - len(own),
        assumed=(*file.notes, *about_size, *about_classes, *layout.assumed),
        file=file,
    )


def _count_classes(file: WeightFile, layout: DetectorLayout) -> int:
    """Count the outputs of a box; there are as many anchors a cell as in the project's own networks."""
    head, anchors = layout.heads[layout.first_head], layout.anchors_of_a_cell
    logits, offsets = (file.tensors.get(f"{name}.weight") for name in head)
    if logits is None or offsets is None or logits.ndim != 4 or offsets.ndim != 4:
        raise CheckpointError(f"{file.path}: looks like {layout.project}, but its detection heads are not whole")
    if len(offsets) != 4 * anchors or len(logits) % anchors or len(logits) < 2 * anchors:
        raise CheckpointError(
            f"{file.path}: looks like {layout.project}, but {head.offsets} has {len(offsets)} outputs and "
            f"{head.logits} {len(logits)}",
            f"only the project's own {anchors} anchors a cell can be imported: the file does not tell which others are",
        )
    return len(logits) // anchors


def _classes(file: WeightFile, classes: Classes | None, number: int) -> tuple[Classes, tuple[str, ...]]:
    if classes is None:
        guessed, note = guessed_classes(number)
        return guessed, (note,)
    if len(classes) != number:
        raise UsageError(
            f"--classes has {counted(len(classes), 'name')}, and {file.path} {counted(number, 'class', 'classes')}",
            "name the classes that it was trained on, in their order and without background",
        )
    return classes, ()


def _side(file: WeightFile, size: int | None, layout: DetectorLayout) -> tuple[int, tuple[str, ...]]:
    if layout.size is not None:
        if size not in (None, layout.size):
            raise _other_size(size, layout.project, layout.size)
        return layout.size, ()
    if size is not None:
        return size, ()
    for what, name in (("the network's name", file.network), ("the file's name", file.path.name)):
        found = size_in_name(name)
        if found is not None:
            return found, (f"input is {found} x {found} px, by {what}",)
    return _DEFAULT_SIZE, (
        f"input is {_DEFAULT_SIZE} x {_DEFAULT_SIZE} px, for no name tells it: --size gives another",
    )


def _other_size(size: int | None, project: str, only: int) -> UsageError:
    return UsageError(f"--size {size}: these weights, {project}, are for {only} px alone", "leave --size out")


def _check_repeated(file: WeightFile, layout: DetectorLayout) -> None:
    """Demand of tensors that are in the file twice to be equal, by the memory that they share or by their numbers."""
    by_place = {tensor.data_ptr() for name, tensor in file.tensors.items() if not name.startswith(layout.repeated)}
    strangers = [
        (name, tensor)
        for name, tensor in file.tensors.items()
        if layout.repeated and name.startswith(layout.repeated) and tensor.data_ptr() not in by_place
    ]
    for name, tensor in strangers:
        same_shape = (
            t for n, t in file.tensors.items() if not n.startswith(layout.repeated) and t.shape == tensor.shape
        )
        if not any(torch.equal(tensor, other) for other in same_shape):
            raise CheckpointError(
                f"{file.path}: looks like {layout.project}, but {name}, which should repeat another tensor, does not",
                "is the file whole, and of an unchanged network?",
            )


def _renamed(layout: DetectorLayout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors our names, and heads our form; what has no place keeps its name."""
    left = dict(tensors)
    given: dict[str, Tensor] = {}
    for ours, theirs in layout.layers.items():
        for kind in ("weight", "bias", *_STATISTICS, _COUNTER):
            if f"{theirs}.{kind}" in left:
                tensor = left.pop(f"{theirs}.{kind}")
                given[f"{ours}.{kind}"] = tensor.float() if tensor.is_floating_point() else tensor
    for ours, head in layout.heads.items():
        for kind in ("weight", "bias"):
            parts = [left.pop(f"{name}.{kind}", None) for name in head]
            if parts[0] is not None and parts[1] is not None:
                # Old files of Caffe have biases of four sides.
                joined = _joined(*(part.flatten() if kind == "bias" else part for part in parts if part is not None))
                given |= {f"{ours}.{kind}": joined} if joined is not None else {}
    return _folded(given) | {f"?{name}": tensor for name, tensor in left.items()}


def _joined(logits: Tensor, offsets: Tensor) -> Tensor | None:
    """Make one head of two: for each anchor its logits, then its offsets; None if they are not of one kind."""
    if not logits.ndim or not offsets.ndim or logits.shape[1:] != offsets.shape[1:]:
        return None
    anchors = len(offsets) // 4
    if not anchors or len(logits) % anchors or len(offsets) % 4:
        return None
    of_anchor = [part.float().unflatten(0, (anchors, -1)) for part in (logits, offsets)]
    return torch.cat(of_anchor, dim=1).flatten(0, 1)


def _folded(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move the bias of a convolution that batch normalisation follows into its mean: both only shift."""
    for name in [n for n in given if n.endswith(".0.bias")]:
        mean = name.removesuffix("0.bias") + "1.running_mean"
        if mean in given and given[mean].shape == given[name].shape:
            given[mean] = given[mean] - given.pop(name)
    return given


@lru_cache(maxsize=8)
def _state(config: DetectorConfig) -> dict[str, Tensor]:
    """Tell names and shapes of a detector's tensors, without the tensors."""
    with torch.device("meta"):
        return build(config).network.state_dict()


def _theirs(layout: DetectorLayout | None, ours: str) -> str:
    """Name one of our tensors as its file does; a head by its logits."""
    layer, _, kind = ours.rpartition(".")
    if layout is None or ours.startswith("?"):
        return ours.removeprefix("?")
    return f"{layout.heads[layer].logits if layer in layout.heads else layout.layers.get(layer, layer)}.{kind}"


def _fault(given: dict[str, Tensor], wanted: Mapping[str, Tensor], layout: DetectorLayout | None) -> str | None:
    """Say in what tensors differ from those of the detector; None if they are just these, once they are mended.

    Counters of batch normalisation may be missing, and left-hand sides of 1 be too many, as in old files of Caffe.
    """
    for name, tensor in wanted.items():
        if name.endswith(_COUNTER) and name not in given:
            given[name] = torch.zeros((), dtype=torch.int64)
        if name in given and given[name].shape != tensor.shape:
            shape = given[name].shape
            extra = len(shape) - tensor.ndim
            if extra > 0 and shape[extra:] == tensor.shape and set(shape[:extra]) == {1}:
                given[name] = given[name].reshape(tensor.shape)
    missing = [name for name in wanted if name not in given]
    if missing:
        return f"{counted(len(missing), 'tensor is', 'tensors are')} missing, such as {_theirs(layout, missing[0])}"
    surplus = [name for name in given if name not in wanted]
    if surplus:
        return f"{counted(len(surplus), 'tensor has', 'tensors have')} no place, such as {_theirs(layout, surplus[0])}"
    odd = [name for name, tensor in given.items() if tensor.shape != wanted[name].shape]
    if odd:
        has, wants = (" x ".join(map(str, t.shape)) or "a number" for t in (given[odd[0]], wanted[odd[0]]))
        which = f"such as {_theirs(layout, odd[0])}, {has} instead of {wants}"
        return f"{counted(len(odd), 'tensor has another shape', 'tensors have other shapes')}, {which}"
    strange = next((n for n, t in given.items() if t.is_floating_point() != wanted[n].is_floating_point()), None)
    return f"{_theirs(layout, strange)} holds numbers of {given[strange].dtype}" if strange is not None else None


# Others --------------------------------------------------------------------------------------------------------------


def _ssd(file: WeightFile, classes: Classes | None, size: int | None) -> Imported:
    side = torchvision_ssd.PREPROCESS.height
    if size not in (None, side):
        raise _other_size(size, _SSD, side)
    try:
        outputs = torchvision_ssd.count_classes(file.tensors)
    except (CheckpointError, TypeError) as error:  # the second where a head is a single number
        reason = (
            error.message if isinstance(error, CheckpointError) else f"looks like {_SSD}, but a head has no outputs"
        )
        raise CheckpointError(f"{file.path}: {reason}", "is the file whole, and of that very network?") from None
    labels, assumed = None, list(file.notes)
    if outputs == COCO_CLASSES.category_ids[-1] + 1 and classes in (None, COCO_CLASSES):
        classes, labels = COCO_CLASSES, COCO_CLASSES.category_ids
        assumed.append(
            "the 80 classes are those of COCO (by their number); outputs of ids that it leaves out are dropped"
        )
    else:
        classes, notes = _classes(file, classes, outputs - 1)
        assumed += notes
    config = torchvision_ssd.torchvision_config(classes)
    try:
        given = torchvision_ssd.convert_ssd300(file.tensors, labels)
        fault = _fault(given, _state(config), None)
    except (IndexError, RuntimeError, TypeError):  # which is how heads of other shapes show
        fault = "its heads have other shapes"
    if fault is not None:
        raise CheckpointError(f"{file.path}: looks like {_SSD}, but {fault}", "is the file whole?")
    return Imported(
        project=_SSD,
        about="SSD300 with VGG-16",
        config=config,
        tensors=given,
        left_out=0,
        assumed=tuple(assumed),
        file=file,
    )


def _refuse_relatives(file: WeightFile) -> None:
    """Refuse what is near to a known detector and computes something else, with the reason."""
    names = file.tensors.keys()
    if any(name.startswith("adm_loc") for name in names):
        raise CheckpointError(
            f"{file.path}: RefineDet++, whose detection heads are deformable convolutions, one for each anchor; "
            "there is no such network here",
            "import a RefineDet without ++",
        )
    if {"vgg.1.running_mean", "tcb0.0.weight"} <= names:
        raise CheckpointError(
            f"{file.path}: a RefineDet whose VGG-16 has batch normalisation (refinedet_bn); there is no such network "
            "here",
            "import a RefineDet with the plain VGG-16",
        )
    backbone = _backbone(set(names))
    if backbone is not None:
        raise CheckpointError(
            f"{file.path}: a backbone ({backbone}), not a detector: it needs training first, and no import",
            f"refinedet train --data DATA --preset {_PRESET_OF[backbone]} --backbone-weights {file.path}",
        )


def _backbone(names: set[str]) -> str | None:
    found = next((b for b in BACKBONE_LAYOUTS if find_layout(names, b) is not None), None)
    if found is None or not found.startswith("resnet") or "layer1.0.conv3.weight" not in names:
        return found
    return "resnet101" if "layer3.22.conv3.weight" in names else "resnet50"


_PRESET_OF = {
    "vgg16": "refinedet320_vgg16",
    "mobilenet_v2": "refinedet320_mobilenetv2",
    "resnet18": "refinedet320_resnet18",
    "resnet50": "refinedet320_resnet50",
    "resnet101": "refinedet320_resnet101",
}


def _unknown(file: WeightFile) -> CheckpointError:
    """Describe a file that nothing here can read, and what comes nearest to it."""
    names = list(file.tensors)
    shown = ", ".join(f"{n[:60]} [{' x '.join(map(str, file.tensors[n].shape))}]" for n in names[:3])
    families = sorted({name.partition(".")[0][:30] for name in names})
    message = (
        f"{file.path}: weights of no detector that is known. It holds {counted(len(names), 'tensor')} in "
        f"{counted(len(families), 'group')} ({', '.join(families[:8])}{', ...' if len(families) > 8 else ''}), "
        f"beginning with {shown}"
    )
    known = ", ".join(dict.fromkeys([*(layout.project for layout in DETECTOR_LAYOUTS), _SSD]))
    return CheckpointError(message, f"{_nearest(names)}; known are {known}")


def _nearest(names: list[str]) -> str:
    layouts = [(layout, _names_of(layout)) for layout in DETECTOR_LAYOUTS]
    layout, wanted = max(layouts, key=lambda pair: len(pair[1] & set(names)) / len(pair[1]))
    shared = wanted & set(names)
    if not shared:
        return "no tensor has a name of any known detector"
    missing = sorted(wanted - shared)
    return f"nearest is {layout.project} ({layout.about}): {len(shared)} of its {len(wanted)} names are there" + (
        f", {missing[0]} is not" if missing else ""
    )


def _names_of(layout: DetectorLayout) -> set[str]:
    """Name the tensors that a layout's file holds, but for repeated ones and counters."""
    wanted = set()
    for name in _state(layout.config(VOC_CLASSES, layout.size or _DEFAULT_SIZE)):
        ours, _, kind = name.rpartition(".")
        theirs = layout.heads[ours] if ours in layout.heads else (layout.layers[ours],)
        wanted |= {f"{their}.{kind}" for their in theirs if kind != _COUNTER}
    return wanted
