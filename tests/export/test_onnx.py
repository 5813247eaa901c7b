"""ONNX files against PyTorch, run by onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torchvision
from torch import nn

from hwnas.errors import ExportError
from hwnas.export.convert import to_onnx
from hwnas.export.onnx_writer import OPSET

pytestmark = pytest.mark.slow

SHAPE = (1, 3, 64, 64)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    generator = torch.Generator().manual_seed(0)
    module = torchvision.models.mobilenet_v2(num_classes=10).eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.2, generator=generator)
            layer.running_var.uniform_(0.05, 0.3, generator=generator)
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    to_onnx(
        module, SHAPE, metadata={"architecture": '{"blocks": []}', "dtype": "float32"}, path=path
    )
    return module, path


def test_onnxruntime_agrees_with_pytorch(exported: tuple[nn.Module, Path]) -> None:
    module, path = exported
    x_NCHW = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = module(x_NCHW).numpy()
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    got = session.run(["logits"], {"image": x_NCHW.numpy()})[0]
    assert wanted.std() > 0.1, "with smaller logits there is nothing to compare"
    assert np.abs(got - wanted).max() / np.abs(wanted).max() < 1e-4


def test_the_file_describes_itself(exported: tuple[nn.Module, Path]) -> None:
    _, path = exported
    model = onnx.load(path, load_external_data=False)
    assert [entry.name for entry in path.parent.iterdir()] == ["net.onnx"], (
        "the weights are inside, and there is no other file"
    )
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "architecture": '{"blocks": []}',
        "dtype": "float32",
    }
    assert [tensor.name for tensor in model.graph.input] == ["image"]
    assert [tensor.name for tensor in model.graph.output] == ["logits"]
    shape = model.graph.input[0].type.tensor_type.shape
    assert tuple(axis.dim_value for axis in shape.dim) == SHAPE


def test_batch_norms_are_folded_and_the_tracer_leaves_no_notes(
    exported: tuple[nn.Module, Path],
) -> None:
    _, path = exported
    model = onnx.load(path)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert b"site-packages" not in path.read_bytes()
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_exporting_is_quiet_repeatable_and_leaves_the_module_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).train()
    for name in ("a.onnx", "b.onnx"):
        to_onnx(module, (1, 3, 8, 8), metadata={}, path=str(tmp_path / name))
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert all(layer.training for layer in module.modules())


class TwoOutputs(nn.Module):
    def forward(self, x_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x_NCHW + 1, x_NCHW + 2


def test_refusals_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="batch size 1"):
        to_onnx(nn.Identity(), (4, 3, 8, 8), metadata={}, path=tmp_path / "x.onnx")
    with pytest.raises(ExportError, match="cannot export Conv2d"):
        to_onnx(nn.Conv2d(3, 4, 1), (1, 4, 8, 8), metadata={}, path=tmp_path / "x.onnx")
    with pytest.raises(ExportError, match="has 2 outputs, but output_names has 1"):
        to_onnx(TwoOutputs(), (1, 3, 8, 8), metadata={}, path=tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
