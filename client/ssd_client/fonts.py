"""The font and the words for a label on a picture: never the empty box that a font draws for a missing character."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

from PIL import ImageFont

from .text import escaped

Font: TypeAlias = "ImageFont.FreeTypeFont | ImageFont.ImageFont"

# Looked for in the system's folders, after Pillow's own font and matplotlib's DejaVu.
_SYSTEM_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "LiberationSans-Regular.ttf"),
    *("wqy-zenhei.ttc", "Arial Unicode.ttf", "arial.ttf", "msgothic.ttc"),
)
_MISSING = "\uffff"  # is no character, so every font draws its box for it


def fitting(text: str, size: int) -> tuple[Font, str]:
    """A font of this size that has every character of the text; without one, the text in characters that it has.

    Args:
        text: a label with its score.
        size: in pixels.

    Returns:
        The font, and what to draw.
    """
    text = escaped(unicodedata.normalize("NFC", text))
    fonts = _fonts(size)
    for font in fonts:
        if all(_has(font, character) for character in text):
            return font, text
    best = max(fonts, key=lambda font: sum(_has(font, character) for character in text))
    return best, "".join(_replacement(best, character) for character in text)


@lru_cache(maxsize=8)
def _fonts(size: int) -> tuple[Font, ...]:
    fonts: list[Font] = [ImageFont.load_default(size=size)]
    matplotlib = find_spec("matplotlib")
    own = (
        Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf" if matplotlib and matplotlib.origin else ""
    )
    for name in filter(None, (str(own), *_SYSTEM_FONTS)):
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:  # not on this machine
            continue
    return tuple(fonts)


@lru_cache(maxsize=4096)
def _has(font: Font, character: str) -> bool:
    return character.isspace() or bytes(font.getmask(character)) != bytes(font.getmask(_MISSING))


def _replacement(font: Font, character: str) -> str:
    """The character, its plain letters (an e for é), or its number."""
    letters = "".join(c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c))
    latin = re.match(r"LATIN (SMALL|CAPITAL) LETTER (\w\w?)\b", unicodedata.name(character, ""))
    named = "" if latin is None else latin[2].lower() if latin[1] == "SMALL" else latin[2].capitalize()
    for candidate in (character, letters, character.casefold(), named):
        if candidate and all(_has(font, each) for each in candidate):
            return candidate
    return f"U+{ord(character):04X}"
