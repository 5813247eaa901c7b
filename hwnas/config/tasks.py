"""Which tasks there are: known by name here, so that a configuration can be checked
without loading them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from hwnas.registry import Registry

TASKS = Registry(
    "task",
    {
        "classify": "hwnas.tasks.classification:Classification",
        "detect": "hwnas.tasks.detection:Detection",
    },
)
"""What networks are trained for; third parties add theirs with the entry point
``hwnas.task`` (see ``hwnas.task``).
"""


def _known(name: str) -> str:
    if name not in TASKS:
        raise ValueError(f"input should be {' or '.join(map(repr, TASKS))}")
    return name


def network_kind(task: str) -> str:
    """Whether the networks of a task classify or detect: ``Architecture.task``. Only a
    third party's task is loaded for that.
    """
    if task in TASKS.builtin:
        return task
    kind: str = TASKS.get(task).network_kind
    return kind


TaskName = Annotated[str, AfterValidator(_known)]
"""The name of a task."""
