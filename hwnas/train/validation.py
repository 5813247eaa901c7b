"""The validation curve: how good a network is on test images while it trains.

The averaged weights, where an average is kept, are evaluated on a fixed part of the test images, as timm and torchvision do on their
validation split. *Nothing is chosen by it*: the last weights are kept, whatever the curve says, so the test images judge them as fairly
as if nobody had looked. Evaluation draws no random number, changes no statistics and no order of batches: the weights are the same, bit
for bit, with and without it.

Rows of ``validation.jsonl``: ``step`` (of how many updates the weights are), ``epoch``, ``images``, and ``test_accuracy`` of a classifier
or ``test_ap`` and ``test_ap50`` of a detector. A resumed training has the same rows: those behind its checkpoint are dropped and made
again.
"""

from __future__ import annotations

from torch import nn

from hwnas.data.coco import CocoImages
from hwnas.data.images import Images, evaluation_batches, evaluation_order
from hwnas.detection import average_precision, detect
from hwnas.engine import Engine, accuracy
from hwnas.nn.detector import DetectionNetwork
from hwnas.runs import JsonLines, StageContext

FILE = "validation.jsonl"
POINTS = 10
"""Of a curve whose density nobody chose."""
SHARE = 0.05
"""What such a curve may cost, as a part of the training."""
IMAGES, DETECTION_IMAGES = 2_000, 500
COST, DETECTION_COST = 1 / 3, 1.0
"""Images of a point, and the cost of one against that of a training image: a classifier's has no backward pass, and what a detector saves
by that, NMS at AP's threshold takes."""


class Validation:
    """Evaluates what ``engine`` trains on a part of ``test``; ``epoch_steps`` are the updates of an epoch, a fraction where they are."""

    def __init__(self, ctx: StageContext, engine: Engine, test: Images, epoch_steps: float) -> None:
        self.ctx, self.engine, self.test, self.epoch_steps = ctx, engine, test, epoch_steps
        self.log = JsonLines(ctx.folder / FILE)
        self.limit = min(len(test), DETECTION_IMAGES if isinstance(test, CocoImages) else IMAGES)
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
        cost = DETECTION_COST if isinstance(self.test, CocoImages) else COST
        affordable = int(SHARE * steps * self.engine.batch_size / (cost * self.limit))
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
        qualities = self._qualities(self.engine.averaged)
        with self.log.appending() as append:
            append({"step": self.engine.step, "epoch": round(epoch, 3), "images": self.limit, **qualities})
        name, value = next(iter(qualities.items()))
        said = f"AP {value:.1%} on" if name == "test_ap" else f"{value:.1%} of"
        self.ctx.progress.say(f"epoch {epoch:.3g}: {said} {self.limit:,} test images")

    def _qualities(self, network: nn.Module) -> dict[str, float]:
        size, workers = self.ctx.experiment.train.batch_size, self.ctx.experiment.data.workers
        if not isinstance(network, DetectionNetwork):
            return {"test_accuracy": accuracy(network, evaluation_batches(self.test, 4 * size, limit=self.limit, workers=workers))}
        assert isinstance(self.test, CocoImages)
        settings = self.ctx.experiment.detector.post_processing
        found = detect(network, self.test, settings, batch_size=size, limit=self.limit, workers=workers)
        numbers = average_precision(self.test, found)
        return {"test_ap": numbers.AP, "test_ap50": numbers.AP50}
