"""The losses of classifiers that ``train.loss`` names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target

from hwnas.config import AugmentationConfig, Experiment
from hwnas.data.training_augmentation import Mixing
from hwnas.engine import BinaryCrossEntropy, CrossEntropy
from hwnas.runs import StageContext
from hwnas.train.training import begin
from tests.conftest import digits_space
from tests.train.rectangles import settings

torch.set_num_threads(1)


def of_digits(**train: object) -> Experiment:
    data = {"name": "digits", "resolution": 8, "channels": 1}
    return Experiment.model_validate({"data": data, "train": {"batch_size": 16, **train}})


def test_the_binary_loss_by_hand() -> None:
    """-t log sigmoid(x) - (1 - t) log sigmoid(-x), with t = 1 - s + s / K for the label and
    s / K for the K - 1 other classes, averaged over images and classes.
    """
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 3, 0, 0])
    found, logged = BinaryCrossEntropy(0.2)(logits, y)
    target = 0.8 * F.one_hot(y, 4) + 0.2 / 4
    expected = -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).mean()
    torch.testing.assert_close(found, expected)
    accuracy = (logits.argmax(1) == y).float().mean()
    torch.testing.assert_close(logged["train_accuracy"], accuracy)


def test_mixed_targets_are_taken_as_they_are() -> None:
    x_NCHW, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 2])
    _, targets_NK = Mixing(AugmentationConfig(mixup=1.0), 3, 0.1)(x_NCHW, y, seed=3)
    logits = torch.randn(4, 3)
    found, logged = BinaryCrossEntropy(0.1)(logits, targets_NK)
    expected = F.binary_cross_entropy_with_logits(logits, targets_NK)
    torch.testing.assert_close(found, expected)
    right = (logits.argmax(1) == targets_NK.argmax(1)).float().mean()
    torch.testing.assert_close(logged["train_accuracy"], right)


def test_mixed_and_plain_targets_are_smoothed_alike() -> None:
    """A batch that timm mixes with a share of 1 has the loss of its labels."""
    logits, y = torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    targets_NK = mixup_target(y, num_classes=5, lam=1.0, smoothing=0.3)
    criterion = BinaryCrossEntropy(0.3)
    torch.testing.assert_close(criterion(logits, y)[0], criterion(logits, targets_NK)[0])


def test_smoothed_targets_keep_their_precision() -> None:
    """0.1 / 1000 and 0.9 + 0.1 / 1000 are not numbers of bfloat16."""
    logits = torch.zeros(1, 1000, dtype=torch.bfloat16)
    logits[0, 3] = 8.0
    y = torch.tensor([3])
    found, _ = BinaryCrossEntropy(0.1)(logits, y)
    torch.testing.assert_close(found, BinaryCrossEntropy(0.1)(logits.float(), y)[0])


@pytest.mark.parametrize(
    ("loss", "kind"), [("bce", BinaryCrossEntropy), ("cross_entropy", CrossEntropy)]
)
def test_a_training_minimises_the_named_loss(loss: str, kind: type, tmp_path: Path) -> None:
    space = digits_space()
    experiment = of_digits(loss=loss, label_smoothing=0.25, epochs=0.1)
    training = begin(
        StageContext(experiment, tmp_path, tmp_path), space.decode(space.at([0, 0, 0]))
    )
    criterion = training.engine.criterion
    assert isinstance(criterion, kind)
    logits, y = torch.randn(4, 10), torch.arange(4)
    torch.testing.assert_close(criterion(logits, y)[0], kind(0.25)(logits, y)[0])
    assert training.step(0)["loss"] > 0


def test_the_default_is_not_part_of_a_document() -> None:
    assert "loss" not in of_digits(loss="cross_entropy").model_dump()["train"]
    assert of_digits(loss="bce").model_dump()["train"]["loss"] == "bce"


def test_a_detector_has_a_loss_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.loss = 'bce' is for image labels.*'detect' has"):
        Experiment.model_validate(settings(tmp_path, loss="bce"))
