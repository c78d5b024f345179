"""The command `refinedet weights list`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from refinedet_cli.cli.fitted_table import FittedTable
from refinedet_cli.cli.options import JsonOpt, QuietOpt
from refinedet_cli.cli.output import Output

if TYPE_CHECKING:
    from refinedet_cli.zoo.inventory import Model


def weights_list(json: JsonOpt = False, quiet: QuietOpt = False) -> None:
    """List the models on this machine: those that come with the tool, and those from the Hugging Face Hub.

    Each name can be given to --weights. The Hub itself is not asked; weights pull gets a model from there.
    """
    from refinedet_cli.zoo.inventory import bundled_models, cached_models

    models = [*bundled_models(), *cached_models()]
    Output(json=json, quiet=quiet).result({"models": [_entry(model) for model in models]}, _table(models), _legend())


def _entry(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "source": model.source,
        "path": model.path,
        "bytes": model.bytes,
        "sha256": model.sha256,
        "preset": model.config.preset,
        "classes": len(model.config.classes),
        "trained_on": model.trained_on,
        "scored_on": model.scores.data if model.scores else None,
        "AP": model.scores.value("AP") if model.scores else None,
        "AP50": model.scores.value("AP50") if model.scores else None,
        "licence": model.licence,
    }


def _table(models: list[Model]) -> Table:
    table = FittedTable("Models")
    table.add_text("Name", "Source", "Trained on")
    table.add_number("Classes", "AP", "AP50")
    table.add_text("Scored on")
    table.add_number("MB")
    table.add_text("Licence")
    for model in models:
        scores = model.scores
        table.add_row(
            model.name,
            model.source,
            model.trained_on or "-",
            str(len(model.config.classes)),
            *("-" if (v := scores and scores.value(name)) is None else f"{v:.3f}" for name in ("AP", "AP50")),
            "-" if scores is None else scores.data,
            f"{model.bytes / 1e6:.1f}",
            model.licence or "-",
        )
    return table


def _legend() -> Text:
    return Text("numbers on different data cannot be compared; weights info NAME tells more")
