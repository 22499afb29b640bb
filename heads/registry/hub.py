"""Downloads from and uploads to a hub, with its client's errors in words for people.

The client is imported only when it is needed, because its import takes longer than finding a local folder.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from heads.errors import RegistryError
from heads.registry.downloads import stopped_by_signals

# Copies of the same weights in other formats, and what lies in subfolders.
_NOT_WANTED = ("*/*", "consolidated*")


def snapshot(hub_id: str, patterns: Iterable[str]) -> Path:
    """The hub repository's files that match, from the hub's own cache or downloaded into it."""
    with _fetching(hub_id) as client:
        return Path(
            client.snapshot_download(hub_id, allow_patterns=list(patterns), ignore_patterns=list(_NOT_WANTED))
        )


def download(hub_id: str, file: str, folder: Path) -> None:
    """One file of a hub repository, into the folder. Raises RegistryError."""
    with _fetching(hub_id) as client:
        client.hf_hub_download(hub_id, file, local_dir=folder)


def upload(directory: Path, hub_id: str, files: Iterable[str]) -> str:
    """Put these files of a folder into a hub repository, which is made, private, where there is none.

    Returns the address of the commit. Raises RegistryError.
    """
    with _pushing(hub_id) as client:
        api = client.HfApi()
        api.create_repo(hub_id, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=hub_id,
            folder_path=directory,
            allow_patterns=list(files),
            commit_message="Upload a Gorgon head set",
        )
    return str(commit.commit_url)


def _client() -> ModuleType:
    import huggingface_hub
    import huggingface_hub.errors

    return huggingface_hub


@contextmanager
def _fetching(hub_id: str) -> Generator[ModuleType, None, None]:
    """The hub's client; turns what it raises into RegistryError. A signal ends the process at once, because
    the client's threads would be waited for. The next start takes up what they have written."""
    client = _client()
    errors = client.errors
    try:
        with stopped_by_signals(os._exit):
            yield client
    except errors.GatedRepoError as error:
        raise RegistryError(
            f"{hub_id} asks for its terms to be accepted; do so, then set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise RegistryError(f"the hub has no {hub_id}, or it is private and HF_TOKEN is not set") from error
    except errors.RemoteEntryNotFoundError as error:
        raise RegistryError(f"{hub_id} has no file of that name") from error
    except (OSError, ValueError, errors.HTTPError) as error:  # HTTPError of the HTTP library it is built on
        raise RegistryError(
            f"{hub_id} cannot be fetched from the hub ({type(error).__name__}) and is not in its cache; "
            "check the connection, or give a local folder"
        ) from error


@contextmanager
def _pushing(hub_id: str) -> Generator[ModuleType, None, None]:
    """The hub's client; turns what it raises into RegistryError."""
    client = _client()
    errors = client.errors
    try:
        yield client
    except errors.LocalTokenNotFoundError as error:
        raise RegistryError(
            f"{hub_id} cannot be pushed without a token; run hf auth login or set HF_TOKEN"
        ) from error
    except (OSError, ValueError, errors.HTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise RegistryError(
                f"the hub does not let this token write to {hub_id}; make one with write access to it and "
                "set HF_TOKEN"
            ) from error
        raise RegistryError(
            f"{hub_id} cannot be pushed to the hub ({type(error).__name__}); check the connection, or give a "
            "folder"
        ) from error
