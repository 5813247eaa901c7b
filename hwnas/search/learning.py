"""Did a finished search learn anything? Four checks of what it has logged and ranked,
with standard errors.

1. *The shared weights.* The loss in the last fifth of the steps is compared with that
   of a guess, which is the best answer without looking at the image. A guess's loss is
   the entropy of the class frequencies: ln(classes) if they are equal; with label
   smoothing, the entropy of the smoothed frequencies. A detector's loss has no such
   level and is compared with the first fifth of the steps.
2. *Held-out images.* The mean quality of all ranked networks is compared with that of a
   guess, because weights that have memorised their training images also have a low
   loss. An AP is compared with 0. For 1 / (1 + loss) no level is known, as a confident
   network may have a higher loss than a guess.
3. *The policy.* Its reward (or held-out loss) in the last fifth of the steps is compared
   with the first fifth. Entropy is not enough: it also falls on noise.
4. *Random networks.* The proposals are compared with random networks within the same
   budget, by Welch's test. The variance of each group is at least the evaluation noise
   of a network, which is that of a proportion of n images. What a finder's choice among
   many networks owes to that noise is subtracted.

A difference is significant if its p-value is below 5 %. What cannot be evaluated, as
after few steps or with few networks, is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from hwnas.core.caution import Caution
from hwnas.core.metric import ACCURACY, AP, shown, shown_difference, shown_points
from hwnas.core.statistics import (
    NO_AP,
    Average,
    Difference,
    average,
    below,
    better_than_guessing,
    block_average,
    selection_intensity,
    welch,
)
from hwnas.document import Record

END_FRACTION = 0.2
"""The first and the last steps are this fraction of all (our choice)."""

LEAST_STEPS = 4
"""Fewest steps in the first or last part that are compared."""

LEAST_NETWORKS = 4
"""Fewest proposals, and fewest random networks, that are compared."""

NEAR_CHANCE = 0.01
"""Training must reduce the loss of a guess by this fraction. A long search can tell less
than that from noise, though nothing has been learned.
"""

NEGLIGIBLE = 0.0005
"""A share of a quality (0..1) that is shown as zero, and so is not mentioned."""

MIN_ENTROPY_CHANGE = 0.05
"""A policy's entropy should change by this fraction during a search (our choice)."""

Rows = Sequence[Mapping[str, float]]


class Weights(Record):
    """The training loss of the shared weights, per cross-entropy where a teacher adds
    one.
    """

    first: Average
    last: Average
    chance: float | None = Field(None, description="the loss of a guess; none for a detector")

    @property
    def learned(self) -> bool:
        """Whether the loss ended below that of a guess or, if none is known, below the
        loss of the first steps.
        """
        if self.chance is None:
            return welch(self.first, self.last).negative
        return below(self.last, self.chance) and self.last.mean < (1 - NEAR_CHANCE) * self.chance

    @property
    def text(self) -> str:
        """What a search that has learned nothing says about its loss."""
        if self.chance is None:
            return (
                f"the super-net's loss did not fall ({_pm(self.first)} at first, {_pm(self.last)}"
                " at the end)"
            )
        return f"the super-net's loss ended at {_pm(self.last)}; guessing has {self.chance:.3f}"


class HeldOutQuality(Record):
    """The mean quality of the ranked networks on ``images`` held-out images, and that
    of a guess.
    """

    metric: str
    mean: float
    chance: float
    images: int

    @property
    def learned(self) -> bool:
        """Whether the mean network is better than a guess.

        The networks err on the same images, so together they are no more certain than a
        single one.
        """
        if self.metric == AP:
            return self.mean > NO_AP
        return better_than_guessing(round(self.mean * self.images), self.images, self.chance)

    @property
    def text(self) -> str:
        """What a search that has learned nothing says about its networks."""
        text = (
            f"its networks have {self.metric} {shown(self.metric, self.mean)} on {self.images:,}"
            " held-out images"
        )
        if self.metric != AP:
            text += f" (guessing: {shown(self.metric, self.chance)})"
        return text


