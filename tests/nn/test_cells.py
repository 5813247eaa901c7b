"""The super-net of cells: a single path is its standalone network, a mixture is the
weighted sum, and unused weights get no gradient.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from hwnas.config import SupernetConfig
from hwnas.core.cell_steps import NONE
from hwnas.core.cells import CellSpace
from hwnas.core.spaces import darts, nasbench201, nds_darts
from hwnas.errors import ConfigError
from hwnas.nn.cells import CellSupernet, GrowingSupernet, with_values
from hwnas.nn.checkpoint import load_network, save_network
from hwnas.nn.supernet import load_supernet, make_supernet, resized
from hwnas.search.proposal import one_hot

SPACES = {
    "nasbench201": nasbench201(width=0.25, resolution=8),
    "darts": darts(channels=4, layers=5, resolution=8),
    # its second stage is a single reduction
    "nds_darts": nds_darts(width=0.125, layers=4, resolution=8),
}


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def supernet_of(space: CellSpace, **config: object) -> CellSupernet:
    return CellSupernet(
        space, torch.Generator().manual_seed(0), SupernetConfig.model_validate(config)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("affine", [True, False])
def test_a_single_path_is_the_extracted_network(name: str, affine: bool, tmp_path: Path) -> None:
    space, rng = SPACES[name], np.random.default_rng(0)
    supernet = supernet_of(space, bn_affine=affine)
    for _ in range(6):
        picks = space.sample(rng)
        network = supernet.extract(picks).train()
        torch.testing.assert_close(supernet(images(), one_hot(picks, space)), network(images()))
        assert network.arch.macs == space.decode(picks).macs
    save_network(network, tmp_path / "network.safetensors")
    again = load_network(tmp_path / "network.safetensors").train()
    torch.testing.assert_close(again(images()), network(images()))


@pytest.mark.slow
@pytest.mark.parametrize("name", SPACES)
def test_a_single_path_gives_no_other_weight_a_gradient(name: str) -> None:
    space = SPACES[name]
    supernet = supernet_of(space)
    picks = space.sample(np.random.default_rng(3))
    supernet(images(), one_hot(picks, space)).sum().backward()
    trained = sum(weight.numel() for weight in supernet.parameters() if weight.grad is not None)
    network = supernet.extract(picks)
    # fewer than all if a node is zero: nothing after it learns
    assert 0 < trained <= sum(weight.numel() for weight in network.parameters())


def test_a_mixture_is_the_weighted_sum_of_options() -> None:
    """A single edge, worked out by hand. Options of weight 0 get no gradient."""
    space = SPACES["nasbench201"]
    supernet = supernet_of(space)
    position, step = next(
        (i, step) for i, step in enumerate(supernet.steps) if step.key == "c.e1-3"
    )
    x_NCHW = torch.randn(
        2, step.channels, step.size, step.size, generator=torch.Generator().manual_seed(2)
    )
    weights = torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4], requires_grad=True)
    part = supernet.parts[position]
    mixed = supernet._edge(step, part, x_NCHW, with_values({"c.e1-3": weights}), 0.0)
    by_hand = 0.2 * x_NCHW + 0.3 * part["nor_conv_3x3"](x_NCHW) + 0.4 * part["avg_pool_3x3"](x_NCHW)
    assert mixed is not None
    torch.testing.assert_close(mixed, by_hand)
    mixed.square().sum().backward()
    assert (
        weights.grad is not None
        and weights.grad[[1, 3, 4]].abs().min() > 0
        and weights.grad[[0, 2]].abs().max() == 0
    )
    assert all(weight.grad is None for weight in part["nor_conv_1x1"].parameters())


def test_edges_weigh_as_much_as_the_input_pairs_that_keep_them() -> None:
    space = SPACES["darts"]
    supernet = supernet_of(space)
    picks = space.sample(np.random.default_rng(0))
    gates = {key: torch.tensor(gate) for key, gate in one_hot(picks, space).items()}
    key = "normal.n4.inputs"
    gates["normal.e0-4"] = gates["normal.e3-4"] = torch.eye(8)[3].double()
    # both pairs keep 0-4, and neither keeps 3-4
    gates[key] = torch.tensor(
        [0.5 if pair in ("0+1", "0+2") else 0.0 for pair in space.inputs[key]]
    )
    position, step = next(
        (i, step) for i, step in enumerate(supernet.steps) if step.key == "normal.e0-4"
    )
    x_NCHW = torch.randn(2, step.channels, step.size, step.size)
    kept = supernet._edge(step, supernet.parts[position], x_NCHW, with_values(gates), 0.0)
    assert kept is not None
    torch.testing.assert_close(kept, x_NCHW)
    left_out = next(i for i, step in enumerate(supernet.steps) if step.key == "normal.e3-4")
    assert (
        supernet._edge(
            supernet.steps[left_out], supernet.parts[left_out], x_NCHW, with_values(gates), 0.0
        )
        is None
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SPACES)
def test_rematerialisation_changes_no_gradient(name: str) -> None:
    space = SPACES[name]
    gates = {
        choice.key: np.full(len(choice.options), 1 / len(choice.options))
        for choice in space.choices
    }
    gradients = []
    for remat in (True, False):
        supernet = supernet_of(space, remat=remat)
        torch.manual_seed(0)
        supernet(images(), gates, skip_dropout=0.3).square().sum().backward()
        gradients.append([weight.grad for weight in supernet.parameters()])
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_running_statistics_change_only_while_tracking() -> None:
    space = SPACES["darts"]
    supernet = supernet_of(space, bn_track=True)
    gates = {
        choice.key: np.full(len(choice.options), 1 / len(choice.options))
        for choice in space.choices
    }
    norm = next(module for module in supernet.modules() if isinstance(module, torch.nn.BatchNorm2d))
    supernet.tracking = False
    supernet.train()(images(), gates)
    assert norm.running_mean is not None and norm.running_mean.abs().max() == 0
    supernet.tracking = True
    supernet(images(), gates)
    assert norm.running_mean.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SPACES)
def test_a_saved_super_net_keeps_its_proxies(name: str, tmp_path: Path) -> None:
    space = SPACES[name].changed("deeper", cells=(2, 2), channels=8)
    supernet = supernet_of(space, proxy_depth=1, proxy_width=0.5, bn_affine=False)
    picks = space.sample(np.random.default_rng(0))
    assert supernet.arch(picks).macs < space.decode(picks).macs
    supernet.save(tmp_path / "shared.safetensors")
    again = load_supernet(tmp_path / "shared.safetensors", space)
    torch.testing.assert_close(
        again(images(), one_hot(picks, space)), supernet(images(), one_hot(picks, space))
    )
    with pytest.raises(ConfigError, match="was trained on space deeper"):
        load_supernet(tmp_path / "shared.safetensors", SPACES[name])


@pytest.mark.slow
def test_only_the_current_stage_of_a_growing_super_net_learns(tmp_path: Path) -> None:
    space = SPACES["darts"].changed("deep", cells=(3, 3))
    growing = GrowingSupernet(space, torch.Generator().manual_seed(0), SupernetConfig(), (1, 2, 3))
    picks = space.sample(np.random.default_rng(0))
    macs = []
    for growing.grown in range(3):
        growing.zero_grad()
        growing(images(), one_hot(picks, space)).sum().backward()
        learnt = {
            name.split(".")[1]
            for name, weight in growing.named_parameters()
            if weight.grad is not None and weight.grad.any()
        }
        assert learnt == {str(growing.grown)}
        macs.append(growing.arch(picks).macs)
    assert macs == sorted(set(macs))
    growing.save(tmp_path / "shared.safetensors")
    again = load_supernet(tmp_path / "shared.safetensors", space)
    torch.testing.assert_close(
        again(images(), one_hot(picks, space)), growing(images(), one_hot(picks, space))
    )


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"channels": "random"}, "channels = 'random'"),
        ({"wsbn": True}, "wsbn = True"),
        ({"operation_on": "edge"}, "operation_on = 'edge'"),
        ({"path_dropout": 0.1}, "path_dropout = 0.1"),
        ({"sharing": "collapsed"}, "share no weights"),
        ({"kernels": "ofa"}, "share no weights"),
    ],
)
def test_heuristics_that_do_not_apply(config: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_supernet(SPACES["darts"], torch.Generator(), SupernetConfig.model_validate(config))
    assert word in str(raised.value)


def angle_vector(supernet: CellSupernet, text: str) -> list[torch.Tensor]:
    """AngleNAS's vector of a NAS-Bench-201 cell, path by path and cell by cell."""
    space = supernet.space
    picks = space.read(text)
    parts = {step.slot: part for step, part in zip(supernet.steps, supernet.parts, strict=True)}
    vector: list[torch.Tensor] = []
    for slot in ("stem", "cell5", "cell11", "norm", "classifier"):
        vector += [weight.flatten() for weight in parts[slot].parameters()]
    for path in ((0, 3), (0, 2, 3), (0, 1, 2, 3), (0, 1, 3)):
        for cell in (*range(5), *range(6, 11), *range(12, 17)):
            weights: list[torch.Tensor] = []
            for source, node in pairwise(path):
                option = str(picks[f"c.e{source}-{node}"])
                if option == NONE:
                    weights = []
                    break
                if option == "avg_pool_3x3":
                    channels = next(
                        step.channels
                        for step in supernet.steps
                        if step.slot == f"cell{cell}.c.e{source}-{node}"
                    )
                    weights.append(torch.full((channels * 9,), 1 / 9))
                elif option != "skip_connect":
                    weights.append(
                        parts[f"cell{cell}.c.e{source}-{node}"][
                            option
                        ].layers.conv.conv.weight.flatten()
                    )
            vector += weights
    return vector


