"""Weights of other projects: recognised, brought into our form, and computing what their own networks compute."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import nms

from refinedet_cli.core.anchors import tile_anchors
from refinedet_cli.core.boxes import cxcywh_to_xyxy, decode
from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes
from refinedet_cli.core.detector import Detector
from refinedet_cli.core.postprocess import suppress
from refinedet_cli.core.presets import PRESETS, VOC_CLASSES
from refinedet_cli.errors import CheckpointError, UsageError
from refinedet_cli.zoo.checkpoint import file_sha256, load_detector
from refinedet_cli.zoo.importers.class_names import COCO_CLASSES, numbered
from refinedet_cli.zoo.importers.convert import Imported, convert
from refinedet_cli.zoo.importers.layouts import DETECTOR_LAYOUTS, size_in_name
from refinedet_cli.zoo.importers.weight_file import WeightFile, read_weight_file

LETTERS = numbered(("a", "b"))
SIDE = 128


@pytest.fixture(scope="module")
def others(load_script) -> Any:
    return load_script("tests/zoo/other_projects.py")


@dataclass(frozen=True)
class Case:
    """A project: how to make its weights, what they compute, and what its code does around the network."""

    project: str
    about: str
    make: Callable[[Any, int], dict[str, Tensor]]
    forward: Callable[[Any, dict[str, Tensor], Tensor, int], tuple[Tensor, ...]]
    tensors: int
    left_out: int = 0
    caffe: bool = False
    cut: bool = False
    order: str = "bgr"


CASES = {
    "luuuyi": Case(
        "luuuyi/RefineDet.PyTorch", "RefineDet with VGG-16",
        lambda o, c: o.luuuyi(c), lambda o, s, x, c: o.luuuyi_forward(s, x, c), 98, cut=True, order="rgb",
    ),
    "dd604": Case(
        "dd604/refinedet.pytorch", "RefineDet with VGG-16, deconvolutions of 3 x 3, fc6 dilated by 6",
        lambda o, c: o.dd604(c), lambda o, s, x, c: o.dd604_forward(s, x, c), 132, left_out=34,
    ),
    "dd604-resnet": Case(
        "dd604/refinedet.pytorch", "RefineDet with ResNet-101 of torchvision, no blocks before the heads, "
        "deconvolutions of 3 x 3",
        lambda o, c: o.dd604_resnet(c), lambda o, s, x, c: o.dd604_resnet_forward(s, x, c), 1192, left_out=542,
    ),
    "lzx": Case(
        "lzx1413/PytorchSSD (RefineSSD)",
        "RefineDet with VGG-16, fc6 dilated by 6, two ReLUs of the coarsest block missing",
        lambda o, c: o.lzx(c), lambda o, s, x, c: o.lzx_forward(s, x, c), 98, cut=True,
    ),
    "lzx-later": Case(
        "lzx1413/PytorchSSD (RefineDet)", "RefineDet with VGG-16, fc6 dilated by 6",
        lambda o, c: o.lzx(c, later=True), lambda o, s, x, c: o.lzx_forward(s, x, c, later=True), 98, cut=True,
    ),
    "caffe": Case(
        "sfzhang15/RefineDet (Caffe)", "RefineDet with VGG-16",
        lambda o, c: o.caffe_vgg(c), lambda o, s, x, c: o.caffe_vgg_forward(s, x, c), 98, caffe=True,
    ),
    "caffe-resnet": Case(
        "sfzhang15/RefineDet (Caffe)", "RefineDet with ResNet-101",
        lambda o, c: o.caffe_resnet(c), lambda o, s, x, c: o.caffe_resnet_forward(s, x, c), 807, caffe=True,
    ),
}  # fmt: skip


def write(path: Path, others: Any, case: Case, state: dict[str, Tensor], name: str = "") -> Path:
    if case.caffe:
        path.write_bytes(others.caffemodel(state, name))
    else:
        torch.save(state, path)
    return path


def held(state: dict[str, Tensor], name: str = "x.pth") -> WeightFile:
    """A file that was read, without the file."""
    return WeightFile(path=Path(name), kind="PyTorch", tensors=state, network="", notes=(), sha256="0" * 64)


def detector_of(done: Imported) -> Detector:
    with torch.device("meta"):
        detector = build(done.config)
    detector.network.load_state_dict(done.tensors, strict=True, assign=True)
    detector.network.eval()
    return detector


def anchors_by_hand(side: int, *, cut: bool) -> Tensor:
    """Loops over levels, rows, columns and ratios 1, 2, 1/2, as prior_box of these projects has them."""
    rows = []
    for stride, size in ((8, 32), (16, 64), (32, 128), (64, 256)):
        for i, j in itertools.product(range(side // stride), repeat=2):
            for ratio in (1, 2, 0.5):
                w, h = size * math.sqrt(ratio) / side, size / math.sqrt(ratio) / side
                rows.append([(j + 0.5) * stride / side, (i + 0.5) * stride / side, w, h])
    anchors = torch.tensor(rows)
    return anchors.clamp(min=0, max=1) if cut else anchors


def moved(offsets: Tensor, boxes: Tensor) -> Tensor:
    """Boxes as centre and size, after their offsets."""
    centre = boxes[..., :2] + offsets[..., :2] * 0.1 * boxes[..., 2:]
    return torch.cat([centre, boxes[..., 2:] * (offsets[..., 2:] * 0.2).exp()], dim=-1)


def corners(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], dim=-1)


def assert_near(found: Tensor, wanted: Tensor) -> None:
    scale = float(wanted.std())
    assert 1e-3 < scale < 1e3
    assert_close(found / scale, wanted / scale, rtol=1e-3, atol=1e-4)


# What is computed.


@pytest.mark.parametrize("key", CASES)
def test_the_network_computes_what_theirs_does(tmp_path, others, key):
    case = CASES[key]
    state = case.make(others, 3)
    path = write(tmp_path / "weights.bin", others, case, state)
    done = convert(read_weight_file(path), classes=LETTERS, size=SIDE)
    assert (done.project, done.about) == (case.project, case.about)
    assert (len(done.file.tensors), done.left_out) == (case.tensors, case.left_out)
    assert done.config.preset in PRESETS
    assert done.config.preprocess.channel_order == case.order
    pictures = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    detector = detector_of(done)
    with torch.no_grad():
        raw = detector.network(pictures)
        theirs = case.forward(others, state, pictures, 3)
    for found, wanted in zip((raw.arm_logits, raw.arm_offsets, raw.odm_logits, raw.odm_offsets), theirs, strict=True):
        assert_near(found, wanted)
        assert float(wanted.std(dim=1).min()) > 1e-3  # places differ, so an exchange of them would be seen
    anchors = anchors_by_hand(SIDE, cut=case.cut)
    ours = tile_anchors(done.config.require_anchors(), SIDE, SIDE)
    assert_close(ours, anchors)
    wanted_boxes = corners(moved(theirs[3], moved(theirs[1], anchors)))
    variances = done.config.require_anchors().variances
    found_boxes = cxcywh_to_xyxy(decode(raw.odm_offsets, decode(raw.arm_offsets, ours, variances), variances))
    assert_near(found_boxes, wanted_boxes)


@pytest.mark.parametrize(("key", "limit"), [("luuuyi", 1000), ("dd604", 400)])
def test_detections_are_theirs(others, key, limit):
    """What their code does after the network, with torchvision's NMS: by class, the best, no limit on what is kept."""
    case = CASES[key]
    state = case.make(others, 3)
    done = convert(held(state), classes=LETTERS, size=SIDE)
    pictures = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    detector = detector_of(done)
    with torch.no_grad():
        found = suppress(detector.forward(pictures), done.config.postprocess)
        arm_logits, arm_offsets, odm_logits, odm_offsets = case.forward(others, state, pictures, 3)
    boxes = corners(moved(odm_offsets, moved(arm_offsets, anchors_by_hand(SIDE, cut=case.cut))))[0]
    scores = odm_logits.softmax(-1)[0]
    scores[arm_logits.softmax(-1)[0, :, 1] <= 0.01] = 0
    wanted = []
    for label in (1, 2):
        order = scores[:, label].argsort(descending=True)[:limit]
        order = order[scores[order, label] > 0.01]
        kept = order[nms(boxes[order], scores[order, label], 0.45)]
        wanted += [(float(scores[i, label]), label, boxes[i]) for i in kept]
    wanted.sort(key=lambda one: -one[0])
    count = int(found.counts[0])
    assert count == len(wanted) > 20
    assert_close(found.scores[0, :count], torch.tensor([score for score, _, _ in wanted]), rtol=1e-3, atol=1e-4)
    assert_close(found.boxes[0, :count].sum(), torch.stack([box for _, _, box in wanted]).sum(), rtol=1e-3, atol=1e-2)