class PolicyProgress(Record):
    """The policy's entropy in nats at the first and the last step, and its mean reward
    in the first and the last part of the steps.

    The reward of a policy that is trained by gradients is minus the held-out loss.
    """

    rate: str = Field(description="the option of the strategy that sets how fast it learns")
    steps: int
    entropy: tuple[float, float]
    by_loss: bool = Field(description="whether the reward is minus the held-out loss")
    first: Average | None = None
    last: Average | None = None

    @property
    def moved(self) -> bool:
        """Whether the entropy has changed by ``MIN_ENTROPY_CHANGE`` or more."""
        return abs(self.entropy[1] - self.entropy[0]) >= MIN_ENTROPY_CHANGE * self.entropy[0]

    @property
    def rise(self) -> Difference | None:
        """By how much the reward rose; None if there were too few steps."""
        if self.first is None or self.last is None:
            return None
        return welch(self.first, self.last)

    @property
    def caution_unmoved(self) -> Caution | None:
        """A caution if the policy has not moved."""
        if self.moved:
            return None
        headline = f"the policy has hardly moved in {self.steps} steps"
        text = (
            f"{self._entropy}, so the result is close to random search: raise {self.rate} of"
            " search.strategy, or search.epochs."
        )
        return Caution(headline=headline, text=text)

    @property
    def _entropy(self) -> str:
        return f"its entropy went from {self.entropy[0]:.3g} to {self.entropy[1]:.3g} nats"

    @property
    def caution_unimproved(self) -> Caution | None:
        """A caution if the policy has moved, but its reward has not risen."""
        if not self.moved or self.rise is None or self.rise.positive:
            return None
        assert self.first is not None and self.last is not None
        observation = "reward did not rise"
        sign = 1
        if self.by_loss:
            # The reward is minus the loss; people want to read the loss.
            observation = "held-out loss did not fall"
            sign = -1
        text = (
            f"{self._entropy}, but its {observation} by more than noise"
            f" ({_pm(self.first, sign)} at first, {_pm(self.last, sign)} at the end, p ="
            f" {self.rise.p_value:.2g}): raise search.epochs, or change {self.rate} of"
            " search.strategy or search.optimizer.lr."
        )
        return Caution(headline="the policy learned nothing", text=text)


class AgainstRandom(Record):
    """Proposals compared with random networks within the same budget.

    ``selection`` is what the finder's choice on the same images is expected to owe to
    noise; it is subtracted from the difference. ``chosen`` is the quality of the chosen
    network minus that of the best random one. It is not tested, as both are the best of
    several.
    """

    metric: str
    proposals: Average
    random: Average
    selection: float = 0.0
    difference: Difference
    chosen: float
    own_paths: bool = Field(
        description=(
            "whether the weights were trained on the policy's own paths, which flatters its"
            " proposals"
        )
    )
    same: str = Field(
        "latency",
        description="what the budget is of, which proposals and random networks have in common",
    )

    @property
    def sentence(self) -> str:
        """The conclusion in one sentence."""
        difference = self.difference
        if not (difference.positive or difference.negative):
            return f"No better than random networks of the same {self.same} ({self.figures})."
        comparative = "Better" if difference.positive else "Worse"
        by = shown_difference(self.metric, abs(difference.value), difference.error)
        return (
            f"{comparative} than random networks of the same {self.same} by {by} (p ="
            f" {difference.p_value:.1g}{self._selection_text})."
        )

    @property
    def figures(self) -> str:
        """The difference and its p-value."""
        sign = "+" if self.difference.value >= 0 else ""
        difference = sign + shown_difference(
            self.metric, self.difference.value, self.difference.error
        )
        p_value = self.difference.p_value
        return f"difference {difference}{self._selection_text}, p = {p_value:.1g}"

    @property
    def _selection_text(self) -> str:
        if self.selection < NEGLIGIBLE:
            return ""
        return (
            f", after subtracting {shown_points(self.metric, self.selection)} for having chosen the"
            " best on these images"
        )


class Learning(Record):
    """Whether a search has learned anything, and why. ``learned`` is None if nothing
    could be evaluated.
    """

    learned: bool | None
    weights: Weights | None = None
    held_out: HeldOutQuality | None = None
    policy: PolicyProgress | None = None
    against_random: AgainstRandom | None = None
    cautions: tuple[Caution, ...] = ()


@dataclass(frozen=True)
class TrainingLog:
    """What a search has logged: ``rows``, whose losses are means over cross-entropies;
    the name of the strategy's ``rate``; and ``chance``, the loss of a guess.
    """

    rows: Rows
    rate: str | None
    chance: float | None


@dataclass(frozen=True)
class Ranking:
    """What a search has ranked.

    ``proposals`` and ``random`` are qualities on ``images`` held-out images, and
    ``chance`` is the quality of a guess. A finder has evaluated ``evaluated`` networks
    on ``evaluation_images`` of the images. ``same`` is the noun of the budget's unit.
    """

    metric: str
    proposals: Sequence[float]
    random: Sequence[float]
    images: int
    evaluation_images: int
    evaluated: int
    chance: float | None
    same: str = "latency"


def learning_of(log: TrainingLog | None, ranking: Ranking) -> Learning:
    """Evaluate what a search has learned. ``log`` is None if the weights came from
    another run.
    """
    weights = None
    policy = None
    if log is not None:
        weights = _weights(log)
        policy = _policy(log)
    held_out = _held_out(ranking)
    compared = _against_random(ranking, policy is not None)

    weights_caution = _weights_caution(weights, held_out)
    cautions: list[Caution] = []
    if weights_caution is not None:
        cautions.append(weights_caution)
    # A policy's rate can be too low whatever the weights have learned.
    if policy is not None and policy.caution_unmoved is not None:
        cautions.append(policy.caution_unmoved)
    # Rewards and rankings by weights that have learned nothing say nothing.
    if weights_caution is None:
        cautions += _policy_cautions(policy, compared)

    has_evidence = weights is not None or held_out is not None or compared is not None
    policy_known = policy is not None and (not policy.moved or policy.rise is not None)
    learned = None
    if has_evidence or policy_known:
        learned = not cautions
    return Learning(
        learned=learned,
        weights=weights,
        held_out=held_out,
        policy=policy,
        against_random=compared,
        cautions=tuple(cautions),
    )


