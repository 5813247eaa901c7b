"""Every built-in task, and a third party's that is found by its entry point: searched,
trained, exported, validated and reported.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hwnas.config import DataConfig, load_experiment
from hwnas.config.tasks import TASKS
from hwnas.core.arch import Architecture
from hwnas.core.detection import with_detector
from hwnas.core.detector import DetectorSpec
from hwnas.core.fcos import FCOSSpec
from hwnas.core.ops import Op
from hwnas.core.ssdlite import SSDLiteSpec
from hwnas.data.images import Images, evaluation_batches, load_images
from hwnas.nn.blocks import initialise
from hwnas.nn.detector import DetectionNetwork
from hwnas.nn.network import Network, network_of
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.task import EvaluationResult, EvaluationSettings, evaluate, task_named
from hwnas.tasks.classification import Classification
from hwnas.tasks.detection import Detection
from hwnas.testing import TaskConformance
from hwnas.train.result import TrainResult
from hwnas.verdict import Verdict
from tests.conformance.plugins import install
from tests.conformance.top_two_task import TopTwo
from tests.train.rectangles import write_rectangles


class TestClassification(TaskConformance):
    """On digits."""

    task = Classification

    def network(self) -> Network:
        """An untrained classifier."""
        keys = ("conv-h8-i1-o8-k3-relu", "classifier-h8-i8-o10")
        arch = Architecture(name="small", in_channels=1, blocks=tuple(map(Op.parse, keys)))
        return network_of(arch, generator=torch.Generator().manual_seed(0)).eval()

    def images(self) -> Images:
        """The test images."""
        plain = {"name": "digits", "resolution": 8, "channels": 1, "mean": [0.5], "std": [0.5]}
        return load_images(DataConfig.model_validate(plain), "test")


class TestDetection(TaskConformance):
    """On rectangles."""

    task = Detection
    spec: DetectorSpec = SSDLiteSpec(extras=(16,))

    @pytest.fixture(autouse=True)
    def written(self, tmp_path: Path) -> None:
        """Write the images."""
        write_rectangles(tmp_path)
        self.folder = tmp_path

    def network(self) -> Network:
        """An untrained detector."""
        keys = (
            "conv-h48-i3-o8-k3-s2-relu",
            "conv-h24-i8-o16-k3-s2-relu",
            "conv-h12-i16-o24-k3-s2-relu",
            "classifier-h6-i24-o10",
        )
        arch = Architecture(name="small", blocks=tuple(map(Op.parse, keys)))
        detector = with_detector(arch, 2, self.spec, resolution=48)
        return network_of(detector, generator=torch.Generator().manual_seed(0)).eval()

    def images(self) -> Images:
        """The test images."""
        config = {
            "name": "coco",
            "path": str(self.folder),
            "resolution": 48,
            "classes": 2,
            "augment": "none",
        }
        return load_images(DataConfig.model_validate(config), "test")


class TestAnchorFreeDetection(TestDetection):
    """The same with the other kind of detector."""

    spec = FCOSSpec(channels=16)

    def network(self) -> Network:
        """With scores that differ: the order of equal ones would depend on rounding."""
        network = super().network()
        assert isinstance(network, DetectionNetwork)
        for part in (network.neck_layers, network.heads):
            initialise(part, torch.Generator().manual_seed(1))
        return network


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the third party's task, installed as pip would leave it."""
    install(TASKS, TopTwo.name, "tests.conformance.top_two_task:TopTwo", tmp_path, monkeypatch)
    return TopTwo.name


class TestTopTwo(TestClassification):
    """The third party's task."""

    task = TopTwo

    @pytest.fixture(autouse=True)
    def is_found(self, installed: str) -> None:
        """It is found by its entry point."""
        assert isinstance(task_named(installed), TopTwo)


@pytest.mark.slow
def test_a_third_partys_task_goes_through_all_stages(installed: str, tmp_path: Path) -> None:
    """Trained, exported, validated and reported, given only by its name; every document
    has its metric.
    """
    overrides = [
        f"task={installed}",
        "data.resolution=16",
        "train.arch=mobilenet_v2-w0.25",
        "train.epochs=4",
        "train.validate_every=1",
        "validate.rounds=1",
        "validate.tolerances={top2 = 0.004}",
    ]
    run = tmp_path / "run"
    Pipeline(load_experiment("configs/quickstart.toml", overrides), run, Progress()).run()
    trained, verdict = (
        TrainResult.load(run / "train" / "train.json"),
        Verdict.load(run / "validate" / "verdict.json"),
    )
    bundle = json.loads((run / "export" / "bundle.json").read_text())
    assert (trained.task, trained.metric, trained.metrics.keys()) == (
        installed,
        "top2",
        {"top2", "accuracy"},
    )
    assert (trained.metrics["top2"] or 0) > (trained.metrics["accuracy"] or 0) > 0
    assert (bundle["task"], bundle["metric"], bundle["metrics"]) == (
        installed,
        "top2",
        trained.metrics,
    )
    assert (verdict.task, verdict.metric, verdict.metrics) == (installed, "top2", trained.metrics)
    assert (
        verdict.tolerances.tolerance("top2", "fp32") == 0.004
        and verdict.tolerances.tolerance("top2", "int8") == 0.02
    )
    assert [file.name for file in verdict.files] == [
        "model-fp32.tflite",
        "model-int8.tflite",
        "model.onnx",
    ]
    assert all(
        file.quality_passed == (file.loss <= (0.02 if file.dtype == "int8" else 0.004))
        for file in verdict.files
    )
    assert all(abs(file.loss) <= 0.004 for file in verdict.files if file.dtype == "fp32")
    rows = (run / "train" / "validation.jsonl").read_text().splitlines()
    assert [json.loads(row)["test_top2"] for row in rows][-1] == trained.metrics["top2"]
    report = (run / "report" / "report.html").read_text()
    assert "Top-2, PyTorch" in report and "Top2 on test images during training" in report


class Forgetful(Classification):
    """It has its own evaluation, which does not set the network's mode."""

    def evaluate(
        self, network: Network, images: Images, settings: EvaluationSettings
    ) -> EvaluationResult:
        """Run the network in the mode that it is in."""
        x_NCHW, y = next(evaluation_batches(images, 64))
        with torch.no_grad():
            right = network(x_NCHW).argmax(1) == y
        return EvaluationResult({"accuracy": float(right.float().mean())})


def test_evaluation_changes_no_statistics_even_if_a_task_forgets_the_mode() -> None:
    cases = TestClassification()
    network = cases.network()
    untouched_network = cases.network()
    network.train()
    evaluate(Forgetful(), network, cases.images(), EvaluationSettings(64))
    state, untouched = network.state_dict(), untouched_network.state_dict()
    assert any("running_mean" in name for name in state)
    assert all(torch.equal(state[name], untouched[name]) for name in state)
