"""The weights that a search trains: ``SupernetWeights`` implements the protocol
``verbs.SharedWeights`` by a super-net, whose weights the engine updates. ``Batches``
supplies the training and held-out batches of every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hwnas.config import DataConfig
from hwnas.core.arch import Picks
from hwnas.core.gates import Gates, Probes
from hwnas.data.images import Batch, Images, training_batches
from hwnas.engine import Criterion, Engine, Microbatch
from hwnas.nn.network import Network
from hwnas.nn.shared import GatedNetworks, resized
from hwnas.nn.unrolled import Loss, SGDStep, unrolled_gate_gradients
from hwnas.search.evaluator import SupernetEvaluator
from hwnas.search.verbs import Metrics


@dataclass(frozen=True)
class _Stream:
    """An iterator over the batches of every ``stride``-th step, and the last ``batch``
    taken from it, which belongs to ``step``.
    """

    step: int
    stride: int
    batches: Iterator[Batch]
    batch: Batch


class Batches:
    """Training and held-out batches by step. A batch depends only on the seed and the
    step, so a resumed search sees the same batches.
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
        self.train_images = train
        self.held_out_images = held_out
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.steps = steps
        self._streams: dict[int, _Stream] = {}

    def train(self, step: int) -> Batch:
        """The training batch of a step."""
        return self._at(0, self.train_images, self.batch_size, self.seed, step)

    def held_out(self, step: int, multiple: int) -> Batch:
        """The held-out batch of a step: ``multiple`` times a training batch, or all
        held-out images if there are fewer.
        """
        size = min(self.batch_size * multiple, len(self.held_out_images))
        return self._at(multiple, self.held_out_images, size, self.seed + 1, step)

    def _at(self, key: int, images: Images, size: int, seed: int, step: int) -> Batch:
        """The batch of a step; the same batch if it is requested again in that step.

        ``key`` is 0 for training, else the held-out multiple. Each key keeps one stream,
        whose workers prepare the next batches in advance. They need to know the distance
        between the steps, so a new stream begins whenever this distance changes.
        """
        current = self._streams.get(key)
        if current is not None and current.step == step:
            return current.batch

        if current is not None and current.step + current.stride == step:
            stride = current.stride
            batches = current.batches
        else:
            # A method that has skipped k - 1 steps is expected to take every k-th batch.
            stride = 1 if current is None else max(1, step - current.step)
            batches = training_batches(
                images,
                size,
                seed=seed,
                steps=range(step, self.steps, stride),
                workers=self.data.workers,
            )

        batch = next(batches)
        self._streams[key] = _Stream(step, stride, batches, batch)
        return batch


