"""Whether a search has learned anything: every check on rows and rankings whose truth
is known.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from hwnas.config import Experiment
from hwnas.core.metric import ACCURACY, AP, OF_LOSS
from hwnas.core.objective import AbsoluteObjective
from hwnas.search.cost_counter import SearchCost
from hwnas.search.learning import Learning, Ranking, Rows, TrainingLog, learning_of
from hwnas.search.result import Candidate, SearchResult
from hwnas.tasks.labels import ClassificationQuality

CHANCE = math.log(10)
GOOD = Ranking(
    ACCURACY,
    proposals=(0.8,),
    random=(),
    images=500,
    evaluation_images=500,
    evaluated=0,
    chance=0.1,
)
"""A network that is better than a guess, and too few to compare with random ones."""


def rows(steps: int, seed: int, **means: Any) -> Rows:
    """Columns of metrics with noise of 0.05 around a mean, or around a line from one
    mean to another; the entropy has none.
    """
    rng = np.random.default_rng(seed)
    columns = {}
    for name, ends in means.items():
        first, last = ends if isinstance(ends, tuple) else (ends, ends)
        columns[name] = np.linspace(first, last, steps) + (
            0.0 if name == "entropy" else rng.normal(0, 0.05, steps)
        )
    return [
        {name: float(values[step]) for name, values in columns.items()} for step in range(steps)
    ]


def evaluated(
    metrics: Rows,
    *,
    rate: str | None = None,
    chance: float | None = CHANCE,
    ranking: Ranking = GOOD,
) -> Learning:
    return learning_of(TrainingLog(metrics, rate, chance), ranking)


def texts(learning: Learning) -> list[str]:
    return [str(caution) for caution in learning.cautions]


# the shared weights


def test_a_loss_at_chance_is_reported_with_its_figures() -> None:
    learning = evaluated(rows(200, 0, loss=(2.4, CHANCE)))
    assert (
        learning.learned is False
        and learning.weights is not None
        and learning.weights.last.count == 8
    )
    assert learning.weights.last.mean == pytest.approx(
        np.mean([row["loss"] for row in rows(200, 0, loss=(2.4, CHANCE))[-40:]])
    )
    [text] = texts(learning)
    assert (
        text.startswith("the search learned nothing: the super-net's loss ended at 2.3")
        and "guessing has 2.303" in text
    )
    assert "search.epochs" in text and "search.optimizer.lr" in text and "data.resolution" in text


def test_a_loss_below_chance_is_not_reported() -> None:
    learning = evaluated(rows(200, 0, loss=(CHANCE, 0.95 * CHANCE)))
    assert learning.learned is True and learning.cautions == ()


def test_a_short_search_whose_loss_falls_has_learned() -> None:
    """The losses of a detector in 48 steps: of the first ten and the last ten, no two
    are alike, and the first ten fall.
    """
    learning = evaluated(rows(48, 0, loss=(6.0, 3.0)), chance=None)
    assert learning.weights is not None and learning.weights.learned and learning.cautions == ()


def test_a_loss_above_chance_is_not_learning_either() -> None:
    assert evaluated(rows(200, 0, loss=(2.0, 3.0))).learned is False


def test_what_a_long_search_can_tell_from_noise_may_still_be_negligible() -> None:
    """Half a percent below a guess, and more than five standard errors away."""
    learning = evaluated(rows(20_000, 0, loss=0.995 * CHANCE))
    assert learning.weights is not None
    assert (
        CHANCE - learning.weights.last.mean
    ) / learning.weights.last.error > 5 and learning.learned is False


def test_chance_hardly_ever_passes_for_learning() -> None:
    """Two hundred searches at chance, of forty steps each. Losses are correlated over
    four steps, which is longer than a block of so few steps.
    """
    rng, passed = np.random.default_rng(3), 0
    for _ in range(200):
        noise = np.convolve(rng.normal(0, 0.1, 43), np.full(4, 0.5), "valid")
        passed += bool(evaluated([{"loss": CHANCE + deviation} for deviation in noise]).learned)
    assert passed <= 24  # nearer a tenth than the nominal level of one in twenty


@pytest.mark.parametrize(("steps", "known"), [(17, False), (18, True)])
def test_too_few_steps_are_inconclusive(steps: int, known: bool) -> None:
    learning = evaluated(
        rows(steps, 0, loss=1.1 * CHANCE), ranking=Ranking(OF_LOSS, (0.3,), (), 500, 500, 0, None)
    )
    assert (learning.weights is not None, learning.learned) == (
        (True, False) if known else (False, None)
    )


@pytest.mark.parametrize(
    ("ends", "learned"), [((6.0, 4.0), True), ((6.0, 6.0), False), ((6.0, 7.0), False)]
)
def test_a_detectors_loss_is_compared_with_its_start(
    ends: tuple[float, float], learned: bool
) -> None:
    ranking = Ranking(AP, (0.1,), (), images=30, evaluation_images=30, evaluated=0, chance=0.0)
    learning = evaluated(rows(100, 0, loss=ends), chance=None, ranking=ranking)
    assert learning.learned is learned
    assert [
        text.startswith("the search learned nothing: the super-net's loss did not fall (")
        for text in texts(learning)
    ] == [True] * (not learned)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("counts", [(30, 30, 30, 30), (70, 30, 15, 5), (100, 20, 0, 0)])
def test_a_guess_has_the_lowest_loss_without_looking_at_the_image(
    counts: tuple[int, ...], smoothing: float
) -> None:
    """Found by descent on logits that are the same for every image, with torch's own
    label smoothing.
    """
    labels = np.repeat(np.arange(4), counts)
    quality = ClassificationQuality(Experiment.model_validate({"data": {"classes": 4}}))
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        repeated = logits.expand(len(labels), 4)
        loss: torch.Tensor = torch.nn.functional.cross_entropy(
            repeated, torch.from_numpy(labels), label_smoothing=smoothing
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    assert quality.loss_of_a_guess(labels, smoothing) == pytest.approx(float(closure()), abs=1e-4)
    assert quality.of_a_guess(labels) == max(counts) / sum(counts)
    if len(set(counts)) == 1:
        assert quality.loss_of_a_guess(labels, smoothing) == pytest.approx(math.log(4))


# held-out images


def test_weights_that_memorised_their_images_have_learned_nothing() -> None:
    ranking = Ranking(
        ACCURACY,
        (0.11, 0.09),
        (0.1, 0.1),
        images=500,
        evaluation_images=500,
        evaluated=0,
        chance=0.11,
    )
    learning = evaluated(rows(200, 0, loss=(2.3, 0.1)), ranking=ranking)
    [text] = texts(learning)
    assert (
        "its networks have accuracy 10.0% on 500 held-out images (guessing: 11.0%)" in text
        and learning.learned is False
    )


@pytest.mark.parametrize(("ap", "learned"), [(0.0, False), (0.0004, False), (0.01, True)])
def test_an_ap_near_zero_is_not_learning(ap: float, learned: bool) -> None:
    """Without rows, as the weights are those of another run."""
    learning = learning_of(
        None, Ranking(AP, (ap,), (ap,), images=30, evaluation_images=30, evaluated=5, chance=0.0)
    )
    assert learning.learned is learned and learning.weights is learning.policy is None


# the policy


def test_entropy_that_falls_on_noise_is_not_learning() -> None:
    learning = evaluated(
        rows(300, 0, loss=(2.3, 1.0), entropy=(14.0, 5.0), reward=0.4), rate="rl_lr"
    )
    [text] = texts(learning)
    assert text.startswith(
        "the policy learned nothing: its entropy went from 14 to 5 nats, but its reward did not"
        " rise by more than noise ("
    )
    assert "rl_lr of search.strategy" in text and learning.learned is False
    assert (
        learning.policy is not None
        and learning.policy.rise is not None
        and abs(learning.policy.rise.value) < 0.05
    )


def test_a_reward_that_rises_is_learning() -> None:
    learning = evaluated(
        rows(300, 0, loss=(2.3, 1.0), entropy=(14.0, 5.0), reward=(0.4, 0.5)), rate="rl_lr"
    )
    assert (
        learning.learned is True
        and learning.policy is not None
        and learning.policy.rise is not None
    )
    # from the middle of the first fifth to the middle of the last
    assert learning.policy.rise.value == pytest.approx(0.08, abs=0.02)


@pytest.mark.parametrize(("ends", "learned"), [((2.0, 1.5), True), ((1.5, 1.5), False)])
def test_a_held_out_loss_must_fall(ends: tuple[float, float], learned: bool) -> None:
    learning = evaluated(
        rows(300, 0, loss=(2.3, 1.0), entropy=(14.0, 5.0), held_out_loss=ends), rate="alpha_lr"
    )
    assert learning.learned is learned
    assert [
        "held-out loss did not fall by more than noise (1." in text for text in texts(learning)
    ] == [True] * (not learned)


def test_a_policy_that_hardly_moves_is_reported_whatever_its_reward() -> None:
    learning = evaluated(
        rows(300, 0, loss=(2.3, 1.0), entropy=(14.0, 13.9), reward=(0.4, 0.5)), rate="rl_lr"
    )
    assert texts(learning) == [
        "the policy has hardly moved in 300 steps: its entropy went from 14 to 13.9 nats, so the"
        " result is close to random search: raise rl_lr of search.strategy, or search.epochs."
    ]


def test_a_policy_that_hardly_moves_is_reported_beside_weights_at_chance() -> None:
    """Its own learning rate would fix it; its other figures mean nothing while the
    weights are at chance.
    """
    learning = evaluated(rows(300, 0, loss=CHANCE, entropy=(14.0, 13.9), reward=0.1), rate="rl_lr")
    assert [caution.headline for caution in learning.cautions] == [
        "the search learned nothing",
        "the policy has hardly moved in 300 steps",
    ]
    moved = evaluated(rows(300, 0, loss=CHANCE, entropy=(14.0, 3.9), reward=0.1), rate="rl_lr")
    assert [caution.headline for caution in moved.cautions] == ["the search learned nothing"]


def test_a_method_without_a_policy_is_not_evaluated_by_one() -> None:
    assert evaluated(rows(300, 0, loss=(2.3, 1.0), entropy=(14.0, 13.9))).policy is None


# random networks


def compared(
    proposals: Any,
    random: Any,
    *,
    metric: str = ACCURACY,
    images: int = 10**9,
    evaluated_by_finder: int = 100_000,
) -> Learning:
    """What was learned by a search whose finder has evaluated ``evaluated_by_finder``
    networks. The default number of images leaves no noise.
    """
    chance = None if metric == OF_LOSS else 0.1
    return learning_of(
        None,
        Ranking(
            metric, tuple(proposals), tuple(random), images, images, evaluated_by_finder, chance
        ),
    )


PROPOSALS = (0.62, 0.60, 0.63, 0.59, 0.61, 0.60)
RANDOM = (0.55, 0.57, 0.56, 0.54, 0.60, 0.56, 0.52)


def test_proposals_are_compared_with_random_networks_by_welchs_test() -> None:
    learning = compared(PROPOSALS, RANDOM)
    assert learning.learned is True and learning.against_random is not None
    expected = stats.ttest_ind(PROPOSALS, RANDOM, equal_var=False)
    assert learning.against_random.difference.p_value == pytest.approx(expected.pvalue, rel=1e-3)
    assert learning.against_random.chosen == pytest.approx(0.02)
    assert learning.against_random.sentence.startswith(
        "Better than random networks of the same latency by 5.1 ± 1.1 points (p = "
    )


def test_a_difference_within_noise_is_no_better() -> None:
    learning = compared((0.56, 0.60, 0.52, 0.55), RANDOM)
    assert learning.learned is False and learning.against_random is not None
    assert (
        learning.against_random.sentence
        == "No better than random networks of the same latency (difference +0.0 ± 1.9 points, p"
        " = 1)."
    )
    [text] = texts(learning)
    assert (
        text.startswith("the search is no better than random: ") and "search.random_samples" in text
    )


def test_proposals_worse_than_random_are_reported() -> None:
    learning = compared((0.41, 0.40, 0.42, 0.40), RANDOM)
    assert learning.learned is False and learning.against_random is not None
    assert learning.against_random.sentence.startswith(
        "Worse than random networks of the same latency by 15.0 ± 1.1 points (p = 4e-07)."
    )


def test_a_loss_is_not_shown_as_a_percentage() -> None:
    learning = compared((0.56, 0.60, 0.52, 0.55), RANDOM, metric=OF_LOSS)
    assert learning.against_random is not None
    assert (
        learning.against_random.sentence
        == "No better than random networks of the same latency (difference +0.000 ± 0.019, p = 1)."
    )
    assert "points" not in texts(learning)[0] and "%" not in texts(learning)[0]


def test_the_noise_of_few_images_counts() -> None:
    """Accuracies spread by half a point, but on 100 images each is known to 5 points
    only: a difference of three points is within the noise.
    """
    proposals, random = (0.530, 0.525, 0.535, 0.530), (0.500, 0.505, 0.495, 0.500)
    assert compared(proposals, random).learned is True
    course = TrainingLog(
        rows(300, 0, loss=(2.3, 1.0), entropy=(14.0, 5.0), reward=(0.4, 0.5)), "rl_lr", CHANCE
    )
    against_random = learning_of(
        course, Ranking(ACCURACY, proposals, random, 100, 100, 0, 0.1)
    ).against_random
    assert (
        against_random is not None
        and against_random.own_paths
        and not against_random.difference.positive
    )
    assert against_random.difference.error == pytest.approx(
        math.sqrt((0.53 * 0.47 + 0.5 * 0.5) / 100 / 4), rel=1e-3
    )


def test_the_best_of_many_equal_networks_are_no_better() -> None:
    """A finder picks the best 8 of 160 networks of the same true accuracy: what it
    picks is noise.
    """
    rng = np.random.default_rng(4)
    uncorrected = corrected = 0
    for _ in range(200):
        accuracies = np.sort(rng.binomial(400, 0.6, 160) / 400)[::-1]
        random = rng.binomial(400, 0.6, 8) / 400
        uncorrected += stats.ttest_ind(accuracies[:8], random, equal_var=False).pvalue < 0.05
        learning = learning_of(
            None, Ranking(ACCURACY, tuple(accuracies[:8]), tuple(random), 400, 400, 160, 0.1)
        )
        corrected += learning.learned is True
    assert uncorrected > 190
    assert corrected <= 20  # a tenth: the spread of eight random networks is itself uncertain


def test_the_best_of_many_different_networks_are_better() -> None:
    """The same, but true accuracies spread by three times the noise."""
    rng, recognised = np.random.default_rng(5), 0
    for _ in range(100):
        truth = rng.normal(0.6, 0.075, 168).clip(0.05, 0.95)
        seen = rng.binomial(400, truth) / 400
        learning = learning_of(
            None,
            Ranking(
                ACCURACY, tuple(np.sort(seen[8:])[::-1][:8]), tuple(seen[:8]), 400, 400, 160, 0.1
            ),
        )
        recognised += learning.learned is True
    assert recognised > 90


def test_the_correction_for_choosing_the_best_matches_a_simulation() -> None:
    """A finder has seen a quarter of the images that networks are ranked on, so a
    quarter of what its choice owes to its own noise remains. By simulation.
    """
    rng, biases, corrections = np.random.default_rng(6), [], []
    for _ in range(400):
        truth = rng.normal(0.6, 0.03, 100)
        # 0.24 = 0.6 * 0.4 is the variance of one image; 100 images are the finder's
        finder_noise = rng.normal(0, math.sqrt(0.24 / 100), 100)
        other_noise = rng.normal(0, math.sqrt(0.24 / 300), 100)
        best = np.argsort(-(truth + finder_noise))[:5]
        biases.append((finder_noise / 4 + 3 * other_noise / 4)[best].mean())
        seen = truth + finder_noise / 4 + 3 * other_noise / 4
        learning = learning_of(
            None,
            Ranking(
                ACCURACY, tuple(seen[best]), tuple(rng.permutation(seen)[:50]), 400, 100, 100, 0.1
            ),
        )
        assert learning.against_random is not None
        corrections.append(learning.against_random.selection)
    assert np.mean(corrections) == pytest.approx(np.mean(biases), rel=0.15)
    assert learning.against_random.sentence.count("for having chosen the best on these images") == 1


@pytest.mark.parametrize(("proposals", "random"), [(3, 8), (8, 3), (8, 0)])
def test_too_few_networks_are_not_compared(proposals: int, random: int) -> None:
    assert compared((0.6,) * proposals, (0.6,) * random).against_random is None


def test_proposals_that_are_random_are_not_compared() -> None:
    """Random search has no policy and no finder that evaluates; its proposals are the
    best of random networks.
    """
    assert compared(PROPOSALS, RANDOM, evaluated_by_finder=0).against_random is None


# the document


def test_results_of_earlier_versions_are_read() -> None:
    """Version 1 called a candidate's quality ``accuracy``, whatever it was, and its
    metric ``quality``; in versions 1 and 2, costs were in milliseconds.
    """
    old_candidate = {
        "picks": {"a": "ir_k3_e3"},
        "latency_ms": 1.0,
        "accuracy": 0.4,
        "reward": 0.39,
        "limits": {},
    }
    result = SearchResult(
        strategy="tunas", space_sha256="0", objective=AbsoluteObjective(), target=1.0, tolerance=0.02, reachable=(0.5, 2.0),
        table_sha256="0", steps=10, seed=0, candidates=(Candidate(picks={}, predicted=1.0, quality=0.5, reward=0.5),),
    )  # fmt: skip
    content = json.loads(result.to_json())
    names = {"target": "target_ms", "reachable": "reachable_ms"}
    content = {
        names.get(name, name): value
        for name, value in content.items()
        if name not in ("metric", "learning", "unit", "random_anywhere")
    }
    content |= {
        "schema": "hwnas.search/1",
        "quality": OF_LOSS,
        "candidates": [old_candidate],
        "random": [old_candidate, old_candidate],
        "spread": [],
    }
    parsed = SearchResult.parse(json.dumps(content))
    assert parsed.metric == OF_LOSS and parsed.learning is None
    assert [candidate.quality for candidate in (*parsed.candidates, *parsed.random)] == [0.4] * 3
    assert (parsed.unit, parsed.target, parsed.reachable, parsed.candidates[0].predicted) == (
        "ms",
        1.0,
        (0.5, 2.0),
        1.0,
    )
    version_2 = {name: value for name, value in content.items() if name != "quality"} | {
        "schema": "hwnas.search/2",
        "metric": OF_LOSS,
    }
    new_candidate = {
        ("quality" if name == "accuracy" else name): value for name, value in old_candidate.items()
    }
    assert (
        SearchResult.parse(
            json.dumps(
                version_2
                | {"candidates": [new_candidate], "random": [new_candidate, new_candidate]}
            )
        )
        == parsed
    )
    cost = SearchCost(macs=7, training_images=6, evaluated=5)
    parsed = parsed.model_copy(update={"cost": cost, "random_anywhere": parsed.random})
    version_3 = json.loads(parsed.to_json())
    assert (
        version_3["schema"] == "hwnas.search/4" and SearchResult.parse(parsed.to_json()) == parsed
    )
    version_3["schema"], version_3["spread"] = "hwnas.search/3", version_3.pop("random_anywhere")
    version_3["cost"]["judged"] = version_3["cost"].pop("evaluated")
    assert SearchResult.parse(json.dumps(version_3)) == parsed
