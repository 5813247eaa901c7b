"""Search space shrinking: repeatedly train the super-net for a while, and remove the
operators that a metric scores lowest.

Hu, Liang, Guo, Wan, Zhang, Wei, Gu, Sun: "Angle-based Search Space Shrinking for Neural
Architecture Search" (ABS; ECCV 2020, arXiv 2004.13431), algorithm 1; released code
megvii-model/AngleNAS. Generalised by Hu et al., "PWSNAS: Powering Weight Sharing NAS
With General Search Space Shrinking Framework" (IEEE TNNLS 34(11), 2023). An operator is
an option of a choice of blocks. With a space A, its super-net's weights W and their base
W0:

    W0 = W at initialisation;  train W for a long time
    while |A| > ``until``:
        for every operator o:
            score(o) = mean of metric(a; W0, W) over sampled a in A that contain o
        remove the k operators of lowest score from A (or the lowest of every choice),
            but never the last one of a choice
        W0 = W, once, after more than ``refresh_after`` operators have been removed
        train W for a short time, starting from its current value

Metrics, by name (``SHRINK_METRICS``); a higher score is better:

- ``angle`` (ABS): how far training has turned the architecture's weights, see
  ``hwnas.search.angle``;
- ``accuracy``: held-out accuracy of the architecture with the super-net's weights and
  recalibrated BN; 1 / (1 + loss) if ``search.quality = "loss"``;
- ``magnitude``: the operator's architecture parameter, which is trained together with the
  weights as in DARTS; samples no architectures;
- ``random``: a uniform random number; needs no super-net.

The sampled architectures are different, and each one counts for all its operators.
Every operator is in ``samples`` of them if that many are found; at most ``tries`` times
as many are drawn. ``sampling = "depths"`` draws the number of skipped slots first.

PWSNAS has a second strategy: fewer operators leave room for more parameters, so that
fewer architectures share each weight. Only its abstract was available, so the
implementation is *our interpretation*. In the rounds that ``shrink.operation_on``
names, a slot's weights are split into one copy per slot (``edge``) or per operator
(``op``) that its input comes from; each copy starts with the shared weights.

*Differences from the papers*:

- In every round, the learning rate follows a whole schedule (warm-up, cosine to 0) and
  momentum starts at 0, so the weights that score the operators have settled. The
  released code continues a single schedule.
- The released code drops the gradients of weights that are not sampled, as does
  ``optimizer.inactive_weights = "frozen"``. It clips gradients by value, the engine
  clips by norm (``search.optimizer.clip_norm``).
- For ``magnitude``, the papers train the super-net as DARTS does, as a mixture. Here,
  single paths train the weights, as for the other metrics, so that all metrics can
  share the first and longest training. Every ``alpha_every`` steps, alpha descends the
  held-out loss of the mixture (first order). Alpha is kept from round to round, without
  the removed operators.
- W0 is the initialisation, or the weights after ``shrink.base_epochs``, which is 5 in
  their DARTS space. There, every edge has one operator; here a node keeps two edges,
  and an architecture counts for the operators of the edges that are kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from hwnas.config import ShrinkConfig
from hwnas.core.additive_cost import AdditiveCost
from hwnas.core.arch import Picks
from hwnas.core.option import SKIP
from hwnas.core.space import Choice, SearchSpace
from hwnas.errors import SpaceError
from hwnas.progress import Progress

if TYPE_CHECKING:  # see hwnas/lazy.py
    from hwnas.nn.supernet import Supernet
    from hwnas.search.evaluator import SupernetEvaluator

Operator = tuple[str, str]
"""The key of a choice, and one of its options."""

Scores = dict[Operator, float]

DRAWN = 256
"""Architectures drawn at a time (our choice)."""


@dataclass
class MetricContext:
    """Everything that a metric may use.

    ``children`` are the sampled architectures. ``initial`` and ``trained`` are the
    super-net with its base weights W0 and with its current weights W; ``evaluator``
    evaluates architectures by the latter. ``alphas`` are the architecture parameters by
    operator, if the metric has asked for them (``ShrinkMetric.alphas``).
    """

    space: SearchSpace
    rng: np.random.Generator
    children: Sequence[Picks] = ()
    initial: Supernet | None = None
    trained: Supernet | None = None
    evaluator: SupernetEvaluator | None = None
    alphas: Scores = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)


class ShrinkMetric(ABC):
    """Base class of metrics that score operators.

    The class attributes say what a metric needs. ``trains``: a trained super-net.
    ``samples``: sampled architectures. ``evaluates``: held-out images, on which it
    evaluates each of them. ``alphas``: architecture parameters, trained together with the
    weights.
    """

    trains: ClassVar[bool] = True
    samples: ClassVar[bool] = False
    evaluates: ClassVar[bool] = False
    alphas: ClassVar[bool] = False

    @abstractmethod
    def scores(self, context: MetricContext) -> Scores:
        """The scores of the space's operators; higher is better. An operator that could
        not be scored is left out.
        """


class SampledMetric(ShrinkMetric):
    """A metric of architectures. An operator's score is the mean over the sampled
    children that contain it.
    """

    samples = True

    @abstractmethod
    def child(self, context: MetricContext) -> Callable[[Picks], float]:
        """The metric as a function of the picks of an architecture."""

    def scores(self, context: MetricContext) -> Scores:
        """Means over the children. An operator that is in none of them has no score."""
        metric = self.child(context)
        values: list[float] = []
        with context.progress.task("scoring sampled architectures", len(context.children)) as task:
            for picks in context.children:
                values.append(metric(picks))
                task.advance(note=f"{values[-1]:.3g}")
        return operator_means(context.space, context.children, values)


class Angle(SampledMetric):
    """The angle between an architecture's weights in W0 and in W."""

    def child(self, context: MetricContext) -> Callable[[Picks], float]:
        """See ``hwnas.search.angle``."""
        from hwnas.search.angle import Angles

        assert context.initial is not None and context.trained is not None
        return Angles(context.initial, context.trained).of


