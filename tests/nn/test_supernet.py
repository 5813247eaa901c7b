"""The super-net: a path is the extracted network, slicing is masking, mixtures are TuNAS's, and what is unused stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.config import OptimizerConfig
from hwnas.core.arch import Picks
from hwnas.core.op import Layer, Op
from hwnas.core.space import MacroSpace, Stage
from hwnas.core.spaces import mobile32
from hwnas.engine import Engine
from hwnas.nn.network import Network
from hwnas.nn.supernet import Supernet
from hwnas.search.strategy import one_hot

torch.set_num_threads(1)

PLAIN = ("ir_k3_e3", "ir_k5_e3", "ir_k3_e6", "ir_k5_e6")
WITH_SE = (*PLAIN, *(f"{option}_se0.25" for option in PLAIN))


def widths_space(act: str = "relu6") -> MacroSpace:
    """Searched widths from stem to head, SE, residuals wherever shapes match, lists that are no full grid."""
    stages = (
        Stage(widths=(8, 16), slots=(("cn_k3",),)),
        Stage(widths=(8, 16), slots=(("ds_k3", "ds_k5", "ds_k3_se0.25"), ("ds_k3", "skip")), residual="matching"),
        Stage(widths=(16, 24), stride=2, slots=(WITH_SE, (*PLAIN, "skip"))),
        Stage(widths=(16, 24), slots=(("ir_k3_e6_se0.25", "ir_k3_e4_se0.5", "ds_k5"), (*WITH_SE, "skip")), residual="matching"),
        Stage(widths=(24, 48), slots=(("cn_k1", "cn_k3"),)),
    )
    return MacroSpace(name="widths", resolution=10, classes=7, act=act, stages=stages)


def groups_space() -> MacroSpace:
    """Grouped and ungrouped 1 x 1 convolutions side by side, as in FBNet."""
    options = ("ir_k3_e1", "ir_k3_e1_g2", "ir_k5_e3", "ir_k5_e3_g2", "skip")
    stages = (
        Stage(widths=(16,), slots=(("cn_k3",),)),
        Stage(widths=(16, 32), stride=2, slots=(options[:-1], options)),
    )
    return MacroSpace(name="groups", resolution=8, classes=5, stages=stages)


SPACES = {
    "mobile32": lambda: mobile32(resolution=16),
    "widths": widths_space,
    "widths-hswish": lambda: widths_space("hswish"),
    "groups": groups_space,
}


def supernet_of(space: MacroSpace) -> Supernet:
    """With BN scales and all biases away from 1 and 0, so that mixing them up shows."""
    generator = torch.Generator().manual_seed(3)
    supernet = Supernet(space, generator)
    with torch.no_grad():
        for parameter in supernet.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
        supernet.classifier.weight.normal_(0, 0.3, generator=generator)
    return supernet


def batch(space: MacroSpace, seed: int = 0, count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, space.in_channels, space.resolution, space.resolution)
    return torch.randn(shape, generator=generator), torch.randint(0, space.classes, (count,), generator=generator)


def random_picks(space: MacroSpace, count: int) -> list[Picks]:
    """Random ones, and the ones that always take the first and the last option."""
    rng = np.random.default_rng(5)
    ends = [{choice.key: choice.options[end] for choice in space.choices} for end in (0, -1)]
    return [*ends, *(space.sample(rng) for _ in range(count))]


def picked_ops(space: MacroSpace, picks: Picks) -> Iterator[tuple[int, Op]]:
    """(slot position, op) of the slots that are not skipped, by the space's own decoding."""
    blocks = iter(space.decode(picks).blocks)
    for position, slot in enumerate(space.slots):
        if picks.get(slot.key, slot.options[0]) != "skip":
            yield position, next(blocks)


def shared_tensors(supernet: Supernet, picks: Picks, network: Network) -> Iterator[tuple[Tensor, Tensor]]:
    """(the super-net's parameter, the extracted network's) for each parameter of the network, found by shape and place only."""
    for block, (position, op) in zip(network.blocks, picked_ops(supernet.space, picks), strict=False):
        convs = [part for part in block.modules() if isinstance(part, nn.Conv2d)]
        norms = iter(part for part in block.modules() if isinstance(part, nn.BatchNorm2d))
        for conv, layer in zip(convs, op.layers, strict=True):
            name = layer.name + (f"_k{layer.kernel}" if layer.name in ("depthwise", "conv") else "")
            name += f"_g{layer.groups}" if layer.groups > 1 and layer.name != "depthwise" else ""
            elastic = supernet.slots[position].shared[name]
            yield elastic.conv.weight, conv.weight
            if conv.bias is not None:
                yield elastic.conv.bias, conv.bias
            if layer.norm:
                norm = next(norms)
                yield elastic.norm.weight, norm.weight
                yield elastic.norm.bias, norm.bias
    yield supernet.classifier.weight, network.blocks[-1].linear.weight
    yield supernet.classifier.bias, network.blocks[-1].linear.bias


