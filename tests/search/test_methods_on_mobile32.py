"""Every built-in method on the space for 32-pixel images: its proposals meet the
target.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hwnas.config import Experiment
from hwnas.core.spaces import mobile32
from hwnas.core.table import LatencyTable
from hwnas.search import STRATEGIES
from hwnas.search.result import SearchResult
from hwnas.testing import synthetic_table
from tests.search.staging import run

torch.set_num_threads(1)

DATA = {
    "name": "digits",
    "resolution": 32,
    "channels": 1,
    "mean": (0.31,),
    "std": (0.37,),
    "augment": "crop",
}
SPACE = mobile32(resolution=32, in_channels=1, classes=10, width=0.5)
EVOLUTION = {"generations": 2, "population": 3, "mutations": 1, "crossovers": 1, "parents": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "tunas": {"rl_lr": 0.05},
    "proxylessnas": {"warmup": 0.0, "arch_every": 1, "alpha_lr": 0.05},
    "fbnet": {"warmup": 0.0, "theta_every": 1, "theta_lr": 0.05},
    "darts": {"alpha_lr": 0.05, "order": 1},
    "pdarts": {"alpha_lr": 0.05},
    "spos": EVOLUTION,
    "fairnas": {"generations": 2, "population": 3},
    "progressive_shrinking": EVOLUTION,
    "random_standalone": {"trainings": 3},
}


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    return synthetic_table(SPACE)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_candidates_are_within_two_percent_of_the_target(
    strategy: str, table: LatencyTable, tmp_path: Path
) -> None:
    """All candidates of all methods do, whatever a policy has learned in four steps."""
    # 0.028 epochs are four steps of 8 images
    search = {
        "strategy": {"name": strategy, **OPTIONS.get(strategy, {})}, "target_range": 0.35, "epochs": 0.028, "batch_size": 8,
        "candidates": 3, "random_samples": 0, "evaluation_images": 16, "recalibration_images": 16,
    }  # fmt: skip
    run(
        tmp_path / "search",
        Experiment.model_validate({"data": DATA, "search": search}),
        table,
        space=SPACE,
    )
    result = SearchResult.load(tmp_path / "search/search.json")
    assert result.steps == 4
    assert len({tuple(candidate.picks.items()) for candidate in result.candidates}) == 3
    for candidate in result.candidates:
        assert abs(candidate.predicted / result.target - 1) <= 0.02
