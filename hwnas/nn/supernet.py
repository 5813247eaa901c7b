"""The weight-shared super-net of a macro space, of classifiers or of detectors.

Gates say what runs. One option of a choice with weight 1 is a single path, and costs
what that path costs: weights are sliced. Several options with weights are a mixture:
blocks are added up, widths become a weighted mask over the channels of the widest
(FBNetV2, arXiv 2004.05565), depths weigh the slots they keep. ``slot`` and ``elastic``
say how weights are shared.

BN uses the statistics of the batch, also when scoring; nothing is tracked unless
``bn_track`` is set, as in TuNAS's code.

*Differences from the papers*: TuNAS masks channels of the widest weights; **slicing**
computes the same. Shared weights that a step does not touch at all get no decay and no
momentum, unless ``optimizer.inactive_weights`` says so; of those it does touch, the channels
outside the slice do. A mixture over kernels is averaged before the shared projection,
as in TuNAS. In a mixture over widths, expansions are relative to the widest, and a BN
that follows a depthwise convolution of the masked channels (``ds``) scales them up
again. One resolution runs at a time: images of different sizes have no weighted sum.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from hwnas.config import SupernetConfig
from hwnas.core.arch import Architecture
from hwnas.core.cells import CellSpace
from hwnas.core.ops import Op
from hwnas.core.option import SKIP
from hwnas.core.space import MacroSpace, Option, SearchSpace, Slot
from hwnas.core.spaces import parse_space
from hwnas.errors import CheckpointError, ConfigError
from hwnas.nn import transfer
from hwnas.nn.blocks import initialise
from hwnas.nn.cells import CellSupernet, GrowingSupernet
from hwnas.nn.checkpoint import load_tensors_checked
from hwnas.nn.detector import Outputs
from hwnas.nn.elastic import Sharing
from hwnas.nn.elastic_detector import ElasticDetector, copy_into
from hwnas.nn.elastic_head import ElasticClassifier, ElasticHead
from hwnas.nn.network import Network, network_of
from hwnas.nn.shared import Gates, Probes, Supernet, check_proxy_resolution, resized, resolve_config
from hwnas.nn.slot import ElasticSlot, Run, Width, executed, skips
from hwnas.nn.transfer import Transferred

__all__ = [
    "Gates",
    "Probes",
    "Supernet",
    "check_supernet",
    "load_supernet",
    "make_supernet",
    "read_supernet",
    "resized",
]

Producer = tuple[int, str]
"""Where an input comes from: the slot's position, and, with ``operation_on = "op"``,
its option (else nothing).
"""

PathStep = tuple[int, str, Op, int]
"""A slot that runs: its position, the option and the op there, and which of its sources
its input comes from.
"""

IMAGE: Producer = (-1, "")
"""The producer of the first slot's input."""


HEADS: Mapping[str, type[ElasticClassifier] | type[ElasticDetector]] = {
    "classify": ElasticClassifier,
    "detect": ElasticDetector,
}
"""Task of a space -> what its networks end with."""


