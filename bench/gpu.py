"""`gorgon bench gpu`, or `python -m bench.gpu`: the engine's step on a GPU beside the memory limit, for the
default model and for Llama-shaped models with random weights; and its attention beside other libraries'.

The limit of a pass is the time to read every weight and the keys and values of every request's context once,
at the bandwidth of copies measured in the same run. Nothing here needs a GPU but its clocks: with
`--device cpu --shapes tiny` all of it runs in seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from bench.attention import Attended
from bench.bandwidth import Bandwidth
from bench.facts import machine_facts
from bench.gpu_model import Found, measure_attention_of, measure_steps_of, profile_family
from bench.gpu_options import GpuBenchOptions, add_arguments, read_options
from bench.gpu_targets import OWN, TARGETS, Row, sentence
from bench.report import print_json, print_table
from engine.errors import GorgonError
from engine.runner.device import resolve_device, resolve_dtype
from heads.errors import HeadsError, RegistryError
from trees.family import TreeFamily

_NOTE_WIDTH = 60  # characters of an error in the table; all of it is in the JSON
_SIMULATED = (
    "Tokens per step, and what follows from them, are simulated: from the gains of the built-in head set of "
    "smollm2-135m-instruct (tree.json, its own held-out greedy answers), whatever the model. Shapes have "
    "untrained Hydra heads of the same kind: the time to draft is real, what is accepted is not."
)


def run(args: argparse.Namespace) -> int:
    options = read_options(args)
    device = resolve_device(options.device)
    bandwidth = Bandwidth(device)
    steps: list[Found] = []
    attended: list[Attended] = []
    failed: dict[str, str] = {}
    # All models' steps come first: what another library does wrong may leave the device unusable.
    if "steps" in options.parts:
        _measure(steps, measure_steps_of, options, bandwidth, failed)
    if "attention" in options.parts:
        _measure(attended, measure_attention_of, options, bandwidth, failed)
    rows, attention = ([one.row(bandwidth.copy) for one in part] for part in (steps, attended))
    for row in attention:
        if row["kernel"] == OWN and row["note"]:
            failed.setdefault(row["model"], f"attention, {row['pass']}: {row['note']}")
    family = profile_family()
    compare(rows, family)
    verdicts = [target.judge([*rows, *attention]) for target in TARGETS]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    speeds = f"reads {bandwidth.read / 1e9:.1f} GB/s, copies {bandwidth.copy / 1e9:.1f} GB/s"
    print(f"{gpu or 'CPU'}: memory {speeds}\n{_SIMULATED}\n")
    if rows:
        _print(rows)
    if attention:
        _print_attention(attention)
    print("\n".join(map(sentence, verdicts)))
    print_json(
        {
            "bench": "gpu",
            **machine_facts(),
            "gpu": gpu,
            "device": str(device),
            "dtype": str(resolve_dtype(options.dtype, device)).removeprefix("torch."),
            "quantization": options.quantization,
            "kv_cache_dtype": options.kv_cache_dtype,
            "threads": torch.get_num_threads(),
            "read_bytes_per_second": round(bandwidth.read),
            "copy_bytes_per_second": round(bandwidth.copy),
            "simulated": {"note": _SIMULATED, "gains": family.gains},
            "rows": rows,
            "attention": attention,
            "targets": verdicts,
            "not_measured": failed,
        }
    )
    return 1 if failed else 0


def _measure(
    found: list[Any],
    measure: Callable[[str, GpuBenchOptions, Bandwidth], Iterable[Any]],
    options: GpuBenchOptions,
    bandwidth: Bandwidth,
    failed: dict[str, str],
) -> None:
    """Measure one part of all models; why one failed goes into `failed`, and the next has its turn."""
    for name in options.shapes:
        try:
            found.extend(measure(name, options, bandwidth))
        except (GorgonError, HeadsError, RegistryError, RuntimeError) as error:  # torch raises the last
            failed.setdefault(name, str(error))
            print(f"{name} was not measured to the end: {error}", file=sys.stderr)


def compare(rows: list[Row], family: TreeFamily) -> None:
    """Put each step of trees beside the plain one of the same requests and context: the ratio of their times
    and, from the profile's gains, tokens per step and the speed-up, drafting included."""
    plain = {_place(row): row["ms_median"] for row in rows if row["kind"] == "plain"}
    for row in rows:
        if row["nodes"] == 1:
            continue
        row["simulated_tokens_per_step"] = round(1 + sum(family.gains[: row["nodes"] - 1]), 3)
        alone = plain.get(_place(row))
        if alone is not None:
            row["over_plain"] = round(row["ms_median"] / alone, 3)
            step = row["ms_median"] + row["ms_drafting"]
            row["simulated_speed_up"] = round(row["simulated_tokens_per_step"] * alone / step, 3)


def _place(row: Row) -> tuple[str, int, int]:
    return row["model"], row["requests"], row["context"]


def _print(rows: list[Row]) -> None:
    print_table(
        [
            "model", "step", "requests", "context", "ms", "best ms", "limit ms", "of the limit", "over plain",
            "device waits", "drafting ms", "tokens/step (sim.)", "speed-up (sim.)",
        ],
        [
            [
                row["model"], row["kind"], row["requests"], row["context"], row["ms_median"], row["ms_best"],
                row["limit_ms"], f"{row['share_of_limit']:.0%}", row.get("over_plain"), row.get("idle_share"),
                row.get("ms_drafting"), row.get("simulated_tokens_per_step"), row.get("simulated_speed_up"),
            ]
            for row in rows
        ],
    )  # fmt: skip


def _print_attention(rows: list[Row]) -> None:
    print("\nAttention of all layers, keys and values stored:")
    print_table(
        [
            "model", "pass", "requests", "context", "kernel", "ms", "best ms", "limit ms", "of the limit",
            "times ours", "",
        ],
        [
            [
                row["model"], row["pass"], row["requests"], row["context"], row["kernel"],
                row.get("ms_median"), row.get("ms_best"), row.get("limit_ms"),
                f"{row['share_of_limit']:.0%}" if "share_of_limit" in row else None, row.get("over_own"),
                (row["note"] or "").partition("\n")[0][:_NOTE_WIDTH],
            ]
            for row in rows
        ],
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n\n")[0])
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except GorgonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
