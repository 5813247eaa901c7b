"""The training loop. There is one: stand-alone training and every search method run on it.

The engine owns what strategies must never see: optimiser, schedule, mixed precision,
weight averaging, checkpoints, the check that the loss is finite. A step is any function
of the step number that calls ``Engine.train_step``. What is minimised is a module of
its own, the criterion: the engine knows no task.

Resuming is exact: every random draw is a function of (seed, step), so a checkpoint
needs no generator state, and a run killed at any moment ends with the same weights, bit
for bit, as one that was not (on the same CPU and thread count; a GPU's convolutions add
up in no fixed order).
"""

from __future__ import annotations

import io
import math
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from hwnas.config import OptimizerConfig
from hwnas.core.cost import UNITS
from hwnas.document import write_atomic
from hwnas.errors import CheckpointError, ConfigError, DivergenceError
from hwnas.progress import Progress
from hwnas.runs import JsonLines

Metrics = dict[str, float]


DEFAULT_OPTIONS = {"rmsproptf": {"alpha": 0.9, "eps": 1.0}}
"""TuNAS's decay and epsilon, where the configuration names no options."""


_COUNTED = [unit for unit in UNITS.values() if unit.name != "ms"]
COUNTS = {unit.quantity: unit for unit in _COUNTED} | {unit.expected: unit for unit in _COUNTED}
"""What a search logs of a budget that is counted, by name."""

SHOWN_FIRST = (
    "loss",
    "quality",
    "train_accuracy",
    "latency_ms",
    "expected_ms",
    *COUNTS,
    "reward",
    "entropy",
)
"""What people look at first: of a note, a narrow terminal shows only the beginning."""


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, lr: float, table: str = "optimizer"
) -> torch.optim.Optimizer:
    """The optimiser of a model at a rate; no decay of BN, of biases and of what the
    model's ``no_weight_decay()`` names.

    Raises ConfigError, naming the configuration's ``table``, where timm has no such
    optimiser or it takes no such option.
    """
    options = config.options if config.options is not None else DEFAULT_OPTIONS.get(config.name, {})
    try:
        made = create_optimizer_v2(
            model,
            config.name,
            lr=lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **options,
        )
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        raise ConfigError(
            f"{table}.name = {config.name!r} with options {options} cannot be made ({error}): see"
            " timm's optimisers."
        ) from error
    assert isinstance(made, torch.optim.Optimizer)
    return made


def check_optimizer(config: OptimizerConfig, table: str) -> None:
    """Raise ConfigError where an optimiser cannot be made, or keeps no state by which
    inactive weights could decay.
    """
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model, config, config.lr, table)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()  # what it keeps of a weight is there after the first step
    _require_state(optimizer, config, table)


def _require_state(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, table: str = "optimizer"
) -> None:
    if config.inactive_weights == "decay" and not optimizer.state:
        raise ConfigError(
            f"{table}.inactive_weights = 'decay', but {config.name!r} without momentum keeps no state by which"
            f" weights move on: set {table}.momentum, or inactive_weights = 'frozen'."
        )


class Stateful(Protocol):
    """Anything that a checkpoint carries beside the weights (a strategy)."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and containers of them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse."""