class MacroSupernet(Supernet):
    """All architectures of a macro space in one module.

    Example:
        >>> supernet = MacroSupernet(space, torch.Generator().manual_seed(0))      # doctest: +SKIP
        >>> logits = supernet(images, one_hot(picks, space))            # doctest: +SKIP
    """

    space: MacroSpace
    proxy: MacroSpace

    def __init__(
        self, space: MacroSpace, generator: torch.Generator, config: SupernetConfig | None = None
    ) -> None:
        super().__init__()
        self.config = config = resolve_config(config, "he")
        self.check(space, config)
        self.space, self.proxy = space, _proxy(space, config)
        kernels = "own" if config.kernels == "auto" else config.kernels
        sharing = Sharing(config.channels, kernels, config.bn_affine, config.bn_track)
        self.fraction, self.tracking = 0.0, True
        self.producers = [self._producers(position) for position in range(len(self.proxy.slots))]
        self.slots = nn.ModuleList()
        for slot, producers in zip(self.proxy.slots, self.producers, strict=True):
            sources = len(producers) if config.operation_on != "node" else 1
            norms = len(producers) if config.wsbn else 1
            self.slots.append(
                ElasticSlot(
                    slot, space.bn_eps, sharing, config.sharing == "separate", sources, norms
                )
            )
        head = HEADS[space.task](self.proxy, config, sharing)
        self.add_module(head.NAME, head)
        initialise(self.slots, generator, config.initialisation)
        head.initialise(generator, config.initialisation)

    @classmethod
    def check(cls, space: MacroSpace, config: SupernetConfig) -> None:
        """Raise ConfigError where a super-net of ``space`` cannot be made so."""
        _proxy(space, config)
        _check_one_resolution(space, config)
        check_proxy_resolution(space, config)

    @classmethod
    def shared_by(cls, config: SupernetConfig, sharing: str, kernels: str) -> SupernetConfig:
        """The settings with the search method's way to share weights where they leave it open."""
        method = {"sharing": sharing, "kernels": kernels}
        return config.model_copy(
            update={key: way for key, way in method.items() if getattr(config, key) == "auto"}
        )

    @property
    def head(self) -> ElasticHead:
        """What comes after the slots."""
        return cast(ElasticHead, self.get_submodule(HEADS[self.space.task].NAME))

    def no_weight_decay(self) -> set[str]:
        """Weights without L2, by timm's convention: the classifier's (as in TuNAS's code)."""
        return {f"{self.head.NAME}.{name}" for name in self.head.no_weight_decay()}

    def forward(
        self, x_NCHW: Tensor, gates: Gates, probes: Probes | None = None, skip_dropout: float = 0.0
    ) -> Tensor | Outputs:
        """Images [N, channels, size, size] under ``gates`` -> logits [N, classes], or
        the ``Outputs`` of a detector.

        See the module for mixtures.
        """
        head, maps, probes = self.head, [], probes or {}
        x_NCHW = resized(x_NCHW, self.proxy_resolution() or _resolution(self.space, gates))
        width, producer = Width(self.proxy.in_channels, self.proxy.in_channels), IMAGE
        for position, (module, slot) in enumerate(zip(self.slots, self.proxy.slots, strict=True)):
            out = _width(slot, gates, probes, x_NCHW) if slot.first else width
            into, width = width, out
            kept, runs = _kept(slot, gates, probes)
            if runs and not self._left_out(slot):
                slot_gates = executed(slot, gates.get(slot.key), probes.get(slot.key, ()))
                remat = self.config.remat and len(slot_gates.executed) > 1
                source = self.producers[position].index(producer)
                run = Run(source, skip_dropout, self._keep_path(position), remat, self.tracking)
                y_NCHW = module(x_NCHW, slot_gates, into, out, run)
                x_NCHW = y_NCHW if _is_one(kept) else kept * y_NCHW + (1 - kept) * x_NCHW
                passed = skips(slot_gates) or runs == "probed"
                producer = (
                    producer if passed else self._producer(position, slot_gates.executed[0][0])
                )
            if position in head.tapped:
                maps.append((x_NCHW, width))
        return head.outputs(maps, self.tracking)

    def _left_out(self, slot: Slot) -> bool:
        """Whether the proxy depth cuts a slot off."""
        return self.config.proxy_depth is not None and slot.index >= self.config.proxy_depth

    def _producer(self, position: int, option: str) -> Producer:
        """What a slot's output counts as."""
        return position, option if self.config.operation_on == "op" else ""

    def _producers(self, position: int) -> tuple[Producer, ...]:
        """What a slot's input may come from, the nearest first: slots before it up to
        one that is never passed over.
        """
        found: list[Producer] = []
        for earlier in reversed(range(position)):
            slot = self.proxy.slots[earlier]
            found += dict.fromkeys(
                self._producer(earlier, option) for option in slot.options if option != SKIP
            )
            if SKIP not in slot.options and not slot.elective and not self._left_out(slot):
                return tuple(found)
        return (*found, IMAGE)

    def _keep_path(self, position: int) -> float:
        """NAO's drop-path: the keep probability falls with the layer's position and
        with the progress of the training.
        """
        return 1 - self.config.path_dropout * (position + 1) / len(self.slots) * self.fraction

    def arch(self, picks: Mapping[str, Option]) -> Architecture:
        """The architecture that ``picks`` are in this super-net: the space's own, but
        for the proxies.
        """
        arch = self.proxy.decode(self._proxied(picks))
        if self.config.proxy_depth is None:
            return arch
        return self.proxy.network(
            [(self.proxy.slots[position], op) for position, _, op, _ in self.path(picks)], arch.name
        )

    def extract(self, picks: Mapping[str, Option]) -> Network:
        """A stand-alone network with copies of the weights that ``picks`` use. Its BN
        statistics are not estimated yet.

        Channels are the first ones of each width (or the averaged ones); random
        channelling is for training only.
        """
        network = network_of(self.arch(picks)).to(next(self.parameters()))
        training = self.training
        self.eval()
        with torch.no_grad():
            for block, (position, option, op, source) in zip(
                network.blocks, self.path(picks), strict=False
            ):
                elastic: Any = self.slots[position]
                copy_into(block, elastic.weights(option, op, source))
            self.head.copy_into(network)
        self.train(training)
        return network

    def angle_parts(self, picks: Mapping[str, Option]) -> list[tuple[Hashable, int]]:
        """The slots that ``picks`` execute, as ``path`` has them, and the width before
        the classifier.
        """
        path = self.path(picks)
        return [*((step, 1) for step in path), (path[-1][2].out_ch, 1)]

    def angle_weights(self, part: Hashable) -> list[Tensor]:
        """The convolutions of a slot, or the classifier's weights; no BN and no biases."""
        if isinstance(part, int):
            return self.head.angle_weights(part)
        position, option, op, source = cast(PathStep, part)
        slot: Any = self.slots[position]
        return [
            weight
            for name, weight in slot.weights(option, op, source).items()
            if name.endswith("conv.weight")
        ]

    @property
    def by_slot(self) -> Mapping[Slot, ElasticSlot]:
        """The weights of every slot."""
        return {
            slot: cast(ElasticSlot, module)
            for slot, module in zip(self.proxy.slots, self.slots, strict=True)
        }

    def load_backbone(self, path: Path) -> Transferred:
        """Begin with the weights of every slot that is the same in a super-net's file;
        see ``GatedNetworks``.
        """
        source = read_supernet(path)
        found = transfer.load_backbone(self.by_slot, source.by_slot)
        if not found.taken:
            raise ConfigError(
                f"the super-net {path} of space {source.space.name} has no slot in common with"
                f" space {self.space.name}: train it on the same space and width, with the same"
                " strategy and search.supernet settings."
            )
        return found

    @torch.no_grad()
    def copy_weights(self, source: Supernet) -> None:
        """Begin with the weights of the super-net of a space that this one's was shrunk
        from; see ``GatedNetworks``.
        """
        assert isinstance(source, MacroSupernet)
        training = source.training
        source.eval()  # random channels are for training: here the first ones
        there = {slot.key: position for position, slot in enumerate(source.proxy.slots)}
        theirs = {slot.key: module for slot, module in source.by_slot.items()}
        for (slot, module), producers in zip(self.by_slot.items(), self.producers, strict=True):
            known = source.producers[there[slot.key]]
            numbers = [
                known.index(self._seen_by(source, there, producer)) for producer in producers
            ]
            transfer.copy_weights(module, theirs[slot.key], numbers)
        self.head.copy_weights(source.head)
        source.train(training)

    def _seen_by(
        self, source: MacroSupernet, there: Mapping[str, int], producer: Producer
    ) -> Producer:
        """What ``source``, whose slots are ``there``, calls a producer of this super-net."""
        position, option = producer
        if producer == IMAGE:
            return IMAGE
        return source._producer(there[self.proxy.slots[position].key], option)

    def _proxied(self, picks: Mapping[str, Option]) -> dict[str, Option]:
        """The same picks in the proxy space, whose options stand in the same order."""
        pairs = zip(self.space.choices, self.proxy.choices, strict=True)
        return {
            mine.key: theirs.options[mine.options.index(picks[mine.key])] for mine, theirs in pairs
        }

    def path(self, picks: Mapping[str, Option]) -> list[PathStep]:
        """(position, option, op, source) of the slots that ``picks`` execute."""
        picks = self._proxied(picks)
        at = self.proxy.resolutions.index(int(picks["resolution"])) if "resolution" in picks else 0
        path, producer, channels = [], IMAGE, self.proxy.in_channels
        for position, slot in enumerate(self.proxy.slots):
            into, channels = channels, int(picks.get(slot.out_key, slot.out_widths[0]))
            deep = slot.index < int(
                picks.get(slot.depth_key, slot.index + 1)
            ) and not self._left_out(slot)
            option = str(picks.get(slot.key, slot.options[0]))
            op = slot.op(option, into, channels, slot.sizes[at]) if deep else None
            if op is not None:
                path.append((position, option, op, self.producers[position].index(producer)))
                producer = self._producer(position, option)
        return path


