"""Every way that a data set in COCO's layout can be wrong."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hwnas.config import DataConfig
from hwnas.data import fingerprint
from hwnas.data.coco_file import read_annotations
from hwnas.data.images import load_images
from hwnas.errors import DataError
from tests.data.scenes import coco_config, load, scene, write_coco, write_json, write_scenes


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """The folder of ``write_scenes``."""
    write_scenes(tmp_path)
    return tmp_path


def refused(config: DataConfig, *words: str, split: str = "all") -> None:
    with pytest.raises(DataError) as caught:
        load_images(config, split)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def change(*path: str | int, to: Any = None) -> Callable[[Any], None]:
    """A function that sets a key of the annotation file, or removes it if ``to`` is
    None.
    """

    def apply(content: Any) -> None:
        *parents, last = path
        for step in parents:
            content = content[step]
        if to is None:
            del content[last]
        else:
            content[last] = to

    return apply


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (change("annotations", to=[]), ("no annotations",)),
        (change("images", to=[]), ("no images",)),
        (change("categories", to=[]), ("no categories",)),
        (change("annotations"), ("'annotations' is missing",)),
        (change("images", 0, "width"), ("images.0.width", "missing")),
        (change("images", 0, "height", to=0), ("images.0.height = 0",)),
        (change("images", 1, "id", to="6"), ("images.1.id = '6'", "integer")),
        (change("annotations", 1, "bbox", to=[1, 2, 3]), ("annotations.1.bbox",)),
        (
            change("annotations", 1, "bbox", to=[1, 2, -3, 4]),
            ("annotations.1.bbox.2 = -3", "greater than or equal to 0"),
        ),
        (
            change("annotations", 1, "bbox", to=[float("nan"), 2, 3, 4]),
            ("annotations.1.bbox.0 = nan", "finite"),
        ),
        (
            change("annotations", 1, "bbox", to=[1, 2, 3, float("inf")]),
            ("annotations.1.bbox.3 = inf", "finite"),
        ),
        (
            change("annotations", 1, "bbox", to=["1", 2, 3, 4]),
            ("annotations.1.bbox.0 = '1'", "number"),
        ),
        (change("annotations", 1, "area", to=-1), ("annotations.1.area = -1",)),
        (change("annotations", 1, "iscrowd", to=2), ("annotations.1.iscrowd = 2",)),
        (
            change("annotations", 1, "image_id", to=99),
            ("number 1 in its list", "image_id 99", "no such image"),
        ),
        (change("annotations", 1, "image_id", to=-99), ("image_id -99",)),
        (
            change("annotations", 1, "category_id", to=4),
            ("number 1 in its list", "category_id 4", "no such category"),
        ),
        (change("images", 1, "id", to=5), ("image ids", "5 occurs more than once")),
        (change("categories", 1, "id", to=8), ("category ids", "8 occurs more than once")),
        (
            change("categories", 1, "name", to="dog"),
            ("category names", "'dog' occurs more than once"),
        ),
        (
            change("images", 1, "file_name", to="gone.png"),
            ("names 3 images, of which 1 are not in", "'gone.png'"),
        ),
        (
            change("categories", to=[{"id": n, "name": str(n)} for n in range(1, 10)]),
            ("9 categories", "data.classes = 2", "to 9"),
        ),
    ],
)
def test_annotation_files_that_are_wrong(
    scenes: Path, mistake: Callable[[Any], None], words: tuple[str, ...]
) -> None:
    path = scenes / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    mistake(content)
    path.write_text(json.dumps(content))
    refused(coco_config(scenes), str(path), *words)


def test_annotation_files_that_are_missing_or_something_else(scenes: Path) -> None:
    path = scenes / "annotations" / "instances_train.json"
    whole = path.read_text()
    for text, word in (
        ("", "not JSON"),
        (whole[:200], "not JSON"),
        ("hello", "not JSON"),
        ("[1]", "COCO's format"),
        ("{}", "COCO's format"),
    ):
        path.write_text(text)
        refused(coco_config(scenes), str(path), word)
    path.write_bytes(b"\xff\xfe\x00")
    refused(coco_config(scenes), str(path), "not JSON")
    path.unlink()
    refused(coco_config(scenes), str(scenes), "instances_train2017.json", "instances_train.json")
    path.mkdir()
    refused(coco_config(scenes), "instances_train2017.json")
    refused(coco_config(scenes, path=None), "data.path")
    refused(coco_config(scenes / "nowhere"), "nowhere", "not a folder")
    with pytest.raises(DataError, match="cannot be read"):
        read_annotations(scenes / "nothing.json")


def test_boxes_that_are_wrong_are_counted_in_one_warning(tmp_path: Path) -> None:
    boxes = [
        [-10.0, 5.0, 30.0, 20.0],  # clipped to 0, 5, 20, 20
        [90.0, 40.0, 50.0, 50.0],  # clipped to 90, 40, 10, 10
        [10.0, 10.0, 0.0, 20.0],  # no width
        [200.0, 10.0, 20.0, 20.0],  # outside
        [100.0, 10.0, 20.0, 20.0],  # touches the edge from outside
        [60.0, 20.0, 40.5, 20.0],  # over by rounding: kept, but clipped for training
    ]
    path = write_coco(tmp_path, {"a.png": scene(100, 50)}, [(0, 3, box) for box in boxes])
    with pytest.warns(UserWarning) as caught:
        images = load(coco_config(tmp_path, resolution=100))
    assert [str(warning.message) for warning in caught] == [
        f"{path}: of 6 boxes, 2 left their image and were clipped, 3 had no area inside it and were"
        " left out."
    ]
    expected = [[0, 5, 20, 20], [90, 40, 10, 10], [60, 20, 40.5, 20]]
    assert [row["bbox"] for row in images.ground_truth()["annotations"]] == expected
    assert images.__getitems__([(0, 0)])[1][0, :, :4].tolist() == [
        [0, 10, 20, 50],
        [90, 80, 100, 100],
        [60, 40, 100, 80],
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(coco_config(tmp_path))  # the same file, already read: no second warning
    write_coco(tmp_path, {"a.png": scene(100, 50)}, [(0, 3, [200, 10, 20, 20])])
    with pytest.warns(UserWarning):
        refused(coco_config(tmp_path), str(path), "no single object")


def test_area_and_crowd_may_be_left_out(scenes: Path) -> None:
    path = scenes / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"] = [
        {key: row[key] for key in ("image_id", "category_id", "bbox")}
        for row in content["annotations"][:3]
    ]
    content["annotations"][0]["area"] = 7.5
    write_json(scenes, content)
    rows = load(coco_config(scenes)).ground_truth()["annotations"]
    assert [(row["id"], row["area"], row["iscrowd"]) for row in rows] == [
        (1, 7.5, 0),
        (2, 1200, 0),
        (3, 1200, 0),
    ]


def test_validation_categories_must_be_the_training_categories(scenes: Path) -> None:
    """Classes are positions in the list of ids: another id in val would silently shift
    them.
    """
    images, objects = {"v.png": scene(20, 20)}, [(0, 3, [1.0, 1.0, 9.0, 9.0])]
    for categories in (
        [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}],
        [{"id": 3, "name": "cat"}, {"id": 8, "name": "wolf"}],
    ):
        write_coco(scenes, images, objects, "val", categories=categories)
        refused(
            coco_config(scenes),
            "instances_val.json",
            "instances_train.json",
            "8",
            "same list",
            split="test",
        )
    # without training annotations, there is nothing to compare with
    (scenes / "annotations" / "instances_train.json").unlink()
    assert load(coco_config(scenes), "test").names == ("cat", "wolf")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"augment": "crop_flip"}, "ssd, ssdlite or none"),
        ({"name": "digits", "augment": "ssd"}, "for boxes"),
        ({"name": "folder", "augment": "ssdlite"}, "for boxes"),
        ({"name": "npz", "classes": 1}, "2 or more"),
        ({"classes": 0}, "greater than or equal to 1"),
    ],
)
def test_configurations_of_the_other_task(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        coco_config(tmp_path, **keys)


def test_other_annotations_are_other_data(scenes: Path) -> None:
    """A stage that ran on the earlier ones is stale, although all files keep their
    names and sizes.
    """
    path = scenes / "annotations" / "instances_train.json"
    before = fingerprint(coco_config(scenes))
    assert fingerprint(coco_config(scenes)) == before
    path.write_text(path.read_text().replace("[10, 20, 40, 30]", "[10, 20, 40, 31]"))
    assert fingerprint(coco_config(scenes)) != before
