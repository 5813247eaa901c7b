"""The shared weights of a search: what ``SearchContext`` asks for, done with a
super-net on the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwnas.config import DataConfig
from hwnas.core.arch import Picks
from hwnas.data.images import Batch, Images, training_batches
from hwnas.engine import Criterion, Engine, Microbatch
from hwnas.nn.network import Network
from hwnas.nn.shared import GatedNetworks, Gates, Probes, resized
from hwnas.nn.unrolled import unrolled_gate_gradients
from hwnas.search.evaluator import SupernetEvaluator
from hwnas.search.verbs import Metrics


@dataclass(frozen=True)
class _Position:
    """A stream of batches of every ``stride``-th step, and the last one that was taken."""

    step: int
    stride: int
    stream: Iterator[Batch]
    batch: Batch


class Batches:
    """Training and held-out batches of a step. All are functions of the step, so a
    resumed search sees the same ones.
    """

    def __init__(
        self,
        train: Images,
        held_out: Images,
        data: DataConfig,
        batch_size: int,
        seed: int,
        steps: int,
    ) -> None:
        self.train_images, self.held_out_images, self.data = train, held_out, data
        self.batch_size, self.seed, self.steps = batch_size, seed, steps
        self._streams: dict[int, _Position] = {}

    def train(self, step: int) -> Batch:
        """The training batch of a step."""
        return self._at(0, self.train_images, self.batch_size, self.seed, step)

    def held_out(self, step: int, multiple: int) -> Batch:
        """The held-out batch of a step, ``multiple`` times as large as a training batch."""
        size = min(self.batch_size * multiple, len(self.held_out_images))
        return self._at(multiple, self.held_out_images, size, self.seed + 1, step)

    def _at(self, name: int, images: Images, size: int, seed: int, step: int) -> Batch:
        """The batch of a step, from a stream that steps of equal distance share. Asked
        twice in a step, it is the same batch.
        """
        known = self._streams.get(name)
        if known is not None and known.step == step:
            return known.batch
        stride = 1 if known is None else max(1, step - known.step)
        stream = known.stream if known is not None and known.step + known.stride == step else None
        if stream is None:
            stream = training_batches(
                images,
                size,
                seed=seed,
                first=step,
                last=self.steps,
                stride=stride,
                workers=self.data.workers,
            )
        else:
            assert known is not None
            stride = known.stride
        self._streams[name] = _Position(step, stride, stream, next(stream))
        return self._streams[name].batch


class SupernetWeights:
    """Trains and differentiates a super-net. ``state_dict`` holds the teacher, where there is one.

    Detectors are trained without a teacher: a distillation of boxes is a method of its own.
    """

    def __init__(
        self,
        engine: Engine,
        supernet: GatedNetworks,
        batches: Batches,
        evaluator: SupernetEvaluator,
    ) -> None:
        self.engine, self.supernet, self.batches, self.evaluator = (
            engine,
            supernet,
            batches,
            evaluator,
        )
        self.quality = evaluator.quality
        self.held_out_loss = self.quality.criterion().to(engine.device)
        self.teacher: Network | None = None
        self._taught: Picks = {}

    def train(
        self, gates: Sequence[Gates], *, split: bool, teach: bool, skip_dropout: float
    ) -> Metrics:
        """One update: all gates on the whole batch and their gradients added up, or
        each on its part and the mean of them.
        """
        self.evaluator.forget()
        self._set_fraction()
        x_NCHW, y = self.engine.to_device(*self.batches.train(self.engine.step))
        shares = _shares(x_NCHW, y, len(gates) if split else 1)
        teach = teach and self.quality.of_cross_entropy
        taught = [(x, labels, self._soft(x) if teach else None) for x, labels in shares] * (
            1 if split else len(gates)
        )
        return self.engine.optimizer_step(
            [
                Microbatch(
                    x, labels, (each, None, skip_dropout), soft_labels, weight=len(labels) / len(y)
                )
                for each, (x, labels, soft_labels) in zip(gates, taught, strict=True)
            ]
        )

    def _set_fraction(self) -> None:
        """What the super-net's schedules go by: here and not once a step, as a resumed
        step may begin with any of these calls.
        """
        self.supernet.fraction = self.engine.step / self.engine.steps

    @torch.no_grad()
    def _soft(self, x_NCHW: Tensor) -> Tensor:
        """The teacher's probabilities [N, classes]."""
        assert self.teacher is not None, "no teacher is remembered yet"
        self.teacher.train()  # the statistics of the batch, as in the super-net
        with self.engine.autocast():
            return torch.softmax(
                self.teacher(resized(x_NCHW, self.teacher.arch.resolution)).float(), 1
            )

    @torch.no_grad()
    def qualities(self, gates: Sequence[Gates], multiple: int) -> list[float]:
        """Quality of each on its part of the held-out batch of this step."""
        x_NCHW, y = self.engine.to_device(*self.batches.held_out(self.engine.step, multiple))
        self._set_fraction()
        self.supernet.eval()
        found = []
        for each, (x_part, y_part) in zip(gates, _shares(x_NCHW, y, len(gates)), strict=True):
            with self.engine.autocast():
                outputs = self.supernet(x_part, each)
            found.append(self.quality.of_outputs(outputs, y_part))
        return found

    def gate_gradients(
        self, gates: Gates, probes: Probes, order: int, skip_dropout: float
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Held-out loss in training mode, and its derivative by the gates: at the
        weights, or after a virtual step.

        Weights, their ``grad`` and BN's running statistics stay as they are. The second
        order takes no probes.
        """
        assert self.supernet.shares, "networks that share nothing have no gates to differentiate"
        self._set_fraction()
        self.supernet.train()
        self.supernet.tracking = False
        try:
            return self._gate_gradients(gates, probes, order, skip_dropout)
        finally:
            self.supernet.tracking = True

    def _gate_gradients(
        self, gates: Gates, probes: Probes, order: int, skip_dropout: float
    ) -> tuple[float, dict[str, np.ndarray]]:
        leaves = {
            key: torch.as_tensor(gate).to(self.engine.device, torch.float32).requires_grad_()
            for key, gate in gates.items()
        }
        held_out = self.engine.to_device(*self.batches.held_out(self.engine.step, 1))
        if order == 2:
            assert not probes, "the second order takes no probes"
            return self._unrolled(leaves, held_out, skip_dropout)
        with self.engine.autocast():
            loss = self._loss(self.held_out_loss, held_out, leaves, probes, skip_dropout)
        value = self.engine.finite(loss)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        zero = {key: np.zeros(len(leaf)) for key, leaf in leaves.items()}
        return value, zero | {
            key: _array(gradient)
            for key, gradient in zip(leaves, found, strict=True)
            if gradient is not None
        }

    def _loss(
        self, criterion: Criterion, batch: Batch, gates: Gates, probes: Probes, skip_dropout: float
    ) -> Tensor:
        loss, _ = criterion(self.supernet(batch[0], gates, probes, skip_dropout), batch[1])
        return loss

    def _unrolled(
        self, leaves: Mapping[str, Tensor], held_out: Batch, skip_dropout: float
    ) -> tuple[float, dict[str, np.ndarray]]:
        """DARTS's second order. The virtual step is one of SGD, with the momentum
        buffers where that is the optimiser.

        In full precision: the finite difference moves weights by less than bfloat16, or
        a GPU's TF32, resolves.
        """
        train = self.engine.to_device(*self.batches.train(self.engine.step))
        groups = [
            (weight, group)
            for group in self.engine.optimizer.param_groups
            for weight in group["params"]
        ]
        momentum = (
            self.engine.optimizer_config.momentum
            if isinstance(self.engine.optimizer, torch.optim.SGD)
            else 0.0
        )
        buffers = [
            self.engine.optimizer.state.get(weight, {}).get("momentum_buffer") if momentum else None
            for weight, _ in groups
        ]

        def loss_on(batch: Batch, criterion: Criterion) -> Any:
            def loss(gates: Gates) -> Tensor:
                # the same dropout masks every time
                torch.manual_seed(self.engine.seed * 1_000_003 + self.engine.step)
                return self._loss(criterion, batch, gates, {}, skip_dropout)

            return loss

        with torch.backends.cudnn.flags(allow_tf32=False):
            value, gradients = unrolled_gate_gradients(
                loss_on(train, self.engine.loss_of),
                loss_on(held_out, self.held_out_loss),
                [weight for weight, _ in groups],
                leaves,
                lr=self.engine.lr,
                momentum_buffers=buffers,
                momentum=momentum,
                weight_decay=[group["weight_decay"] for _, group in groups],
            )
        self.engine.finite(torch.tensor(value))
        return value, {key: _array(gradient) for key, gradient in gradients.items()}

    def remember_teacher(self, picks: Picks) -> None:
        """Extract and keep the network of ``picks``."""
        self.teacher, self._taught = (
            self.supernet.extract(picks).to(memory_format=torch.channels_last),
            dict(picks),
        )

    def grow(self, number: int) -> None:
        """Go on with super-net ``number``; evaluations of the earlier one are forgotten."""
        if self.supernet.grow(number):
            self.evaluator.forget()

    def state_dict(self) -> dict[str, Any]:
        """The teacher's picks and weights."""
        return {
            "picks": self._taught,
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the teacher."""
        if state["teacher"] is None:
            self.teacher, self._taught = None, {}
            return
        self.remember_teacher(state["picks"])
        assert self.teacher is not None
        self.teacher.load_state_dict(state["teacher"])


def _shares(x_NCHW: Tensor, y: Tensor, count: int) -> list[Batch]:
    """A batch in ``count`` parts."""
    assert len(y) >= 2 * count, f"{len(y)} images for {count} parts: BN needs two in each"
    return list(zip(x_NCHW.tensor_split(count), y.tensor_split(count), strict=True))


def _array(gradient: Tensor) -> np.ndarray:
    array: np.ndarray = gradient.detach().double().cpu().numpy()
    return array
