"""One slot of a super-net: the shared weights of all its options and widths, run under
gates.

Which options share weights is up to ``separate``:

- ``separate=False`` (``collapsed`` in the configuration) is TuNAS's scheme (arXiv
  2008.06120, section 4): one expansion and one projection convolution for all kernel
  sizes and expansions, and one depthwise convolution per kernel size.
- ``separate=True`` (``separate`` in the configuration) gives every option its own
  weights, as in ProxylessNAS, FBNet, SPOS and DARTS. The exception is options that
  differ only in their kernel size, if small kernels are cut out of the largest one (OFA
  kernel): these share.

The input can come from several slots if those in between are skipped. With ``sources``
> 1 (``operation_on = "edge"``), each slot that the input can come from has its own
weights; with ``norms`` > 1 (``wsbn``), each has its own BNs. (With ``operation_on =
"op"``, read "each option of each slot".) How a narrower layer takes its channels and
its kernel out of a wider one is a separate matter, described by ``elastic.Sharing``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
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

_NODES_WITH_OWN_1X1 = ("depthwise", "conv")
"""Names of the nodes whose 1x1 kernel also has its own weights if ``Sharing.kernels``
is ``own``. In all other nodes, only kernels larger than 1 have their own weights.
"""


@dataclass(frozen=True)
class Width:
    """The output width of a stage when several widths may run at once.

    ``active`` is the widest width with a nonzero weight. ``computed`` is the widest
    that is computed at all, which includes the widths that are only probed. ``mask_C``
    has one value for each of the first ``computed`` channels: the total weight of the
    widths that contain the channel. None means that all are 1.
    """

    active: int
    computed: int
    mask_C: Tensor | None = None


@dataclass(frozen=True)
class SlotGates:
    """The gates of one slot, split into what runs and what is only probed.

    ``executed`` are the options with nonzero weights, as (option, weight). ``probed``
    are options with weight zero whose gates get a gradient anyway, as (position in
    ``slot.options``, option). ``vector`` is the whole gate vector [options]; None if
    the slot has a single option.
    """

    executed: tuple[tuple[str, Any], ...]
    probed: tuple[tuple[int, str], ...] = ()
    vector: Any = None


@dataclass(frozen=True)
class RunOptions:
    """Settings of one forward pass through a slot.

    ``source`` is the position of the slot that the input comes from, among the slots
    that can feed this one. ``skip_dropout`` is the dropout probability after a skip,
    ``keep_path`` the probability that an image keeps its residual branch. With
    ``remat``, activations are recomputed in the backward pass to save memory. With
    ``tracks``, BNs update their running statistics, if they keep any.
    """

    source: int = 0
    skip_dropout: float = 0.0
    keep_path: float = 1.0
    remat: bool = False
    tracks: bool = True


@dataclass(frozen=True)
class _Member:
    """An option of a group: its program at the computed widths (without the residual)
    and its weight.
    """

    option: str
    program: Program
    weight: Any


@dataclass(frozen=True)
class _Branch:
    """What an option computes between two widths.

    ``residual`` tells whether the input is added to it. Options with equal
    ``group_key`` run as one group.
    """

    program: Program
    residual: bool
    group_key: Hashable


class _FirstCallTracks:
    """Runs a group for ``checkpoint``, which calls it once in the forward pass and
    again in the backward pass. Only the first call may update the running statistics of
    BN.
    """

    def __init__(self, slot: ElasticSlot, members: list[_Member], run: RunOptions) -> None:
        self.slot = slot
        self.members = members
        self.run = run

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        run = self.run
        self.run = replace(run, tracks=False)
        return self.slot.group(x_NCHW, self.members, run)


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
        # (option, active and computed input width, active and computed output width)
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
                        # nodes with the same name have equally many groups, except for
                        # depthwise ones, which have one per channel
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
        # torch does not allow dots in the names of modules
        name = node.name.replace(".", "_")
        if node.kind == "channels" or (
            own_kernels and (node.kernel > 1 or node.name in _NODES_WITH_OWN_1X1)
        ):
            name += f"_k{node.kernel}"
        # a depthwise node has one group per channel, so slicing channels slices groups too
        if node.groups > 1 and not node.depthwise:
            name += f"_g{node.groups}"
        if not self.separate:
            return name

        if not own_kernels:
            option = _option_without_kernel(option)
        return f"{option.replace('.', '_')}|{name}"

    def forward(
        self,
        x_NCHW: Tensor,
        gates: SlotGates,
        into: Width,
        out: Width,
        run: RunOptions = RunOptions(),
    ) -> Tensor:
        """The sum of the slot's options, weighted by their gates: [N, into.computed, H,
        W] -> [N, out.computed, H', W'].
        """
        groups: dict[Hashable, list[_Member]] = {}
        # total weight of the options that add their input to their output
        residual_weight: Any = 0.0
        # weight of the option that only passes its input on
        skip_weight: Any = 0.0
        all_residual = True
        for option, weight in gates.executed:
            branch = self._branch(option, into, out)
            if branch is None:
                skip_weight = skip_weight + weight
                continue
            if branch.residual:
                residual_weight = residual_weight + weight
            else:
                all_residual = False
            member = _Member(option, branch.program, weight)
            groups.setdefault(branch.group_key, []).append(member)

        y_NCHW = _sum(
            fitted(self._gated(x_NCHW, members, run), out.computed) for members in groups.values()
        )
        terms = []
        if y_NCHW is not None:
            # without a residual, an image whose path is dropped would have no output at all
            if all_residual and self.training and run.keep_path < 1.0:
                y_NCHW = _drop_path(y_NCHW, run.keep_path)
            if out.mask_C is not None:
                y_NCHW = y_NCHW * out.mask_C[:, None, None]
            terms.append(y_NCHW)
        if not is_number(residual_weight, 0.0):
            terms.append(weighted(fitted(x_NCHW, out.computed), residual_weight))
        if not is_number(skip_weight, 0.0):
            skip_NCHW = F.dropout(x_NCHW, run.skip_dropout, self.training)
            terms.append(weighted(skip_NCHW, skip_weight))
        assert terms, f"nothing runs in {self.slot.key}"

        total: Tensor = _sum(terms)
        if gates.probed and differentiable(gates.vector):
            probes = [(i, self._probe(option, into, out, run)) for i, option in gates.probed]
            total = _Probed.apply(total, x_NCHW.detach(), gates.vector, probes)
        return total

    def _branch(self, option: str, into: Width, out: Width) -> _Branch | None:
        """What an option computes at the active widths, stretched to the computed
        widths; None for skip.

        The input side is not stretched if a grouped convolution reads it: channels
        would move to other groups, and after a depthwise one, BN would give channels
        that are all zero a nonzero value. Nor is the output side if a grouped
        convolution writes it. The extra channels are ignored there.
        """
        key = (option, into.active, into.computed, out.active, out.computed)
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

        in_ch = into.active if grouped_input else into.computed
        out_ch = out.active if grouped_output else out.computed
        stretched = op.resized(in_ch, out_ch).program
        group_key = option if self.separate else _program_without_kernels(stretched)
        return _Branch(stretched, op.residual, group_key)

    def _gated(self, x_NCHW: Tensor, members: list[_Member], run: RunOptions) -> Tensor:
        """The output of a group. With ``remat``, its activations are not kept but
        computed again in the backward pass.
        """
        if not run.remat or not self.training:
            return self.group(x_NCHW, members, run)

        # Only random channels draw random numbers in here. Otherwise the generator's state
        # is not saved, because reading it waits for the GPU.
        draws_channels = self.sharing.channels in ("chunk", "random")
        gated: Tensor = checkpoint(
            _FirstCallTracks(self, members, run),
            x_NCHW,
            use_reentrant=False,
            preserve_rng_state=draws_channels,
        )
        return gated

    def group(self, x_NCHW: Tensor, members: list[_Member], run: RunOptions) -> Tensor:
        """The output of options that differ only in their kernels, times the sum of
        their weights. Nodes whose kernels differ run once per option and their outputs
        are averaged; all other nodes run once.
        """
        first = members[0]
        # Computed before the nodes run: the order of operations in the autograd graph is
        # the order in which gradients are summed, and so decides how they are rounded.
        total_weight = _total_weight(members)
        # value 0 is the input, value i + 1 the output of node i
        values = {INPUT: fitted(x_NCHW, first.program.in_ch)}
        for position, node in enumerate(first.program.nodes):
            inputs = [values[i] for i in node.inputs]
            if node.kind in PLAIN:
                y_NCHW = PLAIN[node.kind](node, inputs)
            elif any(member.program.nodes[position] != node for member in members[1:]):
                y_NCHW = self._mixed(inputs[0], members, position, run)
            else:
                y_NCHW = self._layer_output(inputs[0], first.option, node, run)
            values[position + 1] = y_NCHW
            for i in first.program.endings[position]:
                del values[i]
        [output] = first.program.outputs
        return weighted(values[output], total_weight)

    def _mixed(
        self, x_NCHW: Tensor, members: list[_Member], position: int, run: RunOptions
    ) -> Tensor:
        """The weighted mean of a node's outputs with the kernels of several options."""
        total_weight = _total_weight(members)
        outputs = []
        for member in members:
            node = member.program.nodes[position]
            y_NCHW = self._layer_output(x_NCHW, member.option, node, run)
            outputs.append(member.weight / total_weight * y_NCHW)
        total: Tensor = sum(outputs[1:], outputs[0])
        return total

    def _layer_output(self, x_NCHW: Tensor, option: str, node: Node, run: RunOptions) -> Tensor:
        """The output of a node that has weights."""
        layer = self._layers(run.source)[self._names[option, node.name]]
        y_NCHW: Tensor = layer(x_NCHW, node, self._norm(run.source), run.tracks)
        return y_NCHW

    def _layers(self, source: int) -> Any:
        """The layers for inputs from a source, by the names of the shared weights."""
        return self.copies[source if len(self.copies) > 1 else 0]

    def _norm(self, source: int) -> int:
        """The index of the BNs for inputs from a source."""
        return source if self.norms > 1 else 0

    def _probe(
        self, option: str, into: Width, out: Width, run: RunOptions
    ) -> Callable[[Tensor], Tensor]:
        """A function from the input to the complete output of an option, with residual
        and mask but without any dropout.
        """
        only_option = SlotGates(((option, 1.0),))
        plain_run = RunOptions(run.source, tracks=False)
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
    """Returns the slot's output unchanged, and gives the gate of each probed option a
    gradient in the backward pass.

    This gradient is the derivative of the loss with respect to the gate, where the
    slot's output is the sum of its options' outputs times their gates: the inner
    product of the option's output and the gradient of the slot's output. A probed
    option runs only in the backward pass and without a graph, so it costs time but no
    memory (ProxylessNAS's ``full_v2``). Options that share a projection (``collapsed``)
    are probed as if each had its own.
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
        # autograd does not restore the forward pass's autocast in the backward pass
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


def slot_gates(slot: Slot, gate: Any, probed: Sequence[int] = ()) -> SlotGates:
    """Split a slot's gate vector into the options that run and those only probed.

    ``probed`` are the positions of the options to probe; those with a nonzero gate run
    anyway. ``gate`` may be None if the slot has a single option, which then runs.
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
    """Whether skip is the only option that runs."""
    return all(option == SKIP for option, _ in gates.executed)


