"""Score calibration: turns a classifier's outputs into the probability that a label is
correct.

Platt's method (Probabilistic outputs for support vector machines, 1999): for each
label, a logistic regression of "the image shows it" on the label's score. Its targets
are (N+ + 1) / (N+ + 2) and 1 / (N- + 2) instead of 1 and 0, so that the slope stays
finite even for perfectly separated classes.

Readers compute (ScoreCalibrationOptions in metadata_schema.fbs;
score_calibration_calculator.cc): scale / (1 + exp(-(slope g(x) + offset))). g is the
identity for logits and log(x) - log(1 - x) for probabilities. Scale is 1.

The calibrated scores of an image need not sum to 1, and its best label may change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from hwnas.errors import ExportError

Floats = npt.NDArray[np.float64]
Transformation = Literal["IDENTITY", "INVERSE_LOGISTIC"]
_SMALLEST = 1e-16
"""Below this value, readers extend the logarithm such that its value stays finite."""


@dataclass(frozen=True)
class ScoreCalibration:
    """The slope and the offset of each label's sigmoid, in the order of labels. They
    apply to scores after ``transformation``.
    """

    slopes: tuple[float, ...]
    offsets: tuple[float, ...]
    transformation: Transformation

    def text(self) -> str:
        """The content of the associated file: a line ``scale,slope,offset``
        per label.
        """
        pairs = zip(self.slopes, self.offsets, strict=True)
        return "\n".join(f"1,{slope:.9g},{offset:.9g}" for slope, offset in pairs)

    def apply(self, scores: npt.NDArray[np.floating]) -> Floats:
        """Calibrate scores [N, labels] of a file, as readers do.

        >>> calibration = ScoreCalibration((2.0,), (-1.0,), "IDENTITY")
        >>> calibration.apply(np.array([[0.5]])).tolist()
        [[0.5]]
        """
        transformed = _transformed(scores.astype(np.float64), self.transformation)
        context = transformed * np.array(self.slopes) + np.array(self.offsets)
        calibrated: Floats = 1 / (1 + np.exp(-context))
        return calibrated


def fit(
    scores: npt.NDArray[np.floating],
    labels: Sequence[int] | npt.NDArray[np.integer],
    transformation: Transformation,
) -> ScoreCalibration:
    """Fit a sigmoid per label to scores [N, labels] of N images with the correct labels
    ``labels`` [N].

    Raises ExportError if there are no images.
    """
    if not len(scores):
        raise ExportError("Score calibration needs at least one image")
    context = _transformed(scores.astype(np.float64), transformation)
    correct = np.asarray(labels)
    fitted = [_platt(context[:, label], correct == label) for label in range(scores.shape[1])]
    slopes = tuple(slope for slope, _ in fitted)
    offsets = tuple(offset for _, offset in fitted)
    return ScoreCalibration(slopes, offsets, transformation)


def _platt(context: Floats, is_label: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """The slope and the offset that minimise the cross-entropy with Platt's targets."""
    from sklearn.linear_model import LogisticRegression

    positives = int(is_label.sum())
    negatives = len(is_label) - positives
    targets = np.where(is_label, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    # scikit-learn takes classes only. A target of 0.9 becomes an image of the class with
    # weight 0.9, and the same image of the other class with weight 0.1.
    twice = np.concatenate([context, context])[:, None]
    classes = np.repeat([1, 0], len(context))
    weights = np.concatenate([targets, 1 - targets])
    # The solver stops at a given size of the gradient, which depends on the scale of the
    # scores.
    spread = float(context.std()) or 1.0
    model = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(
        twice / spread, classes, sample_weight=weights
    )
    return float(model.coef_[0, 0]) / spread, float(model.intercept_[0])


def _transformed(scores: Floats, transformation: Transformation) -> Floats:
    if transformation == "IDENTITY":
        return scores
    return _clamped_log(scores) - _clamped_log(1 - scores)


def _clamped_log(x: Floats) -> Floats:
    below: Floats = 2 * np.log(_SMALLEST) - np.log(2 * _SMALLEST - np.minimum(x, _SMALLEST))
    return np.where(x < _SMALLEST, below, np.log(np.maximum(x, _SMALLEST)))
