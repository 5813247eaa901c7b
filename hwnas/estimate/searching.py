"""The estimate of the search stage, from a few real steps in every phase of the
strategy, and from evaluating one network on a few images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
from hwnas.estimate.parts import Part, Stopwatch, TimeEstimate, peak_memory
from hwnas.nn.bn import recalibrate
from hwnas.search import STRATEGIES
from hwnas.search.evaluator import KEPT_BYTES, SupernetEvaluator, to_network_input
from hwnas.search.proposal import sample_feasible
from hwnas.search.random_baseline import choose_random_baseline, image_counts
from hwnas.search.searching import Prepared, prepare, with_space_resolution
from hwnas.search.settings import search_finder
from hwnas.search.strategy import SearchContext, Strategy
from hwnas.search.supernets import cost_counter_of, load_trained_supernet

STEPS = 0.3
"""Fraction of the stopwatch's seconds for timing steps of the strategy."""
STEPS_OF_A_PHASE = 9
"""Most steps that are timed in a phase, after one that only warms up."""
EVALUATION_SECONDS = 3.0
"""About how many seconds timing the evaluation of one network may take."""
FEW = 8
"""Images of a first timing, which tells how many more there is time for."""
MOST_WEIGHTS = 100_000_000
"""Most weights of a super-net that is built for an estimate. They take 0.4 GB, and a
few times that during training. The number is our choice.
"""


def weights_of(space: SearchSpace, *, collapsed: bool = False) -> int:
    """About how many weights a super-net has: those of the largest block of every slot
    and, unless the slot's options share them (``collapsed``), as many for each option.
    """
    options = {choice.key: len(choice.options) for choice in space.choices}
    weights = 0
    for term in space.terms():
        largest = max((op.params for op in term.ops if op is not None), default=0)
        weights += largest if collapsed else largest * options.get(term.slot, 1)
    return weights


def _is_collapsed(config: SearchConfig) -> bool:
    """Whether the options of a slot share their weights."""
    if config.supernet.sharing == "auto":
        strategy: type[Strategy] = STRATEGIES.get(config.strategy.name)
        return strategy.sharing == "collapsed"
    return config.supernet.sharing == "collapsed"


def of_search(ctx: Context) -> TimeEstimate:
    """Time a search. Raises HwnasError if it could not run."""
    ctx.check_data()
    space = ctx.space
    config = ctx.experiment.search
    weights = weights_of(space, collapsed=_is_collapsed(config))
    if weights > MOST_WEIGHTS:
        return TimeEstimate(
            unknown=f"a super-net of {weights / 1e6:.0f} M weights is not built for a plan"
        )
    experiment, search = search_context(ctx.experiment, space, ctx.table)
    experiment = with_space_resolution(experiment, space)
    if config.weights is not None:
        evaluator = SupernetEvaluator(load_trained_supernet(config, space), experiment)
        search.cost_counter = cost_counter_of(config, evaluator.supernet)
        return _of_finding(experiment, search, evaluator, None)

    prepared = prepare(experiment, space, search, ctx.folder("search"))
    per_step, macs_per_step = _time_steps(prepared, ctx.watch)
    # Pretend that the search has trained to its end: its cost decides how many random
    # architectures are scored.
    assert search.cost_counter is not None
    counts = search.cost_counter.state_dict()
    counts["macs"] = round(macs_per_step * search.steps)
    search.cost_counter.load_state_dict(counts)
    training = Part("training", search.steps, per_step)
    saving, checkpoint_bytes = checkpoints(
        prepared.engine, training, experiment.checkpoint_seconds, ctx.watch
    )
    rest = _of_finding(experiment, search, prepared.evaluator, prepared.strategy)
    return replace(
        rest, parts=(training, saving, *rest.parts), disk_bytes=rest.disk_bytes + checkpoint_bytes
    )


class _Steps:
    """Runs any steps of a search; ``numbers`` are those it has run."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.numbers: list[int] = []

    def __call__(self, number: int) -> None:
        self.prepared.engine.step = number
        self.prepared.step(number)
        self.numbers.append(number)


def _time_steps(prepared: Prepared, watch: Stopwatch) -> tuple[float, float]:
    """Mean seconds and mean multiply-accumulates of a step, over all phases of a
    strategy, weighted by their lengths.
    """
    search = prepared.search
    assert search.cost_counter is not None
    milestones = (0, *prepared.strategy.milestones(search))
    begins = sorted({min(step, search.steps - 1) for step in milestones})
    seconds = 0.0
    macs = 0.0
    timed = _Steps(prepared)
    for begin, end in pairwise((*begins, search.steps)):
        macs_before = search.cost_counter.cost.macs
        timed.numbers = []
        # Warm-ups of a strategy fade out during a phase, so its middle is the most like
        # the whole.
        middle = min((begin + end) // 2, end - 1)
        numbers = [begin, *range(middle, min(end, middle + STEPS_OF_A_PHASE))]
        per_step = watch.mean([partial(timed, number) for number in numbers], STEPS / len(begins))
        phase_macs = search.cost_counter.cost.macs - macs_before
        seconds += (end - begin) * per_step
        macs += (end - begin) * phase_macs / len(timed.numbers)
    return seconds / search.steps, macs / search.steps


def checkpoints(
    engine: Engine, training: Part, every_seconds: float, watch: Stopwatch
) -> tuple[Part, float]:
    """Saving checkpoints during training, and the bytes of two, the newest and the one
    before it. The weights that the stage writes at the end are smaller.
    """
    per_save = watch.once(engine.save)
    size_bytes = 2 * engine.checkpoint.stat().st_size
    engine.finish()
    count = training.count
    if every_seconds:
        count = training.seconds / (every_seconds + per_save)
    # Two more: before the first step and after the last.
    return Part("checkpoints", 2 + min(count, training.count), per_save), size_bytes


class _CountingEvaluator:
    """An evaluator that takes no time; ``known`` tells how many architectures a
    strategy or a finder has asked for.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.known: dict[str, float] = {}

    def evaluate(self, picks: Picks) -> float:
        """A made-up quality in 0..1, different for every architecture and
        deterministic.
        """
        identity = self.space.decode(picks).identity
        return self.known.setdefault(identity, (0.618 * len(self.known)) % 1.0)


