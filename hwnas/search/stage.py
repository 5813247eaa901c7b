"""The search stage: a space, a table and a target in; an architecture and the super-net's weights out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from hwnas.config import DataConfig, Experiment
from hwnas.core.arch import Architecture, Picks
from hwnas.core.cost import CostModel
from hwnas.core.objective import Objective
from hwnas.core.space import MacroSpace
from hwnas.core.table import LatencyTable
from hwnas.data.images import Batch, Images, evaluation_batches, load_images, training_batches
from hwnas.document import Document
from hwnas.engine import Engine, accuracy, steps_of
from hwnas.errors import ConfigError, SpaceError, TargetError
from hwnas.nn.bn import recalibrate
from hwnas.nn.network import Network, save_network
from hwnas.nn.supernet import Supernet
from hwnas.progress import Progress
from hwnas.runs import StageContext
from hwnas.search import STRATEGIES
from hwnas.search.strategy import Metrics, SearchContext, Strategy, random_within


class Candidate(BaseModel):
    """An architecture judged by the super-net: recalibrated held-out accuracy and predicted latency."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    picks: Picks
    latency_ms: float
    accuracy: float
    reward: float


class SearchResult(Document):
    """What a search found. ``candidates`` are the strategy's proposals, best reward first.

    For comparison, ``random`` are random architectures within the budget, and ``spread`` over the whole space.
    """

    SCHEMA: ClassVar[str] = "hwnas.search"

    strategy: str
    space_sha256: str
    objective: Objective
    target_ms: float
    tolerance: float
    reachable_ms: tuple[float, float]
    table_sha256: str
    steps: int
    seed: int
    candidates: tuple[Candidate, ...] = Field(min_length=1)
    random: tuple[Candidate, ...] = ()
    spread: tuple[Candidate, ...] = ()


OUTPUTS = ["arch.json", "search.json", "supernet.safetensors"]


def resolve_target(experiment: Experiment, cost: CostModel) -> float:
    """The latency budget in milliseconds, checked to be within the space's reach."""
    config = experiment.search
    if not cost.space.choices:
        raise SpaceError(f"space {cost.space.name} has no open choice, so nothing to search: train its architecture by train.arch.")
    low, high = cost.range_ms()
    if config.target_ms is not None:
        cost.check_target(config.target_ms)
        return config.target_ms
    if config.target_range is not None:
        return low + config.target_range * (high - low)
    raise ConfigError(
        f"search.target_ms is not set: set it to your budget; this space takes {low:.4g} to {high:.4g} ms on {cost.table.title}."
    )


def run(ctx: StageContext, space: MacroSpace, table: LatencyTable) -> None:
    """Search and write ``arch.json``, ``search.json`` and ``supernet.safetensors`` (the winner with the super-net's weights)."""
    config, seed, progress = ctx.experiment.search, ctx.experiment.seed, ctx.progress
    cost = CostModel(space, table, allow_uncalibrated=config.allow_uncalibrated)
    target_ms = resolve_target(ctx.experiment, cost)
    strategy_class = STRATEGIES.get(config.strategy.name)
    strategy: Strategy = strategy_class(config.strategy.options(strategy_class.Config))
    train, held_out = load_images(ctx.experiment.data, "train", augment=True), load_images(ctx.experiment.data, "held_out")
    steps = steps_of(config.epochs, len(train), config.batch_size)

    supernet = Supernet(space, torch.Generator().manual_seed(seed))
    engine = Engine(
        supernet,
        config.optimizer,
        steps,
        config.batch_size,
        seed,
        ctx.folder,
        label_smoothing=config.label_smoothing,
        checkpoint_seconds=ctx.experiment.checkpoint_seconds,
        extra={"strategy": strategy},
    )
    batches = _Batches(train, held_out, ctx.experiment.data, config.batch_size, seed, steps)

    def quality(gates: Mapping[str, Any], multiple: int) -> float:
        return _batch_accuracy(engine, batches.held_out(search.step, multiple), gates)

    def train_step(gates: Mapping[str, Any]) -> Metrics:
        return engine.weight_step(*batches.train(search.step), gates)

    search = SearchContext(space, cost, config.objective, target_ms, config.tolerance, steps, config.batch_size, train_step, quality)
    if not random_within(search, 1, np.random.default_rng(seed)):
        raise TargetError(
            f"no architecture of space {space.name} within {config.tolerance:.2g} of {target_ms:.4g} ms was found: raise search.tolerance."
        )
    strategy.setup(search)
    engine.resume()

    def step(number: int) -> Metrics:
        search.step, search.rng = number, np.random.default_rng([seed, number])
        return strategy.step(search)

    progress.say(
        f"target {target_ms:.4g} ms on {table.title}; {space.name} reaches {cost.range_ms()[0]:.4g} to {cost.range_ms()[1]:.4g} ms"
    )
    engine.fit(step, progress, f"searching ({config.strategy.name})")

    search.rng = np.random.default_rng([seed, steps])
    judge = _Judge(supernet, search, ctx.experiment)
    candidates = judge.rank(strategy.propose(search, config.candidates), progress, "ranking proposals")
    random = judge.rank(random_within(search, config.random_samples, search.rng), progress, "scoring random architectures in the budget")
    anywhere = [space.sample(search.rng) for _ in range(config.random_samples)]
    spread = judge.rank(anywhere, progress, "scoring random architectures anywhere")
    best = candidates[0]
    arch = space.decode(best.picks, f"{space.name}-{config.strategy.name}")
    arch.save(ctx.folder / "arch.json")
    save_network(judge.network(best.picks), ctx.folder / "supernet.safetensors")
    SearchResult(
        strategy=config.strategy.name,
        space_sha256=space.sha256,
        objective=config.objective,
        target_ms=target_ms,
        tolerance=config.tolerance,
        reachable_ms=cost.range_ms(),
        table_sha256=table.sha256,
        steps=steps,
        seed=seed,
        candidates=tuple(candidates),
        random=tuple(random),
        spread=tuple(spread),
    ).save(ctx.folder / "search.json")
    engine.finish()
    progress.say(_summary(arch, best, target_ms))


