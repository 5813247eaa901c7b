"""A third party's target: programs of ``torch.export``, run by PyTorch itself. It uses
nothing of hwnas but the contract.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from hwnas.export.target import Target, Trained


class TorchProgram(Target):
    """Float32, channels first."""

    runtime = "torch"
    dtype = "fp32"
    file = "model.pt2"
    layout: ClassVar[Literal["NHWC", "NCHW"]] = "NCHW"
    packages = ("torch",)
    runner = Path(__file__).with_name("torch_runner.py")

    def write(self, trained: Trained) -> bytes:
        """The network by itself."""
        return self.timing_file(trained.network)

    def timing_file(self, network: Any) -> bytes:
        """A program for one image, channels first."""
        shape = (1, network.arch.in_channels, network.arch.resolution, network.arch.resolution)
        program = torch.export.export(_Plain(network).eval(), (torch.zeros(shape),))
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        return buffer.getvalue()


class _Plain(nn.Module):
    """The network without what hwnas stores beside its weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_NCHW: torch.Tensor) -> Any:
        return self.network(x_NCHW)
