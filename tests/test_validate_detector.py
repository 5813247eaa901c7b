"""A small detector through export and validation: its bundle, its verdict, and which
promises are broken by what.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from hwnas.config import FORMATS, NMS_FORMATS, Experiment
from hwnas.core.detector import PostProcessing
from hwnas.core.spaces import mobile32
from hwnas.data.coco import CocoImages
from hwnas.data.images import load_images
from hwnas.devices.device import HOST, connect
from hwnas.devices.host import Host
from hwnas.devices.session import Bench
from hwnas.errors import ConfigError, DeviceError, DocumentError
from hwnas.export.bundle import Bundle
from hwnas.export.post_processing import READERS
from hwnas.export.target import target
from hwnas.export.timing import timing_file
from hwnas.networks import architecture
from hwnas.nn.checkpoint import save_network
from hwnas.nn.network import network_of
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.tasks.boxes import parity
from hwnas.train.result import TrainResult
from hwnas.validate.latency import write_typical_image
from hwnas.validate.validating import validate
from hwnas.verdict import Verdict, lines
from tests.train.rectangles import classifier, settings

pytestmark = pytest.mark.slow

torch.set_num_threads(1)

VALIDATE = {"rounds": 1, "max_spread": 10.0}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("rectangles")
    content = settings(folder, epochs=30)
    content["detector"]["post_processing"] = {"min_score": 0.02, "detections": 50}
    return Experiment.model_validate(
        {**content, "export": {"calibration_images": 16, "parity_images": 8}, "validate": VALIDATE}
    )


@pytest.fixture(scope="module")
def run(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder after ``hwnas run``. Do not write into it."""
    root = tmp_path_factory.mktemp("detector") / "run"
    Pipeline(experiment, root, Progress()).run()
    return root


class Changed(Host):
    """The host, reusing outputs and timings, and changing the outputs of one file."""

    outputs: ClassVar[dict[tuple[str, bytes], np.ndarray]] = {}
    rows: ClassVar[dict[str, list[dict[str, Any]]]] = {}

    def __init__(
        self, name: str = "", change: Callable[[np.ndarray], np.ndarray] = np.copy
    ) -> None:
        super().__init__(HOST)
        self.name, self.change = name, change

    def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
        if plan["runtime"] not in self.rows:
            self.rows[plan["runtime"]] = list(super().measure(plan, folder))
        yield from self.rows[plan["runtime"]]

    def predict(self, model: Path, images_NHWC: np.ndarray, folder: Path) -> np.ndarray:
        key = (model.name, images_NHWC.tobytes())
        if key not in self.outputs:
            self.outputs[key] = super().predict(model, images_NHWC, folder)
        return self.change(self.outputs[key]) if model.name == self.name else self.outputs[key]


def verdict(
    run: Path, experiment: Experiment, work: Path, connection: Any = None, **changes: Any
) -> Verdict:
    config = experiment.validation.model_copy(update=changes)
    bench = Bench(HOST, connection or Changed(), experiment.device, timing_file, work)
    return validate(bench, run / "export", experiment.data, config, None)


def test_all_files_are_as_good_as_pytorch(run: Path) -> None:
    bundle, outcome = (
        Bundle.load(run / "export" / "bundle.json"),
        Verdict.load(run / "validate" / "verdict.json"),
    )
    trained = TrainResult.load(run / "train" / "train.json")
    assert (trained.metric, bundle.metric, outcome.metric) == ("AP", "AP", "AP") and bundle.metrics[
        "AP"
    ] > 0.3
    assert bundle.metrics["AP"] == pytest.approx(trained.metrics["AP"], abs=1e-3)
    assert outcome.metrics == pytest.approx(bundle.metrics, abs=1e-9)
    assert [file.name for file in outcome.files] == [
        target(kind).file for kind in (*FORMATS, *NMS_FORMATS)
    ]
    assert outcome.passed and outcome.unpredicted == "there is no table of this device"
    for file in outcome.files:
        assert file.metrics["AP"] > 0.25 and "accuracy" not in file.metrics
        assert file.measured_ms > 0 and (file.predicted_ms, file.latency_passed) == (None, None)
        in_graph = "nms" in file.name or "tasks" in file.name
        assert (
            (file.post_processing_ms is None) == (file.app_post_processing_ms is None) == in_graph
        )
        assert (file.app_ms is None) == (not in_graph) and file.timed_on == (
            "test image" if in_graph else None
        )
        assert (file.network_ms is None) == (in_graph or file.runtime == "onnxruntime")
        assert file.parity is not None and file.parity_passed is (
            None if in_graph or file.dtype == "int8" else True
        )
        # the NMS of the tasks operator sees boxes that are not cut off at the edges
        if file.dtype == "fp32" and "tasks" not in file.name:
            assert file.parity.relative_error < 1e-5 and file.parity.agreement == 1
    printed = lines(outcome)
    assert (outcome.min_score, outcome.app_score) == (0.02, 0.3)
    assert re.search(
        r" \+ [\d.]+ ms of post-processing in NumPy at score 0\.3 \([\d.]+ ms at 0\.02, as AP"
        r" needs\); AP ",
        printed[0],
    )
    assert re.search(
        r"^model-nms\.onnx: [\d.]+ ms at score 0\.02, as AP needs, [\d.]+ ms at 0\.3, on a test"
        r" image; AP ",
        printed[3],
    )
    assert "note: latency is not checked: there is no table of this device." in printed
    assert printed[-1] == "verdict: passed"


