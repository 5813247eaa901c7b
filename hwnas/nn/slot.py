"""One slot of a super-net: the shared weights of all its options and widths, run under
gates.

Sharing ``collapsed`` is TuNAS's (arXiv 2008.06120, section 4): one expansion and one
projection convolution for all kernel sizes and expansions, one depthwise convolution
per kernel size. Sharing ``separate`` gives every option its own weights (ProxylessNAS,
FBNet, SPOS, DARTS). The exception is options that differ only in a kernel size cut out
of a larger one (OFA kernel). ``sources`` (operation on edge) additionally gives each
producer of the input its own weights.
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
from hwnas.nn.gates import differentiable, is_number, option_weights, weighted

_OWN_KERNELS = ("depthwise", "conv")
"""Names of nodes with weights of their own for every kernel size, including 1. Other
nodes have them only for kernels larger than 1.
"""


@dataclass(frozen=True)
class Width:
    """A stage's output width under gates.

    ``active`` is the widest option with a nonzero weight, ``run`` the widest that is
    computed at all (including probed ones). ``mask_C`` has one weight for each of the
    first ``run`` channels, the sum over the options that contain it; None means that
    all are 1.
    """

    active: int
    run: int
    mask_C: Tensor | None = None


@dataclass(frozen=True)
class SlotGates:
    """What a slot runs: (option, weight) pairs with nonzero weights, (position, option)
    pairs that are only probed, and the whole gate vector.
    """

    executed: tuple[tuple[str, Any], ...]
    probed: tuple[tuple[int, str], ...] = ()
    vector: Any = None


@dataclass(frozen=True)
class Run:
    """How a slot is run.

    ``source`` is the index of the producer that the input comes from. ``skip_dropout``
    is the dropout behind skips, ``keep_path`` the probability of keeping a residual
    branch. ``remat`` recomputes options in the backward pass to save memory, and
    ``tracks`` lets BN update its running statistics.
    """

    source: int = 0
    skip_dropout: float = 0.0
    keep_path: float = 1.0
    remat: bool = False
    tracks: bool = True


@dataclass(frozen=True)
class _Member:
    """An option to run: its program at the widths that are run (without the residual)
    and its weight.
    """

    option: str
    program: Program
    weight: Any


@dataclass(frozen=True)
class _Branch:
    """What an option computes between two widths.

    ``residual`` tells whether the input is added to it. Options with equal
    ``runs_with`` run as one group.
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
        self.slot = slot
        self.separate = separate
        self.sharing = sharing
        self.norms = norms
        # (option, name of a node) -> name of the shared weights
        self._names: dict[tuple[str, str], str] = {}
        self._branches: dict[tuple[str, int, int, int, int], _Branch | None] = {}
        widest: dict[str, Node] = {}
        kernels: dict[str, set[int]] = {}
        for option in slot.options:
            for in_ch, out_ch in slot.widths:
                op = slot.op(option, in_ch, out_ch)
                if op is None:
                    continue
                for node in op.layers:
                    name = self._shared_name(option, node)
                    self._names[option, node.name] = name
                    known = widest.get(name, node)
                    kernels.setdefault(name, set()).add(node.kernel)
                    widest[name] = replace(
                        node,
                        in_ch=max(node.in_ch, known.in_ch),
                        out_ch=max(node.out_ch, known.out_ch),
                        # equal except for depthwise nodes, whose widest has most groups
                        groups=max(node.groups, known.groups),
                    )

        self.copies = nn.ModuleList()
        for _ in range(sources):
            layers = nn.ModuleDict()
            for name, node in widest.items():
                layers[name] = elastic(node, tuple(kernels[name]), bn_eps, sharing, norms)
            self.copies.append(layers)

    def _shared_name(self, option: str, node: Node) -> str:
        """The name of the shared weights that a node of an option uses."""
        own_kernels = self.sharing.kernels == "own"
        parts = node.name.replace(".", "_")
        if node.kind == "channels" or (
            own_kernels and (node.kernel > 1 or node.name in _OWN_KERNELS)
        ):
            parts += f"_k{node.kernel}"
        # depthwise groups are as many as channels, which slicing takes care of
        if node.groups > 1 and not node.depthwise:
            parts += f"_g{node.groups}"
        if not self.separate:
            return parts

        if not own_kernels:
            option = _without_kernel(option)
        # torch refuses dots in the names of modules
        return f"{option.replace('.', '_')}|{parts}"

    def forward(
        self, x_NCHW: Tensor, gates: SlotGates, into: Width, out: Width, run: Run = Run()
    ) -> Tensor:
        """The gated sum of the slot's options: [N, into.run, H, W] -> [N, out.run, H', W']."""
        groups: dict[Hashable, list[_Member]] = {}
        # total weight of the options with a residual, and of skip
        identity: Any = 0.0
        skipped: Any = 0.0
        all_residual = True
        for option, weight in gates.executed:
            option_branch = self._branch(option, into, out)
            if option_branch is None:
                skipped = skipped + weight
                continue
            if option_branch.residual:
                identity = identity + weight
            else:
                all_residual = False
            member = _Member(option, option_branch.program, weight)
            groups.setdefault(option_branch.runs_with, []).append(member)

        branch = _sum(
            fitted(self._gated(x_NCHW, members, run), out.run) for members in groups.values()
        )
        terms = []
        if branch is not None:
            # without a residual, a dropped path would leave the image nothing at all
            if all_residual and self.training and run.keep_path < 1.0:
                branch = _drop_path(branch, run.keep_path)
            if out.mask_C is not None:
                branch = branch * out.mask_C[:, None, None]
            terms.append(branch)
        if not is_number(identity, 0.0):
            terms.append(weighted(fitted(x_NCHW, out.run), identity))
        if not is_number(skipped, 0.0):
            terms.append(weighted(F.dropout(x_NCHW, run.skip_dropout, self.training), skipped))
        assert terms, f"nothing runs in {self.slot.key}"

        total: Tensor = _sum(terms)
        if gates.probed and differentiable(gates.vector):
            probes = [(i, self._probe(option, into, out, run)) for i, option in gates.probed]
            total = _Probed.apply(total, x_NCHW.detach(), gates.vector, probes)
        return total

    def _branch(self, option: str, into: Width, out: Width) -> _Branch | None:
        """What an option computes at the active widths, stretched to the widths that
        are run; None for skip.

        Grouped convolutions that read the input are not stretched: other channels would
        share a group, and the BN of a depthwise one would turn channels that are 0 into
        something. Grouped convolutions that produce the output are not stretched
        either. Both ignore the additional channels.
        """
        key = (option, into.active, into.run, out.active, out.run)
        if key not in self._branches:
            op = self.slot.op(option, into.active, out.active)
            if op is None:
                self._branches[key] = None
            else:
                self._branches[key] = self._stretched(option, op, into, out)
        return self._branches[key]

    def _stretched(self, option: str, op: Op, into: Width, out: Width) -> _Branch:
        program = op.branch.program
        [output] = program.outputs
        readers = [node for node in program.nodes if INPUT in node.inputs]
        grouped_input = any(node.groups > 1 for node in readers)
        grouped_output = program.nodes[output - 1].groups > 1

        in_ch = into.active if grouped_input else into.run
        out_ch = out.active if grouped_output else out.run
        stretched = op.resized(in_ch, out_ch).program
        runs_with = option if self.separate else _without_kernels(stretched)
        return _Branch(stretched, op.residual, runs_with)

    def _gated(self, x_NCHW: Tensor, members: list[_Member], run: Run) -> Tensor:
        """The output of a group. With ``remat``, its activations are not kept but
        computed again in the backward pass.
        """
        if not run.remat or not self.training:
            return self._group(x_NCHW, members, run)

        # running statistics must not count a batch twice
        runs = chain([run], repeat(replace(run, tracks=False)))
        # nothing else draws in here, and reading the generator's state waits for the GPU
        draws = self.sharing.channels in ("chunk", "random")
        gated: Tensor = checkpoint(
            lambda x: self._group(x, members, next(runs)),
            x_NCHW,
            use_reentrant=False,
            preserve_rng_state=draws,
        )
        return gated

    def _group(self, x_NCHW: Tensor, members: list[_Member], run: Run) -> Tensor:
        """The output of options that differ only in their kernels, times the sum of
        their weights. Outputs of differing kernels are mixed; all else runs once.
        """
        first = members[0]
        # before the nodes run: the order of the graph decides how gradients are rounded
        total_weight = _total_weight(members)
        values = {INPUT: fitted(x_NCHW, first.program.in_ch)}
        for position, node in enumerate(first.program.nodes):
            inputs = [values[i] for i in node.inputs]
            if node.kind in PLAIN:
                y_NCHW = PLAIN[node.kind](node, inputs)
            elif any(member.program.nodes[position] != node for member in members[1:]):
                y_NCHW = self._mixed(inputs[0], members, position, run)
            else:
                y_NCHW = self._run(inputs[0], first.option, node, run)
            values[position + 1] = y_NCHW
            for i in first.program.endings[position]:
                del values[i]
        [output] = first.program.outputs
        return weighted(values[output], total_weight)

    def _mixed(self, x_NCHW: Tensor, members: list[_Member], position: int, run: Run) -> Tensor:
        """The weighted mean of a node's outputs with the kernels of several options."""
        total_weight = _total_weight(members)
        outputs = []
        for member in members:
            y_NCHW = self._run(x_NCHW, member.option, member.program.nodes[position], run)
            outputs.append(member.weight / total_weight * y_NCHW)
        total: Tensor = sum(outputs[1:], outputs[0])
        return total

    def _run(self, x_NCHW: Tensor, option: str, node: Node, run: Run) -> Tensor:
        """The output of one node with weights."""
        layer = self._layers(run.source)[self._names[option, node.name]]
        y_NCHW: Tensor = layer(x_NCHW, node, self._norm(run.source), run.tracks)
        return y_NCHW

    def _layers(self, source: int) -> Any:
        """The layers for a producer of the input, by the names of the shared weights."""
        return self.copies[source if len(self.copies) > 1 else 0]

    def _norm(self, source: int) -> int:
        """The index of the BNs for a producer of the input."""
        return source if self.norms > 1 else 0

    def _probe(self, option: str, into: Width, out: Width, run: Run) -> Callable[[Tensor], Tensor]:
        """A function from the input to an option's whole output, with residual and mask
        but without any dropout.
        """
        only_option = SlotGates(((option, 1.0),))
        plain_run = Run(run.source, tracks=False)
        return lambda x_NCHW: self(x_NCHW, only_option, into, out, plain_run)

    def weights(self, option: str, op: Op, source: int = 0) -> dict[str, Tensor]:
        """The state of a standalone block of ``op``, taken from the shared weights."""
        state: dict[str, Tensor] = {}
        for node in op.layers:
            shared = self._layers(source)[self._names[option, node.name]]
            tensors = shared.sliced(node, *shared.narrow(node), self._norm(source))
            for name, tensor in tensors.items():
                state[f"{op.WEIGHTS}{node.name}.{name}"] = tensor
        return state


