"""The curves of a run as a CSV file that survives kills: rows of lost steps are removed when the run
continues."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

LOG_FILE = "log.csv"


class CurveFile:
    """log.csv in the run's directory. Its rows begin with the step; not every step has one.

    Nothing is written where `active` is false, which it is on all devices but the first.
    """

    def __init__(self, directory: Path, columns: Sequence[str], active: bool) -> None:
        self.path, self.columns, self.active = directory / LOG_FILE, ["step", *columns], active

    def start(self, step: int) -> None:
        """Begin the file where there is none or the run is a new one."""
        if self.active and (step == 0 or not self.path.exists()):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(",".join(self.columns) + "\n")

    def cut(self, step: int) -> None:
        """Drop the rows of steps after this one, which were lost when the run was killed."""
        if self.active and self.path.exists():
            header, *rows = self.path.read_text().splitlines(True)
            kept = [row for row in rows if int(row.split(",")[0]) <= step]
            self.path.write_text(header + "".join(kept))

    def add(self, step: int, values: Sequence[object]) -> None:
        """One row; None is an empty field."""
        if self.active:
            with self.path.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow([step, *values])