class Criterion(Protocol):
    """What a model is trained by: a module, so that its tensors go where the model is."""

    def __call__(self, outputs: Any, y: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of the model's outputs on the targets of a batch, and what else to
        log of it (scalars).
        """

    def to(self, device: torch.device) -> Self:
        """Move to a device."""


class CrossEntropy(nn.Module):
    """Classification: cross-entropy of logits [N, classes] and labels [N]."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the accuracy on the batch."""
        loss = F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        return loss, {"train_accuracy": (logits.detach().argmax(1) == y).float().mean()}


@dataclass(frozen=True)
class Microbatch:
    """One forward pass of an update: a batch, what the model takes beside the images,
    and how much its gradient weighs.

    ``soft_labels`` [N, classes] are a teacher's probabilities; the cross-entropy of the
    model's logits with them is added to the loss.
    """

    x_NCHW: Tensor
    y: Tensor
    forward_args: tuple[Any, ...] = ()
    soft_labels: Tensor | None = None
    weight: float = 1.0


def best_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def flush_denormals() -> None:
    """Let this process's arithmetic take denormal numbers for zero: weights that decay
    make a CPU many times slower otherwise.

    To be called before torch starts its threads, which inherit the mode; so that all
    runs agree in every bit, all stages do.
    """
    torch.set_flush_denormal(True)


@dataclass
class Engine:
    """Trains ``model`` for ``steps`` steps by ``criterion``.

    ``folder`` holds ``checkpoint.pt`` (removed by ``finish``) and ``metrics.jsonl``.
    ``extra`` is saved and restored with the weights.
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
        # mobile networks train two to four times as fast in this layout on a CPU, and
        # no slower on a GPU
        self.model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.loss_of: Criterion = self.criterion.to(self.device)
        config = self.optimizer_config
        self.base_lr = config.lr * self.batch_size / 256
        self.optimizer = make_optimizer(self.model, config, self.base_lr)
        self.ema = (
            ModelEmaV3(self.model, decay=self.ema_decay, use_warmup=True)
            if self.ema_decay
            else None
        )
        self.metrics = JsonLines(self.folder / "metrics.jsonl")
        self.step = 0

    @property
    def ema_model(self) -> nn.Module:
        """The weights to keep: the moving average where one is kept, else the model's own."""
        return self.model if self.ema is None else self.ema.module

    def to_device(self, x_NCHW: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A batch where and how the model wants it."""
        return (
            x_NCHW.to(self.device, non_blocking=True, memory_format=torch.channels_last),
            y.to(self.device, non_blocking=True),
        )

    def autocast(self) -> torch.autocast:
        """bfloat16 on GPUs; full precision on CPUs, most of which have no arithmetic for it."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"
        )

    def train_step(self, x_NCHW: Tensor, y: Tensor, *forward_args: Any) -> Metrics:
        """One update of the weights on a batch. Raises DivergenceError, before the
        update, where the loss is not finite.
        """
        return self.optimizer_step([Microbatch(x_NCHW, y, forward_args)])

    def optimizer_step(self, parts: Sequence[Microbatch]) -> Metrics:
        """One update of the weights by the summed gradients of several forward passes,
        which run one after another.

        Raises DivergenceError, before the update, where a loss is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)  # no decay and no momentum without a gradient
        means: Metrics = {}
        for part in parts:
            for name, value in self._backward(part).items():
                means[name] = means.get(name, 0.0) + value / len(parts)
        if self.optimizer_config.inactive_weights == "decay":
            # those that were used before, also by the run that this one resumes
            for weight in self.optimizer.state:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        if self.optimizer_config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.optimizer_config.clip_norm)
        self.optimizer.step()
        _require_state(self.optimizer, self.optimizer_config)
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        return means

    @property
    def lr(self) -> float:
        """The learning rate of this step."""
        return self.base_lr * schedule(self.step, self.steps, self.optimizer_config.warmup)

    def _backward(self, part: Microbatch) -> Metrics:
        """Add the gradients of one forward pass; its loss and what the criterion says of it."""
        x_NCHW, y = self.to_device(part.x_NCHW, part.y)
        with self.autocast():
            outputs = self.model(x_NCHW, *part.forward_args)
            loss, logged = self.loss_of(outputs, y)
            if part.soft_labels is not None:
                loss = loss + F.cross_entropy(outputs, part.soft_labels)
        value = self.finite(loss)
        (loss * part.weight).backward()  # type: ignore[no-untyped-call]
        return {"loss": value, **{name: float(each.detach()) for name, each in logged.items()}}

    def finite(self, loss: Tensor) -> float:
        """The value of a loss. Raises DivergenceError where it is none."""
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
        """Call ``step(t)`` for the steps that are left, log each, checkpoint now and then.

        ``after`` is called between a step and its checkpoint, so that what it writes
        about a state is there when the state is kept.
        """
        saved = time.monotonic()
        if not self.checkpoint.exists():
            self.save()
        with (
            progress.task(description, self.steps, self.step) as task,
            self.metrics.appending() as log,
        ):
            while self.step < self.steps:
                # dropout draws from the global generator
                torch.manual_seed(self.seed * 1_000_003 + self.step)
                metrics = step(self.step)
                log({"step": self.step, **metrics})
                self.step += 1
                task.advance(note=note_of(metrics))
                after()
                if time.monotonic() - saved > self.checkpoint_seconds or self.step == self.steps:
                    self.save()
                    saved = time.monotonic()

    @property
    def checkpoint(self) -> Path:
        """Where the state is kept between runs."""
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """Write the whole state atomically. Raises DivergenceError, and keeps the old
        one, where a weight is not finite.
        """
        if not all(bool(torch.isfinite(weight).all()) for weight in self.model.parameters()):
            raise self._diverged("a weight is no longer finite")
        state = {
            "step": self.step,
            "steps": self.steps,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "extra": {name: part.state_dict() for name, part in self.extra.items()},
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(self.checkpoint, buffer.getvalue())

    def resume(self) -> bool:
        """Restore the last checkpoint, if there is one, and drop the metrics behind it.

        Raises CheckpointError where the file is corrupt or belongs to another run.
        """
        if not self.checkpoint.exists():
            self.metrics.rewrite([])
            return False
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            if state["steps"] != self.steps:
                raise CheckpointError(
                    f"checkpoint {self.checkpoint} is of a run of {state['steps']} steps, not"
                    f" {self.steps}: use --fresh."
                )
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
            for name, part in self.extra.items():
                part.load_state_dict(state["extra"][name])
        except (
            RuntimeError,
            LookupError,
            ValueError,
            TypeError,
            EOFError,
            OSError,
            pickle.UnpicklingError,
        ) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"checkpoint {self.checkpoint} is corrupt or of another network: remove it, or"
                " start again with --fresh."
            ) from error
        self.step = state["step"]
        self.metrics.rewrite([row for row in self.metrics.read() if row["step"] < self.step])
        return True

    def finish(self) -> None:
        """Remove the checkpoint: the stage's own outputs replace it."""
        self.checkpoint.unlink(missing_ok=True)


def note_of(metrics: Metrics) -> str:
    """The numbers of a step for a progress bar: ``loss 1.23  quality 0.45  latency 0.5
    ms``, what is in ``SHOWN_FIRST`` first.
    """
    order = [
        *(name for name in SHOWN_FIRST if name in metrics),
        *(name for name in metrics if name not in SHOWN_FIRST),
    ]
    return "  ".join(_shown(name, metrics[name]) for name in order)


def _shown(name: str, value: float) -> str:
    if name.endswith("_ms"):
        return f"{name.removesuffix('_ms')} {value:.3g} ms"
    if name in COUNTS:
        prefix = "expected " if name == COUNTS[name].expected else ""
        return f"{prefix}{COUNTS[name].shown(value)}"
    return f"{name.removeprefix('train_')} {value:.3g}"


def steps_of(epochs: float, images: int, batch_size: int) -> int:
    """Optimiser steps of a number of epochs."""
    return max(1, round(epochs * images / batch_size))


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate: linear from 0 over the first ``warmup`` part of the
    steps, then half a cosine to 0.
    """
    position = step / steps
    if position < warmup:
        return (step + 1) / (warmup * steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (position - warmup) / (1 - warmup)))


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
