"""Mosaics: every box lies on its object, no object that is seen lacks its box, and all
draws follow from the request.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from hwnas.config import Experiment
from hwnas.data.images import Batch, training_batches
from hwnas.data.mosaic import Mosaic
from tests.data.scenes import GREEN, RED, coco_config, load, scene, write_coco

torch.set_num_threads(1)

SIZE = 64


@pytest.fixture
def rectangles(tmp_path: Path) -> Path:
    """Six images with a red cat and a green dog each at places of their own, none of which
    touches an edge.
    """
    images, objects = {}, []
    for number in range(6):
        cat = [4 + 3 * number, 6, 22, 18]
        dog = [40, 32 + 2 * number, 16, 20]
        images[f"{number}.png"] = scene(SIZE, SIZE, (RED, cat), (GREEN, dog))
        objects += [(number, 3, cat), (number, 8, dog)]
    write_coco(tmp_path, images, objects)
    return tmp_path


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def components(seen: np.ndarray) -> list[list[int]]:
    """The bounding boxes, x1, y1, x2, y2, of the connected regions of a mask."""
    labelled, _ = ndimage.label(seen)
    found = ndimage.find_objects(labelled)
    return [[across.start, down.start, across.stop, down.stop] for down, across in found]


@pytest.mark.parametrize("rows", [SIZE, SIZE // 2])
def test_each_box_is_on_its_object_and_each_object_has_its_box(rectangles: Path, rows: int) -> None:
    """Judged by the connected regions of each colour; only small rests of objects may be
    seen without a box.
    """
    images = Mosaic(load(coco_config(rectangles, resolution=[rows, SIZE])), 1.0)
    x_NCHW, y = images.__getitems__([(0, draw) for draw in range(60)])
    assert x_NCHW.shape == (60, 3, rows, SIZE) and x_NCHW.dtype == torch.float32
    widths = []
    for x, targets in zip(x_NCHW, y, strict=True):
        for label in (0, 1):
            boxes = targets[targets[:, 4] == label, :4].tolist()
            for region in components((x[label] > 0.5).numpy()):
                matching = [box for box in boxes if box == pytest.approx(region, abs=1.5)]
                if matching:
                    boxes.remove(matching[0])
                    widths.append(matching[0][2] - matching[0][0])
                else:
                    width, height = region[2] - region[0], region[3] - region[1]
                    assert width * height < 0.25 * 22 * 18 * rows / SIZE
            # a box without a region of its own is a rest of a pixel or two
            assert all(min(box[2] - box[0], box[3] - box[1]) < 2.5 for box in boxes)
    assert len(widths) > 200
    # all of a cat at half its size, and at nearly its own
    assert 19 < max(widths) <= 22.5


def test_boxes_with_less_than_a_tenth_are_left_out(tmp_path: Path) -> None:
    """A box covers its whole image, which has R / 2 to R pixels a side in a mosaic: what is
    left out is less than R * R / 10, what is kept at least a quarter of that.
    """
    whole = [0, 0, SIZE, SIZE]
    write_coco(tmp_path, {"a.png": scene(SIZE, SIZE, (RED, whole))}, [(0, 3, whole)])
    images = Mosaic(load(coco_config(tmp_path)), 1.0)
    _, y = images.__getitems__([(0, draw) for draw in range(150)])
    kept = []
    left_out = []
    for targets in y:
        boxes = targets[targets[:, 4] == 0, :4].numpy()
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        kept += areas.tolist()
        left_out.append(SIZE**2 - float(areas.sum()))
        assert len(boxes) >= 1 and boxes.min() >= 0 and boxes.max() <= SIZE
    tenth = SIZE**2 / 10
    assert min(kept) >= tenth / 4 - 1e-3
    # three of them at most are left out
    assert 0 < max(left_out) < 3 * tenth


def test_boxes_smaller_than_a_pixel_are_left_out(tmp_path: Path) -> None:
    """At half of its size, a rectangle of 1.5 pixels is smaller than one."""
    thin = [30, 20, 1.5, 30]
    write_coco(tmp_path, {"a.png": scene(SIZE, SIZE)}, [(0, 3, thin)])
    _, y = Mosaic(load(coco_config(tmp_path)), 1.0).__getitems__([(0, draw) for draw in range(100)])
    boxes = y[y[..., 4] == 0]
    assert len(boxes) > 10
    assert float((boxes[:, 2] - boxes[:, 0]).min()) >= 1


def test_the_requested_image_is_put_together_with_any_others(tmp_path: Path) -> None:
    """Images of one grey each: the requested one is at the top left, and each of all
    images at every other corner of some mosaic.
    """
    greys = range(0, 240, 40)
    plain = {f"{grey}.png": np.full((SIZE, SIZE, 3), grey, np.uint8) for grey in greys}
    write_coco(tmp_path, plain, [(0, 3, [1, 1, 9, 9])])
    images = Mosaic(load(coco_config(tmp_path)), 1.0)
    x_NCHW, _ = images.__getitems__([(2, draw) for draw in range(60)])
    grey_NHW = (255 * x_NCHW[:, 0]).round().int()
    assert set(grey_NHW[:, 0, 0].tolist()) == {80}
    for row, column in ((0, -1), (-1, 0), (-1, -1)):
        assert set(grey_NHW[:, row, column].tolist()) == set(greys)
    # the point where they meet
    meets = (grey_NHW[:, 0] == 80).sum(1)
    assert len(set(meets.tolist())) > 20


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["none", "ssd"])
def test_mosaics_are_functions_of_the_request(rectangles: Path, augment: str) -> None:
    """Whatever the number of loader processes and the rest of the batch; the global
    generators stay as they were.
    """
    images = Mosaic(load(coco_config(rectangles, augment=augment), augment=True), 0.5)
    states = (random.getstate(), torch.get_rng_state())
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    straight = list(training_batches(images, 4, seed=0, steps=range(0, 4)))
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    now: Any = np.random.get_state()  # noqa: NPY002
    assert np.array_equal(now[1], numpy_state[1]) and now[2] == numpy_state[2]
    for workers in (0, 2):
        resumed = list(training_batches(images, 4, seed=0, steps=range(2, 4), workers=workers))
        assert all(same(a, b) for a, b in zip(straight[2:], resumed, strict=True))
    requests = [(index, 7) for index in range(6)]
    alone = [images.__getitems__([request])[0] for request in requests]
    assert torch.equal(images.__getitems__(requests)[0], torch.cat(alone))


def test_the_probability_of_a_mosaic(rectangles: Path) -> None:
    """An image that does not become one is the usual one, and without any mosaic, batches
    are the usual ones.
    """
    usual = load(coco_config(rectangles, augment="jitter"), augment=True)
    requests = [(draw % 6, draw) for draw in range(100)]
    x, y = usual.__getitems__(requests)
    assert same(Mosaic(usual, 0.0).__getitems__(requests), (x, y))
    some_x, _ = Mosaic(usual, 0.3).__getitems__(requests)
    changed = sum(not torch.equal(a, b) for a, b in zip(x, some_x, strict=True))
    assert 18 < changed < 42


def test_images_without_objects(tmp_path: Path) -> None:
    write_coco(tmp_path, {"a.png": scene(20, 20), "b.png": scene(20, 20)}, [(1, 3, [1, 1, 9, 9])])
    images = Mosaic(load(coco_config(tmp_path)), 1.0)
    x, y = images.__getitems__([(0, draw) for draw in range(40)])
    assert x.shape == (40, 3, SIZE, SIZE)
    counts = (y[..., 4] >= 0).sum(1)
    assert int(counts.min()) == 0 < int(counts.max()) <= 3
    assert len(images) == 2 and images.labels_of(np.array([1])).tolist() == [0]


def test_grey_mosaics(rectangles: Path) -> None:
    config = coco_config(rectangles, channels=1, mean=(0.0,), std=(1.0,))
    assert Mosaic(load(config), 1.0).__getitems__([(0, 0)])[0].shape == (1, 1, SIZE, SIZE)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": {"augmentation": {"mosaic": 0.5}}}, "mosaic = 0.5 is for detectors; remove it"),
        (
            {
                "task": "detect",
                "data": {"name": "coco"},
                "train": {"augmentation": {"mosaic": 0.5, "mixup": 0.2}},
            },
            "train.augmentation.mixup = 0.2 is for classifiers; remove it",
        ),
    ],
    ids=["classifier", "mixup"],
)
def test_mosaics_are_for_detectors(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Experiment.model_validate(settings)


def test_a_run_folder_of_before_keeps_its_hash() -> None:
    """Neither key is in the document of a training without mosaics."""
    plain = Experiment.model_validate({"train": {"augmentation": {"mixup": 0.2}}})
    assert plain.model_dump()["train"]["augmentation"] == {
        "auto": "none",
        "erasing": 0.0,
        "mixup": 0.2,
        "cutmix": 0.0,
    }
    detector: dict[str, Any] = {"task": "detect", "data": {"name": "coco"}}
    detector["train"] = {"augmentation": {"mosaic": 0.5}}
    loaded = Experiment.model_validate(detector)
    assert loaded.model_dump()["train"]["augmentation"]["mosaic"] == 0.5
    assert Experiment.model_validate(loaded.model_dump(by_alias=True)) == loaded
