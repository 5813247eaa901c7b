"""Prices of ops from whole networks: Bayesian linear regression with a prior of many parts.

    ms of network n = (intercept + sum over its ops of w_op) * (1 + noise)

Every belief of the prior (``prior``), at every size of its deviations, makes the prices
w a Gaussian with a covariance S. Their posterior mean and the evidence for the part are
closed forms of K = A S A^T, A being the counts of ops divided by the measured times
(Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, equations 2.23
and 2.30); one eigendecomposition of K serves all noise levels. The prices are the mean
over all parts and noise levels, weighted by their evidence: with few networks that is
the known device that fits best, scaled; with many, the networks' own word.

Phones stall: some of their measurements are twice the others. Noise is therefore
Student's t with TAIL degrees of freedom, by weights that are computed again from how
far each network is from what the others predict for it (equations 5.10 to 5.12), under
the part that has the largest evidence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hwnas.tables.prior import INTERCEPT, Belief, Prior

NOISE = (0.003, 0.006, 0.012, 0.025, 0.05, 0.1, 0.2)
"""Standard deviations of the relative noise that are tried."""
TAIL = 4.0
PASSES = 3
"""How often the regression is done; before each but the first, the networks' weights
are computed again.
"""


@dataclass(frozen=True)
class Prices:
    """What a fit found: milliseconds per op float [ops], the intercept, and how much
    each price list of the prior is believed.
    """

    op_ms: np.ndarray
    intercept_ms: float
    believed: dict[str, float]

    def of(self, counts_NP: np.ndarray) -> np.ndarray:
        """Latencies in milliseconds of networks given as counts of ops [N, ops]."""
        latencies: np.ndarray = counts_NP @ self.op_ms + self.intercept_ms
        return latencies


def fit_prices(prior: Prior, counts_NP: np.ndarray, ms_N: np.ndarray) -> Prices:
    """The prices of ops from networks: counts of ops [N, ops] and their latencies in
    milliseconds [N].
    """
    scale_ms = float(np.median(ms_N))
    counts = np.concatenate([counts_NP, np.ones((len(ms_N), 1))], axis=1)
    seen = np.flatnonzero(counts.any(axis=0))
    design = counts[:, seen] * (scale_ms / ms_N)[:, None]
    beliefs = prior.beliefs(counts.mean(axis=0))
    alike = prior.alike(np.arange(len(prior.ops)), seen[:-1])
    weights = np.ones(len(ms_N))
    data = _Data.of(design, weights)
    for _ in range(PASSES - 1):
        likeliest = max(
            _parts(beliefs, data, seen, alike), key=lambda part: float(part.evidence_S.max())
        )
        weights = _trust(likeliest, data, weights)
        data = _Data.of(design, weights)
    prices, believed = _average(
        beliefs, list(_parts(beliefs, data, seen, alike)), data, seen, alike
    )
    op_prices, intercept = cut_at_zero(prices, counts.mean(axis=0))
    return Prices(op_prices * scale_ms, intercept * scale_ms, believed)


def cut_at_zero(prices_P: np.ndarray, mean_P: np.ndarray) -> tuple[np.ndarray, float]:
    """Prices [ops + 1] as prices of ops, none below 0, and the intercept, which is last.

    What cutting adds to the mean network (``mean_P``: its counts) is taken off the
    intercept, so that nothing changes where every network has the op.
    """
    positive = np.maximum(prices_P[:-1], 0.0)
    return positive, float(prices_P[-1] - mean_P[:-1] @ (positive - prices_P[:-1]))


@dataclass(frozen=True)
class _Data:
    """Weighted rows and what they should give. More networks than ops are compressed to
    as many rows as ops, losing nothing.

    ``basis`` [networks, rows] has orthonormal columns; ``lost`` is the squared length
    of what no prices explain, over ``spare`` rows.
    """

    rows: np.ndarray
    goal: np.ndarray
    basis: np.ndarray
    weighted: np.ndarray
    lost: float
    spare: int

    @classmethod
    def of(cls, design: np.ndarray, weights: np.ndarray) -> _Data:
        weighted = np.sqrt(weights)
        rows = design * weighted[:, None]
        if len(rows) <= rows.shape[1]:
            return cls(rows, weighted, np.eye(len(rows)), weighted, 0.0, 0)
        basis, small = np.linalg.qr(rows)
        goal = basis.T @ weighted
        return cls(
            small,
            goal,
            basis,
            weighted,
            max(float(weighted @ weighted - goal @ goal), 0.0),
            len(rows) - len(small),
        )


@dataclass(frozen=True)
class _PriorFit:
    """One belief at one size of its deviations: log evidence [noise levels] and dual
    coefficients [noise levels, rows].
    """

    belief: Belief
    rho: float
    tau: float
    evidence_S: np.ndarray
    dual_SN: np.ndarray
    eigenvalues: np.ndarray
    vectors: np.ndarray


def _parts(
    beliefs: list[Belief], data: _Data, seen: np.ndarray, alike: np.ndarray
) -> Iterator[_PriorFit]:
    """Every belief at every size of its deviations. ``seen`` are the columns of the
    data, ``alike`` [ops, ops seen].
    """
    noise_S = np.square(NOISE)[:, None]
    fixed, counts = data.rows[:, -1], data.rows[:, :-1]
    for belief in beliefs:
        centre = data.rows @ belief.centre_P[seen]
        away = data.rows @ belief.away_KP[:, seen].T
        own = counts * belief.centre_P[seen[:-1]]
        as_is = np.outer(centre, centre) + INTERCEPT**2 * np.outer(fixed, fixed)
        along, single = away @ away.T, own @ alike[seen[:-1]] @ own.T
        for rho, tau, log_probability in belief.sizes:
            eigenvalues, vectors = np.linalg.eigh(as_is + rho**2 * along + tau**2 * single)
            variance_SN = np.maximum(eigenvalues, 0.0) + noise_S
            turned = vectors.T @ data.goal
            context = log_probability - 0.5 * (np.log(variance_SN) + turned**2 / variance_SN).sum(
                axis=1
            )
            context -= 0.5 * (data.spare * np.log(noise_S) + data.lost / noise_S)[:, 0]
            yield _PriorFit(
                belief, rho, tau, context, turned / variance_SN @ vectors.T, eigenvalues, vectors
            )


def _average(
    beliefs: list[Belief], parts: list[_PriorFit], data: _Data, seen: np.ndarray, alike: np.ndarray
) -> tuple[np.ndarray, dict[str, float]]:
    """The mean of the prices [ops + 1] over all parts and noise levels, and the share
    of each belief in it.
    """
    top = max(part.evidence_S.max() for part in parts)
    total = sum(float(np.exp(part.evidence_S - top).sum()) for part in parts)
    prices = np.zeros(len(alike) + 1)
    believed = dict.fromkeys((belief.name for belief in beliefs), 0.0)
    for belief in beliefs:
        dual, along, single = np.zeros((3, len(data.goal)))
        for part in parts:
            if part.belief is belief:
                share_S = np.exp(part.evidence_S - top) / total
                believed[belief.name] += float(share_S.sum())
                mean = share_S @ part.dual_SN
                dual += mean
                along += part.rho**2 * mean
                single += part.tau**2 * mean
        prices += belief.centre_P * (data.rows @ belief.centre_P[seen] @ dual)
        prices += belief.away_KP.T @ (belief.away_KP[:, seen] @ data.rows.T @ along)
        prices[-1] += INTERCEPT**2 * float(data.rows[:, -1] @ dual)
        own = belief.centre_P[:-1]
        prices[:-1] += own * (alike @ (own[seen[:-1]] * (data.rows[:, :-1].T @ single)))
    return prices, believed


def _trust(part: _PriorFit, data: _Data, weights: np.ndarray) -> np.ndarray:
    """New weights of the networks, from how far each is from what ``part`` predicts for
    it out of the others.
    """
    best = int(part.evidence_S.argmax())
    noise = NOISE[best] ** 2
    vectors = data.basis @ part.vectors
    inverse = (1 - (vectors**2).sum(axis=1)) / noise + vectors**2 @ (
        1 / (np.maximum(part.eigenvalues, 0.0) + noise)
    )
    dual = (data.weighted - data.basis @ data.goal) / noise + data.basis @ part.dual_SN[best]
    residual = dual / inverse / data.weighted
    variance = np.maximum(1 / inverse - noise, 0.0) / weights + noise
    trusted: np.ndarray = (TAIL + 1) / (TAIL + residual**2 / variance)
    return trusted