class Accuracy(SampledMetric):
    """Held-out quality after BN recalibration."""

    evaluates = True

    def child(self, context: MetricContext) -> Callable[[Picks], float]:
        """See ``hwnas.search.evaluator``."""
        assert context.evaluator is not None
        return context.evaluator.evaluate


class Magnitude(ShrinkMetric):
    """The operator's architecture parameter."""

    alphas = True

    def scores(self, context: MetricContext) -> Scores:
        """The architecture parameters of the choices of blocks."""
        return {operator: context.alphas[operator] for operator in operators(context.space)}


class Random(ShrinkMetric):
    """Random scores, the baseline that every metric must beat."""

    trains = False

    def scores(self, context: MetricContext) -> Scores:
        """A uniform random number in [0, 1) for every operator."""
        return {operator: float(context.rng.random()) for operator in operators(context.space)}


def shrinkable(space: SearchSpace) -> tuple[Choice, ...]:
    """The choices of blocks, whose options are the operators. Choices of width, depth and
    resolution do not shrink.
    """
    return tuple(choice for choice in space.choices if choice.kind == "op")


def operators(space: SearchSpace) -> list[Operator]:
    """All operators of a space that still have an alternative."""
    names = []
    for choice in shrinkable(space):
        names += [(choice.key, str(option)) for option in choice.options]
    return names


def operator_means(
    space: SearchSpace, children: Sequence[Picks], values: Sequence[float]
) -> Scores:
    """The mean value of the children that contain an operator, for every operator that is
    in one of them. ``values`` [children].

    Example:
        >>> from hwnas.testing import tiny_space
        >>> options = {"s1.b0": ["ir_k3_e3"], "s1.b1": ["ir_k3_e3", "skip"]}
        >>> space = tiny_space().restrict(options)
        >>> picks = space.sample(np.random.default_rng(0))
        >>> children = [{**picks, "s1.b1": "skip"}, {**picks, "s1.b1": "ir_k3_e3"}]
        >>> operator_means(space, children, [1.0, 3.0])[("s1.b1", "skip")]
        1.0
    """
    by_operator: dict[Operator, list[float]] = {operator: [] for operator in operators(space)}
    for picks, value in zip(children, values, strict=True):
        for choice in shrinkable(space):
            # A choice that the architecture leaves out has no part in its value.
            if space.is_kept(choice.key, picks):
                by_operator[choice.key, str(picks[choice.key])].append(value)

    means = {}
    for operator, operator_values in by_operator.items():
        if operator_values:
            means[operator] = float(np.mean(operator_values))
    return means


