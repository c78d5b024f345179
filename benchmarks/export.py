"""Export every preset with untrained weights and prove each file: the table of what exports.

Usage: python benchmarks/export.py [PRESET ...] [--format onnx openvino] [--quick]

There are no trained weights for most presets, so heads are drawn with a fixed seed and scaled until the class logits of
every level have a standard deviation of 2.5: with logits that lie close together, rounding alone would decide which of
two boxes wins. And most places are made background, as with trained weights: else the limit on candidates would cut
between scores that rounding orders. Files go to a temporary folder and are removed; the largest takes 350 MB for a
while. Besides the presets as they are, the default is exported with 1, 20 and 80 classes, at 512 x 512 and 384 x 640,
VGG-16 and ResNet-101 with 1 class and with 80 at 256 x 384.

Exit code 7 if a proof fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from refinedet_cli.core.anchors import anchors_per_cell, level_sizes
from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes, DetectorConfig
from refinedet_cli.core.detector import Detector
from refinedet_cli.core.presets import DEFAULT_PRESET, PRESETS, get_preset
from refinedet_cli.engine.artefact import FormatName
from refinedet_cli.engine.export import ExportOptions, export
from refinedet_cli.zoo.checkpoint import save_checkpoint

SPREAD = 2.5
FOREGROUND = 300
EXIT_GATE = 7


class Case(NamedTuple):
    """A detector to export."""

    preset: str
    classes: int = 20
    height: int | None = None
    width: int | None = None

    def config(self) -> DetectorConfig:
        """Build its config."""
        names = tuple(f"class {i}" for i in range(1, self.classes + 1))
        config = get_preset(self.preset, Classes(names=names, category_ids=tuple(range(1, self.classes + 1)))).detector
        size = config.preprocess
        size = replace(size, height=self.height or size.height, width=self.width or size.width)
        return replace(config, preprocess=size)


def cases(presets: list[str], *, quick: bool) -> Iterator[Case]:
    """List what is to be exported."""
    for preset in presets:
        yield Case(preset)
        if quick:
            continue
        if preset == DEFAULT_PRESET:
            yield from (Case(preset, 1), Case(preset, 80), Case(preset, 20, 512, 512), Case(preset, 20, 384, 640))
        elif preset in ("refinedet320_vgg16", "refinedet320_resnet101"):
            yield from (Case(preset, 1), Case(preset, 80, 256, 384))


def spread_detector(config: DetectorConfig) -> Detector:
    """Build a detector whose random heads tell anchors apart."""
    torch.manual_seed(0)
    detector = build(config)
    network: Any = detector.network.eval()
    generator = torch.Generator().manual_seed(1)
    size = config.preprocess
    with torch.no_grad():
        noise = torch.randn(1, 3, size.height, size.width, generator=generator) * 60 / max(size.std)
        raw = network(noise)
        counts = [
            rows * columns * each
            for (rows, columns), each in zip(
                level_sizes(config.anchors, size.height, size.width), anchors_per_cell(config.anchors), strict=True
            )
        ]
        for head, logits in ((network.arm, raw.arm_logits), (network.odm, raw.odm_logits)):
            for level, of_level in zip(head.levels, cast(Tensor, logits).split(counts, dim=1), strict=True):
                factor = SPREAD / of_level.std()
                level.weight *= factor
                level.bias *= factor
        again = network(noise)
        shift = background_shift(again.odm_logits)
        for level in network.odm.levels:
            level.bias.view(-1, config.classes.with_background + 4)[:, 0] += shift
    return detector


def background_shift(logits: Tensor) -> float:
    """Find how much more likely background must be for `FOREGROUND` candidates to score above 0.05."""
    low, high = 0.0, 100.0
    for _ in range(30):
        middle = (low + high) / 2
        shifted = logits.clone()
        shifted[..., 0] += middle
        many = int((shifted.softmax(dim=-1)[..., 1:] > 0.05).sum()) > FOREGROUND
        low, high = (middle, high) if many else (low, middle)
    return high


def export_case(case: Case, format_name: FormatName, folder: Path) -> tuple[str, ...]:
    """Export and prove one detector; returns a row of the table."""
    config = case.config()
    weights = folder / "weights.safetensors"
    detector = spread_detector(config)
    save_checkpoint(weights, config, detector.network.state_dict(), {"note": "random, for a test of export"})
    start = time.perf_counter()
    result = export(weights, folder / "out", ExportOptions(format=format_name))
    seconds = time.perf_counter() - start
    size, agreement = config.preprocess, result.proof.agreement
    for path in (*result.files, weights):
        path.unlink()
    return (
        case.preset,
        f"{size.height} x {size.width}",
        f"{case.classes}",
        format_name,
        f"{agreement.boxes:,}",
        f"{agreement.unmatched}",
        f"{agreement.least_iou:.6f}" if agreement.least_iou is not None else "",
        f"{agreement.score_shift:.1e}",
        f"{seconds:.0f}",
        "proven" if result.proof.holds else "FAILED",
    )


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("presets", nargs="*", metavar="PRESET", help=", ".join(PRESETS))
    parser.add_argument(
        "--format", nargs="+", choices=("onnx", "openvino", "torch-export"), default=["onnx", "openvino"]
    )
    parser.add_argument("--quick", action="store_true", help="each preset once, as it is")
    chosen = parser.parse_args(argv)
    heads = ("Preset", "Input", "Classes", "Format", "Boxes", "Unmatched", "Lowest IoU", "Score shift", "Seconds", "")
    widths = (26, 10, 7, 12, 6, 9, 10, 11, 7, 6)
    print("  ".join(h.ljust(w) for h, w in zip(heads, widths, strict=True)))
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(chosen.presets or list(PRESETS), quick=chosen.quick):
            for format_name in chosen.format:
                row = export_case(case, format_name, Path(folder))
                failed |= row[-1] == "FAILED"
                print("  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)), flush=True)
    return EXIT_GATE if failed else 0


if __name__ == "__main__":
    sys.exit(main())
