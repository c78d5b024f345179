"""The command `refinedet weights info`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.table import Table

from refinedet_cli.cli.downloads import downloads
from refinedet_cli.cli.options import JsonOpt, OfflineOpt, QuietOpt, WeightsArg
from refinedet_cli.cli.output import Output
from refinedet_cli.core.words import counted

if TYPE_CHECKING:
    from refinedet_cli.zoo.inventory import Model


def weights_info(name: WeightsArg, offline: OfflineOpt = False, json: JsonOpt = False, quiet: QuietOpt = False) -> None:
    """Tell what a model is: its classes, how it was trained, what it scored, its licence and its hash.

    A model of the Hugging Face Hub is downloaded into the cache first. --json holds the whole config and all that the
    checkpoint records.
    """
    from refinedet_cli.zoo.hub import resolve_weights
    from refinedet_cli.zoo.inventory import describe

    output = Output(json=json, quiet=quiet)
    with downloads(output, offline=offline):
        path = resolve_weights(name)
    model = describe(path, name, "file")
    output.result(_document(model), *_tables(model))


def _document(model: Model) -> dict[str, Any]:
    from refinedet_cli.core.config import to_dict
    from refinedet_cli.zoo.inventory import count_parameters

    return {
        "name": model.name,
        "path": model.path,
        "bytes": model.bytes,
        "sha256": model.sha256,
        "parameters": count_parameters(model.path),
        "licence": model.licence,
        "scores": model.scores
        and {
            "data": model.scores.data,
            "pictures": model.scores.pictures,
            "weights_chosen_by_them": model.scores.chosen_by,
            **dict(model.scores.values),
            "AP50_of_class": dict(model.scores.of_class),
        },
        "config": to_dict(model.config),
        "provenance": model.provenance,
    }


def _tables(model: Model) -> Iterator[Table]:
    table = Table(title=f"Model {model.name}", title_justify="left", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("figure", overflow="fold")
    for what, figure in _rows(model):
        table.add_row(what, figure)
    yield table
    if model.scores and model.scores.of_class:
        of_class = Table(title="AP50 of each class", title_justify="left")
        of_class.add_column("Class", overflow="fold")
        of_class.add_column("AP50", justify="right")
        for name, value in sorted(model.scores.of_class, key=lambda entry: -entry[1]):
            of_class.add_row(name, f"{value:.3f}")
        yield of_class


def _rows(model: Model) -> Iterator[tuple[str, str]]:
    from refinedet_cli.zoo.inventory import count_parameters
    from refinedet_cli.zoo.model_card import training_facts

    config, scores = model.config, model.scores
    yield "file", str(model.path)
    yield "size", f"{model.bytes / 1e6:.1f} MB, {count_parameters(model.path):,} parameters"
    yield "SHA-256", model.sha256
    yield "licence", model.licence or "not stated"
    yield "network", f"{config.family}, backbone {config.network.backbone}"
    yield "input", f"{config.preprocess.height} x {config.preprocess.width} px"
    if config.grid is not None:
        rows, columns = (side // config.grid.stride for side in (config.preprocess.height, config.preprocess.width))
        yield (
            "grid",
            f"{rows} x {columns} cells of {config.grid.stride} px, {counted(config.grid.boxes, 'box', 'boxes')} each",
        )
    yield counted(len(config.classes), "class", "classes"), ", ".join(config.classes.names)
    if scores is None:
        yield "accuracy", "not recorded"
    else:
        values = ", ".join(f"{name} {value:.3f}" for name, value in scores.values)
        how = ", by which the weights were chosen" if scores.chosen_by else ""
        yield "accuracy", f"{values} on {scores.data}{how}"
    yield from ((f"trained: {what}", figure) for what, figure in training_facts(model) if figure)
