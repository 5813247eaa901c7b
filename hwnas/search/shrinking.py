"""Shrinking: the operators that a metric finds worst leave the search space, again and
again, while its super-net is trained.

Hu, Liang, Guo, Wan, Zhang, Wei, Gu, Sun: "Angle-based Search Space Shrinking for Neural
Architecture Search" (ABS; ECCV 2020, arXiv 2004.13431), algorithm 1; released code
megvii-model/AngleNAS. Its generalisation: Hu et al., "PWSNAS: Powering Weight Sharing
NAS With General Search Space Shrinking Framework" (IEEE TNNLS 34(11), 2023). An
operator is an option of a choice of blocks. With a space A, its super-net's weights W
and their base W0:

    W0 = W at initialisation;  train W for a long time
    while |A| > ``until``:
        score(o) = mean of metric(a; W0, W) over sampled architectures a in A that contain o       for every operator o
        A loses the k operators of lowest score (or the lowest of every choice), but never a choice's last one
        W0 = W, once, when more than ``refresh_after`` operators have gone
        train W for a short time, which goes on from the weights it has

Metrics, by name (``SHRINK_METRICS``); a higher score is better:

- ``angle`` (ABS): by how far training has turned the architecture's weights, see
  ``hwnas.search.angle``;
- ``accuracy``: held-out accuracy of the architecture with the super-net's weights, BN
  statistics re-estimated; with ``search.quality = "loss"`` 1 / (1 + loss) there;
- ``magnitude``: no architecture is sampled: the architecture parameter of the operator,
  trained beside the weights as in DARTS;
- ``random``: a uniform number, which needs no super-net at all.

Every sampled architecture is a different one and counts for all its operators, and
every operator is in ``samples`` of them, where there are as many; at most ``tries``
times as many are drawn. ``sampling = "depths"`` draws the number of skipped slots
first.

PWSNAS has a second strategy: fewer operators leave room for more parameters, so that
each weight serves fewer architectures. Only its abstract could be had, so what is here
is *an interpretation*: by ``shrink.operation_on``, a slot's weights are split at a
stage into copies per slot that the input comes from (``edge``), or per operator that it
comes from (``op``), each of which begins as what was shared.

*Differences from the papers*:

- The learning rate follows a whole schedule (warm-up, cosine to 0) at every stage, and
  momentum starts at 0; the code goes on along one schedule. Operators are scored by
  weights that have settled, then.
- The released code drops the gradients of weights that are not sampled, as does
  ``optimizer.inactive_weights = "frozen"``; it clips gradients by value, the engine by norm
  (``search.optimizer.clip_norm``).
- ``magnitude`` in the papers is of a super-net that is trained as DARTS trains it, as a
  mixture. Here the weights are trained by single paths, as for the other metrics, which
  can then share the first and longest training; every ``alpha_every`` steps alpha
  descends the held-out loss of the mixture (first order). Alpha goes on from stage to
  stage, without the operators that left.
- W0 is the initialisation, or the weights after ``shrink.base_epochs``: 5 in their
  DARTS space. There, every edge has one operator; here a node keeps two edges, and an
  architecture counts for the operators of those that are kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from hwnas.config import ShrinkConfig
from hwnas.core.additive_cost import AdditiveCost
from hwnas.core.arch import Picks
from hwnas.core.option import SKIP
from hwnas.core.space import Choice, SearchSpace
from hwnas.errors import SpaceError
from hwnas.nn.supernet import Supernet
from hwnas.progress import Progress
from hwnas.search.angle import Angles
from hwnas.search.evaluator import SupernetEvaluator

Operator = tuple[str, str]
"""Choice key, option."""

Scores = dict[Operator, float]

DRAWN = 256
"""Architectures drawn at a time (ours)."""


@dataclass
class MetricContext:
    """What a metric may look at: the space, its super-net as it was and as it is, and
    what was trained beside it.

    ``evaluator`` evaluates architectures by the present super-net, ``alphas`` are the
    architecture parameters by operator, where the metric asked for them. ``children``
    are the sampled architectures.
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
    """Says what operators are worth.

    ``trains``: it looks at a super-net. ``samples``: it looks at sampled architectures.
    ``evaluates``: it runs each on images. ``alphas``: it wants architecture parameters to
    be trained beside the weights.
    """

    trains: ClassVar[bool] = True
    samples: ClassVar[bool] = False
    evaluates: ClassVar[bool] = False
    alphas: ClassVar[bool] = False

    @abstractmethod
    def scores(self, context: MetricContext) -> Scores:
        """The score of every operator of the space that could be scored; a higher one is better."""


