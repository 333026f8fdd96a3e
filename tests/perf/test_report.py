"""The report of a run: what it says, and how its page looks in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from perf import report
from tests.perf import example_run

if TYPE_CHECKING:
    from PIL.Image import Image

PLOTS = ("served", "split", "concurrency", "batch", "rate")
SECTIONS = (
    "LoadGen",
    "Served against in-process",
    "Where the time goes",
    "More clients",
    "Larger batches",
    "Requests at a given rate",
    "Protocols and shared memory",
    "Environment",
    "Settings",
)
BARS = (((47, 111, 222), (138, 75, 208)), ((108, 160, 255), (185, 139, 240)))  # --vertical and --horizontal
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def markdown(summary: dict[str, Any]) -> str:
    return report.report(summary).markdown()


def html_of(summary: dict[str, Any]) -> str:
    return report.report(summary).html()


def test_a_busy_machine_is_said() -> None:
    summary = example_run.summary()
    assert len(report.verdict(summary)) == 5
    summary["environment"]["other_load"] = 0.45
    assert report.verdict(summary)[-2].text.startswith("Other programs took 45% of the cores")


class Page(HTMLParser):
    """Tags that are still open, ids, and whatever the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.unnamed: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"]] if given.get("id") else []
        self.loads += [
            value or "" for name, value in attrs if name in ("src", "srcset", "data", "action") or name.startswith("on")
        ]
        link = given.get("href") or given.get("xlink:href") or "#"
        self.loads += [] if link.startswith(("#", "data:,")) else [link]
        if given.get("role") in ("img", "region") and not given.get("aria-label"):
            self.unnamed.append(tag)
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "link", "br"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    paths = report.report(example_run.summary()).write(folder, "report")
    assert paths == [folder / "report.md", folder / "report.html"]
    return folder


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("partial")
    report.report(example_run.partial()).write(folder, "report")
    return folder


def headings(text: str) -> list[str]:
    return [line[3:] for line in text.splitlines() if line.startswith("## ")]


def test_the_summary_comes_out_of_json_unchanged() -> None:
    summary = example_run.summary()
    assert markdown(json.loads(json.dumps(summary))) == markdown(summary)


def test_five_lines_come_first(whole: Path) -> None:
    lines = (whole / "report.md").read_text().splitlines()[4:10]
    assert lines[5] == ""
    assert lines[0].startswith("- ✓ LoadGen (unofficial): fp32 single-stream 11.6 ms; fp32 multi-stream 14.8 ms; ")
    assert "fp32 server 80 queries/s with p99 14.8 ms" in lines[0]
    assert lines[1].startswith("- ✗ Served / in-process throughput, 4 clients: fp32 shared memory 0.9")
    assert "HTTP 0.836" in lines[1]
    assert "(goal 0.85, MISSED)" in lines[1]
    assert lines[2].startswith(
        "- ✓ What serving adds to a single stream's p50: fp32 0.72 ms, int8 0.72 ms (at most 1 ms)"
    )
    assert lines[3] == "- ✓ Answers under LoadGen: 11,200 checked: 0 wrong, 0 missing."
    assert lines[4].startswith("- ✓ Complete")


def test_a_run_that_was_broken_off_says_so_and_why(broken_off: Path) -> None:
    lines = (broken_off / "report.md").read_text().splitlines()[4:8]
    assert lines[2] == "- ✗ Answers under LoadGen: 48 checked: 3 wrong, 1 missing."
    assert lines[3].startswith("- ✗ PARTIAL: tritonserver ended in the middle of 8 clients")
    titles = headings((broken_off / "report.md").read_text())
    assert not {"Larger batches", "LoadGen"} & set(titles)
    assert "PARTIAL" in (broken_off / "report.html").read_text()


@pytest.mark.parametrize(("line", "change"), [
    (0, {"precisions": {"fp32": {"served_ratio": {"shm": 0.949}}}}),
    (1, {"precisions": {"fp32": {"single_stream": {"overhead_ms": 1.01}}}}),
    (2, {"answers": {"checked": 5, "wrong": 0, "missing": 1}}),
    (3, {"complete": False}),
])  # fmt: skip
def test_what_misses_its_target_is_bad(line: int, change: dict[str, Any]) -> None:
    good = {
        "precisions": {"fp32": {"served_ratio": {"shm": 0.951}, "single_stream": {"overhead_ms": -0.2}}},
        "answers": {"checked": 5, "wrong": 0, "missing": 0},
        "complete": True,
    }
    assert report.verdict(good)[line].good is True
    assert report.verdict({**good, **change})[line].good is False