@pytest.fixture(scope="module")
def luuuyi_voc(others) -> dict[str, Tensor]:
    return others.luuuyi(21)


def test_anchors_at_320_differ_in_fifty_numbers(luuuyi_voc):
    done = convert(held(luuuyi_voc))
    plain = tile_anchors(PRESETS["refinedet320_vgg16"](VOC_CLASSES).detector.require_anchors(), 320, 320)
    cut = tile_anchors(done.config.require_anchors(), 320, 320)
    assert int((cut != plain).sum()) == 50
    assert float(cut[:, 2:].max()) == 1.0
    large = convert(held(luuuyi_voc), size=512).config
    assert large.anchors == PRESETS["refinedet512_vgg16"](VOC_CLASSES).detector.anchors
    assert large.preset == "refinedet512_vgg16"


def test_their_numbers_around_the_network(luuuyi_voc, others):
    done = convert(held(luuuyi_voc))
    assert done.config.classes == VOC_CLASSES
    post = done.config.postprocess
    assert (post.candidates, post.candidates_per, post.keep, post.nms_iou) == (1000, "class", 20_000, 0.45)
    assert (post.arm_filter, post.score_threshold) == (0.01, 0.01)
    pre = done.config.preprocess
    assert (pre.mean, pre.std, pre.channel_order) == ((123.0, 117.0, 104.0), (1.0, 1.0, 1.0), "rgb")
    official = convert(held(read_only_names(others.caffe_vgg(3))), classes=LETTERS).config.postprocess
    assert (official.candidates, official.candidates_per, official.keep) == (1000, "class", 500)


