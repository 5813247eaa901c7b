"""The settings of a search, checked: its strategy, its finder, its target and its limits,
and the ``SearchContext`` made of them. Nothing here builds or trains a network, unless
``search.weights`` names a trained super-net, which has to fit.
"""

from __future__ import annotations

import numpy as np

from hwnas.config import Experiment, Plugin, SearchConfig
from hwnas.core.cost import CostModel
from hwnas.core.limits import LatencyLimit, Limits
from hwnas.core.space import SearchSpace
from hwnas.core.table import LatencyTable
from hwnas.document import file_sha256, user_path
from hwnas.errors import ConfigError, SpaceError, TargetError
from hwnas.search import FINDERS, STRATEGIES, check_space
from hwnas.search.finder import Finder
from hwnas.search.proposal import sample_feasible
from hwnas.search.strategy import SearchContext, Strategy
from hwnas.search.supernet_file import supernet_path

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


def resolve_target(experiment: Experiment, cost: CostModel) -> float:
    """The budget's number in the unit of ``cost``.

    Raises SpaceError if the space has no choices, TargetError if the target is out of
    reach, and ConfigError if no target is set.
    """
    config = experiment.search
    budget = config.main_budget
    key = target_key(config)
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


def target_key(config: SearchConfig) -> str:
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
    plugin = finder_plugin(config)
    if plugin is None:
        return None
    finder: type[Finder] = FINDERS.get(plugin.name)
    return finder(plugin.options(finder.Config))  # type: ignore[call-arg]


def finder_plugin(config: SearchConfig) -> Plugin | None:
    """The finder with its options as configured, or the default of ``search_finder``."""
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
    if config.pretrained is not None:
        from hwnas.nn.pretrained import read_pretrained

        if not space.CHAIN:
            raise ConfigError(
                f"search.pretrained is for chains of blocks, and {space.name} is a space of cells:"
                " remove it."
            )
        read_pretrained(config.pretrained, config.pretrained_model, "search.pretrained")
    if config.weights is not None:
        from hwnas.search.supernets import load_trained_supernet

        # No strategy runs, so only the trained super-net has to fit.
        load_trained_supernet(config, space)
        return limits

    strategy = search_strategy(config)
    check_space(config.strategy.name, space)
    strategy.check(space)
    if strategy.shares_weights:
        from hwnas.nn.supernet import check_supernet

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
    if config.pretrained is not None and not strategy.shares_weights:
        raise ConfigError(
            f"strategy {name!r} trains networks that share no weights, and search.pretrained is for"
            " super-nets: remove it, or use a strategy with a super-net."
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
    if config.pretrained is not None:
        from hwnas.nn.pretrained import pretrained_hashes

        model = config.pretrained_model
        hashes |= pretrained_hashes(config.pretrained, model, "search.pretrained")
    if config.backbone is not None:
        hashes["backbone"] = file_sha256(supernet_path(config.backbone, "search.backbone"))
    return hashes
