"""`gorgon train`: what cannot work is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.main import main


def test_a_data_file_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "medusa1", "--out", "heads", "--data", "nowhere.jsonl"]) == 2
    assert "--data: nowhere.jsonl is no file" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--heads", "--layers", "--vocab", "--epochs", "--batch", "--lr"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "many"])
def test_impossible_values_are_refused(
    flag: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "medusa1", "--data", "x", "--out", str(tmp_path), flag, value])
    assert stopped.value.code == 2
    assert flag in capsys.readouterr().err
