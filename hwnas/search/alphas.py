"""Architecture parameters of the differentiable methods: one vector alpha per choice,
whose softmax is the policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hwnas.core.space import SearchSpace
from hwnas.errors import SpaceError
from hwnas.lazy import torch

if TYPE_CHECKING:  # see hwnas/lazy.py
    from torch import Tensor


def refuse_resolutions(space: SearchSpace, strategy: str) -> None:
    """Raises SpaceError if ``space`` leaves the resolution open: a batch of images has
    a single resolution, so ``strategy`` cannot mix several.
    """
    for choice in space.choices:
        if choice.kind == "resolution":
            options = ", ".join(map(str, choice.options))
            raise SpaceError(
                f"{strategy} mixes the options of a choice, and {choice.key!r} of space"
                f" {space.name} ({options}) cannot be mixed: restrict it to one option"
                f" (space.restrict = {{{choice.key} = [{choice.options[-1]}]}}), or use a strategy"
                " that samples, such as tunas, spos or random."
            )


class Alphas:
    """alpha of every choice of a space (float64 on the CPU), and the Adam optimiser
    that updates them.

    The initial alphas are drawn from ``rng``, normal with standard deviation
    ``init_std``; 0 starts with a uniform policy. ``kept`` marks the options that a
    method has not dropped (bool [options]; initially all): the others have probability
    0.
    """

    def __init__(
        self,
        space: SearchSpace,
        rng: np.random.Generator,
        *,
        init_std: float,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        self.values: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        for choice in space.choices:
            count = len(choice.options)
            initial = rng.normal(0.0, init_std, count)
            self.values[choice.key] = torch.tensor(initial, requires_grad=True)
            self.kept[choice.key] = torch.ones(count, dtype=torch.bool)
        self.optimizer = torch.optim.Adam(
            list(self.values.values()), lr=lr, betas=betas, weight_decay=weight_decay
        )

    def softmax(self) -> dict[str, Tensor]:
        """Choice key -> probabilities [options], differentiable in alpha."""
        policy = {}
        for key, alpha in self.values.items():
            logits = alpha.masked_fill(~self.kept[key], -torch.inf)
            policy[key] = torch.softmax(logits, 0)
        return policy

    def policy(self) -> dict[str, np.ndarray]:
        """Choice key -> probabilities [options], as arrays."""
        return {key: p.detach().numpy() for key, p in self.softmax().items()}

    def gradients(self, loss: Tensor) -> dict[str, Tensor | None]:
        """Choice key -> d loss / d alpha [options]; None if ``loss`` does not depend on
        the choice.
        """
        gradients = torch.autograd.grad(loss, list(self.values.values()), allow_unused=True)
        return dict(zip(self.values, gradients, strict=True))

    def update(self, loss: Tensor) -> None:
        """One Adam step down the gradient of ``loss``."""
        self.apply(self.gradients(loss))

    def apply(self, gradients: Mapping[str, Tensor | None]) -> None:
        """One Adam step with the given gradients; None leaves the alpha of a choice,
        and its moments, unchanged.
        """
        for key, alpha in self.values.items():
            alpha.grad = gradients[key]
        self.optimizer.step()

    def entropy(self) -> float:
        """Sum of the choices' entropies, in nats."""
        total = 0.0
        for p in self.policy().values():
            # 1e-30 makes p log p of a dropped option 0 instead of nan
            total += float(-(p * np.log(p + 1e-30)).sum())
        return total

    def state_dict(self) -> dict[str, Any]:
        """Alphas, the kept options, and the state of the optimiser."""
        values = {key: alpha.detach().clone() for key, alpha in self.values.items()}
        return {"values": values, "kept": dict(self.kept), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from ``state_dict``."""
        with torch.no_grad():
            for key, alpha in self.values.items():
                alpha.copy_(state["values"][key])
        # the engine loads all tensors to its own device
        self.kept = {key: state["kept"][key].cpu() for key in self.kept}
        self.optimizer.load_state_dict(state["optimizer"])