def test_nothing_measured_still_makes_a_report() -> None:
    least = {"run": "x", "model": "shapes", "complete": False, "problems": ["no server"]}
    text = markdown(least)
    assert "PARTIAL: no server" in text
    assert headings(text) == []
    assert [line.good for line in report.verdict(least)] == [None, None, None, False]
    parsed = Page()
    parsed.feed(html_of(least))
    assert parsed.open == []


@pytest.mark.parametrize("name", sorted({*example_run.summary()} - {"run", "model"}))
def test_any_part_may_be_missing(name: str) -> None:
    summary = example_run.summary()
    assert markdown({**summary, name: None})
    del summary[name]
    assert markdown(summary)


def test_a_precision_may_be_half_measured() -> None:
    summary = example_run.summary()
    summary["precisions"]["int8"] = {"single_stream": summary["precisions"]["int8"]["single_stream"]}
    del summary["mlperf"]["int8"]["offline"]
    summary["series"]["rate"] = []
    summary["series"]["concurrency"] = summary["series"]["concurrency"][:1]
    text = html_of(summary)
    assert "<svg" in text
    assert "int8 0.72 ms" in text
    assert "int8 shared memory" not in text


def test_every_section_and_figure_is_there(whole: Path) -> None:
    text = (whole / "report.md").read_text()
    assert headings(text) == list(SECTIONS)
    page = (whole / "report.html").read_text()
    assert tuple(re.findall(r'<svg[^>]*>.*?id="(\w+)-figure_1"', page, re.S)) == PLOTS
    assert all(f">{figure}<" in page for figure in ("0.977", "0.936", "0.836", "10.1 ms"))  # on the bars
    for said in ("saturates at 4 clients", "150", "VALID", "AMD EPYC 7B13"):
        assert said in text
        assert said in page


def test_the_page_is_well_formed_and_loads_nothing(whole: Path, broken_off: Path) -> None:
    for folder in (whole, broken_off):
        text = (folder / "report.html").read_text()
        page = Page()
        page.feed(text)
        assert page.open == []
        assert page.loads == []
        assert page.unnamed == []
        assert len(page.ids) == len(set(page.ids))
        assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
        assert set(re.findall(r'href="#([^"]*)"', text)) <= set(page.ids)
        assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text).replace("HTTP", "")
        assert "prefers-color-scheme:dark" in text
        assert "#0000" not in text  # the plots' stand-ins
        assert len(text) < 2_000_000


