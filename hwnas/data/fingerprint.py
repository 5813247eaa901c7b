"""Fingerprints of data sets: how a stage knows that the images which it reads have
changed.

A fingerprint covers what one part of a data set consists of, and nothing else: another
spelling of ``data.path``, stray files, or images of the other part leave it as it is.
It does not read photographs, which would take hours for a large data set: of those,
names and sizes count; of arrays and annotations, the contents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, TypeAlias

from hwnas.config import DataConfig
from hwnas.data import DATASETS, data_folder
from hwnas.document import file_sha256
from hwnas.errors import DataError

if TYPE_CHECKING:  # see hwnas/lazy.py
    from hwnas.data.images import Images

Part: TypeAlias = Literal["train", "test"]
"""What a stage reads: all training images (``train`` and ``held_out`` in the terms of
``load_images``), or the test images.
"""

_ARRAY_FILES: dict[tuple[str, Part], tuple[str, ...]] = {
    ("npz", "train"): ("train.npz",),
    ("npz", "test"): ("test.npz",),
    ("cifar10", "train"): ("cifar-10-batches-py/data_batch_*",),
    ("cifar10", "test"): ("cifar-10-batches-py/test_batch",),
}
"""(data set, part) -> patterns of the files with the arrays, below ``data.path``."""


def fingerprint(config: DataConfig, part: Part) -> str:
    """A hash of what a part of a data set consists of: a sha256 in hex.

    Of images in ``data.skip`` only the names count, so a run does not depend on whether
    they are still on disk. All files below the folder of a plug-in's data set count,
    because it is not known which of them it reads. Data sets without a path always have
    the same fingerprint.

    Listing 200,000 images takes seconds, and every stage of a run asks for them. So
    within a process a part is listed again only if a file was added to one of its folders
    or removed from it, or if annotations have changed.

    Raises DataError if the part cannot be read.
    """
    if config.name not in ("folder", "coco"):
        return _digest(config, part, _lines_of_files(config, part))
    known = _KNOWN.get((config, part))
    if known is not None and known.times_ns == _times_ns(known.times_ns):
        return known.digest

    folder = data_folder(config)
    split = "all" if part == "train" else "test"
    images: Images = DATASETS.get(config.name)(config, split, False)
    files = images.files()
    # before the files are looked at, so that later changes are noticed
    times_ns = _times_ns([*_folders(folder, files), *images.label_files()])
    digest = _digest(config, part, _lines_of_images(config, folder, images, files))
    _KNOWN[config, part] = _Known(times_ns, digest)
    return digest


@dataclass(frozen=True)
class _Known:
    """A fingerprint, and when the folders and annotations that it was made of last
    changed.
    """

    times_ns: dict[Path, int | None]
    digest: str


_KNOWN: dict[tuple[DataConfig, Part], _Known] = {}
"""The fingerprints of this process."""


def _times_ns(paths: Iterable[Path]) -> dict[Path, int | None]:
    """The times of the last change; None for what does not exist."""
    times: dict[Path, int | None] = {}
    for path in paths:
        try:
            times[path] = path.stat().st_mtime_ns
        except OSError:
            times[path] = None
    return times


def _folders(folder: Path, files: Iterable[str]) -> set[Path]:
    """The folders that decide which files a data set has: those of ``files``, their
    parents, and that of the training images, whose classes count for the test images.
    """
    parents = {PurePosixPath(file).parent for file in files}
    above = {parent for path in parents for parent in path.parents}
    return {folder / path for path in parents | above} | {folder / "train"}


def _digest(config: DataConfig, part: Part, lines: Iterable[str]) -> str:
    digest = hashlib.sha256(f"{config.name} {part}\n".encode())
    for line in lines:
        digest.update(f"{line}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _lines_of_files(config: DataConfig, part: Part) -> Iterator[str]:
    """One line for each file of arrays or of a plug-in's data set, in a fixed order."""
    if config.path is None:
        return
    folder = data_folder(config)
    if config.name in ("npz", "cifar10"):
        for pattern in _ARRAY_FILES[config.name, part]:
            for path in sorted(folder.glob(pattern)):
                yield f"{path.relative_to(folder)}:{content_mark(path)}"
        return

    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in paths:
        yield f"{path.relative_to(folder)}:{_mark(path)}"


def _lines_of_images(
    config: DataConfig, folder: Path, images: Images, files: Iterable[str]
) -> Iterator[str]:
    """One line for each class, file of labels and image."""
    # labels are positions in the list of names
    yield from (f"class {name}" for name in images.names)
    for path in images.label_files():
        yield f"{path.name}:{content_mark(path)}"
    skipped = set(config.skip)
    for name in files:
        yield f"{name}:{'skipped' if name in skipped else _size(folder / name)}"


def _mark(path: Path) -> str:
    """The content of an array or annotation file, the size of any other."""
    if path.suffix in (".npz", ".json"):
        return content_mark(path)
    return _size(path)


def _size(path: Path) -> str:
    try:
        return str(path.stat().st_size)
    except OSError as error:
        raise DataError(
            f"image {path} cannot be read ({error.strerror}): check its permissions, or remove it."
        ) from error


def content_mark(path: Path) -> str:
    """The sha256 of a file's content. A file that has not changed since is not read
    again.
    """
    try:
        status = path.stat()
        return _content_sha256(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check data.path.") from error


@lru_cache(maxsize=64)
def _content_sha256(path: Path, size_bytes: int, changed_ns: int) -> str:
    # size and time are only part of the cache's key
    del size_bytes, changed_ns
    return file_sha256(path)
