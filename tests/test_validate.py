"""Verdicts on devices that are slower than profiled, with tables that do not apply, and
on faulty files.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwnas.config import Experiment, load_experiment
from hwnas.core.caution import Caution
from hwnas.core.table import LatencyTable
from hwnas.devices.device import Device
from hwnas.devices.session import Bench
from hwnas.devices.simulated import Simulated
from hwnas.errors import DeviceError, DocumentError
from hwnas.export.bundle import Bundle
from hwnas.export.timing import timing_file
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.validate.validating import validate
from hwnas.verdict import Verdict, drift_note, lines

pytestmark = pytest.mark.slow


class Throttled(Simulated):
    """The simulated device, ``factor`` times as slow, and ``network_factor`` times
    slower still on whole networks.
    """

    factor = network_factor = 1.0

    def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
        whole = {item["id"] for item in plan["items"] if len(item["ops"]) > 1}
        for row in super().measure(plan, folder):
            factor = self.factor * (self.network_factor if row.get("id") in whole else 1.0)
            yield {**row, "ms": [factor * ms for ms in row["ms"]]} if "ms" in row else row


@pytest.fixture
def device(finished_run: Path) -> Device:
    return Device.load(finished_run.parent / "device.json")


@pytest.fixture
def experiment(finished_run: Path) -> Experiment:
    return load_experiment(
        finished_run.parent / "tiny.toml", ["validate.latency_tolerance=0.05", "validate.images=40"]
    )


def verdict(
    run: Path,
    device: Device,
    experiment: Experiment,
    work: Path,
    *,
    factor: float = 1.0,
    network_factor: float = 1.0,
    header: Any = None,
    connect: type[Throttled] = Throttled,
) -> Verdict:
    connection = connect(device)
    connection.factor, connection.network_factor = factor, network_factor
    table = LatencyTable.load(run / "profile" / "table.json")
    table = table.model_copy(update={"header": table.header.model_copy(update=header or {})})
    bench = Bench(device, connection, experiment.device, timing_file, work)
    return validate(bench, run / "export", experiment.data, experiment.validation, table)


def float_file(outcome: Verdict) -> Any:
    return next(file for file in outcome.files if file.name == "model-fp32.tflite")


def test_a_device_as_profiled_passes(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    outcome = verdict(finished_run, device, experiment, tmp_path)
    assert outcome.passed and outcome.images == 40
    assert outcome.drift == pytest.approx(1, abs=0.02) and drift_note(outcome) is None
    assert float_file(outcome).latency_passed is True and float_file(outcome).parity_passed is True
    assert [
        file.latency_passed
        for file in outcome.files
        if file.dtype == "int8" or file.runtime == "onnxruntime"
    ] == [None, None]


def test_a_slow_device_is_told_from_a_slow_network(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    slow = verdict(finished_run, device, experiment, tmp_path, factor=1.15)
    assert slow.passed and slow.drift == pytest.approx(1.15, rel=0.02)
    assert float_file(slow).measured_ms / (float_file(slow).predicted_ms or 1) == pytest.approx(
        1.15, rel=0.04
    )
    assert "15% slower now than when it was profiled" in (drift_note(slow) or "")
    wrong = verdict(finished_run, device, experiment, tmp_path, network_factor=1.15)
    assert not wrong.passed and wrong.drift == pytest.approx(1, abs=0.02)
    assert (
        float_file(wrong).latency_error == pytest.approx(0.15, abs=0.04)
        and "OUT OF TOLERANCE" in lines(wrong)[0]
    )


def test_a_device_twice_as_slow_as_profiled_fails(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    outcome = verdict(finished_run, device, experiment, tmp_path, factor=2.0)
    assert not outcome.passed and float_file(outcome).latency_passed is False
    assert "profile it again" in (drift_note(outcome) or "")


@pytest.mark.parametrize(
    ("header", "why"),
    [({"device": "pixel-8"}, "the table is of pixel-8"), ({"threads": 4}, "for 4 threads, not 1")],
)
def test_a_table_of_another_device_predicts_nothing(
    finished_run: Path,
    device: Device,
    experiment: Experiment,
    tmp_path: Path,
    header: dict[str, Any],
    why: str,
) -> None:
    outcome = verdict(finished_run, device, experiment, tmp_path, header=header)
    assert outcome.passed and outcome.drift is None and why in (outcome.unpredicted or "")
    assert {file.predicted_ms for file in outcome.files} == {None}
    assert any("latency is not checked" in line for line in lines(outcome))


class Wrong(Throttled):
    """A device that lacks a runtime, and on which one file's outputs are 1% off."""

    def runtimes(self) -> dict[str, str]:
        return {"litert": super().runtimes()["litert"]}

    def predict(self, model: Path, images_NHWC: np.ndarray, folder: Path) -> np.ndarray:
        outputs = super().predict(model, images_NHWC, folder)
        return outputs * 1.01 if model.name == "model-fp32.tflite" else outputs


