"""The weight-sharing super-net of a cell space.

Every option of every edge of every cell has its own weights; all cells of one kind run
under the same gates. If one option of every choice has weight 1, the super-net runs a
single path. Several options with weights are DARTS's mixture: outputs are added up by
weight, and an edge has the summed weight of the pairs of edges that keep it. BN uses
the statistics of the batch unless ``bn_track`` is set. In DARTS's cells, pooling is
followed by a BN without scale and shift, as in its search and in extracted networks;
networks that are trained in the end do not have it.

With ``bn_affine = false``, only the BNs of the stem and the reductions and the last BN
have scale and shift, as in DARTS's and NAS-Bench-201's super-nets.

By default, weights are initialised as PyTorch does, as in the papers' code;
``initialisation = "he"`` initialises as TuNAS does.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hwnas.config import SupernetConfig
from hwnas.core.arch import Architecture
from hwnas.core.cell_steps import NONE, CellStep
from hwnas.core.cells import CellSpace
from hwnas.core.gates import Gates, Probes
from hwnas.core.ops import Pool
from hwnas.core.space import Option
from hwnas.errors import ConfigError
from hwnas.nn.blocks import build, initialise
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.nn.gates import is_number, option_weights, weighted
from hwnas.nn.shared import Supernet, check_proxy_resolution, resized, resolve_config

UNSUPPORTED = {"channels": "first", "operation_on": "node", "wsbn": False, "path_dropout": 0.0}
"""Settings about weight sharing between options, which cells do not have, with the
values that switch them off.
"""
BN_MOMENTUM = 0.1

Listed = Mapping[str, tuple[Any, list[float]]]
"""Choice key -> the gate vector and its values."""

Weighted = tuple[str, Any]
"""An option and its weight, a number or a scalar tensor."""


class CellSupernet(Supernet):
    """All networks of a cell space in one module.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> supernet = CellSupernet(space, generator)  # doctest: +SKIP
        >>> logits = supernet(images, one_hot(picks, space))  # doctest: +SKIP
    """

    space: CellSpace
    proxy: CellSpace

    def __init__(
        self, space: CellSpace, generator: torch.Generator, config: SupernetConfig | None = None
    ) -> None:
        super().__init__()
        self.config = config = resolve_config(config, "torch")
        self.check(space, config)
        self.space = space
        self.proxy = _proxy(space, config)
        self.steps = self.proxy.make_steps(pool_norm=space.skeleton == "darts")
        self.parts = nn.ModuleList(self._part(step) for step in self.steps)
        self._last_use: dict[int, int] = {}
        for position, step in enumerate(self.steps):
            for point in step.of:
                self._last_use[point] = position
        self.fraction = 0.0
        self._tracking = True
        initialise(self, generator, config.initialisation)

    @classmethod
    def check(cls, space: CellSpace, config: SupernetConfig) -> None:
        """Raise ConfigError if a setting has no meaning for cells."""
        check_proxy_resolution(space, config, space.multiple)
        for key, required in UNSUPPORTED.items():
            if getattr(config, key) != required:
                raise ConfigError(
                    f"search.supernet.{key} = {getattr(config, key)!r} is about weight sharing"
                    f" between blocks, but {space.name} is a cell space: set it to {required!r}."
                )
        for key, required in (("sharing", "separate"), ("kernels", "own")):
            if getattr(config, key) not in ("auto", required):
                raise ConfigError(
                    f"search.supernet.{key} = {getattr(config, key)!r}, but the options of space"
                    f" {space.name} share no weights: set it to {required!r}."
                )

    def _part(self, step: CellStep) -> nn.Module:
        """The module with the weights of a step."""
        if step.kind == "op":
            assert step.op is not None
            op_module = build(step.op, bn_eps=self.space.bn_eps, dropout=self.config.dropout)
            # bn_affine is for the cells; stem, reductions and the last BN stay affine
            affine = self.config.bn_affine or ".pre" not in step.slot
            return self._with_norms(op_module, affine)

        options = nn.ModuleDict()
        if step.kind == "edge":
            for option, op in zip(step.options, step.ops, strict=True):
                if op is not None:
                    options[option] = build(op, bn_eps=self.space.bn_eps)
        return self._with_norms(options, self.config.bn_affine)

    def _with_norms(self, part: nn.Module, affine: bool) -> nn.Module:
        """``part`` with its BNs replaced by ones with this super-net's settings."""
        for module in list(part.modules()):
            for name, norm in module.named_children():
                if isinstance(norm, nn.BatchNorm2d):
                    replacement = nn.BatchNorm2d(
                        norm.num_features,
                        norm.eps,
                        BN_MOMENTUM,
                        affine=norm.affine and affine,
                        track_running_stats=self.config.bn_track,
                    )
                    setattr(module, name, replacement)
        return part

    @property
    def tracking(self) -> bool:
        """Whether passes in training mode update the running statistics of BN."""
        return self._tracking

    @tracking.setter
    def tracking(self, on: bool) -> None:
        self._tracking = on
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = BN_MOMENTUM if on else 0.0

    def no_weight_decay(self) -> set[str]:
        """Names of weights without weight decay: the classifier's."""
        return {f"parts.{len(self.parts) - 1}.linear.weight"}

    def forward(
        self, x_NCHW: Tensor, gates: Gates, probes: Probes | None = None, skip_dropout: float = 0.0
    ) -> Tensor:
        """Images [N, channels, size, size] under ``gates`` -> logits [N, classes].
        ``probes`` must be empty: options of cells cannot be probed.
        """
        assert not probes, "options of cells are not probed"
        x_NCHW = resized(x_NCHW, self.proxy_resolution() or self.space.side)
        listed = with_values(gates)
        points: dict[int, Tensor | None] = {0: x_NCHW}
        for position, (step, part) in enumerate(zip(self.steps, self.parts, strict=True)):
            inputs = [points[point] for point in step.of]
            # a node without any edge is zero, but later layers still need its shape
            if step.kind == "sum" and all(map_NCHW is None for map_NCHW in inputs):
                size = step.size * x_NCHW.shape[-1] // self.space.side
                zeros = x_NCHW.new_zeros((x_NCHW.shape[0], step.channels, size, size))
                points[position + 1] = zeros.contiguous(memory_format=torch.channels_last)
            else:
                points[position + 1] = self._run_step(step, part, inputs, listed, skip_dropout)
            # free maps after their last use
            for point in set(step.of):
                if self._last_use[point] == position:
                    del points[point]
        return cast(Tensor, points[len(self.steps)])

    def _run_step(
        self,
        step: CellStep,
        part: Any,
        inputs: Sequence[Tensor | None],
        gates: Listed,
        skip_dropout: float,
    ) -> Tensor | None:
        """The output of a step; None for an edge that contributes nothing."""
        present = [x_NCHW for x_NCHW in inputs if x_NCHW is not None]
        if step.kind == "sum":
            return _sum(present)
        if step.kind == "concat":
            return torch.cat(present, dim=1)
        if step.kind == "op":
            y_NCHW: Tensor = part(present[0])
            return y_NCHW
        return self._edge(step, part, present[0], gates, skip_dropout)

    def _edge(
        self, step: CellStep, part: Any, x_NCHW: Tensor, gates: Listed, skip_dropout: float
    ) -> Tensor | None:
        """The gated sum of an edge's options; None if there is nothing to add."""
        kept = _kept(step, gates)
        options = _weighted_options(step, gates)
        if is_number(kept, 0.0) or not options:
            return None

        def mixed(x_NCHW: Tensor) -> Tensor:
            terms = []
            for option, weight in options:
                y_NCHW = self._option(part, option, x_NCHW, skip_dropout)
                terms.append(weighted(y_NCHW, weight))
            return _sum(terms)

        with_weights = sum(option in part for option, _ in options)
        # the second pass of rematerialisation would update running statistics again
        if with_weights > 1 and self.training and self.config.remat and not self.config.bn_track:
            y_NCHW: Tensor = checkpoint(
                mixed, x_NCHW, use_reentrant=False, preserve_rng_state=skip_dropout > 0
            )
        else:
            y_NCHW = mixed(x_NCHW)
        return weighted(y_NCHW, kept)

    def _option(self, part: Any, option: str, x_NCHW: Tensor, skip_dropout: float) -> Tensor:
        """The output of one option. An option without an op passes its input on."""
        if option in part:
            y_NCHW: Tensor = part[option](x_NCHW)
            return y_NCHW
        if not skip_dropout:
            return x_NCHW
        return F.dropout(x_NCHW, skip_dropout, self.training)

    def arch(self, picks: Mapping[str, Option]) -> Architecture:
        """The network of ``picks`` at the depth and width of the proxy, with the
        search's BN after pooling.
        """
        return self.proxy.network(picks, self.steps)

    def extract(self, picks: Mapping[str, Option]) -> ClassificationNetwork:
        """A standalone network with copies of the weights that ``picks`` use. Its BN
        statistics are not estimated yet.
        """
        network = ClassificationNetwork(self.arch(picks)).to(next(self.parameters()))
        _, origins = self.proxy.walk(picks, self.steps)
        with torch.no_grad():
            for block, origin in zip(network.blocks, origins, strict=True):
                shared = self._shared(origin.step, origin.option)
                tensors = block.state_dict()
                for name, tensor in shared.state_dict().items():
                    tensors[name].copy_(tensor)
        return network

    def _shared(self, position: int, option: str) -> nn.Module:
        """The module of an option of a step, or of a step without options."""
        part: Any = self.parts[position]
        module: nn.Module = part[option] if option else part
        return module

    def angle_parts(self, picks: Mapping[str, Option]) -> list[tuple[Hashable, int]]:
        """Pairs (position of a step, option that runs there), as in Hu et al. (arXiv
        2004.13431) for cells.

        Weights are collected along every path from an input of a cell to its output, so
        those of an edge count once per path. Paths with ``none`` or with an edge that
        is not kept do not count; ``skip_connect`` has no weights. The fixed parts count
        once.
        """
        parts: list[tuple[Hashable, int]] = []
        paths = self.space.paths(picks)
        for position, step in enumerate(self.steps):
            if step.kind == "op":
                parts.append(((position, ""), 1))
            elif step.kind == "edge" and paths[step.key]:
                option = str(picks.get(step.key, step.options[0]))
                if step.ops[step.options.index(option)] is not None:
                    parts.append(((position, option), paths[step.key]))
        return parts

    def angle_weights(self, part: Hashable) -> list[Tensor]:
        """The convolutions of an option. For pooling, one kernel of 1 / k^2 per
        channel, the same before and after training.

        The fixed parts of NAS-Bench-201's skeleton give all their parameters, those of
        DARTS's their convolutions and the classifier.
        """
        position, option = cast(tuple[int, str], part)
        step = self.steps[position]
        op = step.ops[step.options.index(option)] if option else None
        if isinstance(op, Pool):
            shape = (op.in_ch, op.kernel, op.kernel)
            return [next(self.parameters()).new_full(shape, 1 / op.kernel**2)]

        weights: list[Tensor] = list(self._shared(position, option).parameters())
        if not option and self.space.skeleton == "nasbench201":
            return weights
        # biases and the parameters of BN have one dimension
        return [weight for weight in weights if weight.dim() > 1]

    def copy_weights(self, source: Supernet) -> None:
        """Start from the weights of the super-net whose space was shrunk to this one's:
        those of the remaining options.
        """
        source_state = source.state_dict()
        self.load_state_dict({name: source_state[name] for name in self.state_dict()})