SUPERNETS: Mapping[type[SearchSpace], Any] = {MacroSpace: MacroSupernet, CellSpace: CellSupernet}
"""Kind of space -> its super-net. The other kinds have none."""

GROWING: Mapping[type[SearchSpace], Any] = {CellSpace: GrowingSupernet}
"""Kind of space -> its super-net where a search method grows it."""


def make_supernet(
    space: SearchSpace,
    generator: torch.Generator,
    config: SupernetConfig | None = None,
    growth: Sequence[int] = (),
) -> Supernet:
    """The super-net of a space, of the kind that the space is. ``growth``: cells of
    each stage in those that follow one another.
    """
    if growth:
        growing: Supernet = GROWING[type(space)](space, generator, config, growth)
        return growing
    supernet: Supernet = SUPERNETS[type(space)](space, generator, config)
    return supernet


def check_supernet(space: SearchSpace, config: SupernetConfig) -> None:
    """Raise ConfigError where a super-net of ``space`` cannot be made so, without making one."""
    kind = SUPERNETS.get(type(space))
    if kind is not None:
        kind.check(space, config)


def read_supernet(path: Path) -> Supernet:
    """The super-net of a file. Raises CheckpointError where the file is corrupt, or no
    super-net's.
    """
    tensors, metadata = load_tensors_checked(path)
    try:
        space = parse_space(metadata["space"], str(path))
        # as every file began that does not say
        settings = {"initialisation": "he", **json.loads(metadata["supernet"])}
        supernet = make_supernet(
            space, torch.Generator().manual_seed(0), SupernetConfig.model_validate(settings)
        )
        supernet.load_state_dict(tensors)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"super-net {path} does not fit this version of hwnas ({error}): train it again."
        ) from error
    return supernet