def test_strange_names_are_escaped() -> None:
    summary = example_run.summary()
    evil = "<script>alert('$x$ |\n\"')</script>"
    summary["model"] = summary["mlperf"]["fp32"]["offline"]["metric"] = evil
    summary["environment"]["cpu"] = evil
    summary["series"]["batch"][0]["label"] = evil
    text = html_of(summary)
    assert "<script" not in text
    page = Page()
    page.feed(text)
    assert page.open == []
    tables = [line for line in markdown(summary).splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_figures_that_are_not_there_become_dashes() -> None:
    summary = example_run.summary()
    summary["precisions"]["fp32"]["direct_ips"] = None
    summary["series"]["batch"][0]["latency_ms"] = {"p50": float("nan")}
    summary["series"]["batch"][1]["parts_ms"] = dict.fromkeys(summary["series"]["batch"][1]["parts_ms"], 0.0)
    summary["mlperf"]["fp32"]["server"]["figures"] = {"rate": 80.0, "bound_ms": 100.0}
    summary["mlperf"]["fp32"]["server"] |= {"value": None, "valid": False, "problems": ["2 samples without an answer"]}
    assert "fp32, server: 2 samples without an answer." in markdown(summary)
    assert report.verdict(summary)[0].good is False
    assert "nan" not in html_of(summary).lower().replace("resonance", "")


# -- in a browser ------------------------------------------------------------------------------------------------------

# Errors are collected before anything else runs, and told to the page around when all is drawn.
_PROBE = r"""<script>
const seen = {errors: []};
addEventListener("error", event => seen.errors.push(event.message));
const report = console.error;
console.error = (...words) => { seen.errors.push(words.join(" ")); report(...words); };
const channels = color => color.match(/[\d.]+/g).slice(0, 3).map(value => {
  const part = value / 255;
  return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
});
const light = color => channels(color).reduce((sum, element, i) => sum + element * [0.2126, 0.7152, 0.0722][i], 0);
const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
addEventListener("load", () => {
  const all = what => [...document.querySelectorAll(what)], box = element => element.getBoundingClientRect();
  seen.dark = matchMedia("(prefers-color-scheme: dark)").matches;
  seen.page = [document.documentElement.scrollWidth, document.documentElement.clientWidth];
  seen.height = document.documentElement.scrollHeight;
  seen.plots = all("figure svg").map(element => [box(element).width, box(element).height]);
  seen.cut = all("table, figure svg").filter(element => {
    const around = element.closest(".scroll");
    return box(element).width > around.clientWidth && getComputedStyle(around).overflowX !== "auto";
  }).length;
  const card = getComputedStyle(document.querySelector(".scroll")).backgroundColor;
  const texts = all("th, td, p, li span, a").map(element => getComputedStyle(element).color);
  seen.contrast = Math.min(...texts.map(color => contrast(color, card)));
  seen.outside = all("figure svg text").filter(element => {
    const own = box(element), around = box(element.closest("svg"));
    return own.left < around.left - 1 || own.right > around.right + 1 || own.bottom > around.bottom + 1;
  }).map(element => element.textContent);
  seen.text = all("figure svg text").length;
  parent.postMessage(JSON.stringify(seen), "*");
});
</script>"""
# Chromium makes no window as narrow as a telephone: the page stands in a frame of that width.
_FRAME = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<style>body{{margin:0}}iframe{{border:0;display:block;width:{width}px;height:{height}px}}</style>
<script>addEventListener("message", event => document.getElementById("seen").textContent = event.data)</script>
<iframe srcdoc="{page}"></iframe><pre id="seen"></pre>"""


def browse(
    page: Path, folder: Path, width: int, *, dark: bool, height: int = 8000
) -> tuple[dict[str, Any], Image, str]:
    """What the probe saw in a page, how it looks, and what the browser wrote."""
    import PIL.Image

    assert CHROMIUM is not None
    probed = page.read_text().replace("<head>", f"<head>{_PROBE}", 1)
    frame, shot = folder / "frame.html", folder / "shot.png"
    frame.write_text(_FRAME.format(width=width, height=height, page=html.escape(probed)))
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--enable-logging=stderr", "--v=0", f"--blink-settings=preferredColorScheme={0 if dark else 1}"),
            *(f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 600)},{height}"),
            *(f"--screenshot={shot}", "--dump-dom", frame.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    told = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert told, done.stderr
    seen: dict[str, Any] = json.loads(html.unescape(told[1]))
    with PIL.Image.open(shot) as picture:
        return seen, picture.convert("RGB").crop((0, 0, width, min(height, seen["height"]))), done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.parametrize(
    ("width", "dark"),
    [
        pytest.param(1200, False, id="light"),
        pytest.param(420, True, id="telephone, dark"),
        pytest.param(1200, True, id="dark", marks=pytest.mark.long),
        pytest.param(420, False, id="telephone, light", marks=pytest.mark.long),
    ],
)
def test_the_page_in_a_browser(whole: Path, tmp_path: Path, width: int, dark: bool) -> None:
    seen, picture, said = browse(whole / "report.html", tmp_path, width, dark=dark)
    assert seen["errors"] == []
    assert "CONSOLE" not in said
    assert seen["dark"] == dark
    assert seen["page"][1] == width
    assert seen["page"][0] <= width  # nothing makes the page itself scroll sideways
    assert seen["cut"] == 0
    assert len(seen["plots"]) == len(PLOTS)
    assert all(min(size) > 100 for size in seen["plots"])
    assert seen["text"] > 200
    assert seen["outside"] == []
    assert seen["contrast"] >= 4.5  # WCAG 2.1, 1.4.3
    colors = picture.getcolors(1 << 24)
    assert colors is not None
    assert len(colors) > 500
    (_, ground), (_, second) = sorted(colors, reverse=True)[:2]
    assert (max(ground) < 60 and max(second) < 60) if dark else (min(ground) > 240 and min(second) > 240)
    for hue in BARS[dark]:  # every bar of the first plot, drawn in this scheme's colours
        assert any(
            max(abs(a - b) for a, b in zip(color, hue, strict=True)) < 24 for count, color in colors if count > 200
        )


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: chromium, chromium-browser or google-chrome on PATH")
def test_the_browser_test_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        '<html><head></head><body><div class="scroll" style="background:#fff;width:300px"><table style="width:2000px">'
        '<tr><td style="color:#777">a</td></tr></table></div><script>console.error("oh"); nowhere()</script></body>'
        "</html>"
    )
    seen, _, said = browse(page, tmp_path, 420, dark=False, height=600)
    assert seen["page"][0] > 420
    assert seen["cut"] == 1
    assert seen["contrast"] < 4.5
    assert len(seen["errors"]) == 2
    assert "CONSOLE" in said
