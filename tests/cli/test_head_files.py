"""Head sets come in from other projects, go out to them, and travel: the commands, as a person runs them."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from safetensors.torch import load_file, save_file

from cli.head_files import EXPORT_FORMATS
from cli.main import main
from engine.model.loader import load_vocabulary
from heads.checkpoint import load_heads, save_heads
from heads.formats.export import FORMATS, export_heads
from heads.medusa import MedusaHeads
from tests.engine.tiny import save_tiny_model
from trees.family import TreeFamily


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model(folder)
    return folder


@pytest.fixture
def head_set(model: Path, tmp_path: Path) -> Path:
    """Three heads of one block for the tiny model, with a tree and a card."""
    torch.manual_seed(0)
    module = MedusaHeads(3, 1, 64, 128)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.1)
    embedding, _ = load_vocabulary(model)
    folder = tmp_path / "set"
    save_heads(folder, module, str(model), embedding)
    TreeFamily(((0,), (0, 0)), (0.5, 0.3)).save(folder / "tree.json")
    (folder / "README.md").write_text("# A card\n")
    return folder


@pytest.mark.parametrize("format_name", EXPORT_FORMATS)
def test_export_then_import_gives_the_same_heads(
    format_name: str, model: Path, head_set: Path, tmp_path: Path, capsys: Any
) -> None:
    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    export = ["heads", "export", str(head_set), "--format", format_name, "--model", str(model)]
    assert main([*export, "--out", there]) == 0
    assert main(["heads", "import", there, "--model", str(model), "--out", back]) == 0
    assert f"gorgon calibrate --heads {back} --model {model}" in capsys.readouterr().out
    expected = load_heads(head_set).module.state_dict()
    found = load_heads(Path(back)).module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert main(["heads", "verify", back, "--model", str(model)]) == 0
    tree = json.loads((tmp_path / "back" / "tree.json").read_text())
    assert tree["calibrated"] is False
    assert "not calibrated" in tree["source"]
    assert TreeFamily.load(tmp_path / "back" / "tree.json").max_depth == 3


def test_every_format_can_be_asked_for() -> None:
    assert set(EXPORT_FORMATS) == set(FORMATS)


def test_a_lying_config_is_a_warning(model: Path, head_set: Path, tmp_path: Path, capsys: Any) -> None:
    _, lm_head = load_vocabulary(model)
    export_heads("medusa", load_heads(head_set).module, "tiny", lm_head, tmp_path / "lies")
    (tmp_path / "lies" / "config.json").write_text(json.dumps({"medusa_num_heads": 2}))
    out = str(tmp_path / "out")
    assert main(["heads", "import", str(tmp_path / "lies"), "--model", str(model), "--out", out]) == 0
    captured = capsys.readouterr()
    assert "warning: config.json says medusa_num_heads 2, but the weights hold 3" in captured.err
    assert "3 Medusa heads" in captured.out


def test_export_refuses_another_base(head_set: Path, tmp_path: Path, capsys: Any) -> None:
    torch.manual_seed(1)
    folder = tmp_path / "other"
    save_tiny_model(folder)
    weights = folder / "model.safetensors"
    save_file({k: torch.randn_like(v) for k, v in load_file(weights).items()}, weights, {"format": "pt"})
    command = ["heads", "export", str(head_set), "--format", "tgi", "--model", str(folder)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert "this is another model" in capsys.readouterr().err


def test_import_of_no_checkpoint_is_one_line(model: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["heads", "import", str(tmp_path / "nowhere"), "--model", str(model)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_push_and_pull_through_a_folder(head_set: Path, tmp_path: Path, capsys: Any) -> None:
    (head_set / "notes.txt").write_text("mine alone")
    (head_set / "cache").mkdir()
    (head_set / "cache" / "rows.safetensors").touch()
    (head_set / "state.safetensors").touch()
    assert main(["heads", "push", str(head_set), str(tmp_path / "shared" / "set")]) == 0
    assert main(["heads", "pull", str(tmp_path / "shared" / "set"), "--out", str(tmp_path / "mine")]) == 0
    names = {"config.json", "heads.safetensors", "tree.json", "README.md"}
    assert {path.name for path in (tmp_path / "mine").iterdir()} == names
    for name in names:
        assert (tmp_path / "mine" / name).read_bytes() == (head_set / name).read_bytes()
    assert "gorgon serve" in capsys.readouterr().out


def test_a_tree_that_asks_for_more_guesses_than_there_are_is_not_pushed(
    head_set: Path, tmp_path: Path, capsys: Any
) -> None:
    paths = tuple((rank,) for rank in (0, 128))
    TreeFamily(paths, (0.5, 0.1)).save(head_set / "tree.json")
    assert main(["heads", "push", str(head_set), str(tmp_path / "there")]) == 1
    assert "asks for guess 129 of a head, but its heads know 128 tokens" in capsys.readouterr().err


def test_a_merged_checkpoint_is_the_source_of_heads_and_their_base(
    model: Path, head_set: Path, tmp_path: Path, capsys: Any
) -> None:
    merged, out = tmp_path / "merged", str(tmp_path / "out")
    shutil.copytree(model, merged)
    tensors = load_file(merged / "model.safetensors")
    module = load_heads(head_set).module
    for head in range(3):
        tensors[f"medusa_head.{head}.0.linear.weight"] = module.state_dict()["weights.0"][head].clone()
        tensors[f"medusa_head.{head}.0.linear.bias"] = module.state_dict()["biases.0"][head].clone()
        tensors[f"medusa_head.{head}.1.weight"] = torch.randn(128, 64)
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    assert main(["heads", "import", str(merged), "--model", str(merged), "--out", out]) == 0
    assert "trained together with the heads" in capsys.readouterr().err
    assert main(["heads", "verify", out, "--model", str(merged)]) == 0
    assert "own projection" in capsys.readouterr().out


@pytest.mark.parametrize("damaged", ["tree.json", "heads.safetensors"])
def test_a_damaged_set_is_neither_pushed_nor_pulled(
    damaged: str, head_set: Path, tmp_path: Path, capsys: Any
) -> None:
    (head_set / damaged).write_bytes((head_set / damaged).read_bytes()[:-20])
    assert main(["heads", "push", str(head_set), str(tmp_path / "there")]) == 1
    assert main(["heads", "pull", str(head_set), "--out", str(tmp_path / "there")]) == 1
    assert not (tmp_path / "there").exists()
    assert damaged in capsys.readouterr().err


class FakeHub:
    """Stands for the hub: keeps what is uploaded in a folder, or refuses as `error` says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: Exception | None = None
        self.created: list[dict[str, Any]] = []

    def create_repo(self, repo_id: str, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.created.append({"repo_id": repo_id, **options})

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str
    ) -> SimpleNamespace:
        names = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
        self.folder.mkdir(parents=True)
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copyfile(folder_path / name, self.folder / name)
        return SimpleNamespace(commit_url=f"hub://{repo_id}")

    def snapshot(self, repo_id: str, **options: Any) -> str:
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot)
    monkeypatch.chdir(tmp_path)
    yield fake


