"""Decodes all images of a data set once, in parallel, and remembers what it found.

Until a file changes, it is not decoded again, in other runs neither. The memory is a
database in the cache folder. Whatever happens to it only costs time.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import PIL

from hwnas.cache import cache_folder, private_folder
from hwnas.data.decoding import RULES, Examined, examine
from hwnas.errors import StorageError
from hwnas.progress import Progress

FILE = "images-1.sqlite"
"""The database; the number is that of its tables."""

CHUNK = 64
"""Images that are decoded between two reports of progress."""

SAVE_SECONDS = 5.0
"""How often results are saved, so that a check that is interrupted continues."""

LOCKED_SECONDS = 5.0
"""How long a run waits for another one that writes at the moment."""

TABLE = """
CREATE TABLE IF NOT EXISTS images (
    folder BLOB, rules TEXT, image BLOB,
    size_bytes INTEGER, changed_ns INTEGER,
    mode TEXT, width INTEGER, height INTEGER, reason TEXT,
    PRIMARY KEY (folder, rules, image)
) WITHOUT ROWID
"""

Result = TypeVar("Result")

State: TypeAlias = tuple[int, int]
"""A file's size in bytes and the time of its last change in ns."""

Row: TypeAlias = tuple[Any, ...]


def examine_all(
    root: Path, images: Sequence[str], channels: int, progress: Progress
) -> dict[str, Examined]:
    """What ``examine`` finds in every image, by its path relative to ``root``."""
    # paths may hold bytes that are no text
    key = (os.fsencode(root.resolve()), f"{RULES} {PIL.__version__} {channels}")
    remembered = _remembered(key)
    found: dict[str, Examined] = {}
    states: dict[str, State | None] = {}
    for image in images:
        # before decoding: a file that changes in the meantime is decoded again next time
        states[image] = state = _state(f"{root}/{image}")
        known = remembered.get(image)
        if known is not None and known[0] == state:
            found[image] = known[1]

    new = [image for image in states if image not in found]
    unsaved: list[Row] = []
    saved_at = time.monotonic()
    try:
        for image, examined in _decoded(root, new, channels, progress):
            found[image] = examined
            state = states[image]
            if state is not None:
                facts = (examined.mode, examined.width, examined.height, examined.reason)
                unsaved.append((*key, os.fsencode(image), *state, *facts))
            if time.monotonic() - saved_at > SAVE_SECONDS:
                _remember(unsaved)
                unsaved.clear()
                saved_at = time.monotonic()
    finally:
        _remember(unsaved)
    return found


def _decoded(
    root: Path, images: Sequence[str], channels: int, progress: Progress
) -> Iterator[tuple[str, Examined]]:
    """Each image and what is in its file. Pillow's decoders run outside the interpreter's
    lock, so threads use all cores.
    """
    if not images:
        return
    examine_one = partial(examine, root, channels=channels)
    with (
        ThreadPoolExecutor(_cores()) as pool,
        progress.task("check images", len(images)) as task,
    ):
        for start in range(0, len(images), CHUNK):
            chunk = images[start : start + CHUNK]
            yield from zip(chunk, pool.map(examine_one, chunk), strict=True)
            task.advance(len(chunk))


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # on Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _state(path: str) -> State | None:
    """None if the file cannot be read; then there is nothing to remember."""
    try:
        # a Path for each file would double the time of a look at known files
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):  # ValueError: the name holds a NUL
        return None
    return status.st_size, status.st_mtime_ns


def _remembered(key: tuple[bytes, str]) -> dict[str, tuple[State, Examined]]:
    """What earlier runs found in the images of a folder."""
    query = (
        "SELECT image, size_bytes, changed_ns, mode, width, height, reason FROM images"
        " WHERE folder = ? AND rules = ?"
    )
    rows = _in_database(lambda database: database.execute(query, key).fetchall())
    remembered: dict[str, tuple[State, Examined]] = {}
    for image, size_bytes, changed_ns, *facts in rows or ():
        mode, width, height, reason = facts
        is_valid = isinstance(mode, str) and isinstance(width, int) and isinstance(height, int)
        # damaged values: the database does not check its content
        if is_valid and isinstance(reason, str | None):
            examined = Examined(mode, width, height, reason)
            remembered[os.fsdecode(image)] = ((size_bytes, changed_ns), examined)
    return remembered


def _remember(rows: Sequence[Row]) -> None:
    insert = "INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
    if rows:
        _in_database(lambda database: database.executemany(insert, rows))


def _in_database(work: Callable[[sqlite3.Connection], Result]) -> Result | None:
    """The result of ``work`` on the database, in one transaction; None if there is no
    usable one. A damaged database is replaced by an empty one.
    """
    try:
        path = private_folder(cache_folder()) / FILE
    except StorageError:
        return None
    for _ in range(2):
        try:
            with closing(sqlite3.connect(path, timeout=LOCKED_SECONDS)) as database, database:
                database.execute(TABLE)
                return work(database)
        except sqlite3.OperationalError:
            return None  # locked by another run for long, or the disk is full
        except sqlite3.DatabaseError:
            with suppress(OSError):
                path.unlink()
    return None
