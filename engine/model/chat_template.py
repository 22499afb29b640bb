"""Renders the model's own chat template. A template is foreign code: it runs in jinja's sandbox, with its
output and its time bounded, and whatever it raises is an error of the request.

The bounds are looked at wherever a template can spend time or memory: between the pieces it emits, at every
turn of a loop, and around every call, filter and operator, because loops may emit nothing and one piece may
be huge.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from engine.errors import ModelError, RequestError

MAX_RENDERED_CHARACTERS = 16 * 1024 * 1024
MAX_RENDER_SECONDS = 5.0
MAX_EXPONENT = 64
MAX_INTEGER_BITS = 4096


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(_Bounded(environment).visit(environment.parse(source)))
        except TemplateSyntaxError as error:
            raise ModelError(f"the model's chat template does not compile: {error}") from error

    def render(self, variables: dict[str, Any]) -> str:
        """The rendered text. Raises RequestError for what the template refuses or out of bounds."""
        pieces: list[str] = []
        size = 0
        began = _deadline.set(time.monotonic() + MAX_RENDER_SECONDS)
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_RENDERED_CHARACTERS:
                    raise _too_long()
                _check_time()
        except RequestError:
            raise
        except Exception as error:  # any operation of a foreign template can fail, in any way
            raise RequestError(
                "messages", f"the model's chat template refuses these messages: {error}"
            ) from error
        finally:
            _deadline.reset(began)
        return "".join(pieces)


_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)


def _check_time() -> None:
    if time.monotonic() > _deadline.get():
        raise RequestError("messages", "the model's chat template took too long to render")


def _too_long() -> RequestError:
    return RequestError("messages", "the rendered conversation is too long")


def _check_numbers(values: Iterable[object]) -> None:
    """Refuse numbers that, as a width or a count, would make something too long."""
    if any(isinstance(value, int) and abs(value) > MAX_RENDERED_CHARACTERS for value in values):
        raise _too_long()


def _checked(value: Any) -> Any:
    _check_time()
    if isinstance(value, Sized) and len(value) > MAX_RENDERED_CHARACTERS:
        raise _too_long()
    if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
        raise _too_long()
    return value


def _turns(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _check_time()
        yield item


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # with jinja's marks, which say what it is given
    def call(*args: Any, **named: Any) -> Any:
        _check_numbers([*args, *named.values()])
        return _checked(function(*args, **named))

    return call


class _Bounded(NodeTransformer):
    """Puts the checks around what the sandbox lets pass: loops, and strings joined with `~`."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = self._through("_turns", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return self._through("_checked", node)

    def _through(self, name: str, node: nodes.Node) -> nodes.Expr:
        environment = self._environment
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=environment)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            numbers = [len(value) if isinstance(value, Sized) else value for value in (left, right)]
            if isinstance(left, Sized) or isinstance(right, Sized):
                _check_numbers([numbers[0] * numbers[1]])
        elif operator == "**" and abs(right) > MAX_EXPONENT:
            raise _too_long()
        return _checked(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **named: Any) -> Any:
        _check_numbers([*args, *named.values()])
        return _checked(super().call(context, obj, *args, **named))


def _environment() -> _Environment:
    """What templates are written against: transformers' environment."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.filters.update({name: _guarded(each) for name, each in environment.filters.items()})
    environment.filters.update({"_turns": _turns, "_checked": _checked})
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
