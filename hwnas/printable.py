"""Text from files on its way to a terminal, a page or a message.

Names, labels and paths come from files that somebody else may have written. Control
characters in them could move the cursor, recolour the terminal or reverse the reading
direction of what follows, and thus show another text than the file holds.
"""

from __future__ import annotations

from typing import Any

_KEPT = "\t\n"
"""Control characters that our own messages and tables consist of."""

_CONTROLS = (
    range(0x20),  # C0
    range(0x7F, 0xA0),  # DEL and C1
    (0x061C, 0x200E, 0x200F),  # marks of reading direction
    range(0x2028, 0x202F),  # separators of lines and paragraphs, embeddings and overrides
    range(0x2066, 0x206A),  # isolates
    range(0xD800, 0xE000),  # halves of surrogate pairs, which no terminal can be sent
    (0xFEFF,),  # the byte order mark
)

# The escapes are those of JSON, so that an escaped JSON document is still that document.
_ESCAPES = {
    code: f"\\u{code:04x}" for codes in _CONTROLS for code in codes if chr(code) not in _KEPT
}


def printable(text: str) -> str:
    """The text with control characters and those that change the reading direction as
    escapes. Line breaks and tabs stay.

    Example:
        >>> printable("cat\\x1b[2J")
        'cat\\\\u001b[2J'
    """
    return text.translate(_ESCAPES)


LONGEST_LINE = 2000
"""Characters of the longest line. A name from a file may be as long as the file."""


def one_line(text: str) -> str:
    """``printable`` without line breaks and with an ellipsis in the middle if the text is
    very long, for a sentence about names of any kind.
    """
    line = printable(" ".join(text.split("\n")))
    if len(line) <= LONGEST_LINE:
        return line
    half = LONGEST_LINE // 2
    return f"{line[:half]} ... {line[-half:]}"


def shortened(text: str, longest: int = 80) -> str:
    """The beginning of a text that is longer than ``longest`` characters."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def quoted(value: Any, longest: int = 60) -> str:
    """A value as Python writes it, shortened to ``longest`` characters, for messages."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = "a number of thousands of digits"
    except RecursionError:
        text = "a value that is nested too deeply"
    return shortened(text, longest)
