"""NAS-Bench-Macro's noise ceiling, and how well MACs and parameters alone rank its
networks, from the benchmark's own accuracies.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kendalltau

from hwnas.core.spaces import nasbench_macro
from hwnas.study.metrics import best_tenth, kendall, kendall_top
from hwnas.study.truth import Truth, read_truth


@pytest.fixture(scope="module")
def truth() -> Truth:
    if "HWNAS_TEST_DATA" not in os.environ:
        pytest.skip("needs nasbench_macro/nasbench_macro_cifar10.csv.gz: set HWNAS_TEST_DATA")
    return read_truth(
        Path(os.environ["HWNAS_TEST_DATA"], "nasbench_macro/nasbench_macro_cifar10.csv.gz"),
        nasbench_macro(),
    )


def test_the_noise_ceiling(truth: Truth) -> None:
    first, second, _ = truth.accuracy_NR.T
    assert truth.columns == ("acc1", "acc2", "acc3")
    assert kendall(first, second) == pytest.approx(0.882, abs=5e-4)
    assert kendall(first, second) == pytest.approx(kendalltau(first, second).statistic, abs=1e-12)
    top = best_tenth(truth.mean)
    assert len(top) == 656
    assert kendall(first[top], second[top]) == pytest.approx(0.1822, abs=5e-5)
    # means over the three pairs of repeats
    assert truth.agreement() == pytest.approx((0.881, 0.185), abs=5e-4)
    best = np.flatnonzero(truth.mean == truth.mean.max())
    # both have the same blocks, and the same accuracies in the file
    assert {truth.names[i] for i in best} == {"22212202", "22212220"}
    assert truth.mean.max() == pytest.approx(0.93127, abs=5e-6)


@pytest.mark.slow
def test_how_well_macs_and_parameters_alone_rank(truth: Truth) -> None:
    space = nasbench_macro()
    archs = [space.decode(picks) for picks in truth.picks]
    macs, params = (
        np.array([arch.macs for arch in archs]),
        np.array([arch.params for arch in archs]),
    )
    assert kendall(macs, truth.mean) == pytest.approx(0.556, abs=5e-4)
    assert kendall(params, truth.mean) == pytest.approx(0.218, abs=5e-4)
    assert kendall_top(macs, truth.mean) == pytest.approx(0.341, abs=5e-4)
