"""A detector whose outputs vary like a trained one's, and ways to run its files."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import torch
from ai_edge_litert.interpreter import Interpreter
from torch import nn

from hwnas.nn.blocks import initialise
from hwnas.nn.detector import DetectionNetwork
from tests.nn.detectors import Kind, small_network

CLASSES = 3
"""With three, a map's logits and codes have the same shape, so that only their order
tells them apart.
"""


def lively_network(kind: Kind = "softmax", classes: int = CLASSES) -> DetectionNetwork:
    """In eval mode, with statistics and weights that make scores and boxes vary."""
    network = small_network(classes, kind)
    generator = torch.Generator().manual_seed(3)
    for part in network.modules():
        if (
            isinstance(part, nn.BatchNorm2d)
            and part.running_mean is not None
            and part.running_var is not None
        ):
            part.running_mean.normal_(0, 0.3, generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
    # the neck of an anchor-free detector would otherwise shrink everything
    if kind == "fcos":
        for part in (network.neck_layers, network.heads):
            initialise(part, generator)
        for head in network.heads:
            head.get_submodule("boxes.predict.conv").get_parameter("weight").data *= 0.2
    for name, weight in network.heads.named_parameters():
        if name.endswith("predict.conv.weight") and kind != "fcos":
            weight.data *= 20
    return network.eval()


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(4))


def run_tflite(model: bytes, x_NCHW: torch.Tensor) -> list[dict[str, np.ndarray]]:
    """The outputs for each image, by name."""
    interpreter = Interpreter(model_content=model, num_threads=1)
    interpreter.allocate_tensors()
    [entry] = interpreter.get_input_details()
    outputs = []
    for image in x_NCHW.permute(0, 2, 3, 1).numpy():
        interpreter.set_tensor(entry["index"], np.ascontiguousarray(image[None]))
        interpreter.invoke()
        outputs.append(
            {
                exit_["name"]: interpreter.get_tensor(exit_["index"])
                for exit_ in interpreter.get_output_details()
            }
        )
    return outputs


def run_onnx(model: bytes, x_NCHW: torch.Tensor) -> list[Any]:
    """The only output, for each image."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return [session.run(None, {"image": image[None].numpy()})[0] for image in x_NCHW]
