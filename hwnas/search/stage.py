"""The search stage.

It takes a space, a latency table and a target, and returns an architecture and the
super-net's weights.
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
from hwnas.document import file_sha256, user_path
from hwnas.engine import Engine, check_optimizer, steps_of
from hwnas.errors import ConfigError, SpaceError, TargetError
from hwnas.nn.checkpoint import save_network
from hwnas.nn.supernet import check_supernet
from hwnas.runs import StageContext
from hwnas.search import FINDERS, STRATEGIES, check_space
from hwnas.search.cost_counter import CountedEvaluator, CountedWeights
from hwnas.search.evaluator import EVALUATIONS, SupernetEvaluator
from hwnas.search.finder import Finder
from hwnas.search.learning import Ranking, TrainingLog, learning_of
from hwnas.search.proposal import sample_feasible
from hwnas.search.random_baseline import choose_random_baseline
from hwnas.search.result import Candidate, SearchResult
from hwnas.search.strategy import Metrics, SearchContext, Strategy
from hwnas.search.supernets import (
    SUPERNET_FILE,
    cost_counter_of,
    load_trained_supernet,
    supernet_of,
    supernet_path,
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
"""The default finder for a trained super-net (``search.weights``).

It evaluates 160 architectures, which takes minutes on a CPU. The number is our choice;
SPOS evaluates 1,000.
"""


def outputs(config: SearchConfig) -> list[str]:
    """The files that the stage writes: the winner, the result, the winner's inherited
    weights and, if the stage trains a super-net, the super-net.
    """
    strategy: type[Strategy] = STRATEGIES.get(config.strategy.name)
    files = ["arch.json", "search.json", "supernet.safetensors"]
    if config.weights is None and strategy.shares_weights:
        files.append(SUPERNET_FILE)
    return files


def resolve_target(experiment: Experiment, cost: CostModel) -> float:
    """The budget's number in the unit of ``cost``.

    Raises SpaceError if the space has no choices, TargetError if the target is out of
    reach, and ConfigError if no target is set.
    """
    config = experiment.search
    budget = config.main_budget
    key = _target_key(config)
    if not cost.space.choices:
        raise SpaceError(
            f"space {cost.space.name} has no choices left, so there is nothing to search: train its"
            " only architecture with train.arch."
        )
    low, high = cost.range()
    if budget.most is not None:
        cost.check_target(budget.most, key)
        return budget.most
    if config.target_range is not None:
        return low + config.target_range * (high - low)
    raise ConfigError(
        f"{key} is not set: set it to your budget; an architecture of this space {cost.verb}"
        f" {cost.unit.shown(low, high)}{cost.source}."
    )


def _target_key(config: SearchConfig) -> str:
    """The configuration key that sets the target."""
    if config.budget is None:
        return "search.target_ms"
    return f"search.budget.{config.main_budget.FIELD}"


def search_strategy(config: SearchConfig) -> Strategy:
    """The configured strategy. Raises ConfigError on an unknown name or option."""
    strategy: type[Strategy] = STRATEGIES.get(config.strategy.name)
    return strategy(config.strategy.options(strategy.Config))  # type: ignore[call-arg]


def search_finder(config: SearchConfig) -> Finder | None:
    """The finder of a search, or None if the strategy proposes architectures itself.

    A search in a trained super-net runs no strategy, so its default is
    ``TRAINED_FINDER``. Raises ConfigError on an unknown name or option.
    """
    plugin = _finder_plugin(config)
    if plugin is None:
        return None
    finder: type[Finder] = FINDERS.get(plugin.name)
    return finder(plugin.options(finder.Config))  # type: ignore[call-arg]


def _finder_plugin(config: SearchConfig) -> Plugin | None:
    if config.finder is None and config.weights is not None:
        return TRAINED_FINDER
    return config.finder


def search_context(
    experiment: Experiment, space: SearchSpace, table: LatencyTable | None
) -> SearchContext:
    """The context of a search whose settings have been checked.

    The target and every limit are within the space's reach and can be met together; the
    strategy (or ``search.weights``) fits the space and the batch size. ``table`` gives
    the costs of a latency budget; a counted budget (MACs, parameters) ignores it. The
    context has no weights and no steps yet.

    Raises TargetError, CoverageError, TableError, SpaceError or ConfigError.
    """
    config = experiment.search
    cost = config.main_budget.cost(space, table, config.allow_uncalibrated)
    target = resolve_target(experiment, cost)
    limits = check_search(experiment, space)
    search = SearchContext(
        space, cost, config.objective, target, config.tolerance, 0, config.batch_size, limits=limits
    )

    # Target and limits may each be within reach and still exclude each other, so look
    # for one architecture that meets all of them.
    if not sample_feasible(search, 1, np.random.default_rng(experiment.seed)):
        bounds = "".join(f", {limit.title} <= {limit.most:g}" for limit in limits.compiled)
        advice = "raise search.tolerance"
        if config.limits:
            advice += ", lower the target or raise a limit"
        raise TargetError(
            f"no architecture of space {space.name} was found within"
            f" {100 * config.tolerance:.3g} % of {cost.unit.shown(target)}{bounds}: {advice}."
        )
    return search


def check_search(experiment: Experiment, space: SearchSpace) -> Limits:
    """Check all settings of a search that do not depend on its latency table: that the
    limits are within reach, and that strategy, space, super-net and batch size fit.

    Returns the limits. Raises TargetError, CoverageError, TableError, SpaceError or
    ConfigError.
    """
    config = experiment.search
    limits = Limits(
        space, config.limits, _limit_table, allow_uncalibrated=config.allow_uncalibrated
    )
    limits.check()
    if config.backbone is not None:
        supernet_path(config.backbone, "search.backbone")
    if config.weights is not None:
        # No strategy runs, so only the trained super-net has to fit.
        load_trained_supernet(config, space)
        return limits

    strategy = search_strategy(config)
    check_space(config.strategy.name, space)
    strategy.check(space)
    if strategy.shares_weights:
        check_supernet(space, config.supernet)
    _check_settings(experiment, strategy)
    return limits


def _limit_table(path: str) -> LatencyTable:
    return LatencyTable.load(user_path(path, "table of search.limits"))


def _check_settings(experiment: Experiment, strategy: Strategy) -> None:
    """Raise ConfigError if the super-net's settings or the batch size do not fit the
    strategy.
    """
    config = experiment.search
    name = config.strategy.name
    if strategy.mixes_options and (config.supernet.operation_on != "node" or config.supernet.wsbn):
        raise ConfigError(
            f"strategy {name!r} mixes options, so an input has no single producer: set"
            " search.supernet.operation_on = 'node' and wsbn = false, or use a strategy that"
            " samples paths."
        )
    if config.backbone is not None and not strategy.shares_weights:
        raise ConfigError(
            f"strategy {name!r} trains networks that share no weights, so search.backbone would"
            " initialise nothing: remove it, or use a strategy with a super-net."
        )
    size = config.batch_size
    for split, count in zip(("training", "held-out"), strategy.microbatches(), strict=True):
        # Batch normalisation needs at least two images in every microbatch.
        if size < 2 * count:
            raise ConfigError(
                f"strategy {name!r} splits a {split} batch into {count} microbatches, and"
                f" search.batch_size = {size} leaves fewer than two images for each: set it to"
                f" {2 * count} or more."
            )


def run(ctx: StageContext, space: SearchSpace, table: LatencyTable | None) -> None:
    """Search, and write the winner, the result and the weights.

    ``arch.json`` and ``supernet.safetensors`` hold the winner and its inherited
    weights, ``search.json`` the result. If this run trains a super-net,
    ``shared.safetensors`` holds all of it. See ``outputs``.
    """
    config = ctx.experiment.search
    progress = ctx.progress
    search = search_context(ctx.experiment, space, table)
    search.progress = progress
    experiment = with_space_resolution(ctx.experiment, space)
    cost = search.cost_model
    progress.info(
        f"target {cost.unit.shown(search.target)}{cost.source}; {space.name} reaches"
        f" {cost.unit.shown(*cost.range())}"
    )
    finder = search_finder(config)
    if config.weights is not None:
        evaluator = SupernetEvaluator(load_trained_supernet(config, space), experiment)
        search.cost_counter = cost_counter_of(config, evaluator.supernet)
        _find(ctx, search, evaluator, finder, None)
        return

    prepared = prepare(experiment, space, search, ctx.folder)
    engine = prepared.engine
    evaluator = prepared.evaluator
    if config.backbone is not None:
        backbone = supernet_path(config.backbone, "search.backbone")
        progress.info(str(evaluator.supernet.load_backbone(backbone)))

    # A checkpoint holds newer weights than the backbone, so it is loaded afterwards.
    engine.resume(ctx.progress)
    first_step = engine.step
    start = time.monotonic()
    engine.fit(prepared.step, progress, f"searching ({config.strategy.name})")
    if first_step < search.steps:
        # A resumed search has timed only its last steps: scale to all of them.
        steps_run = search.steps - first_step
        search.seconds = (time.monotonic() - start) * search.steps / steps_run

    evaluator.supernet.save(ctx.folder / SUPERNET_FILE)
    _find(ctx, search, evaluator, finder, prepared)
    # The checkpoint goes last: a run that is killed while finding does not train again.
    engine.finish()


def with_space_resolution(experiment: Experiment, space: SearchSpace) -> Experiment:
    """The experiment with images of the space's resolution, which ``space.restrict``
    may have made smaller than that of the data.
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
        self.search.step = number
        # A generator of the step alone: a resumed search draws the same numbers.
        self.search.rng = np.random.default_rng([self.engine.seed, number])
        return self.strategy.step(self.search)