@pytest.mark.parametrize("name", SPACES)
def test_a_path_is_the_extracted_network(name: str) -> None:
    """Forward exactly; gradients equal, scattered back to the corner of the shared weights that was used."""
    space = SPACES[name]()
    supernet = supernet_of(space)
    for number, picks in enumerate(random_picks(space, 10)):
        x_NCHW, y = batch(space, number)
        network = supernet.extract(picks).train()
        supernet.zero_grad(set_to_none=True)
        ours, theirs = supernet.train()(x_NCHW, one_hot(picks, space)), network(x_NCHW)
        assert ours.std() > 1e-2
        assert torch.equal(ours, theirs)
        F.cross_entropy(ours, y).backward()
        F.cross_entropy(theirs, y).backward()
        expected: dict[Tensor, Tensor] = {}
        for shared, own in shared_tensors(supernet, picks, network):
            scattered = torch.zeros_like(shared)
            scattered[tuple(slice(n) for n in own.shape)] = own.grad
            assert torch.equal(shared[tuple(slice(n) for n in own.shape)], own)
            expected[shared] = scattered
        assert len(expected) == len(list(network.parameters()))
        for parameter_name, parameter in supernet.named_parameters():
            if parameter not in expected:
                assert parameter.grad is None, parameter_name
            else:
                scale = expected[parameter].abs().max() + 1e-6
                assert (parameter.grad - expected[parameter]).abs().max() <= 1e-5 * scale, parameter_name


def prefix(count: int, total: int) -> Tensor:
    """1 for the first ``count`` channels, 0 for the rest."""
    return (torch.arange(total) < count).float()


