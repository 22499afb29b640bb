"""The KV cache's blocks as numbers: who holds which, what each one contains, which to give away next.

Plain Python. The tensors behind the numbers belong to `engine.backends.kv_cache`.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Iterable, MutableSequence, Sequence


class OutOfBlocks(Exception):
    """Fewer blocks can be had than were asked for; nothing was allocated."""


class IntegrityError(Exception):
    """The pool contradicts itself or its block tables. Raised by `check_integrity` only."""


def hash_scope(scope: str) -> bytes:
    """What the first block of a cache scope has as its parent: no block of another scope has the same name.

    Scopes may come from clients; `person` keeps one from being chosen so that it spells a block.
    """
    return hashlib.blake2b(scope.encode(), digest_size=16, person=b"cache scope").digest()


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name of a full block: its tokens and, through `parent`, all tokens before it and their scope."""
    return hashlib.blake2b(parent + array("I", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """Blocks with reference counts and a prefix cache.

    A block is in exactly one of three states: *held* (one or more references), *cached* (no reference, but
    its content is known by hash and may be taken up again) or *free*. Allocation takes free blocks first and
    then evicts cached ones, least recently released first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))  # popped from the end: low numbers first
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_available

    def extend(self, block_table: MutableSequence[int], num_positions: int) -> bool:
        """Make a block table as long as so many logical positions need; False where blocks are short."""
        missing = -(-num_positions // self.block_size) - len(block_table)
        if missing > self.num_available:
            return False
        if missing > 0:
            block_table.extend(self.allocate(missing))
        return True

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with one reference each. Raises OutOfBlocks, then nothing has changed."""
        if count > self.num_available:
            raise OutOfBlocks(f"{count} blocks asked, {self.num_available} available")
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block, taking cached ones back into use."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference of each block of a table, its end first, so that prefixes outlive their tails."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hashes[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def register(self, block: int, block_hash: bytes) -> None:
        """Make a held block's content findable. A second block of the same content stays anonymous."""
        if self._hashes[block] is None and block_hash not in self._by_hash:
            self._hashes[block] = block_hash
            self._by_hash[block_hash] = block

    def find_prefix(self, block_hashes: Iterable[bytes]) -> list[int]:
        """The longest run of known blocks from the start; the caller takes them with `share`."""
        found = []
        for block_hash in block_hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def prefix_length(self, block_hashes: Sequence[bytes]) -> int:
        """How many blocks `find_prefix` would find, by bisection: too few where some in between are gone."""
        return bisect_left(block_hashes, True, key=lambda block_hash: block_hash not in self._by_hash)

    def _forget(self, block: int) -> None:
        block_hash = self._hashes[block]
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._hashes[block] = None

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Compare the pool with itself and with every block table there is. Raises IntegrityError."""
        expected = Counter(block for table in block_tables for block in table)
        for block, references in enumerate(self._references):
            if references != expected[block]:
                raise IntegrityError(f"block {block}: {references} references, {expected[block]} holders")
        idle = [*self._free, *self._cached]
        if len(set(idle)) != len(idle):
            raise IntegrityError("a block is free or cached twice")
        if {block for block in range(self.num_blocks) if not self._references[block]} != set(idle):
            raise IntegrityError("a block without references is neither free nor cached, or a held one is")
        named = {block: name for block, name in enumerate(self._hashes) if name is not None}
        if {name: block for block, name in named.items()} != self._by_hash:
            raise IntegrityError("hashes and blocks disagree")
        if any(self._hashes[block] is not None for block in self._free):
            raise IntegrityError("a free block still has a hash")
        if any(self._hashes[block] is None for block in self._cached):
            raise IntegrityError("a cached block has no hash")
