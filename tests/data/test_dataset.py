from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinedet_cli.core.config import Classes
from refinedet_cli.data.dataset import Dataset, Record, canonical_name, join, listed, match_classes, remap
from refinedet_cli.errors import DataError


def classes(*names: str) -> Classes:
    return Classes(names=names, category_ids=tuple(range(10, 10 + len(names))))


def record(image_id: int, of: list[int], **changes: object) -> Record:
    n = len(of)
    made = Record(
        image_id=image_id,
        path=Path(f"{image_id}.jpg"),
        width=100,
        height=80,
        boxes=np.arange(4.0 * n).reshape(n, 4),
        labels=np.array(of, dtype=np.int64),
        areas=np.arange(1.0, n + 1),
        crowd=np.zeros(n, dtype=bool),
        difficult=np.zeros(n, dtype=bool),
        annotation_ids=np.arange(n) + 100 * image_id,
        file_name=f"{image_id}.jpg",
    )
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("aeroplane", "airplane"),
        ("motorbike", "motorcycle"),
        ("sofa", "couch"),
        ("tvmonitor", "tv"),
        ("TV-Monitor", "tv"),
        ("diningtable", "dining table"),
        ("pottedplant", "potted_plant"),
        ("Traffic_Light", "traffic light"),
        ("trafficlight", "traffic-light"),
        ("  Stop   sign ", "stop sign"),
        ("Straße", "STRASSE"),
    ],
)
def test_equal_spellings(one: str, other: str) -> None:
    assert canonical_name(one) == canonical_name(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("car", "cart"), ("zone 1-1", "zone 11"), ("bus", "bus stop"), ("tv", "monitor"), ("c", "c++")],
)
def test_different_names_stay_different(one: str, other: str) -> None:
    assert canonical_name(one) != canonical_name(other)


@given(st.text(max_size=20))
def test_canonical_name_is_its_own(name: str) -> None:
    assert canonical_name(canonical_name(name)) == canonical_name(name)


def test_match_pairs_spellings_and_tells_the_rest() -> None:
    match = match_classes(classes("person", "couch", "airplane", "tv"), classes("Aeroplane", "zebra", "sofa", "person"))
    assert match.labels.tolist() == [0, 3, 0, 2, 1]
    assert match.shared == ("person", "couch", "airplane")
    assert match.only_in_model == ("tv",)
    assert match.only_in_data == ("zebra",)


def test_match_of_equal_lists_is_the_identity() -> None:
    own = classes("b", "a", "c")
    match = match_classes(own, own)
    assert match.labels.tolist() == [0, 1, 2, 3]
    assert match.only_in_model == match.only_in_data == ()


def test_match_prefers_the_exact_name() -> None:
    match = match_classes(classes("Car", "car", "CAR"), classes("car", "cAr", "CAR"))
    assert match.labels.tolist() == [0, 2, 1, 3]


def test_match_joins_two_spellings_of_one_class() -> None:
    match = match_classes(classes("couch"), classes("sofa", "couch"))
    assert match.labels.tolist() == [0, 1, 1]
    assert match.shared == ("couch",)
    assert match.only_in_data == ()


def test_remap_renames_and_counts_what_it_removes() -> None:
    data = Dataset(
        "d", classes("zebra", "sofa", "cat"), (record(1, [1, 2, 3, 1]), record(2, [1]), record(3, [])), ("n",)
    )
    model = classes("cat", "dog", "couch")
    mapped = remap(data, model)
    assert mapped.classes == model
    assert [r.labels.tolist() for r in mapped.records] == [[3, 1], [], []]
    assert mapped.records[0].annotation_ids.tolist() == [101, 102]
    assert mapped.records[0].boxes.tolist() == data.records[0].boxes[1:3].tolist()
    assert mapped.notes == ("n", "3 objects of classes that the model does not know left out: zebra")
    assert data.records[0].labels.tolist() == [1, 2, 3, 1]


def test_remap_to_more_classes_adds_no_note() -> None:
    mapped = remap(Dataset("d", classes("cat"), (record(1, [1]),)), classes("dog", "cat"))
    assert mapped.records[0].labels.tolist() == [2]
    assert mapped.notes == ()


def test_remap_without_a_shared_class_names_both_lists() -> None:
    with pytest.raises(DataError, match=r"zebra, gnu.*cat, dog") as caught:
        remap(Dataset("d", classes("zebra", "gnu"), ()), classes("cat", "dog"))
    assert caught.value.hint