def _weights_caution(weights: Weights | None, held_out: HeldOutQuality | None) -> Caution | None:
    """A caution if the weights have learned nothing."""
    texts = []
    if weights is not None and not weights.learned:
        texts.append(weights.text)
    if held_out is not None and not held_out.learned:
        texts.append(held_out.text)
    if not texts:
        return None
    advice = "raise search.epochs or data.resolution, or change search.optimizer.lr"
    return Caution(headline="the search learned nothing", text=f"{'; '.join(texts)}: {advice}.")


def _policy_cautions(
    policy: PolicyProgress | None, compared: AgainstRandom | None
) -> list[Caution]:
    """Cautions about the policy's reward, and about proposals no better than random."""
    cautions = []
    if policy is not None and policy.caution_unimproved is not None:
        cautions.append(policy.caution_unimproved)
    if compared is not None and not compared.difference.positive:
        advice = (
            "raise search.epochs; more search.candidates and search.random_samples resolve smaller"
            " differences"
        )
        text = (
            f"its proposals against random networks of the same {compared.same}:"
            f" {compared.figures}; {advice}."
        )
        cautions.append(Caution(headline="the search is no better than random", text=text))
    return cautions


def _first_and_last(values: Sequence[float]) -> tuple[Average, Average] | None:
    """Averages of the first and the last fifth; None if these are too few values."""
    count = round(END_FRACTION * len(values))
    if count < LEAST_STEPS:
        return None
    return block_average(values[:count]), block_average(values[-count:])


def _logged(log: TrainingLog, name: str) -> list[float]:
    """The values of a metric, of all steps that have logged it."""
    return [row[name] for row in log.rows if name in row]


def _weights(log: TrainingLog) -> Weights | None:
    parts = _first_and_last(_logged(log, "loss"))
    if parts is None:
        return None
    first, last = parts
    return Weights(first=first, last=last, chance=log.chance)


def _held_out(ranking: Ranking) -> HeldOutQuality | None:
    if ranking.chance is None:
        return None
    qualities = [*ranking.proposals, *ranking.random]
    mean = math.fsum(qualities) / len(qualities)
    return HeldOutQuality(
        metric=ranking.metric, mean=mean, chance=ranking.chance, images=ranking.images
    )


def _policy(log: TrainingLog) -> PolicyProgress | None:
    entropies = _logged(log, "entropy")
    if log.rate is None or not entropies:
        return None
    rewards = _logged(log, "reward")
    by_loss = not rewards
    if by_loss:
        rewards = [-loss for loss in _logged(log, "held_out_loss")]
    first, last = _first_and_last(rewards) or (None, None)
    return PolicyProgress(
        rate=log.rate,
        steps=len(log.rows),
        entropy=(entropies[0], entropies[-1]),
        by_loss=by_loss,
        first=first,
        last=last,
    )


def _against_random(ranking: Ranking, by_policy: bool) -> AgainstRandom | None:
    """The proposals compared with random networks; None if there are too few of either,
    or if neither a policy nor a finder has chosen the proposals.
    """
    if min(len(ranking.proposals), len(ranking.random)) < LEAST_NETWORKS:
        return None
    if not by_policy and not ranking.evaluated:
        return None
    proposals = average(ranking.proposals, _noise(ranking.proposals, ranking))
    random = average(ranking.random, _noise(ranking.random, ranking))
    selection = _selection(ranking) if ranking.evaluated else 0.0
    return AgainstRandom(
        metric=ranking.metric,
        proposals=proposals,
        random=random,
        selection=selection,
        difference=welch(random, proposals, selection),
        chosen=ranking.proposals[0] - max(ranking.random),
        own_paths=by_policy,
        same=ranking.same,
    )


def _noise(qualities: Sequence[float], ranking: Ranking) -> float:
    """The variance of an accuracy due to the choice of the held-out images, a
    proportion's. Unknown for other metrics, and then 0.
    """
    if ranking.metric != ACCURACY:
        return 0.0
    mean = math.fsum(qualities) / len(qualities)
    return mean * (1 - mean) / ranking.images


def _selection(ranking: Ranking) -> float:
    """How much of the proposals' mean quality on all held-out images is expected to be
    due to noise in the finder's choice; see ``selection_intensity``.
    """
    variance = average(ranking.random).error ** 2 * len(ranking.random)
    # Noise that all networks share does not tell them apart, so what counts cannot
    # exceed the variance between them.
    noise = min(_noise(ranking.random, ranking), variance)
    # The finder has seen fewer images, on which the noise is larger.
    finders_noise = noise * ranking.images / min(ranking.evaluation_images, ranking.images)
    finders_std = math.sqrt(variance - noise + finders_noise)
    if finders_std == 0.0:
        return 0.0
    return selection_intensity(len(ranking.proposals), ranking.evaluated) * noise / finders_std


def _pm(value: Average, sign: int = 1) -> str:
    return f"{sign * value.mean:.3f} ± {value.error:.3f}"
