"""An engine process without a model, which starts in no time and misbehaves on demand.

Its model folder holds one line for each start to come in the file `starts`: what the next one does. A request
gets the token 7 every 10 ms; what its first prompt token stands for, see below.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from engine import channel
from engine.config import EngineConfig
from engine.messages import (
    AbortRequest,
    AddRequest,
    Configure,
    EngineFailed,
    EngineReady,
    RequestOutput,
    RequestUsage,
    StepOutput,
    StepStats,
    ToEngine,
)
from tests.fake_engine import model_info

DIES, HANGS, SPINS = 100, 101, 102  # first tokens of prompts
STEP_SECONDS = 0.01


def main(descriptor: int) -> None:
    with socket.socket(fileno=descriptor) as connection:
        first = channel.receive(connection)
        if not isinstance(first, Configure):
            return
        _start(first.config, connection)
        connection.sendall(channel.frame(EngineReady(model_info())))
        inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
        _serve(connection, inbox)


def _start(config: EngineConfig, connection: socket.socket) -> None:
    starts = Path(config.model_dir) / "starts"
    lines = starts.read_text().splitlines() if starts.exists() else []
    with (starts.parent / "pids").open("a") as pids:
        print(os.getpid(), file=pids)
    if lines:
        starts.write_text("\n".join(lines[1:]))
    match lines[0].split() if lines else []:
        case ["hang"]:
            time.sleep(1000)
        case ["stop"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        case ["after", seconds]:
            time.sleep(float(seconds))
        case ["capture"] if not config.enforce_eager:
            connection.sendall(channel.frame(EngineFailed("stream is capturing", eager_may_start=True)))
            os._exit(1)


def _read(connection: socket.socket, inbox: queue.SimpleQueue[ToEngine]) -> None:
    while (message := channel.receive(connection)) is not None:
        inbox.put(message)
    os._exit(0)


def _serve(connection: socket.socket, inbox: queue.SimpleQueue[ToEngine]) -> None:
    left: dict[str, int] = {}  # tokens that each request is still to get
    steps: dict[str, int] = {}
    while True:
        while not left or not inbox.empty():
            message = inbox.get()
            if isinstance(message, AbortRequest):
                left.pop(message.request_id, None)
            elif isinstance(message, AddRequest):
                _misbehave(message.prompt_token_ids[0])
                left[message.request_id] = message.sampling.max_tokens
        time.sleep(STEP_SECONDS)
        outputs = []
        for request_id in list(left):
            left[request_id] -= 1
            steps[request_id] = steps.get(request_id, 0) + 1
            usage = RequestUsage(
                cached_tokens=0, decode_steps=steps[request_id], drafted_tokens=0, accepted_tokens=0
            )
            reason = None if left[request_id] else "length"
            outputs.append(
                RequestOutput(request_id=request_id, token_ids=[7], usage=usage, finish_reason=reason)
            )
            if reason:
                del left[request_id]
        connection.sendall(channel.frame(StepOutput(outputs, _stats(len(outputs), len(left)))))


def _misbehave(token: int) -> None:
    if token == DIES:
        os._exit(3)
    while token == SPINS:
        pass
    if token == HANGS:
        time.sleep(1000)


def _stats(num_committed: int, num_running: int) -> StepStats:
    return StepStats(
        duration=STEP_SECONDS,
        num_tokens=num_committed,
        committed_tokens=[1] * num_committed,
        drafted_tokens=0,
        accepted_by_depth=[],
        drafted_by_depth=[],
        num_running=num_running,
        num_waiting=0,
        kv_usage=0.0,
        preemptions=0,
        prefix_queries=0,
        prefix_hits=0,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
