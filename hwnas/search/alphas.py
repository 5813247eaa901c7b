"""Architecture parameters of the differentiable methods: one vector per choice, softmax
of which is its policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwnas.core.space import SearchSpace
from hwnas.errors import SpaceError


def refuse_resolutions(space: SearchSpace, strategy: str) -> None:
    """Raise SpaceError where ``space`` leaves the resolution open: a batch of images
    has one, so ``strategy`` cannot mix several.
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
    """alpha per choice of a space (float64 on the CPU), and the Adam that updates them.

    ``init_std`` is the standard deviation of the normal initialisation drawn from
    ``rng``; 0 starts uniform. ``kept`` says which options are still there (bool
    [options]; all, to start with): the others have probability 0.
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
        self.values: dict[str, Tensor] = {
            choice.key: torch.tensor(
                rng.normal(0.0, init_std, len(choice.options)), requires_grad=True
            )
            for choice in space.choices
        }
        self.kept = {
            key: torch.ones(len(alpha), dtype=torch.bool) for key, alpha in self.values.items()
        }
        self.optimizer = torch.optim.Adam(
            list(self.values.values()), lr=lr, betas=betas, weight_decay=weight_decay
        )

    def softmax(self) -> dict[str, Tensor]:
        """Choice key -> probabilities [options], differentiable."""
        return {
            key: torch.softmax(alpha.masked_fill(~self.kept[key], -torch.inf), 0)
            for key, alpha in self.values.items()
        }

    def policy(self) -> dict[str, np.ndarray]:
        """Choice key -> probabilities [options]."""
        return {key: p.detach().numpy() for key, p in self.softmax().items()}

    def gradients(self, loss: Tensor) -> dict[str, Tensor | None]:
        """Choice key -> d loss / d alpha [options]; None where ``loss`` does not depend
        on the choice.
        """
        found = torch.autograd.grad(loss, list(self.values.values()), allow_unused=True)
        return dict(zip(self.values, found, strict=True))

    def update(self, loss: Tensor) -> None:
        """One Adam step down the gradient of ``loss``."""
        self.apply(self.gradients(loss))

    def apply(self, gradients: Mapping[str, Tensor | None]) -> None:
        """One Adam step with given gradients; None leaves a choice's alpha, and its
        moments, alone.
        """
        for key, alpha in self.values.items():
            alpha.grad = gradients[key]
        self.optimizer.step()

    def entropy(self) -> float:
        """Sum of the choices' entropies, in nats."""
        return float(sum(-(p * np.log(p + 1e-30)).sum() for p in self.policy().values()))

    def state_dict(self) -> dict[str, Any]:
        """Values, what is kept, and the optimiser's moments."""
        values = {key: alpha.detach().clone() for key, alpha in self.values.items()}
        return {"values": values, "kept": dict(self.kept), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        with torch.no_grad():
            for key, alpha in state["values"].items():
                self.values[key].copy_(alpha)
        # the engine loads everything on to its device
        self.kept = {key: kept.cpu() for key, kept in state["kept"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
