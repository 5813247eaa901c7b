"""The search stage.

It takes a space, a latency table and a target, and returns an architecture and the
super-net's weights.
"""

from __future__ import annotations

from hwnas.config import Experiment, SearchConfig
from hwnas.core.cost import UNITS
from hwnas.core.describe import format_count
from hwnas.core.search_space import SearchSpace
from hwnas.core.table import LatencyTable
from hwnas.errors import ConfigError
from hwnas.runs import StageContext
from hwnas.search import STRATEGIES
from hwnas.search.settings import (
    check_search,
    limit_hashes,
    search_context,
    target_key,
    weight_hashes,
)
from hwnas.search.strategy import Strategy
from hwnas.search.supernet_file import SUPERNET_FILE
from hwnas.stages import Stage, configured_table
from hwnas.task import task_of


def outputs(config: SearchConfig) -> list[str]:
    """The files that the stage writes: the winner, the result, the winner's inherited
    weights and, if the stage trains a super-net, the super-net.
    """
    strategy: type[Strategy] = STRATEGIES.get(config.strategy.name)
    files = ["arch.json", "search.json", "supernet.safetensors"]
    if config.weights is None and strategy.shares_weights:
        files.append(SUPERNET_FILE)
    return files


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
                f"{target_key(config)} is not set: set it to {budget}, or search.target_range to"
                " 0..1."
            )
        check_search(experiment, space)
        if config.weights is None:
            from hwnas.engine import check_optimizer

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
        return f"without a target yet: set {target_key(config)}"

    def run(self, ctx: StageContext) -> None:
        """Search with the current latency table."""
        from hwnas.search.searching import run

        run(ctx, self.at.space, self._table())

    def _table(self) -> LatencyTable | None:
        """The table of a latency budget; None for a counted budget."""
        if self.at.experiment.search.by_table:
            return self.at.table()
        return None
