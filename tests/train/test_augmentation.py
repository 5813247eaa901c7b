"""A training with every augmentation of ``train.augmentation``."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from hwnas.document import file_sha256
from hwnas.train.result import TrainResult
from tests.commands import Command, run
from tests.conftest import write_tiny

SETTINGS = (
    "train.arch=0 0 0",
    "train.epochs=1",
    "train.batch_size=64",
    "train.augmentation.auto=rand-m5-mstd0.5",
    "train.augmentation.erasing=0.3",
    "train.augmentation.mixup=0.2",
    "train.augmentation.cutmix=1.0",
    "train.augmentation.cutout=3",
    "train.augmentation.repeats=2",
    "train.loss=bce",
    "train.progressive={start=0.5, stages=2}",
    'train.optimizer.schedule={kind="cosine", final=0.05, cycles=2}',
)


@pytest.mark.slow
def test_a_killed_and_resumed_training_ends_the_same(tmp_path: Path) -> None:
    config = write_tiny(tmp_path)
    options = [argument for setting in SETTINGS for argument in ("-s", setting)]
    arguments = {
        name: ["train", str(config), "--out", str(tmp_path / name), "-q", *options]
        for name in ("straight", "killed")
    }
    run(arguments["straight"])
    log = tmp_path / "killed" / "train" / "metrics.jsonl"
    killed = Command(arguments["killed"])
    status = killed.kill_once(lambda: log.exists() and log.read_bytes().count(b"\n") >= 5)
    assert status == -signal.SIGKILL, "the training was over before it could be killed"
    run(arguments["killed"])
    for name in ("model.safetensors", "train.json", "metrics.jsonl"):
        folders = (tmp_path / folder / "train" / name for folder in ("straight", "killed"))
        assert len({file_sha256(path) for path in folders}) == 1, name


@pytest.mark.slow
def test_a_network_learns_from_mixed_images(tmp_path: Path) -> None:
    config = write_tiny(tmp_path)
    settings = ("train.arch=0 0 0", "train.epochs=6", "train.augmentation.mixup=0.2")
    options = [argument for setting in settings for argument in ("-s", setting)]
    run(["train", str(config), "--out", str(tmp_path / "run"), "-q", *options])
    accuracy = TrainResult.load(tmp_path / "run" / "train" / "train.json").metrics["accuracy"]
    assert accuracy is not None and accuracy > 0.8
