"""The validation curve: how good a network is on test images while it trains.

The averaged weights, where an average is kept, are evaluated on a fixed part of the
test images, as timm and torchvision do on their validation split. *Nothing is chosen by
it*: the last weights are kept, whatever the curve says, so the test images judge them
as fairly as if nobody had looked. Evaluation draws no random number, changes no
statistics and no order of batches: the weights are the same, bit for bit, with and
without it.

Rows of ``validation.jsonl``: ``step`` (of how many updates the weights are), ``epoch``,
``images``, and what ``Task.curve`` names: ``test_accuracy`` of a classifier,
``test_ap`` and ``test_ap50`` of a detector. A resumed training has the same rows: those
behind its checkpoint are dropped and made again.
"""

from __future__ import annotations

from torch import nn

from hwnas.data.images import Images, evaluation_order
from hwnas.engine import Engine
from hwnas.nn.network import Network
from hwnas.runs import JsonLines, StageContext
from hwnas.task import Evaluation, evaluate, task_of

FILE = "validation.jsonl"
POINTS = 10
"""Of a curve whose density nobody chose."""
SHARE = 0.05
"""What such a curve may cost, as a part of the training."""


class Validation:
    """Evaluates what ``engine`` trains on a part of ``test``; ``epoch_steps`` are the
    updates of an epoch, a fraction where they are.
    """

    def __init__(self, ctx: StageContext, engine: Engine, test: Images, epoch_steps: float) -> None:
        self.ctx, self.engine, self.test, self.epoch_steps = ctx, engine, test, epoch_steps
        self.log = JsonLines(ctx.folder / FILE)
        self.task = task_of(ctx.experiment)
        self.limit = min(len(test), self.task.curve_images)
        self.due = self._due()

    def _due(self) -> frozenset[int]:
        """The numbers of updates after which to evaluate."""
        steps, every = self.engine.steps, self.ctx.experiment.train.validate_every
        without_objects = len(self.test.labels_of(evaluation_order(self.test, self.limit))) == 0
        if every == 0 or without_objects:  # of which there is no AP
            return frozenset()
        if every is not None:
            stride = max(1, round(every * self.epoch_steps))
            return frozenset({*range(stride, steps + 1, stride), steps})
        affordable = int(
            SHARE * steps * self.engine.batch_size / (self.task.curve_cost * self.limit)
        )
        points = min(POINTS, affordable, steps)
        if points < 2:  # the end alone is no curve, and judged anyway
            return frozenset()
        return frozenset(round(steps * number / points) for number in range(1, points + 1))

    def resume(self) -> None:
        """Drop the rows behind the engine's state. To be called after the engine has resumed."""
        self.log.rewrite([row for row in self.log.read() if row["step"] <= self.engine.step])

    def __call__(self) -> None:
        """Evaluate now, where it is due, log it and say it."""
        if self.engine.step not in self.due:
            return
        epoch = self.engine.step / self.epoch_steps
        qualities = self._qualities(self.engine.ema_model)
        with self.log.appending() as append:
            append(
                {
                    "step": self.engine.step,
                    "epoch": round(epoch, 3),
                    "images": self.limit,
                    **qualities,
                }
            )
        said = self.task.said_on_the_way(next(iter(qualities.values())))
        self.ctx.progress.info(f"epoch {epoch:.3g}: {said} {self.limit:,} test images")

    def _qualities(self, network: nn.Module) -> dict[str, float]:
        assert isinstance(network, Network)
        how = Evaluation(
            self.ctx.experiment.train.batch_size, self.limit, self.ctx.experiment.data.workers
        )
        metrics = evaluate(self.task, network, self.test, how).metrics
        return {
            row: value
            for row, name in self.task.curve.items()
            if (value := metrics[name]) is not None
        }
