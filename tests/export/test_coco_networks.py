"""The detectors in configs/experiments: two training steps on made-up data, all files,
and their validation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.config import FORMATS, NMS_FORMATS, Experiment, load_experiment
from hwnas.devices.device import HOST, connect
from hwnas.export.bundle import Bundle
from hwnas.export.target import target
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.tasks.boxes import parity
from hwnas.verdict import Verdict
from tests.data.scenes import write_coco

torch.set_num_threads(1)

CATEGORIES = [{"id": number + 1, "name": f"kind {number}"} for number in range(80)]


def write_made_up(folder: Path) -> None:
    """Write four training and two test images, bright rectangles on noise, with COCO's
    number of categories.
    """
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        drawn, objects = {}, []
        for number in range(count):
            pixels = rng.integers(60, 120, (240, 320, 3), dtype=np.uint8)
            pixels[40:160, 60:220] = rng.integers(180, 255, 3)
            drawn[f"{number}.png"] = pixels
            objects.append((number, number + 1, [60.0, 40.0, 160.0, 120.0]))
        write_coco(folder, drawn, objects, part, categories=CATEGORIES)


def truncate(name: str, folder: Path) -> Experiment:
    """The experiment on made-up data, with two training steps."""
    write_made_up(folder / "data")
    content: dict[str, Any] = load_experiment(Path("configs/experiments") / name).model_dump(
        mode="json", by_alias=True, exclude_unset=True
    )
    content["data"] |= {"path": str(folder / "data"), "workers": 0}
    # The running statistics have only two steps to adapt: with those of a new network,
    # int8 outputs are nothing but noise.
    content["train"] |= {"epochs": 1, "batch_size": 2, "bn_momentum": 0.5}
    content["train"]["optimizer"] |= {"lr": 1e-3}
    content |= {"export": {"calibration_images": 3, "parity_images": 2}, "checkpoint_seconds": 1e9}
    content["validate"] = {"rounds": 1, "max_spread": 100.0}
    return Experiment.model_validate(content)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "validated"), [("coco128.toml", True), ("coco.toml", False)])
def test_every_file_is_exported_and_agrees(name: str, validated: bool, tmp_path: Path) -> None:
    """int8 files are compared with the float file, and only without NMS: after two
    training steps, no class is much likelier than another.
    """
    experiment, root = truncate(name, tmp_path), tmp_path / "run"
    pipeline = Pipeline(experiment, root, Progress())
    for stage in ("train", "export"):
        pipeline.run_stage(stage)
    bundle = Bundle.load(root / "export" / "bundle.json")
    assert {file.format for file in bundle.files} == {*FORMATS, *NMS_FORMATS}
    assert min(file.size_bytes for file in bundle.files) > 256 * 1024
    settings, resolution = experiment.detector.post_processing, bundle.preprocessing.resolution
    with np.load(root / "export" / "parity.npz") as arrays:
        images, rows = arrays["images"], arrays["rows"]
    host = connect(HOST)
    float_rows = host.predict(root / "export" / "model-fp32.tflite", images, tmp_path).reshape(
        rows.shape
    )
    for file in bundle.files:
        if file.dtype == "fp32":
            assert file.parity.relative_error < 1e-4 and file.parity.agreement == 1.0, file
        elif target(file.format).graph == "decoded":
            outputs = host.predict(root / "export" / file.name, images, tmp_path)
            assert (
                parity(
                    target(file.format).graph, outputs, float_rows, settings, resolution
                ).relative_error
                < 0.1
            ), file
    if validated:
        pipeline.run_stage("validate")
        verdict = Verdict.load(root / "validate" / "verdict.json")
        assert {file.name for file in verdict.files} == {file.name for file in bundle.files}
    assert (root / "export" / "labels.txt").read_text().splitlines() == list(bundle.labels)
