"""Public data sets by name: where they lie, and what to fetch where they do not."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from refinedet_cli.data.dataset import listed
from refinedet_cli.data.download import download, unpack
from refinedet_cli.errors import DataError

ROOT_VARIABLE = "REFINEDET_DATA"
DEFAULT_ROOT = Path("datasets")

_COCO = "http://images.cocodataset.org"
_VOC = "http://host.robots.ox.ac.uk/pascal/VOC"


@dataclass(frozen=True)
class Archive:
    """An official archive.

    Attributes:
        url: where it is offered.
        size: in bytes, as its server gives it.
        parts: the parts of the data set that need it.
        holds: something of what is in it, under the folder where it is unpacked.
    """

    url: str
    size: int
    parts: tuple[str, ...]
    holds: str

    @property
    def name(self) -> str:
        """Its file name."""
        return self.url.rpartition("/")[2]

    def __str__(self) -> str:
        gigabytes = self.size >= 1_000_000_000
        return f"{self.name} ({self.size / 1e9:.1f} GB)" if gigabytes else f"{self.name} ({self.size / 1e6:.0f} MB)"


@dataclass(frozen=True)
class _Public:
    """One public data set.

    Attributes:
        folders: where it may lie under the root, the usual first.
        is_there: whether a folder holds it.
        wanted: what is in that folder.
        archives: the official ones.
        unpack: where under the root they are unpacked.
        page: where they are offered.
        hidden: the parts whose annotations are not public.
    """

    folders: tuple[str, ...]
    is_there: Callable[[Path], bool]
    wanted: str
    archives: tuple[Archive, ...]
    unpack: str
    page: str
    hidden: tuple[str, ...] = ()


def _has_coco(folder: Path) -> bool:
    return any(_holds_coco(folder, f"{part}{year}") for part in ("train", "val") for year in (2017, 2014))


def _holds_coco(folder: Path, part: str) -> bool:
    return (folder / "annotations" / f"instances_{part}.json").is_file()


def _has_voc(folder: Path) -> bool:
    return (folder / "Annotations").is_dir()


def _voc_folders(year: str) -> tuple[str, ...]:
    return (f"VOCdevkit/{year}", year, f"VOC/VOCdevkit/{year}", f"voc/VOCdevkit/{year}")


_SETS = {
    "coco": _Public(
        folders=("coco", "COCO", "coco2017", "coco2014", "."),
        is_there=_has_coco,
        wanted="annotations/instances_train2017.json, annotations/instances_val2017.json, and the pictures in "
        "train2017/ and val2017/ or images/train2017/ and images/val2017/ (or 2014 in place of 2017)",
        archives=(
            Archive(
                f"{_COCO}/annotations/annotations_trainval2017.zip",
                252_907_541,
                ("train", "val", "train2017", "val2017"),
                "annotations/instances_val2017.json",
            ),
            Archive(f"{_COCO}/zips/val2017.zip", 815_585_330, ("val", "val2017"), "val2017"),
            Archive(f"{_COCO}/zips/train2017.zip", 19_336_861_798, ("train", "train2017"), "train2017"),
            Archive(
                f"{_COCO}/annotations/annotations_trainval2014.zip",
                252_872_794,
                ("train2014", "val2014"),
                "annotations/instances_val2014.json",
            ),
            Archive(f"{_COCO}/zips/val2014.zip", 6_645_013_297, ("val2014",), "val2014"),
            Archive(f"{_COCO}/zips/train2014.zip", 13_510_573_713, ("train2014",), "train2014"),
        ),
        unpack="coco",
        page="https://cocodataset.org/#download",
        hidden=("test", "test2017", "test-dev2017", "test2014", "test2015", "test-dev2015"),
    ),
    "voc2007": _Public(
        folders=_voc_folders("VOC2007"),
        is_there=_has_voc,
        wanted="Annotations/, ImageSets/Main/ and JPEGImages/",
        archives=(
            Archive(
                f"{_VOC}/voc2007/VOCtrainval_06-Nov-2007.tar",
                460_032_000,
                ("train", "val", "trainval"),
                "VOCdevkit/VOC2007/ImageSets/Main/trainval.txt",
            ),
            Archive(
                f"{_VOC}/voc2007/VOCtest_06-Nov-2007.tar",
                451_020_800,
                ("test",),
                "VOCdevkit/VOC2007/ImageSets/Main/test.txt",
            ),
        ),
        unpack=".",
        page=f"{_VOC}/voc2007/",
    ),
    "voc2012": _Public(
        folders=_voc_folders("VOC2012"),
        is_there=_has_voc,
        wanted="Annotations/, ImageSets/Main/ and JPEGImages/",
        archives=(
            Archive(
                f"{_VOC}/voc2012/VOCtrainval_11-May-2012.tar",
                1_999_639_040,
                ("train", "val", "trainval"),
                "VOCdevkit/VOC2012/ImageSets/Main/trainval.txt",
            ),
        ),
        unpack=".",
        page=f"{_VOC}/voc2012/",
        hidden=("test",),
    ),
}
PUBLIC_SETS = tuple(_SETS)


def data_root(root: Path | None = None) -> Path:
    """Find the folder where public data sets lie: the given one, else $REFINEDET_DATA, else ./datasets."""
    return root if root is not None else Path(os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT)


def find_public(name: str, root: Path | None = None, part: str = "") -> Path:
    """Find a public data set.

    Args:
        name: one of ``PUBLIC_SETS``.
        root: see ``data_root``.
        part: the one that is wanted, as "val2014": where the data set lies in several folders, that with it is taken.

    Returns:
        its folder: that with ``annotations`` of COCO, that with ``Annotations`` of VOC.

    Raises:
        DataError: it is not there, saying where it was looked for and what to fetch.
    """
    public, top = _SETS[name], data_root(root)
    folders = [top / folder for folder in public.folders]
    found = [folder for folder in folders if public.is_there(folder)]
    if found:
        own = (folder for folder in found if any(_holds_coco(folder, name) for name in (part, f"{part}2017")))
        return next(own, found[0])
    looked = listed([str(folder) for folder in folders])
    archives = listed([str(archive) for archive in _archives_of(public, part)])
    raise DataError(
        f"the data set {name} is not there: looked at {looked} for {public.wanted}",
        f"unpack {archives} from {public.page} in {top / public.unpack}, or name the folder where it lies with --root "
        f"or {ROOT_VARIABLE}; eval --download fetches it",
    )


def fetch_public(
    name: str, part: str, on_progress: Callable[[Archive, int], None], root: Path | None = None
) -> tuple[Archive, ...]:
    """Download and unpack what one part of a public data set needs and is not there; the archives are then deleted.

    Args:
        name: one of ``PUBLIC_SETS``.
        part: such as "val".
        on_progress: called with an archive and how many of its bytes are there.
        root: see ``data_root``.

    Returns:
        the archives that were fetched.

    Raises:
        DataError: the part is not public, or as ``download`` and ``unpack``.
    """
    refuse_hidden(name, part)
    public, folder = _SETS[name], data_root(root) / _SETS[name].unpack
    fetched = []
    for archive in (a for a in public.archives if part in a.parts):
        target = folder / archive.name
        # An archive that is still there was not unpacked to its end.
        if target.is_file() or not _holds(public, data_root(root), archive):
            download(archive.url, target, archive.size, partial(on_progress, archive))
            unpack(target, folder)
            target.unlink()
            fetched.append(archive)
    return tuple(fetched)


def _archives_of(public: _Public, part: str) -> list[Archive]:
    """The archives of the usual parts; those of one that goes by a name of its own, as "val2014"."""
    usual = [archive for archive in public.archives if {"train", "val", "test"} & {*archive.parts}]
    own = [archive for archive in public.archives if part in archive.parts]
    return usual if not own or any(archive in usual for archive in own) else own


def _holds(public: _Public, top: Path, archive: Archive) -> bool:
    """Tell whether what an archive holds lies in any of the places where the data set is looked for."""
    tail = archive.holds.removeprefix(f"{public.folders[0]}/")
    return any((top / folder / tail).exists() for folder in public.folders)


def refuse_hidden(name: str, part: str) -> None:
    """Refuse a part whose annotations only its evaluation server has.

    Raises:
        DataError: the part is one of these.
    """
    if part in _SETS[name].hidden:
        raise DataError(f"the annotations of {name} {part} are not public", f"measure on {name}:val")


def describe_archive(file_name: str) -> str:
    """Name an official archive with its size; the bare name if it is none of ours."""
    known = (archive for public in _SETS.values() for archive in public.archives)
    return next((str(archive) for archive in known if archive.name == file_name), file_name)
