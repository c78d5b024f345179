"""Start a network from the weights of one with another class list, and read files of tensors with care."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from refinedet_cli.errors import CheckpointError


class UnreadableFileError(CheckpointError):
    """A file of weights that is damaged."""


@dataclass(frozen=True)
class WarmStart:
    """What a network took over, by the names of its tensors.

    Attributes:
        copied: taken as they were.
        remapped: class outputs taken row by row.
        fresh: left at their random start, because there was nothing of their shape.
    """

    copied: tuple[str, ...]
    remapped: tuple[str, ...]
    fresh: tuple[str, ...]


def copy_detector(
    network: nn.Module, source: Mapping[str, Tensor], label_map: Mapping[int, int], classes: int, source_classes: int
) -> WarmStart:
    """Copy a detector's weights into a network with another class list.

    Args:
        network: the new detector's network; written to.
        source: the old network's state.
        label_map: new label to old label, for the classes both know; background 0 is added.
        classes: outputs per anchor of the new detection heads, background included.
        source_classes: the same of the old ones.

    Returns:
        `WarmStart`. Class outputs without a counterpart keep their fresh weights.
    """
    copied, remapped, fresh = [], [], []
    rows = {0: 0, **label_map}
    state = network.state_dict()
    for name, tensor in state.items():
        old = source.get(name)
        if old is None:
            fresh.append(name)
        elif (
            name.startswith("odm.")
            and tensor.shape[0] * (source_classes + 4) == old.shape[0] * (classes + 4)
            and tensor.shape[1:] == old.shape[1:]
        ):
            new_rows = tensor.view(-1, classes + 4, *tensor.shape[1:])
            old_rows = old.view(-1, source_classes + 4, *old.shape[1:])
            for new_label, old_label in rows.items():
                new_rows[:, new_label] = old_rows[:, old_label]
            new_rows[:, classes:] = old_rows[:, source_classes:]
            remapped.append(name)
        elif old.shape == tensor.shape:
            tensor.copy_(old)
            copied.append(name)
        else:
            fresh.append(name)
    return WarmStart(tuple(copied), tuple(remapped), tuple(fresh))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors or from a PyTorch file, never running code from it.

    Raises:
        CheckpointError: the file is missing, damaged, or a pickle of something other than tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file", "name a .safetensors or .pth file of tensors")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise UnreadableFileError(f"{path}: cannot be read ({type(error).__name__})", "get the file again") from None
    except Exception as error:  # weights_only refuses with pickle.UnpicklingError among others
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors ({type(error).__name__})",
            "save the state dict alone, or as safetensors",
        ) from None
    if not isinstance(content, dict) or not all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in content.items()
    ):
        raise CheckpointError(f"{path}: not a plain state dict", "save the state dict alone, or as safetensors")
    return content
