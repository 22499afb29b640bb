"""Hydra heads by the CPU kernels guess what the module guesses, and grow the same trees."""

from __future__ import annotations

from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from engine.answering import EngineMode
from engine.backends.backend import Place
from engine.backends.choose import choose
from engine.backends.growing import GrowRows
from engine.backends.native.hydra import NativeHydra
from engine.backends.native.library import kernels
from engine.backends.native.noise import gumbel
from engine.backends.noise import Noise
from engine.build import build
from engine.config import EngineConfig
from engine.runner.heads_drafter import HeadsDrafter
from heads.hydra import HydraHeads
from heads.prefix import PrefixLayer
from tests.engine.backends.native import levels
from tests.engine.backends.native.decoders import WIDE, random_decoder
from tests.engine.families import full
from tests.engine.tiny import CPU
from trees.select import grow_trees, make_chains

pytestmark = pytest.mark.skipif(kernels() is None, reason="no AVX-512 VNNI and BF16, or no C compiler")


def hydra(token_map: Tensor | None) -> HydraHeads:
    torch.manual_seed(1)
    heads = HydraHeads(3, 128, PrefixLayer(64, 4, 2, 32, 64), token_map)
    for parameter in heads.parameters():
        parameter.data.normal_(std=0.1)
    return heads.requires_grad_(False)


@pytest.mark.parametrize("mapped", [False, True])
def test_hydra_heads_guess_what_the_module_guesses(mapped: bool) -> None:
    token_map = torch.randperm(128)[:48] if mapped else None
    heads, decoder = hydra(token_map), random_decoder(WIDE)
    vocabulary, embedding = decoder.lm_head.weight, decoder.embedding
    heads.bind(vocabulary, embedding)
    native = NativeHydra(heads, vocabulary)
    hidden, roots = torch.randn(3, 64).bfloat16(), torch.tensor([5, 6, 7])
    states = [levels.begin(hidden), heads.begin(hidden, roots, 3)]
    tokens, origins = roots.unsqueeze(1), torch.zeros(3, 1, dtype=torch.int64)
    for level in range(3):
        (found, sure, states[0]), (expected, wanted, states[1]) = (
            ask(level, state, tokens, origins, 8)
            for ask, state in zip((partial(levels.guess, native), heads.guess), states, strict=True)
        )
        torch.testing.assert_close(sure, wanted, rtol=0.1, atol=0.1)
        torch.testing.assert_close(states[0], states[1].float(), rtol=0.1, atol=0.1)
        assert (found == expected)[..., 0].float().mean() > 0.6  # near-ties may go either way
        assert all(len(set(row)) == 8 for row in found.flatten(0, 1).tolist())
        if token_map is not None:
            assert set(found.flatten().tolist()) <= set(token_map.tolist())
        tokens, origins = expected[:, 0, :4], torch.zeros(3, 4, dtype=torch.int64)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kind", ["whole", "odd map", "low rank", "own"])
def test_whatever_part_of_the_heads_the_kernels_take_the_answers_stay(kind: str, temperature: float) -> None:
    prefix = PrefixLayer(64, 4, 2, 32, 64)
    heads = {
        "whole": lambda: HydraHeads(3, 128, prefix),
        "odd map": lambda: HydraHeads(3, 128, prefix, torch.randperm(128)[:50]),
        "low rank": lambda: HydraHeads(3, 128, prefix, None, "low_rank", 16),
        "own": lambda: HydraHeads(3, 128, prefix, None, "own"),
    }[kind]().requires_grad_(False)
    torch.manual_seed(1)
    for parameter in heads.parameters():
        parameter.data.normal_(std=0.1)
    answers, backend = [], choose(Place(WIDE, CPU, torch.bfloat16, torch.bfloat16, 16))
    for drafts in (0, 9):
        decoder = random_decoder(WIDE)
        heads.bind(decoder.lm_head.weight, decoder.embedding)
        drafter = HeadsDrafter(heads, decoder.lm_head.weight, backend)
        config = EngineConfig(
            model_dir="",
            device="cpu",
            dtype="bfloat16",
            quantization="none",
            kv_cache_memory=1 << 22,
            max_num_seqs=2,
            max_num_batched_tokens=64,
        )
        engine = build(config, loaded=decoder, drafter=drafter, family=full(9, 3, 3), fixed_drafts=drafts)
        run = EngineMode("", engine).run_many([[5, 6, 7], list(range(40))], 24, 2, temperature)
        answers.append(run.outputs)
        assert (run.drafted > 0) == (drafts > 0)
    assert answers[0] == answers[1]
    assert [len(tokens) for tokens in answers[0].values()] == [24, 24]


