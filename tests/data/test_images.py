"""Data: the order of batches, the splits, the augmentation against a slow reference,
and every way a file can be wrong.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from hwnas.config import DataConfig
from hwnas.data.images import (
    Batch,
    Images,
    Portion,
    Request,
    _until_killed,
    evaluation_batches,
    load_images,
    sampled_images,
    split_indices,
    training_batches,
)
from hwnas.errors import ConfigError, DataError
from hwnas.failures import LOADER

torch.set_num_threads(1)

GREY: dict[str, Any] = {"channels": 1, "mean": (0.0,), "std": (1.0,)}
DIGITS = DataConfig(name="digits", resolution=8, **GREY)


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def pixels(x_NCHW: torch.Tensor) -> np.ndarray:
    return (x_NCHW * 255).round().to(torch.uint8).numpy()


def in_order(images: Images, batch_size: int) -> Iterator[Batch]:
    """All images as they are stored."""
    for start in range(0, len(images), batch_size):
        yield images.__getitems__(
            [(index, 0) for index in range(start, min(start + batch_size, len(images)))]
        )


# what makes a data set a different one


# digits


def test_digits_are_real() -> None:
    """All 1,797 of scikit-learn's digits, each in exactly one split, with its own
    label.
    """
    bunch = load_digits()
    theirs = {
        (image.tobytes(), int(label))
        for image, label in zip(
            (bunch.images * 255 / 16).round().astype(np.uint8), bunch.target, strict=True
        )
    }
    parts = [load_images(DIGITS, split) for split in ("train", "held_out", "test")]
    ours = [
        (pixels(x)[i, 0].tobytes(), int(y[i]))
        for part in parts
        for x, y in in_order(part, 500)
        for i in range(len(y))
    ]
    assert [len(part) for part in parts] == [1150, 288, 359]
    assert len(ours) == 1797 == len(bunch.target)
    assert set(ours) == theirs
    assert parts[0].names == tuple("0123456789")


def test_splits_are_disjoint_and_cover() -> None:
    assert split_indices(5, 0.2, "all").tolist() == [0, 1, 2, 3, 4]
    for total, held_out in ((10, 0.2), (1438, 0.2), (7, 0.01), (100, 0.5)):
        train, held = (
            split_indices(total, held_out, "train"),
            split_indices(total, held_out, "held_out"),
        )
        assert sorted([*train, *held]) == list(range(total))
        assert len(held) == max(1, round(total * held_out))


def test_normalisation_and_channels() -> None:
    colour = DataConfig(name="digits", resolution=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    x, _ = next(in_order(load_images(colour, "test"), 16))
    grey, _ = next(in_order(load_images(DIGITS, "test"), 16))
    assert x.shape == (16, 3, 8, 8)
    for channel, (mean, std) in enumerate(zip(colour.mean, colour.std, strict=True)):
        assert torch.allclose(x[:, channel], (grey[:, 0] - mean) / std, atol=1e-6)


def test_resizing_is_that_of_pillow() -> None:
    """Pillow's bilinear filter is antialiased too; the results agree within a grey
    level.
    """
    original = pixels(next(in_order(load_images(DIGITS, "test"), 20))[0])
    for size in (16, 13):
        resized = pixels(
            next(in_order(load_images(DIGITS.model_copy(update={"resolution": size}), "test"), 20))[
                0
            ]
        )
        expected = [
            np.asarray(Image.fromarray(image[0]).resize((size, size), Image.Resampling.BILINEAR))
            for image in original
        ]
        assert np.abs(resized[:, 0].astype(int) - np.stack(expected)).max() <= 1


def test_sampled_images_are_channels_last() -> None:
    images = load_images(DIGITS, "test")
    sample = sampled_images(images, 5)
    assert sample.shape == (5, 8, 8, 1)
    everything, _ = next(in_order(images, len(images)))
    assert np.array_equal(sample[-1], everything[-1].permute(1, 2, 0).numpy())
    assert len(sampled_images(images, 10_000)) == len(images)


# order


def test_batches_are_a_function_of_seed_and_step() -> None:
    images = load_images(DIGITS, "train", augment=True)
    uninterrupted = list(training_batches(images, 64, seed=3, steps=range(0, 40)))
    resumed = list(training_batches(images, 64, seed=3, steps=range(23, 40)))
    assert len(uninterrupted) == 40
    assert all(same(a, b) for a, b in zip(uninterrupted[23:], resumed, strict=True))
    other = list(training_batches(images, 64, seed=4, steps=range(0, 40)))
    assert not any(same(a, b) for a, b in zip(uninterrupted, other, strict=True))
    assert not any(same(a, b) for a, b in itertools.combinations(uninterrupted, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_kth_step(workers: int) -> None:
    """A stride skips steps and changes none: across epochs (1,150 images in batches of
    64), and if it does not divide the number of steps.
    """
    images = load_images(DIGITS, "train", augment=True)
    uninterrupted = list(training_batches(images, 64, seed=3, steps=range(0, 41)))
    for first, stride in ((0, 5), (3, 7), (40, 4)):
        strided = list(
            training_batches(images, 64, seed=3, steps=range(first, 41, stride), workers=workers)
        )
        assert len(strided) == len(uninterrupted[first::stride])
        assert all(same(a, b) for a, b in zip(strided, uninterrupted[first::stride], strict=True))


def test_a_portion_is_a_fixed_random_part() -> None:
    """The same images every time, each with its own label."""
    plain = load_images(DIGITS, "train")
    everything = [
        (image.tobytes(), int(label))
        for x, y in in_order(plain, 500)
        for image, label in zip(x.numpy(), y, strict=True)
    ]
    for portion, count in ((0.5, 575), (0.1, 115), (1e-9, 1)):
        part = Portion(plain, portion)
        kept = [
            (image.tobytes(), int(label))
            for x, y in in_order(part, 500)
            for image, label in zip(x.numpy(), y, strict=True)
        ]
        assert len(part) == len(kept) == count
        assert kept == [everything[i] for i in Portion(plain, portion).kept]
        assert [label for _, label in kept] == part.labels.tolist()
    assert list(Portion(plain, 0.5).kept) != list(range(575))


def test_each_epoch_visits_every_image_once() -> None:
    """Epochs need not end at batch boundaries: 3 epochs of 1,150 images in batches of
    46, of 115, and of 100.
    """
    plain = load_images(DIGITS, "train")
    everything = sorted(image.tobytes() for image in next(in_order(plain, len(plain)))[0].numpy())
    for size, steps in ((46, 75), (115, 30), (100, 35)):
        stream = np.concatenate(
            [x.numpy() for x, _ in training_batches(plain, size, seed=0, steps=range(0, steps))]
        )
        epochs = [
            [image.tobytes() for image in stream[start : start + len(plain)]]
            for start in (0, 1150, 2300)
        ]
        for epoch in epochs:
            assert sorted(epoch) == everything
        assert epochs[0] != epochs[1] != epochs[2]


class Echo(Images):
    """Images that return what they were asked for: [index, augmentation seed] per
    image.
    """

    def __init__(self, count: int) -> None:
        self.labels = np.zeros(count, dtype=np.int64)

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        return torch.tensor(requests), torch.zeros(len(requests))


def test_every_step_is_augmented_differently() -> None:
    """One seed per step, none of them twice: in a later epoch, an image looks
    different.
    """
    draws = [
        set(requests[:, 1].tolist())
        for requests, _ in training_batches(Echo(40), 8, seed=3, steps=range(0, 100))
    ]
    assert all(len(draw) == 1 for draw in draws)
    assert len(set.union(*draws)) == 100
    other = [
        set(requests[:, 1].tolist())
        for requests, _ in training_batches(Echo(40), 8, seed=4, steps=range(0, 100))
    ]
    assert not set.union(*draws) & set.union(*other)


def test_workers_change_nothing() -> None:
    images = load_images(DIGITS, "train", augment=True)
    without_workers = list(training_batches(images, 32, seed=0, steps=range(5, 15)))
    with_workers = list(training_batches(images, 32, seed=0, steps=range(5, 15), workers=2))
    assert all(same(a, b) for a, b in zip(without_workers, with_workers, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_batches_hold_every_image_once(workers: int) -> None:
    """In one fixed order; a limit takes the first of that order, which are of all
    classes.
    """
    images = load_images(DIGITS, "held_out")
    batches = list(evaluation_batches(images, 64, workers=workers))
    assert [len(y) for _, y in batches] == [64, 64, 64, 64, 32]
    in_batches = sorted(
        (image.tobytes(), int(label))
        for x, y in batches
        for image, label in zip(x.numpy(), y, strict=True)
    )
    x_NCHW, y = next(in_order(images, 288))
    assert in_batches == sorted(
        (image.tobytes(), int(label)) for image, label in zip(x_NCHW.numpy(), y, strict=True)
    )
    some = list(evaluation_batches(images, 64, limit=100, workers=workers))
    assert [len(y) for _, y in some] == [64, 36]
    assert same(some[0], batches[0])
    assert set(torch.cat([y for _, y in some]).tolist()) == set(range(10))
    assert (
        sum(len(y) for _, y in evaluation_batches(images, 64, limit=10_000, workers=workers)) == 288
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_leave_the_global_generator_alone(workers: int) -> None:
    """Dropout draws from it: a loader that a resumed run makes in the middle of a step
    must not shift the step's draws.
    """
    images = load_images(DIGITS, "train", augment=True)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    next(training_batches(images, 8, seed=0, steps=range(3, 9), workers=workers))
    next(evaluation_batches(images, 8, workers=workers))
    assert torch.equal(torch.rand(1), expected)


# augmentation


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_augmentation_against_a_slow_reference(augment: str) -> None:
    """Each image is one of the 3 x 3 crops of its zero-padded original (8 px: padding
    1), flipped or not.
    """
    config = DIGITS.model_copy(update={"augment": augment})
    train, plain = load_images(config, "train", augment=True), load_images(config, "train")
    requests = [(index, 99) for index in range(200)]
    augmented, originals = (
        pixels(train.__getitems__(requests)[0])[:, 0],
        pixels(plain.__getitems__(requests)[0])[:, 0],
    )
    seen = {}
    for image, original in zip(augmented, originals, strict=True):
        padded = np.zeros((10, 10), np.uint8)
        padded[1:9, 1:9] = original
        crops = {(top, left, flip): padded[top : top + 8, left : left + 8][:, ::-1 if flip else 1]
                 for top in range(3) for left in range(3) for flip in (False, True)}  # fmt: skip
        matching = [key for key, crop in crops.items() if np.array_equal(crop, image)]
        assert matching
        seen[matching[0]] = seen.get(matching[0], 0) + 1
    flips = sum(count for (_, _, flip), count in seen.items() if flip)
    assert {(top, left) for top, left, _ in seen} == set(itertools.product(range(3), range(3)))
    assert (60 < flips < 140) if augment == "crop_flip" else flips == 0


def test_augmentation_is_deterministic_and_only_on_request() -> None:
    images = load_images(DIGITS, "train", augment=True)
    requests = [(index, 5) for index in range(64)]
    assert same(images.__getitems__(requests), images.__getitems__(requests))
    assert not same(
        images.__getitems__(requests), images.__getitems__([(index, 6) for index in range(64)])
    )
    plain = load_images(DIGITS, "train")
    assert same(
        plain.__getitems__(requests), plain.__getitems__([(index, 6) for index in range(64)])
    )


def test_imagenet_augmentation_needs_a_folder() -> None:
    with pytest.raises(DataError, match="crop_flip"):
        load_images(DIGITS.model_copy(update={"augment": "imagenet"}), "train", augment=True)


# npz


def npz_config(folder: Path, **changes: Any) -> DataConfig:
    return DataConfig(
        **{"name": "npz", "path": str(folder), "resolution": 8, "classes": 3, **GREY, **changes}
    )


def write_npz(folder: Path, name: str = "train", count: int = 20, **changes: Any) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8),
        "y": np.arange(count) % 3,
        **changes,
    }
    np.savez(
        folder / f"{name}.npz", **{key: value for key, value in arrays.items() if value is not None}
    )


def refused(config: DataConfig, *words: str, split: str = "train") -> None:
    with pytest.raises(DataError) as caught:
        load_images(config, split)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_npz_is_read(tmp_path: Path) -> None:
    write_npz(tmp_path)
    write_npz(tmp_path, "test", 6)
    assert [
        len(load_images(npz_config(tmp_path), split)) for split in ("train", "held_out", "test")
    ] == [16, 4, 6]
    # grey images without a channel axis
    write_npz(tmp_path, "test", x=np.zeros((20, 8, 8), np.uint8))
    assert len(load_images(npz_config(tmp_path), "test")) == 20


def test_shrinking_is_that_of_pillow_too(tmp_path: Path) -> None:
    """Without antialiasing, this would be off by far more than a grey level."""
    originals = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 1), dtype=np.uint8)
    write_npz(tmp_path, "test", 6, x=originals)
    shrunk = pixels(next(in_order(load_images(npz_config(tmp_path, resolution=16), "test"), 6))[0])
    expected = [
        np.asarray(Image.fromarray(image[..., 0]).resize((16, 16), Image.Resampling.BILINEAR))
        for image in originals
    ]
    assert np.abs(shrunk[:, 0].astype(int) - np.stack(expected)).max() <= 1


def test_npz_folder_and_file_missing(tmp_path: Path) -> None:
    refused(npz_config(tmp_path, path=None), "data.path")
    refused(npz_config(tmp_path / "nowhere"), "nowhere", "not a folder")
    refused(npz_config(tmp_path), "train.npz", "does not exist")
    write_npz(tmp_path)
    refused(npz_config(tmp_path), "test.npz", split="test")


def test_npz_wrong_arrays(tmp_path: Path) -> None:
    for changes, words in (
        ({"x": np.zeros((20, 8, 8, 1), np.float32)}, ("uint8", "float32")),
        ({"x": np.zeros((20, 64), np.uint8)}, ("[20, 64]",)),
        ({"y": np.zeros(19, np.int64)}, ("[19]",)),
        ({"y": np.zeros(20)}, ("float64", "integers")),
        ({"y": None}, ("'x' and 'y'",)),
        ({"x": np.array([{"a": 1}] * 20, dtype=object)}, ("'x' and 'y'", "pickle")),
    ):
        write_npz(tmp_path, **changes)  # type: ignore[arg-type]
        refused(npz_config(tmp_path), "train.npz", *words)


def test_npz_broken_files(tmp_path: Path) -> None:
    write_npz(tmp_path)
    path = tmp_path / "train.npz"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 0xFF
    np.save(tmp_path / "array.npy", np.zeros(3))
    for content in (
        b"",
        whole[:100],
        whole[: len(whole) // 2],
        whole[:-10],
        bytes(flipped),
        b"hello",
        (tmp_path / "array.npy").read_bytes(),
    ):
        path.write_bytes(content)
        refused(npz_config(tmp_path), "train.npz")


def test_labels_outside_the_classes(tmp_path: Path) -> None:
    write_npz(tmp_path)
    refused(npz_config(tmp_path, classes=2), "0 to 2", "set data.classes to 3")
    write_npz(tmp_path, y=np.arange(20) - 1)
    refused(npz_config(tmp_path, classes=30), "-1")


def test_channels_must_agree(tmp_path: Path) -> None:
    write_npz(tmp_path, x=np.zeros((20, 8, 8, 3), np.uint8))
    refused(npz_config(tmp_path), "3 channels", "data.channels")


def test_empty_split(tmp_path: Path) -> None:
    write_npz(tmp_path, "test", 0)
    refused(npz_config(tmp_path), "no images", split="test")


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match="digits"):
        load_images(DIGITS.model_copy(update={"name": "digit"}), "train")


def test_cifar10_folder_missing(tmp_path: Path) -> None:
    refused(DataConfig(name="cifar10", path=str(tmp_path)), "cifar-10-batches-py")


@pytest.fixture(scope="session")
def unpacked_cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = os.environ.get("HWNAS_TEST_DATA")
    if not source:
        pytest.skip(
            "HWNAS_TEST_DATA is not set: it names a folder whose unpack.py makes cifar10/train.npz"
            " and test.npz"
        )
    folder = tmp_path_factory.mktemp("data")
    subprocess.run(
        [sys.executable, str(Path(source) / "unpack.py"), str(folder), "cifar10"], check=True
    )
    return folder / "cifar10"


def test_cifar10_as_npz(unpacked_cifar10: Path) -> None:
    config = DataConfig(name="npz", path=str(unpacked_cifar10))
    test, train, held_out = (load_images(config, split) for split in ("test", "train", "held_out"))
    assert (len(train), len(held_out), len(test)) == (40_000, 10_000, 10_000)
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert test.names[3] == "cat"
    means = np.mean([x.numpy().mean((0, 2, 3)) for x, _ in in_order(test, 1000)], axis=0)
    unnormalised = means * np.array(config.std) + np.array(config.mean)
    # the test images' published channel means
    assert np.allclose(unnormalised, [0.4942, 0.4851, 0.4504], atol=2e-3)


# folders


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """2 classes, 6 training and 3 validation images each, of different sizes and modes,
    as PNG (so that pixels are exact).
    """
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                size = (20 + i, 24, 3)
                image = Image.fromarray((rng.integers(0, 60, size) + 120 * label).astype(np.uint8))
                (image.convert("L") if i == 1 else image.convert("RGBA") if i == 2 else image).save(
                    folder / f"{i}.png"
                )
    return tmp_path


def folder_config(path: Path, **changes: Any) -> DataConfig:
    return DataConfig(
        **{
            "name": "folder",
            "path": str(path),
            "resolution": 16,
            "classes": 2,
            "augment": "imagenet",
            **changes,
        }
    )


def test_folder_is_decoded(image_folder: Path) -> None:
    """Evaluation: the shorter side becomes 18 px (Pillow's bicubic), then the middle
    16.
    """
    config = folder_config(image_folder, mean=(0.0,) * 3, std=(1.0,) * 3)
    test = load_images(config, "test")
    x, y = next(in_order(test, 10))
    assert x.shape == (6, 3, 16, 16)
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.names == ("cat", "dog")
    image = Image.open(image_folder / "val" / "cat" / "0.png").resize(
        (21, 18), Image.Resampling.BICUBIC
    )
    expected = np.asarray(image)[1:17, 2:18]  # torchvision rounds (21 - 16) / 2 to 2
    assert np.array_equal(pixels(x)[0].transpose(1, 2, 0), expected)
    assert x[3:].mean() - x[:3].mean() > 0.3
    assert (
        load_images(folder_config(image_folder, channels=1, mean=(0.5,), std=(0.5,)), "test")
        .__getitems__([(0, 0)])[0]
        .shape[1]
        == 1
    )


def test_folder_batches_are_deterministic(image_folder: Path) -> None:
    train = load_images(folder_config(image_folder), "train", augment=True)
    assert len(train) == 10
    assert len(load_images(folder_config(image_folder), "held_out")) == 2
    torch.manual_seed(1)
    uninterrupted = list(training_batches(train, 4, seed=0, steps=range(0, 6)))
    after = torch.rand(1)
    torch.manual_seed(2)
    for workers in (0, 2):
        resumed = list(training_batches(train, 4, seed=0, steps=range(2, 6), workers=workers))
        assert all(same(a, b) for a, b in zip(uninterrupted[2:], resumed, strict=True))
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)  # the global generator is left alone
    assert not same(uninterrupted[0], uninterrupted[3])


def test_an_image_that_does_not_decode(image_folder: Path) -> None:
    victim = image_folder / "val" / "dog" / "1.png"
    whole = victim.read_bytes()
    for content in (b"this is no image", whole[: len(whole) // 2], b""):
        victim.write_bytes(content)
        test = load_images(folder_config(image_folder), "test")
        for workers in (0, 2):  # with 2, without the traceback of a loader process
            with pytest.raises(DataError, match="does not decode") as caught:
                list(evaluation_batches(test, 3, workers=workers))
            assert str(victim) in str(caught.value)
            assert "\n" not in str(caught.value)


def test_folder_errors(image_folder: Path) -> None:
    refused(folder_config(image_folder / "train"), "train")
    refused(
        folder_config(image_folder, classes=3).model_copy(
            update={"classes": 2, "path": str(image_folder / "none")}
        ),
        "none",
    )
    empty = image_folder / "train" / "emu"
    empty.mkdir()
    refused(folder_config(image_folder, classes=3), "emu")


def test_validation_classes_must_be_the_training_classes(image_folder: Path) -> None:
    """Labels are positions in the sorted list of folders: another folder in val would
    silently shift them.
    """
    (image_folder / "val" / "cat").rename(image_folder / "val" / "cow")
    refused(folder_config(image_folder), "cat", "cow", split="test")


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError()])
def test_a_loader_that_is_killed_while_a_batch_is_fetched_is_named(error: Exception) -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise error

    batches = _until_killed(broken())
    assert next(batches) == 1
    with pytest.raises(RuntimeError) as caught:
        next(batches)
    assert LOADER.search(str(caught.value))
