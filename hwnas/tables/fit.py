"""Tables fitted to whole networks, for devices that cannot time single ops, or if
measurements of networks already exist.

The costs of ops come from a regression (see ``regression``) with a prior from other
devices' tables and a roofline (see ``prior``). The table reports its error on networks
that it was not fitted to, and whether more networks would help.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from hwnas.core.arch import Architecture
from hwnas.core.calibration import held_out
from hwnas.core.clock import is_possible
from hwnas.core.ops import Op
from hwnas.core.table import Calibration, Entry, LatencyTable, TableHeader
from hwnas.errors import CoverageError, TableError
from hwnas.tables.prior import ROOFLINE, Prior
from hwnas.tables.regression import fit_costs

MIN_NETWORKS = 3
"""Fewest networks that a table is fitted to."""
FOLDS = 10
"""Folds of the cross-validation. Fewer networks than this are left out one by one."""
HALVINGS = 6
"""Number of random splits in half, which show the error with half as many networks."""
WORTHWHILE = 0.9
"""More networks are recommended if they would reduce the error to less than this
fraction of it.
"""
MAX_LISTED_DEVICES = 3
"""The provenance names the most similar devices, up to this many."""
MIN_LISTED_SHARE = 0.005
"""Devices with a smaller share are not named: it would round to 0 %."""


def fit_table(
    ops: Sequence[Op],
    networks: Sequence[tuple[Architecture, float]],
    header: TableHeader,
    rng: np.random.Generator,
    *,
    known: Sequence[LatencyTable] = (),
    provenance: Mapping[str, str] = MappingProxyType({}),
) -> LatencyTable:
    """Fit a table of ``ops``, usually those of a space, to measured networks:
    (architecture, milliseconds), each architecture once.

    ``known`` are other devices' tables of the same ops, which serve as the prior; without
    any, the prior is the roofline. Entries are the costs of ops inside networks, so the
    calibration is only an intercept. Its ``held_out`` comes from cross-validation: every
    network is predicted by a fit to other networks. ``provenance`` is added to the fit's
    own: which known devices this one resembles, how many ops are in no network and have
    the prior's cost, and whether more networks would help.

    Raises TableError for fewer than MIN_NETWORKS networks or a time that no clock measures
    (0, below a nanosecond, NaN), and CoverageError if a network has ops that are not in
    ``ops`` or a table lacks some.

    Example:
        >>> space = load_space("fbnet")  # doctest: +SKIP
        >>> rng = np.random.default_rng(0)
        >>> table = fit_table(space.ops, networks, header, rng)  # doctest: +SKIP
        >>> calibration = table.calibration  # doctest: +SKIP
        >>> calibration.held_out.mape, table.provenance["more_networks"]  # doctest: +SKIP
        (0.031, '20 networks: 3.1%; about 20 more would bring 2.6%')
    """
    if len(networks) < MIN_NETWORKS:
        raise TableError(
            f"fitting a table needs at least {MIN_NETWORKS} different networks, got"
            f" {len(networks)}: measure more."
        )
    for arch, latency in networks:
        if not is_possible(latency):
            raise TableError(
                f"network {arch.name!r} takes {latency:g} ms, which no clock measures: give"
                " latencies"
                " in milliseconds."
            )
    ms_N = np.array([latency for _, latency in networks], dtype=float)
    prior = Prior.of(ops, known)
    counts_NP = count_ops(ops, [arch for arch, _ in networks])
    fitted = fit_costs(prior, counts_NP, ms_N)
    predicted_N, sums_N = _cross_validate(prior, counts_NP, ms_N, rng)

    entries = {}
    for op, op_ms in zip(ops, fitted.op_ms, strict=True):
        # Five significant digits, as in a profile.
        entries[op.key] = Entry(ms=float(f"{op_ms:.5g}"))
    calibration = Calibration(
        intercept_ms=fitted.intercept_ms,
        slope=1.0,
        networks=len(ms_N),
        held_out=held_out(predicted_N, sums_N, ms_N),
    )
    unseen = int((~counts_NP.any(axis=0)).sum())
    # These texts are part of the table's document, so its hash depends on their wording,
    # and they keep the words of the first release: judged (evaluated), price (cost).
    own_provenance = {
        "method": f"fitted from {len(ms_N)} whole networks, judged by cross-validation",
        "prior": "; ".join([*prior.names, ROOFLINE]),
        "resembles": _resembles(fitted.posterior),
        "prior_alone": (
            f"{unseen} of {len(ops)} ops are in no measured network: their price is the prior's"
        ),
        "more_networks": _more_networks(
            prior, counts_NP, ms_N, np.abs(predicted_N / ms_N - 1), rng
        ),
    }
    return LatencyTable(
        header=header,
        entries=entries,
        calibration=calibration,
        provenance={**own_provenance, **provenance},
    )


def _resembles(shares: Mapping[str, float]) -> str:
    """The most similar known devices with their shares: ``pixel1 80%, roofline 19%``."""
    names = []
    for name, share in sorted(shares.items(), key=lambda item: -item[1])[:MAX_LISTED_DEVICES]:
        if share >= MIN_LISTED_SHARE:
            names.append(f"{name} {share:.0%}")
    return ", ".join(names)


def count_ops(ops: Sequence[Op], networks: Sequence[Architecture]) -> np.ndarray:
    """How often each network contains each op: float [networks, ops]. Raises
    CoverageError if a network contains an op that is not in ``ops``.
    """
    position = {op: i for i, op in enumerate(ops)}
    counts_NP = np.zeros((len(networks), len(ops)))
    for row, arch in zip(counts_NP, networks, strict=True):
        for op, times in Counter(arch.ops()).items():
            if op not in position:
                raise CoverageError(
                    f"architecture {arch.name!r} contains op {op.key}, which is not in the table's"
                    " space.",
                    (op.key,),
                )
            row[position[op]] = times
    return counts_NP


def _cross_validate(
    prior: Prior, counts_NP: np.ndarray, ms_N: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted latency and sum of entries of each network, from a fit to other folds:
    float [N] each.
    """
    fold_N = rng.permutation(len(ms_N)) % FOLDS
    predicted_N = np.zeros(len(ms_N))
    sums_N = np.zeros(len(ms_N))
    for fold in np.unique(fold_N):
        test = fold_N == fold
        fitted = fit_costs(prior, counts_NP[~test], ms_N[~test])
        predicted_N[test] = fitted.of(counts_NP[test])
        sums_N[test] = counts_NP[test] @ fitted.op_ms
    return predicted_N, sums_N


