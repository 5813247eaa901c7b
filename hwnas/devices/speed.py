"""The speed of a device from one measurement to the next, estimated from the measurements
themselves.

Clock rates step up and down within seconds, because of a phone's governor and heat, or
of a virtual machine's neighbours. Items are timed in random order. The items timed just
before and after another one, each compared with its own median, tell how fast the
device was at that moment. Dividing a time by this slowness gives the time at the median
speed of the session::

    slowness_j = median of ms_k / item_ms[item_k] over the neighbours k of j that belong
                 to other items
    item_ms[i] = median of ms_j / slowness_j over the measurements j of item i

Both lines are repeated, as in Tukey's median polish of rows and columns (Exploratory
Data Analysis, 1977, chapter 11), with moments as columns. If the speed of the device is
constant, the times do not change at all.

The assumption is that a change of speed affects all items alike. If it does not (for
instance, a lower clock rate slows down arithmetic but not memory), only the common part
is removed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NEIGHBOURS = 3
"""How many measurements on either side are compared. Our choice: 1 to 8 predict equally
well, on profiles of two spaces on a virtual machine.
"""
SWEEPS = 3
"""How often the two lines are repeated. Our choice: more changed nothing on these
profiles.
"""


def slowness(names: Sequence[str], ms: Sequence[float]) -> np.ndarray:
    """How slow the device was at each of N measurements, float [N], relative to the
    median: 2 means that everything took twice as long as usual.

    ``names`` [N] are the items that were measured and ``ms`` [N] their times, both in
    order of measurement.
    """
    times = np.asarray(ms, dtype=float)
    slow = np.ones(len(times))
    items, item = np.unique(np.asarray(names), return_inverse=True)
    members = [np.flatnonzero(item == i) for i in range(len(items))]

    # The neighbours of each measurement: [N, 2 * NEIGHBOURS]. An item says nothing about
    # the speed at its own measurement, so only other items are compared.
    offsets = [*range(-NEIGHBOURS, 0), *range(1, NEIGHBOURS + 1)]
    position = np.arange(len(times))[:, None] + offsets
    inside = np.clip(position, 0, len(times) - 1)
    compared = (position == inside) & (item[inside] != item[:, None])
    has_neighbours = compared.any(axis=1)

    for _ in range(SWEEPS):
        usual = np.array([np.median(times[member] / slow[member]) for member in members])
        relative = np.where(compared, (times / usual[item])[inside], np.nan)
        slow[has_neighbours] = np.nanmedian(relative[has_neighbours], axis=1)
        slow /= np.median(slow)
    return slow
