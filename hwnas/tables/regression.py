"""Costs of ops from whole networks: Bayesian linear regression with a mixture of
Gaussians as the prior.

    ms of network n = (intercept + sum over its ops of w_op) * (1 + noise)

Each hypothesis of the prior (see ``prior``), at each size of its deviations, is one
component of the mixture: a Gaussian over the costs w with covariance S. The posterior
mean and the evidence of a component are closed forms of K = A S A^T, where A holds the
counts of ops divided by the measured times (Rasmussen and Williams, Gaussian Processes
for Machine Learning, 2006, equations 2.23 and 2.30). One eigendecomposition of K serves
all noise levels. The result is the mean over all components and noise levels, weighted
by evidence. With few networks, it is close to the best-fitting known device, rescaled;
with many, the measurements dominate.

Phones stall: some measurements take twice as long as others. The noise is therefore
Student's t with TAIL degrees of freedom. It is approximated by weights of the networks,
which are recomputed from how far each network is from the prediction of the others
(equations 5.10 to 5.12), under the component with the largest evidence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hwnas.tables.prior import INTERCEPT, Hypothesis, Prior

NOISE = (0.003, 0.006, 0.012, 0.025, 0.05, 0.1, 0.2)
"""Standard deviations of the relative noise that are tried."""
TAIL = 4.0
"""Degrees of freedom of the noise."""
PASSES = 3
"""Number of regressions. Before each one but the first, the weights of the networks are
recomputed.
"""


@dataclass(frozen=True)
class FittedCosts:
    """The result of a fit: milliseconds per op, float [ops]; the intercept; and the
    posterior probability of each cost list of the prior.
    """

    op_ms: np.ndarray
    intercept_ms: float
    posterior: dict[str, float]

    def of(self, counts_NP: np.ndarray) -> np.ndarray:
        """Latencies in milliseconds, float [N], of networks given as counts of ops
        [N, ops].
        """
        latencies: np.ndarray = counts_NP @ self.op_ms + self.intercept_ms
        return latencies


def fit_costs(prior: Prior, counts_NP: np.ndarray, ms_N: np.ndarray) -> FittedCosts:
    """Fit the costs of ops to networks.

    ``counts_NP`` holds the counts of ops in each network, float [N, ops], and ``ms_N``
    the measured latencies in milliseconds, float [N].
    """
    # In units of the median network, costs fit the scale of the prior.
    scale_ms = float(np.median(ms_N))
    counts = np.concatenate([counts_NP, np.ones((len(ms_N), 1))], axis=1)
    # Ops in no network do not affect the evidence, so they are left out of the data.
    seen = np.flatnonzero(counts.any(axis=0))
    # Divided by the measured times, all goals are 1 and the noise is relative.
    design = counts[:, seen] * (scale_ms / ms_N)[:, None]
    hypotheses = prior.hypotheses(counts.mean(axis=0))
    correlation = prior.correlation(np.arange(len(prior.ops)), seen[:-1])
    weights = np.ones(len(ms_N))
    data = _Data.of(design, weights)
    for _ in range(PASSES - 1):
        components = _components(hypotheses, data, seen, correlation)
        likeliest = max(components, key=lambda component: float(component.evidence_S.max()))
        weights = _robust_weights(likeliest, data, weights)
        data = _Data.of(design, weights)
    components = _components(hypotheses, data, seen, correlation)
    costs, posterior = _average(hypotheses, list(components), data, seen, correlation)
    op_costs, intercept = clip_at_zero(costs, counts.mean(axis=0))
    return FittedCosts(op_costs * scale_ms, intercept * scale_ms, posterior)


def clip_at_zero(costs_P: np.ndarray, mean_P: np.ndarray) -> tuple[np.ndarray, float]:
    """Split costs [ops + 1] into the costs of ops, clipped at 0, and the intercept.

    What clipping adds to the mean network (``mean_P``: its counts) is subtracted from the
    intercept. For an op that every network contains equally often, nothing changes.
    """
    op_costs = np.maximum(costs_P[:-1], 0.0)
    added = mean_P[:-1] @ (op_costs - costs_P[:-1])
    return op_costs, float(costs_P[-1] - added)


@dataclass(frozen=True)
class _Data:
    """The weighted data: costs w should satisfy ``rows`` @ w = ``goal``.

    If there are more networks than ops, they are compressed to as many rows as ops,
    without loss. ``basis`` [networks, rows] then has orthonormal columns.
    ``unexplained`` is the squared length of what no costs can explain of the goals, in
    a space of ``spare_dimensions``. ``weighted`` are the goals before compression,
    [networks].
    """

    rows: np.ndarray
    goal: np.ndarray
    basis: np.ndarray
    weighted: np.ndarray
    unexplained: float
    spare_dimensions: int

    @classmethod
    def of(cls, design: np.ndarray, weights: np.ndarray) -> _Data:
        """Weight the networks: all goals are 1 before that."""
        weighted = np.sqrt(weights)
        rows = design * weighted[:, None]
        if len(rows) <= rows.shape[1]:
            return cls(rows, weighted, np.eye(len(rows)), weighted, 0.0, 0)
        basis, compressed = np.linalg.qr(rows)
        goal = basis.T @ weighted
        # Rounding can make the difference of squares slightly negative.
        unexplained = max(float(weighted @ weighted - goal @ goal), 0.0)
        return cls(compressed, goal, basis, weighted, unexplained, len(rows) - len(compressed))


@dataclass(frozen=True)
class _Component:
    """One component of the mixture: a hypothesis with sizes of its deviations.

    ``evidence_S`` is the log evidence, prior included, float [noise levels];
    ``dual_SN`` holds the dual coefficients, float [noise levels, rows];
    ``eigenvalues`` and ``vectors`` decompose K.
    """

    hypothesis: Hypothesis
    rho: float
    tau: float
    evidence_S: np.ndarray
    dual_SN: np.ndarray
    eigenvalues: np.ndarray
    vectors: np.ndarray


def _components(
    hypotheses: list[Hypothesis], data: _Data, seen: np.ndarray, correlation: np.ndarray
) -> Iterator[_Component]:
    """Every hypothesis at every size of its deviations. ``seen`` are the columns of the
    data among all ops and the intercept; ``correlation`` is [ops, ops seen].
    """
    noise_S = np.square(NOISE)[:, None]
    fixed = data.rows[:, -1]
    counts = data.rows[:, :-1]
    for hypothesis in hypotheses:
        # K = A S A^T, split by kind of deviation, so that the sizes only scale the terms.
        centre = data.rows @ hypothesis.centre_P[seen]
        away = data.rows @ hypothesis.differences_KP[:, seen].T
        centre_costs = counts * hypothesis.centre_P[seen[:-1]]
        scaled = np.outer(centre, centre) + INTERCEPT**2 * np.outer(fixed, fixed)
        towards = away @ away.T
        per_op = centre_costs @ correlation[seen[:-1]] @ centre_costs.T
        for rho, tau, log_probability in hypothesis.sizes:
            eigenvalues, vectors = np.linalg.eigh(scaled + rho**2 * towards + tau**2 * per_op)
            # K is positive semi-definite: negative eigenvalues are rounding errors.
            variance_SN = np.maximum(eigenvalues, 0.0) + noise_S
            rotated = vectors.T @ data.goal
            misfit_SN = np.log(variance_SN) + rotated**2 / variance_SN
            evidence_S = log_probability - 0.5 * misfit_SN.sum(axis=1)
            # The dimensions that compression removed contain only noise.
            removed_S = data.spare_dimensions * np.log(noise_S) + data.unexplained / noise_S
            evidence_S -= 0.5 * removed_S[:, 0]
            dual_SN = rotated / variance_SN @ vectors.T
            yield _Component(hypothesis, rho, tau, evidence_S, dual_SN, eigenvalues, vectors)


def _average(
    hypotheses: list[Hypothesis],
    components: list[_Component],
    data: _Data,
    seen: np.ndarray,
    correlation: np.ndarray,
) -> tuple[np.ndarray, dict[str, float]]:
    """The mean of the costs [ops + 1] over all components and noise levels, weighted by
    evidence, and the posterior probability of each hypothesis.
    """
    # Relative to the largest evidence, so that the exponentials do not underflow.
    top = max(component.evidence_S.max() for component in components)
    total = sum(float(np.exp(component.evidence_S - top).sum()) for component in components)
    costs = np.zeros(len(correlation) + 1)
    posterior = dict.fromkeys((hypothesis.name for hypothesis in hypotheses), 0.0)
    for hypothesis in hypotheses:
        # The posterior mean S A^T dual is linear in the dual coefficients, so they are
        # averaged first, once for each kind of deviation.
        dual, towards, per_op = np.zeros((3, len(data.goal)))
        for component in components:
            if component.hypothesis is hypothesis:
                share_S = np.exp(component.evidence_S - top) / total
                posterior[hypothesis.name] += float(share_S.sum())
                mean = share_S @ component.dual_SN
                dual += mean
                towards += component.rho**2 * mean
                per_op += component.tau**2 * mean
        costs += hypothesis.centre_P * (data.rows @ hypothesis.centre_P[seen] @ dual)
        differences_KP = hypothesis.differences_KP
        costs += differences_KP.T @ (differences_KP[:, seen] @ data.rows.T @ towards)
        costs[-1] += INTERCEPT**2 * float(data.rows[:, -1] @ dual)
        centre_costs = hypothesis.centre_P[:-1]
        deviations = centre_costs[seen[:-1]] * (data.rows[:, :-1].T @ per_op)
        costs[:-1] += centre_costs * (correlation @ deviations)
    return costs, posterior


def _robust_weights(component: _Component, data: _Data, weights: np.ndarray) -> np.ndarray:
    """New weights of the networks, from how far each is from what ``component`` predicts
    for it from the others.
    """
    best = int(component.evidence_S.argmax())
    noise = NOISE[best] ** 2
    # The diagonal of (K + noise I)^-1 over all networks. Outside the span of ``basis``,
    # K is 0.
    vectors = data.basis @ component.vectors
    inside = vectors**2 @ (1 / (np.maximum(component.eigenvalues, 0.0) + noise))
    outside = (1 - (vectors**2).sum(axis=1)) / noise
    inverse = outside + inside
    dual = (data.weighted - data.basis @ data.goal) / noise + data.basis @ component.dual_SN[best]
    # Leave-one-out residuals and variances, without the weights.
    residual = dual / inverse / data.weighted
    variance = np.maximum(1 / inverse - noise, 0.0) / weights + noise
    robust: np.ndarray = (TAIL + 1) / (TAIL + residual**2 / variance)
    return robust
