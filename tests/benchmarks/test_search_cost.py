"""What a step of every search method costs, in time and memory, against standalone
training of the same networks.

pytest tests/benchmarks/test_search_cost.py --benchmark-only -s

Batches of CIFAR-10's size (64 x 3 x 32 x 32), space mobile32, one thread. The real
strategies train a super-net on an engine; the networks that a step has sampled are then
trained on the same batch, each by its own engine, step by step in turns. Methods that
mix all options are compared with networks drawn uniformly. Ratios are medians over the
repetitions.

- *time*: the weight step (``SearchContext.train``); *whole*: a step of the strategy
  with its own updates, in the phase in which it makes them. Both are relative to the
  standalone steps of the same networks, of which FairNAS has five per step.
- TuNAS's first steps, in which its op warm-up averages all options, have their own
  rows; the paper's warm-up takes that time, so it has no limit.
- *memory*: the largest sum of live tensors, beyond those from before the step and
  including the weights' gradients, by torch's profiler; relative to the largest of
  those networks.

``test_evaluating_with_a_trained_super_net`` measures what ``search.weights`` with
evolution costs per architecture.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from hwnas.config import DataConfig, Experiment, OptimizerConfig, SupernetConfig
from hwnas.core.arch import Picks
from hwnas.core.cost import CostModel
from hwnas.core.objective import AbsoluteObjective
from hwnas.core.spaces import mobile32
from hwnas.data.images import Batch, Images, Request
from hwnas.engine import Engine
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.nn.supernet import MacroSupernet
from hwnas.search import STRATEGIES
from hwnas.search.evaluator import SupernetEvaluator
from hwnas.search.evolution import Evolution, EvolutionConfig
from hwnas.search.progressive_shrinking import largest_picks
from hwnas.search.proposal import one_hot
from hwnas.search.strategy import Gates, Metrics, SearchContext, Strategy
from hwnas.search.weights import Batches, SupernetWeights
from hwnas.testing import prepared, synthetic_table

# keeps torch's profiler from logging that it starts and stops
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

SPACE = mobile32()
BATCH, STEPS = 64, 1000
FIRST = 900
"""The first measured step: every method makes its own updates by then, and P-DARTS is
in its last stage.
"""

WARM_UP = {"architectures": 1, "warmup": 0.25, "rl_delay": 0.25}
"""TuNAS at the start: with probability 1 at step 0, and nearly 1 after it, kernel and
skip decisions average all their options.
"""


@dataclass(frozen=True)
class Method:
    """A strategy with its settings, and upper limits for its ratios."""

    title: str
    strategy: str
    options: dict[str, Any] = field(default_factory=dict)
    remat: bool = True
    first: int = FIRST
    time: float | None = None
    whole: float | None = None
    memory: float | None = None


METHODS = (
    Method("tunas", "tunas", time=1.25, memory=1.5),
    Method("tunas, op warm-up", "tunas", WARM_UP, first=0, memory=1.5),
    Method("tunas, op warm-up, not rematerialised", "tunas", WARM_UP, first=0, remat=False),
    Method("spos", "spos", time=1.25, memory=1.5),
    Method("random", "random"),
    Method("proxylessnas two-path", "proxylessnas", {"arch_every": 1}, whole=2.5),
    Method("fairnas, 5 paths", "fairnas", time=1.25),
    Method("progressive_shrinking, 4 paths, taught", "progressive_shrinking"),
    Method("fbnet", "fbnet", {"theta_every": 1}, memory=3.0),
    Method("fbnet, not rematerialised", "fbnet", {"theta_every": 1}, remat=False),
    Method("darts, first order", "darts", {"order": 1}, memory=3.0),
    Method("darts, first order, not rematerialised", "darts", {"order": 1}, remat=False),
    Method("darts, second order", "darts", {"order": 2}, memory=3.0),
    Method("pdarts, last stage", "pdarts", memory=3.0),
)


class Noise(Images):
    """Random images of CIFAR-10's shape."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x_NCHW = torch.randn(1024, 3, 32, 32, generator=generator)
        self.labels = torch.randint(0, 10, (1024,), generator=generator).numpy()
        self.names, self.resizing = tuple("0123456789"), "none"

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        index = [index for index, _ in requests]
        return self.x_NCHW[index], torch.from_numpy(self.labels[index])


def seconds(work: Callable[[], Any]) -> float:
    """The wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_bytes(work: Callable[[], Any]) -> int:
    """The peak memory of live tensors during a call, beyond that from before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(max(np.cumsum(changes), default=0))


def test_the_peak_of_a_known_case() -> None:
    """8 MB are live at once, and 4 MB of them are freed before the next 2 MB; tensors
    from before the call do not count.
    """
    megabyte = 2**20
    before = torch.zeros(3 * megabyte, dtype=torch.uint8)

    def work() -> None:
        kept = torch.zeros(4 * megabyte, dtype=torch.uint8)
        passing = torch.zeros(4 * megabyte, dtype=torch.uint8)
        del passing
        later = torch.zeros(2 * megabyte, dtype=torch.uint8)
        del kept, later

    assert peak_bytes(work) == pytest.approx(8 * megabyte, abs=4096)
    assert before.numel() == 3 * megabyte


