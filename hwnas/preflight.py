"""What can be known to be wrong before a device is touched: asked at the start of ``hwnas run``, and of a stage for what follows it.

A profile takes minutes and a search hours; what stops the training after them should have been said before.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.search_space import SearchSpace
from hwnas.core.spaces import is_document
from hwnas.core.table import LatencyTable
from hwnas.data.inspection import check_data
from hwnas.engine import check_optimizer
from hwnas.errors import ConfigError
from hwnas.networks import architecture
from hwnas.search.stage import check_search, search_context
from hwnas.stages import configured_table
from hwnas.train.stage import backbone_file, trained_backbone


def check(experiment: Experiment, space: SearchSpace, stages: Collection[str]) -> None:
    """Check what the ``stages`` still to come need, beside what they leave each other.

    All splits of the data; budget, strategy, finder, super-net and optimiser of a search, against the table where one is named;
    architecture, optimiser and beginning of the training. Raises UserError in one sentence.
    """
    searches = "search" in stages
    if searches:
        _check_search(experiment, space)
    if "train" in stages:
        _check_training(experiment, space)
    if searches or "train" in stages:
        check_data(experiment.data, searches=searches, exact=not is_document(experiment.space.name))


def _check_search(experiment: Experiment, space: SearchSpace) -> None:
    config = experiment.search
    if config.main_budget.most is None and config.target_range is None:
        key, what = "search.target_ms", "your latency budget in milliseconds"
        if config.budget is not None:
            key, what = f"search.budget.{config.budget.FIELD}", "your budget"
        raise ConfigError(f"{key} is not set: set it to {what}, or search.target_range to 0..1.")
    check_search(experiment, space)
    if config.weights is None:
        check_optimizer(config.optimizer, "search.optimizer")
    if config.table is not None or not config.by_table:
        table = None if config.table is None else LatencyTable.load(configured_table(config.table))
        search_context(experiment, space, table)


def _check_training(experiment: Experiment, space: SearchSpace) -> None:
    config = experiment.train
    check_optimizer(config.optimizer, "train.optimizer")
    supernet = experiment.search.supernet
    proxy = supernet.proxy_width != 1.0 or supernet.proxy_depth is not None
    if config.weights == "supernet" and proxy and config.arch is None and experiment.search.weights is None:
        raise ConfigError(
            "train.weights = 'supernet' needs a super-net of full size, and search.supernet.proxy_width or proxy_depth makes it smaller: "
            "set train.weights = 'scratch'."
        )
    arch: Architecture | None = architecture(experiment, space, Path()) if config.arch is not None else None
    if config.backbone is not None and arch is not None:
        trained_backbone(config.backbone, arch)
    elif config.backbone is not None:
        backbone_file(config.backbone)