class SampledMetric(ShrinkMetric):
    """A metric of architectures: an operator's score is the mean over the children that
    contain it.
    """

    samples = True

    @abstractmethod
    def child(self, context: MetricContext) -> Callable[[Picks], float]:
        """The metric as a function of the picks of an architecture."""

    def scores(self, context: MetricContext) -> Scores:
        """Means over the children; an operator that is in none has no score."""
        metric, values = self.child(context), []
        with context.progress.task("scoring sampled architectures", len(context.children)) as task:
            for picks in context.children:
                values.append(metric(picks))
                task.advance(note=f"{values[-1]:.3g}")
        return operator_means(context.space, context.children, values)


class Angle(SampledMetric):
    """The angle between an architecture's weights in W0 and W."""

    def child(self, context: MetricContext) -> Callable[[Picks], float]:
        """See ``hwnas.search.angle``."""
        assert context.initial is not None and context.trained is not None
        return Angles(context.initial, context.trained).of


class Accuracy(SampledMetric):
    """Held-out accuracy after BN recalibration."""

    evaluates = True

    def child(self, context: MetricContext) -> Callable[[Picks], float]:
        """See ``hwnas.search.evaluator``."""
        assert context.evaluator is not None
        return context.evaluator.evaluate


class Magnitude(ShrinkMetric):
    """The operator's architecture parameter."""

    alphas = True

    def scores(self, context: MetricContext) -> Scores:
        """Those of the choices of blocks are scores as they are."""
        return {operator: context.alphas[operator] for operator in operators(context.space)}


class Random(ShrinkMetric):
    """What any metric must beat."""

    trains = False

    def scores(self, context: MetricContext) -> Scores:
        """A uniform number each."""
        return {operator: float(context.rng.random()) for operator in operators(context.space)}


def shrinkable(space: SearchSpace) -> tuple[Choice, ...]:
    """The choices whose options are operators: those of blocks. Widths, depths and
    resolutions stay as they are.
    """
    return tuple(choice for choice in space.choices if choice.kind == "op")


def operators(space: SearchSpace) -> list[Operator]:
    """All operators of a space that still have an alternative."""
    return [(choice.key, str(option)) for choice in shrinkable(space) for option in choice.options]


def operator_means(
    space: SearchSpace, children: Sequence[Picks], values: Sequence[float]
) -> Scores:
    """Mean value of the children that contain each operator.

    Example:
        >>> from hwnas.testing import tiny_space
        >>> space = tiny_space().restrict({"s1.b0": ["ir_k3_e3"], "s1.b1": ["ir_k3_e3", "skip"]})
        >>> picks = space.sample(np.random.default_rng(0))
        >>> operator_means(space, [{**picks, "s1.b1": "skip"}, {**picks, "s1.b1": "ir_k3_e3"}], [1.0, 3.0])[("s1.b1", "skip")]
        1.0
    """
    found: dict[Operator, list[float]] = {operator: [] for operator in operators(space)}
    for picks, value in zip(children, values, strict=True):
        for choice in shrinkable(space):
            if space.kept(choice.key, picks):
                found[choice.key, str(picks[choice.key])].append(value)
    return {operator: float(np.mean(each)) for operator, each in found.items() if each}


