"""The rows of `speed.py` for a CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from speed_cases import wrong_cases
from speed_detectors import (
    Stand,
    default_weights,
    inference_network,
    load_ours,
    look,
    open_ours,
    paper_weights,
    peer,
    sample_inputs,
    turn,
)
from speed_timing import (
    Bench,
    Finding,
    Work,
    milliseconds,
    number,
    rate,
    ratio,
    share,
    spread,
    take_turns,
    time_calls,
)
from speed_training import criterion_share
from torch import Tensor
from torchvision.ops import nms

from refinedet_cli.core.boxes import cxcywh_to_xyxy, decode
from refinedet_cli.core.config import DetectorConfig
from refinedet_cli.core.deployed import DeployedNetwork
from refinedet_cli.core.detector import Detector
from refinedet_cli.core.postprocess import suppress
from refinedet_cli.core.preprocess import preprocess
from refinedet_cli.data.images import FoundImage, read_image, read_reduced
from refinedet_cli.engine.artefact import import_openvino, openvino_core
from refinedet_cli.engine.detect import DetectOptions, detect
from refinedet_cli.engine.device import Precision, select_precision
from refinedet_cli.engine.predict import default_batch

Row = Callable[[Bench], Iterator[Finding]]
SCORE = 0.3
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32")
PICTURES_IN_MEMORY = 8
TRAINING_BATCH = 16


# --- detect


def detect_vgg16(bench: Bench) -> Iterator[Finding]:
    """`detect` with the paper's detector against torchvision's SSD300."""
    weights = str(paper_weights(bench))
    yield from _detect(bench, weights, "ssd300_vgg16", bench.sizes.vgg_pictures, (2.2, 1.05))


def detect_default(bench: Bench) -> Iterator[Finding]:
    """`detect` with the bundled detector against torchvision's SSDLite320."""
    weights = default_weights(bench)
    yield from _detect(bench, weights, "ssdlite320_mobilenet_v3_large", bench.sizes.light_pictures, (1.5, 1.0))


def _detect(
    bench: Bench, weights: str | None, peer_name: str, pictures: int, targets: tuple[float, float]
) -> Iterator[Finding]:
    ours = {precision: open_ours(bench, weights, precision, SCORE) for precision in ("auto", "fp32")}
    paths = turn(bench, pictures)
    # Each place is a picture of its own, even where the file comes again.
    images = [FoundImage(path, f"{i:06}{path.suffix}") for i, path in enumerate(paths)]
    stand = peer(bench, peer_name, len(ours["fp32"].classes))
    folders = (bench.folder / f"{peer_name}-{i}" for i in count())

    def run(precision: str) -> object:
        predictor = ours[precision]
        options = DetectOptions(score=SCORE, batch=default_batch(bench.device), draw=False)
        return detect(predictor, images, out=next(folders), options=options)

    sides: dict[str, Work] = {
        "auto": lambda: run("auto"),
        "theirs": lambda: look(stand.model, paths, bench.device),
        "fp32": lambda: run("fp32"),
    }
    seconds = take_turns(bench, sides, warm_up=1)
    facts = {"peer": peer_name, "pictures_a_turn": pictures, **_raw_head(bench, stand, paths)}
    for precision, target in zip(("auto", "fp32"), targets, strict=True):
        used = ours[precision].precision
        yield Finding(
            work=f"detect, {ours[precision].config.preset}, {used if used == precision else f'auto: {used}'}",
            ours=rate(seconds[precision], pictures),
            theirs=f"{rate(seconds['theirs'], pictures)}\n{peer_name}",
            figure=ratio(seconds[precision], seconds["theirs"]),
            target=target,
            seconds={"ours": seconds[precision], "theirs": seconds["theirs"]},
            facts=facts,
        )


