"""The estimate of the training stage, from a few real steps of the network, or of one
that the search may find.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from hwnas.estimate.context import Context
from hwnas.estimate.parts import Part, Stopwatch, TimeEstimate, peak_memory
from hwnas.estimate.searching import checkpoints
from hwnas.nn.network import Network
from hwnas.runs import StageContext
from hwnas.task import EvaluationSettings, evaluate, task_of
from hwnas.train import training

STEPS = 0.15
"""Fraction of the stopwatch's seconds for timing training steps."""
MOST_STEPS = 12
"""Most training steps that are timed at one resolution."""
TESTED = 64
"""Most test images that are timed."""


def _seconds_per_step(run: training.TrainingRun, watch: Stopwatch) -> float:
    """Mean seconds of a step, over all stages of a resolution that rises."""
    engine = run.engine

    def timed(number: int) -> None:
        engine.step = number
        run.step(number)

    begins = (0,) if run.progression is None else run.progression.begins
    seconds = 0.0
    for begin, end in pairwise((*begins, engine.steps)):
        numbers = range(begin, min(end, begin + MOST_STEPS))
        calls = [partial(timed, number) for number in numbers]
        seconds += (end - begin) * watch.mean(calls, STEPS / len(begins))
    return seconds / engine.steps


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
    steps = Part("training", engine.steps, _seconds_per_step(run, watch))
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
