"""Tables: refusals, fitting and evaluating calibrations, rank correlation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hwnas.core import calibration as calibration_module
from hwnas.core.calibration import fit_calibration, held_out_errors
from hwnas.core.ops import MBConv, Op
from hwnas.core.statistics import spearman
from hwnas.core.table import Calibration, Entry, LatencyTable, TableHeader
from hwnas.errors import DocumentError

FAST = settings(deadline=None, derandomize=True, max_examples=200)
KEY = "conv-h32-i3-o8-k3-relu"
BARE: list[tuple[Op, ...]] = [()] * 3
"""Networks without ops, where only the sums matter."""


def table() -> LatencyTable:
    unknown = "unknown"
    header = TableHeader(
        device="pixel", cpu=unknown, machine=unknown, runtime="litert", runtime_version="2.1", dtype="int8", threads=4, cores=(4, 5),
        governor=unknown, layout="nhwc", batch=1, date="2025-01-01", space="s",
    )  # fmt: skip
    return LatencyTable(
        header=header,
        entries={KEY: Entry(ms=0.25, p10_ms=0.2, p90_ms=0.3, runs=70, rounds=7, spread=0.01)},
    )


def test_a_table_reads_back() -> None:
    held_out = held_out_errors(
        fit_calibration(BARE, [1.0, 2.0, 3.0], [1.5, 2.5, 3.5]),
        BARE,
        [1.0, 2.0, 4.0],
        [1.5, 2.6, 4.4],
    )
    calibration = Calibration(intercept_ms=0.5, slope=1, networks=3, held_out=held_out)
    for original in (
        table(),
        table().model_copy(update={"calibration": calibration, "slots": {"s0.b0": {"skip": -1.5}}}),
    ):
        assert LatencyTable.parse(original.to_json()) == original
    assert table().title == "pixel/litert-int8-4t"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("header", "threads"), "four", "threads"),
        (("header", "deivce"), "x", r"unknown key 'header\.deivce'; did you mean 'device'"),
        (("entries", KEY, "ms"), -1.0, "ms = -1.0: input should be greater than or equal to 0"),
        (("entries", KEY, "ms"), float("nan"), "finite"),
        (("entries", KEY, "ms"), float("inf"), "finite"),
        (("entries", KEY, "ms"), "0.25", "ms"),
        (("entries", KEY, "mz"), 1.0, "unknown key .*mz'; did you mean 'ms'"),
        (("entries", KEY + "-k3"), {"ms": 1.0}, "is not how this op is written"),
        (("entries", "conv"), {"ms": 1.0}, "'conv' is not an op key: it lacks"),
        (("entries",), {}, "a table needs entries or slots"),
        (
            ("calibration",),
            {"intercept_ms": 0.0, "slope": -1.0, "networks": 3},
            "slope = -1.0: input should be greater than 0",
        ),
    ],
)
def test_wrong_tables_are_refused_with_the_place(
    place: tuple[str, ...], value: object, message: str
) -> None:
    content = json.loads(table().to_json())
    *parents, last = place
    part = content
    for key in parents:
        part = part[key]
    part[last] = value
    with pytest.raises(DocumentError, match=message):
        LatencyTable.parse(json.dumps(content))


@pytest.mark.parametrize("field", sorted(TableHeader.model_fields))
def test_every_field_of_the_header_is_required(field: str) -> None:
    content = json.loads(table().to_json())
    del content["header"][field]
    with pytest.raises(DocumentError, match=rf"key 'header\.{field}' is missing"):
        LatencyTable.parse(json.dumps(content))


@FAST
@given(st.floats(0.3, 3), st.floats(-0.5, 2), st.lists(st.floats(1, 100), min_size=3, max_size=12))
def test_an_exact_affine_relation_is_recovered(
    slope: float, intercept: float, sums: list[float]
) -> None:
    assume(np.ptp(sums) > 0.1 * np.mean(sums))
    measured = [intercept + slope * value for value in sums]
    assume(min(measured) > 0.1)
    calibration = fit_calibration([()] * len(sums), sums, measured)
    assert (calibration.slope, calibration.intercept_ms) == pytest.approx(
        (slope, intercept), abs=1e-6
    )
    assert calibration.networks == len(sums)


def test_the_fit_weighs_relative_errors() -> None:
    """The reference is the minimum of the mean squared relative error, found by a
    general optimiser.
    """
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 50, 20)
    y = (0.8 + 1.1 * x) * rng.uniform(0.9, 1.1, 20)

    def error(parameters: np.ndarray) -> float:
        return float((((parameters[0] + parameters[1] * x) / y - 1) ** 2).mean())

    best = scipy.optimize.minimize(
        error,
        [0.0, 1.0],
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 5000},
    ).x
    calibration = fit_calibration([()] * len(x), list(x), list(y))
    assert (calibration.intercept_ms, calibration.slope) == pytest.approx(tuple(best), abs=1e-4)


@pytest.mark.parametrize(
    ("sums", "measured"),
    [
        ([2.0], [3.0]),  # one network
        ([2.0, 4.0], [3.0, 6.0]),  # two
        ([4.0, 4.0, 4.0], [6.0, 6.1, 5.9]),  # no spread to fit a slope on
        ([4.0, 4.05, 4.1], [6.0, 6.075, 6.15]),  # hardly any spread
        ([1.0, 2.0, 3.0], [4.5, 3.0, 1.5]),  # falling: noise, not a calibration
    ],
)
def test_only_the_slope_is_fitted_where_a_line_cannot_be(
    sums: list[float], measured: list[float]
) -> None:
    calibration = fit_calibration([()] * len(sums), sums, measured)
    assert calibration.intercept_ms == 0.0
    assert calibration.slope == pytest.approx(1.5)


def random_networks(rng: np.random.Generator, count: int) -> list[tuple[Op, ...]]:
    """Chains of blocks in all proportions, with few weights on large images and many on
    small ones.
    """
    return [
        tuple(
            MBConv(int(size), int(width), int(width), 6 * int(width), 3, act="relu")
            for size, width in zip(
                rng.choice([7, 14, 28, 56, 112], 8),
                rng.choice([8, 16, 32, 96, 160], 8),
                strict=True,
            )
        )
        for _ in range(count)
    ]


def mvalues(op: Op) -> float:
    return (op.params + op.in_ch * op.size**2 + op.out_ch * op.out_size**2) / 1e6


@pytest.mark.parametrize("form", ["weights", "capped"])
def test_cold_memory_costs_take_the_form_that_fits_the_networks(form: str) -> None:
    rng = np.random.default_rng(0)
    networks, sums = random_networks(rng, 16), rng.uniform(1, 50, 16)
    cold_ms = (
        (lambda op: 0.12 * op.params / 1e6)
        if form == "weights"
        else (lambda op: 0.3 * min(mvalues(op), 0.25))
    )
    cold = np.array([sum(map(cold_ms, ops)) for ops in networks])
    measured = 0.3 + 1.04 * sums + cold
    calibration = fit_calibration(networks[:12], list(sums[:12]), list(measured[:12]))
    assert (calibration.intercept_ms, calibration.slope) == pytest.approx((0.3, 1.04), abs=1e-9)
    expected = (0.12, 0.0, None) if form == "weights" else (0.0, 0.3, 0.25)
    assert (
        calibration.cache_miss_ms_per_mparam,
        calibration.cache_miss_ms_per_mvalue,
        calibration.cache_mvalues,
    ) == pytest.approx(expected, abs=1e-9)
    assert held_out_errors(
        calibration, networks[12:], list(sums[12:]), list(measured[12:])
    ).max_error == pytest.approx(0, abs=1e-9)
    assert calibration.op_ms(2.0, networks[0][0]) == pytest.approx(2.08 + cold_ms(networks[0][0]))


def test_cold_memory_has_no_cost_with_too_few_networks_or_below_zero() -> None:
    rng = np.random.default_rng(0)
    networks, sums = random_networks(rng, 12), rng.uniform(1, 50, 12)
    cold = np.array([sum(op.params for op in ops) / 1e6 for ops in networks])
    few = fit_calibration(networks[:7], list(sums[:7]), list((0.3 + 1.04 * sums + 0.12 * cold)[:7]))
    below = fit_calibration(networks, list(sums), list(0.3 + 1.04 * sums - 0.05 * cold))
    for calibration in (few, below):
        assert calibration.cache_miss_ms_per_mparam == 0
    assert few.cache_miss_ms_per_mvalue == 0


def test_the_leave_one_out_error_is_that_of_fits_to_the_other_networks() -> None:
    """The reference refits without each network in turn."""
    rng = np.random.default_rng(1)
    networks, x = random_networks(rng, 10), rng.uniform(1, 50, 10)
    cold = np.array([sum(op.params for op in ops) / 1e6 for ops in networks])
    y = (0.5 + 1.1 * x + 0.4 * cold) * rng.uniform(0.95, 1.05, 10)
    shape = Calibration(intercept_ms=0, slope=1, cache_miss_ms_per_mparam=1, networks=10)
    design, errors = np.stack([x, np.ones(10), cold], axis=1) / y[:, None], []
    for i in range(10):
        others = np.arange(10) != i
        fit = np.linalg.lstsq(design[others], np.ones(9), rcond=None)[0]
        errors.append(abs(design[i] @ fit - 1))
    fitted = calibration_module._fit_shape(shape, networks, x, y)
    assert fitted is not None and fitted[0] == pytest.approx(np.mean(errors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p10_ms": 2.0, "p90_ms": 1.0}, "it is below p10_ms = 2"),
        ({"p10_ms": -1.0}, "greater than or equal to 0"),
        ({"spread": -0.1}, "greater than or equal to 0"),
        ({"runs": 0}, "greater than or equal to 1"),
        ({"rounds": -3}, "greater than or equal to 1"),
        ({"ms": True}, "valid number"),
    ],
)
def test_entries_that_no_measurement_gives_are_refused(
    change: dict[str, object], message: str
) -> None:
    content = json.loads(table().to_json())
    content["entries"][KEY] = {"ms": 1.0, "p10_ms": 0.9, "p90_ms": 1.1, **change}
    with pytest.raises(DocumentError, match=f"entries.{KEY}.*{message}"):
        LatencyTable.parse(json.dumps(content))


def test_a_median_of_medians_may_be_outside_the_percentiles_of_all_runs() -> None:
    """Four slow rounds of five runs, three fast ones of a hundred."""
    entry = Entry(ms=2.0, p10_ms=1.0, p90_ms=1.0, runs=320, rounds=7, spread=0.5)
    assert entry.p90_ms is not None and entry.ms > entry.p90_ms


def test_held_out_errors_by_hand() -> None:
    calibration = Calibration(intercept_ms=1.0, slope=2.0, networks=5)
    errors = held_out_errors(
        calibration, BARE, [1.0, 2.0, 4.0], [3.0, 4.0, 10.0]
    )  # predicted 3, 5, 9
    assert errors.networks == 3
    assert errors.pairs == ((3.0, 3.0), (5.0, 4.0), (9.0, 10.0))
    assert errors.mape == pytest.approx((0 + 0.25 + 0.1) / 3)
    assert errors.max_error == pytest.approx(0.25)
    assert errors.raw_mape == pytest.approx((2 / 3 + 0.5 + 0.6) / 3)
    assert errors.spearman == pytest.approx(1.0)
    assert held_out_errors(
        calibration, BARE, [1.0, 4.0, 2.0], [3.0, 4.0, 10.0]
    ).spearman == pytest.approx(0.5)


def test_a_rank_correlation_needs_three_networks_that_differ() -> None:
    calibration = Calibration(intercept_ms=0.0, slope=1.0, networks=3)
    assert held_out_errors(calibration, BARE[:2], [1.0, 2.0], [1.0, 2.0]).spearman is None
    alike = held_out_errors(calibration, BARE, [2.0, 2.0, 2.0], [1.0, 2.0, 3.0])
    assert alike.spearman is None
    stored = table().model_copy(
        update={"calibration": calibration.model_copy(update={"held_out": alike})}
    )
    assert LatencyTable.parse(stored.to_json()) == stored


@FAST
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=30))
def test_spearman_with_ties_is_scipys(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, dtype=float).T
    assume(np.ptp(a) > 0 and np.ptp(b) > 0)
    assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)
