"""The parts that are exported, run eagerly, against the code that a checkpoint runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from refinedet_cli.core.config import Classes, DetectorConfig, PreprocessConfig
from refinedet_cli.core.deployed import (
    DeployedCandidates,
    DeployedDetector,
    DeployedNetwork,
    KeepByClass,
    class_nms,
    keep_in_loop,
)
from refinedet_cli.core.detector import Detector
from refinedet_cli.core.postprocess import greedy_keep, suppress, to_detections
from refinedet_cli.core.preprocess import preprocess, preprocess_batch
from refinedet_cli.core.presets import tiny
from refinedet_cli.core.structures import Candidates, Detections
from refinedet_cli.zoo.checkpoint import load_detector

CONFIG = tiny(Classes(names=tuple("abcde"), category_ids=(1, 2, 3, 5, 9))).detector
SIZES = ((1, 1), (1, 300), (97, 3), (64, 64), (50, 75), (333, 129))


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels)


def variant(*, arm: bool = True, per: str = "picture", keep: int = 200, candidates: int = 400) -> DetectorConfig:
    return replace(
        CONFIG,
        network=replace(CONFIG.network, arm=arm),
        postprocess=replace(CONFIG.postprocess, candidates_per=per, keep=keep, candidates=candidates),
    )


@pytest.fixture(autouse=True)
def _uncompiled():
    """Called eagerly, `torch.while_loop` would compile itself for every shape, which takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def detectors(tmp_path_factory, save_spread) -> Callable[..., Detector]:
    """A seeded detector, by the arguments of `variant`; those with an ARM have the same weights."""
    folder = tmp_path_factory.mktemp("weights")

    def load(*, arm: bool = True, **others) -> Detector:
        path = folder / f"arm-{arm}.safetensors"
        if not path.exists():
            save_spread(path, variant(arm=arm))
        detector = load_detector(path).detector
        config = variant(arm=arm, **others)
        return replace(detector, config=config, decoder=type(detector.decoder)(config))

    return load


# --- preprocessing


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_batch_is_preprocessed_as_its_pictures_are(size, order):
    config = PreprocessConfig(
        height=64, width=128, mean=(120.0, 90.0, 60.0), std=(50.0, 60.0, 70.0), channel_order=order
    )
    images = pictures(3, *size)
    expected = torch.stack([preprocess(image, config) for image in images])
    found = preprocess_batch(images, config)
    assert (found.dtype, found.shape) == (torch.float32, (3, 3, 64, 128))
    assert_close(found, expected, rtol=0, atol=1e-5)
    assert len(expected.flatten(1).unique(dim=0)) == 3


# --- the whole detector


def ordinary(detector: Detector, images: Tensor) -> list[Detections]:
    """The way of a checkpoint: each picture on its own."""
    found = []
    with torch.no_grad():
        for image in images:
            raw = detector.network(preprocess(image, detector.config.preprocess)[None])
            best = suppress(detector.decoder(raw), detector.config.postprocess)
            found += to_detections(best, [tuple(image.shape[:2])])
    return found


def keeper_of(name: str, config: DetectorConfig):
    return {"loop": keep_in_loop, "class": KeepByClass(config)}[name]


@pytest.mark.parametrize("keeper", ["loop", "class"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per": "class"},
        {"arm": False},
        {"keep": 20},
        {"candidates": 60},
        {"per": "class", "candidates": 30, "keep": 60},
    ],
    ids=str,
)
def test_the_deployed_detector_finds_what_the_checkpoint_finds(detectors, options, keeper, assert_same):
    detector = detectors(**options)
    module = DeployedDetector(detector, keeper_of(keeper, detector.config))
    post = detector.config.postprocess
    places = min(post.keep, post.candidates * (5 if post.candidates_per == "class" else 1))
    for size in ((37, 90), (1, 1)):
        images = pictures(2, *size)
        boxes, scores, labels, counts = module(images)
        assert (boxes.dtype, scores.dtype) == (torch.float32, torch.float32)
        assert (labels.dtype, counts.dtype) == (torch.int64, torch.int64)
        assert boxes.shape == (2, places, 4)
        assert labels.shape == scores.shape == boxes.shape[:2]
        expected = ordinary(detector, images)
        assert min(map(len, expected)) >= 20
        for i, count in enumerate(counts.tolist()):
            assert_same(Detections(boxes[i, :count], scores[i, :count], labels[i, :count]), expected[i])
            for rest in (boxes, scores, labels):
                assert not rest[i, count:].any()


