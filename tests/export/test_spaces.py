"""The smallest, the largest and a random network of every built-in space: built, run
and written to files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from torch import nn

from hwnas.core.arch import Architecture
from hwnas.core.option import parse_option
from hwnas.core.spaces import MACRO_SPACES, load_space
from hwnas.export.convert import to_onnx
from hwnas.export.tflite_writer import write_tflite
from hwnas.nn.classifier import ClassificationNetwork

torch.set_num_threads(1)

RESOLUTION = 64
NEW_SHAPES = ("mobilenet_v3_like", "fbnet", "ofa_mobilenet_v3")
"""Spaces with shuffles, gates or pooled heads. The others consist of layers that
test_onnx.py covers, and an export takes seconds.
"""


def arch_of(name: str, which: str) -> Architecture:
    """At half the width, as the widest networks have 40 million weights."""
    space = load_space(name, resolution=RESOLUTION, width=0.5, classes=10)
    if which == "random":
        return space.decode(space.sample(np.random.default_rng(3)))
    chosen = min if which == "smallest" else max
    return space.decode({choice.key: chosen(choice.options, key=macs) for choice in space.choices})


def macs(option: str | int) -> float:
    """The MACs of an option at a fixed shape; widths, depths and resolutions are their
    own measure.
    """
    if isinstance(option, int):
        return option
    block = parse_option(option)
    return 0 if block is None else block.op(16, 16, 8, 1, "relu", False).macs


def network_of(name: str, which: str) -> ClassificationNetwork:
    return trained(
        ClassificationNetwork(arch_of(name, which), generator=torch.Generator().manual_seed(0))
    )


@torch.no_grad()
def trained(network: ClassificationNetwork) -> ClassificationNetwork:
    """The network with random BN weights and BN statistics of a batch of noise, so that
    activations neither vanish nor explode, as after training.
    """
    generator = torch.Generator().manual_seed(1)
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    for part in norms:
        part.momentum = 1.0
        part.weight.uniform_(0.5, 1.5, generator=generator)
        part.bias.normal_(0, 0.3, generator=generator)
    arch = network.arch
    network.train()(
        torch.randn(8, arch.in_channels, arch.resolution, arch.resolution, generator=generator)
    )
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0, 0.3, generator=generator)
            module.bias.normal_(0, 0.3, generator=generator)
    return network.eval()


def images(network: ClassificationNetwork) -> torch.Tensor:
    size = network.arch.resolution
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def assert_same(outputs_NC: np.ndarray, network: ClassificationNetwork) -> None:
    with torch.inference_mode():
        expected_NC = network(images(network)).numpy()
    assert np.abs(expected_NC[0] - expected_NC[1]).max() > 0.1, (
        "if outputs do not depend on the image, there is nothing to compare"
    )
    assert np.abs(outputs_NC - expected_NC).max() < 1e-4 * np.abs(expected_NC).max()


@pytest.mark.parametrize("which", ["smallest", "largest", "random"])
@pytest.mark.parametrize("name", MACRO_SPACES)
def test_litert_computes_what_pytorch_does(name: str, which: str) -> None:
    network = network_of(name, which)
    interpreter = Interpreter(model_content=write_tflite(network), num_threads=1)
    interpreter.allocate_tensors()
    outputs = []
    for image_CHW in images(network):
        interpreter.set_tensor(
            interpreter.get_input_details()[0]["index"], image_CHW.permute(1, 2, 0)[None].numpy()
        )
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
    assert_same(np.concatenate(outputs), network)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW_SHAPES)
def test_onnxruntime_computes_what_pytorch_does(name: str, tmp_path: Path) -> None:
    network = network_of(name, "random")
    size = network.arch.resolution
    to_onnx(network, (1, 3, size, size), metadata={}, path=tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "net.onnx", providers=["CPUExecutionProvider"]
    )
    assert_same(
        np.concatenate(
            [session.run(None, {"image": image[None].numpy()})[0] for image in images(network)]
        ),
        network,
    )


def test_the_smallest_and_largest_networks_are_the_extremes() -> None:
    for name in MACRO_SPACES:
        small, middle, large = (
            arch_of(name, which).macs for which in ("smallest", "random", "largest")
        )
        assert small < middle < large
