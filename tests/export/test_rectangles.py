"""Files for images that are not square compute what PyTorch computes."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from torch import nn

from hwnas.core.detection import with_detector
from hwnas.core.detector import DetectorSpec
from hwnas.core.fcos import FCOSSpec
from hwnas.core.ops import Op
from hwnas.core.published import published
from hwnas.core.size import Rectangle, sides
from hwnas.core.ssdlite import SSDLiteSpec
from hwnas.export import onnx_detector, onnx_writer, tflite_writer
from hwnas.export.detector import Decoded
from hwnas.export.tflite_detector import add_decoding
from hwnas.nn.blocks import build
from hwnas.nn.network import network_of

KEYS = (
    "conv-h9w14-i3-o8-k3-s2-relu6",
    "conv-h8w15-i3-o8-k5-s2-relu",
    "mbconv-h7w12-i8-o8-m24-k5-q6-hswish-id",
    "mbconv-h10w7-i8-o16-m24-k3-s2-relu6",
    "avgpool-h7w10-i8-o8-k3-s2",
    "maxpool-h7w10-i8-o8-k3-s2",
    "maxpool-h8w10-i8-o8-k3-s2",
    "upsample-h3w5-i8-o8",
    "classifier-h3w5-i8-o4",
)


def lively(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None:
            assert part.running_var is not None
            part.running_mean.normal_(0, 0.3, generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
    return module.eval()


def by_tflite(model: bytes, x_NCHW: torch.Tensor) -> np.ndarray:
    interpreter = Interpreter(model_content=model, num_threads=1)
    interpreter.allocate_tensors()
    images = np.ascontiguousarray(x_NCHW.permute(0, 2, 3, 1).numpy())
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], images)
    interpreter.invoke()
    output: np.ndarray = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    return output


def by_onnx(model: bytes, x_NCHW: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    output: np.ndarray = session.run(None, {"image": x_NCHW.numpy()})[0]
    return output


@pytest.mark.parametrize("key", KEYS)
@torch.no_grad()
def test_every_op(key: str) -> None:
    op = Op.parse(key)
    module = lively(build(op))
    x_NCHW = torch.randn(1, op.in_ch, *sides(op.size), generator=torch.Generator().manual_seed(1))
    expected = module(x_NCHW)
    if expected.dim() == 4:
        assert tuple(expected.shape[2:]) == sides(op.out_size)
        channels_last = expected.permute(0, 2, 3, 1)
    else:
        channels_last = expected
    written = by_tflite(tflite_writer.write_op(op, module), x_NCHW)
    np.testing.assert_allclose(written, channels_last.numpy(), atol=1e-5)
    written = by_onnx(onnx_writer.write_op(op, module), x_NCHW)
    np.testing.assert_allclose(written, expected.numpy(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [SSDLiteSpec(extras=(32, 16)), FCOSSpec(channels=16)])
@torch.no_grad()
def test_decoded_boxes_of_detectors(spec: DetectorSpec) -> None:
    size = Rectangle(64, 128)
    arch = with_detector(published("mobilenet_v2"), 3, spec, resolution=size)
    network = network_of(arch, generator=torch.Generator().manual_seed(0))
    lively(network)
    for head in network.heads:
        bias = head.get_submodule("boxes.predict.conv").get_parameter("bias")
        bias.normal_(0, 1.5, generator=torch.Generator().manual_seed(2))
    x_NCHW = torch.randn(1, 3, 64, 128, generator=torch.Generator().manual_seed(1))
    rows = Decoded(network)(x_NCHW).numpy()
    # clipped at both edges: 128 px wide, 64 px high
    assert rows[..., [0, 2]].max() == 128 and 40 < rows[..., [1, 3]].max() <= 64
    written = by_tflite(add_decoding(tflite_writer.write_heads(network), network), x_NCHW)
    np.testing.assert_allclose(written, rows, atol=2e-4)
    written = by_onnx(onnx_detector.add_decoding(network, {}), x_NCHW)
    np.testing.assert_allclose(written, rows, atol=2e-4)
