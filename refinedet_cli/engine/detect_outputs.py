"""The files that a run leaves beside its pictures, all made of the same records."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from refinedet_cli.core.config import Classes
from refinedet_cli.data.files import write_whole
from refinedet_cli.data.listing import DiskSet
from refinedet_cli.engine.detect_copies import ANNOTATED_NAME, CROPS_NAME
from refinedet_cli.engine.detect_journal import Earlier, journals_in, look_at, records_in, remove_parts
from refinedet_cli.engine.detect_names import UniqueNames
from refinedet_cli.engine.results import RESULTS_NAME, Origin, PictureRecord, write_records, write_results_list
from refinedet_cli.errors import DataError, UsageError
from refinedet_cli.files import whole_file

# What is written only if it is asked for; `detections.json` always is.
FORMATS = ("results", "yolo", "csv")

LIST_NAME, CSV_NAME, LABELS_NAME, YOLO_CLASSES_NAME = "results.json", "detections.csv", "labels", "classes.txt"
_COLUMNS = ("file_name", "image_id", "width", "height", "class", "category_id", "score")
_BOX_COLUMNS = ("box_left", "box_top", "box_width", "box_height")
# What each kind of output puts into the folder.
_ENTRIES = {
    "coco": (RESULTS_NAME,),
    "results": (LIST_NAME,),
    "yolo": (LABELS_NAME, YOLO_CLASSES_NAME),
    "csv": (CSV_NAME,),
    ANNOTATED_NAME: (ANNOTATED_NAME,),
    CROPS_NAME: (CROPS_NAME,),
}
# Of drawn copies each is looked at: a folder of that name may be a user's own, to which some are added.
_GUARDED = ("coco", "results", "yolo", "csv", CROPS_NAME)


def write_outputs(
    out: Path,
    records: Iterable[PictureRecord],
    classes: Classes,
    origin: Origin,
    formats: Iterable[str],
    *,
    complete: bool,
) -> list[Path]:
    """Write what was found in the formats asked for; `detections.json` always.

    Args:
        out: the folder of the run.
        records: by image id, gone through several times.
        classes: of the detector.
        origin: how the detections were made.
        formats: names out of `FORMATS`, and others, which do not count.
        complete: whether the run went through to its end.

    Returns:
        the files and folders, `detections.json` first.

    Raises:
        DataError: one cannot be written.
    """
    wanted, written = set(formats), [out / RESULTS_NAME]
    write_records(written[0], records, classes, origin, complete=complete)
    if "results" in wanted:
        written.append(out / LIST_NAME)
        write_results_list(written[-1], records)
    if "yolo" in wanted:
        written.append(out / LABELS_NAME)
        _write_yolo(out, records, classes)
    if "csv" in wanted:
        written.append(out / CSV_NAME)
        _write_csv(written[-1], records, classes)
    return written


def refuse_strangers(out: Path, outputs: Iterable[str], earlier: Earlier | None) -> None:
    """Refuse to write where something lies that no run of this tool has written.

    Raises:
        UsageError: names it.
    """
    ours = earlier.outputs if earlier is not None else frozenset()
    for output in sorted(set(outputs) & set(_GUARDED) - ours):
        for name in _ENTRIES[output]:
            if (out / name).exists():
                raise _not_ours(out / name)


def refuse_copies_of_strangers(out: Path, names: Iterable[str], earlier: Earlier | None) -> None:
    """Refuse to draw a picture to where a file lies that no run of this tool has written.

    Args:
        out: the folder of the run.
        names: of all pictures that are drawn.
        earlier: what the journals in the folder tell.

    Raises:
        UsageError: names it.
    """
    folder = out / ANNOTATED_NAME
    if _is_drawing(earlier) or not folder.is_dir():
        return
    with DiskSet() as known, UniqueNames() as unique:
        for journal in journals_in(out):
            for record in records_in(journal):
                if record.annotated is not None:
                    known.add(str(record.annotated))
        for name in names:
            path = folder / unique.annotated(name)
            if path.is_file() and known.add(str(path)):
                # Another process of this run may have found no strangers, and begun to draw since.
                if _is_drawing(look_at(journals_in(out))):
                    return
                raise _not_ours(path)


def _is_drawing(run: Earlier | None) -> bool:
    """Whether a run that did not come to its end may have drawn copies that are not in its journal yet."""
    return run is not None and not run.finished and ANNOTATED_NAME in run.outputs


def _not_ours(path: Path) -> UsageError:
    return UsageError(
        f"{path} is there already, and no run in this folder has written it", "move it away, or choose another --out"
    )


def remove_earlier(out: Path, journal: Path, earlier: Earlier) -> int:
    """Remove what a run that is to be replaced has written, and nothing else; counts the pictures and labels."""
    removed = 0
    folders = [out / ANNOTATED_NAME, out / CROPS_NAME, out / LABELS_NAME]
    roots = [folder.resolve() for folder in folders]
    for path in _written_by(out, journal, earlier):
        if path.is_file() and any(path.resolve().is_relative_to(root) for root in roots):
            path.unlink()
            removed += 1
    for output in earlier.outputs & set(_ENTRIES):
        for name in _ENTRIES[output]:
            if (out / name).is_file():
                (out / name).unlink()
    for folder in folders:
        _remove_empty(folder)
    remove_parts(out)
    return removed


def _written_by(out: Path, journal: Path, earlier: Earlier) -> Iterator[Path]:
    for record in records_in(journal):
        if record.annotated is not None:
            yield record.annotated
        yield from record.crops
    if "yolo" in earlier.outputs:
        yield from (path for _, path in _labels(out, records_in(journal)))


def _remove_empty(folder: Path) -> None:
    if folder.is_symlink() or not folder.is_dir():
        return
    for below in list(folder.iterdir()):
        _remove_empty(below)
    if not any(folder.iterdir()):
        folder.rmdir()


def _write_yolo(out: Path, records: Iterable[PictureRecord], classes: Classes) -> None:
    """Write a line an object: number of the class, centre and size as fractions of the picture, and score."""
    numbers = {category_id: i for i, category_id in enumerate(classes.category_ids)}
    folder = out / LABELS_NAME
    for record, path in _labels(out, records):
        if not record.was_read:
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"not written: {path} is a link that leads out of {folder}", "remove the link")
        lines = []
        for (left, top, width, height), score, category_id in record.rows:
            sizes = (width / record.width, height / record.height)
            centre = ((left + width / 2) / record.width, (top + height / 2) / record.height)
            numbers_of_box = " ".join(f"{value:.6f}" for value in (*centre, *sizes, score))
            lines.append(f"{numbers[category_id]} {numbers_of_box}\n")
        write_whole(path, "".join(lines))
    write_whole(out / YOLO_CLASSES_NAME, "".join(f"{' '.join(name.split())}\n" for name in classes.names))


def _labels(out: Path, records: Iterable[PictureRecord]) -> Iterator[tuple[PictureRecord, Path]]:
    """Name a file of labels for each record, as the picture but for the extension."""
    with UniqueNames() as names:
        for record in records:
            stem = names.stem(record.file_name)
            yield record, out / LABELS_NAME / stem.with_name(f"{stem.name}.txt")


def _write_csv(path: Path, records: Iterable[PictureRecord], classes: Classes) -> None:
    """Write a row an object."""
    names = dict(zip(classes.category_ids, classes.names, strict=True))
    with whole_file(path) as file:
        # A name whose bytes are no text is written with escapes, for a reader of the table expects UTF-8.
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow((*_COLUMNS, *_BOX_COLUMNS))
        for r in records:
            for row in r.rows:
                of_class = (names[row.category_id], row.category_id, row.score)
                writer.writerow((r.file_name, r.image_id, r.width, r.height, *of_class, *row.bbox))
        text.detach()
