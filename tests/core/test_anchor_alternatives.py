"""Other inputs with the same anchors, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from refinedet_cli.core.anchor_alternatives import alternatives
from refinedet_cli.core.anchor_coverage import ObjectSet
from refinedet_cli.core.config import AnchorConfig
from refinedet_cli.core.presets import paper_anchors

ONE = AnchorConfig(strides=(32,), shapes=(((32, 32),),))


def objects_of(*boxes: list[float]) -> ObjectSet:
    count = len(boxes)
    return ObjectSet(np.array(boxes, dtype=np.float64), np.ones(count, np.int64), np.arange(count), count)


def test_sizes_and_costs():
    rows = alternatives(objects_of([0, 0, 32, 32]), paper_anchors(), (320, 320), aspect=4 / 3)
    assert [(r.cure, r.input_size, r.passes) for r in rows] == [
        ("now", (320, 320), 1),
        ("larger", (384, 384), 1),
        ("larger", (448, 448), 1),
        ("larger", (512, 512), 1),
        ("shaped", (320, 384), 1),
        ("tiles", (320, 320), 4),
        ("tiles+whole", (320, 320), 5),
    ]
    assert [r.cost for r in rows] == pytest.approx([1, 1.44, 1.96, 2.56, 1.2, 4, 5])


def test_an_input_that_has_the_shape_is_not_repeated():
    rows = alternatives(objects_of([0, 0, 32, 32]), paper_anchors(), (320, 384), aspect=1.2)
    assert "shaped" not in {r.cure for r in rows}
    upright = alternatives(objects_of([0, 0, 32, 32]), paper_anchors(), (320, 320), aspect=0.75)
    assert upright[4].input_size == (384, 320)


def test_small_objects_grow_with_the_input_and_in_tiles():
    # Objects of 16 px at the centres of cells: 16 * 16 of 32 * 32 is a quarter.
    objects = objects_of([8, 8, 24, 24], [40, 8, 56, 24])
    shares = {(r.cure, r.input_size): r.fit.matched for r in alternatives(objects, ONE, (128, 128))}
    assert shares[("now", (128, 128))] == 0
    assert shares[("tiles", (128, 128))] == shares[("tiles+whole", (128, 128))] == 0
    # Doubled, 16 px at 16 + 32 k are 32 px on a cell's corner; at 0 they are a cell.
    objects = objects_of([0, 0, 16, 16], [112, 112, 128, 128])
    shares = {(r.cure, r.input_size): r.fit.matched for r in alternatives(objects, ONE, (128, 128))}
    assert shares[("now", (128, 128))] == 0
    assert shares[("tiles", (128, 128))] == 1
    assert shares[("larger", (192, 192))] == 1  # 24 px in the first cell: 576 of 1024.


def test_objects_are_cut_at_tile_borders():
    # A cell of the whole picture that lies across the middle: four pieces of a quarter.
    config = AnchorConfig(strides=(64,), shapes=(((64, 64),),))
    across = objects_of([64, 64, 128, 128])  # With 192 px, the border is at 96.
    tiles, both = alternatives(across, config, (192, 192))[-2:]
    assert (tiles.fit.matched, both.fit.matched) == (0, 1)
    # Half of it in each tile is enough: the piece is 32 x 64 px, doubled 64 x 128, half of which is a cell.
    half = alternatives(objects_of([64, 0, 128, 64]), config, (192, 192))[-2]
    assert half.fit.matched == 1
    # A quarter of it would be a cell, but is too little of the object; three quarters are three cells in a row.
    long = alternatives(objects_of([64, 0, 192, 32]), config, (192, 192))[-2]
    assert long.fit.matched == 0


@pytest.mark.parametrize("aspect", [0.0, -1.0, float("nan"), float("inf")])
def test_a_wrong_aspect_is_refused(aspect: float):
    with pytest.raises(ValueError, match="aspect"):
        alternatives(objects_of([0, 0, 16, 16]), ONE, (128, 128), aspect=aspect)


def test_no_objects_are_refused():
    empty = ObjectSet(np.empty((0, 4)), np.empty(0, np.int64), np.empty(0, np.int64), 2)
    with pytest.raises(ValueError, match="no objects"):
        alternatives(empty, ONE, (128, 128))
