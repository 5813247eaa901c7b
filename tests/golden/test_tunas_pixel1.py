"""TuNAS's published linear model of Pixel 1 latency, evaluated by our cost model: its
numbers are the reference for ours.

Coefficients: google-research:tunas/cost_model_data.py, key ``proxylessnas_search``.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from hwnas.core.arch import Picks
from hwnas.core.cost import CostModel
from hwnas.core.objective import absolute
from hwnas.core.option import factorise
from hwnas.core.spaces import mobile32, picks_of_codes, proxylessnas
from hwnas.core.table import Calibration, LatencyTable, TableHeader
from hwnas.errors import CoverageError, TableError, TargetError

BIAS_MS = 92.1360
SEPCONV_MS = {"ds_k3": -1.7525, "ds_k5": 2.3517, "ds_k7": 8.2273}
COLUMNS = ("ir_k3_e3", "ir_k3_e6", "ir_k5_e3", "ir_k5_e6", "ir_k7_e3", "ir_k7_e6", "skip")
COEFFICIENTS_MS = """
s2.b0 -4.0253 0.2700 -2.3048 5.1523 1.8893 7.8449
s2.b1 -4.2480 1.2601 -1.1474 6.5624 2.2915 13.8460 -9.7380
s2.b2 -4.2437 1.2582 -1.1388 6.5644 2.2875 13.8407 -9.7419
s2.b3 -4.2454 1.2674 -1.1391 6.5529 2.2867 13.8496 -9.7456
s3.b0 -1.4441 1.7459 -0.7502 3.3162 0.3029 5.6558
s3.b1 -0.4231 1.7823 0.2742 3.0070 1.2959 5.1498 -2.2597
s3.b2 -0.4181 1.7787 0.2715 3.0050 1.2914 5.1475 -2.2494
s3.b3 -0.4242 1.7829 0.2772 3.0075 1.2887 5.1470 -2.2526
s4.b0 0.3987 1.8179 0.6215 2.2556 0.9019 2.8308
s4.b1 0.3152 1.9928 0.6314 2.5633 1.0723 3.3423 -1.0907
s4.b2 0.3189 1.9886 0.6304 2.5571 1.0754 3.3413 -1.0853
s4.b3 0.3203 1.9904 0.6288 2.5560 1.0723 3.3414 -1.0826
s5.b0 0.0774 1.8745 0.3749 2.4440 0.8307 3.2250
s5.b1 -0.0354 2.4754 0.2995 3.2227 0.7995 4.1008 -2.0361
s5.b2 -0.0340 2.4688 0.3008 3.2176 0.8032 4.1012 -2.0310
s5.b3 -0.0466 2.4747 0.2998 3.2264 0.8005 4.1096 -2.0380
s6.b0 0.3297 2.2676 0.4422 2.4684 0.5770 2.7417
s6.b1 -0.2127 3.5878 -0.0505 3.8599 0.1206 4.2688 -2.7475
s6.b2 -0.2108 3.5937 -0.0519 3.8637 0.1230 4.2576 -2.7489
s6.b3 -0.2060 3.5953 -0.0618 3.8641 0.1221 4.2629 -2.7501
s7.b0 -1.1863 3.6508 -1.0354 3.9290 -0.8548 4.3233
"""
T1_INDICES = (
    "0,0,0,1,0,0,0,0,1,0,0,1,0,0,1,0,1,1,0,1,0,0,1,0,0,0,0,0,0,2,1,0,1,1,0,2,1,0,2,1,0,0,1,1,0,0,0,0,1,0,0,1,0,0,0,1,1,0,2,0,0,0,0,0,"
    "1,0,0,0,2,1,0,0,0"
)
T2_CODES = "0,1,0,6,6,2,0,1,1,5,1,1,1,4,1,1,1,5,5,2,2,5"  # ProxylessNAS-Mobile


@cache
def pixel1() -> LatencyTable:
    """The linear model as a table of slots: its bias is the calibration's intercept."""
    rows = [line.split() for line in COEFFICIENTS_MS.strip().splitlines()]
    slots = {key: dict(zip(COLUMNS, map(float, values), strict=False)) for key, *values in rows}
    unknown = "unknown"
    header = TableHeader(
        device="pixel1", cpu=unknown, machine=unknown, runtime="netadapt-lut", runtime_version=unknown, dtype="fp32", threads=unknown,
        cores=unknown, governor=unknown, layout=unknown, batch=1, date=unknown, space="proxylessnas",
    )  # fmt: skip
    calibration = Calibration(intercept_ms=BIAS_MS, slope=1.0, networks=0)
    return LatencyTable(
        header=header, slots={"s1.b0": SEPCONV_MS, **slots}, calibration=calibration
    )


@cache
def cost() -> CostModel:
    return CostModel.of_table(proxylessnas(), pixel1())


