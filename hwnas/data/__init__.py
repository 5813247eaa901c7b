"""Data sets by name: images with labels or boxes.

The splits are ``train`` and ``held_out``, which together are ``all`` training images,
and ``test``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from hwnas.config import DataConfig
from hwnas.document import file_sha256
from hwnas.errors import DataError
from hwnas.registry import Registry

DATASETS = Registry(
    "data",
    {
        "digits": "hwnas.data.arrays:digits",
        "npz": "hwnas.data.arrays:npz",
        "cifar10": "hwnas.data.arrays:cifar10",
        "folder": "hwnas.data.folder:folder",
        "coco": "hwnas.data.coco:coco",
    },
)

_READ: dict[str, tuple[str, ...]] = {
    "digits": (),
    "npz": ("train.npz", "test.npz"),
    "cifar10": ("cifar-10-batches-py",),
    "folder": ("train", "val"),
}
"""Name of a data set -> all files and folders that it reads below ``data.path``. It is
unknown for plug-ins and for coco, whose annotations may name images anywhere; with
those, everything counts.
"""


def data_folder(config: DataConfig) -> Path:
    """``data.path`` as a path. Raises DataError if it is not set or not a folder."""
    if config.path is None:
        raise DataError(
            f"data.name = {config.name!r} needs data.path: set it to the folder of the images."
        )
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"data.path {str(folder)!r} is not a folder: check the path, or where the images were"
            " unpacked."
        )
    return folder


def fingerprint(config: DataConfig) -> str:
    """A hash of the images on disk, which tells a stage that they have changed.

    It covers the contents of npz and JSON files, and the names and sizes of all others.
    Files that the data set does not read are ignored. Data sets without a path always
    have the same fingerprint.

    Raises DataError if ``data.path`` is set but not a folder.
    """
    digest = hashlib.sha256(config.name.encode())
    if config.path is None:
        return digest.hexdigest()

    folder = data_folder(config)
    files: list[Path] = []
    for name in _READ.get(config.name, ("",)):
        root = folder / name
        files += [path for path in (root, *root.rglob("*")) if path.is_file()]

    for path in sorted(files):
        digest.update(f"{path.relative_to(folder)}:{_content_mark(path)}\n".encode())
    return digest.hexdigest()


def _content_mark(path: Path) -> str:
    """The hash of an npz or JSON file, the size of any other in bytes."""
    if path.suffix in (".npz", ".json"):
        return file_sha256(path)
    # hashing every photograph of a large data set would take too long
    return str(path.stat().st_size)