def _option_without_kernel(option: str) -> str:
    """An option without its kernel size: equal for options that differ only in that."""
    return "_".join(part for part in option.split("_") if not part.startswith("k"))


def _program_without_kernels(program: Program) -> Program:
    """A program with all kernel sizes set to 0: equal for programs that differ only in
    those.
    """
    return replace(program, nodes=tuple(replace(node, kernel=0) for node in program.nodes))


def _total_weight(members: Sequence[_Member]) -> Any:
    return _sum(member.weight for member in members)


def _sum(terms: Iterable[Any]) -> Any:
    """The sum of the terms; None without terms. Terms are consumed one by one, so that
    only the total and one term are in memory at a time.
    """
    total: Any = None
    for term in terms:
        # not sum(): its 0 + first term would copy a whole feature map
        total = term if total is None else total + term
    return total


def fitted(x_NCHW: Tensor, channels: int) -> Tensor:
    """The first ``channels`` channels, padded with zeros if there are fewer. The extra
    channels are those of widths that are only probed.
    """
    missing = channels - x_NCHW.shape[1]
    if missing == 0:
        return x_NCHW
    if missing > 0:
        return F.pad(x_NCHW, (0, 0, 0, 0, 0, missing))
    return x_NCHW[:, :channels]


def _drop_path(y_NCHW: Tensor, keep: float) -> Tensor:
    """Set a residual branch to zero for whole images with probability 1 - ``keep``, and
    divide it by ``keep`` for the others, so that its mean stays the same.
    """
    kept_N111 = torch.rand(y_NCHW.shape[0], 1, 1, 1, device=y_NCHW.device) < keep
    return y_NCHW * (kept_N111.to(y_NCHW.dtype) / keep)