def read_only_names(net: dict[str, Tensor]) -> dict[str, Tensor]:
    """Blobs of a network without normalisation, named as reading names them."""
    kinds = {"0": "weight", "1": "bias"}
    return {f"{n.rpartition('.')[0]}.{kinds[n.rpartition('.')[2]]}": t for n, t in net.items()}


# Files.


def test_a_checkpoint_of_ours_comes_of_it(tmp_path, luuuyi_voc):
    path = tmp_path / "RefineDet512_VOC_final.pth"
    torch.save({f"module.{name}": tensor for name, tensor in luuuyi_voc.items()}, path)
    done = convert(read_weight_file(path))
    out = tmp_path / "voc.safetensors"
    done.save(out)
    loaded = load_detector(out)
    assert loaded.config == done.config
    assert loaded.config.preprocess.height == 512
    told = loaded.provenance["imported"]
    assert told["project"] == "luuuyi/RefineDet.PyTorch"
    assert (told["file"], told["sha256"]) == (path.name, file_sha256(path))
    assert "input is 512 x 512 px, by the file's name" in told["assumed"]
    assert "'module.' before every name is left out" in told["assumed"]
    assert any("those of VOC" in sentence for sentence in told["assumed"])


def test_of_two_inputs_the_same_weights(luuuyi_voc):
    assert convert(held(luuuyi_voc, "a320.pth")).tensors.keys() == convert(held(luuuyi_voc, "a512.pth")).tensors.keys()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("RefineDet512_VOC_final.pth", 512), ("refinedet_320x320.pth", 320), ("best.pth", None), ("v3200.pth", None),
        ("from320to512.pth", None), ("VGG_coco_refinedet_vgg16_512x512_iter_400000", 512),
    ],
)  # fmt: skip
def test_sizes_in_names(name, size):
    assert size_in_name(name) == size


def test_the_name_of_the_network_counts_before_that_of_the_file(tmp_path, others):
    net = others.caffe_vgg(3)
    path = tmp_path / "refinedet320.caffemodel"
    path.write_bytes(others.caffemodel(net, "VGG_coco_refinedet_vgg16_512x512_train"))
    done = convert(read_weight_file(path))
    assert done.config.preprocess.width == 512
    assert "input is 512 x 512 px, by the network's name" in done.assumed


