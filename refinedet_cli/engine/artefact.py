"""Exported files: what they say of themselves, how they run, and how they stand in for a checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes, DetectorConfig, from_dict, to_dict
from refinedet_cli.core.deployed import sample_output
from refinedet_cli.core.postprocess import suppress, to_detections
from refinedet_cli.core.preprocess import preprocess
from refinedet_cli.core.structures import BatchDetections, Candidates, Detections
from refinedet_cli.engine.predict import picture_sizes
from refinedet_cli.engine.stages import stage
from refinedet_cli.errors import CheckpointError, ConfigError, DeviceError, UsageError
from refinedet_cli.files import require_file
from refinedet_cli.zoo.checkpoint import EXPORTED_SUFFIXES

FormatName = Literal["onnx", "openvino", "torch-export"]
ExportPrecision = Literal["fp32", "fp16", "int8"]
Content = Literal["detections", "candidates", "network"]

SUFFIXES: dict[FormatName, str] = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2"}
METADATA_KEY = "refinedet"
CLASSES_KEY = "classes"
_INSTALL = 'pip install "refinedet[export]"'
_VERSION = 1
_NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"

Arrays = tuple[NDArray[Any], ...]
Runner = Callable[[NDArray[Any]], Arrays]


@dataclass(frozen=True)
class ArtefactInfo:
    """What an exported file says of itself.

    Attributes:
        format: of the file.
        precision: of the network's weights and sums; everything around it is float32.
        content: "detections" is the whole detector, "candidates" all but NMS, "network" neither preprocessing nor
            decoding.
        batch: pictures computed together; None if any number.
        config: of the detector.
        provenance: of the checkpoint, as its training recorded it.
        weights, sha256: the checkpoint's name and hash.
        made_with: versions of the libraries that wrote the file.
    """

    format: FormatName
    precision: ExportPrecision
    content: Content
    batch: int | None
    config: DetectorConfig
    provenance: dict[str, Any]
    weights: str
    sha256: str
    made_with: dict[str, str]

    def to_json(self) -> str:
        """Write it as the text that exported files carry."""
        return json.dumps({"version": _VERSION, **vars(self), "config": to_dict(self.config)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, path: Path) -> ArtefactInfo:
        """Read the text of a file.

        Raises:
            CheckpointError: it is damaged or from a newer version.
        """
        try:
            content = json.loads(text)
            if content.pop("version") > _VERSION:
                raise CheckpointError(f"{path}: exported by a newer version of this tool", "upgrade refinedet")
            config = from_dict(DetectorConfig, content.pop("config"))
            info = cls(config=config, **content)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError) as error:
            raise CheckpointError(
                f"{path}: what the file says of itself is damaged ({error})", "export again"
            ) from None
        if not info._is_sound():
            raise CheckpointError(f"{path}: what the file says of itself is damaged", "export again")
        return info

    def _is_sound(self) -> bool:
        return (
            self.format in get_args(FormatName)
            and self.precision in get_args(ExportPrecision)
            and self.content in get_args(Content)
            and (self.batch is None or (isinstance(self.batch, int) and self.batch > 0))
            and isinstance(self.provenance, dict)
            and isinstance(self.made_with, dict)
        )


class Artefact(NamedTuple):
    """An exported file, ready to run.

    Attributes:
        path: the file.
        info: what it says of itself.
        engine: the library that runs it, with its version.
        run: its one input to its outputs, in order: uint8[B, H, W, 3], or float32[B, 3, height, width] for a bare
            network.
    """

    path: Path
    info: ArtefactInfo
    engine: str
    run: Runner


# The cure where there is no exported file of a name.
MISSING = "name a file that `refinedet export` wrote"


def is_artefact(path: Path) -> bool:
    """Tell whether a name is that of an exported file."""
    return path.suffix.lower() in EXPORTED_SUFFIXES


def open_artefact(path: Path, *, device: torch.device | None = None, trusted: bool = False) -> Artefact:
    """Make an exported file ready to run, with as many threads as torch uses.

    Args:
        path: the file; for OpenVINO the .xml, beside which lies the .bin.
        device: None is the CPU.
        trusted: whether a .pt2 may be opened, which can run code that is hidden in it.

    Raises:
        CheckpointError: the file is missing, damaged, or none that `refinedet export` wrote.
        DeviceError: the library cannot compute there.
        UsageError: the library is not installed, or a .pt2 is not trusted.
    """
    require_file(path, MISSING)
    kind = next((name for name, suffix in SUFFIXES.items() if path.suffix.lower() == suffix), None)
    if kind == "onnx":
        return _open_onnx(path, device)
    if device is not None and device.type != "cpu":
        raise DeviceError(f"{path}: files of this kind run on the CPU here", "choose --device cpu")
    if kind == "openvino":
        return _open_openvino(path)
    if not trusted:
        raise UsageError(
            f"{path}: a .pt2 can run code that is hidden in it, so it is opened only where it was just written",
            "take .onnx, OpenVINO or the checkpoint; `refinedet export --check FILE --trust` proves one of yours",
        )
    return _open_torch_export(path)


def _open_onnx(path: Path, device: torch.device | None) -> Artefact:
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    provider = "CPUExecutionProvider"
    if device is not None and device.type != "cpu":
        provider = "CUDAExecutionProvider"
        if device.type != "cuda" or provider not in runtime.get_available_providers():
            raise DeviceError(
                f"{path}: the installed onnxruntime cannot compute on {device.type}",
                "choose --device cpu, or install onnxruntime-gpu",
            )
    try:
        session = runtime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # its errors share no class below Exception
        raise _unreadable(path, "ONNX", error) from None
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    info = _info(text, path)
    [source] = [entry.name for entry in session.get_inputs()]
    return Artefact(
        path=path,
        info=info,
        engine=f"onnxruntime {runtime.__version__}",
        run=lambda pixels: tuple(session.run(None, {source: pixels})),
    )


def _open_openvino(path: Path) -> Artefact:
    openvino, core = import_openvino(), openvino_core()
    # Without the hint, computers that can would compute all of it in bf16, the resize included.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    try:
        model = core.read_model(path)
        text = model.get_rt_info([METADATA_KEY]).astype(str) if METADATA_KEY in model.rt_info else None
        run = _Compiled(lambda: core.compile_model(model, "CPU", settings))
    except RuntimeError as error:
        raise _unreadable(path, "OpenVINO", error) from None
    return Artefact(path, _info(text, path), f"OpenVINO {openvino.__version__.partition('-')[0]}", run)


class _Compiled:
    """A model of OpenVINO that any thread may call, in memory that stays bounded.

    A compiled model has one place for its outputs, whoever calls it; and of every size of pictures it keeps what it has
    prepared, megabytes each, until it goes.
    """

    _MOST_SIZES = 100

    def __init__(self, compile_model: Callable[[], Any]) -> None:
        self._compile = compile_model
        self._model = compile_model()
        self._sizes: set[tuple[int, ...]] = set()
        self._turn = threading.Lock()

    def __call__(self, pixels: NDArray[Any]) -> Arrays:
        with self._turn:
            if pixels.shape not in self._sizes and len(self._sizes) == self._MOST_SIZES:
                self._model = None  # gone before the next takes memory
                self._model = self._compile()
                self._sizes.clear()
            self._sizes.add(pixels.shape)
            found = self._model(pixels)
            return tuple(np.array(found[i]) for i in range(len(self._model.outputs)))


def _open_torch_export(path: Path) -> Artefact:
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith(f"extra/{METADATA_KEY}")), None)
            text = None if name is None else archive.read(name).decode()
        info = _info(text, path)
        module = torch.export.load(path).module()
    except CheckpointError:
        raise
    except Exception as error:  # damage shows as whatever comes first
        raise _unreadable(path, "torch.export", error) from None

    def run(pixels: NDArray[Any]) -> Arrays:
        with torch.inference_mode():
            return tuple(t.numpy() for t in module(torch.from_numpy(pixels)))

    return Artefact(path, info, f"torch.export {torch.__version__}", run)


def require_writers(format_name: FormatName) -> None:
    """Make sure that what writes files of a format is installed.

    Raises:
        UsageError: a library is missing.
    """
    if format_name == "torch-export":
        return
    for name in ("onnx", "onnxscript"):
        _import(name)
    import_onnxruntime()
    if format_name == "openvino":
        import_openvino()


def import_onnxruntime() -> ModuleType:
    """Import ONNX Runtime without its telemetry, which would begin at once: files in the home folder, and reports.

    Raises:
        UsageError: it is not installed.
    """
    before = os.environ.get(_NO_TELEMETRY)
    os.environ[_NO_TELEMETRY] = "1"
    try:
        return _import("onnxruntime")
    finally:
        if before is None:
            del os.environ[_NO_TELEMETRY]
        else:
            os.environ[_NO_TELEMETRY] = before


def import_openvino() -> ModuleType:
    """Import OpenVINO without its telemetry, which would open a connection and write into the home folder.

    Raises:
        UsageError: it is not installed.
    """
    with _absent("openvino_telemetry"):
        return _import("openvino")


@cache
def openvino_core() -> Any:
    """Get the one `openvino.Core` of this process, which stays until it ends.

    Each core's CPU plugin gives the thread a stack for signal handlers and, when it goes, puts back the one it found.
    Of two that go in the order they came, the second puts back the stack that the first freed: the next signal that
    Python handles (Ctrl-C, the end of a loader's worker) ends the process with a segmentation fault.

    Raises:
        UsageError: OpenVINO is not installed.
    """
    return import_openvino().Core()


@contextlib.contextmanager
def _absent(name: str) -> Iterator[None]:
    """Let a package seem not to be installed, if it is not loaded yet."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def _import(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{name} is needed for this file, and cannot be imported ({error})", _INSTALL) from None


