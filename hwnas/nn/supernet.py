"""The weight-sharing super-net of a macro space, of classifiers or of detectors.

Gates select what runs. If one option of every choice has weight 1, the super-net runs a
single path at the cost of that path, because weights are sliced. Several options with
weights are a mixture: the outputs of blocks are added up, widths become a weighted mask
over the channels of the widest (FBNetV2, arXiv 2004.05565), and depths weight the slots
that they keep. ``slot`` and ``elastic`` describe how weights are shared.

BN uses the statistics of the batch, in evaluation too; nothing is tracked unless
``bn_track`` is set, as in TuNAS's code.

*Differences from the papers*: TuNAS masks channels of the widest weights; **slicing**
computes the same. Shared weights that a step does not use at all get no decay and no
momentum, unless ``optimizer.inactive_weights`` asks for it; in the weights that it does
use, channels outside the slice get both. A mixture over kernels is averaged before the
shared projection, as in TuNAS. In a mixture over widths, expansions are relative to the
widest, and a BN that follows a depthwise convolution of the masked channels (``ds``)
scales them up again. Only one resolution runs at a time, because images of different
sizes have no weighted sum.
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
from hwnas.core.gates import Gates, Probes
from hwnas.core.ops import Op
from hwnas.core.option import SKIP
from hwnas.core.space import MacroSpace, Option, SearchSpace, Slot
from hwnas.core.spaces import parse_space
from hwnas.errors import CheckpointError, ConfigError
from hwnas.failures import is_out_of_memory
from hwnas.nn import transfer
from hwnas.nn.blocks import initialise
from hwnas.nn.cells import CellSupernet, GrowingSupernet
from hwnas.nn.checkpoint import first_line, load_tensors_checked
from hwnas.nn.detector import Outputs
from hwnas.nn.elastic import Sharing
from hwnas.nn.elastic_detector import ElasticDetector, copy_into
from hwnas.nn.elastic_head import ElasticClassifier, ElasticHead
from hwnas.nn.gates import differentiable, is_number, option_weights
from hwnas.nn.network import Network, network_of
from hwnas.nn.remapping import TargetBlock
from hwnas.nn.shared import Supernet, check_proxy_resolution, resized, resolve_config
from hwnas.nn.slot import ElasticSlot, RunOptions, Width, skips, slot_gates
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
"""Where an input comes from: the position of a slot, and its option if ``operation_on``
is "op" (else "").
"""

PathStep = tuple[int, str, Op, int]
"""A slot that runs: its position, its option and op, and the index of the producer that
its input comes from.
"""

IMAGE: Producer = (-1, "")
"""The producer of the first slot's input."""


HEADS: Mapping[str, type[ElasticClassifier] | type[ElasticDetector]] = {
    "classify": ElasticClassifier,
    "detect": ElasticDetector,
}
"""Task of a space -> the head of its super-net."""


