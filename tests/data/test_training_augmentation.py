"""Augmentations of training, judged by timm and torchvision with the same seeds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import v2

from hwnas.config import AugmentationConfig, DataConfig, Experiment
from hwnas.data.images import Batch, Images, Request, load_images, training_batches
from hwnas.data.training_augmentation import Mixing, TrainingAugmentation, cut_out, seeded
from hwnas.errors import ConfigError

COLOUR = DataConfig.model_validate(
    {
        "name": "npz",
        "path": "x",
        "resolution": 32,
        "classes": 10,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
)
DIGITS = DataConfig.model_validate(
    {"name": "digits", "resolution": 16, "channels": 1, "mean": [0.3], "std": [0.35]}
)


def augmentation(data: DataConfig = COLOUR, **settings: Any) -> TrainingAugmentation:
    return TrainingAugmentation(AugmentationConfig(**settings), data)


def picture(seed: int = 0, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("randaugment", v2.RandAugment()),
        ("autoaugment", v2.AutoAugment()),
        ("trivialaugment", v2.TrivialAugmentWide()),
    ],
)
def test_policies_are_torchvisions(name: str, theirs: Any) -> None:
    ours = augmentation(auto=name)
    changed = 0
    for seed in range(8):
        found = np.asarray(ours.picture(picture(), seed))
        with seeded(seed):
            expected = np.asarray(theirs(picture()))
        assert np.array_equal(found, expected)
        changed += not np.array_equal(found, np.asarray(picture()))
    assert changed >= 4


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "augmix-m3-w2", "original-mstd0.5", "v0"])
def test_strings_are_timms(name: str) -> None:
    """The step that ``create_transform`` makes of the string."""
    transform = create_transform(
        32,
        is_training=True,
        auto_augment=name,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        interpolation="random",
    )
    [theirs] = [
        step
        for step in transform.transforms
        if type(step).__name__ in ("RandAugment", "AutoAugment", "AugMixAugment")
    ]
    ours = augmentation(auto=name)
    for seed in range(6):
        found = np.asarray(ours.picture(picture(), seed))
        with seeded(seed):
            expected = np.asarray(theirs(picture()))
        assert np.array_equal(found, expected), seed


@pytest.mark.parametrize("auto", ["randaugment", "autoaugment", "trivialaugment", "rand-m9-inc1"])
@pytest.mark.parametrize("data", [COLOUR, DIGITS], ids=["colour", "grey"])
def test_images_keep_their_shape(auto: str, data: DataConfig) -> None:
    pixels = torch.randint(0, 256, (12, data.channels, 16, 16), dtype=torch.uint8)
    changed = augmentation(data, auto=auto).pictures(pixels, list(range(12)))
    assert changed.shape == pixels.shape and changed.dtype == torch.uint8
    assert not torch.equal(changed, pixels)


def test_a_rectangle_becomes_noise() -> None:
    ours = augmentation(erasing=1.0)
    areas = []
    for seed in range(40):
        erased = ours.erased(torch.full((3, 32, 32), 9.0), seed)
        changed = (erased != 9.0).all(0)
        rows, columns = changed.any(1).sum(), changed.any(0).sum()
        assert changed.sum() == rows * columns
        areas.append(float(changed.float().mean()))
    # timm draws 2 to 33 % of the area
    assert min(areas) > 0.01 and 0.2 < max(areas) < 0.36


@pytest.mark.parametrize("side", [16, 5])
def test_a_square_becomes_the_mean_colour(side: int) -> None:
    """As in DARTS's code: the centre is anywhere, and what lies beyond the edge is cut off."""
    ours = augmentation(cutout=side)
    covered = torch.zeros(32, 32)
    areas = set()
    for seed in range(300):
        cut = ours.erased(torch.ones(3, 32, 32), seed)
        is_zero = (cut == 0).all(0)
        assert torch.equal(cut, (~is_zero).float().expand(3, 32, 32))
        rows, columns = is_zero.any(1), is_zero.any(0)
        assert int(is_zero.sum()) == int(rows.sum() * columns.sum())
        for line in (rows, columns):
            # shorter only at an edge
            assert int(line.sum()) == side or bool(line[0] or line[-1])
            assert side // 2 <= int(line.sum()) <= side
        areas.add(int(is_zero.sum()))
        covered += is_zero
    assert max(areas) == side**2 and min(areas) < 0.5 * side**2
    assert bool(covered.any(0).all()) and bool(covered.any(1).all())


