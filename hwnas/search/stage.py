"""The search stage: a space, a table and a target in; an architecture and the
super-net's weights out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hwnas.config import Experiment, Plugin, SearchConfig
from hwnas.core.arch import Architecture, Picks
from hwnas.core.cost import UNITS, CostModel
from hwnas.core.describe import format_count
from hwnas.core.limits import LatencyLimit, Limits
from hwnas.core.metric import shown
from hwnas.core.space import SearchSpace
from hwnas.core.table import LatencyTable
from hwnas.data.images import Images, Portion, load_images
from hwnas.document import file_sha256
from hwnas.engine import Engine, check_optimizer, steps_of
from hwnas.errors import ConfigError, SpaceError, TargetError
from hwnas.nn.checkpoint import save_network
from hwnas.nn.supernet import check_supernet
from hwnas.runs import StageContext
from hwnas.search import FINDERS, STRATEGIES, check_space
from hwnas.search.comparison import compared_with
from hwnas.search.cost_counter import CountedEvaluator, CountedWeights
from hwnas.search.evaluator import EVALUATIONS, SupernetEvaluator
from hwnas.search.finder import Finder
from hwnas.search.learning import Course, Ranking, learning_of
from hwnas.search.proposal import sample_feasible
from hwnas.search.result import Candidate, SearchResult
from hwnas.search.strategy import Metrics, SearchContext, Strategy
from hwnas.search.supernets import (
    SUPERNET_FILE,
    cost_counter_of,
    supernet_of,
    trained,
    trained_supernet,
)
from hwnas.search.weights import Batches, SupernetWeights
from hwnas.stages import Stage, configured_table
from hwnas.task import task_of

TRAINED_FINDER = Plugin.model_validate(
    {
        "name": "evolution",
        "generations": 8,
        "population": 20,
        "parents": 10,
        "mutations": 10,
        "crossovers": 10,
    }
)
"""What finds architectures in a trained super-net where nothing is named: 160 are
evaluated (ours), minutes on a CPU; SPOS evaluates 1,000.
"""


def outputs(config: SearchConfig) -> list[str]:
    """The files the stage writes: the winner, the result, the winner's inherited
    weights, and the super-net where it trains one.
    """
    made: type[Strategy] = STRATEGIES.get(config.strategy.name)
    trained = [SUPERNET_FILE] if config.weights is None and made.shares else []
    return ["arch.json", "search.json", "supernet.safetensors", *trained]


def resolve_target(experiment: Experiment, cost: CostModel) -> float:
    """The budget's number, in the unit of ``cost``, checked to be within the space's reach."""
    config, budget = experiment.search, experiment.search.main_budget
    key = "search.target_ms" if config.budget is None else f"search.budget.{budget.FIELD}"
    if not cost.space.choices:
        raise SpaceError(
            f"space {cost.space.name} has no open choice, so nothing to search: train its"
            " architecture by train.arch."
        )
    low, high = cost.range()
    if budget.most is not None:
        cost.check_target(budget.most, key)
        return budget.most
    if config.target_range is not None:
        return low + config.target_range * (high - low)
    raise ConfigError(
        f"{key} is not set: set it to your budget; this space {cost.verb}"
        f" {cost.unit.shown(low, high)}{cost.source}."
    )


def search_strategy(config: SearchConfig) -> Strategy:
    """The strategy of a configuration. Raises ConfigError on an unknown name or option."""
    made: type[Strategy] = STRATEGIES.get(config.strategy.name)
    return made(config.strategy.options(made.Config))  # type: ignore[call-arg]


def search_finder(config: SearchConfig) -> Finder | None:
    """The configured finder; a short evolution where a trained super-net is used, whose
    strategy is over; else None: the strategy's own.
    """
    plugin = _finder_plugin(config)
    if plugin is None:
        return None
    made: type[Finder] = FINDERS.get(plugin.name)
    return made(plugin.options(made.Config))  # type: ignore[call-arg]


def _finder_plugin(config: SearchConfig) -> Plugin | None:
    return config.finder or (TRAINED_FINDER if config.weights is not None else None)


def search_context(
    experiment: Experiment, space: SearchSpace, table: LatencyTable | None
) -> SearchContext:
    """The budget of a search, checked: the target and every limit are within the
    space's reach, and can be met together.

    ``table`` prices a budget of latency, and is not looked at for one that is counted.

    So are the strategy's demands on space and batch, or those of ``search.weights``.
    The context has no weights and no steps yet. Raises TargetError, CoverageError,
    TableError, SpaceError or ConfigError in one sentence.
    """
    config = experiment.search
    cost = config.main_budget.cost(space, table, config.allow_uncalibrated)
    target = resolve_target(experiment, cost)
    limits = check_search(experiment, space)
    search = SearchContext(
        space, cost, config.objective, target, config.tolerance, 0, config.batch_size, limits=limits
    )
    if not sample_feasible(search, 1, np.random.default_rng(experiment.seed)):
        together = "".join(f", {each.title} <= {each.most:g}" for each in limits.compiled)
        around = f"within {100 * config.tolerance:.3g} % of {cost.unit.shown(target)}{together}"
        raise TargetError(
            f"no architecture of space {space.name} {around} was found: raise"
            f" search.tolerance{', lower the target or raise a limit' if config.limits else ''}."
        )
    return search


def check_search(experiment: Experiment, space: SearchSpace) -> Limits:
    """What a search needs beside a table of its own: limits within reach, and the
    strategy's demands on space, super-net and batch.

    Returns the limits. Raises TargetError, CoverageError, TableError, SpaceError or
    ConfigError in one sentence.
    """
    config = experiment.search
    limits = Limits(
        space, config.limits, _limit_table, allow_uncalibrated=config.allow_uncalibrated
    )
    limits.check()
    if config.backbone is not None:
        trained_supernet(config.backbone, "search.backbone")
    if config.weights is not None:
        trained(config, space)
        return limits
    strategy = search_strategy(config)
    check_space(config.strategy.name, space)
    strategy.check(space)
    if strategy.shares:
        check_supernet(space, config.supernet)
    _check_settings(experiment, strategy)
    return limits


def _limit_table(path: str) -> LatencyTable:
    return LatencyTable.load(Path(path).expanduser())


def _check_settings(experiment: Experiment, strategy: Strategy) -> None:
    """Raise ConfigError where the super-net's or the batch's settings do not fit the strategy."""
    supernet = experiment.search.supernet
    if strategy.mixes and (supernet.operation_on != "node" or supernet.wsbn):
        raise ConfigError(
            f"strategy {experiment.search.strategy.name!r} mixes options, so an input has no one"
            " producer: set search.supernet.operation_on = 'node' and wsbn = false, or use a"
            " strategy that samples paths."
        )
    if experiment.search.backbone is not None and not strategy.shares:
        raise ConfigError(
            f"strategy {experiment.search.strategy.name!r} trains networks that share no weights,"
            " so search.backbone begins nothing: remove it, or use a strategy with a super-net."
        )
    size, parts = experiment.search.batch_size, strategy.parts()
    for split, count in zip(("training", "held-out"), parts, strict=True):
        if size < 2 * count:
            raise ConfigError(
                f"strategy {experiment.search.strategy.name!r} splits a {split} batch into {count}"
                f" parts, and search.batch_size = {size} leaves less than two images for each: set"
                f" it to {2 * count} or more."
            )


def run(ctx: StageContext, space: SearchSpace, table: LatencyTable | None) -> None:
    """Search, and write the winner, the result and the weights.

    ``arch.json`` and ``supernet.safetensors`` are the winner and its inherited weights,
    ``search.json`` the result, and ``shared.safetensors`` the whole super-net, where
    this run has trained one; see ``outputs``.
    """
    config, progress = ctx.experiment.search, ctx.progress
    search = search_context(ctx.experiment, space, table)
    search.progress = progress
    experiment = sized(ctx.experiment, space)
    cost = search.cost_model
    progress.info(
        f"target {cost.unit.shown(search.target)}{cost.source}; {space.name} reaches"
        f" {cost.unit.shown(*cost.range())}"
    )
    finder = search_finder(config)
    if config.weights is not None:
        evaluator = SupernetEvaluator(trained(config, space), experiment)
        search.cost_counter = cost_counter_of(config, evaluator.supernet)
        _find(ctx, search, evaluator, finder, None)
        return

    prepared = prepare(experiment, space, search, ctx.folder)
    engine, evaluator = prepared.engine, prepared.evaluator
    if config.backbone is not None:
        progress.info(
            str(
                evaluator.supernet.load_backbone(
                    trained_supernet(config.backbone, "search.backbone")
                )
            )
        )
    engine.resume()
    begun_at, begun_with = time.monotonic(), engine.step
    engine.fit(prepared.step, progress, f"searching ({config.strategy.name})")
    if begun_with < search.steps:
        search.seconds = (time.monotonic() - begun_at) * search.steps / (search.steps - begun_with)
    evaluator.supernet.save(ctx.folder / SUPERNET_FILE)
    _find(ctx, search, evaluator, finder, prepared)
    engine.finish()


def sized(experiment: Experiment, space: SearchSpace) -> Experiment:
    """The experiment with images of the space's size, which ``space.restrict`` may have
    made smaller than the data's.
    """
    return experiment.model_copy(update={"data": experiment.data.at(space.resolution)})


@dataclass(frozen=True)
class Prepared:
    """A search that is ready to run."""

    search: SearchContext
    strategy: Strategy
    engine: Engine
    evaluator: SupernetEvaluator

    def step(self, number: int) -> Metrics:
        """One step of the strategy."""
        self.search.step, self.search.rng = (
            number,
            np.random.default_rng([self.engine.seed, number]),
        )
        return self.strategy.step(self.search)


def prepare(
    experiment: Experiment, space: SearchSpace, search: SearchContext, folder: Path
) -> Prepared:
    """Set the strategy up, and build the weights that it trains: a super-net, or
    networks of their own.
    """
    config, seed = experiment.search, experiment.seed
    train, held_out = _images(experiment), load_images(experiment.data, "held_out")
    search.steps = steps_of(config.epochs, len(train), config.batch_size)
    strategy = search_strategy(config)
    search.rng = np.random.default_rng([seed, search.steps, 1])
    strategy.setup(search)
    supernet = supernet_of(experiment, space, strategy)
    evaluator = SupernetEvaluator(supernet, experiment)
    search.cost_counter = cost_counter_of(config, supernet)
    engine = Engine(
        supernet,
        config.optimizer,
        search.steps,
        config.batch_size,
        seed,
        folder,
        criterion=evaluator.quality.criterion(config.label_smoothing),
        checkpoint_seconds=experiment.checkpoint_seconds,
    )
    batches = Batches(train, held_out, experiment.data, config.batch_size, seed, search.steps)
    weights = SupernetWeights(engine, supernet, batches, evaluator)
    search.weights, search.evaluator = (
        CountedWeights(weights, search.cost_counter),
        CountedEvaluator(evaluator, search.cost_counter),
    )
    engine.extra = {"strategy": strategy, "teacher": weights, "cost": search.cost_counter}
    return Prepared(search, strategy, engine, evaluator)


def _images(experiment: Experiment) -> Images:
    """The training images that the super-net sees."""
    images, config = load_images(experiment.data, "train", augment=True), experiment.search
    if config.data_portion * len(images) < config.batch_size:
        raise ConfigError(
            f"search.data_portion = {config.data_portion:g} leaves"
            f" {round(config.data_portion * len(images))} of {len(images)} images, less than a"
            f" batch of {config.batch_size}: raise it, or lower search.batch_size."
        )
    return Portion(images, config.data_portion) if config.data_portion < 1 else images


def _course(prepared: Prepared, config: SearchConfig) -> Course:
    """What the search has logged, its losses per cross-entropy."""
    strategy, evaluator = prepared.strategy, prepared.evaluator
    rows = prepared.engine.metrics.read()
    if evaluator.quality.of_cross_entropy:
        rows = [{**row, "loss": row["loss"] / strategy.cross_entropies(row)} for row in rows]
    return Course(
        rows,
        strategy.rate,
        evaluator.quality.loss_of_a_guess(evaluator.train.labels, config.label_smoothing),
    )


def _find(
    ctx: StageContext,
    search: SearchContext,
    evaluator: SupernetEvaluator,
    finder: Finder | None,
    trained: Prepared | None,
) -> None:
    """Architectures from trained weights: by the finder, else by the strategy; then the
    last ranking and the outputs.

    ``trained`` is None where the weights are those of another run. An architecture
    within the budget was found before the search began; it is proposed where nothing
    else is.
    """
    config, seed = ctx.experiment.search, ctx.experiment.seed
    evaluator.keep(ctx.folder / EVALUATIONS)
    assert search.cost_counter is not None
    search.evaluator = CountedEvaluator(evaluator, search.cost_counter)
    search.step, search.rng = search.steps, np.random.default_rng([seed, search.steps])
    begun_at = time.monotonic()
    if finder is not None:
        proposals = finder.find(search, config.candidates)
    else:
        assert trained is not None
        proposals = trained.strategy.propose(search, config.candidates)
    search.seconds += time.monotonic() - begun_at
    proposals = proposals or sample_feasible(search, 1, np.random.default_rng(seed))
    _conclude(
        ctx, search, evaluator, proposals, None if trained is None else _course(trained, config)
    )


def _conclude(
    ctx: StageContext,
    search: SearchContext,
    evaluator: SupernetEvaluator,
    proposals: list[Picks],
    course: Course | None,
) -> None:
    """Rank the proposals, score random architectures beside them, write the outputs,
    say what was found and whether to believe it.
    """
    config, space, progress = ctx.experiment.search, evaluator.supernet.space, ctx.progress
    name = config.strategy.name if config.weights is None else "trained super-net"
    assert search.cost_counter is not None
    evaluated = search.cost_counter.cost.evaluated
    comparison = compared_with(search, evaluator, proposals)
    progress.info(comparison.sentence)
    candidates = _ranked(search, evaluator, proposals, f"ranking {len(proposals)} proposals")
    for picks in proposals:
        search.cost_counter.count_evaluation(
            picks, config.recalibration_images + len(evaluator.held_out)
        )
    cost = search.cost_counter.cost  # the random ones below are for the report alone
    random = _ranked(
        search, evaluator, comparison.within, f"scoring {len(comparison.within)} random in budget"
    )
    anywhere = _ranked(
        search,
        evaluator,
        comparison.anywhere,
        f"scoring {len(comparison.anywhere)} random anywhere",
        evaluator.evaluate,
    )
    best = candidates[0]
    arch = space.decode(best.picks, f"{space.name}-{name.replace(' ', '-')}")
    arch.save(ctx.folder / "arch.json")
    save_network(evaluator.network(best.picks), ctx.folder / "supernet.safetensors")
    ranking = Ranking(
        metric=evaluator.quality.metric,
        proposals=[candidate.quality for candidate in candidates],
        random=[candidate.quality for candidate in random],
        images=len(evaluator.held_out),
        evaluation_images=config.evaluation_images,
        evaluated=evaluated,
        chance=evaluator.quality.of_a_guess(evaluator.held_out.labels),
        same=search.cost_model.unit.noun,
    )
    learning = learning_of(course, ranking)
    SearchResult(
        strategy=name,
        metric=evaluator.quality.metric,
        space_sha256=space.sha256,
        objective=config.objective,
        unit=search.cost_model.unit.name,
        target=search.target,
        tolerance=config.tolerance,
        reachable=search.cost_model.range(),
        table_sha256=None if search.cost_model.table is None else search.cost_model.table.sha256,
        steps=search.steps,
        seed=ctx.experiment.seed,
        finder=_finder_plugin(config),
        weights_sha256=(
            file_sha256(trained_supernet(config.weights)) if config.weights is not None else None
        ),
        cost=cost,
        learning=learning,
        candidates=tuple(candidates),
        random=tuple(random),
        random_anywhere=tuple(anywhere),
    ).save(ctx.folder / "search.json")
    progress.info(_summary(arch, best, search, evaluator.quality.metric))
    for caution in learning.cautions:
        progress.warning(str(caution))


def _ranked(
    search: SearchContext,
    evaluator: SupernetEvaluator,
    proposals: Sequence[Picks],
    description: str,
    quality_of: Callable[[Picks], float] | None = None,
) -> list[Candidate]:
    """Judge each proposal, by default on all held-out images; best reward first."""
    evaluated, metric = [], evaluator.quality.metric
    of_all = quality_of or (lambda picks: evaluator.on_all_images(evaluator.network(picks)))
    with search.progress.task(description, len(proposals)) as task:
        for picks in proposals:
            quality, predicted = of_all(picks), search.cost_model.cost(picks)
            values = {} if search.limits is None else search.limits.describe(picks)
            reward = search.reward(quality, predicted)
            evaluated.append(
                Candidate(
                    picks=picks, predicted=predicted, quality=quality, reward=reward, limits=values
                )
            )
            task.advance(note=f"{metric} {shown(metric, quality)}")
            named = ", ".join(f"{key} {option}" for key, option in picks.items())
            search.progress.debug(
                f"{search.cost_model.unit.shown(predicted)}, {metric} {shown(metric, quality)}: {named}"
            )
    return sorted(evaluated, key=lambda candidate: -candidate.reward)


def _summary(arch: Architecture, best: Candidate, search: SearchContext, metric: str) -> str:
    unit = search.cost_model.unit
    counts = {
        "macs": f"{arch.macs / 1e6:.1f} M MACs",
        "params": f"{arch.params / 1e6:.2f} M parameters",
    }
    facts = [
        (
            f"{unit.shown(best.predicted)} predicted ({best.predicted / search.target - 1:+.1%} of"
            " the target)"
        ),
        *(text for name, text in counts.items() if name != unit.name),
        f"super-net {metric} {shown(metric, best.quality)}",
    ]
    return f"found {arch.name}: {', '.join(facts)}"


class Search(Stage):
    """Searches the space, where no architecture is named."""

    name = "search"
    result = "arch.json"
    reported = ("search.json", "arch.json", "metrics.jsonl")
    estimate = "hwnas.estimate.searching:of_search"
    checked = ("search", "train")
    trains = True
    holds_out = True

    @classmethod
    def is_needed(cls, experiment: Experiment) -> bool:
        """Not where an architecture is named."""
        return experiment.train.arch is None

    @classmethod
    def check_settings(cls, experiment: Experiment, space: SearchSpace) -> None:
        """Budget, strategy, finder, super-net and optimiser, against the table where
        one is named.
        """
        config = experiment.search
        if config.main_budget.most is None and config.target_range is None:
            key, what = "search.target_ms", "your latency budget in milliseconds"
            if config.budget is not None:
                key, what = f"search.budget.{config.budget.FIELD}", "your budget"
            raise ConfigError(
                f"{key} is not set: set it to {what}, or search.target_range to 0..1."
            )
        check_search(experiment, space)
        if config.weights is None:
            check_optimizer(config.optimizer, "search.optimizer")
        if config.table is not None or not config.by_table:
            table = (
                None if config.table is None else LatencyTable.load(configured_table(config.table))
            )
            search_context(experiment, space, table)

    @property
    def outputs(self) -> list[str]:
        """The winner, the result and the weights."""
        return outputs(self.at.experiment.search)

    def inputs(self) -> dict[str, str]:
        """The space, the tables, super-nets of earlier runs, the data and the settings."""
        self.at.check_searchable()
        config = self.at.experiment.search
        found = limit_hashes(config) | (self.at.hash_of_table() if config.by_table else {})
        if config.weights is not None:
            found["super-net"] = file_sha256(trained_supernet(config.weights))
        if config.backbone is not None:
            found["backbone"] = file_sha256(trained_supernet(config.backbone, "search.backbone"))
        search_context(self.at.experiment, self.at.space, self._table())
        settings = self.at.hashes_of_config("search", "seed", *task_of(self.at.experiment).tables)
        return {"space.json": self.at.space.sha256, **found, **self.at.hashes_of_data(), **settings}

    def summary(self) -> str:
        """What trains how long, among how many, for which target."""
        config = self.at.experiment.search
        budget = config.main_budget
        if budget.most is not None:
            target = f"at {budget.most / UNITS[budget.UNIT].scale:g} {UNITS[budget.UNIT].symbol}"
        elif config.target_range is not None:
            ends = (
                "the fastest to the slowest" if config.by_table else "the smallest to the largest"
            )
            target = f"at {config.target_range:.0%} of the way from {ends}"
        else:
            key = "search.target_ms" if config.budget is None else f"search.budget.{budget.FIELD}"
            target = f"without a target yet: set {key}"
        trains = config.weights is None
        searcher = (
            f"{config.strategy.name} for {config.epochs:g} epochs"
            if trains
            else "a trained super-net"
        )
        return (
            f"{searcher} over {format_count(self.at.space.architectures)} architectures, {target}"
        )

    def run(self, ctx: StageContext) -> None:
        """Search with the table as it is now."""
        run(ctx, self.at.space, self._table())

    def _table(self) -> LatencyTable | None:
        """The table of the budget; None where it is counted."""
        return self.at.table() if self.at.experiment.search.by_table else None


def limit_hashes(config: SearchConfig) -> dict[str, str]:
    """The tables that ``search.limits`` name, as inputs of a stage."""
    return {
        f"search.limits[{i}].table": LatencyTable.load(Path(limit.table).expanduser()).sha256
        for i, limit in enumerate(config.limits)
        if isinstance(limit, LatencyLimit) and limit.table is not None
    }