class MacroSupernet(Supernet):
    """All architectures of a macro space in one module.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> supernet = MacroSupernet(space, generator)  # doctest: +SKIP
        >>> logits = supernet(images, one_hot(picks, space))  # doctest: +SKIP
    """

    space: MacroSpace
    proxy: MacroSpace

    def __init__(
        self, space: MacroSpace, generator: torch.Generator, config: SupernetConfig | None = None
    ) -> None:
        super().__init__()
        self.config = config = resolve_config(config, "he")
        self.check(space, config)
        self.space = space
        self.proxy = _proxy(space, config)
        kernels = "own" if config.kernels == "auto" else config.kernels
        sharing = Sharing(config.channels, kernels, config.bn_affine, config.bn_track)
        separate = config.sharing == "separate"
        self.fraction = 0.0
        self.tracking = True
        self.producers = [self._producers(position) for position in range(len(self.proxy.slots))]

        self.slots = nn.ModuleList()
        for slot, producers in zip(self.proxy.slots, self.producers, strict=True):
            sources = len(producers) if config.operation_on != "node" else 1
            norms = len(producers) if config.wsbn else 1
            self.slots.append(ElasticSlot(slot, space.bn_eps, sharing, separate, sources, norms))
        head = HEADS[space.task](self.proxy, config, sharing)
        self.add_module(head.NAME, head)
        initialise(self.slots, generator, config.initialisation)
        head.initialise(generator, config.initialisation)

    @classmethod
    def check(cls, space: MacroSpace, config: SupernetConfig) -> None:
        """Raise ConfigError if a super-net of ``space`` cannot be built with
        ``config``.
        """
        _proxy(space, config)
        _check_one_resolution(space, config)
        check_proxy_resolution(space, config)

    @classmethod
    def shared_by(cls, config: SupernetConfig, sharing: str, kernels: str) -> SupernetConfig:
        """The settings with ``auto`` replaced by the search method's ``sharing`` and
        ``kernels``.
        """
        update: dict[str, str] = {}
        if config.sharing == "auto":
            update["sharing"] = sharing
        if config.kernels == "auto":
            update["kernels"] = kernels
        return config.model_copy(update=update)

    @property
    def head(self) -> ElasticHead:
        """What follows the slots: the classifier or the detector."""
        return cast(ElasticHead, self.get_submodule(HEADS[self.space.task].NAME))

    def no_weight_decay(self) -> set[str]:
        """Names of weights without weight decay (timm's convention): the classifier's,
        as in TuNAS's code.
        """
        return {f"{self.head.NAME}.{name}" for name in self.head.no_weight_decay()}

    def forward(
        self, x_NCHW: Tensor, gates: Gates, probes: Probes | None = None, skip_dropout: float = 0.0
    ) -> Tensor | Outputs:
        """Images [N, channels, size, size] under ``gates`` -> logits [N, classes], or
        the ``Outputs`` of a detector.

        The module's docstring describes mixtures.
        """
        head = self.head
        maps = []
        probes = probes or {}
        x_NCHW = resized(x_NCHW, self.proxy_resolution() or _resolution(self.space, gates))
        width = Width(self.proxy.in_channels, self.proxy.in_channels)
        producer = IMAGE
        for position, (module, slot) in enumerate(zip(self.slots, self.proxy.slots, strict=True)):
            into = width
            # all slots of a stage have the width of its first
            if slot.first:
                width = _width(slot, gates, probes, x_NCHW)
            kept, state = _kept(slot, gates, probes)
            if state != "off" and not self._beyond_proxy_depth(slot):
                own_gates = slot_gates(slot, gates.get(slot.key), probes.get(slot.key, ()))
                remat = self.config.remat and len(own_gates.executed) > 1
                source = self.producers[position].index(producer)
                keep_path = self._keep_path(position)
                run = RunOptions(source, skip_dropout, keep_path, remat, self.tracking)
                y_NCHW = module(x_NCHW, own_gates, into, width, run)
                if not is_number(kept, 1.0):
                    y_NCHW = kept * y_NCHW + (1 - kept) * x_NCHW
                x_NCHW = y_NCHW
                # a slot that passes its input on is not the producer of its output
                if state == "executed" and not skips(own_gates):
                    producer = self._producer(position, own_gates.executed[0][0])
            if position in head.tapped:
                maps.append((x_NCHW, width))
        return head.outputs(maps, self.tracking)

    def _beyond_proxy_depth(self, slot: Slot) -> bool:
        """Whether the proxy depth cuts a slot off."""
        return self.config.proxy_depth is not None and slot.index >= self.config.proxy_depth

    def _producer(self, position: int, option: str) -> Producer:
        """The producer of the output of a slot that runs ``option``."""
        if self.config.operation_on != "op":
            return position, ""
        return position, option

    def _producers(self, position: int) -> tuple[Producer, ...]:
        """Everything that a slot's input may come from, nearest first: the slots before
        it, back to one that always runs.
        """
        producers: list[Producer] = []
        for earlier in reversed(range(position)):
            slot = self.proxy.slots[earlier]
            options = [option for option in slot.options if option != SKIP]
            # without operation_on = "op", all options of a slot are the same producer
            producers += dict.fromkeys(self._producer(earlier, option) for option in options)
            always_runs = SKIP not in slot.options and not slot.elective
            if always_runs and not self._beyond_proxy_depth(slot):
                return tuple(producers)
        return (*producers, IMAGE)

    def _keep_path(self, position: int) -> float:
        """NAO's drop-path: the keep probability falls with the layer's position and
        with the progress of the training.
        """
        return 1 - self.config.path_dropout * (position + 1) / len(self.slots) * self.fraction

    def arch(self, picks: Mapping[str, Option]) -> Architecture:
        """The architecture of ``picks`` in this super-net. It is the space's own unless
        proxies change depth or width.
        """
        arch = self.proxy.decode(self._proxied(picks))
        if self.config.proxy_depth is None:
            return arch
        ops = [(self.proxy.slots[position], op) for position, _, op, _ in self.path(picks)]
        return self.proxy.network(ops, arch.name)

    def extract(self, picks: Mapping[str, Option]) -> Network:
        """A standalone network with copies of the weights that ``picks`` use. Its BN
        statistics are not estimated yet.

        It gets the first channels of each width (or the averaged ones); random
        channelling is for training only.
        """
        network = network_of(self.arch(picks)).to(next(self.parameters()))
        training = self.training
        # in training mode, the slots would draw random channels
        self.eval()
        with torch.no_grad():
            # not strict: a classifier's last block is not a slot
            for block, step in zip(network.blocks, self.path(picks), strict=False):
                position, option, op, source = step
                slot: Any = self.slots[position]
                copy_into(block, slot.weights(option, op, source))
            self.head.copy_into(network)
        self.train(training)
        return network

    def angle_parts(self, picks: Mapping[str, Option]) -> list[tuple[Hashable, int]]:
        """The steps of the ``path`` of ``picks``, and the width before the classifier.
        Each counts once.
        """
        path = self.path(picks)
        parts: list[tuple[Hashable, int]] = [(step, 1) for step in path]
        _, _, last_op, _ = path[-1]
        parts.append((last_op.out_ch, 1))
        return parts

    def angle_weights(self, part: Hashable) -> list[Tensor]:
        """The convolutions of a slot, or the classifier's weights; no BN
        and no biases.
        """
        if isinstance(part, int):
            return self.head.angle_weights(part)
        position, option, op, source = cast(PathStep, part)
        slot: Any = self.slots[position]
        weights = slot.weights(option, op, source)
        return [weight for name, weight in weights.items() if name.endswith("conv.weight")]

    @property
    def by_slot(self) -> Mapping[Slot, ElasticSlot]:
        """The weights of every slot."""
        slots = cast(Sequence[ElasticSlot], self.slots)
        return dict(zip(self.proxy.slots, slots, strict=True))

    def target_blocks(self) -> list[TargetBlock]:
        """Every slot with all its options, and the classifier; see ``GatedNetworks``."""
        # in training mode, the slots would draw random channels
        training = self.training
        self.eval()
        blocks = []
        for slot, module in self.by_slot.items():
            blocks.append(TargetBlock(_variants(slot, module), slot.first))
        self.train(training)
        blocks += self.head.target_blocks()
        return blocks

    def load_backbone(self, path: Path) -> Transferred:
        """Start from the weights of every slot that is the same in the super-net of a
        file; see ``GatedNetworks``.
        """
        source = read_supernet(path)
        transferred = transfer.load_backbone(self.by_slot, source.by_slot)
        if not transferred.taken:
            raise ConfigError(
                f"the super-net {path} of space {source.space.name} has no slot in common with"
                f" space {self.space.name}: train it on the same space and width, with the same"
                " strategy and search.supernet settings."
            )
        return transferred

    @torch.no_grad()
    def copy_weights(self, source: Supernet) -> None:
        """Start from the weights of the super-net whose space was shrunk to this one's;
        see ``GatedNetworks``.
        """
        assert isinstance(source, MacroSupernet)
        training = source.training
        # in training mode, the source's slots would draw random channels
        source.eval()
        source_positions = {slot.key: i for i, slot in enumerate(source.proxy.slots)}
        for (slot, module), producers in zip(self.by_slot.items(), self.producers, strict=True):
            source_position = source_positions[slot.key]
            source_slot = cast(ElasticSlot, source.slots[source_position])
            source_producers = source.producers[source_position]
            numbers = []
            for producer in producers:
                counterpart = self._counterpart(source, source_positions, producer)
                numbers.append(source_producers.index(counterpart))
            transfer.copy_weights(module, source_slot, numbers)
        self.head.copy_weights(source.head)
        source.train(training)

    def _counterpart(
        self, source: MacroSupernet, source_positions: Mapping[str, int], producer: Producer
    ) -> Producer:
        """The producer in ``source`` that corresponds to a producer in this super-net.
        ``source_positions``: key of a slot -> its position in ``source``.
        """
        position, option = producer
        if producer == IMAGE:
            return IMAGE
        return source._producer(source_positions[self.proxy.slots[position].key], option)

    def _proxied(self, picks: Mapping[str, Option]) -> dict[str, Option]:
        """The same picks in the proxy space, whose options are in the same order."""
        proxied: dict[str, Option] = {}
        for choice, proxy_choice in zip(self.space.choices, self.proxy.choices, strict=True):
            position = choice.options.index(picks[choice.key])
            proxied[choice.key] = proxy_choice.options[position]
        return proxied

    def path(self, picks: Mapping[str, Option]) -> list[PathStep]:
        """The slots that ``picks`` execute, in order."""
        picks = self._proxied(picks)
        resolution_index = 0
        if "resolution" in picks:
            resolution_index = self.proxy.resolutions.index(int(picks["resolution"]))

        path: list[PathStep] = []
        producer = IMAGE
        out_ch = self.proxy.in_channels
        for position, slot in enumerate(self.proxy.slots):
            # the width of a stage holds even if its depth leaves this slot out
            in_ch = out_ch
            out_ch = int(picks.get(slot.out_key, slot.out_widths[0]))
            depth = int(picks.get(slot.depth_key, slot.index + 1))
            if slot.index >= depth or self._beyond_proxy_depth(slot):
                continue
            option = str(picks.get(slot.key, slot.options[0]))
            op = slot.op(option, in_ch, out_ch, slot.sizes[resolution_index])
            if op is not None:
                path.append((position, option, op, self.producers[position].index(producer)))
                producer = self._producer(position, option)
        return path


