"""What an experiment names: its space, as the data shape it, and plug-ins, devices and
networks, which are looked up.
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
    """The space of an experiment: built-in ones take classes, channels and resolution
    from the data.
    """
    name, data = experiment.space.name, experiment.data
    overrides: dict[str, Any] = {}
    if name in SPACES:
        overrides = {
            "classes": data.classes,
            "resolution": data.resolution,
            "in_channels": data.channels,
        }
    overrides |= {"act": experiment.space.act} if experiment.space.act else {}
    overrides |= {"width": experiment.space.width} if experiment.space.width != 1.0 else {}
    if experiment.space.layers is not None:
        if name not in DARTS_SPACES:
            known = ", ".join(DARTS_SPACES)
            raise ConfigError(
                f"space.layers = {experiment.space.layers} is for {known}, not for {name!r}: remove"
                " it; a document has its number of cells."
            )
        overrides["layers"] = experiment.space.layers
    space: SearchSpace = load_space(name, **overrides)
    if (space.classes, space.resolution, space.in_channels) != (
        data.classes,
        data.resolution,
        data.channels,
    ):
        raise ConfigError(
            f"space {name!r} has {space.classes} classes, {space.resolution} px and"
            f" {space.in_channels} channels, but the data {data.classes}, {data.resolution} and"
            f" {data.channels}: make them agree."
        )
    space = space.restrict(experiment.space.restrict) if experiment.space.restrict else space
    return task_of(experiment).space(space, experiment)


def with_counted_classes(experiment: Experiment) -> Experiment:
    """With ``data.classes`` where they are not given: those of a space document, whose
    hash they are part of, else those there are.
    """
    if "classes" in experiment.data.model_fields_set or not is_document(experiment.space.name):
        data = with_classes(experiment.data)
    else:
        data = experiment.data.model_copy(
            update={"classes": load_space(experiment.space.name).classes}
        )
    return experiment.model_copy(update={"data": data})


def check_names(experiment: Experiment, space: SearchSpace) -> None:
    """Look up everything the experiment names, so that a misspelling is found before
    any work is done.
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
        data, width = experiment.data, experiment.space.width
        resolve_arch(
            name,
            space,
            resolution=data.resolution,
            classes=data.classes,
            in_channels=data.channels,
            width=width,
        )
