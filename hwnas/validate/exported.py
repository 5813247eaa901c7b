"""A bundle to be validated: the files of it that the device can run, and their outputs
there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hwnas.devices.session import Bench, Item
from hwnas.document import file_sha256
from hwnas.errors import DocumentError
from hwnas.export.bundle import Bundle, BundleFile, OtherFile


@dataclass(frozen=True)
class Exported:
    """A bundle, the folder of its files, and the files that the device can run."""

    bundle: Bundle
    folder: Path
    files: tuple[BundleFile, ...]

    def path(self, file: BundleFile) -> Path:
        """The path of a file."""
        return self.folder / file.name

    def item(self, file: BundleFile, path: Path | None = None, image: Path | None = None) -> Item:
        """A file to time. ``path`` may be a file derived from it; the item then has
        that file's name.
        """
        path = path or self.path(file)
        return Item(path.name, file.runtime, path, self.bundle.architecture.ops(), image)

    def predict(self, file: BundleFile, images_NHWC: np.ndarray, bench: Bench) -> np.ndarray:
        """The outputs of a file on the device. Raises DeviceError if it cannot run
        there.
        """
        return bench.connection.predict(self.path(file), images_NHWC, bench.folder)


def load_bundle(folder: Path) -> Bundle:
    """The bundle in a folder. Raises DocumentError if a file is missing or does not
    match its hash.
    """
    bundle = Bundle.load(folder / "bundle.json")
    # older bundles have no hashes of the files beside the models
    others = [file for file in (bundle.labels_file, bundle.parity_file) if file is not None]
    described: list[BundleFile | OtherFile] = [*bundle.files, *others]
    for file in described:
        path = folder / file.name
        if not path.is_file() or file_sha256(path) != file.sha256:
            raise DocumentError(
                f"{path} is missing or not the file that bundle.json describes: export again."
            )
    return bundle
