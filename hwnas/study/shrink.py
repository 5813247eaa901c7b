"""``hwnas study shrink``: shrink a space by one or more metrics, and measure what is left
of its good networks.

The first super-net is trained once and shared. Every metric then scores its operators
and continues with its own, shrunk super-nets. Folders:

    shrink-first/               the first super-net
        initial.safetensors         its weights W0 at initialisation (or after base_epochs)
        shared.safetensors          its trained weights W
        alphas.json                 its trained architecture parameters alpha
    shrink-<metric>/stage-<n>/  round n; n = 0: scored by the first super-net
                                n > 0: by one trained on the space left by round n - 1
        initial.safetensors  shared.safetensors  alphas.json
                                    W0, W and alpha on the space of this round
        step.json                   scores and dropped operators
        space.json                  the space after the drops
    shrink-<metric>/            the result of a metric
        space.json                  the final space
        path.json                   all rounds
    shrink/shrink.json          the comparison of the metrics

A round with a step.json is finished. An interrupted training run resumes from its
checkpoint. The folders keep the name of the first release, so that an interrupted study
resumes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hwnas.config import Experiment, ShrinkConfig
from hwnas.config.decisive import decisive
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
from hwnas.search.searching import prepare
from hwnas.search.settings import search_strategy
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
from hwnas.search.strategy import Metrics, SearchContext
from hwnas.search.supernet_file import SUPERNET_FILE
from hwnas.study.documents import ShrinkPath, ShrinkStep
from hwnas.study.supernets import base_step, refuse_pretrained, saving_at
from hwnas.task import task_of

INITIAL = "initial.safetensors"
ALPHAS = "alphas.json"
SPACE = "space.json"
PATH = "path.json"
STEP = "step.json"


@dataclass(frozen=True)
class _Inherited:
    """What a round inherits from the one before: its super-nets W0 and W, and its alpha."""

    initial: Supernet
    trained: Supernet
    alphas: Scores


@dataclass(frozen=True)
class _SupernetTraining:
    """The training run of a round's super-net into ``folder``.

    ``inherited`` is None for the first super-net, which starts from random weights.
    """

    space: SearchSpace
    folder: Path
    number: int
    inherited: _Inherited | None
    with_alphas: bool
    description: str


@dataclass(frozen=True)
class _Round:
    """One round of a metric's shrinking: its number, the space that it shrinks, and its
    folder.

    ``dropped`` is the number of operators that earlier rounds have dropped.
    ``refreshed`` says whether one of them has replaced W0 by W.
    """

    metric: str
    number: int
    space: SearchSpace
    folder: Path
    dropped: int
    refreshed: bool


def metric(name: str) -> ShrinkMetric:
    """The metric of a name. Raises ConfigError if the name is unknown."""
    metric_class: type[ShrinkMetric] = SHRINK_METRICS.get(name)
    return metric_class()


def check(experiment: Experiment, space: SearchSpace) -> None:
    """Raise ConfigError or SpaceError if the configuration cannot shrink ``space``."""
    config = experiment.shrink
    search = experiment.search
    if not task_of(experiment).studied:
        raise ConfigError(
            f"task = {experiment.task!r} cannot be studied: shrink the space with a classifier"
            " first, and put a detector on the result."
        )
    refuse_pretrained(search)
    if not shrinkable(space):
        raise SpaceError(
            f"space {space.name} has no choice of blocks left, so nothing can be dropped: use a"
            " larger one."
        )
    if space.size <= config.until:
        raise ConfigError(
            f"shrink.until = {config.until}, but space {space.name} has {space.size} architectures"
            " already: set it lower."
        )

    strategy = STRATEGIES.get(search.strategy.name)
    metrics = [metric(name) for name in config.metrics]
    if not any(each.trains for each in metrics):
        return
    if not strategy.shares_weights or strategy.mixes_options:
        raise ConfigError(
            f"strategy {search.strategy.name!r} does not train single paths of a super-net, which"
            " shrinking needs: use spos or fairnas."
        )
    search_strategy(search).check(space)
    if not space.CHAIN and set(config.operation_on) - {"node"}:
        raise ConfigError(
            f"shrink.operation_on = {list(config.operation_on)}, but every edge of space"
            f" {space.name} has a single input: leave it empty."
        )
    if any(each.alphas for each in metrics):
        refuse_resolutions(space, "magnitude")
        # A mixed input is a sum over several producers, so weights or statistics of its
        # own per producer cannot be chosen.
        if search.supernet.wsbn or {search.supernet.operation_on, *config.operation_on} != {"node"}:
            raise ConfigError(
                "the metric magnitude mixes options, so an input has no single producer: set"
                " search.supernet.operation_on = 'node' and wsbn = false, leave shrink.operation_on"
                " empty, or remove that metric."
            )


def wants_alphas(config: ShrinkConfig) -> bool:
    """Whether any metric scores by architecture parameters."""
    return any(metric(name).alphas for name in config.metrics)


def outputs_of_first(config: ShrinkConfig) -> list[str]:
    """The names of the files that the first training run writes."""
    files = [INITIAL, SUPERNET_FILE]
    if wants_alphas(config):
        files.append(ALPHAS)
    return files


def first_sha256(experiment: Experiment) -> str:
    """The hash of all settings that the first training run depends on, except for the
    space, the seed and the images. Settings that only scoring uses are left out.
    """
    config = experiment.shrink
    ignored = {"recalibration_images", "evaluation_images", "limits", "epochs"}
    # The loss (quality = 'loss') is also the reward of policies, so it affects training.
    if experiment.search.quality == "metric":
        ignored.add("quality")
    search = decisive(experiment, "search", *ignored)
    alpha_settings = None
    if wants_alphas(config):
        alpha_settings = (config.alpha_lr, config.alpha_every)
    return content_sha256(
        [search, config.first_epochs, config.base_epochs, config.operation_on[:1], alpha_settings]
    )


def train_first(ctx: StageContext, space: SearchSpace) -> None:
    """Train the super-net of the whole space, which all metrics share."""
    training = _SupernetTraining(
        space=space,
        folder=ctx.folder,
        number=0,
        inherited=None,
        with_alphas=wants_alphas(ctx.experiment.shrink),
        description="training the super-net of all metrics",
    )
    _train(ctx, training)


def run(ctx: StageContext, space: SearchSpace, name: str, first: Path | None) -> None:
    """Shrink ``space`` by the metric ``name``, and write ``space.json`` and ``path.json``.

    ``first`` is the folder of the first training run; None if the metric needs none.
    """
    config = ctx.experiment.shrink
    shrink_metric = metric(name)
    steps: list[ShrinkStep] = []
    present = space
    while present.size > config.until and shrinkable(present):
        number = len(steps)
        folder = ctx.folder / f"stage-{number}"
        folder.mkdir(exist_ok=True)
        if not (folder / STEP).exists():
            current = _Round(
                metric=name,
                number=number,
                space=present,
                folder=folder,
                dropped=sum(len(step.dropped) for step in steps),
                refreshed=any(step.refreshed for step in steps),
            )
            trained = None
            if shrink_metric.trains:
                trained = first if number == 0 else folder
                if number > 0 and not (folder / SUPERNET_FILE).exists():
                    before = first if number == 1 else ctx.folder / f"stage-{number - 1}"
                    assert before is not None
                    _train_round(ctx, current, before, steps[-1].refreshed)
            _score(ctx, current, trained)
        step = ShrinkStep.load(folder / STEP)
        steps.append(step)
        # Nothing may be dropped any more (shrink.keep): a further round would be the same.
        if not step.dropped:
            break
        present = parse_space(read_bytes(folder / SPACE), str(folder / SPACE))

    present.save(ctx.folder / SPACE)
    ShrinkPath(
        metric=name,
        space=space.name,
        space_sha256=space.sha256,
        seed=ctx.experiment.seed,
        base_epochs=config.base_epochs,
        steps=tuple(steps),
        shrunk_sha256=present.sha256,
    ).save(ctx.folder / PATH)


def _train_round(ctx: StageContext, current: _Round, before: Path, refreshed: bool) -> None:
    """Train the super-net of a round from that in ``before``. ``refreshed``: W replaces
    W0.
    """
    with_alphas = metric(current.metric).alphas
    training = _SupernetTraining(
        space=current.space,
        folder=current.folder,
        number=current.number,
        inherited=_inherited(before, with_alphas, refreshed),
        with_alphas=with_alphas,
        description=f"{current.metric}: training a super-net of {format_count(current.space.size)}",
    )
    _train(ctx, training)


def _score(ctx: StageContext, current: _Round, trained: Path | None) -> None:
    """Score the operators of a round, drop the worst, and write the space that is left.

    ``trained`` is the folder of the super-net; None if the metric needs none.
    """
    experiment = _at_resolution(ctx.experiment, current.space)
    config = ctx.experiment.shrink
    shrink_metric = metric(current.metric)
    # The last number keeps this stream apart from those of alpha (3) and of the random
    # shrinkings in shrink_eval.py (4).
    rng = np.random.default_rng([experiment.seed, current.number, 2])
    context = MetricContext(current.space, rng, progress=ctx.progress)
    if shrink_metric.samples:
        samples = config.samples
        if shrink_metric.evaluates and config.evaluated_samples is not None:
            samples = config.evaluated_samples
        context.children = sample_children(current.space, config, samples, rng)
    if trained is not None:
        context.initial = read_supernet(trained / INITIAL).to(best_device())
        context.trained = read_supernet(trained / SUPERNET_FILE).to(best_device())
        context.evaluator = SupernetEvaluator(context.trained, experiment)
        # Evaluations are kept in a file, so that an interrupted scoring resumes.
        context.evaluator.keep(current.folder / EVALUATIONS)
        if shrink_metric.alphas:
            context.alphas = _read_alphas(trained)

    scores = shrink_metric.scores(context)
    drops = select_drops(current.space, scores, config)
    original = _original_name(current.space.name, current.metric)
    name = f"{original}-{current.metric}-{current.number + 1}"
    shrunk = remove_operators(current.space, drops, name)
    refreshes = (
        config.refresh_after is not None
        and not current.refreshed
        and current.dropped + len(drops) > config.refresh_after
    )
    by_choice: dict[str, dict[str, float]] = {}
    for key, option in operators(current.space):
        if (key, option) in scores:
            by_choice.setdefault(key, {})[option] = scores[key, option]

    # step.json comes last: it marks the round as finished.
    shrunk.save(current.folder / SPACE)
    operation_on = None
    params = None
    if context.trained is not None:
        operation_on = context.trained.config.operation_on
        params = sum(weight.numel() for weight in context.trained.parameters())
    epochs = 0.0
    if shrink_metric.trains:
        epochs = config.epochs if current.number else config.first_epochs
    ShrinkStep(
        size=current.space.size,
        epochs=epochs,
        operation_on=operation_on,
        params=params,
        children=len(context.children),
        scores=by_choice,
        dropped=tuple(drops),
        size_after=shrunk.size,
        refreshed=refreshes,
    ).save(current.folder / STEP)
    ctx.progress.info(
        f"{current.metric}, round {current.number}: {len(drops)} of {len(scores)} scored operators"
        f" dropped ({', '.join(f'{key} {option}' for key, option in drops)}; a choice's last"
        f" operator is kept and not scored); {format_count(current.space.size)} architectures ->"
        f" {format_count(shrunk.size)}"
    )


def _original_name(space: str, name: str) -> str:
    """The name of the space from which the metric ``name`` has shrunk ``space``."""
    return space.rpartition(f"-{name}-")[0] or space


def _inherited(before: Path, alphas: bool, refreshed: bool) -> _Inherited:
    """What is in the folder ``before`` of the previous round. ``refreshed``: W replaces
    W0.
    """
    trained = read_supernet(before / SUPERNET_FILE)
    initial = trained if refreshed else read_supernet(before / INITIAL)
    return _Inherited(initial, trained, _read_alphas(before) if alphas else {})


def _read_alphas(folder: Path) -> Scores:
    scores: Scores = {}
    for key, values in json.loads((folder / ALPHAS).read_text()).items():
        for option, value in values.items():
            scores[key, option] = value
    return scores


def _write_alphas(folder: Path, space: SearchSpace, alphas: Alphas) -> None:
    values = {}
    for choice in space.choices:
        options = map(str, choice.options)
        values[choice.key] = dict(zip(options, alphas.values[choice.key].tolist(), strict=True))
    text = json.dumps(values, indent=1, sort_keys=True) + "\n"
    write_atomic(folder / ALPHAS, text.encode())


def _at_resolution(experiment: Experiment, space: SearchSpace) -> Experiment:
    return experiment.model_copy(update={"data": experiment.data.at(space.resolution)})


def _train(ctx: StageContext, training: _SupernetTraining) -> None:
    """Train the super-net of a round and save it, together with its W0. An interrupted
    training run resumes.
    """
    config = ctx.experiment.shrink
    space = training.space
    folder = training.folder
    inherited = training.inherited
    experiment = _training_experiment(ctx.experiment, space, training.number)
    # Shrinking has no budget: half-way through the range of MACs stands in for the target
    # that a search context needs.
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
    engine = prepared.engine
    supernet = prepared.evaluator.supernet
    if inherited is not None:
        initial = make_supernet(space, torch.Generator().manual_seed(0), supernet.config)
        initial.copy_weights(inherited.initial)
        supernet.copy_weights(inherited.trained.to(engine.device))
        initial.save(folder / INITIAL)
    alphas = None
    if training.with_alphas:
        rng = np.random.default_rng([experiment.seed, training.number, 3])
        alphas = Alphas(
            space, rng, init_std=1e-3, lr=config.alpha_lr, betas=(0.5, 0.999), weight_decay=1e-3
        )
        if inherited is not None:
            _inherit_alphas(space, inherited.alphas, alphas)
        # Alphas are part of the checkpoint, or a resumed run would restart them.
        engine.extra = {**engine.extra, "alphas": alphas}

    def step(number: int) -> Metrics:
        metrics = prepared.step(number)
        if alphas is not None and number % config.alpha_every == 0:
            held_out = search.loss(alphas.softmax())
            alphas.update(held_out)
            metrics |= {"held_out_loss": float(held_out.detach()), "entropy": alphas.entropy()}
        return metrics

    # A later round inherits its W0, which is saved already.
    base = None
    if inherited is None:
        base = base_step(config.base_epochs, config.first_epochs, engine.steps)
    engine.resume(ctx.progress)
    saving_step = saving_at(step, base, supernet, folder / INITIAL)
    engine.fit(saving_step, ctx.progress, training.description)
    if alphas is not None:
        _write_alphas(folder, space, alphas)
    # Last, because this file marks the training of a round as finished.
    supernet.save(folder / SUPERNET_FILE)
    engine.finish()


def _training_experiment(experiment: Experiment, space: SearchSpace, number: int) -> Experiment:
    """The experiment that trains the super-net of round ``number``."""
    config = experiment.shrink
    levels = config.operation_on or (experiment.search.supernet.operation_on,)
    # Rounds beyond the last level stay at that level.
    level = levels[min(number, len(levels) - 1)]
    update = {
        "epochs": config.epochs if number else config.first_epochs,
        "supernet": experiment.search.supernet.model_copy(update={"operation_on": level}),
        "limits": (),
    }
    return _at_resolution(experiment, space).model_copy(
        update={
            "search": experiment.search.model_copy(update=update),
            # Another seed for each round, so that it sees other batches and paths.
            "seed": (experiment.seed + 7919 * number) % 2**31,
        }
    )


def _inherit_alphas(space: SearchSpace, before: Scores, alphas: Alphas) -> None:
    """Copy the values of the options that are still in ``space``."""
    with torch.no_grad():
        for choice in space.choices:
            for position, option in enumerate(choice.options):
                alphas.values[choice.key][position] = before[choice.key, str(option)]
