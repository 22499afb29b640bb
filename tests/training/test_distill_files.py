"""What a run of `gorgon distill` leaves behind can be trusted by the next one."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from engine.errors import ConfigError
from training.dataset import DataError
from training.distill_files import DistillFiles, failed_path

ORDER = {name: place for place, name in enumerate("abcdef")}
SETTINGS = {"seed": 0}


def opened(out: Path, settings: Mapping[str, object] = SETTINGS) -> DistillFiles:
    return DistillFiles(out, settings, ORDER)


def put(out: Path, names: str, finish: bool) -> None:
    with opened(out) as files:
        for name in names:
            files.append({"id": name, "text": name * 5})
        if finish:
            files.finish()


def names(out: Path) -> str:
    text = gzip.decompress(out.read_bytes()) if out.suffix == ".gz" else out.read_bytes()
    return "".join(json.loads(line)["id"] for line in text.splitlines())


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_rows_end_up_in_the_order_of_the_prompts_each_once(tmp_path: Path, name: str) -> None:
    out = tmp_path / "new" / name
    put(out, "eb", finish=False)
    assert not out.exists()
    put(out, "d", finish=True)
    assert names(out) == "bde"
    put(out, "fa", finish=False)
    put(out, "d", finish=False)  # as if it had been killed before the partial file was removed
    with opened(out) as files:
        assert sorted(row["id"] for row in files.rows()) == list("abdef")
        files.finish()
    assert names(out) == "abdef"
    whole = tmp_path / "whole" / name
    put(whole, "fedba", finish=True)
    assert whole.read_bytes() == out.read_bytes()


@pytest.mark.parametrize("torn", ["", '{"id"', "x" * 200_000])
def test_a_torn_last_line_is_cut_however_long(tmp_path: Path, torn: str) -> None:
    out, partial = tmp_path / "a.jsonl", tmp_path / "a.partial.jsonl"
    put(out, "ab", finish=False)
    whole = partial.read_text()
    partial.write_text(whole + torn)
    opened(out).__exit__(None, None, None)
    assert partial.read_text() == whole


def test_a_torn_only_line_is_cut(tmp_path: Path) -> None:
    partial = tmp_path / "a.partial.jsonl"
    partial.write_text('{"id": "a"')
    put(tmp_path / "a.jsonl", "b", finish=True)
    assert names(tmp_path / "a.jsonl") == "b"


def test_settings_may_change_as_long_as_there_is_no_row(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with opened(out, {"seed": 1}):
        pass
    put(out, "a", finish=False)
    for settings in ({"seed": 1}, {"seed": 0, "dtype": "float32"}):
        with pytest.raises(ConfigError, match="other settings"):
            opened(out, settings)
    put(out, "b", finish=True)
    with pytest.raises(ConfigError, match="seed 0 then, 1 now"):
        opened(out, {"seed": 1})


def test_two_outputs_whose_files_would_have_one_name_are_told_apart(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", "a", finish=False)
    with pytest.raises(ConfigError, match=r"output 'a\.jsonl' then, 'a\.jsonl\.gz' now"):
        opened(tmp_path / "a.jsonl.gz")


def test_an_output_of_another_program_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text("precious\n")
    with pytest.raises(ConfigError, match="not made by gorgon distill"):
        opened(out)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"] and out.read_text() == "precious\n"


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_settings_are_named(tmp_path: Path, text: str) -> None:
    put(tmp_path / "a.jsonl", "a", finish=False)
    (tmp_path / "a.settings.json").write_text(text)
    with pytest.raises(ConfigError, match=r"a\.settings\.json is missing or damaged"):
        opened(tmp_path / "a.jsonl")


def test_a_truncated_output_is_named(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl.gz"
    put(out, "abc", finish=True)
    out.write_bytes(out.read_bytes()[:-12])
    with opened(out) as files, pytest.raises(DataError, match=r"a\.jsonl\.gz is damaged"):
        list(files.rows())


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        opened(tmp_path / "file" / "a.jsonl")


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    with opened(tmp_path / "a.jsonl"), pytest.raises(ConfigError, match="another process is writing"):
        opened(tmp_path / "a.jsonl")


def test_failures_are_of_the_last_run_and_may_hold_what_is_no_unicode(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with opened(out) as files:
        files.append_failure({"id": "a", "messages": "\ud800 é"})
    assert json.loads(failed_path(out).read_text()) == {"id": "a", "messages": "\ud800 é"}
    put(out, "a", finish=True)
    assert not failed_path(out).exists()
