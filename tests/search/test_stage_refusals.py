"""What the search stage refuses, before anything is trained and in one sentence: names,
budgets, tables, batches, super-nets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.core.cost import CostModel
from hwnas.core.space import MacroSpace
from hwnas.core.table import LatencyTable
from hwnas.errors import (
    ConfigError,
    CoverageError,
    DivergenceError,
    DocumentError,
    SpaceError,
    TableError,
    TargetError,
)
from hwnas.testing import synthetic_table
from tests.search.staging import OPTIONS, elastic_digits_space, experiment, run

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    return synthetic_table(elastic_digits_space())


@pytest.mark.parametrize("strategy", OPTIONS)
def test_an_unreachable_target_is_refused(
    strategy: str, table: LatencyTable, tmp_path: Path
) -> None:
    low, high = CostModel.of_table(elastic_digits_space(), table).range()
    for target in (0.9 * low, 1.1 * high):
        with pytest.raises(TargetError) as caught:
            run(
                tmp_path / "search",
                experiment(strategy, target_ms=target, target_range=None),
                table,
            )
        for number in (f"{target:g}", f"{low:.4g}", f"{high:.4g}"):
            assert number in str(caught.value)
    assert not list((tmp_path / "search").iterdir())


def test_a_missing_target_is_refused(table: LatencyTable, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"search\.target_ms is not set"):
        run(tmp_path / "search", experiment(target_range=None), table)


@pytest.mark.parametrize("strategy", OPTIONS)
def test_a_tolerance_that_no_architecture_meets_is_refused(
    strategy: str, table: LatencyTable, tmp_path: Path
) -> None:
    """Reported before any training."""
    with pytest.raises(TargetError, match=r"search\.tolerance"):
        run(tmp_path / "search", experiment(strategy, tolerance=1e-9), table)
    assert not list((tmp_path / "search").iterdir())


def test_a_table_of_another_space_is_refused(table: LatencyTable, tmp_path: Path) -> None:
    other_space = elastic_digits_space(width=24)
    with pytest.raises(CoverageError) as caught:
        run(tmp_path / "search", experiment(), table, space=other_space)
    missing = [op.key for op in other_space.ops if op.key not in table.entries]
    assert list(caught.value.missing) == missing
    assert missing[0] in str(caught.value)
    assert f"lacks {len(missing)} of the {len(other_space.ops)} ops" in str(caught.value)


def test_an_uncalibrated_table_is_refused(table: LatencyTable, tmp_path: Path) -> None:
    uncalibrated = table.model_copy(update={"calibration": None})
    with pytest.raises(TableError, match="allow_uncalibrated"):
        run(tmp_path / "search", experiment(), uncalibrated)
    CostModel.of_table(elastic_digits_space(), uncalibrated, allow_uncalibrated=True)


def test_an_unknown_strategy_or_option_is_refused(table: LatencyTable, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'tunas'"):
        run(tmp_path / "search", experiment("tunass"), table)
    with pytest.raises(ConfigError, match="rl_lr"):
        run(tmp_path / "search", experiment(strategy={"name": "tunas", "rl_lrr": 1}), table)


@pytest.mark.slow
def test_a_trained_super_net_of_another_space_or_none_is_refused(
    table: LatencyTable, tmp_path: Path
) -> None:
    run(tmp_path / "first/search", experiment("random"), table)
    other_space = elastic_digits_space().restrict({"s1.b1": ["ir_k3_e3", "skip"]})
    with pytest.raises(ConfigError, match=r"was trained on space tiny .* not on tiny"):
        run(
            tmp_path / "second/search",
            experiment(weights=str(tmp_path / "first")),
            table,
            space=other_space,
        )
    with pytest.raises(ConfigError, match=r"has no shared\.safetensors: name the search folder"):
        run(tmp_path / "second/search", experiment(weights=str(tmp_path)), table)


def test_a_table_that_lacks_the_ops_of_a_wider_space_is_refused(
    table: LatencyTable, tmp_path: Path
) -> None:
    """The same sentence for every strategy, before anything is trained."""
    wider = elastic_digits_space().scaled(2.0)
    for strategy in OPTIONS:
        with pytest.raises(CoverageError, match=r"lacks \d+ of the \d+ ops of space"):
            run(tmp_path / "search", experiment(strategy), table, space=wider)


@pytest.mark.parametrize("strategy", ["proxylessnas", "fbnet", "darts", "pdarts"])
def test_strategies_that_mix_refuse_open_resolutions(
    strategy: str, table: LatencyTable, tmp_path: Path
) -> None:
    content = {**elastic_digits_space().model_dump(), "resolutions": [8, 4]}
    elastic = MacroSpace.model_validate(content)
    with pytest.raises(SpaceError, match="resolution"):
        run(tmp_path / "search", experiment(strategy), synthetic_table(elastic), space=elastic)


@pytest.mark.parametrize("level", ["edge", "op"])
def test_strategies_that_mix_refuse_weights_per_edge(
    level: str, table: LatencyTable, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match="strategy 'fbnet' mixes options, so an input has no single producer"
    ):
        run(tmp_path / "search", experiment("fbnet", supernet={"operation_on": level}), table)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", OPTIONS)
def test_divergence_is_reported_with_its_step_and_a_remedy(
    strategy: str, table: LatencyTable, tmp_path: Path
) -> None:
    optimizer = {"name": "sgd", "lr": 1e12, "momentum": 0.9, "warmup": 0.0}
    with pytest.raises(DivergenceError, match=r"at step \d+ of \d+ .*lower optimizer\.lr"):
        run(tmp_path / "search", experiment(strategy, optimizer=optimizer), table)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (
            {"strategy": {"name": "tunas", "architectures": 17}},
            (
                r"'tunas' splits a training batch into 17 microbatches, and search\.batch_size = 32 .* set"
                r" it to 34 or more"
            ),
        ),
        (
            {"strategy": {"name": "proxylessnas", "gradient": "reinforce", "rl_samples": 17}},
            (
                r"'proxylessnas' splits a held-out batch into 17 microbatches, and search\.batch_size = 32"
                r" .* set it to 34 or more"
            ),
        ),
        (
            {"data_portion": 0.02},
            (
                r"search\.data_portion = 0\.02 leaves 23 of 1150 images, less than a batch of 32:"
                r" raise it, or lower search\.batch_size"
            ),
        ),
        (
            {"strategy": {"name": "random_standalone", "trainings": 8}, "epochs": 0.1},
            r"8 training runs share 4 steps, so some get none: lower trainings or raise search\.epochs",
        ),
        (
            {"strategy": {"name": "fairnas", "population": 1}},
            r"options of 'fairnas': population .*2",
        ),
    ],
)
def test_settings_that_cannot_work_together_are_refused(
    search: dict[str, Any], message: str, table: LatencyTable, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        run(tmp_path / "search", experiment(**search), table)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "search").iterdir())


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "tunas", "architectures": 16},
        {"name": "proxylessnas", "gradient": "reinforce", "rl_samples": 16},
    ],
)
def test_a_batch_of_32_may_have_sixteen_parts(
    strategy: dict[str, Any], table: LatencyTable, tmp_path: Path
) -> None:
    run(
        tmp_path / "search",
        experiment(strategy=strategy, epochs=0.1, candidates=1, random_samples=0),
        table,
    )
    assert (tmp_path / "search/arch.json").exists()


def test_a_super_net_that_does_not_fit_the_configuration_is_refused(
    table: LatencyTable, tmp_path: Path
) -> None:
    """Because settings contradict it, or because it has not tracked BN statistics."""
    run(
        tmp_path / "first/search",
        experiment("random", epochs=0.1, random_samples=0, candidates=1),
        table,
    )
    weights = {"weights": str(tmp_path / "first"), "finder": {"name": "random", "architectures": 2}}
    for search, message in (
        (
            {"supernet": {"dropout": 0.5}},
            (
                r"search\.supernet\.dropout = 0\.5, but the trained super-net in .*first has 0\.0:"
                r" remove the key"
            ),
        ),
        (
            {"supernet": {"sharing": "collapsed"}},
            r"search\.supernet\.sharing = 'collapsed', but .* has 'separate': remove the key",
        ),
        (
            {"recalibration_images": 0, "supernet": {"bn_track": True}},
            (
                r"the super-net in .*first tracks no BN statistics: set"
                r" search\.recalibration_images to 2 or more"
            ),
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            run(tmp_path / "second", experiment(**weights, **search), table)
    assert not list((tmp_path / "second").iterdir())
    # nothing is trained, so no batch is split into 17 parts
    run(
        tmp_path / "second",
        experiment(**weights, strategy={"name": "tunas", "architectures": 17}),
        table,
    )
    assert (tmp_path / "second/arch.json").exists()


def test_tracked_statistics_need_no_recalibration(table: LatencyTable, tmp_path: Path) -> None:
    tracked: dict[str, Any] = {
        "recalibration_images": 0,
        "supernet": {"bn_track": True},
        "random_samples": 0,
        "candidates": 1,
    }
    run(tmp_path / "first/search", experiment("random", epochs=0.1, **tracked), table)
    finder = {"name": "random", "architectures": 2}
    run(
        tmp_path / "second",
        experiment(weights=str(tmp_path / "first"), finder=finder, **tracked),
        table,
    )
    assert (tmp_path / "second/arch.json").exists()


def test_limits_that_cannot_be_met_together_are_refused(
    table: LatencyTable, tmp_path: Path
) -> None:
    """Each one is within reach, but the fastest network is the smallest: a slow target
    and few operations exclude each other.
    """
    space, cost = elastic_digits_space(), CostModel.of_table(elastic_digits_space(), table)
    grid = np.stack(
        np.meshgrid(*(np.arange(len(choice.options)) for choice in space.choices), indexing="ij"),
        -1,
    )
    smallest = min(space.decode(space.at(row)).macs for row in grid.reshape(-1, len(space.choices)))
    limits = [{"kind": "macs", "max_macs": smallest + 1}]
    target = cost.range()[1]
    with pytest.raises(
        TargetError,
        match=(
            rf"no architecture of space tiny was found within 2 % of {target:.4g} ms, macs <= \d+:"
            r" .*raise a limit"
        ),
    ) as caught:
        run(tmp_path / "search", experiment("random", limits=limits, target_ms=target), table)
    assert "lower the target or raise a limit" in str(caught.value)
    assert not list((tmp_path / "search").iterdir())


def test_the_table_of_a_limit_is_found(
    table: LatencyTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing table is named in the error; ``~`` is the home folder."""
    limits = [{"kind": "latency", "table": "~/board.json", "max_ms": 1e6}]
    monkeypatch.setenv("HOME", str(tmp_path))
    short = experiment("random", limits=limits, epochs=0.1, random_samples=0, candidates=1)
    with pytest.raises(DocumentError, match=r"board\.json does not exist: check the path"):
        run(tmp_path / "search", short, table)
    table.save(tmp_path / "board.json")
    run(tmp_path / "search", short, table)
    assert (tmp_path / "search/arch.json").exists()
