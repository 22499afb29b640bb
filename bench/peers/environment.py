"""A virtual environment of its own for each peer, outside the repository, made once and kept.

Peers are never installed beside us, because their pinned versions and ours conflict.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from engine.errors import GorgonError

INSTALL_LIMIT = 1800.0  # seconds for one command

PIP_INSTALL = ("-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet")


class PeerError(GorgonError):
    """A peer could not be installed, started or measured. The others go on."""


def ensure_environment(folder: Path, commands: Sequence[Sequence[str]]) -> Path:
    """The python of the environment in `folder`, made unless the same commands have made it already.

    `commands` are arguments for that python, one command after the other. Raises PeerError with the end of
    what failed; install.log in the folder has all of it.
    """
    python, wanted, made = folder / "bin" / "python", repr(commands), folder / "installed"
    if made.is_file() and made.read_text() == wanted:
        return python
    print(f"Installing {folder.name} in {folder}; this takes minutes", file=sys.stderr)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True, symlinks=True)
        for command in commands:
            _run([str(python), *command], folder / "install.log")
        made.write_text(wanted)
    except subprocess.CalledProcessError as error:
        raise PeerError(f"{folder} could not be made: {error}") from error
    except OSError as error:
        raise PeerError(f"{folder} cannot be written: {error}") from error
    return python


def _run(command: Sequence[str], log: Path) -> None:
    with log.open("ab") as output:
        try:
            status = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=INSTALL_LIMIT,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise PeerError(f"installing took more than {INSTALL_LIMIT:.0f} s; see {log}") from error
    if status:
        raise PeerError(f"not installed: {last_lines(log)} (all of it in {log})")


def last_lines(log: Path, count: int = 3) -> str:
    """The end of a log in one line, for an error message."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-count:])[-500:] or "no output"
