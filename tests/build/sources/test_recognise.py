"""Families are tried in their order, or the one that is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from build.errors import ImportModelError, OptionError
from build.files import ROOT
from build.sources.foreign import Wishes
from build.sources.recognise import FAMILIES
from tests.build.sources.checks import check, imported
from tests.build.sources.layouts import Layout
from tests.build.sources.layouts_without_nms import yolo
from tests.build.sources.networks import BOXES, Network


def test_every_family_is_explained_and_named_once() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert all(family.about for family in FAMILIES)


def test_a_family_can_be_named(tmp_path: Path) -> None:
    layout = yolo()
    layout.wishes = Wishes(family="yolo")
    check(layout, tmp_path)
    layout.wishes = Wishes(family="caffe-ssd")
    with pytest.raises(ImportModelError, match="is no caffe-ssd; it has the outputs 'output0'"):
        imported(layout, tmp_path)
    layout.wishes = Wishes(family="cafe")
    with pytest.raises(OptionError, match="must be one of caffe-ssd"):
        imported(layout, tmp_path)


def test_an_operator_that_chooses_boxes_is_named(tmp_path: Path) -> None:
    net = Network({"box": 4, "cls": 3})
    net.out(net.add("MulticlassNms3", net.rows("box"), net.rows("cls")), "rows", ["batch", BOXES, 9])
    with pytest.raises(ImportModelError):
        imported(Layout(net.build(), 3, lambda x: (x, x), ""), tmp_path)


def test_the_guide_lists_the_families() -> None:
    text = (ROOT / "docs" / "import.md").read_text(encoding="utf-8")
    section = text.split("## Families")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([a-z-]+)` \|", section, re.M) == [family.name for family in FAMILIES]
