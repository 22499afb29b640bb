"""Environments are made once by their commands, made anew when these change, and say what failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.peers.environment import PeerError, ensure_environment


@pytest.fixture(autouse=True)
def without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Putting pip into an environment takes seconds, and nothing here needs it."""
    import venv

    create = venv.create
    monkeypatch.setattr(
        "venv.create", lambda folder, **options: create(folder, **{**options, "with_pip": False})
    )


def count(folder: Path) -> tuple[str, str]:
    return ("-c", f"open({str(folder / 'count')!r}, 'a').write('x')")


def test_commands_run_once_in_the_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, commands = tmp_path / "peer", [count(tmp_path), ("-c", "import sys; print(sys.prefix)")]
    python = ensure_environment(folder, commands)
    assert ensure_environment(folder, commands) == python == folder / "bin" / "python"
    assert (tmp_path / "count").read_text() == "x"
    assert (folder / "install.log").read_text().strip() == str(folder)
    assert capsys.readouterr().err.count("Installing peer") == 1


def test_other_commands_make_it_anew(tmp_path: Path) -> None:
    folder = tmp_path / "peer"
    ensure_environment(folder, [count(tmp_path)])
    (folder / "old").touch()
    ensure_environment(folder, [count(tmp_path), count(tmp_path)])
    assert (tmp_path / "count").read_text() == "xxx"
    assert not (folder / "old").exists()


def test_a_failure_has_its_reason_and_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "peer"
    for _ in range(2):
        with pytest.raises(
            PeerError, match=r"not installed: .*no wheel for you \(all of it in .*install\.log"
        ):
            ensure_environment(folder, [("-c", "raise SystemExit('no wheel for you')"), count(tmp_path)])
    assert not (tmp_path / "count").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PeerError, match=r"file.peer cannot be"):
        ensure_environment(tmp_path / "file" / "peer", [count(tmp_path)])