@pytest.mark.parametrize("wrapping", ["state_dict", "model", "odd", "both"])
def test_weights_among_other_things(tmp_path, others, wrapping):
    state = others.luuuyi(3)
    whole = {"epoch": 3, "lr": 0.1, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    if wrapping == "both":
        whole |= {"ema": {n: t * 2 for n, t in state.items()}, "model": state}
    else:
        whole[wrapping] = state
    path = tmp_path / "run.pth"
    torch.save(whole, path)
    file = read_weight_file(path)
    assert torch.equal(file.tensors["vgg.0.weight"], state["vgg.0.weight"])
    place = "model" if wrapping == "both" else wrapping
    beside = ", and not from 'ema'" if wrapping == "both" else ""
    assert file.notes == (f"taken from {place!r} in the file{beside}",)


@pytest.mark.parametrize("form", ["new", "old", "unpacked", "double"])
@pytest.mark.parametrize("old", [False, True])
def test_every_form_of_a_caffemodel_says_the_same(tmp_path, others, form, old):
    net = others.caffe_vgg(3, narrow=16)
    path = tmp_path / "net.caffemodel"
    path.write_bytes(others.caffemodel(net, "narrow", form=form, old=old))
    file = read_weight_file(path)
    assert (file.kind, file.network, len(file.tensors)) == ("Caffe", "narrow", 98)
    for name, tensor in read_only_names(net).items():
        assert_close(file.tensors[name].reshape(tensor.shape), tensor, rtol=0, atol=0)


def test_old_files_of_caffe_have_sides_of_one(others):
    state = read_only_names(others.caffe_vgg(3))
    wanted = convert(held(state), classes=LETTERS)
    padded = {n: t.reshape(1, 1, 1, -1) if t.ndim == 1 else t for n, t in state.items()}
    found = convert(held(padded), classes=LETTERS)
    for name, tensor in wanted.tensors.items():
        assert torch.equal(found.tensors[name], tensor)


def test_legacy_files_and_safetensors_are_the_same_as_archives(tmp_path, others):
    state = others.dd604(3)
    paths = [tmp_path / name for name in ("zip.pth", "old.pth", "new.safetensors")]
    torch.save(state, paths[0])
    torch.save(state, paths[1], _use_new_zipfile_serialization=False)
    save_file({n: t.clone() for n, t in state.items()}, paths[2])
    done = [convert(read_weight_file(path), classes=LETTERS) for path in paths]
    for name, tensor in done[0].tensors.items():
        assert torch.equal(done[1].tensors[name], tensor)
        assert torch.equal(done[2].tensors[name], tensor)


# Classes, size, order.


def test_classes_are_guessed_by_their_number(others):
    assert convert(held(others.luuuyi(81))).config.classes == COCO_CLASSES
    done = convert(held(others.luuuyi(4)))
    assert done.config.classes.names == ("class1", "class2", "class3")
    assert any("--classes" in sentence for sentence in done.assumed)
    assert COCO_CLASSES.category_ids[-1] == 90


def test_as_many_classes_as_there_are(luuuyi_voc):
    with pytest.raises(UsageError, match=r"--classes has 2 names, and x\.pth 20 classes"):
        convert(held(luuuyi_voc), classes=LETTERS)


def test_the_order_of_colours_can_be_set(luuuyi_voc):
    done = convert(held(luuuyi_voc), channel_order="bgr")
    assert done.config.preprocess.channel_order == "bgr"
    assert "input is BGR, as asked for" in done.assumed
    assert convert(held(luuuyi_voc), channel_order="rgb").assumed == convert(held(luuuyi_voc)).assumed


# torchvision.


def test_torchvision_s_ssd_is_imported_with_the_classes_of_coco():
    from torchvision.models.detection import ssd300_vgg16

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=91).state_dict()
    done = convert(held(state))
    assert (done.project, done.config.family, len(done.config.classes)) == ("torchvision (ssd300_vgg16)", "ssd", 80)
    assert done.config.classes == COCO_CLASSES
    detector_of(done)
    other = Classes(names=tuple(map(str, range(90))), category_ids=tuple(range(90)))
    assert convert(held(state), classes=other).config.classes == other
    with pytest.raises(UsageError, match="for 300 px alone"):
        convert(held(state), size=320)
    head = "head.classification_head.module_list.{}.weight"
    for name in (
        head.format(0),
        head.format(5),
        "head.regression_head.module_list.2.bias",
        "backbone.features.0.weight",
    ):
        for wrong in (torch.tensor(1.0), torch.zeros(7), torch.zeros(364, 1, 3, 3)):
            with pytest.raises(CheckpointError, match=r"^x\.pth: .*ssd300_vgg16"):
                convert(held(state | {name: wrong}))


