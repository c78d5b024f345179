from __future__ import annotations

import pytest

from refinedet_cli.core.words import counted, joined, pace


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((1, "box", "boxes"), "1 box"),
        ((2, "box", "boxes"), "2 boxes"),
        ((0, "picture"), "0 pictures"),
        ((12_345, "picture"), "12,345 pictures"),
    ],
)
def test_a_number_takes_the_right_noun(words: tuple[int, str], expected: str) -> None:
    assert counted(*words) == expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0.0, "0.0"), (0.0123, "0.012"), (0.96, "0.96"), (1.0, "1.0"), (23.45, "23.4"), (1234, "1,234.0")],
)
def test_a_slow_pace_is_not_nothing(number: float, expected: str) -> None:
    assert pace(number) == expected


@pytest.mark.parametrize(
    ("parts", "expected"), [([], ""), (["a"], "a"), (["a", "b"], "a and b"), (("a", "b", "c"), "a, b and c")]
)
def test_a_list_ends_in_and(parts: list[str], expected: str) -> None:
    assert joined(parts) == expected
