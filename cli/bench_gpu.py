"""`gorgon bench gpu`: the step on a GPU against the memory limit."""

from __future__ import annotations

import argparse

from cli.parser import Subparsers


def register(commands: Subparsers[argparse.ArgumentParser]) -> None:
    from bench.gpu_options import add_arguments

    parser = commands.add_parser(
        "gpu",
        help="time of a step on a GPU, by model size, requests, context and tree",
        description="Times decoding steps of the default model and of Llama-shaped models with random "
        "weights, attention alone beside other libraries' and how long the device waits for the host, and "
        "says how far each is from the memory limit. With --device cpu --shapes tiny it runs anywhere.",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from bench.gpu import run as run_bench

    return run_bench(args)
