"""Text that others supply, made fit to be stored, logged and shown.

A terminal obeys control characters: an escape sequence in a name can fill the clipboard (OSC 52),
hide what follows, or answer as if somebody had typed (ECMA-48, 8.3 and XTerm's "Control
Sequences"); a newline forges a line of a log; an override of the writing direction (UAX #9) shows
a name backwards.  None of them has a place in a name.
"""

from __future__ import annotations

import re
from typing import Final

LONGEST: Final = 500
"""Characters of a name, a path or a sentence that are kept, unless a caller needs more."""

_STRINGS = r"(?:\x1b[\]P_^X]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x80-\x9f]*(?:\x07|\x1b\\|\x9c)"
_SEQUENCES = r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
_ESCAPE = re.compile(f"{_STRINGS}|{_SEQUENCES}|\x1b[ -/]*[0-~]")
"""A string that is addressed to the terminal (OSC, DCS, APC, PM, SOS), a control sequence (CSI), or
another escape sequence, in their 7-bit and 8-bit forms."""


def plain(text: str, longest: int = LONGEST) -> str:
    """Return one line without anything that a terminal obeys, of at most `longest` characters.

    Escape sequences are taken out whole; white space of other kinds becomes a space, and whatever
    else cannot be printed (control and format characters, lone surrogates) is replaced by U+FFFD,
    so that nobody takes the rest for what was written.  Text that is cut ends in "…".
    """
    if not text.isprintable():
        # What is far beyond the limit need not be looked at.
        text = _ESCAPE.sub("", text[: 8 * longest])
        text = "".join(one if one.isprintable() else _instead(one) for one in text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _instead(character: str) -> str:
    return " " if character.isspace() else "\N{REPLACEMENT CHARACTER}"


def plain_lines(text: str, longest: int = LONGEST) -> str:
    """Return a text of several lines, each of them made plain."""
    return "\n".join(plain(line, longest) for line in text.split("\n"))
