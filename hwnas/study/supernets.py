"""The super-nets of a study: trained as a search would train them, or taken from earlier runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hwnas.config import Experiment, SearchConfig
from hwnas.core.limits import MacsLimit
from hwnas.core.space import SearchSpace
from hwnas.core.table import LatencyTable
from hwnas.errors import ConfigError
from hwnas.nn.shared import GatedNetworks
from hwnas.runs import StageContext
from hwnas.search import STRATEGIES
from hwnas.search.result import SearchResult
from hwnas.search.stage import prepare, search_context, search_strategy
from hwnas.search.strategy import Metrics
from hwnas.search.supernets import SUPERNET_FILE, trained_supernet
from hwnas.task import task_of

EVAL_ONLY_KEYS = (
    "evaluation_images",
    "recalibration_images",
    "candidates",
    "random_samples",
    "finder",
)
"""Settings of a search that its super-net's training has nothing to do with.
``quality`` is none of them: policies are rewarded by it.
"""

BASE_FILE = "base.safetensors"
"""The super-net as it was after ``study.base_epochs``."""

Step = Callable[[int], Metrics]
"""What an engine fits: the number of a step -> what it logs."""


@dataclass(frozen=True)
class Trained:
    """The file of a trained super-net, the seed that initialised it, and the strategy
    that trained it.

    ``base`` is the file of the weights that the angle is from; None: those of the initialisation.
    """

    seed: int
    path: Path
    strategy: str
    base: Path | None = None


def training(experiment: Experiment, seed: int) -> Experiment:
    """The experiment that trains the super-net of ``seed``.

    A budget of latency without ``search.table`` has no prices: half-way through the
    MACs of the space is taken instead, within which strategies that steer by their
    budget are free to go where they like. What only says how architectures are evaluated
    afterwards is as by default, so that a study of other settings takes over the
    super-nets that are there.
    """
    search = experiment.search.model_copy(
        update={name: SearchConfig.model_fields[name].default for name in EVAL_ONLY_KEYS}
    )
    if search.table is None and search.by_table:
        place = 0.5 if search.target_range is None else search.target_range
        middle = {
            "target_ms": None,
            "budget": MacsLimit(kind="macs"),
            "target_range": place,
            "tolerance": 0.5,
        }
        search = search.model_copy(update=middle)
    return experiment.model_copy(update={"seed": seed, "search": search})


def check(experiment: Experiment, space: SearchSpace) -> None:
    """Raise ConfigError where the configuration names no super-net that a study can
    use, or none with an angle.
    """
    if not task_of(experiment).studied:
        raise ConfigError(
            f"task = {experiment.task!r} has no study: the accuracies that are known are those of"
            " classifiers."
        )
    config = experiment.search
    if config.weights is not None:
        raise ConfigError(
            f"search.weights = {config.weights!r} is for 'hwnas search': name the folder in"
            " study.supernets."
        )
    base = experiment.study.base_epochs
    if base and experiment.study.supernets:
        raise ConfigError(
            f"study.base_epochs = {base:g}, but only the last weights of study.supernets are there:"
            " leave it at 0."
        )
    if base >= config.epochs:
        raise ConfigError(
            f"study.base_epochs = {base:g} is no part of search.epochs = {config.epochs:g}:"
            " lower it."
        )
    if not experiment.study.supernets and not STRATEGIES.get(config.strategy.name).shares:
        raise ConfigError(
            f"strategy {config.strategy.name!r} trains networks that share no weights, so there is"
            " no super-net to study: choose another."
        )
    grows = not experiment.study.supernets and bool(search_strategy(config).growth(space))
    if grows and "angle" in experiment.study.scores:
        raise ConfigError(
            f"strategy {config.strategy.name!r} begins its super-net anew as it grows, so an angle"
            " from its first weights says nothing: remove angle from study.scores."
        )


def train(ctx: StageContext, space: SearchSpace, table: LatencyTable | None) -> None:
    """Train the super-net of ``ctx.experiment`` (see ``training``) into
    ``shared.safetensors``, going on where it was.
    """
    experiment = ctx.experiment.model_copy(
        update={"data": ctx.experiment.data.at(space.resolution)}
    )
    search = search_context(experiment, space, table)
    search.progress = ctx.progress
    prepared = prepare(experiment, space, search, ctx.folder)
    engine, supernet = prepared.engine, prepared.evaluator.supernet
    base = base_epochs(experiment)
    at = base_step(base, experiment.search.epochs, engine.steps) if base else None
    step = saving_at(prepared.step, at, supernet, ctx.folder / BASE_FILE)
    engine.resume()
    engine.fit(
        step,
        ctx.progress,
        f"training a super-net ({experiment.search.strategy.name}, seed {experiment.seed})",
    )
    supernet.save(ctx.folder / SUPERNET_FILE)
    engine.finish()


def outputs(experiment: Experiment) -> list[str]:
    """The files of a training."""
    return [SUPERNET_FILE, *([BASE_FILE] if base_epochs(experiment) else [])]


def base_epochs(experiment: Experiment) -> float:
    """``study.base_epochs``, where an angle is asked for."""
    return experiment.study.base_epochs if "angle" in experiment.study.scores else 0.0


def base_step(base_epochs: float, epochs: float, steps: int) -> int:
    """The step before which ``base_epochs`` of ``epochs`` are over."""
    return min(steps - 1, round(steps * base_epochs / epochs))


def saving_at(step: Step, at: int | None, supernet: GatedNetworks, path: Path) -> Step:
    """A training's steps, with the super-net saved before step ``at``."""

    def saving(number: int) -> Metrics:
        if number == at:
            supernet.save(path)
        return step(number)

    return saving


def earlier(folder: str) -> Trained:
    """The super-net of an earlier run's search. Raises ConfigError where there is none,
    or none that is finished.
    """
    path = trained_supernet(folder, "study.supernets")
    result = path.parent / "search.json"
    if not result.is_file():
        raise ConfigError(
            f"study.supernets: {path.parent} has no search.json, which says its seed: finish that"
            " search first."
        )
    found = SearchResult.load(result)
    return Trained(found.seed, path, found.strategy)