def _variants(slot: Slot, module: ElasticSlot) -> list[tuple[Op, dict[str, Tensor]]]:
    """The options of a slot at its largest widths, smallest first, with views of the
    weights of each producer of its input.
    """
    in_ch = max(widths[0] for widths in slot.widths)
    out_ch = max(widths[1] for widths in slot.widths)
    ops = {option: slot.op(option, in_ch, out_ch) for option in slot.options}
    present = [(option, op) for option, op in ops.items() if op is not None]
    present.sort(key=lambda pair: pair[1].params)
    own = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    variants = []
    for option, op in present:
        for source in range(max(len(module.copies), module.norms)):
            state = module.weights(option, op, source)
            weights = [tensor for name, tensor in state.items() if name.endswith("conv.weight")]
            # transformed kernels and averaged channels are no views; larger options cover them
            if all(weight.untyped_storage().data_ptr() in own for weight in weights):
                variants.append((op, state))
    return variants


SUPERNETS: Mapping[type[SearchSpace], Any] = {MacroSpace: MacroSupernet, CellSpace: CellSupernet}
"""Kind of space -> its super-net. Other kinds have none."""

GROWING: Mapping[type[SearchSpace], Any] = {CellSpace: GrowingSupernet}
"""Kind of space -> its super-net for search methods that grow it."""