def prepare(
    experiment: Experiment, space: SearchSpace, search: SearchContext, folder: Path
) -> Prepared:
    """Set up the strategy, and build the weights that it trains: a super-net, or
    standalone networks. Fills in the missing fields of ``search``.
    """
    config = experiment.search
    seed = experiment.seed
    train = _images(experiment)
    held_out = load_images(experiment.data, "held_out")
    search.steps = steps_of(config.epochs, len(train), config.batch_size)

    strategy = search_strategy(config)
    # The 1 keeps setup apart from the steps ([seed, step]) and the finder ([seed, steps]).
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
    search.weights = CountedWeights(weights, search.cost_counter)
    search.evaluator = CountedEvaluator(evaluator, search.cost_counter)
    engine.extra = {"strategy": strategy, "teacher": weights, "cost": search.cost_counter}
    return Prepared(search, strategy, engine, evaluator)


def _images(experiment: Experiment) -> Images:
    """The training images that the super-net sees. Raises ConfigError if
    ``search.data_portion`` leaves less than one batch.
    """
    images = load_images(experiment.data, "train", augment=True)
    config = experiment.search
    if config.data_portion * len(images) < config.batch_size:
        raise ConfigError(
            f"search.data_portion = {config.data_portion:g} leaves"
            f" {round(config.data_portion * len(images))} of {len(images)} images, less than a"
            f" batch of {config.batch_size}: raise it, or lower search.batch_size."
        )
    if config.data_portion < 1:
        return Portion(images, config.data_portion)
    return images


