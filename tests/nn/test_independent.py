"""Independent networks: they share nothing behind the interface of a super-net, and
training them in turn equals training each by itself.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hwnas.config import OptimizerConfig
from hwnas.core.arch import Picks
from hwnas.core.space import MacroSpace
from hwnas.engine import Engine
from hwnas.nn.independent import IndependentNetworks
from hwnas.nn.supernet import MacroSupernet, resized
from hwnas.search.proposal import one_hot
from tests.nn.nets import batch, depths_space

torch.set_num_threads(1)


def three_networks() -> tuple[MacroSpace, list[Picks], IndependentNetworks]:
    space, rng = depths_space(), np.random.default_rng(1)
    members = [{**space.sample(rng), "resolution": size} for size in (8, 12, 12)]
    return space, members, IndependentNetworks(space, members, torch.Generator().manual_seed(0))


def test_gates_select_the_network_that_runs() -> None:
    """It runs at its own resolution, and the others get no gradient."""
    space, members, independent = three_networks()
    x_NCHW, y = batch(space)
    for number, picks in enumerate(members):
        independent.zero_grad(set_to_none=True)
        logits = independent(x_NCHW, one_hot(picks, space))
        network = independent.networks[number]
        assert network.arch.blocks == space.decode(picks).blocks
        assert torch.equal(logits, network(resized(x_NCHW, picks["resolution"])))
        F.cross_entropy(logits, y).backward()
        trained = {
            name.split(".")[1]
            for name, parameter in independent.named_parameters()
            if parameter.grad is not None
        }
        assert trained == {str(number)}
    stranger = space.at(
        (space.index(members[0]) + 1) % [len(choice.options) for choice in space.choices]
    )
    with pytest.raises(ValueError, match="not in list"):
        independent(x_NCHW, one_hot(stranger, space))


def test_an_extracted_network_is_a_copy_with_its_statistics() -> None:
    space, members, independent = three_networks()
    x_NCHW, _ = batch(space)
    independent.train()(x_NCHW, one_hot(members[1], space))
    network = independent.extract(members[1])
    original = independent.networks[1]
    for (name, mine), theirs in zip(
        network.state_dict().items(), original.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name
        assert mine.data_ptr() != theirs.data_ptr()
    assert independent.arch(members[1]).blocks == network.arch.blocks
    assert torch.equal(network.eval()(x_NCHW), original.eval()(x_NCHW))


@pytest.mark.parametrize("optimizer", ["rmsproptf", "momentum", "adamw"])
def test_training_in_turn_equals_training_each_by_itself(optimizer: str, tmp_path: Path) -> None:
    """Bit for bit: no decay, momentum or statistics from the steps of the others."""
    space, members, independent = three_networks()
    config = OptimizerConfig(name=optimizer, lr=0.5, weight_decay=0.1, options={}, warmup=0.0)
    standalone = [independent.extract(picks) for picks in members]
    together = Engine(independent, config, 9, 6, 0, tmp_path)
    engines = [Engine(network, config, 9, 6, 0, tmp_path) for network in standalone]
    for step in range(9):
        x_NCHW, y = batch(space, step)
        turn = step % 3
        together.step = engines[turn].step = step
        together.train_step(x_NCHW, y, one_hot(members[turn], space))
        engines[turn].train_step(resized(x_NCHW, members[turn]["resolution"]), y)
    for network, copy in zip(independent.networks, standalone, strict=True):
        weights: dict[str, Tensor] = copy.state_dict()
        assert all(
            torch.equal(value, weights[name]) for name, value in network.state_dict().items()
        )


def test_the_classifiers_are_not_decayed() -> None:
    _, members, independent = three_networks()
    last = [len(network.blocks) - 1 for network in independent.networks]
    assert independent.no_weight_decay() == {
        f"networks.{i}.blocks.{last[i]}.linear.weight" for i in range(len(members))
    }
    assert independent.no_weight_decay() <= {name for name, _ in independent.named_parameters()}


def test_it_has_the_super_nets_contract_but_nothing_to_share(tmp_path: Path) -> None:
    space, _, independent = three_networks()
    supernet = MacroSupernet(space, torch.Generator())
    assert (independent.shares, supernet.shares) == (False, True)
    assert independent.proxies == supernet.proxies == (space,)
    independent.save(tmp_path / "shared.safetensors")
    assert list(tmp_path.iterdir()) == []
    for refused in (
        lambda: independent.grow(1),
        lambda: independent.load_backbone(tmp_path),
        lambda: independent.copy_weights(supernet),
    ):
        with pytest.raises(AssertionError, match="IndependentNetworks"):
            refused()
