"""Drop-path in networks of cells, as in DARTS's code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.graph import Step
from hwnas.core.spaces import load_space
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.nn.graph import edge_points
from hwnas.runs import StageContext
from hwnas.train.training import begin

torch.set_num_threads(1)


def network_of_cells() -> Architecture:
    space = load_space("darts", layers=3, classes=10, width=0.2)
    return space.decode(space.sample(np.random.default_rng(0)))


def test_the_edges_are_the_terms_of_sums_that_ops_make() -> None:
    """A stem (1), two preprocessed inputs (2, 3), an edge with an op (4), a skip connection
    of input 3, and an edge (6) beside a skip connection of node 5.
    """
    keys = ("op 0", "op 1", "op 1", "op 2", "sum 4 3", "op 3", "sum 6 5", "concat 5 7", "op 8")
    assert edge_points([Step.parse(key) for key in keys]) == {4, 6}


def test_a_preprocessed_input_is_no_edge() -> None:
    """Point 4 reads another cell's concatenation, and only a skip connection reads it."""
    keys = ("op 0", "op 1", "concat 1 2", "op 3", "op 1", "sum 4 5", "op 6")
    assert edge_points([Step.parse(key) for key in keys]) == {5}


def test_every_cell_has_eight_edges_less_its_skip_connections() -> None:
    space = load_space("darts", layers=8)
    picks = space.sample(np.random.default_rng(0))
    everything = {choice.key: "sep_conv_3x3" for choice in space.choices if choice.kind == "op"}
    assert len(edge_points(space.decode({**picks, **everything}).graph)) == 8 * 8
    skips = {key: "skip_connect" for key in everything if key.startswith("normal")}
    # skip connections that halve the image are ops
    assert len(edge_points(space.decode({**picks, **everything, **skips}).graph)) == 2 * 8


def test_images_lose_edges_in_training_only() -> None:
    network = ClassificationNetwork(network_of_cells())
    x_NCHW = torch.randn(8, 3, 32, 32)
    network.drop_path = 0.5
    assert torch.equal(network.eval()(x_NCHW), network(x_NCHW))
    network.train()
    torch.manual_seed(0)
    first = network(x_NCHW)
    torch.manual_seed(0)
    assert torch.equal(network(x_NCHW), first)
    assert not torch.equal(network(x_NCHW), first)


def test_the_probability_rises_over_the_training(tmp_path: Path) -> None:
    data = {"name": "digits", "resolution": 32, "augment": "none"}
    train = {"drop_path": 0.3, "epochs": 0.01, "batch_size": 2, "validate_every": 0}
    experiment = Experiment.model_validate({"data": data, "train": train})
    training = begin(StageContext(experiment, tmp_path, tmp_path), network_of_cells())
    network = training.engine.model
    assert isinstance(network, ClassificationNetwork)
    for number in (0, 3):
        training.step(number)
        assert network.drop_path == pytest.approx(0.3 * number / training.engine.steps)