def test_the_bundle_says_how_to_read_its_files(run: Path, experiment: Experiment) -> None:
    folder = run / "export"
    bundle = Bundle.load(folder / "bundle.json")
    assert bundle.detector is not None and bundle.labels == ("red", "blue")
    assert (
        Bundle.parse(bundle.to_json()) == bundle
        and "accuracy" not in json.loads(bundle.to_json())["metrics"]
    )
    assert (
        bundle.preprocessing.mean == experiment.data.mean
        and "without keeping the aspect ratio" in bundle.preprocessing.resize
    )
    images = load_images(experiment.data, "test")
    assert isinstance(images, CocoImages)
    x_NCHW, targets = images.__getitems__([(0, 0)])
    for file in bundle.files:
        assert file.outputs is not None
        outputs = Host(HOST).predict(folder / file.name, x_NCHW.permute(0, 2, 3, 1).numpy(), folder)
        assert outputs.size == sum(int(np.prod(output.shape)) for output in file.outputs)
        options = bundle.detector.post_processing.model_dump()
        boxes, scores, labels = READERS[target(file.format).graph](
            outputs[0], options, bundle.architecture.resolution, len(bundle.labels)
        )
        assert len(scores) and (np.diff(scores) <= 0).all()
        wanted = [target_box for target_box in targets[0] if target_box[4] == labels[0]]
        assert (
            min(float(np.abs(boxes[0] - target_box[:4].numpy()).max()) for target_box in wanted)
            < 12
        ), "boxes are x1, y1, x2, y2 in pixels of the input"


def test_a_bundle_of_version_1_is_read(run: Path) -> None:
    """It described the outputs of all of a detector's files in one place."""
    content = json.loads((run / "export" / "bundle.json").read_text())
    new = Bundle.parse(json.dumps(content))
    old = {
        name: value for name, value in content.items() if name not in ("metric", "metrics", "task")
    }
    graphs = {file.name: target(file.format).graph for file in new.files}
    described = {
        file["name"]: {"graph": graphs[file["name"]], "outputs": file["outputs"]}
        for file in content["files"]
    }
    old |= {
        "schema": "hwnas.bundle/1",
        "torch_ap": content["metrics"]["AP"],
        "detector": {**content["detector"], "files": described},
    }
    old["files"] = [
        {name: value for name, value in file.items() if name != "outputs"}
        for file in content["files"]
    ]
    assert Bundle.parse(json.dumps(old)) == new.model_copy(
        update={"metrics": {"AP": new.metrics["AP"]}}
    )
    for files in ([1], {"a": {}}, {"a": 3}):
        with pytest.raises(DocumentError):
            Bundle.parse(json.dumps({**old, "detector": {**content["detector"], "files": files}}))


def test_validation_can_use_a_part_of_the_images(
    run: Path, experiment: Experiment, tmp_path: Path
) -> None:
    outcome = verdict(run, experiment, tmp_path, images=3)
    assert outcome.images == 3 and outcome.passed


@pytest.mark.parametrize("name", ["model-fp32.tflite", "model-nms.onnx", "model-int8-tasks.tflite"])
def test_a_file_that_finds_nothing_has_an_ap_of_0(
    name: str, run: Path, experiment: Experiment, tmp_path: Path
) -> None:
    outcome = verdict(run, experiment, tmp_path, Changed(name, np.zeros_like))
    [wrong] = [file for file in outcome.files if file.name == name]
    assert (wrong.metrics["AP"], wrong.quality_passed, outcome.passed) == (0.0, False, False)
    assert all(file.quality_passed for file in outcome.files if file.name != name)
    assert wrong.parity is not None and wrong.parity.agreement < 1
    assert (
        any(line.startswith(name) and "OUT OF TOLERANCE" in line for line in lines(outcome))
        and lines(outcome)[-1] == "verdict: FAILED"
    )


