"""The fusion report's page."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from build.reports import fusion_html
from build.reports.fusion_model import Report
from build.reports.fusion_onnxruntime import map_optimised
from build.reports.source_graph import Source
from tests.build.reports.networks import network, node, optimised, report_of
from tests.perf.test_report import CHROMIUM, browse


class Page(HTMLParser):
    """Tags that stay open, and everything that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        self.loads += [tag] if tag in ("script", "link", "iframe", "img") else []
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_html_is_whole_and_loads_nothing(shapes: Report) -> None:
    text = fusion_html.html(shapes)
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.loads == []
    assert "url(" not in text.replace("url(#plot)", "")
    assert "prefers-color-scheme:dark" in text
    pictures = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(pictures) == 2
    for picture in pictures:
        ElementTree.fromstring(picture)
    assert pictures[1].count('class="box vertical"') == 18 * 3 + 18


def test_strange_names_are_escaped(tmp_path: Path) -> None:
    nodes = [node("Relu", ["pixels"], "<script>alert('x')</script>|&")]
    source = Source(network(nodes, [nodes[0].output[0]]))
    report = report_of(source, map_optimised(source, optimised(source.model, tmp_path)))
    assert "<script>" not in fusion_html.html(report)
    Page().feed(fusion_html.html(report))


def test_without_ceilings_there_is_no_roofline(shapes: Report) -> None:
    text = fusion_html.html(dataclasses.replace(shapes, ceilings=None))
    assert len(re.findall(r"<svg.*?</svg>", text, re.S)) == 1
    assert "What bounds them" not in text
    assert fusion_html.roofline_svg(dataclasses.replace(shapes, kernels=[])) == ""


def test_a_report_of_constants_alone_has_no_graph() -> None:
    page = Page()
    page.feed(fusion_html.html(Report("test", "onnxruntime", "1", "fp32", "here", "so", [])))
    assert page.open == []


def test_every_kernel_with_a_bound_is_a_dot_and_names_lie_on_none(shapes: Report) -> None:
    picture = ElementTree.fromstring(fusion_html.roofline_svg(shapes))
    dots = [[float(dot.attrib[name]) for name in ("cx", "cy", "r")] for dot in picture.iter("circle")]
    names = [text for text in picture.iter("text") if text.get("class") == "dotname"]
    assert len(dots) == sum(bool(kernel.bound and kernel.operations) for kernel in shapes.kernels)
    assert all(64 <= x <= 1034 and 18 <= y <= 414 for x, y, _ in dots)
    assert 0 < len(names) <= 8
    for name in names:
        across, down = float(name.attrib["x"]), float(name.attrib["y"]) - 4
        half = 3 * len(name.text or "")
        assert not any(abs(x - across) < half + r and abs(y - down) < 5 + r for x, y, r in dots)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.parametrize("width", [1200, 420])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_in_a_browser(shapes: Report, tmp_path: Path, width: int, dark: bool) -> None:
    (tmp_path / "report.html").write_text(fusion_html.html(shapes))
    seen, _, log = browse(tmp_path / "report.html", tmp_path, width, dark=dark)
    assert seen["errors"] == []
    assert "CONSOLE" not in log
    assert seen["dark"] == dark
    assert seen["page"][0] <= width  # nothing makes the page itself scroll sideways
    assert seen["cut"] == 0
    assert seen["contrast"] >= 4.5  # WCAG 2.1, 1.4.3
