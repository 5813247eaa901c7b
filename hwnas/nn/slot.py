"""One slot of a super-net: the shared weights of all its options and widths, run under gates.

Sharing ``collapsed`` is TuNAS's (arXiv 2008.06120, section 4): one expansion and one
projection convolution for all kernel sizes and expansions, one depthwise convolution
per kernel size. Sharing ``separate`` gives every option weights of its own
(ProxylessNAS, FBNet, SPOS, DARTS), but for those that differ in nothing but a kernel
size that is cut out of a larger one (OFA kernel). ``sources`` (operation on edge) gives
each producer of the input weights of its own too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hwnas.core.ir import INPUT, Node, Program
from hwnas.core.ops import Op
from hwnas.core.option import SKIP
from hwnas.core.space import Slot
from hwnas.nn.blocks import PLAIN
from hwnas.nn.elastic import Sharing, elastic

_OWN_KERNELS = ("depthwise", "conv")
"""Nodes that have weights per kernel size even where theirs is 1; the others have them
where a kernel is larger.
"""


@dataclass(frozen=True)
class Width:
    """A stage's output width under gates.

    ``active`` is the widest option with a weight, ``run`` the widest that is computed
    at all (probed ones included); ``mask_C`` weights the first ``run`` channels by the
    options that hold them, None where all weigh 1.
    """

    active: int
    run: int
    mask_C: Tensor | None = None


@dataclass(frozen=True)
class SlotGates:
    """What a slot is to run: (option, weight) pairs with a weight, options that are
    only probed, the whole gate vector.
    """

    executed: tuple[tuple[str, Any], ...]
    probed: tuple[tuple[int, str], ...] = ()
    vector: Any = None


@dataclass(frozen=True)
class Run:
    """How a slot is run.

    ``source`` is the number of the slot that the input comes from, ``tracks`` whether
    BN may update its running statistics. The rest: dropout behind skips, the
    probability of keeping a residual branch, rematerialisation of options.
    """

    source: int = 0
    skip_dropout: float = 0.0
    keep_path: float = 1.0
    remat: bool = False
    tracks: bool = True


@dataclass(frozen=True)
class _Member:
    """An option to run, what it computes at the widths that are run (its residual
    apart), and its weight.
    """

    option: str
    program: Program
    weight: Any


@dataclass(frozen=True)
class _Branch:
    """What an option computes between two widths, beside whether its input is added;
    and what it can be run together with.
    """

    program: Program
    residual: bool
    runs_with: Hashable


class ElasticSlot(nn.Module):
    """One slot with the shared weights of all its options and widths."""

    def __init__(
        self,
        slot: Slot,
        bn_eps: float,
        sharing: Sharing,
        separate: bool = False,
        sources: int = 1,
        norms: int = 1,
    ) -> None:
        super().__init__()
        self.slot, self.separate, self.sharing = slot, separate, sharing
        self._names: dict[tuple[str, str], str] = {}
        self._branches: dict[tuple[str, int, int, int, int], _Branch | None] = {}
        widest: dict[str, Node] = {}
        kernels: dict[str, set[int]] = {}
        for option in slot.options:
            for in_ch, out_ch in slot.widths:
                op = slot.op(option, in_ch, out_ch)
                for node in op.layers if op is not None else ():
                    name = self._names[option, node.name] = self._shared_name(option, node)
                    known = widest.get(name, node)
                    kernels.setdefault(name, set()).add(node.kernel)
                    widest[name] = replace(
                        node,
                        in_ch=max(node.in_ch, known.in_ch),
                        out_ch=max(node.out_ch, known.out_ch),
                        # equal, but for depthwise nodes: their widest has most groups
                        groups=max(node.groups, known.groups),
                    )
        self.copies = nn.ModuleList(
            nn.ModuleDict(
                {
                    name: elastic(node, tuple(kernels[name]), bn_eps, sharing, norms)
                    for name, node in widest.items()
                }
            )
            for _ in range(sources)
        )
        self.norms = norms

    def _shared_name(self, option: str, node: Node) -> str:
        """Which shared weights a node of an option uses."""
        own = node.kind == "channels" or (
            self.sharing.kernels == "own" and (node.kernel > 1 or node.name in _OWN_KERNELS)
        )
        kernel = f"_k{node.kernel}" if own else ""
        groups = f"_g{node.groups}" if node.groups > 1 and not node.depthwise else ""
        owner = option if self.sharing.kernels == "own" else _without_kernel(option)
        prefix = f"{owner.replace('.', '_')}|" if self.separate else ""
        return f"{prefix}{node.name.replace('.', '_')}{kernel}{groups}"

    def forward(
        self, x_NCHW: Tensor, gates: SlotGates, into: Width, out: Width, run: Run = Run()
    ) -> Tensor:
        """The gated sum of the slot's options: [N, into.run, H, W] -> [N, out.run, H', W']."""
        groups: dict[Hashable, list[_Member]] = {}
        # how much of the input passes beside the options: the weights of those with a residual
        identity: Any = 0.0
        skipped: Any = 0.0
        all_residual = True
        for option, weight in gates.executed:
            option_branch = self._branch(option, into, out)
            if option_branch is None:
                skipped = skipped + weight
                continue
            identity = identity + weight if option_branch.residual else identity
            all_residual = all_residual and option_branch.residual
            groups.setdefault(option_branch.runs_with, []).append(
                _Member(option, option_branch.program, weight)
            )
        branch = _sum(
            fitted(self._gated(x_NCHW, members, run), out.run) for members in groups.values()
        )
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
            probes = [
                (position, self._probe(option, into, out, run)) for position, option in gates.probed
            ]
            total = _Probed.apply(total, x_NCHW.detach(), gates.vector, probes)
        return total

    def _branch(self, option: str, into: Width, out: Width) -> _Branch | None:
        """What an option computes at the active widths, stretched to those that are
        run; None for skip.

        A convolution in groups that reads the input is not stretched, where other
        channels would meet, and a depthwise one neither, as its BN would make something
        of channels that are 0. Nor is a grouped one that makes the output. Both leave
        the further channels out.
        """
        key = (option, into.active, into.run, out.active, out.run)
        if key not in self._branches:
            op = self.slot.op(option, into.active, out.active)
            self._branches[key] = None if op is None else self._stretched(option, op, into, out)
        return self._branches[key]

    def _stretched(self, option: str, op: Op, into: Width, out: Width) -> _Branch:
        program = op.branch.program
        nodes, [output] = program.nodes, program.outputs
        in_ch = (
            into.active
            if any(node.groups > 1 for node in nodes if INPUT in node.inputs)
            else into.run
        )
        out_ch = out.active if nodes[output - 1].groups > 1 else out.run
        program = op.resized(in_ch, out_ch).program
        return _Branch(program, op.residual, option if self.separate else _without_kernels(program))

    def _gated(self, x_NCHW: Tensor, members: list[_Member], run: Run) -> Tensor:
        """A group, without what its backward pass needs where that is to be computed
        again. Statistics count once.
        """
        if not run.remat or not self.training:
            return self._group(x_NCHW, members, run)
        runs = chain([run], repeat(replace(run, tracks=False)))
        # only these; asking a GPU for its generator's state would wait for it
        draws = self.sharing.channels in ("chunk", "random")
        gated: Tensor = checkpoint(
            lambda x: self._group(x, members, next(runs)),
            x_NCHW,
            use_reentrant=False,
            preserve_rng_state=draws,
        )
        return gated

    def _group(self, x_NCHW: Tensor, members: list[_Member], run: Run) -> Tensor:
        """Options that differ in kernels only: what these make is mixed, the rest runs once."""
        first = members[0]
        weight_sum = _sum(member.weight for member in members)
        values = {INPUT: fitted(x_NCHW, first.program.in_ch)}
        for position, node in enumerate(first.program.nodes):
            read = [values[value] for value in node.inputs]
            if node.kind in PLAIN:
                made = PLAIN[node.kind](node, read)
            elif len(members) > 1 and any(
                member.program.nodes[position] != node for member in members[1:]
            ):
                made = self._mixed(read[0], members, position, run)
            else:
                made = self._run(read[0], first.option, node, run)
            values[position + 1] = made
            for value in first.program.endings[position]:
                del values[value]
        [output] = first.program.outputs
        return _weighted(values[output], weight_sum)

    def _mixed(self, x_NCHW: Tensor, members: list[_Member], position: int, run: Run) -> Tensor:
        """The weighted mean of what a node makes with the kernels of several options."""
        weight_sum = _sum(member.weight for member in members)
        mixed = [
            member.weight
            / weight_sum
            * self._run(x_NCHW, member.option, member.program.nodes[position], run)
            for member in members
        ]
        total: Tensor = sum(mixed[1:], mixed[0])
        return total

    def _run(self, x_NCHW: Tensor, option: str, node: Node, run: Run) -> Tensor:
        module: Any = self.copies[run.source if len(self.copies) > 1 else 0]
        y_NCHW: Tensor = module[self._names[option, node.name]](
            x_NCHW, node, run.source if self.norms > 1 else 0, run.tracks
        )
        return y_NCHW

    def _probe(self, option: str, into: Width, out: Width, run: Run) -> Callable[[Tensor], Tensor]:
        """An option's whole output as a function of the input, residual and mask
        included, without any dropout.
        """
        alone, plain = SlotGates(((option, 1.0),)), Run(run.source, tracks=False)
        return lambda x_NCHW: self(x_NCHW, alone, into, out, plain)

    def weights(self, option: str, op: Op, source: int = 0) -> dict[str, Tensor]:
        """State of a stand-alone block of ``op``, taken from the shared weights."""
        module: Any = self.copies[source if len(self.copies) > 1 else 0]
        state: dict[str, Tensor] = {}
        for node in op.layers:
            shared = module[self._names[option, node.name]]
            tensors = shared.sliced(node, *shared.narrow(node), source if self.norms > 1 else 0)
            state |= {f"{op.WEIGHTS}{node.name}.{name}": tensor for name, tensor in tensors.items()}
        return state


