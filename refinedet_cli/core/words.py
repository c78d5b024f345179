"""Numbers and lists as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, one: str, many: str | None = None) -> str:
    """Write a number with its noun.

    Args:
        number: of things.
        one: the noun for a single one.
        many: the noun for several; with an s at its end if None.
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def pace(number: float) -> str:
    """Write how many there are a second: one decimal, or two figures of what would round to little or nothing."""
    return f"{number:,.1f}" if number >= 1 or not number else f"{number:.2g}"


def joined(parts: Sequence[str]) -> str:
    """Write a list as in a sentence: ``a, b and c``; empty for none."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
