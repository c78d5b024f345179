from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinedet_cli.core.config import Classes
from refinedet_cli.data.dataset import Dataset
from refinedet_cli.data.placement import (
    FolderLink,
    Part,
    Placement,
    place_for_coco,
    place_for_voc,
    place_for_yolo,
    transfer_pictures,
)
from refinedet_cli.data.records import Objects, Pictures, make_records
from refinedet_cli.errors import DataError

ROOT = Path("/data")


def part(names: Sequence[str], root: Path = ROOT, name: str | None = None) -> Part:
    paths = [root / file_name.replace("\\", "/") for file_name in names]
    pictures = Pictures(list(range(len(names))), list(names), paths, [(9, 9)] * len(names))
    classes = Classes(names=("cat",), category_ids=(1,))
    return Part(name, Dataset("x", classes, make_records(pictures, Objects(), str).records))  # type: ignore[arg-type]


def names_of(placement: Placement) -> list[str]:
    return [name for names in placement.names for name in names]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.png", "sub/b.png"], ["images/a.png", "images/sub/b.png"]),
        (["images/a.png", "more/b.png"], ["images/a.png", "more/b.png"]),
        (["sub\\a.png"], ["sub/a.png"]),
        (["./sub//a.png"], ["sub/a.png"]),
    ],
)
def test_coco_keeps_names(names: list[str], expected: list[str]) -> None:
    assert names_of(place_for_coco([part(names)], "copy")) == expected


def test_coco_parts_with_equal_names_get_folders() -> None:
    parts = [part(["1.png"], ROOT / "train", "train"), part(["1.png"], ROOT / "valid", "val")]
    placement = place_for_coco(parts, "copy")
    assert placement.names == (("images/train/1.png",), ("images/val/1.png",))
    assert placement.file_names == (("1.png",), ("1.png",))
    stay = place_for_coco(parts, "stay")
    assert stay.file_names == placement.file_names
    assert stay.links == (FolderLink("images/train", ROOT / "train"), FolderLink("images/val", ROOT / "valid"))


def test_one_link_where_names_are_relative_to_one_folder() -> None:
    stay = place_for_coco([part(["x/1.png"], name="train"), part(["y/1.png"], name="val")], "stay")
    assert stay.links == (FolderLink("images", ROOT),)
    assert stay.file_names == (("x/1.png",), ("y/1.png",))


def test_voc_needs_stems_of_their_own() -> None:
    names = ["a.png", "b/1.png", "c/1.png", "A.jpg", ".hidden/x.png", " y .png", "z\n.png", "日本.png"]
    placed = names_of(place_for_voc([part(names)], "copy"))
    assert placed == [
        f"JPEGImages/{name}"
        for name in ("a.png", "b_1.png", "c_1.png", "A-2.jpg", "x.png", "y.png", "z_.png", "日本.png")
    ]


def test_a_number_takes_no_other_picture_s_name() -> None:
    placed = names_of(place_for_voc([part(["a.png", "a.jpg", "a-2.png", "a.gif"])], "copy"))
    assert placed == [f"JPEGImages/{name}" for name in ("a.png", "a-3.jpg", "a-2.png", "a-4.gif")]


def test_yolo_keeps_folders_but_none_called_images() -> None:
    parts = [part(["train/x/1.png", "train/images/2.png"], name="train"), part(["1.png", "1.jpg"])]
    assert names_of(place_for_yolo(parts, "copy")) == [
        "images/train/x/1.png",
        "images/train/images_/2.png",
        "images/train/1.png",
        "images/train/1-2.jpg",
    ]


def test_what_would_need_another_name_cannot_stay() -> None:
    with pytest.raises(DataError, match="1 picture cannot stay, for YOLO needs other names"):
        place_for_yolo([part(["1.png", "images/2.png"])], "stay")
    with pytest.raises(DataError, match="in 2"):
        place_for_voc([part(["1.png", "x/2.png"])], "stay")
    with pytest.raises(DataError, match="1 picture cannot stay, for VOC needs other names"):
        place_for_voc([part(["1.png", "1.jpg"])], "stay")


def test_names_without_an_extension_of_pictures() -> None:
    with pytest.raises(DataError, match="no extension of pictures"):
        place_for_voc([part(["a.data"])], "copy")
    assert names_of(place_for_coco([part(["a.data"])], "copy")) == ["images/a.data"]


@given(
    st.lists(
        st.text(min_size=1, max_size=6).map(lambda t: t.replace("/", "").replace("\\", "").strip(".") + "a"), max_size=6
    ),
    st.sampled_from([place_for_voc, place_for_yolo]),
)
def test_names_are_safe_and_distinct(stems: list[str], place) -> None:
    names = [f"{stem * 60}.png" for stem in dict.fromkeys(stems)] or ["a.png"]
    placed = names_of(place([part(names)], "copy"))
    assert len({PurePosixPath(name).with_suffix("").as_posix().casefold() for name in placed}) == len(names)
    for name in placed:
        leaf = name.rpartition("/")[2]
        assert len((leaf + ".xml").encode()) < 256
        assert leaf == leaf.strip()
        assert not leaf.startswith(".")
        assert len(leaf.splitlines()) == 1


def test_a_picture_of_two_parts_is_brought_once(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    parts = [part(["a.png"], tmp_path, "train"), part(["a.png"], tmp_path, "val")]
    steps: list[int] = []
    done = transfer_pictures(parts, place_for_coco(parts, "copy"), tmp_path / "out", "copy", lambda: steps.append(1))
    assert done == (1, 0)
    assert len(steps) == 2


def test_names_that_this_disk_takes_for_one(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    parts = [part(["a.png"], tmp_path)]
    (tmp_path / "out" / "images").mkdir(parents=True)
    (tmp_path / "out" / "images" / "a.png").touch()
    for transfer in ("copy", "link"):
        with pytest.raises(DataError, match="another picture would both be"):
            transfer_pictures(parts, place_for_coco(parts, "copy"), tmp_path / "out", transfer, lambda: None)
