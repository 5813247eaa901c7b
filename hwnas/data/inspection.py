"""Checks of a configuration against the images on disk before anything is built on
them: counts classes that are not set, and finds missing splits.
"""

from __future__ import annotations

from hwnas.config import IMAGE_LABELS, DataConfig
from hwnas.data import DATASETS
from hwnas.data.coco import training_categories
from hwnas.data.images import Images, load_images
from hwnas.errors import ConfigError, DataError


def with_classes(config: DataConfig) -> DataConfig:
    """The configuration with ``data.classes`` counted if it was not given.

    Folders have one class per class folder, COCO's layout one per category, arrays one
    more than their largest label. The classes of plug-ins are unknown, so they keep the
    default.

    Raises ConfigError if the classes cannot be counted, or if there is only one.
    """
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


def check_data(config: DataConfig, *, searches: bool, exact: bool = True) -> None:
    """Open every split that a later stage needs, and check that layout, labels, class
    folders and categories agree and that no part is empty.

    With ``exact``, there must be as many class folders as classes. Otherwise there may
    be fewer, as with a space document that has its own number of classes. ``searches``
    requires enough images to hold some out.

    Raises DataError, with a message of one sentence.
    """
    training = load_images(config, "all")
    load_images(config, "test")
    if exact and config.name == "folder" and len(training.names) != config.classes:
        raise DataError(
            f"data.path {config.path!r} has {len(training.names)} class folders in train, but"
            f" data.classes = {config.classes}: set it to {len(training.names)}, or leave it out."
        )
    if searches and len(training) < 2:
        raise DataError(
            f"data {config.name!r} has one training image, but a search holds some out: add more."
        )
