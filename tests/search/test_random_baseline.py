"""The random architectures that proposals are compared with: how many, on which images,
and what is announced before they are scored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.core.table import LatencyTable
from hwnas.data.images import Batch, Images, Request
from hwnas.search import evaluator as evaluation
from hwnas.search import random_baseline
from hwnas.search.evaluator import SupernetEvaluator
from hwnas.search.proposal import sample_feasible
from hwnas.search.random_baseline import affordable, choose_random_baseline, image_counts
from hwnas.search.result import SearchResult
from hwnas.search.settings import search_context
from hwnas.search.strategy import SearchContext
from hwnas.search.supernets import cost_counter_of
from hwnas.tasks.labels import ClassificationQuality
from hwnas.testing import synthetic_table
from tests.search.staging import Saying, elastic_digits_space, experiment, run
from tests.search.test_evaluator import supernet_of

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    return synthetic_table(elastic_digits_space())


def search_that_cost(
    table: LatencyTable, macs: int, **settings: Any
) -> tuple[SearchContext, SupernetEvaluator]:
    """The context and the evaluator of a search that has cost ``macs``
    multiply-accumulates.
    """
    config = experiment(**settings)
    search, evaluator = (
        search_context(config, elastic_digits_space(), table),
        SupernetEvaluator(supernet_of(elastic_digits_space()), config),
    )
    search.cost_counter = cost_counter_of(config.search, evaluator.supernet)
    search.cost_counter.load_state_dict({**search.cost_counter.state_dict(), "macs": macs})
    search.rng = np.random.default_rng(3)
    return search, evaluator


def test_how_many_pairs_are_affordable() -> None:
    within, anywhere = [10.0] * 8, [5.0] * 8
    assert affordable(1000, within, anywhere) == 8
    assert affordable(90, within, anywhere) == 6
    assert affordable(89, within, anywhere) == 5
    assert affordable(-7, within, anywhere) == 4, "fewer would say nothing about chance"


def test_a_short_search_scores_few_random_architectures_and_a_long_one_eight(
    table: LatencyTable,
) -> None:
    counts = {}
    for macs in (10**6, 10**10, 10**12):
        search, evaluator = search_that_cost(table, macs, random_samples=None)
        proposals = sample_feasible(search, 3, np.random.default_rng(0))
        compared = choose_random_baseline(search, evaluator, proposals)
        counts[macs] = len(compared.within)
        assert len(compared.anywhere) == len(compared.within)
        if len(compared.within) > random_baseline.FEWEST:
            assert search.cost_counter is not None
            of_all, of_part = image_counts(evaluator)
            spent = sum(
                search.cost_counter.evaluation_macs(picks, of_all)
                for picks in (*proposals, *compared.within)
            )
            spent += sum(
                search.cost_counter.evaluation_macs(picks, of_part) for picks in compared.anywhere
            )
            assert spent <= random_baseline.SHARE * macs
    assert counts[10**6] == random_baseline.FEWEST
    assert counts[10**12] == random_baseline.MOST


def test_a_number_that_is_set_is_used(table: LatencyTable) -> None:
    search, evaluator = search_that_cost(table, 1, random_samples=6)
    compared = choose_random_baseline(
        search, evaluator, sample_feasible(search, 3, np.random.default_rng(0))
    )
    assert (len(compared.within), len(compared.anywhere)) == (6, 6)


def test_the_announcement_gives_the_counts_and_the_cost(table: LatencyTable) -> None:
    search, evaluator = search_that_cost(table, 10**10, evaluation_images=100)
    search.seconds = 1000.0  # so that one percent is ten seconds
    sentence = choose_random_baseline(
        search, evaluator, sample_feasible(search, 3, np.random.default_rng(0))
    ).sentence
    scored = (
        "ranking 3 proposals and scoring 2 random architectures in the budget on"
        f" {len(evaluator.held_out)} held-out images each"
    )
    match = re.fullmatch(
        scored
        + r", and 2 from the whole space on 100 images: about (\d+) s, (\d+)% of the search's cost",
        sentence,
    )
    assert match, sentence
    assert int(match[1]) == pytest.approx(10 * int(match[2]), abs=5), (
        "the seconds are that share of 1,000"
    )
    assert 0 < int(match[2]) < 9


@pytest.mark.slow
def test_random_architectures_in_the_budget_are_scored_on_all_images_and_others_on_few(
    table: LatencyTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[int] = []
    original = ClassificationQuality.of_network

    def counted(
        quality: ClassificationQuality, network: Any, images: Any, batches: Any, limit: int | None
    ) -> float:
        batches = list(batches)
        evaluated.append(sum(len(y) for _, y in batches))
        return original(quality, network, images, batches, limit)

    monkeypatch.setattr(ClassificationQuality, "of_network", counted)
    progress = Saying()
    run(
        tmp_path / "search",
        experiment("random", evaluation_images=100, epochs=0.5),
        table,
        progress,
    )
    result = SearchResult.load(tmp_path / "search/search.json")
    all_images = max(evaluated)
    assert all_images > 100
    assert evaluated == [all_images] * (len(result.candidates) + len(result.random)) + [100] * len(
        result.random_anywhere
    )
    assert len(result.random) == len(result.random_anywhere) == 2
    assert any(
        line.startswith("ranking 3 proposals and scoring 2 random architectures in the budget on")
        for line in progress.said
    )


def test_held_out_images_are_read_once_if_they_fit_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluator = SupernetEvaluator(supernet_of(elastic_digits_space()), experiment())
    picks = elastic_digits_space().at([0] * len(elastic_digits_space().choices))
    reads = 0
    images_type = type(evaluator.held_out)
    original = images_type.__getitems__

    def counted(images: Images, requests: Sequence[Request]) -> Batch:
        nonlocal reads
        reads += len(requests) if images is evaluator.held_out else 0
        return original(images, requests)

    monkeypatch.setattr(images_type, "__getitems__", counted)
    first, second = (evaluator.on_all_images(evaluator.network(picks)) for _ in range(2))
    assert first == second
    assert reads == len(evaluator.held_out)
    monkeypatch.setattr(evaluation, "KEPT_BYTES", 1000)  # too little for the images
    streaming = SupernetEvaluator(evaluator.supernet, experiment())
    streaming.held_out, reads = evaluator.held_out, 0
    assert [streaming.on_all_images(streaming.network(picks)) for _ in range(2)] == [first, first]
    assert reads == 2 * len(evaluator.held_out)
