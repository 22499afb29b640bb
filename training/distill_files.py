"""What `gorgon distill` keeps on disk, so that it can be killed at any moment and go on where it stopped.

Beside `answers.jsonl.gz` lie, for as long as it is unfinished, `answers.partial.jsonl`, to which a row is
appended and flushed when it is done, and for good `answers.settings.json` (what every row was made with),
`answers.failed.jsonl` (rows without an answer, and why) and `answers.log.csv` (progress). The partial file
is plain text even where the output is gzipped: a torn gzip stream could not be continued.
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
    """Where the rows are that could not be answered."""
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
        out.parent.mkdir(parents=True, exist_ok=True)
        self._check_settings({"output": out.name, **settings})
        self._partial = self._partial_path.open("a+b")
        try:
            fcntl.flock(self._partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._partial.close()
            raise ConfigError(
                "out", f"another process is writing {out.name}; wait for it or end it"
            ) from error
        _cut_torn_line(self._partial)
        # Rows that failed are tried anew each time: what failed may have been the machine.
        self._failed = failed_path(out).open("wb")

    def __enter__(self) -> DistillFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._partial.close()
        self._failed.close()

    def _check_settings(self, settings: dict[str, object]) -> None:
        if not self._settings_path.exists():
            if self._out.exists():
                raise ConfigError(
                    "out", f"{self._out} exists and was not made by gorgon distill; name another"
                )
            partial = self._settings_path.with_suffix(".json.partial")
            partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            partial.replace(self._settings_path)
            return
        try:
            recorded = json.loads(self._settings_path.read_text(encoding="utf-8"))
        except ValueError:
            recorded = None
        if not isinstance(recorded, dict):
            raise ConfigError("out", f"{self._settings_path} is damaged; name another file")
        differing = [name for name, value in settings.items() if recorded.get(name) != value]
        if differing:
            changes = ", ".join(f"{n} {recorded.get(n)!r} then, {settings[n]!r} now" for n in differing)
            raise ConfigError(
                "out",
                f"the rows of {self._out.name} were begun with other settings ({changes}); "
                "give the same again, or another file",
            )

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row that is done, each once, those of the finished file first."""
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
        """Put all rows into the output, in the order of the prompts; the partial file goes."""
        made = self._out.with_name(self._out.name + ".partial")
        with made.open("wb") as raw:
            # No time and no name in the header: the same rows give the same file.
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
    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
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