class SupernetWeights:
    """Trains and differentiates a super-net.

    ``state_dict`` holds only the teacher, if any: the engine saves the super-net.
    Detectors ignore ``teach``, because distilling boxes would need a method of its own.
    """

    def __init__(
        self,
        engine: Engine,
        supernet: GatedNetworks,
        batches: Batches,
        evaluator: SupernetEvaluator,
    ) -> None:
        self.engine = engine
        self.supernet = supernet
        self.batches = batches
        self.evaluator = evaluator
        self.quality = evaluator.quality
        self.held_out_criterion = self.quality.criterion().to(engine.device)
        self.teacher: Network | None = None
        self._teacher_picks: Picks = {}

    def train(
        self, gates: Sequence[Gates], *, split: bool, teach: bool, skip_dropout: float
    ) -> Metrics:
        """One update of the weights on this step's training batch. Returns the metrics,
        averaged over ``gates``.

        By default, all gates run on the whole batch, and their gradients are summed.
        With ``split``, each runs on its own part of the batch, and their gradients are
        averaged. ``teach`` adds a cross-entropy with the teacher's probabilities.
        """
        self.evaluator.forget()
        self._set_fraction()
        x_NCHW, y = self.engine.to_device(*self.batches.train(self.engine.step))
        parts = _split(x_NCHW, y, len(gates) if split else 1)
        soft_labels: list[Tensor | None] = [None] * len(parts)
        if teach and self.quality.of_cross_entropy:
            soft_labels = [self._soft_labels(x) for x, _ in parts]
        if not split:
            # All gates see the same batch, so the teacher runs on it only once.
            parts = parts * len(gates)
            soft_labels = soft_labels * len(gates)

        microbatches = []
        for part_gates, (x, labels), soft in zip(gates, parts, soft_labels, strict=True):
            forward_args = (part_gates, None, skip_dropout)  # gates, probes, skip_dropout
            # The engine sums the gradients. On whole batches every weight is 1; with
            # split the weights add up to 1, so the sum is the mean over the batch.
            weight = len(labels) / len(y)
            microbatches.append(Microbatch(x, labels, forward_args, soft, weight))
        return self.engine.optimizer_step(microbatches)

    def _set_fraction(self) -> None:
        """Tell the super-net's schedules how far the search is.

        Called by every method that runs the super-net, because any of them may be the
        first in a resumed search.
        """
        self.supernet.fraction = self.engine.step / self.engine.steps

    @torch.no_grad()
    def _soft_labels(self, x_NCHW: Tensor) -> Tensor:
        """The teacher's probabilities [N, classes]."""
        assert self.teacher is not None, "no teacher is remembered yet"
        # BN normalises by the statistics of the batch, as in the super-net.
        self.teacher.train()
        with self.engine.autocast():
            logits = self.teacher(resized(x_NCHW, self.teacher.arch.size))
            return torch.softmax(logits.float(), 1)

    @torch.no_grad()
    def qualities(self, gates: Sequence[Gates], multiple: int) -> list[float]:
        """Quality in 0..1 of each of ``gates`` on its microbatch of this step's held-out
        batch.
        """
        x_NCHW, y = self.engine.to_device(*self.batches.held_out(self.engine.step, multiple))
        self._set_fraction()
        # eval() turns off dropout and the proxy resolution. The BN of a super-net still
        # uses the statistics of the batch, unless search.supernet.bn_track is set.
        self.supernet.eval()
        qualities = []
        parts = _split(x_NCHW, y, len(gates))
        for part_gates, (x_part, y_part) in zip(gates, parts, strict=True):
            with self.engine.autocast():
                outputs = self.supernet(x_part, part_gates)
            qualities.append(self.quality.of_outputs(outputs, y_part))
        return qualities

    def gate_gradients(
        self, gates: Gates, probes: Probes, order: int, skip_dropout: float
    ) -> tuple[float, dict[str, np.ndarray]]:
        """The held-out loss in training mode, and its gradient with respect to the gates:
        choice key -> float64 [options].

        ``order = 1`` takes both at the current weights, ``order = 2`` after a virtual
        training step. ``probes`` names options with weight zero that need a gradient
        anyway; only order 1 supports them. Leaves the weights, their ``grad`` and BN's
        running statistics unchanged.
        """
        assert self.supernet.shares, "standalone networks have no gates to differentiate"
        self._set_fraction()
        self.supernet.train()
        self.supernet.tracking = False  # BN's running statistics stay unchanged
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
            loss = self._loss(self.held_out_criterion, held_out, leaves, probes, skip_dropout)
        value = self.engine.check_finite(loss)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        # The gradient of a choice that the loss does not depend on is None: it stays 0.
        arrays = {key: np.zeros(len(leaf)) for key, leaf in leaves.items()}
        for key, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                arrays[key] = _float64(gradient)
        return value, arrays

    def _loss(
        self, criterion: Criterion, batch: Batch, gates: Gates, probes: Probes, skip_dropout: float
    ) -> Tensor:
        loss, _ = criterion(self.supernet(batch[0], gates, probes, skip_dropout), batch[1])
        return loss

    def _unrolled(
        self, leaves: Mapping[str, Tensor], held_out: Batch, skip_dropout: float
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Held-out loss and gradients after a virtual SGD step (DARTS's second order),
        with momentum if the optimiser is SGD.

        Runs in float32, without autocast and without TF32 in convolutions, because the
        finite difference moves weights by less than bfloat16 or TF32 can resolve. For
        matrix products, PyTorch has TF32 off by default.
        """
        train = self.engine.to_device(*self.batches.train(self.engine.step))
        optimizer = self.engine.optimizer
        weights: list[nn.Parameter] = []
        weight_decay: list[float] = []
        for group in optimizer.param_groups:
            weights.extend(group["params"])
            weight_decay.extend([group["weight_decay"]] * len(group["params"]))
        # The virtual step is plain SGD unless the optimiser is SGD itself: the state of
        # other optimisers holds no momentum buffers that a step of SGD could use.
        momentum = 0.0
        if isinstance(optimizer, torch.optim.SGD):
            momentum = self.engine.optimizer_config.momentum
        buffers: list[Tensor | None] = [None] * len(weights)
        if momentum:
            buffers = [optimizer.state.get(w, {}).get("momentum_buffer") for w in weights]

        def loss_on(batch: Batch, criterion: Criterion) -> Loss:
            def loss(gates: Gates) -> Tensor:
                # The finite difference compares losses, so every one of them needs the
                # same dropout masks.
                self.engine.seed_torch()
                return self._loss(criterion, batch, gates, {}, skip_dropout)

            return loss

        with torch.backends.cudnn.flags(allow_tf32=False):
            value, gradients = unrolled_gate_gradients(
                loss_on(train, self.engine.criterion),
                loss_on(held_out, self.held_out_criterion),
                weights,
                leaves,
                SGDStep(self.engine.lr, momentum, buffers, weight_decay),
            )
        self.engine.check_finite(torch.tensor(value))
        return value, {key: _float64(gradient) for key, gradient in gradients.items()}

    def remember_teacher(self, picks: Picks) -> None:
        """Keep a copy of the network of ``picks`` as the teacher."""
        self.teacher = self.supernet.extract(picks).to(memory_format=torch.channels_last)
        self._teacher_picks = dict(picks)

    def grow(self, number: int) -> None:
        """Continue with super-net ``number``; drops evaluations of the previous one."""
        if self.supernet.grow(number):
            self.evaluator.forget()

    def state_dict(self) -> dict[str, Any]:
        """The teacher's picks and weights."""
        return {
            "picks": self._teacher_picks,
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the teacher."""
        if state["teacher"] is None:
            self.teacher = None
            self._teacher_picks = {}
            return
        self.remember_teacher(state["picks"])
        assert self.teacher is not None
        self.teacher.load_state_dict(state["teacher"])


def _split(x_NCHW: Tensor, y: Tensor, count: int) -> list[Batch]:
    """A batch in ``count`` parts, whose sizes differ by at most one image."""
    assert len(y) >= 2 * count, f"{len(y)} images for {count} parts: BN needs two in each"
    return list(zip(x_NCHW.tensor_split(count), y.tensor_split(count), strict=True))


def _float64(gradient: Tensor) -> np.ndarray:
    """A gradient as a numpy array in float64."""
    array: np.ndarray = gradient.detach().double().cpu().numpy()
    return array
