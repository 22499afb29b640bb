"""When a request ends, and that nothing after its end gets out."""

from __future__ import annotations

from typing import Any

import pytest

from engine.batch import PassResult
from engine.messages import RequestOutput
from engine.speculation.policy import FixedSpeculation
from tests.engine.helpers import EOS, FakeRunner, make_scheduler, params, run_step

PATH = [10, 11, 12, 13]  # committed in one step, after a first token 9


def commit(path: list[int], max_tokens: int = 20, max_model_len: int = 64, **settings: Any) -> RequestOutput:
    """What the second step of a request brings when its pass commits `path`; its prompt has 4 tokens."""
    scheduler = make_scheduler(policy=FixedSpeculation(8), max_model_len=max_model_len)
    scheduler.add("a", [3, 4, 5, 6], params(max_tokens, **settings))
    batch = scheduler.schedule()
    scheduler.update(batch, [PassResult([9])])
    batch = scheduler.schedule()
    [output] = scheduler.update(batch, [PassResult(list(path))])
    scheduler.check_integrity()
    assert ("a" in scheduler) == (output.finish_reason is None)
    assert scheduler.pool.num_held == 0 or output.finish_reason is None
    return output


def test_goes_on_where_nothing_ends_it() -> None:
    output = commit(PATH)
    assert (output.token_ids, output.finish_reason, output.stop_token_id) == (PATH, None, None)


@pytest.mark.parametrize("place", range(4))
def test_eos_ends_it_and_drops_the_rest_of_the_path(place: int) -> None:
    path = [*PATH[:place], EOS, *PATH[place:]]
    output = commit(path)
    assert output.token_ids == path[: place + 1]
    assert (output.finish_reason, output.stop_token_id) == ("stop", EOS)


def test_stop_token_ends_it() -> None:
    output = commit(PATH, stop_token_ids=(40, 12))
    assert output.token_ids == [10, 11, 12]
    assert (output.finish_reason, output.stop_token_id) == ("stop", 12)


def test_ignored_eos_is_a_token_like_others_but_stop_tokens_still_count() -> None:
    output = commit([10, EOS, 12, 13], ignore_eos=True, stop_token_ids=(13,))
    assert output.token_ids == [10, EOS, 12, 13]
    assert output.stop_token_id == 13
    assert commit([10, EOS], ignore_eos=True, stop_token_ids=(EOS,)).stop_token_id == EOS


@pytest.mark.parametrize(("max_tokens", "expected"), [(2, 1), (3, 2), (5, 4)])
def test_token_limit_ends_it_within_the_path(max_tokens: int, expected: int) -> None:
    output = commit(PATH, max_tokens)
    assert output.token_ids == PATH[:expected]
    assert output.finish_reason == "length"


def test_full_context_ends_it_within_the_path() -> None:
    output = commit(PATH, max_model_len=7)
    assert output.token_ids == PATH[:2]
    assert output.finish_reason == "length"


def test_stop_wins_where_stop_and_limit_fall_on_the_same_token() -> None:
    assert commit([10, EOS, 12], max_tokens=3).finish_reason == "stop"


def test_no_stop_before_min_tokens() -> None:
    # Token 9 is the first; EOS would be the third of four tokens that must come.
    output = commit([10, EOS, 12, 13, EOS, 14], min_tokens=4, stop_token_ids=(12,))
    assert output.token_ids == [10, EOS, 12, 13, EOS]
    assert output.finish_reason == "stop"


def test_logprobs_are_cut_where_the_tokens_are() -> None:
    scheduler = make_scheduler()
    scheduler.add("a", [3, 4, 5, 6], params(2, logprobs=0))
    batch = scheduler.schedule()
    results = [PassResult([10, 11, 12], ["x", "y", "z"])]  # type: ignore[list-item]
    [output] = scheduler.update(batch, results)
    assert output.logprobs == ["x", "y"]


def test_limit_of_one_token_takes_one_pass() -> None:
    scheduler = make_scheduler()
    scheduler.add("a", [3, 4, 5, 6], params(1))
    _, [output] = run_step(scheduler, FakeRunner(scheduler))
    assert len(output.token_ids) == 1
    assert output.finish_reason == "length"
    assert not scheduler.has_work()
