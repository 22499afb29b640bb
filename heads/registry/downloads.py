"""What every download needs: a lock against other processes, an immediate end by signals, a check of the
file."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_STANDARD_ERROR = 2  # progress goes here; standard output belongs to whoever called
_SECONDS_TO_END = 3.0  # between SIGTERM and SIGKILL for a child
_STOPPING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def alone(lock: Path) -> Generator[int, None, None]:
    """Wait until no other process holds the lock file `lock`. Yields the descriptor that holds it now."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another process that fetches the same (it holds {lock})", file=sys.stderr)
            with stopped_by_signals(sys.exit):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def stopped_by_signals(stop: Callable[[int], object]) -> Generator[None, None, None]:
    """Meanwhile, SIGTERM and SIGHUP call `stop` with an exit status.

    Without this, process 1 of a container would not end, and child processes would go on. Does nothing
    outside of the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _STOPPING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, lambda received, _frame: stop(128 + received))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_stoppable(command: Sequence[str], environment: Mapping[str, str], keep_open: int) -> int:
    """Run a command to its end and return its status. The command ends with this process unless that is
    killed."""
    with (
        stopped_by_signals(sys.exit),
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=_STANDARD_ERROR,
            pass_fds=(keep_open,),
            process_group=0,  # Ctrl-C reaches this process only; `_end` ends the whole group
        ) as process,
    ):
        try:
            return process.wait()
        finally:
            if process.returncode is None:
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(path: Path, always: int = 256 * 2**20) -> bool:
    """Whether a file still has the bytes that it had at the first call. A file beside it keeps the checksum.

    Files of up to `always` bytes are read each time, larger ones only if their size or time has changed.
    """
    found = path.stat()
    now = {"size": found.st_size, "mtime_ns": found.st_mtime_ns}
    note = note_of(path)
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        digest, unchanged = known.pop("sha256"), known == now
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        digest, unchanged = None, False
    if digest is not None and unchanged and found.st_size > always:
        return True
    actual = sha256_of(path)
    if digest not in (None, actual):
        return False
    if not unchanged:
        with contextlib.suppress(OSError):  # if the note cannot be written, the file is read each time
            note.write_text(json.dumps({"sha256": actual, **now}), encoding="utf-8")
    return True


def note_of(path: Path) -> Path:
    """Where `is_intact` keeps what it knows of a file."""
    return path.with_name(path.name + ".sha256")
