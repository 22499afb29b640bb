"""The model answers prompts itself, in the batched engine, because heads learn best from their own model's
words.

`distill` is the whole of `gorgon distill`. `training.conversation` decides what is asked and how,
`training.distill_files` keeps the results on disk.
"""

from __future__ import annotations

import hashlib
import shlex
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.build import build
from engine.config import EngineConfig
from engine.engine import Engine
from engine.folders import with_folders
from engine.runner.device import resolve_device, resolve_dtype
from engine.text.tokenizer import ChatTokenizer, load_chat_tokenizer
from heads.registry.names import ResolvedModel
from training.conversation import Conversation, FailedError, Prompt, Sampling, choose, read_prompts
from training.distill_files import DistillFiles, failed_path

PROGRESS_SECONDS = 5.0
_MODEL_FILES = frozenset({".gguf", ".jinja", ".json", ".model", ".safetensors"})
_END_BYTES = 1 << 20


@dataclass
class Totals:
    """The work of one run, and the sums over all rows of the output for the summary."""

    rows: int = 0
    greedy_rows: int = 0
    tokens: int = 0
    unasked: int = 0  # user turns of rows that ended early
    failures: Counter[str] = field(default_factory=Counter)

    def count(self, row: dict[str, Any]) -> None:
        self.rows += 1
        self.greedy_rows += not row["temperature"]
        self.tokens += row["tokens"]
        self.unasked += row.get("unasked", 0)


