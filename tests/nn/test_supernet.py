"""The super-net: a path is the extracted network, slicing is masking, mixtures are
TuNAS's, and unused weights stay unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.config import OptimizerConfig, SupernetConfig
from hwnas.core.arch import Picks
from hwnas.core.ir import Node
from hwnas.core.ops import Op
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.engine import Engine
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.nn.slot import ElasticSlot, Width, slot_gates
from hwnas.nn.supernet import MacroSupernet, resized
from hwnas.search.proposal import one_hot
from tests.nn.nets import (
    SPACES,
    batch,
    kernels_space,
    picked_ops,
    random_picks,
    shared_name,
    supernet_of,
)

torch.set_num_threads(1)

PATHS = [
    (name, sharing)
    for name in SPACES
    for sharing in ("collapsed", "separate")
    if (name, sharing) != ("mobilenet_v3_like", "separate")
]
"""MobileNetV3's 36 options with weights of their own would be too large for a test."""


def shared_tensors(
    supernet: MacroSupernet, picks: Picks, network: ClassificationNetwork, sharing: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """(the super-net's parameter, the extracted network's) for each parameter of the
    network, matched by name, shape and position only.
    """
    for block, (position, option, op) in zip(
        network.blocks, picked_ops(supernet.space, picks), strict=False
    ):
        convs = [part for part in block.modules() if isinstance(part, nn.Conv2d | nn.Conv1d)]
        norms = iter(part for part in block.modules() if isinstance(part, nn.BatchNorm2d))
        for conv, layer in zip(convs, op.layers, strict=True):
            elastic = supernet.slots[position].copies[0][
                shared_name(option, layer.name, layer.kernel, layer.groups, sharing)
            ]
            if isinstance(conv, nn.Conv1d):
                yield elastic.along.conv.weight, conv.weight
                continue
            yield elastic.conv.weight, conv.weight
            if conv.bias is not None:
                yield elastic.conv.bias, conv.bias
            if layer.norm:
                norm = next(norms)
                yield elastic.norms[0].weight, norm.weight
                yield elastic.norms[0].bias, norm.bias
    yield supernet.classifier.weight, network.blocks[-1].linear.weight
    yield supernet.classifier.bias, network.blocks[-1].linear.bias


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sharing"), PATHS)
def test_a_path_is_the_extracted_network(name: str, sharing: str) -> None:
    """Outputs are equal, and so are gradients, scattered back to the corner of the
    shared weights that was used.
    """
    space = SPACES[name]()
    supernet = supernet_of(space, SupernetConfig(sharing=sharing)).double()
    for number, picks in enumerate(random_picks(space, 4)):
        x_NCHW, y = batch(space, number)
        x_NCHW = x_NCHW.double()
        network = supernet.extract(picks).train()
        supernet.zero_grad(set_to_none=True)
        ours = supernet.train()(x_NCHW, one_hot(picks, space))
        theirs = network(resized(x_NCHW, network.arch.resolution))
        assert ours.std() > 1e-2
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
        F.cross_entropy(ours, y).backward()
        F.cross_entropy(theirs, y).backward()
        expected: dict[Tensor, Tensor] = {}
        for shared, own in shared_tensors(supernet, picks, network, sharing):
            scattered = torch.zeros_like(shared)
            scattered[tuple(slice(n) for n in own.shape)] = own.grad
            assert torch.equal(shared[tuple(slice(n) for n in own.shape)], own)
            expected[shared] = scattered
        assert len(expected) == len(list(network.parameters()))
        for parameter_name, parameter in supernet.named_parameters():
            if parameter not in expected:
                assert parameter.grad is None, parameter_name
            else:
                assert torch.allclose(parameter.grad, expected[parameter], rtol=1e-7, atol=1e-10), (
                    parameter_name
                )


def prefix(count: int, total: int) -> Tensor:
    """1 for the first ``count`` channels, 0 for the rest."""
    return (torch.arange(total) < count).double()


def padded(x_NCHW: Tensor, channels: int) -> Tensor:
    """The first ``channels`` channels, with zeros for those that are missing."""
    return F.pad(x_NCHW, (0, 0, 0, 0, 0, max(0, channels - x_NCHW.shape[1])))[:, :channels]


class MaskedSupernet:
    """TuNAS's formulation, written out: the widest weights times prefix masks, and
    batch norm over all channels, then masked.

    Grouped convolutions are dense ones with a block-diagonal mask. In float64.
    """

    def __init__(self, supernet: MacroSupernet, sharing: str) -> None:
        self.supernet, self.sharing = supernet, sharing

    def layer(self, position: int, option: str, layer: Node, x_NCHW: Tensor) -> Tensor:
        name = shared_name(option, layer.name, layer.kernel, layer.groups, self.sharing)
        elastic = self.supernet.slots[position].copies[0][name]
        weight, channels = elastic.conv.weight, elastic.conv.in_channels
        out_mask = prefix(layer.out_ch, weight.shape[0])
        masked, groups = weight * out_mask[:, None, None, None], 1
        if layer.name in ("depthwise", "start"):
            groups = weight.shape[0]
        else:
            own_in, own_out = layer.in_ch // layer.groups, layer.out_ch // layer.groups
            same_group = (
                torch.arange(weight.shape[0])[:, None] // own_out
                == torch.arange(channels)[None] // own_in
            )
            dense = masked[:, torch.arange(channels) % own_in] if layer.groups > 1 else masked
            masked = dense * (same_group * prefix(layer.in_ch, channels))[:, :, None, None]
        x_NCHW = F.conv2d(
            padded(x_NCHW, channels), masked, None, layer.stride, layer.kernel // 2, groups=groups
        )
        if elastic.conv.bias is not None:
            x_NCHW = x_NCHW + (elastic.conv.bias * out_mask)[:, None, None]
        if len(elastic.norms):
            mean, var = (
                x_NCHW.mean((0, 2, 3), keepdim=True),
                x_NCHW.var((0, 2, 3), unbiased=False, keepdim=True),
            )
            x_NCHW = (x_NCHW - mean) / (var + elastic.norms[0].eps).sqrt()
            x_NCHW = (
                x_NCHW * elastic.norms[0].weight[:, None, None]
                + elastic.norms[0].bias[:, None, None]
            )
            x_NCHW = x_NCHW * out_mask[:, None, None]
        gates = {"sigmoid": torch.sigmoid, "hsig": lambda v: (v + 3).clamp(0, 6) / 6}
        return {
            "none": lambda v: v,
            "relu": F.relu,
            "relu6": F.relu6,
            "hswish": F.hardswish,
            "silu": F.silu,
            **gates,
        }[layer.act](x_NCHW)

    def block(self, position: int, option: str, op: Op, x_NCHW: Tensor) -> Tensor:
        layers = {layer.name: layer for layer in op.layers}
        x_NCHW = x_NCHW.mean((2, 3), keepdim=True) if op.pooled else x_NCHW
        for name, layer in layers.items():
            if name == "depthwise" and op.groups > 1:
                x_NCHW = (
                    x_NCHW[:, : layer.in_ch]
                    .unflatten(1, (op.groups, -1))
                    .transpose(1, 2)
                    .flatten(1, 2)
                )
            if name == "se.reduce":
                hidden = self.layer(position, option, layer, x_NCHW.mean((2, 3), keepdim=True))
                gate = self.layer(position, option, layers["se.expand"], hidden)
                x_NCHW = x_NCHW * gate[:, : x_NCHW.shape[1]]
            elif name == "eca":
                kernel = (
                    self.supernet.slots[position]
                    .copies[0][shared_name(option, name, layer.kernel, 1, self.sharing)]
                    .along.conv.weight
                )
                along = F.conv1d(
                    x_NCHW[:, : layer.in_ch].mean((2, 3))[:, None],
                    kernel,
                    padding=layer.kernel // 2,
                )
                x_NCHW = x_NCHW[:, : layer.in_ch] * torch.sigmoid(along).transpose(1, 2)[..., None]
            elif name != "se.expand":
                x_NCHW = self.layer(position, option, layer, x_NCHW)
        return x_NCHW

    def __call__(self, x_NCHW: Tensor, picks: Picks) -> Tensor:
        if "resolution" in picks and picks["resolution"] != x_NCHW.shape[-1]:
            x_NCHW = F.interpolate(
                x_NCHW, size=int(picks["resolution"]), mode="bilinear", antialias=True
            )
        for position, option, op in picked_ops(self.supernet.space, picks):
            y_NCHW = self.block(position, option, op, x_NCHW)
            x_NCHW = y_NCHW + padded(x_NCHW, y_NCHW.shape[1]) if op.residual else y_NCHW
        classifier = self.supernet.classifier
        width = self.supernet.space.decode(picks).blocks[-1].in_ch
        pooled = padded(x_NCHW.mean((2, 3), keepdim=True), classifier.in_features).flatten(1)
        return F.linear(
            pooled, classifier.weight * prefix(width, classifier.in_features), classifier.bias
        )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sharing"), PATHS)
def test_slicing_is_masking(name: str, sharing: str) -> None:
    """In float64, where rounding cannot hide a difference."""
    space = SPACES[name]()
    supernet = supernet_of(space, SupernetConfig(sharing=sharing)).double()
    masked = MaskedSupernet(supernet, sharing)
    narrow = 0
    for number, picks in enumerate(random_picks(space, 2)):
        x_NCHW, y = (batch(space, number)[0].double(), batch(space, number)[1])
        logits, gradients = [], []
        for module, path in ((supernet, one_hot(picks, space)), (masked, picks)):
            supernet.zero_grad(set_to_none=True)
            logits.append(module(x_NCHW, path))
            F.cross_entropy(logits[-1], y).backward()
            gradients.append(
                {
                    key: torch.zeros_like(p) if p.grad is None else p.grad
                    for key, p in supernet.named_parameters()
                }
            )
        assert torch.allclose(logits[0], logits[1], rtol=1e-9, atol=1e-9)
        for key, gradient in gradients[0].items():
            assert torch.allclose(gradient, gradients[1][key], rtol=1e-6, atol=1e-9), key
        narrow += sum(
            bool((gradient == 0).any()) and bool((gradient != 0).any())
            for gradient in gradients[0].values()
        )
    shares = sharing == "collapsed" or any(choice.kind == "width" for choice in space.choices)
    assert not shares or narrow > 10  # corners of shared weights were used


def reference_branch(slot: nn.Module, x_NCHW: Tensor, kernels: dict[int, float]) -> Tensor:
    """expand -> weighted average of the depthwise outputs -> SE -> projection, from the
    slot's parameters alone.
    """

    def norm(y: Tensor, part: nn.Module) -> Tensor:
        return F.batch_norm(
            y, None, None, part.norms[0].weight, part.norms[0].bias, training=True, eps=1e-3
        )

    shared = slot.copies[0]
    expanded = F.relu(norm(F.conv2d(x_NCHW, shared["expand"].conv.weight), shared["expand"]))
    mixed = torch.zeros(())
    for kernel, weight in kernels.items():
        part = shared[f"depthwise_k{kernel}"]
        mixed = mixed + weight * F.relu(
            norm(
                F.conv2d(expanded, part.conv.weight, padding=kernel // 2, groups=expanded.shape[1]),
                part,
            )
        )
    hidden = F.relu(
        F.conv2d(
            mixed.mean((2, 3), keepdim=True),
            shared["se_reduce"].conv.weight,
            shared["se_reduce"].conv.bias,
        )
    )
    mixed = mixed * torch.sigmoid(
        F.conv2d(hidden, shared["se_expand"].conv.weight, shared["se_expand"].conv.bias)
    )
    return norm(F.conv2d(mixed, shared["project"].conv.weight), shared["project"])


def run_slot(module: ElasticSlot, x_NCHW: Tensor, gate: np.ndarray) -> Tensor:
    """The output of a slot with eight channels in and out under a gate."""
    y_NCHW: Tensor = module(x_NCHW, slot_gates(module.slot, gate), Width(8, 8), Width(8, 8))
    return y_NCHW


def test_uniform_kernels_average_before_the_projection() -> None:
    supernet = supernet_of(kernels_space()).double()
    x_NCHW = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    slot = supernet.slots[1]
    y_NCHW = run_slot(slot, x_NCHW, np.full(3, 1 / 3))
    assert torch.allclose(
        y_NCHW, reference_branch(slot, x_NCHW, {3: 1 / 3, 5: 1 / 3, 7: 1 / 3}), atol=1e-10
    )
    after_projection = sum(run_slot(slot, x_NCHW, np.eye(3)[i]) for i in range(3)) / 3
    # averaging after the projection gives something else
    assert (y_NCHW - after_projection).abs().max() > 1e-3


def test_half_a_skip_halves_the_branch() -> None:
    supernet = supernet_of(kernels_space()).double()
    x_NCHW = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    slot = supernet.slots[2]
    y_NCHW = run_slot(slot, x_NCHW, np.array([0.0, 0.5, 0.0, 0.5]))
    assert torch.allclose(
        y_NCHW, x_NCHW + 0.5 * reference_branch(slot, x_NCHW, {5: 1.0}), atol=1e-10
    )
    y_NCHW = run_slot(slot, x_NCHW, np.array([0.25, 0.25, 0.0, 0.5]))
    assert torch.allclose(
        y_NCHW, x_NCHW + 0.5 * reference_branch(slot, x_NCHW, {3: 0.5, 5: 0.5}), atol=1e-10
    )
    assert torch.equal(run_slot(slot, x_NCHW, np.array([0.0, 0.0, 0.0, 1.0])), x_NCHW)


def test_half_a_skip_beside_a_plain_convolution() -> None:
    """A plain convolution has no residual, so half a skip adds half the input."""
    stages = (SpaceStage(widths=(8,), slots=(("cn_k3",), ("cn_k3", "ir_k3_e3", "skip"))),)
    space = MacroSpace(name="plain", resolution=6, classes=4, stages=stages)
    supernet = supernet_of(space).double()
    slot = supernet.slots[1]
    x_NCHW = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    plain, inverted = (
        run_slot(slot, x_NCHW, np.array([1.0, 0, 0])),
        run_slot(slot, x_NCHW, np.array([0, 1.0, 0])),
    )
    assert torch.allclose(
        run_slot(slot, x_NCHW, np.array([0.5, 0, 0.5])), 0.5 * plain + 0.5 * x_NCHW
    )
    assert torch.allclose(
        run_slot(slot, x_NCHW, np.array([0.5, 0.5, 0])), 0.5 * plain + 0.5 * inverted
    )


def test_gradient_with_respect_to_gates() -> None:
    """Torch gates: the derivative of the output equals finite differences."""
    supernet = supernet_of(kernels_space()).double()
    x_NCHW, _ = batch(kernels_space())
    gates = torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=torch.float64, requires_grad=True)

    def output(values: Tensor) -> Tensor:
        total: Tensor = (
            supernet(x_NCHW.double(), {"s1.b0": np.array([1.0, 0.0, 0.0]), "s1.b1": values}) ** 2
        ).sum()
        return total

    assert torch.autograd.gradcheck(output, (gates,), atol=1e-4)


def test_options_of_weight_zero_are_not_executed() -> None:
    space = kernels_space()
    supernet = supernet_of(space)
    x_NCHW, y = batch(space)
    F.cross_entropy(
        supernet(x_NCHW, {"s1.b0": np.array([0.5, 0.0, 0.5]), "s1.b1": np.array([0, 0, 0, 1.0])}), y
    ).backward()
    executed = {
        name
        for name, part in supernet.slots[1].copies[0].items()
        if part.conv.weight.grad is not None
    }
    assert executed == {
        "expand",
        "depthwise_k3",
        "depthwise_k7",
        "se_reduce",
        "se_expand",
        "project",
    }
    assert all(parameter.grad is None for parameter in supernet.slots[2].parameters())


@pytest.mark.parametrize("optimizer", ["rmsproptf", "sgd", "adamw"])
def test_unused_weights_stay_bit_identical(optimizer: str, tmp_path: Path) -> None:
    """They get no gradient, momentum or weight decay in a step that skips them,
    whatever came before.
    """
    space = kernels_space()
    supernet = supernet_of(space)
    config = OptimizerConfig(name=optimizer, lr=1.0, weight_decay=0.1, options={}, warmup=0.0)
    engine = Engine(supernet, config, 10, 6, 0, tmp_path)
    # builds momentum
    engine.train_step(
        *batch(space), {"s1.b0": np.array([1.0, 0, 0]), "s1.b1": np.array([0, 0, 1.0, 0])}
    )
    engine.step = 1
    before = {name: parameter.detach().clone() for name, parameter in supernet.named_parameters()}
    engine.train_step(
        *batch(space, 1), {"s1.b0": np.array([0, 1.0, 0]), "s1.b1": np.array([0, 0, 0, 1.0])}
    )
    changed = {
        name
        for name, parameter in supernet.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    used = {name for name in before if name.startswith(("slots.0.", "slots.1.", "classifier."))}
    used -= {name for name in used if "depthwise_k3" in name or "depthwise_k7" in name}
    assert changed == used


def test_a_super_net_needs_a_gate_for_every_choice() -> None:
    space = kernels_space()
    with pytest.raises(AssertionError):
        supernet_of(space)(batch(space)[0], {"s1.b0": np.array([1.0, 0, 0])})
