"""What a run writes down step by step: averages in log.csv, evaluations in metrics.csv."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refinedet_cli.core.structures import LossParts
from refinedet_cli.data.loading import Batch, Plan
from refinedet_cli.metrics.coco import CocoResult

LOG_FILE = "log.csv"
METRICS_FILE = "metrics.csv"
REPORT_EVERY_SECONDS = 2.0


@dataclass(frozen=True)
class StepReport:
    """Where training is; averages are over the steps since the last report.

    Attributes:
        step, steps: done and in all.
        epoch: passes done.
        lr: rate of the heads.
        input_size: height and width of this step's pictures, px-in.
        total: the loss.
        parts: its terms.
        positives: matched anchors per picture, by module.
        gradient_norm: before clipping.
        pictures_per_second: over the last report's steps.
        seconds_left: at that speed, evaluations not counted.
    """

    step: int
    steps: int
    epoch: float
    lr: float
    input_size: tuple[int, int]
    total: float
    parts: dict[str, float]
    positives: dict[str, float]
    gradient_norm: float
    pictures_per_second: float
    seconds_left: float


class RunLog:
    """Averages of the steps since the last report, and the run's CSV files."""

    def __init__(self, out: Path) -> None:
        self.steps, self.metrics = out / LOG_FILE, out / METRICS_FILE
        self._sums: dict[str, Tensor] = {}
        self._count = self._pictures = 0
        self._since = time.monotonic()

    def restart(self) -> None:
        """Drop what an earlier run wrote."""
        for path in (self.steps, self.metrics):
            path.unlink(missing_ok=True)

    def cut(self, step: int) -> None:
        """Drop the rows beyond a step, which a resumed run will write again."""
        for path in (self.steps, self.metrics):
            if path.is_file():
                head, *rows = path.read_text(encoding="utf-8").splitlines()
                kept = [r for r in rows if r and int(r.split(",")[0]) <= step]
                path.write_text("\n".join([head, *kept, ""]), encoding="utf-8")

    def add(
        self, loss: LossParts, norm: Tensor, batch: Batch, *, step: int, plan: Plan, lr: float, size: torch.Size
    ) -> StepReport | None:
        """Take one step in; a report every `REPORT_EVERY_SECONDS` and at the end of the run."""
        values = {"total": loss.total.detach(), "gradient_norm": norm.detach(), **loss.parts}
        values |= {f"positives_{name}": n / len(batch.indices) for name, n in loss.positives.items()}
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1
        self._pictures += len(batch.indices)
        elapsed = time.monotonic() - self._since
        if elapsed < REPORT_EVERY_SECONDS and step < plan.steps:
            return None
        means = {name: float(value) / self._count for name, value in self._sums.items()}
        report = StepReport(
            step=step,
            steps=plan.steps,
            epoch=step / plan.steps_per_epoch,
            lr=lr,
            input_size=(size[0], size[1]),
            total=means["total"],
            parts={name: means[name] for name in loss.parts},
            positives={name: means[f"positives_{name}"] for name in loss.positives},
            gradient_norm=means["gradient_norm"],
            pictures_per_second=self._pictures / elapsed,
            seconds_left=(plan.steps - step) * elapsed / self._count,
        )
        self._sums, self._count, self._pictures, self._since = {}, 0, 0, time.monotonic()
        row = {
            "step": step,
            "epoch": round(report.epoch, 4),
            "lr": f"{lr:.6g}",
            "input": f"{size[0]}x{size[1]}",
            **{name: f"{value:.5g}" for name, value in means.items()},
            "pictures_per_second": round(report.pictures_per_second, 2),
        }
        _append(self.steps, row)
        return report

    def evaluation(self, step: int, epoch: float, result: CocoResult) -> None:
        """Write an evaluation down."""
        numbers = {k: v for k, v in asdict(result).items() if isinstance(v, float) or v is None}
        _append(self.metrics, {"step": step, "epoch": round(epoch, 4), **numbers})
        self._since = time.monotonic()


def _append(path: Path, row: Mapping[str, Any]) -> None:
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