class GrowingSupernet(Supernet):
    """Super-nets of one space with more and more cells, each trained from scratch
    (P-DARTS). Only the one that is ``grown`` runs and learns.

    ``cells`` has the cells per stage of each super-net, reductions not counted, and at
    most those of the space.
    """

    def __init__(
        self,
        space: CellSpace,
        generator: torch.Generator,
        config: SupernetConfig,
        cells: Sequence[int],
    ) -> None:
        super().__init__()
        self.space = space
        self.config = config
        self.grown = len(cells) - 1
        self.stages = nn.ModuleList()
        for count in cells:
            stage_config = config.model_copy(update={"proxy_depth": count})
            self.stages.append(CellSupernet(space, generator, stage_config))

    @classmethod
    def check(cls, space: CellSpace, config: SupernetConfig) -> None:
        """Raise ConfigError if a setting has no meaning for cells."""
        CellSupernet.check(space, config)

    @property
    def proxies(self) -> Sequence[CellSpace]:
        """The space at the depth of each super-net."""
        return [cast(CellSupernet, stage).proxy for stage in self.stages]

    def grow(self, number: int) -> bool:
        """Run super-net ``number`` from now on, and return whether that is a change."""
        changed = self.grown != number
        self.grown = number
        return changed

    @property
    def present(self) -> CellSupernet:
        """The super-net that runs now."""
        return cast(CellSupernet, self.stages[self.grown])

    @property
    def fraction(self) -> float:
        """The part of the training that is over, in [0, 1]."""
        return self.present.fraction

    @fraction.setter
    def fraction(self, part: float) -> None:
        self.present.fraction = part

    @property
    def tracking(self) -> bool:
        """Whether passes in training mode update the running statistics of BN."""
        return self.present.tracking

    @tracking.setter
    def tracking(self, on: bool) -> None:
        self.present.tracking = on

    def no_weight_decay(self) -> set[str]:
        """Names of weights without weight decay: the classifiers'."""
        names: set[str] = set()
        for i, stage in enumerate(self.stages):
            stage_names = cast(CellSupernet, stage).no_weight_decay()
            names |= {f"stages.{i}.{name}" for name in stage_names}
        return names

    def forward(
        self, x_NCHW: Tensor, gates: Gates, probes: Probes | None = None, skip_dropout: float = 0.0
    ) -> Tensor:
        """Run the present super-net."""
        logits: Tensor = self.present(x_NCHW, gates, probes, skip_dropout)
        return logits

    def arch(self, picks: Mapping[str, Option]) -> Architecture:
        """The network of ``picks`` in the present super-net."""
        return self.present.arch(picks)

    def extract(self, picks: Mapping[str, Option]) -> ClassificationNetwork:
        """A standalone network with weights of the present super-net."""
        return self.present.extract(picks)

    def angle_parts(self, picks: Mapping[str, Option]) -> list[tuple[Hashable, int]]:
        """The parts of ``picks`` in the present super-net."""
        return self.present.angle_parts(picks)

    def angle_weights(self, part: Hashable) -> list[Tensor]:
        """The weights of a part of the present super-net."""
        return self.present.angle_weights(part)

    def save(self, path: Path) -> None:
        """Save the deepest super-net, which is the one that runs at the end of the
        training.
        """
        cast(CellSupernet, self.stages[-1]).save(path)


