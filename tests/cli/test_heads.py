"""The head set that comes with the default model can be listed, shown and verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from heads.defaults import DEFAULT_MODEL
from heads.registry.names import list_head_sets


def test_list_names_the_built_in_set(capsys: Any) -> None:
    assert main(["heads", "list"]) == 0
    assert DEFAULT_MODEL in capsys.readouterr().out


def test_show_tells_what_a_set_holds(capsys: Any) -> None:
    assert main(["heads", "show"]) == 0
    out = capsys.readouterr().out
    assert "num_heads: " in out and "expected tokens per step by draft nodes: 1: 1." in out


def test_verify_accepts_the_default_pair(default_model_dir: Path, capsys: Any) -> None:
    assert main(["heads", "verify"]) == 0
    assert "fits smollm2-135m-instruct" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["no-such-set", "none", "auto"])
def test_a_name_that_is_no_set(name: str, capsys: Any) -> None:
    assert main(["heads", "show", name]) == 1
    assert capsys.readouterr().err.startswith("gorgon: error: ")


def test_verify_refuses_a_tree_deeper_than_the_heads(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "deep"
    shutil.copytree(list_head_sets()[DEFAULT_MODEL], folder)
    paths = [[0] * depth for depth in range(1, 10)]
    (folder / "tree.json").write_text(json.dumps({"version": 1, "paths": paths, "gains": [0.1] * 9}))
    assert main(["heads", "verify", str(folder)]) == 1
    assert "is 9 deep, but it has" in capsys.readouterr().err


def test_a_damaged_tree_is_one_line(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(list_head_sets()[DEFAULT_MODEL], folder)
    (folder / "tree.json").write_text("{}")
    assert main(["heads", "show", str(folder)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
