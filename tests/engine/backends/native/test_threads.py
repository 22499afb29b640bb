"""The kernels' own threads: results do not depend on them, and waiting does not take what others need."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import host
from engine.answering import EngineMode
from engine.backends.kv_cache import KVCache
from engine.backends.native.attention import NativeAttention
from engine.backends.native.decoder import NativeDecoder
from engine.backends.native.library import kernels
from engine.backends.native.matrix import Kind, NativeLinear
from engine.backends.threads import num_threads, use_threads
from engine.build import build
from engine.config import EngineConfig
from engine.errors import ConfigError
from tests.engine.backends.native.decoders import WIDE, random_decoder
from tests.engine.passes import make_pass
from tests.engine.tiny import CPU

pytestmark = pytest.mark.skipif(kernels() is None, reason="no AVX-512 VNNI and BF16, or no C compiler")


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    yield
    use_threads(None)


def test_threads_are_those_that_the_host_grants_unless_told_otherwise() -> None:
    assert num_threads() == host.num_cpus()
    assert use_threads(3) == num_threads() == 3
    for wrong in (0, 257):
        with pytest.raises(ConfigError, match="threads"):
            EngineConfig(model_dir="", threads=wrong)


@torch.inference_mode()
def test_a_pass_is_the_same_to_the_last_bit_by_any_number_of_threads() -> None:
    decoder = NativeDecoder(random_decoder(WIDE), lambda name, weight: Kind.INT8)
    step, num_blocks = make_pass([(40, 3, 20), (0, 90, 0), (7, 1, 0)], 16, 5)

    def run() -> tuple[Tensor, Tensor]:
        cache = KVCache(WIDE, num_blocks, 16, torch.bfloat16, CPU)
        attention = NativeAttention(step, cache, WIDE.num_heads)
        return decoder.logits(decoder(step.token_ids, step.positions, attention)), cache.k

    use_threads(1)
    expected = run()
    for count in (2, 3, 8, 200):
        use_threads(count)
        for _ in range(3):
            found = run()
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_callers_at_the_same_time_do_not_disturb_each_other() -> None:
    use_threads(3)
    linear = NativeLinear(torch.randn(512, 256), None, Kind.INT8)
    inputs = [torch.randn(17, 256).bfloat16() for _ in range(4)]
    expected = [linear(x) for x in inputs]
    wrong = []

    def call(x: Tensor, y: Tensor) -> None:
        wrong.extend(i for i in range(200) if not torch.equal(linear(x), y))

    callers = [threading.Thread(target=call, args=pair) for pair in zip(inputs, expected, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def said_by(code: str) -> str:
    preamble = """
import os, time, torch
from engine.backends.native.matrix import Kind, NativeLinear
from engine.backends.threads import use_threads
torch.manual_seed(0)
linear = NativeLinear(torch.randn(4096, 512), None, Kind.INT8)
x = torch.randn(1, 512).bfloat16()
"""
    done = subprocess.run(
        [sys.executable, "-c", preamble + code], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


def test_two_threads_on_one_core_work_no_more_than_one() -> None:
    """Processor time, so that it does not matter what else the machine does."""
    code = """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
def seconds(threads):
    use_threads(threads)
    linear(x)
    start = time.process_time()
    for _ in range(1500):
        linear(x)
    return time.process_time() - start
print(min(seconds(2) for _ in range(3)) / min(seconds(1) for _ in range(3)))
"""
    assert float(said_by(code)) < 1.8


def test_threads_sleep_soon_after_a_call() -> None:
    code = """
use_threads(2)
spent = 0.0
for _ in range(100):
    linear(x)
    start = time.process_time()
    time.sleep(0.005)
    spent += time.process_time() - start
print(spent)
"""
    assert float(said_by(code)) < 0.1  # of half a second; OpenMP's threads spend all of it


def test_a_forked_child_computes_without_the_threads_it_lost() -> None:
    code = """
use_threads(3)
expected = linear(x)
child = os.fork()
if not child:
    os._exit(0 if all(torch.equal(linear(x), expected) for _ in range(50)) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.equal(linear(x), expected))
"""
    assert said_by(code) == "0 True"


def test_signals_are_left_to_the_process_own_threads() -> None:
    code = """
use_threads(3)
linear(x)
masks = [
    int(line.split()[1], 16)
    for thread in os.listdir("/proc/self/task")
    if open(f"/proc/self/task/{thread}/comm").read().startswith("gorgon")
    for line in open(f"/proc/self/task/{thread}/status")
    if line.startswith("SigBlk")
]
print(len(masks), all(mask >> 14 & 1 and mask >> 1 & 1 for mask in masks))
"""
    assert said_by(code) == "2 True"


def test_an_engine_computes_with_the_threads_it_is_told_and_torch_with_one_beside_our_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before, seen = torch.get_num_threads(), []
    forward = NativeDecoder.forward

    def watched(self: NativeDecoder, *args: Any) -> Tensor:
        seen.append((num_threads(), torch.get_num_threads()))
        return forward(self, *args)

    monkeypatch.setattr(NativeDecoder, "forward", watched)
    caplog.set_level("INFO")
    config = EngineConfig(
        model_dir="", device="cpu", dtype="bfloat16", quantization="none", kv_cache_memory=1 << 22, threads=3
    )
    try:
        engine = build(config, loaded=random_decoder(WIDE))
        assert len(EngineMode("", engine).run([5, 6, 7], 4).outputs[0]) == 4
        assert torch.get_num_threads() == 3  # what else this process computes is not the engine's to decide
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {(3, 1)}
    assert "3 threads" in caplog.text
