"""What the reports for people share: figures, tables, and the look of a page that loads nothing."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class Html(str):
    """Text that is HTML already: `tag` escapes every other."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """Rows of text under heads; the first `words` columns are words, the others figures."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1

    def markdown(self) -> list[str]:
        """The table's lines in Markdown."""
        lines = [self.heads, ["---"] * len(self.heads), *self.rows]
        return ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines]

    def html(self, label: str) -> Html:
        """The table in HTML; columns with long words are broken into lines."""
        longest = [max((len(row[i]) for row in self.rows), default=0) for i in range(self.words)]
        styles = [{"class_": "long" if length > 60 else "words"} for length in longest]
        styles += [{}] * (len(self.heads) - self.words)

        def line(cells: Sequence[str], kind: str) -> Html:
            return tag("tr", *(tag(kind, cell, **style) for cell, style in zip(cells, styles, strict=True)))

        return scroll(tag("table", line(self.heads, "th"), *(line(row, "td") for row in self.rows)), label)


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many significant digits and no exponent; empty for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def tag(name: str, *content: str, **attributes: object) -> Html:
    """An element of HTML or SVG; `class_` is the attribute `class`, `text_anchor` is `text-anchor`."""
    pairs = [f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"' for key, value in attributes.items()]
    inside = (part if isinstance(part, Html) else html.escape(part) for part in content)
    return Html(f"<{name}{''.join(pairs)}>{''.join(inside)}</{name}>")


def scroll(content: str, label: str, kind: str = "scroll") -> Html:
    """What is wider than the page scrolls by itself, with the keyboard too."""
    return tag("div", content, class_=kind, tabindex=0, role="region", aria_label=label)


def page(title: str, style: str, parts: Iterable[str], head: str = "") -> str:
    """The whole file, with a style of its own after the common look."""
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    top = f"<head>{meta}{tag('title', title)}{head}<style>{_LOOK}{style}</style></head>"
    return f'<!doctype html>\n<html lang="en">{top}\n<body>{tag("main", Html(chr(10).join(parts)))}</body></html>\n'


_LOOK = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1d2128;--dim:#646c78;--line:#e0e2e6;--grid:#eceef1;
--vertical:#2f6fde;--pointwise:#0f8f83;--horizontal:#8a4bd0;--expansion:#5b8c1f;--added:#c07a00;--unmapped:#d23b3b;
--single:#8a92a0;--folded:#b4bac4}
@media(prefers-color-scheme:dark){:root{--bg:#14161a;--card:#1b1e24;--ink:#e4e7ec;--dim:#98a1ae;--line:#2d323b;
--grid:#262a32;--vertical:#6ca0ff;--pointwise:#3fc3b4;--horizontal:#b98bf0;--expansion:#9bc95a;--added:#e3a63a;
--unmapped:#ff7575;--single:#8d96a5;--folded:#565e6b}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:25px;margin:0 0 4px}h2{font-size:18px;margin:38px 0 10px}h3{font-size:15px;margin:18px 0 6px}
h1,h3,p,li{overflow-wrap:anywhere}p{margin:6px 0}.dim{color:var(--dim)}svg{display:block}
.card,.scroll{background:var(--card);border:1px solid var(--line);border-radius:10px}
.scroll{overflow-x:auto;padding:14px}.scroll:focus-visible{outline:2px solid var(--vertical)}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:5px 9px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{color:var(--dim);font-weight:600}tr:last-child td{border-bottom:0}.words,.long{text-align:left}
td.long{white-space:normal;overflow-wrap:break-word;min-width:15em}
@media(max-width:600px){td.words{white-space:normal;min-width:7em}}
@media print{.scroll{overflow:visible}}
"""
