"""Flags and variables come from the dataclass alone, flags win, and nothing is ignored in silence."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from cli.parser import Parser
from cli.settings import (
    EnvironmentSettingError,
    add_flags,
    build,
    check_variables,
    client_api_key,
    parse_bytes,
    settings_of,
)
from engine.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Example:
    folder: str = "no flag: it has no help"
    kind: Literal["fast", "slow"] = field(default="fast", metadata={"help": "100% of the kind"})
    block_size: int = field(default=16, metadata={"help": "size"})
    share: float = field(default=0.5, metadata={"help": "share"})
    name: str | None = field(default=None, metadata={"help": "name"})
    kv_cache_memory: int | None = field(default=None, metadata={"help": "bytes"})
    loud: bool = field(default=False, metadata={"help": "loud"})

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigError("block_size", f"must be at least 1, not {self.block_size}")


def parse(*argv: str) -> argparse.Namespace:
    parser = Parser(prog="example")
    add_flags(parser, settings_of(Example))
    args: argparse.Namespace = parser.parse_args(argv)
    return args


def test_every_field_with_help_is_a_flag_and_a_variable() -> None:
    settings = settings_of(Example)
    flags = ["--kind", "--block-size", "--share", "--name", "--kv-cache-memory", "--loud"]
    assert [s.flag for s in settings] == flags
    assert settings[1].variable == "GORGON_BLOCK_SIZE"


def test_defaults_are_the_dataclass_own() -> None:
    assert build(Example, parse(), {}, folder="x") == Example(folder="x")


def test_flag_wins_over_variable() -> None:
    environ = {"GORGON_BLOCK_SIZE": "8", "GORGON_KIND": "slow", "GORGON_SHARE": "0.25"}
    built = build(Example, parse("--block-size", "4"), environ)
    assert built == Example(block_size=4, kind="slow", share=0.25)


def test_a_fixed_field_is_a_default_that_a_flag_overrides() -> None:
    assert build(Example, parse(), {}, block_size=2).block_size == 2
    assert build(Example, parse("--block-size", "4"), {}, block_size=2).block_size == 4


def test_a_switch_is_on_by_being_there() -> None:
    assert build(Example, parse("--loud"), {"GORGON_LOUD": "false"}).loud
    assert build(Example, parse(), {"GORGON_LOUD": "true"}).loud
    assert not build(Example, parse(), {"GORGON_LOUD": "false"}).loud


@pytest.mark.parametrize(
    ("text", "value"),
    [("4096", 4096), ("512M", 512 * 2**20), ("2G", 2**31), ("1.5GiB", 3 * 2**29), ("64kB", 65536)],
)
def test_sizes_take_units(text: str, value: int) -> None:
    assert build(Example, parse("--kv-cache-memory", text), {}).kv_cache_memory == value
    assert build(Example, parse(), {"GORGON_KV_CACHE_MEMORY": text}).kv_cache_memory == value


@pytest.mark.parametrize("text", ["", "G", "2X", "-1G", "1 2", "nan", "1e400"])
def test_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no size; write bytes or 512M, 2G"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"GORGON_BLOCK_SIZE": "many"}, "GORGON_BLOCK_SIZE: 'many' is not a whole number"),
        ({"GORGON_SHARE": "half"}, "GORGON_SHARE: 'half' is not a number"),
        ({"GORGON_KIND": "slw"}, "GORGON_KIND: 'slw' is none of fast, slow; did you mean slow"),
        ({"GORGON_BLOCK_SIZE": "0"}, "GORGON_BLOCK_SIZE: must be at least 1, not 0"),
        ({"GORGON_LOUD": "maybe"}, "GORGON_LOUD: 'maybe' is neither true nor false"),
        ({"GORGON_NAME": " "}, "GORGON_NAME is empty"),
    ],
)
def test_a_bad_value_names_its_variable(environ: dict[str, str], message: str) -> None:
    with pytest.raises(EnvironmentSettingError, match=message):
        build(Example, parse(), environ)


def test_an_impossible_flag_names_the_flag() -> None:
    with pytest.raises(ConfigError, match="--block-size: must be at least 1, not 0"):
        build(Example, parse("--block-size", "0"), {"GORGON_BLOCK_SIZE": "4"})


def test_unknown_variables_are_errors_with_the_closest_name() -> None:
    check_variables({"GORGON_HOME": "/x", "GORGON_KIND": "slow", "PATH": "/bin"}, settings_of(Example))
    with pytest.raises(EnvironmentSettingError, match="GORGON_BLOKSIZE; did you mean GORGON_BLOCK_SIZE"):
        check_variables({"GORGON_BLOKSIZE": "4"}, settings_of(Example))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--blok-size", "4"], "unknown flag --blok-size; did you mean --block-size?"),
        (["--block", "4"], "unknown flag --block"),
        (["--kind", "slo"], "'slo' is none of fast, slow; did you mean slow?"),
        (["--block-size", "1.5"], "'1.5' is not a whole number"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_wrong_flags_exit_2_with_the_fix(argv: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse(*argv)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_client_takes_the_first_of_the_servers_keys() -> None:
    assert client_api_key({"GORGON_API_KEY": "first,second"}) == "first"
    assert client_api_key({"GORGON_API_KEY": ""}) is client_api_key({}) is None
