"""Networks whose backbone can be kept as it is while the rest is trained."""

from __future__ import annotations

from typing import Any, Self

from torch import nn


class Freezable(nn.Module):
    """A network with ``blocks``, of which the first ``backbone_blocks`` are its backbone.

    ``frozen`` keeps the weights of the backbone, and ``frozen_norms`` the statistics,
    scales and shifts of its BNs, which then normalise as in evaluation.
    """

    blocks: nn.Sequential
    frozen: bool = False
    frozen_norms: bool = False

    @property
    def backbone_blocks(self) -> int:
        """The number of blocks that may start from the weights of another network."""
        return len(self.blocks)

    def freeze(self, *, weights: bool, norms: bool) -> None:
        """Freeze the backbone, or let it learn again."""
        if (self.frozen, self.frozen_norms) == (weights, norms or weights):
            return
        self.frozen = weights
        self.frozen_norms = norms or weights
        for block in self.blocks[: self.backbone_blocks]:
            for module in block.modules():
                is_frozen = weights or (norms and isinstance(module, nn.BatchNorm2d))
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(not is_frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; frozen BNs stay in evaluation mode."""
        super().train(mode)
        if self.frozen_norms:
            for block in self.blocks[: self.backbone_blocks]:
                for module in block.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.eval()
        return self

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's order of the layers for learning rates that differ by block; what has no
        group is last.
        """
        del coarse
        return {"blocks": r"^blocks\.(\d+)"}
