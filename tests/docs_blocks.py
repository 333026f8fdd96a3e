"""The fenced blocks of a page of documentation, with the comment above them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


class Block(NamedTuple):
    """A fenced block and the HTML comment right above it, if any."""

    language: str
    text: str
    note: str


def blocks(path: Path) -> list[Block]:
    """All blocks of a page that name a language."""
    pattern = re.compile(r"(?:^<!-- (?P<note>.*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
    return [Block(m["language"], m["text"], m["note"] or "") for m in pattern.finditer(path.read_text())]
