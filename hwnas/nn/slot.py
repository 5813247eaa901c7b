"""One slot of a super-net: the shared weights of all its options and widths, run under gates.

Sharing ``collapsed`` is TuNAS's (arXiv 2008.06120, section 4): one expansion and one projection convolution for all kernel
sizes and expansions, one depthwise convolution per kernel size. Sharing ``separate`` gives every option weights of its own
(ProxylessNAS, FBNet, SPOS, DARTS), but for those that differ in nothing but a kernel size that is cut out of a larger one (OFA
kernel). ``sources`` (operation on edge) gives each producer of the input weights of its own too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hwnas.core.op import Layer, Op
from hwnas.core.option import SKIP
from hwnas.core.space import Slot
from hwnas.nn.blocks import se_gate, shuffle_channels
from hwnas.nn.elastic import ElasticConv, Sharing

_KERNEL_LAYERS = ("depthwise", "conv")
"""Layers whose kernel size an option chooses; all others are 1 x 1."""


@dataclass(frozen=True)
class Width:
    """A stage's output width under gates.

    ``active`` is the widest option with a weight, ``run`` the widest that is computed at all (probed ones included);
    ``mask_C`` weights the first ``run`` channels by the options that hold them, None where all weigh 1.
    """

    active: int
    run: int
    mask_C: Tensor | None = None


@dataclass(frozen=True)
class SlotGates:
    """What a slot is to run: (option, weight) pairs with a weight, options that are only probed, the whole gate vector."""

    executed: tuple[tuple[str, Any], ...]
    probed: tuple[tuple[int, str], ...] = ()
    vector: Any = None


@dataclass(frozen=True)
class Run:
    """How a slot is run.

    ``source`` is the number of the slot that the input comes from, ``tracks`` whether BN may update its running statistics. The
    rest: dropout behind skips, the probability of keeping a residual branch, rematerialisation of options.
    """

    source: int = 0
    skip_dropout: float = 0.0
    keep_path: float = 1.0
    remat: bool = False
    tracks: bool = True


@dataclass(frozen=True)
class _Member:
    """An option to run, the op it is at the widths that are run, and its weight."""

    option: str
    op: Op
    weight: Any


class ElasticSlot(nn.Module):
    """One slot with the shared weights of all its options and widths."""

    def __init__(self, slot: Slot, bn_eps: float, sharing: Sharing, separate: bool = False, sources: int = 1, norms: int = 1) -> None:
        super().__init__()
        self.slot, self.separate, self.sharing = slot, separate, sharing
        self._names: dict[tuple[str, str], str] = {}
        self._ops: dict[tuple[str, int, int, int, int], tuple[Op | None, bool]] = {}
        self._runs_with = {option: option if separate else _without_kernel(option) for option in slot.options}
        widest: dict[str, Layer] = {}
        kernels: dict[str, set[int]] = {}
        for option in slot.options:
            for in_ch, out_ch in slot.widths:
                op = slot.op(option, in_ch, out_ch)
                for layer in op.layers if op is not None else ():
                    name = self._names[option, layer.name] = self._shared_name(option, layer)
                    known = widest.get(name, layer)
                    kernels.setdefault(name, set()).add(layer.kernel)
                    widest[name] = replace(
                        layer,
                        in_ch=max(layer.in_ch, known.in_ch),
                        out_ch=max(layer.out_ch, known.out_ch),
                        groups=max(layer.groups, known.groups),  # equal, but for depthwise layers: their widest has most groups
                    )
        self.copies = nn.ModuleList(
            nn.ModuleDict({name: ElasticConv(layer, tuple(kernels[name]), bn_eps, sharing, norms) for name, layer in widest.items()})
            for _ in range(sources)
        )
        self.norms = norms

    def _shared_name(self, option: str, layer: Layer) -> str:
        """Which shared weights a layer of an option uses."""
        own = layer.name in _KERNEL_LAYERS and self.sharing.kernels == "own"
        kernel = f"_k{layer.kernel}" if own else ""
        groups = f"_g{layer.groups}" if layer.groups > 1 and layer.name != "depthwise" else ""
        owner = option if self.sharing.kernels == "own" else _without_kernel(option)
        prefix = f"{owner.replace('.', '_')}|" if self.separate else ""
        return f"{prefix}{layer.name}{kernel}{groups}"

    def forward(self, x_NCHW: Tensor, gates: SlotGates, into: Width, out: Width, run: Run = Run()) -> Tensor:
        """The gated sum of the slot's options: [N, into.run, H, W] -> [N, out.run, H', W']."""
        groups: dict[str, list[_Member]] = {}
        identity: Any = 0.0  # how much of the input passes beside the options: the weights of those with a residual
        skipped: Any = 0.0
        all_residual = True
        for option, weight in gates.executed:
            op, residual = self._op(option, into, out)
            if op is None:
                skipped = skipped + weight
                continue
            identity = identity + weight if residual else identity
            all_residual = all_residual and residual
            groups.setdefault(self._runs_with[option], []).append(_Member(option, op, weight))
        branch = _sum(fitted(self._gated(x_NCHW, members, run), out.run) for members in groups.values())
        if branch is not None and all_residual and self.training and run.keep_path < 1.0:
            branch = _drop_path(branch, run.keep_path)
        if branch is not None and out.mask_C is not None:
            branch = branch * out.mask_C[:, None, None]
        terms = [branch] if branch is not None else []
        if not _is(identity, 0.0):
            terms.append(_weighted(fitted(x_NCHW, out.run), identity))
        if not _is(skipped, 0.0):
            terms.append(_weighted(F.dropout(x_NCHW, run.skip_dropout, self.training), skipped))
        assert terms, f"nothing runs in {self.slot.key}"
        total: Tensor = _sum(terms)
        if gates.probed and _differentiable(gates.vector):
            probes = [(position, self._probe(option, into, out, run)) for position, option in gates.probed]
            total = _Probed.apply(total, x_NCHW.detach(), gates.vector, probes)
        return total

    def _op(self, option: str, into: Width, out: Width) -> tuple[Op | None, bool]:
        """The option's op at the active widths, stretched to those that are run; and whether the input is added to its output.

        A depthwise convolution on the input is not stretched, as its BN would make something of channels that are 0; nor is a
        convolution in groups, where other channels would meet. Both leave the further channels out.
        """
        key = (option, into.active, into.run, out.active, out.run)
        if key not in self._ops:
            op = self.slot.op(option, into.active, out.active)
            residual = op is not None and op.residual
            if op is not None and (into.active, out.active) != (into.run, out.run):
                grouped = op.groups > 1
                in_ch = into.active if grouped or op.kind == "dsconv" else into.run
                op = replace(op, in_ch=in_ch, out_ch=out.active if grouped else out.run, residual=False)
            self._ops[key] = op, residual
        return self._ops[key]

    def _gated(self, x_NCHW: Tensor, members: list[_Member], run: Run) -> Tensor:
        """A group, without what its backward pass needs where that is to be computed again. Statistics count once."""
        if not run.remat or not self.training:
            return self._group(x_NCHW, members, run)
        runs = chain([run], repeat(replace(run, tracks=False)))
        draws = self.sharing.channels in ("chunk", "random")  # only these; asking a GPU for its generator's state would wait for it
        gated: Tensor = checkpoint(lambda x: self._group(x, members, next(runs)), x_NCHW, use_reentrant=False, preserve_rng_state=draws)
        return gated

    def _group(self, x_NCHW: Tensor, members: list[_Member], run: Run) -> Tensor:
        """Options that differ in their kernel only: their depthwise outputs are mixed, the rest runs once."""
        option, first = members[0].option, members[0].op
        weight_sum = _sum(member.weight for member in members)
        x_NCHW = fitted(x_NCHW, first.in_ch)
        if first.pooled:
            x_NCHW = F.adaptive_avg_pool2d(x_NCHW, 1)
        for position, layer in enumerate(first.layers):
            if layer.name == "depthwise" and first.shuffled:
                x_NCHW = shuffle_channels(x_NCHW, first.groups)
            if layer.name == "se_expand":
                continue
            if layer.name == "se_reduce":
                squeezed = self._run(F.adaptive_avg_pool2d(x_NCHW, 1), option, layer, run)
                x_NCHW = x_NCHW * se_gate(self._run(squeezed, option, first.layers[position + 1], run), first.se_gate)
            elif len(members) > 1 and layer.name in _KERNEL_LAYERS:
                mixed = [each.weight / weight_sum * self._run(x_NCHW, each.option, each.op.layers[position], run) for each in members]
                x_NCHW = sum(mixed[1:], mixed[0])
            else:
                x_NCHW = self._run(x_NCHW, option, layer, run)
        return _weighted(x_NCHW, weight_sum)

    def _run(self, x_NCHW: Tensor, option: str, layer: Layer, run: Run) -> Tensor:
        module: Any = self.copies[run.source if len(self.copies) > 1 else 0]
        y_NCHW: Tensor = module[self._names[option, layer.name]](x_NCHW, layer, run.source if self.norms > 1 else 0, run.tracks)
        return y_NCHW

    def _probe(self, option: str, into: Width, out: Width, run: Run) -> Callable[[Tensor], Tensor]:
        """An option's whole output as a function of the input, residual and mask included, without any dropout."""
        alone, plain = SlotGates(((option, 1.0),)), Run(run.source, tracks=False)
        return lambda x_NCHW: self(x_NCHW, alone, into, out, plain)

    def weights(self, option: str, op: Op, source: int = 0) -> dict[str, Tensor]:
        """State of a stand-alone block of ``op``, taken from the shared weights."""
        module: Any = self.copies[source if len(self.copies) > 1 else 0]
        state: dict[str, Tensor] = {}
        for layer in op.layers:
            shared = module[self._names[option, layer.name]]
            prefix = layer.name.replace("se_", "se.")
            tensors = shared.sliced(layer, *shared.narrow(layer), source if self.norms > 1 else 0)
            state |= {f"layers.{prefix}.{name}": tensor for name, tensor in tensors.items()}
        return state


