"""Rebuild mix20, the pictures and boxes behind the shipped weights, from the official archives.

Usage: python benchmarks/mix20.py --voc VOCdevkit/VOC2012 --coco COCO --out mix20

``--voc`` holds JPEGImages and Annotations (VOCtrainval_11-May-2012.tar); ``--coco`` holds train2017, val2017 and
annotations/instances_{train,val}2017.json. Of the archives only the pictures that mix20_ids.json lists are read.

What comes out: mix20-train.json, mix20-dev.json and mix20-val.json in COCO format, each a valid DATA of ``refinedet``,
beside voc/images and coco/images. The rules, all of them:

* the 20 VOC classes, with the ids 1 to 20 in VOC's order; COCO's objects of other classes are left out;
* ``difficult`` is VOC's, ``iscrowd`` is COCO's, and ``ignore`` marks both; nothing is dropped for them;
* a picture whose short side exceeds 320 pixels is shrunk to 320, and its boxes with it, to two decimals; ``area`` is
  that of the scaled box;
* VOC's 1-based inclusive corners become 0-based edges: [xmin - 1, ymin - 1, xmax, ymax];
* in the pictures listed under ``coco_val2017_short`` every box is one original pixel narrower and lower than COCO's,
  and boxes that have no area then are gone. The weights were trained and scored with boxes that a well-known list gives
  in this form, so the form belongs to the set.

What cannot be equal to the copy that the weights were trained on: the pixels, since those pictures were shrunk and
compressed (WebP) by programs that are not recorded; and a few ``difficult`` and ``iscrowd`` flags, which that copy
inferred where this script reads the official ones. Picture ids, file names, sizes and boxes are equal.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from refinedet_cli.core.presets import VOC_NAMES
from refinedet_cli.data.dataset import canonical_name
from refinedet_cli.data.files import write_json, write_whole
from refinedet_cli.errors import DataError, RefineDetError

IDS = Path(__file__).with_name("mix20_ids.json")
SHORT_SIDE = 320
# Near to the compression of the copy that the weights were trained on, judged by the size of its files.
WEBP_QUALITY = 80
LABELS = {canonical_name(name): label for label, name in enumerate(VOC_NAMES, start=1)}
# Pictures (and boxes) of the splits of one group are numbered together, so that train and dev can be joined.
GROUPS = (("mix20-train", "mix20-dev"), ("mix20-val",))


class Split(NamedTuple):
    """The official picture ids of one split.

    Attributes:
        voc2012: names without extension.
        coco_train2017, coco_val2017: ids.
        coco_val2017_short: ids of pictures whose boxes are one pixel short.
    """

    voc2012: tuple[str, ...]
    coco_train2017: tuple[int, ...]
    coco_val2017: tuple[int, ...]
    coco_val2017_short: tuple[int, ...]

    @property
    def keys(self) -> frozenset[str | int]:
        """All ids; those of VOC are strings and those of COCO numbers."""
        return frozenset(i for part in self for i in part)


class Box(NamedTuple):
    """One object: xywh in pixels of the original picture, its label in 1..20, and its flags."""

    x: float
    y: float
    width: float
    height: float
    label: int
    crowd: bool
    difficult: bool


@dataclass(frozen=True)
class Picture:
    """One official picture and its objects.

    Attributes:
        key: official id.
        source: the official file.
        file_name: where the shrunk picture goes, relative to the output folder.
        width, height: of the original.
        boxes: in the order of the official annotation.
        origin: what else the picture's entry tells: official split, licence, address.
    """

    key: str | int
    source: Path
    file_name: str
    width: int
    height: int
    boxes: tuple[Box, ...]
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height after shrinking."""
        scale = min(1.0, SHORT_SIDE / min(self.width, self.height))
        return round(self.width * scale), round(self.height * scale)


