from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refinedet_cli.core.config import Classes
from refinedet_cli.data.coco import read_coco
from refinedet_cli.data.dataset import Dataset
from refinedet_cli.data.records import Objects, Pictures, make_records
from refinedet_cli.data.write_coco import Extras, side_lengths, write_coco

CLASSES = Classes(names=("cat", "dog"), category_ids=(3, 9))


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0.01, 1e4)), min_size=1))
def test_lengths_lead_from_edge_to_edge(pairs: list[tuple[float, float]]) -> None:
    low, length = np.array(pairs).T
    high = low + length
    found = side_lengths(low, high)
    np.testing.assert_array_equal(low + found, high)
    np.testing.assert_allclose(found, length, rtol=1e-9, atol=1e-9)


def test_lengths_are_short_where_they_were() -> None:
    low, length = np.array([100.3, 0.1, 7.0]), np.array([50.1, 0.2, 5.0])
    assert (low + length - low).tolist() != length.tolist()
    assert side_lengths(low, low + length).tolist() == length.tolist()


def dataset(folder: Path) -> Dataset:
    pictures = Pictures([7, 4], ["a.png", "b.png"], [folder / "a.png", folder / "b.png"], [(40, 30), (20, 10)])
    objects = Objects(
        [5, 2], [0, 0], [2, 1], [[0.1, 0.2, 3.3, 4.4], [1, 2, 3, 4]], [float("nan"), 5.5], [True, False], [False, True]
    )
    return Dataset("x", CLASSES, make_records(pictures, objects, str).records)


def test_what_is_written_reads_the_same(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    write_coco(tmp_path / "set.json", data, ["a.png", "b.png"])
    back = read_coco(tmp_path / "set.json")
    assert back.fingerprint == data.fingerprint
    assert back.classes == data.classes
    for one, other in zip(data.records, back.records, strict=True):
        assert one.image_id == other.image_id
        np.testing.assert_array_equal(one.annotation_ids, other.annotation_ids)
        np.testing.assert_array_equal(one.areas, other.areas)


def test_no_field_of_another_file_replaces_our_own(tmp_path: Path) -> None:
    own = {"id": 99, "more": 1}
    extras = Extras({"info": {"a": 1}}, {7: own}, {5: own}, {3: own})
    write_coco(tmp_path / "set.json", dataset(tmp_path), ["a.png", "b.png"], extras)
    document = json.loads((tmp_path / "set.json").read_text())
    assert document["info"] == {"a": 1}
    for key, identity in (("images", 7), ("annotations", 5), ("categories", 3)):
        assert document[key][0]["id"] == identity
        assert document[key][0]["more"] == 1
        assert "more" not in document[key][1]


def test_a_set_without_objects(tmp_path: Path) -> None:
    pictures = Pictures([7], ["a.png"], [tmp_path / "a.png"], [(40, 30)])
    empty = Dataset("x", CLASSES, make_records(pictures, Objects(), str).records)
    write_coco(tmp_path / "set.json", empty, ["a.png"])
    assert len(read_coco(tmp_path / "set.json").records[0]) == 0
