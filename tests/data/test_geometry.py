"""Training and evaluation see images in the same way: for every data set, with every
augmentation and geometry that it allows.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from hwnas.config import DataConfig, Resize
from hwnas.config.tables import BOX_AUGMENTATIONS
from hwnas.data.geometry import Frame, Geometry
from hwnas.data.images import Images, load_images
from hwnas.nn.supernet import resized
from tests.data.scenes import PLAIN, coco_config, load, scene, write_coco

torch.set_num_threads(1)

MODES: tuple[Resize, ...] = ("squash", "crop", "pad")
SIZE = 16
MARKS = (0.35, 0.65)
WIDE, HIGH = 32, 24
RED, GREEN = (255, 0, 0), (0, 255, 0)


def geometry(**changes: Any) -> Geometry:
    return Geometry.of(DataConfig(**{"name": "folder", "resolution": 224, **changes}))


# the geometry by itself


@pytest.mark.parametrize(
    ("changes", "size", "frame"),
    [
        ({}, (640, 480), (224, 224, 0, 0)),
        # (224 - 341) / 2 is -58.5
        ({"resize": "crop"}, (640, 480), (341, 256, -58, -16)),
        ({"resize": "crop"}, (375, 500), (256, 341, -16, -58)),
        ({"augment": "imagenet"}, (256, 256), (256, 256, -16, -16)),
        ({"resize": "crop", "crop_fraction": 1}, (640, 480), (298, 224, -37, 0)),
        # 33 / 0.55 is 59.99999999999999
        ({"resize": "crop", "crop_fraction": 0.55, "resolution": 33}, (60, 60), (60, 60, -14, -14)),
        ({"resize": "pad"}, (640, 480), (224, 168, 0, 28)),
        ({"resize": "pad"}, (101, 333), (67, 224, 78, 0)),
        ({"resize": "pad"}, (3000, 2), (224, 1, 0, 112)),
        # 96 high, 160 wide
        ({"resolution": [96, 160]}, (640, 480), (160, 96, 0, 0)),
        ({"resolution": [96, 160], "resize": "pad"}, (640, 480), (128, 96, 16, 0)),
        ({"resolution": [96, 160], "resize": "pad"}, (1000, 100), (160, 16, 0, 40)),
        # the smallest size that covers 109 x 182: 96 / 0.875 and 160 / 0.875
        ({"resolution": [96, 160], "resize": "crop"}, (640, 480), (182, 136, -11, -20)),
        ({"resolution": [96, 160], "resize": "crop"}, (1000, 100), (1090, 109, -465, -6)),
    ],
)
def test_where_an_image_lies(
    changes: dict[str, Any], size: tuple[int, int], frame: tuple[int, ...]
) -> None:
    assert geometry(**changes).frame(*size) == Frame(*frame)


def test_the_defaults_are_those_of_the_augmentation() -> None:
    defaults = {
        augment: (default.mode, default.crop_fraction, default.interpolation)
        for augment in ("crop_flip", "none", "imagenet")
        for default in [geometry(augment=augment)]
    }
    assert defaults == {
        "crop_flip": ("squash", None, "bilinear"),
        "none": ("squash", None, "bilinear"),
        "imagenet": ("crop", 0.875, "bicubic"),
    }
    chosen = geometry(augment="imagenet", resize="squash", interpolation="bilinear")
    assert (chosen.mode, chosen.crop_fraction, chosen.interpolation) == ("squash", None, "bilinear")


@pytest.mark.parametrize("size", [(640, 480), (301, 187), (113, 500), (256, 256), (40, 31)])
def test_imagenet_evaluation_is_that_of_torchvision(size: tuple[int, int]) -> None:
    noise = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    )
    reference = v2.Compose(
        [v2.Resize(256, interpolation=InterpolationMode.BICUBIC), v2.CenterCrop(224)]
    )
    assert np.array_equal(
        np.asarray(geometry(augment="imagenet").fitted(noise)), np.asarray(reference(noise))
    )


@pytest.mark.parametrize("mode", MODES)
def test_boxes_map_back_to_the_photograph(mode: Resize) -> None:
    """The photograph's corners and a box inside it, from the frame and by hand."""
    mapping = geometry(resize=mode)
    width, height, left, top = mapping.frame(640, 480)
    corners = [left, top, left + width, top + height]
    inside = [left + width / 4, top + height / 2, left + width / 2, top + height]
    boxes = mapping.to_photograph(np.array([corners, inside]), 640, 480)
    assert boxes.tolist() == [pytest.approx([0, 0, 640, 480]), pytest.approx([160, 240, 320, 480])]
    assert mapping.to_photograph(np.zeros((0, 4)), 640, 480).shape == (0, 4)
    outside = mapping.to_photograph(np.array([[-10.0, -10, 300, 300]]), 640, 480)
    assert (outside.tolist() == [[0, 0, 640, 480]]) == (mode == "pad")


