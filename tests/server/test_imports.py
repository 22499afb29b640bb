"""What neither process loads: imports are a large part of a start."""

from __future__ import annotations

import subprocess
import sys


def test_the_server_imports_neither_torch_nor_what_fetches_and_reads_weights() -> None:
    code = "import server.run, heads.registry.names, heads.registry.share"
    runs_without({"torch", "transformers", "gguf", "huggingface_hub"}, code)


def test_an_engine_with_heads_imports_nothing_that_trains_fetches_or_compiles() -> None:
    code = """
import engine.process
from heads.checkpoint import load_heads
from heads.registry.names import list_head_sets
for folder in list_head_sets().values():
    load_heads(folder)
"""
    runs_without({"torch._dynamo", "transformers", "gguf", "huggingface_hub"}, code)


def runs_without(unwanted: set[str], code: str) -> None:
    checked = f"{code}\nimport sys\nprint(*({unwanted!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", checked], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("", "")
