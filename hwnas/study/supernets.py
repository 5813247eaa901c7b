"""The super-nets of a study: trained as a search would train them, or taken from
earlier runs.
"""

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
from hwnas.search.searching import prepare
from hwnas.search.settings import search_context, search_strategy
from hwnas.search.strategy import Metrics
from hwnas.search.supernet_file import SUPERNET_FILE, supernet_path
from hwnas.task import task_of

EVAL_ONLY_KEYS = (
    "evaluation_images",
    "recalibration_images",
    "candidates",
    "random_samples",
    "finder",
)
"""Keys of ``search`` that do not affect the training of its super-net. ``quality`` is
not one of them: it is the reward of policies.
"""

BASE_FILE = "base.safetensors"
"""The super-net after ``study.base_epochs`` epochs."""

Step = Callable[[int], Metrics]
"""A training step: its number -> the metrics to log."""


@dataclass(frozen=True)
class TrainedSupernet:
    """The file of a trained super-net, the seed that initialised it, and the strategy
    that trained it.

    ``base`` is the file of the weights that the angle is measured from; None means the
    initial weights.
    """

    seed: int
    path: Path
    strategy: str
    base: Path | None = None


def training(experiment: Experiment, seed: int) -> Experiment:
    """The experiment that trains the super-net of ``seed``.

    Keys that only affect the evaluation of architectures afterwards are set to their
    defaults, so that a study that changes them can reuse the trained super-nets.

    A latency budget without ``search.table`` has no costs. The middle of the range of
    MACs of the space replaces it, with a tolerance that leaves strategies that follow
    their budget free to move.
    """
    defaults = {name: SearchConfig.model_fields[name].default for name in EVAL_ONLY_KEYS}
    search = experiment.search.model_copy(update=defaults)
    if search.table is None and search.by_table:
        middle = {
            "target_ms": None,
            "budget": MacsLimit(kind="macs"),
            "target_range": 0.5 if search.target_range is None else search.target_range,
            "tolerance": 0.5,
        }
        search = search.model_copy(update=middle)
    return experiment.model_copy(update={"seed": seed, "search": search})


def refuse_pretrained(config: SearchConfig) -> None:
    """Raise ConfigError if a search would start from trained weights: a study trains its
    super-nets from scratch.
    """
    for key in ("pretrained", "backbone"):
        value = getattr(config, key)
        if value is not None:
            raise ConfigError(
                f"search.{key} = {value!r} is for 'hwnas search': the super-nets of a study start"
                " from scratch; remove it."
            )


def check(experiment: Experiment, space: SearchSpace) -> None:
    """Raise ConfigError if the configuration gives no super-net that a study can use, or
    asks for an angle that its super-nets do not have.
    """
    if not task_of(experiment).studied:
        raise ConfigError(
            f"task = {experiment.task!r} cannot be studied: true accuracies are known for"
            " classifiers only."
        )
    config = experiment.search
    refuse_pretrained(config)
    if config.weights is not None:
        raise ConfigError(
            f"search.weights = {config.weights!r} is for 'hwnas search': name the folder in"
            " study.supernets."
        )
    base = experiment.study.base_epochs
    if base and experiment.study.supernets:
        raise ConfigError(
            f"study.base_epochs = {base:g}, but runs in study.supernets keep only the last weights:"
            " leave it at 0."
        )
    if base >= config.epochs:
        raise ConfigError(
            f"study.base_epochs = {base:g} is not below search.epochs = {config.epochs:g}:"
            " lower it."
        )
    if not experiment.study.supernets and not STRATEGIES.get(config.strategy.name).shares_weights:
        raise ConfigError(
            f"strategy {config.strategy.name!r} trains networks that share no weights, so there is"
            " no super-net to study: choose another."
        )
    grows = not experiment.study.supernets and bool(search_strategy(config).growth(space))
    if grows and "angle" in experiment.study.scores:
        raise ConfigError(
            f"strategy {config.strategy.name!r} initialises its super-net again as it grows, so an"
            " angle from its first weights says nothing: remove angle from study.scores."
        )


def train(ctx: StageContext, space: SearchSpace, table: LatencyTable | None) -> None:
    """Train the super-net of ``ctx.experiment`` (see ``training``) and write
    ``shared.safetensors``. An interrupted training run resumes.
    """
    experiment = ctx.experiment.model_copy(
        update={"data": ctx.experiment.data.at(space.resolution)}
    )
    search = search_context(experiment, space, table)
    search.progress = ctx.progress
    prepared = prepare(experiment, space, search, ctx.folder)
    engine = prepared.engine
    supernet = prepared.evaluator.supernet
    base = base_epochs(experiment)
    saved_at = base_step(base, experiment.search.epochs, engine.steps) if base else None
    step = saving_at(prepared.step, saved_at, supernet, ctx.folder / BASE_FILE)
    engine.resume(ctx.progress)
    engine.fit(
        step,
        ctx.progress,
        f"training a super-net ({experiment.search.strategy.name}, seed {experiment.seed})",
    )
    supernet.save(ctx.folder / SUPERNET_FILE)
    engine.finish()


def outputs(experiment: Experiment) -> list[str]:
    """The names of the files that a training run writes."""
    return [SUPERNET_FILE, BASE_FILE] if base_epochs(experiment) else [SUPERNET_FILE]


def base_epochs(experiment: Experiment) -> float:
    """``study.base_epochs``; 0 if no angle is scored."""
    return experiment.study.base_epochs if "angle" in experiment.study.scores else 0.0


def base_step(base_epochs: float, epochs: float, steps: int) -> int:
    """The first step after ``base_epochs`` of ``epochs``, in a training run of
    ``steps``.
    """
    return min(steps - 1, round(steps * base_epochs / epochs))


def saving_at(step: Step, at: int | None, supernet: GatedNetworks, path: Path) -> Step:
    """``step``, with the super-net saved to ``path`` before step ``at`` (None: never)."""

    def saving_step(number: int) -> Metrics:
        if number == at:
            supernet.save(path)
        return step(number)

    return saving_step


def earlier(folder: str) -> TrainedSupernet:
    """The super-net of the search in ``folder``. Raises ConfigError if there is none, or
    the search is not finished.
    """
    path = supernet_path(folder, "study.supernets")
    result_path = path.parent / "search.json"
    if not result_path.is_file():
        raise ConfigError(
            f"study.supernets: {path.parent} has no search.json, which holds its seed: finish that"
            " search first."
        )
    result = SearchResult.load(result_path)
    return TrainedSupernet(result.seed, path, result.strategy)
