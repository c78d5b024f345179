"""What `refinedet eval --report` puts on its page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refinedet_cli.cli.eval_tables import (
    Detector,
    Measured,
    class_numbers,
    interval_of,
    meanings_of,
    scope_of,
    settings_of,
)
from refinedet_cli.core.words import counted

if TYPE_CHECKING:
    from refinedet_cli.engine.anchor_refinement import Refinement
    from refinedet_cli.engine.report import Page


def page_of(measured: Measured, refinement: Refinement | None) -> Page:
    """Explain what was measured; ``refinement`` where a detector with anchors was run."""
    from refinedet_cli import __version__
    from refinedet_cli.engine.reasons import find_reasons
    from refinedet_cli.engine.report import Number, Page, SourcePicture

    collected = measured.collected
    numbers = []
    for name, meaning in meanings_of(measured).items():
        estimate = interval_of(measured, name)
        low, high = (None, None) if estimate is None else (estimate.low, estimate.high)
        numbers.append(Number(name, meaning, getattr(measured.result, name.partition("_voc")[0]), low, high))
    columns, rows = class_numbers(measured)
    return Page(
        title=f"{measured.dataset.name} by {_maker(measured)}",
        scope=f"{scope_of(measured)}: {counted(len(collected.records), 'picture')}, "
        f"{counted(collected.objects, 'object')}",
        numbers=numbers,
        columns=columns,
        rows=rows,
        reasons=find_reasons(collected.truths, collected.detections, collected.scored_classes),
        refinement=refinement,
        pictures=[SourcePicture(r.path, r.file_name, r.width, r.height) for r in collected.records],
        facts=[
            *settings_of(measured),
            ("Data fingerprint", measured.dataset.fingerprint),
            *(("Note", note) for note in measured.notes),
            ("Written by", f"refinedet {__version__}"),
        ],
    )


def _maker(measured: Measured) -> str:
    made = measured.made
    return made.origin.weights if isinstance(made, Detector) else made.path.name