def load_supernet(path: Path, space: SearchSpace) -> Supernet:
    """The super-net of a file, for ``space``. Raises CheckpointError where the file is
    corrupt, ConfigError where the space differs.
    """
    supernet = read_supernet(path)
    trained = supernet.space
    if trained.sha256 != space.sha256:
        raise ConfigError(
            f"super-net {path} is of space {trained.name} ({trained.sha256[:12]}), not of"
            f" {space.name} ({space.sha256[:12]}): name its own."
        )
    return supernet


def _proxy(space: MacroSpace, config: SupernetConfig) -> MacroSpace:
    """The space with its widths scaled: the same choices, narrower networks."""
    if config.proxy_width == 1.0:
        return space
    proxy = space.scaled(config.proxy_width)
    if [len(choice.options) for choice in proxy.choices] != [
        len(choice.options) for choice in space.choices
    ]:
        raise ConfigError(
            f"search.supernet.proxy_width = {config.proxy_width:g} makes different widths of space"
            f" {space.name} the same: choose it larger."
        )
    return proxy


def _check_one_resolution(space: MacroSpace, config: SupernetConfig) -> None:
    """Raise ConfigError where images of another size than the network's make no sense."""
    kind = HEADS[space.task].ONE_SIZE
    if len(space.resolutions) > 1:
        kind = "a space with resolutions to choose from is"
    if kind and config.proxy_resolution is not None:
        raise ConfigError(
            f"search.supernet.proxy_resolution = {config.proxy_resolution}, but {kind} for images"
            " as they are: remove it."
        )


def _resolution(space: MacroSpace, gates: Gates) -> int | None:
    gate = gates.get("resolution")
    return None if gate is None else space.resolutions[int(gate.argmax())]


def _width(slot: Slot, gates: Gates, probes: Probes, x_NCHW: Tensor) -> Width:
    """A stage's width under gates; the mask is on the device and of the type of ``x_NCHW``."""
    gate = gates.get(slot.out_key)
    if gate is None:
        assert len(slot.out_widths) == 1, f"no gate for {slot.out_key}"
        return Width(slot.out_widths[0], slot.out_widths[0])
    values, probed = gate.tolist(), probes.get(slot.out_key, ())
    active = max(
        width for width, value in zip(slot.out_widths, values, strict=True) if value != 0.0
    )
    run = max([active, *(slot.out_widths[i] for i in probed)])
    if (
        sorted(values)[-2:] == [0.0, 1.0]
        and not probed
        and not (isinstance(gate, Tensor) and gate.requires_grad)
    ):
        return Width(active, active)
    weights = torch.as_tensor(gate).to(x_NCHW)
    holds = (
        torch.arange(run, device=x_NCHW.device)[None]
        < torch.tensor(slot.out_widths, device=x_NCHW.device)[:, None]
    )
    return Width(active, run, weights @ holds.to(x_NCHW))


def _kept(
    slot: Slot, gates: Gates, probes: Probes
) -> tuple[Any, Literal["", "probed", "executed"]]:
    """How much of a slot the depth keeps, and whether it runs: a slot that only probed
    depths keep has weight 0.
    """
    gate = gates.get(slot.depth_key)
    if gate is None:
        return 1.0, "executed"
    values, probed = gate.tolist(), set(probes.get(slot.depth_key, ()))
    keeping = [i for i, depth in enumerate(slot.depths) if depth > slot.index]
    if len(keeping) == len(values):
        return 1.0, "executed"
    weight = sum(
        gate[i] if isinstance(gate, Tensor) and gate.requires_grad else values[i] for i in keeping
    )
    if any(values[i] != 0.0 for i in keeping):
        return weight, "executed"
    return weight, "probed" if probed.intersection(keeping) else ""


def _is_one(weight: Any) -> bool:
    return not isinstance(weight, Tensor) and float(weight) == 1.0
