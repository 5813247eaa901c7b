"""What a search is said to have learned: each piece of evidence on rows and rankings
whose truth is known.
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
from hwnas.search.learning import Course, Learning, Ranking, Rows, learning_of
from hwnas.search.result import Candidate, SearchResult
from hwnas.tasks.classification import ClassificationQuality

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
"""Networks that know something, and too few to compare."""


def rows(steps: int, seed: int, **means: Any) -> Rows:
    """Columns with noise of 0.05 around a mean, or a line from one mean to another."""
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
    found: Rows, *, rate: str | None = None, chance: float | None = CHANCE, ranking: Ranking = GOOD
) -> Learning:
    return learning_of(Course(found, rate, chance), ranking)


def texts(found: Learning) -> list[str]:
    return [str(caution) for caution in found.cautions]


# the shared weights


def test_a_loss_at_chance_is_named_with_its_figures() -> None:
    found = evaluated(rows(200, 0, loss=(2.4, CHANCE)))
    assert found.learned is False and found.weights is not None and found.weights.last.count == 8
    assert found.weights.last.mean == pytest.approx(
        np.mean([row["loss"] for row in rows(200, 0, loss=(2.4, CHANCE))[-40:]])
    )
    [text] = texts(found)
    assert (
        text.startswith("the search learned nothing: the super-net's loss ended at 2.3")
        and "a guess's is 2.303" in text
    )
    assert "search.epochs" in text and "search.optimizer.lr" in text and "data.resolution" in text


def test_a_loss_below_chance_is_not() -> None:
    found = evaluated(rows(200, 0, loss=(CHANCE, 0.95 * CHANCE)))
    assert found.learned is True and found.cautions == ()


def test_a_short_search_whose_loss_falls_has_learned() -> None:
    """The losses of a detector in 48 steps: of the first ten and the last ten, no two
    are alike, and the former fall.
    """
    found = evaluated(rows(48, 0, loss=(6.0, 3.0)), chance=None)
    assert found.weights is not None and found.weights.learned and found.cautions == ()


def test_a_loss_above_chance_has_not_learned_either() -> None:
    assert evaluated(rows(200, 0, loss=(2.0, 3.0))).learned is False


def test_what_a_long_search_tells_from_noise_may_still_be_nothing() -> None:
    """Half a percent below a guess, a hundred standard errors away."""
    found = evaluated(rows(20_000, 0, loss=0.995 * CHANCE))
    assert found.weights is not None
    assert (
        CHANCE - found.weights.last.mean
    ) / found.weights.last.error > 5 and found.learned is False


def test_chance_hardly_ever_passes_for_learning() -> None:
    """Two hundred searches at chance, of forty steps each, whose losses are alike for
    four steps, longer than a block of so few is.
    """
    rng, passed = np.random.default_rng(3), 0
    for _ in range(200):
        noise = np.convolve(rng.normal(0, 0.1, 43), np.full(4, 0.5), "valid")
        passed += bool(evaluated([{"loss": CHANCE + each} for each in noise]).learned)
    assert passed <= 24  # nearer a tenth than the level, one in twenty


@pytest.mark.parametrize(("steps", "known"), [(17, False), (18, True)])
def test_few_steps_say_nothing(steps: int, known: bool) -> None:
    found = evaluated(
        rows(steps, 0, loss=1.1 * CHANCE), ranking=Ranking(OF_LOSS, (0.3,), (), 500, 500, 0, None)
    )
    assert (found.weights is not None, found.learned) == ((True, False) if known else (False, None))


@pytest.mark.parametrize(
    ("ends", "learned"), [((6.0, 4.0), True), ((6.0, 6.0), False), ((6.0, 7.0), False)]
)
def test_a_detectors_loss_is_held_against_its_start(
    ends: tuple[float, float], learned: bool
) -> None:
    ranking = Ranking(AP, (0.1,), (), images=30, evaluation_images=30, evaluated=0, chance=0.0)
    found = evaluated(rows(100, 0, loss=ends), chance=None, ranking=ranking)
    assert found.learned is learned
    assert [
        text.startswith("the search learned nothing: the super-net's loss did not fall (")
        for text in texts(found)
    ] == [True] * (not learned)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("counts", [(30, 30, 30, 30), (70, 30, 15, 5), (100, 20, 0, 0)])
def test_a_guess_has_the_lowest_loss_of_those_who_do_not_look(
    counts: tuple[int, ...], smoothing: float
) -> None:
    """By descent on logits that are the same for every image, with torch's own label smoothing."""
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


