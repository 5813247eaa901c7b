"""Mixtures: options, widths and depths weighted by gates, their derivatives, probes,
and rematerialisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hwnas.config import SupernetConfig
from hwnas.core.arch import Picks
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.nn.slot import SlotGates, Width, slot_gates
from hwnas.nn.supernet import MacroSupernet
from hwnas.search.proposal import one_hot
from tests.nn.nets import (
    PLAIN,
    batch,
    depths_space,
    groups_space,
    kernels_space,
    random_picks,
    supernet_of,
    widths_space,
)

torch.set_num_threads(1)

SEPARATE = SupernetConfig(sharing="separate")


def double(
    space: MacroSpace, config: SupernetConfig | None = None
) -> tuple[MacroSupernet, Tensor, Tensor]:
    """A super-net in float64, images and labels."""
    x_NCHW, y = batch(space)
    return supernet_of(space, config).double(), x_NCHW.double(), y


def random_gates(
    space: MacroSpace, seed: int = 0, requires_grad: bool = False
) -> dict[str, Tensor]:
    """A weight for every option of every choice; the weights of a choice add up to 1.
    A resolution is one-hot.
    """
    rng = np.random.default_rng(seed)
    gates = {
        choice.key: rng.dirichlet(np.full(len(choice.options), 3.0)) for choice in space.choices
    }
    gates |= {
        choice.key: np.eye(len(choice.options))[0]
        for choice in space.choices
        if choice.kind == "resolution"
    }
    return {key: torch.tensor(gate, requires_grad=requires_grad) for key, gate in gates.items()}


def leaves(picks: Picks, space: MacroSpace) -> dict[str, Tensor]:
    """One-hot gates that require a gradient."""
    return {
        key: torch.tensor(gate, requires_grad=True) for key, gate in one_hot(picks, space).items()
    }


def by_hand(supernet: MacroSupernet, x_NCHW: Tensor, gates: Mapping[str, Any]) -> Tensor:
    """The definition of separate sharing without resolutions, in plain autograd: all
    options run at all weights, and widths are masks.

    x <- (1 - k) x + k * sum_i g_i option_i(x), where k is the weight of the depths that
    keep the slot and an option's branch (not its identity) is multiplied by the weights
    of the widths that hold each channel.
    """
    into = Width(supernet.space.in_channels, supernet.space.in_channels)
    for module, slot in zip(supernet.slots, supernet.space.slots, strict=True):
        out = into
        if slot.first:
            widest, mask = max(slot.out_widths), None
            if slot.out_key in gates:
                holds = [
                    torch.cat([torch.ones(width), torch.zeros(widest - width)]).double()
                    for width in slot.out_widths
                ]
                mask = sum(
                    weight * held for weight, held in zip(gates[slot.out_key], holds, strict=True)
                )
            out = Width(widest, widest, mask)
        weights = gates.get(slot.key, torch.ones(1))
        y_NCHW: Any = 0.0
        for option, weight in zip(slot.options, weights, strict=True):
            y_NCHW = y_NCHW + weight * module(x_NCHW, SlotGates(((option, 1.0),)), into, out)
        kept = sum(
            g
            for g, depth in zip(gates.get(slot.depth_key, [1.0]), slot.depths or (99,), strict=True)
            if depth > slot.index
        )
        x_NCHW, into = y_NCHW if slot.first else (1 - kept) * x_NCHW + kept * y_NCHW, out
    return F.linear(x_NCHW.mean((2, 3)), supernet.classifier.weight, supernet.classifier.bias)


def single_resolution() -> MacroSpace:
    return depths_space().restrict({"resolution": [8]})


MIXED: dict[str, Callable[[], MacroSpace]] = {
    "kernels": kernels_space,
    "groups": groups_space,
    "widths": widths_space,
    "depths": single_resolution,
}


@pytest.mark.parametrize("name", MIXED)
def test_separate_options_add_up(name: str) -> None:
    """Outputs and gradients of all weights and gates are those of the definition."""
    space = MIXED[name]()
    supernet, x_NCHW, y = double(space, SEPARATE)
    results = []
    for run in (supernet, lambda *args: by_hand(supernet, *args)):
        gates = random_gates(space, requires_grad=True)
        logits = run(x_NCHW, gates)
        inputs = [*gates.values(), *supernet.parameters()]
        results.append(
            (logits, torch.autograd.grad(F.cross_entropy(logits, y), inputs, allow_unused=True))
        )
    (ours, our_gradients), (theirs, their_gradients) = results
    assert ours.std() > 1e-2
    assert torch.allclose(ours, theirs, atol=1e-10)
    for mine, other in zip(our_gradients, their_gradients, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or torch.allclose(mine, other, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("act", ["relu6", "hswish"])
def test_a_mixture_of_widths_is_a_weighted_mask_over_channels(act: str) -> None:
    """FBNetV2: the channels that only the wider option has are multiplied by its
    weight, the others by the sum of both weights.
    """
    stages = (
        SpaceStage(widths=(8, 16), slots=(("cn_k3",),)),
        SpaceStage(widths=(8,), slots=(("cn_k1",),)),
    )
    space = MacroSpace(name="two", resolution=6, classes=3, act=act, stages=stages)
    supernet, x_NCHW, _ = double(space)
    first, second = (module.copies[0] for module in supernet.slots)

    def conv(x: Tensor, part: Any, kernel: int) -> Tensor:
        x = F.conv2d(x, part.conv.weight, padding=kernel // 2)
        x = F.batch_norm(
            x, None, None, part.norms[0].weight, part.norms[0].bias, training=True, eps=1e-3
        )
        return F.hardswish(x) if act == "hswish" else F.relu6(x)

    masked = (
        conv(x_NCHW, first["conv_k3"], 3)
        * torch.cat([torch.ones(8), torch.full((8,), 0.3)])[:, None, None]
    )
    expected = supernet.classifier(conv(masked, second["conv_k1"], 1).mean((2, 3)))
    assert torch.allclose(
        supernet(x_NCHW, {"s0.width": np.array([0.7, 0.3])}), expected, atol=1e-10
    )
    assert torch.allclose(
        supernet(x_NCHW, {"s0.width": torch.tensor([0.7, 0.3], dtype=torch.float64)}),
        expected,
        atol=1e-10,
    )


@pytest.mark.parametrize("sharing", ["collapsed", "separate"])
@pytest.mark.parametrize("make", [widths_space, depths_space, groups_space])
def test_a_one_hot_mixture_is_the_path(make: Callable[[], MacroSpace], sharing: str) -> None:
    """Exactly with plain numbers or tensors that require a gradient; nearly if other
    widths and depths are probed.
    """
    space = make()
    supernet, x_NCHW, _ = double(space, SupernetConfig(sharing=sharing))
    everything = {
        choice.key: range(len(choice.options))
        for choice in space.choices
        if choice.kind in ("width", "depth")
    }
    for picks in random_picks(space, 5):
        path = supernet(x_NCHW, one_hot(picks, space))
        assert torch.equal(
            supernet(
                x_NCHW, {key: torch.tensor(gate) for key, gate in one_hot(picks, space).items()}
            ),
            path,
        )
        assert torch.equal(supernet(x_NCHW, leaves(picks, space)), path)
        for probes in (everything, *({key: options} for key, options in everything.items())):
            assert torch.allclose(
                supernet(x_NCHW, leaves(picks, space), probes), path, rtol=1e-10, atol=1e-10
            )


@pytest.mark.parametrize("config", [{"operation_on": "edge"}, {"wsbn": True}])
def test_probed_depths_leave_the_forward_pass_alone(config: dict[str, Any]) -> None:
    """Even if weights depend on where the input comes from: a slot of weight 0 is not a
    producer.
    """
    space = depths_space()
    supernet, x_NCHW, _ = double(space, SupernetConfig(**config))
    for picks in random_picks(space, 5):
        probes = {
            choice.key: range(len(choice.options))
            for choice in space.choices
            if choice.kind == "depth"
        }
        assert torch.equal(
            supernet(x_NCHW, leaves(picks, space), probes), supernet(x_NCHW, one_hot(picks, space))
        )


def test_a_mixture_of_depths_weighs_the_slots_by_the_depths_that_keep_them() -> None:
    space = single_resolution()
    supernet, x_NCHW, _ = double(space)
    picks = {choice.key: choice.options[0] for choice in space.choices}
    gates = one_hot(picks, space) | {"s1.depth": np.array([0.5, 0.2, 0.3])}
    width = Width(8, 8)
    x = supernet.slots[0](x_NCHW, SlotGates((("cn_k3", 1.0),)), Width(3, 3), width)
    for position, kept in ((1, 1.0), (2, 0.5), (3, 0.3), (4, 0.3)):
        y = supernet.slots[position](x, SlotGates((("ir_k3_e3", 1.0),)), width, width)
        x = x + kept * (y - x)
    x = supernet.slots[5](x, SlotGates((("ir_k5_e3_se0.25_hsig", 1.0),)), width, Width(16, 16))
    x = supernet.slots[7](x, SlotGates((("hd", 1.0),)), Width(16, 16), Width(24, 24))
    expected = F.linear(x.flatten(1), supernet.classifier.weight[:, :24], supernet.classifier.bias)
    assert torch.allclose(supernet(x_NCHW, gates), expected, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["collapsed", "separate"])
@pytest.mark.parametrize(
    ("make", "kind"), [(groups_space, "op"), (widths_space, "width"), (single_resolution, "depth")]
)
def test_gradients_of_gates_match_finite_differences(
    make: Callable[[], MacroSpace], kind: str, sharing: str
) -> None:
    space = make()
    supernet, x_NCHW, _ = double(space, SupernetConfig(sharing=sharing))
    gates = random_gates(space, seed=2)
    keys = [choice.key for choice in space.choices if choice.kind == kind]

    def output(*values: Tensor) -> Tensor:
        total: Tensor = (
            supernet(x_NCHW, {**gates, **dict(zip(keys, values, strict=True))}) ** 2
        ).sum()
        return total

    assert torch.autograd.gradcheck(
        output, [gates[key].requires_grad_() for key in keys], eps=1e-7, rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("make", [groups_space, widths_space, single_resolution])
def test_probes_are_the_gradient_of_executing_everything(make: Callable[[], MacroSpace]) -> None:
    """At weight 0, <output of the option, gradient of the output>, as autograd computes
    it if all options of a slot run.
    """
    space = make()
    supernet, x_NCHW, y = double(space, SEPARATE)
    probes = {
        choice.key: range(len(choice.options)) for choice in space.choices if choice.kind == "op"
    }
    for picks in random_picks(space, 3):
        # by_hand always runs the widest
        picks |= {
            choice.key: max(choice.options) for choice in space.choices if choice.kind == "width"
        }
        found, expected = [], []
        for run, results in (
            (lambda g: supernet(x_NCHW, g, probes), found),
            (lambda g: by_hand(supernet, x_NCHW, g), expected),
        ):
            gates = leaves(picks, space)
            logits = run(gates)
            F.cross_entropy(logits, y).backward()
            gradients = [
                torch.zeros_like(gates[key]) if gates[key].grad is None else gates[key].grad
                for key in probes
            ]
            results += [logits, *gradients]
        for mine, other in zip(found, expected, strict=True):
            assert torch.allclose(mine, other, rtol=1e-6, atol=1e-10)
        assert sum(float(gradient.abs().sum()) > 1e-6 for gradient in found[1:]) >= 2


def test_probes_change_neither_outputs_nor_weights() -> None:
    """The forward pass is the same bit for bit. Weights that are only probed get no
    gradient, and their statistics stay unchanged.
    """
    space = kernels_space()
    supernet = supernet_of(space, SupernetConfig(sharing="separate", bn_track=True))
    x_NCHW, y = batch(space)
    picks: Picks = {"s1.b0": "ir_k5_e3_se0.25", "s1.b1": "ir_k3_e3_se0.25"}
    gates = leaves(picks, space)
    before = {name: value.clone() for name, value in supernet.named_buffers()}
    logits = supernet(x_NCHW, gates, {key: range(3) for key in gates})
    loss = F.cross_entropy(logits, y)
    loss.backward()
    assert torch.equal(logits, supernet(x_NCHW, one_hot(picks, space)))
    for key, gate in gates.items():
        assert gate.grad is not None
        assert bool((gate.grad[:3] != 0).all()), key
    used = (
        "slots.0.",
        "slots.1.copies.0.ir_k5_e3_se0_25|",
        "slots.2.copies.0.ir_k3_e3_se0_25|",
        "classifier.",
    )
    for name, parameter in supernet.named_parameters():
        assert (parameter.grad is not None) == name.startswith(used), name
    changed = {
        name for name, value in supernet.named_buffers() if not torch.equal(value, before[name])
    }
    assert changed == {
        name for name in before if name.startswith(used) and "num_batches" not in name
    }


def test_probes_run_in_the_precision_of_the_forward_pass() -> None:
    """Autocast is off when the backward pass begins; the probes switch it on again."""
    space = kernels_space()
    supernet = supernet_of(space, SEPARATE)
    x_NCHW, y = batch(space)
    picks: Picks = {"s1.b0": "ir_k5_e3_se0.25", "s1.b1": "ir_k3_e3_se0.25"}
    gradients = []
    for enabled in (False, True):
        gates = {
            key: torch.tensor(gate, dtype=torch.float32, requires_grad=True)
            for key, gate in one_hot(picks, space).items()
        }
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(supernet(x_NCHW, gates, {key: range(3) for key in gates}), y)
        loss.backward()
        gradients.append(torch.cat([gate.grad for gate in gates.values() if gate.grad is not None]))
    # bfloat16 is too coarse for an elementwise comparison
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.95


def run_with_gradients(
    supernet: MacroSupernet, x_NCHW: Tensor, y: Tensor, gates: dict[str, Tensor]
) -> tuple[list[Tensor | None], int]:
    """Logits, all gradients and running statistics, and the bytes kept for the backward
    pass, weights not counted.
    """
    kept = 0
    weights = {parameter.data_ptr() for parameter in supernet.parameters()}

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if tensor.untyped_storage().data_ptr() in weights else tensor.nbytes
        return tensor

    x_NCHW = x_NCHW.clone().requires_grad_()
    torch.manual_seed(11)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        logits = supernet(x_NCHW, gates, None, 0.3)
        loss = F.cross_entropy(logits, y)
    inputs = [gate for gate in gates.values() if gate.requires_grad]
    gradients = torch.autograd.grad(
        loss, [x_NCHW, *inputs, *supernet.parameters()], allow_unused=True
    )
    return [logits, *gradients, *supernet.buffers()], kept


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"bn_track": True, "path_dropout": 0.5}, {"channels": "random", "dropout": 0.3}],
)
@pytest.mark.parametrize("sharing", ["collapsed", "separate"])
@pytest.mark.parametrize("make", [groups_space, widths_space])
def test_rematerialisation_changes_only_memory(
    make: Callable[[], MacroSpace], sharing: str, settings: dict[str, Any]
) -> None:
    """Outputs, gradients of weights, input and gates, and running statistics are the
    same; random channels and dropout masks are drawn again.
    """
    space = make()
    for gates in (random_gates(space, requires_grad=True), random_gates(space)):
        results, kept = [], []
        for remat in (False, True):
            supernet, x_NCHW, y = double(
                space, SupernetConfig(sharing=sharing, remat=remat, **settings)
            )
            supernet.fraction = 0.5
            found, size = run_with_gradients(supernet, x_NCHW, y, gates)
            results.append(found)
            kept.append(size)
        for mine, other in zip(*results, strict=True):
            assert (mine is None) == (other is None)
            assert mine is None or torch.allclose(mine, other, rtol=1e-9, atol=1e-12)
        assert kept[1] < 0.6 * kept[0]


def test_plain_numbers_and_tensors_as_gates_agree() -> None:
    """A gate that requires no gradient is read as numbers; the result is the same."""
    space = kernels_space()
    supernet, x_NCHW, _ = double(space)
    gates = random_gates(space)
    expected = supernet(x_NCHW, {key: gate.clone().requires_grad_() for key, gate in gates.items()})
    assert torch.allclose(supernet(x_NCHW, gates), expected, atol=1e-12)
    assert torch.allclose(
        supernet(x_NCHW, {key: gate.numpy() for key, gate in gates.items()}), expected, atol=1e-12
    )


def test_what_a_gate_executes() -> None:
    slot = MacroSpace(
        name="s",
        resolution=8,
        classes=2,
        stages=(SpaceStage(widths=(8,), slots=(("cn_k3",), (*PLAIN, "skip"))),),
    ).slots[1]
    gates = slot_gates(slot, np.array([0.0, 0.5, 0.0, 0.0, 0.5]), [1, 2])
    assert gates.executed == (("ir_k5_e3", 0.5), ("skip", 0.5))
    assert gates.probed == ((2, "ir_k3_e6"),)  # option 1 is executed, so it needs no probe
