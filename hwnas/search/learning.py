"""Did a finished search learn anything? Judged from what it has logged and ranked, with
standard errors.

1. *The shared weights.* The loss of the last fifth of the steps against that of a
   guess: the best that can be said without looking at the image, which is the entropy
   of the class frequencies, ln(classes) where they are equal (with label smoothing, of
   the smoothed ones). A detector's loss has no such level and is held against the first
   fifth of the steps.
2. *Held-out images.* The mean quality of all networks that were ranked against a guess:
   weights that know their training images by heart have a low loss. An AP is held
   against 0; of 1 / (1 + loss) no level is known, as a confident network may lose more
   than a guess.
3. *The policy.* Its reward (or held-out loss) in the last fifth of its steps against
   the first: entropy also falls on noise.
4. *Random networks.* The proposals against random networks within the same budget, by
   Welch's test. The evaluation noise of a network, that of a proportion of n images, is
   the least variance of each; what a finder's choice among many owes to that noise is
   taken off.

A difference counts where its p-value is below 5 %. What cannot be evaluated (a search of
few steps, few networks) is None.
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

PART = 0.2
"""Part of the steps that counts as the first or the last of them (ours)."""

LEAST_STEPS = 4
"""Steps in a part below which it says nothing."""

LEAST_NETWORKS = 4
"""Proposals, and random networks, below which they are not compared."""

NEAR_CHANCE = 0.01
"""Part of a guess's loss that training must have taken off: in a long search less than
that is told from noise, and still nothing.
"""

NOTHING = 0.0005
"""A part of a quality that reads as none."""

MIN_ENTROPY_CHANGE = 0.05
"""Part of its entropy that a policy should have lost or won in a search (ours)."""

Rows = Sequence[Mapping[str, float]]


class Weights(Record):
    """The training loss of the shared weights, per cross-entropy where a teacher adds one."""

    first: Average
    last: Average
    chance: float | None = Field(None, description="the loss of a guess; none for a detector")

    @property
    def learned(self) -> bool:
        """Whether the loss ended below a guess's, or else below where it began."""
        if self.chance is None:
            return welch(self.first, self.last).negative
        return below(self.last, self.chance) and self.last.mean < (1 - NEAR_CHANCE) * self.chance

    @property
    def text(self) -> str:
        """The figures in words."""
        if self.chance is None:
            return (
                f"the super-net's loss did not fall ({_pm(self.first)} at first, {_pm(self.last)}"
                " at the end)"
            )
        return f"the super-net's loss ended at {_pm(self.last)}, and a guess's is {self.chance:.3f}"


class HeldOut(Record):
    """The mean quality of the ranked networks on ``images`` held-out images, and that
    of a guess.
    """

    metric: str
    mean: float
    chance: float
    images: int

    @property
    def learned(self) -> bool:
        """Whether the mean network is better than a guess. Networks err on the same
        images, so all together are no surer than one.
        """
        if self.metric == AP:
            return self.mean > NO_AP
        return better_than_guessing(round(self.mean * self.images), self.images, self.chance)

    @property
    def text(self) -> str:
        """The figures in words."""
        guess = "" if self.metric == AP else f", and a guess has {shown(self.metric, self.chance)}"
        return (
            f"its networks have {self.metric} {shown(self.metric, self.mean)} on {self.images:,}"
            f" held-out images{guess}"
        )


