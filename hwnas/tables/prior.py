"""The prior over a device's latencies before anything is measured on it: cost lists that
it may resemble, and how far it may deviate from them.

A *cost list* gives the cost of every op and of the fixed rest, in any unit: only the
proportions matter. There are two kinds:

- *known devices*: the list of each given table;
- *the roofline*: the mean of five lists that are counted, not measured: layers, dense
  MACs, depthwise MACs, values moved and parameters. A device that spent all its time on
  one of these would have exactly that list; real devices lie in between.

A device that resembles a list t, in units of its mean network, has the costs

    w = a t + c e + rho * sum over companions u of b_u (u - t) + tau * (t . z)

    a, b_u ~ N(0, 1),  c ~ N(0, INTERCEPT^2),  z ~ N(0, C)

where e is the intercept, and the companions are all other known lists, or the five lists
of the roofline. C[i, j] = ALIKE^(number of fields in which ops i and j differ): a device
that is slow at one 5 x 5 block is slow at similar blocks.

Each combination of a list, rho and tau is a separate hypothesis, and the measurements
choose among them (see ``regression``). For each kind of deviation, EXACT is the prior
probability that there is none; its sizes share the rest equally. The roofline is an
exception: no real device equals its mean, so a deviation towards the five is certain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hwnas.core.clock import is_possible
from hwnas.core.cost import check_coverage, op_ms
from hwnas.core.ops import Op
from hwnas.core.size import area
from hwnas.core.table import LatencyTable
from hwnas.errors import TableError

INTERCEPT = 0.1
"""Standard deviation of the fixed part of a network's latency, in addition to the list's
own fixed part, in units of the mean network.
"""
ALIKE = 0.9
"""Correlation between the deviations of two ops that differ in one field."""
EXACT = 0.75
"""Prior probability that there is no deviation of one kind."""
RHO = (0.05, 0.2)
"""Sizes of deviations towards a companion."""
TAU = (0.03, 0.1, 0.3, 1.0)
"""Sizes of deviations of single ops, relative to their cost."""
ROOFLINE = "roofline"


@dataclass(frozen=True)
class Hypothesis:
    """The hypothesis that a device resembles one cost list.

    ``centre_P`` is the list, float [ops + 1] with the intercept last, in units of the
    mean network. ``differences_KP`` holds the differences to it of its K companions.
    ``exact`` is the probability that there is no deviation towards a companion.
    """

    name: str
    centre_P: np.ndarray
    differences_KP: np.ndarray
    exact: float

    @property
    def sizes(self) -> Iterator[tuple[float, float, float]]:
        """All combinations of deviations: (rho, tau, log probability)."""
        # Without companions, there is nothing to deviate towards.
        rhos = _with_probabilities(RHO, self.exact) if len(self.differences_KP) else [(0.0, 1.0)]
        for rho, rho_probability in rhos:
            for tau, tau_probability in _with_probabilities(TAU, EXACT):
                yield rho, tau, math.log(rho_probability * tau_probability)


def _with_probabilities(sizes: Sequence[float], exact: float) -> list[tuple[float, float]]:
    """Sizes of a deviation with their probabilities, including a size of 0 with
    probability ``exact``. Impossible sizes are left out.
    """
    probabilities = [(0.0, exact)]
    for size in sizes:
        probabilities.append((size, (1 - exact) / len(sizes)))
    return [(size, probability) for size, probability in probabilities if probability]


@dataclass(frozen=True)
class Prior:
    """Cost lists over ``ops``. ``known_KP`` holds those of known devices, float
    [devices, ops + 1] with the intercept last, in the order of ``names``.

    Example:
        >>> from hwnas.core.spaces import mobile32
        >>> Prior.of(mobile32().ops).names
        ()
    """

    ops: tuple[Op, ...]
    names: tuple[str, ...]
    known_KP: np.ndarray

    @classmethod
    def of(cls, ops: Sequence[Op], tables: Sequence[LatencyTable] = ()) -> Prior:
        """The prior from tables of known devices. Without any, the roofline only.

        Raises CoverageError if a table lacks ops, and TableError if it is a positional
        model.
        """
        known_KP = np.zeros((len(tables), len(ops) + 1))
        for row, table in zip(known_KP, tables, strict=True):
            if not table.entries:
                raise TableError(
                    f"table {table.title} has costs for positions of a space, not ops: give a table"
                    " of ops as the prior."
                )
            check_coverage(ops, table, "the fit")
            row[:-1] = [op_ms(op, table) for op in ops]
            if table.calibration is not None:
                row[-1] = table.calibration.intercept_ms
        return cls(tuple(ops), tuple(table.title for table in tables), known_KP)

    @cached_property
    def roofline_lists(self) -> np.ndarray:
        """The five lists of the roofline: float [5, ops + 1]."""
        lists = zip(*map(_counts, self.ops), strict=True)
        # Counts have no fixed part, so the intercept is 0.
        return np.array([[*costs, 0.0] for costs in lists])

    @cached_property
    def _fields(self) -> np.ndarray:
        """The fields in which ops may differ, with values coded as integers:
        [fields, ops].
        """
        codes = []
        for values in zip(*map(_traits, self.ops), strict=True):
            # Integers instead of words, so that ``correlation`` can compare whole arrays.
            codes.append(np.unique(np.array(values), return_inverse=True)[1])
        return np.array(codes)

    def correlation(self, of: np.ndarray, to: np.ndarray) -> np.ndarray:
        """Correlations between the deviations of ops, given as indices [A] and [B]:
        float [A, B].
        """
        differing = np.zeros((len(of), len(to)), dtype=np.int64)
        for field in self._fields:
            differing += field[of, None] != field[to]
        correlations: np.ndarray = ALIKE**differing
        return correlations

    def hypotheses(self, mean_P: np.ndarray) -> list[Hypothesis]:
        """All hypotheses. ``mean_P`` is the mean network, float [ops + 1]: how often it
        contains each op, and 1 for the intercept.

        Raises TableError if that network takes 0 ms by one of the tables, or another time
        that no clock measures.
        """
        with np.errstate(over="ignore"):  # refused below
            unit_ms = self.known_KP @ mean_P
        for name, table_ms in zip(self.names, unit_ms, strict=True):
            if not is_possible(table_ms):
                raise TableError(
                    f"table {name} predicts {table_ms:g} ms for the measured networks, so it cannot"
                    " be their prior."
                )
        known_KP = self.known_KP / unit_ms[:, None]
        hypotheses = []
        for i, name in enumerate(self.names):
            centre_P = known_KP[i]
            companions_KP = np.delete(known_KP, i, axis=0)
            hypotheses.append(Hypothesis(name, centre_P, companions_KP - centre_P, EXACT))

        # A list of zeros has no proportions, such as depthwise MACs in a space without.
        counted_KP = self.roofline_lists[self.roofline_lists @ mean_P > 0]
        counted_KP = counted_KP / (counted_KP @ mean_P)[:, None]
        centre_P = counted_KP.mean(axis=0)
        hypotheses.append(Hypothesis(ROOFLINE, centre_P, counted_KP - centre_P, exact=0.0))
        return hypotheses


def _traits(op: Op) -> tuple[Any, ...]:
    """The fields in which two ops may differ. The expansion is relative to the input's
    width, so that equal expansions of different widths do not count as a difference.
    """
    return (
        op.kind,
        op.size,
        op.in_ch,
        op.out_ch,
        op.mid_ch / op.in_ch,
        op.kernel,
        op.stride,
        op.groups,
        op.se_ch > 0,
        op.act,
        op.residual,
        getattr(op, "se_gate", "sigmoid"),
    )


def _counts(op: Op) -> tuple[float, ...]:
    """Layers, dense MACs, depthwise MACs, values read and written, parameters."""
    depthwise = 0
    moved = 0
    for layer in op.layers:
        moved += layer.read + layer.written
        if layer.groups == layer.in_ch > 1:
            depthwise += layer.macs
    if op.pooled or op.residual:
        # Pooling and the residual connection read the op's input outside the layers.
        moved += op.in_ch * area(op.size)
    return len(op.layers), op.macs - depthwise, depthwise, moved, op.params