def make_supernet(
    space: SearchSpace,
    generator: torch.Generator,
    config: SupernetConfig | None = None,
    growth: Sequence[int] = (),
) -> Supernet:
    """Build the super-net for this kind of space, drawing its weights from
    ``generator``.

    ``growth`` has the cells per stage of each super-net in a growing series; if it is
    empty, the super-net does not grow.
    """
    if growth:
        growing: Supernet = GROWING[type(space)](space, generator, config, growth)
        return growing
    supernet: Supernet = SUPERNETS[type(space)](space, generator, config)
    return supernet


def check_supernet(space: SearchSpace, config: SupernetConfig) -> None:
    """Raise ConfigError if a super-net of ``space`` cannot be built with ``config``.
    Does not build one.
    """
    kind = SUPERNETS.get(type(space))
    if kind is not None:
        kind.check(space, config)


def read_supernet(path: Path) -> Supernet:
    """Load the super-net of a file.

    Raises CheckpointError if the file is missing, corrupt or does not hold a super-net.
    """
    tensors, metadata = load_tensors_checked(path)
    try:
        space = parse_space(metadata["space"], str(path))
        # files that do not record the initialisation were written when "he" was the only one
        settings = {"initialisation": "he", **json.loads(metadata["supernet"])}
        config = SupernetConfig.model_validate(settings)
        supernet = make_supernet(space, torch.Generator().manual_seed(0), config)
        supernet.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"super-net {path} does not fit this version of hwnas ({first_line(error)}): train it"
            " again."
        ) from error
    return supernet


