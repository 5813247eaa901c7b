"""Searches for detectors: their quality, training by every kind of method, and the
whole pipeline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.config import Experiment, load_experiment
from hwnas.core.arch import Architecture
from hwnas.core.cost import latency_ms
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.core.ssdlite import SSDLiteSpec
from hwnas.core.table import LatencyTable
from hwnas.data.coco import CocoImages
from hwnas.data.images import load_images
from hwnas.devices.device import Device
from hwnas.errors import ConfigError, DataError, SpaceError, UserError
from hwnas.experiments import experiment_space
from hwnas.export.bundle import Bundle
from hwnas.nn.bn import recalibrate
from hwnas.nn.checkpoint import load_network
from hwnas.nn.detector import DetectionNetwork
from hwnas.nn.supernet import MacroSupernet
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.search.evaluator import SupernetEvaluator
from hwnas.search.proposal import one_hot
from hwnas.search.result import SearchResult
from hwnas.search.searching import prepare
from hwnas.search.settings import search_context
from hwnas.tasks.boxes import DetectionCriterion, average_precision, detect
from hwnas.testing import synthetic_table
from tests.train.rectangles import write_rectangles

torch.set_num_threads(1)
OPTIONS = ("ir_k3_e3", "ir_k5_e3", "ir_k3_e6", "ir_k5_e6")


def space(classes: int = 2) -> MacroSpace:
    """A space with feature maps at strides 4 and 8: four open blocks, and an open width
    at each tap.
    """
    stages = (
        SpaceStage(widths=(8,), stride=2, slots=(("cn_k3",),)),
        SpaceStage(widths=(16, 24), stride=2, slots=(OPTIONS, (*OPTIONS, "skip"))),
        SpaceStage(widths=(24, 32), stride=2, slots=(OPTIONS, (*OPTIONS, "skip"))),
        SpaceStage(widths=(48,), slots=(("cn_k1",),)),
    )
    return MacroSpace(name="rectangles", resolution=48, classes=classes, stages=stages)


def content(folder: Path, **search: Any) -> dict[str, Any]:
    """The settings of an experiment, after writing its data, space and device to
    ``folder``.
    """
    write_rectangles(folder / "data")
    space().save(folder / "space.json")
    Device(id="simulated", soc="formula", connection="simulated").save(folder / "device.json")
    return {
        "name": "rectangles",
        "task": "detect",
        "space": {"name": str(folder / "space.json")},
        "device": {"name": str(folder / "device.json")},
        "data": {
            "name": "coco",
            "path": str(folder / "data"),
            "resolution": 48,
            "classes": 2,
            "held_out": 0.25,
            "augment": "ssdlite",
        },
        "detector": {"extras": [32, 16]},
        "profile": {"rounds": 3, "max_rounds": 3, "fit_networks": 4, "test_networks": 4},
        "search": {
            "target_range": 0.4,
            "strategy": {"name": "tunas", "rl_lr": 0.05},
            "epochs": 2,
            "batch_size": 6,
            "candidates": 2,
            "random_samples": 1,
            "recalibration_images": 12,
            "optimizer": {"name": "adamw", "lr": 0.05, "weight_decay": 0.01, "warmup": 0.1},
            **search,
        },
        "train": {
            "weights": "supernet",
            "epochs": 2,
            "batch_size": 6,
            "optimizer": {"name": "adamw", "lr": 0.05},
        },
    }


def experiment(folder: Path, **search: Any) -> Experiment:
    return Experiment.model_validate(content(folder, **search))


def toml(folder: Path, **search: Any) -> Path:
    """Write the experiment to a TOML file."""

    def written(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key} = {written(item)}" for key, item in value.items()) + "}"
        return (
            "[" + ", ".join(map(written, value)) + "]"
            if isinstance(value, list)
            else str(value)
            if not isinstance(value, str)
            else f'"{value}"'
        )

    path = folder / "rectangles.toml"
    path.write_text(
        "\n".join(f"{key} = {written(value)}" for key, value in content(folder, **search).items())
    )
    return path


def evaluator_of(config: Experiment) -> tuple[SupernetEvaluator, MacroSupernet]:
    supernet = MacroSupernet(experiment_space(config), torch.Generator().manual_seed(0))
    return SupernetEvaluator(supernet, config), supernet


@pytest.mark.slow
def test_the_whole_pipeline_meets_the_budget(tmp_path: Path) -> None:
    """Profile, search, train from the super-net's weights, export, validate, report: on
    a simulated device.
    """
    run = tmp_path / "run"
    Pipeline(load_experiment(toml(tmp_path)), run, Progress()).run()
    result, table = (
        SearchResult.load(run / "search" / "search.json"),
        LatencyTable.load(run / "profile" / "table.json"),
    )
    arch = Architecture.load(run / "search" / "arch.json")
    assert abs(latency_ms(arch, table) / result.target - 1) <= 0.02
    assert (
        result.metric == "AP"
        and arch.detector is not None
        and arch.detector.heads[0].key in table.entries
    )
    assert (
        table.calibration is not None
        and table.calibration.held_out is not None
        and table.calibration.held_out.mape < 0.03
    )
    network = load_network(run / "train" / "model.safetensors")
    assert isinstance(network, DetectionNetwork) and (
        network.arch.blocks,
        network.arch.detector,
    ) == (arch.blocks, arch.detector)
    text = (run / "report" / "report.html").read_text()
    assert "AP is that of the shared weights" in text and "extra 0" in text and "head 3" in text
    bundle = Bundle.load(run / "export" / "bundle.json")
    assert bundle.architecture == network.arch and {file.format for file in bundle.files} >= {
        "tflite-int8-tasks",
        "onnx-nms",
    }
    assert (run / "validate" / "verdict.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        "tunas",
        "proxylessnas",
        "fbnet",
        "darts",
        "pdarts",
        "spos",
        "fairnas",
        "random",
        "progressive_shrinking",
    ],
)
def test_every_method_trains_detectors(strategy: str, tmp_path: Path) -> None:
    config = experiment(tmp_path, strategy=strategy, batch_size=8, epochs=1)
    detector_space = experiment_space(config)
    search = search_context(config, detector_space, _tabled(config, tmp_path))
    prepared = prepare(config, detector_space, search, tmp_path)
    before = {name: tensor.clone() for name, tensor in prepared.engine.model.named_parameters()}
    metrics: dict[str, float] = {}
    for number in range(2):
        prepared.engine.step = number
        metrics |= prepared.step(number)
    assert metrics["loss"] > 0 and all(np.isfinite(value) for value in metrics.values())
    assert {"class_loss", "box_loss"} <= metrics.keys()
    moved = [
        name
        for name, tensor in prepared.engine.model.named_parameters()
        if not torch.equal(tensor, before[name])
    ]
    assert any("heads" in name for name in moved) and any(
        "slots" in name or "blocks" in name for name in moved
    )


def _tabled(config: Experiment, folder: Path) -> LatencyTable:
    table = synthetic_table(experiment_space(config))
    table.save(folder / "table.json")
    return table


# quality


def test_a_batch_is_scored_by_its_loss(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    detector_space = experiment_space(config)
    prepared = prepare(
        config,
        detector_space,
        search_context(config, detector_space, _tabled(config, tmp_path)),
        tmp_path,
    )
    weights: Any = prepared.engine.extra["teacher"]
    gates = one_hot(detector_space.sample(np.random.default_rng(0)), detector_space)
    (batch_quality,) = weights.qualities([gates], 1)
    x_NCHW, y = weights.batches.held_out(0, 1)
    with torch.no_grad():
        loss, _ = DetectionCriterion(
            detector_space.decode(detector_space.at([0] * len(detector_space.choices)))
        )(weights.supernet.eval()(x_NCHW, gates), y)
    assert (
        batch_quality == pytest.approx(1 / (1 + float(loss)), rel=1e-5)
        and 0.05 < batch_quality < 0.5
    )


@pytest.mark.parametrize("quality", ["metric", "loss"])
def test_evaluations_are_those_of_the_recalibrated_network(quality: str, tmp_path: Path) -> None:
    config = experiment(tmp_path, quality=quality, evaluation_images=4)
    evaluator, supernet = evaluator_of(config)
    picks = supernet.space.sample(np.random.default_rng(1))
    train, held_out = load_images(config.data, "train"), load_images(config.data, "held_out")
    assert isinstance(held_out, CocoImages) and len(held_out) == 6
    network = supernet.extract(picks)
    assert isinstance(network, DetectionNetwork)
    recalibrate(network, (x for x, _ in evaluator._batches(train, 6, 12)))
    for limit, evaluated in (
        (4, evaluator.evaluate(picks)),
        (None, evaluator.on_all_images(evaluator.network(picks))),
    ):
        if quality == "metric":
            expected = average_precision(
                held_out,
                detect(
                    network, held_out, config.detector.post_processing, batch_size=8, limit=limit
                ),
            ).AP
        else:
            batches = list(evaluator._batches(held_out, 24, limit))
            with torch.no_grad():
                loss, _ = DetectionCriterion(network.arch)(
                    network.eval()(batches[0][0]), batches[0][1]
                )
            expected = 1 / (1 + float(loss))
        assert evaluated == pytest.approx(expected, abs=1e-6)
    assert evaluator.quality.metric == ("AP" if quality == "metric" else "1 / (1 + loss)")


# initial weights


def test_the_backbone_starts_from_a_classification_super_net(tmp_path: Path) -> None:
    config = experiment(tmp_path, backbone=str(tmp_path / "classified"), epochs=0.01)
    source = MacroSupernet(space(), torch.Generator().manual_seed(7))
    (tmp_path / "classified" / "search").mkdir(parents=True)
    source.save(tmp_path / "classified" / "search" / "shared.safetensors")
    messages: list[str] = []

    class Lines(Progress):
        def info(self, message: str) -> None:
            messages.append(message)

    _tabled(config, tmp_path)
    config = config.model_copy(
        update={"search": config.search.model_copy(update={"table": str(tmp_path / "table.json")})}
    )
    Pipeline(config, tmp_path / "run", Lines()).run_stage("search")
    assert "5 of 5 slots have inherited weights" in messages


# refusals


def refused(config: Experiment, folder: Path, stage: str, error: type[UserError]) -> str:
    with pytest.raises(error) as caught:
        Pipeline(config, folder / "run", Progress()).run_stage(stage)
    assert "\n" not in str(caught.value) and not (folder / "run" / stage).exists()
    return str(caught.value)


def changed(config: Experiment, section: str, **changes: Any) -> Experiment:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})


def test_spaces_that_cannot_have_detectors_are_refused(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    several = MacroSpace.model_validate({**space().model_dump(), "resolutions": (32, 48)})
    several.save(tmp_path / "several.json")
    assert "has several input resolutions (32, 48)" in refused(
        changed(config, "space", name=str(tmp_path / "several.json")),
        tmp_path,
        "search",
        SpaceError,
    )
    flat = MacroSpace(
        name="flat",
        resolution=48,
        classes=2,
        stages=(SpaceStage(widths=(8,), slots=(("cn_k3", "cn_k5"),)),),
    )
    flat.save(tmp_path / "flat.json")
    assert "needs feature maps at two resolutions" in refused(
        changed(config, "space", name=str(tmp_path / "flat.json")), tmp_path, "search", SpaceError
    )
    detector_space = experiment_space(config)
    detector_space.save(tmp_path / "boxes.json")
    digits = Experiment.model_validate(
        {
            "space": {"name": str(tmp_path / "boxes.json")},
            "data": {"name": "digits", "resolution": 48, "classes": 2},
        }
    )
    assert "are detectors: set task = 'detect'" in refused(digits, tmp_path, "search", ConfigError)


def test_missing_files_are_reported_before_the_search(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    table = str(tmp_path / "table.json")
    _tabled(config, tmp_path)
    config = changed(config, "search", table=table)
    missing = changed(config, "search", backbone=str(tmp_path))
    assert (
        "search.backbone = " in (message := refused(missing, tmp_path, "search", ConfigError))
        and "has no shared.safetensors" in message
    )
    (tmp_path / "data" / "annotations" / "instances_train.json").unlink()
    with pytest.raises(DataError, match=r"has no annotations/instances_train2017\.json"):
        Pipeline(config, tmp_path / "run", Progress()).run_stage("search")


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"backbone": "a", "weights": "b"}, r"search\.backbone and search\.weights both set"),
        ({"supernet": {"dropout": 0.1}}, r"search\.supernet\.dropout is before the classifier"),
        ({"quality": "AP"}, r"search\.quality = 'AP'"),
    ],
)
def test_contradictory_settings_are_refused(
    search: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment(toml(tmp_path, **search))


def test_a_space_with_its_own_detector_keeps_it(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    space().with_detector(SSDLiteSpec(extras=(24,))).save(tmp_path / "own.json")
    own = experiment_space(changed(config, "space", name=str(tmp_path / "own.json")))
    assert own.detector is not None and own.detector.extras == (24,)


def test_the_shipped_example_has_a_space_of_detectors() -> None:
    config = load_experiment("configs/experiments/raccoon-search.toml")
    detector_space = experiment_space(config)
    assert (
        detector_space.detector is not None
        and detector_space.detector.extras == config.detector.extras
        and detector_space.size > 1e6
    )