class _Probed(torch.autograd.Function):
    """Passes the output through; in the backward pass, the gate of each probed option
    gets <its output, gradient of the output>.

    The option is run only then, without a graph, so that it costs time but no memory
    (ProxylessNAS's ``full_v2``). This is the derivative of the sum of all options'
    outputs; options that share a projection (``collapsed``) are probed as if they did
    not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_NCHW: Tensor,
        x_NCHW: Tensor,
        gate: Tensor,
        probes: Sequence[tuple[int, Callable[[Tensor], Tensor]]],
    ) -> Tensor:
        """Nothing changes."""
        ctx.save_for_backward(x_NCHW)
        ctx.probes, ctx.gate, kind = probes, gate.detach(), x_NCHW.device.type
        ctx.autocast = {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
        }
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
    pairs = tuple(
        (option, gate[i] if _differentiable(gate) else values[i])
        for i, option in enumerate(slot.options)
        if values[i] != 0.0
    )
    return SlotGates(pairs, tuple((i, slot.options[i]) for i in probed if values[i] == 0.0), gate)


def skips(gates: SlotGates) -> bool:
    """Whether nothing but skip is executed."""
    return all(option == SKIP for option, _ in gates.executed)


def _without_kernel(option: str) -> str:
    """What options that differ in their kernel only have in common."""
    return "_".join(part for part in option.split("_") if not part.startswith("k"))


def _without_kernels(program: Program) -> Program:
    """What programs that differ in the sizes of their kernels only have in common."""
    return replace(program, nodes=tuple(replace(node, kernel=0) for node in program.nodes))


def _differentiable(gate: Any) -> bool:
    return isinstance(gate, Tensor) and gate.requires_grad


def _is(weight: Any, value: float) -> bool:
    """Whether a weight is a plain number of this value; a tensor carries a gradient and
    never is.
    """
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
    """The first ``channels`` channels, zeros for those that are missing: widths that
    are only probed hold nothing.
    """
    missing = channels - x_NCHW.shape[1]
    if missing > 0:
        return F.pad(x_NCHW, (0, 0, 0, 0, 0, missing))
    return x_NCHW[:, :channels] if missing else x_NCHW


def _drop_path(y_NCHW: Tensor, keep: float) -> Tensor:
    """Zero whole images of a residual branch with probability 1 - keep, the others
    divided by keep.
    """
    kept_N111 = torch.rand(y_NCHW.shape[0], 1, 1, 1, device=y_NCHW.device) < keep
    return y_NCHW * (kept_N111.to(y_NCHW.dtype) / keep)
