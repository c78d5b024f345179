"""A data set in memory: pictures by name, boxes as arrays, and what its classes have in common with a model's."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.core.config import Classes
from refinedet_cli.core.words import counted
from refinedet_cli.errors import DataError

Split = Literal["train", "val", "test"]
# What the parts of a data set are called, the first most commonly.
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test",),
}

# What a reader may have had to do with objects; see `Dataset.altered`.
DROPPED, CLIPPED, OUTLINED = "boxes dropped", "boxes clipped", "outlines"

# Spellings of one class in VOC and COCO, after `_fold`; the right-hand side is COCO's.
_SAME = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "motor bike": "motorcycle",
    "sofa": "couch",
    "tvmonitor": "tv",
    "tv monitor": "tv",
    "television": "tv",
}
# COCO's names of two words, which VOC (diningtable, pottedplant) and others write as one.
_TWO_WORDS = (
    "baseball bat",
    "baseball glove",
    "cell phone",
    "dining table",
    "fire hydrant",
    "hair drier",
    "hot dog",
    "parking meter",
    "potted plant",
    "sports ball",
    "stop sign",
    "teddy bear",
    "tennis racket",
    "traffic light",
    "wine glass",
)
_SAME |= {name.replace(" ", ""): name for name in _TWO_WORDS}


@dataclass(frozen=True, eq=False)
class Record:
    """One picture and its objects; the picture itself stays on disk.

    Attributes:
        image_id: as in the annotation file.
        path: where the picture lies.
        width, height: of the picture as it is seen, EXIF orientation applied, px-img.
        boxes: float64[N, 4], xyxy, px-img, inside the picture, with positive width and height. N may be 0.
        labels: int64[N], in 1..C-1.
        areas: float64[N], square px-img; of the object's mask where the file knows it, else of the box.
        crowd: bool[N], boxes around a group that is not told apart.
        difficult: bool[N], objects that count neither as found nor as missed.
        annotation_ids: int64[N].
        file_name: as in the annotation file.
    """

    image_id: int
    path: Path
    width: int
    height: int
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    difficult: NDArray[np.bool_]
    annotation_ids: NDArray[np.int64]
    file_name: str

    def __post_init__(self) -> None:
        if self.boxes.ndim != 2 or self.boxes.shape[1] != 4:
            raise ValueError(f"expected boxes [N, 4], got {list(self.boxes.shape)}")
        count = len(self.boxes)
        if any(len(a) != count for a in (self.labels, self.areas, self.crowd, self.difficult, self.annotation_ids)):
            raise ValueError(f"expected {count} labels, areas, flags and annotation ids, one for each box")

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, chosen: NDArray[np.bool_]) -> Record:
        """Keep some of the objects.

        Args:
            chosen: bool[N].
        """
        return dataclasses.replace(
            self,
            boxes=self.boxes[chosen],
            labels=self.labels[chosen],
            areas=self.areas[chosen],
            crowd=self.crowd[chosen],
            difficult=self.difficult[chosen],
            annotation_ids=self.annotation_ids[chosen],
        )


@dataclass(frozen=True, eq=False)
class Dataset:
    """Pictures with objects of a list of classes.

    Attributes:
        name: for people.
        classes: label ``i`` of a record is ``classes.names[i - 1]``.
        records: in the order of the annotation file.
        notes: what was dropped or looks odd, one line for each kind with its count.
        altered: how many objects are not here as the files have them, by what was done with them.
    """

    name: str
    classes: Classes
    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()
    altered: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def objects(self) -> int:
        """Number of boxes in all pictures."""
        return sum(len(r) for r in self.records)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over class names, file names, sizes, boxes, labels and flags.

        It depends neither on where the data set lies nor on the order of its pictures.
        """
        digest = hashlib.sha256("\0".join(self.classes.names).encode("utf-8", "surrogatepass"))
        for record in sorted(self.records, key=lambda r: (r.file_name, r.image_id)):
            digest.update(record.file_name.encode("utf-8", "surrogatepass"))
            digest.update(f"\0{record.width} {record.height} {len(record)}\0".encode())
            digest.update(record.boxes.astype("<f8").tobytes())
            digest.update(record.labels.astype("<i8").tobytes())
            digest.update(np.stack([record.crowd, record.difficult]).astype("u1").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class ClassMatch:
    """Which classes of a data set a model knows.

    Attributes:
        labels: int64[len(data) + 1], the model's label of each label of the data; 0 where it has none.
        shared: the model's names that the data has too, in the model's order.
        only_in_model: the model's other names.
        only_in_data: the data's names that the model does not know, in the data's order.
    """

    labels: NDArray[np.int64]
    shared: tuple[str, ...]
    only_in_model: tuple[str, ...]
    only_in_data: tuple[str, ...]


def canonical_name(name: str) -> str:
    """Spell a class name so that equal classes of VOC, COCO and their many copies are equal strings.

    Case does not count, nor whether words are parted by space, underscore or hyphen; ``aeroplane`` becomes
    ``airplane``, ``diningtable`` becomes ``dining table``. Other words stay parted or joined as they are: ``zone 1-1``
    is not ``zone 11``.

    Returns:
        a name that is its own canonical name.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    folded = " ".join(word for word in re.split(r"[\s_-]+", text) if word)
    return _SAME.get(folded, folded)


def match_classes(model: Classes, data: Classes) -> ClassMatch:
    """Pair the classes of a data set with those of a model: equal names first, then equal canonical names.

    Two classes of the data may go to one class of the model (``sofa`` and ``couch``).
    """
    exact = {name: i for i, name in enumerate(model.names, start=1)}
    canonical: dict[str, int] = {}
    for name, label in exact.items():
        canonical.setdefault(canonical_name(name), label)
    found = [exact.get(name) or canonical.get(canonical_name(name), 0) for name in data.names]
    known = set(found)
    return ClassMatch(
        labels=np.array([0, *found], dtype=np.int64),
        shared=tuple(name for name, label in exact.items() if label in known),
        only_in_model=tuple(name for name, label in exact.items() if label not in known),
        only_in_data=tuple(name for name, label in zip(data.names, found, strict=True) if label == 0),
    )


def remap(dataset: Dataset, classes: Classes) -> Dataset:
    """Give a data set the labels of a model.

    Args:
        dataset: left as it is.
        classes: the model's.

    Returns:
        all pictures of the data set, in their order, with the objects of the shared classes and ``classes`` as its
        list. Objects of other classes are gone and counted in the notes.

    Raises:
        DataError: no class is shared.
    """
    match = match_classes(classes, dataset.classes)
    if not match.shared:
        raise DataError(
            f"the data set {dataset.name} and the model share no class: the data has {listed(dataset.classes.names)}; "
            f"the model has {listed(classes.names)}",
            "use weights trained on these classes, or name the classes of the data as the model does",
        )
    counts = np.zeros(len(dataset.classes) + 1, dtype=np.int64)
    records = []
    for record in dataset.records:
        counts += np.bincount(record.labels, minlength=len(counts))
        labels = match.labels[record.labels]
        renamed = dataclasses.replace(record, labels=labels)
        records.append(renamed if labels.all() else renamed.select(labels > 0))
    removed = int(counts[match.labels == 0].sum())
    notes = dataset.notes
    if removed:
        notes += (
            f"{counted(removed, 'object of a class', 'objects of classes')} that the model does not know left out: "
            f"{listed(match.only_in_data)}",
        )
    return Dataset(dataset.name, classes, tuple(records), notes)


def join(datasets: Sequence[Dataset]) -> Dataset:
    """Make one data set of several, as for VOC 07+12.

    Args:
        datasets: at least one.

    Returns:
        all their pictures in order. Classes are the union, in order of first appearance: of different data sets those
        of equal name, or else of equal canonical name, are one; of one data set none are. Category ids are those of
        the first data set where it has all classes, else 1, 2, ... Picture and annotation ids are numbered anew, since
        those of different files may be equal. A single data set is returned as it is.
    """
    first = datasets[0]
    if len(datasets) == 1:
        return first
    names: list[str] = []
    for dataset in datasets:
        own = dataset.classes.names
        # As `match_classes` pairs them: the first of several; it is taken if this data set has it by name.
        alike = {canonical_name(name): name not in own for name in reversed(names)}
        names += [name for name in own if name not in names and not alike.pop(canonical_name(name), False)]
    classes = first.classes
    if len(names) != len(classes):
        classes = Classes(names=tuple(names), category_ids=tuple(range(1, len(names) + 1)))
    records: list[Record] = []
    annotations = 0
    for dataset in datasets:
        for record in remap(dataset, classes).records:
            ids = np.arange(annotations + 1, annotations + 1 + len(record), dtype=np.int64)
            annotations += len(record)
            records.append(dataclasses.replace(record, image_id=len(records) + 1, annotation_ids=ids))
    notes = tuple(f"{dataset.name}: {note}" for dataset in datasets for note in dataset.notes)
    return Dataset(" + ".join(d.name for d in datasets), classes, tuple(records), notes)


def listed(names: Sequence[str], limit: int = 100) -> str:
    """Join names for a message, cutting a very long list short with the number that is left."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
