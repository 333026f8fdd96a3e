"""What the reports share: figures, tables, and the page that they stand on."""

from __future__ import annotations

import pytest

from build.reports.html import Table, number, page, tag


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
    table = Table(("name", "words", "ms"), [("x" * 61, "y", "z" * 61)], words=2).html("a label")
    assert 'class="scroll" tabindex="0" role="region" aria-label="a label"' in table
    assert '<th class="long">name</th><th class="words">words</th><th>ms</th>' in table
    assert '<td class="words">y</td>' in table
    assert '<th class="words">name</th>' in Table(("name",), []).html("")


def test_everything_but_html_is_escaped() -> None:
    text = "<b>'\""
    assert tag("p", text, tag("i", "&"), title=text, aria_label="x", class_="y") == (
        '<p title="&lt;b&gt;&#x27;&quot;" aria-label="x" class="y">&lt;b&gt;&#x27;&quot;<i>&amp;</i></p>'
    )
    whole = page(text, "a{color:red}", [tag("p", "a"), tag("p", "b")])
    assert whole.startswith('<!doctype html>\n<html lang="en"><head>')
    assert "<title>&lt;b&gt;&#x27;&quot;</title>" in whole
    assert "a{color:red}</style>" in whole
    assert "<main><p>a</p>\n<p>b</p></main>" in whole