class Timed(SupernetWeights):
    """Shared weights that keep the gates and the seconds of the last weight step."""

    gates: Sequence[Gates] = ()
    seconds = 0.0

    def train(
        self, gates: Sequence[Gates], *, split: bool, teach: bool, skip_dropout: float
    ) -> Metrics:
        start = time.perf_counter()
        metrics = super().train(gates, split=split, teach=teach, skip_dropout=skip_dropout)
        self.gates, self.seconds = gates, time.perf_counter() - start
        return metrics


class Search:
    """A search in full swing, stepped by hand."""

    def __init__(self, method: Method, folder: Path) -> None:
        strategy_class: type[Strategy] = STRATEGIES.get(method.strategy)
        self.strategy = strategy_class(strategy_class.Config(**method.options))
        cost = CostModel.of_table(SPACE, synthetic_table(SPACE))
        low, high = cost.range()
        self.ctx = SearchContext(
            SPACE, cost, AbsoluteObjective(), (low + high) / 2, 0.02, STEPS, BATCH
        )
        prepared(self.strategy, self.ctx, 0)
        self.generator = torch.Generator().manual_seed(0)
        supernet = MacroSupernet(
            SPACE, self.generator, SupernetConfig(sharing=self.strategy.sharing, remat=method.remat)
        )
        self.folder, noise = folder, Noise()
        engine, batches = (
            self.engine(supernet),
            Batches(noise, noise, DataConfig(), BATCH, 0, STEPS),
        )
        self.weights = Timed(engine, supernet, batches, SupernetEvaluator(supernet, Experiment()))
        self.ctx.weights = self.weights
        uniform = {
            choice.key: np.full(len(choice.options), 1 / len(choice.options))
            for choice in SPACE.choices
        }
        self.at(method.first)
        # now every weight has its optimiser's state
        self.weights.train([uniform], split=False, teach=False, skip_dropout=0.0)
        self.weights.remember_teacher(largest_picks(SPACE))

    def engine(self, model: torch.nn.Module) -> Engine:
        return Engine(model, OptimizerConfig(), STEPS, BATCH, 0, self.folder)

    def at(self, step: int) -> None:
        """Go to a step and load its batches."""
        self.weights.engine.step = self.ctx.step = step
        self.ctx.rng = np.random.default_rng([0, step])
        self.weights.batches.train(step)
        for multiple in (1, 4):
            self.weights.batches.held_out(step, multiple)

    def step(self) -> None:
        """The strategy's step."""
        self.strategy.step(self.ctx)

    def sampled(self) -> list[Picks]:
        """The networks of the last step's paths or, if it mixed options, one drawn
        uniformly.
        """
        if all(max(gate) == 1.0 for gates in self.weights.gates for gate in gates.values()):
            return [
                SPACE.at([int(gates[choice.key].argmax()) for choice in SPACE.choices])
                for gates in self.weights.gates
            ]
        return [SPACE.sample(self.ctx.rng)]

    def alone(self) -> Iterator[Callable[[], Any]]:
        """For each of those networks, a training step on this step's batch, after a
        first one.
        """
        x_NCHW, y = self.weights.batches.train(self.ctx.step)
        for picks in self.sampled():
            engine = self.engine(
                ClassificationNetwork(SPACE.decode(picks), generator=self.generator)
            )
            engine.step = self.ctx.step
            engine.train_step(x_NCHW, y)
            engine.optimizer.zero_grad(set_to_none=True)
            yield lambda engine=engine: engine.train_step(x_NCHW, y)


@dataclass
class Ratios:
    """Medians relative to standalone steps of the same networks, and these steps."""

    time: float
    whole: float
    memory: float
    alone_ms: float
    alone_mb: float


def measured(
    method: Method, folder: Path, repetitions: int = 5, memory_repetitions: int = 2
) -> Ratios:
    """One method, interleaved with its networks; the first repetition only warms up."""
    search = Search(method, folder)
    times, wholes, memories, alone_s, alone_mb = [], [], [], [], []
    for repetition in range(repetitions + 1):
        search.at(method.first + repetition)
        whole = seconds(search.step)
        references = [seconds(step) for step in search.alone()]
        if repetition:
            times.append(search.weights.seconds / sum(references))
            wholes.append(whole / sum(references))
            alone_s.append(statistics.mean(references))
    for repetition in range(memory_repetitions):
        search.at(method.first + repetitions + 1 + repetition)
        search.weights.engine.optimizer.zero_grad(set_to_none=True)
        peak = peak_bytes(search.step)
        references = [peak_bytes(step) for step in search.alone()]
        memories.append(peak / max(references))
        alone_mb.append(max(references) / 1e6)
    median = statistics.median
    return Ratios(
        median(times), median(wholes), median(memories), 1e3 * median(alone_s), median(alone_mb)
    )


