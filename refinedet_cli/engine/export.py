"""Export: write the file, prove it against the checkpoint, and only then give it its name."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from refinedet_cli.core.config import PostprocessConfig
from refinedet_cli.core.deployed import (
    Deployed,
    DeployedCandidates,
    DeployedDetector,
    DeployedNetwork,
    KeepByClass,
    keep_in_loop,
)
from refinedet_cli.core.preprocess import preprocess_batch
from refinedet_cli.core.structures import Detections
from refinedet_cli.data.dataset import Dataset
from refinedet_cli.data.files import make_folder, write_whole
from refinedet_cli.data.images import FoundImage, read_image
from refinedet_cli.engine.artefact import (
    SUFFIXES,
    ArtefactInfo,
    ArtefactPredictor,
    Content,
    ExportPrecision,
    FormatName,
    open_artefact,
    require_writers,
)
from refinedet_cli.engine.evaluate import EvaluationProgress, collect, score_coco, with_postprocess
from refinedet_cli.engine.export_formats import quantise, write_onnx, write_openvino, write_torch_export
from refinedet_cli.engine.predict import AnyPredictor, ReferencePredictor
from refinedet_cli.engine.proof import TOLERANCES, Accuracy, Proof, compare, judge
from refinedet_cli.engine.sidecar import SIDECAR_SUFFIX, GoldenPictures, Picture, sidecar_text, versions
from refinedet_cli.errors import ConfigError, DataError, UsageError
from refinedet_cli.files import sync_folder, sync_tree, written_by_a_library
from refinedet_cli.zoo.checkpoint import LoadedDetector, file_sha256, load_detector

_CPU = torch.device("cpu")
_PHOTOGRAPHS = Path(__file__).with_name("photographs")
# Enough to find the ranges of activations; more takes memory and gains nothing.
_CALIBRATION_PICTURES = 128
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.float32}


@dataclass(frozen=True)
class ExportOptions:
    """What to write.

    Attributes:
        format, precision, content, batch: as in `ArtefactInfo`.
        postprocess: in place of the detector's own.
        pictures: on which the file is proven; none are the photographs that the package carries.
        dataset: annotated pictures on which it is proven besides, AP included.
        calibration: pictures from which int8 takes the ranges of activations.
    """

    format: FormatName = "onnx"
    precision: ExportPrecision = "fp32"
    content: Content = "detections"
    batch: int | None = 1
    postprocess: PostprocessConfig | None = None
    pictures: Sequence[FoundImage] = ()
    dataset: Dataset | None = None
    calibration: Sequence[FoundImage] = ()


class Stage(NamedTuple):
    """How far the work has come: what is being done, and pictures done of how many; no total where none is known."""

    name: str
    done: int = 0
    total: int | None = None


@dataclass(frozen=True)
class ExportResult:
    """What came of an export.

    Attributes:
        info: what the file says of itself.
        proof: of the file against the checkpoint.
        files: the file first, then those that belong to it; empty where the proof failed, for then nothing is kept.
        golden: pictures kept in the sidecar.
    """

    info: ArtefactInfo
    proof: Proof
    files: tuple[Path, ...]
    golden: int


def ignore(stage: Stage) -> None:
    """Take no notice of progress."""


def export(
    weights: Path, out: Path, options: ExportOptions, on_progress: Callable[[Stage], None] = ignore
) -> ExportResult:
    """Write a detector as a file for another runtime, and prove that it finds what the checkpoint finds.

    Args:
        weights: a checkpoint.
        out: folder for the file and its sidecar, made where missing.
        options: what to write and what to prove it on.
        on_progress: called as the work goes on.

    Returns:
        `ExportResult`. Where the proof fails, nothing is left in ``out``, and a file of that name that was there before
        is as it was.

    Raises:
        CheckpointError: the weights cannot be used.
        ConfigError: the detector has post-processing that no exported file can do.
        UsageError: the options do not go together, or a library is missing.
        DataError: a picture cannot be read, or ``out`` cannot be written.
    """
    loaded = _load(weights, options)
    _check(loaded, options)
    info = _describe(loaded, options)
    name = _file_name(weights, options)
    with _workshop(out) as folder:
        on_progress(Stage("writing"))
        path = folder / name
        with written_by_a_library(out / name):
            _write(loaded, path, info, options)
        candidate = ArtefactPredictor(open_artefact(path, trusted=True), _CPU)
        # Anew, because the one that was exported may have been rounded.
        reference = ReferencePredictor(_load(weights, options), device=_CPU, precision="fp32")
        busiest = GoldenPictures(TOLERANCES[options.precision].above)
        proof = prove(reference, candidate, _pictures(options.pictures), options.dataset, on_progress, busiest)
        if not proof.holds:
            return ExportResult(info, proof, files=(), golden=0)
        golden = busiest.proven(reference, candidate.artefact)
        made = sorted(p for p in folder.iterdir() if p.name != name)
        sidecar = path.with_name(f"{name}{SIDECAR_SUFFIX}")
        write_whole(sidecar, sidecar_text(info, proof, [path, *made], golden))
        sync_tree(folder)
        # What describes the others comes last: where it is, they are.
        files = [_put(p, out) for p in [*made, path, sidecar]]
        sync_folder(out)
    return ExportResult(info, proof, (out / name, *(f for f in files if f.name != name)), len(golden))


def prove(
    reference: AnyPredictor,
    candidate: AnyPredictor,
    pictures: Iterable[Picture],
    dataset: Dataset | None = None,
    on_progress: Callable[[Stage], None] = ignore,
    golden: GoldenPictures | None = None,
) -> Proof:
    """Compare what two detectors find.

    Args:
        reference: what is right.
        candidate: what is to be proven; its precision decides what is tolerated.
        pictures: to look at; those of `odd_pictures` are looked at too.
        dataset: annotated pictures to look at besides, and to compute the AP of both on.
        on_progress: called after every picture.
        golden: is shown every picture with what the reference found in it.
    """
    tolerance = TOLERANCES[candidate.precision]
    golden = golden or GoldenPictures(tolerance.above)
    accuracy = None
    seen: list[tuple[str, Detections, Detections]] = []
    if dataset is not None:
        first, second = (
            collect(detector, dataset, batch=1, workers=1, on_progress=partial(_report, on_progress, doing))
            for detector, doing in ((reference, "reference"), (candidate, "exported file"))
        )
        for record, a, b in zip(first.records, first.pictures, second.pictures, strict=True):
            golden.consider(a.file_name, partial(read_image, record.path), a.detections)
            seen.append((a.file_name, a.detections, b.detections))
        before, after = score_coco(first).AP, score_coco(second).AP
        accuracy = Accuracy(dataset.name, before, after, first.complete)

    def looked_at() -> Iterator[tuple[str, Detections, Detections]]:
        yield from seen
        for number, (name, pixels) in enumerate(pictures, start=1):
            found = reference.predict([pixels])[0]
            golden.consider(name, partial(np.asarray, pixels), found)
            yield name, found, candidate.predict([pixels])[0]
            on_progress(Stage("proving", number))
        for name, pixels in odd_pictures():
            yield name, reference.predict([pixels])[0], candidate.predict([pixels])[0]

    return judge(compare(looked_at(), tolerance, reference.config.postprocess), accuracy, tolerance)


def _report(on_progress: Callable[[Stage], None], doing: str, progress: EvaluationProgress) -> None:
    on_progress(Stage(doing, progress.done, progress.total))


def _load(weights: Path, options: ExportOptions) -> LoadedDetector:
    loaded = load_detector(weights)
    return loaded if options.postprocess is None else with_postprocess(loaded, options.postprocess)


def _check(loaded: LoadedDetector, options: ExportOptions) -> None:
    if loaded.config.postprocess.soft_nms_iou is not None:
        raise ConfigError(
            "soft-NMS cannot be part of an exported file", "add --postprocess paper or --postprocess caffe"
        )
    if options.precision == "int8" and options.format == "torch-export":
        raise UsageError("--precision int8 does not go with --format torch-export", "take onnx or openvino")
    if options.precision == "int8" and not options.calibration:
        raise UsageError(
            "--precision int8 needs pictures to take the ranges of activations from",
            "add --calibrate DIR with some 100 pictures of the kind that the detector will see",
        )
    if options.precision != "int8" and options.calibration:
        raise UsageError("--calibrate is about int8", "add --precision int8, or leave it out")
    require_writers(options.format)


def _describe(loaded: LoadedDetector, options: ExportOptions) -> ArtefactInfo:
    return ArtefactInfo(
        format=options.format,
        precision=options.precision,
        content=options.content,
        batch=options.batch,
        config=loaded.config,
        provenance=loaded.provenance,
        weights=loaded.path.name,
        sha256=file_sha256(loaded.path),
        made_with=versions(options.format),
    )


def _file_name(weights: Path, options: ExportOptions) -> str:
    parts = [weights.stem]
    parts += [options.content] if options.content != "detections" else []
    parts += [options.precision] if options.precision != "fp32" else []
    return "-".join(parts) + SUFFIXES[options.format]


def _pictures(found: Sequence[FoundImage]) -> Iterator[Picture]:
    """Read the pictures to prove on, one by one."""
    if not found:
        found = [FoundImage(path, path.name) for path in sorted(_PHOTOGRAPHS.glob("*.jpg"))]
    for image in found:
        yield Picture(image.name, read_image(image.path))


def odd_pictures() -> list[Picture]:
    """Draw pictures that are not shaped like a photograph: one pixel, a long strip, a tall one, a grey one."""
    ramp = np.linspace(0, 255, 8000, dtype=np.uint8)
    y, x = np.mgrid[:240, :320]
    # Off the centre, and nowhere the same: places that look alike score alike, and rounding would decide between them.
    rings = (np.sqrt((x - 130) ** 2 + 2 * (y - 90) ** 2) * 0.7).astype(np.uint8)
    strip = np.stack([ramp, ramp[::-1], np.roll(ramp, 4000)], axis=-1)
    return [
        Picture("1 x 1 px", np.full((1, 1, 3), 200, np.uint8)),
        Picture("8,000 x 12 px", np.repeat(strip[None], 12, axis=0)),
        Picture("3 x 8,000 px", np.repeat(strip[:, None], 3, axis=1)),
        Picture("grey", np.repeat(rings[..., None], 3, axis=-1)),
    ]


@contextmanager
def _workshop(out: Path) -> Iterator[Path]:
    """Give a folder beside the final place, so that files can be moved there whole, and clear it away.

    Of the folders that were made for it, those that stay empty go too.
    """
    made = [path for path in (out, *out.parents) if not path.exists()]
    make_folder(out)
    folder = out / f".{secrets.token_hex(8)}.tmp"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            for path in made:
                path.rmdir()


def _put(path: Path, out: Path) -> Path:
    target = out / path.name
    if target.is_dir():
        raise DataError(f"cannot write {target}: a folder of that name is in the way", "choose another --out")
    return path.replace(target)


def _write(loaded: LoadedDetector, path: Path, info: ArtefactInfo, options: ExportOptions) -> None:
    dtype = _DTYPES[options.precision]
    if options.format == "torch-export":
        write_torch_export(_module(loaded, options, dtype), path, info)
        return
    onnx_file = path if options.format == "onnx" else path.with_suffix(".onnx")
    module = _module(loaded, options, dtype)
    write_onnx(module, onnx_file, info)
    if options.precision == "int8":
        quantise(onnx_file, onnx_file, _calibration(options, info), info)
    if options.format == "openvino":
        write_openvino(onnx_file, path, info)
        onnx_file.unlink()


def _module(loaded: LoadedDetector, options: ExportOptions, dtype: torch.dtype) -> Deployed:
    if options.content == "network":
        return DeployedNetwork(loaded.detector, dtype)
    if options.content == "candidates":
        return DeployedCandidates(loaded.detector, dtype)
    keeper = keep_in_loop if options.format == "torch-export" else KeepByClass(loaded.config)
    return DeployedDetector(loaded.detector, keeper, dtype)


def _calibration(options: ExportOptions, info: ArtefactInfo) -> list[NDArray[Any]]:
    """Read pictures spread evenly over those given, as the graph takes them."""
    given = options.calibration
    places = np.linspace(0, len(given) - 1, min(len(given), _CALIBRATION_PICTURES)).round().astype(int)
    found = [given[i] for i in places]
    inputs: list[NDArray[Any]] = []
    for image in found:
        pixels = np.repeat(read_image(image.path)[None], options.batch or 1, axis=0)
        if options.content == "network":
            inputs.append(preprocess_batch(torch.from_numpy(pixels), info.config.preprocess).numpy())
        else:
            inputs.append(pixels)
    return inputs
