"""Runs the real server over a fake engine in a process of its own, with the arguments GRACE and STEP.

Listens on a free port, which the banner names. STEP is the seconds of one step of the engine.
"""

from __future__ import annotations

import asyncio
import sys

from server.metrics import Metrics
from server.run import StopSignals, listen, serve_http
from server.settings import ServerSettings
from tests.fake_engine import ByteTokenizer, FakeEngine


async def main(grace: float, step: float) -> None:
    settings = ServerSettings(served_model_name="fake-model", port=0, shutdown_grace_period=grace)
    engine = FakeEngine(answer="x" * 20, tokens_per_step=1, step_seconds=step)
    metrics = Metrics("fake-model")
    with listen(settings) as listener:
        await serve_http(settings, engine, ByteTokenizer(), metrics, listener, StopSignals())
    print("aborted", len(engine.aborted), flush=True)


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]), float(sys.argv[2])))
