"""Networks that ``profile.networks`` names, as the experiment's data shape them: what is priced beside the space."""

from __future__ import annotations

from pathlib import Path

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.search_space import SearchSpace
from hwnas.errors import SpaceError, UserError
from hwnas.train.stage import architecture


def named_networks(experiment: Experiment, space: SearchSpace) -> tuple[Architecture, ...]:
    """The networks of ``profile.networks``, each as ``train.arch`` would be, in order; none where it is a number.

    They are as wide as published, or as their name says (``mobilenet_v2-w0.5``): ``space.width`` is about the space. Raises ConfigError
    where a name is unknown or a network does not fit the data.
    """
    names = experiment.profile.networks
    if isinstance(names, int):
        return ()
    plain = experiment.space.model_copy(update={"width": 1.0})
    found = []
    for name in names:
        train = experiment.train.model_copy(update={"arch": name})
        try:
            found.append(architecture(experiment.model_copy(update={"space": plain, "train": train}), space, Path()))
        except UserError as error:
            raise SpaceError(f"profile.networks names {name!r}: {error}") from error
    return tuple(found)
