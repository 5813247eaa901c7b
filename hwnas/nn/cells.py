"""The weight-shared super-net of a space of cells.

Every option of every edge of every cell has weights of its own; the cells of one kind
run under the same gates. One option of a choice with weight 1 is a single path, which
runs that option alone. Several are DARTS's mixture: outputs are added up by weight; an
edge weighs as much as the pairs of edges that keep it. BN uses the statistics of the
batch unless ``bn_track`` is set. Where DARTS's cells pool, a BN without scale and shift
follows, as in its search (and in networks that are extracted), not in the networks that
are trained in the end.

``bn_affine = false`` leaves scale and shift to the stem, the reductions and the last
BN, as DARTS's and NAS-Bench-201's super-nets do.

Weights begin as PyTorch's do, as in the papers' code; ``initialisation = "he"`` is TuNAS's.
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
from hwnas.core.cell_plan import NONE, CellStep
from hwnas.core.cells import CellSpace
from hwnas.core.ops import Pool
from hwnas.core.space import Option
from hwnas.errors import ConfigError
from hwnas.nn.blocks import build, initialise
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.nn.shared import Gates, Probes, Supernet, check_proxy_resolution, resized, resolve_config

UNSUPPORTED = {"channels": "first", "operation_on": "node", "wsbn": False, "path_dropout": 0.0}
"""Settings that say how options share weights, which options of cells do not, and the
values that leave them off.
"""
BN_MOMENTUM = 0.1

Listed = Mapping[str, tuple[Any, list[float]]]
"""Choice key -> the gate vector, and its values."""

Weighted = tuple[str, Any]
"""An option and its weight, a number or a scalar tensor."""


class CellSupernet(Supernet):
    """All networks of a space of cells in one module.

    Example:
        >>> supernet = CellSupernet(space, torch.Generator().manual_seed(0))      # doctest: +SKIP
        >>> logits = supernet(images, one_hot(picks, space))            # doctest: +SKIP
    """

    space: CellSpace
    proxy: CellSpace

    def __init__(
        self, space: CellSpace, generator: torch.Generator, config: SupernetConfig | None = None
    ) -> None:
        super().__init__()
        self.config = config = resolve_config(config, "torch")
        self.check(space, config)
        self.space, self.proxy = space, _proxy(space, config)
        self.places = self.proxy.plan(pool_norm=space.skeleton == "darts")
        self.parts = nn.ModuleList(self._part(place) for place in self.places)
        self._last_use = {
            point: position for position, place in enumerate(self.places) for point in place.of
        }
        self.fraction, self._tracking = 0.0, True
        initialise(self, generator, config.initialisation)

    @classmethod
    def check(cls, space: CellSpace, config: SupernetConfig) -> None:
        """Raise ConfigError where a setting has no meaning for cells."""
        check_proxy_resolution(space, config, space.multiple)
        for key, usual in UNSUPPORTED.items():
            if getattr(config, key) != usual:
                raise ConfigError(
                    f"search.supernet.{key} = {getattr(config, key)!r} says how blocks in a row"
                    f" share weights, and space {space.name} is one of cells: set it to {usual!r}."
                )
        for key, usual in (("sharing", "separate"), ("kernels", "own")):
            if getattr(config, key) not in ("auto", usual):
                raise ConfigError(
                    f"search.supernet.{key} = {getattr(config, key)!r}, but the options of space"
                    f" {space.name} share no weights: set {usual!r}."
                )

    def _part(self, place: CellStep) -> nn.Module:
        """The weights of a place."""
        if place.kind == "op":
            assert place.op is not None
            part = build(place.op, bn_eps=self.space.bn_eps, dropout=self.config.dropout)
            return self._normed(part, affine=self.config.bn_affine or ".pre" not in place.slot)
        ops = zip(place.options, place.ops, strict=True) if place.kind == "edge" else ()
        options = nn.ModuleDict(
            {option: build(op, bn_eps=self.space.bn_eps) for option, op in ops if op is not None}
        )
        return self._normed(options, affine=self.config.bn_affine)

    def _normed(self, part: nn.Module, affine: bool) -> nn.Module:
        """A part with its BN as the configuration has it."""
        for module in list(part.modules()):
            for name, norm in module.named_children():
                if isinstance(norm, nn.BatchNorm2d):
                    options: dict[str, Any] = {
                        "affine": norm.affine and affine,
                        "track_running_stats": self.config.bn_track,
                    }
                    setattr(
                        module,
                        name,
                        nn.BatchNorm2d(norm.num_features, norm.eps, BN_MOMENTUM, **options),
                    )
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
        """The classifier's weights."""
        return {f"parts.{len(self.parts) - 1}.linear.weight"}

    def forward(
        self, x_NCHW: Tensor, gates: Gates, probes: Probes | None = None, skip_dropout: float = 0.0
    ) -> Tensor:
        """Images [N, channels, size, size] under ``gates`` -> logits [N, classes].
        Options are not probed here.
        """
        assert not probes, "options of cells are not probed"
        x_NCHW = resized(x_NCHW, self.proxy_resolution() or self.space.resolution)
        listed = with_values(gates)
        points: dict[int, Tensor | None] = {0: x_NCHW}
        for position, (place, part) in enumerate(zip(self.places, self.parts, strict=True)):
            read = [points[point] for point in place.of]
            if place.kind == "sum" and not any(each is not None for each in read):
                size = place.size * x_NCHW.shape[-1] // self.space.resolution
                shape = (x_NCHW.shape[0], place.channels, size, size)
                points[position + 1] = x_NCHW.new_zeros(shape).contiguous(
                    memory_format=torch.channels_last
                )
            else:
                points[position + 1] = self._made(place, part, read, listed, skip_dropout)
            for point in set(place.of):
                if self._last_use[point] == position:
                    del points[point]
        return cast(Tensor, points[len(self.places)])

    def _made(
        self,
        place: CellStep,
        part: Any,
        read: Sequence[Tensor | None],
        gates: Listed,
        skip_dropout: float,
    ) -> Tensor | None:
        """What a place makes; None is the zero of an edge that is not there."""
        present = [x_NCHW for x_NCHW in read if x_NCHW is not None]
        if place.kind == "sum":
            return _sum(present)
        if place.kind == "concat":
            return torch.cat(present, dim=1)
        if place.kind == "op":
            made: Tensor = part(present[0])
            return made
        return self._edge(place, part, present[0], gates, skip_dropout)

    def _edge(
        self, place: CellStep, part: Any, x_NCHW: Tensor, gates: Listed, skip_dropout: float
    ) -> Tensor | None:
        """The gated sum of an edge's options."""
        kept = _kept(place, gates)
        options = _weighted(place, gates)
        if _is(kept, 0.0) or not options:
            return None

        def mixed(x_NCHW: Tensor) -> Tensor:
            return _sum(
                [
                    _times(self._option(part, option, x_NCHW, skip_dropout), weight)
                    for option, weight in options
                ]
            )

        computed = sum(option in part for option, _ in options)
        if computed > 1 and self.training and self.config.remat and not self.config.bn_track:
            y_NCHW: Tensor = checkpoint(
                mixed, x_NCHW, use_reentrant=False, preserve_rng_state=skip_dropout > 0
            )
        else:
            y_NCHW = mixed(x_NCHW)
        return _times(y_NCHW, kept)

    def _option(self, part: Any, option: str, x_NCHW: Tensor, skip_dropout: float) -> Tensor:
        if option in part:
            y_NCHW: Tensor = part[option](x_NCHW)
            return y_NCHW
        return F.dropout(x_NCHW, skip_dropout, self.training) if skip_dropout else x_NCHW

    def arch(self, picks: Mapping[str, Option]) -> Architecture:
        """The network of ``picks`` at the proxies' depth and width, with the BN behind
        pooling that a search has.
        """
        return self.proxy.network(picks, self.places)

    def extract(self, picks: Mapping[str, Option]) -> ClassificationNetwork:
        """A stand-alone network with copies of the weights that ``picks`` use. Its BN
        statistics are not estimated yet.
        """
        network = ClassificationNetwork(self.arch(picks)).to(next(self.parameters()))
        with torch.no_grad():
            for block, origin in zip(
                network.blocks, self.proxy.walk(picks, self.places)[1], strict=True
            ):
                shared = self._shared(origin.place, origin.option)
                tensors = block.state_dict()
                for name, tensor in shared.state_dict().items():
                    tensors[name].copy_(tensor)
        return network

    def _shared(self, position: int, option: str) -> nn.Module:
        part: Any = self.parts[position]
        module: nn.Module = part[option] if option else part
        return module

    def angle_parts(self, picks: Mapping[str, Option]) -> list[tuple[Hashable, int]]:
        """Positions of places with the options that run there (Hu et al., arXiv
        2004.13431, for cells).

        Weights are taken along every path from an input of a cell to its output, so
        those of an edge occur once per path; a path with ``none`` on it, or with an
        edge that is not kept, is no path; ``skip_connect`` has no weights. The fixed
        parts follow once.
        """
        found: list[tuple[Hashable, int]] = []
        paths = self.space.paths(picks)
        for position, place in enumerate(self.places):
            if place.kind == "op":
                found.append(((position, ""), 1))
            elif place.kind == "edge" and paths[place.key]:
                option = str(picks.get(place.key, place.options[0]))
                if place.ops[place.options.index(option)] is not None:
                    found.append(((position, option), paths[place.key]))
        return found

    def angle_weights(self, part: Hashable) -> list[Tensor]:
        """The convolutions of an option; of pooling, one kernel of 1 / k^2 per channel,
        before and after training.

        Of the fixed parts, all parameters of NAS-Bench-201's skeleton, and the
        convolutions and the classifier of DARTS's.
        """
        position, option = cast(tuple[int, str], part)
        place = self.places[position]
        op = place.ops[place.options.index(option)] if option else None
        if isinstance(op, Pool):
            return [
                next(self.parameters()).new_full((op.in_ch, op.kernel, op.kernel), 1 / op.kernel**2)
            ]
        everything = not option and self.space.skeleton == "nasbench201"
        return [
            weight
            for weight in self._shared(position, option).parameters()
            if everything or weight.dim() > 1
        ]

    def copy_weights(self, source: Supernet) -> None:
        """Begin with the weights of the super-net of a space that this one's was shrunk
        from: those of the options that are left.
        """
        there = source.state_dict()
        self.load_state_dict({name: there[name] for name in self.state_dict()})


