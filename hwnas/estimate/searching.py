"""The search stage: a few real steps of the strategy in every one of its phases, and a
few images through one evaluated network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from hwnas.config import Experiment, SearchConfig
from hwnas.core.arch import Picks
from hwnas.core.search_space import SearchSpace
from hwnas.data.images import Batch, evaluation_batches
from hwnas.engine import Engine
from hwnas.estimate.budget import search_context
from hwnas.estimate.context import Context
from hwnas.estimate.parts import Estimate, Part, Stopwatch, peak_memory
from hwnas.nn.bn import recalibrate
from hwnas.search import STRATEGIES, stage
from hwnas.search.comparison import compared_with, image_counts
from hwnas.search.evaluator import KEPT_BYTES, SupernetEvaluator, placed
from hwnas.search.proposal import sample_feasible
from hwnas.search.strategy import SearchContext, Strategy
from hwnas.search.supernets import cost_counter_of, trained

STEPS = 0.3
"""Part of the timing's seconds for steps of the strategy."""
STEPS_OF_A_PHASE = 9
"""Steps that are timed of a phase, at most, the first of which warms up."""
JUDGING = 3.0
"""Seconds for evaluating one network, about."""
FEW = 8
"""Images that tell how many more there is time for."""
MOST_WEIGHTS = 100_000_000
"""Weights of the largest super-net that is built for an estimate: 0.4 GB, and a few
times as much while it trains (ours).
"""


def weights_of(space: SearchSpace, *, collapsed: bool = False) -> int:
    """Weights of a super-net, about: of the largest block of every slot where its
    options share them, else of all options.
    """
    options = {choice.key: len(choice.options) for choice in space.choices}
    found = 0
    for term in space.terms():
        largest = max((op.params for op in term.ops if op is not None), default=0)
        found += largest if collapsed else largest * options.get(term.slot, 1)
    return found


def _collapsed(config: SearchConfig) -> bool:
    made: type[Strategy] = STRATEGIES.get(config.strategy.name)
    sharing = made.sharing if config.supernet.sharing == "auto" else config.supernet.sharing
    return sharing == "collapsed"


def of_search(ctx: Context) -> Estimate:
    """Time a search. Raises HwnasError where it could not run."""
    ctx.check_data()
    space, watch = ctx.space, ctx.watch
    config = ctx.experiment.search
    weights = weights_of(space, collapsed=_collapsed(config))
    if weights > MOST_WEIGHTS:
        return Estimate(
            unknown=f"a super-net of {weights / 1e6:.0f} M weights is not built for a plan"
        )
    experiment, search = search_context(ctx.experiment, space, ctx.table)
    experiment = stage.sized(experiment, space)
    if config.weights is not None:
        evaluator = SupernetEvaluator(trained(config, space), experiment)
        search.cost_counter = cost_counter_of(config, evaluator.supernet)
        return _of_finding(experiment, search, evaluator, None)
    prepared = stage.prepare(experiment, space, search, ctx.folder("search"))
    per_step, macs_per_step = _step_seconds(prepared, watch)
    assert search.cost_counter is not None
    search.cost_counter.load_state_dict(
        {**search.cost_counter.state_dict(), "macs": round(macs_per_step * search.steps)}
    )
    training = Part("training", search.steps, per_step)
    saving, checkpoint_bytes = checkpoints(
        prepared.engine, training, experiment.checkpoint_seconds, watch
    )
    rest = _of_finding(experiment, search, prepared.evaluator, prepared.strategy)
    return replace(
        rest, parts=(training, saving, *rest.parts), disk_bytes=rest.disk_bytes + checkpoint_bytes
    )


class _Steps:
    """Steps of a search, out of turn."""

    def __init__(self, prepared: stage.Prepared) -> None:
        self.prepared, self.numbers = prepared, list[int]()

    def __call__(self, number: int) -> None:
        self.prepared.engine.step = number
        self.prepared.step(number)
        self.numbers.append(number)


