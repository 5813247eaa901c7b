"""Checks of a configuration against the images on disk before anything is built on
them: counts classes that are not set, and finds everything that would stop or spoil a
later stage, in one go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hwnas.config import IMAGE_LABELS, DataConfig
from hwnas.data import DATASETS, data_folder
from hwnas.data.coco import training_categories
from hwnas.data.decoding import Examined
from hwnas.data.examination import examine_all
from hwnas.data.images import are_skipped, check_images
from hwnas.data.wording import counted, listed, quoted, shown
from hwnas.errors import ConfigError, DataError, DataProblemsError
from hwnas.progress import Progress

if TYPE_CHECKING:  # see hwnas/lazy.py
    from hwnas.data.images import Images

PARTS = {"train": "all", "test": "test"}
"""The parts of a data set, and the split that holds all images of each."""


def with_classes(config: DataConfig) -> DataConfig:
    """The configuration with ``data.classes`` counted if it was not given.

    Folders have one class per class folder, COCO's layout one per category, arrays one
    more than their largest label. The classes of plug-ins are unknown, so they keep the
    default.

    Raises ConfigError if the classes cannot be counted, or if there is only one;
    DataProblemsError if there are more problems.
    """
    try:
        return _counted(config)
    except ConfigError as error:
        problems = [str(error)]
        # what else is wrong should not have to wait for the next attempt
        if config.name == "folder":
            try:
                DATASETS.get(config.name)(config, "test", False)
            except DataError as other:
                problems.append(str(other))
        if problems[-1] in problems[0]:
            raise
        raise DataProblemsError(_together(problems), {}) from error


def _counted(config: DataConfig) -> DataConfig:
    if "classes" in config.model_fields_set or config.name not in (*IMAGE_LABELS, "coco"):
        return config
    try:
        classes = classes_in(config)
    except DataError as error:
        raise ConfigError(f"data.classes is not set and cannot be counted: {error}") from error
    # one class is enough for a detector, which tells it from the background
    if classes < 2 and config.name in IMAGE_LABELS:
        raise ConfigError(
            f"data {config.name!r} has one class, which leaves nothing to tell apart: check"
            " data.path."
        )
    return config.model_copy(update={"classes": classes})


def classes_in(config: DataConfig) -> int:
    """The number of classes in the training images of a built-in data set.

    Raises DataError if they cannot be read.
    """
    if config.name == "coco":
        return len(training_categories(config))
    # only load_images compares the labels with data.classes, so any number will do here
    unchecked = config.model_copy(update={"classes": 0})
    images: Images = DATASETS.get(config.name)(unchecked, "all", False)
    if config.name == "folder":
        return len(images.names)
    if len(images) == 0:
        raise DataError(f"data {config.name!r} has no training images: check data.path.")
    low, high = int(images.labels.min()), int(images.labels.max())
    if low < 0:
        raise DataError(f"data {config.name!r} has the label {low}: labels count from 0.")
    return high + 1


@dataclass(frozen=True)
class Part:
    """The training or the test images.

    ``name`` is that of ``PARTS``; ``examined`` is what is in the files of the images, by
    path relative to ``data.path``.
    """

    name: str
    images: Images
    examined: Mapping[str, Examined]

    @property
    def title(self) -> str:
        """``training`` or ``test``, for messages."""
        return "training" if self.name == "train" else self.name

    @property
    def counts(self) -> dict[str, int]:
        """Class name -> number of its images, or for detection of its objects."""
        names, labels = self.images.names, self.images.labels
        # others are a problem that is found elsewhere
        valid = labels[(labels >= 0) & (labels < len(names))]
        numbers = np.bincount(valid, minlength=len(names))
        return dict(zip(names, numbers.tolist(), strict=True))


@dataclass
class Inspection:
    """What a look at all images has found.

    ``problems`` and ``notes`` are one line each: what would stop or spoil a later stage,
    and what is only unusual. ``unreadable`` maps the images that do not decode, as paths
    relative to ``data.path``, to the reasons.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)

    def check(self) -> None:
        """Raise DataProblemsError, which lists all problems, if there are any."""
        if self.problems:
            raise DataProblemsError(_together(self.problems), self.unreadable)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within it, a DataError becomes a problem."""
        try:
            yield
        except DataError as error:
            self.add_problem(str(error))

    def add_problem(self, problem: str) -> None:
        """Add a problem, unless it is part of one that is known: the same cause may be
        met in every part.
        """
        if not any(problem in known for known in self.problems):
            self.problems.append(problem)


def _together(problems: Sequence[str]) -> str:
    """One problem as it is, several as a list."""
    if len(problems) == 1:
        return problems[0]
    lines = [f"the data have {len(problems)} problems:", *problems]
    return "\n  ".join(lines)


def inspect(
    config: DataConfig,
    *,
    searches: bool,
    exact: bool = True,
    progress: Progress | None = None,
) -> Inspection:
    """Open the training and the test images, check that layout, labels, class folders and
    categories agree and that no part is empty, and decode all images once.

    With ``exact``, there must be as many class folders as classes. Otherwise there may
    be fewer, as with a space document that has its own number of classes. ``searches``
    requires enough images to hold some out. With ``data.unreadable = "skip"``, images that
    do not decode are a note, and the rest must do without them.
    """
    inspection = Inspection()
    is_counted = True
    try:
        config = _counted(config)
    except ConfigError as error:
        inspection.add_problem(str(error))
        is_counted = False
        # its reader compares the categories with their number
        if config.name == "coco":
            return inspection

    opened: dict[str, Images] = {}
    for name, split in PARTS.items():
        with inspection.collecting():
            opened[name] = DATASETS.get(config.name)(config, split, False)
            if is_counted:
                check_images(opened[name], config, split)
    if "train" in opened:
        _check_training(opened["train"], config, inspection, searches, exact and is_counted)

    examined = _examined(config, list(opened.values()), progress or Progress())
    for name, images in opened.items():
        part = Part(name, images, {file: examined[file] for file in _kept(images, config)})
        inspection.parts.append(part)
        _check_files(part, config, inspection)
        _add_notes(part, config, inspection)
    if inspection.unreadable and config.unreadable == "skip":
        skip = (*config.skip, *inspection.unreadable)
        without = config.model_copy(update={"skip": skip})
        for split in PARTS.values():
            with inspection.collecting():
                DATASETS.get(config.name)(without, split, False)
    return inspection


def _kept(images: Images, config: DataConfig) -> list[str]:
    """The files of the images that are not skipped."""
    files = images.files()
    return [files[position] for position in np.flatnonzero(~are_skipped(files, config))]


def _examined(
    config: DataConfig, parts: Sequence[Images], progress: Progress
) -> dict[str, Examined]:
    """What is in the files of all parts, by path."""
    # an annotation file may name an image of the other part
    files = {file: None for images in parts for file in _kept(images, config)}
    if not files:
        return {}
    return examine_all(data_folder(config), list(files), config.channels, progress)


def _check_training(
    images: Images, config: DataConfig, inspection: Inspection, searches: bool, exact: bool
) -> None:
    """Check the number of classes and of images."""
    if exact and config.name == "folder" and len(images.names) != config.classes:
        inspection.add_problem(
            f"data.path {config.path!r} has {len(images.names)} class folders in train, but"
            f" data.classes = {config.classes}: set it to {len(images.names)}, or leave it out."
        )
    if searches and len(images) == 1:
        inspection.add_problem(
            f"data {config.name!r} has one training image, but a search holds some out: add more."
        )


def _check_files(part: Part, config: DataConfig, inspection: Inspection) -> None:
    """Check that images decode, and that those which do fit their labels."""
    reasons = {
        file: examined.reason
        for file, examined in part.examined.items()
        if examined.reason is not None
    }
    inspection.unreadable |= reasons
    if reasons:
        examples = [f"{shown(file)} ({reason})" for file, reason in reasons.items()]
        does, them = ("does", "it") if len(reasons) == 1 else ("do", "them")
        said = (
            f"{len(reasons):,} of {counted(len(part.examined), f'{part.title} image')} in"
            f" {shown(str(config.path))} {does} not decode: {listed(examples)}"
        )
        if config.unreadable == "skip":
            inspection.notes.append(f"{said}; left out.")
        else:
            inspection.add_problem(
                f"{said}; replace or remove {them}, or set data.unreadable = 'skip'."
            )

    misfits = []
    for position, file in enumerate(part.images.files()):
        examined = part.examined.get(file)
        if examined is None or examined.reason is not None:
            continue
        try:
            part.images.check_size(position, (examined.width, examined.height))
        except DataError as error:
            misfits.append(str(error))
    if misfits:
        count = ""
        if len(misfits) > 1:
            count = f"{len(misfits):,} {part.title} images do not fit their labels, first: "
        inspection.add_problem(count + misfits[0])


def _add_notes(part: Part, config: DataConfig, inspection: Inspection) -> None:
    """Note what is unusual: classes without images, and images that are skipped."""
    inspection.notes += part.images.notes
    without = [name for name, count in part.counts.items() if count == 0]
    # the reader of COCO's files warns of those itself
    if without and not (config.name == "coco" and part.name == "train"):
        noun = "objects" if config.name == "coco" else "images"
        inspection.notes.append(
            f"{len(without):,} of {len(part.images.names):,} classes have no {part.title} {noun}:"
            f" {quoted(without)}."
        )
    if part.name == "train" and config.skip:
        inspection.notes.append(f"{counted(len(config.skip), 'image')} left out (data.skip).")
