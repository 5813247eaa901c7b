"""Checkpoints: they read back, and broken ones are refused in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hwnas.core.arch import Architecture
from hwnas.core.spaces import mobile32, published
from hwnas.errors import CheckpointError
from hwnas.nn.checkpoint import load_network, save_network
from hwnas.nn.classifier import ClassificationNetwork

torch.set_num_threads(1)


def small_network(seed: int = 0) -> ClassificationNetwork:
    space = mobile32(resolution=16)
    picks = {choice.key: choice.options[0] for choice in space.choices}
    network = ClassificationNetwork(
        space.decode(picks), generator=torch.Generator().manual_seed(seed)
    )
    # moves the BN statistics
    network.train()(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)))
    return network


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_network(small_network(), tmp_path / "model.safetensors", {"test_accuracy": "0.9"})
    return tmp_path / "model.safetensors"


def test_round_trip(saved: Path) -> None:
    network = small_network()
    loaded = load_network(saved)
    assert loaded.arch == network.arch
    assert loaded.state_dict().keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not torch.equal(
        network.state_dict()["blocks.0.layers.conv.norm.running_mean"], torch.zeros(16)
    )


def test_metadata_holds_the_architecture(saved: Path) -> None:
    """Read with safetensors' own reader."""
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(small_network().state_dict())
    assert Architecture.parse(metadata["architecture"]) == small_network().arch
    assert metadata["test_accuracy"] == "0.9"


@pytest.mark.slow
def test_same_network_same_bytes(tmp_path: Path) -> None:
    """In another process, too: by itself, safetensors orders metadata by a hash that is
    random per process.
    """
    metadata = {letter: letter for letter in "abcdefgh"}
    path, again = tmp_path / "model.safetensors", tmp_path / "again.safetensors"
    save_network(small_network(), path, metadata)
    program = (
        "import sys; from pathlib import Path; from hwnas.nn.checkpoint import load_network,"
        " save_network\nsave_network(load_network(Path(sys.argv[1])), Path(sys.argv[2]), {letter:"
        " letter for letter in 'hgfedcba'})"
    )
    subprocess.run([sys.executable, "-c", program, str(path), str(again)], check=True)
    assert again.read_bytes() == path.read_bytes()


def refused(path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_network(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [0.0, 0.00002, 0.005, 0.05, 0.5, 0.999])
def test_truncated(saved: Path, part: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(part * len(content))])
    refused(saved)


def test_last_byte_missing(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-1])
    refused(saved)


def test_not_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"PK\x03\x04 this is something else altogether, but long enough to look at")
    refused(path)
    refused(tmp_path / "missing.safetensors")
    refused(tmp_path)


def test_corrupt_header(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[8:12] = b"\xff\xfe\x00\x01"
    saved.write_bytes(bytes(content))
    refused(saved)


def test_without_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(small_network().state_dict(), path)
    refused(path)
    save_file(
        small_network().state_dict(),
        path,
        {"architecture": json.dumps({"schema": "hwnas.space/1"})},
    )
    refused(path)


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    other = published("mobilenet_v2", resolution=32, classes=10)
    save_file(small_network().state_dict(), path, {"architecture": other.to_json()})
    refused(path)
