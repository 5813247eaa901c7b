"""The second-order gradient against closed forms and autograd's own double backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hwnas.nn.unrolled import SGDStep, unrolled_gate_gradients

LR, MOMENTUM, DECAY = 0.07, 0.9, 3e-2


class Bilevel:
    """L_train = sum_i g_i (w' A_i w / 2 + b_i' w), quadratic in w; L_val is a
    smooth function of w and g. Two weights, two gates.
    """

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.weights = [nn.Parameter(normal(4)), nn.Parameter(normal(2, 3))]
        self.buffers: list[Tensor | None] = [normal(4), normal(2, 3)]
        self.gates = {"a": torch.softmax(normal(3), 0), "b": torch.softmax(normal(2), 0)}
        curvature = normal(5, 10, 10)
        self.curvature, self.slope, self.target = (
            curvature + curvature.transpose(1, 2),
            normal(5, 10),
            normal(10),
        )

    def train(self, gates: Mapping[str, Tensor], weights: Any = None) -> Tensor:
        w, g = self._flat(weights), torch.cat([gates["a"], gates["b"]])
        return (g * (0.5 * torch.einsum("i,nij,j->n", w, self.curvature, w) + self.slope @ w)).sum()

    def held_out(self, gates: Mapping[str, Tensor], weights: Any = None) -> Tensor:
        w = self._flat(weights)
        return ((torch.tanh(w) - self.target) ** 2).sum() * gates["a"][0] + (
            gates["b"] ** 2
        ).sum() * w.sin().sum()

    def _flat(self, weights: Any) -> Tensor:
        return torch.cat([w.reshape(-1) for w in (self.weights if weights is None else weights)])

    def reference(
        self, decay: float, momentum: float, lr: float = LR
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The derivative through the virtual step by differentiating twice."""
        leaves = {key: gate.clone().requires_grad_() for key, gate in self.gates.items()}
        downhill = torch.autograd.grad(self.train(leaves), self.weights, create_graph=True)
        moved = [
            w - lr * (momentum * buffer + gradient + decay * w)
            for w, gradient, buffer in zip(self.weights, downhill, self.buffers, strict=True)
            if buffer is not None
        ]
        loss = self.held_out(leaves, moved)
        return loss.detach(), dict(
            zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)
        )


def unrolled(problem: Bilevel, **overrides: Any) -> tuple[float, dict[str, Tensor]]:
    options = {
        "lr": LR,
        "momentum_buffers": problem.buffers,
        "momentum": MOMENTUM,
        "weight_decay": DECAY,
    } | overrides
    return unrolled_gate_gradients(
        problem.train, problem.held_out, problem.weights, problem.gates, SGDStep(**options)
    )


def test_finite_difference_equals_the_mixed_derivative_on_a_quadratic() -> None:
    """The second order adds -xi * (d2 L_train / dg dw) v, where d2 L_train / dg_i dw =
    A_i w + b_i in closed form.
    """
    problem = Bilevel()
    _, by_gate = unrolled(problem)
    w = problem._flat(None).detach()
    g = torch.cat([problem.gates["a"], problem.gates["b"]])
    downhill = torch.einsum("n,nij,j->i", g, problem.curvature, w) + problem.slope.T @ g
    buffer = torch.cat([b.reshape(-1) for b in problem.buffers if b is not None])
    moved = (w - LR * (MOMENTUM * buffer + downhill + DECAY * w)).requires_grad_()
    leaves = {key: gate.clone().requires_grad_() for key, gate in problem.gates.items()}
    v, *direct = torch.autograd.grad(problem.held_out(leaves, [moved]), [moved, *leaves.values()])
    mixed = torch.einsum("nij,j->ni", problem.curvature, w) + problem.slope
    added = torch.cat([by_gate["a"], by_gate["b"]]) - torch.cat(direct)
    torch.testing.assert_close(added, -LR * mixed @ v, rtol=1e-9, atol=1e-9)
    assert added.abs().min() > 1e-3


@pytest.mark.parametrize(
    ("momentum", "decay"), [(0.0, 0.0), (MOMENTUM, 0.0), (0.0, DECAY), (MOMENTUM, DECAY)]
)
def test_against_double_backward(momentum: float, decay: float) -> None:
    for seed in range(3):
        problem = Bilevel(seed)
        loss, by_gate = unrolled(problem, momentum=momentum, weight_decay=decay)
        expected_loss, expected = problem.reference(decay, momentum)
        assert loss == pytest.approx(expected_loss.item(), rel=1e-12)
        for key, gradient in expected.items():
            torch.testing.assert_close(by_gate[key], gradient, rtol=1e-9, atol=1e-9)


