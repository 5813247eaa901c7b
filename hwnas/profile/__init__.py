"""Profiling: from a space and a device to a calibrated latency table.

1. *Plan*: every op of the space, and whole networks sampled over the space's range of
   sizes, some to fit the calibration and some to judge it.
2. *Build*: a model file for each, cached by op key.
3. *Measure* in rounds (``devices/session.py``): entries whose rounds spread more than
   allowed get further rounds.
4. *Judge the noise*: entries whose rounds still spread are flagged.
5. *Calibrate*: a map from entries to networks (core/table.py), fitted on some networks,
   judged on the others.

Where only whole networks can be timed, or op by op would take too long, ``profile.mode
= "networks"`` measures sampled networks alone, and the entries are fitted to them
(tables/fit.py).

Rows are kept in ``samples.jsonl`` as they come, so that a killed profile resumes.
"""