def _unreadable(path: Path, kind: str, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:200]
    return CheckpointError(f"{path}: not a readable {kind} file ({reason})", "get the file again, or export anew")


def _info(text: str | None, path: Path) -> ArtefactInfo:
    if text is None:
        raise CheckpointError(
            f"{path}: not a file that `refinedet export` wrote", "its classes and preprocessing are not known"
        )
    return ArtefactInfo.from_json(text, path)


class ArtefactPredictor:
    """An exported file that stands where a checkpoint could; it gives what `Predictor` gives.

    What the file leaves out (NMS, or everything around the network) is computed by the code that a checkpoint uses.

    Args:
        artefact: opened.
        device: that it was opened for.

    Attributes:
        artefact, device: as given.
        schedule: None, as each picture is looked at once.
    """

    schedule = None

    def __init__(self, artefact: Artefact, device: torch.device) -> None:
        self.artefact = artefact
        self.device = device
        finish = {"detections": _read_detections, "candidates": _suppress_candidates}.get(artefact.info.content)
        self._finish = partial(finish, artefact.info.config) if finish else _decode_network(artefact)

    @property
    def config(self) -> DetectorConfig:
        """The config of the detector that was exported."""
        return self.artefact.info.config

    @property
    def classes(self) -> Classes:
        """The classes that labels stand for."""
        return self.config.classes

    @property
    def path(self) -> Path:
        """The exported file."""
        return self.artefact.path

    @property
    def provenance(self) -> dict[str, Any]:
        """What the checkpoint said of how it was made."""
        return self.artefact.info.provenance

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(height, width) of the network's input; the file resizes to it, or this does for a bare network."""
        return self.config.preprocess.height, self.config.preprocess.width

    @property
    def precision(self) -> str:
        """The number format of the network."""
        return self.artefact.info.precision

    @property
    def engine(self) -> str:
        """The library that computes, with its version."""
        return self.artefact.engine

    def predict(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Find the objects in pictures, which may differ in size.

        Args:
            images: pictures uint8[H, W, 3], RGB. Those of one size are computed together as far as the file allows.

        Returns:
            one `Detections` per picture, in order.

        Raises:
            ValueError: a picture is not uint8[H, W, 3].
        """
        sizes = picture_sizes(images)
        found: list[Detections | None] = [None] * len(images)
        for places in self._batches(sizes):
            chosen = [images[i] for i in places]
            # A fixed batch is filled up; what is found in the filling is left.
            filling = (self.artefact.info.batch or 0) - len(chosen)
            with stage("prepare"):
                pixels = self._input([*chosen, *[chosen[-1]] * filling])
            outputs = self.artefact.run(pixels)
            of_these = [sizes[i] for i in places]
            with stage("post-processing"):
                for place, detections in zip(places, self._finish(outputs, of_these), strict=True):
                    found[place] = detections
        return [detections for detections in found if detections is not None]

    def _batches(self, sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
        """Group pictures that can be computed together."""
        groups: dict[tuple[int, int] | None, list[int]] = {}
        for i, size in enumerate(sizes):
            groups.setdefault(None if self.artefact.info.content == "network" else size, []).append(i)
        for places in groups.values():
            together = self.artefact.info.batch or len(places)
            for start in range(0, len(places), together):
                yield places[start : start + together]

    def _input(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[Any]:
        if self.artefact.info.content != "network":
            return np.stack(images)
        config = self.config.preprocess
        tensors = [preprocess(torch.from_numpy(np.require(i, requirements=["C", "W"])), config) for i in images]
        return torch.stack(tensors).numpy()


Sizes = Sequence[tuple[int, int]]


def _read_detections(config: DetectorConfig, outputs: Arrays, sizes: Sizes) -> list[Detections]:
    boxes, scores, labels, counts = (torch.from_numpy(np.require(o, requirements=["W"])) for o in outputs)
    return [
        Detections(boxes[i, :count], scores[i, :count], labels[i, :count])
        for i, count in zip(range(len(sizes)), counts.tolist(), strict=False)
    ]


def _suppress_candidates(config: DetectorConfig, outputs: Arrays, sizes: Sizes) -> list[Detections]:
    boxes, scores = (torch.from_numpy(np.require(o, requirements=["W"])) for o in outputs)
    height, width = sizes[0]
    groups = config.classes.with_background - 1 if config.postprocess.candidates_per == "class" else 1
    best = scores.max(dim=2)
    grouped = Candidates(
        boxes=(boxes / torch.tensor([width, height, width, height])).unflatten(1, (groups, -1)),
        scores=best.values.unflatten(1, (groups, -1)),
        labels=best.indices.unflatten(1, (groups, -1)) + 1,
    )
    return _cut(suppress(grouped, config.postprocess), sizes)


def _decode_network(artefact: Artefact) -> Callable[[Arrays, Sizes], list[Detections]]:
    """Prepare the decoding of a bare network's output; only the family knows which tensor means what."""
    detector = build(artefact.info.config)
    sample = sample_output(detector)
    names = [name for name, value in sample._asdict().items() if isinstance(value, Tensor)]

    def decode(outputs: Arrays, sizes: Sizes) -> list[Detections]:
        tensors = [torch.from_numpy(np.require(o, requirements=["W"])) for o in outputs]
        raw = sample._replace(**dict(zip(names, tensors, strict=True)))
        return _cut(suppress(detector.decoder(raw), artefact.info.config.postprocess), sizes)

    return decode


def _cut(found: BatchDetections, sizes: Sizes) -> list[Detections]:
    """Leave the filling of a fixed batch."""
    return to_detections(BatchDetections(*(t[: len(sizes)] for t in found)), sizes)
