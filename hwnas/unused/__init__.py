"""Settings without effect: for every key of an experiment, when it has no effect.

``keys.KEYS`` is the table of all keys and cases. A key is checked only if it was given,
in the file or by ``-s``. The configuration of a run folder contains every key and is
not checked. What happens with a key without effect depends on its case:

- The key was given by ``-s``: an error; if ``-s`` also gave the reason, ``Case.both``.
- The file gave both the key and the reason: ``Case.file``.
- The file gave the key and ``-s`` the reason (one file serves many commands):
  ``Case.overridden``.

Keys of stages that a command does not run are not checked, so that the same file and
the same ``-s`` serve ``hwnas profile`` and ``hwnas train``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from hwnas.config import Experiment, keys_given
from hwnas.errors import ConfigError
from hwnas.progress import Progress
from hwnas.unused.case import Case, Level, Situation
from hwnas.unused.keys import KEYS


def check_used(
    experiment: Experiment, verb: str, overrides: Sequence[str], progress: Progress
) -> None:
    """Check that the given keys have an effect; see the module docstring. Raises
    ConfigError for the first key that is an error, and otherwise warns.

    ``verb`` is the command without ``hwnas``, ``overrides`` the ``key.path=value``
    strings of the command line.
    """
    overridden = tuple(text.partition("=")[0].strip() for text in overrides)
    situation = Situation(experiment, verb, overridden)
    # Keys with the same reason share one warning.
    warned: dict[Case, list[str]] = defaultdict(list)
    for key, value in keys_given(experiment).items():
        case = _first_case(key, situation)
        if case is None:
            continue
        level = _level(case, key, situation)
        if level == "refuse":
            raise ConfigError(
                f"{key} = {_quote(value)} has no effect: {case.why.format(e=experiment)};"
                f" {case.fix}."
            )
        if level == "warn":
            warned[case].append(key)
    for case, keys in warned.items():
        verb_form = "have" if len(keys) > 1 else "has"
        progress.warning(
            f"{case.why.format(e=experiment)}, so {', '.join(keys)} {verb_form} no effect."
        )


def _first_case(key: str, situation: Situation) -> Case | None:
    """The first case in which the key has no effect; None if it has an effect."""
    for case in KEYS[key]:
        if situation.verb in case.verbs and case.holds(situation):
            return case
    return None


def _level(case: Case, key: str, situation: Situation) -> Level:
    reason_overridden = any(map(situation.overrides, case.by))
    if situation.overrides(key):
        return case.both if reason_overridden else "refuse"
    return case.overridden if reason_overridden else case.file


def _quote(value: Any) -> str:
    """A value as text of at most 60 characters."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    text = repr(value)
    if len(text) <= 60:
        return text
    return text[:57] + "..."