# ssd.pytorch.


@pytest.mark.parametrize(("classes", "sizes"), [
    (21, (30, 60, 111, 162, 213, 264, 315)), (3, (21, 45, 99, 153, 207, 261, 315)),
])  # fmt: skip
def test_the_ssd_computes_what_ssd_pytorch_does(others, classes, sizes):
    state = others.ssd(classes)
    done = convert(held(state))
    assert (done.project, done.config.family, done.config.preprocess.height) == ("amdegroot/ssd.pytorch", "ssd", 300)
    assert done.config.preprocess.channel_order == "rgb"
    rows = []
    for side, step, (small, large), ratios in zip(
        (38, 19, 10, 5, 3, 1), (8, 16, 32, 64, 100, 300), itertools.pairwise(sizes),
        ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)), strict=True,
    ):  # fmt: skip
        for i, j in itertools.product(range(side), repeat=2):
            shapes = [(small, small), (math.sqrt(small * large),) * 2]
            for ratio in ratios:
                shapes += [(small * math.sqrt(ratio), small / math.sqrt(ratio))]
                shapes += [(small / math.sqrt(ratio), small * math.sqrt(ratio))]
            rows += [[(j + 0.5) * step / 300, (i + 0.5) * step / 300, w / 300, h / 300] for w, h in shapes]
    assert len(rows) == 8732
    ours = tile_anchors(done.config.require_anchors(), 300, 300)
    theirs = torch.tensor(rows).clamp(min=0, max=1)
    assert_close(torch.cat([ours[:, :2].clamp(max=1), ours[:, 2:]], dim=1), theirs)
    assert int((ours[:, :2] > 1).sum()) == 120  # the one difference, which is said
    assert float(ours[:, :2].max()) == pytest.approx(304 / 300)
    assert any("120 of 8,732 anchors" in sentence for sentence in done.assumed)
    if classes == 3:
        picture = torch.randn(1, 3, 300, 300, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            raw = detector_of(done).network(picture)
            logits, offsets = others.ssd_forward(state, picture, classes)
        assert_near(raw.logits, logits)
        assert_near(raw.offsets, offsets)
    with pytest.raises(UsageError, match="for 300 px alone"):
        convert(held(state), size=512)


# What is refused.


def refusal(state: dict[str, Tensor], **how: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        convert(held(state), **how)
    assert caught.value.hint
    return caught.value


def test_the_plus_plus_network_is_refused_with_the_reason(others):
    state = {n: t for n, t in others.luuuyi(3, narrow=16).items() if not n.startswith("odm")}
    error = refusal(state | {"adm_loc1.0.weight": torch.zeros(4, 16, 3, 3)})
    assert "RefineDet++" in error.message
    assert "deformable" in error.message


def test_vgg_with_normalisation_is_refused_with_the_reason(others):
    state = others.luuuyi(3, narrow=16) | {"vgg.1.running_mean": torch.zeros(4)}
    assert "batch normalisation" in refusal(state).message


@pytest.mark.parametrize(
    ("names", "backbone", "preset"),
    [
        (("0.weight", "33.weight"), "vgg16", "refinedet320_vgg16"),
        (("features.0.weight", "classifier.0.weight"), "vgg16", "refinedet320_vgg16"),
        (("conv1.weight", "layer1.0.conv1.weight"), "resnet18", "refinedet320_resnet18"),
        (("conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv3.weight"), "resnet50", "refinedet320_resnet50"),
    ],
)
def test_a_backbone_alone_is_told_where_it_is_taken(names, backbone, preset):
    error = refusal({name: torch.zeros(1) for name in names})
    assert f"a backbone ({backbone}), not a detector" in error.message
    assert error.hint == f"refinedet train --data DATA --preset {preset} --backbone-weights x.pth"


def test_an_unknown_file_is_described():
    state = {
        "stem.conv.weight": torch.zeros(8, 3, 3, 3),
        "stem.bn.weight": torch.zeros(8),
        "head.fc.bias": torch.zeros(4),
    }
    error = refusal(state)
    assert error.message == (
        "x.pth: weights of no detector that is known. It holds 3 tensors in 2 groups (head, stem), beginning with "
        "stem.conv.weight [8 x 3 x 3 x 3], stem.bn.weight [8], head.fc.bias [4]"
    )
    assert (error.hint or "").startswith(
        "no tensor has a name of any known detector; known are luuuyi/RefineDet.PyTorch, "
    )


def test_what_is_nearly_known_is_named(others):
    state = others.luuuyi(3, narrow=16)
    del state["tcb0.0.weight"]
    hint = refusal(state).hint or ""
    assert "nearest is luuuyi/RefineDet.PyTorch (RefineDet with VGG-16): 97 of its 98 names are there" in hint
    assert "tcb0.0.weight is not" in hint


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("missing", "but 1 tensor is missing, such as tcb2.10.bias"),
        ("surplus", "but 1 tensor has no place, such as vgg.99.weight"),
        (
            "shape",
            "but 1 tensor has another shape, such as extras.1.weight, 512 x 256 x 1 x 1 instead of 512 x 256 x 3 x 3",
        ),
        ("head", "but 1 tensor is missing, such as odm_conf.2.weight"),
        ("anchors", "but odm_loc.0 has 20 outputs and odm_conf.0 15"),
        ("nan", "backbone.conv1.0.0.weight is not finite"),
        ("scalar head", "but 1 tensor is missing, such as odm_conf.3.weight"),
        ("scalar first head", "but its detection heads are not whole"),
        ("whole numbers", "but vgg.0.bias holds numbers of torch.int64"),
    ],
)
def test_an_altered_network_is_refused(others, fault, says):
    state = others.luuuyi(3)
    if fault == "missing":
        del state["tcb2.10.bias"]
    elif fault == "surplus":
        state["vgg.99.weight"] = torch.zeros(3)
    elif fault == "shape":
        state["extras.1.weight"] = state["extras.1.weight"][..., :1, :1]
    elif fault == "head":
        state["odm_conf.2.weight"] = state["odm_conf.2.weight"][:-1]
    elif fault == "scalar head":
        state["odm_conf.3.weight"] = state["odm_loc.3.weight"] = torch.tensor(1.0)
    elif fault == "scalar first head":
        state["odm_conf.0.weight"] = torch.tensor(1.0)
    elif fault == "whole numbers":
        state["vgg.0.bias"] = state["vgg.0.bias"].long()
    elif fault == "anchors":
        state["odm_loc.0.weight"], state["odm_conf.0.weight"] = torch.zeros(20, 256, 3, 3), torch.zeros(15, 256, 3, 3)
    else:
        state["vgg.0.weight"][3, 1, 0, 2] = torch.nan
    with pytest.raises(CheckpointError) as caught:
        convert(held(state), classes=LETTERS)
    assert says in caught.value.message


