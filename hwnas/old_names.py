"""Renamed members of the classes that plug-ins implement. A plug-in that defines the old
name keeps working for one release, with a warning that tells the new one.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping


def accept_old_names(plugin: type, new_names: Mapping[str, str]) -> None:
    """Call this in ``__init_subclass__``. Old members of ``plugin`` are given their new
    names (old name -> new name), with a FutureWarning for each. A member that only has
    the new name also gets the old one, which a plug-in's subclass may call.
    """
    for old, new in new_names.items():
        members = vars(plugin)
        if old in members and new not in members:
            warnings.warn(
                f"{plugin.__module__}.{plugin.__qualname__}: {old!r} is now {new!r}; the old name"
                " works until the next release.",
                FutureWarning,
                stacklevel=4,
            )
            setattr(plugin, new, members[old])
        elif new in members and old not in members:
            setattr(plugin, old, members[new])