def test_weights_that_know_their_images_by_heart_have_learned_nothing() -> None:
    ranking = Ranking(
        ACCURACY,
        (0.11, 0.09),
        (0.1, 0.1),
        images=500,
        evaluation_images=500,
        evaluated=0,
        chance=0.11,
    )
    found = evaluated(rows(200, 0, loss=(2.3, 0.1)), ranking=ranking)
    [text] = texts(found)
    assert (
        "its networks have accuracy 10.0% on 500 held-out images, and a guess has 11.0%" in text
        and found.learned is False
    )


@pytest.mark.parametrize(("ap", "learned"), [(0.0, False), (0.0004, False), (0.01, True)])
def test_an_ap_of_zero(ap: float, learned: bool) -> None:
    """Without rows: the weights are those of another run."""
    found = learning_of(
        None, Ranking(AP, (ap,), (ap,), images=30, evaluation_images=30, evaluated=5, chance=0.0)
    )
    assert found.learned is learned and found.weights is found.policy is None


# the policy


def test_entropy_that_falls_on_noise_is_not_learning() -> None:
    found = evaluated(rows(300, 0, loss=(2.3, 1.0), entropy=(14.0, 5.0), reward=0.4), rate="rl_lr")
    [text] = texts(found)
    assert text.startswith(
        "the policy learned nothing: its entropy went from 14 to 5 nats, but its reward did not"
        " rise by more than noise ("
    )
    assert "rl_lr of search.strategy" in text and found.learned is False
    assert (
        found.policy is not None
        and found.policy.rise is not None
        and abs(found.policy.rise.value) < 0.05
    )


def test_a_reward_that_rises_is() -> None:
    found = evaluated(
        rows(300, 0, loss=(2.3, 1.0), entropy=(14.0, 5.0), reward=(0.4, 0.5)), rate="rl_lr"
    )
    assert found.learned is True and found.policy is not None and found.policy.rise is not None
    # from the middle of the first fifth to that of the last
    assert found.policy.rise.value == pytest.approx(0.08, abs=0.02)


@pytest.mark.parametrize(("ends", "learned"), [((2.0, 1.5), True), ((1.5, 1.5), False)])
def test_a_held_out_loss_should_fall(ends: tuple[float, float], learned: bool) -> None:
    found = evaluated(
        rows(300, 0, loss=(2.3, 1.0), entropy=(14.0, 5.0), held_out_loss=ends), rate="alpha_lr"
    )
    assert found.learned is learned
    assert [
        "held-out loss did not fall by more than noise (1." in text for text in texts(found)
    ] == [True] * (not learned)


def test_a_still_policy_is_named_whatever_its_reward() -> None:
    found = evaluated(
        rows(300, 0, loss=(2.3, 1.0), entropy=(14.0, 13.9), reward=(0.4, 0.5)), rate="rl_lr"
    )
    assert texts(found) == [
        "the policy has hardly moved in 300 steps: its entropy went from 14 to 13.9 nats, so the"
        " result is close to random search: raise rl_lr of search.strategy, or search.epochs."
    ]


def test_a_still_policy_is_named_beside_weights_that_know_nothing() -> None:
    """Its own rate mends it; the other figures mean nothing then."""
    found = evaluated(rows(300, 0, loss=CHANCE, entropy=(14.0, 13.9), reward=0.1), rate="rl_lr")
    assert [caution.headline for caution in found.cautions] == [
        "the search learned nothing",
        "the policy has hardly moved in 300 steps",
    ]
    moved = evaluated(rows(300, 0, loss=CHANCE, entropy=(14.0, 3.9), reward=0.1), rate="rl_lr")
    assert [caution.headline for caution in moved.cautions] == ["the search learned nothing"]


