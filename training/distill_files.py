"""What `gorgon distill` keeps on disk, so that it can be killed at any moment and continue later.

Beside `answers.jsonl.gz` there are `answers.settings.json` (the settings of every row),
`answers.failed.jsonl` (rows without an answer, and why) and `answers.log.csv` (progress). Until the output is
finished there is also `answers.partial.jsonl`: every finished row is appended to it and flushed. It is plain
text even where the output is gzipped, because a broken gzip stream could not be continued.
"""

from __future__ import annotations

import csv
import fcntl
import gzip
import heapq
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from engine.errors import ConfigError
from training.dataset import DataError

LOG_COLUMNS = ("time", "rows", "failed", "tokens", "tokens_per_second", "tokens_per_step", "eta_seconds")


def failed_path(out: Path) -> Path:
    """The file with the rows that could not be answered."""
    return _beside(out, "failed.jsonl")


def _beside(out: Path, suffix: str) -> Path:
    return out.with_name(f"{out.name.removesuffix('.gz').removesuffix('.jsonl')}.{suffix}")


class DistillFiles:
    """The files of one output. A context manager; holds a lock while it is open.

    `order` maps the id of every row that may be written to its place in the prompts.
    """

    def __init__(self, out: Path, settings: Mapping[str, object], order: Mapping[str, int]) -> None:
        """Raises ConfigError where the output belongs to other settings or to another program, or where
        another process is writing it."""
        self._out = out
        self._settings_path = _beside(out, "settings.json")
        self._partial_path = _beside(out, "partial.jsonl")
        self._log_path = _beside(out, "log.csv")
        self._order = order
        if out.exists() and not self._settings_path.exists():
            raise ConfigError("out", f"{out} exists and was not made by gorgon distill; name another")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._partial = self._partial_path.open("a+b")
        except OSError as error:
            raise ConfigError("out", f"{out} cannot be written: {error}") from error
        try:
            self._begin({"output": out.name, **settings})
        except ConfigError:
            self._partial.close()
            raise
        # Rows that failed are tried again each time: the machine may have been the reason.
        self._failed = failed_path(out).open("wb")

    def __enter__(self) -> DistillFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._partial.close()
        self._failed.close()

    def _begin(self, settings: dict[str, object]) -> None:
        """Take the lock, and check that existing rows were made with these settings."""
        try:
            fcntl.flock(self._partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            message = f"another process is writing {self._out.name}; wait for it or end it"
            raise ConfigError("out", message) from error
        _cut_torn_line(self._partial)
        if self._out.exists() or self._partial.seek(0, os.SEEK_END):
            self._check_settings(settings)
            return
        made = self._settings_path.with_suffix(".json.partial")
        made.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        made.replace(self._settings_path)

    def _check_settings(self, settings: dict[str, object]) -> None:
        try:
            recorded = json.loads(self._settings_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            recorded = None
        if not isinstance(recorded, dict):
            raise ConfigError("out", f"{self._settings_path} is missing or damaged; name another file")
        differing = [name for name, value in settings.items() if recorded.get(name) != value]
        if differing:
            changes = ", ".join(f"{n} {recorded.get(n)!r} then, {settings[n]!r} now" for n in differing)
            raise ConfigError(
                "out",
                f"the rows of {self._out.name} were begun with other settings ({changes}); "
                "give the same again, or another file",
            )

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every finished row once, those of the finished output first."""
        seen: set[str] = set()
        for line in (*_lines(self._out), *_lines(self._partial_path)):
            row = json.loads(line)
            if row["id"] not in seen:
                seen.add(row["id"])
                yield row

    def append(self, row: Mapping[str, object]) -> None:
        _write_line(self._partial, row)

    def append_failure(self, row: Mapping[str, object]) -> None:
        _write_line(self._failed, row)

    def log(self, figures: Mapping[str, float | None]) -> None:
        """Append a line to the CSV; `figures` has LOG_COLUMNS without the time, None where unknown."""
        new = not self._log_path.exists()
        with self._log_path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, LOG_COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow({"time": round(time.time(), 1), **figures})

    def finish(self) -> None:
        """Put all rows into the output, in the order of the prompts, and remove the partial file."""
        made = self._out.with_name(self._out.name + ".partial")
        with made.open("wb") as raw:
            # The header has no time and no name, so that the same rows give the same file.
            packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if self._out.suffix == ".gz" else None
            last = -1
            for place, line in heapq.merge(self._places(self._out), sorted(self._places(self._partial_path))):
                if place > last:
                    (packed or raw).write(line)
                    last = place
            if packed is not None:
                packed.close()
        made.replace(self._out)
        self._partial_path.unlink()
        if not self._failed.tell():
            failed_path(self._out).unlink()

    def _places(self, path: Path) -> Iterator[tuple[int, bytes]]:
        for line in _lines(path):
            yield self._order[json.loads(line)["id"]], line


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that may be gzipped; none where there is no file."""
    if not path.exists():
        return
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} is damaged: {error}; remove it and its .settings.json to begin anew"
        ) from error


def _write_line(file: BinaryIO, row: Mapping[str, object]) -> None:
    try:
        line = json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # prompts may hold half of a surrogate pair
        line = json.dumps(row).encode()
    file.write(line + b"\n")
    file.flush()


def _cut_torn_line(file: BinaryIO) -> None:
    """Drop what follows the last line break: a row whose writing was interrupted."""
    end = file.seek(0, os.SEEK_END)
    step = 1 << 16
    begin = end
    while begin > 0:
        begin = max(0, begin - step)
        file.seek(begin)
        found = file.read(min(step, end - begin)).rfind(b"\n")
        if found >= 0:
            file.truncate(begin + found + 1)
            return
    file.truncate(0)
