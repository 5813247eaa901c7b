"""The COCO evaluation: published numbers, cases by hand, and nothing to evaluate."""

# ruff: noqa: SIM300 - COCO writes AP in capitals, which ruff takes for a constant

from __future__ import annotations

import copy
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hwnas.data.coco_eval import NUMBERS, CocoMetrics, evaluate
from hwnas.errors import DataError

Rows = list[dict[str, Any]]

FIXTURES = {
    "A_coco100_bbox": ("A_instances_val2014_100.json.gz", "A_fakebbox100_results.json.gz"),
    "B_coco_sampled_bbox_area": ("B_gt_bbox_area.json.gz", "B_dt_bbox.json.gz"),
    "C_small": ("C_small_gt.json.gz", "C_small_dt.json.gz"),
}


@pytest.fixture(scope="module")
def fixtures() -> Path:
    source = os.environ.get("HWNAS_TEST_DATA")
    if not source:
        pytest.skip("HWNAS_TEST_DATA is not set: it names a folder with coco_eval_fixtures")
    return Path(source) / "coco_eval_fixtures"


def read(path: Path) -> Any:
    with gzip.open(path) as file:
        return json.load(file)


@pytest.mark.parametrize("name", FIXTURES)
def test_published_numbers(fixtures: Path, name: str) -> None:
    """All 12 metrics and every category's AP. A: COCO's own demo, with crowds; B:
    another project's numbers; C: no small objects at all.
    """
    expected = json.loads((fixtures / "expected.json").read_text())
    ground_truth, results = (read(fixtures / file) for file in FIXTURES[name])
    metrics = evaluate(ground_truth, results)
    stats = {
        key: -1.0 if getattr(metrics, key) is None else getattr(metrics, key) for key in NUMBERS
    }
    assert stats == pytest.approx(expected[name]["stats"], abs=1e-12)
    names = {str(category["id"]): category["name"] for category in ground_truth["categories"]}
    by_name = {
        names[key]: None if value == -1 else pytest.approx(value, abs=1e-8)
        for key, value in expected[name]["AP_per_category"].items()
    }
    assert metrics.AP_per_class == by_name
    if name.startswith("B"):
        assert stats == pytest.approx(expected["B_published_by_source"], abs=1e-6)


def test_pycocotools_stays_silent_and_changes_nothing(
    fixtures: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ground_truth, results = (read(fixtures / file) for file in FIXTURES["C_small"])
    before = copy.deepcopy((ground_truth, results))
    evaluate(ground_truth, results)
    evaluate(ground_truth, [])
    assert capfd.readouterr() == ("", "")
    assert (ground_truth, results) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["A_coco100_bbox", "C_small"])
@pytest.mark.parametrize("renamed", ["{:020d}", "large"])
def test_ids_of_any_kind_make_no_difference(fixtures: Path, name: str, renamed: str) -> None:
    """Strings, and integers that are neighbours beyond what floats and NumPy can hold."""
    ground_truth, results = (read(fixtures / file) for file in FIXTURES[name])
    expected = evaluate(ground_truth, results)

    def other(key: int) -> Any:
        return 2**64 + key if renamed == "large" else renamed.format(key)

    for row in (*ground_truth["images"], *ground_truth["categories"]):
        row["id"] = other(row["id"])
    for row in (*ground_truth["annotations"], *results):
        row |= {"image_id": other(row["image_id"]), "category_id": other(row["category_id"])}
    assert evaluate(ground_truth, results) == expected


# by hand: images of 100 x 100 pixels, objects of 50 x 50


def truth(
    *objects: tuple[int, int, list[float]],
    images: int = 2,
    classes: tuple[str, ...] = ("cat", "dog"),
    **keys: Any,
) -> dict[str, Any]:
    """Ground truth; objects are (image, category, box)."""
    return {
        "images": [
            {"id": number, "width": 100, "height": 100, "file_name": f"{number}.jpg"}
            for number in range(images)
        ],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                **keys,
            }
            for number, (image, category, box) in enumerate(objects)
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes)],
    }


def detected(*detections: tuple[int, int, list[float], float]) -> Rows:
    """Results; detections are (image, category, box, score)."""
    return [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in detections
    ]


BOX = [10.0, 20.0, 50.0, 50.0]
SHIFTED = [20.0, 20.0, 50.0, 50.0]  # IoU 2000 / 3000 with BOX


def test_one_object_by_hand() -> None:
    """Its id is 0, which pycocotools itself would count as never found."""
    metrics = evaluate(truth((0, 0, BOX)), detected((0, 0, BOX, 0.9)))
    assert (metrics.AP, metrics.AP50, metrics.AR1, metrics.APm) == pytest.approx((1, 1, 1, 1))
    assert (metrics.APs, metrics.APl) == (None, None)
    assert metrics.AP_per_class == {"cat": pytest.approx(1), "dog": None}
    metrics = evaluate(truth((0, 0, BOX)), detected((0, 0, SHIFTED, 0.9)))
    # .50, .55, .60, .65 of 10 thresholds
    assert (metrics.AP, metrics.AP50, metrics.AP75) == (pytest.approx(0.4), pytest.approx(1), 0)
    # of another class, and in another image
    assert evaluate(truth((0, 0, BOX)), detected((0, 1, BOX, 0.9))).AP == 0
    assert evaluate(truth((0, 0, BOX)), detected((1, 0, BOX, 0.9))).AP == 0