def _raw_head(bench: Bench, stand: Stand, paths: Sequence[Path]) -> dict[str, Any]:
    """Time the peer with its head as it was drawn, too: a figure to know, not to compare with."""
    few = paths[:PICTURES_IN_MEMORY]
    look(stand.raw, few[:1], bench.device)
    seconds = time_calls(bench, lambda: look(stand.raw, few, bench.device), 1)
    return {
        "peer_scores_above_threshold": stand.passing,
        "peer_raw_head_scores_above_threshold": stand.raw_passing,
        "peer_raw_head_seconds_a_picture": seconds / len(few),
    }


# --- the network alone


def forward_vgg16(bench: Bench) -> Iterator[Finding]:
    """The paper's network against OpenVINO."""
    yield from _forward(bench, load_ours(str(paper_weights(bench))))


def forward_default(bench: Bench) -> Iterator[Finding]:
    """The default network against OpenVINO."""
    yield from _forward(bench, load_ours(default_weights(bench)))


def _forward(bench: Bench, detector: Detector) -> Iterator[Finding]:
    inputs = sample_inputs(bench, detector, 1).to(bench.device)
    networks = {precision: inference_network(detector, bench.device, precision) for precision in PRECISIONS}
    theirs = openvino_networks(detector, inputs, torch.get_num_threads())
    sides: dict[str, Work] = {}
    # The two of a precision are neighbours in every round.
    for precision in PRECISIONS:
        sides[f"ours {precision}"] = lambda network=networks[precision]: _inferred(network, inputs)
        sides[f"theirs {precision}"] = lambda run=theirs[precision]: run(inputs.numpy())
    seconds = take_turns(bench, sides)
    for precision, target in zip(PRECISIONS, (0.9, 0.75), strict=True):
        raw = _tensors(_inferred(networks[precision], inputs))
        far, agrees = difference(raw, theirs[precision](inputs.numpy()), 1e-3)
        ours, other = seconds[f"ours {precision}"], seconds[f"theirs {precision}"]
        yield Finding(
            work=f"network, {detector.config.preset}, {precision}, one picture"
            + ("" if agrees or precision == "bf16" else " (OUTPUTS DIFFER)"),
            ours=f"{number(milliseconds(ours).median)} ms",
            theirs=f"{number(milliseconds(other).median)} ms\nOpenVINO",
            figure=ratio(ours, other),
            target=target,
            seconds={"ours": ours, "theirs": other},
            facts={"largest_difference": far, "equal_to_1e-3": agrees},
        )


def _inferred(network: torch.nn.Module, inputs: Tensor) -> Any:
    with torch.inference_mode():
        return network(inputs)


