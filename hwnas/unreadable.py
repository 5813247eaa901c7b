"""Images that a run leaves out because they do not decode.

They are listed in ``unreadable.json`` in the run folder. From then on, it makes no
difference to the run whether such an image is still on disk: in training, another image
takes its place, so that all others keep theirs (``data.skip``). Results from before the
image was left out therefore stay up to date, and what was interrupted resumes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Self

from hwnas.config import DataConfig
from hwnas.data import data_folder
from hwnas.data.fingerprint import Part, fingerprint
from hwnas.document import Document
from hwnas.errors import DataError

FILE = "unreadable.json"

PARTS: tuple[Part, ...] = ("train", "test")


class Unreadable(Document):
    """The images that a run leaves out.

    ``images`` maps their paths relative to ``data.path`` to the reasons. ``same_as``
    maps the fingerprint of a part of the data without them to the fingerprint that the
    part had when the run began.
    """

    SCHEMA: ClassVar[str] = "hwnas.unreadable"

    images: dict[str, str] = {}
    same_as: dict[str, str] = {}

    @classmethod
    def of_run(cls, root: Path) -> Self:
        """The images that the run in ``root`` leaves out so far."""
        path = root / FILE
        return cls.load(path) if path.is_file() else cls()

    def applied(self, data: DataConfig) -> DataConfig:
        """The data without the images that the run leaves out."""
        if not self.images:
            return data
        skip = sorted({*data.skip, *self.images})
        return data.model_copy(update={"skip": tuple(skip)})

    def removed(self, data: DataConfig) -> DataConfig:
        """The data without those images that are no longer on disk."""
        if not self.images:
            return data
        try:
            folder = data_folder(data)
        except DataError:
            # whoever reads the images says so; a report does not
            return data
        gone = [image for image in self.images if not (folder / image).exists()]
        if not gone:
            return data
        return data.model_copy(update={"skip": tuple(sorted({*data.skip, *gone}))})

    def extended(
        self, images: Mapping[str, str], data: DataConfig, inputs: Mapping[str, str]
    ) -> Self:
        """Leave out further ``images`` (path -> reason) of ``data``, which already lack
        those left out so far. ``inputs`` are those of the stage that has met the images,
        if one has: an image may be gone by now.
        """
        extended = self.model_copy(update={"images": {**self.images, **images}})
        same_as = dict(self.same_as)
        for part in PARTS:
            # no stage has used a part that cannot be read
            with suppress(DataError):
                before = inputs.get(f"{part} images") or fingerprint(data, part)
                after = fingerprint(extended.applied(data), part)
                if after != before:
                    same_as[after] = same_as.get(before, before)
        return extended.model_copy(update={"same_as": same_as})
