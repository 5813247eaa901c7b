"""What a detector learns from 160 photographs, compared with untrained baselines.

HWNAS_TEST_DATA=../shared/data pytest tests/benchmarks/test_detection.py --benchmark-only -s

AP on the 40 validation images of the raccoon data, side by side: always the mean box of
the training images, with score 1; the network of configs/experiments/raccoon.toml as
initialised; trained from scratch; and trained from a backbone that has seen CIFAR-10
(``CIFAR_EPOCHS`` epochs). And AP on the 128 images of coco128, 71 classes, after
training on the same images: an error in anchors, matching, losses or boxes would keep a
detector from overfitting.

Runs are kept in ``$HWNAS_DETECTION`` (default runs/detection), so a stopped benchmark
resumes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.config import load_experiment
from hwnas.data.coco import CocoImages
from hwnas.data.coco_eval import CocoMetrics
from hwnas.data.images import load_images
from hwnas.experiments import experiment_space
from hwnas.networks import architecture
from hwnas.nn.detector import DetectionNetwork
from hwnas.nn.post_processor import Detections
from hwnas.tasks.boxes import average_precision, detect
from hwnas.train.result import TrainResult

CONFIG, CLASSIFIER = "configs/experiments/raccoon.toml", "configs/experiments/methods-cifar10.toml"
CIFAR_EPOCHS = 5
OVERFIT = "configs/experiments/coco128.toml"


def root() -> Path:
    return Path(os.environ.get("HWNAS_DETECTION", "runs/detection")).absolute()


def train(config: str, *settings: str, out: Path) -> float:
    """The seconds that ``hwnas train`` took, or 0 if it had been done before."""
    done, started = (out / "train" / "train.json").exists(), time.monotonic()
    options = [argument for setting in settings for argument in ("-s", setting)]
    command = [sys.executable, "-m", "hwnas", "train", config, *options, "--out", str(out), "-q"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return 0.0 if done else time.monotonic() - started


@pytest.fixture(scope="module")
def data() -> Path:
    if "HWNAS_TEST_DATA" not in os.environ:
        pytest.skip("needs the raccoon and CIFAR-10 data: set HWNAS_TEST_DATA")
    folder = root() / "data"
    unpack = [sys.executable, str(Path(os.environ["HWNAS_TEST_DATA"], "unpack.py")), str(folder)]
    subprocess.run([*unpack, "raccoon", "cifar10", "coco128"], check=True)
    return folder


def constant_box(train: CocoImages, test: CocoImages) -> CocoMetrics:
    """The metrics of predicting the mean box, as fractions of the image, everywhere."""
    annotations = train.annotations
    relative = []
    for index, image in enumerate(train.chosen):
        x_y_w_h = annotations.boxes[annotations.objects(image)]
        relative.append(
            np.hstack([x_y_w_h[:, :2], x_y_w_h[:, :2] + x_y_w_h[:, 2:]])
            / np.tile(train.sizes[index], 2)
        )
    box = torch.from_numpy(test.resolution * np.concatenate(relative).mean(axis=0, keepdims=True))
    always = Detections(box, torch.ones(1), torch.zeros(1, dtype=torch.int64))
    return average_precision(test, dict.fromkeys(range(len(test)), always))


def coco_numbers(path: Path) -> CocoMetrics:
    """COCO's metrics in the result of a training."""
    result = TrainResult.load(path)
    return CocoMetrics.model_validate({**result.metrics, "AP_per_class": result.per_class})


def test_raccoons_are_learned(benchmark: Any, data: Path) -> None:
    settings = [f"data.path={data / 'raccoon'}"]
    experiment = load_experiment(CONFIG, settings)
    images, test = load_images(experiment.data, "all"), load_images(experiment.data, "test")
    assert isinstance(images, CocoImages) and isinstance(test, CocoImages)
    untrained = DetectionNetwork(
        architecture(experiment, experiment_space(experiment), root()),
        generator=torch.Generator().manual_seed(experiment.seed),
    )
    cifar = [
        f"data.path={data / 'cifar10'}",
        f"train.arch={experiment.train.arch}",
        f"train.epochs={CIFAR_EPOCHS}",
    ]
    seconds = {
        "scratch": benchmark.pedantic(
            train,
            args=(CONFIG, *settings),
            kwargs={"out": root() / "scratch"},
            rounds=1,
            iterations=1,
        ),
        "cifar": train(CLASSIFIER, *cifar, out=root() / "cifar"),
        "backbone": train(
            CONFIG, *settings, f"train.backbone={root() / 'cifar'}", out=root() / "backbone"
        ),
    }
    rows: dict[str, CocoMetrics] = {
        "always the mean box": constant_box(images, test),
        "network, not trained": average_precision(
            test, detect(untrained, test, experiment.detector.post_processing, batch_size=16)
        ),
        "trained from scratch": coco_numbers(root() / "scratch/train/train.json"),
        "trained, backbone from CIFAR-10": coco_numbers(root() / "backbone/train/train.json"),
    }
    classifier = TrainResult.load(root() / "cifar/train/train.json")
    print(
        f"\nseconds: {', '.join(f'{name} {value:.0f}' for name, value in seconds.items())};"
        f" CIFAR-10: {classifier.quality}"
    )
    for name, metrics in rows.items():
        print(
            f"  {name:32} AP {metrics.AP:6.1%}   AP50 {metrics.AP50:6.1%}   AP75"
            f" {metrics.AP75:6.1%}"
        )
    box, untrained_ap, scratch, backbone = rows.values()
    assert untrained_ap.AP50 < 0.1
    assert min(scratch.AP, backbone.AP) > 1.5 * box.AP and backbone.AP50 > box.AP50 + 0.1


def test_coco128_is_overfitted(benchmark: Any, data: Path) -> None:
    folder = root() / "overfit"
    for name, source in (("train2017", "train2017"), ("val2017", "train2017")):
        shutil.copytree(data / "coco128" / source, folder / name, dirs_exist_ok=True)
        (folder / "annotations").mkdir(exist_ok=True)
        shutil.copy(
            data / "coco128/annotations/instances_train2017.json",
            folder / f"annotations/instances_{name}.json",
        )
    out = root() / "coco128"
    seconds = benchmark.pedantic(
        train, args=(OVERFIT, f"data.path={folder}"), kwargs={"out": out}, rounds=1, iterations=1
    )
    metrics = coco_numbers(out / "train/train.json")
    print(f"\nseconds: {seconds:.0f}")
    sizes = f"small {metrics.APs:.1%}, medium {metrics.APm:.1%}, large {metrics.APl:.1%}"
    print(f"  AP {metrics.AP:.1%}   AP50 {metrics.AP50:.1%}   AP of objects that are {sizes}")
    assert metrics.AP50 >= 0.5
