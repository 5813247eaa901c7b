"""The names of the tasks, so that a configuration can be checked without
loading them.
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
"""The tasks that networks are trained for. Third parties add their own with the entry
point ``hwnas.task`` (see ``hwnas.task``).
"""


def _check_task(name: str) -> str:
    if name not in TASKS:
        raise ValueError(f"input should be {' or '.join(map(repr, TASKS))}")
    return name


def network_kind(task: str) -> str:
    """The kind of networks of a task, ``classify`` or ``detect``, as in
    ``Architecture.task``.
    """
    # The names of the built-in tasks are the kinds; only a plug-in has to be loaded.
    if task in TASKS.builtin:
        return task
    kind: str = TASKS.get(task).network_kind
    return kind


TaskName = Annotated[str, AfterValidator(_check_task)]
"""The name of a task."""