def test_fingerprint_ignores_place_and_order() -> None:
    one, two = record(1, [1, 2]), record(2, [])
    first = Dataset("a", classes("x", "y"), (one, two))
    second = Dataset("b", classes("x", "y"), (two, dataclasses.replace(one, path=Path("/else/1.jpg"))), ("note",))
    assert first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == 64


@pytest.mark.parametrize(
    "changed",
    [
        {"boxes": np.full((2, 4), 0.5)},
        {"labels": np.array([2, 1])},
        {"file_name": "other.jpg"},
        {"width": 101},
        {"crowd": np.array([True, False])},
        {"difficult": np.array([True, False])},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_fingerprint_sees_changes(changed: dict[str, object]) -> None:
    names = classes("x", "y")
    before = Dataset("a", names, (record(1, [1, 2]),)).fingerprint
    assert Dataset("a", names, (record(1, [1, 2], **changed),)).fingerprint != before


def test_fingerprint_sees_class_names() -> None:
    records = (record(1, [1, 2]),)
    assert Dataset("a", classes("x", "y"), records).fingerprint != Dataset("a", classes("x", "z"), records).fingerprint


@pytest.mark.parametrize("changed", [{"boxes": np.zeros((2, 5))}, {"labels": np.zeros(3)}, {"areas": np.zeros(0)}])
def test_record_refuses_unequal_columns(changed: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        record(1, [1, 2], **changed)


def test_counts() -> None:
    data = Dataset("d", classes("x"), (record(1, [1, 1]), record(2, []), record(3, [1])))
    assert (len(data), data.objects) == (3, 3)


def test_long_lists_are_cut_with_their_rest_counted() -> None:
    assert listed(["a", "b"], 2) == "a, b"
    assert listed([str(i) for i in range(5)], 2) == "0, 1 and 3 more"


def test_joining_keeps_every_object_under_its_class_and_renumbers_ids() -> None:
    def dataset(name: str, names: tuple[str, ...], labels: list[int]) -> Dataset:
        count = len(labels)
        record = Record(
            image_id=1,
            path=Path(f"{name}.png"),
            width=100,
            height=50,
            boxes=np.tile(np.array([1.0, 2.0, 11.0, 12.0]), (count, 1)),
            labels=np.array(labels, np.int64),
            areas=np.full(count, 100.0),
            crowd=np.zeros(count, bool),
            difficult=np.zeros(count, bool),
            annotation_ids=np.arange(count, dtype=np.int64),
            file_name=f"{name}.png",
        )
        classes = Classes(names=names, category_ids=tuple(10 * (i + 1) for i in range(len(names))))
        return Dataset(name, classes, (record,))

    first = dataset("a", ("sofa", "cat"), [1, 2])
    assert join([first]) is first
    same = join([first, dataset("b", ("cat", "couch"), [1, 2, 2])])
    assert same.classes == first.classes
    assert [r.labels.tolist() for r in same.records] == [[1, 2], [2, 1, 1]]
    assert [r.image_id for r in same.records] == [1, 2]
    assert [r.annotation_ids.tolist() for r in same.records] == [[1, 2], [3, 4, 5]]
    more = join([first, dataset("c", ("dog",), [1])])
    assert more.classes == Classes(names=("sofa", "cat", "dog"), category_ids=(1, 2, 3))
    assert more.records[1].labels.tolist() == [3]
    assert more.name == "a + c"


def test_joining_makes_no_two_classes_of_one_data_set_one(make_record) -> None:
    def dataset(name: str, *names: str) -> Dataset:
        classes = Classes(names=names, category_ids=tuple(range(1, len(names) + 1)))
        boxes = [[0, 0, 5, 5]] * len(names)
        record = make_record(Path(f"{name}.png"), boxes, labels=range(1, len(names) + 1))
        return Dataset(name, classes, (record,))

    letters = ("A", "a", "zone-1", "zone_1")
    joined = join([dataset("one", *letters), dataset("two", *letters[::-1]), dataset("three", "Zone 1", "b")])
    assert joined.classes.names == (*letters, "b")
    assert [r.labels.tolist() for r in joined.records] == [[1, 2, 3, 4], [4, 3, 2, 1], [3, 5]]
    # "A" is taken by its own name, so "a" is another class, and so is the second of two that look like one.
    joined = join([dataset("one", "A"), dataset("two", "a", "A"), dataset("three", "b"), dataset("four", "B", "B ")])
    assert joined.classes.names == ("A", "a", "b", "B ")
    assert [r.labels.tolist() for r in joined.records] == [[1], [2, 1], [3], [3, 4]]
