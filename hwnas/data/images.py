"""The interface of data sets, and the deterministic order of their batches.

A batch is a pure function of (seed, step): the images follow from one permutation per
epoch, the augmentation from one generator per step. A run that was killed and resumed
therefore sees exactly the batches that it would have seen without interruption.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from hwnas.config import DataConfig
from hwnas.data import DATASETS
from hwnas.data.geometry import Geometry
from hwnas.errors import DataError
from hwnas.failures import is_out_of_memory
from hwnas.interruption import ignore_in_loader
from hwnas.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from hwnas.data.training_augmentation import TrainingAugmentation

Batch: TypeAlias = "tuple[Tensor, Tensor]"
"""Normalised images float32 [N, C, H, W] and labels int64 [N]; for detection, boxes
float32 [N, M, 5] (see ``data/coco.py``).
"""

Request: TypeAlias = tuple[int, int]
"""(image index, seed of the augmentation); without augmentation, the seed is ignored."""


class Images:
    """A split of a data set, for a ``DataLoader``. Subclasses read and augment the images.

    ``labels`` is int64 [N], and ``names`` holds the class names. For detection, where
    an image has any number of objects, ``labels`` is int64 [objects], and subclasses
    override ``__len__`` and ``labels_of``. ``resizing`` describes in words how an image
    is brought to the model's size, for users of an exported file; ``geometry`` does so
    in numbers, if the data set has one. ``notes`` are sentences about what is unusual in
    the data but does not stop the work.
    """

    resizing: str
    geometry: Geometry | None = None
    notes: tuple[str, ...] = ()

    labels: np.ndarray
    names: tuple[str, ...]
    training_augmentation: TrainingAugmentation | None = None
    """What training does to images beyond ``data.augment``."""

    def __len__(self) -> int:
        return len(self.labels)

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """The labels of the images at ``indices``."""
        labels: np.ndarray = self.labels[indices]
        return labels

    @abstractmethod
    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        """Read a whole batch at once."""

    def files(self) -> list[str]:
        """The files of the images as paths relative to ``data.path``, in the order of the
        images and with those in ``data.skip``. Empty if the images are no files of their
        own.
        """
        return []

    def label_files(self) -> list[Path]:
        """The files that hold the labels, if the images are files of their own."""
        return []

    def check_size(self, position: int, size: tuple[int, int]) -> None:
        """Raise DataError if the file at ``position`` in ``files``, which is stored with
        ``size`` (width, height) in pixels, contradicts its labels.
        """


def load_images(config: DataConfig, split: str, *, augment: bool = False) -> Images:
    """The images of ``split`` (``train``, ``held_out``, ``all`` or ``test``), checked
    against the configuration.

    ``held_out`` is a fixed part of the training images, the same for every seed of the
    experiment; ``train`` is the rest, and ``all`` is both. A search needs them apart,
    the final training does not.

    Raises DataError if there are no images or if labels exceed ``data.classes``.
    """
    images: Images = DATASETS.get(config.name)(config, split, augment)
    check_images(images, config, split)
    return images


def check_images(images: Images, config: DataConfig, split: str) -> None:
    """Raise DataError if there are no images or if labels exceed ``data.classes``."""
    if len(images) == 0:
        raise DataError(
            f"data {config.name!r} has no images in its {split} split: check data.path."
        )
    # in detection, all images of a part may be without objects
    if len(images.labels) == 0:
        return
    low, high = int(images.labels.min()), int(images.labels.max())
    if low < 0 or high >= config.classes:
        raise DataError(
            f"data {config.name!r} has labels {low} to {high}, but data.classes = {config.classes}:"
            f" set data.classes to {high + 1}."
        )


class Portion(Images):
    """A fixed random part of a split, the same for every seed of the experiment."""

    def __init__(self, images: Images, portion: float) -> None:
        self.images = images
        self.names = images.names
        self.resizing = images.resizing
        self.geometry = images.geometry
        count = max(1, round(portion * len(images)))
        self.kept = np.sort(np.random.default_rng(0).permutation(len(images))[:count])
        self.labels = images.labels_of(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """The labels of the images at ``indices``."""
        return self.images.labels_of(self.kept[indices])

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        """Read a whole batch at once."""
        return self.images.__getitems__([(int(self.kept[index]), draw) for index, draw in requests])


def split_indices(total: int, held_out: float, split: str) -> np.ndarray:
    """The sorted indices of those of ``total`` training images that belong to ``split``:
    ``train``, ``held_out`` or ``all``.
    """
    if split == "all":
        return np.arange(total)
    # a constant seed: the parts must not depend on the experiment's
    order = np.random.default_rng(0).permutation(total)
    cut = max(1, round(total * held_out))
    chosen = order[:cut] if split == "held_out" else order[cut:]
    return np.sort(chosen)


def are_skipped(files: Sequence[str], config: DataConfig) -> np.ndarray:
    """Which files, as paths relative to ``data.path``, are in ``data.skip``: bool [N]."""
    skip = frozenset(config.skip)
    return np.array([file in skip for file in files], dtype=bool)


def read_instead(skipped: np.ndarray) -> np.ndarray:
    """The position to read for each image of a split, int64 [N]: its own, or for
    ``skipped`` ones (bool [N], not all of them) that of the next one that is not.
    """
    kept = np.flatnonzero(~skipped)
    following = np.searchsorted(kept, np.arange(len(skipped)))
    # the first one follows the last one; without images, nothing does
    return kept[following % max(1, len(kept))]


class _Stream:
    """A batch sampler for the steps in ``steps``. One permutation of the ``size`` images
    after the other is cut into batches, in which each image follows ``repeats`` times.

    Repeated augmentation: Hoffer et al., "Augment your batch", arXiv 1901.09335.

    *Differences from timm's* ``RepeatAugSampler``: that one gives the copies of an image to
    different processes, and here they are in the same batch; it permutes the images anew
    for every epoch of as many images as there are, of which only 1 in ``repeats`` are
    different, and here each permutation is used up, so that no image is left out.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, steps: range, repeats: int = 1
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.steps = steps
        self.repeats = repeats

    def __iter__(self) -> Iterator[list[Request]]:
        round_number = -1
        order = np.empty(0, dtype=np.int64)
        for step in self.steps:
            draws = [self._draw(step, copy) for copy in range(self.repeats)]
            batch = []
            # a batch may cross the border between two permutations
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                place, copy = divmod(position, self.repeats)
                if place // self.size != round_number:
                    round_number = place // self.size
                    rng = np.random.default_rng([self.seed, round_number, 0])
                    order = rng.permutation(self.size)
                batch.append((int(order[place % self.size]), draws[copy]))
            yield batch

    def _draw(self, step: int, copy: int) -> int:
        """The seed of the augmentation of a step's images, or of their further copies."""
        # the third number separates these draws from the permutations' (0)
        numbers = [self.seed, step, 1]
        if copy:
            numbers.append(copy)
        return int(np.random.default_rng(numbers).integers(2**62))

    def __len__(self) -> int:
        return len(self.steps)


