"""``hwnas study shrink``: a space shrunk by one or more metrics, and what of its good
networks is left.

The first super-net is trained once; every metric scores its operators and goes on from
there with a shrunk super-net of its own. Folders:

    shrink-first/                      the first super-net: initial.safetensors (W0), shared.safetensors, alphas.json
    shrink-<metric>/stage-<n>/         n = 0: scored by the first super-net; n > 0: trained on the space of stage n - 1
        initial.safetensors  shared.safetensors  alphas.json      W0, W and alpha on the space of this stage
        step.json  space.json                                     scores and drops; the space that they leave
    shrink-<metric>/space.json  path.json                         what is left in the end, and all stages
    shrink/shrink.json                                            the comparison

A stage that has its step.json is over. One that was interrupted in its training goes on
from its checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hwnas.config import Experiment, ShrinkConfig
from hwnas.core.cost import CostModel
from hwnas.core.describe import format_count
from hwnas.core.space import SearchSpace
from hwnas.core.spaces import parse_space
from hwnas.document import content_sha256, read_bytes, write_atomic
from hwnas.engine import best_device
from hwnas.errors import ConfigError, SpaceError
from hwnas.nn.supernet import Supernet, make_supernet, read_supernet
from hwnas.runs import StageContext
from hwnas.search import SHRINK_METRICS, STRATEGIES
from hwnas.search.alphas import Alphas, refuse_resolutions
from hwnas.search.evaluator import EVALUATIONS, SupernetEvaluator
from hwnas.search.shrinking import (
    MetricContext,
    Scores,
    ShrinkMetric,
    operators,
    remove_operators,
    sample_children,
    select_drops,
    shrinkable,
)
from hwnas.search.stage import prepare, search_strategy
from hwnas.search.strategy import Metrics, SearchContext
from hwnas.search.supernets import SUPERNET_FILE
from hwnas.study.documents import ShrinkPath, ShrinkStep
from hwnas.study.supernets import base_step, saving_at
from hwnas.task import task_of

INITIAL = "initial.safetensors"
ALPHAS = "alphas.json"
SPACE = "space.json"
PATH = "path.json"
STEP = "step.json"


@dataclass(frozen=True)
class _Begin:
    """What a stage begins with: the super-nets W0 and W of the space before, and alpha there."""

    initial: Supernet
    trained: Supernet
    alphas: Scores


def metric(name: str) -> ShrinkMetric:
    """A metric by name. Raises ConfigError on an unknown one."""
    made: type[ShrinkMetric] = SHRINK_METRICS.get(name)
    return made()


def check(experiment: Experiment, space: SearchSpace) -> None:
    """Raise ConfigError or SpaceError where the configuration cannot shrink ``space``."""
    config, search = experiment.shrink, experiment.search
    if not task_of(experiment).studied:
        raise ConfigError(
            f"task = {experiment.task!r} has no study: shrink the space of classifiers first, and"
            " put a detector on what is left."
        )
    if not shrinkable(space):
        raise SpaceError(
            f"space {space.name} has no choice of blocks left, so nothing can be dropped: take a"
            " larger one."
        )
    if space.size <= config.until:
        raise ConfigError(
            f"shrink.until = {config.until}, but space {space.name} has {space.size} architectures"
            " already: set it lower."
        )
    strategy = STRATEGIES.get(search.strategy.name)
    found = [metric(name) for name in config.metrics]
    if not any(each.trains for each in found):
        return
    if not strategy.shares or strategy.mixes:
        raise ConfigError(
            f"strategy {search.strategy.name!r} does not train single paths of a super-net, which"
            " shrinking is about: use spos or fairnas."
        )
    search_strategy(search).check(space)
    if not space.CHAIN and set(config.operation_on) - {"node"}:
        raise ConfigError(
            f"shrink.operation_on = {list(config.operation_on)}, but an edge of space {space.name}"
            " has one input: leave it empty."
        )
    if any(each.alphas for each in found):
        refuse_resolutions(space, "magnitude")
        if search.supernet.wsbn or {search.supernet.operation_on, *config.operation_on} != {"node"}:
            raise ConfigError(
                "the metric magnitude mixes options, so an input has no one producer: set"
                " search.supernet.operation_on = 'node' and wsbn = false, leave shrink.operation_on"
                " empty, or remove that metric."
            )


def wants_alphas(config: ShrinkConfig) -> bool:
    """Whether any metric is of architecture parameters."""
    return any(metric(name).alphas for name in config.metrics)


def outputs_of_first(config: ShrinkConfig) -> list[str]:
    """The files of the first training."""
    return [INITIAL, SUPERNET_FILE, *([ALPHAS] if wants_alphas(config) else [])]


def first_sha256(experiment: Experiment) -> str:
    """Identity of what decides the first training, beside space, seed and images: what
    only scoring asks for does not.
    """
    config = experiment.shrink
    ignored = {"recalibration_images", "evaluation_images", "limits", "epochs"}
    if experiment.search.quality == "metric":  # the loss is also what a policy is rewarded by
        ignored.add("quality")
    search = experiment.search.model_dump(mode="json", exclude=ignored)
    beside = (config.alpha_lr, config.alpha_every) if wants_alphas(config) else None
    return content_sha256(
        [search, config.first_epochs, config.base_epochs, config.operation_on[:1], beside]
    )


def train_first(ctx: StageContext, space: SearchSpace) -> None:
    """Train the super-net of the whole space, which all metrics share."""
    _train(
        ctx,
        space,
        ctx.folder,
        0,
        None,
        wants_alphas(ctx.experiment.shrink),
        "training the super-net of all metrics",
    )


def run(ctx: StageContext, space: SearchSpace, name: str, first: Path | None) -> None:
    """Shrink by a metric: ``space.json`` and ``path.json``. ``first`` is the folder of
    the first training; None where none is needed.
    """
    experiment, config, found = ctx.experiment, ctx.experiment.shrink, metric(name)
    steps: list[ShrinkStep] = []
    present, dropped, refreshed = space, 0, False
    while present.size > config.until and shrinkable(present):
        number = len(steps)
        folder = ctx.folder / f"stage-{number}"
        folder.mkdir(exist_ok=True)
        if not (folder / STEP).exists():
            trained = first if number == 0 else folder
            if number > 0 and found.trains and not (folder / SUPERNET_FILE).exists():
                before = first if number == 1 else ctx.folder / f"stage-{number - 1}"
                assert before is not None
                begin = _beginning(before, found.alphas, steps[-1].refreshed)
                _train(
                    ctx,
                    present,
                    folder,
                    number,
                    begin,
                    found.alphas,
                    f"{name}: training a super-net of {format_count(present.size)}",
                )
            _score(
                ctx,
                present,
                name,
                folder,
                trained if found.trains else None,
                number,
                dropped,
                refreshed,
            )
        step = ShrinkStep.load(folder / STEP)
        steps.append(step)
        if not step.dropped:
            break
        present, dropped, refreshed = (
            parse_space(read_bytes(folder / SPACE), str(folder / SPACE)),
            dropped + len(step.dropped),
            refreshed or step.refreshed,
        )
    present.save(ctx.folder / SPACE)
    ShrinkPath(
        metric=name,
        space=space.name,
        space_sha256=space.sha256,
        seed=experiment.seed,
        base_epochs=config.base_epochs,
        steps=tuple(steps),
        shrunk_sha256=present.sha256,
    ).save(ctx.folder / PATH)


def _score(
    ctx: StageContext,
    space: SearchSpace,
    name: str,
    folder: Path,
    trained: Path | None,
    number: int,
    dropped: int,
    refreshed: bool,
) -> None:
    """Score the operators, drop the worst, and write what is left."""
    experiment, config, found = _sized(ctx.experiment, space), ctx.experiment.shrink, metric(name)
    rng = np.random.default_rng([experiment.seed, number, 2])
    context = MetricContext(space, rng, progress=ctx.progress)
    if found.samples:
        samples = (
            config.evaluated_samples
            if found.evaluates and config.evaluated_samples is not None
            else config.samples
        )
        context.children = sample_children(space, config, samples, rng)
    if trained is not None:
        context.initial = read_supernet(trained / INITIAL).to(best_device())
        context.trained = read_supernet(trained / SUPERNET_FILE).to(best_device())
        context.evaluator = SupernetEvaluator(context.trained, experiment)
        context.evaluator.keep(folder / EVALUATIONS)
        context.alphas = _read_alphas(trained) if found.alphas else {}
    scores = found.scores(context)
    gone = select_drops(space, scores, config)
    left = remove_operators(space, gone, f"{_root(space.name, name)}-{name}-{number + 1}")
    refresh = (
        config.refresh_after is not None
        and not refreshed
        and dropped + len(gone) > config.refresh_after
    )
    by_choice: dict[str, dict[str, float]] = {}
    for key, option in operators(space):
        if (key, option) in scores:
            by_choice.setdefault(key, {})[option] = scores[key, option]
    left.save(folder / SPACE)
    supernet = context.trained
    epochs = config.epochs if number else config.first_epochs
    ShrinkStep(
        size=space.size,
        epochs=epochs if found.trains else 0.0,
        operation_on=None if supernet is None else supernet.config.operation_on,
        params=(
            None if supernet is None else sum(weight.numel() for weight in supernet.parameters())
        ),
        children=len(context.children),
        scores=by_choice,
        dropped=tuple(gone),
        size_after=left.size,
        refreshed=refresh,
    ).save(folder / STEP)
    ctx.progress.info(
        f"{name}, stage {number}: {len(gone)} of {len(scores)} scored operators dropped"
        f" ({', '.join(f'{key} {option}' for key, option in gone)}; a choice's last operator stays,"
        f" and is not scored); {format_count(space.size)} architectures -> {format_count(left.size)}"
    )


def _root(space: str, name: str) -> str:
    """The name of the space that a shrunk one came from."""
    return space.rpartition(f"-{name}-")[0] or space


def _beginning(before: Path, alphas: bool, refreshed: bool) -> _Begin:
    trained = read_supernet(before / SUPERNET_FILE)
    return _Begin(
        trained if refreshed else read_supernet(before / INITIAL),
        trained,
        _read_alphas(before) if alphas else {},
    )


def _read_alphas(folder: Path) -> Scores:
    return {
        (key, option): value
        for key, values in json.loads((folder / ALPHAS).read_text()).items()
        for option, value in values.items()
    }


def _sized(experiment: Experiment, space: SearchSpace) -> Experiment:
    return experiment.model_copy(update={"data": experiment.data.at(space.resolution)})


def _train(
    ctx: StageContext,
    space: SearchSpace,
    folder: Path,
    number: int,
    begin: _Begin | None,
    with_alphas: bool,
    description: str,
) -> None:
    """Train the super-net of a stage into ``folder``, with W0 beside it, going on where it was."""
    config = ctx.experiment.shrink
    experiment = _training(ctx.experiment, space, number)
    cost = CostModel.of_macs(space)
    low, high = cost.range()
    search = SearchContext(
        space,
        cost,
        experiment.search.objective,
        (low + high) / 2,
        experiment.search.tolerance,
        0,
        experiment.search.batch_size,
    )
    search.progress = ctx.progress
    prepared = prepare(experiment, space, search, folder)
    engine, supernet = prepared.engine, prepared.evaluator.supernet
    if begin is not None:
        initial = make_supernet(space, torch.Generator().manual_seed(0), supernet.config)
        initial.copy_weights(begin.initial)
        supernet.copy_weights(begin.trained.to(engine.device))
        initial.save(folder / INITIAL)
    rng = np.random.default_rng([experiment.seed, number, 3])
    alphas = (
        Alphas(space, rng, init_std=1e-3, lr=config.alpha_lr, betas=(0.5, 0.999), weight_decay=1e-3)
        if with_alphas
        else None
    )
    if alphas is not None:
        if begin is not None:
            _carry_alphas(space, begin.alphas, alphas)
        engine.extra = {**engine.extra, "alphas": alphas}

    def step(at: int) -> Metrics:
        metrics = prepared.step(at)
        if alphas is not None and at % config.alpha_every == 0:
            held_out = search.loss(alphas.softmax())
            alphas.update(held_out)
            metrics |= {"held_out_loss": float(held_out.detach()), "entropy": alphas.entropy()}
        return metrics

    base = (
        base_step(config.base_epochs, config.first_epochs, engine.steps) if begin is None else None
    )
    engine.resume()
    engine.fit(saving_at(step, base, supernet, folder / INITIAL), ctx.progress, description)
    if alphas is not None:
        values = {
            choice.key: {
                str(option): value
                for option, value in zip(
                    choice.options, alphas.values[choice.key].tolist(), strict=True
                )
            }
            for choice in space.choices
        }
        write_atomic(
            folder / ALPHAS, (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()
        )
    supernet.save(folder / SUPERNET_FILE)
    engine.finish()


def _training(experiment: Experiment, space: SearchSpace, number: int) -> Experiment:
    """The experiment that trains the super-net of a stage: each sees other batches and paths."""
    config, search = experiment.shrink, experiment.search
    levels = config.operation_on or (search.supernet.operation_on,)
    supernet = search.supernet.model_copy(
        update={"operation_on": levels[min(number, len(levels) - 1)]}
    )
    update = {
        "epochs": config.epochs if number else config.first_epochs,
        "supernet": supernet,
        "limits": (),
    }
    return _sized(experiment, space).model_copy(
        update={
            "search": search.model_copy(update=update),
            "seed": (experiment.seed + 7919 * number) % 2**31,
        }
    )


def _carry_alphas(space: SearchSpace, before: Scores, alphas: Alphas) -> None:
    with torch.no_grad():
        for choice in space.choices:
            for position, option in enumerate(choice.options):
                alphas.values[choice.key][position] = before[choice.key, str(option)]
