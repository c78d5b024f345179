"""From a checkpoint to its place on the Hugging Face Hub: the weights, their card and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refinedet_cli import __version__
from refinedet_cli.data.files import write_whole
from refinedet_cli.engine.card_figures import card_figures
from refinedet_cli.errors import CheckpointError, UsageError
from refinedet_cli.zoo.checkpoint import load_detector
from refinedet_cli.zoo.hub import CARD_FILE, HUB_FILE, parse_hub_name, resolve_weights
from refinedet_cli.zoo.inventory import Model, bundled_models, describe
from refinedet_cli.zoo.model_card import Figure, model_card
from refinedet_cli.zoo.publish import Published, publish


@dataclass(frozen=True)
class Upload:
    """What is to be published, checked and written but not yet sent.

    Attributes:
        repo: ``org/repo``.
        model: the checkpoint.
        card: of the repository, Markdown.
        figures: of the card.
        licence: that the card states; None where it states none.
    """

    repo: str
    model: Model
    card: str
    figures: tuple[Figure, ...]
    licence: str | None


def prepare_upload(weights: str | None, repo: str, *, licence: str | None = None) -> Upload:
    """Check weights and write their card.

    Args:
        weights: as a user names them.
        repo: ``org/repo``.
        licence: that their owner gives them, such as apache-2.0; None takes what is known of them.

    Raises:
        UsageError: ``repo`` is not written so.
        CheckpointError: there are no such weights, or they cannot be used.
    """
    place = parse_hub_name(repo)
    if place is None or place.repo != repo:
        raise UsageError(f"{repo!r} is no place to publish to", "write it as org/repo, or user/repo")
    path = resolve_weights(weights)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: only checkpoints are published", "name the .safetensors file of a run")
    load_detector(path)  # refuses what nobody could use
    return _upload(describe(path, str(path), "file"), repo, licence)


def prepare_bundled(owner: str) -> list[Upload]:
    """Do the same for all bundled models, each as ``owner/name``.

    Raises:
        UsageError: ``owner`` is no name of a user or an organisation.
        CheckpointError: they are missing or damaged.
    """
    if "/" in owner or parse_hub_name(f"{owner}/model") is None:
        raise UsageError(f"{owner!r} is no user or organisation of the Hub", "write its name alone")
    return [_upload(model, f"{owner}/{model.name}", None) for model in bundled_models()]


def _upload(model: Model, repo: str, licence: str | None) -> Upload:
    figures = card_figures(model)
    chosen = licence or model.licence
    return Upload(repo, model, model_card(model, repo, licence=chosen, figures=figures), figures, chosen)


def send(upload: Upload, *, private: bool = False, message: str | None = None) -> Published:
    """Publish: the weights under the name that `resolve_weights` asks for, so that ``org/repo`` is enough to use them.

    Raises:
        CheckpointError: it cannot be sent; nothing is published then.
    """
    files: dict[str, Path | bytes] = {HUB_FILE: upload.model.path, CARD_FILE: upload.card.encode()}
    files |= {figure.name: figure.content for figure in upload.figures}
    told = message or f"Publish {upload.model.config.preset} with refinedet {__version__}"
    return publish(upload.repo, files, private=private, message=told)


def write_cards(uploads: Sequence[Upload], folder: Path) -> list[Path]:
    """Write cards and figures into a folder; with several uploads, each into one of its own.

    Raises:
        DataError: a file cannot be written.
    """
    written = []
    for upload in uploads:
        place = folder if len(uploads) == 1 else folder / upload.repo.partition("/")[2]
        for name, content in [(CARD_FILE, upload.card.encode()), *((f.name, f.content) for f in upload.figures)]:
            write_whole(place / name, content)
            written.append(place / name)
    return written
