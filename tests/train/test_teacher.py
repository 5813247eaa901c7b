"""Distillation: a network learns what another one says of the images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.errors import ConfigError
from hwnas.nn.checkpoint import load_network, save_network
from hwnas.nn.network import Network, network_of
from hwnas.runs import JsonLines
from hwnas.train.teacher import Teacher
from tests.commands import run
from tests.conftest import digits_space, write_tiny
from tests.train.rectangles import settings

torch.set_num_threads(1)


def teacher(path: Path, classes: int = 10) -> Network:
    space = digits_space().model_copy(update={"classes": classes})
    arch: Architecture = space.decode(space.at([0, 0, 0]))
    network = network_of(arch, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        # sure of what it says, whatever that is
        network.blocks[-1].get_parameter("linear.weight").mul_(300)
    save_network(network, path)
    return network.eval()


def test_probabilities_are_the_networks_at_its_own_resolution(tmp_path: Path) -> None:
    network = teacher(tmp_path / "teacher.safetensors")
    x_NCHW = torch.randn(4, 1, 16, 16)
    found = Teacher(str(tmp_path / "teacher.safetensors"), 10, 1).probabilities(x_NCHW)
    smaller = F.interpolate(x_NCHW, size=(8, 8), mode="bilinear", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(found, network(smaller).softmax(1))
    assert not found.requires_grad


@pytest.mark.slow
def test_a_student_learns_from_its_teacher(tmp_path: Path) -> None:
    """A teacher that is wrong about every image is followed further than the labels are."""
    network = teacher(tmp_path / "teacher.safetensors")
    config = write_tiny(tmp_path)
    agreements = {}
    for name, taught in (("alone", ()), ("taught", ("train.teacher=teacher.safetensors",))):
        chosen = ("train.arch=0 0 0", "train.epochs=4", *taught)
        options = [argument for setting in chosen for argument in ("-s", setting)]
        run(["train", str(config), "--out", str(tmp_path / name), "-q", *options], cwd=tmp_path)
        student = load_network(tmp_path / name / "train" / "model.safetensors").eval()
        x_NCHW = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            same = student(x_NCHW).argmax(1) == network(x_NCHW).argmax(1)
        agreements[name] = float(same.float().mean())
    assert agreements["taught"] > agreements["alone"] + 0.15
    rows = JsonLines(tmp_path / "taught" / "train" / "metrics.jsonl").read()
    assert rows[0]["loss"] > 4.0  # two cross-entropies of ten classes


@pytest.mark.parametrize("classes", [7, 12])
def test_a_teacher_of_other_classes_is_refused(classes: int, tmp_path: Path) -> None:
    teacher(tmp_path / "model.safetensors", classes)
    with pytest.raises(ConfigError, match=f"for {classes} classes and 1 channels, but the data"):
        Teacher(str(tmp_path), 10, 1)


def test_an_absent_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.teacher = .* has no model\.safetensors"):
        Teacher(str(tmp_path), 10, 1)


def test_a_detector_has_no_teacher(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.teacher teaches classifiers"):
        Experiment.model_validate(settings(tmp_path, teacher="x"))