# measured in the tensors of every data set


def corners(width: int, height: int) -> tuple[int, list[tuple[int, int]]]:
    """The side of the two blocks in a picture, and their upper left corners."""
    side = min(width, height) // 8
    return side, [(round(width * at - side / 2), round(height * at - side / 2)) for at in MARKS]


def marked(width: int, height: int) -> np.ndarray:
    """A red and a green block on black."""
    side, (red, green) = corners(width, height)
    return scene(width, height, (RED, [*red, side, side]), (GREEN, [*green, side, side]))


def write_arrays(folder: Path) -> None:
    for part in ("train", "test"):
        np.savez(
            folder / f"{part}.npz", x=np.stack([marked(WIDE, HIGH)] * 20), y=np.arange(20) % 10
        )


def write_cifar10(folder: Path) -> None:
    """torchvision's layout, with pictures of our own."""
    root = folder / "cifar-10-batches-py"
    root.mkdir()
    rows = np.stack([marked(32, 32).transpose(2, 0, 1).reshape(-1)] * 4)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (root / name).write_bytes(pickle.dumps({"data": rows, "labels": [0, 1, 2, 3]}))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": [*"abcdefghij"]}))


def write_folder(folder: Path, picture: np.ndarray | None = None) -> None:
    for part in ("train", "val"):
        for name in "ab":
            (folder / part / name).mkdir(parents=True)
            for number in range(3):
                Image.fromarray(marked(WIDE, HIGH) if picture is None else picture).save(
                    folder / part / name / f"{number}.png"
                )


def write_boxes(folder: Path) -> None:
    for part in ("train", "val"):
        write_coco(
            folder,
            {f"{name}.png": marked(WIDE, HIGH) for name in "abcde"},
            [(0, 3, [12, 8, 12, 8])],
            part,
        )


SETS: dict[str, tuple[Callable[[Path], None], tuple[str, ...], tuple[int, int]]] = {
    "npz": (write_arrays, ("none", "crop", "crop_flip"), (WIDE, HIGH)),
    "cifar10": (write_cifar10, ("none", "crop", "crop_flip"), (32, 32)),
    "folder": (write_folder, ("none", "crop", "crop_flip", "imagenet"), (WIDE, HIGH)),
    "coco": (write_boxes, ("none", *BOX_AUGMENTATIONS), (WIDE, HIGH)),
}
"""The writer of the pictures, the augmentations that are allowed, the pictures' size.
"""
REFUSED = {
    *(("coco", augment, "crop") for augment in ("none", *BOX_AUGMENTATIONS)),
    ("folder", "imagenet", "pad"),
}
CASES = [
    (name, augment, mode)
    for name, (_, augments, _) in SETS.items()
    for augment in augments
    for mode in MODES
    if (name, augment, mode) not in REFUSED
]