def openvino_networks(
    detector: Detector, inputs: Tensor, threads: int
) -> dict[Precision, Callable[[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]]:
    """Compile the bare network with OpenVINO for one picture, in either precision."""
    openvino = import_openvino()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about itself
        model = openvino.convert_model(DeployedNetwork(detector), example_input=inputs)
    model.reshape([*inputs.shape])

    def runner(precision: Precision) -> Callable[[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
        hints = {
            "INFERENCE_PRECISION_HINT": {"bf16": "bf16", "fp32": "f32"}[precision],
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = openvino_core().compile_model(model, "CPU", hints).create_infer_request()

        def run(pixels: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
            # Without copies on the way in and out, which is the fastest that its Python interface has.
            found = request.infer([pixels], share_inputs=True, share_outputs=True)
            return [found[i] for i in range(len(found))]

        return run

    return {precision: runner(precision) for precision in PRECISIONS}


def difference(raw: Sequence[Tensor], other: Sequence[np.ndarray[Any, Any]], tolerance: float) -> tuple[float, bool]:
    """Compare two outputs: the largest difference, and whether all are within a tolerance, absolute plus relative."""
    pairs = [(ours.float(), torch.from_numpy(np.array(theirs))) for ours, theirs in zip(raw, other, strict=True)]
    far = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    return far, all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in pairs)


def _tensors(raw: Any) -> list[Tensor]:
    return [value for value in raw if isinstance(value, Tensor)]


# --- post-processing


def postprocess(bench: Bench) -> Iterator[Finding]:
    """Decoder and suppression of one picture, alone and as a part of the whole."""
    trained, paper = load_ours(default_weights(bench)), load_ours(str(paper_weights(bench)))
    network = inference_network(trained, bench.device, "fp32")
    inputs = sample_inputs(bench, trained, PICTURES_IN_MEMORY)
    real = [_inferred(network, one[None]) for one in inputs]
    for name, raws in (("photographs", real), ("all anchors full of boxes", [dense_output(real[0])])):
        yield _postprocess(bench, trained, raws, name)
    yield _share_of_predict(bench, paper)


def _postprocess(bench: Bench, detector: Detector, raws: Sequence[Any], name: str) -> Finding:
    config = detector.config
    ours, naive = (cycle(raws, step) for step in (lambda raw: process(detector, raw), lambda raw: loop(detector, raw)))
    seconds = take_turns(bench, {"ours": ours, "theirs": naive})
    shape = _tensors(raws[0])[-1].shape
    return Finding(
        work=f"post-processing of a picture, {shape[1]:,} anchors, {len(config.classes)} classes, {name}",
        ours=f"{number(milliseconds(seconds['ours']).median)} ms",
        theirs=f"{number(milliseconds(seconds['theirs']).median)} ms\na loop over classes",
        figure=milliseconds(seconds["ours"]),
        unit="ms",
        target=2.0,
        sense="under",
        seconds=seconds,
        facts={"candidates": config.postprocess.candidates, "ratio": ratio(*seconds.values())._asdict()},
    )


def _share_of_predict(bench: Bench, detector: Detector) -> Finding:
    precision = select_precision("auto", bench.device)
    predictor = open_ours(bench, str(paper_weights(bench)))
    network = inference_network(detector, bench.device, precision)
    pictures = [read_image(path) for path in turn(bench, PICTURES_IN_MEMORY)]
    raws = [_inferred(network, one[None]) for one in sample_inputs(bench, detector, PICTURES_IN_MEMORY)]
    sides = {
        "post-processing": cycle(raws, lambda raw: process(detector, raw)),
        "predict": cycle(pictures, lambda pixels: predictor.predict([pixels])),
    }
    seconds = take_turns(bench, sides)
    part, whole = (f"{number(milliseconds(values).median)} ms" for values in seconds.values())
    return Finding(
        work=f"post-processing as a part of predict, {detector.config.preset}, {precision}",
        ours=f"{part} of {whole}",
        figure=share(*seconds.values()),
        unit="%",
        target=5.0,
        sense="under",
        seconds=seconds,
    )


def cycle(values: Sequence[Any], step: Callable[[Any], object]) -> Work:
    """Take the next value at every call, from the start again after the last."""
    places = count()
    return lambda: step(values[next(places) % len(values)])


@torch.inference_mode()
def process(detector: Detector, raw: Any) -> object:
    """Do what `Predictor` does after the network."""
    return suppress(detector.decoder(raw), detector.config.postprocess)


@torch.inference_mode()
def loop(detector: Detector, raw: Any) -> list[Tensor]:
    """Do it the plain way: decode all boxes, then one NMS after the other for each class."""
    config: DetectorConfig = detector.config
    post, anchors = config.postprocess, config.require_anchors()
    boxes = detector.decoder.anchors(raw.input_size, raw.odm_logits.device)  # type: ignore[attr-defined]
    for offsets in (raw.arm_offsets, raw.odm_offsets):
        boxes = decode(offsets[0].float(), boxes, anchors.variances)
    boxes = cxcywh_to_xyxy(boxes)
    scores = raw.odm_logits[0].float().softmax(dim=-1)
    scores = scores * (raw.arm_logits[0].float().softmax(dim=-1)[:, 1:] >= post.arm_filter)
    kept = []
    for label in range(1, scores.shape[1]):
        passing = scores[:, label] > post.score_threshold
        of_class = boxes[passing]
        kept.append(of_class[nms(of_class, scores[passing, label], post.nms_iou)])
    return kept


def dense_output(raw: Any) -> Any:
    """Make raw output in which every anchor passes the filter and every class the threshold, with boxes anywhere."""
    generator = torch.Generator().manual_seed(0)

    def drawn(values: Tensor, deviation: float) -> Tensor:
        return torch.randn(values.shape, generator=generator).to(values.device) * deviation

    return raw._replace(
        arm_logits=drawn(raw.arm_logits, 0.5),
        arm_offsets=drawn(raw.arm_offsets, 1.0),
        odm_logits=drawn(raw.odm_logits, 0.5),
        odm_offsets=drawn(raw.odm_offsets, 1.0),
    )


# --- large photographs


def decoding(bench: Bench) -> Iterator[Finding]:
    """Decode and resize large photographs, with and without what `detect` leaves out."""
    config = load_ours(default_weights(bench)).config.preprocess
    paths = large_photographs(bench)

    def full(path: Path) -> Tensor:
        return preprocess(torch.from_numpy(read_image(path)), config)

    def reduced(path: Path) -> Tensor:
        return preprocess(torch.from_numpy(read_reduced(path, (config.height, config.width)).pixels), config)

    seconds = take_turns(bench, {"ours": cycle(paths, reduced), "theirs": cycle(paths, full)})
    width, height = bench.sizes.photograph
    far = max(float((full(path) - reduced(path)).abs().mean()) for path in paths)
    yield Finding(
        work=f"decode and resize a JPEG of {width * height / 1e6:.3g} megapixels to {config.width} x {config.height}",
        ours=f"{number(milliseconds(seconds['ours']).median)} ms",
        theirs=f"{number(milliseconds(seconds['theirs']).median)} ms\ndecoded in full",
        figure=ratio(seconds["ours"], seconds["theirs"]),
        target=3.0,
        seconds=seconds,
        facts={
            "megabytes_a_file": sum(path.stat().st_size for path in paths) / len(paths) / 1e6,
            "mean_difference_of_network_input": far,
        },
    )


def large_photographs(bench: Bench) -> list[Path]:
    """Enlarge some pictures, with the grain that a camera adds: their files are as large as a telephone's."""
    paths = []
    for i, source in enumerate(turn(bench, min(3, len(bench.pictures)))):
        with Image.open(source) as image:
            large = image.convert("RGB").resize(bench.sizes.photograph, Image.Resampling.BICUBIC)
        grain = np.random.default_rng(i).normal(0, 5, (large.height, large.width, 1))
        pixels = (np.asarray(large, dtype=np.float32) + grain).clip(0, 255).astype(np.uint8)
        paths.append(bench.folder / f"large-{i}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


# --- training, correctness


def loss(bench: Bench) -> Iterator[Finding]:
    """Matching and loss in a training step of the default recipe."""
    yield criterion_share(bench, bench.sizes.default, min(TRAINING_BATCH, bench.sizes.batch))


def correctness(bench: Bench) -> Iterator[Finding]:
    """Post-processing against brute force."""
    start = bench.clock()
    wrong = wrong_cases(bench.sizes.cases, bench.device)
    yield Finding(
        work=f"post-processing equal to brute force, {bench.sizes.cases:,} random cases, ties included",
        ours=f"{wrong:,} wrong",
        figure=spread([float(wrong)]),
        unit="",
        target=0.0,
        sense="at most",
        facts={"cases": bench.sizes.cases, "seconds": bench.clock() - start},
    )


ROWS: dict[str, Row] = {
    "detect-vgg16": detect_vgg16,
    "detect-default": detect_default,
    "forward-vgg16": forward_vgg16,
    "forward-default": forward_default,
    "postprocess": postprocess,
    "decoding": decoding,
    "loss": loss,
    "correctness": correctness,
}