class GrowingSupernet(Supernet):
    """Super-nets of one space with more and more cells, each beginning anew (P-DARTS).
    Only the one that is ``grown`` runs and learns.

    ``cells`` are the cells of each stage, reductions not counted, in each of them; at
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
        self.space, self.config, self.grown = space, config, len(cells) - 1
        sized = [config.model_copy(update={"proxy_depth": count}) for count in cells]
        self.stages = nn.ModuleList(CellSupernet(space, generator, each) for each in sized)

    @classmethod
    def check(cls, space: CellSpace, config: SupernetConfig) -> None:
        """As each of them."""
        CellSupernet.check(space, config)

    @property
    def proxies(self) -> Sequence[CellSpace]:
        """The space with the cells of each stage."""
        return [cast(CellSupernet, stage).proxy for stage in self.stages]

    def grow(self, number: int) -> bool:
        """Run super-net ``number`` from now on; whether another one did until now."""
        changed, self.grown = self.grown != number, number
        return changed

    @property
    def present(self) -> CellSupernet:
        """The super-net that runs."""
        return cast(CellSupernet, self.stages[self.grown])

    @property
    def fraction(self) -> float:
        """How much of the training is over."""
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
        """The classifiers' weights."""
        return {
            f"stages.{i}.{name}"
            for i, stage in enumerate(self.stages)
            for name in cast(CellSupernet, stage).no_weight_decay()
        }

    def forward(
        self, x_NCHW: Tensor, gates: Gates, probes: Probes | None = None, skip_dropout: float = 0.0
    ) -> Tensor:
        """As the present super-net."""
        logits: Tensor = self.present(x_NCHW, gates, probes, skip_dropout)
        return logits

    def arch(self, picks: Mapping[str, Option]) -> Architecture:
        """As the present super-net."""
        return self.present.arch(picks)

    def extract(self, picks: Mapping[str, Option]) -> ClassificationNetwork:
        """As the present super-net."""
        return self.present.extract(picks)

    def angle_parts(self, picks: Mapping[str, Option]) -> list[tuple[Hashable, int]]:
        """As the present super-net."""
        return self.present.angle_parts(picks)

    def angle_weights(self, part: Hashable) -> list[Tensor]:
        """As the present super-net."""
        return self.present.angle_weights(part)

    def save(self, path: Path) -> None:
        """The deepest super-net, which is the one that is left when the training is over."""
        cast(CellSupernet, self.stages[-1]).save(path)