@pytest.fixture
def configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str, Resize], DataConfig]:
    """A function that writes a data set of marked pictures and returns its
    configuration.
    """
    # torchvision would check for the md5 of the real pictures
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)

    def config(
        name: str, augment: str, mode: Resize, resolution: int | tuple[int, int] = SIZE
    ) -> DataConfig:
        write, _, _ = SETS[name]
        write(tmp_path)
        classes = {"folder": 2, "coco": 2}.get(name, 10)
        settings = {
            "path": str(tmp_path),
            "classes": classes,
            "resolution": resolution,
            "augment": augment,
            "resize": mode,
            **PLAIN,
        }
        return DataConfig.model_validate({"name": name, **settings})

    return config


def places(x_CHW: torch.Tensor) -> np.ndarray:
    """Centres (x, y) of the red and of the green block, in pixels."""
    bright = torch.stack([x_CHW[0] - x_CHW[2], x_CHW[1] - x_CHW[2]]).clamp(min=0).double().numpy()
    rows = np.arange(x_CHW.shape[-2]) + 0.5
    columns = np.arange(x_CHW.shape[-1]) + 0.5
    mass = bright.sum((1, 2))
    return np.stack(
        [(bright.sum(1) * columns).sum(1) / mass, (bright.sum(2) * rows).sum(1) / mass], axis=1
    )


def expected_distance(mode: Resize, width: int, height: int) -> np.ndarray:
    """How far apart the blocks are in the network's input, in x and y, by the
    definition of the mode.
    """
    factors = {
        "squash": (SIZE / width, SIZE / height),
        "crop": (18 / min(width, height),) * 2,  # 16 / 0.875 = 18.3
        "pad": (SIZE / max(width, height),) * 2,
    }[mode]
    _, (red, green) = corners(width, height)
    return np.array(factors) * np.subtract(green, red)


def drawn_batches(images: Images, draws: int, at_once: int = 100) -> Iterator[torch.Tensor]:
    """One training image in many draws. Arrays are augmented with one draw per batch,
    in which their images still differ.
    """
    for start in range(0, draws, at_once):
        yield images.__getitems__([(0, start + number) for number in range(at_once)])[0]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "augment", "mode"), CASES)
def test_training_has_the_scale_of_evaluation(
    configured: Callable[[str, str, Resize], DataConfig], name: str, augment: str, mode: Resize
) -> None:
    """Some draw augments nothing: its training image is the evaluated one, bit for bit,
    and its scale is that of the mode.

    A random area (``imagenet``) is hardly ever the whole image, but some draw comes
    close to what is evaluated.
    """
    config, (width, height) = configured(name, augment, mode), SETS[name][2]
    evaluated, held_out = (
        load_images(config, split).__getitems__([(0, 0)])[0][0] for split in ("test", "held_out")
    )
    assert torch.equal(evaluated, held_out)  # the pictures are all the same
    seen = places(evaluated)
    assert np.abs(seen[1] - seen[0] - expected_distance(mode, width, height)).max() < 0.1
    # the middle may fall between two pixels
    assert seen.mean(0) == pytest.approx([SIZE / 2, SIZE / 2], abs=0.55)
    training = load_images(config, "train", augment=True)
    if augment == "imagenet":
        images = (x for x_NCHW in drawn_batches(training, 600) for x in x_NCHW)
        nearest = min(np.abs(places(x) - seen).max() for x in images if both_are_in(x))
        assert nearest < 0.7
    else:
        assert any(
            torch.equal(x, evaluated) for x_NCHW in drawn_batches(training, 3000) for x in x_NCHW
        )