def _training_log(prepared: Prepared, config: SearchConfig) -> TrainingLog:
    """What the search has logged. Losses that are sums of several cross-entropies are
    divided by their number, so that they compare with the loss of a guess.
    """
    strategy = prepared.strategy
    evaluator = prepared.evaluator
    rows = prepared.engine.metrics.read()
    if evaluator.quality.of_cross_entropy:
        rows = [{**row, "loss": row["loss"] / strategy.cross_entropies(row)} for row in rows]
    chance = evaluator.quality.loss_of_a_guess(evaluator.train.labels, config.label_smoothing)
    return TrainingLog(rows, strategy.rate_option, chance)


def _find(
    ctx: StageContext,
    search: SearchContext,
    evaluator: SupernetEvaluator,
    finder: Finder | None,
    trained: Prepared | None,
) -> None:
    """Propose architectures by the finder, if there is one, else by the strategy; then
    rank them and write the outputs.

    ``trained`` is None if the weights come from another run.
    """
    config = ctx.experiment.search
    seed = ctx.experiment.seed
    evaluator.keep(ctx.folder / EVALUATIONS)
    assert search.cost_counter is not None
    search.evaluator = CountedEvaluator(evaluator, search.cost_counter)
    search.step = search.steps
    search.rng = np.random.default_rng([seed, search.steps])

    start = time.monotonic()
    if finder is not None:
        proposals = finder.find(search, config.candidates)
    else:
        assert trained is not None
        proposals = trained.strategy.propose(search, config.candidates)
    search.seconds += time.monotonic() - start

    if not proposals:
        # ``search_context`` has found an architecture with the same seed, so this one
        # exists.
        proposals = sample_feasible(search, 1, np.random.default_rng(seed))
    log = None if trained is None else _training_log(trained, config)
    _conclude(ctx, search, evaluator, proposals, log)


