"""Data sets by name: images with labels or boxes.

The splits are ``train`` and ``held_out``, which together are ``all`` training images,
and ``test``.
"""

from __future__ import annotations

from pathlib import Path

from hwnas.config import DataConfig
from hwnas.document import user_path
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


def data_folder(config: DataConfig) -> Path:
    """``data.path`` as a path. Raises DataError if it is not set or not a folder."""
    if config.path is None:
        raise DataError(
            f"data.name = {config.name!r} needs data.path: set it to the folder of the images."
        )
    folder = user_path(config.path, "data.path")
    if not folder.is_dir():
        raise DataError(
            f"data.path {str(folder)!r} is not a folder: check the path, or where the images were"
            " unpacked."
        )
    return folder
