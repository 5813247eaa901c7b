"""TFLite files against PyTorch: the same numbers, and a graph that suits phones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import calibrator, recipe, recipe_manager
from ai_edge_quantizer.utils import qsv_utils
from torch import nn

from hwnas.errors import ExportError
from hwnas.export import convert, quantization
from hwnas.export.convert import to_tflite
from hwnas.export.quantization import quantize_int8
from hwnas.export.tflite_file import graph_ops

pytestmark = pytest.mark.slow

SHAPE = (1, 16, 14, 14)


class Block(nn.Module):
    """MBConv: expand, depthwise, project; with a residual if the shape allows one."""

    def __init__(self, c_in: int, c_out: int, stride: int, kernel: int = 3) -> None:
        super().__init__()
        mid = 6 * c_in
        self.layers = nn.Sequential(
            *(nn.Conv2d(c_in, mid, 1, bias=False), nn.BatchNorm2d(mid), nn.ReLU6()),
            *(
                nn.Conv2d(mid, mid, kernel, stride, kernel // 2, groups=mid, bias=False),
                nn.BatchNorm2d(mid),
            ),
            *(nn.ReLU6(), nn.Conv2d(mid, c_out, 1, bias=False), nn.BatchNorm2d(c_out)),
        )
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        y_NCHW = self.layers(x_NCHW)
        return x_NCHW + y_NCHW if self.residual else y_NCHW


class Net(nn.Module):
    """A stem, one block of each kind and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 24, 2))
        self.classifier = nn.Linear(24, 10)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(self.blocks(self.stem(x_NCHW)), 1)
        logits: torch.Tensor = self.classifier(pooled.flatten(1))
        return logits


def randomised(module: nn.Module) -> nn.Module:
    """Batch norms as after training: otherwise outputs are too small to compare."""
    generator = torch.Generator().manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.2, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    return module.eval()


