"""What devices and their programs say, made fit for a sentence of ours."""

from __future__ import annotations

from hwnas.printable import printable

LIMIT = 600
"""The longest text of a device that is shown in full, in characters."""


def excerpt(text: str, limit: int = LIMIT) -> str:
    """Text of a device on one line, with its control characters as escapes.

    Text longer than ``limit`` loses its middle: messages of C++ begin with what was
    attempted and end with why it failed.

    Example:
        >>> excerpt("cannot load\\n   x.onnx")
        'cannot load x.onnx'
    """
    line = printable(" ".join(text.split()))
    if len(line) <= limit:
        return line
    return f"{line[: limit // 3]} ... {line[-(2 * limit // 3) :]}"


def last_line(text: str) -> str:
    """The ``excerpt`` of the last line that is not blank; empty if there is none."""
    lines = [line for line in text.splitlines() if line.strip()]
    return excerpt(lines[-1]) if lines else ""