def read_ids(path: Path) -> dict[str, Split]:
    """Read the picture ids of each split, by the name of the split."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return {name: Split(**{part: tuple(ids) for part, ids in parts.items()}) for name, parts in document.items()}


def read_voc(root: Path, names: Iterable[str]) -> Iterator[Picture]:
    """Read the VOC annotations of some pictures.

    Raises:
        DataError: an annotation is missing or not one of VOC's.
    """
    for name in names:
        path = root / "Annotations" / f"{name}.xml"
        try:
            tree = ElementTree.parse(path).getroot()
            boxes = tuple(_voc_box(entry) for entry in tree.findall("object"))
            width, height = (int(_text(tree, f"size/{side}")) for side in ("width", "height"))
        except FileNotFoundError:
            raise DataError(f"{path} is missing", "unpack VOCtrainval_11-May-2012.tar in full") from None
        except (OSError, ElementTree.ParseError, ValueError, KeyError) as error:
            raise DataError(
                f"{path} cannot be read as a VOC annotation ({error})", "unpack the archive again"
            ) from None
        source = root / "JPEGImages" / f"{name}.jpg"
        yield Picture(
            name, source, f"voc/images/voc2012_{name}.webp", width, height, boxes, {"official_split": "VOC2012"}
        )


def _voc_box(entry: ElementTree.Element) -> Box:
    left, top, right, bottom = (float(_text(entry, f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax"))
    label = LABELS[canonical_name(_text(entry, "name"))]
    difficult = entry.findtext("difficult", "0").strip() == "1"
    return Box(left - 1, top - 1, right - left + 1, bottom - top + 1, label, crowd=False, difficult=difficult)


def _text(entry: ElementTree.Element, path: str) -> str:
    text = entry.findtext(path)
    if text is None:
        raise ValueError(f"no {path}")
    return text.strip()


def read_coco(root: Path, year: str, ids: Iterable[int], short: Iterable[int]) -> Iterator[Picture]:
    """Read the COCO annotations of some pictures.

    Args:
        root: holds annotations and the pictures' folders.
        year: "train2017" or "val2017".
        ids: pictures to take as they are.
        short: pictures whose boxes become one pixel narrower and lower.

    Raises:
        DataError: the annotations are missing, unreadable, or do not know a picture.
    """
    shortened = set(short)
    wanted = shortened.union(ids)
    if not wanted:
        return
    path = root / "annotations" / f"instances_{year}.json"
    document = _load(path)
    try:
        labels = {entry["id"]: LABELS.get(canonical_name(entry["name"])) for entry in document["categories"]}
        images = {entry["id"]: entry for entry in document["images"] if entry["id"] in wanted}
        boxes: dict[int, list[Box]] = {key: [] for key in images}
        for entry in document["annotations"]:
            label = labels[entry["category_id"]]
            if entry["image_id"] in images and label is not None:
                x, y, width, height = entry["bbox"]
                less = 1 if entry["image_id"] in shortened else 0
                box = Box(x, y, width - less, height - less, label, crowd=bool(entry["iscrowd"]), difficult=False)
                boxes[entry["image_id"]].append(box)
        for key in sorted(wanted & images.keys()):
            entry = images[key]
            origin = {"coco_id": key, "official_split": year}
            origin |= {name: entry[name] for name in ("license", "flickr_url") if name in entry}
            yield Picture(
                key,
                root / year / entry["file_name"],
                f"coco/images/{key:012d}.webp",
                entry["width"],
                entry["height"],
                tuple(b for b in boxes[key] if b.width > 0 and b.height > 0),
                origin,
            )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a COCO annotation file ({error!r})", "unpack the archive again") from None
    if unknown := sorted(wanted - images.keys()):
        raise DataError(
            f"{path} does not know {len(unknown):,} of {len(wanted):,} pictures (first: {unknown[0]})",
            "take the instances file of annotations_trainval2017.zip",
        )


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing", "unpack annotations_trainval2017.zip") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error})", "unpack the archive again") from None


def write_picture(picture: Picture, out: Path) -> None:
    """Shrink a picture and write it as WebP.

    Raises:
        DataError: it cannot be read, or is not of the size that its annotation says.
    """
    try:
        with Image.open(picture.source) as image:
            if image.size != (picture.width, picture.height):
                raise DataError(
                    f"{picture.source} is {image.width} x {image.height}, "
                    f"but its annotation says {picture.width} x {picture.height}",
                    "take the pictures of the official archive, in their original size",
                )
            shrunk = image.convert("RGB")
    except OSError as error:
        raise DataError(f"{picture.source} cannot be read ({error})", "unpack the archive again") from None
    if shrunk.size != picture.size:
        shrunk = shrunk.resize(picture.size, Image.Resampling.LANCZOS)
    content = io.BytesIO()
    shrunk.save(content, "WEBP", quality=WEBP_QUALITY)
    write_whole(out / picture.file_name, content.getvalue())


def box_entries(picture: Picture, image_id: int, first: int) -> list[dict[str, Any]]:
    """Make the COCO entries of a picture's boxes, scaled to its shrunk size and numbered from ``first``."""
    width, height = picture.size
    across, down = width / picture.width, height / picture.height
    return [
        {
            "id": number,
            "image_id": image_id,
            "category_id": box.label,
            "bbox": [round(v, 2) for v in (box.x * across, box.y * down, box.width * across, box.height * down)],
            "area": round(box.width * across * box.height * down, 2),
            "iscrowd": int(box.crowd),
            "difficult": int(box.difficult),
            "ignore": int(box.crowd or box.difficult),
        }
        for number, box in enumerate(picture.boxes, start=first)
    ]