class Policy(Record):
    """The policy's entropy in nats at both ends, and the reward of its steps (of
    gradients: minus the held-out loss) in both parts.
    """

    rate: str = Field(description="the option of the strategy that sets how fast it learns")
    steps: int
    entropy: tuple[float, float]
    by_loss: bool = Field(description="whether the reward is minus the held-out loss")
    first: Average | None = None
    last: Average | None = None

    @property
    def moved(self) -> bool:
        """Whether the entropy has changed by a twentieth."""
        return abs(self.entropy[1] - self.entropy[0]) >= MIN_ENTROPY_CHANGE * self.entropy[0]

    @property
    def rise(self) -> Difference | None:
        """By how much the reward rose; None where the steps are too few."""
        return None if self.first is None or self.last is None else welch(self.first, self.last)

    @property
    def stillness(self) -> Caution | None:
        """Said of a policy that has not moved."""
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
    def vanity(self) -> Caution | None:
        """Said of a policy that has moved for nothing."""
        if not self.moved or self.rise is None or self.rise.positive:
            return None
        assert self.first is not None and self.last is not None
        sign, what = (
            (-1, "held-out loss did not fall") if self.by_loss else (1, "reward did not rise")
        )
        first, last = (_pm(each, sign) for each in (self.first, self.last))
        text = (
            f"{self._entropy}, but its {what} by more than noise ({first} at first, {last} at the"
            f" end, p = {self.rise.p_value:.2g}): raise search.epochs, or change {self.rate} of"
            " search.strategy or search.optimizer.lr."
        )
        return Caution(headline="the policy learned nothing", text=text)


class AgainstRandom(Record):
    """Proposals against random networks within the same budget.

    ``selection``: what the finder's choice on the same images is expected to owe to
    noise, taken off the difference. ``chosen``: by how much the chosen network is above
    the best random one, without any test: both are the best of several.
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
        found = self.difference
        if not (found.positive or found.negative):
            return f"No better than random networks of the same {self.same} ({self.figures})."
        how = "Better" if found.positive else "Worse"
        by = shown_difference(self.metric, abs(found.value), found.error)
        return (
            f"{how} than random networks of the same {self.same} by {by} (p ="
            f" {found.p_value:.1g}{self._less})."
        )

    @property
    def figures(self) -> str:
        """The difference and its p-value."""
        sign = "+" if self.difference.value >= 0 else ""
        difference = sign + shown_difference(
            self.metric, self.difference.value, self.difference.error
        )
        return f"difference {difference}{self._less}, p = {self.difference.p_value:.1g}"

    @property
    def _less(self) -> str:
        if self.selection < NOTHING:
            return ""
        return (
            f", {shown_points(self.metric, self.selection)} for the choice of the best on these"
            " images taken off"
        )


class Learning(Record):
    """What is known of a search's learning. ``learned`` is None where nothing could be evaluated."""

    learned: bool | None
    weights: Weights | None = None
    held_out: HeldOut | None = None
    policy: Policy | None = None
    against_random: AgainstRandom | None = None
    cautions: tuple[Caution, ...] = ()


@dataclass(frozen=True)
class Course:
    """What a search has logged: ``rows`` with its losses per cross-entropy, the
    strategy's ``rate``, and the loss of a guess.
    """

    rows: Rows
    rate: str | None
    chance: float | None


@dataclass(frozen=True)
class Ranking:
    """What a search has ranked: qualities of the proposals and of random networks on
    ``images`` held-out images; a guess's quality.

    ``evaluated`` networks were looked at by a finder, on ``evaluation_images`` of these.
    ``same`` is the noun of the budget's unit.
    """

    metric: str
    proposals: Sequence[float]
    random: Sequence[float]
    images: int
    evaluation_images: int
    evaluated: int
    chance: float | None
    same: str = "latency"


def learning_of(course: Course | None, ranking: Ranking) -> Learning:
    """Judge a search. ``course`` is None where the weights came from another run."""
    weights = None if course is None else _weights(course)
    held_out = _held_out(ranking)
    policy = None if course is None else _policy(course)
    compared = _against_random(ranking, policy is not None)
    basic = _basic(weights, held_out)
    # which its own rate mends, whatever the weights know
    still = None if policy is None else policy.stillness
    cautions = [
        *basic,
        *([still] if still is not None else []),
        *([] if basic else _further(policy, compared)),
    ]
    policy_judged = policy is not None and (not policy.moved or policy.rise is not None)
    evaluated = policy_judged or any(each is not None for each in (weights, held_out, compared))
    learned = not cautions if evaluated else None
    return Learning(
        learned=learned,
        weights=weights,
        held_out=held_out,
        policy=policy,
        against_random=compared,
        cautions=tuple(cautions),
    )


