"""The `gorgon` command: reads the command line and hands over to one handler.

Nothing heavy is imported here or at the top of any other module of this package: `gorgon --help` has to
answer at once, so each command imports what it runs only when it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from cli import bench, calibrate, chat, distill, evaluate, heads, pull, serve, train
from cli.parser import Parser
from cli.settings import EnvironmentSettingError
from engine.errors import ConfigError, GorgonError
from heads.errors import HeadsError, RegistryError
from trees.family import TreeError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def build_parser() -> Parser:
    parser = Parser(prog="gorgon", description="Serve language models, several tokens per forward pass.")
    parser.add_argument("--version", action="version", version=f"gorgon {version('gorgon-serve')}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (serve, chat, pull, heads, distill, train, calibrate, evaluate, bench):
        command.register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors meant for people are one line, without traceback."""
    args = build_parser().parse_args(argv)
    run: Callable[..., int] = args.run
    try:
        return run(args)
    except (GorgonError, HeadsError, RegistryError, TreeError) as error:
        print(f"gorgon: error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError | EnvironmentSettingError) else EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
