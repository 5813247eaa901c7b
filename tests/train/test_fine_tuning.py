"""Training that starts from pretrained weights: what is taken, frozen and resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hwnas.config import Experiment
from hwnas.document import file_sha256
from hwnas.engine import make_optimizer
from hwnas.errors import ConfigError
from hwnas.nn.checkpoint import load_network, save_network
from hwnas.nn.freezing import Freezable
from hwnas.nn.network import network_of
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.train.result import TrainResult
from tests.commands import Command, run
from tests.train.rectangles import classifier, settings

torch.set_num_threads(1)

OF_NORMS = ("running_mean", "running_var", "norm.weight", "norm.bias")


class Lines(Progress):
    """Keeps the messages of a stage."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def info(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """The weights of a trained classifier with the blocks of the detector."""
    network = network_of(classifier(), generator=torch.Generator().manual_seed(5))
    path = tmp_path / "backbone.safetensors"
    save_network(network, path)
    return path


def fine_tuning(folder: Path, backbone: Path, **train: Any) -> dict[str, Any]:
    train = {"pretrained": str(backbone), "epochs": 2, "validate_every": 0, **train}
    return settings(folder, **train)


def trained(config: dict[str, Any], folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The weights after a training, and its messages."""
    pipeline = Pipeline(Experiment.model_validate(config), folder, lines := Lines())
    pipeline.run_stage("train")
    return load_network(folder / "train" / "model.safetensors").state_dict(), lines.said


@pytest.mark.slow
def test_a_detector_starts_from_the_backbone_of_a_classifier(
    tmp_path: Path, backbone: Path
) -> None:
    """With everything frozen, the backbone stays what it was, BN statistics included."""
    config = fine_tuning(tmp_path, backbone, freeze=0.99)
    weights, said = trained(config, tmp_path / "run")
    expected = load_network(backbone).state_dict()
    kept = [name for name in weights if name.startswith("blocks.") and name in expected]
    assert len(kept) > 40
    # round(0.99 * 6 steps) is all of them
    assert all(torch.equal(weights[name], expected[name]) for name in kept)
    assert any("layers" in line and "backbone.safetensors" in line for line in said)
    assert TrainResult.load(tmp_path / "run" / "train" / "train.json").weights == "pretrained"


@pytest.mark.slow
def test_bn_can_be_frozen_alone(tmp_path: Path, backbone: Path) -> None:
    weights, _ = trained(fine_tuning(tmp_path, backbone, freeze_bn=True), tmp_path / "run")
    expected = load_network(backbone).state_dict()
    for name, tensor in weights.items():
        if name.startswith("blocks.") and "num_batches" not in name:
            assert torch.equal(tensor, expected[name]) == name.endswith(OF_NORMS), name


@pytest.mark.slow
def test_a_killed_and_resumed_fine_tuning_ends_the_same(tmp_path: Path, backbone: Path) -> None:
    """Killed while the backbone is frozen, resumed until after it learns again."""
    config = fine_tuning(tmp_path, backbone, epochs=3, freeze=0.6, ema_decay=0.9)
    config["train"]["optimizer"]["layer_decay"] = 0.7
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
    assert status == -signal.SIGKILL
    run(arguments["killed"])
    for name in ("model.safetensors", "train.json", "metrics.jsonl"):
        folders = (tmp_path / folder / "train" / name for folder in ("straight", "killed"))
        assert len({file_sha256(path) for path in folders}) == 1, name


def test_a_frozen_backbone_gets_no_gradient_and_learns_again() -> None:
    network = network_of(classifier(), generator=torch.Generator().manual_seed(0))
    assert isinstance(network, Freezable)
    network.train()
    network.freeze(weights=True, norms=False)
    network(torch.randn(2, 3, 48, 48)).sum().backward()
    with_gradient = {name for name, weight in network.named_parameters() if weight.grad is not None}
    assert with_gradient == {"blocks.5.linear.weight", "blocks.5.linear.bias"}
    network.freeze(weights=False, norms=False)
    network.train()
    network(torch.randn(2, 3, 48, 48)).sum().backward()
    assert all(weight.grad is not None for weight in network.parameters())
    assert all(module.training for module in network.modules())


def test_blocks_learn_more_slowly_the_nearer_they_are_to_the_image(tmp_path: Path) -> None:
    network = network_of(classifier())
    train = {"optimizer": {"name": "sgd", "lr": 1.0, "layer_decay": 0.5}}
    config = Experiment.model_validate({"data": {"name": "digits"}, "train": train})
    optimizer = make_optimizer(network, config.train.optimizer, 1.0)
    scales = {}
    for group in optimizer.param_groups:
        for weight in group["params"]:
            scales[id(weight)] = group["lr_scale"]
    by_block = [{scales[id(weight)] for weight in block.parameters()} for block in network.blocks]
    assert by_block == [{0.5**5}, {0.5**4}, {0.5**3}, {0.5**2}, {0.5}, {1.0}]


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"freeze": 0.5}, "train.freeze keeps initial weights as they are, and these are random"),
        ({"freeze_bn": True}, "train.freeze_bn keeps initial weights as they are"),
        ({"pretrained_model": "fbnetc_100"}, "needs train.pretrained, which is not set"),
        ({"pretrained": "a.pth", "weights": "supernet"}, "both set the initial weights"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(train: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Experiment.model_validate({"data": {"name": "digits"}, "train": train})


def test_absent_weights_are_reported_before_anything_is_done(tmp_path: Path) -> None:
    config = fine_tuning(tmp_path, tmp_path / "absent.pth")
    pipeline = Pipeline(Experiment.model_validate(config), tmp_path / "run", Progress())
    with pytest.raises(ConfigError, match=r"absent\.pth' does not exist: check the path"):
        pipeline.run()
    assert not (tmp_path / "run").exists()
