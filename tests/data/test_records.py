from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinedet_cli.core.config import Classes
from refinedet_cli.data.records import Checked, Objects, Pictures, make_records, picture_ids, unused_classes


def records(boxes: list[list[float]], places: list[int], sizes: list[tuple[int, int]]) -> Checked:
    count, n = len(boxes), len(sizes)
    pictures = Pictures(list(range(n)), [f"{i}.jpg" for i in range(n)], [Path(f"{i}.jpg") for i in range(n)], sizes)
    flags = [False] * count
    objects = Objects(list(range(count)), places, [1] * count, boxes, [float("nan")] * count, flags, flags)
    return make_records(pictures, objects, lambda chosen: "objects " + ", ".join(map(str, chosen)))


def test_objects_go_to_their_pictures_in_order() -> None:
    found = records([[i, 0, 1, 1] for i in range(5)], [2, 0, 2, 0, 2], [(9, 9), (9, 9), (9, 9)])
    assert [r.annotation_ids.tolist() for r in found.records] == [[1, 3], [], [0, 2, 4]]
    assert found.notes == ()


def test_no_pictures_and_no_objects() -> None:
    assert records([], [], []) == ((), (), {})
    assert [len(r) for r in records([], [], [(9, 9)]).records] == [0]


def test_examples_are_the_first_three() -> None:
    found = records([[0, 0, 1, 1], *[[20, 0, 1, 1]] * 4], [0] * 5, [(9, 9)])
    assert found.notes == ("4 boxes are dropped: outside their picture (objects 1, 2, 3, ...)",)


@given(st.lists(st.tuples(*[st.floats(-50, 150)] * 4), max_size=6))
def test_every_box_ends_inside_with_area_or_is_counted(boxes: list[tuple[float, ...]]) -> None:
    found = records([list(box) for box in boxes], [0] * len(boxes), [(100, 60)])
    kept = found.records[0].boxes
    assert (kept >= 0).all()
    assert (kept[:, 2:] <= [100, 60]).all()
    assert (kept[:, 2:] > kept[:, :2]).all()
    dropped = sum(int(note.split()[0]) for note in found.notes if "dropped" in note)
    assert len(kept) + dropped == len(boxes)
    np.testing.assert_allclose(found.records[0].areas, np.prod(kept[:, 2:] - kept[:, :2], axis=1))


@pytest.mark.parametrize(
    ("stems", "expected"),
    [
        ([], []),
        (["000012", "7"], [12, 7]),
        (["2008_000123", "000005"], [2008000123, 5]),
        (["7", "007"], [1, 2]),
        (["7", "b"], [1, 2]),
        (["9" * 16, "7"], [1, 2]),
        (["٣", "7"], [1, 2]),
    ],
)
def test_picture_ids(stems: list[str], expected: list[int]) -> None:
    assert picture_ids(stems) == expected


@given(st.lists(st.from_regex(r"[0-9]{1,3}(_[0-9]{1,3})?", fullmatch=True) | st.text(max_size=3), unique=True))
def test_picture_ids_are_distinct(stems: list[str]) -> None:
    assert len(set(picture_ids(stems))) == len(stems)


def test_unused_classes() -> None:
    classes = Classes(names=("a", "b", "c"), category_ids=(1, 2, 3))
    assert unused_classes(classes, [2, 2]) == ("2 of 3 classes without object: a, c",)
    assert unused_classes(classes, [1, 3, 2]) == ()