class Distiller:
    """Answers prompts, as many at a time as the engine runs. A new one starts when one is done."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: ChatTokenizer,
        files: DistillFiles,
        totals: Totals,
        sampling: Sampling,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._files = files
        self._totals = totals
        self._sampling = sampling
        self._running: dict[str, Conversation] = {}

    def run(self, prompts: Iterable[Prompt], on_step: Callable[[list[int]], None]) -> None:
        """Answer all prompts. `on_step` gets the numbers of tokens that each step committed, per request."""
        waiting = deque(prompts)
        while waiting or self._running:
            while waiting and len(self._running) < self._engine.info.max_num_seqs:
                conversation = Conversation(waiting.popleft(), self._sampling)
                self._running[conversation.prompt.id] = conversation
                self._ask(conversation, "stop")
            if not self._running:
                continue
            step = self._engine.step()
            for output in step.outputs:
                conversation = self._running[output.request_id]
                try:
                    conversation.take(output, self._tokenizer)
                except FailedError as error:
                    self._fail(conversation, error)
                    continue
                if output.finish_reason is not None:
                    self._ask(conversation, output.finish_reason)
            on_step(step.stats.committed_tokens)

    def _ask(self, conversation: Conversation, finish_reason: str) -> None:
        """Start the next turn of a conversation, or write it where there is none."""
        try:
            request = conversation.next_turn(self._tokenizer, self._engine.info)
        except FailedError as error:
            self._fail(conversation, error)
            return
        if request is not None:
            self._engine.add_request(request)
            return
        del self._running[conversation.prompt.id]
        row = conversation.row(finish_reason)
        self._files.append(row)
        self._totals.count(row)

    def _fail(self, conversation: Conversation, error: FailedError) -> None:
        del self._running[conversation.prompt.id]
        self._totals.failures[error.reason] += 1
        self._files.append_failure(
            {
                **conversation.named(),
                "reason": error.reason,
                "detail": str(error),
                "messages": conversation.messages,
            }
        )


class Progress:
    """Prints a line and logs it every few seconds: this run's speed, the whole output's rows and tokens."""

    def __init__(self, files: DistillFiles, totals: Totals, num_waiting: int) -> None:
        self._files, self._totals = files, totals
        self._num_before, self._num_waiting = totals.rows, num_waiting
        self._committed = self._passes = 0
        self._began = self._printed = time.monotonic()

    def step(self, committed: Sequence[int]) -> None:
        """committed: tokens per request that committed in this step."""
        self._committed += sum(committed)
        self._passes += len(committed)
        if time.monotonic() - self._printed >= PROGRESS_SECONDS:
            self.report()

    def report(self) -> None:
        self._printed = time.monotonic()
        seconds = self._printed - self._began
        failed = self._totals.failures.total()
        handled = self._totals.rows - self._num_before + failed
        rate = self._committed / seconds
        per_step = self._committed / max(1, self._passes)
        left = (self._num_waiting - handled) * seconds / handled if handled else None
        self._files.log(
            {
                "rows": self._totals.rows,
                "failed": failed,
                "tokens": self._totals.tokens,
                "tokens_per_second": round(rate, 1),
                "tokens_per_step": round(per_step, 3),
                "eta_seconds": None if left is None else round(left),
            }
        )
        print(
            f"distill: {self._totals.rows}/{self._num_before + self._num_waiting} rows, {failed} failed, "
            f"{rate:.0f} tokens/s, {per_step:.2f} tokens/step, "
            + ("no row done yet" if left is None else f"{left / 60:.1f} min left"),
            flush=True,
        )


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """What `gorgon distill` was asked for. `config` has no folders yet; `num_prompts` None means all."""

    model: str
    heads: str
    config: EngineConfig
    prompts: Path
    out: Path
    num_prompts: int | None
    sampling: Sampling


def distill(options: DistillOptions) -> Totals:
    """Answer the prompts that are not answered yet, `config.max_num_seqs` at a time, and finish the file.

    After a kill, the next call with the same options continues. Rows depend only on the settings and their
    own id, as far as the engine's rounding allows (in bfloat16, passes of another shape may decide a near-tie
    differently). Raises DataError, ConfigError and what the registry and engine raise.
    """
    prompts = read_prompts(options.prompts)
    order = {prompt.id: place for place, prompt in enumerate(prompts)}
    if options.num_prompts is not None:
        prompts = choose(prompts, options.num_prompts, options.sampling.seed)
    model, config = with_folders(options.config, options.model, options.heads)
    with DistillFiles(options.out, _recorded(options, model), order) as files:
        totals = Totals()
        done = set()
        for row in files.rows():
            done.add(row["id"])
            totals.count(row)
        waiting = [prompt for prompt in prompts if prompt.id not in done]
        if done:
            print(f"{len(done)} rows of {options.out.name} are there, {len(waiting)} are left", flush=True)
        if waiting:
            engine = build(config)
            tokenizer = load_chat_tokenizer(model.model_dir)
            progress = Progress(files, totals, len(waiting))
            distiller = Distiller(engine, tokenizer, files, totals, options.sampling)
            distiller.run(waiting, progress.step)
            progress.report()
        files.finish()
    return totals


def _fingerprint(model_dir: Path) -> str:
    """SHA-256 of the sizes and both ends of the model's files. Another training of the model differs
    there, and weights of many gigabytes need not be read twice."""
    total = hashlib.sha256()
    for path in sorted(path for path in model_dir.iterdir() if path.suffix in _MODEL_FILES):
        size = path.stat().st_size
        total.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            total.update(file.read(_END_BYTES))
            file.seek(max(0, size - _END_BYTES))
            total.update(file.read(_END_BYTES))
    return total.hexdigest()


def _recorded(options: DistillOptions, model: ResolvedModel) -> dict[str, object]:
    """The settings that decide the text of rows. Heads and concurrency do not, and more prompts may be added
    later."""
    device = resolve_device(options.config.device)
    return {
        "model": model.name,
        "model_sha256": _fingerprint(model.model_dir),
        "prompts_sha256": hashlib.sha256(options.prompts.read_bytes()).hexdigest(),
        **asdict(options.sampling),
        "dtype": str(resolve_dtype(options.config.dtype, device)).removeprefix("torch."),
        "max_model_len": options.config.max_model_len,
    }


def summary(totals: Totals, out: Path, model: str) -> list[str]:
    """Lines for people: what the output holds, what failed, and what to do next."""
    share = 100 * totals.greedy_rows / totals.rows if totals.rows else 0.0
    lines = [f"{out}: {totals.rows} rows, {totals.tokens} answer tokens, {share:.1f}% of rows greedy"]
    if totals.unasked:
        why = "an answer before was cut or rewritten by the chat template, or the context is full"
        lines.append(f"not asked: {totals.unasked} follow-up turns ({why})")
    failed = ", ".join(f"{number} {reason}" for reason, number in totals.failures.most_common())
    if failed:
        lines.append(f"failed: {failed} (see {failed_path(out)}; the same command tries them again)")
    if totals.rows:
        data = shlex.quote(str(out))
        lines.append(f"next: gorgon train heads --model {shlex.quote(model)} --data {data} --out my-heads")
    return lines