def _step_seconds(prepared: stage.Prepared, watch: Stopwatch) -> tuple[float, float]:
    """Mean seconds of a step, and its multiply-accumulates, over all phases of a
    strategy, each as long as it is.
    """
    search = prepared.search
    assert search.cost_counter is not None
    begins = sorted(
        {min(step, search.steps - 1) for step in (0, *prepared.strategy.milestones(search))}
    )
    seconds = macs = 0.0
    timed = _Steps(prepared)
    for begin, end in pairwise((*begins, search.steps)):
        before, timed.numbers = search.cost_counter.cost.macs, []
        # warm-ups fade, so that neither end is like the whole
        middle = min((begin + end) // 2, end - 1)
        numbers = [begin, *range(middle, min(end, middle + STEPS_OF_A_PHASE))]
        each = watch.mean([partial(timed, number) for number in numbers], STEPS / len(begins))
        seconds += (end - begin) * each
        macs += (end - begin) * (search.cost_counter.cost.macs - before) / len(timed.numbers)
    return seconds / search.steps, macs / search.steps


def checkpoints(
    engine: Engine, training: Part, every_seconds: float, watch: Stopwatch
) -> tuple[Part, float]:
    """Saving the state while training, and how large it is. The stage's own weights,
    written in the end, are smaller.
    """
    each = watch.once(engine.save)
    size_bytes = engine.checkpoint.stat().st_size
    engine.finish()
    count = training.seconds / (every_seconds + each) if every_seconds else training.count
    return Part("checkpoints", 2 + min(count, training.count), each), size_bytes


class _Counting:
    """An evaluator that takes no time: what a strategy asks for when it proposes, counted."""

    def __init__(self, space: SearchSpace) -> None:
        self.space, self.known = space, dict[str, float]()

    def evaluate(self, picks: Picks) -> float:
        """A number that depends on nothing but the architecture's turn."""
        identity = self.space.decode(picks).identity
        return self.known.setdefault(identity, (0.618 * len(self.known)) % 1.0)


def _of_finding(
    experiment: Experiment,
    search: SearchContext,
    evaluator: SupernetEvaluator,
    strategy: Strategy | None,
) -> Estimate:
    """What comes after the training: finding, ranking, scoring random architectures."""
    config, cost_counter = experiment.search, search.cost_counter
    assert cost_counter is not None
    counting = _Counting(search.space)
    search.evaluator = counting
    search.step, search.rng = search.steps, np.random.default_rng([experiment.seed, search.steps])
    finder = stage.search_finder(config)
    found = (
        finder.find(search, config.candidates)
        if finder is not None
        else strategy and strategy.propose(search, config.candidates)
    )
    proposals = found or sample_feasible(search, 1, search.rng)
    of_part = image_counts(evaluator)[1]
    for _ in counting.known:
        cost_counter.count_evaluation(proposals[0], of_part)
    comparison = compared_with(search, evaluator, proposals)
    costs = _costs_of_judging(evaluator, proposals[0])
    estimated = min(config.recalibration_images, len(evaluator.train))
    recalibration = costs.extraction + estimated * costs.estimating
    full = recalibration + len(evaluator.held_out) * costs.evaluating
    part = recalibration + min(len(evaluator.held_out), config.evaluation_images) * costs.evaluating
    parts = (
        Part("reading images", estimated + len(evaluator.held_out), costs.reading),
        Part("finding", len(counting.known), part),
        Part("ranking", len(proposals), full),
        Part(
            "scoring random networks",
            len(comparison.within) + len(comparison.anywhere) * part / full,
            full,
        ),
    )
    kept = costs.image_bytes * estimated + min(
        KEPT_BYTES, costs.image_bytes * len(evaluator.held_out)
    )
    weights_bytes = sum(tensor.nbytes for tensor in evaluator.supernet.state_dict().values())
    trained_bytes = weights_bytes if config.weights is None else 0
    network_bytes = 4.0 * search.space.decode(proposals[0]).params
    return Estimate(
        tuple(part for part in parts if part.count),
        peak_memory() + kept,
        trained_bytes + network_bytes,
    )


@dataclass(frozen=True)
class _Costs:
    """Seconds of extracting a network, and per image of reading it, of estimating BN
    statistics and of evaluating; bytes of an image.
    """

    extraction: float
    reading: float
    estimating: float
    evaluating: float
    image_bytes: int


def _costs_of_judging(evaluator: SupernetEvaluator, picks: Picks) -> _Costs:
    watch = Stopwatch(math.inf)
    networks = []
    extraction = watch.once(lambda: networks.append(evaluator.supernet.extract(picks)))
    network = networks[0]
    network.to(memory_format=torch.channels_last)
    device, size_px = next(network.parameters()).device, network.arch.resolution
    size = 4 * evaluator.config.batch_size
    few, _ = next(
        evaluation_batches(evaluator.held_out, size, limit=FEW, workers=evaluator.workers)
    )
    warm = watch.once(lambda: recalibrate(network, [placed(few, device, size_px)])) / len(few)
    count = min(len(evaluator.held_out), size, max(len(few), int(JUDGING / 3 / warm)))
    batches: list[Batch] = []
    reading = watch.once(
        lambda: batches.extend(
            evaluation_batches(evaluator.held_out, size, limit=count, workers=evaluator.workers)
        )
    )
    x_NCHW = placed(batches[0][0][: evaluator.config.batch_size], device, size_px)
    estimating = watch.once(lambda: recalibrate(network, [x_NCHW]))
    evaluating = watch.once(
        lambda: evaluator.quality.of_network(network, evaluator.held_out, batches, count)
    )
    return _Costs(
        extraction, reading / count, estimating / len(x_NCHW), evaluating / count, few[0].nbytes
    )
