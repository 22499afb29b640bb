"""A report as a list of blocks, written as Markdown or as one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; }
body { max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 0.5rem; }
h2 { border-bottom: 1px solid #ccc; padding-bottom: 0.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.5rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { background: #f4f4f4; }
th:first-child, td:first-child { text-align: left; }
.facts th, .facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
img { max-width: 100%; display: block; margin: 1rem 0; }
"""


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is a label, the others figures, unless they are `facts`."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    facts: bool = False


@dataclass(frozen=True)
class Image:
    """A PNG file beside the report."""

    path: Path
    caption: str


Block = Heading | Paragraph | Table | Image


def to_markdown(blocks: Sequence[Block]) -> str:
    """Images are linked by their file name."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Image(path, caption):
            return f"![{caption}]({path.name})"
        case Table(headers, rows, facts):
            rule = ["---"] + ["---" if facts else "---:"] * (len(headers) - 1)
            lines = [headers, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_html(blocks: Sequence[Block], title: str) -> str:
    """Images are embedded."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Image(path, caption):
            data = base64.b64encode(path.read_bytes()).decode()
            return f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        case Table(headers, rows, facts):
            head = _html_row("th", headers)
            lines = "\n".join(_html_row("td", row) for row in rows)
            name = ' class="facts"' if facts else ""
            table = f"<table{name}>\n<thead>{head}</thead>\n<tbody>\n{lines}\n</tbody></table>"
            return f'<div class="wide">{table}</div>'


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