class _Probed(torch.autograd.Function):
    """Passes the output through; in the backward pass, the gate of each probed option gets <its output, gradient of the output>.

    The option is run only then, without a graph, so that it costs time but no memory (ProxylessNAS's ``full_v2``). This is the
    derivative of the sum of all options' outputs; options that share a projection (``collapsed``) are probed as if they did not.
    """

    @staticmethod
    def forward(ctx: Any, y_NCHW: Tensor, x_NCHW: Tensor, gate: Tensor, probes: Sequence[tuple[int, Callable[[Tensor], Tensor]]]) -> Tensor:
        """Nothing changes."""
        ctx.save_for_backward(x_NCHW)
        ctx.probes, ctx.gate, kind = probes, gate.detach(), x_NCHW.device.type
        ctx.autocast = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        return y_NCHW.view_as(y_NCHW)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Gradients of the output (as it came) and of the gate."""
        (x_NCHW,) = ctx.saved_tensors
        gradient = gradients[0]
        by_gate = torch.zeros_like(ctx.gate)
        with torch.no_grad(), torch.autocast(**ctx.autocast):
            for position, output in ctx.probes:
                by_gate[position] = (output(x_NCHW) * gradient).sum()
        return gradient, None, by_gate, None


def executed(slot: Slot, gate: Any, probed: Sequence[int] = ()) -> SlotGates:
    """The gates of a slot from its gate vector (None: its one option) and the options to probe."""
    if gate is None:
        assert len(slot.options) == 1, f"no gate for {slot.key}"
        return SlotGates(((slot.options[0], 1.0),))
    values = gate.tolist()
    pairs = tuple((option, gate[i] if _differentiable(gate) else values[i]) for i, option in enumerate(slot.options) if values[i] != 0.0)
    return SlotGates(pairs, tuple((i, slot.options[i]) for i in probed if values[i] == 0.0), gate)


def skips(gates: SlotGates) -> bool:
    """Whether nothing but skip is executed."""
    return all(option == SKIP for option, _ in gates.executed)


def _without_kernel(option: str) -> str:
    """What options that differ in their kernel only have in common."""
    return "_".join(part for part in option.split("_") if not part.startswith("k"))


def _differentiable(gate: Any) -> bool:
    return isinstance(gate, Tensor) and gate.requires_grad


def _is(weight: Any, value: float) -> bool:
    """Whether a weight is a plain number of this value; a tensor carries a gradient and never is."""
    return not isinstance(weight, Tensor) and float(weight) == value


def _weighted(x_NCHW: Tensor, weight: Any) -> Tensor:
    """Without a copy where the weight is 1."""
    return x_NCHW if _is(weight, 1.0) else x_NCHW * weight


def _sum(terms: Iterable[Any]) -> Any:
    """None of nothing. Terms are asked for one after another, so that no more than two are kept."""
    total: Any = None
    for term in terms:
        total = term if total is None else total + term
    return total


def fitted(x_NCHW: Tensor, channels: int) -> Tensor:
    """The first ``channels`` channels, zeros for those that are missing: widths that are only probed hold nothing."""
    missing = channels - x_NCHW.shape[1]
    if missing > 0:
        return F.pad(x_NCHW, (0, 0, 0, 0, 0, missing))
    return x_NCHW[:, :channels] if missing else x_NCHW


def _drop_path(y_NCHW: Tensor, keep: float) -> Tensor:
    """Zero whole images of a residual branch with probability 1 - keep, the others divided by keep."""
    kept_N111 = torch.rand(y_NCHW.shape[0], 1, 1, 1, device=y_NCHW.device) < keep
    return y_NCHW * (kept_N111.to(y_NCHW.dtype) / keep)
