"""The folder for everything that can be made or fetched again: models, compiled kernels."""

from __future__ import annotations

import functools
import logging
import os
import stat
import tempfile
from pathlib import Path

from heads.errors import RegistryError

logger = logging.getLogger(__name__)


def cache_dir() -> Path:
    """GORGON_HOME, else .cache/gorgon in the user's home. Raises RegistryError where there is no place.

    A user without a home (a container's numeric uid, HOME unset) gets the same temporary folder every time.
    """
    if home := os.environ.get("GORGON_HOME"):
        return expand_user(home).absolute()
    try:
        return (Path.home() / ".cache" / "gorgon").absolute()
    except RuntimeError:
        return _temporary("no home folder is known of this user")


def writable_cache(part: str) -> Path:
    """The folder `part` of the cache, which is made where it is missing.

    Where the cache cannot be written to, it is in the same temporary folder every time. Raises RegistryError
    where that is impossible too.
    """
    folder = cache_dir() / part
    if _is_writable(folder):
        return folder
    kept = _temporary(f"{folder} cannot be written to") / part
    if not _is_writable(kept):
        raise RegistryError(f"neither {folder} nor {kept} can be written to; set GORGON_HOME to a folder")
    return kept


def expand_user(name: str) -> Path:
    """The path with ~ and ~user replaced. Raises RegistryError for a home that cannot be found."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise RegistryError(f"{name!r}: the home folder that ~ stands for is not known") from None


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


@functools.cache  # so that the warning comes once
def _temporary(reason: str) -> Path:
    """A folder of this user alone. Others could create it first, and files in it are loaded as code: so it is
    checked."""
    try:
        folder = Path(tempfile.gettempdir()) / f"gorgon-{os.geteuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise RegistryError(f"{reason}, nor can a temporary one; set GORGON_HOME to a folder") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise RegistryError(f"{reason}, and {folder} is not this user's alone; set GORGON_HOME to a folder")
    logger.warning("%s; %s is used instead. GORGON_HOME names a better place.", reason, folder)
    return folder