def test_a_network_that_finds_nothing_gives_zeros(detectors):
    detector = detectors()
    silent = replace(detector.config, postprocess=replace(detector.config.postprocess, score_threshold=1.0))
    detector = replace(detector, config=silent, decoder=type(detector.decoder)(silent))
    for keeper in (keep_in_loop, KeepByClass(silent)):
        for output in DeployedDetector(detector, keeper)(pictures(2, 40, 40)):
            assert not output.any()


class FixedDecoder:
    """Stands in for a decoder: gives the same candidates whatever the network says."""

    def __init__(self, candidates: Candidates) -> None:
        self.candidates = candidates

    def __call__(self, raw: object) -> Candidates:
        return self.candidates


OUTSIDE = ((1.0, 0.0, 1.5, 1.0), (-1.0, -1.0, 0.0, 0.5), (0.2, 0.2, 0.2, 0.8), (0.1, 1.2, 0.4, 3.0))
INSIDE = ((0.25, 0.5, 0.75, 1.0), (-0.5, -0.25, 0.5, 2.0), (0.6, 0.1, 0.9, 0.4))


@pytest.mark.parametrize("keeper", ["loop", "class"])
def test_gaps_of_boxes_outside_the_picture_are_closed(detectors, keeper):
    rows = [OUTSIDE[0], INSIDE[0], OUTSIDE[1], OUTSIDE[2], INSIDE[1], OUTSIDE[3], INSIDE[2], INSIDE[2]]
    first = torch.tensor(rows)
    second = torch.tensor([OUTSIDE[1]] * 8)
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.0]).expand(2, 1, 8)
    labels = torch.tensor([1, 2, 1, 3, 1, 4, 5, 1]).expand(2, 1, 8)
    candidates = Candidates(torch.stack([first, second])[:, None], scores, labels)
    detector = replace(detectors(keep=7), decoder=FixedDecoder(candidates))
    boxes, found, classes, counts = DeployedDetector(detector, keeper_of(keeper, detector.config))(
        pictures(2, 100, 200)
    )
    assert counts.tolist() == [3, 0]
    expected = torch.tensor([[50.0, 50, 150, 100], [0, 0, 100, 100], [120, 10, 180, 40]])
    assert_close(boxes[0, :3], expected, rtol=0, atol=1e-4)
    assert_close(found[0], torch.tensor([0.8, 0.5, 0.3, 0, 0, 0, 0]), rtol=0, atol=0)
    assert classes[0].tolist() == [2, 1, 5, 0, 0, 0, 0]
    assert not boxes[0, 3:].any()
    for output in (boxes, found, classes):
        assert not output[1].any()


def test_the_network_alone_is_rounded(detectors):
    detector = detectors()
    expected = ordinary(detector, pictures(1, 64, 64))[0]
    module = DeployedDetector(detector, keep_in_loop, torch.float16)
    assert {p.dtype for p in module.network.parameters()} == {torch.float16}
    boxes, scores, _, counts = module(pictures(1, 64, 64))
    assert (boxes.dtype, scores.dtype) == (torch.float32, torch.float32)
    assert abs(int(counts) - len(expected)) <= 0.1 * len(expected)
    assert_close(scores[0, :10], expected.scores[:10], rtol=0, atol=0.05)


# --- suppression


