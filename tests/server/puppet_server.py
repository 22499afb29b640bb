"""Runs the whole server without a model: with an engine of `tests.engine.puppet` and a tokenizer of bytes.

The arguments are the engine's folder and the grace period. Listens on a free port, which the banner names.
"""

from __future__ import annotations

import sys
from pathlib import Path

from engine import child
from engine.config import EngineConfig
from server import run
from server.settings import ServerSettings
from tests.fake_engine import ByteTokenizer


def main(folder: str, grace: float) -> int:
    child._MODULE = "tests.engine.puppet"
    run.load_chat_tokenizer = lambda *_: ByteTokenizer()  # type: ignore[assignment,return-value]
    settings = ServerSettings(served_model_name="fake-model", port=0, shutdown_grace_period=grace)
    return run.serve(settings, EngineConfig(model_dir=folder))


if __name__ == "__main__":
    assert Path(sys.argv[1]).is_dir()
    sys.exit(main(sys.argv[1], float(sys.argv[2])))
