"""Files of weights: damaged ones are refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.errors import CheckpointError
from hwnas.nn.checkpoint import load_network, save_network
from hwnas.nn.network import network_of
from tests.conftest import digits_space


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The content of a file of weights."""
    space = digits_space()
    arch = space.decode({choice.key: choice.options[0] for choice in space.choices})
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_network(network_of(arch), path)
    return path.read_bytes()


def refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_network(path)
    assert str(path) in str(caught.value)
    assert "train again, or restore the file" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_cut_off_are_refused(tmp_path: Path, weights: bytes) -> None:
    header = int.from_bytes(weights[:8], "little")
    lengths = [0, 1, 7, 8, 9, header // 2, header + 8, header + 9, len(weights) - 1]
    for length in lengths:
        refused(tmp_path / "cut.safetensors", weights[:length])


def test_a_damaged_header_is_refused_in_a_sentence(tmp_path: Path, weights: bytes) -> None:
    """Or it still says the same, as after a change of a name that nobody reads."""
    path = tmp_path / "flipped.safetensors"
    header = int.from_bytes(weights[:8], "little")
    # not the first bytes of the length, which ask for terabytes and are refused below
    for position in np.random.default_rng(0).integers(8 * 8, 8 * (header + 8), 60):
        flipped = bytearray(weights)
        flipped[position // 8] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        try:
            load_network(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
    for position in range(8):
        flipped = bytearray(weights)
        flipped[position] ^= 64
        refused(path, bytes(flipped))


def test_too_little_memory_does_not_condemn_the_weights(
    tmp_path: Path, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    (tmp_path / "model.safetensors").write_bytes(weights)
    monkeypatch.setattr("torch.nn.Module.load_state_dict", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        load_network(tmp_path / "model.safetensors")
