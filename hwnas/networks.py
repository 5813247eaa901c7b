"""Networks that a configuration names, as the experiment's data shape them: what is
trained, and what is priced beside the space.
"""

from __future__ import annotations

from pathlib import Path

from hwnas.config import DataConfig, Experiment, resolve_path
from hwnas.core.arch import Architecture
from hwnas.core.published import resolve_arch
from hwnas.core.search_space import SearchSpace
from hwnas.errors import ConfigError, SpaceError, UserError
from hwnas.task import task_of


def architecture(experiment: Experiment, space: SearchSpace, searched: Path) -> Architecture:
    """What is to be trained: ``train.arch`` (a document, a published network's name, or
    one of ``space``), else the searched one.

    It is made the task's: for detection, SSDLite is put on it where it has no detector.
    Raises ConfigError where it does not fit the data or the task.
    """
    name, data = experiment.train.arch, experiment.data
    if name is None:
        arch = Architecture.load(searched)
    elif Path(name).suffix == ".json":
        arch = Architecture.load(resolve_path(Path(name)))
    else:
        width = experiment.space.width
        arch = resolve_arch(
            name,
            space,
            resolution=data.resolution,
            classes=data.classes,
            in_channels=data.channels,
            width=width,
        )
    arch = task_of(experiment).architecture(arch, experiment)
    data = sized(experiment, arch)
    if (arch.classes, arch.resolution, arch.in_channels) != (
        data.classes,
        data.resolution,
        data.channels,
    ):
        raise ConfigError(
            f"architecture {arch.name!r} has {arch.classes} classes, {arch.resolution} px and"
            f" {arch.in_channels} channels, but the data {data.classes}, {data.resolution} and"
            f" {data.channels}: make data.classes, data.resolution and data.channels agree."
        )
    return arch


def sized(experiment: Experiment, arch: Architecture) -> DataConfig:
    """The data at the size that the search chose; of an architecture that the user
    names, at the size that the user names.
    """
    return experiment.data.at(arch.resolution) if experiment.train.arch is None else experiment.data


def named_networks(experiment: Experiment, space: SearchSpace) -> tuple[Architecture, ...]:
    """The networks of ``profile.networks``, each as ``train.arch`` would be, in order;
    none where it is a number.

    They are as wide as published, or as their name says (``mobilenet_v2-w0.5``):
    ``space.width`` is about the space. Raises ConfigError where a name is unknown or a
    network does not fit the data.
    """
    names = experiment.profile.networks
    if isinstance(names, int):
        return ()
    plain = experiment.space.model_copy(update={"width": 1.0})
    found = []
    for name in names:
        train = experiment.train.model_copy(update={"arch": name})
        try:
            found.append(
                architecture(
                    experiment.model_copy(update={"space": plain, "train": train}), space, Path()
                )
            )
        except UserError as error:
            raise SpaceError(f"profile.networks names {name!r}: {error}") from error
    return tuple(found)
