"""Every built-in target, and a third party's that is found by its entry point:
exported, profiled, timed and validated.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hwnas.config import TARGETS, load_experiment
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.export.target import Target, target
from hwnas.export.targets import Onnx, TFLiteFloat, TFLiteInt8
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.testing import TargetConformance
from tests.conformance.plugins import install
from tests.conformance.torch_target import TorchProgram
from tests.conftest import write_tiny


class TestTFLiteFloat(TargetConformance):
    """Float32."""

    target = TFLiteFloat


class TestTFLiteInt8(TargetConformance):
    """Static int8."""

    target = TFLiteInt8


class TestOnnx(TargetConformance):
    """Float32."""

    target = Onnx


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the third party's target, installed as pip would leave it."""
    install(
        TARGETS,
        "torch-program",
        "tests.conformance.torch_target:TorchProgram",
        tmp_path,
        monkeypatch,
    )
    return "torch-program"


class TestTorchProgram(TargetConformance):
    """The third party's target."""

    target = TorchProgram

    @pytest.fixture(autouse=True)
    def is_found(self, installed: str) -> None:
        """It is found by its entry point."""
        assert isinstance(target(installed), TorchProgram)


@pytest.mark.slow
def test_a_third_partys_target_goes_through_all_stages(installed: str, tmp_path: Path) -> None:
    """Profiled, exported, timed and validated, given only by its names."""
    overrides = [
        "device.name=host",
        "device.runtime=torch",
        f"export.formats=['tflite-fp32', '{installed}']",
        "profile.rounds=1",
        "profile.max_rounds=1",
        "profile.min_ms=1",
        "profile.fit_networks=2",
        "profile.test_networks=1",
        "search.epochs=1",
        "search.target_range=0.5",
        "search.tolerance=0.5",
        "search.candidates=2",
        "search.random_samples=1",
        "train.epochs=1",
        "validate.rounds=1",
        "validate.latency_tolerance=100",
        "validate.max_drift=100",
    ]
    experiment = load_experiment(write_tiny(tmp_path), overrides)
    # exporting a program takes a second, so few ops are to be measured
    stages = (
        SpaceStage(widths=(8,), slots=(("cn_k3",),)),
        SpaceStage(
            widths=(16,), stride=2, slots=(("ir_k3_e3", "ir_k5_e3", "ir_k3_e6", "ir_k5_e6"),)
        ),
        SpaceStage(widths=(32,), slots=(("cn_k1",),)),
    )
    MacroSpace(name="tiny", resolution=8, in_channels=1, classes=10, stages=stages).save(
        tmp_path / "space.json"
    )
    Pipeline(experiment, tmp_path / "run", Progress()).run()
    header = json.loads((tmp_path / "run/profile/table.json").read_text())["header"]
    assert (header["runtime"], header["layout"]) == ("torch", "NCHW")
    files = {
        file["name"]: file
        for file in json.loads((tmp_path / "run/export/bundle.json").read_text())["files"]
    }
    assert (
        files["model.pt2"]["runtime"] == "torch"
        and files["model.pt2"]["parity"]["relative_error"] < 1e-5
    )
    verdict = {
        file["name"]: file
        for file in json.loads((tmp_path / "run/validate/verdict.json").read_text())["files"]
    }
    assert (
        verdict["model.pt2"]["predicted_ms"] > 0
        and verdict["model-fp32.tflite"]["predicted_ms"] is None
    )


def test_targets_differ(installed: str) -> None:
    """In file names and, if they are timed, in runtime and number format."""
    targets: list[Target] = [target(name) for name in TARGETS]
    assert len({kind.file for kind in targets}) == len(targets) == 7
    timed = [(kind.runtime, kind.dtype) for kind in targets if kind.graph == "decoded"]
    assert len(set(timed)) == len(timed) == 4