def test_boxes_with_swapped_coordinates_fail(
    run: Path, experiment: Experiment, tmp_path: Path
) -> None:
    """x and y are swapped, which looks right on square images."""
    outcome = verdict(
        run,
        experiment,
        tmp_path,
        Changed("model.onnx", lambda rows: rows[..., [1, 0, 3, 2, *range(4, rows.shape[-1])]]),
    )
    assert [
        file.name
        for file in outcome.files
        if not file.quality_passed or file.parity_passed is False
    ] == ["model.onnx"]


def test_outputs_of_another_size_than_the_bundle_says_are_refused(
    run: Path, experiment: Experiment, tmp_path: Path
) -> None:
    cut = Changed("model.onnx", lambda rows: rows[:, :-1])
    with pytest.raises(
        DeviceError,
        match=(
            r"model\.onnx gave outputs \[8, \d+, 6\] for 8 images, but bundle\.json says \d+"
            r" numbers per image"
        ),
    ):
        verdict(run, experiment, tmp_path, cut)


def test_a_file_replaced_by_another_is_refused(
    run: Path, experiment: Experiment, tmp_path: Path
) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    shutil.copy(copied / "export" / "model-nms.onnx", copied / "export" / "model.onnx")
    with pytest.raises(DocumentError, match=r"model\.onnx is missing or not the file"):
        verdict(copied, experiment, tmp_path)


def test_other_data_are_refused(run: Path, experiment: Experiment, tmp_path: Path) -> None:
    digits = Experiment.model_validate({"data": {"name": "digits"}}).data
    with pytest.raises(
        ConfigError, match=r"data\.name = 'digits' has no boxes, but 'small-ssdlite' is a detector"
    ):
        bench = Bench(HOST, connect(HOST), experiment.device, timing_file, tmp_path)
        validate(bench, run / "export", digits, experiment.validation, None)
    smaller = tmp_path / "data"
    shutil.copytree(Path(str(experiment.data.path)), smaller)
    path = smaller / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["images"].pop()
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in kept]
    path.write_text(json.dumps(content))
    fewer = experiment.model_copy(
        update={"data": experiment.data.model_copy(update={"path": str(smaller)})}
    )
    with pytest.raises(
        DocumentError, match="made with 8 test images, but the data has 7: export again"
    ):
        verdict(run, fewer, tmp_path)


def test_the_report_of_a_validated_detector(run: Path) -> None:
    text = (run / "report" / "report.html").read_text()
    outcome = Verdict.load(run / "validate" / "verdict.json")
    assert (
        "✓ passed" in text
        and "finds objects with an AP of" in text
        and "in graph" in text
        and "Not finished" not in text
    )
    for file in outcome.files:
        assert text.count(f"AP, {file.name}") == 1
    assert "Top-1, " not in text


def test_files_that_take_pixels_are_validated(
    run: Path, experiment: Experiment, tmp_path: Path
) -> None:
    """They are as good as those that do not, by outputs and AP; and the network is also
    timed by itself, without the normalisation.
    """
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    formats = (
        "tflite-fp32",
        "tflite-int8",
        "onnx",
        "onnx-nms",
        "tflite-fp32-tasks",
        "tflite-int8-tasks",
    )
    app = experiment.model_copy(
        update={
            "export": experiment.export.model_copy(update={"input": "uint8", "formats": formats})
        }
    )
    Pipeline(app, copied, Progress()).run_stage("export")
    before, after = (Bundle.load(folder / "export" / "bundle.json") for folder in (run, copied))
    for plain, with_pixels in zip(before.files, after.files, strict=True):
        assert plain.input is not None and with_pixels.input is not None
        assert (plain.input.dtype, with_pixels.input.dtype, with_pixels.outputs) == (
            "float32",
            "uint8",
            plain.outputs,
        )
        assert with_pixels.parity.relative_error == pytest.approx(
            plain.parity.relative_error, abs=0.02 if plain.dtype == "int8" else 1e-5
        )
    bench = Bench(HOST, Host(HOST), app.device, timing_file, tmp_path)
    outcome = validate(bench, copied / "export", app.data, app.validation, None)
    known = {file.name: file for file in Verdict.load(run / "validate" / "verdict.json").files}
    assert outcome.passed
    for file in outcome.files:
        assert file.metrics["AP"] == pytest.approx(
            known[file.name].metrics["AP"], abs=0.03 if file.dtype == "int8" else 1e-3
        )
        assert (file.network_ms is None) == (known[file.name].network_ms is None)


