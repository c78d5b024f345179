"""How often pictures come: repeat factors by hand, and drawings that keep to their shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refinedet_cli.data.sampling import draw_companions, draw_weighted, repeat_factors


def test_a_picture_gets_the_most_that_a_class_of_it_asks_for(dataset_of):
    # Of 8 pictures class 1 is in all, class 2 in 2, class 3 in 1.
    labels = [[1, 1], [1], [1], [1], [1], [1, 2], [1, 2, 2], [1, 3, 1]]
    factors = repeat_factors(dataset_of(labels), 0.5)
    # sqrt(0.5 / 0.25) and sqrt(0.5 / 0.125); how many objects of a class a picture has does not matter.
    np.testing.assert_allclose(factors, [1, 1, 1, 1, 1, 2**0.5, 2**0.5, 2.0])


def test_without_rare_classes_nothing_repeats(dataset_of):
    labels = [[1, 2], [1, 2, 3], [2, 1]]
    np.testing.assert_array_equal(repeat_factors(dataset_of(labels), 1 / 3), 1.0)


def test_pictures_without_objects_and_crowds_ask_for_nothing(dataset_of):
    labels = [[], [1], [1], [1], [1, 2]]
    data = dataset_of(labels, crowds=[(4, 1)])
    np.testing.assert_array_equal(repeat_factors(data, 0.8), 1.0)
    np.testing.assert_allclose(repeat_factors(dataset_of(labels), 0.8), [1, 1, 1, 1, 2.0])


def test_a_class_without_pictures_changes_nothing(dataset_of):
    np.testing.assert_array_equal(repeat_factors(dataset_of([[1], [1]], names="abcdefghi"), 1.0), 1.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.5, 5.0), min_size=1, max_size=40), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_a_drawing_keeps_to_the_shares_up_to_rounding(weights, count, seed):
    weights = np.array(weights)
    drawn = draw_weighted(weights, count, np.random.default_rng(seed))
    assert len(drawn) == count
    assert (np.diff(drawn) >= 0).all()
    expected = weights / weights.sum() * count
    came = np.bincount(drawn, minlength=len(weights))
    assert (came >= np.floor(expected - 1e-9)).all()
    assert (came <= np.ceil(expected + 1e-9)).all()


def test_equal_weights_draw_each_once():
    np.testing.assert_array_equal(draw_weighted(np.ones(9), 9, np.random.default_rng(3)), np.arange(9))


@pytest.mark.parametrize("weights", [None, np.array([1.0, 1.0, 6.0])])
def test_companions_come_with_their_weights(weights):
    drawn = draw_companions(3, weights, 20_000, np.random.default_rng(0))
    shares = np.bincount(drawn, minlength=3) / 20_000
    expected = [1 / 3, 1 / 3, 1 / 3] if weights is None else [0.125, 0.125, 0.75]
    np.testing.assert_allclose(shares, expected, atol=0.015)
