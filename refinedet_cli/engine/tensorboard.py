"""The numbers of a run as TensorBoard reads them; all that knows the package tensorboard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from refinedet_cli.engine.run_log import StepReport
from refinedet_cli.errors import UsageError
from refinedet_cli.metrics.coco import CocoResult

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# What is not yet on disk is lost if the run is killed; the state that it would be resumed from may be newer.
_FLUSH_SECONDS = 5


class EventFiles:
    """Writes event files; each start of a run adds one.

    Args:
        folder: of the event files.
        step: steps done. What files of an earlier start hold beyond it was lost with that start, and TensorBoard leaves
            it out, so that no curve is drawn twice.

    Raises:
        UsageError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = _writer_class()(str(folder), purge_step=step + 1 if step else None, flush_secs=_FLUSH_SECONDS)

    def steps(self, report: StepReport) -> None:
        """Write what the steps since the last report gave."""
        values = {
            "loss/total": report.total,
            **{f"loss/{name}": value for name, value in report.parts.items()},
            **{f"positives/{name}": value for name, value in report.positives.items()},
            "train/lr": report.lr,
            "train/gradient_norm": report.gradient_norm,
            "train/pictures_per_second": report.pictures_per_second,
            "train/epoch": report.epoch,
        }
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, report.step)

    def evaluation(self, step: int, result: CocoResult) -> None:
        """Write the numbers of an evaluation; those that there is no object for are left out."""
        for name, value in vars(result).items():
            if isinstance(value, float):
                self._writer.add_scalar(f"validation/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def require_tensorboard() -> None:
    """Look whether event files can be written, before anything is done.

    Raises:
        UsageError: the package tensorboard is not installed.
    """
    _writer_class()


def drop_events(folder: Path) -> None:
    """Remove the event files of an earlier run; other files stay."""
    for path in folder.glob("events.out.tfevents.*"):
        path.unlink(missing_ok=True)


def _writer_class() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            f"--tensorboard needs the package tensorboard, which cannot be imported ({error})",
            'pip install "refinedet[tensorboard]", or leave --tensorboard out: run.html shows the same numbers',
        ) from None
    return SummaryWriter