def test_repeated_tensors_have_to_be_equal(others):
    state = others.dd604(3)
    state["layer1.0.weight"] = state["layer1.0.weight"] + 1
    assert "layer1.0.weight, which should repeat another tensor, does not" in refusal(state, classes=LETTERS).message


def test_weights_of_this_tool_need_no_import(root):
    with pytest.raises(CheckpointError, match="weights of this tool, which need no import"):
        read_weight_file(next((root / "weights").glob("*.safetensors")))


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (b"", "a.pth", "the file is empty"),
        (b"not weights at all, but some text", "a.pth", "no kind of file that is known: it begins with 6e 6f 74 20"),
        (b"not weights at all, but some text", "a.caffemodel", "not a readable caffemodel"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "a.caffemodel.h5", "an HDF5 file, which is not read"),
        (b"\x0a\x03abc", "a.caffemodel", "no weights in it"),
    ],
)
def test_files_of_other_kinds(tmp_path, content, name, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_weight_file(path)
    assert caught.value.message.startswith(f"{path}: {says}")


def test_every_layout_differs_from_every_other():
    for one, other in itertools.permutations(DETECTOR_LAYOUTS, 2):
        assert not set(other.signs) <= {f"{name}.weight" for name in one.layers.values()}
    assert all(one.config(LETTERS, one.size or 320).classes == LETTERS for one in DETECTOR_LAYOUTS)
