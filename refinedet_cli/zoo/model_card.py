"""The model card that goes to the Hub with a checkpoint, written from what the checkpoint itself records."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from refinedet_cli.core.config import to_dict
from refinedet_cli.core.words import counted
from refinedet_cli.zoo.hub import DEFAULT_WEIGHTS
from refinedet_cli.zoo.inventory import Model, Scores, count_parameters

# The Hub's words for licences that are common for weights; any other goes there as "other" with a name.
_LICENCES = frozenset(
    {
        "afl-3.0", "agpl-3.0", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0",
        "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-4.0", "cc0-1.0", "gpl-2.0", "gpl-3.0", "isc",
        "lgpl-3.0", "mit", "mpl-2.0", "openrail", "pddl", "unlicense",
    }
)  # fmt: skip
_TITLES = {
    "AP": "AP, mean over IoU 0.50 to 0.95", "AP50": "AP at IoU 0.50", "AP75": "AP at IoU 0.75",
    "AP_small": "AP of small objects", "AP_medium": "AP of medium objects", "AP_large": "AP of large objects",
}  # fmt: skip
_FAMILIES = {"refinedet": ("RefineDet", "1711.06897"), "ssd": ("SSD", "1512.02325"), "yolo": ("YOLO", "1506.02640")}
_CLASSES_NAMED = 12


class Figure(NamedTuple):
    """A picture of the card: its file name in the repository, what it shows, and its PNG."""

    name: str
    caption: str
    content: bytes


def model_card(model: Model, repo: str, *, licence: str | None, figures: Sequence[Figure] = ()) -> str:
    """Write the README.md of a repository.

    Args:
        model: what is published.
        repo: ``org/repo``, where it will be found.
        licence: that its owner gives it; None says that none is stated.
        figures: uploaded beside it.

    Returns:
        Markdown behind a YAML head as the Hub reads it. Nothing in it was not measured or recorded: what is not known
        is left out, or said to be unknown.
    """
    title = repo.partition("/")[2]
    parts = [
        f"# {_line(title)}",
        _summary(model),
        *_use(repo),
        *_accuracy(model.scores),
        *(f"![{_line(figure.caption)}]({figure.name})" for figure in figures),
        *_training(model),
        *_licence(licence, model.facts),
        *_config(to_dict(model.config)),
    ]
    return _head(model, title, licence) + "\n\n".join(parts) + "\n"


def _head(model: Model, title: str, licence: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="object-detection",
            dataset_type=re.sub(r"[^a-z0-9._-]+", "-", scores.data.lower()).strip("-") or "data",
            dataset_name=scores.data,
            metric_type="mAP",
            metric_name=name,
            metric_value=round(value, 4),
        )
        for scores in ([model.scores] if model.scores else [])
        for name, value in scores.values
    ]
    data = ModelCardData(
        **_licence_fields(licence),
        library_name="refinedet",
        pipeline_tag="object-detection",
        tags=["refinedet", model.config.network.backbone],
        model_name=title,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _licence_fields(licence: str | None) -> dict[str, Any]:
    if licence is None:
        return {}
    return {"license": licence.lower()} if licence.lower() in _LICENCES else {
        "license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-") or "other",
    }  # fmt: skip


def _summary(model: Model) -> str:
    config = model.config
    names = config.classes.names
    listed = ", ".join(_line(name) for name in names[:_CLASSES_NAMED])
    more = f" and {len(names) - _CLASSES_NAMED} more" if len(names) > _CLASSES_NAMED else ""
    of = counted(len(names), "class", "classes")
    size = config.preprocess
    family, paper = _FAMILIES[config.family]
    return (
        f"An object detector of the {family} family ([paper](https://arxiv.org/abs/{paper})): backbone "
        f"{config.network.backbone}, input {size.height} x {size.width} px, {count_parameters(model.path) / 1e6:.1f} M "
        f"parameters in {model.bytes / 1e6:.1f} MB, {of}: {listed}{more}."
    )


def _use(repo: str) -> Iterator[str]:
    yield "## How to run"
    yield (
        f"```console\n$ pip install refinedet\n$ refinedet detect photos --weights {repo} --out found\n"
        f"$ refinedet train --data mine --weights {repo} --out runs/mine\n```"
    )
    yield (
        "```python\nfrom refinedet_cli.api import Detector\n\n"
        f'detector = Detector.from_pretrained("{repo}")\nprint(detector.predict("photo.jpg"))\n```'
    )


def _accuracy(scores: Scores | None) -> Iterator[str]:
    yield "## Accuracy"
    if scores is None:
        yield "Not measured: the training run had no validation data."
        return
    pictures = "" if scores.pictures is None else f", {counted(scores.pictures, 'picture')}"
    yield "\n".join(
        [
            f"| on `{_cell(scores.data)}`{pictures} | |",
            "|---|--:|",
            *(f"| {_TITLES.get(name, name)} | {value:.3f} |" for name, value in scores.values),
        ]
    )
    if scores.chosen_by:
        yield (
            "Measured during training, on the data by which the weights of the run were chosen: expect a little less "
            "on other pictures."
        )
    if scores.of_class:
        ranked = sorted(scores.of_class, key=lambda entry: -entry[1])
        rows = (f"| {_cell(name)} | {value:.3f} |" for name, value in ranked)
        yield "\n".join(["| class | AP50 |", "|---|--:|", *rows])


def _training(model: Model) -> Iterator[str]:
    yield "## Training"
    rows = [(what, figure) for what, figure in training_facts(model) if figure]
    if not rows:
        yield "The checkpoint does not record how it was trained."
        return
    yield "\n".join(["| | |", "|---|---|", *(f"| {what} | {_cell(figure)} |" for what, figure in rows)])
    if recipe := model.facts.get("recipe"):
        yield f"```console\n{recipe}\n```"


def training_facts(model: Model) -> Iterator[tuple[str, str]]:
    """Tell how a model was trained, as far as it is recorded: pairs of what and figure, for people."""
    told = model.provenance
    data, recipe = told.get("data"), told.get("train")
    if isinstance(data, Mapping):
        yield "data", f"{data.get('name')}" + _pictures(data.get("pictures"))
        yield "data, SHA-256", str(data.get("sha256") or "")
    yield "start", _start(told.get("start"))
    yield "pictures seen", f"{seen:,}" if isinstance(seen := told.get("pictures_seen"), int) else ""
    yield "steps", f"{step:,}" if isinstance(step := told.get("step"), int) else ""
    if isinstance(recipe, Mapping):
        named = ("optimizer", "lr", "schedule", "batch", "weight_decay", "ema_decay", "freeze_stages")
        yield "recipe", ", ".join(f"{name} {recipe[name]}" for name in named if name in recipe)
    yield "cost", str(model.facts.get("cost") or "")
    yield "preset", model.config.preset
    yield "seed", str(told.get("seed", ""))
    yield "trained with", f"refinedet {told['tool_version']}" if "tool_version" in told else ""
    if isinstance(imported := told.get("imported"), Mapping):
        yield "by", f"{imported.get('project')}, imported from {imported.get('file')}"
        yield "imported file, SHA-256", str(imported.get("sha256") or "")


def _pictures(count: Any) -> str:
    return f", {counted(count, 'picture')}" if isinstance(count, int) else ""


def _start(start: Any) -> str:
    if not isinstance(start, Mapping):
        return ""
    if start.get("random"):
        return "random weights"
    if isinstance(start.get("backbone"), Mapping):
        backbone = start["backbone"]
        return f"ImageNet backbone {backbone.get('repo') or backbone.get('file')}"
    return f"detector {start['weights']}" if "weights" in start else ""


def _licence(licence: str | None, facts: Mapping[str, Any]) -> Iterator[str]:
    yield "## Licence"
    about = f" Data: {facts['data_licence']}." if "data_licence" in facts else ""
    if licence is None:
        yield f"The owner of this repository has not stated a licence for these weights.{about}"
    else:
        yield f"The weights are under {_line(licence)}.{about}"
    if facts and facts.get("file", "").startswith(DEFAULT_WEIGHTS):
        yield "These are the weights that come with the tool; `refinedet detect` uses them without any option."


def _config(config: Mapping[str, Any]) -> Iterator[str]:
    yield "## Config"
    rows = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in config.items())
    yield (
        "The checkpoint rebuilds its own detector from this; no option is needed to use it.\n\n"
        f"<details><summary>All settings and classes</summary>\n\n```json\n{{\n{rows}\n}}\n```\n\n</details>"
    )


def _line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")
