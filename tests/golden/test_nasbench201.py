"""NAS-Bench-201: our networks have the benchmark's own MACs and parameters, according
to its published numbers and to a second implementation.
"""

from __future__ import annotations

import csv
import gzip
import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hwnas.core.additive_cost import AdditiveCost
from hwnas.core.arch import Architecture
from hwnas.core.cells import CellSpace
from hwnas.core.spaces import nasbench201
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.study.truth import read_truth

SPACE = nasbench201()


def uniform(option: str, space: CellSpace) -> Architecture:
    return space.decode({choice.key: option for choice in space.choices})


@pytest.mark.parametrize(
    ("resolution", "classes", "params", "mega_flops"),
    [
        (32, 10, (0.073306, 1.531546), (7.78305, 220.11969)),
        (32, 100, (0.079156, 1.537396), (7.78890, 220.12554)),
        (16, 120, (None, None), (1.95340, 55.03756)),
    ],
)
def test_the_smallest_and_the_largest_network(
    resolution: int, classes: int, params: tuple[float | None, ...], mega_flops: tuple[float, ...]
) -> None:
    """The benchmark's bounds for CIFAR-10, CIFAR-100 and ImageNet16-120, as its users
    publish them. They include the classifier's bias.
    """
    space = nasbench201(resolution=resolution, classes=classes)
    for option, wanted_params, wanted_flops in zip(
        ("skip_connect", "nor_conv_3x3"), params, mega_flops, strict=True
    ):
        arch = uniform(option, space)
        assert round((arch.macs + classes) / 1e6, 5) == wanted_flops
        assert wanted_params is None or arch.params / 1e6 == wanted_params


def test_published_networks_in_between() -> None:
    """OpenMMLab's example of the benchmark's cost_info, and the benchmark's own
    example, network 1.
    """
    openmmlab = SPACE.decode(
        SPACE.read(
            "|nor_conv_3x3~0|+|nor_conv_3x3~0|none~1|+|skip_connect~0|none~1|avg_pool_3x3~2|"
        )
    )
    assert ((openmmlab.macs + 10) / 1e6, openmmlab.params / 1e6) == (78.56193, 0.559386)
    first = SPACE.decode(
        SPACE.read(
            "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|skip_connect~2|"
        )
    )
    assert (round((first.macs + 10) / 1e6, 2), round(first.params / 1e6, 3)) == (113.95, 0.802)


class Cell(nn.Module):
    """A second implementation of the benchmark's cell, from its paper, without any code
    of hwnas.
    """

    def __init__(self, text: str, channels: int) -> None:
        super().__init__()
        self.nodes = [
            [part.split("~") for part in group.strip("|").split("|")] for group in text.split("+")
        ]
        self.ops = nn.ModuleDict()
        for node, edges in enumerate(self.nodes, 1):
            for option, source in edges:
                if option.startswith("nor_conv"):
                    kernel = int(option[-1])
                    conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)
                    self.ops[f"{source}{node}"] = nn.Sequential(
                        nn.ReLU(), conv, nn.BatchNorm2d(channels)
                    )
                elif option == "avg_pool_3x3":
                    self.ops[f"{source}{node}"] = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        points = [x]
        for node, edges in enumerate(self.nodes, 1):
            total = torch.zeros_like(x)
            for option, source in edges:
                if option != "none":
                    before = points[int(source)]
                    total = total + (
                        before if option == "skip_connect" else self.ops[f"{source}{node}"](before)
                    )
            points.append(total)
        return points[-1]


class Reduction(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()

        def half(into: int, stride: int) -> nn.Sequential:
            conv = nn.Conv2d(into, 2 * channels, 3, stride, 1, bias=False)
            return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(2 * channels))

        self.main = nn.Sequential(half(channels, 2), half(2 * channels, 1))
        self.side = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(channels, 2 * channels, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.side(x)


def second_implementation(text: str) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)]
    for channels in (16, 32, 64):
        parts += [Reduction(channels // 2)] if channels > 16 else []
        parts += [Cell(text, channels) for _ in range(5)]
    return nn.Sequential(
        *parts,
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def random_cells(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [SPACE.write(SPACE.sample(rng)) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 60, 20))
def test_sixty_networks_have_the_counts_and_outputs_of_a_second_implementation(first: int) -> None:
    x_NCHW = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for text in random_cells(60)[first : first + 20]:
        arch = SPACE.decode(SPACE.read(text))
        network, other = ClassificationNetwork(arch).train(), second_implementation(text).train()
        with FlopCounterMode(display=False) as counter:
            expected = other(x_NCHW)
        # two images, and two FLOPs per MAC
        assert (
            counter.get_total_flops(),
            sum(weight.numel() for weight in other.parameters()),
        ) == (4 * arch.macs, arch.params), text
        with torch.no_grad():
            for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
                mine.copy_(theirs)
        torch.testing.assert_close(network(x_NCHW), expected, rtol=1e-4, atol=1e-5)


def test_every_network_has_the_counts_of_its_convolutions() -> None:
    """The counts of all 15,625 networks depend only on how many of their edges are
    3 x 3 and 1 x 1 convolutions.
    """
    index_NC = np.array(list(product(range(5), repeat=6)))
    # the positions of nor_conv_3x3 and nor_conv_1x1 among the options
    threes, ones = (index_NC == 3).sum(axis=1), (index_NC == 2).sum(axis=1)
    macs = AdditiveCost.of_ops(SPACE, lambda op: op.macs).costs(index_NC)
    params = AdditiveCost.of_ops(SPACE, lambda op: op.params).costs(index_NC)
    assert SPACE.size == len(index_NC) == 15_625
    assert macs.tolist() == (7_783_040 + 35_389_440 * threes + 3_932_160 * ones).tolist()
    assert params.tolist() == (73_306 + 243_040 * threes + 28_000 * ones).tolist()


@pytest.mark.skipif(
    "HWNAS_TEST_DATA" not in os.environ,
    reason="needs nasbench201/nasbench201_acc.csv.gz: set HWNAS_TEST_DATA",
)
def test_the_benchmarks_own_architectures_and_accuracies() -> None:
    path = Path(os.environ["HWNAS_TEST_DATA"], "nasbench201/nasbench201_acc.csv.gz")
    truth = read_truth(path, SPACE, ["cifar10_test_200"])
    assert len(truth.names) == 15_625
    assert all(
        SPACE.write(picks) == name for name, picks in zip(truth.names, truth.picks, strict=True)
    )
    assert truth.mean.max() == pytest.approx(0.9437, abs=5e-5)  # the published optimum
    best = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|"
    assert truth.names[int(truth.mean.argmax())] == best
    with gzip.open(path, "rt") as file:
        classes = {row["arch_str"]: row["unique_str"] for row in csv.DictReader(file)}
    assert len(set(classes.values())) == 6_466
