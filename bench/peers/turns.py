"""Servers measured in turns: every job goes to all of them, one after the other, in an order that rotates.

While one is measured the others are paused. One that fails is dropped with its reason, the rest goes on.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import httpx

from bench.load import closed_loop, summarize_load
from bench.peers.environment import PeerError
from bench.peers.process import ServerProcess
from bench.prompts import Prompt
from bench.serve import connect
from bench.stream import Ask, BenchError
from bench.synthetic import synthetic_prompts

FIRST_TOKEN_REQUESTS = 16
FIRST_TOKEN_PROMPT = 500  # tokens
_FIRST_TOKEN_ANSWER = 4  # tokens; only the first is timed
_WARM_UP = 4  # requests, and four times as many tokens of each


@dataclass
class Running:
    """A started server, the name of its model, and its figures: by round for each number of requests at once,
    and by round to the first token."""

    name: str
    process: ServerProcess
    model: str
    levels: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    first_token: list[dict[str, Any]] = field(default_factory=list)
    resident_bytes: int | None = None


@dataclass(frozen=True)
class Job:
    """One load. `time_limit`: seconds after which answers that still run are cut off."""

    prompts: Sequence[Prompt]
    concurrency: int
    max_tokens: int
    time_limit: float


class Turns:
    """Measures the servers that still work. `failures` gets the reason of every other one, by name."""

    def __init__(self, servers: Sequence[Running], failures: dict[str, str], time_limit: float) -> None:
        self.servers = list(servers)
        self._failures = failures
        self._time_limit = time_limit
        self._turn = 0

    def rounds(self, prompts: Sequence[Prompt], levels: Sequence[int], count: int, max_tokens: int) -> None:
        """Measure every level `count` times. Each time has prompts of its own as long as there are enough, so
        that no prefix cache knows them."""
        supply = cycle(prompts)
        for number in range(count):
            for level in levels:
                asked = list(islice(supply, requests_of(level)))
                results = self._all(Job(asked, level, max_tokens, self._time_limit))
                for server, figures in results:
                    server.levels.setdefault(level, []).append(figures)
                rates = ", ".join(f"{s.name} {f['tokens_per_second']:.1f}" for s, f in results)
                print(f"round {number + 1}, {level} at once, tokens/s: {rates}", file=sys.stderr)

    def first_tokens(self, count: int, seed: int) -> None:
        """Measure the time to the first token of long prompts that come all at once, `count` times."""
        for number in range(count):
            if not self.servers:
                return
            prompts = self._long_prompts(self.servers[0], seed + number)
            for server, figures in self._all(
                Job(prompts, FIRST_TOKEN_REQUESTS, _FIRST_TOKEN_ANSWER, self._time_limit)
            ):
                server.first_token.append(figures)
            print(f"round {number + 1}: time to first token done", file=sys.stderr)

    def warm_up(self, prompts: Sequence[Prompt]) -> None:
        self._all(Job(prompts[-_WARM_UP:], _WARM_UP, 4 * _WARM_UP, self._time_limit))

    def _all(self, job: Job) -> list[tuple[Running, dict[str, Any]]]:
        """The figures of every server that could do the job."""
        first = self._turn % max(1, len(self.servers))
        self._turn += 1
        results = []
        for server in [*self.servers[first:], *self.servers[:first]]:
            server.process.resume()
            try:
                server.process.check_alive()
                results.append((server, asyncio.run(_measure(server, job))))
            except (PeerError, BenchError, httpx.HTTPError) as error:
                reason = f"{str(error) or type(error).__name__}; see {server.process.log}"
                self._failures[server.name] = reason
                print(f"{server.name} drops out: {reason}", file=sys.stderr)
                self.servers.remove(server)
            finally:
                server.process.pause()
        return results

    def _long_prompts(self, server: Running, seed: int) -> list[Prompt]:
        """The same words for all servers. This one counts their tokens; all serve the same model."""
        server.process.resume()
        try:
            return asyncio.run(_synthetic(server, seed))
        finally:
            server.process.pause()


def requests_of(concurrency: int) -> int:
    """Requests of one measurement: enough for a steady load, and for an average with one at a time."""
    return max(8, 2 * concurrency)


async def _measure(server: Running, job: Job) -> dict[str, Any]:
    ask = Ask(model=server.model, max_tokens=job.max_tokens)
    async with connect(server.process.url) as client:
        load = await closed_loop(client, ask, job.prompts, job.concurrency, job.time_limit)
    return summarize_load(load)


async def _synthetic(server: Running, seed: int) -> list[Prompt]:
    ask = Ask(model=server.model, max_tokens=1)
    async with connect(server.process.url) as client:
        return await synthetic_prompts(client, ask, FIRST_TOKEN_PROMPT, FIRST_TOKEN_REQUESTS, seed)