def _proxy(space: CellSpace, config: SupernetConfig) -> CellSpace:
    """The space with fewer and narrower cells, but the same choices."""
    if config.proxy_width == 1.0 and config.proxy_depth is None:
        return space
    cells = tuple(min(count, config.proxy_depth or count) for count in space.cells)
    # the number of channels stays even
    channels = max(2, 2 * round(space.channels * config.proxy_width / 2))
    return space.changed(space.name, cells=cells, channels=channels)


def with_values(gates: Gates) -> Listed:
    """Gates with their values, which are read once for all cells: reading waits for the
    GPU.
    """
    return {key: (gate, gate.tolist()) for key, gate in gates.items()}


def _kept(step: CellStep, gates: Listed) -> Any:
    """The weight with which a node keeps an edge: the sum over the pairs that contain
    it.
    """
    if not step.kept:
        return 1.0
    if step.keep_key not in gates:
        return float(step.kept[0])

    gate, values = gates[step.keep_key]
    containing = [i for i, kept in enumerate(step.kept) if kept]
    if not any(values[i] for i in containing):
        return 0.0
    weights = option_weights(gate, values)
    return sum(weights[i] for i in containing)


def _weighted_options(step: CellStep, gates: Listed) -> list[Weighted]:
    """The options of an edge with nonzero weights, except ``none``, which
    adds nothing.
    """
    if step.key not in gates:
        assert len(step.options) == 1, f"no gate for {step.key}"
        return [(option, 1.0) for option in step.options if option != NONE]

    gate, values = gates[step.key]
    weights = option_weights(gate, values)
    options: list[Weighted] = []
    for i, option in enumerate(step.options):
        if values[i] != 0.0 and option != NONE:
            options.append((option, weights[i]))
    return options


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
