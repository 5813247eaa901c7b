"""Tables fitted from whole networks: the algebra against independent code, what is
recovered, what a table holds, what must never happen, and what is refused.
"""

from __future__ import annotations

import os
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.core.arch import Architecture
from hwnas.core.clock import LONGEST_MS, SHORTEST_MS
from hwnas.core.cost import CostModel, latency_ms, op_ms
from hwnas.core.families import fbnet
from hwnas.core.ops import Op
from hwnas.core.published import published
from hwnas.core.space import MacroSpace
from hwnas.core.spaces import mobile32
from hwnas.core.statistics import spearman
from hwnas.core.table import Calibration, Entry, LatencyTable, TableHeader
from hwnas.errors import CoverageError, TableError
from hwnas.tables import prior as prior_module
from hwnas.tables import regression
from hwnas.tables.fit import count_ops, fit_table
from hwnas.tables.prior import ROOFLINE, Hypothesis, Prior
from hwnas.tables.regression import clip_at_zero, fit_costs

FAST = settings(deadline=None, derandomize=True, max_examples=25)
SPACE = mobile32()
OPS = SPACE.ops


def sampled(count: int, seed: int = 0, space: MacroSpace = SPACE) -> list[Architecture]:
    rng = np.random.default_rng(seed)
    return [space.decode(space.sample(rng), f"net-{i}") for i in range(count)]


def device(seed: int = 0, spread: float = 0.3) -> np.ndarray:
    """Milliseconds per op of a made-up device: from layers, MACs and output sizes,
    times a random factor for each op.
    """
    factors = np.random.default_rng([seed, 5]).lognormal(0.0, spread, len(OPS))
    return (
        np.array(
            [0.02 * len(op.layers) + op.macs / 4e6 + op.out_ch * op.out_size**2 / 2e6 for op in OPS]
        )
        * factors
    )


def measured(
    networks: list[Architecture], costs: np.ndarray, noise: float = 0.0, fixed_ms: float = 0.3
) -> list[tuple[Architecture, float]]:
    ms = (count_ops(OPS, networks) @ costs + fixed_ms) * np.random.default_rng(9).normal(
        1.0, noise, len(networks)
    )
    return [(arch, float(value)) for arch, value in zip(networks, ms, strict=True)]


def header(device_name: str = "made-up") -> TableHeader:
    return TableHeader.model_validate(
        {
            **dict.fromkeys(TableHeader.model_fields, "unknown"),
            "device": device_name,
            "space": SPACE.name,
        }
    )


def table_of(costs: np.ndarray, name: str, intercept_ms: float = 0.0) -> LatencyTable:
    calibration = Calibration(intercept_ms=intercept_ms, slope=1.0, networks=9)
    entries = {op.key: Entry(ms=float(cost)) for op, cost in zip(OPS, costs, strict=True)}
    return LatencyTable(header=header(name), entries=entries, calibration=calibration)


def fitted(networks: list[tuple[Architecture, float]], *known: LatencyTable) -> LatencyTable:
    return fit_table(OPS, networks, header(), np.random.default_rng(0), known=known)


# The algebra


def covariance(hypothesis: Hypothesis, prior: Prior, rho: float, tau: float) -> np.ndarray:
    """S of a part over all costs, written out from the formula in ``prior``."""
    every = np.arange(len(prior.ops))
    fixed = np.eye(len(every) + 1)[-1]
    s = np.outer(hypothesis.centre_P, hypothesis.centre_P) + prior_module.INTERCEPT**2 * np.outer(
        fixed, fixed
    )
    s += rho**2 * hypothesis.differences_KP.T @ hypothesis.differences_KP
    s[:-1, :-1] += (
        tau**2
        * prior.correlation(every, every)
        * np.outer(hypothesis.centre_P[:-1], hypothesis.centre_P[:-1])
    )
    return s


