"""Settings that do nothing: every key of an experiment, and when it has no effect.

``keys.KEYS`` is the one table. A key is judged only where it was given, in the file or
by ``-s``; a run folder's own configuration says every key, and is not judged. What
happens then is said by the case:

- given by ``-s``: refused; where the reason is given by ``-s``, too, as ``Case.both`` says;
- in the file, as is the reason: as ``Case.file`` says;
- in the file, while ``-s`` gives the reason (one file serves many commands): as
  ``Case.overridden`` says.

Keys of stages that a verb does not run are not judged: the same file, and the same
``-s``, serve ``hwnas profile`` and ``hwnas train``.
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
    """Refuse keys that were given and do nothing, or say so in a warning; see the
    module. Raises ConfigError for the first.

    ``overrides`` are those of the command line, ``key.path=value``.
    """
    situation = Situation(
        experiment, verb, tuple(text.partition("=")[0].strip() for text in overrides)
    )
    idle: dict[Case, list[str]] = defaultdict(list)
    for key, value in keys_given(experiment).items():
        case = next(
            (case for case in KEYS[key] if verb in case.verbs and case.holds(situation)), None
        )
        level = "quiet" if case is None else _level(case, key, situation)
        if case is not None and level == "refuse":
            raise ConfigError(
                f"{key} = {_shown(value)} does nothing: {case.why.format(e=experiment)};"
                f" {case.fix}."
            )
        if case is not None and level == "warn":
            idle[case].append(key)
    for case, keys in idle.items():
        progress.warning(
            f"{case.why.format(e=experiment)}, so {', '.join(keys)}"
            f" {'do' if len(keys) > 1 else 'does'} nothing."
        )


def _level(case: Case, key: str, situation: Situation) -> Level:
    reason_overridden = any(map(situation.overrides, case.by))
    if situation.overrides(key):
        return case.both if reason_overridden else "refuse"
    return case.overridden if reason_overridden else case.file


def _shown(value: Any) -> str:
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    text = repr(plain)
    return text if len(text) <= 60 else text[:57] + "..."
