"""The training stage: a few real steps of the network itself, or of one that the search
may find.
"""

from __future__ import annotations

from hwnas.estimate.context import Context
from hwnas.estimate.parts import Estimate, Part, peak_memory
from hwnas.estimate.searching import checkpoints
from hwnas.nn.network import Network
from hwnas.runs import StageContext
from hwnas.task import Evaluation, evaluate, task_of
from hwnas.train import stage

STEPS = 0.15
"""Part of the timing's seconds for steps."""
MOST_STEPS = 12
"""... and at most so many."""
TESTED = 64
"""Test images that are timed."""


def of_training(ctx: Context) -> Estimate:
    """Time a training. Raises HwnasError where it could not run."""
    ctx.check_data()
    arch, watch, folder = ctx.arch, ctx.watch, ctx.folder("train")
    fresh = {"weights": "scratch", "backbone": None}  # what it begins with takes no longer
    experiment = ctx.experiment.model_copy(
        update={"train": ctx.experiment.train.model_copy(update=fresh)}
    )
    training = stage.begin(StageContext(experiment, folder, folder), arch)
    engine = training.engine

    def step() -> None:
        training.step(engine.step)
        engine.step += 1

    per_step = watch.mean([step] * min(MOST_STEPS, engine.steps), STEPS)
    steps = Part("training", engine.steps, per_step)
    saving, checkpoint_bytes = checkpoints(engine, steps, experiment.checkpoint_seconds, watch)
    ctx.test_images = len(training.test)
    count = min(TESTED, ctx.test_images)
    network = engine.ema_model
    assert isinstance(network, Network)
    how = Evaluation(experiment.train.batch_size, count, experiment.data.workers)
    each_image = (
        watch.once(lambda: evaluate(task_of(experiment), network, training.test, how)) / count
    )
    validation = training.validation
    curve = Part("validation curve", len(validation.due), validation.limit * each_image)
    parts = (
        steps,
        saving,
        *([curve] if validation.due else []),
        Part("testing", ctx.test_images, each_image),
    )
    return Estimate(parts, peak_memory(), checkpoint_bytes + 4.0 * arch.params)
