"""Flags and GORGON_* variables derived from frozen dataclasses.

A field with `help` in its metadata is a setting: `max_num_seqs` becomes `--max-num-seqs` and
GORGON_MAX_NUM_SEQS. Only what the user set is handed on, so that defaults live in the dataclass alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from cli.parser import closest
from engine.errors import ConfigError, GorgonError

ENV_PREFIX = "GORGON_"
OTHER_VARIABLES = frozenset({"GORGON_HOME"})  # read elsewhere: where models are kept
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class EnvironmentSettingError(GorgonError):
    """A GORGON_* variable that is unknown or holds an impossible value."""


def parse_bytes(text: str) -> int:
    """512M, 2G, 1.5GiB or plain bytes -> bytes. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size; write bytes or 512M, 2G")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None


def parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None


def parse_bool(text: str) -> bool:
    """true or false, as GORGON_* variables spell it. A flag is true if it is there."""
    if text not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text == "true"


PARSERS: dict[object, Callable[[str], Any]] = {
    str: str,
    int: parse_int,
    float: parse_float,
    bool: parse_bool,
}
SIZES = frozenset({"kv_cache_memory", "max_body_bytes"})  # whole numbers of bytes, written with units


@dataclass(frozen=True)
class Setting:
    """One setting. `parse` turns the text of a flag or variable into the value, or raises ValueError."""

    name: str
    help: str
    default: Any
    parse: Callable[[str], Any]
    choices: tuple[str, ...] | None = None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()

    def read(self, text: str) -> Any:
        """The value of `text`. Raises ValueError with what would work."""
        value = self.parse(text)
        if self.choices is not None and value not in self.choices:
            guess = closest(text, self.choices)
            hint = f"; did you mean {guess}?" if guess else ""
            raise ValueError(f"{text!r} is none of {', '.join(self.choices)}{hint}")
        return value


def settings_of(config: type) -> list[Setting]:
    """The settings of a dataclass: its fields whose metadata has `help`."""
    hints = get_type_hints(config)
    return [
        _setting(field, hints[field.name]) for field in dataclasses.fields(config) if "help" in field.metadata
    ]


def _setting(field: dataclasses.Field[Any], hint: Any) -> Setting:
    choices = None
    if get_origin(hint) is Literal:
        choices, kind = get_args(hint), str
    else:
        kind = next((arg for arg in get_args(hint) if arg is not type(None)), hint)
    default = None if field.default is dataclasses.MISSING else field.default
    parse = parse_bytes if field.name in SIZES else PARSERS[kind]
    return Setting(field.name, field.metadata["help"], default, parse, choices)


def add_flags(parser: argparse.ArgumentParser, settings: Iterable[Setting]) -> None:
    for setting in settings:
        if setting.parse is parse_bool:
            parser.add_argument(setting.flag, action="store_true", default=None, help=setting.help)
            continue
        shown = "" if setting.default is None else f" (default: {setting.default})"
        parser.add_argument(
            setting.flag,
            type=_argparse_type(setting),
            default=None,  # None is "not given": the variable, then the dataclass, decide
            metavar="{" + ",".join(setting.choices) + "}" if setting.choices else _metavar(setting),
            help=(setting.help + shown).replace("%", "%%"),
        )


def _metavar(setting: Setting) -> str:
    names: dict[object, str] = {parse_int: "N", parse_float: "X", parse_bytes: "SIZE"}
    return names.get(setting.parse, "TEXT")


def _argparse_type(setting: Setting) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return setting.read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def check_variables(environ: Mapping[str, str], settings: Iterable[Setting]) -> None:
    """Refuse GORGON_* variables that nothing reads. Otherwise a misspelt one would be ignored silently."""
    known = {setting.variable for setting in settings} | OTHER_VARIABLES
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and name not in known:
            guess = closest(name, known)
            raise EnvironmentSettingError(
                f"unknown environment variable {name}" + (f"; did you mean {guess}?" if guess else "")
            )


def given(
    args: argparse.Namespace, environ: Mapping[str, str], settings: Iterable[Setting]
) -> dict[str, Any]:
    """What the user set, by name: the flag if given, else the variable. Raises EnvironmentSettingError."""
    values: dict[str, Any] = {}
    for setting in settings:
        value = getattr(args, setting.name)
        if value is None and (text := environ.get(setting.variable)) is not None:
            if not text.strip():
                raise EnvironmentSettingError(f"{setting.variable} is empty; give it a value or unset it")
            try:
                value = setting.read(text)
            except ValueError as error:
                raise EnvironmentSettingError(f"{setting.variable}: {error}") from None
        if value is not None:
            values[setting.name] = value
    return values


T = TypeVar("T")


def build(config: type[T], args: argparse.Namespace, environ: Mapping[str, str], **fixed: Any) -> T:
    """An instance of the dataclass from flags, variables and `fixed` fields.

    Where the dataclass refuses a value that came from a variable, the error names the variable.
    """
    settings = settings_of(config)
    values = given(args, environ, settings)
    try:
        return config(**{**fixed, **values})
    except ConfigError as error:
        setting = next((s for s in settings if s.name == error.parameter), None)
        if setting is None or getattr(args, setting.name) is not None or setting.name not in values:
            raise
        reason = str(error).removeprefix(f"{setting.flag}: ")
        raise EnvironmentSettingError(f"{setting.variable}: {reason}") from None


def client_api_key(environ: Mapping[str, str]) -> str | None:
    """The key of a command that talks to a server: the first of the keys that the server accepts."""
    return environ.get("GORGON_API_KEY", "").split(",")[0] or None
