"""Characters that hide or disturb: refused in labels, escaped where they are shown."""

from __future__ import annotations

import json
import os

import pytest
from ssd_client import ModelConfig, ModelConfigError, SSDClientError
from ssd_client.text import escaped, has_hidden

from tests.client.conftest import PARAMETERS

HIDDEN = [
    "\x00",
    "\x1b",
    "\r",
    "\n",
    "\x7f",
    "\x9b",
    "\u200f",
    "\u202e",
    "\u2066",
    "\u2028",
    "\ufeff",
    "\udcff",
    "\x85",
    "\u00ad",
    "\u200b",
    "\u2060",
    "\U000e0041",
]


@pytest.mark.parametrize("character", HIDDEN)
def test_hidden_characters(character: str) -> None:
    assert has_hidden(f"a{character}b")
    shown = escaped(f"a{character}b")
    assert shown.isascii()
    assert shown.isprintable()
    with pytest.raises(ModelConfigError, match=r"parameter 'labels' .* marks of writing direction"):
        ModelConfig.from_triton("m", 8, {**PARAMETERS, "labels": json.dumps([f"a{character}"])})
    with pytest.raises(ModelConfigError, match="parameter 'precision'"):
        ModelConfig.from_triton("m", 8, {**PARAMETERS, "precision": f"fp{character}32"})


@pytest.mark.parametrize("text", ["circle", "Überweg 人 🙂", "ключ", "नमस्ते", "👨\u200d👩\u200d👧", "a b"])
def test_other_texts_stay(text: str) -> None:
    assert not has_hidden(text)
    assert escaped(text) == text
    assert ModelConfig.from_triton("m", 8, {**PARAMETERS, "labels": f'["{text}"]'}).labels == (text,)


def test_forms() -> None:
    assert escaped("\x1b[31m\u202e" + os.fsdecode(b"\xff") + "\n", keep="\n") == "\\x1b[31m\\u202e\\xff\n"
    assert str(SSDClientError("a\x1b", why="b\u202e", fix="c\td")) == (
        "a\\x1b\nlikely because: b\\u202e\nwhat to do: c\\x09d"
    )
