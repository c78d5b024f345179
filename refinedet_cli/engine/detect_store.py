"""Where a run puts what it finds: into a folder, from which it can go on, or nowhere but into the sums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, Self

from refinedet_cli.core.config import Classes
from refinedet_cli.engine.detect_journal import (
    JOURNAL_NAME,
    Earlier,
    Journal,
    RunKey,
    journal_name,
    journals_in,
    look_at,
)
from refinedet_cli.engine.detect_outputs import (
    refuse_copies_of_strangers,
    refuse_strangers,
    remove_earlier,
    write_outputs,
)
from refinedet_cli.engine.detect_shards import is_own, wait_for_all
from refinedet_cli.engine.distributed import Shard
from refinedet_cli.engine.results import RESULTS_NAME, ClassTally, PictureRecord, write_records
from refinedet_cli.engine.stages import stage
from refinedet_cli.errors import UsageError

# Pictures, and failures, that a result lists, and objects in these pictures together; the files list all.
LISTED = 1000
LISTED_OBJECTS = 50_000


class Summary:
    """What a run found, in numbers, and its first pictures.

    Attributes:
        pictures: the first that were read, up to `LISTED` with `LISTED_OBJECTS`.
        problems: the first `LISTED` that failed, or of which something could not be written.
        count: all pictures.
        read: those that were read.
        failed: pictures with a problem.
        with_objects: pictures in which something was found.
        annotated, crops: files written.
        sides: how many pictures have which longer side, px-img.
        classes: counts what was found.
    """

    def __init__(self, classes: Classes) -> None:
        self.pictures: list[PictureRecord] = []
        self.problems: list[PictureRecord] = []
        self.count = self.read = self.failed = self.with_objects = self.annotated = self.crops = 0
        self._listed_objects = 0
        self.sides: Counter[int] = Counter()
        self.classes = ClassTally(classes)

    def add(self, record: PictureRecord) -> None:
        """Count a picture."""
        self.count += 1
        if record.was_read:
            self.read += 1
            self.sides[max(record.width, record.height)] += 1
            self._listed_objects += len(record.rows)
            if len(self.pictures) < LISTED and self._listed_objects <= LISTED_OBJECTS:
                self.pictures.append(record)
        if record.problem is not None:
            self.failed += 1
            if len(self.problems) < LISTED:
                self.problems.append(record)
        self.with_objects += bool(record.rows)
        self.annotated += record.annotated is not None
        self.crops += len(record.crops)
        self.classes.add(record.rows)


class Store(Protocol):
    """Where records go; a context manager."""

    @property
    def done(self) -> int:
        """Records that it has."""

    @property
    def removed(self) -> int:
        """Files of an earlier run that were in its way and are gone."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def wants(self, image_id: int) -> bool:
        """Tell whether this process has to work on a picture."""

    def begin(self) -> None:
        """Get ready for the first record; calls after the first do nothing."""

    def append(self, record: PictureRecord) -> None:
        """Take a record."""

    def stop(self) -> None:
        """Leave what is there in order, when the run ends before its end."""

    def finish(self) -> list[Path]:
        """Write what is made of all records together, and tell which files."""

    def summary(self) -> Summary:
        """Sum up."""


class InMemory:
    """Keeps the sums alone."""

    def __init__(self, classes: Classes, shard: Shard | None, batch: int) -> None:
        self.done = self.removed = 0
        self._summary = Summary(classes)
        self._shard, self._batch = shard, batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wants(self, image_id: int) -> bool:
        """All are wanted that are in the blocks of this process."""
        return is_own(image_id, self._shard, self._batch)

    def begin(self) -> None:
        """Nothing has to be made ready."""

    def append(self, record: PictureRecord) -> None:
        """Count a record."""
        self._summary.add(record)

    def stop(self) -> None:
        """Nothing has to be left in order."""

    def finish(self) -> list[Path]:
        """Nothing is written."""
        return []

    def summary(self) -> Summary:
        """What was counted."""
        return self._summary


