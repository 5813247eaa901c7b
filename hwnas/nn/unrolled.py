"""The second-order architecture gradient of DARTS: the derivative of the held-out loss
after one virtual training step.

Liu, Simonyan, Yang: "DARTS: Differentiable Architecture Search" (ICLR 2019, arXiv
1806.09055), equations 6 to 8; released code quark0/darts, cnn/architect.py. With
weights w, gates g and the virtual step's learning rate xi:

    w' = w - xi * (momentum * buffer + grad_w L_train(w, g) + weight_decay * w)
    v  = grad_w' L_val(w', g)                   eps = 0.01 / ||v||_2               w+- = w +- eps * v
    d/dg L_val(w'(g), g) ~ grad_g L_val(w', g) - xi * [grad_g L_train(w+, g) - grad_g L_train(w-, g)] / (2 eps)

The bracket is a finite difference for (d2 L_train / dg dw) v, so no Hessian is ever
formed: four passes forward and backward, where the first order (xi = 0) needs one. It
is exact where L_train is quadratic in w.

*Differences from the paper*:

- Gradients are by the gates, not by alpha: gates are functions of alpha alone, so the
  chain rule does the rest outside.
- v is the gradient of the loss. An early version of the code (8876e79) adds weight
  decay to it, which is in no term of equation 8.
- The momentum buffers are read only; the code multiplies them in place by the momentum.
- Whatever optimiser trains the weights, the virtual step is one of SGD with momentum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

Loss: TypeAlias = Callable[[Mapping[str, Tensor]], Tensor]
"""Gates -> scalar loss under the weights' present values. Asked twice, it must say the
same: draw the same dropout masks.
"""

RADIUS = 0.01
"""Length ||eps * v|| of the finite difference's step (the paper's)."""


def unrolled_gate_gradients(
    train_loss: Loss,
    held_out_loss: Loss,
    weights: Sequence[nn.Parameter],
    gates: Mapping[str, Tensor],
    *,
    lr: float,
    momentum_buffers: Sequence[Tensor | None] | None = None,
    momentum: float = 0.0,
    weight_decay: float | Sequence[float] = 0.0,
) -> tuple[float, dict[str, Tensor]]:
    """The held-out loss at w', and its derivative by every gate ([options], like the
    gate) through the virtual step.

    ``momentum_buffers`` and, where it is a sequence, ``weight_decay`` belong to
    ``weights`` one by one. Weights that a loss does not depend on (options that are not
    executed) stay where they are: no decay, no momentum. The weights are moved in
    place, and are back bit for bit afterwards, also after an exception; their ``grad``
    is not touched.

    Example:
        >>> w = nn.Parameter(torch.tensor([2.0]))
        >>> loss, by_gate = unrolled_gate_gradients(
        ...     lambda g: (g["a"] * w).sum(), lambda g: (w**2).sum(), [w], {"a": torch.tensor([1.0])}, lr=0.5
        ... )
        >>> loss, round(by_gate["a"].item(), 3)    # w' = 2 - 0.5 * 1; d/da (2 - 0.5 a)^2 = -1.5
        (2.25, -1.5)
    """
    leaves = {key: gate.detach().requires_grad_() for key, gate in gates.items()}
    original = [weight.detach().clone() for weight in weights]
    buffers = momentum_buffers if momentum_buffers is not None else [None] * len(weights)
    decays = (
        [weight_decay] * len(weights) if isinstance(weight_decay, int | float) else weight_decay
    )
    try:
        _, downhill, _ = _gradients(train_loss(leaves), weights, leaves)
        steps: list[Tensor | None] = []
        for gradient, w, buffer, decay in zip(downhill, original, buffers, decays, strict=True):
            velocity = momentum * buffer if buffer is not None else 0.0
            steps.append(None if gradient is None else gradient + decay * w + velocity)
        _move(weights, original, steps, -lr)
        value, direction, by_gate = _gradients(held_out_loss(leaves), weights, leaves)
        norm = nn.utils.get_total_norm([v for v in direction if v is not None]).item()
        if norm == 0.0:
            return value, by_gate
        eps = RADIUS / norm
        _move(weights, original, direction, eps)
        _, _, above = _gradients(train_loss(leaves), [], leaves)
        _move(weights, original, direction, -eps)
        _, _, below = _gradients(train_loss(leaves), [], leaves)
    finally:
        _move(weights, original, [None] * len(weights), 0.0)
    return value, {key: by_gate[key] - lr * (above[key] - below[key]) / (2 * eps) for key in leaves}


def _gradients(
    loss: Tensor, weights: Sequence[nn.Parameter], leaves: Mapping[str, Tensor]
) -> tuple[float, list[Tensor | None], dict[str, Tensor]]:
    """The loss, its gradients by the weights (None: independent of it) and by the gates (zeros)."""
    found = torch.autograd.grad(loss, [*weights, *leaves.values()], allow_unused=True)
    by_gate = {
        key: torch.zeros_like(leaf) if gradient is None else gradient
        for (key, leaf), gradient in zip(leaves.items(), found[len(weights) :], strict=True)
    }
    return loss.item(), list(found[: len(weights)]), by_gate


@torch.no_grad()
def _move(
    weights: Sequence[nn.Parameter],
    original: Sequence[Tensor],
    directions: Sequence[Tensor | None],
    length: float,
) -> None:
    """weight = original + length * direction. From the original each time, so that
    nothing adds up.
    """
    for weight, start, direction in zip(weights, original, directions, strict=True):
        weight.copy_(start if direction is None else start + length * direction)
