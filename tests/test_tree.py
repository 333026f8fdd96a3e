"""The tests mirror the tree, and the traps of a folder called `build` stay shut."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_pytest_collects_the_tests_of_build() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "long or not long", "tests"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    collected = {line.split("::")[0] for line in listed.splitlines() if "::" in line}
    assert {str(p.relative_to(ROOT)) for p in ROOT.glob("tests/**/test_*.py")} == collected


def test_ruff_and_git_see_build() -> None:
    ignored = subprocess.run(
        ["git", "check-ignore", "build/spec.py", "tests/build/x.py"], cwd=ROOT, capture_output=True
    )
    assert ignored.returncode == 1, "git ignores build/"
    assert '"build"' not in (ROOT / "pyproject.toml").read_text().split("[tool.ruff]")[1].split("[tool.ruff.lint]")[0]


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("build", {"perf", "deploy"}),  # of the client, what tests/build/test_imports.py allows
        ("client", {"build", "deploy", "perf", "models"}),
        ("deploy", {"perf", "models", "ssd_client"}),
        ("models", {"build", "deploy", "perf", "ssd_client"}),
    ],
)
def test_nobody_imports_what_the_design_forbids(folder: str, forbidden: set[str]) -> None:
    sources = list((ROOT / folder).rglob("*.py"))
    assert sources
    for source in sources:
        assert not _imports(source) & forbidden, source


def test_invoke_lists_its_tasks_in_under_a_second() -> None:
    def listing() -> float:
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "invoke", "--list"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "demo" in done.stdout
        assert "build-engines" in done.stdout
        return time.perf_counter() - started

    assert min(listing() for _ in range(3)) < 1.0


@pytest.mark.parametrize("heavy", ["onnx", "onnxruntime", "torch", "tensorrt", "matplotlib", "tritonclient", "numpy"])
def test_tasks_import_nothing_heavy(heavy: str) -> None:
    code = f"import tasks, sys; raise SystemExit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_texts_are_read_with_or_without_a_byte_order_mark() -> None:
    """Windows editors write one; read as plain UTF-8 it becomes part of the first label or breaks JSON and TOML."""
    others = (  # not written by hand, or read by Triton as well, which takes none
        *("/proc", "/sys", '"maps"', "TRITON_VERSION", "stamp", "log_path", "end_profiling", "CONFIG", "_MARK"),
        *("text_format.Parse", "path.read_text().splitlines()[0]", "host, process = ", "_lock_file", "LOCK", "PAGE"),
        *("_CLIENT", "NvInferVersion.h"),
    )
    for folder in ("build", "client"):
        for source in (ROOT / folder).rglob("*.py"):
            for line in source.read_text().splitlines():
                if ".read_text(" in line and not any(word in line for word in others):
                    assert 'encoding="utf-8-sig"' in line, f"{source}: {line.strip()}"


PAGES = [
    path
    for folder in (".", "client", "docs", "model_repository", "models", "models/shapes", "plugins")
    for path in sorted((ROOT / folder).glob("*.md"))
]


def _anchors(page: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target.read_text()), link


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rows_of_a_table_have_as_many_cells_as_its_head(page: Path) -> None:
    cells = 0
    for line in page.read_text().splitlines():
        count = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not (cells and count) or count == cells, line
        cells = count
