"""Which settings decide a result. A stage depends on those and on nothing else, so
another spelling of a path or another number of loader processes does not repeat it.
"""

from __future__ import annotations

from typing import Any

from hwnas.config.experiment import Experiment
from hwnas.document import content_sha256

NOT_DECISIVE: dict[str, tuple[str, ...]] = {
    "data": ("path", "workers", "unreadable", "skip", "allow_outside"),
    "device": ("name",),
    "profile": ("prior", "networks"),
    "search": ("table", "weights", "backbone", "pretrained"),
    "train": ("arch", "backbone", "pretrained", "teacher"),
    "study": ("truth", "supernets", "processes", "ray_address", "ray_gpus"),
}
"""Table of the configuration -> its keys that decide no result: paths, because what they
lead to is an input of its own, and settings of how, not what, is computed. The images
that are left out are part of the images' fingerprint.
"""


def decisive(experiment: Experiment, section: str, *ignored: str) -> Any:
    """The settings of a table of the configuration that decide results, or the value of a
    key of the top level. ``ignored`` are further keys that do not matter to the caller.
    """
    content = experiment.model_dump(mode="json", by_alias=True)[section]
    if not isinstance(content, dict):
        return content
    for key in (*NOT_DECISIVE.get(section, ()), *ignored):
        content.pop(key, None)
    for limit in content.get("limits", ()):
        # the path of a limit's table, whose content is an input, too
        limit.pop("table", None)
    if section == "profile" and isinstance(experiment.profile.networks, int):
        # a number of networks, not the names of some, which are inputs by content
        content["networks"] = experiment.profile.networks
    return content


def settings_sha256(experiment: Experiment, section: str, *ignored: str) -> str:
    """The hash of the ``decisive`` settings of a table of the configuration."""
    return content_sha256(decisive(experiment, section, *ignored))
