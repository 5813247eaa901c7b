"""The search stage end to end, on real digits and the table of a simulated device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.config import DataConfig, DeviceConfig, Experiment, ProfileConfig
from hwnas.core.arch import Architecture
from hwnas.core.cost import CostModel, latency_ms
from hwnas.core.space import MacroSpace
from hwnas.core.table import LatencyTable
from hwnas.data.images import evaluation_batches, load_images
from hwnas.devices.device import Device, connect
from hwnas.devices.session import Bench
from hwnas.engine import accuracy
from hwnas.errors import TargetError
from hwnas.experiments import experiment_space
from hwnas.nn.checkpoint import load_network
from hwnas.nn.supernet import MacroSupernet, load_supernet
from hwnas.profile.stage import profile
from hwnas.progress import Progress
from hwnas.search import STRATEGIES
from hwnas.search.proposal import is_feasible, sample_feasible
from hwnas.search.result import SearchResult
from hwnas.search.supernet_file import SUPERNET_FILE
from hwnas.search.weights import Batches
from hwnas.testing import synthetic_table
from tests.search.staging import (
    DATA,
    EVOLUTION,
    OPTIONS,
    Killed,
    Killing,
    elastic_digits_space,
    experiment,
    run,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> LatencyTable:
    """The table of a simulated device that was profiled."""
    device = Device(id="simulated", soc="none", connection="simulated")
    config = ProfileConfig(rounds=3, max_rounds=3)
    folder = tmp_path_factory.mktemp("profile")
    bench = Bench(
        device,
        connect(device),
        DeviceConfig(name="simulated"),
        lambda ops, runtime, dtype: Path("unread"),
        folder,
    )
    return profile(bench, elastic_digits_space(), config)


def test_every_strategy_is_tested_here() -> None:
    assert sorted(OPTIONS) == list(STRATEGIES)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", OPTIONS)
def test_end_to_end(strategy: str, table: LatencyTable, tmp_path: Path) -> None:
    """Only the strategy changes; what it finds is within 2 % of the target and better
    than chance.
    """
    # DARTS's second order costs 2.5 times as much
    options = {**OPTIONS[strategy], **({"order": 1} if strategy == "darts" else {})}
    run(tmp_path / "search", experiment(strategy={"name": strategy, **options}, epochs=4.0), table)
    space, cost = elastic_digits_space(), CostModel.of_table(elastic_digits_space(), table)
    result = SearchResult.load(tmp_path / "search/search.json")
    low, high = cost.range()
    assert result.target == pytest.approx((low + high) / 2)
    assert result.reachable == pytest.approx((low, high))
    assert result.table_sha256 == table.sha256
    assert result.steps == 144
    assert 1 <= len(result.candidates) <= 3
    shares = strategy != "random_standalone"  # standalone networks say nothing about others
    assert len(result.random) == len(result.random_anywhere) == (2 if shares else 0)
    assert (tmp_path / "search" / SUPERNET_FILE).exists() == shares
    for candidates in (result.candidates, result.random):
        rewards = [candidate.reward for candidate in candidates]
        assert rewards == sorted(rewards, reverse=True)
        for candidate in candidates:
            assert candidate.predicted == pytest.approx(
                latency_ms(space.decode(candidate.picks), table)
            )
            assert abs(candidate.predicted / result.target - 1) <= 0.02
            assert candidate.reward == pytest.approx(
                candidate.quality - 0.1 * abs(candidate.predicted / result.target - 1)
            )
    best = result.candidates[0]
    assert best.quality > 0.2  # of 10 classes, after four epochs
    arch = Architecture.load(tmp_path / "search/arch.json")
    assert arch.blocks == space.decode(best.picks).blocks
    network = load_network(tmp_path / "search/supernet.safetensors")
    assert network.arch.blocks == arch.blocks
    held_out = load_images(DataConfig.model_validate(DATA), "held_out")
    assert accuracy(network, evaluation_batches(held_out, 128)) == pytest.approx(
        best.quality, abs=0.01
    )
    assert not (tmp_path / "search/checkpoint.pt").exists()
    lines = (tmp_path / "search/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(144))


def resumed_bit_for_bit(
    folder: Path, config: Experiment, table: LatencyTable, kills: tuple[tuple[str, int], ...]
) -> None:
    """Compare a run that is killed where ``kills`` say, with a checkpoint at every
    step, with a run that is not killed.
    """
    run(folder / "straight", config, table)
    for where, steps in kills:
        with pytest.raises(Killed):
            run(folder / "killed", config, table, Killing(where, steps))
        assert (folder / "killed/checkpoint.pt").exists(), (where, steps)
    run(folder / "killed", config, table)
    for name in ("arch.json", "supernet.safetensors", "search.json", "metrics.jsonl"):
        assert (folder / "killed" / name).read_bytes() == (
            folder / "straight" / name
        ).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", OPTIONS)
def test_resumed_bit_for_bit(strategy: str, table: LatencyTable, tmp_path: Path) -> None:
    """Killed in warm-up, while the policy learns, and while proposals are ranked."""
    config = experiment(strategy={"name": strategy, **OPTIONS[strategy]}, epochs=0.45)
    resumed_bit_for_bit(
        tmp_path,
        config,
        table,
        (("searching", 3), ("searching", 6), ("searching", 4), ("ranking", 1)),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "supernet"),
    [
        ("darts", {"path_dropout": 0.5}),
        ("pdarts", {"path_dropout": 0.5, "dropout": 0.2}),
        ("fbnet", {"bn_track": True, "remat": False, "dropout": 0.2}),
        ("tunas", {"channels": "chunk", "path_dropout": 0.5}),
        ("spos", {"channels": "random", "sharing": "collapsed"}),
        ("spos", {"operation_on": "edge", "wsbn": True, "bn_track": True}),
        (
            "progressive_shrinking",
            {"kernels": "ofa_transform", "channels": "random", "path_dropout": 0.5},
        ),
    ],
)
def test_resumed_bit_for_bit_with_super_net_settings(
    strategy: str, supernet: dict[str, Any], table: LatencyTable, tmp_path: Path
) -> None:
    """Settings that draw random numbers within a step (dropout, channels), keep
    statistics, or have a teacher.
    """
    options = {
        **OPTIONS[strategy],
        **({"generations": 1} if strategy in ("spos", "progressive_shrinking") else {}),
    }
    config = experiment(
        strategy={"name": strategy, **options},
        epochs=0.4,
        supernet=supernet,
        candidates=1,
        random_samples=1,
    )
    resumed_bit_for_bit(tmp_path, config, table, (("searching", 3), ("searching", 8)))


def test_random_architectures_cover_the_tolerance_band(table: LatencyTable) -> None:
    """Against exhaustive search: exactly the architectures of the band, each once."""
    from hwnas.core.objective import AbsoluteObjective
    from hwnas.search.strategy import SearchContext

    space, cost = elastic_digits_space(), CostModel.of_table(elastic_digits_space(), table)
    low, high = cost.range()
    for part in (0.02, 0.5, 0.97):
        target = low + part * (high - low)
        ctx = SearchContext(space, cost, AbsoluteObjective(), target, 0.02, 1, 1)
        grid = np.stack(
            np.meshgrid(
                *(np.arange(len(choice.options)) for choice in space.choices), indexing="ij"
            ),
            -1,
        )
        all_index = grid.reshape(-1, len(space.choices))
        expected = {tuple(row) for row in all_index[is_feasible(ctx, all_index)]}
        sampled = [
            tuple(space.index(picks))
            for picks in sample_feasible(ctx, len(all_index), np.random.default_rng(0))
        ]
        assert len(sampled) == len(set(sampled))
        assert set(sampled) == expected


def test_targets_that_random_sampling_does_not_meet() -> None:
    """Near the ends of the range of a large space, rejection sampling finds nothing;
    samples are then moved to the target.
    """
    from hwnas.core.objective import AbsoluteObjective
    from hwnas.core.spaces import proxylessnas
    from hwnas.search.proposal import uniform_index
    from hwnas.search.strategy import SearchContext

    space = proxylessnas()
    cost = CostModel.of_table(space, synthetic_table(space))
    low, high = cost.range()
    for part in (0.02, 0.97):
        target = low + part * (high - low)
        ctx = SearchContext(space, cost, AbsoluteObjective(), target, 0.005, 1, 1)
        assert not is_feasible(ctx, uniform_index(space, 10_000, np.random.default_rng(1))).any()
        sampled = [
            tuple(space.index(picks)) for picks in sample_feasible(ctx, 4, np.random.default_rng(0))
        ]
        assert len(set(sampled)) == 4
        assert is_feasible(ctx, np.array(sampled)).all()


def test_held_out_batches_depend_on_the_step() -> None:
    """And on nothing else. They have the requested size, but are never larger than the
    split.
    """
    data = DataConfig.model_validate(DATA)
    train, held_out = load_images(data, "train", augment=True), load_images(data, "held_out")
    batches, again = (Batches(train, held_out, data, 32, 5, 40) for _ in range(2))
    held_out_batches = [batches.held_out(step, 4) for step in range(6)]
    assert all(len(y) == 128 for _, y in held_out_batches)
    assert len(batches.held_out(0, 100)[1]) == len(held_out)
    for i, (x_NCHW, _) in enumerate(held_out_batches):
        assert torch.equal(again.held_out(i, 4)[0], x_NCHW)
        assert not any(torch.equal(x_NCHW, earlier) for earlier, _ in held_out_batches[:i])
    straight = [batches.train(step) for step in range(6)]
    assert torch.equal(again.train(4)[0], straight[4][0])
    assert torch.equal(again.train(5)[0], straight[5][0])
    assert torch.equal(again.train(2)[0], straight[2][0])


@pytest.mark.slow
@pytest.mark.parametrize("finder", ["evolution", "nsga2", "random"])
def test_a_trained_super_net_serves_another_budget(
    finder: str, table: LatencyTable, tmp_path: Path
) -> None:
    """Only the finder runs, on the weights of the earlier run and for another target;
    nothing is trained.
    """
    run(tmp_path / "first/search", experiment("random", epochs=2.0), table)
    options = {"evolution": EVOLUTION, "nsga2": OPTIONS["fairnas"], "random": {"architectures": 6}}[
        finder
    ]
    again = experiment(
        weights=str(tmp_path / "first"), finder={"name": finder, **options}, target_range=0.3
    )
    run(tmp_path / "second/search", again, table)
    first, second = (
        SearchResult.load(tmp_path / name / "search/search.json") for name in ("first", "second")
    )
    low, high = first.reachable
    assert second.steps == 0
    assert second.target == pytest.approx(low + 0.3 * (high - low))
    assert all(
        abs(candidate.predicted / second.target - 1) <= 0.02 for candidate in second.candidates
    )
    assert not (tmp_path / "second/search/metrics.jsonl").exists()
    supernet = load_supernet(tmp_path / "first/search" / SUPERNET_FILE, elastic_digits_space())
    inherited = load_network(tmp_path / "second/search/supernet.safetensors")
    extracted = supernet.extract(second.candidates[0].picks)
    assert all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(inherited.parameters(), extracted.parameters(), strict=True)
    )


@pytest.mark.slow
def test_limits_hold_in_addition_to_the_target(table: LatencyTable, tmp_path: Path) -> None:
    """Another device's table and a limit on MACs: every candidate meets both, and the
    result has the values.
    """
    board = table.model_copy(update={"header": table.header.model_copy(update={"device": "board"})})
    board.save(tmp_path / "board.json")
    space, cost = elastic_digits_space(), CostModel.of_table(elastic_digits_space(), table)
    low, high = cost.range()
    macs = sorted(space.decode(space.sample(np.random.default_rng(i))).macs for i in range(200))
    limits = [
        {"kind": "latency", "table": str(tmp_path / "board.json"), "max_ms": (low + high) / 2},
        {"kind": "macs", "max_macs": macs[120]},
    ]
    run(tmp_path / "search", experiment("random", limits=limits), table)
    result = SearchResult.load(tmp_path / "search/search.json")
    for candidate in (*result.candidates, *result.random):
        arch = space.decode(candidate.picks)
        assert candidate.limits["macs"] == arch.macs <= macs[120]
        assert candidate.predicted <= (low + high) / 2
        assert len(candidate.limits) == 2
    with pytest.raises(
        TargetError, match=r"limit macs <= 1000 is out of reach.*search\.limits\[0\]\.max_macs"
    ):
        run(
            tmp_path / "other",
            experiment("random", limits=[{"kind": "macs", "max_macs": 1000}]),
            table,
        )


class Warnings(Progress):
    """Keeps all warnings."""

    def __init__(self) -> None:
        self.warned: list[str] = []

    def warning(self, message: str) -> None:
        self.warned.append(message)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "rate"),
    [
        ("tunas", "rl_lr"),
        ("proxylessnas", "alpha_lr"),
        ("fbnet", "theta_lr"),
        ("darts", "alpha_lr"),
        ("random", None),
    ],
)
def test_a_policy_that_has_hardly_moved_is_warned_about(
    strategy: str, rate: str | None, table: LatencyTable, tmp_path: Path
) -> None:
    """At the papers' rates, a short search ends where it began, and the warning names
    the option to raise. Random search has no policy.
    """
    progress = Warnings()
    run(
        tmp_path / "search",
        experiment(strategy, epochs=0.2, candidates=1, random_samples=0),
        table,
        progress,
    )
    # there may be another warning, as weights of seven steps may be at chance
    warned = [warning for warning in progress.warned if "the policy" in warning]
    assert len(warned) == (rate is not None)
    for warning in warned:
        assert (
            "hardly moved in 7 steps" in warning and f"raise {rate} of search.strategy" in warning
        )
        assert rate in STRATEGIES.get(strategy).Config.model_fields


@pytest.mark.slow
def test_a_policy_that_has_moved_is_not_warned_about(table: LatencyTable, tmp_path: Path) -> None:
    progress = Warnings()
    config = experiment(
        strategy={"name": "proxylessnas", "alpha_lr": 0.5, "arch_every": 1},
        epochs=0.5,
        candidates=1,
        random_samples=0,
    )
    run(tmp_path / "search", config, table, progress)
    assert not any("the policy" in warning for warning in progress.warned)


def elastic_space() -> MacroSpace:
    return MacroSpace.model_validate(
        {**elastic_digits_space().model_dump(), "resolution": 16, "resolutions": [8, 16]}
    )


@pytest.mark.slow
@pytest.mark.parametrize("resolution", [8, 16])
@pytest.mark.parametrize("strategy", ["fbnet", "darts", "random"])
def test_a_space_restricted_to_one_resolution(
    strategy: str, resolution: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Methods that mix options run on it, and images have the resolution that is left,
    even if that of the data is larger.
    """
    elastic = elastic_space()
    (tmp_path / "space.json").write_text(elastic.to_json())
    config = experiment(strategy, epochs=0.1, candidates=1, random_samples=1)
    content = {
        **config.model_dump(mode="json", by_alias=True),
        "space": {"name": str(tmp_path / "space.json"), "restrict": {"resolution": [resolution]}},
    }
    content["data"]["resolution"] = 16
    config = Experiment.model_validate(content)
    space = experiment_space(config)
    sizes: set[int] = set()
    forward = MacroSupernet.forward

    def watched(self: MacroSupernet, x_NCHW: torch.Tensor, *arguments: Any) -> torch.Tensor:
        sizes.add(x_NCHW.shape[-1])
        return forward(self, x_NCHW, *arguments)

    monkeypatch.setattr(MacroSupernet, "forward", watched)
    run(tmp_path / "search", config, synthetic_table(elastic), space=space)
    assert (
        space.resolution
        == Architecture.load(tmp_path / "search/arch.json").resolution
        == resolution
    )
    assert sizes == {resolution}


def test_a_run_with_a_trained_super_net_starts_from_its_own_resolved_configuration(
    table: LatencyTable, tmp_path: Path
) -> None:
    """A resolved configuration has every key, defaults included, even if the super-net
    was trained with another setting.
    """
    run(
        tmp_path / "first/search",
        experiment("random", epochs=0.2, supernet={"dropout": 0.2, "kernels": "ofa"}),
        table,
    )
    finder = {"name": "random", "architectures": 2}
    config = experiment(
        weights=str(tmp_path / "first"),
        finder=finder,
        supernet={"kernels": "ofa"},
        random_samples=0,
    )
    run(tmp_path / "second/search", config, table)
    resolved = Experiment.model_validate(config.model_dump(mode="json", by_alias=True))
    run(tmp_path / "third/search", resolved, table)
    assert (tmp_path / "third/search/search.json").read_bytes() == (
        tmp_path / "second/search/search.json"
    ).read_bytes()
