"""The weights that a training begins with: a super-net's, or an earlier training's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hwnas.core.arch import Architecture
from hwnas.errors import ConfigError
from hwnas.nn.checkpoint import load_network
from hwnas.nn.network import Network
from hwnas.runs import StageContext

WEIGHTS = "model.safetensors"


def load_initial_weights(network: Network, ctx: StageContext) -> None:
    """Copy into a new network the weights that the settings name. With ``train.weights =
    "scratch"`` and no backbone it stays as it is.
    """
    config = ctx.experiment.train
    if config.weights == "supernet":
        inherited = load_network(ctx.path("search", "supernet.safetensors"))
        network.load_state_dict(inherited.state_dict())
    if config.backbone is not None:
        trained = load_network(trained_backbone(config.backbone, network.arch))
        network.blocks.load_state_dict(trained.blocks[: len(network.blocks)].state_dict())


def backbone_file(folder: str) -> Path:
    """The weights file in the folder that ``train.backbone`` names. Raises ConfigError
    where there is none.
    """
    root = Path(folder).expanduser()
    path = next(
        (path for path in (root / WEIGHTS, root / "train" / WEIGHTS) if path.is_file()), None
    )
    if path is None:
        raise ConfigError(
            f"train.backbone = {folder!r} holds no {WEIGHTS}: name the folder of a finished"
            " training."
        )
    return path


def trained_backbone(folder: str, arch: Architecture) -> Path:
    """The weights file of an earlier training, whose first blocks are those of
    ``arch``. Raises ConfigError where there is none.
    """
    path = backbone_file(folder)
    blocks = load_network(path).arch.blocks
    for position, op in enumerate(arch.blocks):
        there = replace(blocks[position], size=op.size) if position < len(blocks) else None
        if there != op:
            raise ConfigError(
                f"train.backbone = {folder!r} is another network: block {position} is"
                f" {there.key if there else 'nothing'} there and {op.key} here; train the same"
                " architecture (train.arch) both times."
            )
    return path
