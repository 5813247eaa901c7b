"""Fitting a table's calibration to whole networks, and judging it on networks that the
fit has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hwnas.core.ops import Op
from hwnas.core.statistics import rank_correlation
from hwnas.core.table import Calibration, HeldOut

FIT_CACHE_MISSES_FROM = 8
"""Networks from which on the price of cold memory is fitted too; with fewer, a third
coefficient would fit noise.
"""
CAPS_MVALUES = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, None)
"""Caps that are tried: 250 kB to 16 MB of float32, the caches of phones to those of servers."""


def fit_calibration(
    networks: Sequence[Sequence[Op]], sums_ms: Sequence[float], measured_ms: Sequence[float]
) -> Calibration:
    """The map from sums of entries to whole networks (chains of ops): least squares of
    the *relative* error.

    Relative, because a table serves fast and slow networks alike. Three or more
    networks whose sums differ by 5 % are needed; with fewer, or where the fit would
    have a slope below zero, the slope alone is fitted. From ``FIT_CACHE_MISSES_FROM`` networks
    on, the price of cold memory is fitted in each of its forms; the form that predicts
    every network best from the others is taken, and none where its price would be
    negative.
    """
    x, y = np.asarray(sums_ms, dtype=float), np.asarray(measured_ms, dtype=float)
    plain = Calibration(intercept_ms=0.0, slope=float(np.median(y / x)), networks=len(x))
    if len(x) < 3 or np.ptp(x) <= 0.05 * x.mean():
        return plain
    shapes = [plain]
    if len(x) >= FIT_CACHE_MISSES_FROM:
        shapes.append(plain.model_copy(update={"cache_miss_ms_per_mparam": 1.0}))
        shapes += [
            plain.model_copy(update={"cache_miss_ms_per_mvalue": 1.0, "cache_mvalues": cap})
            for cap in CAPS_MVALUES
        ]
    fits = [
        fit for fit in (_fit_shape(shape, networks, x, y) for shape in shapes) if fit is not None
    ]
    return min(fits, key=lambda fit: fit[0])[1] if fits else plain


def _fit_shape(
    shape: Calibration, networks: Sequence[Sequence[Op]], x: np.ndarray, y: np.ndarray
) -> tuple[float, Calibration] | None:
    """``shape``, which says with prices of 1 what cold memory is, fitted; with the mean
    error of leaving each network out.

    None where the slope or the price comes out below zero. A network's error by the fit
    to all others is its residual divided by 1 - leverage, the leverages being the
    diagonal of the hat matrix.
    """
    cold = np.array([sum(shape.op_ms(0.0, op) for op in ops) for ops in networks])
    columns = [x, np.ones(len(x)), *([cold] if cold.any() else [])]
    design = np.stack(columns, axis=1) / y[:, None]
    coefficients = np.linalg.lstsq(design, np.ones(len(y)), rcond=None)[0]
    slope, intercept, price = (*coefficients, 0.0)[:3]
    if slope <= 0 or price < 0:
        return None
    leverage = np.einsum("ij,ji->i", design, np.linalg.pinv(design))
    left_out = np.abs(design @ coefficients - 1) / np.maximum(1 - leverage, 1e-9)
    prices = {
        name: float(price) * getattr(shape, name)
        for name in ("cache_miss_ms_per_mparam", "cache_miss_ms_per_mvalue")
    }
    return float(left_out.mean()), shape.model_copy(
        update={"slope": float(slope), "intercept_ms": float(intercept), **prices}
    )


def judge(
    calibration: Calibration,
    networks: Sequence[Sequence[Op]],
    sums_ms: Sequence[float],
    measured_ms: Sequence[float],
) -> HeldOut:
    """The calibrated error on held-out networks."""
    x, y = np.asarray(sums_ms), np.asarray(measured_ms)
    predicted = np.array(
        [calibration.network_ms(ops, sum_ms) for ops, sum_ms in zip(networks, sums_ms, strict=True)]
    )
    return held_out(predicted, x, y)


def held_out(predicted_ms: np.ndarray, raw_ms: np.ndarray, measured_ms: np.ndarray) -> HeldOut:
    """How far predictions are from measurements, each float [N], beside those of the
    uncalibrated sums ``raw_ms``.
    """
    errors = np.abs(predicted_ms / measured_ms - 1)
    return HeldOut(
        networks=len(errors),
        mape=float(errors.mean()),
        max_error=float(errors.max()),
        spearman=rank_correlation(predicted_ms, measured_ms),
        raw_mape=float(np.abs(raw_ms / measured_ms - 1).mean()),
        pairs=tuple((float(p), float(m)) for p, m in zip(predicted_ms, measured_ms, strict=True)),
    )
