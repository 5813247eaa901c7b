"""What training does to images beyond a crop and a flip, by timm and torchvision.

``TrainingAugmentation`` changes one image at a time, where its data set calls it: a
picture after the crop and the flip, and the normalised image at the end. ``Mixing``
blends the images of a batch and their labels. All draws follow from the seed of an
image or of a step, and the global generators are left as they were.

Sources: RandAugment (arXiv 1909.13719), AutoAugment (1805.09501) and TrivialAugment
(2103.10158) are torchvision's with its defaults, strings such as
``rand-m9-mstd0.5-inc1`` timm's; random erasing (1708.04896) is timm's with random
pixels; mixup (1710.09412) and CutMix (1905.04899) are timm's, one of the two for each
batch; cutout (1708.04552) is that of DARTS's code, which neither library has.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import (
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
)
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2

from hwnas.config import AugmentationConfig, DataConfig
from hwnas.errors import ConfigError

POLICIES = {
    "randaugment": v2.RandAugment,
    "autoaugment": v2.AutoAugment,
    "trivialaugment": v2.TrivialAugmentWide,
}
"""Name in the configuration -> torchvision's transform."""

TIMM_POLICIES = {
    "rand": rand_augment_transform,
    "augmix": augment_and_mix_transform,
    "original": auto_augment_transform,
    "originalr": auto_augment_transform,
    "v0": auto_augment_transform,
    "v0r": auto_augment_transform,
    "3a": auto_augment_transform,
}
"""First word of timm's strings -> the function that makes the transform."""

TRANSLATION = 0.45
"""The largest translation of timm's policies, as a part of the image's
smaller side (timm's default).
"""

AUGMIX_TRANSLATION = 0.3
"""The same for AugMix (timm's default)."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All global generators of the CPU start from ``seed``, and are restored after."""
    state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - timm draws from the global one
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed % 2**63)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)  # noqa: NPY002


class TrainingAugmentation:
    """Changes the images of ``data`` as ``config`` says. Raises ConfigError if the policy
    is unknown, or if cutout could cover a whole image.
    """

    def __init__(self, config: AugmentationConfig, data: DataConfig) -> None:
        if config.cutout >= data.smaller_side:
            raise ConfigError(
                f"train.augmentation.cutout = {config.cutout} can cover a whole image of"
                f" {data.resolution} pixels: choose a smaller side, for instance half of that."
            )
        self.cutout = config.cutout
        self.policy = _policy(config.auto, data)
        self.erasing = RandomErasing(
            probability=config.erasing, mode="pixel", max_count=1, device="cpu"
        )

    def picture(self, image: Image.Image, seed: int) -> Image.Image:
        """A PIL image, changed by the policy."""
        if self.policy is None:
            return image
        with seeded(seed):
            changed: Image.Image = self.policy(image)
        return changed

    def erased(self, x_CHW: Tensor, seed: int) -> Tensor:
        """A normalised image of which a rectangle may have become noise, and a square 0,
        the mean colour. It is changed in place.
        """
        # another seed than the picture's, so that the two do not go together
        with seeded(seed + 1):
            erased: Tensor = self.erasing(x_CHW)
        if self.cutout:
            cut_out(erased, self.cutout, np.random.default_rng([seed, 3]))
        return erased

    def pictures(self, pixels_NCHW: Tensor, seeds: list[int]) -> Tensor:
        """Images of an array, uint8 [N, C, H, W], changed by the policy."""
        if self.policy is None:
            return pixels_NCHW
        changed = []
        for pixels_CHW, seed in zip(pixels_NCHW, seeds, strict=True):
            image = v2.functional.to_pil_image(pixels_CHW)
            changed.append(v2.functional.pil_to_tensor(self.picture(image, seed)))
        return torch.stack(changed)


def cut_out(x_CHW: Tensor, side: int, rng: np.random.Generator) -> None:
    """Set a square of ``side`` pixels to 0, in place. Its centre is anywhere in the image,
    and what lies beyond the edge is cut off, as in DARTS's code.

    *Difference from the code*: an odd side is not rounded down to an even one.
    """
    height, width = x_CHW.shape[-2:]
    top = int(rng.integers(height)) - side // 2
    left = int(rng.integers(width)) - side // 2
    x_CHW[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = 0


def _policy(name: str, data: DataConfig) -> Any:
    """The transform of PIL images of that name; None for ``none``."""
    if name == "none":
        return None
    if name in POLICIES:
        return POLICIES[name]()
    make = TIMM_POLICIES.get(name.split("-")[0])
    if make is not None:
        border = tuple(min(255, round(255 * value)) for value in data.mean)
        settings: dict[str, Any] = {
            "translate_const": int(TRANSLATION * data.smaller_side),
            "img_mean": border,
        }
        if name.startswith("augmix"):
            settings["translate_pct"] = AUGMIX_TRANSLATION
        try:
            return make(name, settings)
        except (AssertionError, ValueError, KeyError) as error:
            reason = f" ({error})" if str(error) else ""
            raise ConfigError(
                f"train.augmentation.auto = {name!r} is not a policy that timm can read{reason}:"
                " write it like rand-m9-mstd0.5-inc1."
            ) from error
    raise ConfigError(
        f"train.augmentation.auto = {name!r} is unknown: choose none, {', '.join(POLICIES)}, or a"
        " string of timm such as rand-m9-mstd0.5-inc1."
    )


class Mixing:
    """Mixup or CutMix of whole batches. Targets become probabilities [N, classes], with the
    label smoothing of the loss.
    """

    def __init__(self, config: AugmentationConfig, classes: int, label_smoothing: float) -> None:
        self.mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            label_smoothing=label_smoothing,
            num_classes=classes,
        )

    def __call__(self, x_NCHW: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """A batch with mixed images and targets. ``x_NCHW`` is changed in place."""
        with seeded(seed):
            mixed_NCHW, targets_NK = self.mixup(x_NCHW, y)
        return mixed_NCHW, targets_NK
