"""What shrinking leaves of NAS-Bench-Macro, recounted from the digits of the
benchmark's names.
"""

from __future__ import annotations

import csv
import gzip
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from hwnas.config import ShrinkConfig
from hwnas.core.spaces import nasbench_macro
from hwnas.search.shrinking import operators
from hwnas.study.documents import ShrinkStep
from hwnas.study.shrink_eval import Known, chance, curve, oracle
from hwnas.study.truth import read_truth

SPACE = nasbench_macro()
CONFIG = ShrinkConfig(dropped=3, until=30)
KEYS = [choice.key for choice in SPACE.choices]


@pytest.fixture(scope="module")
def path() -> Path:
    if "HWNAS_TEST_DATA" not in os.environ:
        pytest.skip("needs nasbench_macro/nasbench_macro_cifar10.csv.gz: set HWNAS_TEST_DATA")
    return Path(os.environ["HWNAS_TEST_DATA"], "nasbench_macro/nasbench_macro_cifar10.csv.gz")


@pytest.fixture(scope="module")
def known(path: Path) -> Known:
    return Known(SPACE, read_truth(path, SPACE))


@pytest.fixture(scope="module")
def digits(path: Path) -> dict[str, float]:
    """Mean accuracy by the benchmark's name: one digit for each of the eight layers, 0
    for identity.
    """
    with gzip.open(path, "rt") as file:
        return {
            row["arch"]: np.mean([float(row[f"acc{i}"]) for i in (1, 2, 3)]) / 100
            for row in csv.DictReader(file)
        }


def test_identity_is_the_worst_operator_of_every_layer(
    known: Known, digits: dict[str, float]
) -> None:
    means = known.means(operators(SPACE), known.left(()))
    for layer, choice in enumerate(SPACE.choices):
        by_hand = [
            np.mean([value for name, value in digits.items() if int(name[layer]) == digit])
            for digit in range(3)
        ]
        assert [means[choice.key, str(option)] for option in choice.options] == pytest.approx(
            by_hand
        )
        assert by_hand[0] < by_hand[1] < by_hand[2]


def test_what_remains_without_identity(known: Known, digits: dict[str, float]) -> None:
    gone = [(choice.key, str(choice.options[0])) for choice in SPACE.choices]
    left, before = known.remaining(known.left(gone)), known.remaining(known.left(()))
    kept = {name: value for name, value in digits.items() if "0" not in name}
    best = sorted(digits, key=lambda name: -digits[name])[:656]
    assert (left.networks, before.networks) == (2**8, 3**8) == (len(kept), len(digits))
    assert left.mean == pytest.approx(
        np.mean(list(kept.values()))
    ) and before.mean == pytest.approx(0.90247, abs=5e-6)
    assert left.best == pytest.approx(max(kept.values())) and left.worst == pytest.approx(
        min(kept.values())
    )
    # the tolerance is for ties at the edge of the best tenth
    assert left.best_tenth == pytest.approx(
        len([name for name in best if "0" not in name]) / 656, abs=2 / 656
    )


def test_a_shrinking_curve_by_hand(known: Known, digits: dict[str, float]) -> None:
    """Scores that rank two pairs of operators right and one wrong, then a drop."""
    a, b, c = ((KEYS[0], str(option)) for option in SPACE.choices[0].options)
    step = ShrinkStep(
        size=6561,
        epochs=1.0,
        children=3,
        scores={KEYS[0]: {a[1]: 1.0, b[1]: 3.0, c[1]: 2.0}},
        dropped=(a,),
        size_after=4374,
    )
    result = curve(known, "made up", [step])
    assert result.operator_kendall == (pytest.approx(1 / 3),)
    assert [left.networks for left in result.remaining] == [6561, 4374]
    assert result.remaining[1].mean == pytest.approx(
        np.mean([value for name, value in digits.items() if name[0] != "0"])
    )


def test_the_truth_as_a_score_raises_the_mean_at_every_drop(known: Known) -> None:
    left = oracle(known, SPACE, CONFIG).remaining
    # the first two steps drop six identities
    assert [step.networks for step in left[:3]] == [3**8, 2**3 * 3**5, 2**6 * 3**2]
    means = [step.mean or 0.0 for step in left]
    assert all(a < b for a, b in pairwise(means))
    assert means[0] == pytest.approx(0.9025, abs=5e-5) and means[-1] > 0.925
    assert left[-1].networks <= 30


def test_chance_changes_nothing_on_average(known: Known) -> None:
    by_chance = chance(known, SPACE, CONFIG, 0)
    means = [mean for mean, _, _ in by_chance.mean]
    assert abs(means[-1] - means[0]) < 0.002
    assert all(low < mean < high for mean, low, high in by_chance.mean[1:])
    assert by_chance.best_tenth[-1][0] < 0.05  # of the 656 best, in a space of at most 30 of 6,561