def test_the_weights_of_the_angle_are_those_of_anglenas() -> None:
    """Sums over the weights, times their multiplicity, are those of the long vector."""
    space, rng = SPACES["nasbench201"], np.random.default_rng(0)
    supernet = supernet_of(space)
    for _ in range(10):
        picks = space.sample(rng)
        vector = torch.cat(angle_vector(supernet, space.write(picks))).detach()
        weights = [
            (weight, times)
            for part, times in supernet.angle_parts(picks)
            for weight in supernet.angle_weights(part)
        ]
        assert sum(weight.numel() * times for weight, times in weights) == len(vector)
        squares = sum(float(weight.detach().square().sum()) * times for weight, times in weights)
        assert squares == pytest.approx(float(vector.square().sum()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPACES)
def test_images_are_smaller_until_the_last_part_of_training(name: str) -> None:
    space, x_NCHW = SPACES[name].changed(name, resolution=16), resized(images(), 16)
    supernet = supernet_of(space, proxy_resolution=8, full_resolution=0.5)
    for seed in range(5):
        picks = space.sample(np.random.default_rng(seed))
        network, gates = supernet.extract(picks).train(), one_hot(picks, space)
        assert supernet.train()(x_NCHW, gates).shape == (4, 10)
        if any(step.kind == "zero" for step in network.arch.graph):
            continue  # a standalone network's zeros have a fixed size
        for supernet.fraction, size in ((0.0, 8), (0.5, 16)):
            torch.testing.assert_close(
                supernet.train()(x_NCHW, gates), network(resized(x_NCHW, size))
            )
    for size in (10, 16):
        with pytest.raises(
            ConfigError,
            match=(
                rf"proxy_resolution = {size} must be below the 16 px of space \w+ and divisible"
                r" by 4"
            ),
        ):
            supernet_of(space, proxy_resolution=size)


@pytest.mark.slow
def test_every_stage_of_a_growing_super_net_knows_the_progress_of_training() -> None:
    config = SupernetConfig(proxy_resolution=8, full_resolution=0.5)
    growing = GrowingSupernet(
        SPACES["darts"].changed("larger", resolution=16),
        torch.Generator().manual_seed(0),
        config,
        (1, 1),
    )
    for growing.grown in range(2):
        growing.fraction = 0.0
        assert growing.present.proxy_resolution() == 8
        growing.fraction = 0.5
        assert growing.present.proxy_resolution() is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("requested", "expected"), [("auto", "torch"), ("torch", "torch"), ("he", "he")]
)
def test_weights_are_initialised_as_in_the_papers_code_or_as_requested(
    requested: str, expected: str, tmp_path: Path
) -> None:
    """PyTorch's uniform weights end at 1 / sqrt(fan-in); nearly half of He's normal
    weights lie beyond. The file records the initialisation.
    """
    supernet = supernet_of(SPACES["nasbench201"], initialisation=requested)
    convs = [part.weight for part in supernet.modules() if isinstance(part, torch.nn.Conv2d)]
    beyond = [float((weight.abs() > weight[0].numel() ** -0.5).float().mean()) for weight in convs]
    assert max(beyond) == 0 if expected == "torch" else min(beyond) > 0.2
    supernet.save(tmp_path / "shared.safetensors")
    assert (
        load_supernet(tmp_path / "shared.safetensors", SPACES["nasbench201"]).config.initialisation
        == expected
    )
