"""Text that came from elsewhere: which characters hide or disturb, and how such text is shown.

Build and client refuse these characters in labels, and show them escaped in messages and on terminals.
"""

from __future__ import annotations

import re

# Control characters, the marks and overrides of writing direction, line and paragraph separators, the byte order mark,
# what Python makes of bytes that are no UTF-8, and characters without width. Joiners (U+200C, U+200D) are not among
# them: Persian and emoji need them.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


HIDDEN = "control characters, marks of writing direction or characters without width"


def has_hidden(text: str) -> bool:
    """Whether the text holds a character that nobody sees, or half a character."""
    return _HIDDEN.search(text) is not None


def escaped(text: str, keep: str = "") -> str:
    r"""The text with such characters written as \x1b or \u202e.

    Args:
        text: any text; bytes of a file name that are no UTF-8 become \xff.
        keep: characters that stay, such as a line feed.
    """
    return _HIDDEN.sub(lambda match: match[0] if match[0] in keep else _escape(ord(match[0])), text)


def _escape(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # os.fsdecode's stand-in for a byte that is no UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
