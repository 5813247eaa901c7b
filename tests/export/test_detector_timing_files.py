"""Timing files of detectors: the writers' outputs are PyTorch's, and every runtime gets
a file of every kind of op.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from torch import Tensor, nn

from hwnas.core.detection import with_detector
from hwnas.core.ops import Op
from hwnas.core.ssdlite import SSDLiteSpec
from hwnas.export import onnx_writer, tflite_writer
from hwnas.export.timing import timing_file
from hwnas.nn.blocks import build
from hwnas.nn.detector import DetectionNetwork
from tests.nn.detectors import BLOCKS, small_arch

torch.set_num_threads(1)
SSDPredictor, EXTRA = (
    Op.parse("ssd-h9-i16-o24-k3-a6-relu6"),
    Op.parse("extra-h8-i16-o32-m16-k3-s2-relu6"),
)


def loud(module: nn.Module) -> Any:
    """The module in eval mode, with statistics unlike those of a fresh network."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.normal_(0, 0.3, generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
    return module.eval()


def six_maps() -> DetectionNetwork:
    """A detector with more maps than XNNPACK concatenates at once."""
    arch = with_detector(
        small_arch().model_copy(update={"detector": None}),
        3,
        SSDLiteSpec(extras=(32, 16, 16, 16)),
        resolution=64,
    )
    return loud(DetectionNetwork(arch, generator=torch.Generator().manual_seed(0)))  # type: ignore[no-any-return]


def image(op: Op) -> Tensor:
    return torch.randn(1, op.in_ch, op.size, op.size, generator=torch.Generator().manual_seed(2))


def by_onnx(model: bytes, x_NCHW: Tensor) -> dict[str, np.ndarray]:
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    session = ort.InferenceSession(model)
    names = [output.name for output in session.get_outputs()]
    return dict(
        zip(names, session.run(None, {session.get_inputs()[0].name: x_NCHW.numpy()}), strict=True)
    )


def by_litert(model: bytes, x_NCHW: Tensor) -> tuple[dict[str, np.ndarray], list[str]]:
    """The outputs, and the names of those that are computed outside the delegate."""
    interpreter = Interpreter(model_content=model, num_threads=1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(
        interpreter.get_input_details()[0]["index"], x_NCHW.permute(0, 2, 3, 1).contiguous().numpy()
    )
    interpreter.invoke()
    outputs = {
        output["name"]: interpreter.get_tensor(output["index"])
        for output in interpreter.get_output_details()
    }
    delegate = [node for node in interpreter._get_ops_details() if node["op_name"] == "DELEGATE"]
    assert len(delegate) == 1
    return outputs, [
        output["name"]
        for output in interpreter.get_output_details()
        if output["index"] not in delegate[0]["outputs"]
    ]


@torch.no_grad()
def test_a_whole_detector_computes_what_pytorch_does() -> None:
    network = six_maps()
    x_NCHW = image(BLOCKS[0])
    logits, codes = network(x_NCHW)
    assert logits.std() > 0.01 and codes.std() > 0.01
    by_name, outside = by_litert(tflite_writer.write_tflite(network), x_NCHW)
    assert not outside, f"XNNPACK leaves {outside} to slower kernels"
    for outputs in (by_name, by_onnx(onnx_writer.write_onnx(network), x_NCHW)):
        assert list(outputs) == ["logits", "codes"]
        np.testing.assert_allclose(outputs["logits"], logits.numpy(), atol=1e-5)
        np.testing.assert_allclose(outputs["codes"], codes.numpy(), atol=1e-5)


@torch.no_grad()
def test_predictors_have_two_outputs() -> None:
    module, x_NCHW = loud(build(SSDPredictor)), image(SSDPredictor)
    classes, boxes = module(x_NCHW)
    outputs, _ = by_litert(tflite_writer.write_op(SSDPredictor, module), x_NCHW)
    np.testing.assert_allclose(outputs["classes"], classes.permute(0, 2, 3, 1).numpy(), atol=1e-5)
    np.testing.assert_allclose(outputs["boxes"], boxes.permute(0, 2, 3, 1).numpy(), atol=1e-5)
    outputs = by_onnx(onnx_writer.write_op(SSDPredictor, module), x_NCHW)
    np.testing.assert_allclose(outputs["classes"], classes.numpy(), atol=1e-5)
    np.testing.assert_allclose(outputs["boxes"], boxes.numpy(), atol=1e-5)


@torch.no_grad()
def test_an_extra_layer_computes_what_pytorch_does() -> None:
    module, x_NCHW = loud(build(EXTRA)), image(EXTRA)
    y_NCHW = module(x_NCHW)
    outputs, _ = by_litert(tflite_writer.write_op(EXTRA, module), x_NCHW)
    np.testing.assert_allclose(outputs["output"], y_NCHW.permute(0, 2, 3, 1).numpy(), atol=1e-5)
    np.testing.assert_allclose(
        by_onnx(onnx_writer.write_op(EXTRA, module), x_NCHW)["logits"], y_NCHW.numpy(), atol=1e-5
    )


@pytest.mark.parametrize(
    ("runtime", "dtype"), [("litert", "fp32"), ("litert", "int8"), ("onnxruntime", "fp32")]
)
def test_every_runtime_gets_its_files(runtime: str, dtype: str) -> None:
    arch = small_arch()
    names = {timing_file(timed, runtime, dtype).name for timed in ((SSDPredictor,), (EXTRA,), arch)}
    assert len(names) == 3 and all(
        timing_file(timed, runtime, dtype).stat().st_size > 1000
        for timed in ((SSDPredictor,), (EXTRA,), arch)
    )
    if dtype == "int8":
        interpreter = Interpreter(model_path=str(timing_file(arch, runtime, dtype)))
        assert [output["dtype"] for output in interpreter.get_output_details()] == [
            np.int8,
            np.int8,
        ]


def test_other_taps_give_another_file() -> None:
    """The ops and their order are the same, but the detector reads other blocks."""
    arch = small_arch()
    assert arch.detector is not None and arch.detector.taps == (2, 3)
    other = arch.model_copy(update={"detector": arch.detector.model_copy(update={"taps": (1, 3)})})
    assert other.ops() == arch.ops()
    assert timing_file(other, "litert", "fp32") != timing_file(arch, "litert", "fp32")
