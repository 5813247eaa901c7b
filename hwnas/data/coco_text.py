"""The text of COCO annotation files, which is parsed in pieces.

COCO's own file for training is 450 MB, most of it the outlines of its 860,000 objects,
and as Python objects it would take 4 GB. So the outlines, which nobody needs for boxes,
are cut out of the text first. Then the list of objects is parsed in pieces, each of which
is reduced to what is needed of it before the next is parsed.

Neither needs to understand the whole text, because a mistake about it is noticed:

- What is cut out is the beginning of a list up to some closing bracket before the next
  key or brace. If it is not all of the list, the brackets that remain do not match, and
  the text is parsed again without cutting.
- Text up to the end of some object is a piece if it parses as a list when it is put into
  brackets. Then its own brackets match, so what remains without it is still JSON.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic_core import from_json

from hwnas.document import decoded_text, uncollected
from hwnas.errors import DataError

BLOCK_BYTES = 2**25
"""How much is read at once."""

PIECE_BYTES = 2**17
"""Least size of a piece: small enough for the processor's caches."""

CUTS = 16
"""How many ends of objects are tried for a piece, before the rest is parsed as a whole."""

CONTEXT = 40
"""Characters before a mistake that a message shows."""

_OUTLINE = re.compile(rb'"segmentation"\s*:\s*\[[0-9eE+.,\-\s\[\]]*\]')
"""The outline of an object as lists of coordinates, with its key."""

_BETWEEN = re.compile(rb"\}\s*,\s*(?=\{)")
"""From the end of an object to the beginning of the next."""

_LEFT_OUT = "..."
"""What stands in a list for the pieces that were taken out of it."""

Piece = TypeVar("Piece")


def parsed(path: Path, key: str, convert: Callable[[list[Any]], Piece]) -> tuple[Any, list[Piece]]:
    """The content of a JSON file, and the pieces that were taken out of its list ``key``
    in the order of the list, all converted. The rest of the list is in the content.

    In place of lists of numbers with the key ``segmentation``, there may be a 0. ``convert``
    gets lists of entries, and sometimes in vain; it must not raise.

    Raises DataError if the file cannot be read, is not JSON, or holds what Python cannot
    represent: an integer of thousands of digits, lists nested too deeply.
    """
    try:
        with uncollected():
            try:
                return _parsed(_without_outlines(path), key, convert)
            except ValueError:
                # something is wrong with the text, or else with what was cut out of it
                return _parsed(path.read_bytes(), key, convert)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check data.path.") from error
    except RecursionError as error:
        raise DataError(
            f"{path} has lists or objects nested too deeply to be COCO's format: it is corrupt;"
            " unpack or export it again."
        ) from error
    except json.JSONDecodeError as error:
        before = error.doc[max(0, error.pos - CONTEXT) : error.pos]
        place = f"after {before!r}" if before else "at its beginning"
        raise DataError(
            f"{path} is not JSON ({error.msg} {place}): it is corrupt or was cut off; unpack or"
            " export it again."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not JSON ({error.reason} for {error.encoding}): it is corrupt or has"
            " another"
            " encoding; export it again as UTF-8."
        ) from error
    except ValueError as error:
        # Python converts no text of more digits
        raise DataError(
            f"{path} has an integer of more than {sys.get_int_max_str_digits()} digits: correct"
            " it or export it again."
        ) from error


def _parsed(
    content: bytes, key: str, convert: Callable[[list[Any]], Piece]
) -> tuple[Any, list[Piece]]:
    pieces, rest = _pieces(content, key, convert)
    document = _loaded(rest)
    if not pieces:
        return document, []
    entries = document.get(key) if isinstance(document, dict) else None
    if isinstance(entries, list) and entries[:1] == [_LEFT_OUT]:
        del entries[0]
        return document, pieces
    # they were those of another list, deeper in the file
    return _loaded(content), []


def _without_outlines(path: Path) -> bytes:
    """The text of a JSON file with 0 in place of each outline. Text that is not UTF-8
    remains as it is.
    """
    parts: list[bytes] = []
    rest = b""
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            block = rest + block
            # there is no brace in an outline, so this cuts none in two
            end = block.rfind(b"}") + 1
            parts.append(_OUTLINE.sub(b'"segmentation":0', block[:end]))
            rest = block[end:]
    return b"".join((*parts, rest))


def _pieces(
    content: bytes, key: str, convert: Callable[[list[Any]], Piece]
) -> tuple[list[Piece], bytes]:
    """The converted pieces of the list ``key``, and the text without them."""
    pieces: list[Piece] = []
    opening = re.search(rb'"%s"\s*:\s*\[' % key.encode(), content)
    if opening is None:
        return pieces, content
    end = opening.end()
    while (found := _next_piece(content, end)) is not None:
        entries, end = found
        pieces.append(convert(entries))
    if not pieces:
        return pieces, content
    left_out = json.dumps(_LEFT_OUT).encode()
    return pieces, b"".join((content[: opening.end()], left_out, b", ", content[end:]))


def _next_piece(content: bytes, begin: int) -> tuple[list[Any], int] | None:
    """The entries of the piece of a list that begins at this place of the text, and the
    place of the entry that follows them; None if there is no such piece.
    """
    cuts = _BETWEEN.finditer(content, begin + PIECE_BYTES)
    for cut in islice(cuts, CUTS):
        # with the brace, without the comma
        entries = _list_of(content[begin : cut.start() + 1])
        if entries is not None:
            return entries, cut.end()
    return None


def _list_of(text: bytes) -> list[Any] | None:
    """The entries of a list without its brackets; None if it does not parse."""
    try:
        entries: list[Any] = from_json(b"[%s]" % text, cache_strings="keys")
    except ValueError:
        return None
    return entries


def _loaded(content: bytes) -> Any:
    try:
        return from_json(content, cache_strings="keys")
    except ValueError:
        # slower, but it knows more encodings, and its errors tell the place
        return json.loads(decoded_text(content))