def sample_children(
    space: SearchSpace, config: ShrinkConfig, samples: int, rng: np.random.Generator
) -> list[Picks]:
    """Different architectures within ``max_macs``, so that each operator is in
    ``samples`` of them, where that many were found.

    Operators on edges that no node keeps are in none. Raises SpaceError where
    ``max_macs`` leaves an operator none.
    """
    position = {choice.key: i for i, choice in enumerate(space.choices)}
    macs = AdditiveCost.of_ops(space, lambda op: op.macs) if config.max_macs is not None else None
    found: dict[bytes, np.ndarray] = {}
    counts = {choice.key: np.zeros(len(choice.options), dtype=int) for choice in shrinkable(space)}
    for choice in shrinkable(space):
        for number, option in enumerate(choice.options):
            most = min(samples, space.size // len(choice.options))  # no more contain it
            for _ in range(max(1, -(-config.tries * samples // DRAWN))):
                if counts[choice.key][number] >= most:
                    break
                drawn_NC = _drawn(space, config, rng, DRAWN)
                drawn_NC[:, position[choice.key]] = number
                if macs is not None:
                    drawn_NC = drawn_NC[macs.costs(drawn_NC) <= config.max_macs]
                for row in drawn_NC:
                    name, picks = space.canonical(row).tobytes(), space.at(row)
                    if (
                        name not in found
                        and counts[choice.key][number] < most
                        and space.kept(choice.key, picks)
                    ):
                        found[name] = row
                        for other in counts:
                            counts[other][row[position[other]]] += space.kept(other, picks)
            if macs is not None and not counts[choice.key][number]:
                raise SpaceError(
                    f"no architecture of space {space.name} with {choice.key} = {option} within"
                    f" shrink.max_macs = {config.max_macs:g} was found: raise it, or remove that"
                    " option by space.restrict."
                )
    return [space.at(row) for row in found.values()]


def _drawn(
    space: SearchSpace, config: ShrinkConfig, rng: np.random.Generator, count: int
) -> np.ndarray:
    """Random architectures: int64 [count, choices], uniform or with a uniform number of
    skipped slots.
    """
    drawn_NC = np.stack(
        [rng.integers(len(choice.options), size=count) for choice in space.choices], axis=1
    )
    skips = {
        i: choice.options.index(SKIP)
        for i, choice in enumerate(space.choices)
        if SKIP in choice.options
    }
    if config.sampling == "architectures" or not skips:
        return drawn_NC
    skipped_N = rng.integers(len(skips) + 1, size=count)
    order_NS = rng.random((count, len(skips))).argsort(axis=1).argsort(axis=1)
    for rank_N, (i, at) in zip(order_NS.T, skips.items(), strict=True):
        other_N = rng.integers(len(space.choices[i].options) - 1, size=count)
        drawn_NC[:, i] = np.where(rank_N < skipped_N, at, other_N + (other_N >= at))
    return drawn_NC


def select_drops(
    space: SearchSpace, scores: Mapping[Operator, float], config: ShrinkConfig
) -> list[Operator]:
    """The operators that leave, the worst first. Every choice keeps ``keep`` options;
    those without a score stay.

    Example:
        >>> from hwnas.testing import tiny_space
        >>> space = tiny_space().restrict({"s1.b0": ["ir_k3_e3"], "s1.b1": ["ir_k3_e3", "skip"], "s1.b2": ["ir_k3_e3", "skip"]})
        >>> scores = {("s1.b1", "skip"): 1.0, ("s1.b1", "ir_k3_e3"): 2.0, ("s1.b2", "skip"): 4.0, ("s1.b2", "ir_k3_e3"): 3.0}
        >>> select_drops(space, scores, ShrinkConfig(dropped=2))
        [('s1.b1', 'skip'), ('s1.b2', 'ir_k3_e3')]
    """
    left = {choice.key: len(choice.options) for choice in shrinkable(space)}
    most = {key: 1 if config.drop == "each" else count for key, count in left.items()}
    found: list[Operator] = []
    # stable: of equals, the first in the space's order
    for operator in sorted(scores, key=lambda operator: scores[operator]):
        key, _ = operator
        if config.drop == "lowest" and len(found) == config.dropped:
            break
        if left[key] > config.keep and most[key] > 0:
            found.append(operator)
            left[key], most[key] = left[key] - 1, most[key] - 1
    return found


def remove_operators(space: SearchSpace, dropped: Sequence[Operator], name: str) -> SearchSpace:
    """The space that is left: a new document."""
    gone = set(dropped)
    allowed = {
        choice.key: [option for option in choice.options if (choice.key, str(option)) not in gone]
        for choice in shrinkable(space)
    }
    return space.restrict(allowed, name)