def test_a_network_against_double_backward() -> None:
    """Not quadratic: the error of the finite difference is then of second order in eps,
    so it nearly agrees. In float32, as in a search.
    """
    torch.manual_seed(0)
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    layers = [nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)]
    weights = [p for layer in layers for p in layer.parameters()]

    def forward(gates: Mapping[str, Tensor], half: slice, w: list[Tensor]) -> Tensor:
        hidden = torch.tanh(nn.functional.linear(x[half], w[0], w[1]))
        mixed = torch.stack(
            [
                torch.tanh(nn.functional.linear(hidden, w[2], w[3])),
                torch.tanh(nn.functional.linear(hidden, w[4], w[5])),
            ]
        )
        hidden = (gates["slot"][:, None, None] * mixed).sum(0)
        return nn.functional.cross_entropy(nn.functional.linear(hidden, w[6], w[7]), y[half])

    first, second = slice(0, 32), slice(32, 64)
    gates = {"slot": torch.tensor([0.4, 0.6])}
    _, by_gate = unrolled_gate_gradients(
        lambda g: forward(g, first, weights),
        lambda g: forward(g, second, weights),
        weights,
        gates,
        SGDStep(2.0),
    )
    leaf = gates["slot"].clone().requires_grad_()
    downhill = torch.autograd.grad(
        forward({"slot": leaf}, first, weights), weights, create_graph=True
    )
    loss = forward(
        {"slot": leaf},
        second,
        [w - 2.0 * gradient for w, gradient in zip(weights, downhill, strict=True)],
    )
    (expected,) = torch.autograd.grad(loss, [leaf])
    (first_order,) = torch.autograd.grad(forward({"slot": leaf}, second, weights), [leaf])
    torch.testing.assert_close(by_gate["slot"], expected, rtol=2e-2, atol=1e-4)
    assert not torch.allclose(by_gate["slot"], first_order, rtol=0.1), (
        "the second order makes no difference here"
    )


def test_a_learning_rate_of_zero_gives_the_first_order() -> None:
    problem = Bilevel()
    loss, by_gate = unrolled(problem, lr=0.0)
    leaves = {key: gate.clone().requires_grad_() for key, gate in problem.gates.items()}
    held_out = problem.held_out(leaves)
    assert loss == held_out.item()
    for gradient, found in zip(
        torch.autograd.grad(held_out, list(leaves.values())), by_gate.values(), strict=True
    ):
        assert torch.equal(gradient, found)


def test_every_weight_can_have_its_own_decay() -> None:
    problem = Bilevel()
    loss, _ = unrolled(problem, weight_decay=[DECAY, DECAY])
    assert loss == unrolled(problem)[0]
    assert loss != unrolled(problem, weight_decay=[DECAY, 0.0])[0]


def _fails_at(call: int, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    calls = iter(range(10))

    def failing(gates: Mapping[str, Tensor]) -> Tensor:
        if next(calls) == call:
            raise RuntimeError("out of memory")
        return loss(gates)

    return failing


@pytest.mark.parametrize("call", [0, 1, 2, None])
def test_weights_are_restored_bit_for_bit_and_gradients_untouched(call: int | None) -> None:
    """Whichever pass on the training batch fails; None means that none does."""
    problem = Bilevel()
    for weight in problem.weights:
        weight.grad = torch.full_like(weight, 7.0)
    before = [weight.detach().clone() for weight in problem.weights]
    buffers = [buffer.clone() for buffer in problem.buffers if buffer is not None]
    train = problem.train if call is None else _fails_at(call, problem.train)

    def run() -> None:
        unrolled_gate_gradients(
            train,
            problem.held_out,
            problem.weights,
            problem.gates,
            SGDStep(LR, MOMENTUM, problem.buffers),
        )

    if call is None:
        run()
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            run()
    for weight, old in zip(problem.weights, before, strict=True):
        assert torch.equal(weight, old)
        assert weight.grad is not None and torch.equal(weight.grad, torch.full_like(weight, 7.0))
    assert all(
        torch.equal(now, old)
        for now, old in zip(problem.buffers, buffers, strict=True)
        if now is not None
    )
    assert not problem.gates["a"].requires_grad


def test_weights_that_are_not_executed_stay_unchanged() -> None:
    """They get no decay and no momentum; a gate that nothing depends on has gradient
    zero.
    """
    problem = Bilevel()
    idle = nn.Parameter(torch.ones(3, dtype=torch.float64))
    seen: list[Tensor] = []

    def held_out(gates: Mapping[str, Tensor]) -> Tensor:
        seen.append(idle.detach().clone())
        return problem.held_out(gates)

    gates = {**problem.gates, "idle": torch.ones(2, dtype=torch.float64)}
    _, by_gate = unrolled_gate_gradients(
        problem.train,
        held_out,
        [*problem.weights, idle],
        gates,
        SGDStep(LR, MOMENTUM, [*problem.buffers, torch.ones(3, dtype=torch.float64)], DECAY),
    )
    assert torch.equal(seen[0], torch.ones(3, dtype=torch.float64))
    assert torch.equal(by_gate["idle"], torch.zeros(2, dtype=torch.float64))
    for key, gradient in unrolled(problem)[1].items():
        assert torch.equal(by_gate[key], gradient)


def test_a_held_out_loss_without_weights_has_no_second_order() -> None:
    problem = Bilevel()
    _, by_gate = unrolled_gate_gradients(
        problem.train, lambda g: (g["a"] ** 2).sum(), problem.weights, problem.gates, SGDStep(LR)
    )
    assert torch.equal(by_gate["a"], 2 * problem.gates["a"])
