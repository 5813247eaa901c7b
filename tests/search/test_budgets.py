"""Counted budgets: cost models without a table, their configuration, and searches that
need no profile.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwnas.config import Experiment, load_experiment
from hwnas.core.arch import Architecture
from hwnas.core.cost import UNITS, CostModel, weight_bytes
from hwnas.core.limits import LatencyLimit, MacsLimit
from hwnas.engine import note_of
from hwnas.errors import ConfigError, TargetError
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.runs import JsonLines
from hwnas.search.result import SearchResult
from tests.search.staging import Saying, elastic_digits_space, experiment, run

SHORT: dict[str, Any] = {"epochs": 0.5, "candidates": 2, "tolerance": 0.05}
COUNTS = {
    "macs": lambda arch: arch.macs,
    "params": lambda arch: arch.params,
    "size_bytes": lambda arch: weight_bytes(arch.params, "int8"),
}


def cost_of(kind: str) -> CostModel:
    space = elastic_digits_space()
    cost_models = {
        "macs": CostModel.of_macs,
        "params": CostModel.of_params,
        "size_bytes": lambda space: CostModel.of_bytes(space, "int8"),
    }
    return cost_models[kind](space)


@pytest.mark.parametrize("kind", COUNTS)
def test_counted_costs_are_those_of_the_decoded_network(kind: str) -> None:
    space, cost, rng = elastic_digits_space(), cost_of(kind), np.random.default_rng(0)
    sampled = [space.sample(rng) for _ in range(20)]
    values = [COUNTS[kind](space.decode(picks)) for picks in sampled]
    assert [cost.cost(picks) for picks in sampled] == values
    assert cost.costs(np.array([space.index(picks) for picks in sampled])).tolist() == values
    low, high = cost.range()
    assert low <= min(values) < max(values) <= high
    assert (cost.unit, cost.table, cost.source) == (UNITS[kind], None, "")


def test_the_range_starts_at_the_count_of_the_smallest_network() -> None:
    space, cost = elastic_digits_space(), cost_of("macs")
    smallest = {choice.key: choice.options[0] for choice in space.choices} | {
        "s1.b1": "skip",
        "s1.b2": "skip",
    }
    assert cost.range()[0] == space.decode(smallest).macs


def test_costs_are_shown_with_their_unit() -> None:
    assert UNITS["ms"].shown(1.5) == "1.5 ms"
    assert UNITS["macs"].shown(38_040_000) == "38.04 M MACs"
    assert UNITS["params"].shown(1_000_000, 2_500_000) == "1 to 2.5 M parameters"
    assert UNITS["size_bytes"].shown(250_000) == "0.25 MB of weights"


def test_the_note_of_a_step_uses_the_unit_of_the_budget() -> None:
    metrics = {"macs": 38_040_000.0, "expected_macs": 4e7, "loss": 1.0}
    assert note_of(metrics) == "loss 1  38.04 M MACs  expected 40 M MACs"


def test_an_unreachable_count_is_refused_and_the_error_names_its_key() -> None:
    message = (
        r"target 1000 M MACs is out of reach of space tiny: its architectures have .* M MACs;"
        r" choose search\.budget\.max_macs in that"
    )
    with pytest.raises(TargetError, match=message):
        cost_of("macs").check_target(1e9, "search.budget.max_macs")


# the configuration


def test_target_ms_is_shorthand_for_a_latency_budget() -> None:
    short, long = (
        load_experiment(None, ["search.target_ms=3"]),
        load_experiment(None, ["search.budget={kind='latency', max_ms=3}"]),
    )
    assert (
        short.search.main_budget
        == long.search.main_budget
        == LatencyLimit(kind="latency", max_ms=3)
    )
    assert short.search.by_table and long.search.by_table


def test_an_unset_budget_is_not_written() -> None:
    assert "budget" not in load_experiment(None, ["search.target_ms=3"]).search.model_dump(
        mode="json"
    )
    config = load_experiment(None, ["search.budget={kind='macs', max_macs=3e6}"])
    written = config.search.model_dump(mode="json", by_alias=True)
    assert written["budget"] == {"kind": "macs", "max_macs": 3_000_000} and isinstance(
        written["budget"]["max_macs"], int
    )
    assert Experiment.model_validate(config.model_dump(mode="json", by_alias=True)) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["search.budget={kind='macs'}", "search.target_ms=3"],
            "search.target_ms is shorthand for a search.budget .*; remove one of them",
        ),
        (
            ["search.budget={kind='activation_bytes', max_bytes=9}"],
            "is a peak, not a sum over blocks, .* put it under search.limits",
        ),
        (
            ["search.budget={kind='latency', table='t.json'}"],
            "name the table of the budget in search.table",
        ),
        (["search.budget={kind='flops'}"], "flops"),
        (["search.limits=[{kind='macs'}]"], "max_macs is missing: a limit needs its number"),
        (["search.limits=[{kind='latency', max_ms=3}]"], "table is missing"),
    ],
)
def test_invalid_budgets_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment(None, settings)


# searches


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "budget"),
    [
        ({"name": "tunas"}, {"kind": "macs"}),
        ({"name": "fbnet", "latency_loss": "fbnet"}, {"kind": "params"}),
        (
            {"name": "spos", "generations": 2, "population": 6, "parents": 3},
            {"kind": "size_bytes", "dtype": "int8"},
        ),
    ],
)
def test_a_search_without_a_table(
    strategy: dict[str, Any], budget: dict[str, Any], tmp_path: Path
) -> None:
    progress, kind = Saying(), budget["kind"]
    run(tmp_path / "search", experiment(strategy=strategy, budget=budget, **SHORT), None, progress)
    result, (low, high) = (
        SearchResult.load(tmp_path / "search" / "search.json"),
        cost_of(kind).range(),
    )
    assert (result.unit, result.table_sha256, result.reachable) == (kind, None, (low, high))
    assert result.target == (low + high) / 2
    arch = Architecture.load(tmp_path / "search" / "arch.json")
    assert result.candidates[0].predicted == COUNTS[kind](arch)
    assert all(
        abs(candidate.predicted / result.target - 1) <= 0.05 for candidate in result.candidates
    )
    rows = JsonLines(tmp_path / "search" / "metrics.jsonl").read()
    cost_columns = {name for row in rows for name in row if name in (kind, f"expected_{kind}")}
    assert cost_columns and not any(name.endswith("_ms") for row in rows for name in row)
    assert all(low <= row[name] <= high for row in rows for name in cost_columns & row.keys())
    symbol = UNITS[kind].symbol
    assert any(
        re.fullmatch(rf"target \S+ {symbol}; tiny reaches \S+ to \S+ {symbol}", line)
        for line in progress.said
    )
    assert any(
        re.match(rf"found tiny-\w+: \S+ {symbol} predicted \(", line) for line in progress.said
    )
    assert not any(" ms" in line for line in progress.said)


@pytest.mark.slow
def test_a_budget_in_macs_needs_no_profile(tmp_path: Path) -> None:
    """The number of the budget is the target, no stage asks for a table, and the report
    shows the unit.
    """
    space, progress = elastic_digits_space(), Saying()
    space.save(tmp_path / "space.json")
    macs = round(sum(cost_of("macs").range()) / 2)
    config = experiment(budget=MacsLimit(kind="macs", max_macs=macs), target_range=None, **SHORT)
    config = config.model_copy(
        update={"space": config.space.model_copy(update={"name": str(tmp_path / "space.json")})}
    )
    pipeline = Pipeline(config, tmp_path / "run", progress)
    assert "profile" not in pipeline.needed
    assert f"at {macs / 1e6:g} M MACs" in pipeline.plan()
    pipeline.run_stage("search")
    result = SearchResult.load(tmp_path / "run" / "search" / "search.json")
    assert (result.unit, result.target) == ("macs", macs)
    Pipeline(config, tmp_path / "run", Progress()).run_stage("report")
    text = (tmp_path / "run" / "report" / "report.html").read_text()
    assert "predicted M MACs" in text and f"{macs / 1e6:.3g}" in text
    assert '<span class="unit">M MACs</span>' in text and "predicted latency" not in text
    assert json.loads((tmp_path / "run" / "config.json").read_text())["search"]["budget"] == {
        "kind": "macs",
        "max_macs": macs,
    }


def test_a_budget_without_its_number_is_refused(tmp_path: Path) -> None:
    elastic_digits_space().save(tmp_path / "space.json")
    config = experiment(budget={"kind": "macs"}, target_range=None)
    config = config.model_copy(
        update={"space": config.space.model_copy(update={"name": str(tmp_path / "space.json")})}
    )
    with pytest.raises(
        ConfigError,
        match=(
            r"search\.budget\.max_macs is not set: set it to your budget, or search\.target_range"
            r" to 0\.\.1"
        ),
    ):
        Pipeline(config, tmp_path / "run", Progress()).run_stage("search")