def picks_of_indices(indices: list[int]) -> Picks:
    """Picks from TuNAS's 73 OneOf indices, in post-order: kernel, expansion and outer
    op of each layer, and after each block its filters.
    """
    left = iter(indices)
    picks: Picks = {}
    kernels, expansions = (3, 5, 7), (3, 6)

    def layer(key: str) -> None:
        kernel, expansion, skipped = kernels[next(left)], expansions[next(left)], next(left)
        picks[key] = "skip" if skipped else f"ir_k{kernel}_e{expansion}"

    assert next(left) == 0  # filters of the stem
    picks["s1.b0"] = f"ds_k{kernels[next(left)]}"
    assert next(left) == 0
    for block in range(2, 8):
        for position in range(1 if block == 7 else 4):
            layer(f"s{block}.b{position}")
        assert next(left) == 0
    assert next(left) == 0  # filters of the head
    assert not list(left)
    return picks


def uniform_gates() -> dict[str, np.ndarray]:
    """The controller at zero logits: kernel, expansion and skip are decided separately,
    so a skip has probability 1/2.
    """
    gates = {}
    for choice in cost().space.choices:
        options = tuple(map(str, choice.options))
        kept = len(options) - factorise(options).skippable
        gates[choice.key] = np.array(
            [
                0.5 if option == "skip" else (0.5 if "skip" in options else 1.0) / kept
                for option in options
            ]
        )
    return gates


def test_the_architecture_in_tunas_unit_test() -> None:
    indices = [int(index) for index in T1_INDICES.split(",")]
    assert len(indices) == 73
    assert cost().cost(picks_of_indices(indices)) == pytest.approx(84.0167, abs=1e-3)


def test_proxylessnas_mobile() -> None:
    picks = picks_of_codes(proxylessnas(), [int(code) for code in T2_CODES.split(",")])
    assert cost().cost(picks) == pytest.approx(84.416, abs=1e-3)


def test_the_range_of_the_space() -> None:
    low, high = cost().range()
    assert (round(low, 1), round(high, 1)) == (30.9, 219.1)
    with pytest.raises(TargetError, match=r"20 ms is out of reach .* take 30\.9. to 219\.1 ms"):
        cost().check_target(20.0)
    cost().check_target(84.0)


def test_the_mean_under_the_uniform_controller() -> None:
    assert float(cost().expected(uniform_gates())) == pytest.approx(92.7, abs=0.2)


def test_the_spread_of_uniform_samples_and_how_many_land_at_the_target() -> None:
    rng = np.random.default_rng(0)
    index_NC = np.stack(
        [rng.choice(len(p), size=200_000, p=p) for p in uniform_gates().values()], axis=1
    )
    latencies_ms = cost().costs(index_NC)
    assert latencies_ms.mean() == pytest.approx(92.7, abs=0.2)
    assert latencies_ms.std() == pytest.approx(16.9, abs=0.15)
    assert ((latencies_ms >= 83) & (latencies_ms <= 85)).mean() == pytest.approx(0.043, abs=0.002)


def test_a_restricted_space_keeps_the_costs_of_fixed_choices() -> None:
    picks = picks_of_codes(proxylessnas(), [int(code) for code in T2_CODES.split(",")])
    fixed = ("s1.b0", "s2.b0", "s2.b2", "s7.b0")
    smaller = CostModel.of_table(
        proxylessnas().restrict({key: [picks[key]] for key in fixed}), pixel1()
    )
    assert len(smaller.space.choices) == 22 - len(fixed)
    rest = {key: option for key, option in picks.items() if key not in fixed}
    assert smaller.cost(rest) == pytest.approx(84.416, abs=1e-3)


def test_the_model_refuses_another_space() -> None:
    with pytest.raises(TableError, match=r"has costs for slots of another space \(s2\.b3, s3\.b3"):
        CostModel.of_table(mobile32(), pixel1())
    incomplete = pixel1().model_copy(
        update={
            "slots": {key: options for key, options in pixel1().slots.items() if key != "s3.b1"}
        }
    )
    with pytest.raises(CoverageError, match=r"s3\.b1:ir_k3_e3") as caught:
        CostModel.of_table(proxylessnas(), incomplete)
    assert len(caught.value.missing) == 7  # the options of s3.b1


def test_sizes_of_the_space() -> None:
    space = proxylessnas()
    assert f"{space.decisions:.3g}" == "2.16e+21"
    assert space.decisions == 3 * 6**6 * 12**15
    assert space.size == 3 * 6**6 * 7**15


def test_the_absolute_reward() -> None:
    assert absolute(0.75, 92.4, 84.0, beta=-0.10) == pytest.approx(0.740, abs=1e-12)


def test_each_single_change_costs_the_difference_of_its_coefficients() -> None:
    base = {choice.key: choice.options[0] for choice in cost().space.choices}
    base_ms = cost().cost(base)
    changes = [(choice.key, option) for choice in cost().space.choices for option in choice.options]
    assert len(changes) == 144  # the number of coefficients in TuNAS's file
    slots = pixel1().slots
    for key, option in changes:
        change_ms = cost().cost({**base, key: option}) - base_ms
        assert change_ms == pytest.approx(
            slots[key][str(option)] - slots[key][str(base[key])], abs=1e-9
        )
