"""What can be known to be wrong before a device is touched: asked at the start of
``hwnas run``, and of a stage for what follows it.

A profile takes minutes and a search hours; what stops the training after them should
have been said before.
"""

from __future__ import annotations

from collections.abc import Collection

from hwnas.config import Experiment
from hwnas.core.search_space import SearchSpace
from hwnas.core.spaces import is_document
from hwnas.data.inspection import check_data
from hwnas.stages import stage_class


def check(experiment: Experiment, space: SearchSpace, stages: Collection[str]) -> None:
    """Check what the ``stages`` still to come need, beside what they leave each other:
    their settings, and all splits of the data.

    Raises UserError in one sentence.
    """
    classes = [stage_class(name) for name in stages]
    for each in classes:
        each.check_settings(experiment, space)
    if any(each.trains for each in classes):
        searches = any(each.holds_out for each in classes)
        check_data(experiment.data, searches=searches, exact=not is_document(experiment.space.name))
