"""From pictures to detections."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from refinedet_cli.core import fused
from refinedet_cli.core.config import Classes
from refinedet_cli.core.postprocess import soften, suppress, to_detections
from refinedet_cli.core.preprocess import preprocess
from refinedet_cli.core.presets import tiny
from refinedet_cli.engine.lanes import lanes_for
from refinedet_cli.engine.predict import Predictor, ReferencePredictor, default_batch
from refinedet_cli.zoo.checkpoint import LoadedDetector, load_detector

CPU = torch.device("cpu")
SIZES = ((64, 64), (48, 100), (130, 31), (20, 20), (64, 65), (90, 90), (33, 77))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, save_random) -> LoadedDetector:
    """A seeded random detector whose scores differ from box to box."""
    config = tiny(Classes(names=("person", "cat", "dog"), category_ids=(1, 17, 18))).detector
    path = save_random(tmp_path_factory.mktemp("weights") / "tiny.safetensors", config)
    return load_detector(path)


@pytest.fixture
def predictor(loaded) -> Predictor:
    return Predictor(loaded, device=CPU, precision="fp32")


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def test_what_is_found_does_not_depend_on_the_batch(predictor, images, assert_same):
    together = predictor.predict(images)
    assert sum(len(d) for d in together) > 50
    for image, expected in zip(images, together, strict=True):
        assert_same(predictor.predict([image])[0], expected)


def test_what_is_found_does_not_depend_on_the_order(predictor, images, assert_same):
    forward, backward = predictor.predict(images), predictor.predict(images[::-1])
    for a, b in zip(forward, backward[::-1], strict=True):
        assert_same(a, b)


def test_it_is_the_chain_of_the_core(predictor, loaded, images, assert_same):
    config, detector = loaded.config, loaded.detector
    with torch.no_grad():
        inputs = torch.stack([preprocess(torch.from_numpy(image), config.preprocess) for image in images])
        expected = to_detections(suppress(detector.forward(inputs), config.postprocess), list(SIZES))
    for a, b in zip(predictor.predict(images), expected, strict=True):
        assert_same(a, b)


def test_boxes_lie_inside_their_pictures_and_scores_descend(predictor, images):
    for (height, width), found in zip(SIZES, predictor.predict(images), strict=True):
        assert len(found)
        assert (found.boxes >= 0).all()
        assert (found.boxes[:, 0::2] <= width).all()
        assert (found.boxes[:, 1::2] <= height).all()
        assert (found.scores.diff() <= 0).all()
        assert found.boxes.dtype == found.scores.dtype == torch.float32
        assert found.boxes.device == CPU
        assert not found.boxes.requires_grad


def test_soft_nms_follows_where_the_config_has_it(predictor, loaded, images, assert_same):
    post = replace(loaded.config.postprocess, soft_nms_iou=0.2)
    config = replace(loaded.config, postprocess=post)
    softened = replace(loaded, detector=replace(loaded.detector, config=config))
    lowered = 0.0
    found = Predictor(softened, device=CPU, precision="fp32").predict(images)
    for after, before in zip(found, predictor.predict(images), strict=True):
        assert_same(after, soften(before, 0.2, post.score_threshold))
        assert (after.scores.diff() <= 0).all()
        lowered += float(before.scores.sum() - after.scores.sum())
    assert lowered > 1


def test_no_pictures_no_detections(predictor):
    assert predictor.predict([]) == []


@pytest.mark.parametrize(
    ("image", "cure"),
    [
        (np.zeros((8, 8), np.uint8), "repeat the grey channel"),
        (np.zeros((8, 8, 1), np.uint8), "repeat the grey channel"),
        (np.zeros((8, 8, 4), np.uint8), "drop the alpha channel"),
        (np.zeros((8, 8, 3), np.float32), "convert it to uint8"),
        (np.zeros((0, 8, 3), np.uint8), "expected uint8"),
        (np.zeros((3, 8, 8), np.uint8), "expected uint8"),
    ],
    ids=["grey", "grey3d", "alpha", "float", "empty", "channels first"],
)
def test_other_arrays_are_refused_by_place_and_cure(predictor, images, image, cure):
    with pytest.raises(ValueError, match=f"picture 1: .*{cure}"):
        predictor.predict([images[0], image])


def test_read_only_and_mirrored_arrays_are_taken_and_left_alone(predictor, images, assert_same):
    frozen = images[1].copy()
    frozen.flags.writeable = False
    mirrored = images[1][:, ::-1]
    before = mirrored.copy()
    found = predictor.predict([frozen, mirrored])
    assert_same(found[0], predictor.predict([images[1]])[0])
    assert_same(found[1], predictor.predict([before])[0])
    np.testing.assert_array_equal(mirrored, before)


def test_predicting_leaves_the_weights_and_statistics_as_they_are(loaded, images):
    loaded.detector.network.train()
    predictor = Predictor(loaded, device=CPU, precision="fp32")
    assert loaded.detector.network.training
    before = {name: tensor.clone() for name, tensor in loaded.detector.network.state_dict().items()}
    predictor.predict(images)
    for name, tensor in loaded.detector.network.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_and_memory_layout_of_the_network(loaded, images, precision, dtype):
    seen: dict[str, torch.Tensor] = {}

    def look(module, inputs, output) -> None:
        seen.setdefault("input", inputs[0])
        seen["output"] = output

    predictor = Predictor(loaded, device=CPU, precision=precision)
    norm = next(m for m in predictor._network.modules() if isinstance(m, torch.nn.GroupNorm))
    handle = norm.register_forward_hook(look)
    try:
        found = predictor.predict(images)
    finally:
        handle.remove()
    assert seen["output"].dtype == dtype
    assert seen["output"].is_inference()
    assert seen["input"].is_contiguous(memory_format=torch.channels_last)
    assert predictor.precision == precision
    assert all(d.boxes.dtype == torch.float32 for d in found)
    assert sum(map(len, found)) > 50


def test_switches_of_cudnn_are_put_back(predictor, images):
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)
    predictor.predict(images[:1])
    after = (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)
    assert after == before


@pytest.mark.parametrize(("threads", "batch"), [(1, 8), (2, 8), (6, 24), (96, 64)])
def test_each_lane_has_pictures_to_compute(monkeypatch, threads, batch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert default_batch(CPU) == batch
    assert (default_batch(CPU, everywhere=True), default_batch(torch.device("cuda"))) == (8, 32)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_lanes_find_what_one_thread_finds_and_each_has_one(loaded, images, assert_same, monkeypatch):
    assert (lanes_for(CPU), lanes_for(torch.device("cuda"))) == (2, 1)
    predictor = Predictor(loaded, device=CPU, precision="fp32", lanes=2)
    threads = []
    compute = predictor._network.forward

    def watched(part: torch.Tensor) -> object:
        threads.append((threading.current_thread(), torch.get_num_threads()))
        return compute(part)

    monkeypatch.setattr(predictor._network, "forward", watched)
    found = predictor.predict(images)
    assert {count for _, count in threads} == {1}
    assert threading.main_thread() not in {thread for thread, _ in threads}
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    alone = Predictor(loaded, device=CPU, precision="fp32")
    for image, of_lane in zip(images, found, strict=True):
        assert_same(alone.predict([image])[0], of_lane)


@pytest.mark.usefixtures("two_threads")
def test_a_heavy_network_is_shared_by_all_threads(loaded, images, assert_same, monkeypatch):
    expected = Predictor(loaded, device=CPU, precision="fp32").predict(images)
    monkeypatch.setattr(fused, "_MOST_BYTES", 1)
    predictor = Predictor(loaded, device=CPU, precision="fp32", lanes=2)
    threads = []
    compute = predictor._network.forward

    def watched(part: torch.Tensor) -> object:
        threads.append(torch.get_num_threads())
        return compute(part)

    monkeypatch.setattr(predictor._network, "forward", watched)
    for mine, other in zip(predictor.predict(images), expected, strict=True):
        assert_same(mine, other)
    assert threads == [2] * len(images)


@pytest.mark.usefixtures("two_threads")
def test_many_pictures_get_lanes_where_these_pay(loaded, images, assert_same, monkeypatch):
    one = Predictor(loaded, device=CPU, precision="fp32")
    many = one.for_many()
    assert many._lanes.count == 2
    assert many.for_many() is many
    for mine, other in zip(one.predict(images), many.predict(images), strict=True):
        assert_same(mine, other)
    reference = ReferencePredictor(loaded, device=CPU, precision="fp32")
    assert reference.for_many() is reference
    monkeypatch.setattr(fused, "_MOST_BYTES", 1)
    heavy = Predictor(loaded, device=CPU, precision="fp32")
    assert heavy.for_many() is heavy
    torch.set_num_threads(1)
    assert one.for_many() is one


@pytest.mark.usefixtures("two_threads")
def test_threads_that_come_later_have_as_many_as_usual(loaded):
    Predictor(loaded, device=CPU, precision="fp32", lanes=2)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2


def test_what_goes_wrong_in_a_lane_comes_out(loaded, images, monkeypatch):
    predictor = Predictor(loaded, device=CPU, precision="fp32", lanes=3)

    def fail(part: torch.Tensor) -> object:
        raise MemoryError(f"for {len(part)}")

    monkeypatch.setattr(predictor._network, "forward", fail)
    with pytest.raises(MemoryError, match="for"):
        predictor.predict(images)


@pytest.mark.gpu
def test_the_gpu_finds_the_same(loaded, images):
    expected = Predictor(loaded, device=CPU, precision="fp32").predict(images)
    try:
        found = Predictor(loaded, device=torch.device("cuda"), precision="fp32").predict(images)
    finally:
        loaded.detector.network.to(CPU)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.scores[:20], b.scores[:20], rtol=0, atol=1e-3)
