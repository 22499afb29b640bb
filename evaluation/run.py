"""`gorgon evaluate`: measures a head set on prompts and writes the report of it.

The folder holds answers.jsonl (what was measured, by which a stopped run goes on), results.json, report.md,
report.html and the plots.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from bench.engine import warm_up
from bench.facts import machine_facts
from bench.prompts import read_prompts, sample
from bench.report import print_table
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.folders import with_folders
from engine.messages import ModelInfo
from evaluation.answers import ANSWERS, Answered, EvaluateError, Journal
from evaluation.baselines import Baseline, baseline_modes, plan_baselines
from evaluation.card import CARD, update_card
from evaluation.document import Table, to_html, to_markdown
from evaluation.figures import figures_of
from evaluation.measure import measure
from evaluation.modes import make_modes, tree_sizes
from evaluation.plots import check_matplotlib, draw
from evaluation.report import main_table, report_blocks
from trees.family import TreeFamily

RESULTS = "results.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """`num_prompts` None is all of the file; `draft_tokens` None is the usual sizes that the family has;
    `baselines`, `draft_model` and `draft_layers` are as in `plan_baselines`."""

    model: str
    heads: str
    config: EngineConfig  # without folders
    prompts: Path
    num_prompts: int | None
    max_tokens: int
    seed: int
    temperatures: tuple[float, ...]
    draft_tokens: tuple[int, ...] | None
    baselines: tuple[str, ...]
    draft_model: str | None
    draft_layers: int | None
    all_turns: bool
    out: Path
    card: bool


def run(options: EvaluateOptions) -> int:
    from engine.text.tokenizer import load_chat_tokenizer

    check_matplotlib()
    prompts = read_prompts(options.prompts)
    prompts = sample(
        prompts, len(prompts) if options.num_prompts is None else options.num_prompts, options.seed
    )
    model, config = with_folders(options.config, options.model, options.heads)
    if config.heads_dir is None:
        raise ConfigError("heads", f"{model.name} has no head set of its own; name the one to evaluate")
    heads_dir = Path(config.heads_dir)
    family = TreeFamily.load(heads_dir / "tree.json").prefix(options.config.max_tree_nodes - 1)
    sizes = tree_sizes(options.draft_tokens, family)
    baselines = plan_baselines(options.baselines, config, options.draft_model, options.draft_layers)
    tokenizer = load_chat_tokenizer(model.model_dir)
    modes = [*make_modes(config, sizes), *baseline_modes(config, baselines)]
    info = modes[1].engine.info
    names = [mode.name for mode in modes]
    facts = machine_facts()
    settings = _settings(options, model.name, heads_dir, info, names, baselines, facts)
    _make_folder(options.out)
    journal = Journal(options.out / ANSWERS, settings)

    warm_up(modes, tokenizer.encode_chat(prompts[0].messages))
    measure(
        modes,
        tokenizer,
        prompts,
        options.temperatures,
        journal,
        options.max_tokens,
        options.seed,
        options.all_turns,
    )
    rows = [
        journal.rows[temperature, index]
        for temperature in options.temperatures
        for index in range(len(prompts))
    ]
    document = {
        "report": "evaluate",
        **facts,
        **settings,
        "prompts": len(prompts),
        "turns": sum(len(row.turns) for row in rows if row.temperature == options.temperatures[0]),
        "figures": figures_of(rows, names),
        "rows": [_without_tokens(row) for row in rows],
    }
    write_report(options.out, document)
    _print(document)
    print(f"The report: {options.out / 'report.html'}, {options.out / 'report.md'}")
    if options.card:
        update_card(heads_dir, document)
        print(f"The card has the main figures: {heads_dir / CARD}")
    print(f"Next, publish the head set: gorgon heads push {heads_dir} ORG/NAME")
    return 0


def write_report(folder: Path, document: dict[str, Any]) -> None:
    """results.json, the plots, report.md and report.html."""
    (folder / RESULTS).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    plots = [draw(figures, folder) for figures in document["figures"]]
    blocks = report_blocks(document, plots)
    (folder / "report.md").write_text(to_markdown(blocks), encoding="utf-8")
    html = to_html(blocks, f"Evaluation of {document['heads']}")
    (folder / "report.html").write_text(html, encoding="utf-8")


def _settings(
    options: EvaluateOptions,
    model: str,
    heads_dir: Path,
    info: ModelInfo,
    modes: Sequence[str],
    baselines: Sequence[Baseline],
    facts: dict[str, object],
) -> dict[str, Any]:
    """What answers and times depend on. More prompts or temperatures may be added to a folder later."""
    engine = asdict(options.config)
    return {
        "model": model,
        "heads": info.heads,
        "heads_sha256": _digest(heads_dir),
        "dtype": info.dtype,
        "quantization": info.quantization,
        "device": _device_name(info),
        "threads": _num_threads(),
        "modes": list(modes),
        "baselines": {baseline.name: baseline.description for baseline in baselines},
        "prompt_file": options.prompts.name,
        "prompts_sha256": hashlib.sha256(options.prompts.read_bytes()).hexdigest(),
        "seed": options.seed,
        "max_tokens": options.max_tokens,
        "all_turns": options.all_turns,
        "engine": {name: engine[name] for name in sorted(engine) if not name.endswith("_dir")},
        "cpu": facts["cpu"],
        "cores": facts["cores"],
        "gorgon": facts["gorgon"],
    }


def _device_name(info: ModelInfo) -> str:
    import torch

    return torch.cuda.get_device_name(info.device) if info.device.startswith("cuda") else info.device


def _num_threads() -> int:
    """Cores that torch computes with: OMP_NUM_THREADS and such change it."""
    import torch

    return torch.get_num_threads()


def _digest(heads_dir: Path) -> str:
    """Digest of a head set without its card, which --card rewrites."""
    digest = hashlib.sha256()
    for path in sorted(heads_dir.iterdir()):
        if path.suffix in (".json", ".safetensors"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluateError(f"{folder} cannot be made: {error.strerror}") from error


def _without_tokens(row: Answered) -> Any:
    """A row as plain data; the answers themselves stay in answers.jsonl."""
    data = msgspec.to_builtins(row)
    for turn in data["turns"]:
        for measured in turn["runs"].values():
            measured["tokens"] = sum(len(tokens) for tokens in measured.pop("outputs").values())
    return data


def _print(document: dict[str, Any]) -> None:
    for figures in document["figures"]:
        print(f"Temperature {figures['temperature']:g}")
        if figures["tasks"]:
            table: Table = main_table(figures)
            print_table(table.headers, table.rows)
        for mode, found in figures["exactness"].items():
            if found["wrong"] or found["near_ties"]:
                print(
                    f"{mode}: {found['identical']} of {found['answers']} answers as without speculation, "
                    f"{found['near_ties']} parted at a near-tie, {found['wrong']} are wrong"
                )
