"""Which classes of a detector a user wants to see."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from refinedet_cli.core.config import Classes
from refinedet_cli.data.dataset import canonical_name
from refinedet_cli.errors import UsageError

_SHOWN = 30


def select_labels(classes: Classes, wanted: Sequence[str]) -> frozenset[int]:
    """Find the classes that names or category ids stand for.

    Args:
        classes: of the detector.
        wanted: names, in any of the spellings that `canonical_name` takes for equal, or category ids as text; a name
            goes before an id.

    Returns:
        their labels; as many as there are different classes in ``wanted``.

    Raises:
        UsageError: the detector does not know one of them; tells the nearest name and those it knows.
    """
    known: dict[str, int] = {}
    for label, category_id in enumerate(classes.category_ids, start=1):
        known[str(category_id)] = label
    for label, name in reversed(list(enumerate(classes.names, start=1))):
        known[canonical_name(name)] = label
    known |= {name: label for label, name in enumerate(classes.names, start=1)}
    labels = set()
    for text in wanted:
        found = known.get(text) or known.get(canonical_name(text))
        if found is None:
            raise UsageError(f"--class {text}: the detector has no such class", _cure(classes, text))
        labels.add(found)
    return frozenset(labels)


def _cure(classes: Classes, text: str) -> str:
    near = difflib.get_close_matches(canonical_name(text), [canonical_name(name) for name in classes.names], n=1)
    guess = [name for name in classes.names if near and canonical_name(name) == near[0]]
    shown = ", ".join(classes.names[:_SHOWN])
    more = f" and {len(classes) - _SHOWN} more" if len(classes) > _SHOWN else ""
    return f"{f'did you mean {guess[0]}? ' if guess else ''}it knows {shown}{more}, or their category ids"
