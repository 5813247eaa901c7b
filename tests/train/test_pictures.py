"""Pictures of detections: which boxes they show, and where."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hwnas.nn.post_processor import Detections
from hwnas.tasks.pictures import Pictures, pictures_of
from tests.data.scenes import coco_config, load, scene, write_coco, write_scenes


def nothing() -> Detections:
    return Detections(torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.int64))


def test_boxes_are_fractions_of_the_image_and_crowds_are_left_out(tmp_path: Path) -> None:
    write_scenes(tmp_path)
    images = load(coco_config(tmp_path))
    detections = Detections(
        torch.tensor([[0.0, 16, 32, 64], [1, 1, 2, 2]]),
        torch.tensor([0.9, 0.31]),
        torch.tensor([1, 0]),
    )
    both, dog, none = pictures_of(images, {0: detections, 1: nothing(), 2: nothing()}).pictures
    assert {(box.label, box.corners) for box in both.truth} == {
        ("cat", (0.05, 0.2, 0.25, 0.5)),
        ("dog", (0.6, 0.6, 0.85, 0.9)),
    }
    first = both.found[0]
    assert (first.label, first.corners, first.score) == ("dog", (0.0, 0.25, 0.5, 1.0), 0.9)
    assert (len(both.found), len(dog.truth), len(none.truth)) == (2, 1, 0)
    pixels = np.asarray(Image.open(io.BytesIO(both.jpeg))).astype(int)
    assert pixels.shape == (100, 200, 3)
    assert np.abs(pixels[35, 30] - (255, 0, 0)).max() < 40 and pixels[5, 5].max() < 40
    assert [Image.open(io.BytesIO(picture.jpeg)).size for picture in (dog, none)] == [
        (60, 120),
        (80, 80),
    ]


def test_boxes_are_fractions_of_the_image_without_its_border(tmp_path: Path) -> None:
    """The wide image takes 64 x 32 pixels of the input, below a border of 16; the part
    of a box that lies in the border is cut off.
    """
    write_scenes(tmp_path)
    images = load(coco_config(tmp_path, resize="pad"))
    detections = Detections(
        torch.tensor([[16.0, 24, 32, 40], [32, 0, 64, 32]]),
        torch.tensor([0.9, 0.8]),
        torch.tensor([1, 0]),
    )
    picture, *_ = pictures_of(images, {0: detections}).pictures
    assert [box.corners for box in picture.found] == [(0.25, 0.25, 0.5, 0.75), (0.5, 0.0, 1.0, 0.5)]


def test_pictures_show_what_the_network_saw(tmp_path: Path) -> None:
    """An image of 16 bits under a name from Windows, in the place of a skipped one."""
    pixels = np.full((64, 64), 100 << 8, np.uint16)
    path = write_coco(
        tmp_path, {"a.png": pixels, "b.png": pixels, "c.png": scene(8, 8)}, [(1, 3, [0, 0, 32, 64])]
    )
    path.write_text(path.read_text().replace("b.png", "data\\\\train\\\\b.png"))
    images = load(coco_config(tmp_path, skip=["train/a.png"]))
    (picture,) = pictures_of(images, {0: nothing()}).pictures
    assert [box.corners for box in picture.truth] == [(0.0, 0.0, 0.5, 1.0)]
    greys = np.asarray(Image.open(io.BytesIO(picture.jpeg))).astype(int)
    assert greys.shape == (64, 64, 3)
    assert np.abs(greys - 100).max() < 3


def test_only_the_best_and_the_likely_are_shown(tmp_path: Path) -> None:
    write_scenes(tmp_path)
    images = load(coco_config(tmp_path))
    scores = torch.linspace(0.99, 0.01, 50)
    detections = Detections(torch.rand(50, 4), scores, torch.zeros(50, dtype=torch.int64))
    few = Detections(
        torch.rand(3, 4), torch.tensor([0.8, 0.3, 0.29]), torch.zeros(3, dtype=torch.int64)
    )
    many, two = pictures_of(images, {1: detections, 0: few}).pictures
    assert [box.score for box in many.found] == pytest.approx(scores[:10].tolist(), abs=1e-4)
    assert [box.score for box in two.found] == pytest.approx([0.8, 0.3])


def test_a_large_image_is_shrunk_and_a_grey_one_becomes_rgb(tmp_path: Path) -> None:
    grey = Image.fromarray(scene(900, 600)).convert("L")
    write_coco(tmp_path, {"large.png": grey}, [(0, 3, [10, 10, 300, 300])])
    (picture,) = pictures_of(load(coco_config(tmp_path)), {0: nothing()}).pictures
    opened = Image.open(io.BytesIO(picture.jpeg))
    assert (opened.size, opened.mode, opened.format) == ((320, 213), "RGB", "JPEG")
    assert picture.truth[0].corners == pytest.approx(
        (10 / 900, 10 / 600, 310 / 900, 310 / 600), abs=1e-4
    )


def test_the_document_is_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    write_scenes(tmp_path)
    images = load(coco_config(tmp_path))
    pictures = pictures_of(images, dict.fromkeys(range(3), nothing()))
    pictures.save(tmp_path / "pictures.json")
    assert Pictures.load(tmp_path / "pictures.json") == pictures
    assert pictures_of(images, dict.fromkeys(range(3), nothing())).sha256 == pictures.sha256
