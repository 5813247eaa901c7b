"""Renamed keys and values of configurations. The old spelling is accepted for one
release, with a warning that names the new one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

OLD_KEYS: Mapping[str, tuple[str, Mapping[Any, Any]]] = {
    "search.optimizer.unused": ("inactive_weights", {"rest": "frozen", "move": "decay"}),
    "train.optimizer.unused": ("inactive_weights", {"rest": "frozen", "move": "decay"}),
    "shrink.judged_samples": ("evaluated_samples", {}),
}
"""Old key -> (last part of the new key, old value -> new value)."""


def with_new_keys(content: Any, source: str, *, warn: bool = True) -> Any:
    """The parsed content of a configuration file or of ``-s``, with renamed keys in
    their new spelling. Issues a FutureWarning with ``source`` for each, unless ``warn``
    is False: for content that the user has not written.

    Content of the wrong type is returned unchanged, because the model reports it
    better.
    """
    content = copy.deepcopy(content)
    for old_key, (new_name, new_values) in OLD_KEYS.items():
        *path, old_name = old_key.split(".")
        table: Any = content
        for name in path:
            table = table.get(name) if isinstance(table, dict) else None
        if not isinstance(table, dict) or old_name not in table:
            continue
        # With both spellings, one value would be lost: the model refuses the old key.
        if new_name in table:
            continue

        old_value = table.pop(old_name)
        new_value = old_value
        # Other types, such as lists, cannot be looked up; the model reports them.
        if isinstance(old_value, str):
            new_value = new_values.get(old_value, old_value)
        table[new_name] = new_value
        if not warn:
            continue
        new_key = ".".join([*path, new_name])
        warnings.warn(
            f"{source}: {old_key} = {old_value!r} is now {new_key} = {new_value!r}; the old"
            " spelling is read until the next release.",
            FutureWarning,
            # The line that calls this function: Python then shows a message that is
            # repeated, as for every seed of a study, only once.
            stacklevel=2,
        )
    return content
