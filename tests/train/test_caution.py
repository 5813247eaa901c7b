"""What a training result says about a network that is no better than a guess."""

from __future__ import annotations

import pytest
from scipy import stats

from hwnas.data.coco_eval import NUMBERS, CocoMetrics
from hwnas.train.result import TrainResult


@pytest.mark.parametrize(("right", "cautious"), [(9, True), (15, True), (16, False), (90, False)])
def test_a_classifier_that_guesses_gets_a_caution(right: int, cautious: bool) -> None:
    """Guessing among ten classes may get 15 of 100 images right (p = 0.073), but hardly
    16 (p = 0.040).
    """
    common = {
        "architecture_sha256": "0",
        "weights": "scratch",
        "steps": 1,
        "seed": 0,
        "test_images": 100,
    }
    metrics = {
        "task": "classify",
        "metric": "accuracy",
        "metrics": {"accuracy": right / 100},
        "guess": 0.1,
    }
    result = TrainResult.model_validate({**common, **metrics, "class_names": list("0123456789")})
    assert (stats.binomtest(right, 100, 0.1, alternative="greater").pvalue >= 0.05) == cautious
    assert (result.caution is not None) == cautious
    if result.caution is not None:
        assert str(result.caution).startswith(
            f"the trained network learned nothing: {right}.00% of 100 test images right, where a"
            " guess gets 10"
        )
        assert "train.epochs" in result.caution.text and "train.optimizer.lr" in result.caution.text
    frequent = result.model_copy(update={"guess": 0.9})
    assert frequent.caution is not None, "always naming the most frequent class is as good"
    assert TrainResult.parse(frequent.to_json()) == frequent


@pytest.mark.parametrize(("ap", "cautious"), [(0.0, True), (0.0004, True), (0.02, False)])
def test_a_detector_that_finds_nothing_gets_a_caution(ap: float, cautious: bool) -> None:
    coco = CocoMetrics.model_validate({**dict.fromkeys(NUMBERS, ap), "AP_per_class": {"a": ap}})
    common = {
        "architecture_sha256": "0",
        "weights": "scratch",
        "steps": 1,
        "seed": 0,
        "test_images": 5,
        "class_names": ("a",),
    }
    result = TrainResult.model_validate(
        {
            **common,
            "task": "detect",
            "metric": "AP",
            "metrics": coco.by_name,
            "per_class": coco.AP_per_class,
        }
    )
    assert (result.caution is not None) == cautious
    if result.caution is not None:
        assert str(result.caution).startswith(
            "the trained network finds nothing: AP 0.0% on 5 test images: raise train.epochs"
        )
