"""The estimate of the training stage, from a few real steps of the network, or of one
that the search may find.
"""

from __future__ import annotations

from hwnas.estimate.context import Context
from hwnas.estimate.parts import Part, TimeEstimate, peak_memory
from hwnas.estimate.searching import checkpoints
from hwnas.nn.network import Network
from hwnas.runs import StageContext
from hwnas.task import EvaluationSettings, evaluate, task_of
from hwnas.train import training

STEPS = 0.15
"""Fraction of the stopwatch's seconds for timing training steps."""
MOST_STEPS = 12
"""Most training steps that are timed."""
TESTED = 64
"""Most test images that are timed."""


def of_training(ctx: Context) -> TimeEstimate:
    """Time training. Raises HwnasError if it could not run."""
    ctx.check_data()
    arch = ctx.arch
    watch = ctx.watch
    folder = ctx.folder("train")
    # Initial weights may not exist yet, and do not change the time.
    from_scratch = {"weights": "scratch", "backbone": None, "pretrained": None}
    train = ctx.experiment.train.model_copy(update=from_scratch)
    experiment = ctx.experiment.model_copy(update={"train": train})
    run = training.begin(StageContext(experiment, folder, folder), arch)
    engine = run.engine

    def step() -> None:
        run.step(engine.step)
        engine.step += 1

    per_step = watch.mean([step] * min(MOST_STEPS, engine.steps), STEPS)
    steps = Part("training", engine.steps, per_step)
    saving, checkpoint_bytes = checkpoints(engine, steps, experiment.checkpoint_seconds, watch)

    ctx.test_images = len(run.test)
    count = min(TESTED, ctx.test_images)
    network = engine.ema_model
    assert isinstance(network, Network)
    settings = EvaluationSettings(experiment.train.batch_size, count, experiment.data.workers)
    seconds = watch.once(lambda: evaluate(task_of(experiment), network, run.test, settings))
    per_image = seconds / count

    parts = [steps, saving]
    validation = run.validation
    if validation.due:
        per_point = validation.limit * per_image
        parts.append(Part("validation curve", len(validation.due), per_point))
    parts.append(Part("testing", ctx.test_images, per_image))
    # float32 weights are written next to the checkpoint.
    return TimeEstimate(tuple(parts), peak_memory(), checkpoint_bytes + 4.0 * arch.params)
