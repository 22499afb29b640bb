"""Memory on a real GPU: the fitted cache, passes that truly run out, fp8, and weights of 8 bits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.shapes import random_decoder
from cli.main import main
from engine.backends.kv_cache import FP8, KVCache
from engine.backends.torch.scaled import ScaledFP8Linear, ScaledInt8Linear
from engine.build import build
from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import AddRequest
from tests.engine.helpers import params
from tests.engine.tiny import CONFIG, CPU

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
PROMPTS = [[(11 * i + 3 * p + p * p) % 4096 for p in range(n)] for i, n in enumerate((300, 20, 700, 50))]


@pytest.fixture(autouse=True)
def whole_device() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def make_engine(**settings: Any) -> Engine:
    sizes = {"max_num_seqs": 8, "max_model_len": 2048, "speculation": "off"}
    config = EngineConfig(model_dir="", dtype="float32", device="cuda", **{**sizes, **settings})
    return build(config, loaded=random_decoder("tiny", torch.float32, CUDA))


def answers(engine: Engine) -> tuple[list[list[int]], int]:
    """Tokens of all prompts, and how often memory ran out."""
    tokens: dict[str, list[int]] = {str(index): [] for index in range(len(PROMPTS))}
    for name, prompt in zip(tokens, PROMPTS, strict=True):
        engine.add_request(AddRequest(name, prompt, params(40, ignore_eos=True)))
    lost = 0
    while engine.has_work():
        step = engine.step()
        lost += step.stats.out_of_memory
        for output in step.outputs:
            assert output.failure is None
            tokens[output.request_id] += output.token_ids
    return list(tokens.values()), lost


def test_the_cache_takes_what_is_asked_for_and_leaves_the_rest() -> None:
    free, total = torch.cuda.mem_get_info()
    share = 1 - free / total + 0.1
    engine = make_engine(gpu_memory_utilization=share)
    left, _ = torch.cuda.mem_get_info()
    assert total * (1 - share) <= left + (64 << 20)
    assert engine.info.num_blocks * 16 * 2 * 2 * 2 * 16 * 4 > 0.05 * total
    assert all(len(tokens) == 40 for tokens in answers(engine)[0])


def test_a_pass_that_truly_runs_out_changes_no_answer() -> None:
    expected, calm = answers(make_engine(kv_cache_memory=32 << 20))
    assert calm == 0
    engine = make_engine(kv_cache_memory=32 << 20)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    # A little more than what lies there: prompts together do not fit, parts of them do.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (4 << 20)) / total)
    found, lost = answers(engine)
    assert found == expected
    assert lost > 0


def test_fp8_caches_hold_the_same_bytes_as_on_a_cpu() -> None:
    torch.manual_seed(0)
    k, v = (torch.randn(12, CONFIG.num_kv_heads, CONFIG.head_dim) * 200 for _ in range(2))
    slots = torch.randperm(12)
    caches = [KVCache(CONFIG, 3, 4, torch.float32, device, stored=FP8) for device in (CPU, CUDA)]
    for cache in caches:
        device = cache.k.device
        cache.write(1, slots.to(device), k.to(device), v.to(device))
    for first, second in zip(caches[0].read_run(1, 0, 3), caches[1].read_run(1, 0, 3), strict=True):
        assert torch.equal(first, second.cpu())


@pytest.mark.parametrize("rows", [1, 17, 64])
@pytest.mark.parametrize("kind", [ScaledInt8Linear, ScaledFP8Linear])
def test_scaled_products_are_those_of_a_cpu(kind: type[ScaledInt8Linear], rows: int) -> None:
    if kind is ScaledFP8Linear and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 here")
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*size).bfloat16() for size in ((rows, 256), (512, 256), (512,)))
    expected = kind(weight, bias)(x)
    found = kind(weight.to(CUDA), bias.to(CUDA))(x.to(CUDA)).cpu()
    torch.testing.assert_close(found, expected, rtol=1.6e-2, atol=1e-2)


def test_the_benchmark_says_how_long_the_device_waits(capsys: Any) -> None:
    flags = ["--device", "cuda", "--shapes", "tiny", "--steps", "5", "--requests", "1", "--nodes", "1", "8"]
    assert main(["bench", "gpu", *flags, "--contexts", "100"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["gpu"] == torch.cuda.get_device_name()
    assert 0.0 < document["steps"][0]["idle_share"] < 1.0
    assert min(document["steps"][0]["ms_by_kernel"].values()) > 0.0


def test_weights_are_loaded_without_a_second_copy(tiny_model_dir: Path) -> None:
    from engine.model.loader import load_decoder

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    decoder = load_decoder(tiny_model_dir, torch.float32, CUDA)
    size = sum(parameter.nbytes for parameter in decoder.parameters())
    largest = max(parameter.nbytes for parameter in decoder.parameters())
    assert torch.cuda.max_memory_allocated() - before < size + largest + (1 << 17)
