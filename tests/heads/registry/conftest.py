"""Fixtures of fetching."""

from __future__ import annotations

import pytest

from heads.registry import wheels
from tests.heads.registry.wheel import FakePip


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(wheels, "run_stoppable", fake)
    return fake
