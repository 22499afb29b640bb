"""The helper process that renders chat templates.

`engine.text.chat_template` starts it. Its arguments are the file descriptor of a connected socket, and
limits. It ends when that socket closes. A template is foreign code that comes with a model file. jinja's
sandbox keeps it from the machine, but one call of a filter can take minutes or gigabytes inside C code, where
nothing can interrupt it. The kernel can: address space and CPU time of this process are limited, and its
parent kills it when it is late.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
import time
from collections.abc import Iterable
from datetime import datetime
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# The first byte of every answer; text in UTF-8 follows.
READY, RENDERED, REFUSED, NOT_COMPILED, TOO_LONG = b"^", b"=", b"!", b"?", b"+"

_KEPT_TEMPLATES = 8


def main(descriptor: int, seconds: float, characters: int, memory: int) -> int:
    """Answer until the socket closes. `seconds` of CPU time for one answer, rounded up, `characters` of
    rendered text, `memory` in bytes of address space. Ends with status 1 out of memory."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the parent decides when to end
        signal.signal(number, signal.SIG_IGN)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, memory)
    connection = Connection(descriptor)
    try:
        connection.send_bytes(READY)
        while True:
            source, variables = json.loads(connection.recv_bytes())
            # Usually the parent ends this process first. This limit holds when the parent is gone.
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds))
            connection.send_bytes(_answer(source, variables, characters))
    except (EOFError, ConnectionError):
        return 0  # the parent is gone
    except MemoryError:
        return 1


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _answer(source: str, variables: dict[str, Any] | None, characters: int) -> bytes:
    """The rendered text, or why there is none. Without variables the template is compiled only."""
    try:
        template = _compiled(source)
    except TemplateSyntaxError as error:
        return NOT_COMPILED + _encoded(str(error))
    if variables is None:
        return RENDERED
    try:
        text = _joined(template.generate(variables), characters)
    except MemoryError:
        raise
    except Exception as error:  # a foreign template can fail in any way
        return REFUSED + _encoded(str(error)[:characters])
    return TOO_LONG if text is None else RENDERED + _encoded(text)


def _joined(pieces: Iterable[str], characters: int) -> str | None:
    kept: list[str] = []
    for piece in pieces:
        characters -= len(piece)
        if characters < 0:
            return None
        kept.append(piece)
    return "".join(kept)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # the tokenizer reports text that is not Unicode


@lru_cache(_KEPT_TEMPLATES)
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates are written against: transformers' environment."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}`, which marks the assistant's words for training, renders what is in it."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, where jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