class _Probed(torch.autograd.Function):
    """Passes the output through. In the backward pass, the gate of each probed option
    gets the inner product of the option's output and the gradient of the slot's output.

    A probed option runs only in the backward pass and without a graph, so it costs time
    but no memory (ProxylessNAS's ``full_v2``). The product is the derivative of the sum
    of all options' outputs. Options that share a projection (``collapsed``) are probed
    as if they did not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_NCHW: Tensor,
        x_NCHW: Tensor,
        gate: Tensor,
        probes: Sequence[tuple[int, Callable[[Tensor], Tensor]]],
    ) -> Tensor:
        """Return the output unchanged."""
        ctx.save_for_backward(x_NCHW)
        ctx.probes = probes
        ctx.gate = gate.detach()
        kind = x_NCHW.device.type
        # the backward pass does not run under the forward pass's autocast by itself
        ctx.autocast = {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
        }
        return y_NCHW.view_as(y_NCHW)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """The unchanged gradient of the output, and the gradient of the gate."""
        (x_NCHW,) = ctx.saved_tensors
        gradient = gradients[0]
        by_gate = torch.zeros_like(ctx.gate)
        with torch.no_grad(), torch.autocast(**ctx.autocast):
            for position, probe in ctx.probes:
                by_gate[position] = (probe(x_NCHW) * gradient).sum()
        return gradient, None, by_gate, None


def executed(slot: Slot, gate: Any, probed: Sequence[int] = ()) -> SlotGates:
    """The gates of a slot from its gate vector and the positions of options to probe.

    ``gate`` may be None if the slot has a single option, which then runs.
    """
    if gate is None:
        assert len(slot.options) == 1, f"no gate for {slot.key}"
        return SlotGates(((slot.options[0], 1.0),))

    values = gate.tolist()
    weights = option_weights(gate, values)
    pairs = tuple((slot.options[i], weights[i]) for i, value in enumerate(values) if value != 0.0)
    probed_pairs = tuple((i, slot.options[i]) for i in probed if values[i] == 0.0)
    return SlotGates(pairs, probed_pairs, gate)


def skips(gates: SlotGates) -> bool:
    """Whether nothing but skip is executed."""
    return all(option == SKIP for option, _ in gates.executed)


def _without_kernel(option: str) -> str:
    """An option without its kernel: equal for options that differ only in that."""
    return "_".join(part for part in option.split("_") if not part.startswith("k"))


def _without_kernels(program: Program) -> Program:
    """A program with all kernel sizes set to 0: equal for programs that differ only in
    those.
    """
    return replace(program, nodes=tuple(replace(node, kernel=0) for node in program.nodes))


def _total_weight(members: Sequence[_Member]) -> Any:
    return _sum(member.weight for member in members)


def _sum(terms: Iterable[Any]) -> Any:
    """The sum of the terms; None if there are none. Terms are consumed one by one, so
    that at most two are in memory.
    """
    total: Any = None
    for term in terms:
        # not sum(): 0 + term would be one more pass over the first map
        total = term if total is None else total + term
    return total


def fitted(x_NCHW: Tensor, channels: int) -> Tensor:
    """The first ``channels`` channels, padded with zeros if there are fewer. Channels of
    widths that are only probed are zero.
    """
    missing = channels - x_NCHW.shape[1]
    if missing == 0:
        return x_NCHW
    if missing > 0:
        return F.pad(x_NCHW, (0, 0, 0, 0, 0, missing))
    return x_NCHW[:, :channels]


def _drop_path(y_NCHW: Tensor, keep: float) -> Tensor:
    """Zero whole images of a residual branch with probability 1 - keep, and divide the
    others by keep.
    """
    kept_N111 = torch.rand(y_NCHW.shape[0], 1, 1, 1, device=y_NCHW.device) < keep
    return y_NCHW * (kept_N111.to(y_NCHW.dtype) / keep)
