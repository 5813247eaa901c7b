"""COCO data: boxes stay on their objects through every augmentation, and map back to
the stored images.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import pil_loader

from hwnas.config.tables import BOX_AUGMENTATIONS
from hwnas.data.coco import CocoImages
from hwnas.data.coco_eval import evaluate
from hwnas.data.images import (
    Batch,
    Portion,
    evaluation_batches,
    evaluation_order,
    sampled_images,
    training_batches,
)
from hwnas.errors import DataError, UnreadableImageError
from tests.data.scenes import (
    GREEN,
    RED,
    WHITE,
    coco_config,
    load,
    scene,
    write_coco,
    write_json,
    write_scenes,
)

torch.set_num_threads(1)


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# real data


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that unpacks a shared data set, once, and returns its folder."""
    source = os.environ.get("HWNAS_TEST_DATA")
    if not source:
        pytest.skip(
            "HWNAS_TEST_DATA is not set: it names a folder whose unpack.py makes coco128 and"
            " raccoon"
        )
    folder = tmp_path_factory.mktemp("coco")

    def unpack(name: str) -> Path:
        if not (folder / name).exists():
            subprocess.run(
                [sys.executable, str(Path(source) / "unpack.py"), str(folder), name], check=True
            )
        return folder / name

    return unpack


def perfect_results(images: CocoImages) -> list[dict[str, Any]]:
    """The results of a network that makes no mistakes: the targets of the batches,
    mapped back to the stored images.
    """
    rows, order = [], iter(evaluation_order(images))
    for _, y in evaluation_batches(images, 16):
        for objects in y.numpy():
            objects = objects[objects[:, 4] >= 0]
            rows += images.results(
                int(next(order)),
                objects[:, :4],
                np.full(len(objects), 0.9),
                objects[:, 4].astype(int),
            )
    return rows


