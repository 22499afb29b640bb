"""An argument parser whose errors are one line and say what would have worked."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was probably meant to be, if any is near."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


class Parser(argparse.ArgumentParser):
    """No abbreviations, so that a new flag never changes the meaning of an old command line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gorgon: error: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        # argparse calls this for every parser down to the command's own. Only that one knows the flags.
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._explain_unknown(unknown))
        return parsed, unknown

    def _explain_unknown(self, unknown: Sequence[str]) -> str:
        word = unknown[0].split("=", 1)[0]
        if not word.startswith("-"):
            return f"unexpected argument {word!r}"
        guess = closest(word, self._option_string_actions)
        return f"unknown flag {word}" + (f"; did you mean {guess}?" if guess else "")


Subparsers = argparse._SubParsersAction  # argparse has no public name for what add_subparsers returns