def test_outputs_that_are_wrong_only_on_the_device_fail(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    outcome = verdict(finished_run, device, experiment, tmp_path, connect=Wrong)
    parity = float_file(outcome).parity
    assert (
        parity is not None
        and parity.relative_error == pytest.approx(0.01, rel=0.01)
        and parity.agreement == 1
    )
    assert (
        not outcome.passed
        and float_file(outcome).parity_passed is False
        and float_file(outcome).quality_passed
    )
    assert (
        Bundle.load(finished_run / "export" / "bundle.json").files[0].parity.relative_error < 1e-4
    )


class Mistaken(Throttled):
    """A device on which the int8 file's outputs are shifted by one class."""

    def predict(self, model: Path, images_NHWC: np.ndarray, folder: Path) -> np.ndarray:
        outputs = super().predict(model, images_NHWC, folder)
        return np.roll(outputs, 1, axis=1) if model.name == "model-int8.tflite" else outputs


def test_a_classifier_that_loses_accuracy_fails(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    strict = experiment.validation.model_copy(update={"int8_accuracy_tolerance": 0.3})
    outcome = verdict(
        finished_run,
        device,
        experiment.model_copy(update={"validation": strict}),
        tmp_path,
        connect=Mistaken,
    )
    files = {file.name: file for file in outcome.files}
    wrong = files.pop("model-int8.tflite")
    assert wrong.loss == pytest.approx(outcome.metrics["accuracy"] - wrong.metrics["accuracy"])
    assert wrong.loss > 0.5
    assert (wrong.quality_passed, outcome.passed) == (False, False)
    assert all(file.quality_passed for file in files.values())


class NotANumber(Throttled):
    """A device on which one file's outputs are NaN."""

    def predict(self, model: Path, images_NHWC: np.ndarray, folder: Path) -> np.ndarray:
        outputs = super().predict(model, images_NHWC, folder)
        return outputs * np.nan if model.name == "model-fp32.tflite" else outputs


def test_outputs_that_are_not_finite_are_one_sentence(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    with pytest.raises(DeviceError, match=r"model-fp32\.tflite gave outputs that are not finite"):
        verdict(finished_run, device, experiment, tmp_path, connect=NotANumber)


def test_validation_depends_on_the_outputs_that_it_compares_with(
    finished_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    pipeline = Pipeline(load_experiment(finished_run.parent / "tiny.toml"), run, Progress())
    before = pipeline.stage("validate").inputs()
    parity = run / "export" / "parity.npz"
    damaged = bytearray(parity.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    parity.write_bytes(damaged)
    after = pipeline.stage("validate").inputs()
    assert {name for name in before if before[name] != after[name]} == {"parity.npz"}
    with pytest.raises(DocumentError, match=r"parity\.npz is missing or not the file"):
        pipeline.run_stage("validate")


def test_a_file_whose_runtime_the_device_lacks_is_named(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    outcome = verdict(finished_run, device, experiment, tmp_path, connect=Wrong)
    assert [file.name for file in outcome.files] == ["model-fp32.tflite", "model-int8.tflite"]
    assert outcome.not_run == {"model.onnx": f"{device.id} does not run onnxruntime"}
    assert f"model.onnx: not run, {device.id} does not run onnxruntime" in lines(outcome)


def test_a_runtime_that_is_missing_comes_with_the_reason(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    class Explained(Wrong):
        def missing(self) -> dict[str, str]:
            return {"onnxruntime": "onnxruntime 1.12.1 is too old"}

    found = verdict(finished_run, device, experiment, tmp_path, connect=Explained)
    assert found.not_run == {
        "model.onnx": f"{device.id} does not run onnxruntime (onnxruntime 1.12.1 is too old)"
    }


def test_a_board_out_of_reach_leaves_the_earlier_verdict_where_it_is(
    finished_run: Path, tmp_path: Path
) -> None:
    if shutil.which("ssh") is None:
        pytest.skip("there is no ssh client here")
    root = tmp_path / "run"
    shutil.copytree(finished_run, root)
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        options = {"host": "127.0.0.1", "port": str(taken.getsockname()[1])}
        document = tmp_path / "board.json"
        Device(id="board", soc="none", connection="ssh", options=options).save(document)
        config = finished_run.parent / "tiny.toml"
        experiment = load_experiment(config, [f"device.name={document}"])
        with pytest.raises(DeviceError, match="cannot reach board over ssh"):
            Pipeline(experiment, root, Progress()).run_stage("validate")
    assert (root / "validate/verdict.json").read_bytes() == (
        finished_run / "validate/verdict.json"
    ).read_bytes()


def test_prices_fitted_to_whole_networks_tell_no_drift(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    """They are not times of standalone blocks, which drift is measured with: a device
    1.15 times as slow looks like a network that is slower than predicted.
    """
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    table = LatencyTable.load(run / "profile" / "table.json")
    entries = {
        key: entry.model_copy(update={"runs": "unknown"}) for key, entry in table.entries.items()
    }
    table.model_copy(update={"entries": entries}).save(run / "profile" / "table.json")
    usual, slow = (
        verdict(run, device, experiment, tmp_path, factor=factor) for factor in (1.0, 1.15)
    )
    assert usual.passed and usual.drift is None and float_file(usual).predicted_ms is not None
    assert float_file(slow).latency_error == pytest.approx(0.15, abs=0.04) and not slow.passed


def test_a_file_that_was_replaced_is_refused(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "export" / "model.onnx").write_bytes(b"something else")
    with pytest.raises(DocumentError, match=r"model\.onnx is missing or not the file"):
        verdict(run, device, experiment, tmp_path)


def test_float_files_agree_with_pytorch_on_real_images(finished_run: Path) -> None:
    bundle = Bundle.load(finished_run / "export" / "bundle.json")
    with np.load(finished_run / "export" / "parity.npz") as arrays:
        assert arrays["logits"].std() > 0.1  # otherwise there is nothing to compare
    for file in bundle.files:
        assert file.dtype == "int8" or file.parity.relative_error <= 1e-4


def test_documents_of_classifiers_have_nothing_of_detectors(finished_run: Path) -> None:
    """Not even empty keys."""
    for path in (
        finished_run / "export" / "bundle.json",
        finished_run / "validate" / "verdict.json",
    ):
        content = path.read_text()
        document = (Bundle if path.stem == "bundle" else Verdict).parse(content)
        assert document.to_json() == content
        words = (
            '"AP"',
            '"detector": {"',
            '"post_processing_ms"',
            '"detector": null,\n "files"',
            '"min_score"',
        )
        assert not [word for word in words if word in content] and (
            document.task,
            document.metric,
        ) == ("classify", "accuracy")


@pytest.fixture(scope="module")
def app_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run with files of the same network that take pixels and return
    probabilities. Do not write into it.
    """
    run = tmp_path_factory.mktemp("app") / "run"
    shutil.copytree(finished_run, run)
    overrides = ["export.input=uint8", "export.softmax=true", "export.score_calibration=true"]
    Pipeline(
        load_experiment(finished_run.parent / "tiny.toml", overrides), run, Progress()
    ).run_stage("export")
    return run


class Slower(Throttled):
    """A device on which files for apps take 1.5 times as long. On ``SlowNetworks``, the
    files of the networks by themselves do.
    """

    slow = "model"

    def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
        for row in super().measure(plan, folder):
            yield (
                {**row, "ms": [1.5 * ms for ms in row["ms"]]}
                if row.get("id", "").startswith(self.slow)
                else row
            )


class SlowNetworks(Slower):
    slow = "network-"


def test_files_for_apps_are_validated(
    app_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    """By accuracy and outputs, with pixels in and probabilities out. What surrounds the
    network is not part of the latency prediction.
    """
    outcome = verdict(app_run, device, experiment, tmp_path, connect=Slower)
    assert outcome.passed and [file.name for file in outcome.files] == [
        "model-fp32.tflite",
        "model-int8.tflite",
        "model.onnx",
    ]
    for file in outcome.files:
        assert file.parity is not None and file.parity.agreement > 0.9
        assert file.network_ms is not None and file.measured_ms == pytest.approx(
            1.5 * file.network_ms, rel=0.05
        )
    assert (
        float_file(outcome).latency_passed is True
        and abs(float_file(outcome).latency_error or 1) < 0.05
    )
    assert "for the network by itself" in lines(outcome)[0]
    plain = verdict(app_run.parent / "run", device, experiment, tmp_path, connect=SlowNetworks)
    assert not plain.passed and float_file(plain).latency_error == pytest.approx(0.5, abs=0.05)


def test_files_for_apps_are_as_accurate_as_plain_ones(
    app_run: Path, finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    app, plain = (verdict(run, device, experiment, tmp_path) for run in (app_run, finished_run))
    assert app.metrics == plain.metrics
    accuracies = [[file.metrics["accuracy"] for file in outcome.files] for outcome in (app, plain)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.03)
    assert (float_file(app).metrics, float_file(plain).network_ms) == (
        float_file(plain).metrics,
        None,
    )


def test_a_bundle_describes_the_inputs_and_outputs_of_its_files(
    app_run: Path, finished_run: Path
) -> None:
    app, plain = (Bundle.load(run / "export" / "bundle.json") for run in (app_run, finished_run))
    for file in app.files:
        assert file.input is not None and file.outputs is not None
        layout, shape = (
            ("NHWC", (1, 8, 8, 1)) if file.runtime == "litert" else ("NCHW", (1, 1, 8, 8))
        )
        assert (file.input.dtype, file.input.layout, file.input.shape, file.input.range) == (
            "uint8",
            layout,
            shape,
            (0, 255),
        )
        assert "the file normalises" in file.input.meaning
        assert [(output.name, output.shape) for output in file.outputs] == [
            ("probabilities", (1, 10))
        ]
    for file in plain.files:
        assert file.input is not None and file.outputs is not None
        assert (file.input.dtype, file.input.range) == (
            "float32",
            (pytest.approx(-0.75), pytest.approx(1.75)),
        )
        assert [output.name for output in file.outputs] == ["logits"]
    assert (
        app.score_calibration is not None
        and app.score_calibration.transformation == "INVERSE_LOGISTIC"
    )
    with (
        np.load(app_run / "export" / "parity.npz") as fed,
        np.load(finished_run / "export" / "parity.npz") as normalised,
    ):
        assert fed["images"].dtype == np.uint8 and fed["images"].std() > 10
        np.testing.assert_allclose(
            (fed["images"] / 255 - 0.3) / 0.4, normalised["images"], atol=1e-5
        )
        np.testing.assert_allclose(fed["logits"], normalised["logits"], atol=1e-4)
    for file in app.files:
        assert file.dtype == "int8" or file.parity.relative_error <= 1e-5


def test_bundles_without_inputs_and_outputs_are_still_read(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    """Earlier versions wrote such bundles, whose hashes must not change."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    path = run / "export" / "bundle.json"
    content = json.loads(path.read_text())
    content["files"] = [
        {name: value for name, value in file.items() if name not in ("input", "outputs")}
        for file in content["files"]
    ]
    path.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    bundle = Bundle.load(path)
    assert bundle.to_json() == path.read_text() and bundle.files[0].input is None
    assert (bundle.interface.input, bundle.interface.softmax) == ("float32", False)
    assert verdict(run, device, experiment, tmp_path).passed


def test_a_verdict_with_warnings_is_not_a_plain_pass(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    """The last line names them. Without any, the document is byte for byte the same as
    before warnings existed.
    """
    plain = verdict(finished_run, device, experiment, tmp_path)
    assert "warnings" not in json.loads(plain.to_json()) and lines(plain)[-1] == "verdict: passed"
    assert plain.model_copy(update={"warnings": ()}).sha256 == plain.sha256
    cautions = (
        Caution(headline="the search learned nothing", text="the loss is 2.303."),
        Caution(headline="the network is odd", text="so."),
    )
    warned = plain.model_copy(update={"warnings": cautions})
    assert (
        lines(warned)[-1]
        == "verdict: passed, but the search learned nothing: the loss is 2.303; the network is"
        " odd: so."
    )
    assert lines(warned.model_copy(update={"passed": False}))[-1].startswith(
        "verdict: FAILED, and the search learned nothing: "
    )
    assert Verdict.parse(warned.to_json()) == warned and warned.sha256 != plain.sha256


def test_a_failed_verdict_says_what_to_do(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    """One line for each reason, and none if all is well."""
    plain = verdict(finished_run, device, experiment, tmp_path)
    assert not any(line.startswith("what to do") for line in lines(plain))

    def advice(**changes: object) -> list[str]:
        """The advice for a failed verdict whose float file has these values."""
        first = plain.files[0].model_copy(update=changes)
        printed = lines(
            plain.model_copy(update={"files": (first, *plain.files[1:]), "passed": False})
        )
        return [
            line.removeprefix("what to do: ") for line in printed if line.startswith("what to do: ")
        ]

    late = {"latency_passed": False, "latency_error": 0.065}
    [noisy] = advice(**late, spread=0.119)
    assert (
        "rounds of model-fp32.tflite differ by 11.9%" in noisy
        and "hwnas validate with --fresh" in noisy
    )
    [quiet] = advice(**late, spread=0.001)
    assert "profile again with more profile.rounds" in quiet
    [wrong] = advice(quality_passed=False)
    assert (
        wrong == "model-fp32.tflite loses more than validate.accuracy_tolerance allows: raise"
        " validate.accuracy_tolerance if the file is good enough."
    )
    [different] = advice(parity_passed=False)
    assert "report it" in different


def test_documents_of_version_1_are_read(finished_run: Path) -> None:
    """A classifier's bundle and verdict, which had their own names for accuracy.
    Malformed documents are refused.
    """
    bundle = json.loads((finished_run / "export" / "bundle.json").read_text())
    new = Bundle.parse(json.dumps(bundle))
    old = {
        name: value for name, value in bundle.items() if name not in ("metric", "metrics", "task")
    }
    old |= {"schema": "hwnas.bundle/1", "torch_accuracy": bundle["metrics"]["accuracy"]}
    assert Bundle.parse(json.dumps(old)) == new
    verdict = json.loads((finished_run / "validate" / "verdict.json").read_text())
    former = {
        name: value for name, value in verdict.items() if name not in ("metric", "metrics", "task")
    }
    former |= {"schema": "hwnas.verdict/1", "torch_accuracy": verdict["metrics"]["accuracy"]}
    names = {"loss": "accuracy_loss", "quality_passed": "accuracy_passed"}
    former["files"] = [
        {names.get(name, name): value for name, value in file.items() if name != "metrics"}
        | {"accuracy": file["metrics"]["accuracy"]}
        for file in verdict["files"]
    ]
    assert Verdict.parse(json.dumps(former)) == Verdict.parse(json.dumps(verdict))
    with pytest.raises(
        DocumentError,
        match="torch_accuracy or torch_ap, but this one has neither: export again",
    ):
        Bundle.parse(
            json.dumps({name: value for name, value in old.items() if name != "torch_accuracy"})
        )
    for files in (3, None, ["a"], {"a": 1}):
        with pytest.raises(DocumentError):
            Verdict.parse(json.dumps({**former, "files": files}))
