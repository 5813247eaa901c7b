"""Profiling: from a space and a device to a calibrated latency table.

1. *Plan*: every op of the space, and whole networks spread over the space's range of
   sizes, some to fit the calibration and some to evaluate it.
2. *Build*: a model file for each of them, cached by op key.
3. *Measure* in rounds (``devices/session.py``): items whose rounds spread more than
   allowed get more rounds.
4. *Flag* entries that are still noisy after that.
5. *Calibrate*: fit a map from entries to networks (``core/table.py``) on some of the
   networks, and evaluate it on the others.

If only whole networks can be timed, or single ops would take too long, ``profile.mode =
"networks"`` measures only sampled networks, and the entries are fitted to them
(``tables/fit.py``).

Measurements are appended to ``samples.jsonl`` as they arrive, so that a profile that was
killed can resume.
"""
