"""The super-net that a search trains, or takes from an earlier run, and what counts the
cost of both.
"""

from __future__ import annotations

from pathlib import Path

import torch

from hwnas.config import Experiment, SearchConfig, SupernetConfig
from hwnas.core.space import SearchSpace
from hwnas.engine import best_device
from hwnas.errors import ConfigError
from hwnas.nn.independent import IndependentNetworks
from hwnas.nn.shared import GatedNetworks
from hwnas.nn.supernet import SUPERNETS, Supernet, load_supernet, make_supernet
from hwnas.search.cost_counter import CostCounter
from hwnas.search.strategy import Strategy

SUPERNET_FILE = "shared.safetensors"
"""The whole trained super-net, which ``search.weights`` of another run takes."""


def supernet_of(experiment: Experiment, space: SearchSpace, strategy: Strategy) -> GatedNetworks:
    """The weights that a strategy trains: a super-net as it shares them, one that
    grows, or networks of their own.
    """
    generator = torch.Generator().manual_seed(experiment.seed)
    if strategy.alone:
        return IndependentNetworks(space, strategy.alone, generator)
    kind: type[Supernet] = SUPERNETS[type(space)]
    config = kind.shared_by(experiment.search.supernet, strategy.sharing, strategy.kernels)
    return make_supernet(space, generator, config, strategy.growth(space))


def cost_counter_of(config: SearchConfig, supernet: GatedNetworks) -> CostCounter:
    """What counts the cost of a search with these weights."""
    return CostCounter(
        supernet.space,
        supernet.proxies,
        config.batch_size,
        config.recalibration_images + config.evaluation_images,
    )


def trained_supernet(folder: str, key: str = "search.weights") -> Path:
    """The super-net file of an earlier run's search folder (or of the run's folder),
    named by the configuration's ``key``.

    Raises ConfigError where there is none.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ConfigError(
            f"{key} = {folder!r} is no folder: name the folder of a finished run that trained a"
            " super-net."
        )
    for path in (root / SUPERNET_FILE, root / "search" / SUPERNET_FILE):
        if path.is_file():
            return path
    raise ConfigError(
        f"{key} = {folder!r} holds no {SUPERNET_FILE}: name the search folder of a finished run that"
        " trained a super-net."
    )


def trained(config: SearchConfig, space: SearchSpace) -> Supernet:
    """The super-net of ``search.weights``, which brings its own sharing. Raises
    ConfigError where the configuration contradicts it.
    """
    assert config.weights is not None
    supernet = load_supernet(trained_supernet(config.weights), space)
    if not config.recalibration_images and not supernet.config.bn_track:
        raise ConfigError(
            f"the super-net in {config.weights} tracks no BN statistics: set"
            " search.recalibration_images to 2 or more."
        )
    trained, usual = supernet.config.model_dump(), SupernetConfig().model_dump()
    # a run's own config.json says every key, so a default asks for nothing
    asked = config.supernet.model_dump()
    other = [key for key, value in asked.items() if value not in (usual[key], trained[key])]
    if other:
        raise ConfigError(
            f"search.supernet.{other[0]} = {asked[other[0]]!r}, but the trained super-net in"
            f" {config.weights} has {trained[other[0]]!r}: remove the key."
        )
    return supernet.to(best_device())
