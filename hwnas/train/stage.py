"""The training stage: an architecture in, a trained network out. It uses all training
images; the search held some out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hwnas.config import Experiment
from hwnas.core.arch import Architecture
from hwnas.core.search_space import SearchSpace
from hwnas.data.images import Batch, Images, load_images, training_batches
from hwnas.document import file_sha256
from hwnas.engine import Engine, Metrics, check_optimizer, steps_of
from hwnas.errors import ConfigError
from hwnas.networks import architecture, sized
from hwnas.nn.checkpoint import load_network, save_network
from hwnas.nn.network import Network, network_of
from hwnas.runs import StageContext
from hwnas.stages import Stage
from hwnas.task import Evaluation, evaluate, task_of
from hwnas.train.initial_weights import (
    WEIGHTS,
    backbone_file,
    load_initial_weights,
    trained_backbone,
)
from hwnas.train.result import TrainResult
from hwnas.train.validation import Validation


def outputs(experiment: Experiment) -> list[str]:
    """The files the stage writes: the weights, the result, and what else the task shows."""
    return [WEIGHTS, "train.json", *task_of(experiment).files]


@dataclass(frozen=True)
class Training:
    """A training that is ready to run, or to go on."""

    engine: Engine
    test: Images
    batches: Iterator[Batch]
    validation: Validation

    def step(self, number: int) -> Metrics:
        """One update on the next batch."""
        del number  # the loader is already at this step
        return self.engine.train_step(*next(self.batches))


def begin(ctx: StageContext, arch: Architecture) -> Training:
    """Build what is trained, and take up what the stage's folder holds of it."""
    config, data, seed = ctx.experiment.train, sized(ctx.experiment, arch), ctx.experiment.seed
    train, test = load_images(data, "all", augment=True), load_images(data, "test")
    network = network_of(
        arch, dropout=config.dropout, generator=torch.Generator().manual_seed(seed)
    )
    load_initial_weights(network, ctx)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = config.bn_momentum
    steps = steps_of(config.epochs, len(train), config.batch_size)
    engine = Engine(
        network,
        config.optimizer,
        steps,
        config.batch_size,
        seed,
        ctx.folder,
        criterion=task_of(ctx.experiment).criterion(arch, config.label_smoothing),
        ema_decay=config.ema_decay,
        checkpoint_seconds=ctx.experiment.checkpoint_seconds,
    )
    engine.resume()
    validation = Validation(ctx, engine, test, len(train) / config.batch_size)
    validation.resume()
    batches = training_batches(
        train, config.batch_size, seed=seed, first=engine.step, last=steps, workers=data.workers
    )
    return Training(engine, test, batches, validation)


def run(ctx: StageContext, arch: Architecture) -> None:
    """Train and write ``model.safetensors`` (averaged weights, BN statistics),
    ``train.json`` and the other ``outputs``.

    On the way, ``validation.jsonl`` gets the validation curve.
    """
    config, training = ctx.experiment.train, begin(ctx, arch)
    engine, test = training.engine, training.test
    engine.fit(training.step, ctx.progress, f"training {arch.name}", training.validation)
    trained = engine.ema_model
    assert isinstance(trained, Network)
    task = task_of(ctx.experiment)
    how = Evaluation(config.batch_size, workers=ctx.experiment.data.workers)
    evaluated = evaluate(task, trained, test, how)
    task.record(ctx.folder, trained, test, evaluated)
    result = TrainResult(
        architecture_sha256=arch.sha256,
        weights=config.weights if config.backbone is None else "backbone",
        steps=engine.steps,
        seed=engine.seed,
        task=task.name,
        metric=task.metric,
        metrics=evaluated.metrics,
        per_class=evaluated.per_class,
        test_images=len(test),
        guess=task.guess(test),
        class_names=test.names,
    )
    metadata = {row: evaluated.metrics[name] for row, name in list(task.curve.items())[:1]}
    save_network(
        trained,
        ctx.folder / WEIGHTS,
        {name: f"{value:.4f}" for name, value in metadata.items() if value is not None},
    )
    result.save(ctx.folder / "train.json")
    engine.finish()
    ctx.progress.info(f"trained {arch.name}: {result.quality}")
    if result.caution is not None:
        ctx.progress.warning(str(result.caution))


class Train(Stage):
    """Trains the searched architecture, or the one that is named."""

    name = "train"
    result = "train.json"
    reported = ("train.json", "arch.json", "pictures.json", "metrics.jsonl", "validation.jsonl")
    estimate = "hwnas.estimate.training:of_training"
    checked = ("train",)
    trains = True

    @classmethod
    def check_settings(cls, experiment: Experiment, space: SearchSpace) -> None:
        """The optimiser, a named architecture against the data, and what the training
        begins with.
        """
        config, supernet = experiment.train, experiment.search.supernet
        check_optimizer(config.optimizer, "train.optimizer")
        proxy = supernet.proxy_width != 1.0 or supernet.proxy_depth is not None
        if (
            config.weights == "supernet"
            and proxy
            and config.arch is None
            and experiment.search.weights is None
        ):
            raise ConfigError(
                "train.weights = 'supernet' needs a super-net of full size, and"
                " search.supernet.proxy_width or proxy_depth makes it smaller: set train.weights ="
                " 'scratch'."
            )
        arch = architecture(experiment, space, Path()) if config.arch is not None else None
        if config.backbone is not None and arch is not None:
            trained_backbone(config.backbone, arch)
        elif config.backbone is not None:
            backbone_file(config.backbone)

    @property
    def outputs(self) -> list[str]:
        """The weights, the result, and what else the task shows."""
        return outputs(self.at.experiment)

    @property
    def searched(self) -> Path:
        """The searched architecture."""
        return self.at.path("search", "arch.json")

    def architecture(self) -> Architecture:
        """What is trained. Raises ConfigError where it does not fit the data or the task."""
        return architecture(self.at.experiment, self.at.space, self.searched)

    def inputs(self) -> dict[str, str]:
        """The architecture, the weights that it begins with, the data and the settings."""
        config, inherited = self.at.experiment.train, self.at.path("search", "supernet.safetensors")
        found = {} if config.arch else self.at.hash_of(self.searched, "search")
        if config.weights == "supernet":
            found |= self.at.hash_of(inherited, "search")
        arch = self.architecture()
        if config.weights == "supernet" and arch != Architecture.load(self.searched):
            raise ConfigError(
                "train.weights = 'supernet' fits the searched architecture alone: set train.weights"
                " = 'scratch'."
            )
        if config.weights == "supernet" and load_network(inherited).arch.identity != arch.identity:
            raise ConfigError(
                "train.weights = 'supernet' needs a super-net of full size, and this one was a"
                " proxy: set train.weights = 'scratch'."
            )
        if config.backbone is not None:
            found |= {"backbone": file_sha256(trained_backbone(config.backbone, arch))}
        settings = self.at.hashes_of_config("train", "seed", *task_of(self.at.experiment).tables)
        return {"architecture": arch.sha256, **found, **self.at.hashes_of_data(), **settings}

    def summary(self) -> str:
        """What is trained how long, and from which weights."""
        config = self.at.experiment.train
        arch = config.arch or "the searched architecture"
        return (
            f"{arch} for {config.epochs:g} epochs, weights from {config.backbone or config.weights}"
        )

    def run(self, ctx: StageContext) -> None:
        """Train it."""
        run(ctx, self.architecture())
