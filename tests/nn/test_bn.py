"""BN recalibration: exact statistics, nothing else changed, and accuracy regained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hwnas.config import DataConfig, OptimizerConfig
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.data.images import evaluation_batches, load_images, training_batches
from hwnas.engine import Engine, accuracy
from hwnas.nn.bn import recalibrate
from hwnas.nn.supernet import MacroSupernet
from hwnas.progress import Progress
from hwnas.search.proposal import one_hot

torch.set_num_threads(1)


def test_closed_form() -> None:
    """The means of the batches' means and of their unbiased variances."""
    norm = nn.BatchNorm2d(3, momentum=0.07)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    weight, bias = norm.weight.detach().clone(), norm.bias.detach().clone()
    norm.train()(torch.full((4, 3, 2, 2), 70.0))  # statistics of other images, to be forgotten
    rng = np.random.default_rng(0)
    batches = [rng.normal(2.0, 3.0, size=(8, 3, 5, 5)) for _ in range(7)]
    recalibrate(norm, (torch.tensor(batch, dtype=torch.float32) for batch in batches))
    means = np.mean([batch.mean(axis=(0, 2, 3)) for batch in batches], axis=0)
    variances = np.mean([batch.var(axis=(0, 2, 3), ddof=1) for batch in batches], axis=0)
    assert np.allclose(norm.running_mean.numpy(), means, rtol=1e-5, atol=1e-6)
    assert np.allclose(norm.running_var.numpy(), variances, rtol=1e-5)
    assert norm.momentum == 0.07
    assert not norm.training
    assert torch.equal(norm.weight, weight)
    assert torch.equal(norm.bias, bias)


def test_statistics_after_another_norm() -> None:
    """A second norm sees what the first outputs in training mode, so its statistics are
    those of the same forward pass.
    """
    network = nn.Sequential(
        nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2), nn.Dropout(0.5)
    ).train()
    x_NCHW = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 5 + 3
    recalibrate(network, [x_NCHW])
    inner = torch.relu(
        (x_NCHW - x_NCHW.mean((0, 2, 3), keepdim=True))
        / (x_NCHW.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    )
    assert torch.allclose(network[2].running_mean, inner.mean((0, 2, 3)), atol=1e-5)
    assert not any(module.training for module in network.modules())


@pytest.mark.slow
def test_recalibration_restores_the_accuracy_of_extracted_networks(tmp_path: Path) -> None:
    data = DataConfig(
        name="digits", resolution=8, channels=1, mean=(0.5,), std=(0.5,), augment="none"
    )
    options = ("ir_k3_e3", "ir_k5_e3", "ir_k3_e6", "ir_k5_e6")
    stages = (
        SpaceStage(widths=(8,), slots=(("cn_k3",),)),
        SpaceStage(widths=(16,), stride=2, slots=(options, (*options, "skip"))),
        SpaceStage(widths=(32,), slots=(("cn_k1",),)),
    )
    space = MacroSpace(name="tiny", resolution=8, in_channels=1, classes=10, stages=stages)
    supernet = MacroSupernet(space, torch.Generator().manual_seed(0))
    train, held_out = load_images(data, "train"), load_images(data, "held_out")
    optimizer = OptimizerConfig(name="sgd", lr=1.6, momentum=0.9, options={})
    engine = Engine(supernet, optimizer, 150, 64, 0, tmp_path)
    batches = training_batches(train, 64, seed=0, steps=range(0, 150))
    rng = np.random.default_rng(0)
    engine.fit(
        lambda step: engine.train_step(*next(batches), one_hot(space.sample(rng), space)),
        Progress(),
        "training",
    )
    gains, weights = [], {name: tensor.clone() for name, tensor in supernet.named_parameters()}
    for option in options:
        network = supernet.extract({"s1.b0": option, "s1.b1": option})
        without = accuracy(network, evaluation_batches(held_out, 256))
        before = {name: parameter.clone() for name, parameter in network.named_parameters()}
        recalibrate(network, (x for x, _ in evaluation_batches(train, 64, limit=512)))
        gains.append(accuracy(network, evaluation_batches(held_out, 256)) - without)
        assert all(
            torch.equal(parameter, before[name]) for name, parameter in network.named_parameters()
        )
        assert without + gains[-1] > 0.6
    assert min(gains) > 0.2, gains
    assert all(torch.equal(tensor, weights[name]) for name, tensor in supernet.named_parameters())
