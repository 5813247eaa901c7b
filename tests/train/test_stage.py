"""Training a detector as a stage: it learns, it ends the same however often it is
killed, and it says first what it cannot do.
"""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.detector import Scores
from hwnas.core.published import published
from hwnas.core.spaces import mobile32
from hwnas.data.coco_eval import NUMBERS
from hwnas.document import file_sha256
from hwnas.errors import ConfigError, DivergenceError, DocumentError, SpaceError, UserError
from hwnas.networks import architecture
from hwnas.nn.checkpoint import load_network, save_network
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.nn.detector import DetectionNetwork
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.runs import JsonLines
from hwnas.train.result import TrainResult
from hwnas.train.stage import outputs
from tests.commands import Command, run
from tests.train.rectangles import classifier, experiment, settings, write_rectangles

torch.set_num_threads(1)


class Lines(Progress):
    """Keeps the messages of a stage."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def info(self, message: str) -> None:
        self.said.append(message)


def trained(experiment: Experiment, run: Path) -> tuple[TrainResult, Lines]:
    Pipeline(experiment, run, lines := Lines()).run_stage("train")
    return TrainResult.load(run / "train" / "train.json"), lines


def refused(experiment: Experiment, run: Path, stage: str = "train") -> str:
    """The error message, which must be one line; nothing may have been done."""
    with pytest.raises(ConfigError) as caught:
        Pipeline(experiment, run, Progress()).run_stage(stage)
    assert "\n" not in str(caught.value) and not (run / "train").exists()
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_a_detector_learns(scores: Scores, tmp_path: Path) -> None:
    config = settings(tmp_path, epochs=25)
    result, lines = trained(
        Experiment.model_validate({**config, "detector": {"extras": [48, 32], "scores": scores}}),
        tmp_path / "run",
    )
    assert (result.metrics["AP50"] or 0) > 0.7
    assert (
        lines.said[-2] == f"trained small-ssdlite: AP {result.metrics['AP']:.1%}, AP50"
        f" {result.metrics['AP50']:.1%} on 8 test images"
    )


@pytest.mark.slow
def test_the_stage_writes_its_outputs(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    result, _ = trained(config, tmp_path / "run")
    folder = tmp_path / "run" / "train"
    arch = Architecture.load(folder / "arch.json")
    assert (result.steps, result.test_images, result.class_names, result.weights) == (
        6,
        8,
        ("red", "blue"),
        "scratch",
    )
    assert result.architecture_sha256 == arch.sha256 and arch.detector is not None
    assert (arch.classes, arch.resolution, len(arch.detector.extras)) == (2, 48, 2)
    stored = json.loads((folder / "train.json").read_text())
    assert (stored["task"], stored["metric"]) == ("detect", "AP") and "guess" not in stored
    assert stored["metrics"].keys() == set(NUMBERS) and stored["per_class"].keys() == {
        "red",
        "blue",
    }
    rows = JsonLines(folder / "metrics.jsonl").read()
    assert [row["step"] for row in rows] == list(range(6))
    assert all(row["loss"] == pytest.approx(row["class_loss"] + row["box_loss"]) for row in rows)
    network = load_network(folder / "model.safetensors")
    assert isinstance(network, DetectionNetwork) and network.arch == arch
    assert all((folder / name).is_file() for name in outputs(config))


@pytest.mark.slow
def test_a_killed_and_resumed_training_ends_the_same(tmp_path: Path) -> None:
    """SIGKILL in the middle of a training with augmentation, averaged weights and
    random crops, and then the same command again.
    """
    config = settings(tmp_path, epochs=3, ema_decay=0.9, validate_every=1)
    config["data"]["augment"] = "ssd"
    config["checkpoint_seconds"] = 0
    (tmp_path / "straight").mkdir()
    arguments = {}
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        arguments[name] = ["train", str(tmp_path / name), "-q"]
    run(arguments["straight"])
    log = tmp_path / "killed" / "train" / "metrics.jsonl"

    def four_of_nine_steps_are_logged() -> bool:
        return log.exists() and log.read_bytes().count(b"\n") >= 4

    killed = Command(arguments["killed"])
    assert killed.kill_once(four_of_nine_steps_are_logged) == -signal.SIGKILL, (
        "the training was over before it could be killed"
    )
    run(arguments["killed"])
    for name in (*outputs(Experiment.model_validate(config)), "metrics.jsonl", "validation.jsonl"):
        assert file_sha256(tmp_path / "killed" / "train" / name) == file_sha256(
            tmp_path / "straight" / "train" / name
        ), name


@pytest.mark.slow
def test_one_class_with_images_without_objects_and_batches_without_boxes(tmp_path: Path) -> None:
    config = experiment(tmp_path, classes=1, batch_size=2)
    shutil.rmtree(tmp_path / "data")
    write_rectangles(tmp_path / "data", classes=1, empty=18)
    result, _ = trained(config, tmp_path / "run")
    rows = JsonLines(tmp_path / "run" / "train" / "metrics.jsonl").read()
    assert min(row["loss"] for row in rows) == 0.0, "some batch of two should have no box"
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert result.per_class.keys() == {"red"}


def test_divergence_is_reported_and_the_last_good_state_is_kept(tmp_path: Path) -> None:
    optimizer = {"name": "momentum", "lr": 1e12, "warmup": 0.0}
    with pytest.raises(DivergenceError, match=r"optimizer\.lr"):
        trained(experiment(tmp_path, optimizer=optimizer), tmp_path / "run")
    state = torch.load(tmp_path / "run" / "train" / "checkpoint.pt", weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


@pytest.mark.slow
def test_batch_norm_has_the_momentum_of_the_recipe(tmp_path: Path) -> None:
    """After one step, a running mean is (1 - m) * 0 + m * mean of the batch."""
    means = []
    for momentum in (0.1, 0.03):
        trained(experiment(tmp_path, epochs=0.1, bn_momentum=momentum), tmp_path / f"{momentum}")
        state = load_network(tmp_path / f"{momentum}" / "train" / "model.safetensors").state_dict()
        means.append(state["blocks.0.layers.conv.norm.running_mean"])
    torch.testing.assert_close(0.3 * means[0], means[1])
    assert means[0].abs().max() > 0.001


# initial weights


def saved_classifier(folder: Path, arch: Architecture | None = None) -> ClassificationNetwork:
    network = ClassificationNetwork(
        arch or classifier(), generator=torch.Generator().manual_seed(5)
    )
    save_network(network, folder / "train" / "model.safetensors")
    return network


@pytest.mark.slow
@pytest.mark.parametrize("named", ["", "train"])
def test_the_backbone_starts_with_the_weights_of_a_classifier(named: str, tmp_path: Path) -> None:
    """Even if the classifier is for images of another size. The learning rate is next
    to nothing, so the weights are still there at the end.
    """
    small = Architecture(
        name="small", blocks=tuple(replace(op, size=op.size * 2 // 3) for op in classifier().blocks)
    )
    source = saved_classifier(tmp_path / "classifier", small)
    still = {"name": "momentum", "lr": 1e-12, "weight_decay": 0.0}
    config = experiment(tmp_path, optimizer=still, backbone=str(tmp_path / "classifier" / named))
    result, _ = trained(config, tmp_path / "run")
    network = load_network(tmp_path / "run" / "train" / "model.safetensors")
    assert result.weights == "backbone"
    theirs, ours = dict(source.named_parameters()), dict(network.named_parameters())
    shared = theirs.keys() & ours.keys()
    assert (
        shared == {name for name in ours if name.startswith("blocks.")} and theirs.keys() - shared
    )
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-9) for name in shared)
    Pipeline(config, tmp_path / "run", lines := Lines()).run_stage("train")
    assert lines.said == ["train: up to date, skipped"]
    with torch.no_grad():
        theirs["blocks.0.layers.conv.conv.weight"].add_(1.0)
    save_network(source, tmp_path / "classifier" / "train" / "model.safetensors")
    Pipeline(config, tmp_path / "run", lines := Lines()).run_stage("train")
    assert lines.said[0].startswith("train: inputs changed")


def test_a_backbone_of_another_network_is_refused(tmp_path: Path) -> None:
    blocks = list(classifier().blocks)
    saved_classifier(tmp_path / "short", Architecture(name="short", blocks=tuple(blocks[:2])))
    keys = [op.key.replace("m72", "m96") for op in blocks]
    saved_classifier(tmp_path / "wide", Architecture(name="wide", blocks=keys))
    message = refused(experiment(tmp_path, backbone=str(tmp_path / "wide")), tmp_path / "run")
    assert f"block 3 is {keys[3]} there and {blocks[3].key} here" in message
    assert "block 2 is nothing there" in refused(
        experiment(tmp_path, backbone=str(tmp_path / "short")), tmp_path / "run"
    )
    assert "has no model.safetensors" in refused(
        experiment(tmp_path, backbone=str(tmp_path / "data")), tmp_path / "run"
    )


# the architecture


def test_the_architecture_of_a_detection_experiment(tmp_path: Path) -> None:
    config = settings(tmp_path)
    attached = architecture(Experiment.model_validate(config), mobile32(), tmp_path)
    assert attached.detector is not None and attached.detector.scores == "softmax"
    config["detector"] = {"extras": [32], "scores": "sigmoid"}
    config["data"]["resolution"] = 96
    attached = architecture(Experiment.model_validate(config), mobile32(), tmp_path)
    assert attached.detector is not None and attached.resolution == 96
    assert (attached.detector.scores, [op.out_ch for op in attached.detector.extras]) == (
        "sigmoid",
        [32],
    )
    attached.save(tmp_path / "own.json")
    config["train"]["arch"] = str(tmp_path / "own.json")
    config["detector"] = {}
    assert architecture(Experiment.model_validate(config), mobile32(), tmp_path) == attached, (
        "its own detector stays"
    )
    config["train"]["arch"] = "ssdlite320_mobilenet_v3_large"
    assert architecture(Experiment.model_validate(config), mobile32(), tmp_path) == published(
        "ssdlite320_mobilenet_v3_large", resolution=96, classes=2
    )


@pytest.mark.parametrize(("width", "channels"), [(0.35, 3), (1.4, 1)])
def test_a_published_network_has_the_configured_width_and_channels(
    tmp_path: Path, width: float, channels: int
) -> None:
    one_each = {"mean": [0.5] * channels, "std": [0.5] * channels}
    data = {"name": "digits", "resolution": 32, "channels": channels, **one_each}
    config = {"space": {"width": width}, "data": data, "train": {"arch": "mobilenet_v2"}}
    arch = architecture(Experiment.model_validate(config), mobile32(), tmp_path)
    assert arch == published(
        "mobilenet_v2", resolution=32, classes=10, in_channels=channels, width=width
    )
    theirs = torchvision.models.mobilenet_v2(num_classes=10, width_mult=width)
    # torchvision's stem always has three input channels
    missing_params = (3 - channels) * 9 * arch.ops()[0].out_ch
    assert (
        arch.params == sum(parameter.numel() for parameter in theirs.parameters()) - missing_params
    )


def test_an_architecture_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = settings(tmp_path)
    own = architecture(Experiment.model_validate(config), mobile32(), tmp_path)
    own.save(tmp_path / "own.json")
    misfit: dict[str, Any] = {
        **config,
        "data": {**config["data"], "resolution": 64},
        "train": {"arch": str(tmp_path / "own.json")},
    }
    assert "has 2 classes, 48 px and 3 channels, but the data has 2, 64 and 3" in refused(
        Experiment.model_validate(misfit), tmp_path / "run"
    )
    digits = {"train": {"arch": str(tmp_path / "own.json")}}
    assert "is a detector: set task = 'detect'" in refused(
        Experiment.model_validate(digits), tmp_path / "run"
    )
    one_size = Architecture(name="flat", blocks=tuple(classifier().blocks[:1]))
    one_size.save(tmp_path / "small.json")
    with pytest.raises(SpaceError, match="needs feature maps at two resolutions"):
        Pipeline(Experiment.model_validate(config), tmp_path / "run", Progress()).run_stage("train")


def test_a_training_without_an_architecture_asks_for_a_search(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"arch\.json does not exist yet: run 'hwnas search'"):
        Pipeline(experiment(tmp_path, arch=None), tmp_path / "run", Progress()).run_stage("train")


# the document of a result


def test_a_result_without_its_metric_is_refused() -> None:
    common = {
        "architecture_sha256": "0",
        "weights": "scratch",
        "steps": 1,
        "seed": 0,
        "test_images": 5,
        "class_names": ["a"],
    }
    classified = {"task": "classify", "metric": "accuracy", "metrics": {"top5": 0.5}}
    with pytest.raises(
        DocumentError,
        match="metrics does not contain 'accuracy', the metric of the task: train again",
    ):
        TrainResult.parse(json.dumps({"schema": "hwnas.train/2", **common, **classified}))


def test_results_of_earlier_versions_are_read() -> None:
    """Version 1 had different keys for each task."""
    common = {
        "schema": "hwnas.train/1",
        "architecture_sha256": "0",
        "weights": "scratch",
        "steps": 1,
        "seed": 0,
        "test_images": 5,
    }
    classified = TrainResult.parse(
        json.dumps({**common, "class_names": ["a", "b"], "test_accuracy": 0.5})
    )
    assert (classified.task, classified.metric, classified.metrics, classified.guess) == (
        "classify",
        "accuracy",
        {"accuracy": 0.5},
        0.5,
    )
    assert (
        classified.quality == "50.00% of 5 test images right"
        and TrainResult.parse(classified.to_json()) == classified
    )
    numbers = dict.fromkeys(NUMBERS, 0.25) | {"APs": None}
    coco = {**numbers, "AP_per_class": {"a": 0.25}}
    detected = TrainResult.parse(json.dumps({**common, "class_names": ["a"], "test_coco": coco}))
    assert (detected.task, detected.metric, detected.metrics, detected.per_class) == (
        "detect",
        "AP",
        numbers,
        {"a": 0.25},
    )
    assert detected.quality == "AP 25.0%, AP50 25.0% on 5 test images"
    with pytest.raises(DocumentError, match="has neither: train again"):
        TrainResult.parse(json.dumps({**common, "class_names": ["a"]}))
    with pytest.raises(DocumentError, match="AP50"):
        TrainResult.parse(
            json.dumps({**common, "class_names": ["a"], "test_coco": {**coco, "AP50": None}})
        )
    with pytest.raises(DocumentError, match=r"is not a hwnas\.train/1 document"):
        TrainResult.parse(json.dumps({**common, "class_names": 3, "test_accuracy": 0.5}))
