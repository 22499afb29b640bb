"""The command answers fast, reports errors in one line, and hands resolved settings to the server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cli import serve
from cli.main import build_parser, main
from cli.settings import ENV_PREFIX
from engine.config import EngineConfig
from engine.errors import EngineStartError
from heads.errors import RegistryError
from server.settings import ServerSettings
from training.heads_recipe import HeadsConfig


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


class Served:
    """Stands in for `server.run.serve`."""

    settings: ServerSettings
    config: EngineConfig
    error: Exception | None = None

    def serve(self, settings: ServerSettings, config: EngineConfig) -> int:
        self.settings, self.config = settings, config
        if self.error is not None:
            raise self.error
        return 0


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    served = Served()
    module = ModuleType("server.run")
    module.serve = served.serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "server.run", module)
    return served


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom cli.main import build_parser\nbuild_parser().format_help()\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'httpx', 'huggingface_hub', 'numpy'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"imported for --help: {done.stderr}"


def test_version(capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.startswith("gorgon 0.")


def test_default_model_is_the_registrys() -> None:
    from heads.registry.names import list_models

    assert list_models()[0].name == serve.DEFAULT_MODEL


def test_serve_hands_over_what_was_asked(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GORGON_API_KEY", "secret")
    monkeypatch.setenv("GORGON_MAX_NUM_SEQS", "8")
    model = tmp_path / "my-model"
    model.mkdir()
    argv = ["serve", str(model), "--port", "9000", "--max-num-seqs", "4", "--kv-cache-memory", "1G"]
    assert main([*argv, "--speculation", "off", "--heads", "none"]) == 0
    assert served.settings == ServerSettings(served_model_name="my-model", port=9000, api_key="secret")
    assert served.config == EngineConfig(
        model_dir=str(model), max_num_seqs=4, kv_cache_memory=2**30, speculation="off"
    )


def test_model_and_its_name_from_variables(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GORGON_MODEL", str(tmp_path))
    monkeypatch.setenv("GORGON_SERVED_MODEL_NAME", "mine")
    assert main(["serve"]) == 0
    assert served.config.model_dir == str(tmp_path)
    assert served.settings.served_model_name == "mine"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-tree-nodes", "65"], "--max-tree-nodes: must be 1 to 64, not 65"),
        (["--port", "70000"], "--port: must be 0 to 65535"),
        (["--max-num-batched-tokens", "4", "--max-num-seqs", "8"], "raise it or lower --max-num-seqs"),
        (["--max-num-seqs", "0"], "--max-num-seqs: must be at least 1"),
    ],
)
def test_impossible_settings_exit_2_before_anything_is_fetched(
    argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("engine.folders.resolve_model", lambda name: pytest.fail("fetched"))
    assert main(["serve", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gorgon: error: ") and message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "2"], "--rounds: one request at a time has no rounds"),
        (["--rounds", "0", "--concurrency", "2"], "--rounds: must be at least 1"),
    ],
)
def test_bench_refuses_what_it_would_ignore(argv: list[str], message: str, capsys: Any) -> None:
    assert main(["bench", "engine", *argv]) == 2
    assert message in capsys.readouterr().err


def test_unknown_variable_exits_2(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("GORGON_PROT", "80")
    assert main(["serve"]) == 2
    assert "did you mean GORGON_PORT?" in capsys.readouterr().err


@pytest.mark.parametrize("error", [EngineStartError("no such weights"), RegistryError("no such name")])
def test_errors_for_people_are_one_line(
    error: Exception, served: Served, tmp_path: Path, capsys: Any
) -> None:
    served.error = error
    assert main(["serve", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"gorgon: error: {error}\n"


def test_unknown_model_is_one_line(capsys: Any) -> None:
    assert main(["serve", "no-such-model"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("gorgon: error: ") and "no-such-model" in error
    assert error.count("\n") == 1


def test_interrupt_is_clean(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.folders.resolve_model", interrupt)
    assert main(["serve", str(tmp_path)]) == 130


def test_pull_prints_where_the_model_is(tmp_path: Path, capsys: Any) -> None:
    assert main(["pull", str(tmp_path)]) == 0
    assert str(tmp_path) in capsys.readouterr().out


def test_the_readme_lists_every_flag() -> None:
    readme = (Path(__file__).parent.parent.parent / "README.md").read_text()
    missing = [s.flag for s in serve.all_settings() if s is not serve.MODEL and f"`{s.flag}`" not in readme]
    assert not missing


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--rank", "7"], "rank"),
        (["--kind", "hydra", "--layers", "5"], "layers"),
        (["--architecture", "hydra", "--no-root-input"], "root_input"),
        (["--prefix-width", "64"], "prefix_width"),
        (["--start", "somewhere", "--heads", "3"], "heads"),
    ],
)
def test_training_flags_without_effect_are_refused(
    flags: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}")
    assert main(["train", "medusa1", "--data", str(data), "--out", str(tmp_path / "o"), *flags]) == 2
    assert f"--{name.replace('_', '-')}: has no effect here" in capsys.readouterr().err


def test_the_training_guide_gives_the_defaults_that_are() -> None:
    guide = (Path(__file__).parent.parent.parent / "docs" / "training.md").read_text()
    args = build_parser().parse_args(["train", "heads", "--data", "d", "--out", "o"])
    heads = HeadsConfig()
    assert f"| `--kind` | {heads.kind} |" in guide
    assert f"| `--heads` | {heads.heads} |" in guide
    assert f"| `--layers` | {heads.layers} |" in guide
    assert f"| `--vocab` | {heads.vocab} |" in guide
    assert f"| `--projection`, `--rank` | {heads.projection}, {heads.rank} |" in guide
    assert f"| `--epochs` | {args.epochs:g} |" in guide
    assert f"| `--max-positions` | {args.max_positions:,} |" in guide
    assert f"| `--batch`, `--lr` | {args.batch}, {args.lr} |" in guide
