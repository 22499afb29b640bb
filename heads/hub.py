"""What is fetched from a hub, and what its client's errors mean to people."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from heads.errors import RegistryError
from heads.fetching import stopped_by_signals

# Of whichever HTTP library the installed hub client is built on: httpx, and httpx2 since its version 2.
HubHTTPError: type[Exception] = HTTPError

# Copies of the same weights in other formats, and what lies in subfolders.
_NOT_WANTED = ("*/*", "consolidated*")


def snapshot(hub_id: str, patterns: Iterable[str]) -> Path:
    """The hub repository's files that match, from the hub's own cache or downloaded into it."""
    # At once: the hub's threads would be waited for. What they have written is taken up by the next start.
    with _hub_errors(hub_id), stopped_by_signals(os._exit):
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, allow_patterns=list(patterns), ignore_patterns=list(_NOT_WANTED)
            )
        )


def download(hub_id: str, file: str, folder: Path) -> None:
    """One file of a hub repository, into the folder. Raises RegistryError."""
    with _hub_errors(hub_id), stopped_by_signals(os._exit):
        huggingface_hub.hf_hub_download(hub_id, file, local_dir=folder)


@contextmanager
def _hub_errors(hub_id: str) -> Generator[None, None, None]:
    """Turns what the hub's client raises into RegistryError."""
    try:
        yield
    except huggingface_hub.errors.GatedRepoError as error:
        raise RegistryError(
            f"{hub_id} asks for its terms to be accepted; do so, then set HF_TOKEN"
        ) from error
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise RegistryError(f"the hub has no {hub_id}, or it is private and HF_TOKEN is not set") from error
    except huggingface_hub.errors.RemoteEntryNotFoundError as error:
        raise RegistryError(f"{hub_id} has no file of that name") from error
    except (OSError, ValueError, HubHTTPError) as error:
        raise RegistryError(
            f"{hub_id} cannot be fetched from the hub ({type(error).__name__}) and is not in its cache; "
            "check the connection, or give a local folder"
        ) from error