def test_raccoons(unpacked: Callable[[str], Path]) -> None:
    config = coco_config(unpacked("raccoon"), classes=1, resolution=320)
    test = load(config, "test")
    assert [len(load(config, split)) for split in ("train", "held_out", "all", "test")] == [
        128,
        32,
        160,
        40,
    ]
    assert test.names == ("raccoon",)
    assert len(load(config).labels) == 173
    x, y = next(training_batches(load(config), 8, seed=0, steps=range(0, 1)))
    assert (x.shape, x.dtype, y.shape[::2], y.dtype) == (
        (8, 3, 320, 320),
        torch.float32,
        (8, 5),
        torch.float32,
    )
    metrics = evaluate(test.ground_truth(), perfect_results(test))
    assert (metrics.AP, metrics.AR100, metrics.AP_per_class["raccoon"]) == pytest.approx((1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("split", ["all", "test"])
def test_coco128(unpacked: Callable[[str], Path], split: str) -> None:
    """80 classes with ids 1 to 90, crowds, images without objects: nothing is lost on
    the way to the network's input and back.
    """
    # at 320, three boxes would be smaller than a pixel
    images = load(coco_config(unpacked("coco128"), classes=80, resolution=640), split)
    assert (len(images), len(images.names), images.category_ids[-1], images.names[79]) == (
        128,
        80,
        90,
        "toothbrush",
    )
    metrics = evaluate(images.ground_truth(), perfect_results(images))
    assert (metrics.AP, metrics.APs) == pytest.approx((1, 1))
    assert (
        sum(value is None for value in metrics.AP_per_class.values())
        == {"all": 9, "test": 7}[split]
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_padding_loses_nothing_either(unpacked: Callable[[str], Path], interpolation: str) -> None:
    """Photographs of every shape, padded to 320 x 320, and their boxes mapped back to
    the photographs' pixels.
    """
    config = coco_config(
        unpacked("raccoon"), classes=1, resolution=320, resize="pad", interpolation=interpolation
    )
    images = load(config, "test")
    assert len({round(width / height, 1) for width, height in images.sizes}) > 3
    metrics = evaluate(images.ground_truth(), perfect_results(images))
    assert pytest.approx((1, 1)) == (metrics.AP, metrics.AR100)


@pytest.mark.slow
def test_the_ground_truth_is_that_of_the_file(unpacked: Callable[[str], Path]) -> None:
    """Imperfect detections get the same metrics, to the last digit, against ours and
    against the annotation file itself.
    """
    folder = unpacked("coco128")
    images = load(coco_config(folder, classes=80, resolution=320))
    rows, rng = perfect_results(images), np.random.default_rng(0)
    for row in rows:
        row["bbox"] = (np.array(row["bbox"]) + rng.normal(0, 4, 4)).tolist()
        row["score"] = rng.random()
    metrics = evaluate(images.ground_truth(), rows)
    assert 0.2 < metrics.AP < 0.8
    assert metrics == evaluate(
        json.loads((folder / "annotations" / "instances_train2017.json").read_text()), rows
    )


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["none", *BOX_AUGMENTATIONS])
def test_batches_are_functions_of_seed_and_step(
    unpacked: Callable[[str], Path], augment: str
) -> None:
    """Whatever the number of loader processes and the first step; and the global
    generator is left as it was.
    """
    images = load(
        coco_config(unpacked("raccoon"), classes=1, augment=augment), "train", augment=True
    )
    torch.manual_seed(1)
    uninterrupted = list(training_batches(images, 8, seed=0, steps=range(0, 4)))
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    for workers in (0, 2):
        resumed = list(training_batches(images, 8, seed=0, steps=range(2, 4), workers=workers))
        assert all(same(a, b) for a, b in zip(uninterrupted[2:], resumed, strict=True))
    requests = [(index, 7) for index in range(8)]
    # an image does not depend on what else is in its batch
    alone = [images.__getitems__([request]) for request in requests]
    assert torch.equal(images.__getitems__(requests)[0], torch.cat([x for x, _ in alone]))
    assert same(
        images.__getitems__(requests), images.__getitems__([(index, 8) for index in range(8)])
    ) == (augment == "none")


def test_a_portion_of_images(scenes: Path) -> None:
    """It knows its own objects, of which an image may have any number."""
    images = load(coco_config(scenes))
    for portion, count in ((0.3, 1), (0.7, 2), (1, 3)):
        part = Portion(images, portion)
        objects = images.ground_truth(part.kept)["annotations"]
        assert len(part) == len(part.kept) == count
        assert part.labels.tolist() == [{3: 0, 8: 1}[row["category_id"]] for row in objects]
        assert part.labels_of(np.arange(count)).tolist() == part.labels.tolist()
        assert same(part.__getitems__([(0, 0)]), images.__getitems__([(int(part.kept[0]), 0)]))


# scenes


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """The folder of ``write_scenes``."""
    write_scenes(tmp_path)
    return tmp_path


def test_targets_are_in_pixels_of_the_input(scenes: Path) -> None:
    """Each axis has its own factor, classes follow the order of the ids, padding has
    class -1, crowds are left out, and an image may have no objects.
    """
    images = load(coco_config(scenes))
    x, y = images.__getitems__([(0, 0), (1, 0), (2, 0)])
    assert images.names == ("cat", "dog")
    assert (images.ids.tolist(), images.category_ids, images.sizes.tolist()) == (
        [5, 6, 7],
        (3, 8),
        [[200, 100], [60, 120], [80, 80]],
    )
    assert y.tolist() == [
        [pytest.approx([38.4, 38.4, 54.4, 57.6, 1]), pytest.approx([3.2, 12.8, 16, 32, 0])],
        [pytest.approx([64 / 3, 32, 160 / 3, 160 / 3, 1]), [-1] * 5],
        [[-1] * 5, [-1] * 5],
    ]
    assert x[0, :, 25, 10].tolist() == [1, 0, 0]
    for index, name in enumerate(("both", "dog")):
        expected = Image.open(scenes / "train" / f"{name}.png").resize(
            (64, 64), Image.Resampling.BILINEAR
        )
        assert (
            x[index] * 255 - torch.from_numpy(np.array(expected)).permute(2, 0, 1)
        ).abs().max() <= 1
    assert images.__getitems__([(2, 0)])[1].shape == (1, 0, 5)
    assert sampled_images(images, 2).shape == (2, 64, 64, 3)


def test_input_is_normalised(scenes: Path) -> None:
    config = coco_config(scenes, mean=(0.5, 0.25, 0.125), std=(0.5, 0.25, 0.125))
    (plain, _), (x, _) = (
        load(settings).__getitems__([(0, 0), (1, 0)]) for settings in (coco_config(scenes), config)
    )
    channels = torch.tensor(config.mean).view(3, 1, 1)
    assert torch.allclose(x, (plain - channels) / channels, atol=1e-6)
    grey = load(
        coco_config(scenes, channels=1, mean=(0.0,), std=(1.0,), augment="ssd"), augment=True
    )
    assert grey.__getitems__([(0, 0)])[0].shape == (1, 1, 64, 64)


def test_results_are_in_pixels_of_the_image(scenes: Path) -> None:
    """So is the ground truth: the file's, crowds too, for the requested images."""
    images = load(coco_config(scenes))
    rows = images.results(
        0,
        np.array([[38.4, 38.4, 54.4, 57.6], [3.2, 12.8, 16, 32]]),
        np.array([0.5, 0.25]),
        np.array([1, 0]),
    )
    assert [(row["image_id"], row["category_id"], row["score"]) for row in rows] == [
        (5, 8, 0.5),
        (5, 3, 0.25),
    ]
    assert [row["bbox"] for row in rows] == [
        pytest.approx([120, 60, 50, 30]),
        pytest.approx([10, 20, 40, 30]),
    ]
    assert images.results(2, np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)) == []
    json.dumps(rows)  # fails unless the numbers are plain
    truth = images.ground_truth([2, 1])
    assert [row["id"] for row in truth["images"]] == [7, 6]
    assert [
        (row["id"], row["image_id"], row["category_id"], row["bbox"])
        for row in truth["annotations"]
    ] == [(1, 6, 8, [20, 60, 30, 40])]
    assert truth["categories"] == [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]
    everything = images.ground_truth()
    assert [(row["category_id"], row["iscrowd"]) for row in everything["annotations"]] == [
        (8, 0),
        (3, 0),
        (3, 1),
        (8, 0),
    ]
    assert evaluate(everything, rows).AP_per_class == {
        "cat": pytest.approx(1),
        "dog": pytest.approx(51 / 101),
    }


def test_splits(scenes: Path) -> None:
    """Held-out images are always the same, and the rest are trained on; the test images
    are those of val, under either name.
    """
    path = write_coco(
        scenes, {f"{number}.png": scene(20, 20) for number in range(10)}, [(0, 3, [1, 1, 9, 9])]
    )
    config = coco_config(scenes)
    parts = {split: set(load(config, split).ids.tolist()) for split in ("train", "held_out", "all")}
    assert parts["train"] | parts["held_out"] == parts["all"] == set(range(5, 15))
    assert not parts["train"] & parts["held_out"]
    assert len(parts["held_out"]) == 2
    content = json.loads(path.read_text())
    # the same images are held out if the file lists them in another order
    write_json(scenes, {**content, "images": content["images"][::-1]})
    assert set(load(config, "held_out").ids.tolist()) == parts["held_out"]
    [empty] = [split for split in ("train", "held_out") if 5 not in parts[split]]
    x, y = load(config, empty).__getitems__([(0, 0)])  # no objects in this part
    assert (len(x), y.shape) == (1, (1, 0, 5))
    for part in ("val", "val2017"):
        write_coco(scenes, {f"{part}.png": scene(20, 20)}, [(0, 3, [1, 1, 9, 9])], part)
    assert load(config, "test").annotations.file_names == ("val2017.png",)


# augmentation


def bounding_box(x_CHW: torch.Tensor, seen: torch.Tensor) -> tuple[float, float, float, float]:
    """The bounding box of the pixels ``seen``: x1, y1, x2, y2."""
    rows, columns = torch.nonzero(seen, as_tuple=True)
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["squash", "pad"])
@pytest.mark.parametrize("augment", ["ssdlite", "ssd"])
def test_boxes_stay_on_their_objects(tmp_path: Path, augment: str, resize: str) -> None:
    """A white object on black is where its box is after any crop, zoom, flip and
    resize, and keeps its class.
    """
    write_coco(
        tmp_path, {"a.png": scene(120, 90, (WHITE, [20, 30, 40, 24]))}, [(0, 8, [20, 30, 40, 24])]
    )
    images = load(
        coco_config(tmp_path, augment=augment, resolution=48, resize=resize), augment=True
    )
    x_NCHW, y = images.__getitems__([(0, draw) for draw in range(150)])
    sides = []
    for x, (target,) in zip(x_NCHW, y, strict=True):
        *box, label = target.tolist()
        assert label == 1
        bright = x.sum(0)
        middle = bright[int(box[1] + box[3]) // 2, int(box[0] + box[2]) // 2]
        assert bounding_box(x, bright > middle / 2) == pytest.approx(box, abs=1.5)
        sides.append(box[2] - box[0])
    assert max(sides) > 30  # it would be 16 without a crop
    assert (min(sides) < 6) == (augment == "ssd")  # only "ssd" zooms out
    # only "ssd" distorts colours
    assert len({round(float(x.max()), 2) for x in x_NCHW}) > 10 or augment == "ssdlite"


@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_jitter_scales_the_evaluated_image(tmp_path: Path, resize: str) -> None:
    """By 0.8 to 1.25, with other colours; the box stays on its object."""
    box = [50, 36, 20, 20]
    write_coco(tmp_path, {"a.png": scene(120, 90, (WHITE, box))}, [(0, 8, box)])
    config = coco_config(tmp_path, augment="jitter", resolution=48, resize=resize)
    evaluated = load(config).__getitems__([(0, 0)])[1][0, 0]
    x_NCHW, y = load(config, augment=True).__getitems__([(0, draw) for draw in range(100)])
    scales = []
    for x, (target,) in zip(x_NCHW, y, strict=True):
        bright = x.sum(0)
        left, top, right, bottom, label = target.tolist()
        middle = bright[int(top + bottom) // 2, int(left + right) // 2]
        assert label == 1
        assert bounding_box(x, bright > middle / 2) == pytest.approx(target[:4].tolist(), abs=1)
        scales.append((right - left) / float(evaluated[2] - evaluated[0]))
    assert 0.75 < min(scales) < 0.85 and 1.18 < max(scales) < 1.28
    assert len({round(float(x.max()), 2) for x in x_NCHW}) > 10
    assert len({round(float(left)) for left in y[:, 0, 0]}) > 10


@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_large_scale_jitter_loses_no_object_that_is_seen(tmp_path: Path, resize: str) -> None:
    """At 0.1 to 2 times the input's size, each box is the rectangle of its colour, and
    what has no box has no pixels of its colour.
    """
    red, green = [10, 10, 50, 40], [70, 40, 40, 45]
    write_coco(
        tmp_path,
        {"a.png": scene(120, 90, (RED, red), (GREEN, green))},
        [(0, 3, red), (0, 8, green)],
    )
    config = coco_config(tmp_path, augment="lsj", resolution=48, resize=resize)
    x_NCHW, y = load(config, augment=True).__getitems__([(0, draw) for draw in range(150)])
    sides, unseen = [], 0
    for x, targets in zip(x_NCHW, y, strict=True):
        boxes = {int(row[4]): row[:4].tolist() for row in targets if row[4] >= 0}
        for label in (0, 1):
            seen = x[label] > 0.5
            if label in boxes:
                assert bounding_box(x, seen) == pytest.approx(boxes[label], abs=1)
                sides.append(boxes[label][2] - boxes[label][0])
            else:
                # at most a sliver of less than a pixel
                assert min(int(seen.any(0).sum()), int(seen.any(1).sum())) <= 1
                unseen += 1
    # the red one is 20 pixels wide in evaluation
    assert min(sides) < 4 and max(sides) > 35
    assert 0 < unseen < 150


def test_a_smaller_image_lies_anywhere_in_a_border_of_the_mean(tmp_path: Path) -> None:
    whole = [0, 0, 40, 40]
    write_coco(tmp_path, {"a.png": scene(40, 40, (WHITE, whole))}, [(0, 3, whole)])
    config = coco_config(tmp_path, augment="lsj", mean=(0.5, 0.25, 0.75), std=(0.2, 0.2, 0.2))
    x_NCHW, y = load(config, augment=True).__getitems__([(0, draw) for draw in range(80)])
    corners = []
    for x, (box,) in zip(x_NCHW, y, strict=True):
        left, top, right, bottom = box[:4].round().int().tolist()
        x[:, top:bottom, left:right] = 0
        assert x.abs().max() < 0.02
        corners.append((left, top))
    assert len(set(corners)) > 30
    assert max(left for left, _ in corners) > 32


def test_every_image_is_augmented_independently(tmp_path: Path) -> None:
    """Draws depend on the step and on the image: two equal images in one batch come out
    different.
    """
    box = [20, 30, 40, 24]
    write_coco(
        tmp_path,
        {f"{name}.png": scene(120, 90, (WHITE, box)) for name in "ab"},
        [(0, 8, box), (1, 8, box)],
    )
    images = load(coco_config(tmp_path, augment="ssd"), augment=True)
    differing = 0
    for draw in range(0, 1000, 100):
        x_NCHW, _ = images.__getitems__([(0, draw), (1, draw)])
        differing += not torch.equal(*x_NCHW)
    assert differing > 5


@pytest.mark.slow
def test_flips_and_crops_are_drawn(scenes: Path) -> None:
    """Half of the images are flipped; a crop may cut an object off, whose box is then
    gone, while the other one keeps its class.
    """
    images = load(coco_config(scenes, augment="ssdlite"), augment=True)
    x_NCHW, y = images.__getitems__([(0, draw) for draw in range(150)])
    flipped, alone = 0, 0
    for x, targets in zip(x_NCHW, y, strict=True):
        boxes = {int(row[4]): row[:4].tolist() for row in targets if row[4] >= 0}
        assert boxes
        for label, box in boxes.items():
            assert bounding_box(x, x[label] > 0.5) == pytest.approx(box, abs=1.5)
        alone += len(boxes) == 1
        flipped += len(boxes) == 2 and boxes[0][0] > boxes[1][0]
    both = 150 - alone
    assert 15 < alone < 100
    assert 0.35 * both < flipped < 0.65 * both


def test_zooming_out_fills_with_the_mean(tmp_path: Path) -> None:
    write_coco(
        tmp_path, {"a.png": scene(40, 40, (WHITE, [0, 0, 40, 40]))}, [(0, 3, [0, 0, 40, 40])]
    )
    config = coco_config(tmp_path, augment="ssd", mean=(0.5, 0.25, 0.75), std=(0.2, 0.2, 0.2))
    x_NCHW, y = load(config, augment=True).__getitems__([(0, draw) for draw in range(60)])
    around = [x[:, 0, 0] for x, (box,) in zip(x_NCHW, y, strict=True) if min(box[:2]) > 3]
    assert len(around) > 5
    assert torch.stack(around).abs().max() < 0.02


@pytest.mark.slow
def test_large_photographs_are_shrunk_for_training(tmp_path: Path) -> None:
    """Their boxes shrink too; evaluation keeps every pixel."""
    write_coco(
        tmp_path,
        {"a.jpg": scene(1600, 1200, (WHITE, [400, 300, 500, 200]))},
        [(0, 3, [400, 300, 500, 200])],
    )
    train, plain = (
        load(coco_config(tmp_path, augment="ssdlite"), augment=augment) for augment in (True, False)
    )
    assert (train._decoded(0).size, plain._decoded(0).size) == ((256, 192), (1600, 1200))
    x_NCHW, y = train.__getitems__([(0, draw) for draw in range(50)])
    for x, (target,) in zip(x_NCHW, y, strict=True):
        assert bounding_box(x, x[0] > 0.5) == pytest.approx(target[:4].tolist(), abs=2)


@pytest.mark.parametrize(
    "objects",
    [
        [(0, 3, [0.0, 0.0, 2.0, 2.0]), (1, 3, [5.0, 5.0, 20.0, 20.0])],
        [(1, 3, [5.0, 5.0, 20.0, 20.0])],
    ],
)
def test_tiny_and_empty_images_are_augmented(tmp_path: Path, objects: list[Any]) -> None:
    """torchvision's crop divides by zero on the former, and hardly ever ends on the
    latter.
    """
    write_coco(tmp_path, {"tiny.png": scene(3, 2), "b.png": scene(40, 40)}, objects)
    for augment in BOX_AUGMENTATIONS:
        images = load(coco_config(tmp_path, augment=augment), augment=True)
        x, y = images.__getitems__([(0, draw) for draw in range(50)])
        assert x.shape == (50, 3, 64, 64)
        assert y.shape[1] == len(objects) - 1


def test_boxes_smaller_than_a_pixel_are_left_out(tmp_path: Path) -> None:
    write_coco(
        tmp_path, {"a.png": scene(640, 640)}, [(0, 3, [10, 10, 9, 50]), (0, 8, [10, 10, 11, 50])]
    )
    assert load(coco_config(tmp_path)).__getitems__([(0, 0)])[1].tolist() == [
        [pytest.approx([1, 1, 2.1, 6, 1])]
    ]
    assert len(load(coco_config(tmp_path)).ground_truth()["annotations"]) == 2


# kinds of images


def test_every_kind_of_image_decodes_as_in_torchvision(tmp_path: Path) -> None:
    """Grey, CMYK, palette and alpha become RGB; EXIF orientation is not applied."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
        (64, 64), Image.Resampling.BICUBIC
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # the tag Orientation: turned by 90 degrees
    pictures = {
        "rgb.jpg": colours,
        "grey.jpg": colours.convert("L"),
        "cmyk.jpg": colours.convert("CMYK"),
        "turned.jpg": colours,
    }
    pictures |= {"palette.png": colours.convert("P"), "alpha.png": colours.convert("RGBA")}
    write_coco(tmp_path, pictures, [(0, 3, [1, 1, 9, 9])])
    colours.save(tmp_path / "train" / "turned.jpg", exif=exif, quality=95, subsampling=0)
    x, _ = load(coco_config(tmp_path)).__getitems__([(index, 0) for index in range(len(pictures))])
    for decoded, name in zip((x * 255).round(), pictures, strict=True):
        path = str(tmp_path / "train" / name)
        assert torch.equal(decoded, torch.from_numpy(np.array(pil_loader(path))).permute(2, 0, 1))
    assert torch.equal(x[0], x[3])
    assert x[1].std(0).max() == 0
    assert (x[2] - x[0]).abs().mean() < 0.02  # neither inverted nor recoloured


def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    """Its boxes would be misplaced: usually, the photograph was annotated after it had
    been turned.
    """
    path = write_coco(tmp_path, {"a.png": scene(40, 20)}, [(0, 3, [1, 1, 9, 9])])
    content = json.loads(path.read_text())
    content["images"][0] |= {"width": 20, "height": 40}
    write_json(tmp_path, content)
    with pytest.raises(DataError, match=r"a\.png is 40 x 20 .* says 20 x 40.*EXIF") as caught:
        load(coco_config(tmp_path)).__getitems__([(0, 0)])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_does_not_decode(tmp_path: Path, workers: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    write_coco(tmp_path, {"a.jpg": noise, "b.jpg": noise}, [(0, 3, [1, 1, 9, 9])])
    victim = tmp_path / "train" / "b.jpg"
    whole = victim.read_bytes()
    for content in (b"this is no image", whole[: len(whole) // 2], whole[:30], b""):
        victim.write_bytes(content)
        for augment in (True, False):
            images = load(coco_config(tmp_path, augment="ssd"), augment=augment)
            with pytest.raises(DataError, match=r"does not decode .* replace or") as caught:
                list(training_batches(images, 2, seed=0, steps=range(0, 2), workers=workers))
            assert str(victim) in str(caught.value)
            assert "\n" not in str(caught.value)


def test_16_bit_grey_images_keep_their_greys(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    write_coco(tmp_path, {"a.png": levels}, [(0, 3, [1, 1, 9, 9])])
    x, _ = load(coco_config(tmp_path)).__getitems__([(0, 0)])
    expected = torch.from_numpy((levels >> 8).astype(np.float32) / 255)
    assert torch.allclose(x[0], expected.expand(3, 64, 64), atol=1e-6)


def test_images_are_found_under_names_of_other_systems(tmp_path: Path) -> None:
    """And their own names stay in the ground truth."""
    red = scene(40, 20, ((255, 0, 0), [0, 0, 40, 20]))
    path = write_coco(tmp_path, {"a b.png": red}, [(0, 3, [1, 1, 9, 9])])
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = "data\\train\\a%20b.png"
    write_json(tmp_path, content)
    images = load(coco_config(tmp_path))
    assert images.files() == ["train/a b.png"]
    assert images.__getitems__([(0, 0)])[0][0, :, 10, 10].tolist() == [1, 0, 0]
    assert images.ground_truth()["images"][0]["file_name"] == "data\\train\\a%20b.png"


def test_images_elsewhere_need_a_permission(tmp_path: Path) -> None:
    write_coco(tmp_path, {"a.png": scene(40, 20)}, [(0, 3, [1, 1, 9, 9])])
    path = write_coco(tmp_path, {"b.png": scene(40, 20)}, [(0, 3, [1, 1, 9, 9])], "val")
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = "../train/../val/b.png"
    write_json(tmp_path, content)
    with pytest.raises(DataError, match=r"lead out of .*data\.allow_outside = true"):
        load(coco_config(tmp_path))
    images = load(coco_config(tmp_path, allow_outside=True))
    assert images.files() == ["train/../val/b.png"]
    assert len(images.__getitems__([(0, 0)])[0]) == 1


# images that are left out


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """Eight training images in grey 0, 20, ..., each with a box of its own width, and as
    many for validation.
    """
    for part in ("train", "val"):
        images, objects = {}, []
        for number in range(8):
            images[f"{number}.png"] = np.full((64, 64, 3), 20 * number, np.uint8)
            objects.append((number, (3, 8)[number % 2], [0, 0, 10 + number, 20]))
        write_coco(tmp_path, images, objects, part)
    return tmp_path


def shown_images(images: CocoImages) -> list[tuple[int, int, int]]:
    """(number by its grey, number by its box, class) of every image."""
    x, y = images.__getitems__([(index, 0) for index in range(len(images))])
    greys = (x[:, 0, 0, 0] * 255 / 20).round().int().tolist()
    widths = (y[:, 0, 2] - 10).round().int().tolist()
    return list(zip(greys, widths, y[:, 0, 4].int().tolist(), strict=True))


@pytest.mark.parametrize("on_disk", [True, False])
def test_another_image_is_trained_on_in_the_place_of_a_skipped_one(
    coloured: Path, on_disk: bool
) -> None:
    """The next of its split with its box, so that all others keep their places, whether
    the skipped file still exists or not.
    """
    skip = ("train/2.png", "train/3.png", "train/7.png", "val/0.png", "elsewhere.png")
    usual = {split: load(coco_config(coloured), split) for split in ("all", "train", "held_out")}
    if not on_disk:
        for name in skip[:4]:
            (coloured / name).unlink()
    left = [0, 1, 4, 5, 6]
    for split, whole in usual.items():
        images = load(coco_config(coloured, skip=skip), split)
        assert images.files() == whole.files()
        own = [int(key) - 5 for key in whole.ids]
        expected = []
        for position in range(len(own)):
            following = own[position:] + own[:position]
            expected.append(next(number for number in following if number in left))
        assert [grey for grey, _, _ in shown_images(images)] == expected
        assert [width for _, width, _ in shown_images(images)] == expected
        labels = [number % 2 for number in expected]
        assert [label for _, _, label in shown_images(images)] == labels
        assert images.labels.tolist() == labels
        assert images.labels_of(np.array([0, 1])).tolist() == labels[:2]
        for index, (width, height) in enumerate(images.sizes):
            assert images.in_photograph(index, np.ones((1, 4))).shape == (1, 4)
            assert (width, height) == (64, 64)


def test_evaluations_go_without_skipped_images(coloured: Path) -> None:
    """Neither in the test split nor in a training split does an image count twice."""
    skip = ("train/2.png", "train/7.png", "val/0.png", "val/5.png")
    config = coco_config(coloured, skip=skip)
    test = load(config, "test")
    assert test.files() == [f"val/{number}.png" for number in (1, 2, 3, 4, 6, 7)]
    assert [grey for grey, _, _ in shown_images(test)] == [1, 2, 3, 4, 6, 7]
    for images, left in ((test, 6), (load(config), 6)):
        truth = images.ground_truth()
        ids = [row["id"] for row in truth["images"]]
        assert len(ids) == len({*ids}) == len(truth["annotations"]) == left
        results = perfect_results(images)
        assert sorted(row["image_id"] for row in results) == sorted(ids)
        assert pytest.approx(1) == evaluate(truth, results).AP
    assert load(config).ground_truth([1, 2])["images"][0]["id"] == 6
    assert len(load(config).ground_truth([1, 2])["images"]) == 1


def test_a_split_without_any_image_left_is_one_sentence(coloured: Path) -> None:
    for part, split in (("val", "test"), ("train", "all")):
        skip = tuple(f"{part}/{number}.png" for number in range(8))
        with pytest.raises(DataError, match=f"data.skip leaves no image of the {split}"):
            load(coco_config(coloured, skip=skip), split)


def test_a_skipped_image_is_not_read(coloured: Path) -> None:
    (coloured / "train" / "2.png").write_bytes(b"nothing")
    images = load(coco_config(coloured))
    with pytest.raises(UnreadableImageError) as caught:
        images.__getitems__([(2, 0)])
    assert caught.value.image == images.files()[2] == "train/2.png"
    images = load(coco_config(coloured, skip=[caught.value.image]))
    assert shown_images(images)[2] == shown_images(images)[3]


def test_stored_sizes_are_checked_without_decoding(tmp_path: Path) -> None:
    write_coco(tmp_path, {"a.png": scene(40, 20)}, [(0, 3, [1, 1, 9, 9])])
    images = load(coco_config(tmp_path))
    images.check_size(0, (40, 20))
    with pytest.raises(DataError, match=r"a\.png is 20 x 40 .* says 40 x 20.*EXIF"):
        images.check_size(0, (20, 40))
    assert images.label_files() == [tmp_path / "annotations" / "instances_train.json"]


# categories that nothing can be learned of


def test_categories_without_objects_are_said_once(tmp_path: Path) -> None:
    """As Roboflow's root category, which is no class at all."""
    names = ["shapes", "square", "bar", "bird", "bee", "\x1b[2J"]
    path = write_coco(
        tmp_path,
        {"a.png": scene(40, 20)},
        [(0, 1, [1, 1, 9, 9]), (0, 2, [1, 1, 9, 9])],
        categories=[{"id": key, "name": name} for key, name in enumerate(names)],
    )
    with pytest.warns(UserWarning) as caught:
        load(coco_config(tmp_path, classes=6))
    assert [str(warning.message) for warning in caught] == [
        f"{path} has no objects of 4 of its 6 categories ('shapes', 'bird', 'bee' and 1 more), so"
        " the network cannot learn to find any: annotate some, or remove the categories from the"
        " files of both parts."
    ]


def test_categories_with_only_crowds_are_said_once(tmp_path: Path) -> None:
    path = write_coco(
        tmp_path, {"a.png": scene(40, 20)}, [(0, 3, [1, 1, 9, 9]), (0, 8, [1, 1, 9, 9])]
    )
    content = json.loads(path.read_text())
    content["annotations"][1]["iscrowd"] = 1
    write_json(tmp_path, content)
    with pytest.warns(UserWarning) as caught:
        load(coco_config(tmp_path))
    [message] = [str(warning.message) for warning in caught]
    assert message.startswith(
        f"{path} has only crowds (iscrowd = 1) of 1 of its 2 categories ('dog'), from which"
    )


def test_a_class_may_be_missing_in_validation(coloured: Path) -> None:
    write_coco(coloured, {"0.png": scene(40, 20)}, [(0, 3, [1, 1, 9, 9])], "val")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(coco_config(coloured), "test")
        load(coco_config(coloured), "all")


def test_one_class(tmp_path: Path) -> None:
    write_coco(
        tmp_path,
        {"a.png": scene(20, 20)},
        [(0, 3, [1, 1, 9, 9])],
        categories=[{"id": 3, "name": "cat"}],
    )
    images = load(coco_config(tmp_path, classes=1))
    assert images.__getitems__([(0, 0)])[1][0, 0, 4] == 0
    assert evaluate(images.ground_truth(), perfect_results(images)).AP_per_class == {
        "cat": pytest.approx(1)
    }