def test_objects_are_told_apart_whatever_their_ids() -> None:
    """Their ids are missing or equal: each object still counts once."""
    two = truth((0, 0, BOX), (1, 0, BOX))
    for change in ({"id": 7}, {}):
        annotations = [
            {key: value for key, value in row.items() if key not in ("id", "area", "iscrowd")}
            | change
            for row in two["annotations"]
        ]
        metrics = evaluate({**two, "annotations": annotations}, detected((0, 0, BOX, 0.9)))
        assert (metrics.AR100, metrics.AP50, metrics.APm) == (
            0.5,
            pytest.approx(51 / 101),
            pytest.approx(51 / 101),
        )


def test_objects_of_unknown_categories_do_not_count() -> None:
    ground_truth = truth((0, 0, BOX), (1, 7, BOX))
    metrics = evaluate(ground_truth, detected((0, 0, BOX, 0.5), (1, 7, BOX, 0.9), (1, 8, BOX, 0.9)))
    assert metrics.AP_per_class == {"cat": pytest.approx(1), "dog": None}


def test_images_without_objects_count() -> None:
    """A more confident detection in an empty image halves the precision; a less
    confident one, after all are found, costs nothing.
    """
    assert evaluate(
        truth((0, 0, BOX)), detected((0, 0, BOX, 0.5), (1, 0, BOX, 0.9))
    ).AP == pytest.approx(0.5)
    assert evaluate(
        truth((0, 0, BOX)), detected((0, 0, BOX, 0.5), (1, 0, BOX, 0.1))
    ).AP == pytest.approx(1)
    assert evaluate(truth((0, 0, BOX), images=50), detected((0, 0, BOX, 0.5))).AP == pytest.approx(
        1
    )


def test_crowds_count_neither_for_nor_against() -> None:
    ground_truth = truth((0, 0, BOX), (0, 0, [60.0, 60.0, 40.0, 40.0]))
    ground_truth["annotations"][1]["iscrowd"] = 1
    inside = [(0, 0, [60.0 + step, 60.0, 10.0, 10.0], 0.9) for step in (0, 10, 20)]
    assert evaluate(ground_truth, detected(*inside, (0, 0, BOX, 0.5))).AP == pytest.approx(1)
    assert (
        evaluate(ground_truth, detected((0, 0, BOX, 0.5))).AR100 == 1
    )  # crowds need not be detected
    ground_truth["annotations"][1]["iscrowd"] = 0
    assert evaluate(ground_truth, detected(*inside, (0, 0, BOX, 0.5))).AP < 0.2


def test_one_class() -> None:
    metrics = evaluate(
        truth((0, 0, BOX), (1, 0, BOX), classes=("raccoon",)),
        detected((0, 0, BOX, 0.9), (1, 0, SHIFTED, 0.8)),
    )
    assert metrics.AP_per_class == {"raccoon": metrics.AP}
    assert metrics.AP == pytest.approx((4 * 1 + 6 * 51 / 101) / 10)


def test_no_detections_score_zero() -> None:
    metrics = evaluate(truth((0, 0, BOX)), [])
    assert [getattr(metrics, name) for name in NUMBERS] == [
        0,
        0,
        0,
        None,
        0,
        None,
        0,
        0,
        0,
        None,
        0,
        None,
    ]
    assert metrics.AP_per_class == {"cat": 0.0, "dog": None}


def test_nothing_to_find_is_refused() -> None:
    for ground_truth in (truth(), truth((0, 0, BOX), (1, 1, BOX), iscrowd=1)):
        with pytest.raises(DataError, match="2 images have no object to find") as caught:
            evaluate(ground_truth, detected((0, 0, BOX, 0.9)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_match_nothing(odd: float) -> None:
    """To pycocotools, a NaN box matches all: a broken file would look perfect."""
    for row in ((0, 0, [odd, 20.0, 50.0, 50.0], 0.9), (0, 0, [odd] * 4, 0.9), (0, 0, BOX, odd)):
        assert evaluate(truth((0, 0, BOX)), detected(row)).AP == 0
        assert evaluate(truth((0, 0, BOX)), detected(row, (0, 0, BOX, 0.1))).AP == pytest.approx(1)


def test_metrics_are_frozen_and_survive_json() -> None:
    metrics = evaluate(truth((0, 0, BOX)), detected((0, 0, SHIFTED, 0.9)))
    assert CocoMetrics.model_validate_json(metrics.model_dump_json(), strict=True) == metrics
    assert {*CocoMetrics.model_fields} == {*NUMBERS, "AP_per_class"}
    with pytest.raises(ValidationError):
        metrics.AP = 1.0  # type: ignore[misc]
