"""The search stage end to end, on real digits and the table of a simulated device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.config import DataConfig, DeviceConfig, Experiment, ProfileConfig
from hwnas.core.arch import Architecture
from hwnas.core.cost import CostModel, latency_ms
from hwnas.core.space import MacroSpace, Stage
from hwnas.core.table import LatencyTable
from hwnas.data.images import evaluation_batches, load_images
from hwnas.devices.device import Device, connect
from hwnas.devices.profile import profile
from hwnas.engine import accuracy
from hwnas.errors import ConfigError, CoverageError, TableError, TargetError
from hwnas.nn.network import load_network
from hwnas.progress import Progress, Task
from hwnas.runs import StageContext
from hwnas.search import stage
from hwnas.search.stage import SearchResult
from hwnas.search.strategy import random_within, within_target

torch.set_num_threads(1)

DATA = {"name": "digits", "resolution": 8, "channels": 1, "mean": (0.3,), "std": (0.35,), "augment": "crop"}
OPTIMIZER = {"name": "sgd", "lr": 2.0, "options": {}}


def tiny_space(width: int = 16) -> MacroSpace:
    first = ("ir_k3_e3", "ir_k5_e3", "ir_k3_e6", "ir_k5_e6")
    stages = (
        Stage(widths=(8, 16), slots=(("cn_k3",),)),
        Stage(widths=(width,), stride=2, slots=(first, (*first, "skip"), (*first, "skip"))),
        Stage(widths=(24, 32), slots=(("cn_k1",),)),
    )
    return MacroSpace(name="tiny", resolution=8, in_channels=1, classes=10, stages=stages)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> LatencyTable:
    device = Device(id="simulated", soc="none", connection="simulated")
    config = ProfileConfig(rounds=3, max_rounds=3)
    folder = tmp_path_factory.mktemp("profile")
    settings = DeviceConfig(name="simulated")
    return profile(tiny_space(), device, connect(device), lambda ops, runtime, dtype: Path("unread"), settings, config, folder, Progress())


def experiment(name: str = "tunas", **search: Any) -> Experiment:
    settings = {
        "strategy": {"name": name}, "target_range": 0.5, "epochs": 1.0, "batch_size": 32, "optimizer": OPTIMIZER,
        "candidates": 3, "random_samples": 2, "recalibration_images": 256, **search,
    }  # fmt: skip
    return Experiment.model_validate({"seed": 5, "checkpoint_seconds": 0.0, "data": DATA, "search": settings})


def run(folder: Path, config: Experiment, table: LatencyTable, progress: Progress | None = None, space: MacroSpace | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stage.run(StageContext(config, folder.parent, folder, progress or Progress()), space or tiny_space(), table)


class Killed(Exception):  # noqa: N818 - stands for a kill
    pass


class Killing(Progress):
    """Dies when the bar whose description contains ``where`` has advanced ``steps`` times."""

    def __init__(self, where: str, steps: int) -> None:
        self.where, self.steps = where, steps

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Task]:
        outer, counts = self, self.where in description

        class Bar(Task):
            def advance(self, steps: int = 1, note: str = "") -> None:
                if counts:
                    outer.steps -= steps
                    if outer.steps <= 0:
                        raise Killed

        yield Bar()


@pytest.mark.parametrize("strategy", ["tunas", "random"])
def test_end_to_end(strategy: str, table: LatencyTable, tmp_path: Path) -> None:
    options = {"name": strategy, **({"rl_lr": 0.02} if strategy == "tunas" else {})}
    run(tmp_path / "search", experiment(strategy, strategy=options, epochs=4.0), table)
    space, cost = tiny_space(), CostModel(tiny_space(), table)
    result = SearchResult.load(tmp_path / "search/search.json")
    low, high = cost.range_ms()
    assert result.target_ms == pytest.approx((low + high) / 2)
    assert result.reachable_ms == pytest.approx((low, high))
    assert result.table_sha256 == table.sha256
    assert result.steps == 144
    assert 1 <= len(result.candidates) <= 3
    assert len(result.random) == 2
    assert len(result.spread) == 2
    for candidates in (result.candidates, result.random):
        rewards = [candidate.reward for candidate in candidates]
        assert rewards == sorted(rewards, reverse=True)
        for candidate in candidates:
            assert candidate.latency_ms == pytest.approx(latency_ms(space.decode(candidate.picks), table))
            assert abs(candidate.latency_ms / result.target_ms - 1) <= 0.02
            assert candidate.reward == pytest.approx(candidate.accuracy - 0.1 * abs(candidate.latency_ms / result.target_ms - 1))
    best = result.candidates[0]
    assert best.accuracy > 0.4  # of 10 classes, after four epochs
    arch = Architecture.load(tmp_path / "search/arch.json")
    assert arch.blocks == space.decode(best.picks).blocks
    network = load_network(tmp_path / "search/supernet.safetensors")
    assert network.arch.blocks == arch.blocks
    held_out = load_images(DataConfig.model_validate(DATA), "held_out")
    assert accuracy(network, evaluation_batches(held_out, 128)) == pytest.approx(best.accuracy, abs=0.01)
    assert not (tmp_path / "search/checkpoint.pt").exists()
    lines = (tmp_path / "search/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(144))


@pytest.mark.parametrize("strategy", ["tunas", "random"])
def test_resumed_bit_for_bit(strategy: str, table: LatencyTable, tmp_path: Path) -> None:
    """Killed in warm-up, while the controller learns, and while proposals are ranked; each time checkpointed at every step."""
    run(tmp_path / "straight", experiment(strategy), table)
    config = experiment(strategy)
    for where, steps in (("searching", 4), ("searching", 19), ("searching", 7), ("ranking", 2)):
        with pytest.raises(Killed):
            run(tmp_path / "killed", config, table, Killing(where, steps))
        assert (tmp_path / "killed/checkpoint.pt").exists(), (where, steps)
    run(tmp_path / "killed", config, table)
    for name in ("arch.json", "supernet.safetensors", "search.json", "metrics.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


def test_unreachable_target(table: LatencyTable, tmp_path: Path) -> None:
    low, high = CostModel(tiny_space(), table).range_ms()
    for target in (0.9 * low, 1.1 * high):
        with pytest.raises(TargetError) as caught:
            run(tmp_path / "search", experiment(target_ms=target, target_range=None), table)
        for number in (f"{target:g}", f"{low:.4g}", f"{high:.4g}"):
            assert number in str(caught.value)
    assert not list((tmp_path / "search").iterdir())


def test_no_target(table: LatencyTable, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"search\.target_ms is not set"):
        run(tmp_path / "search", experiment(target_range=None), table)


@pytest.mark.parametrize("strategy", ["tunas", "random"])
def test_no_architecture_within_the_tolerance(strategy: str, table: LatencyTable, tmp_path: Path) -> None:
    """Said before any training."""
    with pytest.raises(TargetError, match=r"search\.tolerance"):
        run(tmp_path / "search", experiment(strategy, tolerance=1e-9), table)
    assert not list((tmp_path / "search").iterdir())


def test_table_of_another_space(table: LatencyTable, tmp_path: Path) -> None:
    other = tiny_space(width=24)
    with pytest.raises(CoverageError) as caught:
        run(tmp_path / "search", experiment(), table, space=other)
    missing = [op.key for op in other.ops if op.key not in table.entries]
    assert list(caught.value.missing) == missing
    assert missing[0] in str(caught.value)
    assert f"lacks {len(missing)} of the {len(other.ops)} ops" in str(caught.value)


def test_uncalibrated_table_is_refused(table: LatencyTable, tmp_path: Path) -> None:
    uncalibrated = table.model_copy(update={"calibration": None})
    with pytest.raises(TableError, match="allow_uncalibrated"):
        run(tmp_path / "search", experiment(), uncalibrated)
    CostModel(tiny_space(), uncalibrated, allow_uncalibrated=True)


def test_unknown_strategy_and_option(table: LatencyTable, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'tunas'"):
        run(tmp_path / "search", experiment("tunass"), table)
    with pytest.raises(ConfigError, match="rl_lr"):
        run(tmp_path / "search", experiment(strategy={"name": "tunas", "rl_lrr": 1}), table)


def test_random_architectures_cover_the_tolerance_band(table: LatencyTable) -> None:
    """Against everything there is: all of them, each once, and no other."""
    from hwnas.core.objective import AbsoluteObjective
    from hwnas.search.strategy import SearchContext

    space, cost = tiny_space(), CostModel(tiny_space(), table)
    low, high = cost.range_ms()
    for part in (0.02, 0.5, 0.97):
        target = low + part * (high - low)
        ctx = SearchContext(space, cost, AbsoluteObjective(), target, 0.02, 1, 1, lambda gates: {}, lambda gates, multiple: 0.0)
        grid = np.stack(np.meshgrid(*(np.arange(len(choice.options)) for choice in space.choices), indexing="ij"), -1)
        every = grid.reshape(-1, len(space.choices))
        expected = {tuple(row) for row in every[within_target(ctx, every)]}
        found = [tuple(space.index(picks)) for picks in random_within(ctx, len(every), np.random.default_rng(0))]
        assert len(found) == len(set(found))
        assert set(found) == expected


def test_targets_that_chance_does_not_meet() -> None:
    """Near the ends of a large space rejection finds nothing; samples are then moved to the target."""
    from hwnas.core.objective import AbsoluteObjective
    from hwnas.core.spaces import proxylessnas
    from hwnas.search.strategy import SearchContext, uniform_index
    from hwnas.testing import synthetic_table

    space = proxylessnas()
    cost = CostModel(space, synthetic_table(space))
    low, high = cost.range_ms()
    for part in (0.02, 0.97):
        target = low + part * (high - low)
        ctx = SearchContext(space, cost, AbsoluteObjective(), target, 0.005, 1, 1, lambda gates: {}, lambda gates, multiple: 0.0)
        assert not within_target(ctx, uniform_index(space, 10_000, np.random.default_rng(1))).any()
        found = [tuple(space.index(picks)) for picks in random_within(ctx, 4, np.random.default_rng(0))]
        assert len(set(found)) == 4
        assert within_target(ctx, np.array(found)).all()


def test_held_out_batches_change_with_the_step() -> None:
    """And are a function of it, of the size asked for, never larger than the split."""
    data = DataConfig.model_validate(DATA)
    train, held_out = load_images(data, "train", augment=True), load_images(data, "held_out")
    batches, again = (stage._Batches(train, held_out, data, 32, 5, 40) for _ in range(2))
    found = [batches.held_out(step, 4) for step in range(6)]
    assert all(len(y) == 128 for _, y in found)
    assert len(batches.held_out(0, 100)[1]) == len(held_out)
    for i, (x_NCHW, _) in enumerate(found):
        assert torch.equal(again.held_out(i, 4)[0], x_NCHW)
        assert not any(torch.equal(x_NCHW, other) for other, _ in found[:i])
    straight = [batches.train(step) for step in range(6)]
    assert torch.equal(again.train(4)[0], straight[4][0])
    assert torch.equal(again.train(5)[0], straight[5][0])
    assert torch.equal(again.train(2)[0], straight[2][0])