def test_a_method_without_a_policy_is_not_judged_by_one() -> None:
    assert evaluated(rows(300, 0, loss=(2.3, 1.0), entropy=(14.0, 13.9))).policy is None


# random networks


def compared(
    proposals: Any,
    random: Any,
    *,
    metric: str = ACCURACY,
    images: int = 10**9,
    judged_by_finder: int = 100_000,
) -> Learning:
    """Of a finder that has evaluated so many networks; with so many images nothing is owed
    to noise.
    """
    chance = None if metric == OF_LOSS else 0.1
    return learning_of(
        None,
        Ranking(metric, tuple(proposals), tuple(random), images, images, judged_by_finder, chance),
    )


PROPOSALS = (0.62, 0.60, 0.63, 0.59, 0.61, 0.60)
RANDOM = (0.55, 0.57, 0.56, 0.54, 0.60, 0.56, 0.52)


def test_against_random_networks_by_welchs_test() -> None:
    found = compared(PROPOSALS, RANDOM)
    assert found.learned is True and found.against_random is not None
    expected = stats.ttest_ind(PROPOSALS, RANDOM, equal_var=False)
    assert found.against_random.difference.p_value == pytest.approx(expected.pvalue, rel=1e-3)
    assert found.against_random.chosen == pytest.approx(0.02)
    assert found.against_random.sentence.startswith(
        "Better than random networks of the same latency by 5.1 ± 1.1 points (p = "
    )


def test_within_noise() -> None:
    found = compared((0.56, 0.60, 0.52, 0.55), RANDOM)
    assert found.learned is False and found.against_random is not None
    assert (
        found.against_random.sentence
        == "No better than random networks of the same latency (difference +0.0 ± 1.9 points, p"
        " = 1)."
    )
    [text] = texts(found)
    assert (
        text.startswith("the search is no better than random: ") and "search.random_samples" in text
    )


def test_worse_than_random() -> None:
    found = compared((0.41, 0.40, 0.42, 0.40), RANDOM)
    assert found.learned is False and found.against_random is not None
    assert found.against_random.sentence.startswith(
        "Worse than random networks of the same latency by 15.0 ± 1.1 points (p = 4e-07)."
    )


def test_a_loss_is_no_percentage() -> None:
    found = compared((0.56, 0.60, 0.52, 0.55), RANDOM, metric=OF_LOSS)
    assert found.against_random is not None
    assert (
        found.against_random.sentence
        == "No better than random networks of the same latency (difference +0.000 ± 0.019, p = 1)."
    )
    assert "points" not in texts(found)[0] and "%" not in texts(found)[0]


def test_the_noise_of_few_images_counts() -> None:
    """A spread of half a point on 100 images, where one network is known to 5: three
    points are within that.
    """
    proposals, random = (0.530, 0.525, 0.535, 0.530), (0.500, 0.505, 0.495, 0.500)
    assert compared(proposals, random).learned is True
    course = Course(
        rows(300, 0, loss=(2.3, 1.0), entropy=(14.0, 5.0), reward=(0.4, 0.5)), "rl_lr", CHANCE
    )
    found = learning_of(
        course, Ranking(ACCURACY, proposals, random, 100, 100, 0, 0.1)
    ).against_random
    assert found is not None and found.own_paths and not found.difference.positive
    assert found.difference.error == pytest.approx(
        math.sqrt((0.53 * 0.47 + 0.5 * 0.5) / 100 / 4), rel=1e-3
    )


def test_the_best_of_many_equal_networks_are_no_better() -> None:
    """A finder picks the best 8 of 160 networks of the same true accuracy: what it
    picked them for is noise.
    """
    rng = np.random.default_rng(4)
    told = corrected = 0
    for _ in range(200):
        accuracies = np.sort(rng.binomial(400, 0.6, 160) / 400)[::-1]
        random = rng.binomial(400, 0.6, 8) / 400
        told += stats.ttest_ind(accuracies[:8], random, equal_var=False).pvalue < 0.05
        found = learning_of(
            None, Ranking(ACCURACY, tuple(accuracies[:8]), tuple(random), 400, 400, 160, 0.1)
        )
        corrected += found.learned is True
    assert told > 190
    assert corrected <= 20  # a tenth: the spread of eight random networks is itself uncertain


