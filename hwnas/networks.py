"""The networks that a configuration names, with the classes, resolution and channels of
the experiment's data: the one to train, and those to profile in addition to
the space.
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
    """The architecture to train: ``train.arch`` (a document, the name of a published
    network, or one of ``space``) if set, else the document ``searched``.

    It is adapted to the task: a backbone without a detector gets SSDLite for detection.
    Raises ConfigError if it does not fit the data or the task.
    """
    name = experiment.train.arch
    data = experiment.data
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
    data = data_for(experiment, arch)
    if (arch.classes, arch.size, arch.in_channels) != (
        data.classes,
        data.resolution,
        data.channels,
    ):
        raise ConfigError(
            f"architecture {arch.name!r} has {arch.classes} classes, {arch.size} px and"
            f" {arch.in_channels} channels, but the data has {data.classes}, {data.resolution} and"
            f" {data.channels}: make data.classes, data.resolution and data.channels agree."
        )
    return arch


def data_for(experiment: Experiment, arch: Architecture) -> DataConfig:
    """The data to train ``arch`` on.

    The resolution is the one that the search chose; if the user names the architecture
    (``train.arch``), it is the one that the user names, ``data.resolution``.
    """
    if experiment.train.arch is not None:
        return experiment.data
    return experiment.data.at(arch.size)


def named_networks(experiment: Experiment, space: SearchSpace) -> tuple[Architecture, ...]:
    """The networks that ``profile.networks`` names, in order, each built as
    ``train.arch`` would be; empty if it is a number.

    They are as wide as published, or as their name says (``mobilenet_v2-w0.5``);
    ``space.width`` does not apply to them. Raises SpaceError if a name is unknown or a
    network does not fit the data.
    """
    names = experiment.profile.networks
    if isinstance(names, int):
        return ()
    published_width = experiment.space.model_copy(update={"width": 1.0})
    networks = []
    for name in names:
        train = experiment.train.model_copy(update={"arch": name})
        of_name = experiment.model_copy(update={"space": published_width, "train": train})
        try:
            networks.append(architecture(of_name, space, Path()))
        except UserError as error:
            raise SpaceError(f"profile.networks names {name!r}: {error}") from error
    return tuple(networks)
