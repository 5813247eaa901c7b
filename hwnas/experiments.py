"""Resolves what an experiment names: its space with the shape of its data, and the
plug-ins, devices and networks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hwnas.config import Experiment
from hwnas.core.published import resolve_arch
from hwnas.core.search_space import SearchSpace
from hwnas.core.spaces import DARTS_SPACES, SPACES, is_document, load_space
from hwnas.data import DATASETS
from hwnas.data.inspection import with_classes
from hwnas.devices.device import find_device
from hwnas.errors import ConfigError
from hwnas.networks import named_networks
from hwnas.search import FINDERS, STRATEGIES
from hwnas.task import task_of


def experiment_space(experiment: Experiment) -> SearchSpace:
    """The space of an experiment. Built-in spaces take classes, channels and resolution
    from the data. Raises ConfigError or SpaceError if the two do not fit together.
    """
    settings = experiment.space
    data = experiment.data
    overrides: dict[str, Any] = {}
    if settings.name in SPACES:
        overrides["classes"] = data.classes
        overrides["resolution"] = data.resolution
        overrides["in_channels"] = data.channels
    if settings.act:
        overrides["act"] = settings.act
    if settings.width != 1.0:
        overrides["width"] = settings.width
    if settings.layers is not None:
        if settings.name not in DARTS_SPACES:
            known = ", ".join(DARTS_SPACES)
            raise ConfigError(
                f"space.layers = {settings.layers} only applies to {known}, not to"
                f" {settings.name!r}: remove it; a document has its own number of cells."
            )
        overrides["layers"] = settings.layers

    space: SearchSpace = load_space(settings.name, **overrides)
    shape_of_space = (space.classes, space.resolution, space.in_channels)
    if shape_of_space != (data.classes, data.resolution, data.channels):
        raise ConfigError(
            f"space {settings.name!r} has {space.classes} classes, {space.resolution} px and"
            f" {space.in_channels} channels, but the data has {data.classes}, {data.resolution}"
            f" and {data.channels}: make them agree."
        )
    if settings.restrict:
        space = space.restrict(settings.restrict)
    return task_of(experiment).space(space, experiment)


def with_counted_classes(experiment: Experiment) -> Experiment:
    """The experiment with ``data.classes`` filled in if it was not given: from a space
    document, whose hash includes the classes, else counted in the data.
    """
    is_given = "classes" in experiment.data.model_fields_set
    if is_given or not is_document(experiment.space.name):
        data = with_classes(experiment.data)
    else:
        classes = load_space(experiment.space.name).classes
        data = experiment.data.model_copy(update={"classes": classes})
    return experiment.model_copy(update={"data": data})


def check_names(experiment: Experiment, space: SearchSpace) -> None:
    """Look up everything the experiment names, so that a misspelling is reported before
    any work is done. Raises ConfigError.
    """
    find_device(experiment.device.name)
    DATASETS.get(experiment.data.name)
    for plugin, known in (
        (experiment.search.strategy, STRATEGIES),
        (experiment.search.finder, FINDERS),
    ):
        if plugin is not None:
            plugin.options(known.get(plugin.name).Config)
    named_networks(experiment, space)
    name = experiment.train.arch
    if name is not None and Path(name).suffix != ".json":
        data = experiment.data
        width = experiment.space.width
        resolve_arch(
            name,
            space,
            resolution=data.resolution,
            classes=data.classes,
            in_channels=data.channels,
            width=width,
        )
