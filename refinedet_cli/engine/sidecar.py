"""The file beside an exported one: hashes, classes, versions, and pictures with which anyone can prove it again."""

from __future__ import annotations

import base64
import io
import json
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from refinedet_cli import __version__
from refinedet_cli.core.preprocess import resize_weights
from refinedet_cli.core.structures import Detections
from refinedet_cli.engine.artefact import (
    MISSING,
    Artefact,
    ArtefactInfo,
    ArtefactPredictor,
    FormatName,
    open_artefact,
)
from refinedet_cli.engine.predict import AnyPredictor
from refinedet_cli.engine.proof import TOLERANCES, Proof, compare, judge
from refinedet_cli.errors import CheckpointError, GateError
from refinedet_cli.files import require_file
from refinedet_cli.zoo.checkpoint import file_sha256

SIDECAR_SUFFIX = ".json"
_GOLDEN_PICTURES = 3
_GOLDEN_SIDE = 320

Pixels = NDArray[np.uint8]


class Picture(NamedTuple):
    """A picture by a name for people."""

    name: str
    pixels: Pixels


class KeptPicture(NamedTuple):
    """A picture of a sidecar, and what the checkpoint found in it."""

    name: str
    pixels: Pixels
    found: Detections


class GoldenPictures:
    """The few pictures in which most was found, shrunk, so that a sidecar can keep them.

    Args:
        above: objects that score no more do not count.

    """

    def __init__(self, above: float) -> None:
        self._above = above
        self._best: list[tuple[int, Picture]] = []

    @property
    def pictures(self) -> list[Picture]:
        """Those with most objects, most first."""
        return [picture for _, picture in self._best]

    def proven(self, reference: AnyPredictor, artefact: Artefact) -> list[KeptPicture]:
        """Give the pictures with what the reference finds in them, as far as an exported file finds the same.

        Shrunk, a picture is another one; a few boxes may then weigh more than is tolerated.
        """
        kept = [KeptPicture(name, pixels, reference.predict([pixels])[0]) for name, pixels in self.pictures]
        return [picture for picture in kept if prove_golden(artefact, [picture]).holds]

    def consider(self, name: str, read: Callable[[], Pixels], found: Detections) -> None:
        """Keep a picture if more was found in it than in one of those kept; it is read only then."""
        objects = len(found.above(self._above))
        if not objects or (len(self._best) == _GOLDEN_PICTURES and objects <= self._best[-1][0]):
            return
        self._best.append((objects, Picture(name, _shrunk(read()))))
        self._best.sort(key=lambda entry: -entry[0])
        del self._best[_GOLDEN_PICTURES:]


