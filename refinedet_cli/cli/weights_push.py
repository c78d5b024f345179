"""The command `refinedet weights push`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from refinedet_cli.cli.downloads import downloads
from refinedet_cli.cli.options import MODEL, RUNTIME, JsonOpt, OptionalOutOpt, QuietOpt
from refinedet_cli.cli.output import Output
from refinedet_cli.errors import UsageError

if TYPE_CHECKING:
    from refinedet_cli.engine.publish import Upload
    from refinedet_cli.zoo.publish import Published


def weights_push(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|FILE",
            help="A .safetensors file, the folder of a run, or bundled weights.",
            show_default=False,
        ),
    ] = None,
    repo: Annotated[
        str | None, typer.Argument(metavar="ORG/REPO", help="Where to; it is made if it is new.", show_default=False)
    ] = None,
    all_bundled: Annotated[
        str | None,
        typer.Option(
            "--all-bundled",
            metavar="ORG",
            help="Publish every bundled model instead, each as ORG/NAME.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--licence",
            metavar="NAME",
            help="What you put your weights under, such as apache-2.0 or cc-by-4.0.",
            show_default="that of bundled weights, else none is stated",
            rich_help_panel=MODEL,
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.", rich_help_panel=RUNTIME)
    ] = False,
    message: Annotated[
        str | None,
        typer.Option(
            "--message",
            metavar="TEXT",
            help="Of the commit.",
            show_default="made from the model",
            rich_help_panel=RUNTIME,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Send nothing: show the card, or write it and its figures into --out.",
            rich_help_panel=RUNTIME,
        ),
    ] = False,
    out: OptionalOutOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Publish a model on the Hugging Face Hub, with a card made from what the checkpoint records.

    The checkpoint becomes the repository's model.safetensors, so that others can use --weights org/repo at once; its
    README.md and figures are replaced, and everything else there stays. It needs a login that may write there:
    hf auth login, or HF_TOKEN. Look at the card first with --dry-run.
    """
    from refinedet_cli.engine.publish import prepare_bundled, prepare_upload, send, write_cards

    if out is not None and not dry_run:
        raise UsageError("--out is for --dry-run alone", "leave it out, or add --dry-run")
    output = Output(json=json, quiet=quiet)
    if all_bundled is not None:
        if name is not None or licence is not None:
            raise UsageError("--all-bundled takes no other model and no --licence", "give it alone")
        uploads = prepare_bundled(all_bundled)
    elif name is None or repo is None:
        raise UsageError("a model and its place are missing", "such as: refinedet weights push runs/signs org/signs")
    else:
        uploads = [prepare_upload(name, repo, licence=licence)]
    for upload in uploads:
        if upload.licence is None:
            output.warn(f"{upload.repo}: no licence is stated, so nobody may use the weights; state one with --licence")
    if dry_run:
        written = [] if out is None else write_cards(uploads, out)
        _show(output, uploads, written)
        return
    with downloads(output):
        published = [send(upload, private=private, message=message) for upload in uploads]
    document = [_entry(u) | {"commit": p.commit, "url": p.url} for u, p in zip(uploads, published, strict=True)]
    output.result({"dry_run": False, "models": document}, _table(uploads, published))


def _show(output: Output, uploads: list[Upload], written: list[Path]) -> None:
    cards = [Text(upload.card.rstrip("\n")) for upload in uploads]
    document = {"dry_run": True, "models": [_entry(u) | {"card": u.card} for u in uploads], "files": written}
    output.result(document, *(cards if not written else [Text(str(path)) for path in written]))
    output.note("nothing was sent")


def _entry(upload: Upload) -> dict[str, Any]:
    return {
        "repo": upload.repo,
        "weights": upload.model.path,
        "bytes": upload.model.bytes,
        "sha256": upload.model.sha256,
        "licence": upload.licence,
        "figures": [figure.name for figure in upload.figures],
    }


def _table(uploads: list[Upload], published: list[Published]) -> Table:
    table = Table(title="Published", title_justify="left")
    table.add_column("Address", overflow="fold")
    table.add_column("MB", justify="right", no_wrap=True)
    table.add_column("SHA-256 of the weights", overflow="fold")
    table.add_column("Commit", overflow="fold")
    for upload, done in zip(uploads, published, strict=True):
        table.add_row(done.url, f"{upload.model.bytes / 1e6:.1f}", upload.model.sha256, done.commit)
    return table
