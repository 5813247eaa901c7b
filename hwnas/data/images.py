"""What every data set is here, and the deterministic order in which its batches come.

A batch is a pure function of (seed, step): the images by a permutation per epoch, the
augmentation by a generator per step. So a run that was killed and resumed sees exactly
the batches it would have seen.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hwnas.config import DataConfig
from hwnas.data import DATASETS
from hwnas.data.geometry import Geometry
from hwnas.errors import DataError

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Normalised images float32 [N, C, H, W] and labels int64 [N]; for detection, boxes
float32 [N, M, 5] (see ``data/coco.py``).
"""

Request: TypeAlias = tuple[int, int]
"""(image index, seed of the augmentation); the seed is ignored where nothing is augmented."""


class Images(Dataset[Batch]):
    """A split of a data set. Subclasses read and augment; ``labels`` is int64 [N],
    ``names`` the class names.

    Where images have any number of objects, ``labels`` is int64 [objects], and
    ``__len__`` and ``labels_of`` are of their own. ``resizing`` says in words how an
    image becomes the model's size, for the people who use an exported file;
    ``geometry`` says it in numbers, where the data set has one.
    """

    resizing: str
    geometry: Geometry | None = None

    labels: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """The labels of some images."""
        labels: np.ndarray = self.labels[indices]
        return labels

    @abstractmethod
    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        """A whole batch at once."""


def load_images(config: DataConfig, split: str, *, augment: bool = False) -> Images:
    """The images of ``split`` (``train``, ``held_out``, ``all`` or ``test``), checked
    against the configuration.

    ``held_out`` is a fixed part of the training images, the same for every seed of the
    experiment; ``train`` is the rest, ``all`` are both: a search needs them apart, the
    final training does not.
    """
    images: Images = DATASETS.get(config.name)(config, split, augment)
    if len(images) == 0:
        raise DataError(
            f"data {config.name!r} has no images in its {split} split: check data.path."
        )
    if len(images.labels) == 0:
        return images  # a part whose images have no objects
    low, high = int(images.labels.min()), int(images.labels.max())
    if low < 0 or high >= config.classes:
        raise DataError(
            f"data {config.name!r} has labels {low} to {high}, but data.classes = {config.classes}:"
            f" set data.classes to {high + 1}."
        )
    return images


class Portion(Images):
    """A fixed random part of a split, in every seed the same."""

    def __init__(self, images: Images, portion: float) -> None:
        self.images, self.names = images, images.names
        self.resizing, self.geometry = images.resizing, images.geometry
        count = max(1, round(portion * len(images)))
        self.kept = np.sort(np.random.default_rng(0).permutation(len(images))[:count])
        self.labels = images.labels_of(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """The labels of some images."""
        return self.images.labels_of(self.kept[indices])

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        """A whole batch at once."""
        return self.images.__getitems__([(int(self.kept[index]), draw) for index, draw in requests])


def split_indices(total: int, held_out: float, split: str) -> np.ndarray:
    """Which of ``total`` training images belong to ``train``, ``held_out`` or ``all``."""
    if split == "all":
        return np.arange(total)
    order = np.random.default_rng(0).permutation(total)
    cut = max(1, round(total * held_out))
    return np.sort(order[:cut] if split == "held_out" else order[cut:])


class _Stream:
    """Batch sampler: permutation after permutation, cut into batches, of every
    ``stride``-th step from ``first`` to ``last``.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, first: int, last: int, stride: int = 1
    ) -> None:
        self.size, self.batch_size, self.seed, self.steps = (
            size,
            batch_size,
            seed,
            range(first, last, stride),
        )

    def __iter__(self) -> Iterator[list[Request]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in self.steps:
            draw = int(np.random.default_rng([self.seed, step, 1]).integers(2**62))
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = np.random.default_rng([self.seed, epoch, 0]).permutation(self.size)
                batch.append((int(order[position % self.size]), draw))
            yield batch

    def __len__(self) -> int:
        return len(self.steps)


class _Carrying(Dataset[Any]):
    """Hands a DataError over as a value: raised in a loader process, it would arrive
    wrapped in that process's traceback.
    """

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitems__(self, requests: Sequence[Request]) -> Batch | DataError:
        try:
            return self.images.__getitems__(requests)
        except DataError as error:
            return error


def _as_is(batch: Any) -> Any:
    return batch  # __getitems__ already returns a batch


def _load(images: Images, sampler: Iterable[list[Request]], workers: int) -> Iterator[Batch]:
    loader: DataLoader[Any] = DataLoader(
        _Carrying(images),
        batch_sampler=sampler,
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # else a loader made in the middle of a step, by a resumed run, shifts that step's dropout
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def training_batches(
    images: Images,
    batch_size: int,
    *,
    seed: int,
    first: int,
    last: int,
    stride: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """The shuffled batches of every ``stride``-th step from ``first`` to ``last - 1``."""
    return _load(images, _Stream(len(images), batch_size, seed, first, last, stride), workers)


def evaluation_order(images: Images, limit: int | None = None) -> np.ndarray:
    """Indices of all images, or ``limit`` of them, in one fixed random order: folders
    are sorted by class, and a part must not be.
    """
    return np.random.default_rng(0).permutation(len(images))[:limit]


def evaluation_batches(
    images: Images, batch_size: int, *, limit: int | None = None, workers: int = 0
) -> Iterator[Batch]:
    """All images, or ``limit`` of them, in ``evaluation_order``."""
    order = evaluation_order(images, limit)
    return _load(
        images,
        [
            [(int(i), 0) for i in order[at : at + batch_size]]
            for at in range(0, len(order), batch_size)
        ],
        workers,
    )


def sampled_images(images: Images, count: int) -> np.ndarray:
    """``count`` images spread evenly over a split, channels-last float32 [count, H, W,
    C], as a deployed model gets them.
    """
    indices = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)
    x_NCHW, _ = images.__getitems__([(int(index), 0) for index in indices])
    return x_NCHW.permute(0, 2, 3, 1).contiguous().numpy()