def test_the_best_of_many_different_networks_are() -> None:
    """The same where true accuracies spread by three times the noise."""
    rng, told = np.random.default_rng(5), 0
    for _ in range(100):
        truth = rng.normal(0.6, 0.075, 168).clip(0.05, 0.95)
        seen = rng.binomial(400, truth) / 400
        found = learning_of(
            None,
            Ranking(
                ACCURACY, tuple(np.sort(seen[8:])[::-1][:8]), tuple(seen[:8]), 400, 400, 160, 0.1
            ),
        )
        told += found.learned is True
    assert told > 90


def test_what_is_taken_off_for_the_choice() -> None:
    """On all images, where a finder looked at a quarter of them: a quarter of what its
    choice owes to its own noise. By simulation.
    """
    rng, owed, taken = np.random.default_rng(6), [], []
    for _ in range(400):
        truth = rng.normal(0.6, 0.03, 100)
        own = rng.normal(0, math.sqrt(0.24 / 100), 100)
        others = rng.normal(0, math.sqrt(0.24 / 300), 100)
        best = np.argsort(-(truth + own))[:5]
        owed.append((own / 4 + 3 * others / 4)[best].mean())
        seen = truth + own / 4 + 3 * others / 4
        found = learning_of(
            None,
            Ranking(
                ACCURACY, tuple(seen[best]), tuple(rng.permutation(seen)[:50]), 400, 100, 100, 0.1
            ),
        )
        assert found.against_random is not None
        taken.append(found.against_random.selection)
    assert np.mean(taken) == pytest.approx(np.mean(owed), rel=0.15)
    assert (
        found.against_random.sentence.count("for the choice of the best on these images taken off")
        == 1
    )


@pytest.mark.parametrize(("proposals", "random"), [(3, 8), (8, 3), (8, 0)])
def test_few_networks_are_not_compared(proposals: int, random: int) -> None:
    assert compared((0.6,) * proposals, (0.6,) * random).against_random is None


def test_proposals_that_are_random_themselves_are_not_compared() -> None:
    """No policy, and no finder that has evaluated: random search, whose choice is the best of them."""
    assert compared(PROPOSALS, RANDOM, judged_by_finder=0).against_random is None


# the document


def test_results_of_earlier_versions_are_read() -> None:
    """In version 1 a candidate's quality was called accuracy, whatever it was, and its
    metric quality; in both, costs were milliseconds.
    """
    old = {
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
        "candidates": [old],
        "random": [old, old],
        "spread": [],
    }
    found = SearchResult.parse(json.dumps(content))
    assert found.metric == OF_LOSS and found.learning is None
    assert [candidate.quality for candidate in (*found.candidates, *found.random)] == [0.4] * 3
    assert (found.unit, found.target, found.reachable, found.candidates[0].predicted) == (
        "ms",
        1.0,
        (0.5, 2.0),
        1.0,
    )
    second = {name: value for name, value in content.items() if name != "quality"} | {
        "schema": "hwnas.search/2",
        "metric": OF_LOSS,
    }
    newer = {("quality" if name == "accuracy" else name): value for name, value in old.items()}
    assert (
        SearchResult.parse(json.dumps(second | {"candidates": [newer], "random": [newer, newer]}))
        == found
    )
    counted = SearchCost(macs=7, training_images=6, evaluated=5)
    found = found.model_copy(update={"cost": counted, "random_anywhere": found.random})
    third = json.loads(found.to_json())
    assert third["schema"] == "hwnas.search/4" and SearchResult.parse(found.to_json()) == found
    third["schema"], third["spread"] = "hwnas.search/3", third.pop("random_anywhere")
    third["cost"]["judged"] = third["cost"].pop("evaluated")
    assert SearchResult.parse(json.dumps(third)) == found
