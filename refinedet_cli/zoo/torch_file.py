"""Files that ``torch.save`` wrote, read so that nothing in them can run or take more memory than the file is long.

``torch.load(weights_only=True)`` runs no code, but it makes storages, byte arrays and archives as large as the file
says. So what a file says is checked first, in both of its forms: an archive (since torch 1.6) and a row of pickles.
"""

from __future__ import annotations

import io
import itertools
import mmap
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from refinedet_cli.errors import CheckpointError

ARCHIVE, PICKLE = b"PK\x03\x04", b"\x80\x02"

_MAX_ENTRIES = 20_000
_MAX_PICKLE = 16 << 20
_MAX_OPERATIONS = 2_000_000
# In a row of pickles: a magic number, the version and the machine, which hold odd numbers; content; names of storages.
_LEADING, _PICKLES = 3, 5
_STORAGES = ("Float", "Half", "Double", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
# All that a dictionary of tensors needs.
_ALLOWED = {
    "collections OrderedDict", "torch Size", "torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter", "torch.nn.parameter Parameter", "torch.storage UntypedStorage",
    *(f"torch {kind}Storage" for kind in _STORAGES),
}  # fmt: skip
_IMPORTS = {"INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}


class UnreadableFileError(CheckpointError):
    """A file of weights that is damaged."""


def load_torch_file(path: Path) -> Any:
    """Read a file of ``torch.save`` that holds tensors, numbers, texts, lists and dictionaries.

    Args:
        path: there has to be a file.

    Returns:
        What was saved, on the CPU. A tensor's numbers lie in the file, though strides may repeat them: `is_plain`.

    Raises:
        UnreadableFileError: it is damaged, or no file of ``torch.save``.
        CheckpointError: it holds more than that, such as a whole module; nothing of it was run.
    """
    try:
        with path.open("rb") as file:
            _check(path, file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, "cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # of a damaged file, anything: there is no list of what these readers raise
        reason = f"it is damaged or not whole ({type(error).__name__})"
        raise UnreadableFileError(f"{path}: cannot be read, {reason}", "get the file again") from None


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor has as many numbers as its shape says, and as an ordinary array."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _check(path: Path, file: BinaryIO) -> None:
    size = path.stat().st_size
    if file.read(4) == ARCHIVE:
        _check_archive(path, file, size)
        return
    file.seek(0)
    head = io.BytesIO(file.read(_MAX_PICKLE))
    for place in range(_PICKLES):
        _check_pickle(path, head, None if place < _LEADING else size)


def _check_archive(path: Path, file: BinaryIO, size: int) -> None:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        listed = re.finditer(b"PK\x01\x02", content)
        if sum(1 for _ in itertools.islice(listed, _MAX_ENTRIES + 1)) > _MAX_ENTRIES:
            raise ValueError("too many entries")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any("/code/" in entry.filename for entry in entries):
            raise CheckpointError(f"{path}: a TorchScript program, which is not run", "save its state_dict() alone")
        # torch.save neither compresses nor lets entries overlap, so what is inside is smaller than the file.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("larger than the file")
        (pickled,) = (entry for entry in entries if entry.filename.endswith("data.pkl"))
        if pickled.file_size > _MAX_PICKLE:
            raise ValueError("too long a pickle")
        _check_pickle(path, io.BytesIO(archive.read(pickled)), size)


def _check_pickle(path: Path, pickle: BinaryIO, largest: int | None) -> None:
    """Go through a pickle without obeying it: what it imports, and no number beyond the file's length."""
    for count, (operation, argument, _) in enumerate(pickletools.genops(pickle)):
        if count > _MAX_OPERATIONS:
            raise ValueError("too long a pickle")
        if operation.name in _IMPORTS or (operation.name == "GLOBAL" and argument not in _ALLOWED):
            name = ".".join(str(argument).split()) if operation.name in ("GLOBAL", "INST") else operation.name
            raise CheckpointError(
                f"{path}: refused, it holds more than tensors ({name[:80]})",
                "save the state dict alone, or as safetensors",
            )
        if largest is not None and isinstance(argument, int) and abs(argument) > largest and _is_number(operation):
            raise ValueError("a number beyond the file's length")


def _is_number(operation: pickletools.OpcodeInfo) -> bool:
    return operation.name.startswith(("INT", "BININT", "LONG")) and "PUT" not in operation.name
