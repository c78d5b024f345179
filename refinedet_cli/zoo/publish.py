"""To the Hugging Face Hub: files become one commit of a repository."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refinedet_cli.errors import CheckpointError
from refinedet_cli.zoo.hub_client import Transfer, client, refusal, report_progress


@dataclass(frozen=True)
class Published:
    """What became of an upload.

    Attributes:
        repo: ``org/repo``.
        commit: the state of the repository that holds the files.
        url: of the repository's page.
    """

    repo: str
    commit: str
    url: str


class _Counted(io.BufferedReader):
    """A file that tells how far it has been read."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._path, self._size = path, path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        report_progress(Transfer(self._path.name, self.tell(), self._size))
        return content


def publish(repo: str, files: Mapping[str, Path | bytes], *, private: bool, message: str) -> Published:
    """Upload files as one commit on the main branch; a repository that is not there yet is made.

    Args:
        repo: ``org/repo``, of the user or an organisation that the Hub's login may write to.
        files: content or path by name in the repository; others that it has already stay.
        private: of a repository that is made now; one that is there stays as it is.
        message: of the commit.

    Returns:
        `Published`; `fetch` of its commit gives the same bytes.

    Raises:
        CheckpointError: there is no login, it may not write there, or the upload failed; nothing is committed then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        raise CheckpointError(
            f"{repo}: there is no login to the Hugging Face Hub on this machine",
            "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
        )
    api = HfApi()
    with ExitStack() as stack, client(repo, None):
        # The client uses its HTTP library in a way that this calls outdated.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", DeprecationWarning)
        opened: dict[str, Any] = {
            name: stack.enter_context(_Counted(content)) if isinstance(content, Path) else content
            for name, content in files.items()
        }
        try:
            api.create_repo(repo, private=private or None, exist_ok=True)
            operations = [CommitOperationAdd(name, content) for name, content in opened.items()]
            done = api.create_commit(repo, operations, commit_message=message)
        except HfHubHTTPError as error:
            raise _forbidden(repo, error) from None
        except (RuntimeError, ValueError) as error:
            # So the client wraps what stopped the upload of a large file, and what the Hub dislikes in a card.
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise refusal(cause, repo, None) or _failed(repo, cause) from None
    return Published(repo=repo, commit=done.oid, url=f"{api.endpoint}/{repo}")


def _forbidden(repo: str, error: Any) -> CheckpointError:
    status = error.response.status_code
    if status in (401, 403):
        owner = repo.partition("/")[0]
        return CheckpointError(
            f"{repo}: the Hub does not let this login write there ({status})",
            f"use a token that may write to {owner}: `hf auth login`, or HF_TOKEN; `hf auth whoami` tells whose it is",
        )
    return refusal(error, repo, None) or _failed(repo, error)


def _failed(repo: str, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return CheckpointError(f"{repo}: the upload failed ({reason})", "nothing was published; run the command again")
