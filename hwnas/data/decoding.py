"""Image files as pixels: what Pillow, and so torchvision, makes of a file, except where
that would be silently wrong.

========================  ============================================================
stored as                 becomes
========================  ============================================================
8 bits, colour or grey    itself, as RGB or as grey (weights of ITU-R 601-2)
16-bit colour             its high bytes (Pillow's own reading)
16-bit grey               its high bytes, so that 65535 becomes 255. Pillow clips at 255
                          instead: nearly every pixel would be white.
32-bit integers           the same, for values from 0 to 65535; others are refused
floating point            refused: the value of white is not known
PostScript                refused: it is a program, which Pillow would run
palette                   its colours
transparency, alpha       dropped; the colour below it remains, whatever it is
CMYK, YCbCr, 1 bit        Pillow's conversion
animation, several pages  the first picture
========================  ============================================================

The EXIF orientation is ignored, as in torchvision: pixels stay where they are stored.

Files with more than 179 million pixels are refused. That is Pillow's limit
(``2 * Image.MAX_IMAGE_PIXELS``), from half of which on it warns.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from hwnas.data.wording import shown
from hwnas.errors import UnreadableImageError

RULES = 1
"""Number of the rules above. A change of them makes earlier results of ``examine`` stale."""

SHRUNK_FIRST = ("L", "RGB", "CMYK", "YCbCr")
"""The modes that are shrunk before they are converted, which saves time. The order makes
no difference to their pixels beyond rounding. A palette's numbers cannot be averaged, and
averages with alpha would leave out what is transparent.
"""

LONGEST_REASON = 80
"""Characters of a message of Pillow that are shown."""

EXAMINED_PIXELS = 64
"""``examine`` shrinks images to this many pixels a side. libjpeg still reads every byte of
a file, but computes fewer pixels from them.
"""


@dataclass(frozen=True)
class Examined:
    """What is known about a file after decoding it once.

    ``reason`` tells in a few words why it does not decode; None if it does. ``mode`` is
    Pillow's, "" if not even that could be read, and ``width`` and ``height`` are in
    pixels as stored, then 0.
    """

    mode: str = ""
    width: int = 0
    height: int = 0
    reason: str | None = None


class _UndecodableError(Exception):
    """Its text is the reason, in a few words."""


def decode(
    root: Path, image: str, channels: int, *, most: int | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """The image in the file ``root / image``, in mode RGB for 3 ``channels`` or L for 1,
    and its (width, height) in pixels as stored. Images larger than ``most`` pixels a side
    are shrunk while decoding, keeping their aspect ratio.

    Raises UnreadableImageError, in one sentence, if the file is missing, is not a regular
    file, or does not decode.
    """
    path = root / image
    try:
        with _opened(path) as opened:
            stored = opened.size
            return _converted(opened, channels, most), stored
    except Exception as error:  # Pillow's parsers raise whatever a damaged file leads to
        if _is_of_the_machine(error):
            raise
        raise UnreadableImageError(
            f"image {shown(str(path))} does not decode ({_reason(error)}): replace or remove it, or"
            " set data.unreadable = 'skip'.",
            image,
        ) from error


def examine(root: Path, image: str, channels: int) -> Examined:
    """Decode the file ``root / image`` as ``decode`` does, for what there is to know about
    it. Does not raise, whatever the file holds.
    """
    mode, size = "", (0, 0)
    try:
        with _opened(root / image) as opened:
            mode, size = opened.mode, opened.size
            _converted(opened, channels, EXAMINED_PIXELS)
    except Exception as error:  # as in ``decode``
        if _is_of_the_machine(error):
            raise
        return Examined(mode, *size, _reason(error))
    return Examined(mode, *size)


def _is_of_the_machine(error: Exception) -> bool:
    """Whether an error says nothing about the file: memory or open files have run out."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    return isinstance(error, MemoryError)


def _opened(path: Path) -> Image.Image:
    """The image in a file, whose pixels have not been read yet."""
    # opening a named pipe would wait for its other end
    if not path.is_file():
        raise _UndecodableError("not a regular file" if path.exists() else "missing")
    if path.stat().st_size == 0:
        raise _UndecodableError("empty")
    return Image.open(path)


def _converted(opened: Image.Image, channels: int, most: int | None) -> Image.Image:
    """An opened image in mode RGB or L, shrunk to at most ``most`` pixels a side."""
    if opened.format == "EPS":
        # Pillow would have Ghostscript run it
        raise _UndecodableError("PostScript, a program")
    if 0 in opened.size:
        raise _UndecodableError("without pixels")
    if opened.mode == "F":
        raise _UndecodableError("floating-point values: save it with 8 or 16 bits")
    shrunk_first = opened.mode in SHRUNK_FIRST
    if shrunk_first:
        _shrink(opened, most)
    opened.load()

    converted = opened
    if opened.mode.startswith("I"):
        converted = _of_8_bits(opened)
    elif opened.mode not in ("L", "RGB"):
        # The colours are kept whatever their transparency is, so Pillow need not convert
        # it, too. For some palettes it would warn.
        opened.info.pop("transparency", None)
        # as torchvision, by way of the colours also to grey
        converted = opened.convert("RGB")
    converted = converted.convert("RGB" if channels == 3 else "L")
    if not shrunk_first:
        _shrink(converted, most)
    return converted


def _shrink(image: Image.Image, most: int | None) -> None:
    """Shrink an image in place to at most ``most`` pixels a side."""
    if most is not None:
        image.thumbnail((most, most), Image.Resampling.BILINEAR)


def _of_8_bits(image: Image.Image) -> Image.Image:
    """The high bytes of an image of 16 bits (modes I;16, I;16B, I), in mode L."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise _UndecodableError(f"values from {low} to {high}, not of 8 or 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _reason(error: Exception) -> str:
    """Why a file does not decode, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"  # its text has only the path
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels"
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror  # without the path
    if "truncated" in text.lower():
        return "truncated"
    text = shown(" ".join(text.split())) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 3]}..."