def _basic(weights: Weights | None, held_out: HeldOut | None) -> list[Caution]:
    """Weights that know nothing, beside which all else says nothing."""
    texts = [each.text for each in (weights, held_out) if each is not None and not each.learned]
    if not texts:
        return []
    advice = "raise search.epochs or data.resolution, or change search.optimizer.lr"
    return [Caution(headline="the search learned nothing", text=f"{'; '.join(texts)}: {advice}.")]


def _further(policy: Policy | None, compared: AgainstRandom | None) -> list[Caution]:
    vain = None if policy is None else policy.vanity
    found = [] if vain is None else [vain]
    if compared is not None and not compared.difference.positive:
        advice = (
            "raise search.epochs; more search.candidates and search.random_samples tell smaller"
            " differences"
        )
        text = (
            f"its proposals against random networks of the same {compared.same}:"
            f" {compared.figures}; {advice}."
        )
        found.append(Caution(headline="the search is no better than random", text=text))
    return found


def _parts(values: Sequence[float]) -> tuple[Average, Average] | None:
    """The first and the last fifth; None where these are too few values."""
    count = round(PART * len(values))
    return (
        None
        if count < LEAST_STEPS
        else (block_average(values[:count]), block_average(values[-count:]))
    )


def _weights(course: Course) -> Weights | None:
    parts = _parts([row["loss"] for row in course.rows if "loss" in row])
    return None if parts is None else Weights(first=parts[0], last=parts[1], chance=course.chance)


def _held_out(ranking: Ranking) -> HeldOut | None:
    if ranking.chance is None:
        return None
    qualities = [*ranking.proposals, *ranking.random]
    mean = math.fsum(qualities) / len(qualities)
    return HeldOut(metric=ranking.metric, mean=mean, chance=ranking.chance, images=ranking.images)


def _policy(course: Course) -> Policy | None:
    entropies = [row["entropy"] for row in course.rows if "entropy" in row]
    if course.rate is None or not entropies:
        return None
    rewards = [row["reward"] for row in course.rows if "reward" in row]
    by_loss = not rewards
    parts = _parts(
        rewards or [-row["held_out_loss"] for row in course.rows if "held_out_loss" in row]
    )
    first, last = (None, None) if parts is None else parts
    ends = (entropies[0], entropies[-1])
    return Policy(
        rate=course.rate,
        steps=len(course.rows),
        entropy=ends,
        by_loss=by_loss,
        first=first,
        last=last,
    )


def _against_random(ranking: Ranking, by_policy: bool) -> AgainstRandom | None:
    """None where there are too few networks, and where the proposals are random
    networks themselves, which nobody chose.
    """
    if min(len(ranking.proposals), len(ranking.random)) < LEAST_NETWORKS or not (
        by_policy or ranking.evaluated
    ):
        return None
    noise = _noise(ranking.proposals, ranking), _noise(ranking.random, ranking)
    proposals, random = average(ranking.proposals, noise[0]), average(ranking.random, noise[1])
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
    """The variance of an accuracy by the choice of the held-out images; of other
    qualities none is known.
    """
    if ranking.metric != ACCURACY:
        return 0.0
    mean = math.fsum(qualities) / len(qualities)
    return mean * (1 - mean) / ranking.images


def _selection(ranking: Ranking) -> float:
    """What the best of all that a finder has evaluated are expected to owe to noise, on
    all held-out images; see ``statistics``.
    """
    spread = average(ranking.random).error ** 2 * len(ranking.random)
    # whatever all networks share does not tell them apart
    noise = min(_noise(ranking.random, ranking), spread)
    finders_noise = noise * ranking.images / min(ranking.evaluation_images, ranking.images)
    finders_spread = math.sqrt(spread - noise + finders_noise)
    if finders_spread == 0.0:
        return 0.0
    return selection_intensity(len(ranking.proposals), ranking.evaluated) * noise / finders_spread


def _pm(found: Average, sign: int = 1) -> str:
    return f"{sign * found.mean:.3f} ± {found.error:.3f}"