class OnDisk:
    """Keeps a journal in a folder, and makes the other files of it.

    Args:
        out: the folder; it exists.
        key: of the run.
        classes: of the detector.
        outputs: formats to write, and kinds of pictures.
        drawn: names of the pictures that are drawn.
        resume: go on with what is there.
        shard: the part of this process; None where it is alone.
        batch: pictures in a block.

    Attributes:
        done: pictures that have their record.
        removed: files of an earlier run that were in the way.

    Raises:
        UsageError: the folder holds a run that would be lost, or one with another key, or files of somebody else.
    """

    def __init__(
        self,
        out: Path,
        key: RunKey,
        classes: Classes,
        *,
        outputs: frozenset[str],
        drawn: Iterable[str],
        resume: bool,
        shard: Shard | None,
        batch: int,
    ) -> None:
        self.removed = 0
        self._out, self._origin, self._classes = out, key.origin, classes
        self._outputs, self._shard, self._batch = outputs, shard, batch
        self._begun = False
        self._earlier: Earlier | None = None
        self._journal = Journal(out, key, classes, rank=None if shard is None else shard.rank)
        # Rank 0 removes the journals of the others as soon as they hold their last picture.
        self._own = Summary(classes) if shard is not None and shard.rank else None
        if resume:
            # Of several processes one alone tries again what has failed: none could tell when another has done so.
            self._journal.read(again=self._own is None)
        elif self._comes_late(key):
            self._journal.read()
        else:
            self._earlier = _refuse_unfinished(out, shard)
        there = look_at(journals_in(out))
        refuse_strangers(out, outputs, there)
        refuse_copies_of_strangers(out, drawn, there)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.__exit__()

    def wants(self, image_id: int) -> bool:
        """Wanted is what is in the blocks of this process and not done, and what is to be tried again."""
        if image_id in self._journal:
            return False
        return is_own(image_id, self._shard, self._batch) or self._journal.is_to_try_again(image_id)

    @property
    def done(self) -> int:
        """Pictures that have their record."""
        return self._journal.done

    def begin(self) -> None:
        """Remove what a finished run has left, and begin or go on with the journal."""
        if self._begun:
            return
        self._begun = True
        if self._earlier is not None:
            self.removed = remove_earlier(self._out, self._out / JOURNAL_NAME, self._earlier)
        self._journal.begin(self._outputs)

    def append(self, record: PictureRecord) -> None:
        """Put a record into the journal."""
        if self._own is not None:
            self._own.add(record)
        self._journal.append(record)

    def stop(self) -> None:
        """Write `detections.json` of what there is, marked as incomplete."""
        if self._begun and self._shard is None and self._journal.done:
            path = self._out / RESULTS_NAME
            write_records(path, self._journal, self._classes, self._origin, complete=False)

    def finish(self) -> list[Path]:
        """Wait for the other processes, join what all have found, and write the outputs; rank 0 alone does so."""
        if self._own is not None:
            return []
        self.begin()
        if self._shard is not None:
            with stage("wait for processes"):
                wait_for_all(self._journal, self._shard, self._batch)
        if not self._journal.is_merged:
            self._journal.merge()
        written = write_outputs(self._out, self._journal, self._classes, self._origin, self._outputs, complete=True)
        self._journal.finish()
        return written

    def summary(self) -> Summary:
        """Sum up the journal; of several processes those above rank 0 sum up what they have done themselves."""
        if self._own is not None:
            return self._own
        summary = Summary(self._classes)
        for record in self._journal:
            summary.add(record)
        return summary

    def _comes_late(self, key: RunKey) -> bool:
        """Whether rank 0 has merged all pictures of this very run before this process, which has none, looked."""
        if self._own is None or not (self._out / JOURNAL_NAME).exists():
            return False
        with Journal(self._out, key, self._classes) as merged:
            try:
                merged.read()
            except UsageError:
                return False
            return next(merged.missing(), None) is None


def _refuse_unfinished(out: Path, shard: Shard | None) -> Earlier | None:
    """Find the finished run that a new one replaces; None where there is none.

    Of processes that start together none can tell what another has just begun from what an earlier run has left, so
    they look for what cannot be their fellows' alone.
    """
    paths = journals_in(out)
    if shard is not None:
        fellows = {out / journal_name(rank) for rank in range(shard.count) if rank != shard.rank}
        paths = [path for path in paths if path not in fellows]
    earlier = look_at(paths)
    if earlier is None or not (earlier.done or earlier.finished):
        return None if shard is not None else earlier
    if not earlier.finished:
        raise UsageError(
            f"{out} holds a run that was not finished: {earlier.done:,} of {earlier.pictures:,} pictures are done",
            f"go on with it by --resume; to begin anew, remove {paths[0]} or choose another --out",
        )
    if shard is not None:
        raise UsageError(
            f"{out} holds another run, which several processes cannot replace",
            "choose another --out, or go on with it by --resume",
        )
    return earlier
