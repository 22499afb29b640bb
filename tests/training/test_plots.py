"""The plot of a calibration shows the tree's gains added up, and says what it needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.plots import PlotError, expected_tokens, plot_expected_tokens
from trees.family import TreeFamily

FAMILY = TreeFamily(((0,), (0, 0), (1,)), (0.5, 0.25, 0.125))


def test_expected_tokens_add_up_the_gains() -> None:
    assert expected_tokens(FAMILY) == [1.0, 1.5, 1.75, 1.875]


def test_a_png_is_written(tmp_path: Path) -> None:
    import matplotlib.image

    path = tmp_path / "tree.png"
    plot_expected_tokens(FAMILY, path, {1: 1.4, 3: 1.8}, [1.0, 1.5, 1.7, 1.8], "a head set")
    height, width, _ = matplotlib.image.imread(path).shape
    assert (width, height) == (840, 480)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.plots.find_spec", lambda name: None)
    with pytest.raises(PlotError, match=r"gorgon-serve\[report\]"):
        plot_expected_tokens(FAMILY, tmp_path / "tree.png")
    assert not list(tmp_path.iterdir())