def _proxy(space: CellSpace, config: SupernetConfig) -> CellSpace:
    """The space with fewer cells and narrower ones: the same choices."""
    if config.proxy_width == 1.0 and config.proxy_depth is None:
        return space
    cells = tuple(min(count, config.proxy_depth or count) for count in space.cells)
    return space.changed(
        space.name, cells=cells, channels=max(2, 2 * round(space.channels * config.proxy_width / 2))
    )


def with_values(gates: Gates) -> Listed:
    """Gates with their values, read once for all cells: reading waits for a GPU."""
    return {key: (gate, gate.tolist()) for key, gate in gates.items()}


def _kept(place: CellStep, gates: Listed) -> Any:
    """How much of an edge its node keeps: the sum of the weights of the pairs that it is in."""
    if not place.kept:
        return 1.0
    if place.keep_key not in gates:
        return float(place.kept[0])
    gate, values = gates[place.keep_key]
    inside = [i for i, kept in enumerate(place.kept) if kept]
    if not any(values[i] for i in inside):
        return 0.0
    return sum(gate[i] for i in inside) if _differentiable(gate) else sum(values[i] for i in inside)


def _weighted(place: CellStep, gates: Listed) -> list[Weighted]:
    """The options of an edge with a weight, but for ``none``, which adds nothing."""
    if place.key not in gates:
        assert len(place.options) == 1, f"no gate for {place.key}"
        weights: list[Weighted] = [(place.options[0], 1.0)]
    else:
        gate, values = gates[place.key]
        weights = [
            (each, gate[i] if _differentiable(gate) else values[i])
            for i, each in enumerate(place.options)
            if values[i] != 0.0
        ]
    return [(option, weight) for option, weight in weights if option != NONE]


def _differentiable(gate: Any) -> bool:
    return isinstance(gate, Tensor) and gate.requires_grad


def _is(weight: Any, value: float) -> bool:
    """Whether a weight is a plain number of this value; a tensor carries a gradient and
    never is.
    """
    return not isinstance(weight, Tensor) and float(weight) == value


def _times(x_NCHW: Tensor, weight: Any) -> Tensor:
    """Without a copy where the weight is 1."""
    return x_NCHW if _is(weight, 1.0) else x_NCHW * weight


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
