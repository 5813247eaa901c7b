"""Every way that a data set in COCO's layout can be wrong."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hwnas.config import DataConfig
from hwnas.data.coco_file import (
    Annotations,
    _Annotation,
    _Objects,
    _plain_objects,
    read_annotations,
)
from hwnas.data.fingerprint import fingerprint
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


IMAGE = {"id": 1, "file_name": "a.png", "width": 20, "height": 20}


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (change("annotations", to=[]), ("no annotations",)),
        (change("images", to=[]), ("no images",)),
        (change("categories", to=[]), ("no categories",)),
        (change("annotations"), ("'annotations' is missing",)),
        (change("images", 0, "width"), ("images.0.width", "missing")),
        (change("images", 0, "height", to=0), ("images.0.height = 0",)),
        (change("images", 0, "height", to=20.5), ("images.0.height = 20.5", "multiple of 1")),
        (change("images", 0, "height", to="20"), ("images.0.height = '20'", "number")),
        (change("images", 0, "height", to=2**40), ("images.0.height = 1099511627776", "less")),
        (change("images", 1, "id", to=True), ("images.1.id = True", "integer or a string")),
        (change("images", 1, "id", to=6.5), ("images.1.id = 6.5", "integer or a string")),
        # as a float, it may be a neighbour of the one that was meant
        (change("images", 1, "id", to=2.0**60), ("images.1.id = 1.15", "integer or a string")),
        (change("images", 1, "id", to=[6]), ("images.1.id = [6]", "integer or a string")),
        (
            change("images", 1, "id", to="6"),
            ("image_id 6, but the image has the id '6': write both as numbers",),
        ),
        (
            change("annotations", 1, "category_id", to="8"),
            ("category_id '8', but the category has the id 8: write both as numbers",),
        ),
        (
            change("annotations", 1, "image_id", to=False),
            ("annotations.1.image_id = False", "integer or a string"),
        ),
        (change("categories", 1, "id", to=3.5), ("categories.1.id = 3.5",)),
        (change("annotations", 1, "bbox", to=[1, 2, 3]), ("annotations.1.bbox",)),
        (change("annotations", 1, "bbox", to=[]), ("without a bbox (number 1 in its list, id 1)",)),
        (change("annotations", 1, "bbox"), ("without a bbox (number 1 in its list, id 1)",)),
        (change("annotations", 1, to={"file_name": "a"}), ("bbox (number 1 in its list)",)),
        (change("annotations", 1, to=7), ("annotations.1 = 7", "dictionary")),
        (change("annotations", 1, "bbox", to={}), ("annotations.1.bbox = {}",)),
        (change("annotations", 1, "bbox", to=[1, 2, 10**400, 4]), ("annotations.1.bbox.2",)),
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
    path = write_coco(
        tmp_path,
        {"a.png": scene(100, 50)},
        [(0, 3, box) for box in boxes],
        categories=[{"id": 3, "name": "cat"}],
    )
    with pytest.warns(UserWarning) as caught:
        images = load(coco_config(tmp_path, resolution=100, classes=1))
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
        load(coco_config(tmp_path, classes=1))  # the same file, which was read
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


def test_null_is_the_same_as_left_out(scenes: Path) -> None:
    path = scenes / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    for row in content["annotations"]:
        row |= {"iscrowd": None, "area": None}
    write_json(scenes, content)
    rows = load(coco_config(scenes)).ground_truth()["annotations"]
    assert {row["iscrowd"] for row in rows} == {0}
    assert [row["area"] for row in rows] == [row["bbox"][2] * row["bbox"][3] for row in rows]


# ids


def with_ids(folder: Path, ids: list[Any], category_ids: list[Any]) -> Annotations:
    """Images with these ids, each with one object, whose box is as wide as the image's
    position plus 1; of the categories in turn.
    """
    images = [{**IMAGE, "id": key, "file_name": f"{n}.png"} for n, key in enumerate(ids)]
    objects = [
        {
            "image_id": key,
            "category_id": category_ids[n % len(category_ids)],
            "bbox": [0, 0, n + 1, 1],
        }
        for n, key in enumerate(ids)
    ]
    categories = [{"id": key, "name": f"class {key}"} for key in category_ids]
    content = {"images": images, "annotations": objects[::-1], "categories": categories}
    return read_annotations(write_json(folder, content))


def test_ids_of_any_size_and_kind_are_kept_exactly(tmp_path: Path) -> None:
    """Neighbours above 2^53 are the same float, and those above 2^63 do not fit into
    NumPy's integers.
    """
    ids = [2**53 + 1, 2**53, 10**30 + 1, 10**30, -7, "img_002", "7", 7, "img_001"]
    category_ids = [2**64 + 1, 2**64, "cat", "2"]
    annotations = with_ids(tmp_path, ids, category_ids)
    expected = [-7, 7, 2**53, 2**53 + 1, 10**30, 10**30 + 1, "7", "img_001", "img_002"]
    assert annotations.ids.tolist() == expected
    assert list(annotations.categories) == [2**64, 2**64 + 1, "2", "cat"]

    truth = annotations.ground_truth(np.arange(len(ids)))
    assert [row["id"] for row in truth["images"]] == expected
    for row in truth["annotations"]:
        position = ids.index(row["image_id"])
        assert row["bbox"][2] == position + 1
        assert row["category_id"] == category_ids[position % 4]
    assert json.loads(json.dumps(truth)) == truth


def test_whole_floats_are_the_integers_they_stand_for(tmp_path: Path) -> None:
    """As pandas writes them. 1 and 1.0 are the same number in JSON."""
    path = write_coco(tmp_path, {"a.png": scene(20, 20)}, [(0, 3, [1, 1, 9, 9])])
    content = json.loads(path.read_text())
    content["images"][0] |= {"id": 5.0, "width": 20.0}
    content["annotations"][0] |= {"category_id": 3.0, "iscrowd": 0.0}
    write_json(tmp_path, content)
    truth = load(coco_config(tmp_path)).ground_truth()
    assert json.dumps(truth["images"]) == json.dumps(
        [{"id": 5, "file_name": "a.png", "width": 20, "height": 20}]
    )
    assert json.dumps(truth["annotations"][0]["image_id"]) == "5"
    assert json.dumps(truth["annotations"][0]["category_id"]) == "3"


def test_names_do_not_reach_a_terminal_as_they_are(scenes: Path) -> None:
    path = scenes / "annotations" / "instances_train.json"
    whole = json.loads(path.read_text())
    for mistake in (
        change("images", 1, "file_name", to="\x1b[2J.png"),
        change("images", 1, "file_name", to="a\n\ud800.png"),
        change("images", 1, "file_name", to="/\x1b[2J.png"),
        change("annotations", 1, "image_id", to="\x1b[2J"),
        change("annotations", 1, "area", to="\x1b[2J"),
    ):
        content = copy.deepcopy(whole)
        mistake(content)
        write_json(scenes, content)
        with pytest.raises(DataError) as caught:
            load_images(coco_config(scenes), "all")
        assert str(caught.value).isprintable()
    for category in whole["categories"]:
        category["name"] += "\x1b[2J"
    write_json(scenes, {**whole, "annotations": whole["annotations"][1:2]})
    with pytest.warns(UserWarning, match="has no objects of 1 of its 2 categories") as warned:
        load(coco_config(scenes))
    assert str(warned[0].message).isprintable()


def test_what_an_entry_is_depends_on_its_list(scenes: Path) -> None:
    """Images with a field bbox, objects and categories with a file_name."""
    path = scenes / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    expected = load(coco_config(scenes)).ground_truth()
    for row in content["images"]:
        row |= {"bbox": [0, 0, 1, 1], "image_id": 1, "category_id": 2}
    for row in content["annotations"]:
        row |= {"file_name": "a.png", "width": 20, "height": 20}
    for row in content["categories"]:
        row |= {"file_name": "icon.png", "width": 20, "height": 20}
    content["info"] = {**IMAGE, "bbox": None, "more": [IMAGE, content["annotations"][0]]}
    write_json(scenes, content)
    assert load(coco_config(scenes)).ground_truth() == expected


ODD = st.sampled_from(
    [
        0,
        1,
        -1,
        2,
        2.5,
        -0.5,
        1e308,
        math.nan,
        math.inf,
        True,
        False,
        None,
        "1",
        [],
        [1],
        {},
        10**400,
    ]
)
SIDES = st.one_of(
    st.floats(0, 100), st.lists(st.floats(0, 100), min_size=4, max_size=4), st.lists(ODD), ODD
)
ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {"image_id": ODD, "category_id": ODD, "bbox": SIDES},
        optional={"area": ODD, "iscrowd": ODD, "id": ODD},
    ),
    st.dictionaries(st.sampled_from(["image_id", "bbox", "area"]), ODD),
    ODD,
)


@given(st.lists(ENTRIES, min_size=1, max_size=3))
def test_the_fast_check_accepts_only_what_the_full_one_does(entries: list[Any]) -> None:
    """And makes the same of it."""
    fast = _plain_objects(entries)
    if fast is None:
        return
    rows = [_Annotation.model_validate(entry).row() for entry in entries]
    full = _Objects.of_columns([list(column) for column in zip(*rows, strict=True)])
    assert (fast.image_ids, fast.category_ids) == (full.image_ids, full.category_ids)
    for name in ("boxes", "areas", "crowds"):
        np.testing.assert_array_equal(getattr(fast, name), getattr(full, name))


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
        ({"augment": "crop_flip"}, "ssd, ssdlite, jitter, lsj or none"),
        ({"name": "digits", "augment": "ssd"}, "for boxes"),
        ({"name": "folder", "augment": "ssdlite"}, "for boxes"),
        ({"name": "folder", "augment": "lsj"}, "for boxes"),
        ({"name": "npz", "classes": 1}, "at least 2"),
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
    before = fingerprint(coco_config(scenes), "train")
    assert fingerprint(coco_config(scenes), "train") == before
    path.write_text(path.read_text().replace("[10, 20, 40, 30]", "[10, 20, 40, 31]"))
    assert fingerprint(coco_config(scenes), "train") != before