def _summary(arch: Architecture, best: Candidate, target_ms: float) -> str:
    return (
        f"found {arch.name}: {best.latency_ms:.4g} ms predicted ({best.latency_ms / target_ms - 1:+.1%} of the target), "
        f"{arch.macs / 1e6:.1f} M MACs, {arch.params / 1e6:.2f} M parameters, super-net accuracy {best.accuracy:.1%}"
    )


class _Batches:
    """Training and held-out batches of a step. All are functions of the step, so a resumed search sees the same ones."""

    def __init__(self, train: Images, held_out: Images, data: DataConfig, batch_size: int, seed: int, steps: int) -> None:
        self.train_images, self.held_out_images, self.data = train, held_out, data
        self.batch_size, self.seed, self.steps = batch_size, seed, steps
        self._streams: dict[int, tuple[int, Iterator[Batch]]] = {}

    def train(self, step: int) -> Batch:
        """The training batch of a step."""
        return self._next(0, self.train_images, self.batch_size, self.seed, step)

    def held_out(self, step: int, multiple: int) -> Batch:
        """The held-out batch of a step, ``multiple`` times as large as a training batch."""
        size = min(self.batch_size * multiple, len(self.held_out_images))
        return self._next(multiple, self.held_out_images, size, self.seed + 1, step)

    def _next(self, name: int, images: Images, size: int, seed: int, step: int) -> Batch:
        """The batch of a step from a stream that consecutive steps share."""
        position, stream = self._streams.get(name, (-1, iter(())))
        if position != step:
            stream = training_batches(images, size, seed=seed, first=step, last=self.steps, workers=self.data.workers)
        batch = next(stream)
        self._streams[name] = (step + 1, stream)
        return batch


@torch.no_grad()
def _batch_accuracy(engine: Engine, batch: Batch, gates: Mapping[str, Any]) -> float:
    x_NCHW, y = engine.to_device(*batch)
    with engine.autocast():
        logits = engine.model(x_NCHW, gates)
    return float((logits.argmax(1) == y).float().mean())


class _Judge:
    """Ranks architectures by the accuracy of their extracted, BN-recalibrated networks on all held-out images."""

    def __init__(self, supernet: Supernet, search: SearchContext, experiment: Experiment) -> None:
        self.supernet, self.search, self.config, self.workers = supernet, search, experiment.search, experiment.data.workers
        self.train, self.held_out = load_images(experiment.data, "train"), load_images(experiment.data, "held_out")

    def network(self, picks: Picks) -> Network:
        """The network of ``picks`` with the super-net's weights and re-estimated BN statistics."""
        network = self.supernet.extract(picks)
        device = next(network.parameters()).device
        network.to(memory_format=torch.channels_last)
        batches = evaluation_batches(self.train, self.config.batch_size, limit=self.config.recalibration_images, workers=self.workers)
        recalibrate(network, (x_NCHW.to(device, memory_format=torch.channels_last) for x_NCHW, _ in batches))
        return network

    def rank(self, proposals: list[Picks], progress: Progress, description: str) -> list[Candidate]:
        """Judge each proposal; best reward first."""
        judged = []
        with progress.task(description, len(proposals)) as task:
            for picks in proposals:
                held_out = evaluation_batches(self.held_out, 4 * self.config.batch_size, workers=self.workers)
                quality = accuracy(self.network(picks), held_out)
                latency = self.search.cost.latency_ms(picks)
                judged.append(Candidate(picks=picks, latency_ms=latency, accuracy=quality, reward=self.search.reward(quality, latency)))
                task.advance(note=f"accuracy {quality:.1%}")
                progress.detail(
                    f"{latency:.4g} ms, accuracy {quality:.1%}: {', '.join(f'{key} {option}' for key, option in picks.items())}"
                )
        return sorted(judged, key=lambda candidate: -candidate.reward)
