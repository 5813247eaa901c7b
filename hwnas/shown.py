"""What ``hwnas space`` shows: a space by name or that of an experiment, with its table
and the networks that it names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hwnas.config import Experiment, load_experiment
from hwnas.core.arch import Architecture
from hwnas.core.search_space import SearchSpace
from hwnas.core.size import written
from hwnas.core.spaces import SPACES, load_space
from hwnas.document import user_path
from hwnas.errors import UserError
from hwnas.progress import Progress
from hwnas.runs import load_config


@dataclass(frozen=True)
class Shown:
    """A space, the networks whose cost is shown next to it, and the table for both if
    the user did not give one.
    """

    space: SearchSpace
    networks: tuple[Architecture, ...] = ()
    table_path: Path | None = None


def shown_space(name: str, overrides: list[str]) -> Shown:
    """The space of a built-in name, a space document, an experiment (.toml) or a run
    folder.

    ``overrides`` (``key.path=value``) change an experiment. For a space by name, they
    start from the space's own resolution, classes and channels. Raises UserError in one
    sentence.
    """
    path = user_path(name, "CONFIG")
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
    own_settings = [
        f'space.name="{name}"',
        f"data.resolution={written(space.resolution)}",
        f"data.classes={space.classes}",
        f"data.channels={space.in_channels}",
    ]
    return _of_experiment(load_experiment(None, [*own_settings, *overrides]), None)


def _of_experiment(experiment: Experiment, root: Path | None) -> Shown:
    """The space of an experiment, with the configured table, else the profiled one of
    its run folder.
    """
    # Only here, because they import PyTorch, which a space by name does not need.
    from hwnas.networks import named_networks
    from hwnas.pipeline import Pipeline

    pipeline = Pipeline(experiment, root or Path(), Progress())
    is_configured = experiment.search.table is not None
    is_profiled = root is not None and pipeline.folder.table_path.is_file()
    table_path = pipeline.folder.table_path if is_configured or is_profiled else None
    networks = named_networks(pipeline.experiment, pipeline.space)
    return Shown(pipeline.space, networks, table_path)
