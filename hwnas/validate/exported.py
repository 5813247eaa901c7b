"""A bundle on its way to be validated: which of its files the device runs, and what
they put out there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hwnas.devices.session import Bench, Item
from hwnas.document import file_sha256
from hwnas.errors import DocumentError
from hwnas.export.bundle import Bundle, BundleFile


@dataclass(frozen=True)
class Exported:
    """A bundle, the folder of its files, and those files that the device runs."""

    bundle: Bundle
    folder: Path
    files: tuple[BundleFile, ...]

    def path(self, file: BundleFile) -> Path:
        """Where a file is."""
        return self.folder / file.name

    def item(self, file: BundleFile, path: Path | None = None, image: Path | None = None) -> Item:
        """A file to time, or what was made of it at another ``path``, whose name is
        then the item's.
        """
        path = path or self.path(file)
        return Item(path.name, file.runtime, path, self.bundle.architecture.ops(), image)

    def predict(self, file: BundleFile, images_NHWC: np.ndarray, bench: Bench) -> np.ndarray:
        """What a file puts out on the device for images. Raises DeviceError."""
        return bench.connection.predict(self.path(file), images_NHWC, bench.folder)


def load_bundle(folder: Path) -> Bundle:
    """The bundle in a folder, its files checked against their hashes."""
    bundle = Bundle.load(folder / "bundle.json")
    for file in bundle.files:
        path = folder / file.name
        if not path.is_file() or file_sha256(path) != file.sha256:
            raise DocumentError(
                f"{path} is missing or not the file that bundle.json describes: export again."
            )
    return bundle