def clusters(generator: torch.Generator, places: int) -> Tensor:
    centres = torch.rand(max(1, places // 6), 2, generator=generator)
    low = centres[torch.randint(0, len(centres), (places,), generator=generator)]
    low = low + 0.05 * torch.randn(places, 2, generator=generator)
    return torch.cat([low, low + 0.05 + 0.3 * torch.rand(places, 2, generator=generator)], dim=1)


def grid(generator: torch.Generator, places: int) -> Tensor:
    """Overlaps are exact, repeat and hit thresholds; some boxes are without area."""
    low = torch.randint(0, 8, (places, 2), generator=generator)
    return torch.cat([low, low + torch.randint(0, 6, (places, 2), generator=generator)], dim=1) / 8


def chain(generator: torch.Generator, places: int) -> Tensor:
    """Each box overlaps only its neighbours by more than 0.45, so that a decision runs from end to end."""
    left = torch.arange(places) / 4
    return torch.stack([left, torch.zeros(places), left + 1, torch.ones(places)], dim=1)


def random_rows(seed: int, rows: int, draw: Callable[[torch.Generator, int], Tensor], places: int, classes: int):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.stack([draw(generator, places) for _ in range(rows)])
    scores = torch.rand(rows, places, generator=generator).clamp(min=0.01)
    if seed % 2:
        scores = (scores * 4).ceil() / 4
    scores = scores.sort(descending=True).values
    for i in range(rows):  # every third row is full
        scores[i, places - (i % 3) * places // 4 :] = 0
    return boxes, scores, torch.randint(1, classes + 1, (rows, places), generator=generator)


CASES = [
    (draw, places, classes, limit)
    for draw in (clusters, grid)
    for places, classes in ((1, 1), (2, 1), (9, 2), (40, 3))
    for limit in (0.0, 0.45, 0.5, 1.0)
]


@pytest.mark.parametrize(("draw", "places", "classes", "limit"), [*CASES, (chain, 60, 1, 0.45)])
def test_both_forms_of_suppression_are_greedy(draw, places, classes, limit):
    config = replace(CONFIG, postprocess=replace(CONFIG.postprocess, nms_iou=limit))
    for seed in range(2):
        boxes, scores, labels = random_rows(seed, 6, draw, places, classes)
        expected = greedy_keep(boxes, scores, labels, limit)
        assert_close(keep_in_loop(boxes, scores, labels, limit), expected, rtol=0, atol=0)
        assert_close(KeepByClass(config)(boxes, scores, labels, limit), expected, rtol=0, atol=0)
    if draw is chain:
        assert expected[0].tolist() == [i % 2 == 0 for i in range(places)]


def test_with_one_class_a_row_labels_decide_nothing():
    per_class = KeepByClass(variant(per="class"))
    boxes, scores, labels = random_rows(0, 5, clusters, 40, 1)
    expected = greedy_keep(boxes, scores, labels, 0.45)
    assert 0 < int(expected.sum()) < int((scores > 0).sum())
    labels = torch.arange(1, 6)[:, None].expand_as(labels)
    assert_close(per_class(boxes, scores, labels, 0.45), expected, rtol=0, atol=0)


@pytest.mark.parametrize("places", [1, 30])
def test_class_nms_keeps_the_rules_of_custom_operators(places):
    boxes, scores, _ = random_rows(0, 2, clusters, places, 1)
    spread = torch.stack([scores, torch.zeros_like(scores)], dim=1)
    torch.library.opcheck(class_nms, (boxes, spread, 0.45))


# --- the other contents


@pytest.mark.parametrize("per", ["picture", "class"])
def test_candidates_lead_to_the_same_detections(detectors, per, assert_same):
    detector = detectors(per=per, candidates=150)
    images = pictures(2, 50, 80)
    boxes, scores = DeployedCandidates(detector)(images)
    groups = 5 if per == "class" else 1
    assert boxes.shape == (2, groups * 150, 4)
    assert scores.shape == (2, groups * 150, 5)
    assert ((scores > 0).sum(dim=2) <= 1).all()
    best = scores.max(dim=2)
    candidates = Candidates(
        boxes=(boxes / torch.tensor([80, 50, 80, 50])).unflatten(1, (groups, 150)),
        scores=best.values.unflatten(1, (groups, 150)),
        labels=best.indices.unflatten(1, (groups, 150)) + 1,
    )
    found = to_detections(suppress(candidates, detector.config.postprocess), [(50, 80)] * 2)
    for a, b in zip(found, ordinary(detector, images), strict=True):
        assert len(a) >= 20
        assert_same(a, b)


@pytest.mark.parametrize("arm", [True, False])
def test_the_bare_network_gives_its_raw_output_by_name(detectors, arm):
    detector = detectors(arm=arm)
    module = DeployedNetwork(detector)
    inputs = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    names = ("arm_logits", "arm_offsets", "odm_logits", "odm_offsets")
    assert module.output_names == (names if arm else names[2:])
    with torch.no_grad():
        raw = detector.network(inputs)
    for name, value in zip(module.output_names, module(inputs), strict=True):
        assert value.dtype == torch.float32
        assert_close(value, getattr(raw, name), rtol=0, atol=0)
    assert all(value.dtype == torch.float32 for value in DeployedNetwork(detector, torch.float16)(inputs))


def test_what_is_deployed_needs_no_gradient_and_no_training(detectors):
    detector = detectors()
    detector.network.train()
    for module in (
        DeployedDetector(detector, keep_in_loop),
        DeployedCandidates(detector),
        DeployedNetwork(detector),
    ):
        assert not module.network.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_detections_of_a_batch_are_those_of_its_pictures(detectors, assert_same):
    module = DeployedDetector(detectors(), keep_in_loop)
    images = pictures(3, 70, 45)
    together = module(images)
    for i in range(3):
        alone = module(images[i : i + 1])
        count = int(alone[3])
        assert count >= 20
        one, other = (
            Detections(*(output[0, :count] for output in outputs[:3]))
            for outputs in (alone, [output[i : i + 1] for output in together])
        )
        assert int(together[3][i]) == count
        assert_same(other, one)
