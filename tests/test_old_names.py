"""Plug-ins that were written for the previous release, with the old names of what they
implement.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

import hwnas.task
from hwnas.core.arch import Picks
from hwnas.search.random import RandomStandalone
from hwnas.search.strategy import Metrics, SearchContext, Strategy
from hwnas.task import Answers, SearchQuality
from hwnas.tasks.classification import Classification
from hwnas.tasks.labels import Labels


def test_old_methods_of_a_task_are_called_by_their_new_names() -> None:
    with pytest.warns(FutureWarning) as warned:

        class Old(Classification):
            def said(self, metrics: hwnas.task.Metrics, images: int) -> str:
                return f"good on {images}, {super().said(metrics, images)}"

            def kept(self, arrays: Mapping[str, np.ndarray]) -> Answers:
                return Labels(np.array([7]))

    texts = [str(warning.message) for warning in warned]
    assert len(texts) == 2 and "Old: 'said' is now 'describe_result'" in texts[0]
    assert Old().describe_result({"accuracy": 0.5}, 8) == "good on 8, 50.00% of 8 test images right"
    assert len(Old().load_answers({})) == 1
    assert Old().describe_progress(0.5) == "50.0% of"


def test_old_members_of_a_strategy_are_read_by_their_new_names() -> None:
    with pytest.warns(FutureWarning, match="is now") as warned:

        class Old(Strategy):
            Config = BaseModel
            shares = False
            cells = True
            rate = "lr"

            def setup(self, ctx: SearchContext) -> None:
                self.alone = [{"a": "b"}]

            def step(self, ctx: SearchContext) -> Metrics:
                return {}

            def propose(self, ctx: SearchContext, count: int) -> list[Picks]:
                return []

            def parts(self) -> tuple[int, int]:
                return 2, 3

    assert len(warned) == 4
    assert (Old.shares_weights, Old.supports_cells, Old.rate_option) == (False, True, "lr")
    assert not Old.mixes_options
    strategy: Any = Old()
    assert strategy.microbatches() == (2, 3)
    with pytest.warns(FutureWarning, match="'alone' is now 'standalone'"):
        strategy.setup(None)
    assert strategy.standalone == [{"a": "b"}]


def test_built_in_classes_have_both_names_and_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        class New(Classification):
            def describe_progress(self, value: float) -> str:
                return "new"

    old: Any = New()
    assert old.said_on_the_way(0.5) == "new"
    shares = vars(RandomStandalone)["shares"]
    assert shares is RandomStandalone.shares_weights is False


def test_the_old_name_of_the_quality_of_a_search_can_be_imported() -> None:
    with pytest.warns(FutureWarning, match="is now SearchQuality"):
        assert hwnas.task.Quality is SearchQuality
