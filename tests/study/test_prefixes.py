"""Networks evaluated one after another, with the blocks that they share run only once:
the logits are those of whole passes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hwnas.config import SupernetConfig
from hwnas.core.cell_families import nasbench201
from hwnas.core.space import SearchSpace
from hwnas.nn.bn import recalibrate
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.nn.supernet import Supernet, make_supernet
from hwnas.search.proposal import one_hot
from hwnas.study import prefixes as module
from hwnas.study.prefixes import MEMORY_FRACTION, Maps, Prefixes, memory_for_maps
from tests.search.staging import elastic_digits_space

torch.set_num_threads(1)
SPACES = {
    "chain": elastic_digits_space(),
    "cells": nasbench201(cells=(1, 1, 1), channels=4, resolution=8, classes=10),
}


def supernet_of(space: SearchSpace, **settings: bool) -> Supernet:
    return make_supernet(
        space, torch.Generator().manual_seed(0), SupernetConfig.model_validate(settings)
    ).eval()


def images(space: SearchSpace, count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (6, space.in_channels, space.resolution, space.resolution)
    return [
        torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)
        for _ in range(count)
    ]


def network_of(supernet: Supernet, row: np.ndarray) -> ClassificationNetwork:
    network = supernet.extract(supernet.space.at(row)).to(memory_format=torch.channels_last)
    assert isinstance(network, ClassificationNetwork)
    return network


def rows(space: SearchSpace, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    drawn = [
        np.array([rng.integers(len(choice.options)) for choice in space.choices])
        for _ in range(count)
    ]
    return sorted(drawn, key=tuple)


class Runs:
    """Counts how often blocks of networks run on a batch."""

    def __init__(self) -> None:
        self.count = 0

    def of(self, network: ClassificationNetwork) -> ClassificationNetwork:
        for block in network.blocks:
            block.register_forward_hook(self._counted)
        return network

    def _counted(self, *_: object) -> None:
        self.count += 1


@pytest.mark.parametrize("kind", sorted(SPACES))
@pytest.mark.parametrize("memory", [2**30, 200_000, 0])
def test_logits_are_those_of_a_whole_pass(kind: str, memory: int) -> None:
    supernet = supernet_of(SPACES[kind])
    estimating, evaluated = images(supernet.space, 3, 1), images(supernet.space, 2, 2)
    prefixes = Prefixes(Maps(estimating, evaluated), memory=memory)
    for row in rows(supernet.space, 12):
        logits = prefixes.logits(network_of(supernet, row))
        separate = network_of(supernet, row)
        recalibrate(separate, estimating)
        with torch.inference_mode():
            assert all(
                torch.equal(a, separate(x_NCHW))
                for a, x_NCHW in zip(logits, evaluated, strict=True)
            )


@pytest.mark.parametrize("kind", sorted(SPACES))
@pytest.mark.parametrize("tracked", [False, True])
def test_without_recalibration_logits_are_the_super_nets(kind: str, tracked: bool) -> None:
    supernet = supernet_of(SPACES[kind], bn_track=tracked)
    if tracked:
        generator = torch.Generator().manual_seed(5)
        for name, buffer in supernet.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    evaluated = images(supernet.space, 2, 2)
    prefixes = Prefixes(Maps((), evaluated), by_batch=not tracked)
    for row in rows(supernet.space, 8):
        by_batch = prefixes.logits(network_of(supernet, row))
        gates = one_hot(supernet.space.at(row), supernet.space)
        with torch.inference_mode():
            for logits, x_NCHW in zip(by_batch, evaluated, strict=True):
                torch.testing.assert_close(logits, supernet(x_NCHW, gates), rtol=1e-3, atol=1e-4)


def test_common_blocks_run_once() -> None:
    supernet = supernet_of(SPACES["chain"])
    estimating, evaluated, runs = images(supernet.space, 3, 1), images(supernet.space, 2, 2), Runs()
    prefixes = Prefixes(Maps(estimating, evaluated))
    row = rows(supernet.space, 1)[0]
    network = runs.of(network_of(supernet, row))
    prefixes.logits(network)
    # on three batches that estimate BN statistics, and two that are evaluated
    assert runs.count == 5 * len(network.blocks)
    runs.count = 0
    prefixes.logits(runs.of(network_of(supernet, row)))
    assert runs.count == 0
    last = row.copy()
    last[-1] = (row[-1] + 1) % len(supernet.space.choices[-1].options)
    other = runs.of(network_of(supernet, last))
    prefixes.logits(other)
    assert 0 < runs.count < 5 * len(other.blocks) / 2


def test_other_weights_are_noticed() -> None:
    """A block that looks the same but has other weights, such as one that shares only
    some of them, is run.
    """
    supernet = supernet_of(SPACES["chain"])
    estimating, evaluated = images(supernet.space, 3, 1), images(supernet.space, 2, 2)
    prefixes, row = Prefixes(Maps(estimating, evaluated)), rows(supernet.space, 1)[0]
    before = prefixes.logits(network_of(supernet, row))
    changed = network_of(supernet, row)
    weight = next(
        module.weight for module in changed.blocks[1].modules() if isinstance(module, nn.Conv2d)
    )
    with torch.no_grad():
        weight[0] *= 2.0
        weight[1] += 0.5
    after = prefixes.logits(changed)
    assert not torch.equal(before[0], after[0])


def test_maps_that_do_not_fit_are_not_kept() -> None:
    supernet = supernet_of(SPACES["chain"])
    estimating, evaluated, row = (
        images(supernet.space, 3, 1),
        images(supernet.space, 2, 2),
        rows(supernet.space, 1)[0],
    )
    network = network_of(supernet, row)
    first = network.arch.ops()[0]
    bytes_of_first = 5 * 6 * first.out_ch * first.out_size**2 * 4
    for memory, kept in ((bytes_of_first - 1, 0), (bytes_of_first, 1)):
        runs, prefixes = Runs(), Prefixes(Maps(estimating, evaluated), memory=memory)
        prefixes.logits(network_of(supernet, row))
        prefixes.logits(runs.of(network_of(supernet, row)))
        assert runs.count == 5 * (len(network.blocks) - kept)


def test_maps_take_a_part_of_a_containers_memory_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CGROUP", tmp_path / "memory.max")
    unlimited = memory_for_maps(torch.device("cpu"))
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_for_maps(torch.device("cpu")) == unlimited > 2**20
    (tmp_path / "memory.max").write_text("6000000\n")
    assert memory_for_maps(torch.device("cpu")) == int(MEMORY_FRACTION * 6_000_000)
