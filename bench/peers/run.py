"""`gorgon bench peers`: the same load on several servers, taking turns, so that ratios come from one run.

All servers are started first and stay loaded. One that cannot be installed, started or measured is reported
with its reason.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bench.facts import machine_facts
from bench.peers.environment import PeerError, ensure_environment
from bench.peers.models import Forms, forms_of
from bench.peers.process import ServerProcess, free_port
from bench.peers.servers import PEERS, Peer, Plan
from bench.peers.table import print_results, results_of
from bench.peers.turns import FIRST_TOKEN_REQUESTS, Running, Turns
from bench.prompts import read_prompts, sample
from bench.report import print_json
from engine.errors import ConfigError
from heads.registry.cache import writable_cache

CONTEXT = 2048  # tokens of one request: the longest prompts of the usual sets, and their answers
_TERMINATED = 143  # 128 + SIGTERM, as shells report it


@dataclass(frozen=True, kw_only=True)
class PeersOptions:
    """`peers`: names, none for all. `time_limit`: seconds that one server has for one measurement."""

    model: str
    peers: tuple[str, ...]
    prompts: Path
    concurrency: tuple[int, ...]
    rounds: int
    max_tokens: int
    time_limit: float
    seed: int


def run(options: PeersOptions) -> int:
    peers = chosen(options.peers)
    if find_spec("accelerate") is None:  # by which transformers loads models
        raise PeerError(f"gorgon bench peers needs accelerate: {sys.executable} -m pip install accelerate")
    prompts = read_prompts(options.prompts)
    prompts = sample(prompts, len(prompts), options.seed)
    cache = writable_cache("peers")  # environments, models in other formats, logs
    forms = forms_of(options.model, cache)
    slots = max(FIRST_TOKEN_REQUESTS, *options.concurrency)
    failures: dict[str, str] = {}
    with _closing_in_peace() as stack:
        servers = list(_start(peers, forms, slots, cache, stack, failures))
        turns = Turns(servers, failures, options.time_limit)
        try:
            turns.warm_up(prompts)
            turns.rounds(prompts, options.concurrency, options.rounds, options.max_tokens)
            turns.first_tokens(options.rounds, options.seed)
        except KeyboardInterrupt:
            print("Interrupted; this is what was measured before.", file=sys.stderr)
        for server in turns.servers:
            server.resident_bytes = server.process.resident_bytes()
    results = results_of(servers)
    print_results(results, failures, options.concurrency)
    print_json(
        {
            "bench": "peers",
            **machine_facts(),
            "model": options.model,
            "prompts": options.prompts.name,
            "max_tokens": options.max_tokens,
            "rounds": options.rounds,
            "time_limit": options.time_limit,
            "servers": results,
            "failures": failures,
        }
    )
    return 1 if failures else 0


def chosen(names: Sequence[str]) -> list[Peer]:
    """The peers of these names, or all where none is given. Raises ConfigError for an unknown name."""
    known = {peer.name: peer for peer in PEERS}
    for name in names:
        if name not in known:
            raise ConfigError("peers", f"{name} is none of {', '.join(known)}")
    return [peer for peer in PEERS if not names or peer.name in names]


@contextmanager
def _closing_in_peace() -> Generator[ExitStack, None, None]:
    """Closes everything on SIGTERM too, and ignores further signals meanwhile. A server that is left behind
    would stay paused, and in memory, for ever."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    try:
        with ExitStack() as stack:
            try:
                yield stack
            finally:
                for number in handlers:
                    signal.signal(number, signal.SIG_IGN)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _start(
    peers: Sequence[Peer],
    forms: Forms,
    slots: int,
    cache: Path,
    stack: ExitStack,
    failures: dict[str, str],
) -> Iterator[Running]:
    """Start one server after the other, each with the machine to itself, and leave it paused."""
    for peer in peers:
        process: ServerProcess | None = None
        try:
            python = Path(sys.executable)
            if peer.environment is not None:
                name, commands = peer.environment
                python = ensure_environment(cache / name, commands)
            plan = Plan(python, forms, free_port(), slots, CONTEXT)
            log = cache / f"{peer.name}.log"
            print(f"Starting {peer.name}", file=sys.stderr)
            process = ServerProcess(peer.command(plan), plan.port, peer.environ, log)
            stack.callback(process.close)
            model = process.wait_ready(None if peer.model is None else peer.model(forms))
            process.pause()
        except (PeerError, OSError) as error:
            if process is not None:
                process.close()
            failures[peer.name] = str(error)
            print(f"{peer.name}: {error}", file=sys.stderr)
            continue
        yield Running(peer.name, process, model)
