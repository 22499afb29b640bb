"""Kernels are compiled where they run, once; where they cannot be, the engine does without and says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.backends.native import build
from engine.backends.native.library import kernels

pytestmark = pytest.mark.skipif(kernels() is None, reason="no AVX-512 VNNI and BF16, or no C compiler")


def test_without_a_compiler_there_are_no_kernels_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "_compiler", lambda: None)
    assert build.load.__wrapped__() is None
    assert "C compiler" in caplog.text
    monkeypatch.setattr(build, "_compiler", lambda: ["false"])
    assert build.load.__wrapped__() is None
    monkeypatch.setenv("GORGON_HOME", str(tmp_path))
    broken = tmp_path / "cc"
    broken.write_text(
        "#!/bin/sh\ncase $1 in --version) echo cc 1;; *) echo no such option >&2; exit 1;; esac\n"
    )
    broken.chmod(0o755)
    monkeypatch.setattr(build, "_compiler", lambda: [str(broken)])
    assert build.load.__wrapped__() is None
    assert "no such option" in caplog.text
    assert not list(tmp_path.rglob("*.so"))


def test_kernels_are_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GORGON_HOME", str(tmp_path))
    assert build.load.__wrapped__() is not None
    [library] = (tmp_path / "native").iterdir()
    made = library.stat().st_mtime_ns
    assert build.load.__wrapped__() is not None
    assert [path.stat().st_mtime_ns for path in (tmp_path / "native").iterdir()] == [made]