def _shrunk(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    factor = min(1.0, _GOLDEN_SIDE / max(height, width))
    rows = resize_weights(0, height, height, max(1, round(height * factor)))
    columns = resize_weights(0, width, width, max(1, round(width * factor)))
    planes = rows @ (torch.from_numpy(pixels.copy()).float().permute(2, 0, 1) @ columns.T)
    return planes.round().clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy()


class Sidecar(NamedTuple):
    """What is kept beside an exported file: the hashes of all its files by name, and pictures to prove it on."""

    files: dict[str, str]
    golden: list[KeptPicture]


def sidecar_text(info: ArtefactInfo, proof: Proof, files: Sequence[Path], golden: Sequence[KeptPicture]) -> str:
    """Make the text of a sidecar, a JSON document.

    Args:
        info: what the exported file says of itself.
        proof: that it does what the checkpoint does.
        files: the exported file and those that belong to it, which are hashed.
        golden: pictures to keep.
    """
    document = {
        "schema_version": 1,
        "info": json.loads(info.to_json()),
        "files": {path.name: {"sha256": file_sha256(path), "bytes": path.stat().st_size} for path in files},
        "proof": {"agreement": asdict(proof.agreement), "accuracy": proof.accuracy and asdict(proof.accuracy)},
        "golden": [
            {
                "name": name,
                "png": base64.b64encode(_png(pixels)).decode(),
                "boxes": found.boxes.tolist(),
                "scores": found.scores.tolist(),
                "labels": found.labels.tolist(),
            }
            for name, pixels, found in golden
        ],
    }
    return json.dumps(document, allow_nan=False) + "\n"


def _png(pixels: Pixels) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG", optimize=True)
    return encoded.getvalue()


def read_sidecar(path: Path) -> Sidecar:
    """Read the sidecar of an exported file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    sidecar = path.with_name(f"{path.name}{SIDECAR_SUFFIX}")
    require_file(sidecar, "it is written beside every export; copy it along")
    try:
        document = json.loads(sidecar.read_text(encoding="utf-8"))
        files = {str(name): str(entry["sha256"]) for name, entry in document["files"].items()}
        if any(Path(name).name != name for name in files):
            raise ValueError("a file is not beside it")
        golden = [_kept(entry) for entry in document["golden"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{sidecar}: damaged ({error})", "get it again, or export anew") from None
    return Sidecar(files, golden)


def _kept(entry: dict[str, Any]) -> KeptPicture:
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(entry["png"]))).convert("RGB"))
    found = Detections(
        torch.tensor(entry["boxes"]).reshape(-1, 4), torch.tensor(entry["scores"]), torch.tensor(entry["labels"])
    )
    return KeptPicture(str(entry["name"]), pixels, found)


@dataclass(frozen=True)
class CheckResult:
    """What came of proving a file again.

    Attributes:
        info: what the file says of itself.
        engine: what ran it.
        proof: against what its sidecar keeps.
        made_with: other versions than those that wrote it, as (name, then, now).
    """

    info: ArtefactInfo
    engine: str
    proof: Proof
    made_with: tuple[tuple[str, str, str], ...]


def check(path: Path, *, trusted: bool = False) -> CheckResult:
    """Prove an exported file again, wherever it is, with what its sidecar keeps.

    Args:
        path: the file; the sidecar lies beside it.
        trusted: as for `open_artefact`.

    Raises:
        CheckpointError: the file or its sidecar is missing or damaged.
        GateError: it is not the file that was proven.
    """
    require_file(path, MISSING)
    sidecar = read_sidecar(path)
    for name, sha256 in sidecar.files.items():
        member = path.with_name(name)
        require_file(member, "copy it along with the others")
        if file_sha256(member) != sha256:
            raise GateError(f"{member}: not the file that was proven, its content has changed", "get the file again")
    artefact = open_artefact(path, trusted=trusted)
    return CheckResult(
        info=artefact.info,
        engine=artefact.engine,
        proof=prove_golden(artefact, sidecar.golden),
        made_with=_changed(artefact.info),
    )


def prove_golden(artefact: Artefact, golden: Sequence[KeptPicture]) -> Proof:
    """Compare what a file finds in kept pictures with what the checkpoint found in them."""
    tolerance = TOLERANCES[artefact.info.precision]
    predictor = ArtefactPredictor(artefact, torch.device("cpu"))
    pairs = ((kept.name, kept.found, predictor.predict([kept.pixels])[0]) for kept in golden)
    return judge(compare(pairs, tolerance, artefact.info.config.postprocess), None, tolerance)


def versions(format_name: FormatName) -> dict[str, str]:
    """Tell the versions of what writes and runs files of a format, as far as it is installed."""
    others: dict[FormatName, tuple[str, ...]] = {
        "onnx": ("onnx", "onnxruntime"),
        "openvino": ("onnx", "openvino"),
        "torch-export": (),
    }
    known = {"refinedet": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    for name in others[format_name]:
        # Who only runs a file needs no writer, and onnxruntime comes under several names.
        with suppress(PackageNotFoundError):
            known[name] = version(name)
    return known


def _changed(info: ArtefactInfo) -> tuple[tuple[str, str, str], ...]:
    now = versions(info.format)
    return tuple((name, then, now[name]) for name, then in info.made_with.items() if now.get(name, then) != then)
