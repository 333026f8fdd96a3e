"""A report as Markdown and as one HTML file that loads nothing and follows the reader's light or dark setting.

Matplotlib draws with stand-in colours, which are then replaced by the page's CSS variables: the same picture fits both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import files
from build.reports import html
from build.reports.html import Html, Table, scroll, tag

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, DIM, GRID, CARD, BAD = (f"#00000{i}" for i in range(1, 6))
COLORS = tuple(f"#00001{i}" for i in range(7))
_VARIABLES = dict(zip((INK, DIM, GRID, CARD, BAD), ("ink", "dim", "line", "card", "unmapped"), strict=True))
_NAMES = ("vertical", "added", "horizontal", "pointwise", "unmapped", "expansion", "single")
_VARIABLES |= dict(zip(COLORS, _NAMES, strict=True))
_LOOK: Mapping[Any, Any] = {  # newer matplotlib types its settings by name
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.handlelength": 3,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    **dict.fromkeys(("axes.titlecolor", "text.color"), INK),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), DIM),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), GRID),
    **dict.fromkeys(("axes.grid", "axes.axisbelow", "figure.constrained_layout.use"), True),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("xtick.minor.size", "ytick.minor.size"), 0),
}
_STYLE = """
.verdict{list-style:none;margin:18px 0;padding:6px 18px}
.verdict li{display:flex;gap:12px;padding:7px 0;border-bottom:1px solid var(--line)}.verdict li:last-child{border:0}
.verdict b{flex:none;width:20px;height:20px;margin-top:1px;border-radius:50%;color:var(--card);background:var(--single);
font-size:13px;line-height:20px;text-align:center}
.verdict .good{background:var(--expansion)}.verdict .bad{background:var(--unmapped)}
/* darker than the look's own: words stand on them in white */
@media(prefers-color-scheme:light){:root{--added:#9a5f00;--pointwise:#0b7a70;--expansion:#477812;--single:#69717e}}
nav{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px}a{color:var(--vertical)}
figure{margin:0 0 12px}.scroll+.scroll,figure+.scroll{margin-top:12px}
figure svg{width:100%;min-width:700px;height:auto}figure svg *{stroke-linejoin:round;stroke-linecap:butt}
figure svg text{font-family:system-ui,-apple-system,"Segoe UI",sans-serif}
"""
_MARKS = {True: ("good", "✓", "good"), False: ("bad", "✗", "bad"), None: ("", "–", "no target")}


@dataclass(frozen=True)
class Line:
    """A line of the verdict: good, bad, or neither where it has no target."""

    good: bool | None
    text: str


@dataclass(frozen=True)
class Plot:
    """A picture, what it shows in words, and how it is drawn."""

    name: str
    alt: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Section:
    """A part of a report."""

    title: str
    text: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Report:
    """What a report says, whichever way it is written."""

    title: str
    subtitle: str
    verdict: Sequence[Line]
    sections: Sequence[Section]

    def write(self, folder: Path, stem: str) -> list[Path]:
        """Writes `<stem>.md` and `<stem>.html` into a folder, each whole or not at all."""
        paths = [folder / f"{stem}.md", folder / f"{stem}.html"]
        for path, content in zip(paths, (self.markdown(), self.html()), strict=True):
            files.write(path, content)
        return paths

    def markdown(self) -> str:
        """The report for a terminal, a pull request or a diff: without the plots."""
        out = [f"# {self.title}", "", self.subtitle, ""]
        out += [f"- {_MARKS[line.good][1]} {line.text}" for line in self.verdict]
        for part in self.sections:
            out += ["", f"## {part.title}"]
            for text in part.text:
                out += ["", text]
            for table in part.tables:
                out += ["", *table.markdown()]
        return "\n".join(out) + "\n"

    def html(self) -> str:
        """The report as one page."""
        verdict = []
        for line in self.verdict:
            kind, mark, meaning = _MARKS[line.good]
            badge = tag("b", mark, class_=kind, role="img", aria_label=meaning)
            verdict.append(tag("li", badge, tag("span", line.text)))
        links = (tag("a", section.title, href=f"#{_anchor(section.title)}") for section in self.sections)
        parts = [
            tag("h1", self.title),
            tag("p", self.subtitle, class_="dim"),
            tag("ul", *verdict, class_="card verdict", aria_label="verdict"),
            tag("nav", *links, aria_label="sections"),
        ]
        for section in self.sections:
            parts.append(tag("h2", section.title, id=_anchor(section.title)))
            parts += [tag("figure", scroll(Html(svg(plot)), plot.alt)) for plot in section.plots]
            parts += [tag("p", text) for text in section.text]
            parts += [table.html(section.title) for table in section.tables]
        return html.page(self.title, _STYLE, parts, '<link rel="icon" href="data:,">')


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def svg(plot: Plot) -> str:
    """A plot as SVG to stand in HTML: text as text, colours by CSS variables, ids of its own."""
    import matplotlib

    with matplotlib.rc_context({**_LOOK, "svg.hashsalt": plot.name}):  # the same ids in every run
        stream = StringIO()
        plot.draw().savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.S)
    view = re.search(r'viewBox="[^"]+"', text)
    opening = f'<svg {view[0] if view else ""} role="img" aria-label="{escape(plot.alt)}">'
    text = re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1).replace("xlink:href", "href")
    # Matplotlib before 3.11 writes one `font`, later ones `font-size` and `font-family`: the page has its own family.
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    text = re.sub(r"font: ([^;\"]*?)([\d.]+px) [^;\"]*", r"font: \1\2 system-ui, sans-serif", text)
    # Coordinates to a hundredth.
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), text)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{plot.name}-", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, f"var(--{variable})")
    return text.strip()