def _conclude(
    ctx: StageContext,
    search: SearchContext,
    evaluator: SupernetEvaluator,
    proposals: list[Picks],
    log: TrainingLog | None,
) -> None:
    """Rank the proposals, score random architectures as a baseline, write the outputs,
    and report what was found and how far to trust it.
    """
    config = ctx.experiment.search
    space = evaluator.supernet.space
    progress = ctx.progress
    name = config.strategy.name if config.weights is None else "trained super-net"
    assert search.cost_counter is not None
    evaluated = search.cost_counter.cost.evaluated

    baseline = choose_random_baseline(search, evaluator, proposals)
    progress.info(baseline.sentence)
    candidates = _rank(search, evaluator, proposals, f"ranking {len(proposals)} proposals")
    images = config.recalibration_images + len(evaluator.held_out)
    for picks in proposals:
        search.cost_counter.count_evaluation(picks, images)
    # Taken here, because the random architectures below only serve the report and are
    # not part of what the search costs.
    cost = search.cost_counter.cost
    random = _rank(
        search,
        evaluator,
        baseline.within,
        f"scoring {len(baseline.within)} random architectures in the budget",
    )
    anywhere = _rank(
        search,
        evaluator,
        baseline.anywhere,
        f"scoring {len(baseline.anywhere)} random architectures in the whole space",
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
    learning = learning_of(log, ranking)

    table = search.cost_model.table
    weights_sha256 = None
    if config.weights is not None:
        weights_sha256 = file_sha256(supernet_path(config.weights))
    SearchResult(
        strategy=name,
        metric=evaluator.quality.metric,
        space_sha256=space.sha256,
        objective=config.objective,
        unit=search.cost_model.unit.name,
        target=search.target,
        tolerance=config.tolerance,
        reachable=search.cost_model.range(),
        table_sha256=None if table is None else table.sha256,
        steps=search.steps,
        seed=ctx.experiment.seed,
        finder=_finder_plugin(config),
        weights_sha256=weights_sha256,
        cost=cost,
        learning=learning,
        candidates=tuple(candidates),
        random=tuple(random),
        random_anywhere=tuple(anywhere),
    ).save(ctx.folder / "search.json")
    progress.info(_summary(arch, best, search, evaluator.quality.metric))
    for caution in learning.cautions:
        progress.warning(str(caution))


def _rank(
    search: SearchContext,
    evaluator: SupernetEvaluator,
    proposals: Sequence[Picks],
    description: str,
    quality_of: Callable[[Picks], float] | None = None,
) -> list[Candidate]:
    """Evaluate each proposal by ``quality_of`` (default: the quality on all held-out
    images), and sort them by reward, best first.
    """

    def on_all_images(picks: Picks) -> float:
        return evaluator.on_all_images(evaluator.network(picks))

    evaluate = quality_of or on_all_images
    metric = evaluator.quality.metric
    unit = search.cost_model.unit
    candidates = []
    with search.progress.task(description, len(proposals)) as task:
        for picks in proposals:
            quality = evaluate(picks)
            predicted = search.cost_model.cost(picks)
            limits = {} if search.limits is None else search.limits.describe(picks)
            reward = search.reward(quality, predicted)
            candidates.append(
                Candidate(
                    picks=picks, predicted=predicted, quality=quality, reward=reward, limits=limits
                )
            )
            quality_text = f"{metric} {shown(metric, quality)}"
            task.advance(note=quality_text)
            options = ", ".join(f"{key} {option}" for key, option in picks.items())
            search.progress.debug(f"{unit.shown(predicted)}, {quality_text}: {options}")
    return sorted(candidates, key=lambda candidate: -candidate.reward)


def _summary(arch: Architecture, best: Candidate, search: SearchContext, metric: str) -> str:
    unit = search.cost_model.unit
    deviation = best.predicted / search.target - 1
    facts = [f"{unit.shown(best.predicted)} predicted ({deviation:+.1%} of the target)"]
    # The budget's own count is the prediction above.
    if unit.name != "macs":
        facts.append(f"{arch.macs / 1e6:.1f} M MACs")
    if unit.name != "params":
        facts.append(f"{arch.params / 1e6:.2f} M parameters")
    facts.append(f"super-net {metric} {shown(metric, best.quality)}")
    return f"found {arch.name}: {', '.join(facts)}"


class Search(Stage):
    """Searches the space, unless the configuration names an architecture."""

    name = "search"
    result = "arch.json"
    reported = ("search.json", "arch.json", "metrics.jsonl")
    estimate = "hwnas.estimate.searching:of_search"
    checked = ("search", "train")
    trains = True
    holds_out = True

    @classmethod
    def is_needed(cls, experiment: Experiment) -> bool:
        """False if ``train.arch`` names an architecture."""
        return experiment.train.arch is None

    @classmethod
    def check_settings(cls, experiment: Experiment, space: SearchSpace) -> None:
        """Check budget, strategy, finder, super-net and optimiser; also the target, if
        the configuration names a table or the budget needs none.
        """
        config = experiment.search
        if config.main_budget.most is None and config.target_range is None:
            budget = "your budget"
            if config.budget is None:
                budget = "your latency budget in milliseconds"
            raise ConfigError(
                f"{_target_key(config)} is not set: set it to {budget}, or search.target_range to"
                " 0..1."
            )
        check_search(experiment, space)
        if config.weights is None:
            check_optimizer(config.optimizer, "search.optimizer")
        if config.table is not None:
            search_context(experiment, space, LatencyTable.load(configured_table(config.table)))
        elif not config.by_table:
            search_context(experiment, space, None)

    @property
    def outputs(self) -> list[str]:
        """The winner, the result and the weights."""
        return outputs(self.at.experiment.search)

    def inputs(self) -> dict[str, str]:
        """Hashes of the space, the tables, super-nets of earlier runs, the data and the
        settings, by name.
        """
        self.at.check_searchable()
        config = self.at.experiment.search
        files = limit_hashes(config) | weight_hashes(config)
        if config.by_table:
            files |= self.at.hash_of_table()
        search_context(self.at.experiment, self.at.space, self._table())  # checks the target
        data = self.at.hashes_of_data("train")
        settings = self.at.hashes_of_config("search", "seed", *task_of(self.at.experiment).tables)
        return {"space.json": self.at.space.sha256, **files, **data, **settings}

    def summary(self) -> str:
        """The strategy and its length, the size of the space, and the target."""
        config = self.at.experiment.search
        searcher = "a trained super-net"
        if config.weights is None:
            searcher = f"{config.strategy.name} for {config.epochs:g} epochs"
        architectures = format_count(self.at.space.architectures)
        return f"{searcher} over {architectures} architectures, {self._target_text()}"

    def _target_text(self) -> str:
        config = self.at.experiment.search
        budget = config.main_budget
        if budget.most is not None:
            unit = UNITS[budget.UNIT]
            return f"at {budget.most / unit.scale:g} {unit.symbol}"
        if config.target_range is not None:
            ends = "the smallest to the largest"
            if config.by_table:
                ends = "the fastest to the slowest"
            return f"at {config.target_range:.0%} of the way from {ends}"
        return f"without a target yet: set {_target_key(config)}"

    def run(self, ctx: StageContext) -> None:
        """Search with the current latency table."""
        run(ctx, self.at.space, self._table())

    def _table(self) -> LatencyTable | None:
        """The table of a latency budget; None for a counted budget."""
        if self.at.experiment.search.by_table:
            return self.at.table()
        return None


def limit_hashes(config: SearchConfig) -> dict[str, str]:
    """Hashes of the tables that ``search.limits`` name, as inputs of a stage."""
    hashes = {}
    for i, limit in enumerate(config.limits):
        if isinstance(limit, LatencyLimit) and limit.table is not None:
            table = _limit_table(limit.table)
            hashes[f"search.limits[{i}].table"] = table.sha256
    return hashes


def weight_hashes(config: SearchConfig) -> dict[str, str]:
    """Hashes of the weights of earlier runs that a search starts from, as inputs of a
    stage.
    """
    hashes = {}
    if config.weights is not None:
        hashes["super-net"] = file_sha256(supernet_path(config.weights))
    if config.backbone is not None:
        hashes["backbone"] = file_sha256(supernet_path(config.backbone, "search.backbone"))
    return hashes
