"""Platt's sigmoids, and the formula by which readers apply them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from hwnas.errors import ExportError
from hwnas.export.score_calibration import ScoreCalibration, fit


def logits(count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of images; the scores of the three labels overlap."""
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=count)
    return rng.normal(size=(count, 3)) * 3 + 4 * np.eye(3)[labels] + [0, 10, -5], labels


def platt_loss(parameters: np.ndarray, scores: np.ndarray, shown: np.ndarray) -> float:
    """The loss of Platt (1999), section 2.2, with its targets."""
    positives, negatives = shown.sum(), (~shown).sum()
    targets = np.where(shown, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    context = parameters[0] * scores + parameters[1]
    return float((np.logaddexp(0, context) - targets * context).sum())


def test_the_sigmoids_are_platts() -> None:
    scores, labels = logits()
    fitted = fit(scores, labels, "IDENTITY")
    for label in range(3):
        parameters = np.array([fitted.slopes[label], fitted.offsets[label]])
        best = minimize(
            platt_loss,
            [0.0, 0.0],
            args=(scores[:, label], labels == label),
            method="Nelder-Mead",
            options={"maxiter": 4000},
        )
        assert platt_loss(parameters, scores[:, label], labels == label) <= best.fun + 1e-6
        assert parameters == pytest.approx(best.x, rel=1e-2)


def test_calibrated_scores_are_how_often_a_label_is_right() -> None:
    scores, labels = logits(4000)
    calibrated = fit(scores[:2000], labels[:2000], "IDENTITY").apply(scores[2000:])
    for label in range(3):
        sure = (calibrated[:, label] > 0.6) & (calibrated[:, label] < 0.8)
        assert sure.sum() > 50
        assert np.mean(labels[2000:][sure] == label) == pytest.approx(
            calibrated[sure, label].mean(), abs=0.1
        )


def test_perfectly_separated_labels_get_finite_slopes() -> None:
    labels = np.array([0, 1] * 10)
    fitted = fit(100.0 * np.eye(2)[labels], labels, "IDENTITY")
    # Platt's targets for 10 images of either label
    assert fitted.apply(np.array([[100.0, 0.0]])) == pytest.approx(
        np.array([[11 / 12, 1 / 12]]), abs=1e-3
    )


def test_a_label_that_no_image_shows_is_unlikely() -> None:
    scores, labels = logits(100)
    fitted = fit(np.hstack([scores, scores[:, :1]]), labels, "IDENTITY")
    assert fitted.apply(np.hstack([scores, scores[:, :1]]))[:, 3] == pytest.approx(
        1 / 102, abs=2e-3
    )


def test_probabilities_go_through_the_inverse_logistic_function() -> None:
    """As in score_calibration_calculator.cc: below 1e-16, log(x) continues as
    2 log(1e-16) - log(2e-16 - x).
    """
    calibration = ScoreCalibration((0.1,), (1.0,), "INVERSE_LOGISTIC")
    clamped = 2 * math.log(1e-16) - math.log(2e-16)
    context = {0.25: math.log(1 / 3), 0.0: clamped, 1.0: -clamped}
    for score, wanted in context.items():
        assert calibration.apply(np.array([[score]]))[0, 0] == pytest.approx(
            1 / (1 + math.exp(-(0.1 * wanted + 1))), rel=1e-9
        )


def test_logits_and_their_probabilities_are_calibrated_alike() -> None:
    scores, labels = logits()
    by_logits = fit(scores, labels, "IDENTITY")
    by_probabilities = fit(1 / (1 + np.exp(-scores)), labels, "INVERSE_LOGISTIC")
    assert by_probabilities.slopes == pytest.approx(by_logits.slopes, rel=1e-3)


def test_fitting_to_no_images_is_refused() -> None:
    with pytest.raises(ExportError, match="needs at least one image"):
        fit(np.zeros((0, 3)), np.zeros(0, np.int64), "IDENTITY")
