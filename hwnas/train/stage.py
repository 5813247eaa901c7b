"""The training stage: an architecture in, a trained network out. It uses all training images; the search held some out."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.spaces import published
from hwnas.data.images import evaluation_batches, load_images, training_batches
from hwnas.document import Document
from hwnas.engine import Engine, Metrics, accuracy, steps_of
from hwnas.errors import ConfigError
from hwnas.nn.network import Network, load_network, save_network
from hwnas.runs import StageContext

OUTPUTS = ["model.safetensors", "train.json"]


class TrainResult(Document):
    """How good the trained network is."""

    SCHEMA: ClassVar[str] = "hwnas.train"

    architecture_sha256: str
    weights: str
    steps: int
    seed: int
    test_accuracy: float
    test_images: int
    class_names: tuple[str, ...]


def architecture(experiment: Experiment, searched: Path) -> Architecture:
    """What is to be trained: ``train.arch`` (a document, or a published network's name), else the searched one."""
    name = experiment.train.arch
    if name is None:
        return Architecture.load(searched)
    if Path(name).suffix == ".json":
        return Architecture.load(name)
    return published(name, resolution=experiment.data.resolution, classes=experiment.data.classes)


def run(ctx: StageContext, arch: Architecture) -> None:
    """Train and write ``model.safetensors`` (averaged weights, BN statistics) and ``train.json``."""
    config, data, seed = ctx.experiment.train, ctx.experiment.data, ctx.experiment.seed
    if config.arch is None:
        data = data.at(arch.resolution)
    if (arch.classes, arch.resolution, arch.in_channels) != (data.classes, data.resolution, data.channels):
        raise ConfigError(
            f"architecture {arch.name!r} has {arch.classes} classes, {arch.resolution} px and {arch.in_channels} channels, but the data "
            f"{data.classes}, {data.resolution} and {data.channels}: make data.classes, data.resolution and data.channels agree."
        )
    train, test = load_images(data, "all", augment=True), load_images(data, "test")
    network = Network(arch, dropout=config.dropout, generator=torch.Generator().manual_seed(seed))
    if config.weights == "supernet":
        network.load_state_dict(load_network(ctx.path("search", "supernet.safetensors")).state_dict())
    steps = steps_of(config.epochs, len(train), config.batch_size)
    engine = Engine(
        network,
        config.optimizer,
        steps,
        config.batch_size,
        seed,
        ctx.folder,
        label_smoothing=config.label_smoothing,
        ema_decay=config.ema_decay,
        checkpoint_seconds=ctx.experiment.checkpoint_seconds,
    )
    engine.resume()
    batches = training_batches(train, config.batch_size, seed=seed, first=engine.step, last=steps, workers=data.workers)

    def step(number: int) -> Metrics:
        del number  # the loader is already at this step
        return engine.weight_step(*next(batches))

    engine.fit(step, ctx.progress, f"training {arch.name}")
    trained = engine.averaged
    test_accuracy = accuracy(trained, evaluation_batches(test, 4 * config.batch_size, workers=data.workers))
    assert isinstance(trained, Network)
    save_network(trained, ctx.folder / "model.safetensors", {"test_accuracy": f"{test_accuracy:.4f}"})
    TrainResult(
        architecture_sha256=arch.sha256,
        weights=config.weights,
        steps=steps,
        seed=seed,
        test_accuracy=test_accuracy,
        test_images=len(test),
        class_names=test.names,
    ).save(ctx.folder / "train.json")
    engine.finish()
    ctx.progress.say(f"trained {arch.name}: {test_accuracy:.2%} of {len(test)} test images right")
