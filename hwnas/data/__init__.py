"""Images with labels or boxes, by name, in splits: ``train`` and ``held_out`` (parts of
``all`` training images), and ``test``.
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
"""All that a data set reads below ``data.path``: files, or whole folders. Of others
(plug-ins, and coco, whose annotations may name images anywhere) nobody knows, so
everything counts.
"""


def data_folder(config: DataConfig) -> Path:
    """``data.path`` as a path. Raises DataError where it is not set or not there."""
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
    """A hash of the images on disk, so that a stage notices others: contents of npz and
    JSON files, names and sizes of the rest.

    What the data set does not read may lie beside them. A folder with nothing else has
    the hash that it had when everything counted. Raises DataError where ``data.path``
    is set but not there. Data sets without a path have the same fingerprint always.
    """
    digest = hashlib.sha256(config.name.encode())
    if config.path is not None:
        folder = data_folder(config)
        roots = [folder / name for name in _READ.get(config.name, ("",))]
        for path in sorted(
            path for root in roots for path in (root, *root.rglob("*")) if path.is_file()
        ):
            content = (
                file_sha256(path) if path.suffix in (".npz", ".json") else str(path.stat().st_size)
            )
            digest.update(f"{path.relative_to(folder)}:{content}\n".encode())
    return digest.hexdigest()
