"""The speed of a device from one measurement to the next, as the measurements themselves tell it.

Clocks step up and down within seconds: a phone's governor and its heat, a virtual
machine's neighbours. Items are timed in a random order, so those that are timed just
before and just after an item, each compared with its own median, say how fast the
device was at that moment. Times divided by that speed are those of one speed, the
session's median one::

    slowness_j = median of ms_k / item_ms[item_k] over the neighbours k of j, which are
    of other items item_ms[i] = median of ms_j / slowness_j over the measurements j of i

Both lines are repeated, as in Tukey's median polish of rows and columns (Exploratory
Data Analysis, 1977, chapter 11), where a column would be a moment. A device of constant
speed is left exactly as it was measured. What is assumed is that a change of speed is
common to all items: where it is not (a clock that slows arithmetic but not memory), it
is taken out by the share that is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NEIGHBOURS = 3
"""How many measurements on either side are compared. Ours: 1 to 8 predict alike, on
profiles of two spaces on a virtual machine.
"""
SWEEPS = 3
"""How often the two lines are repeated. Ours; more changed nothing there."""


def slowness(names: Sequence[str], ms: Sequence[float]) -> np.ndarray:
    """How slow the device was at each of N measurements, float [N], 1 at the median: 2
    where all took twice as long as usual.

    ``names`` says which item each of the times ``ms``, in order of measurement, is of.
    """
    times = np.asarray(ms, dtype=float)
    found = np.ones(len(times))
    items, item = np.unique(np.asarray(names), return_inverse=True)
    members = [np.flatnonzero(item == i) for i in range(len(items))]
    position = np.arange(len(times))[:, None] + [*range(-NEIGHBOURS, 0), *range(1, NEIGHBOURS + 1)]
    inside = np.clip(position, 0, len(times) - 1)
    compared = (position == inside) & (item[inside] != item[:, None])
    heard = compared.any(axis=1)
    for _ in range(SWEEPS):
        usual = np.array([np.median(times[member] / found[member]) for member in members])
        relative = np.where(compared, (times / usual[item])[inside], np.nan)
        found[heard] = np.nanmedian(relative[heard], axis=1)
        found /= np.median(found)
    return found