def images(
    shape_NCHW: tuple[int, int, int, int], count: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    n, c, h, w = shape_NCHW
    return np.random.default_rng(0).standard_normal((count * n, h, w, c)).astype(np.float32)


def run_torch(module: nn.Module, images_NHWC: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        output = module(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2))
    return (output.permute(0, 2, 3, 1) if output.ndim == 4 else output).numpy()


def run_litert(model: bytes, images_NHWC: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    interpreter = Interpreter(model_content=model, num_threads=1)
    interpreter.allocate_tensors()
    entry, exit_ = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    outputs = []
    for image in images_NHWC:
        if entry["dtype"] == np.int8:
            scale, zero_point = entry["quantization"]
            image = np.clip(np.round(image / scale) + zero_point, -128, 127).astype(np.int8)
        interpreter.set_tensor(entry["index"], image[None])
        interpreter.invoke()
        output = interpreter.get_tensor(exit_["index"])[0].astype(np.float32)
        if exit_["dtype"] == np.int8:
            scale, zero_point = exit_["quantization"]
            output = (output - zero_point) * scale
        outputs.append(output)
    return np.stack(outputs)


def relative_error(got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    assert got.shape == wanted.shape
    assert wanted.std() > 0.1, "with smaller outputs there is nothing to compare"
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.fixture(scope="module")
def block() -> tuple[nn.Module, bytes]:
    module = randomised(Block(16, 16, 1))
    return module, to_tflite(module, SHAPE)


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, bytes]:
    module = randomised(Net())
    return module, to_tflite(module, (1, 3, 32, 32))


def test_a_residual_block_is_four_fused_operators(block: tuple[nn.Module, bytes]) -> None:
    module, model = block
    assert [op.name for op in graph_ops(model)] == [
        "CONV_2D",
        "DEPTHWISE_CONV_2D",
        "CONV_2D",
        "ADD",
    ]
    x_NHWC = images(SHAPE, 2)
    assert relative_error(run_litert(model, x_NHWC), run_torch(module, x_NHWC)) < 1e-5


@pytest.mark.parametrize(("size", "kernel"), [(14, 3), (14, 5), (15, 3)])
def test_stride_two_pads_as_pytorch_does(size: int, kernel: int) -> None:
    module = randomised(Block(16, 24, 2, kernel))
    model = to_tflite(module, (1, 16, size, size))
    names = [op.name for op in graph_ops(model)]
    assert [name for name in names if name != "PAD"] == ["CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D"]
    x_NHWC = images((1, 16, size, size), 2)
    assert relative_error(run_litert(model, x_NHWC), run_torch(module, x_NHWC)) < 1e-5


def test_a_net_has_no_transpose_and_one_mean(net: tuple[nn.Module, bytes]) -> None:
    module, model = net
    names = [op.name for op in graph_ops(model)]
    assert names[:2] == ["PAD", "CONV_2D"]
    assert names[-2:] == ["MEAN", "FULLY_CONNECTED"]
    assert set(names) == {"PAD", "CONV_2D", "DEPTHWISE_CONV_2D", "ADD", "MEAN", "FULLY_CONNECTED"}
    x_NHWC = images((1, 3, 32, 32), 4)
    assert relative_error(run_litert(model, x_NHWC), run_torch(module, x_NHWC)) < 1e-5


def test_the_same_module_gives_the_same_bytes(block: tuple[nn.Module, bytes]) -> None:
    module, model = block
    calibration = [images(SHAPE, 2)]
    assert to_tflite(module, SHAPE) == model
    assert quantize_int8(model, calibration) == quantize_int8(model, calibration)


@pytest.mark.filterwarnings("error")
def test_converting_is_quiet_and_leaves_the_module_alone(capfd: pytest.CaptureFixture[str]) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    module[0].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    quantize_int8(to_tflite(module, (1, 3, 8, 8)), [images((1, 3, 8, 8), 2)])
    assert capfd.readouterr() == ("", "")
    assert [layer.training for layer in module.modules()] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("float_io", [False, True])
def test_int8_is_int8_throughout_and_close(net: tuple[nn.Module, bytes], float_io: bool) -> None:
    module, model = net
    x_NHWC = images((1, 3, 32, 32), 16)
    quantized = quantize_int8(model, [x_NHWC[:8], x_NHWC[8:]], float_io=float_io)
    ops = graph_ops(quantized)
    assert [op.name for op in ops if op.dtype != "INT8"] == (["DEQUANTIZE"] if float_io else [])
    assert ("QUANTIZE" in {op.name for op in ops}) == float_io
    assert len(quantized) < len(model)
    got, wanted = run_litert(quantized, x_NHWC), run_torch(module, x_NHWC)
    assert relative_error(got, wanted) < 0.1
    assert np.corrcoef(got.ravel(), wanted.ravel())[0, 1] > 0.99


def test_activation_ranges_are_those_that_the_quantizer_finds(
    net: tuple[nn.Module, bytes],
) -> None:
    """The quantizer's calibrator copies all tensors to Python: exact, but slow."""
    _, model = net
    key, name, _, _ = quantization._signature(model)
    samples = {key: [{name: image[None]} for image in images((1, 3, 32, 32), 5)]}
    manager = recipe_manager.RecipeManager()
    manager.load_quantization_recipe(recipe.static_wi8_ai8())
    mode = calibrator.CalibrationMode.CALIBRATION_PRESERVE_ALL_TENSORS
    reference = calibrator.Calibrator(
        model, num_threads=1, mode=mode, qsv_update_func=qsv_utils.min_max_update
    )
    reference.calibrate(samples, manager)
    wanted = reference.get_model_qsvs()
    by_tensor = quantization._activation_ranges(model, samples, recipe.static_wi8_ai8())
    assert by_tensor.keys() == wanted.keys()
    assert len(by_tensor) > 10
    for tensor, ranges in by_tensor.items():
        for end in ("min", "max"):
            np.testing.assert_array_equal(ranges[end], wanted[tensor][end], tensor, strict=True)


def test_an_operator_without_an_int8_form_is_named() -> None:
    model = to_tflite(nn.Sequential(nn.ReLU6(), nn.Conv2d(3, 4, 1)), (1, 3, 8, 8))
    with pytest.raises(ExportError, match="RELU6"):
        quantize_int8(model, [images((1, 3, 8, 8), 1)])


def test_refusals_say_what_is_wrong(block: tuple[nn.Module, bytes]) -> None:
    _, model = block
    with pytest.raises(ExportError, match="batch size 1"):
        to_tflite(nn.Identity(), (2, 3, 8, 8))
    with pytest.raises(ExportError, match=r"cannot convert Conv2d at \(1, 4, 8, 8\)"):
        to_tflite(nn.Conv2d(3, 4, 1), (1, 4, 8, 8))
    with pytest.raises(ExportError, match="at least one"):
        quantize_int8(model, [])
    with pytest.raises(ExportError, match=r"float32 \[1, 8, 8, 16\]"):
        quantize_int8(model, [images((1, 16, 8, 8), 1)])
    with pytest.raises(ExportError, match="cannot load this TFLite file"):
        quantize_int8(b"not a flatbuffer, though long enough", [images(SHAPE, 1)])
    with pytest.raises(ExportError, match="nothing to quantise"):
        quantize_int8(to_tflite(nn.Identity(), SHAPE), [images(SHAPE, 1)])


def test_a_converter_that_does_not_work_with_this_torch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "litert_torch.py").write_text("raise AttributeError('no register_constant')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "litert_torch", raising=False)
    with pytest.raises(ExportError, match=r"AttributeError: no register_constant\): upgrade it"):
        convert._litert_torch.__wrapped__()  # past the cache, which other tests fill
