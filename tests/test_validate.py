"""What a verdict says of devices that are slower than profiled, of tables that do not
apply, and of files that are wrong.
"""

from __future__ import annotations

import json
import shutil
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
from hwnas.errors import DocumentError
from hwnas.export.bundle import Bundle
from hwnas.export.timing import timing_file
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.validate.stage import validate
from hwnas.verdict import Verdict, drift_note, lines

pytestmark = pytest.mark.slow


class Throttled(Simulated):
    """The simulated device, ``factor`` times as slow, and ``network_factor`` slower
    still on whole networks.
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
    found = LatencyTable.load(run / "profile" / "table.json")
    found = found.model_copy(update={"header": found.header.model_copy(update=header or {})})
    bench = Bench(device, connection, experiment.device, timing_file, work)
    return validate(bench, run / "export", experiment.data, experiment.validation, found)


def judged(found: Verdict) -> Any:
    return next(file for file in found.files if file.name == "model-fp32.tflite")


def test_as_promised(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    found = verdict(finished_run, device, experiment, tmp_path)
    assert found.passed and found.images == 40
    assert found.drift == pytest.approx(1, abs=0.02) and drift_note(found) is None
    assert judged(found).latency_passed is True and judged(found).parity_passed is True
    assert [
        file.latency_passed
        for file in found.files
        if file.dtype == "int8" or file.runtime == "onnxruntime"
    ] == [None, None]


def test_a_slow_device_is_told_from_a_slow_network(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    slow = verdict(finished_run, device, experiment, tmp_path, factor=1.15)
    assert slow.passed and slow.drift == pytest.approx(1.15, rel=0.02)
    assert judged(slow).measured_ms / (judged(slow).predicted_ms or 1) == pytest.approx(
        1.15, rel=0.04
    )
    assert "15% slower now than when it was profiled" in (drift_note(slow) or "")
    wrong = verdict(finished_run, device, experiment, tmp_path, network_factor=1.15)
    assert not wrong.passed and wrong.drift == pytest.approx(1, abs=0.02)
    assert (
        judged(wrong).latency_error == pytest.approx(0.15, abs=0.04)
        and "OUT OF TOLERANCE" in lines(wrong)[0]
    )


def test_a_device_that_is_not_the_profiled_one_any_more_fails(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    found = verdict(finished_run, device, experiment, tmp_path, factor=2.0)
    assert not found.passed and judged(found).latency_passed is False
    assert "profile it again" in (drift_note(found) or "")


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
    found = verdict(finished_run, device, experiment, tmp_path, header=header)
    assert found.passed and found.drift is None and why in (found.unpredicted or "")
    assert {file.predicted_ms for file in found.files} == {None}
    assert any("latency is not checked" in line for line in lines(found))


class Wrong(Throttled):
    """A device on which one file's outputs are off by one in a hundred, and which lacks
    a runtime.
    """

    def runtimes(self) -> dict[str, str]:
        return {"litert": super().runtimes()["litert"]}

    def predict(self, model: Path, images_NHWC: np.ndarray, folder: Path) -> np.ndarray:
        outputs = super().predict(model, images_NHWC, folder)
        return outputs * 1.01 if model.name == "model-fp32.tflite" else outputs


def test_outputs_that_are_wrong_on_the_device_alone_fail(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    found = verdict(finished_run, device, experiment, tmp_path, connect=Wrong)
    parity = judged(found).parity
    assert (
        parity is not None
        and parity.relative_error == pytest.approx(0.01, rel=0.01)
        and parity.agreement == 1
    )
    assert (
        not found.passed and judged(found).parity_passed is False and judged(found).quality_passed
    )
    assert (
        Bundle.load(finished_run / "export" / "bundle.json").files[0].parity.relative_error < 1e-4
    )


class Mistaken(Throttled):
    """A device on which the int8 file always answers with the class after the right one."""

    def predict(self, model: Path, images_NHWC: np.ndarray, folder: Path) -> np.ndarray:
        outputs = super().predict(model, images_NHWC, folder)
        return np.roll(outputs, 1, axis=1) if model.name == "model-int8.tflite" else outputs


def test_a_classifier_that_loses_accuracy_fails(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    strict = experiment.validation.model_copy(update={"int8_accuracy_tolerance": 0.3})
    found = verdict(
        finished_run,
        device,
        experiment.model_copy(update={"validation": strict}),
        tmp_path,
        connect=Mistaken,
    )
    files = {file.name: file for file in found.files}
    wrong = files.pop("model-int8.tflite")
    assert wrong.loss == pytest.approx(found.metrics["accuracy"] - wrong.metrics["accuracy"])
    assert wrong.loss > 0.5
    assert (wrong.quality_passed, found.passed) == (False, False)
    assert all(file.quality_passed for file in files.values())


def test_a_file_whose_runtime_the_device_lacks_is_named(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    found = verdict(finished_run, device, experiment, tmp_path, connect=Wrong)
    assert [file.name for file in found.files] == ["model-fp32.tflite", "model-int8.tflite"]
    assert found.not_run == {"model.onnx": f"{device.id} does not run onnxruntime"}
    assert f"model.onnx: not run, {device.id} does not run onnxruntime" in lines(found)


def test_prices_fitted_to_whole_networks_tell_no_drift(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    """They are not times of blocks alone: the network is predicted, and judged as it
    is, on a device 1.15 times as slow.
    """
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    table = LatencyTable.load(run / "profile" / "table.json")
    entries = {
        key: entry.model_copy(update={"runs": "unknown"}) for key, entry in table.entries.items()
    }
    table.model_copy(update={"entries": entries}).save(run / "profile" / "table.json")
    as_it_was, slow = (
        verdict(run, device, experiment, tmp_path, factor=factor) for factor in (1.0, 1.15)
    )
    assert (
        as_it_was.passed and as_it_was.drift is None and judged(as_it_was).predicted_ms is not None
    )
    assert judged(slow).latency_error == pytest.approx(0.15, abs=0.04) and not slow.passed


def test_a_file_that_was_replaced_is_refused(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "export" / "model.onnx").write_bytes(b"something else")
    with pytest.raises(DocumentError, match=r"model\.onnx is missing or not the file"):
        verdict(run, device, experiment, tmp_path)


def test_the_exported_floats_are_pytorchs_on_real_images(finished_run: Path) -> None:
    bundle = Bundle.load(finished_run / "export" / "bundle.json")
    with np.load(finished_run / "export" / "parity.npz") as arrays:
        assert arrays["logits"].std() > 0.1  # else the comparison would be of silence
    for file in bundle.files:
        assert file.dtype == "int8" or file.parity.relative_error <= 1e-4


def test_documents_of_classifiers_have_nothing_of_detectors(finished_run: Path) -> None:
    """Nor is anything empty for them."""
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
    """The same network, in files that take pixels and return probabilities. Do not
    write into it.
    """
    run = tmp_path_factory.mktemp("app") / "run"
    shutil.copytree(finished_run, run)
    overrides = ["export.input=uint8", "export.softmax=true", "export.score_calibration=true"]
    Pipeline(
        load_experiment(finished_run.parent / "tiny.toml", overrides), run, Progress()
    ).run_stage("export")
    return run


class Slower(Throttled):
    """A device on which everything around a network, or the networks alone, take half
    as long again.
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
    """Accuracy and outputs with pixels in and probabilities out; what stands around the
    network is no part of the prediction.
    """
    found = verdict(app_run, device, experiment, tmp_path, connect=Slower)
    assert found.passed and [file.name for file in found.files] == [
        "model-fp32.tflite",
        "model-int8.tflite",
        "model.onnx",
    ]
    for file in found.files:
        assert file.parity is not None and file.parity.agreement > 0.9
        assert file.network_ms is not None and file.measured_ms == pytest.approx(
            1.5 * file.network_ms, rel=0.05
        )
    assert judged(found).latency_passed is True and abs(judged(found).latency_error or 1) < 0.05
    assert "for the network by itself" in lines(found)[0]
    plain = verdict(app_run.parent / "run", device, experiment, tmp_path, connect=SlowNetworks)
    assert not plain.passed and judged(plain).latency_error == pytest.approx(0.5, abs=0.05)