def load_supernet(path: Path, space: SearchSpace) -> Supernet:
    """Load the super-net of a file for ``space``.

    Raises CheckpointError if the file is missing or corrupt, ConfigError if its space
    differs.
    """
    supernet = read_supernet(path)
    trained = supernet.space
    if trained.sha256 != space.sha256:
        raise ConfigError(
            f"super-net {path} was trained on space {trained.name} ({trained.sha256[:12]}), not on"
            f" {space.name} ({space.sha256[:12]}): give a super-net of this space."
        )
    return supernet


def _proxy(space: MacroSpace, config: SupernetConfig) -> MacroSpace:
    """The space with scaled widths: the same choices, but narrower networks.

    Raises ConfigError if scaling makes different widths equal.
    """
    if config.proxy_width == 1.0:
        return space
    proxy = space.scaled(config.proxy_width)
    option_counts = [len(choice.options) for choice in space.choices]
    if [len(choice.options) for choice in proxy.choices] != option_counts:
        raise ConfigError(
            f"search.supernet.proxy_width = {config.proxy_width:g} makes different widths of space"
            f" {space.name} equal: choose a larger value."
        )
    return proxy


def _check_one_resolution(space: MacroSpace, config: SupernetConfig) -> None:
    """Raise ConfigError if the space is tied to its resolutions but a proxy resolution
    is set.
    """
    kind = HEADS[space.task].ONE_SIZE
    if len(space.resolutions) > 1:
        kind = "a space with resolutions to choose from is"
    if kind and config.proxy_resolution is not None:
        raise ConfigError(
            f"search.supernet.proxy_resolution = {config.proxy_resolution}, but {kind} for"
            " the original image size only: remove it."
        )


def _resolution(space: MacroSpace, gates: Gates) -> int | None:
    """The gated resolution in pixels; None if there is no gate for it."""
    gate = gates.get("resolution")
    if gate is None:
        return None
    return space.resolutions[int(gate.argmax())]


def _width(slot: Slot, gates: Gates, probes: Probes, x_NCHW: Tensor) -> Width:
    """A stage's width under gates. The mask has the device and the dtype of
    ``x_NCHW``.
    """
    gate = gates.get(slot.out_key)
    if gate is None:
        assert len(slot.out_widths) == 1, f"no gate for {slot.out_key}"
        return Width(slot.out_widths[0], slot.out_widths[0])

    values = gate.tolist()
    probed = probes.get(slot.out_key, ())
    active = max(slot.out_widths[i] for i, value in enumerate(values) if value != 0.0)
    computed = max([active, *(slot.out_widths[i] for i in probed)])
    # a single width at weight 1 needs no mask, unless the gate wants a gradient
    if sorted(values)[-2:] == [0.0, 1.0] and not probed and not differentiable(gate):
        return Width(active, active)

    weights = torch.as_tensor(gate).to(x_NCHW)
    channels = torch.arange(computed, device=x_NCHW.device)
    widths = torch.tensor(slot.out_widths, device=x_NCHW.device)
    contains = channels[None] < widths[:, None]
    return Width(active, computed, weights @ contains.to(x_NCHW))


def _kept(
    slot: Slot, gates: Gates, probes: Probes
) -> tuple[Any, Literal["off", "probed", "executed"]]:
    """The weight with which the depth keeps a slot, and whether the slot runs. A slot
    that only probed depths keep has weight 0.
    """
    gate = gates.get(slot.depth_key)
    if gate is None:
        return 1.0, "executed"

    values = gate.tolist()
    keeping = [i for i, depth in enumerate(slot.depths) if depth > slot.index]
    if len(keeping) == len(values):
        return 1.0, "executed"

    weights = option_weights(gate, values)
    weight = sum(weights[i] for i in keeping)
    if any(values[i] != 0.0 for i in keeping):
        return weight, "executed"
    if set(probes.get(slot.depth_key, ())).intersection(keeping):
        return weight, "probed"
    return weight, "off"
