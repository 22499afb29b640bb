"""Heads in the engine: text stays what it is, and cached prefix layers give what a dense pass gives."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.backends.kv_cache import KVCache
from engine.backends.noise import gumbel, make_keys, mix_seed
from engine.errors import ConfigError
from engine.runner.drafter import Proposal, RootRows
from engine.runner.heads_drafter import HeadsDrafter
from heads.base import DraftHeads
from heads.hydra import HydraHeads
from heads.medusa import MedusaHeads
from heads.prefix import PrefixLayer
from tests.engine.families import full
from tests.engine.helpers import params
from tests.engine.tiny import CONFIG, CPU, VOCAB, Arrival, TinyEngine, plain_pass, tiny_backend, tiny_decoder

SIZE, LENGTH = CONFIG.hidden_size, 40
PROMPTS = [[(11 * i + 3 * p + p * p) % VOCAB for p in range(n)] for i, n in enumerate((3, 20, 37, 50))]
ARRIVALS = {"block_size": 4, "max_model_len": 128}


def hydra(kv_heads: int = CONFIG.num_kv_heads) -> HydraHeads:
    torch.manual_seed(0)
    prefix = PrefixLayer(SIZE, CONFIG.num_heads, kv_heads, CONFIG.head_dim, 48)
    heads = HydraHeads(3, VOCAB, prefix, torch.arange(0, VOCAB, 2))
    # Small enough that guesses stay near the model's own, so that some are accepted.
    for parameter in heads.parameters():
        parameter.data.normal_(std=0.02)
    return heads


def medusa() -> MedusaHeads:
    return MedusaHeads(3, 1, SIZE, VOCAB)


def bound(heads: DraftHeads) -> DraftHeads:
    decoder = tiny_decoder()
    heads.requires_grad_(False).bind(decoder.lm_head.weight, decoder.embedding)
    return heads


def drafter_of(heads: DraftHeads) -> HeadsDrafter:
    return HeadsDrafter(heads, tiny_decoder().lm_head.weight, tiny_backend())


def arrivals(**sampling: Any) -> list[Arrival]:
    settings = {"ignore_eos": True, **sampling}
    return [Arrival(str(i), prompt, params(LENGTH, **settings), 2 * i) for i, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_blocks", [200, 40], ids=["room", "preempted"])
@pytest.mark.parametrize("make", [hydra, medusa])
def test_grown_trees_leave_the_text_as_it_is(sampling: dict[str, Any], num_blocks: int, make: Any) -> None:
    requests = arrivals(**sampling)
    expected = TinyEngine(num_blocks=num_blocks, **ARRIVALS).run(requests)
    drafter = drafter_of(bound(make()))
    engine = TinyEngine(full(20, 3, 3), drafter, num_blocks=num_blocks, budget=48, **ARRIVALS)
    for name, result in engine.run(requests).items():
        assert result.tokens == expected[name].tokens
    assert engine.num_accepted > 0
    assert (engine.num_preemptions > 0) == (num_blocks == 40)


def test_heads_know_the_noise_of_the_draws_that_they_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, Tensor | None]] = []

    def guess(heads: DraftHeads, head: int, *rest: Any) -> Any:
        given.append((head, rest[-1]))
        return ask(heads, head, *rest)

    ask = DraftHeads.guess
    monkeypatch.setattr(DraftHeads, "guess", guess)
    heads = bound(hydra())
    sampled = Arrival("0", PROMPTS[0], params(3, temperature=0.8, seed=7, ignore_eos=True))
    greedy = Arrival("1", PROMPTS[1], params(3, ignore_eos=True))
    for requests in ([greedy], [sampled, greedy]):
        given.clear()
        TinyEngine(full(20, 3, 3), drafter_of(heads), **ARRIVALS).run(requests)
        assert {head for head, _ in given} == {0, 1, 2}
        for head, noise in given:
            if len(requests) == 1:
                assert noise is None
                continue
            # One token is out when the first trees are grown.
            keys = make_keys(torch.tensor([mix_seed(7)]), torch.tensor([len(PROMPTS[0]) + 1 + head]))
            drawn_with = gumbel(keys, torch.ones(1), VOCAB)[0]
            assert noise is not None and heads.token_map is not None
            torch.testing.assert_close(noise[0], 0.8 * drawn_with[heads.token_map])
            assert not noise[1].any()


def test_n_grams_that_repeat_deepen_the_trees_beyond_the_heads() -> None:
    # A model that is made to say the same token over and over.
    engine = TinyEngine(full(20, 3, 3), drafter_of(bound(hydra())), num_blocks=200)
    sampling = params(LENGTH, ignore_eos=True, logit_bias={77: 1000.0})
    [result] = engine.run([Arrival("0", PROMPTS[1], sampling)]).values()
    assert result.tokens == [77] * LENGTH
    # Token 77 is odd, and these heads know even tokens alone.
    assert max(len(output.token_ids) for output in result.outputs) > 4


class Recording(HeadsDrafter):
    """Keeps, of every draft, the known tokens and the rows that its heads start from."""

    def __init__(self, heads: HydraHeads) -> None:
        super().__init__(heads, tiny_decoder().lm_head.weight, tiny_backend())
        self.starts: list[tuple[list[int], Tensor]] = []
        self._known: list[list[int]] = []
        begin = heads.begin

        def recorded(hidden: Tensor, roots: Tensor, num_heads: int) -> Tensor:
            self.starts += zip(self._known, hidden, strict=True)
            return begin(hidden, roots, num_heads)

        heads.begin = recorded  # type: ignore[method-assign]

    def grow(self, rows: RootRows) -> Proposal:
        self._known = [list(request.token_ids) for request in rows.requests]
        return super().grow(rows)


def test_the_cached_prefix_layer_equals_a_dense_pass_after_chunks_trees_and_compaction() -> None:
    heads = hydra()
    bound(heads)
    drafter = Recording(heads)
    # A budget below the longest prompts, so that they come in chunks; half of the requests draft little.
    engine = TinyEngine(full(20, 3, 3), drafter, num_blocks=200, budget=24, **ARRIVALS)
    engine.run(arrivals())
    assert engine.num_accepted > 0
    check_starts(drafter, heads)


def check_starts(drafter: Recording, heads: HydraHeads) -> None:
    """What heads started from is what a dense pass of their prefix layer gives."""
    assert len(drafter.starts) > 40
    embedding = tiny_decoder().embedding
    for known, start in drafter.starts[::3]:
        hidden = plain_pass(known).hidden
        with torch.inference_mode():
            dense = heads.prefix(hidden.unsqueeze(0), embedding[known].unsqueeze(0))
        # The last known token is the root: the row before it is the one heads start from.
        torch.testing.assert_close(start, dense[0, -2], rtol=1e-3, atol=1e-4)


def test_heads_that_have_overflowed_leave_the_text_as_it_is() -> None:
    heads = bound(hydra())
    assert isinstance(heads, HydraHeads)
    heads.biases.data[1:] = torch.nan
    expected = TinyEngine(num_blocks=200, **ARRIVALS).run(arrivals())
    engine = TinyEngine(full(20, 3, 3), drafter_of(heads), num_blocks=200, **ARRIVALS)
    for name, result in engine.run(arrivals()).items():
        assert result.tokens == expected[name].tokens


def test_a_request_that_has_ended_is_not_kept_alive() -> None:
    engine = TinyEngine(full(20, 3, 3), drafter_of(bound(hydra())), num_blocks=200, **ARRIVALS)
    engine.scheduler.add("0", PROMPTS[1], params(8, ignore_eos=True))
    engine.step()
    request = weakref.ref(engine.scheduler._requests["0"])
    while engine.scheduler.has_work():
        engine.step()
    gc.collect()
    assert request() is None


def test_a_prefix_layer_of_another_shape_than_the_cache_is_refused() -> None:
    drafter = drafter_of(bound(hydra(kv_heads=1)))
    cache = KVCache(CONFIG, 4, 4, torch.float32, CPU, extra_layers=1)
    with pytest.raises(ConfigError, match="1 KV heads of size 16"):
        drafter.attach(CONFIG, cache)
