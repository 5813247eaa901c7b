"""Score calibration: from a classifier's outputs to numbers that may be read as how
often a label is right.

Platt's method (Probabilistic outputs for support vector machines, 1999): per label a
logistic regression of "the image shows it" on the label's score, with his targets (N+ +
1) / (N+ + 2) and 1 / (N- + 2) instead of 1 and 0, so that classes which are told apart
perfectly get a finite slope too.

The formula that readers apply (ScoreCalibrationOptions in metadata_schema.fbs;
score_calibration_calculator.cc): scale / (1 + exp(-(slope g(x) + offset))), with g the
identity for logits and log(x) - log(1 - x) for probabilities. Scale is 1.

Calibrated scores of one image need not sum to 1, and its best label may change.
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
"""Below it, readers continue the logarithm so that value and slope stay finite."""


@dataclass(frozen=True)
class ScoreCalibration:
    """Slope and offset of each label's sigmoid, in the order of labels, over scores
    after ``transformation``.
    """

    slopes: tuple[float, ...]
    offsets: tuple[float, ...]
    transformation: Transformation

    def text(self) -> str:
        """The associated file: a line ``scale,slope,offset`` per label."""
        return "\n".join(
            f"1,{slope:.9g},{offset:.9g}"
            for slope, offset in zip(self.slopes, self.offsets, strict=True)
        )

    def apply(self, scores: npt.NDArray[np.floating]) -> Floats:
        """What readers make of scores [N, labels] as the file gives them.

        >>> ScoreCalibration((2.0,), (-1.0,), "IDENTITY").apply(np.array([[0.5]])).tolist()
        [[0.5]]
        """
        context = _transformed(scores.astype(np.float64), self.transformation) * np.array(
            self.slopes
        ) + np.array(self.offsets)
        calibrated: Floats = 1 / (1 + np.exp(-context))
        return calibrated


def fit(
    scores: npt.NDArray[np.floating],
    labels: Sequence[int] | npt.NDArray[np.integer],
    transformation: Transformation,
) -> ScoreCalibration:
    """Fit a sigmoid per label to scores [N, labels] of N images, whose right labels are
    ``labels`` [N].

    Raises ExportError where there are no images.
    """
    if not len(scores):
        raise ExportError("Score calibration needs at least one image")
    context, right = _transformed(scores.astype(np.float64), transformation), np.asarray(labels)
    fitted = [_platt(context[:, label], right == label) for label in range(scores.shape[1])]
    return ScoreCalibration(
        tuple(slope for slope, _ in fitted), tuple(offset for _, offset in fitted), transformation
    )


def _platt(context: Floats, is_label: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and offset of the sigmoid whose cross-entropy with Platt's targets is least."""
    from sklearn.linear_model import LogisticRegression

    positives = int(is_label.sum())
    negatives = len(is_label) - positives
    targets = np.where(is_label, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    # A target of 0.9 is nine tenths of an image that shows the label, and a tenth of
    # one that does not.
    twice, classes = np.concatenate([context, context])[:, None], np.repeat([1, 0], len(context))
    weights = np.concatenate([targets, 1 - targets])
    # the solver stops by the size of gradients, so scores get one scale
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