def _of_finding(
    experiment: Experiment,
    search: SearchContext,
    evaluator: SupernetEvaluator,
    strategy: Strategy | None,
) -> TimeEstimate:
    """What follows the training: finding, ranking, and scoring random architectures."""
    config = experiment.search
    cost_counter = search.cost_counter
    assert cost_counter is not None
    counting = _CountingEvaluator(search.space)
    search.evaluator = counting
    search.step = search.steps
    search.rng = np.random.default_rng([experiment.seed, search.steps])

    # Propose as the search will, but without the time that evaluating takes.
    finder = search_finder(config)
    proposals: list[Picks] = []
    if finder is not None:
        proposals = finder.find(search, config.candidates)
    elif strategy is not None:
        proposals = strategy.propose(search, config.candidates)
    if not proposals:
        proposals = sample_feasible(search, 1, search.rng)
    _, images_of_part = image_counts(evaluator)
    for _ in counting.known:
        cost_counter.count_evaluation(proposals[0], images_of_part)
    baseline = choose_random_baseline(search, evaluator, proposals)

    costs = _evaluation_costs(evaluator, proposals[0])
    held_out = len(evaluator.held_out)
    recalibration_images = min(config.recalibration_images, len(evaluator.train))
    recalibration = costs.extraction + recalibration_images * costs.recalibrating
    on_all = recalibration + held_out * costs.evaluating
    on_part = recalibration + min(held_out, config.evaluation_images) * costs.evaluating
    # A random network anywhere only takes a part of the images.
    random_networks = len(baseline.within) + len(baseline.anywhere) * on_part / on_all
    parts = (
        Part("reading images", recalibration_images + held_out, costs.reading),
        Part("finding", len(counting.known), on_part),
        Part("ranking", len(proposals), on_all),
        Part("scoring random networks", random_networks, on_all),
    )

    kept_bytes = min(KEPT_BYTES, costs.image_bytes * held_out)
    memory_bytes = peak_memory() + costs.image_bytes * recalibration_images + kept_bytes
    disk_bytes = 4.0 * search.space.decode(proposals[0]).params
    if config.weights is None:
        disk_bytes += sum(tensor.nbytes for tensor in evaluator.supernet.state_dict().values())
    return TimeEstimate(tuple(part for part in parts if part.count), memory_bytes, disk_bytes)


@dataclass(frozen=True)
class _Costs:
    """Seconds of extracting a network, seconds per image of reading, of recalibrating
    BN and of evaluating, and bytes of an image.
    """

    extraction: float
    reading: float
    recalibrating: float
    evaluating: float
    image_bytes: int


def _evaluation_costs(evaluator: SupernetEvaluator, picks: Picks) -> _Costs:
    """Time the evaluation of one network."""
    watch = Stopwatch(math.inf)
    networks = []
    extraction = watch.once(lambda: networks.append(evaluator.supernet.extract(picks)))
    network = networks[0]
    network.to(memory_format=torch.channels_last)
    device = next(network.parameters()).device
    size_px = network.arch.size

    def batches(batch_size: int, limit: int) -> Iterator[Batch]:
        return evaluation_batches(
            evaluator.held_out, batch_size, limit=limit, workers=evaluator.workers
        )

    # The first pass also warms up; the other two and the reading get as many images as
    # fit into the time.
    batch_size = 4 * evaluator.config.batch_size
    few_NCHW, _ = next(batches(batch_size, FEW))
    first = watch.once(lambda: recalibrate(network, [to_network_input(few_NCHW, device, size_px)]))
    affordable = int(EVALUATION_SECONDS / 3 / (first / len(few_NCHW)))
    count = min(len(evaluator.held_out), batch_size, max(len(few_NCHW), affordable))

    images: list[Batch] = []
    reading = watch.once(lambda: images.extend(batches(batch_size, count)))
    x_NCHW = to_network_input(images[0][0][: evaluator.config.batch_size], device, size_px)
    recalibrating = watch.once(lambda: recalibrate(network, [x_NCHW]))
    evaluating = watch.once(
        lambda: evaluator.quality.of_network(network, evaluator.held_out, images, count)
    )
    return _Costs(
        extraction=extraction,
        reading=reading / count,
        recalibrating=recalibrating / len(x_NCHW),
        evaluating=evaluating / count,
        image_bytes=few_NCHW[0].nbytes,
    )
