"""Keys and values of configurations that have been renamed. For one release the old
spelling is read, with a warning that says the new one.
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
"""Old key -> the last part of the new one, and old value -> new value."""


def with_new_keys(content: Any, source: str) -> Any:
    """The parsed content of a configuration file, or of ``-s``, with renamed keys in
    their new spelling. Warns for each, naming ``source``. Content of the wrong type is
    returned as it is, for the model to refuse.
    """
    content = copy.deepcopy(content)
    for old_key, (new_name, new_values) in OLD_KEYS.items():
        *path, old_name = old_key.split(".")
        table: Any = content
        for name in path:
            table = table.get(name) if isinstance(table, dict) else None
        if not isinstance(table, dict) or old_name not in table:
            continue

        old_value = table.pop(old_name)
        # anything may stand there, lists included: the model refuses what is wrong
        new_value = (
            new_values.get(old_value, old_value) if isinstance(old_value, str) else old_value
        )
        table.setdefault(new_name, new_value)
        new_key = ".".join([*path, new_name])
        warnings.warn(
            f"{source}: {old_key} = {old_value!r} is now {new_key} = {new_value!r}; the old"
            " spelling is read until the next release.",
            FutureWarning,
            stacklevel=3,
        )
    return content