class MaskedSupernet:
    """TuNAS's way, written out: the widest weights, times prefix masks; batch norm over all channels, then masked."""

    def __init__(self, supernet: Supernet) -> None:
        self.supernet = supernet

    def layer(self, position: int, layer: Layer, x_NCHW: Tensor) -> Tensor:
        kernel = f"_k{layer.kernel}" if layer.name in ("depthwise", "conv") else ""
        elastic = self.supernet.slots[position].shared[layer.name + kernel]
        weight = elastic.conv.weight
        out_mask = prefix(layer.out_ch, weight.shape[0])
        x_NCHW = F.pad(x_NCHW, (0, 0, 0, 0, 0, max(0, self.in_width(elastic) - x_NCHW.shape[1])))[:, : self.in_width(elastic)]
        masked = weight * out_mask[:, None, None, None]
        groups = weight.shape[0]
        if layer.name != "depthwise":
            masked, groups = masked * prefix(layer.in_ch, weight.shape[1])[None, :, None, None], 1
        x_NCHW = F.conv2d(x_NCHW, masked, None, layer.stride, layer.kernel // 2, groups=groups)
        if elastic.conv.bias is not None:
            x_NCHW = x_NCHW + (elastic.conv.bias * out_mask)[:, None, None]
        if elastic.norm is not None:
            mean, var = x_NCHW.mean((0, 2, 3), keepdim=True), x_NCHW.var((0, 2, 3), unbiased=False, keepdim=True)
            x_NCHW = (x_NCHW - mean) / (var + elastic.norm.eps).sqrt()
            x_NCHW = x_NCHW * elastic.norm.weight[:, None, None] + elastic.norm.bias[:, None, None]
            x_NCHW = x_NCHW * out_mask[:, None, None]
        return {"none": lambda v: v, "relu": F.relu, "relu6": F.relu6, "hswish": F.hardswish}[layer.act](x_NCHW)

    @staticmethod
    def in_width(elastic: nn.Module) -> int:
        return int(elastic.conv.in_channels)

    def __call__(self, x_NCHW: Tensor, picks: Picks) -> Tensor:
        for position, op in picked_ops(self.supernet.space, picks):
            entry = x_NCHW
            layers = {layer.name: layer for layer in op.layers}
            for name, layer in layers.items():
                if name == "se_reduce":
                    hidden = self.layer(position, layer, x_NCHW.mean((2, 3), keepdim=True))
                    gate = torch.sigmoid(self.layer(position, layers["se_expand"], hidden))
                    x_NCHW = x_NCHW * gate[:, : x_NCHW.shape[1]]
                elif name != "se_expand":
                    x_NCHW = self.layer(position, layer, x_NCHW)
            x_NCHW = x_NCHW + F.pad(entry, (0, 0, 0, 0, 0, x_NCHW.shape[1] - entry.shape[1])) if op.residual else x_NCHW
        classifier = self.supernet.classifier
        width = self.supernet.space.decode(picks).blocks[-1].in_ch
        pooled = F.pad(x_NCHW.mean((2, 3)), (0, classifier.in_features - x_NCHW.shape[1]))
        return F.linear(pooled, classifier.weight * prefix(width, classifier.in_features), classifier.bias)


@pytest.mark.parametrize("name", ["mobile32", "widths", "widths-hswish"])
def test_slicing_is_masking(name: str) -> None:
    """In float64, where rounding cannot hide a difference."""
    space = SPACES[name]()
    supernet = supernet_of(space).double()
    masked = MaskedSupernet(supernet)
    narrow = 0
    for number, picks in enumerate(random_picks(space, 6)):
        x_NCHW, y = (batch(space, number)[0].double(), batch(space, number)[1])
        logits, gradients = [], []
        for run in (lambda: supernet(x_NCHW, one_hot(picks, space)), lambda: masked(x_NCHW, picks)):  # noqa: B023
            supernet.zero_grad(set_to_none=True)
            logits.append(run())
            F.cross_entropy(logits[-1], y).backward()
            gradients.append({key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in supernet.named_parameters()})
        assert torch.allclose(logits[0], logits[1], rtol=1e-9, atol=1e-9)
        for key, gradient in gradients[0].items():
            assert torch.allclose(gradient, gradients[1][key], rtol=1e-6, atol=1e-9), key
        narrow += sum(bool((gradient == 0).any()) and bool((gradient != 0).any()) for gradient in gradients[0].values())
    assert narrow > 20  # corners of shared weights were used


def mixture(space: MacroSpace, picks: Picks, **gates: list[float]) -> dict[str, np.ndarray]:
    return {**one_hot(picks, space), **{key.replace("_", "."): np.array(values) for key, values in gates.items()}}


def stages_space() -> MacroSpace:
    """One slot that changes the shape and one residual one, each with three kernels and SE."""
    options = ("ir_k3_e3_se0.25", "ir_k5_e3_se0.25", "ir_k7_e3_se0.25")
    stages = (
        Stage(widths=(8,), slots=(("cn_k3",),)),
        Stage(widths=(8,), slots=(options, (*options, "skip"))),
    )
    return MacroSpace(name="kernels", resolution=8, classes=4, stages=stages)


def reference_branch(slot: nn.Module, x_NCHW: Tensor, kernels: dict[int, float]) -> Tensor:
    """expand -> weighted average of the depthwise outputs -> SE -> projection, from the slot's parameters alone."""

    def norm(y: Tensor, part: nn.Module) -> Tensor:
        return F.batch_norm(y, None, None, part.norm.weight, part.norm.bias, training=True, eps=1e-3)

    shared = slot.shared
    expanded = F.relu(norm(F.conv2d(x_NCHW, shared["expand"].conv.weight), shared["expand"]))
    mixed = torch.zeros(())
    for kernel, weight in kernels.items():
        part = shared[f"depthwise_k{kernel}"]
        mixed = mixed + weight * F.relu(norm(F.conv2d(expanded, part.conv.weight, padding=kernel // 2, groups=expanded.shape[1]), part))
    hidden = F.relu(F.conv2d(mixed.mean((2, 3), keepdim=True), shared["se_reduce"].conv.weight, shared["se_reduce"].conv.bias))
    mixed = mixed * torch.sigmoid(F.conv2d(hidden, shared["se_expand"].conv.weight, shared["se_expand"].conv.bias))
    return norm(F.conv2d(mixed, shared["project"].conv.weight), shared["project"])


def test_uniform_kernels_average_before_the_projection() -> None:
    supernet = supernet_of(stages_space()).double()
    x_NCHW = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    slot = supernet.slots[1]
    found = slot(x_NCHW, np.full(3, 1 / 3), 8)
    assert torch.allclose(found, reference_branch(slot, x_NCHW, {3: 1 / 3, 5: 1 / 3, 7: 1 / 3}), atol=1e-10)
    after_projection = sum(slot(x_NCHW, np.eye(3)[i], 8) for i in range(3)) / 3
    assert (found - after_projection).abs().max() > 1e-3  # averaging behind the projection is something else


def test_half_a_skip_halves_the_branch() -> None:
    supernet = supernet_of(stages_space()).double()
    x_NCHW = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    slot = supernet.slots[2]
    found = slot(x_NCHW, np.array([0.0, 0.5, 0.0, 0.5]), 8)
    assert torch.allclose(found, x_NCHW + 0.5 * reference_branch(slot, x_NCHW, {5: 1.0}), atol=1e-10)
    found = slot(x_NCHW, np.array([0.25, 0.25, 0.0, 0.5]), 8)
    assert torch.allclose(found, x_NCHW + 0.5 * reference_branch(slot, x_NCHW, {3: 0.5, 5: 0.5}), atol=1e-10)
    assert torch.equal(slot(x_NCHW, np.array([0.0, 0.0, 0.0, 1.0]), 8), x_NCHW)


def test_half_a_skip_beside_a_plain_convolution() -> None:
    """A plain convolution has no residual, so half a skip adds half the input."""
    stages = (Stage(widths=(8,), slots=(("cn_k3",), ("cn_k3", "ir_k3_e3", "skip"))),)
    space = MacroSpace(name="plain", resolution=6, classes=4, stages=stages)
    supernet = supernet_of(space).double()
    slot = supernet.slots[1]
    x_NCHW = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    plain, inverted = slot(x_NCHW, np.array([1.0, 0, 0]), 8), slot(x_NCHW, np.array([0, 1.0, 0]), 8)
    assert torch.allclose(slot(x_NCHW, np.array([0.5, 0, 0.5]), 8), 0.5 * plain + 0.5 * x_NCHW)
    assert torch.allclose(slot(x_NCHW, np.array([0.5, 0.5, 0]), 8), 0.5 * plain + 0.5 * inverted)


def test_gradient_with_respect_to_gates() -> None:
    """Torch gates: the derivative of the output equals finite differences."""
    supernet = supernet_of(stages_space()).double()
    x_NCHW, _ = batch(stages_space())
    gates = torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=torch.float64, requires_grad=True)

    def output(values: Tensor) -> Tensor:
        total: Tensor = (supernet(x_NCHW.double(), {"s1.b0": (1.0, 0.0, 0.0), "s1.b1": values}) ** 2).sum()
        return total

    assert torch.autograd.gradcheck(output, (gates,), atol=1e-4)


def test_zero_options_are_not_executed() -> None:
    space = stages_space()
    supernet = supernet_of(space)
    x_NCHW, y = batch(space)
    F.cross_entropy(supernet(x_NCHW, {"s1.b0": np.array([0.5, 0.0, 0.5]), "s1.b1": np.array([0, 0, 0, 1.0])}), y).backward()
    executed = {name for name, part in supernet.slots[1].shared.items() if part.conv.weight.grad is not None}
    assert executed == {"expand", "depthwise_k3", "depthwise_k7", "se_reduce", "se_expand", "project"}
    assert all(parameter.grad is None for parameter in supernet.slots[2].parameters())


@pytest.mark.parametrize("optimizer", ["rmsproptf", "sgd", "adamw"])
def test_unused_weights_stay_bit_identical(optimizer: str, tmp_path: Path) -> None:
    """No gradient, no momentum, no weight decay: not in the step that skips them, whatever came before."""
    space = stages_space()
    supernet = supernet_of(space)
    config = OptimizerConfig(name=optimizer, lr=1.0, weight_decay=0.1, options={}, warmup=0.0)
    engine = Engine(supernet, config, 10, 6, 0, tmp_path)
    engine.weight_step(*batch(space), {"s1.b0": np.array([1.0, 0, 0]), "s1.b1": np.array([0, 0, 1.0, 0])})  # builds momentum
    engine.step = 1
    before = {name: parameter.detach().clone() for name, parameter in supernet.named_parameters()}
    engine.weight_step(*batch(space, 1), {"s1.b0": np.array([0, 1.0, 0]), "s1.b1": np.array([0, 0, 0, 1.0])})
    changed = {name for name, parameter in supernet.named_parameters() if not torch.equal(parameter, before[name])}
    used = {name for name in before if name.startswith(("slots.0.", "slots.1.", "classifier."))}
    used -= {name for name in used if "depthwise_k3" in name or "depthwise_k7" in name}
    assert changed == used


def test_a_skip_in_a_supernet_needs_every_open_gate() -> None:
    space = stages_space()
    with pytest.raises(ValueError):
        supernet_of(space)(batch(space)[0], {"s1.b0": np.array([1.0, 0, 0])})