def design(networks: list[tuple[Architecture, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ms = np.array([value for _, value in networks])
    counts = count_ops(OPS, [arch for arch, _ in networks])
    return counts, ms, np.c_[counts, np.ones(len(ms))] * (np.median(ms) / ms)[:, None]


@pytest.mark.parametrize("count", [7, 150])
def test_one_part_is_the_optimum_of_the_penalised_error(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """min |A w - 1|^2 / noise^2 + w' S^-1 w by least squares in the coordinates w = L
    z, with fewer and with more networks than ops.
    """
    monkeypatch.setattr(regression, "PASSES", 1)
    monkeypatch.setattr(regression, "NOISE", (0.05,))
    monkeypatch.setattr(Hypothesis, "sizes", property(lambda self: iter([(0.2, 0.3, 0.0)])))
    counts, ms, a = design(measured(sampled(count), device(), noise=0.05, fixed_ms=2.0))
    prior = Prior.of(OPS)
    hypothesis = prior.hypotheses(np.append(counts.mean(axis=0), 1.0))[0]
    values, vectors = np.linalg.eigh(covariance(hypothesis, prior, 0.2, 0.3))
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    z = np.linalg.lstsq(
        np.r_[a @ root / 0.05, np.eye(root.shape[1])],
        np.r_[np.full(count, 1 / 0.05), np.zeros(root.shape[1])],
        rcond=None,
    )[0]
    best = root @ z * np.median(ms)
    costs = fit_costs(prior, counts, ms)
    assert best[:-1].min() > 0  # otherwise cutting at 0 would matter
    assert costs.op_ms == pytest.approx(best[:-1], rel=1e-6)
    assert costs.intercept_ms == pytest.approx(best[-1], rel=1e-5)


@pytest.mark.parametrize("count", [8, 150])
def test_hypotheses_are_weighted_by_their_evidence(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against scipy's density of the normal distribution; every network has a relative
    latency of 1.
    """
    monkeypatch.setattr(regression, "PASSES", 1)
    counts, ms, a = design(measured(sampled(count), device(0), noise=0.15))
    prior = Prior.of(OPS, [table_of(device(1), "one", 0.1), table_of(device(2), "two")])
    log: dict[str, list[float]] = {}
    for hypothesis in prior.hypotheses(np.append(counts.mean(axis=0), 1.0)):
        for rho, tau, log_probability in hypothesis.sizes:
            k = a @ covariance(hypothesis, prior, rho, tau) @ a.T
            for noise in regression.NOISE:
                normal = scipy.stats.multivariate_normal(
                    np.zeros(count), k + noise**2 * np.eye(count), allow_singular=True
                )
                log.setdefault(hypothesis.name, []).append(
                    log_probability + normal.logpdf(np.ones(count))
                )
    total = np.logaddexp.reduce(np.concatenate(list(log.values())))
    expected = {
        name: float(np.exp(np.logaddexp.reduce(values) - total)) for name, values in log.items()
    }
    assert fit_costs(prior, counts, ms).posterior == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("count", [9, 150])
def test_a_network_weighs_less_the_less_the_others_predict_it(count: int) -> None:
    """Leave-one-out residuals and variances, from actually leaving each one out."""
    counts, _, a = design(measured(sampled(count), device(), noise=0.1))
    prior = Prior.of(OPS)
    hypothesis = prior.hypotheses(np.append(counts.mean(axis=0), 1.0))[0]
    seen = np.flatnonzero(a.any(axis=0))
    weights = np.random.default_rng(0).uniform(0.3, 1.2, count)
    data = regression._Data.of(a[:, seen], weights)
    parts = list(
        regression._components(
            [hypothesis], data, seen, prior.correlation(np.arange(len(OPS)), seen[:-1])
        )
    )
    part = parts[5]
    noise = regression.NOISE[int(part.evidence_S.argmax())] ** 2
    k = a @ covariance(hypothesis, prior, part.rho, part.tau) @ a.T
    expected = []
    for i in range(count):
        others = np.delete(np.arange(count), i)
        gain = np.linalg.solve(
            k[np.ix_(others, others)] + np.diag(noise / weights[others]), k[others, i]
        )
        residual, variance = 1 - gain.sum(), k[i, i] - gain @ k[others, i]
        expected.append(
            (regression.TAIL + 1) / (regression.TAIL + residual**2 / (variance + noise))
        )
    assert regression._robust_weights(part, data, weights) == pytest.approx(
        np.array(expected), rel=1e-4
    )


def test_probabilities_of_a_hypothesis_add_up_to_one() -> None:
    assert [
        hypothesis.exact
        for hypothesis in Prior.of(OPS, [table_of(device(), "known")]).hypotheses(
            np.ones(len(OPS) + 1)
        )
    ] == [
        prior_module.EXACT,
        0,
    ]
    for away, exact in product((np.zeros((0, 3)), np.ones((2, 3))), (0.0, 0.75, 1.0)):
        assert np.exp(
            [p for _, _, p in Hypothesis("one", np.ones(3), away, exact).sizes]
        ).sum() == pytest.approx(1)


def test_the_more_fields_their_keys_share_the_more_alike_ops_are() -> None:
    keys = (
        "mbconv-h8-i16-o16-m48-k3-relu-id",
        "mbconv-h8-i16-o16-m48-k5-relu-id",
        "mbconv-h8-i16-o16-m96-k5-relu",
        "classifier-h4-i16-o10",
    )
    prior = Prior.of([Op.parse(key) for key in keys])
    alike = prior.correlation(np.array([0, 1]), np.arange(4))
    # from the classifier, all seven differ: kind, size, out, expansion, kernel,
    # activation, residual
    assert alike == pytest.approx(prior_module.ALIKE ** np.array([[0, 1, 3, 7], [1, 0, 2, 7]]))
    assert (
        np.linalg.eigvalsh(
            Prior.of(OPS).correlation(np.arange(len(OPS)), np.arange(len(OPS)))
        ).min()
        > 0
    )


def test_the_roofline_counts_layers_macs_values_and_parameters() -> None:
    ops = [
        Op.parse(key)
        for key in (
            "mbconv-h8-i16-o24-m48-k5-s2-relu",
            "dsconv-h4-i8-o8-k3-relu-id",
            "classifier-h4-i16-o10",
        )
    ]
    counted = Prior.of(ops).roofline_lists
    assert counted[:, 0].tolist() == [
        3,
        64 * 16 * 48 + 16 * 48 * 24,
        16 * 25 * 48,
        64 * (16 + 48) + 80 * 48 + 16 * (48 + 24),
        ops[0].params,
    ]
    # the input is read twice
    assert counted[:, 1].tolist() == [
        2,
        16 * 64,
        16 * 9 * 8,
        16 * 16 + 16 * 16 + 16 * 8,
        ops[1].params,
    ]
    assert counted[:, 2].tolist() == [1, 160, 0, 16 * 16 + 16 + 10, 170]
    assert not counted[:, 3].any()  # no intercept


def test_networks_without_depthwise_layers_have_a_roofline_too() -> None:
    ops = [
        Op.parse(key)
        for key in ("conv-h8-i3-o8-k3-relu", "conv-h8-i3-o16-k3-relu", "conv-h8-i3-o16-k5-relu")
    ]
    costs = fit_costs(Prior.of(ops), np.eye(3), np.array([1.0, 2.0, 5.0]))
    assert costs.of(np.eye(3)) == pytest.approx([1, 2, 5], rel=0.2)


@FAST
@given(
    order=st.permutations(range(12)),
    factor=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 5),
)
def test_neither_the_order_of_networks_nor_the_unit_of_time_matters(
    order: list[int], factor: float, seed: int
) -> None:
    counts, ms, _ = design(measured(sampled(12, seed), device(seed), noise=0.05))
    prior = Prior.of(OPS, [table_of(device(7), "known")])
    one, two = fit_costs(prior, counts, ms), fit_costs(prior, counts[order], factor * ms[order])
    assert two.op_ms == pytest.approx(factor * one.op_ms, rel=1e-5)
    assert two.intercept_ms == pytest.approx(factor * one.intercept_ms, rel=1e-4, abs=1e-9 * factor)
    assert two.posterior == pytest.approx(one.posterior, abs=1e-6)


# What is recovered


def test_many_networks_recover_an_additive_device() -> None:
    costs, fresh = device(), sampled(200, seed=1)
    truth = count_ops(OPS, fresh) @ costs + 0.3
    errors = []
    for count in (20, 80, 160, 640):
        counts, ms, _ = design(measured(sampled(count), costs))
        predicted = fit_costs(Prior.of(OPS), counts, ms).of(count_ops(OPS, fresh))
        errors.append(float(np.abs(predicted / truth - 1).mean()))
    assert all(after < 0.7 * before for before, after in pairwise(errors)), errors
    assert errors[-1] < 3e-4


def test_a_known_device_is_found_among_others_and_scaled() -> None:
    known = [table_of(device(seed), f"device-{seed}") for seed in (1, 2, 3)]
    table = fitted(measured(sampled(6), 2.5 * device(2), noise=0.005, fixed_ms=0.0), *known)
    assert table.provenance["resembles"].startswith("device-2 100%")
    assert [entry.ms for entry in table.entries.values()] == pytest.approx(
        2.5 * device(2), rel=0.03
    )


def test_ops_in_no_network_get_the_costs_of_the_known_device() -> None:
    """Networks without kernel 5 in blocks 2 to 4, measured without noise at a third of
    the known device's speed.
    """
    costs = device(1)
    networks = [
        arch for arch in sampled(400) if not any(op.kernel == 5 for op in arch.blocks[2:5])
    ][:8]
    table = fitted(measured(networks, 3 * costs, fixed_ms=0.0), table_of(costs, "known"))
    seen = count_ops(OPS, networks).any(axis=0)
    assert (
        table.provenance["prior_alone"]
        == f"{(~seen).sum()} of {len(OPS)} ops are in no measured network: their price is the"
        " prior's"
    )
    assert 0 < seen.sum() < len(OPS)
    ratio = np.array([entry.ms for entry in table.entries.values()]) / costs
    assert ratio == pytest.approx(3, rel=0.02)


def test_a_known_table_counts_with_its_calibration() -> None:
    calibration = Calibration(intercept_ms=0.7, slope=1.5, cache_miss_ms_per_mparam=2.0, networks=9)
    table = table_of(device(1), "known").model_copy(update={"calibration": calibration})
    assert Prior.of(OPS, [table]).known_KP[0] == pytest.approx(
        [*(op_ms(op, table) for op in OPS), 0.7]
    )


def test_a_few_stalls_do_not_spoil_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    known, costs, fresh = (
        table_of(device(1), "known"),
        1.7 * device(1, spread=0.35),
        count_ops(OPS, sampled(200, seed=1)),
    )
    networks = measured(sampled(16), costs, noise=0.01)
    for i in (3, 8):
        networks[i] = (networks[i][0], 2.2 * networks[i][1])
    counts, ms, _ = design(networks)
    truth = fresh @ costs + 0.3

    def error() -> float:
        return float(
            np.abs(fit_costs(Prior.of(OPS, [known]), counts, ms).of(fresh) / truth - 1).mean()
        )

    robust = error()
    monkeypatch.setattr(regression, "PASSES", 1)
    assert robust < 0.02 < 0.03 < error()


def test_more_networks_help_until_only_noise_is_left() -> None:
    def advice(
        networks: list[tuple[Architecture, float]], *known: LatencyTable
    ) -> tuple[float, str]:
        table = fitted(networks, *known)
        assert table.calibration is not None and table.calibration.held_out is not None
        error, text = table.calibration.held_out.mape, table.provenance["more_networks"]
        assert text.startswith(f"{len(networks)} networks: {error:.1%}; ")
        return error, text.partition("; ")[2]

    error, text = advice(measured(sampled(48), device()))
    assert text.startswith("about 48 more would bring ")
    assert 0.6 * error < float(text.removesuffix("%").rpartition(" ")[2]) / 100 < 0.9 * error
    _, text = advice(measured(sampled(48), device(1), noise=0.05), table_of(device(1), "known"))
    assert text == "half of them did about as well, so more would hardly help"


def test_pixel_3_is_learned_better_from_more_networks() -> None:
    """The published Pixel 3 latencies are sums over a table of blocks, so that table is
    all there is to learn.
    """
    folder = os.environ.get("HWNAS_TEST_DATA")
    if not folder:
        pytest.skip("HWNAS_TEST_DATA is not set: it names a folder with help_latency")
    with np.load(Path(folder, "help_latency/fbnet.npz")) as data:
        codes, ms = data["op_idx"].astype(int), data["lat_pixel3"].astype(float)
    flat = fbnet(resolution=32, classes=100, head=1504)
    strides = (1, 1, 1, 2, 2, 1, 2, 1, 1)  # HW-NAS-Bench's space for 32-pixel images
    stages = [
        {**stage.model_dump(), "stride": stride}
        for stage, stride in zip(flat.stages, strides, strict=True)
    ]
    space = MacroSpace.model_validate({**flat.model_dump(), "stages": stages})
    counts = count_ops(space.ops, [space.decode(space.at(row)) for row in codes[:600]])
    errors = []
    for count in (10, 20, 50, 200):
        rows = [np.arange(start, start + count) for start in range(0, 200, 40)]
        predictions = [
            fit_costs(Prior.of(space.ops), counts[row], ms[row]).of(counts[400:]) for row in rows
        ]
        errors.append(
            float(
                np.mean([np.abs(predicted / ms[400:600] - 1).mean() for predicted in predictions])
            )
        )
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.03 and errors[-1] < 0.002
    assert spearman(predictions[0], ms[400:600]) > 0.9999


# What a table holds


def test_the_table_covers_the_space_and_says_where_it_comes_from() -> None:
    networks = measured(sampled(12), device(), noise=0.02)
    unseen = int((~count_ops(OPS, [arch for arch, _ in networks]).any(axis=0)).sum())
    table = fit_table(
        OPS, networks, header("phone"), np.random.default_rng(0), provenance={"file": "nets.csv"}
    )
    assert table.header == header("phone")
    assert list(table.entries) == [op.key for op in OPS]
    assert LatencyTable.parse(table.to_json()) == table
    cost = CostModel.of_table(SPACE, table)
    arch, ms = networks[0]
    assert arch.origin is not None
    assert (
        cost.cost(arch.origin.picks)
        == pytest.approx(latency_ms(arch, table))
        == pytest.approx(ms, rel=0.2)
    )
    calibration = table.calibration
    assert calibration is not None and calibration.held_out is not None
    assert (calibration.networks, calibration.slope, calibration.cache_miss_ms_per_mparam) == (
        12,
        1.0,
        0.0,
    )
    assert [pair[1] for pair in calibration.held_out.pairs] == [value for _, value in networks]
    assert table.provenance == {
        "method": "fitted from 12 whole networks, judged by cross-validation",
        "prior": ROOFLINE,
        "resembles": "roofline 100%",
        "prior_alone": (
            f"{unseen} of {len(OPS)} ops are in no measured network: their price is the prior's"
        ),
        "more_networks": table.provenance["more_networks"],
        "file": "nets.csv",
    }


def test_no_network_is_evaluated_by_a_fit_that_knows_its_latency() -> None:
    """With ten networks, each is left out alone: the prediction for it does not depend
    on its own latency.
    """
    networks = measured(sampled(10), device(), noise=0.05)
    before = fitted(networks).calibration
    for i in (0, 7):
        changed = [*networks[:i], (networks[i][0], 5 * networks[i][1]), *networks[i + 1 :]]
        after = fitted(changed).calibration
        assert (
            before is not None
            and before.held_out is not None
            and after is not None
            and after.held_out is not None
        )
        assert after.held_out.pairs[i][0] == pytest.approx(before.held_out.pairs[i][0], rel=1e-9)
        assert after.held_out.pairs[i - 1][0] != pytest.approx(
            before.held_out.pairs[i - 1][0], rel=1e-9
        )


@pytest.mark.slow
@FAST
@given(
    ms=st.lists(st.floats(1e-3, 1e4), min_size=3, max_size=6),
    with_known=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_latencies_give_prices_that_are_finite_and_not_below_zero(
    ms: list[float], with_known: bool, seed: int
) -> None:
    networks = list(zip(sampled(len(ms), seed), ms, strict=True))
    # the document refuses what is not finite
    found = fitted(networks, *([table_of(device(1), "known")] if with_known else []))
    assert all(entry.ms >= 0 for entry in found.entries.values()) and len(found.entries) == len(OPS)


@pytest.mark.parametrize(
    "ms",
    [
        [1.0, 1.0, 1.0, 1.0],
        [SHORTEST_MS, SHORTEST_MS, SHORTEST_MS, SHORTEST_MS],
        [SHORTEST_MS, LONGEST_MS, 1.0, 2.0],
        [LONGEST_MS, LONGEST_MS, LONGEST_MS, SHORTEST_MS],
    ],
    ids=["equal", "all a nanosecond", "from a nanosecond to days", "days but one"],
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_the_shortest_the_longest_and_equal_latencies_give_finite_prices(ms: list[float]) -> None:
    found = fitted(list(zip(sampled(len(ms)), ms, strict=True)))
    assert found.calibration is not None and found.calibration.held_out is not None
    # the document, too, refuses what is not finite
    again = LatencyTable.parse(found.to_json())
    assert np.isfinite([entry.ms for entry in again.entries.values()]).all()
    assert np.isfinite([found.calibration.intercept_ms, found.calibration.held_out.mape]).all()


@FAST
@given(costs=st.lists(st.floats(-2, 2), min_size=3, max_size=6))
def test_a_cost_that_would_be_below_zero_is_zero_and_the_intercept_makes_up_for_it(
    costs: list[float],
) -> None:
    before = np.array(costs)
    mean = np.append(np.linspace(0.1, 2.0, len(costs) - 1), 1.0)
    cut, intercept = clip_at_zero(before, mean)
    assert cut.tolist() == [max(cost, 0.0) for cost in costs[:-1]]
    assert mean[:-1] @ cut + intercept == pytest.approx(mean @ before)


# What is refused


def test_refusals() -> None:
    networks = measured(sampled(5), device())
    with pytest.raises(TableError, match=r"at least 3 different networks, got 2: measure more\."):
        fitted(networks[:2])
    for wrong in (0.0, -1.0, 5e-324, 1e-300, 1e300, float("nan"), float("inf")):
        with pytest.raises(
            TableError,
            match=r"network 'net-1' takes \S+ ms, which no clock measures: give latencies in",
        ):
            fitted([networks[0], (networks[1][0], wrong), *networks[2:]])
    with pytest.raises(
        CoverageError,
        match=(
            r"'mobilenet_v2' contains op conv-h224-i3-o32-k3-s2-relu6, which is not in the table's"
            r" space\."
        ),
    ):
        fitted([*networks, (published("mobilenet_v2"), 50.0)])
    known = table_of(device(1), "known")
    partial = known.model_copy(update={"entries": dict(list(known.entries.items())[:-1])})
    with pytest.raises(CoverageError, match=f"lacks 1 of the {len(OPS)} ops of the fit"):
        fitted(networks, known, partial)
    with pytest.raises(TableError, match="has costs for positions of a space, not ops"):
        fitted(
            networks,
            known.model_copy(update={"entries": {}, "slots": {"s2.b0": {"ir_k3_e3": 1.0}}}),
        )
    with pytest.raises(TableError, match="known predicts 0 ms for the measured networks"):
        fitted(networks, table_of(0 * device(1), "known"))
    with pytest.raises(TableError, match="known predicts inf ms for the measured networks"):
        fitted(networks, table_of(0 * device(1) + 1e308, "known"))
