"""Tables fitted from whole networks, where ops cannot be measured one by one, or
somebody has measured networks already.

The prices of ops are found by regression (``regression``) from a prior (``prior``):
other devices' tables, and a roofline. The table says how far it is off on networks that
it has not seen, and whether more networks would help.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from hwnas.core.arch import Architecture
from hwnas.core.calibration import held_out
from hwnas.core.ops import Op
from hwnas.core.table import Calibration, Entry, LatencyTable, TableHeader
from hwnas.errors import CoverageError, TableError
from hwnas.tables.prior import ROOFLINE, Prior
from hwnas.tables.regression import fit_prices

MIN_NETWORKS = 3
FOLDS = 10
"""Of the cross-validation; fewer networks are left out one by one."""
HALVINGS = 6
"""How often the networks are split at random, to see what half of them would have done."""


def fit_table(
    ops: Sequence[Op],
    networks: Sequence[tuple[Architecture, float]],
    header: TableHeader,
    rng: np.random.Generator,
    *,
    known: Sequence[LatencyTable] = (),
    provenance: Mapping[str, str] = MappingProxyType({}),
) -> LatencyTable:
    """The table of ``ops`` (a space's) from measured networks: (architecture,
    milliseconds), each architecture once.

    ``known`` are other devices' tables of the same ops, where the fit starts; without
    any it starts at the roofline. Entries are the prices of ops inside networks, so the
    calibration is an intercept alone. Its ``held_out`` is cross-validated: every
    network is judged by a fit that has not seen it or its latency. ``provenance`` is
    added to what the fit says of itself: which known devices this one resembles, how
    many ops were in no network and have the prior's price, and whether more networks
    would help.

    Raises TableError (fewer than MIN_NETWORKS, a time of 0 or below) or CoverageError
    (ops that a network or a table has alone).

    Example:
        >>> space = load_space("fbnet")                                                        # doctest: +SKIP
        >>> table = fit_table(space.ops, networks, header, np.random.default_rng(0))           # doctest: +SKIP
        >>> table.calibration.held_out.mape, table.provenance["more_networks"]                 # doctest: +SKIP
        (0.031, '20 networks: 3.1%; about 20 more would bring 2.6%')
    """
    if len(networks) < MIN_NETWORKS:
        raise TableError(
            f"a table is fitted from {MIN_NETWORKS} or more different networks, got"
            f" {len(networks)}: measure more."
        )
    ms = np.array([latency for _, latency in networks], dtype=float)
    if not (np.isfinite(ms).all() and ms.min() > 0):
        arch, latency = networks[int(np.flatnonzero(~(np.isfinite(ms) & (ms > 0)))[0])]
        raise TableError(f"network {arch.name!r} takes {latency:g} ms: give latencies above 0.")
    prior = Prior.of(ops, known)
    counts = count_ops(ops, [arch for arch, _ in networks])
    prices = fit_prices(prior, counts, ms)
    predicted, sums = _left_out(prior, counts, ms, rng)
    unseen = int((~counts.any(axis=0)).sum())
    shares = sorted(prices.believed.items(), key=lambda item: -item[1])[:3]
    return LatencyTable(
        header=header,
        entries={
            op.key: Entry(ms=float(f"{price:.5g}"))
            for op, price in zip(ops, prices.op_ms, strict=True)
        },
        calibration=Calibration(
            intercept_ms=prices.intercept_ms,
            slope=1.0,
            networks=len(ms),
            held_out=held_out(predicted, sums, ms),
        ),
        provenance={
            "method": f"fitted from {len(ms)} whole networks, judged by cross-validation",
            "prior": "; ".join([*prior.names, ROOFLINE]),
            "resembles": ", ".join(
                f"{name} {share:.0%}" for name, share in shares if share >= 0.005
            ),
            "prior_alone": (
                f"{unseen} of {len(ops)} ops are in no measured network: their price is the prior's"
            ),
            "more_networks": _more_networks(prior, counts, ms, np.abs(predicted / ms - 1), rng),
            **provenance,
        },
    )


def count_ops(ops: Sequence[Op], networks: Sequence[Architecture]) -> np.ndarray:
    """How often each network holds each op: float [networks, ops]. Raises CoverageError
    where one is not among ``ops``.
    """
    position = {op: i for i, op in enumerate(ops)}
    counts = np.zeros((len(networks), len(ops)))
    for row, arch in zip(counts, networks, strict=True):
        for op, times in Counter(arch.ops()).items():
            if op not in position:
                raise CoverageError(
                    f"architecture {arch.name!r} holds {op.key}, which the space of the table does"
                    " not.",
                    (op.key,),
                )
            row[position[op]] = times
    return counts


def _left_out(
    prior: Prior, counts_NP: np.ndarray, ms_N: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """What fits without a network predict for it, and their sum of entries: float [N] each."""
    fold_of = rng.permutation(len(ms_N)) % FOLDS
    predicted, sums = np.zeros((2, len(ms_N)))
    for fold in np.unique(fold_of):
        out = fold_of == fold
        prices = fit_prices(prior, counts_NP[~out], ms_N[~out])
        predicted[out], sums[out] = prices.of(counts_NP[out]), counts_NP[out] @ prices.op_ms
    return predicted, sums


def _more_networks(
    prior: Prior,
    counts_NP: np.ndarray,
    ms_N: np.ndarray,
    errors_N: np.ndarray,
    rng: np.random.Generator,
) -> str:
    """Whether twice as many networks would help: from how much worse fits to random
    halves are, on the networks they left out.

    The error is taken to fall as a power of the number of networks, at most as
    independent errors do. A promise of less than a tenth of the error is no reason to
    measure more.
    """
    count = len(ms_N)
    halved = np.zeros((HALVINGS, count))
    for errors in halved:
        order = rng.permutation(count)
        for fitted, judged in (
            (order[: count // 2], order[count // 2 :]),
            (order[count // 2 :], order[: count // 2]),
        ):
            prices = fit_prices(prior, counts_NP[fitted], ms_N[fitted])
            errors[judged] = np.abs(prices.of(counts_NP[judged]) / ms_N[judged] - 1)
    error, full = float(errors_N.mean()), count * (1 - 1 / min(FOLDS, count))
    power = (
        min(math.log(max(float(halved.mean()) / error, 1.0)) / math.log(2 * full / count), 0.5)
        if error
        else 0.0
    )
    promised = error * (full / (2 * count)) ** power
    if promised < 0.9 * error:
        return f"{count} networks: {error:.1%}; about {count} more would bring {promised:.1%}"
    return (
        f"{count} networks: {error:.1%}; half of them did about as well, so more would hardly help"
    )