def test_softmax_is_refused_for_detectors(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=(
            r"export\.softmax is for classifiers, and a detector's files have scores already;"
            r" remove it"
        ),
    ):
        Experiment.model_validate({**settings(tmp_path), "export": {"softmax": True}})


@pytest.mark.parametrize(("score", "timed"), [(0.3, True), (0.02, False), (0.01, False)])
def test_files_are_also_timed_at_the_threshold_of_an_app(
    score: float, timed: bool, run: Path, experiment: Experiment, tmp_path: Path
) -> None:
    """Copies for timing are the same files with another threshold; there are none
    unless AP's threshold is lower.
    """
    plans: list[dict[str, Any]] = []

    class Kept(Changed):
        rows: ClassVar[dict[str, list[dict[str, Any]]]] = {}

        def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
            plans.append(plan)
            for item in plan["items"]:
                if "nms" in item["id"] or "tasks" in item["id"]:
                    [image] = np.load(item["input"])
                    outputs[item["id"]] = Host(HOST).predict(
                        Path(item["path"]), image[None], folder
                    )
            yield from super().measure(plan, folder)

    outputs: dict[str, np.ndarray] = {}
    outcome = verdict(run, experiment, tmp_path, Kept(), app_score=score)
    assert all(
        (file.app_ms is not None) == (timed and file.timed_on is not None) for file in outcome.files
    )
    assert all(
        (file.app_post_processing_ms is not None) == (timed and file.timed_on is None)
        for file in outcome.files
    )
    assert outcome.app_score == (score if timed else None)
    assert {name.removeprefix("app-") for name in outputs} == {
        "model-nms.onnx",
        "model-fp32-tasks.tflite",
        "model-int8-tasks.tflite",
    }
    assert len(outputs) == (6 if timed else 3) and not any(
        "input" in i for p in plans for i in p["items"] if i["id"] == "model.onnx"
    )
    for name in [name for name in outputs if name.startswith("app-")]:
        graph = "nms" if "nms" in name else "tasks"
        all_boxes, all_scores, all_labels = READERS[graph](
            outputs[name.removeprefix("app-")], {}, 48, 2
        )
        boxes, scores, labels = READERS[graph](outputs[name], {}, 48, 2)
        high = all_scores > score
        assert 0 < len(scores) < len(all_scores)
        np.testing.assert_array_equal(scores, all_scores[high])
        np.testing.assert_array_equal(boxes, all_boxes[high])
        np.testing.assert_array_equal(labels, all_labels[high])


def test_verdicts_of_version_1_are_read() -> None:
    """They have no app threshold. A current verdict with one reads back unchanged."""
    kept = {
        "name": "model.onnx", "runtime": "onnxruntime", "runtime_version": "1", "dtype": "fp32", "measured_ms": 1.0, "spread": 0.01,
        "predicted_ms": None, "latency_error": None, "latency_passed": None, "parity": None, "parity_passed": True,
    }  # fmt: skip
    content = {
        "schema": "hwnas.verdict/1", "device": "host", "cpu": "test", "cores": [0], "governor": "unknown", "threads": 1,
        "date": "2026-01-01",
        "bundle_sha256": "0" * 64, "table": None, "table_sha256": None, "unpredicted": None, "drift": None, "images": 8,
        "files": [{**kept, "ap": 0.48, "ap_loss": 0.02, "ap_passed": True}],
        "not_run": {}, "passed": True, "torch_ap": 0.5,
        "tolerances": {
            "latency_tolerance": 0.05, "max_drift": 0.25, "parity_tolerance": 1e-4, "accuracy_tolerance": 0.002,
            "int8_accuracy_tolerance": 0.02, "ap_tolerance": 0.005, "int8_ap_tolerance": 0.03, "images": None, "rounds": 7,
            "max_spread": 0.1,
        },
    }  # fmt: skip
    old = Verdict.parse(json.dumps(content))
    wanted = {name: value for name, value in content.items() if name != "torch_ap"}
    wanted |= {
        "schema": "hwnas.verdict/2",
        "task": "detect",
        "metric": "AP",
        "metrics": {"AP": 0.5},
    }
    wanted["files"] = [{**kept, "metrics": {"AP": 0.48}, "loss": 0.02, "quality_passed": True}]
    assert json.loads(old.to_json()) == wanted
    tolerances = old.tolerances.model_copy(update={"app_score": 0.5})
    new = old.model_copy(update={"tolerances": tolerances, "app_score": 0.5, "min_score": 0.001})
    assert Verdict.parse(new.to_json()) == new and new.sha256 != old.sha256