RECTANGLE = (12, 24)
FACTORS = {
    "squash": (24 / WIDE, 12 / HIGH),
    # 32 x 24 pixels cover 27 x 13 at 27 / 32, and fit into 24 x 12 at 12 / 24
    "crop": (27 / WIDE, 27 / WIDE),
    "pad": (12 / HIGH, 12 / HIGH),
}
"""Scale in x and y of the pictures in an input of 12 rows and 24 columns."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "augment", "mode"),
    [
        *(("npz", "crop_flip", mode) for mode in MODES),
        ("folder", "crop_flip", "crop"),
        ("coco", "ssdlite", "squash"),
        ("coco", "ssdlite", "pad"),
    ],
)
def test_rectangles_are_trained_as_they_are_evaluated(
    configured: Callable[..., DataConfig], name: str, augment: str, mode: Resize
) -> None:
    config = configured(name, augment, mode, RECTANGLE)
    (evaluated,), _ = load_images(config, "test").__getitems__([(0, 0)])
    assert tuple(evaluated.shape[1:]) == RECTANGLE
    seen = places(evaluated)
    _, (red, green) = corners(WIDE, HIGH)
    expected = np.array(FACTORS[mode]) * np.subtract(green, red)
    assert np.abs(seen[1] - seen[0] - expected).max() < 0.1
    assert seen.mean(0) == pytest.approx([12, 6], abs=0.55)
    training = load_images(config, "train", augment=True)
    assert any(
        torch.equal(x, evaluated) for x_NCHW in drawn_batches(training, 3000) for x in x_NCHW
    )


@pytest.mark.parametrize("mode", ["squash", "pad"])
def test_boxes_lie_on_their_objects_in_rectangles(
    configured: Callable[..., DataConfig], mode: Resize
) -> None:
    config = configured("coco", "none", mode, RECTANGLE)
    images = load_images(config, "test")
    _, y_NM5 = images.__getitems__([(0, 0)])
    x, y, width, height = 12, 8, 12, 8  # of the picture, see write_boxes
    across, down = FACTORS[mode]
    left = 0 if mode == "squash" else 4  # 16 of 24 columns
    expected = [left + x * across, y * down, left + (x + width) * across, (y + height) * down]
    assert y_NM5[0, 0, :4].tolist() == pytest.approx(expected)
    back = images.in_photograph(0, y_NM5[0, :1, :4].numpy())  # type: ignore[attr-defined]
    assert back[0].tolist() == pytest.approx([x, y, x + width, y + height])


@pytest.mark.parametrize("mode", ["squash", "crop"])
def test_random_areas_are_about_square_where_the_network_looks(
    tmp_path: Path, mode: Resize
) -> None:
    """Even in a picture three times as wide as high, of which a network for squashed
    images is never shown a square.
    """
    write_folder(tmp_path, marked(120, 40))
    settings = {
        "name": "folder",
        "path": str(tmp_path),
        "classes": 2,
        "resolution": 48,
        "augment": "imagenet",
        "resize": mode,
        **PLAIN,
    }
    config = DataConfig.model_validate(settings)
    (evaluated,), _ = load_images(config, "test").__getitems__([(0, 0)])
    images = (
        x
        for x_NCHW in drawn_batches(load_images(config, "train", augment=True), 300)
        for x in x_NCHW
    )
    apart = [np.abs(np.subtract(*places(x))) for x in images if both_are_in(x)]
    aspects = np.array([x / y for x, y in apart]) / np.divide(
        *np.abs(np.subtract(*places(evaluated)))
    )
    assert len(aspects) > 10
    # 3/4 to 4/3, with some room for blocks that are cut off a little
    assert aspects.min() > 0.7 and aspects.max() < 1.45


def both_are_in(x_CHW: torch.Tensor) -> bool:
    return bool(min((x_CHW[0] - x_CHW[2]).max(), (x_CHW[1] - x_CHW[2]).max()) > 0.5)


@pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for name in ("npz", "folder") for mode in MODES]
)
def test_a_shift_moves_the_image_and_does_not_scale_it(
    configured: Callable[[str, str, Resize], DataConfig], name: str, mode: Resize
) -> None:
    """By whole pixels, at most an eighth of the size: with ``crop``, into what lies
    around the middle, otherwise into black.
    """
    config = configured(name, "crop", mode)
    seen = places(load_images(config, "test").__getitems__([(0, 0)])[0][0])
    shifts = {
        tuple((places(x) - seen).round(3).ravel())
        for x_NCHW in drawn_batches(load_images(config, "train", augment=True), 300)
        for x in x_NCHW
    }
    assert Geometry.of(config).room == 2
    assert len(shifts) == 25
    for red_x, red_y, green_x, green_y in shifts:
        assert (red_x, red_y) == (green_x, green_y)
        assert max(abs(red_x), abs(red_y)) <= 2 and red_x % 1 == red_y % 1 == 0


@pytest.mark.parametrize("augment", ["none", "crop", "crop_flip"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resolution", [8, 20])
def test_digits_are_trained_as_they_are_evaluated(
    augment: str, mode: Resize, resolution: int
) -> None:
    """They have eight pixels a side: at that size, and enlarged."""
    config = DataConfig(
        resolution=resolution, channels=1, mean=(0.2,), std=(0.5,), augment=augment, resize=mode
    )
    evaluated = load_images(config, "train").__getitems__([(7, 0)])[0][0]
    training = load_images(config, "train", augment=True)
    neutral = any(
        torch.equal(x, evaluated)
        for draw in range(300)
        for x in training.__getitems__([(7, draw)] * 2)[0]
    )
    assert neutral


@pytest.mark.parametrize("mode", ["squash", "pad"])
def test_arrays_of_the_right_size_stay_as_they_are(tmp_path: Path, mode: Resize) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez(tmp_path / "test.npz", x=pixels, y=np.arange(10))
    for changes in ({"resize": mode}, {"resize": "crop", "crop_fraction": 1.0}):
        config = DataConfig.model_validate(
            {"name": "npz", "path": str(tmp_path), "resolution": SIZE, **PLAIN, **changes}
        )
        x_NCHW, _ = load_images(config, "test").__getitems__([(index, 0) for index in range(10)])
        assert np.array_equal((x_NCHW * 255).round().numpy().transpose(0, 2, 3, 1), pixels)


@pytest.mark.parametrize("mode", MODES)
def test_a_searched_resolution_has_the_same_field_of_view(
    configured: Callable[[str, str, Resize], DataConfig], mode: Resize
) -> None:
    """A super-net shrinks the images of the largest resolution; the winner is trained
    on images loaded at its own.
    """
    config = configured("folder", "none", mode)
    large, small = (
        load_images(config.at(size), "test").__getitems__([(0, 0)])[0] for size in (64, 32)
    )
    shrunk = places(resized(large, 32)[0])
    assert np.abs(shrunk - places(small[0])).max() < 0.6


def test_a_border_has_the_colour_of_the_mean(tmp_path: Path) -> None:
    """In the network's input, it is nearly 0."""
    write_folder(tmp_path)
    settings = {
        "name": "folder",
        "path": str(tmp_path),
        "classes": 2,
        "resolution": SIZE,
        "resize": "pad",
        "augment": "crop",
    }
    config = DataConfig.model_validate(settings)
    (x,), _ = load_images(config, "test").__getitems__([(0, 0)])
    assert x[:, :2].abs().max() < 0.01 and x[:, -2:].abs().max() < 0.01
    assert x[:, 2:-2].abs().max() > 1
    grey = load_images(
        DataConfig.model_validate({**settings, "channels": 1, "mean": [0.25], "std": [0.2]}), "test"
    )
    assert grey.__getitems__([(0, 0)])[0][0, 0, :2].abs().max() < 0.01


def test_detection_pads_in_the_middle(tmp_path: Path) -> None:
    """Targets lie on their objects, and map back to the boxes in the photograph."""
    write_boxes(tmp_path)
    images = load(coco_config(tmp_path, resolution=SIZE, resize="pad"), "test")
    x, y = images.__getitems__([(0, 0)])
    # half the size, below a border of 2 pixels
    assert y[0, 0].tolist() == [6, 2 + 4, 12, 2 + 8, 0]
    assert x[0, :, 0, 0].tolist() == [0, 0, 0]
    (row,) = images.results(0, y[0, :1, :4].numpy(), np.array([0.5]), np.array([0]))
    assert row["bbox"] == pytest.approx([12, 8, 12, 8], abs=1e-4)
