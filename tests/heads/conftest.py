"""Fixtures of fetching."""

from __future__ import annotations

import pytest

from heads import fetch
from tests.heads.wheel import FakePip


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(fetch, "run_stoppable", fake)
    return fake