def documents(splits: dict[str, Split], pictures: Sequence[Picture]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Make the COCO document of each split.

    Args:
        splits: which picture belongs where.
        pictures: all of them, those of VOC first, each part in the order of its ids.

    Yields:
        the split's name and its document; ids are unique within a group of `GROUPS`.
    """
    categories = [{"id": label, "name": name} for label, name in enumerate(VOC_NAMES, start=1)]
    for group in GROUPS:
        images: dict[str, list[dict[str, Any]]] = {name: [] for name in group}
        boxes: dict[str, list[dict[str, Any]]] = {name: [] for name in group}
        split_of = {key: name for name in group for key in splits[name].keys}
        number, annotation = 0, 1
        for picture in pictures:
            if picture.key not in split_of:
                continue
            number += 1
            name = split_of[picture.key]
            width, height = picture.size
            images[name].append(
                {
                    "id": number,
                    "file_name": picture.file_name,
                    "width": width,
                    "height": height,
                    "orig_width": picture.width,
                    "orig_height": picture.height,
                    **picture.origin,
                }
            )
            boxes[name] += box_entries(picture, number, annotation)
            annotation += len(picture.boxes)
        for name in group:
            description = "VOC and COCO subsets together, the 20 VOC classes; splits are ours, not official"
            yield (
                name,
                {
                    "info": {"description": description},
                    "images": images[name],
                    "annotations": boxes[name],
                    "categories": categories,
                },
            )


def rebuild(voc: Path, coco: Path, out: Path) -> None:
    """Read the archives, write the pictures, then the three annotation files, and print what there is.

    Raises:
        DataError: an archive is missing, incomplete or damaged, or ``out`` cannot be written.
    """
    _require_folders(voc, "--voc", ("JPEGImages", "Annotations"))
    _require_folders(coco, "--coco", ("train2017", "val2017", "annotations"))
    splits = read_ids(IDS)
    pictures = [
        *read_voc(voc, sorted(i for s in splits.values() for i in s.voc2012)),
        *read_coco(coco, "train2017", (i for s in splits.values() for i in s.coco_train2017), ()),
        *read_coco(
            coco,
            "val2017",
            (i for s in splits.values() for i in s.coco_val2017),
            (i for s in splits.values() for i in s.coco_val2017_short),
        ),
    ]
    pictures.sort(key=lambda picture: (isinstance(picture.key, int), picture.key))
    _require_sources(pictures)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, _ in enumerate(pool.map(lambda picture: write_picture(picture, out), pictures), start=1):
            if done % 500 == 0:
                print(f"{done:,} of {len(pictures):,} pictures", file=sys.stderr)
    for name, document in documents(splits, pictures):
        write_json(out / f"{name}.json", document)
        print(f"{name}: {len(document['images']):,} pictures, {len(document['annotations']):,} boxes")


def _require_folders(root: Path, option: str, folders: Sequence[str]) -> None:
    for folder in folders:
        if not (root / folder).is_dir():
            raise DataError(f"{option} {root} has no folder {folder}", f"it needs {', '.join(folders)}")


def _require_sources(pictures: Sequence[Picture]) -> None:
    missing = [picture.source for picture in pictures if not picture.source.is_file()]
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(pictures):,} pictures are missing (first: {missing[0]})",
            "unpack the official archives in full: VOCtrainval_11-May-2012.tar, train2017.zip, val2017.zip",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Read the options, rebuild, and return the exit code."""
    parser = argparse.ArgumentParser(description="Rebuild mix20 from the official VOC 2012 and COCO 2017 archives.")
    parser.add_argument("--voc", type=Path, required=True, help="VOCdevkit/VOC2012")
    parser.add_argument("--coco", type=Path, required=True, help="holds train2017, val2017 and annotations")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    options = parser.parse_args(argv)
    try:
        rebuild(options.voc, options.coco, options.out)
    except RefineDetError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
