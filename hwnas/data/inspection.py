"""What the images on disk say of a configuration, before anything is built on it:
classes that are not set, and splits that are missing.
"""

from __future__ import annotations

from hwnas.config import IMAGE_LABELS, DataConfig
from hwnas.data import DATASETS
from hwnas.data.coco import training_categories
from hwnas.data.images import Images, load_images
from hwnas.errors import ConfigError, DataError


def with_classes(config: DataConfig) -> DataConfig:
    """The configuration with ``data.classes`` counted where it was not given.

    Folders have a class per class folder, COCO's layout one per category, arrays as
    many as their largest label and 0. Of plug-ins nobody knows, so they keep the
    default. Raises ConfigError where there is nothing to count.
    """
    if "classes" in config.model_fields_set or config.name not in (*IMAGE_LABELS, "coco"):
        return config
    try:
        found = classes_in(config)
    except DataError as error:
        raise ConfigError(f"data.classes is not set, and cannot be counted: {error}") from error
    if found < 2 and config.name in IMAGE_LABELS:
        raise ConfigError(
            f"data {config.name!r} has one class, which leaves nothing to tell apart: check"
            " data.path."
        )
    return config.model_copy(update={"classes": found})


def classes_in(config: DataConfig) -> int:
    """How many classes the training images of one of our own data sets have. Raises
    DataError where they cannot be read.
    """
    if config.name == "coco":
        return len(training_categories(config))
    images: Images = DATASETS.get(config.name)(
        config.model_copy(update={"classes": 0}), "all", False
    )
    if config.name == "folder":
        return len(images.names)
    if len(images) == 0:
        raise DataError(f"data {config.name!r} has no training images: check data.path.")
    low, high = int(images.labels.min()), int(images.labels.max())
    if low < 0:
        raise DataError(f"data {config.name!r} has the label {low}: labels count from 0.")
    return high + 1


def check_data(config: DataConfig, *, searches: bool, exact: bool = True) -> None:
    """Open every split that a later stage needs: layout, labels, class folders and
    categories agree, and no part is empty.

    ``exact``: there are as many class folders as classes, not fewer, which a space
    document with its own number leaves open. Raises DataError in one sentence.
    """
    training, _ = load_images(config, "all"), load_images(config, "test")
    if exact and config.name == "folder" and len(training.names) != config.classes:
        raise DataError(
            f"data.path {config.path!r} has {len(training.names)} class folders in train, but"
            f" data.classes = {config.classes}: set it to {len(training.names)}, or leave it out."
        )
    if searches and len(training) < 2:
        raise DataError(
            f"data {config.name!r} has one training image, and a search holds some out: give more."
        )
