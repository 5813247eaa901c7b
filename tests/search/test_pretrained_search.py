"""Searches whose super-net starts from the weights of a trained network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.config import Experiment, SearchConfig
from hwnas.core.spaces import load_space
from hwnas.errors import ConfigError
from hwnas.nn.checkpoint import load_network, save_network
from hwnas.nn.network import network_of
from hwnas.search.settings import check_search
from hwnas.search.supernet_file import SUPERNET_FILE
from hwnas.study.supernets import refuse_pretrained
from tests.search.staging import Killed, Killing, Saying, elastic_digits_space, experiment, run

torch.set_num_threads(1)


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """The weights of one network of the space."""
    space = elastic_digits_space()
    arch = space.decode(space.sample(np.random.default_rng(2)))
    network = network_of(arch, generator=torch.Generator().manual_seed(5))
    save_network(network, tmp_path / "pretrained.safetensors")
    return tmp_path / "pretrained.safetensors"


def searching(pretrained: Path, strategy: str = "spos", **search: Any) -> Experiment:
    return experiment(
        strategy=({"name": strategy}),
        pretrained=str(pretrained),
        target_range=None,
        budget={"kind": "macs", "max_macs": 150_000},
        **{"epochs": 0.25, "random_samples": 0, **search},
    )


@pytest.mark.slow
def test_a_search_starts_from_the_weights_and_resumes_bit_for_bit(
    tmp_path: Path, pretrained: Path
) -> None:
    config = searching(pretrained)
    progress = Saying()
    run(tmp_path / "straight", config, None, progress)
    assert any("pretrained.safetensors" in line and "layers" in line for line in progress.said)
    with pytest.raises(Killed):
        run(tmp_path / "killed", config, None, Killing("searching", 5))
    run(tmp_path / "killed", config, None)
    for name in ("arch.json", "search.json", SUPERNET_FILE):
        contents = {(tmp_path / run_ / name).read_bytes() for run_ in ("straight", "killed")}
        assert len(contents) == 1, name


@pytest.mark.slow
def test_weights_that_are_hardly_trained_stay_near_the_start(
    tmp_path: Path, pretrained: Path
) -> None:
    """With a learning rate of almost 0, the winner's stem is that of the file."""
    optimizer = {"name": "sgd", "lr": 1e-9, "weight_decay": 0.0, "options": {}}
    run(tmp_path / "search", searching(pretrained, optimizer=optimizer), None)
    stem = load_network(pretrained).blocks[0].state_dict()["layers.conv.conv.weight"]
    found = load_network(tmp_path / "search" / "supernet.safetensors")
    weight = found.blocks[0].state_dict()["layers.conv.conv.weight"]
    # its channels may have another order
    distances = torch.cdist(weight.flatten(1), stem.flatten(1))
    shared = min(len(weight), len(stem))
    assert (distances.min(1).values < 1e-5).sum() == shared


def test_strategies_without_a_super_net_are_refused(pretrained: Path) -> None:
    config = searching(pretrained, "random_standalone")
    with pytest.raises(
        ConfigError, match=r"share no weights, and search\.pretrained is for super-"
    ):
        check_search(config, elastic_digits_space())


def test_spaces_of_cells_are_refused(pretrained: Path) -> None:
    config = searching(pretrained)
    with pytest.raises(ConfigError, match=r"search\.pretrained is for chains of blocks, and darts"):
        check_search(config, load_space("darts"))


@pytest.mark.parametrize("other", ["weights", "backbone"])
def test_two_sources_of_initial_weights_are_refused(other: str) -> None:
    with pytest.raises(ValueError, match=f"search.pretrained and search.{other} both set"):
        experiment(pretrained="a.pth", **{other: "runs/a"})


@pytest.mark.parametrize("key", ["pretrained", "backbone"])
def test_studies_start_from_scratch(key: str) -> None:
    config = SearchConfig.model_validate({key: "runs/a"})
    with pytest.raises(ConfigError, match=f"search.{key} = 'runs/a' is for 'hwnas search'"):
        refuse_pretrained(config)
