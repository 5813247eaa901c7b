"""The validation curve: how good a network is on test images while it trains.

The weights (the averaged ones, if there is an average) are evaluated on a fixed part of
the test images, as timm and torchvision do on their validation splits. *The curve
chooses nothing*: the last weights are kept in any case, so the final test on these
images is as fair as if nobody had looked. Evaluation draws no random numbers, and
changes neither statistics nor the order of batches: with and without it, the weights
are the same bit for bit.

The rows of ``validation.jsonl`` have ``step`` (the number of updates), ``epoch``,
``images``, and what ``Task.curve`` names: ``test_accuracy`` for a classifier,
``test_ap`` and ``test_ap50`` for a detector. A resumed training run has the same rows,
because it drops and repeats those that are later than its checkpoint.
"""

from __future__ import annotations

from torch import nn

from hwnas.data.images import Images, evaluation_order
from hwnas.engine import Engine
from hwnas.nn.network import Network
from hwnas.runs import JsonLines, StageContext
from hwnas.task import EvaluationSettings, evaluate, task_of

FILE = "validation.jsonl"
POINTS = 10
"""Points of the curve if ``train.validate_every`` is not set."""
SHARE = 0.05
"""Evaluating the curve may cost at most this fraction of the training."""


class Validation:
    """Evaluates the network that ``engine`` trains on a part of ``test``, and logs it.

    ``epoch_steps`` is the number of updates in an epoch, which need not be whole.
    """

    def __init__(self, ctx: StageContext, engine: Engine, test: Images, epoch_steps: float) -> None:
        self.ctx = ctx
        self.engine = engine
        self.test = test
        self.epoch_steps = epoch_steps
        self.log = JsonLines(ctx.folder / FILE)
        self.task = task_of(ctx.experiment)
        self.limit = min(len(test), self.task.curve_images)
        self.due = self._due()

    def _due(self) -> frozenset[int]:
        """The numbers of updates after which to evaluate."""
        steps = self.engine.steps
        every = self.ctx.experiment.train.validate_every
        without_objects = len(self.test.labels_of(evaluation_order(self.test, self.limit))) == 0
        if every == 0 or without_objects:  # there is no AP without objects
            return frozenset()
        if every is not None:
            stride = max(1, round(every * self.epoch_steps))
            return frozenset({*range(stride, steps + 1, stride), steps})

        # Costs in images that are trained on: of a point of the curve, and of all steps.
        point_cost = self.task.curve_cost * self.limit
        affordable = int(SHARE * steps * self.engine.batch_size / point_cost)
        points = min(POINTS, affordable, steps)
        if points < 2:  # the final test covers the end, and a single point is not a curve
            return frozenset()
        return frozenset(round(steps * number / points) for number in range(1, points + 1))

    def resume(self) -> None:
        """Drop the rows that are later than the engine's state. Call it after the engine
        has resumed.
        """
        rows = self.log.read(numbers=("step",))
        self.log.rewrite([row for row in rows if row["step"] <= self.engine.step])

    def __call__(self) -> None:
        """If an evaluation is due at this step, run it, log it and report it."""
        if self.engine.step not in self.due:
            return
        epoch = self.engine.step / self.epoch_steps
        qualities = self._qualities(self.engine.ema_model)
        row = {"step": self.engine.step, "epoch": round(epoch, 3), "images": self.limit}
        with self.log.appending() as append:
            append({**row, **qualities})
        text = self.task.describe_progress(next(iter(qualities.values())))
        self.ctx.progress.info(f"epoch {epoch:.3g}: {text} {self.limit:,} test images")

    def _qualities(self, network: nn.Module) -> dict[str, float]:
        assert isinstance(network, Network)
        settings = EvaluationSettings(
            self.ctx.experiment.train.batch_size, self.limit, self.ctx.experiment.data.workers
        )
        metrics = evaluate(self.task, network, self.test, settings).metrics
        qualities = {}
        for row, name in self.task.curve.items():
            value = metrics[name]
            if value is not None:
                qualities[row] = value
        return qualities
