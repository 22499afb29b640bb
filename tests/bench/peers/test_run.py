"""Servers take turns on the same load; one that fails is reported and the others go on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.peers.models import Forms
from bench.peers.run import PeersOptions, run
from bench.peers.servers import OURS, PEERS, Peer, Plan
from bench.peers.table import print_results, results_of
from bench.peers.turns import Running, requests_of
from bench.prompts import BUILTIN
from cli.main import main
from engine.errors import ConfigError


def fake(plan: Plan) -> list[str]:
    return [sys.executable, "-m", "tests.bench.servers", str(plan.port)]


def broken(plan: Plan) -> list[str]:
    return [sys.executable, "-c", "raise SystemExit('no such instruction set')"]


FAKES = (
    Peer(OURS, fake),
    Peer("other", fake, model=lambda forms: forms.name),
    Peer("broken", broken),
    Peer("not installed", fake, ("missing", (("-c", "raise SystemExit('no wheel for you')"),))),
)


def options(**changed: Any) -> PeersOptions:
    fields: dict[str, Any] = {
        "model": "tiny",
        "peers": (),
        "prompts": BUILTIN,
        "concurrency": (1, 2),
        "rounds": 2,
        "max_tokens": 4,
        "time_limit": 60.0,
        "seed": 0,
    }
    return PeersOptions(**{**fields, **changed})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    import venv

    create = venv.create
    monkeypatch.setattr(
        "venv.create", lambda folder, **options: create(folder, **{**options, "with_pip": False})
    )
    monkeypatch.setattr("bench.peers.run.PEERS", FAKES)
    monkeypatch.setattr("bench.peers.run.forms_of", lambda name, cache: Forms(name, None, tmp_path))
    monkeypatch.setenv("GORGON_HOME", str(tmp_path))
    yield tmp_path / "peers"


def test_one_table_with_ratios_and_with_those_that_failed(cache: Path, capsys: Any) -> None:
    assert run(options()) == 1  # not everything was measured
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert list(document["servers"]) == [OURS, "other"]
    for result in document["servers"].values():
        assert [len(result["levels"][level]["rounds"]) for level in ("1", "2")] == [2, 2]
        assert result["levels"]["2"]["rounds"][0]["requests"] == requests_of(2)
        assert result["resident_bytes"] > 1e6 and result["start_seconds"] > 0
        prompt_tokens = [figures["prompt_tokens"] for figures in result["first_token_rounds"]]
        assert prompt_tokens == [16 * 500, 16 * 500]
    ratio = document["servers"]["other"]["levels"]["1"]["times_as_fast_is_ours"]
    ours, theirs = (document["servers"][name]["levels"]["1"]["rounds"] for name in (OURS, "other"))
    expected = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(ours, theirs, strict=True)]
    assert ratio["median"] == pytest.approx(sum(expected) / 2, abs=1e-3)
    assert "no such instruction set" in document["failures"]["broken"]
    assert "no wheel for you" in document["failures"]["not installed"]
    table = next(line for line in out.splitlines() if line.startswith("other"))
    assert table.count("x") == 2
    assert "broken: not measured to the end: ended with status 1" in out
    assert (cache / "broken.log").is_file()


def test_all_went_well(cache: Path) -> None:
    assert run(options(peers=(OURS,), rounds=1, concurrency=(1,))) == 0


def test_an_unknown_name_lists_the_known(capsys: Any) -> None:
    assert main(["bench", "peers", "--peers", "tgi"]) == 2
    error = capsys.readouterr().err
    assert "--peers: tgi is none of gorgon, gorgon-off, llama.cpp, llama.cpp-ngram, vllm" in error


def test_numbers_below_one_are_refused(capsys: Any) -> None:
    assert main(["bench", "peers", "--rounds", "0"]) == 2
    assert "--rounds: must be at least 1" in capsys.readouterr().err


class Started:
    """Stands in for a process where only its start-up time is asked."""

    start_seconds = 1.0


def test_without_ours_there_are_no_ratios(capsys: Any) -> None:
    figures = {"tokens_per_second": 5.0, "timed_out": True, "ttft_seconds": None, "tokens_per_step": 1.5}
    alone = Running("other", Started(), "m", {1: [figures]})  # type: ignore[arg-type]
    results = results_of([alone])
    level = results["other"]["levels"]["1"]
    assert (level["times_as_fast_is_ours"], level["cut_off"]) == (None, True)
    print_results(results, {}, [1, 4])
    row = capsys.readouterr().out.splitlines()[-2]
    assert row.split() == ["other", "~5.0", "-", "1.50", "-", "-", "1.00"]


def test_every_server_gets_the_same_model_port_and_load(tmp_path: Path) -> None:
    plan = Plan(Path("/env/bin/python"), Forms("tiny", tmp_path / "m.gguf", tmp_path / "st"), 5123, 40, 2048)
    commands = {peer.name: peer.command(plan) for peer in PEERS}
    assert all("5123" in command for command in commands.values())
    assert commands["gorgon-off"] == [*commands["gorgon"], "--speculation", "off"]
    assert commands["llama.cpp"][-5:] == [str(tmp_path / "m.gguf"), "5123", "40", "2048", "0"]
    assert commands["llama.cpp-ngram"][-1] == "1"
    assert str(tmp_path / "st") in commands["vllm"] and "40" in commands["vllm"]
    assert '"method": "ngram"' in commands["vllm-ngram"][-1]
    assert str(tmp_path / "st") in commands["transformers"]


def test_llamacpp_needs_a_gguf(tmp_path: Path) -> None:
    from bench.peers.environment import PeerError

    plan = Plan(Path("python"), Forms("tiny", None, tmp_path), 5123, 40, 2048)
    [peer] = [peer for peer in PEERS if peer.name == "llama.cpp"]
    with pytest.raises(PeerError, match="no GGUF"):
        peer.command(plan)


def test_names_are_checked_before_anything_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.peers.run.forms_of", lambda *_: pytest.fail("resolved"))
    with pytest.raises(ConfigError):
        run(options(peers=("none",)))


def test_what_is_missing_is_said_first(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("bench.peers.run.find_spec", lambda name: None)
    monkeypatch.setattr("bench.peers.run.forms_of", lambda *_: pytest.fail("resolved"))
    assert main(["bench", "peers"]) == 1
    assert f"needs accelerate: {sys.executable}" in capsys.readouterr().err
