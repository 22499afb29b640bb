"""Puts the main figures of a report into the card of the head set they are about."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.answers import EvaluateError
from evaluation.document import Block, Heading, Paragraph, to_markdown
from evaluation.report import main_table

CARD = "README.md"
_SECTION = re.compile(r"^## Evaluation\n.*?(?=^#{1,2} |\Z)", re.MULTILINE | re.DOTALL)


def update_card(folder: Path, document: Mapping[str, Any]) -> None:
    """Write the section `## Evaluation` of README.md, in the place of an older one or at the end.

    Raises EvaluateError where the file cannot be read or written.
    """
    path = folder / CARD
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else f"# {document['heads']}\n"
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluateError(f"{path} cannot be read: {error}") from error
    section = to_markdown(section_blocks(document))
    if _SECTION.search(text):
        text = _SECTION.sub(lambda _: section + "\n", text, count=1).rstrip("\n") + "\n"
    else:
        text = text.rstrip("\n") + "\n\n" + section
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EvaluateError(
            f"{path} cannot be written: {error.strerror}; the report itself is complete"
        ) from error


def section_blocks(document: Mapping[str, Any]) -> list[Block]:
    place = document["cpu"] if document["device"] == "cpu" else document["device"]
    blocks: list[Block] = [
        Heading(2, "Evaluation"),
        Paragraph(
            f"{document['prompts']} prompts of `{document['prompt_file']}` ({document['turns']} turns), at "
            f"most {document['max_tokens']} tokens each, one request at a time, {document['dtype']} on "
            f"{place}, gorgon {document['gorgon']}, {document['date'][:10]}. Speed-up is against speculation "
            "off." + "".join(f" {name}: {text}." for name, text in document["baselines"].items())
        ),
    ]
    for figures in document["figures"]:
        if figures["tasks"]:
            blocks += [Paragraph(f"At temperature {figures['temperature']:g}:"), main_table(figures)]
    return blocks
