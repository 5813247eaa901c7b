"""The training loop, shared by standalone training and all search methods.

The engine owns what strategies must never see: optimiser, schedule, mixed precision,
weight averaging, checkpoints, and the check that the loss is finite. A step is any
function of the step number that calls ``Engine.train_step`` or
``Engine.optimizer_step``. The loss is a separate module, the criterion, so the engine
does not depend on the task.

Resuming is exact: a run that is killed at any moment and resumed ends with the same
weights, bit for bit, as an uninterrupted one. Every random draw is a function of
(seed, step), so checkpoints need no generator state. This holds on the same CPU with
the same number of threads; convolutions on a GPU sum in no fixed order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy as TimmBinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from hwnas import interruption
from hwnas.config import OptimizerConfig
from hwnas.config.search import ConstantSchedule, CosineSchedule, StepSchedule
from hwnas.core.cost import UNITS
from hwnas.errors import CheckpointError, ConfigError, DivergenceError
from hwnas.failures import is_out_of_memory
from hwnas.progress import Progress
from hwnas.runs import JsonLines
from hwnas.state_check import (
    counts_problem,
    optimizer_problem,
    part_problem,
    weights_problem,
)
from hwnas.state_file import StateFile

Metrics = dict[str, float]

COSINE = CosineSchedule()
"""The schedule without settings."""

DEFAULT_OPTIONS = {"rmsproptf": {"alpha": 0.9, "eps": 1.0}}
"""Optimiser name -> options used unless the configuration sets ``options``. Those of
RMSProp are TuNAS's decay and epsilon.
"""


_COUNTED = [unit for unit in UNITS.values() if unit.name != "ms"]
COUNTED_UNITS = {unit.quantity: unit for unit in _COUNTED} | {
    unit.expected: unit for unit in _COUNTED
}
"""Name of a metric -> unit, for costs that are counted (such as MACs) rather than
measured. A search logs the cost of an architecture and the expected cost of its policy.
"""

SHOWN_FIRST = (
    "loss",
    "quality",
    "train_accuracy",
    "latency_ms",
    "expected_ms",
    *COUNTED_UNITS,
    "reward",
    "entropy",
)
"""Metrics shown first on the progress bar: narrow terminals cut off the rest."""


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, lr: float, section: str = "optimizer"
) -> torch.optim.Optimizer:
    """The optimiser of a model at learning rate ``lr``.

    BN, biases, and the parameters that the model's ``no_weight_decay()`` names have no
    weight decay. Raises ConfigError, which names the ``section`` of the configuration,
    if timm lacks the optimiser or the optimiser does not take an option.
    """
    options: Mapping[str, Any] | None = config.options
    if options is None:
        options = DEFAULT_OPTIONS.get(config.name, {})
    layered = {} if config.layer_decay == 1.0 else {"layer_decay": config.layer_decay}
    try:
        optimizer = create_optimizer_v2(
            model,
            config.name,
            lr=lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **layered,
            **options,
        )
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        raise ConfigError(
            f"{section}.name = {config.name!r} with options {options} cannot be created ({error}):"
            " see timm's optimisers."
        ) from error
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def check_optimizer(config: OptimizerConfig, section: str) -> None:
    """Raise ConfigError if an optimiser cannot be created, or if
    ``inactive_weights = 'decay'`` and it keeps no state.
    """
    model = nn.Linear(2, 2)
    alike = config.model_copy(update={"layer_decay": 1.0})
    optimizer = make_optimizer(model, alike, config.lr, section)
    # Optimisers create their state in the first step, so run one.
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    _require_state(optimizer, config, section)


def _require_state(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, section: str = "optimizer"
) -> None:
    """Raise ConfigError if inactive weights should decay, but the optimiser has no
    state after its first step. The keys of the state tell which weights have been used.
    """
    if config.inactive_weights == "decay" and not optimizer.state:
        raise ConfigError(
            f"{section}.inactive_weights = 'decay', but {config.name!r} without momentum keeps no"
            f" state that would move inactive weights: set {section}.momentum, or"
            " inactive_weights = 'frozen'."
        )


class Stateful(Protocol):
    """State that a checkpoint holds in addition to the weights, such as a strategy's."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and containers of them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` has returned."""


