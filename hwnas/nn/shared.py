"""Base classes of what a search trains: the architectures of a space, selected by
gates.

``GatedNetworks`` is the common interface, with or without weight sharing: run under
gates, and extract one of the architectures as a standalone network. ``Supernet`` is the
base of all super-nets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.config import SupernetConfig
from hwnas.core.arch import Architecture
from hwnas.core.gates import Gates, Probes
from hwnas.core.size import Rectangle, Size, sides
from hwnas.core.space import Option, SearchSpace, Slot
from hwnas.errors import ConfigError
from hwnas.nn.checkpoint import save_tensors_atomically
from hwnas.nn.detector import Outputs
from hwnas.nn.network import Network
from hwnas.nn.remapping import TargetBlock
from hwnas.nn.transfer import Transferred


class GatedNetworks(nn.Module, ABC):
    """Architectures of a space in one module. Gates select the one that runs, or a
    mixture.

    ``shares`` tells whether they share weights, so that training some of them trains
    all. ``fraction`` is the part of the training that is over, in [0, 1]; path dropout
    grows with it. ``tracking`` lets passes in training mode update the running
    statistics of BN, if it keeps any (``bn_track``).
    """

    shares: ClassVar[bool]
    space: SearchSpace
    proxy: SearchSpace
    """The space that is trained. It has the same choices, but may be narrower,
    shallower or smaller if the configuration asks for it.
    """
    config: SupernetConfig
    fraction: float
    tracking: bool

    @abstractmethod
    def forward(
        self, x_NCHW: Tensor, gates: Gates, probes: Probes | None = None, skip_dropout: float = 0.0
    ) -> Tensor | Outputs:
        """Images [N, channels, size, size] under ``gates`` -> logits [N, classes], or
        the ``Outputs`` of a detector.
        """

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Names of weights without weight decay (timm's convention): the classifier's,
        as in TuNAS's code.
        """

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's order of the layers for learning rates that differ by slot; what has no
        group is last.
        """
        del coarse
        return {"slots": r"^slots\.(\d+)"}

    @abstractmethod
    def arch(self, picks: Mapping[str, Option]) -> Architecture:
        """The architecture of ``picks`` in this super-net. It is the space's own unless
        proxies change depth or width.
        """

    @abstractmethod
    def extract(self, picks: Mapping[str, Option]) -> Network:
        """A standalone network with copies of the weights that ``picks`` use. Its BN
        statistics are not estimated yet.
        """

    @property
    def proxies(self) -> Sequence[SearchSpace]:
        """The spaces that are trained one after another; more than one if the super-net
        grows.
        """
        return (self.proxy,)

    def grow(self, number: int) -> bool:
        """Switch to super-net ``number`` of a growing series, and return whether that
        was a change.
        """
        raise AssertionError(f"{type(self).__name__} does not grow to {number}")

    def load_backbone(self, path: Path) -> Transferred:
        """Start from the weights of every slot that is the same in the super-net of a
        file: the same options, widths, stride and sharing. Image sizes may differ.

        Raises CheckpointError if the file is corrupt, ConfigError if no slot is the
        same.
        """
        raise AssertionError(f"{type(self).__name__} has no slots to take from {path}")

    def target_blocks(self) -> list[TargetBlock]:
        """What may start from the weights of a trained network, from the first block to
        the last, as views of the weights.
        """
        raise AssertionError(f"{type(self).__name__} is not a chain of blocks")

    def copy_weights(self, source: Supernet) -> None:
        """Start from the weights of the super-net whose space was shrunk to this one's.
        Every remaining network keeps its outputs.

        If this super-net shares less (``operation_on``), each of its copies starts as
        the weights that ``source`` shares. The copy is exact except with
        ``channels = "interpolation"``, which averages wider layers, if the widest
        option was removed.
        """
        raise AssertionError(
            f"{type(self).__name__} takes nothing over from {type(source).__name__}"
        )

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write what another run can resume from. Networks without weight sharing write
        no file.
        """


class Supernet(GatedNetworks):
    """All architectures of a space in one module."""

    shares = True

    @classmethod
    @abstractmethod
    def check(cls, space: Any, config: SupernetConfig) -> None:
        """Raise ConfigError if a super-net of ``space`` cannot be built with
        ``config``. Does not build one.
        """

    @classmethod
    def shared_by(cls, config: SupernetConfig, sharing: str, kernels: str) -> SupernetConfig:
        """The settings with ``auto`` replaced by the search method's ``sharing`` and
        ``kernels``, if options of this kind of super-net can share weights.
        """
        del sharing, kernels
        return config

    @abstractmethod
    def angle_parts(self, picks: Mapping[str, Option]) -> list[tuple[Hashable, int]]:
        """The parts whose weights make up the angle of ``picks``
        (``hwnas.search.angle``), with the number of times that each counts.
        """

    @abstractmethod
    def angle_weights(self, part: Hashable) -> list[Tensor]:
        """The weights of a part, the same for all architectures that contain it."""

    def proxy_resolution(self) -> int | None:
        """The current height = width of training images in pixels; None if it is the
        network's.
        """
        # the end of the training is at full resolution, and so is every evaluation
        if self.training and self.fraction < 1 - self.config.full_resolution:
            return self.config.proxy_resolution
        return None

    @property
    def by_slot(self) -> Mapping[Slot, nn.Module]:
        """The weights of every slot, for another super-net to inherit; empty if there
        are no slots.
        """
        return {}

    def save(self, path: Path) -> None:
        """Save the whole super-net as safetensors, with its space and configuration in
        the metadata. The file is written atomically.
        """
        save_tensors_atomically(
            self, path, {"space": self.space.to_json(), "supernet": self.config.model_dump_json()}
        )


def resized(x_NCHW: Tensor, size: Size | None) -> Tensor:
    """Images [N, C, H, W] scaled to a size; unchanged if they have it, or if ``size`` is
    None.
    """
    if size is None or x_NCHW.shape[-2:] == sides(size):
        return x_NCHW
    scaled = F.interpolate(x_NCHW, size=sides(size), mode="bilinear", antialias=True)
    return scaled.contiguous(memory_format=torch.channels_last)


def resolve_config(
    config: SupernetConfig | None, initialisation: Literal["he", "torch"]
) -> SupernetConfig:
    """The settings with ``initialisation`` in place of ``auto``, so that the file of a
    super-net records how its weights were initialised.
    """
    config = config or SupernetConfig()
    if config.initialisation != "auto":
        return config
    return config.model_copy(update={"initialisation": initialisation})


def check_proxy_resolution(space: SearchSpace, config: SupernetConfig, multiple: int = 1) -> None:
    """Raise ConfigError unless ``proxy_resolution`` is below the space's resolution and
    divisible by ``multiple``, which the strides of its networks require.
    """
    size = config.proxy_resolution
    if size is None:
        return
    if isinstance(space.resolution, Rectangle):
        raise ConfigError(
            f"search.supernet.proxy_resolution = {size} is a square, but the images of space"
            f" {space.name} have {space.resolution} px: remove it."
        )
    if size >= space.resolution or size % multiple:
        divisible = f" and divisible by {multiple}" if multiple > 1 else ""
        raise ConfigError(
            f"search.supernet.proxy_resolution = {size} must be below the {space.resolution} px"
            f" of space {space.name}{divisible}: choose another value, or remove it."
        )
