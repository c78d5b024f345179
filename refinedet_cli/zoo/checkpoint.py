"""Checkpoints: one safetensors file whose header rebuilds the detector."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from refinedet_cli.core.build import build
from refinedet_cli.core.config import DetectorConfig, from_dict, to_dict
from refinedet_cli.core.detector import Detector
from refinedet_cli.errors import CheckpointError, ConfigError
from refinedet_cli.files import require_file, sync_folder, whole_file

FORMAT = "refinedet"
FORMAT_VERSION = 1
# Of files that `refinedet export` writes.
EXPORTED_SUFFIXES = (".onnx", ".xml", ".pt2")

Header = dict[str, Any]
# Each entry turns a header and its tensors of that version into the next version's.
MIGRATIONS: dict[int, Callable[[Header, dict[str, Tensor]], tuple[Header, dict[str, Tensor]]]] = {}


@dataclass(frozen=True)
class LoadedDetector:
    """A detector with its trained weights and what is known of their origin.

    Attributes:
        detector: in evaluation mode, float32, on the CPU.
        provenance: tool version, preset, seed, data and metrics, as the training run recorded them.
        path: the file it came from.
    """

    detector: Detector
    provenance: dict[str, Any]
    path: Path

    @property
    def config(self) -> DetectorConfig:
        """The config the detector was built from."""
        return self.detector.config


def save_checkpoint(
    path: Path,
    config: DetectorConfig,
    tensors: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write weights with everything needed to use them; the same content gives the same bytes.

    Args:
        path: where to; written whole and safely on disk, so that any end leaves the old file or the new one.
        config: rebuilds the detector, its classes and preprocessing included.
        tensors: the network's state; floating-point tensors are stored as ``dtype``.
        provenance: plain data on how the weights were made.
        dtype: float32, or float16 for half the size.

    Raises:
        CheckpointError: a weight is not finite, or does not fit the dtype; nothing is written.
        DataError: the file cannot be written; what was there before is untouched.
    """
    stored = {
        name: (t.detach().to(dtype) if t.is_floating_point() else t.detach()).cpu().contiguous()
        for name, t in tensors.items()
    }
    for name, tensor in stored.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: weight {name!r} is not finite as {dtype}", "the training run has diverged")
    header = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(to_dict(config)),
        "provenance": json.dumps(dict(provenance), allow_nan=False),
    }
    content = _in_order(save(stored, metadata=header))
    with whole_file(path, size=len(content)) as file:
        file.write(content)
    sync_folder(path.resolve().parent)


def _in_order(content: bytes) -> bytes:
    """Sort the header's own entries, which the library orders anew in every process."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(content)[end:]])


def read_header(path: Path) -> tuple[DetectorConfig, dict[str, Any]]:
    """Read config and provenance without the weights.

    Raises:
        CheckpointError: the file is missing, is no checkpoint of ours, or is from a newer version.
    """
    header, _ = _read(path, tensors=False)
    return _config(path, header), header["provenance"]


def load_detector(path: Path) -> LoadedDetector:
    """Rebuild a detector from its checkpoint.

    Returns:
        `LoadedDetector`; every weight of the file is used and every weight of the network is in the file.

    Raises:
        CheckpointError: the file is missing, damaged, no checkpoint of ours, or does not hold exactly the weights that
            its own config asks for.
    """
    header, tensors = _read(path, tensors=True)
    config = _config(path, header)
    detector = build(config)
    try:
        detector.network.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: the weights do not fit the file's own config: {reason[:300]}", "the file is damaged; get it again"
        ) from None
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: weight {name!r} is not finite", "the file is damaged; get it again")
    detector.network.eval()
    return LoadedDetector(detector=detector, provenance=header["provenance"], path=path)


def file_sha256(path: Path) -> str:
    """Hash a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path, *, tensors: bool) -> tuple[Header, dict[str, Tensor]]:
    require_file(path, "name a .safetensors file that `refinedet train` wrote")
    if path.suffix.lower() in EXPORTED_SUFFIXES:
        raise CheckpointError(
            f"{path}: an exported file, which can only detect", "name the .safetensors file that it was made from"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys() if tensors else []
            content = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        if path.suffix.lower() != ".safetensors":
            raise CheckpointError(
                f"{path}: not a checkpoint of this tool, which is a .safetensors file", _import_cure(path)
            ) from None
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})", "get the file again") from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint of this tool", _import_cure(path))
    try:
        version = int(metadata["format_version"])
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: written by a newer version of this tool (format {version})", "upgrade refinedet"
            )
        if version < FORMAT_VERSION and version not in MIGRATIONS:
            raise ValueError(f"there is no format {version}")
        header: Header = {
            "format_version": version,
            "config": json.loads(metadata["config"]),
            "provenance": json.loads(metadata["provenance"]),
        }
        if not isinstance(header["provenance"], dict):
            raise ValueError("provenance is not a table")
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is damaged ({error!r})", "get the file again") from None
    while header["format_version"] < FORMAT_VERSION:
        header, content = MIGRATIONS[header["format_version"]](header, content)
    return header, {name: t.float() if t.is_floating_point() else t for name, t in content.items()}


def _import_cure(path: Path) -> str:
    return f"a detector of another project becomes one with: refinedet weights import {path}"


def _config(path: Path, header: Header) -> DetectorConfig:
    try:
        return from_dict(DetectorConfig, header["config"])
    except ConfigError as error:
        raise CheckpointError(f"{path}: the stored config is not valid: {error.message}", error.hint) from None
