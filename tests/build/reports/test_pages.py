"""What the reports share: figures, tables, and the page that they stand on."""

from __future__ import annotations

from pathlib import Path

import pytest

from build.reports.pages import Table, number, render


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (None, 3, ""),
        (0.0, 3, "0"),
        (1234.5, 3, "1,234"),
        (12.345, 3, "12.3"),
        (0.00123456, 2, "0.0012"),
        (-2.5, 2, "-2.5"),
    ],
)
def test_a_figure_has_its_digits_and_no_exponent(value: float | None, digits: int, text: str) -> None:
    assert number(value, digits) == text


def test_a_table_in_markdown_keeps_one_line_per_row() -> None:
    table = Table(("name", "ms"), [("a|b\nc", "1")])
    assert table.markdown() == ["| name | ms |", "| --- | --- |", "| a\\|b c | 1 |"]


def test_only_columns_with_long_words_are_broken_into_lines() -> None:
    table = Table(("name", "words", "ms"), [("x" * 61, "y", "z" * 61)], words=2)
    assert table.styles == ["long", "words", "figure"]
    assert Table(("name",), []).styles == ["words"]


def test_a_page_escapes_its_values_and_misses_none(tmp_path: Path) -> None:
    template = tmp_path / "page.html"
    template.write_text('{% extends "base.html" %}{% block main %}<p title="{{ text }}">{{ text }}</p>{% endblock %}')
    page = render(template, text="<b>'\"")
    assert '<p title="&lt;b&gt;&#39;&#34;">&lt;b&gt;&#39;&#34;</p>' in page
    assert page.startswith("<!doctype html>")
    with pytest.raises(Exception, match="'text' is undefined"):
        render(template)
