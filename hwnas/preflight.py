"""What can be known to be wrong before a device is used: checked at the start of
``hwnas run``, and of a stage for the stages that follow it.

A profile takes minutes and a search hours. Whatever would stop the training after them
is reported before they start.
"""

from __future__ import annotations

from collections.abc import Collection

from hwnas.config import Experiment
from hwnas.core.search_space import SearchSpace
from hwnas.core.spaces import is_document
from hwnas.data.inspection import Inspection, inspect
from hwnas.progress import Progress
from hwnas.stages import STAGES, stage_class


def check(
    experiment: Experiment,
    space: SearchSpace,
    stages: Collection[str],
    progress: Progress | None = None,
) -> Inspection | None:
    """Check what the coming ``stages`` need besides each other's results: their settings,
    and all images. Returns what the look at the images has found, None if no stage
    trains. Its notes are reported as progress.

    Raises UserError in one sentence, or one with a list for several problems of the data.
    """
    progress = progress or Progress()
    for name in stages:
        stage_class(name).check_settings(experiment, space)
    if not any(stage_class(name).trains for name in stages):
        return None
    inspection = inspect_data(experiment, stages, progress)
    inspection.check()
    for note in inspection.notes:
        progress.info(f"note: {note}")
    return inspection


def inspect_data(experiment: Experiment, stages: Collection[str], progress: Progress) -> Inspection:
    """A look at all images of an experiment, for what the coming ``stages`` need."""
    searches = any(stage_class(name).holds_out for name in stages)
    exact = not is_document(experiment.space.name)
    return inspect(experiment.data, searches=searches, exact=exact, progress=progress)


def needed_stages(experiment: Experiment) -> tuple[str, ...]:
    """The names of the stages that an experiment goes through."""
    return tuple(name for name in STAGES if stage_class(name).is_needed(experiment))
