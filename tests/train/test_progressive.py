"""Progressive resizing: the size of the images in every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hwnas.config import Experiment, ProgressiveConfig
from hwnas.core.arch import Architecture
from hwnas.core.spaces import load_space, published
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.runs import StageContext
from hwnas.train.progressive import Progression, progression_of, total_stride
from hwnas.train.training import TrainingRun, begin
from tests.conftest import digits_space
from tests.train.rectangles import settings

torch.set_num_threads(1)


def architecture(resolution: int = 32) -> Architecture:
    space = digits_space().model_copy(update={"resolution": resolution})
    return space.decode(space.at([0, 0, 0]))


def run_of(folder: Path, **train: Any) -> TrainingRun:
    data = {"name": "digits", "resolution": 32, "channels": 1, "augment": "none"}
    train = {"epochs": 0.05, "batch_size": 16, "validate_every": 0, **train}
    experiment = Experiment.model_validate({"data": data, "train": train})
    return begin(StageContext(experiment, folder, folder), architecture())


@pytest.mark.parametrize(
    ("name", "start", "stages", "sizes"),
    [
        # 128 + (300 - 128) i / 3 = 128, 185.3, 242.7, 300 in the paper, here multiples of 32
        ("mobilenet_v2@300", 128 / 300, 4, (128, 192, 256, 300)),
        ("mobilenet_v2@224", 0.5, 4, (128, 160, 192, 224)),
        ("mobilenet_v3_large@224", 0.55, 2, (128, 224)),
        ("mobilenet_v2@96", 0.1, 3, (32, 64, 96)),
    ],
)
def test_sizes_rise_evenly_to_the_full_one(
    name: str, start: float, stages: int, sizes: tuple[int, ...]
) -> None:
    base, _, resolution = name.partition("@")
    arch = published(base, resolution=int(resolution))
    assert total_stride(arch) == 32
    found = progression_of(ProgressiveConfig(start=start, stages=stages), arch, 100)
    assert found.sizes == sizes


def test_stages_have_equal_lengths() -> None:
    progression = Progression((8, 16, 24, 32), 10)
    sizes = [progression.size(step) for step in range(10)]
    assert sizes == [8, 8, 8, 16, 16, 24, 24, 24, 32, 32]
    assert progression.begins == (0, 3, 5, 8)
    # fewer steps than stages
    assert [Progression((8, 16, 24, 32), 2).size(step) for step in range(2)] == [8, 24]
    assert Progression((8, 16, 24, 32), 2).begins == (0, 1)


@pytest.mark.parametrize("name", ["darts", "nasbench201"])
def test_networks_of_cells_run_at_every_size(name: str) -> None:
    """Also those with a node that nothing leads to."""
    space = load_space(name)
    arch = space.decode(space.at([0] * len(space.choices)))
    assert any(step.kind == "zero" for step in arch.graph)
    network = ClassificationNetwork(arch).eval()
    assert total_stride(arch) == 4
    for size in progression_of(ProgressiveConfig(start=0.1, stages=3), arch, 9).sizes:
        with torch.no_grad():
            assert network(torch.zeros(1, 3, size, size)).shape == (1, arch.classes)


def test_a_step_trains_on_images_of_its_size(tmp_path: Path) -> None:
    training = run_of(tmp_path, progressive={"start": 0.5, "stages": 2})
    plain = run_of(tmp_path / "plain")
    seen: list[torch.Tensor] = []
    for run in (training, plain):
        run.engine.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    steps = training.engine.steps
    for run in (training, plain):
        for number in range(steps):
            run.engine.step = number
            run.step(number)
    resized, full = seen[:steps], seen[steps:]
    half = (steps + 1) // 2
    assert [x_NCHW.shape[-1] for x_NCHW in resized] == [16] * half + [32] * (steps - half)
    smaller = F.interpolate(full[0], size=16, mode="bilinear", antialias=True)
    torch.testing.assert_close(resized[0], smaller)
    assert torch.equal(resized[-1], full[-1])


def test_a_training_without_it_is_as_before(tmp_path: Path) -> None:
    assert run_of(tmp_path).progression is None
    content = Experiment.model_validate({"train": {"progressive": {"start": 1.0}}}).model_dump()
    assert "progressive" not in content["train"]


def test_a_detector_has_one_resolution(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.progressive\.start = 0\.5 is for classifiers"):
        Experiment.model_validate(settings(tmp_path, progressive={"start": 0.5}))