def test_files_for_apps_are_as_accurate(
    app_run: Path, finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    app, plain = (verdict(run, device, experiment, tmp_path) for run in (app_run, finished_run))
    assert app.metrics == plain.metrics
    accuracies = [[file.metrics["accuracy"] for file in found.files] for found in (app, plain)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.03)
    assert (judged(app).metrics, judged(plain).network_ms) == (judged(plain).metrics, None)


def test_a_bundle_says_what_its_files_take(app_run: Path, finished_run: Path) -> None:
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


def test_bundles_that_do_not_say_it_are_read_as_they_were(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    """Those of earlier versions, whose hash stays theirs."""
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


def test_a_verdict_with_warnings_is_no_plain_passed(
    finished_run: Path, device: Device, experiment: Experiment, tmp_path: Path
) -> None:
    """The last line says them; without any, the document is what it was before there
    were warnings, in every byte.
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
    """Once for each reason, before the last line; nothing where all is well."""
    plain = verdict(finished_run, device, experiment, tmp_path)
    assert not any(line.startswith("what to do") for line in lines(plain))

    def said(**changes: object) -> list[str]:
        """What is said of a verdict whose float file is changed so."""
        first = plain.files[0].model_copy(update=changes)
        found = lines(
            plain.model_copy(update={"files": (first, *plain.files[1:]), "passed": False})
        )
        return [
            line.removeprefix("what to do: ") for line in found if line.startswith("what to do: ")
        ]

    late = {"latency_passed": False, "latency_error": 0.065}
    [noisy] = said(**late, spread=0.119)
    assert (
        "rounds of model-fp32.tflite differ by 11.9%" in noisy
        and "hwnas validate with --fresh" in noisy
    )
    [quiet] = said(**late, spread=0.001)
    assert "profile again with more profile.rounds" in quiet
    [wrong] = said(quality_passed=False)
    assert (
        wrong == "model-fp32.tflite loses more than validate.accuracy_tolerance allows: raise"
        " validate.accuracy_tolerance if the file is good enough."
    )
    [different] = said(parity_passed=False)
    assert "report it" in different


def test_documents_of_version_1_are_read(finished_run: Path) -> None:
    """A classifier's bundle and verdict, which had names of their own for accuracy; and
    what is no document at all is said to be none.
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