def test_search_cost(benchmark: Any, tmp_path: Path) -> None:
    """Weight steps, whole steps and peak memory of every method, and their limits."""
    torch.set_num_threads(1)
    by_title: dict[str, Ratios] = {}

    def run() -> None:
        by_title.update({method.title: measured(method, tmp_path) for method in METHODS})

    benchmark.pedantic(run, rounds=1, iterations=1)
    print(f"\n{'':42}{'time':>8}{'whole':>8}{'memory':>8}{'alone, ms':>12}{'alone, MB':>12}")
    missed = []
    for method in METHODS:
        ratios = by_title[method.title]
        print(
            f"{method.title:42}{ratios.time:8.2f}{ratios.whole:8.2f}{ratios.memory:8.2f}{ratios.alone_ms:12.0f}{ratios.alone_mb:12.1f}"
        )
        bars = (("time", method.time), ("whole", method.whole), ("memory", method.memory))
        missed += [
            f"{method.title}: {name} {getattr(ratios, name):.2f}, bar {bar}"
            for name, bar in bars
            if bar and getattr(ratios, name) > bar
        ]
    assert not missed, "; ".join(missed)
    for name in ("fbnet", "darts, first order", "tunas, op warm-up"):
        assert by_title[name].memory < by_title[f"{name}, not rematerialised"].memory


def test_evaluating_with_a_trained_super_net(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds per evaluated architecture: recalibration on 1,024 images and evaluation
    on 1,000 held-out ones by default, or a quarter of both.
    """
    torch.set_num_threads(1)
    held_out, train = Noise(), Noise()
    monkeypatch.setattr(
        "hwnas.search.evaluator.load_images",
        lambda data, split: held_out if split == "held_out" else train,
    )
    supernet = MacroSupernet(SPACE, torch.Generator().manual_seed(0))
    cost = CostModel.of_table(SPACE, synthetic_table(SPACE))
    low, high = cost.range()
    settings = {
        "defaults": {},
        "a quarter of the images": {"recalibration_images": 256, "evaluation_images": 256},
    }
    by_title: dict[str, tuple[int, float]] = {}

    def run() -> None:
        for title, images in settings.items():
            evaluator = SupernetEvaluator(supernet, Experiment.model_validate({"search": images}))
            ctx = SearchContext(
                SPACE,
                cost,
                AbsoluteObjective(),
                (low + high) / 2,
                0.02,
                0,
                BATCH,
                evaluator=evaluator,
            )
            evaluator.keep(tmp_path / title)
            evolution = Evolution(
                EvolutionConfig(generations=2, population=4, parents=2, mutations=2, crossovers=2)
            )
            spent = seconds(lambda evolution=evolution, ctx=ctx: evolution.find(ctx, 1))
            evaluated = (tmp_path / title).read_bytes().count(b"\n")
            by_title[title] = (evaluated, spent / evaluated)

    benchmark.pedantic(run, rounds=1, iterations=1)
    for title, (evaluated, seconds_each) in by_title.items():
        print(
            f"\n{title}: {seconds_each:.2f} s each for {evaluated}; the 1,000 of evolution's defaults take"
            f" {1000 * seconds_each / 60:.0f} minutes"
        )
    assert by_title["a quarter of the images"][1] < by_title["defaults"][1]


def test_super_net_steps_against_standalone_steps(benchmark: Any) -> None:
    """The same eight architectures, interleaved; only forward and backward passes."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    supernet: Any = MacroSupernet(SPACE, generator)
    supernet = supernet.to(memory_format=torch.channels_last)
    picks = [SPACE.sample(rng) for _ in range(8)]
    standalone: list[Any] = [
        ClassificationNetwork(SPACE.decode(row), generator=generator) for row in picks
    ]
    standalone = [network.to(memory_format=torch.channels_last) for network in standalone]
    x_NCHW = torch.randn(BATCH, 3, 32, 32, generator=generator).contiguous(
        memory_format=torch.channels_last
    )
    y = torch.randint(0, 10, (BATCH,), generator=generator)

    def step(module: Any, *gates: Any) -> None:
        module.zero_grad(set_to_none=True)
        F.cross_entropy(module(x_NCHW, *gates), y).backward()

    def ratio() -> float:
        shared = sum(seconds(lambda row=row: step(supernet, one_hot(row, SPACE))) for row in picks)
        return shared / sum(
            seconds(lambda network=network: step(network)) for network in standalone
        )

    ratio()
    ratios = [ratio() for _ in range(5)]
    benchmark.pedantic(lambda: step(supernet, one_hot(picks[0], SPACE)), rounds=3)
    print(
        f"\nsuper-net step / standalone step: median {statistics.median(ratios):.2f},"
        f" {min(ratios):.2f} to {max(ratios):.2f}"
    )