def _more_networks(
    prior: Prior,
    counts_NP: np.ndarray,
    ms_N: np.ndarray,
    errors_N: np.ndarray,
    rng: np.random.Generator,
) -> str:
    """Whether twice as many networks would help, as text.

    This compares the cross-validated errors ``errors_N`` with the errors of fits to
    random halves of the networks. The error is assumed to fall as a power of the number
    of networks.
    """
    count = len(ms_N)
    halved_errors = np.zeros((HALVINGS, count))
    for errors in halved_errors:
        order = rng.permutation(count)
        first, second = order[: count // 2], order[count // 2 :]
        for train, test in ((first, second), (second, first)):
            fitted = fit_costs(prior, counts_NP[train], ms_N[train])
            errors[test] = np.abs(fitted.of(counts_NP[test]) / ms_N[test] - 1)

    error = float(errors_N.mean())
    # Cross-validation fits to all networks but one fold.
    full = count * (1 - 1 / min(FOLDS, count))
    power = 0.0
    if error:
        ratio = max(float(halved_errors.mean()) / error, 1.0)
        # At most 0.5: independent errors fall with the square root of their number.
        power = min(math.log(ratio) / math.log(2 * full / count), 0.5)
    promised = error * (full / (2 * count)) ** power
    if promised < WORTHWHILE * error:
        return f"{count} networks: {error:.1%}; about {count} more would bring {promised:.1%}"
    return (
        f"{count} networks: {error:.1%}; half of them did about as well, so more would hardly help"
    )