def test_a_square_by_hand() -> None:
    """DARTS: rows from the centre minus half the side, up to the centre plus half of it."""

    class Centre:
        def integers(self, size: int) -> int:
            return {8: 1, 6: 4}[size]

    x_CHW = torch.ones(1, 8, 6)
    rng: Any = Centre()
    cut_out(x_CHW, 4, rng)
    expected = torch.ones(1, 8, 6)
    expected[:, 0:3, 2:6] = 0
    assert torch.equal(x_CHW, expected)


def test_cutout_of_a_whole_image_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cutout = 32 can cover a whole image of 32 pixels"):
        augmentation(cutout=32)


@pytest.mark.parametrize("repeats", [2, 3])
def test_a_batch_has_each_image_several_times(repeats: int) -> None:
    images = load_images(DIGITS, "all", augment=True)
    images.training_augmentation = augmentation(DIGITS, auto="trivialaugment")
    plain = load_images(DIGITS, "all")

    def batches(steps: range) -> list[torch.Tensor]:
        stream = training_batches(images, 12, seed=1, steps=steps, repeats=repeats)
        return [x_NCHW for x_NCHW, _ in stream]

    for x_NCHW in batches(range(2)):
        for first in range(0, 12, repeats):
            assert not torch.equal(x_NCHW[first], x_NCHW[first + 1])
    # a batch depends on its step only
    assert torch.equal(batches(range(3, 5))[1], batches(range(4, 5))[0])
    seen = []
    for x_NCHW, _ in training_batches(plain, 12, seed=1, steps=range(3), repeats=repeats):
        for first in range(0, 12, repeats):
            copies = x_NCHW[first : first + repeats]
            assert torch.equal(copies, x_NCHW[first].expand_as(copies))
            seen.append(x_NCHW[first])
    # in the order in which they come without repetition
    [once] = [x for x, _ in training_batches(plain, 36 // repeats, seed=1, steps=range(1))]
    assert torch.equal(torch.stack(seen), once)


class Echo(Images):
    """Six images; a batch is what was asked for."""

    labels = np.zeros(6, dtype=np.int64)

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        asked = torch.tensor(requests)
        return asked, asked


def test_no_image_is_left_out_of_repeated_augmentation() -> None:
    stream = training_batches(Echo(), 4, seed=5, steps=range(6), repeats=2)
    requests = torch.cat([asked for asked, _ in stream]).tolist()
    indices = [index for index, _ in requests]
    for begin in (0, 12):
        assert indices[begin : begin + 12 : 2] == indices[begin + 1 : begin + 12 : 2]
        assert sorted(indices[begin : begin + 12 : 2]) == [0, 1, 2, 3, 4, 5]
    # two copies of one image of a step have different seeds
    draws = [draw for _, draw in requests]
    assert all(draws[i] != draws[i + 1] for i in range(0, 24, 2))


def test_no_erasing_without_its_probability() -> None:
    x_CHW = torch.randn(3, 32, 32)
    assert torch.equal(augmentation(auto="randaugment").erased(x_CHW.clone(), 0), x_CHW)


def test_global_generators_are_left_as_they_were() -> None:
    batch = (torch.randn(4, 3, 8, 8), torch.arange(4))
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    expected = (random.random(), np.random.random(), torch.rand(1).item())  # noqa: NPY002
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    ours = augmentation(auto="rand-m9-mstd0.5-inc1", erasing=1.0)
    ours.erased(torch.zeros(3, 32, 32), 5)
    ours.picture(picture(), 5)
    Mixing(AugmentationConfig(mixup=1.0), 4, 0.1)(*batch, 5)
    found = (random.random(), np.random.random(), torch.rand(1).item())  # noqa: NPY002
    assert found == expected


def test_an_image_depends_on_its_seed_only() -> None:
    images = load_images(DIGITS, "all")
    images.training_augmentation = augmentation(DIGITS, auto="trivialaugment", erasing=0.5)
    together, _ = images.__getitems__([(3, 7), (5, 7), (3, 8)])
    alone, _ = images.__getitems__([(3, 7)])
    assert torch.equal(together[0], alone[0])
    assert not torch.equal(together[0], together[2])


def test_a_folders_images_depend_on_their_seeds_only(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        for part in ("train", "val"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(4):
                picture(number).save(tmp_path / part / name / f"{number}.png")
    data = COLOUR.model_copy(update={"name": "folder", "path": str(tmp_path), "classes": 2})
    images = load_images(data, "all", augment=True)
    images.training_augmentation = augmentation(auto="rand-m9-mstd0.5-inc1", erasing=0.5)
    batches = []
    for workers in (0, 2):
        steps = training_batches(images, 4, seed=1, steps=range(2), workers=workers)
        batches.append(torch.stack([x_NCHW for x_NCHW, _ in steps]))
    assert torch.equal(batches[0], batches[1])
    plain = load_images(data, "all", augment=True)
    x_NCHW, _ = next(iter(training_batches(plain, 4, seed=1, steps=range(1))))
    assert not torch.equal(batches[0][0], x_NCHW)


def test_mixup_blends_images_and_labels() -> None:
    mixing = Mixing(AugmentationConfig(mixup=0.8), classes=5, label_smoothing=0.0)
    x_NCHW = torch.randn(6, 3, 8, 8)
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    mixed_NCHW, targets_NK = mixing(x_NCHW.clone(), y, seed=4)
    # timm blends each image with the one at the same place from the end
    share = float(targets_NK[1, 1])
    assert 0 < share < 1
    expected = share * x_NCHW + (1 - share) * x_NCHW.flip(0)
    torch.testing.assert_close(mixed_NCHW, expected)
    torch.testing.assert_close(targets_NK.sum(1), torch.ones(6))
    assert torch.equal(mixing(x_NCHW.clone(), y, seed=4)[0], mixed_NCHW)
    assert not torch.equal(mixing(x_NCHW.clone(), y, seed=5)[0], mixed_NCHW)


def test_cutmix_pastes_a_rectangle() -> None:
    mixing = Mixing(AugmentationConfig(cutmix=1.0), classes=5, label_smoothing=0.0)
    x_NCHW = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16).clone()
    mixed_NCHW, targets_NK = mixing(x_NCHW, torch.arange(4), seed=2)
    own = (mixed_NCHW[0, 0] == 0).float().mean()
    assert set(mixed_NCHW[0].unique().tolist()) == {0.0, 3.0}
    torch.testing.assert_close(targets_NK[0, 0], own)


@pytest.mark.parametrize(
    ("auto", "words"),
    [("randaugmentt", "is unknown: choose none, randaugment"), ("rand-q9", "timm can read")],
)
def test_unknown_policies_are_refused(auto: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        augmentation(auto=auto)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": {"batch_size": 33, "augmentation": {"mixup": 0.2}}}, "batch_size = 33 is odd"),
        (
            {"train": {"batch_size": 32, "augmentation": {"repeats": 3}}},
            r"batch_size = 32 is not a multiple of train\.augmentation\.repeats = 3",
        ),
        (
            {
                "task": "detect",
                "data": {"name": "coco"},
                "train": {"augmentation": {"erasing": 0.2}},
            },
            "train.augmentation.erasing = 0.2 is for classifiers",
        ),
    ],
    ids=["odd batch", "repeats", "detector"],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Experiment.model_validate({"data": {"name": "digits"}, **settings})


def test_new_keys_are_not_part_of_a_document_at_their_defaults() -> None:
    """The hash of a training with mixup from before they existed must not change."""
    content = AugmentationConfig(mixup=0.2, cutout=0, repeats=1).model_dump()
    assert content == {"auto": "none", "erasing": 0.0, "mixup": 0.2, "cutmix": 0.0}
    assert AugmentationConfig(cutout=4, repeats=2).model_dump().keys() >= {"cutout", "repeats"}
