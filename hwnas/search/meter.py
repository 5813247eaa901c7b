"""What a search costs, counted and not timed, so that it is the same on every machine and after every kill.

    cost = sum over passes of  w * images * MACs executed,    w = 1 forward, w = 3 forward and backward

A backward pass computes two products where the forward computes one, hence 3. Of a mixture, every option that is executed counts: gates
that are not zero, and those probed. DARTS's second order is four gradients: at the weights, after the virtual step, and two for the
finite difference. An architecture that is judged passes its recalibration images and its evaluation images forward, once.

Not counted: optimiser steps, reading images, and what mixtures compute twice to save memory (``supernet.remat``). Options that share
computations (``sharing = "collapsed"``), coupled widths that run at once, slots that ``supernet.proxy_depth`` leaves out and pixels that
``supernet.proxy_resolution`` leaves out count as if they did not, or were not: an upper bound there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from hwnas.core.arch import Picks
from hwnas.core.priced import PricedSpace
from hwnas.core.space import SearchSpace

FORWARD, GRADIENT = 1, 3
"""What a pass costs in forward passes."""

SECOND_ORDER = 4
"""Gradients of DARTS's second order."""


class SearchCost(BaseModel):
    """The cost of a search in multiply-accumulates; see the module. ``training_images`` count once per path that they went through."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    macs: int
    training_images: int
    judged: int


class Meter:
    """Counts what a search of ``space`` asks of its weights.

    ``proxies`` are the spaces whose MACs they have: smaller ones where the super-net is a proxy, several where it grows (``grow``).
    ``judged_images`` are passed forward to judge an architecture.

    Example:
        >>> from hwnas.testing import tiny_space
        >>> meter = Meter(tiny_space(), [tiny_space()], batch_size=64, judged_images=1000)
        >>> meter.judge(tiny_space().sample(np.random.default_rng(0)))
        >>> meter.cost.judged
        1
    """

    def __init__(self, space: SearchSpace, proxies: Sequence[SearchSpace], batch_size: int, judged_images: int) -> None:
        self._proxies = [PricedSpace.of_ops(proxy, lambda op: op.macs) for proxy in proxies]
        self._priced = self._proxies[-1]
        self._space, self._batch_size, self._judged_images = space, batch_size, judged_images
        self._macs = self._images = self._judged = self._teacher = 0
        self._known: set[str] = set()

    @property
    def cost(self) -> SearchCost:
        """All so far."""
        return SearchCost(macs=self._macs, training_images=self._images, judged=self._judged)

    def grow(self, number: int) -> None:
        """From now on the super-net of this number is used."""
        self._priced = self._proxies[number]

    def train(self, gates: Sequence[Mapping[str, Any]], *, split: bool, teach: bool) -> None:
        """An update of the weights: each of the gates on the whole batch, or on its part of it."""
        self._known.clear()  # of other weights
        shares = (
            [len(part) for part in np.array_split(np.arange(self._batch_size), len(gates))] if split else [self._batch_size] * len(gates)
        )
        self._macs += sum(GRADIENT * images * self._executed(each) for each, images in zip(gates, shares, strict=True))
        self._macs += FORWARD * sum(shares) * self._teacher if teach else 0
        self._images += sum(shares)

    def remember_teacher(self, picks: Picks) -> None:
        """From now on this architecture teaches."""
        self._teacher = self._of(picks)

    def qualities(self, gates: Sequence[Mapping[str, Any]], multiple: int) -> None:
        """Held-out images in equal parts through each of the gates."""
        self._macs += sum(FORWARD * self._batch_size * multiple * self._executed(each) for each in gates) // len(gates)

    def gate_gradients(self, gates: Mapping[str, Any], probes: Mapping[str, Sequence[int]], order: int) -> None:
        """The derivative of the held-out loss by the gates."""
        self._macs += (SECOND_ORDER if order == 2 else 1) * GRADIENT * self._batch_size * self._executed(gates, probes)

    def judge(self, picks: Picks, images: int | None = None) -> None:
        """An architecture is judged: on ``images`` where they are given, else by ``ctx.evaluate``, which remembers what it has judged."""
        identity = self._space.decode(picks).identity
        if images is None and identity in self._known:
            return
        self._known.add(identity)
        self._judged += 1
        self._macs += self.judging(picks, self._judged_images if images is None else images)

    def judging(self, picks: Picks, images: int) -> int:
        """MACs of judging an architecture on so many images; nothing is counted."""
        return FORWARD * images * self._of(picks)

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"macs": self._macs, "images": self._images, "judged": self._judged, "teacher": self._teacher}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._macs, self._images, self._judged, self._teacher = (state[key] for key in ("macs", "images", "judged", "teacher"))

    def _of(self, picks: Picks) -> int:
        return round(float(self._priced.of_many(self._space.index(picks)[None])[0]))

    def _executed(self, gates: Mapping[str, Any], probes: Mapping[str, Sequence[int]] | None = None) -> int:
        """MACs of an image under gates, which may be numpy's or torch's."""
        runs = {key: np.array([float(value) != 0 for value in gate], dtype=float) for key, gate in gates.items()}
        for key, options in (probes or {}).items():
            runs[key][list(options)] = 1.0
        return round(float(self._priced.expected(runs)))
