"""There is one place for what is kept, the same at every start, also for users without a home."""

from __future__ import annotations

import logging
import os
import pwd
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from heads.errors import RegistryError
from heads.registry import cache
from heads.registry.cache import cache_dir, expand_user, writable_cache


@pytest.fixture(autouse=True)
def said_nothing_yet() -> Iterator[None]:
    cache._temporary.cache_clear()
    yield
    cache._temporary.cache_clear()


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of a user who has nothing else."""

    def unknown(uid: int) -> NoReturn:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("GORGON_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_gorgon_home_goes_first_then_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GORGON_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "gorgon"
    monkeypatch.setenv("GORGON_HOME", "~/models")
    assert cache_dir() == tmp_path / "models"


def test_a_user_without_a_home_has_one_temporary_folder(
    homeless: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        folders = {cache_dir() for _ in range(3)}
    assert folders == {homeless / f"gorgon-{os.geteuid()}"}
    assert len(caplog.records) == 1 and "GORGON_HOME" in caplog.text
    assert cache_dir().stat().st_mode & 0o777 == 0o700


def test_a_temporary_folder_that_others_can_write_to_is_refused(homeless: Path) -> None:
    folder = homeless / f"gorgon-{os.geteuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(RegistryError, match="not this user's alone; set GORGON_HOME"):
        cache_dir()
    folder.rmdir()
    folder.symlink_to(homeless)
    with pytest.raises(RegistryError, match="not this user's alone"):
        cache_dir()


def test_where_nothing_can_be_written_gorgon_home_is_asked_for(
    homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (homeless / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(homeless / "file"))
    with pytest.raises(RegistryError, match="set GORGON_HOME"):
        cache_dir()


def test_a_cache_that_cannot_be_written_has_one_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GORGON_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert {writable_cache("native") for _ in range(3)} == {
            tmp_path / f"gorgon-{os.geteuid()}" / "native"
        }
    assert len(caplog.records) == 1 and str(tmp_path / "file") in caplog.text
    monkeypatch.setenv("GORGON_HOME", str(tmp_path / "good"))
    assert writable_cache("native") == tmp_path / "good" / "native"


def test_an_unknown_home_is_a_clear_error() -> None:
    with pytest.raises(RegistryError, match="'~nosuchuser/x': the home folder"):
        expand_user("~nosuchuser/x")
