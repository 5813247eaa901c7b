"""Trainings with mosaics, which end before the training does."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from hwnas.config import Experiment
from hwnas.data.images import load_images, training_batches
from hwnas.data.mosaic import Mosaic
from hwnas.document import file_sha256
from hwnas.train.stage import outputs
from hwnas.train.training import _batches
from tests.commands import Command, run
from tests.train.rectangles import experiment, settings

torch.set_num_threads(1)

SEED = 0
STEPS = 6


def seen(batch: tuple[torch.Tensor, torch.Tensor]) -> list[list[float]]:
    """What makes a batch comparable."""
    x_NCHW, y = batch
    return [x_NCHW.flatten().tolist(), y.flatten().tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_last_steps_have_no_mosaics(workers: int, tmp_path: Path) -> None:
    """Wherever the training is resumed, before, at or after the border."""
    config = experiment(tmp_path, augmentation={"mosaic": 1.0, "mosaic_off": 0.3})
    data = config.data.model_copy(update={"workers": workers})
    config = config.model_copy(update={"data": data})
    plain = load_images(config.data, "all", augment=True)
    expected = []
    for step in range(STEPS):
        # 0.3 of six steps are two
        images = plain if step >= 4 else Mosaic(plain, 1.0)
        [batch] = training_batches(images, 8, seed=SEED, steps=range(step, step + 1))
        expected.append(seen(batch))
    for start in (0, 3, 4, 5):
        given = [seen(batch) for batch in _batches(plain, config, range(start, STEPS))]
        assert given == expected[start:]


@pytest.mark.parametrize(("off", "mosaics"), [(0.0, STEPS), (1.0, 0)])
def test_mosaics_in_every_step_or_in_none(off: float, mosaics: int, tmp_path: Path) -> None:
    config = experiment(tmp_path, augmentation={"mosaic": 1.0, "mosaic_off": off})
    plain = load_images(config.data, "all", augment=True)
    usual = training_batches(plain, 8, seed=SEED, steps=range(STEPS))
    given = _batches(plain, config, range(STEPS))
    differing = [seen(a) != seen(b) for a, b in zip(usual, given, strict=True)]
    assert sum(differing) == mosaics


@pytest.mark.slow
def test_a_killed_and_resumed_training_with_mosaics_ends_the_same(tmp_path: Path) -> None:
    """SIGKILL in the middle of the mosaics, and then the same command again."""
    mosaic = {"mosaic": 0.7, "mosaic_off": 0.3}
    config = settings(tmp_path, epochs=3, ema_decay=0.9, augmentation=mosaic)
    config["data"]["augment"] = "lsj"
    config["checkpoint_seconds"] = 0
    arguments = {}
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        arguments[name] = ["train", str(tmp_path / name), "-q"]
    run(arguments["straight"])
    log = tmp_path / "killed" / "train" / "metrics.jsonl"
    killed = Command(arguments["killed"])
    status = killed.kill_once(lambda: log.exists() and log.read_bytes().count(b"\n") >= 3)
    assert status == -signal.SIGKILL, "the training was over before it could be killed"
    run(arguments["killed"])
    for name in (*outputs(Experiment.model_validate(config)), "metrics.jsonl", "validation.jsonl"):
        folders = (tmp_path / folder / "train" / name for folder in ("straight", "killed"))
        assert len({file_sha256(path) for path in folders}) == 1, name
