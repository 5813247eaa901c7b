"""What ``hwnas space`` shows: a space by name, or that of an experiment, with its table
and the networks that it names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hwnas.config import Experiment, load_experiment
from hwnas.core.arch import Architecture
from hwnas.core.search_space import SearchSpace
from hwnas.core.spaces import SPACES, load_space
from hwnas.errors import UserError
from hwnas.networks import named_networks
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.runs import load_config


@dataclass(frozen=True)
class Shown:
    """A space, the networks to price beside it, and the table that prices both where
    none is given.
    """

    space: SearchSpace
    networks: tuple[Architecture, ...] = ()
    table_path: Path | None = None


def shown_space(name: str, overrides: list[str]) -> Shown:
    """The space of a built-in name, a space document, an experiment (.toml) or a run folder.

    ``overrides`` (``key.path=value``) change an experiment; of a space by name they do
    so from its own resolution, classes and channels. Raises UserError in one sentence.
    """
    path = Path(name)
    if path.is_dir() and name not in SPACES:
        if overrides:
            raise UserError(
                f"{name} is a run folder with its own configuration: give the .toml file to change"
                f" {overrides[0]!r}."
            )
        return _of_experiment(load_config(path), path)
    if path.suffix == ".toml":
        return _of_experiment(load_experiment(path, overrides), None)
    space = load_space(name)
    if not overrides:
        return Shown(space)
    shape = (
        f"data.resolution={space.resolution}",
        f"data.classes={space.classes}",
        f"data.channels={space.in_channels}",
    )
    return _of_experiment(load_experiment(None, [f'space.name="{name}"', *shape, *overrides]), None)


def _of_experiment(experiment: Experiment, root: Path | None) -> Shown:
    """The table is the configured one, else the one that this run has profiled."""
    pipeline = Pipeline(experiment, root or Path(), Progress())
    has_table = experiment.search.table is not None or (
        root is not None and pipeline.folder.table_path.is_file()
    )
    networks = named_networks(pipeline.experiment, pipeline.space)
    return Shown(pipeline.space, networks, pipeline.folder.table_path if has_table else None)
