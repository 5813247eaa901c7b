"""The training stage: takes an architecture and returns a trained network.

It trains on all training images, including those that the search holds out.
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
from hwnas.networks import architecture, data_for
from hwnas.nn.checkpoint import load_network, save_network
from hwnas.nn.network import Network, network_of
from hwnas.runs import StageContext
from hwnas.stages import Stage
from hwnas.task import EvaluationSettings, evaluate, task_of
from hwnas.train.initial_weights import (
    WEIGHTS,
    backbone_file,
    load_initial_weights,
    trained_backbone,
)
from hwnas.train.result import TrainResult
from hwnas.train.validation import Validation


def outputs(experiment: Experiment) -> list[str]:
    """The files that the stage writes: the weights, the result, and those of the task."""
    return [WEIGHTS, "train.json", *task_of(experiment).files]


@dataclass(frozen=True)
class TrainingRun:
    """A training run that is ready to start, or to resume."""

    engine: Engine
    test: Images
    batches: Iterator[Batch]
    validation: Validation

    def step(self, number: int) -> Metrics:
        """One update on the next batch."""
        del number  # ``batches`` begins at the engine's step and moves along with it
        return self.engine.train_step(*next(self.batches))


def begin(ctx: StageContext, arch: Architecture) -> TrainingRun:
    """Set up a training run, and restore the checkpoint in the stage's folder, if any."""
    config = ctx.experiment.train
    seed = ctx.experiment.seed
    data = data_for(ctx.experiment, arch)
    train = load_images(data, "all", augment=True)
    test = load_images(data, "test")
    generator = torch.Generator().manual_seed(seed)
    network = network_of(arch, dropout=config.dropout, generator=generator)
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
    engine.resume(ctx.progress)

    # These two continue at the engine's step, so they come after it has resumed.
    validation = Validation(ctx, engine, test, len(train) / config.batch_size)
    validation.resume()
    batches = training_batches(
        train, config.batch_size, seed=seed, steps=range(engine.step, steps), workers=data.workers
    )
    return TrainingRun(engine, test, batches, validation)


def run(ctx: StageContext, arch: Architecture) -> None:
    """Train, and write ``model.safetensors`` (averaged weights and BN statistics),
    ``train.json`` and the other ``outputs``.

    The validation curve is written to ``validation.jsonl`` during the training.
    """
    config = ctx.experiment.train
    training = begin(ctx, arch)
    engine = training.engine
    test = training.test
    engine.fit(training.step, ctx.progress, f"training {arch.name}", training.validation)

    trained = engine.ema_model
    assert isinstance(trained, Network)
    task = task_of(ctx.experiment)
    settings = EvaluationSettings(config.batch_size, workers=ctx.experiment.data.workers)
    evaluated = evaluate(task, trained, test, settings)
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

    metadata = {}
    if task.curve:
        row, name = next(iter(task.curve.items()))
        value = evaluated.metrics[name]
        if value is not None:
            metadata[row] = f"{value:.4f}"
    save_network(trained, ctx.folder / WEIGHTS, metadata)
    result.save(ctx.folder / "train.json")
    engine.finish()
    ctx.progress.info(f"trained {arch.name}: {result.quality}")
    if result.caution is not None:
        ctx.progress.warning(str(result.caution))


class Train(Stage):
    """Trains the searched architecture, or the one that ``train.arch`` names."""

    name = "train"
    result = "train.json"
    reported = ("train.json", "arch.json", "pictures.json", "metrics.jsonl", "validation.jsonl")
    estimate = "hwnas.estimate.training:of_training"
    checked = ("train",)
    trains = True

    @classmethod
    def check_settings(cls, experiment: Experiment, space: SearchSpace) -> None:
        """Check the optimiser, the initial weights, and a named architecture against the
        data.
        """
        config = experiment.train
        supernet = experiment.search.supernet
        check_optimizer(config.optimizer, "train.optimizer")

        is_proxy = supernet.proxy_width != 1.0 or supernet.proxy_depth is not None
        # An already trained super-net (``search.weights``) has settings of its own.
        trains_supernet = config.arch is None and experiment.search.weights is None
        if config.weights == "supernet" and is_proxy and trains_supernet:
            raise ConfigError(
                "train.weights = 'supernet' needs a super-net of full size, and"
                " search.supernet.proxy_width or proxy_depth makes it smaller: set train.weights ="
                " 'scratch'."
            )

        arch = None
        if config.arch is not None:
            arch = architecture(experiment, space, Path())
        if config.backbone is not None:
            if arch is not None:
                trained_backbone(config.backbone, arch)
            else:
                # The search has not chosen the blocks yet, so only the file can be checked.
                backbone_file(config.backbone)

    @property
    def outputs(self) -> list[str]:
        """The weights, the result, and the files of the task."""
        return outputs(self.at.experiment)

    @property
    def searched(self) -> Path:
        """The file of the searched architecture."""
        return self.at.path("search", "arch.json")

    def architecture(self) -> Architecture:
        """The architecture to train. Raises ConfigError if it does not fit the data or the
        task.
        """
        return architecture(self.at.experiment, self.at.space, self.searched)

    def inputs(self) -> dict[str, str]:
        """Hashes of the architecture, the initial weights, the data and the settings, by
        name.
        """
        config = self.at.experiment.train
        inherited = self.at.path("search", "supernet.safetensors")
        files: dict[str, str] = {}
        if not config.arch:
            files |= self.at.hash_of(self.searched, "search")
        if config.weights == "supernet":
            files |= self.at.hash_of(inherited, "search")

        arch = self.architecture()
        if config.weights == "supernet":
            if arch != Architecture.load(self.searched):
                raise ConfigError(
                    "train.weights = 'supernet' only fits the searched architecture: set"
                    " train.weights = 'scratch'."
                )
            if load_network(inherited).arch.identity != arch.identity:
                raise ConfigError(
                    "train.weights = 'supernet' needs a super-net of full size, and this one was a"
                    " proxy: set train.weights = 'scratch'."
                )
        if config.backbone is not None:
            files["backbone"] = file_sha256(trained_backbone(config.backbone, arch))
        data = self.at.hashes_of_data("train", "test")
        settings = self.at.hashes_of_config("train", "seed", *task_of(self.at.experiment).tables)
        return {"architecture": arch.sha256, **files, **data, **settings}

    def summary(self) -> str:
        """The architecture, the number of epochs, and the initial weights."""
        config = self.at.experiment.train
        arch = config.arch or "the searched architecture"
        weights = config.backbone or config.weights
        return f"{arch} for {config.epochs:g} epochs, weights from {weights}"

    def run(self, ctx: StageContext) -> None:
        """Train the architecture."""
        run(ctx, self.architecture())
