"""Changes of a device's speed between measurements, on made-up times whose truth is
known.
"""

from __future__ import annotations

import numpy as np
import pytest

from hwnas.devices.speed import slowness


def session(rng: np.random.Generator, items: int, rounds: int) -> list[str]:
    """Names of items, in the order in which a session measures them."""
    return [f"item-{i}" for _ in range(rounds) for i in rng.permutation(items)]


def medians(names: list[str], ms: np.ndarray) -> np.ndarray:
    return np.array(
        [np.median(ms[[name == item for name in names]]) for item in sorted(set(names))]
    )


def test_a_steady_device_is_left_as_it_is() -> None:
    """Bit for bit, however different the items are."""
    names = session(np.random.default_rng(0), 7, 5)
    assert slowness(names, [0.1 * 3 ** int(name[-1]) for name in names]).tolist() == [1.0] * 35


def test_jumps_of_the_clock_are_corrected() -> None:
    """A clock that is 1.8 times slower for stretches of some measurements: the
    corrected medians are 5 times closer to the truth.
    """
    rng = np.random.default_rng(1)
    names = session(rng, 40, 9)
    truth = np.exp(rng.normal(size=40))
    clock, factor = 1.0, []
    for _ in names:
        clock = 2.8 - clock if rng.random() < 0.05 else clock
        factor.append(clock)
    by_name = dict(zip(sorted(set(names)), truth, strict=True))
    ms = (
        np.array([by_name[name] for name in names])
        * factor
        * np.exp(rng.normal(scale=0.01, size=len(names)))
    )
    uncorrected, corrected = (
        np.log(medians(names, times) / truth) for times in (ms, ms / slowness(names, ms))
    )
    assert np.std(corrected) < np.std(uncorrected) / 5
    assert np.std(corrected) < 0.03


def test_the_noise_of_one_item_stays_with_it() -> None:
    """The other items keep their times, and the noisy one its spread."""
    rng = np.random.default_rng(2)
    names = session(rng, 12, 8)
    ms = np.array([rng.choice([1.0, 3.0]) if name == "item-0" else 1.0 for name in names])
    factors = slowness(names, ms)
    assert factors.tolist() == pytest.approx([1.0] * len(names))


def test_items_that_are_measured_alone_have_no_neighbours() -> None:
    assert slowness(["a", "a", "a", "a"], [1.0, 2.0, 1.0, 3.0]).tolist() == [1.0] * 4
    assert slowness(["a"], [2.0]).tolist() == [1.0]
