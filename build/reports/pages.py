"""What the reports for people share: figures, tables in Markdown and HTML, and the page that they stand on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_LONG = 60  # characters; columns with longer cells are broken into lines


@dataclass(frozen=True)
class Table:
    """Rows of text under heads; the first `words` columns are words, the others figures."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1

    @property
    def styles(self) -> list[str]:
        """The CSS class of each column."""
        longest = [max((len(row[i]) for row in self.rows), default=0) for i in range(len(self.heads))]
        return [
            "figure" if i >= self.words else "long" if length > _LONG else "words" for i, length in enumerate(longest)
        ]

    def markdown(self) -> list[str]:
        """The table's lines in Markdown."""
        lines = [self.heads, ["---"] * len(self.heads), *self.rows]
        return ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines]


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many significant digits and no exponent; empty for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def render(template: Path, **values: Any) -> str:
    """A page of a template, which may extend `base.html` and use its macros.

    Every value is escaped unless the template calls it `safe`. A value that the template names and `values` lacks is
    an error.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([template.parent, _TEMPLATES]),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(values)