def sample_children(
    space: SearchSpace, config: ShrinkConfig, samples: int, rng: np.random.Generator
) -> list[Picks]:
    """Different architectures within ``max_macs``, such that each operator is in
    ``samples`` of them if that many are found.

    Operators on edges that no node keeps are in none of them. Raises SpaceError if
    ``max_macs`` leaves an operator without an architecture.
    """
    position = {choice.key: i for i, choice in enumerate(space.choices)}
    macs = None
    if config.max_macs is not None:
        macs = AdditiveCost.of_ops(space, lambda op: op.macs)
    rounds = max(1, -(-config.tries * samples // DRAWN))  # rounded up
    children: dict[bytes, np.ndarray] = {}
    counts = {choice.key: np.zeros(len(choice.options), dtype=int) for choice in shrinkable(space)}
    for choice in shrinkable(space):
        # No more architectures than these contain an option.
        most = min(samples, space.size // len(choice.options))
        for number, option in enumerate(choice.options):
            for _ in range(rounds):
                if counts[choice.key][number] >= most:
                    break
                drawn_NC = _draw(space, config, rng, DRAWN)
                drawn_NC[:, position[choice.key]] = number
                if macs is not None:
                    drawn_NC = drawn_NC[macs.costs(drawn_NC) <= config.max_macs]
                for row in drawn_NC:
                    if counts[choice.key][number] >= most:
                        break
                    name = space.canonical(row).tobytes()
                    picks = space.at(row)
                    # An operator on an edge that no node keeps is not in the network.
                    if name in children or not space.is_kept(choice.key, picks):
                        continue
                    children[name] = row
                    for other in counts:
                        counts[other][row[position[other]]] += space.is_kept(other, picks)

            # Without a limit, an operator may lack children: no node keeps its edge.
            if macs is not None and not counts[choice.key][number]:
                raise SpaceError(
                    f"no architecture of space {space.name} with {choice.key} = {option} within"
                    f" shrink.max_macs = {config.max_macs:g} was found: raise it, or remove that"
                    " option by space.restrict."
                )
    return [space.at(row) for row in children.values()]


def _draw(
    space: SearchSpace, config: ShrinkConfig, rng: np.random.Generator, count: int
) -> np.ndarray:
    """Random architectures, int64 [count, choices]: uniform or, with ``sampling =
    "depths"``, with a uniform number of skipped slots.
    """
    columns = [rng.integers(len(choice.options), size=count) for choice in space.choices]
    drawn_NC = np.stack(columns, axis=1)
    skips = {}
    for i, choice in enumerate(space.choices):
        if SKIP in choice.options:
            skips[i] = choice.options.index(SKIP)
    if config.sampling == "architectures" or not skips:
        return drawn_NC

    # Every slot gets a random rank, and those with the lowest ranks are skipped.
    skipped_N = rng.integers(len(skips) + 1, size=count)
    rank_NS = rng.random((count, len(skips))).argsort(axis=1).argsort(axis=1)
    for rank_N, (i, skip) in zip(rank_NS.T, skips.items(), strict=True):
        # Positions from ``skip`` on move up by one, which leaves ``skip`` itself out.
        other_N = rng.integers(len(space.choices[i].options) - 1, size=count)
        other_N = other_N + (other_N >= skip)
        drawn_NC[:, i] = np.where(rank_N < skipped_N, skip, other_N)
    return drawn_NC


def select_drops(
    space: SearchSpace, scores: Mapping[Operator, float], config: ShrinkConfig
) -> list[Operator]:
    """The operators to remove, the worst first. Every choice keeps at least ``keep``
    options, and operators without a score stay.

    Example:
        >>> from hwnas.testing import tiny_space
        >>> options = {"s1.b0": ["ir_k3_e3"], "s1.b1": ["ir_k3_e3", "skip"]}
        >>> space = tiny_space().restrict(options | {"s2.b0": ["ir_k3_e3", "ir_k5_e3"]})
        >>> scores = {("s1.b1", "skip"): 1.0, ("s1.b1", "ir_k3_e3"): 2.0}
        >>> scores |= {("s2.b0", "ir_k5_e3"): 4.0, ("s2.b0", "ir_k3_e3"): 3.0}
        >>> select_drops(space, scores, ShrinkConfig(dropped=2))
        [('s1.b1', 'skip'), ('s2.b0', 'ir_k3_e3')]
    """
    remaining = {choice.key: len(choice.options) for choice in shrinkable(space)}
    # With ``drop = "each"``, every choice loses at most one option.
    droppable = dict(remaining)
    if config.drop == "each":
        droppable = dict.fromkeys(remaining, 1)
    drops: list[Operator] = []
    # The sort is stable: of equal scores, the first in the space's order goes first.
    for operator in sorted(scores, key=lambda operator: scores[operator]):
        key, _ = operator
        if config.drop == "lowest" and len(drops) == config.dropped:
            break
        if remaining[key] > config.keep and droppable[key] > 0:
            drops.append(operator)
            remaining[key] -= 1
            droppable[key] -= 1
    return drops


def remove_operators(space: SearchSpace, dropped: Sequence[Operator], name: str) -> SearchSpace:
    """The space without some operators, as a new document called ``name``."""
    removed = set(dropped)
    allowed = {}
    for choice in shrinkable(space):
        allowed[choice.key] = [
            option for option in choice.options if (choice.key, str(option)) not in removed
        ]
    return space.restrict(allowed, name)