class Criterion(Protocol):
    """The loss that a model is trained on. A module, so that its tensors can be moved to
    the model's device.
    """

    def __call__(self, outputs: Any, y: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of the model's outputs on the targets of a batch, and further scalars
        to log, by name.
        """

    def to(self, device: torch.device) -> Self:
        """Move to a device."""


class CrossEntropy(nn.Module):
    """The criterion of classifiers: cross-entropy of logits [N, classes] and labels [N], or
    probabilities [N, classes], which are not smoothed again.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss, and the accuracy on the batch (``train_accuracy``)."""
        # targets that are probabilities have been smoothed where they were mixed
        label_smoothing = self.label_smoothing if y.dim() == 1 else 0.0
        loss = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
        return loss, {"train_accuracy": _accuracy(logits, y)}


class BinaryCrossEntropy(nn.Module):
    """The other criterion of classifiers, timm's: for each class on its own whether the
    image shows it, averaged over images and classes. Targets are as for ``CrossEntropy``.

    Source: Wightman et al., "ResNet strikes back", arXiv 2110.00476.

    *Difference from the paper*: mixed targets stay probabilities; the paper makes 1 of all
    that are not 0 (``target_threshold`` in timm).
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.loss = TimmBinaryCrossEntropy(smoothing=label_smoothing)

    def forward(self, logits: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss, and the accuracy on the batch (``train_accuracy``)."""
        # timm's smoothed targets have the precision of the logits, bfloat16 on a GPU
        return self.loss(logits.float(), y), {"train_accuracy": _accuracy(logits, y)}


def _accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """The fraction of images whose highest logit [N, classes] is their label [N], or their
    most probable class [N, classes].
    """
    labels = y if y.dim() == 1 else y.argmax(1)
    return (logits.detach().argmax(1) == labels).float().mean()


@dataclass(frozen=True)
class Distillation:
    """How much a teacher's probabilities count beside the targets.

    With the loss L of the targets, the share s and the temperature T, the loss becomes

        2 ((1 - s) L + s T^2 CE(softmax(teacher / T), student / T))

    where T^2 keeps the gradient's size (Hinton et al., arXiv 1503.02531). The factor 2
    makes the default the plain sum of two cross-entropies.
    """

    share: float = 0.5
    temperature: float = 1.0

    def __call__(self, loss: Tensor, logits: Tensor, soft_labels: Tensor) -> Tensor:
        """The loss from that of the targets, logits [N, classes], and the probabilities
        [N, classes] that the teacher gives at this temperature.
        """
        soft_loss = F.cross_entropy(logits / self.temperature, soft_labels)
        soft_weight = 2 * self.share * self.temperature**2
        return 2 * (1 - self.share) * loss + soft_weight * soft_loss


@dataclass(frozen=True)
class Microbatch:
    """One forward and backward pass of an update.

    ``x_NCHW`` are images, ``y`` their targets and ``forward_args`` the model's arguments
    after the images. ``soft_labels`` [N, classes] are a teacher's probabilities, which the
    model learns as ``distillation`` says. ``weight`` multiplies the gradient of the pass.
    """

    x_NCHW: Tensor
    y: Tensor
    forward_args: tuple[Any, ...] = ()
    soft_labels: Tensor | None = None
    weight: float = 1.0
    distillation: Distillation = Distillation()


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def flush_denormals() -> None:
    """Make this process treat denormal numbers as zero. Weights that shrink towards zero
    become denormal, and CPUs compute with those many times more slowly.

    Call it before torch starts its threads, which inherit the mode. All stages call it,
    so that their results agree bit for bit.
    """
    torch.set_flush_denormal(True)


@dataclass
class Engine:
    """Trains ``model`` on ``criterion`` for ``steps`` steps.

    ``folder`` holds ``checkpoint.pt`` and the one before it (removed by ``finish``), and
    ``metrics.jsonl``.
    ``optimizer_config.lr`` is for batches of 256 and scales with ``batch_size``.
    ``ema_decay`` = 0 keeps no moving average of the weights. ``extra`` is saved and
    restored with the weights.
    """

    model: nn.Module
    optimizer_config: OptimizerConfig
    steps: int
    batch_size: int
    seed: int
    folder: Path
    criterion: Criterion = field(default_factory=partial(CrossEntropy, 0.1))
    ema_decay: float = 0.0
    checkpoint_seconds: float = 20.0
    extra: Mapping[str, Stateful] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = best_device()
        flush_denormals()
        # Mobile networks train two to four times as fast in this layout on a CPU, and
        # no slower on a GPU.
        self.model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.criterion = self.criterion.to(self.device)
        config = self.optimizer_config
        self.base_lr = config.lr * self.batch_size / 256
        self.optimizer = make_optimizer(self.model, config, self.base_lr)
        self.ema: ModelEmaV3 | None = None
        if self.ema_decay:
            self.ema = ModelEmaV3(self.model, decay=self.ema_decay, use_warmup=True)
        self.metrics = JsonLines(self.folder / "metrics.jsonl")
        self.state_file = StateFile(self.folder)
        self.step = 0

    @property
    def ema_model(self) -> nn.Module:
        """The model to evaluate and keep: the moving average of the weights if
        ``ema_decay`` is not 0, else ``model``.
        """
        return self.model if self.ema is None else self.ema.module

    def to_device(self, x_NCHW: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A batch on the model's device and in its memory layout."""
        return (
            x_NCHW.to(self.device, non_blocking=True, memory_format=torch.channels_last),
            y.to(self.device, non_blocking=True),
        )

    def autocast(self) -> torch.autocast:
        """bfloat16 on GPUs. CPUs use full precision, as most cannot compute in bfloat16."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"
        )

    def seed_torch(self) -> None:
        """Seed torch's global generator from (seed, step)."""
        torch.manual_seed(self.seed * 1_000_003 + self.step)

    def train_step(self, x_NCHW: Tensor, y: Tensor, *forward_args: Any) -> Metrics:
        """One update of the weights on a batch. Returns the loss and the criterion's
        metrics. Raises DivergenceError, before the update, if the loss is not finite.
        """
        return self.optimizer_step([Microbatch(x_NCHW, y, forward_args)])

    def optimizer_step(self, parts: Sequence[Microbatch]) -> Metrics:
        """One update of the weights by the sum of the gradients of several passes, which
        run one after another. Returns the unweighted means of the metrics of the passes.

        Raises DivergenceError, before the update, if a loss is not finite.
        """
        for group in self.optimizer.param_groups:
            # timm sets lr_scale for layer-wise learning rates.
            group["lr"] = self.lr * group.get("lr_scale", 1.0)
        self.model.train()
        # Optimisers skip weights whose gradient is None. Weights that no pass uses are
        # therefore left unchanged: neither weight decay nor momentum applies to them.
        self.optimizer.zero_grad(set_to_none=True)

        means: Metrics = {}
        for part in parts:
            for name, value in self._backward(part).items():
                means[name] = means.get(name, 0.0) + value / len(parts)

        if self.optimizer_config.inactive_weights == "decay":
            # The keys of the optimiser's state are the weights that have been used so
            # far, also before a resume. With a zero gradient, weight decay and momentum
            # apply to those that this update did not use.
            for weight in self.optimizer.state:
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
        if self.optimizer_config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.optimizer_config.clip_norm)
        self.optimizer.step()
        # only now: optimisers create their state in the first step
        _require_state(self.optimizer, self.optimizer_config)
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        return means

    @property
    def lr(self) -> float:
        """The learning rate of this step."""
        config = self.optimizer_config
        return self.base_lr * lr_factor(self.step, self.steps, config.warmup, config.schedule)

    def _backward(self, part: Microbatch) -> Metrics:
        """Run one pass and add its gradients to those of the weights. Returns its loss
        and the criterion's metrics.
        """
        x_NCHW, y = self.to_device(part.x_NCHW, part.y)
        with self.autocast():
            outputs = self.model(x_NCHW, *part.forward_args)
            loss, logged = self.criterion(outputs, y)
            if part.soft_labels is not None:
                loss = part.distillation(loss, outputs, part.soft_labels)
        value = self.check_finite(loss)
        (loss * part.weight).backward()  # type: ignore[no-untyped-call]
        scalars = {name: float(scalar.detach()) for name, scalar in logged.items()}
        return {"loss": value, **scalars}

    def check_finite(self, loss: Tensor) -> float:
        """The value of a loss. Raises DivergenceError if it is infinite or NaN."""
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value}")
        return value

    def _diverged(self, what: str) -> DivergenceError:
        return DivergenceError(
            f"{what} at step {self.step} of {self.steps} (learning rate"
            f" {self.optimizer.param_groups[0]['lr']:.4g}): lower optimizer.lr or set"
            f" optimizer.clip_norm; the last good state is kept in {self.checkpoint}."
        )

    def fit(
        self,
        step: Callable[[int], Metrics],
        progress: Progress,
        description: str,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Call ``step(t)`` for all remaining steps, log each, and save a checkpoint every
        ``checkpoint_seconds`` and after the last step.

        ``after`` is called after every step and before its checkpoint is saved. What
        ``after`` writes about a step is therefore on disk before the checkpoint. A
        signal that asks the program to end takes effect after the current step, when a
        checkpoint of it has been saved; see ``interruption.deferred``.
        """
        saved_at = time.monotonic()
        # A run that diverges early still has the good state that the error message names.
        if not self.checkpoint.exists():
            self.save()
        with (
            interruption.deferred() as interrupted,
            progress.task(description, self.steps, self.step) as task,
            self.metrics.appending() as log,
        ):
            while self.step < self.steps and interrupted.number is None:
                # Dropout draws from torch's global generator.
                self.seed_torch()
                metrics = step(self.step)
                log({"step": self.step, **metrics})
                self.step += 1
                # a terminal that was closed, which sends SIGHUP, refuses to be written to
                if interrupted.number is None:
                    task.advance(note=note_of(metrics))
                after()
                is_due = time.monotonic() - saved_at > self.checkpoint_seconds
                is_over = self.step == self.steps or interrupted.number is not None
                if is_due or is_over:
                    self.save()
                    saved_at = time.monotonic()

    @property
    def checkpoint(self) -> Path:
        """The file that holds the newest state between runs."""
        return self.state_file.path

    def save(self) -> None:
        """Write the whole state atomically. If a weight is not finite, raises
        DivergenceError and keeps the previous checkpoint.
        """
        if not all(bool(torch.isfinite(weight).all()) for weight in self.model.parameters()):
            raise self._diverged("a weight is no longer finite")
        self.state_file.write(
            {
                "step": self.step,
                "steps": self.steps,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": None if self.ema is None else self.ema.module.state_dict(),
                "extra": {name: part.state_dict() for name, part in self.extra.items()},
            }
        )

    def resume(self, progress: Progress | None = None) -> bool:
        """Restore the last checkpoint, and drop the metrics of later steps. Returns
        whether there was a checkpoint.

        If that file is damaged, the checkpoint before it is restored, which ``progress``
        reports. Raises CheckpointError if there is none, or if the checkpoint belongs to
        another run.
        """
        if not self.state_file.exists():
            self.metrics.rewrite([])
            return False
        state = self.state_file.read(self.device, progress or Progress())
        problem = self._problem(state)
        if problem is not None:
            raise self._refused(problem)
        try:
            self._restore(state)
        except Exception as error:  # a part of a plug-in raises whatever a wrong state leads to
            if is_out_of_memory(error):
                raise
            raise self._refused("belongs to another run or network") from error
        self.step = state["step"]
        rows = self.metrics.read()
        self.metrics.rewrite([row for row in rows if _is_before(row, self.step)])
        return True

    def _problem(self, state: Any) -> str | None:
        """Why a state does not belong to this training; None if it does."""
        problem = counts_problem(state, self.steps)
        if problem is None:
            problem = weights_problem(self.model, state["model"])
        if problem is None and self.ema is not None:
            problem = weights_problem(self.ema.module, state["ema"])
        if problem is None:
            problem = optimizer_problem(
                self.model, self._another_optimizer, state["optimizer"], state["step"]
            )
        for name, part in self.extra.items():
            if problem is None:
                problem = part_problem(name, part.state_dict(), state["extra"])
        return problem

    def _another_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(model, self.optimizer_config, self.base_lr)

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        settings = [set(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        # only now: torch adds settings that were new after the checkpoint was written
        for names, group in zip(settings, self.optimizer.param_groups, strict=True):
            missing = names - group.keys()
            if missing:
                raise LookupError(f"the optimiser's setting {min(missing)!r} is missing")
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        for name, part in self.extra.items():
            part.load_state_dict(state["extra"][name])

    def _refused(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self.checkpoint} {problem}: use --fresh to start again, which moves the"
            " earlier results aside."
        )

    def finish(self) -> None:
        """Remove the checkpoints, which the stage's outputs replace."""
        self.state_file.remove()


def _is_before(row: Any, step: int) -> bool:
    """Whether a row of the log belongs to a step before ``step``. A row that a person or
    a bad disk has changed belongs to none.
    """
    number = row.get("step") if isinstance(row, dict) else None
    return isinstance(number, int) and number < step


def note_of(metrics: Metrics) -> str:
    """The metrics of a step for a progress bar: ``loss 1.23  quality 0.45  latency 0.5
    ms``. Those in ``SHOWN_FIRST`` come first.
    """
    names = [name for name in SHOWN_FIRST if name in metrics]
    names += [name for name in metrics if name not in SHOWN_FIRST]
    return "  ".join(_shown(name, metrics[name]) for name in names)


def _shown(name: str, value: float) -> str:
    if name.endswith("_ms"):
        return f"{name.removesuffix('_ms')} {value:.3g} ms"
    if name in COUNTED_UNITS:
        unit = COUNTED_UNITS[name]
        prefix = "expected " if name == unit.expected else ""
        return f"{prefix}{unit.shown(value)}"
    return f"{name.removeprefix('train_')} {value:.3g}"


def steps_of(epochs: float, images: int, batch_size: int) -> int:
    """The number of optimiser steps in a number of epochs, at least 1."""
    return max(1, round(epochs * images / batch_size))


def lr_factor(
    step: int,
    steps: int,
    warmup: float,
    schedule: CosineSchedule | StepSchedule | ConstantSchedule = COSINE,
) -> float:
    """The factor of the learning rate at ``step`` of ``steps``. It rises linearly to 1
    over the first ``warmup`` (a fraction in 0..1) of the steps, then follows the
    ``schedule``. It is never 0 at the start, so the first step already trains.
    """
    position = step / steps
    if position < warmup:
        return (step + 1) / (warmup * steps + 1)
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "step":
        passed = (position - warmup) / (1 - warmup)
        # a boundary that falls on a step must not be missed by rounding
        return schedule.rate ** math.floor(passed * (schedule.times + 1) + 1e-9)
    angle = math.pi * (position - warmup) * schedule.cycles / (1 - warmup)
    if schedule.cycles > 1:
        angle = (angle + 1e-9) % math.pi
    cosine = 0.5 * (1 + math.cos(angle))
    return schedule.final + (1 - schedule.final) * cosine


@torch.inference_mode()
def accuracy(network: nn.Module, batches: Any) -> float:
    """Top-1 accuracy of ``network`` in eval mode over batches of (images [N, C, H, W],
    labels [N]).
    """
    network.eval()
    device = next(network.parameters()).device
    correct, total = 0, 0
    for x_NCHW, y in batches:
        logits = network(x_NCHW.to(device, memory_format=torch.channels_last))
        correct += int((logits.argmax(1).cpu() == y).sum())
        total += len(y)
    return correct / total
