"""Fitting the calibration of a latency table to whole networks, and evaluating it on
held-out networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hwnas.core.ops import Op
from hwnas.core.statistics import rank_correlation
from hwnas.core.table import Calibration, HeldOutErrors

FIT_CACHE_MISSES_FROM = 8
"""Fewest networks for which the cost of cache misses is fitted as well. With fewer, a
third coefficient would fit noise.
"""
CAPS_MVALUES = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, None)
"""Cache sizes that are tried, in million values: 250 kB to 16 MB of float32, from the
caches of phones to those of servers. None: no cap.
"""
MIN_NETWORKS = 3
"""Fewest networks for which an intercept is fitted."""
MIN_RANGE = 0.05
"""Smallest range of the sums, relative to their mean, that determines an intercept."""


class _Fit(NamedTuple):
    """A fitted calibration, and the mean absolute relative error of its predictions for
    each network when fitted to the others.
    """

    error: float
    calibration: Calibration


def fit_calibration(
    networks: Sequence[Sequence[Op]], sums_ms: Sequence[float], measured_ms: Sequence[float]
) -> Calibration:
    """Fit the calibration that maps sums of entries to latencies of whole networks, by
    least squares of the *relative* error.

    The error is relative because a table serves fast and slow networks alike.
    ``networks`` are the ops of each network, ``sums_ms`` the sums of their entries,
    both in the order of ``measured_ms``.

    An intercept needs three or more networks whose sums differ by 5 %. With fewer, or
    if the fitted slope is not positive, only the slope is fitted. From
    ``FIT_CACHE_MISSES_FROM`` networks on, each form of the cache-miss cost is fitted as
    well, and the form with the lowest leave-one-out error is used. Forms with a
    negative cost are discarded.
    """
    sums_N = np.asarray(sums_ms, dtype=float)
    measured_N = np.asarray(measured_ms, dtype=float)
    count = len(sums_N)
    # The median resists outliers, which matter when there are only a few networks.
    slope = float(np.median(measured_N / sums_N))
    proportional = Calibration(intercept_ms=0.0, slope=slope, networks=count)
    if count < MIN_NETWORKS or np.ptp(sums_N) <= MIN_RANGE * sums_N.mean():
        return proportional

    forms = [proportional]
    if count >= FIT_CACHE_MISSES_FROM:
        forms.append(proportional.model_copy(update={"cache_miss_ms_per_mparam": 1.0}))
        for cap in CAPS_MVALUES:
            by_values = {"cache_miss_ms_per_mvalue": 1.0, "cache_mvalues": cap}
            forms.append(proportional.model_copy(update=by_values))

    fits = []
    for form in forms:
        fit = _fit_shape(form, networks, sums_N, measured_N)
        if fit is not None:
            fits.append(fit)
    return min(fits, key=lambda fit: fit.error).calibration if fits else proportional


def _fit_shape(
    form: Calibration,
    networks: Sequence[Sequence[Op]],
    sums_N: np.ndarray,
    measured_N: np.ndarray,
) -> _Fit | None:
    """Fit one form of the calibration; None if the slope or the cache-miss cost comes
    out with the wrong sign.

    ``form`` has a coefficient of 1 for the cache-miss cost that it includes.
    """
    cache_misses_N = np.zeros(len(networks))
    for i, ops in enumerate(networks):
        # With an entry of 0 ms, ``op_ms`` is the cost of cache misses only.
        cache_misses_N[i] = sum(form.op_ms(0.0, op) for op in ops)
    columns = [sums_N, np.ones(len(sums_N))]
    if cache_misses_N.any():
        columns.append(cache_misses_N)
    # Dividing by the measured time makes all goals 1 and the residuals relative errors.
    design = np.stack(columns, axis=1) / measured_N[:, None]
    coefficients = np.linalg.lstsq(design, np.ones(len(measured_N)), rcond=None)[0]
    slope, intercept, cache_miss = (*coefficients, 0.0)[:3]
    if slope <= 0 or cache_miss < 0:
        return None

    # Leave-one-out errors without refitting: the residual divided by 1 - leverage, where
    # the leverages are the diagonal of the hat matrix.
    leverage = np.einsum("ij,ji->i", design, np.linalg.pinv(design))
    left_out = np.abs(design @ coefficients - 1) / np.maximum(1 - leverage, 1e-9)
    fitted = {
        "slope": float(slope),
        "intercept_ms": float(intercept),
        "cache_miss_ms_per_mparam": float(cache_miss) * form.cache_miss_ms_per_mparam,
        "cache_miss_ms_per_mvalue": float(cache_miss) * form.cache_miss_ms_per_mvalue,
    }
    return _Fit(float(left_out.mean()), form.model_copy(update=fitted))


def held_out_errors(
    calibration: Calibration,
    networks: Sequence[Sequence[Op]],
    sums_ms: Sequence[float],
    measured_ms: Sequence[float],
) -> HeldOutErrors:
    """The errors of a calibration on held-out networks. Arguments as for
    ``fit_calibration``.
    """
    pairs = zip(networks, sums_ms, strict=True)
    predicted_ms = np.array([calibration.network_ms(ops, sum_ms) for ops, sum_ms in pairs])
    return held_out(predicted_ms, np.asarray(sums_ms), np.asarray(measured_ms))


def held_out(
    predicted_ms: np.ndarray, raw_ms: np.ndarray, measured_ms: np.ndarray
) -> HeldOutErrors:
    """The relative errors of predictions, and those of the uncalibrated sums ``raw_ms``
    for comparison. Each argument is float [N].
    """
    errors = np.abs(predicted_ms / measured_ms - 1)
    return HeldOutErrors(
        networks=len(errors),
        mape=float(errors.mean()),
        max_error=float(errors.max()),
        spearman=rank_correlation(predicted_ms, measured_ms),
        raw_mape=float(np.abs(raw_ms / measured_ms - 1).mean()),
        pairs=tuple((float(p), float(m)) for p, m in zip(predicted_ms, measured_ms, strict=True)),
    )
