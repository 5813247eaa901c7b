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
from hwnas.data.inspection import check_data
from hwnas.stages import stage_class


def check(experiment: Experiment, space: SearchSpace, stages: Collection[str]) -> None:
    """Check what the coming ``stages`` need besides each other's results: their settings,
    and all splits of the data.

    Raises UserError in one sentence.
    """
    classes = [stage_class(name) for name in stages]
    for stage in classes:
        stage.check_settings(experiment, space)
    if any(stage.trains for stage in classes):
        searches = any(stage.holds_out for stage in classes)
        check_data(experiment.data, searches=searches, exact=not is_document(experiment.space.name))