class _Carrying:
    """Returns errors that users read, instead of raising them: raised in a worker
    process, they would arrive wrapped in that process's traceback.
    """

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitems__(self, requests: Sequence[Request]) -> Batch | DataError | MemoryError:
        try:
            return self.images.__getitems__(requests)
        except DataError as error:
            return error
        except (MemoryError, OSError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # of this class, as those of numpy and torch are not made to be sent
            return MemoryError(str(error))


def _unchanged(batch: Any) -> Any:
    """A collate function for ``__getitems__``, which already returns a batch."""
    return batch


def _load(images: Images, sampler: Iterable[list[Request]], workers: int) -> Iterator[Batch]:
    loader: Iterable[Batch | DataError | MemoryError] = torch.utils.data.DataLoader(
        _Carrying(images),  # type: ignore[arg-type]  # torch needs no more than its methods
        batch_sampler=sampler,
        collate_fn=_unchanged,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # a loader without a generator draws from the global one; when a resumed run makes
        # it in the middle of a step, that would change the step's dropout
        generator=torch.Generator(),
        worker_init_fn=ignore_in_loader,
    )
    for batch in _until_killed(loader):
        if isinstance(batch, DataError | MemoryError):
            raise batch
        yield batch


def _until_killed(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader. Raises RuntimeError, in torch's words, if one of its
    processes was killed while a batch was fetched from it: torch lets the broken
    connection through.
    """
    remaining = iter(batches)
    while True:
        try:
            batch = next(remaining)
        except StopIteration:
            return
        except (ConnectionError, EOFError):
            break
        yield batch
    # raised out here, so that nothing keeps the loader: it would report the death of its
    # process once more, whenever the next child of this process ends
    del remaining
    raise RuntimeError("DataLoader worker (pid unknown) exited unexpectedly")


def training_batches(
    images: Images,
    batch_size: int,
    *,
    seed: int,
    steps: range,
    workers: int = 0,
    repeats: int = 1,
) -> Iterator[Batch]:
    """The shuffled batches of ``steps``. A batch depends only on the seed and its step. It
    has each image ``repeats`` times, a divisor of ``batch_size``, augmented differently.
    """
    return _load(images, _Stream(len(images), batch_size, seed, steps, repeats), workers)


def evaluation_order(images: Images, limit: int | None = None) -> np.ndarray:
    """Indices of all images, or of ``limit`` images, in a fixed random order. Folders
    are sorted by class, so the first images would not represent all classes.
    """
    return np.random.default_rng(0).permutation(len(images))[:limit]


def evaluation_batches(
    images: Images, batch_size: int, *, limit: int | None = None, workers: int = 0
) -> Iterator[Batch]:
    """Batches of all images, or of ``limit`` images, in ``evaluation_order``."""
    requests = [(int(i), 0) for i in evaluation_order(images, limit)]
    starts = range(0, len(requests), batch_size)
    batches = [requests[start : start + batch_size] for start in starts]
    return _load(images, batches, workers)


def sampled_images(images: Images, count: int) -> np.ndarray:
    """``count`` images spread evenly over a split (all of them if it has fewer), as a
    deployed model gets them: float32 [count, H, W, C].
    """
    indices = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)
    x_NCHW, _ = images.__getitems__([(int(index), 0) for index in indices])
    return x_NCHW.permute(0, 2, 3, 1).contiguous().numpy()
