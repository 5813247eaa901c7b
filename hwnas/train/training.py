"""The work of the training stage: trains a network and writes its weights and its
result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import nn

from hwnas.config import AugmentationConfig, Experiment, TrainConfig
from hwnas.core.arch import Architecture
from hwnas.data.images import Batch, Images, load_images, training_batches
from hwnas.data.mosaic import Mosaic
from hwnas.data.training_augmentation import Mixing, TrainingAugmentation
from hwnas.engine import BinaryCrossEntropy, Criterion, Engine, Metrics, Microbatch, steps_of
from hwnas.networks import data_for
from hwnas.nn.blocks import set_drop_path
from hwnas.nn.checkpoint import save_network
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.nn.freezing import Freezable
from hwnas.nn.network import Network, network_of
from hwnas.nn.shared import resized
from hwnas.runs import StageContext
from hwnas.task import EvaluationSettings, evaluate, task_of
from hwnas.train.initial_weights import load_initial_weights
from hwnas.train.progressive import Progression, progression_of
from hwnas.train.result import WEIGHTS, TrainResult
from hwnas.train.teacher import Teacher
from hwnas.train.validation import Validation


@dataclass(frozen=True)
class TrainingRun:
    """A training run that is ready to start, or to resume."""

    engine: Engine
    test: Images
    batches: Iterator[Batch]
    validation: Validation
    mixing: Mixing | None = None
    teacher: Teacher | None = None
    progression: Progression | None = None
    drop_path: float = 0.0
    """The probability at the end that an image loses the op of an edge of a cell. It rises
    from 0, as in DARTS's code.
    """
    frozen_steps: int = 0
    """In how many steps, from the first, the backbone is not trained."""
    freezes_norms: bool = False
    """Whether the BNs of the backbone never change."""

    def step(self, number: int) -> Metrics:
        """One update on the next batch."""
        network = self.engine.model
        assert isinstance(network, Freezable)
        network.freeze(weights=number < self.frozen_steps, norms=self.freezes_norms)
        if self.drop_path:
            assert isinstance(network, ClassificationNetwork)
            network.drop_path = self.drop_path * number / self.engine.steps
        # ``batches`` begins at the engine's step and moves along with it
        x_NCHW, y = next(self.batches)
        if self.mixing is not None:
            seed = int(np.random.default_rng([self.engine.seed, number, 2]).integers(2**62))
            x_NCHW, y = self.mixing(x_NCHW, y, seed)
        x_NCHW, y = self.engine.to_device(x_NCHW, y)
        size = None if self.progression is None else self.progression.size(number)
        batch = Microbatch(resized(x_NCHW, size), y)
        if self.teacher is not None:
            batch = replace(
                batch,
                soft_labels=self.teacher.probabilities(x_NCHW),
                distillation=self.teacher.distillation,
            )
        return self.engine.optimizer_step([batch])


def begin(ctx: StageContext, arch: Architecture) -> TrainingRun:
    """Set up a training run, and restore the checkpoint in the stage's folder, if any."""
    config = ctx.experiment.train
    seed = ctx.experiment.seed
    data = data_for(ctx.experiment, arch)
    train = load_images(data, "all", augment=True)
    test = load_images(data, "test")
    augmentation = config.augmentation
    if augmentation.without_mosaic != AugmentationConfig():
        train.training_augmentation = TrainingAugmentation(augmentation, data)
    mixing = None
    if augmentation.mixes:
        mixing = Mixing(augmentation, data.classes, config.label_smoothing)
    generator = torch.Generator().manual_seed(seed)
    network = network_of(arch, dropout=config.dropout, generator=generator)
    load_initial_weights(network, ctx)
    if not arch.graph:
        set_drop_path(list(network.blocks), config.drop_path)
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
        criterion=_criterion(ctx.experiment, arch),
        ema_decay=config.ema_decay,
        checkpoint_seconds=ctx.experiment.checkpoint_seconds,
    )
    engine.resume(ctx.progress)

    # These two continue at the engine's step, so they come after it has resumed.
    validation = Validation(ctx, engine, test, len(train) / config.batch_size)
    validation.resume()
    batches = _batches(train, ctx.experiment, range(engine.step, steps))
    teacher = None
    if config.teacher is not None:
        teacher = Teacher(config, data, engine.device)
    progression = None
    if config.progressive.start < 1:
        progression = progression_of(config.progressive, arch, steps)
    return TrainingRun(
        engine,
        test,
        batches,
        validation,
        mixing=mixing,
        teacher=teacher,
        progression=progression,
        drop_path=config.drop_path if arch.graph else 0.0,
        frozen_steps=round(config.freeze * steps),
        freezes_norms=config.freeze_bn,
    )


def _criterion(experiment: Experiment, arch: Architecture) -> Criterion:
    """The loss that ``train.loss`` names: by default that of the task."""
    config = experiment.train
    if config.loss == "bce":
        return BinaryCrossEntropy(config.label_smoothing)
    return task_of(experiment).criterion(arch, config.label_smoothing)


def _batches(train: Images, experiment: Experiment, remaining: range) -> Iterator[Batch]:
    """The batches of the ``remaining`` steps of a training, all up to its last one: first
    those with mosaics, if the experiment has them, then those without.

    A batch depends on its step alone, so a training that is resumed gets the same ones on
    either side of the border.
    """
    augmentation = experiment.train.augmentation

    def batches(images: Images, steps: range) -> Iterator[Batch]:
        return training_batches(
            images,
            experiment.train.batch_size,
            seed=experiment.seed,
            steps=steps,
            workers=experiment.data.workers,
            repeats=augmentation.repeats,
        )

    if augmentation.mosaic == 0:
        return batches(train, remaining)
    steps = remaining.stop
    border = max(remaining.start, steps - round(augmentation.mosaic_off * steps))
    with_mosaics = batches(Mosaic(train, augmentation.mosaic), range(remaining.start, border))
    return chain(with_mosaics, batches(train, range(border, steps)))


def _initial_weights(config: TrainConfig) -> str:
    """Where the weights of a training came from, for its result."""
    if config.pretrained is not None:
        return "pretrained"
    return config.weights if config.backbone is None else "backbone"


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
        weights=_initial_weights(config),
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
