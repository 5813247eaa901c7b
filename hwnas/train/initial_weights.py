"""Initial weights of a training run, from a super-net or from an earlier run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hwnas.core.arch import Architecture
from hwnas.document import user_path
from hwnas.errors import ConfigError
from hwnas.runs import StageContext
from hwnas.train.result import WEIGHTS

if TYPE_CHECKING:  # see hwnas/lazy.py
    from hwnas.nn.network import Network


def load_initial_weights(network: Network, ctx: StageContext) -> None:
    """Copy the weights that the settings name into a new network, in place.

    ``train.weights = "supernet"`` replaces all weights, ``train.backbone`` those of the
    blocks that both networks have, ``train.pretrained`` all that can be remapped. With
    none of them, nothing changes.
    """
    from hwnas.nn.checkpoint import load_network

    config = ctx.experiment.train
    if config.pretrained is not None:
        from hwnas.nn.pretrained import load_pretrained, read_pretrained

        key = "train.pretrained"
        pretrained = read_pretrained(config.pretrained, config.pretrained_model, key)
        ctx.progress.info(load_pretrained(network, pretrained, key))
        note = pretrained.note(ctx.experiment.data)
        if note is not None:
            ctx.progress.info(note)
    if config.weights == "supernet":
        inherited = load_network(ctx.path("search", "supernet.safetensors"))
        network.load_state_dict(inherited.state_dict())
    if config.backbone is not None:
        trained = load_network(trained_backbone(config.backbone, network.arch))
        network.blocks.load_state_dict(trained.blocks[: len(network.blocks)].state_dict())


def trained_weights(source: str, key: str) -> Path:
    """The weights of an earlier training run, which the configuration's ``key`` names: the
    file, the folder that holds it, or the run folder. Raises ConfigError if there are none.
    """
    root = user_path(source, key)
    for path in (root, root / WEIGHTS, root / "train" / WEIGHTS):
        if path.is_file():
            return path
    raise ConfigError(
        f"{key} = {source!r} has no {WEIGHTS}: name the folder of a finished training run."
    )


def trained_backbone(folder: str, arch: Architecture) -> Path:
    """The weights file of an earlier training run of a network that begins with the blocks
    of ``arch``. Raises ConfigError if there is no file, or its blocks differ.
    """
    from hwnas.nn.checkpoint import load_network

    path = trained_weights(folder, "train.backbone")
    blocks = load_network(path).arch.blocks
    for position, op in enumerate(arch.blocks):
        trained = None
        if position < len(blocks):
            # The resolution may differ: it does not change the shapes of weights.
            trained = replace(blocks[position], size=op.size)
        if trained != op:
            name = "nothing" if trained is None else trained.key
            raise ConfigError(
                f"train.backbone = {folder!r} is another network: block {position} is {name} there"
                f" and {op.key} here; train the same architecture (train.arch) both times."
            )
    return path
