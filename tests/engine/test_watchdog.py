"""How long a step and a start may take, by what they have taken."""

from __future__ import annotations

from engine.watchdog import Watchdog


def started(largest_pass: float = 0.1, seconds: float = 4.0, timeout: float | None = None) -> Watchdog:
    watchdog = Watchdog(timeout)
    watchdog.started(seconds, largest_pass)
    return watchdog


def test_a_hang_is_found_after_a_few_times_the_longest_step_and_within_thirty_seconds() -> None:
    assert started(largest_pass=0.1).step_limit == 10.0
    assert started(largest_pass=2.0).step_limit == 20.0
    assert started(largest_pass=5.0).step_limit == 30.0
    watchdog = started(largest_pass=0.1)
    watchdog.stepped(2.5)
    assert watchdog.step_limit == 25.0


def test_where_no_pass_was_measured_a_short_step_says_nothing_of_a_long_prompt() -> None:
    watchdog = started(largest_pass=0.0)
    watchdog.stepped(0.01)
    assert watchdog.step_limit == 30.0


def test_a_machine_whose_steps_are_slow_is_not_taken_for_hung() -> None:
    assert started(largest_pass=20.0).step_limit == 30.0  # an estimate
    watchdog = started(largest_pass=0.1)
    watchdog.stepped(25.0)
    assert watchdog.step_limit == 100.0


def test_one_slow_step_is_forgotten_with_time() -> None:
    watchdog = started(largest_pass=0.1)
    watchdog.stepped(25.0)
    for _ in range(5000):
        watchdog.stepped(0.1)
    assert watchdog.step_limit == 10.0


def test_a_step_that_overran_has_longer_the_next_time_and_not_for_ever() -> None:
    watchdog = started(largest_pass=5.0)
    limits = []
    for _ in range(5):
        watchdog.step_overran()
        limits.append(watchdog.step_limit)
    assert limits == [60.0, 120.0, 120.0, 120.0, 120.0]
    for _ in range(2000):
        watchdog.stepped(0.1)
    assert watchdog.step_limit == 30.0


def test_what_the_user_sets_is_the_limit_of_a_step() -> None:
    watchdog = started(largest_pass=20.0, timeout=3.0)
    watchdog.stepped(60.0)
    watchdog.step_overran()
    assert watchdog.step_limit == 3.0


def test_a_later_start_may_take_a_few_times_the_longest_and_more_after_each_that_was_too_slow() -> None:
    watchdog = Watchdog()
    assert watchdog.start_limit == 1800.0
    watchdog.started(4.0, 0.1)
    assert watchdog.start_limit == 60.0
    watchdog.started(40.0, 0.1)
    assert watchdog.start_limit == 120.0
    limits = []
    for _ in range(4):
        watchdog.start_overran()
        limits.append(watchdog.start_limit)
    assert limits == [240.0, 480.0, 960.0, 1800.0]
    watchdog.started(50.0, 0.1)
    assert watchdog.start_limit == 150.0
