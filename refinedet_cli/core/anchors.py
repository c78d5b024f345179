"""Anchors of a feature pyramid."""

from __future__ import annotations

import torch
from torch import Tensor

from refinedet_cli.core.config import AnchorConfig


def level_sizes(config: AnchorConfig, height: int, width: int) -> list[tuple[int, int]]:
    """Compute the (rows, columns) of each level for an input of a given size, px-in.

    Returns:
        Cells enough to cover the input: the last of a row or column reaches over its edge where the stride does not
        divide the side.

    Raises:
        ValueError: a side is not positive.
    """
    if height <= 0 or width <= 0:
        raise ValueError(f"input must be positive on both sides, got {height} x {width}")
    return [(-(-height // s), -(-width // s)) for s in config.strides]


def anchors_per_cell(config: AnchorConfig) -> tuple[int, ...]:
    """Count the anchors of one cell, level by level."""
    return tuple(len(level) for level in config.shapes)


def tile_anchors(config: AnchorConfig, height: int, width: int) -> Tensor:
    """Place every anchor at the centre of every cell.

    Args:
        config: strides and shapes; shapes stay in px-in whatever the input size.
        height: input height, px-in.
        width: input width, px-in.

    Returns:
        float32[A, 4], cxcywh, norm, not clipped; levels in order, cells row by row, anchors of a cell in the order of
        the config. 320 x 320 with three anchors a cell gives 6375, 512 x 512 gives 16320.

    Source: prior_box_layer of the official code, offset 0.5, clip off.
    """
    levels = []
    size = torch.tensor([width, height], dtype=torch.float64)
    for (rows, columns), stride, shapes in zip(
        level_sizes(config, height, width), config.strides, config.shapes, strict=True
    ):
        y = (torch.arange(rows, dtype=torch.float64) + 0.5) * stride
        x = (torch.arange(columns, dtype=torch.float64) + 0.5) * stride
        centres = torch.stack([x.expand(rows, columns), y[:, None].expand(rows, columns)], dim=-1)  # [rows, columns, 2]
        shape = torch.tensor(shapes, dtype=torch.float64)  # [per cell, 2]
        cells = torch.cat(
            [
                centres[:, :, None].expand(-1, -1, len(shapes), -1) / size,
                (shape / size).expand(rows, columns, -1, -1),
            ],
            dim=-1,
        )
        levels.append(cells.reshape(-1, 4))
    return torch.cat(levels).float()


class AnchorCache:
    """Anchors of the input sizes seen so far, on the device they are asked for."""

    def __init__(self, config: AnchorConfig) -> None:
        self.config = config
        self._tiled: dict[tuple[tuple[int, int], torch.device], Tensor] = {}

    def __call__(self, input_size: tuple[int, int], device: torch.device) -> Tensor:
        """Return float32[A, 4], cxcywh, norm."""
        key = (input_size, device)
        if key not in self._tiled:
            self._tiled[key] = tile_anchors(self.config, *input_size).to(device)
        return self._tiled[key]
