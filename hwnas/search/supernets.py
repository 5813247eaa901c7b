"""The super-net that a search trains or takes from an earlier run, and the counter of
its cost.
"""

from __future__ import annotations

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
from hwnas.search.supernet_file import supernet_path


def supernet_of(experiment: Experiment, space: SearchSpace, strategy: Strategy) -> GatedNetworks:
    """The weights that a strategy trains: a super-net that shares weights as the
    strategy does (and may grow), or standalone networks.
    """
    generator = torch.Generator().manual_seed(experiment.seed)
    if strategy.standalone:
        return IndependentNetworks(space, strategy.standalone, generator)
    kind: type[Supernet] = SUPERNETS[type(space)]
    config = kind.shared_by(experiment.search.supernet, strategy.sharing, strategy.kernels)
    return make_supernet(space, generator, config, strategy.growth(space))


def cost_counter_of(config: SearchConfig, supernet: GatedNetworks) -> CostCounter:
    """A counter of the cost of a search with these weights."""
    return CostCounter(
        supernet.space,
        supernet.proxies,
        config.batch_size,
        config.recalibration_images + config.evaluation_images,
    )


def load_trained_supernet(config: SearchConfig, space: SearchSpace) -> Supernet:
    """The super-net of ``search.weights``, on the best device. It keeps the settings
    that it was trained with; raises ConfigError if ``search.supernet`` differs.
    """
    assert config.weights is not None
    supernet = load_supernet(supernet_path(config.weights), space)
    if not config.recalibration_images and not supernet.config.bn_track:
        raise ConfigError(
            f"the super-net in {config.weights} tracks no BN statistics: set"
            " search.recalibration_images to 2 or more."
        )
    trained = supernet.config.model_dump()
    defaults = SupernetConfig().model_dump()
    for key, value in config.supernet.model_dump().items():
        # The config.json of a run contains every key, so a default value does not mean
        # that the user asked for it.
        if value not in (defaults[key], trained[key]):
            raise ConfigError(
                f"search.supernet.{key} = {value!r}, but the trained super-net in"
                f" {config.weights} has {trained[key]!r}: remove the key."
            )
    return supernet.to(best_device())
