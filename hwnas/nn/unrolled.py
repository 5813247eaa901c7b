"""The second-order architecture gradient of DARTS, which is the derivative of the
held-out loss after one virtual training step.

Liu, Simonyan, Yang: "DARTS: Differentiable Architecture Search" (ICLR 2019, arXiv
1806.09055), equations 6 to 8; released code quark0/darts, cnn/architect.py. With
weights w, gates g and the virtual step's learning rate xi:

    w' = w - xi * (momentum * buffer + grad_w L_train(w, g) + weight_decay * w)
    v  = grad_w' L_val(w', g)        eps = 0.01 / ||v||_2        w+- = w +- eps * v
    d/dg L_val(w'(g), g) ~ grad_g L_val(w', g)
                           - xi * [grad_g L_train(w+, g) - grad_g L_train(w-, g)] / (2
                             eps)

The bracket is a finite difference for (d2 L_train / dg dw) v, so no Hessian is ever
formed. It takes four forward and backward passes; the first order (xi = 0) needs one.
The difference is exact if L_train is quadratic in w.

*Differences from the paper*:

- Gradients are taken with respect to the gates, not alpha. Gates depend only on alpha,
  so the caller completes the chain rule.
- v is the gradient of the loss. An early version of the code (8876e79) adds weight
  decay to it, which no term of equation 8 contains.
- The momentum buffers are only read; the code multiplies them in place by the momentum.
- The virtual step is always a step of SGD, whatever optimiser trains the weights. The
  caller passes a momentum and its buffers only if that optimiser is itself SGD.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

Loss: TypeAlias = Callable[[Mapping[str, Tensor]], Tensor]
"""Gates -> scalar loss under the current weights. It must be deterministic: every call
has to draw the same dropout masks.
"""

RADIUS = 0.01
"""Length ||eps * v|| of the finite difference's step, as in the paper."""


@dataclass(frozen=True)
class SGDStep:
    """The virtual step of SGD. ``momentum_buffers`` has one entry per weight (None: no
    buffer yet), and so has ``weight_decay`` if it is a sequence.
    """

    lr: float
    momentum: float = 0.0
    momentum_buffers: Sequence[Tensor | None] | None = None
    weight_decay: float | Sequence[float] = 0.0

    def direction(
        self, gradients: Sequence[Tensor | None], weights: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The direction in which the step moves against every weight; None for weights
        without a gradient, which do not move.
        """
        buffers = self.momentum_buffers
        if buffers is None:
            buffers = [None] * len(weights)
        decays = self.weight_decay
        if isinstance(decays, int | float):
            decays = [decays] * len(weights)

        directions: list[Tensor | None] = []
        for gradient, w, buffer, decay in zip(gradients, weights, buffers, decays, strict=True):
            if gradient is None:
                directions.append(None)
                continue
            velocity = self.momentum * buffer if buffer is not None else 0.0
            directions.append(gradient + decay * w + velocity)
        return directions


def unrolled_gate_gradients(
    train_loss: Loss,
    held_out_loss: Loss,
    weights: Sequence[nn.Parameter],
    gates: Mapping[str, Tensor],
    step: SGDStep,
) -> tuple[float, dict[str, Tensor]]:
    """The held-out loss at w', and its gradient with respect to every gate ([options],
    like the gate) through the virtual ``step``.

    Weights that a loss does not depend on (options that are not executed)
    do not move: no decay, no momentum. The weights are changed in place and restored
    bit for bit, even after an exception; their ``grad`` is not changed.

    Example:
        >>> w = nn.Parameter(torch.tensor([2.0]))
        >>> gates = {"a": torch.tensor([1.0])}
        >>> loss, by_gate = unrolled_gate_gradients(
        ...     lambda g: (g["a"] * w).sum(),
        ...     lambda g: (w**2).sum(),
        ...     [w],
        ...     gates,
        ...     SGDStep(lr=0.5),
        ... )
        >>> # w' = 2 - 0.5 * 1; d/da (2 - 0.5 a)^2 = -1.5
        >>> loss, round(by_gate["a"].item(), 3)
        (2.25, -1.5)
    """
    leaves = {key: gate.detach().requires_grad_() for key, gate in gates.items()}
    original = [weight.detach().clone() for weight in weights]
    try:
        # the virtual step to w'
        _, train_gradients, _ = _gradients(train_loss(leaves), weights, leaves)
        _move(weights, original, step.direction(train_gradients, original), -step.lr)

        value, direction, by_gate = _gradients(held_out_loss(leaves), weights, leaves)
        norm = nn.utils.get_total_norm([v for v in direction if v is not None]).item()
        # the correction vanishes with v, and eps would divide by zero
        if norm == 0.0:
            return value, by_gate

        # the finite difference is around w, not around w'
        eps = RADIUS / norm
        _move(weights, original, direction, eps)
        _, _, above = _gradients(train_loss(leaves), [], leaves)
        _move(weights, original, direction, -eps)
        _, _, below = _gradients(train_loss(leaves), [], leaves)
    finally:
        _move(weights, original, [None] * len(weights), 0.0)

    corrected: dict[str, Tensor] = {}
    for key in leaves:
        corrected[key] = by_gate[key] - step.lr * (above[key] - below[key]) / (2 * eps)
    return value, corrected


def _gradients(
    loss: Tensor, weights: Sequence[nn.Parameter], leaves: Mapping[str, Tensor]
) -> tuple[float, list[Tensor | None], dict[str, Tensor]]:
    """The loss and its gradients with respect to the weights and the gates. Where the
    loss does not depend on them, weights get None and gates get zeros.
    """
    gradients = torch.autograd.grad(loss, [*weights, *leaves.values()], allow_unused=True)
    by_gate: dict[str, Tensor] = {}
    for (key, leaf), gradient in zip(leaves.items(), gradients[len(weights) :], strict=True):
        by_gate[key] = torch.zeros_like(leaf) if gradient is None else gradient
    return loss.item(), list(gradients[: len(weights)]), by_gate


@torch.no_grad()
def _move(
    weights: Sequence[nn.Parameter],
    original: Sequence[Tensor],
    directions: Sequence[Tensor | None],
    length: float,
) -> None:
    """Set every weight to original + length * direction. Starting from the original
    each time keeps rounding errors from adding up.
    """
    for weight, start, direction in zip(weights, original, directions, strict=True):
        weight.copy_(start if direction is None else start + length * direction)
