"""The work of the search stage: trains the super-net, finds and ranks architectures, and
writes the winner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hwnas.config import Experiment, SearchConfig
from hwnas.core.arch import Architecture, Picks
from hwnas.core.metric import shown
from hwnas.core.space import SearchSpace
from hwnas.core.table import LatencyTable
from hwnas.data.images import Images, Portion, load_images
from hwnas.document import file_sha256
from hwnas.engine import Engine, steps_of
from hwnas.errors import ConfigError
from hwnas.nn.checkpoint import save_network
from hwnas.nn.pretrained import load_pretrained_supernet, read_pretrained
from hwnas.runs import StageContext
from hwnas.search.cost_counter import CountedEvaluator, CountedWeights
from hwnas.search.evaluator import EVALUATIONS, SupernetEvaluator
from hwnas.search.finder import Finder
from hwnas.search.learning import Ranking, TrainingLog, learning_of
from hwnas.search.proposal import sample_feasible
from hwnas.search.random_baseline import choose_random_baseline
from hwnas.search.result import Candidate, SearchResult
from hwnas.search.settings import finder_plugin, search_context, search_finder, search_strategy
from hwnas.search.strategy import Metrics, SearchContext, Strategy
from hwnas.search.supernet_file import SUPERNET_FILE, supernet_path
from hwnas.search.supernets import cost_counter_of, load_trained_supernet, supernet_of
from hwnas.search.weights import Batches, SupernetWeights


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
    if config.pretrained is not None:
        key = "search.pretrained"
        pretrained = read_pretrained(config.pretrained, config.pretrained_model, key)
        progress.info(load_pretrained_supernet(evaluator.supernet, pretrained, key))
        note = pretrained.note(experiment.data)
        if note is not None:
            progress.info(note)
    if config.backbone is not None:
        backbone = supernet_path(config.backbone, "search.backbone")
        progress.info(str(evaluator.supernet.load_backbone(backbone)))

    # A checkpoint holds newer weights than these, so it is loaded afterwards.
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
        finder=finder_plugin(config),
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
