"""What the proposals of a search are compared with: random architectures, as many as
the search's length justifies.

The last ranking passes every held-out image through every proposal, and for comparison
random architectures are scored in the same way: within the budget on the same images,
so that they can be told from the proposals, and over the whole space on
``search.evaluation_images``, as nothing but the shape of a cloud depends on them. After
a short search that can take as long as the search. Where ``search.random_samples`` is
not set, there are so many of them that ranking and scoring cost at most ``SHARE`` of
what the search cost, but never fewer than ``FEWEST``: less would say nothing of chance.

The cost is counted in multiply-accumulates (``cost_counter``) and not timed, so it is the same
on every machine and after every kill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hwnas.core.arch import Picks
from hwnas.progress import duration
from hwnas.search.cost_counter import CostCounter
from hwnas.search.evaluator import SupernetEvaluator
from hwnas.search.proposal import sample_feasible
from hwnas.search.strategy import SearchContext

SHARE = 0.2
"""Part of a search's cost that ranking and scoring may take."""
MOST, FEWEST = 8, 4
"""Random architectures of either kind where ``search.random_samples`` is not set."""


@dataclass(frozen=True)
class Comparison:
    """Random architectures ``within`` the budget and ``anywhere`` in the space, and
    what is to be said before they are scored.
    """

    within: Sequence[Picks]
    anywhere: Sequence[Picks]
    sentence: str


def compared_with(
    search: SearchContext, evaluator: SupernetEvaluator, proposals: Sequence[Picks]
) -> Comparison:
    """What to score beside the proposals of a search that is over. Networks that were
    trained alone say nothing about others.
    """
    cost_counter, config, space = search.cost_counter, evaluator.config, search.space
    assert cost_counter is not None
    spent = cost_counter.cost.macs
    of_all, of_part = image_counts(evaluator)
    ranking = sum(cost_counter.evaluation_macs(picks, of_all) for picks in proposals)
    most = config.random_samples if config.random_samples is not None else MOST
    within: list[Picks] = []
    anywhere: list[Picks] = []
    if evaluator.supernet.shares:
        within = sample_feasible(search, most, search.rng)
        anywhere = [space.sample(search.rng) for _ in range(most)]
    count = most
    if config.random_samples is None:
        count = affordable(
            SHARE * spent - ranking,
            _costs(cost_counter, within, of_all),
            _costs(cost_counter, anywhere, of_part),
        )
    within, anywhere = within[:count], anywhere[:count]
    total = (
        ranking
        + sum(_costs(cost_counter, within, of_all))
        + sum(_costs(cost_counter, anywhere, of_part))
    )
    return Comparison(
        within,
        anywhere,
        _sentence(
            search, evaluator, (len(proposals), len(within), len(anywhere)), total / max(spent, 1)
        ),
    )


def image_counts(evaluator: SupernetEvaluator) -> tuple[int, int]:
    """Images that pass through a network that is evaluated on all held-out images, and on
    ``search.evaluation_images`` of them.
    """
    estimating, held_out = evaluator.config.recalibration_images, len(evaluator.held_out)
    return estimating + held_out, estimating + min(held_out, evaluator.config.evaluation_images)


def affordable(left: float, within: Sequence[float], anywhere: Sequence[float]) -> int:
    """How many pairs of random architectures, one of either kind, cost at most
    ``left``: at least ``FEWEST``.
    """
    most = max(len(within), len(anywhere))
    sums = np.zeros(most)
    for costs in (within, anywhere):
        sums[: len(costs)] += costs
    return max(FEWEST, int(np.searchsorted(np.cumsum(sums), left, side="right")))


def _costs(cost_counter: CostCounter, architectures: Sequence[Picks], images: int) -> list[float]:
    return [cost_counter.evaluation_macs(picks, images) for picks in architectures]


def _sentence(
    search: SearchContext, evaluator: SupernetEvaluator, counts: tuple[int, int, int], share: float
) -> str:
    proposals, within, anywhere = counts
    images, part = (
        len(evaluator.held_out),
        min(len(evaluator.held_out), evaluator.config.evaluation_images),
    )
    scoring = f" and scoring {within} random architectures in the budget" if within else ""
    cloud = f", and {anywhere} anywhere on {part:,}" if anywhere else ""
    about = f"about {duration(share * search.seconds)}, " if search.seconds else ""
    return (
        f"ranking {proposals} proposals{scoring} on {images:,} held-out images each{cloud}:"
        f" {about}{share:.0%} of the search's cost"
    )
