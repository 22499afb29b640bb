"""Renders the model's own chat template. A template is foreign code: it runs in jinja's sandbox, with its
output and its time bounded, and whatever it raises is an error of the request.
"""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import ModelError, RequestError

MAX_RENDERED_CHARACTERS = 16 * 1024 * 1024
MAX_RENDER_SECONDS = 5.0


class ChatTemplate:
    """One compiled template. `source` is its text."""

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise ModelError(f"the model's chat template does not compile: {error}") from error

    def render(self, variables: dict[str, Any]) -> str:
        """The rendered text. Raises RequestError for what the template refuses or out of bounds."""
        pieces: list[str] = []
        size, deadline = 0, time.monotonic() + MAX_RENDER_SECONDS
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_RENDERED_CHARACTERS:
                    raise RequestError("messages", "the rendered conversation is too long")
                if time.monotonic() > deadline:
                    raise RequestError("messages", "the model's chat template took too long to render")
        except RequestError:
            raise
        except Exception as error:  # any operation of a foreign template can fail, in any way
            raise RequestError(
                "messages", f"the model's chat template refuses these messages: {error}"
            ) from error
        return "".join(pieces)


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