def test_push_and_pull_through_the_hub(hub: FakeHub, head_set: Path, tmp_path: Path, capsys: Any) -> None:
    names = {path.name for path in head_set.iterdir()}
    (head_set / "cache").mkdir()
    (head_set / "cache" / "rows.safetensors").touch()
    assert main(["heads", "push", str(head_set), "org/name"]) == 0
    assert hub.created == [{"repo_id": "org/name", "private": True, "exist_ok": True}]
    assert "hub://org/name" in capsys.readouterr().out
    assert {path.name for path in hub.folder.iterdir()} == names
    assert main(["heads", "pull", "org/name", "--out", str(tmp_path / "mine")]) == 0
    assert (tmp_path / "mine" / "README.md").read_text() == "# A card\n"
    assert main(["heads", "pull", "org/name"]) == 0
    assert f"{hub.folder} holds 3 Medusa heads" in capsys.readouterr().out


http = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])  # the hub's own


def refusal(status: int) -> Exception:
    response = http.Response(status, request=http.Request("POST", "https://hub.invalid"))
    return HfHubHTTPError("refused", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalTokenNotFoundError("no token"), "without a token; run hf auth login"),
        (refusal(401), "does not let this token write to org/name"),
        (refusal(403), "does not let this token write to org/name"),
        (refusal(500), "check the connection, or give a folder"),
        (http.ConnectError("unreachable"), "check the connection, or give a folder"),
    ],
)
def test_a_hub_that_refuses_is_one_clear_line(
    hub: FakeHub, head_set: Path, error: Exception, message: str, capsys: Any
) -> None:
    hub.error = error
    assert main(["heads", "push", str(head_set), "org/name"]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_import_takes_a_hub_id(hub: FakeHub, model: Path, head_set: Path, tmp_path: Path) -> None:
    command = ["heads", "export", str(head_set), "--format", "vllm", "--model", str(model)]
    assert main([*command, "--out", str(hub.folder)]) == 0
    assert main(["heads", "import", "org/heads", "--model", str(model), "--out", str(tmp_path / "in")]) == 0
    assert load_heads(tmp_path / "in").module.num_heads == 3


def test_pull_onto_itself_or_into_a_file(head_set: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["heads", "pull", str(head_set), "--out", str(head_set)]) == 1
    assert "lies already" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["heads", "push", str(head_set), str(tmp_path / "file")]) == 1
    assert "is a file; name a folder" in capsys.readouterr().err
    assert main(["heads", "pull", str(tmp_path / "nothing")]) == 1
    assert "no hub id like org/name and no folder" in capsys.readouterr().err