def test_the_typical_image(tmp_path: Path) -> None:
    """It is the one with the median number of scores above the threshold."""
    images, rows = (
        np.arange(5, dtype=np.float32).reshape(5, 1, 1, 1),
        np.zeros((5, 9, 5), np.float32),
    )
    for image, count in enumerate((7, 0, 3, 9, 2)):
        rows[image, :count, 4] = 0.5
    rows[1, :, 4] = 0.3
    np.savez(tmp_path / "parity.npz", images=images, rows=rows)
    write_typical_image(tmp_path, "rows", 0.3, tmp_path / "image.npy")
    assert np.load(tmp_path / "image.npy").tolist() == [[[[2.0]]]]


def test_parity_of_detections() -> None:
    """Over all anchors, or over PyTorch's detections and those nearest to them."""
    config = PostProcessing(min_score=0.1, detections=2)
    rows = np.array(
        [[[0, 0, 32, 32, 0.9], [40, 40, 64, 64, 0.5]], [[0, 0, 8, 8, 0.0], [9, 9, 20, 20, 0.0]]],
        np.float32,
    )
    shifted = rows.copy()
    shifted[0, 1, 0] += 0.64
    result = parity("decoded", shifted, rows, config, 64)
    assert (result.images, result.agreement) == (2, 1.0) and result.relative_error == pytest.approx(
        0.01
    )
    chosen = np.zeros((2, 2, 6), np.float32)
    chosen[0] = [[40, 40, 64, 64, 0.5, 0], [0, 0, 32, 32, 0.89, 0]]  # in another order
    result = parity("nms", chosen, rows, config, 64)
    assert result.relative_error == pytest.approx(0.01) and result.agreement == 0.5
    chosen[0, 0] = 0
    assert parity("nms", chosen, rows, config, 64).relative_error == pytest.approx(40 / 64)
    chosen[0, 1, 5] = 1  # of another class
    assert parity("nms", chosen, rows, config, 64).relative_error == 1
    assert parity("tasks", np.zeros((2, 13), np.float32), rows, config, 64).relative_error == 1


@pytest.mark.parametrize(
    ("task", "message"),
    [("classify", "'small-ssdlite' is a detector"), ("detect", "'small' is a classifier")],
)
def test_a_network_of_the_other_task_is_not_exported(
    task: str, message: str, tmp_path: Path
) -> None:
    boxes = Experiment.model_validate(settings(tmp_path))
    network = network_of(
        architecture(boxes, mobile32(), tmp_path) if task == "classify" else classifier()
    )
    save_network(network, tmp_path / "run" / "train" / "model.safetensors", {})
    config = boxes if task == "detect" else Experiment()
    with pytest.raises(ConfigError, match=f"{message}, but task = '{task}': set task = "):
        Pipeline(config, tmp_path / "run", Progress()).run_stage("export")


@pytest.mark.parametrize("formats", [("onnx-nms",), ("onnx", "tflite-int8-tasks")])
def test_a_classifier_has_no_files_with_nms(formats: tuple[str, ...]) -> None:
    with pytest.raises(
        ValueError, match=f"export.formats has '{formats[-1]}', which is for detectors"
    ):
        Experiment.model_validate({"export": {"formats": formats}})
    assert Experiment().export_formats == ("tflite-fp32", "tflite-int8", "onnx")


def test_parity_in_a_rectangle_is_a_fraction_of_the_width_or_of_the_height() -> None:
    config = PostProcessing(min_score=0.1, detections=2)
    rows = np.array([[[0, 0, 32, 16, 0.9], [40, 10, 64, 32, 0.5]]], np.float32)
    for column, share in ((0, 0.64 / 64), (1, 0.64 / 32), (2, 0.64 / 64), (3, 0.64 / 32)):
        shifted = rows.copy()
        shifted[0, 1, column] -= 0.64
        assert parity("decoded", shifted, rows, config, (32, 64)).relative_error == pytest.approx(
            share, rel=1e-4
        )
        boxes = np.concatenate([shifted[0], np.zeros((2, 1), np.float32)], axis=1)
        result = parity("nms", boxes[None], rows, config, (32, 64))
        assert result.relative_error == pytest.approx(share, rel=1e-4)