def test_guesses_that_are_no_numbers_are_no_guesses() -> None:
    heads, decoder = hydra(None), random_decoder(WIDE)
    heads.bind(decoder.lm_head.weight, decoder.embedding)
    heads.biases.data[:] = torch.nan
    native = NativeHydra(heads, decoder.lm_head.weight)
    state = levels.begin(torch.randn(1, 64).bfloat16())
    guesses, sure, _ = levels.guess(
        native, 0, state, torch.tensor([[5]]), torch.zeros(1, 1, dtype=torch.int64), 8
    )
    assert torch.isneginf(sure).all()
    assert guesses.min() >= 0 and guesses.max() < 128 and len(set(guesses.flatten().tolist())) == 8


@settings(max_examples=60, deadline=None)
@given(
    budgets=st.lists(st.integers(2, 64), min_size=1, max_size=5),
    leasts=st.lists(st.sampled_from([0.0, 0.001, 0.02, 0.3, 1.0]), min_size=5, max_size=5),
    lengths=st.lists(st.integers(0, 12), min_size=5, max_size=5),
    temperatures=st.none() | st.lists(st.sampled_from([0.0, 0.7, 1.0]), min_size=5, max_size=5),
    mapped=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_trees_grown_in_one_call_are_those_grown_step_by_step(
    budgets: list[int],
    leasts: list[float],
    lengths: list[int],
    temperatures: list[float] | None,
    mapped: bool,
    seed: int,
) -> None:
    heads = hydra(torch.randperm(128, generator=torch.Generator().manual_seed(2))[:48] if mapped else None)
    decoder = random_decoder(WIDE)
    heads.bind(decoder.lm_head.weight, decoder.embedding)
    native = NativeHydra(heads, decoder.lm_head.weight)
    generator = torch.Generator().manual_seed(seed)
    count, most = len(budgets), max(budgets)
    hidden = 3 * torch.randn(count, 64, generator=generator).bfloat16()
    roots = torch.randint(128, (count,), generator=generator)
    least = torch.tensor(leasts[:count]).log()
    # Chains whose first tokens are what the heads guess too, now and then.
    first = roots.unsqueeze(1)
    likely, _, _ = levels.guess(native, 0, levels.begin(hidden), first, torch.zeros_like(first), 2)
    texts = [
        [int(likely[i, 0, seed % 2]), *range(length - 1)][:length] for i, length in enumerate(lengths[:count])
    ]
    chains = make_chains([(text, [0.7**i for i in range(1, len(text) + 1)]) for text in texts], most - 1, CPU)
    sizes, depth = torch.tensor(budgets), min(3, most - 1)
    noise = None
    if temperatures is not None:
        keys = torch.randint(-(2**63), 2**63 - 1, (count, 3), generator=generator)
        noise = Noise(keys, torch.tensor(temperatures[:count]))
    state = levels.begin(hidden)

    def guess(level: int, tokens: Tensor, origins: Tensor, num_guesses: int) -> tuple[Tensor, Tensor]:
        nonlocal state
        added = None
        if noise is not None:
            added = gumbel(noise.keys[:, level], noise.temperatures, heads.num_tokens, heads.token_map)
        guesses, sure, state = levels.guess(native, level, state, tokens, origins, num_guesses, added)
        return guesses, sure

    tokens, parents, grown = grow_trees(guess, roots, sizes, most, depth, chains, least)
    rows = GrowRows(
        roots=roots,
        num_nodes=sizes,
        max_nodes=most,
        levels=depth,
        chains=chains,
        noise=noise,
        least=least,
    )
    found = native.grow(hidden, rows)
    assert found[2].tolist() == grown.tolist()
    for row, num_nodes in enumerate(grown.tolist()):
        assert found[0][row, :num_nodes].tolist() == tokens[row, :num_nodes].tolist()
        assert found[1][row, :num_nodes].tolist() == parents[row, :num_nodes].tolist()
        assert (found[0][row, num_nodes:] == roots[row]).all() and (found[1][row, num_nodes:] == 0).all()
