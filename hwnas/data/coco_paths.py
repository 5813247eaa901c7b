"""Where the images of an annotation file are, whose names may come from other computers.

A name is a path below the folder of the images. The first of these that exists is the
image:

1. the name itself;
2. with slashes for backslashes, which separate folders on Windows;
3. with percent signs decoded, as in URLs (``a%20b.jpg``);
4. without what comes before a second mention of the folder, as in ``train/a.jpg`` or
   ``C:\\data\\train\\a.jpg`` for the folder ``train``.

Names that lead out of the folder are refused, because annotation files are passed on,
and nothing in them should decide which files are read. ``data.allow_outside`` permits
them. Symbolic links in the folder are the user's own and are followed.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

from hwnas.errors import DataError
from hwnas.printable import quoted

LONGEST_NAME = 200
"""Characters of a name that a message shows."""


def image_paths(
    names: Sequence[str],
    folder: Path,
    annotations: Path,
    *,
    skip: Collection[str],
    allow_outside: bool,
) -> list[str]:
    """The paths of the images with these file names, relative to the parent of their
    ``folder``; absolute ones outside it. Images in ``skip``, which are such paths, need
    not exist.

    Raises DataError if an image does not exist, or if a name leads out of the folder
    and ``allow_outside`` is not set.
    """
    files = _Files(folder)
    found: list[str] = []
    missing: list[str] = []
    outside: list[str] = []
    for name in names:
        spellings = _spellings(name)
        candidates = list(_candidates(spellings, folder, allow_outside))
        path = _first(candidates, files, skip)
        if path is not None:
            found.append(path)
        elif not allow_outside and any(_below(spelt, folder) is None for spelt in spellings):
            outside.append(name)
        else:
            missing.append(name)

    if outside:
        raise DataError(
            f"{annotations} has file names that lead out of {folder} ({len(outside)} of"
            f" {len(names)}, first: {quoted(outside[0], LONGEST_NAME)}): put these images into that"
            " folder and correct the names, or set"
            " data.allow_outside = true if you trust the file."
        )
    if missing:
        raise DataError(
            f"{annotations} names {len(names)} images, of which {len(missing)} are not in"
            f" {folder} (first: {quoted(missing[0], LONGEST_NAME)}): {_cure(missing[0], files)}."
        )
    return found


class _Files:
    """The files in the images' folder, whose directories are listed when they are asked
    for: one by one, 118,000 files would take seconds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._listed: dict[str, frozenset[str]] = {}

    def lists(self, path: str) -> bool:
        """Whether the directory of ``path``, relative to the folder, lists such a file."""
        directory, _, name = path.rpartition("/")
        if directory not in self._listed:
            self._listed[directory] = self._list(directory)
        return name in self._listed[directory]

    def has(self, path: str) -> bool:
        """Whether such a file can be found; on some systems it may be listed in other
        letters. ``path`` may be absolute.
        """
        try:
            return (self.folder / path).is_file()
        except (OSError, ValueError):  # too long, with a NUL, without permission
            return False

    def _list(self, directory: str) -> frozenset[str]:
        names = []
        try:
            with os.scandir(self.folder / directory) as entries:
                for entry in entries:
                    if entry.is_file():
                        names.append(entry.name)
        except (OSError, ValueError):
            pass  # ``has`` may still find them
        return frozenset(names)


def _spellings(name: str) -> list[str]:
    """A file name as a path: as it is, with slashes for backslashes, and decoded."""
    spellings = [name]
    if "\\" in name:
        spellings.append(name.replace("\\", "/"))
    if "%" in name:
        spellings.append(unquote(spellings[-1]))
    return [posixpath.normpath(spelling) for spelling in spellings]


def _candidates(spellings: Sequence[str], folder: Path, allow_outside: bool) -> Iterator[str]:
    """The paths that a file name may mean, relative to the images' folder, in order."""
    for path in spellings:
        below = _below(path, folder)
        if below is not None:
            yield below
        elif allow_outside:
            yield path
    for path in spellings:
        # the last mention: folders above may have the same name
        _, mention, rest = f"/{path}".rpartition(f"/{folder.name}/")
        if mention:
            yield rest


def _below(path: str, folder: Path) -> str | None:
    """A normalised path relative to the folder, None if it leads out of it."""
    if path.startswith("/"):
        # as it was written on this computer
        above = f"{folder.absolute()}/"
        return path.removeprefix(above) if path.startswith(above) else None
    if path == ".." or path.startswith("../"):
        return None
    return path


def _first(candidates: Sequence[str], files: _Files, skip: Collection[str]) -> str | None:
    """The first image that is on disk or in ``skip``, relative to the parent of the
    images' folder; None if there is none.
    """
    for exists in (files.lists, files.has):
        for candidate in candidates:
            path = posixpath.join(files.folder.name, candidate)
            if exists(candidate) or path in skip:
                return path
    return None


def _cure(name: str, files: _Files) -> str:
    """What to do about a missing image."""
    plain = unquote(name.replace("\\", "/")).rpartition("/")[2]
    if plain != name and files.lists(plain):
        return (
            f"{quoted(plain, LONGEST_NAME)} is there, so take the folders out of the file names, or"
            " move the images"
            " into such folders"
        )
    if "\\" in name:
        return (
            "its file names have backslashes, and no file is there with slashes instead, either;"
            " add the images there, or correct the names"
        )
    return "add them there, or remove them from the file"
