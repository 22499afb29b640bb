"""The block pool: nothing is handed out twice, nothing is lost, and what is known stays findable."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine.scheduling.block_pool import BlockPool, IntegrityError, OutOfBlocks, hash_block

HASHES = [hash_block(b"", [n]) for n in range(8)]


def test_allocation_gives_each_block_once_until_none_is_left() -> None:
    pool = BlockPool(4, 16)
    assert sorted(pool.allocate(3) + pool.allocate(1)) == [0, 1, 2, 3]
    with pytest.raises(OutOfBlocks):
        pool.allocate(1)


def test_failed_allocation_changes_nothing() -> None:
    pool = BlockPool(4, 16)
    table = pool.allocate(3)
    with pytest.raises(OutOfBlocks):
        pool.allocate(2)
    assert pool.num_available == 1
    pool.check_integrity([table])


def test_shared_blocks_stay_until_their_last_holder_lets_go() -> None:
    pool = BlockPool(4, 16)
    table = pool.allocate(2)
    pool.share(table)
    pool.release(table)
    assert pool.num_available == 2
    pool.release(table)
    assert pool.num_available == 4


def test_released_blocks_with_known_content_can_be_found_and_taken_up_again() -> None:
    pool = BlockPool(4, 16)
    table = pool.allocate(2)
    for block, name in zip(table, HASHES, strict=False):
        pool.register(block, name)
    pool.release(table)
    found = pool.find_prefix(HASHES[:3])
    assert found == table
    pool.share(found)
    pool.check_integrity([found])


def test_prefix_search_stops_at_the_first_gap() -> None:
    pool = BlockPool(4, 16)
    table = pool.allocate(2)
    pool.register(table[0], HASHES[0])
    pool.register(table[1], HASHES[2])
    assert pool.find_prefix(HASHES[:3]) == table[:1]
    assert pool.prefix_length(HASHES[:3]) == 1


def test_free_blocks_go_before_cached_ones_and_the_longest_unused_is_evicted_first() -> None:
    pool = BlockPool(3, 16)
    first, second, third = pool.allocate(3)
    pool.register(first, HASHES[0])
    pool.register(second, HASHES[1])
    pool.release([second])
    pool.release([first])
    pool.release([third])
    assert pool.allocate(1) == [third]
    assert pool.allocate(1) == [second]
    assert pool.find_prefix([HASHES[1]]) == []
    assert pool.find_prefix([HASHES[0]]) == [first]


def test_tail_of_a_released_table_is_evicted_before_its_prefix() -> None:
    pool = BlockPool(2, 16)
    head, tail = table = pool.allocate(2)
    pool.register(head, HASHES[0])
    pool.register(tail, HASHES[1])
    pool.release(table)
    assert pool.allocate(1) == [tail]


def test_content_known_twice_is_found_once() -> None:
    pool = BlockPool(2, 16)
    first, second = pool.allocate(2)
    pool.register(first, HASHES[0])
    pool.register(second, HASHES[0])
    pool.release([first, second])
    assert pool.find_prefix([HASHES[0]]) == [first]
    pool.check_integrity([])


def test_block_names_tell_tokens_and_what_came_before_apart() -> None:
    names = {
        hash_block(b"", [1, 2]),
        hash_block(b"", [2, 1]),
        hash_block(hash_block(b"", [1, 2]), [1, 2]),
        hash_block(hash_block(b"", [2, 1]), [1, 2]),
    }
    assert len(names) == 4


def test_integrity_check_notices_a_block_nobody_admits_to() -> None:
    pool = BlockPool(4, 16)
    pool.allocate(1)
    with pytest.raises(IntegrityError):
        pool.check_integrity([])


class PoolMachine(RuleBasedStateMachine):
    """Any order of allocate, fork, name, find and release leaves the pool whole."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(10, 16)
        self.held: list[list[int]] = []

    def _hold(self, table: list[int]) -> list[int]:
        self.held.append(table)
        return table

    @rule(target=tables, count=st.integers(0, 6))
    def allocate(self, count: int) -> list[int]:
        available = self.pool.num_available
        if count > available:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(count)
            return self._hold([])
        table = self.pool.allocate(count)
        assert len(set(table)) == count and self.pool.num_available == available - count
        return self._hold(table)

    @rule(target=tables, table=tables, length=st.integers(0, 6))
    def fork(self, table: list[int], length: int) -> list[int]:
        self.pool.share(table[:length])
        return self._hold(table[:length])

    @rule(target=tables, names=st.lists(st.sampled_from(HASHES), max_size=4))
    def take_up_prefix(self, names: list[bytes]) -> list[int]:
        found = self.pool.find_prefix(names)
        assert len(found) <= len(names)
        self.pool.share(found)
        return self._hold(found)

    @rule(table=tables, name=st.sampled_from(HASHES), index=st.integers(0, 5))
    def name_block(self, table: list[int], name: bytes, index: int) -> None:
        if index < len(table):
            self.pool.register(table[index], name)

    @rule(table=consumes(tables))
    def release(self, table: list[int]) -> None:
        self.held = [held for held in self.held if held is not table]  # equal tables are not the same
        self.pool.release(table)

    @rule(table=tables, count=st.integers(1, 3))
    def grow(self, table: list[int], count: int) -> None:
        if count <= self.pool.num_available:
            table.extend(self.pool.allocate(count))

    @invariant()
    def whole(self) -> None:
        self.pool.check_integrity(self.held)
        assert self.pool.num_held == len({block for table in self.held for block in table})

    def teardown(self) -> None:
        for table in self.held:
            self.pool.release(table)
        assert self.pool.num_available == self.pool.num_blocks
        self.pool.check_integrity([])


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase
