"""Tables fitted to whole networks on real devices: how few measured networks are
enough, compared with simpler methods.

    pytest tests/benchmarks/test_fit_transfer.py --benchmark-only -s

*A new device* (HELP, MIT): 5,000 networks of FBNet's space at 32 pixels on 19 settings
of 11 devices. The known devices' tables are fitted to all their 5,000; the new one's to
10, 20 or 50, and evaluated on the rest. A device that is left out is left out in all
its settings (batch 1, 32, 64), though keeping them changes little. For comparison, from
the same networks:

- *best known*: the known device whose table, scaled by an affine map, fits the measured
  networks best;
- *hindsight*: the one that turns out best on the evaluated networks, which cannot be
  known in advance;
- *no device*: the fit from only the roofline;
- *MACs*: an affine map of the number of multiply-accumulates.

*Two phones* (mobile-ml-benchmark, MIT): the 26 of its networks whose blocks are ops of
ours, at 224 pixels, from 5 or 10 of them, and from the roofline or also this computer's
table. The networks are built here by their authors' rules, and checked against the
file's FLOPs and file sizes. ``HWNAS_CPU_TABLES`` names the folder in which this
computer's tables are kept; without it they are measured again, which takes about two
minutes each.

The affine maps minimise the squared relative error; one with a slope below zero becomes
a constant. The sizes of deviations, ALIKE, EXACT, INTERCEPT and NOISE were chosen on
these data, from round numbers; most neighbouring values change the means by a few
percent of themselves. ROOFLINE_RHO and the roofline's own certainty matter more on the
phones.

A known table is trusted for ops that no measured network contains. This computer's
LiteRT takes 3 to 16 times as long for 7 x 7 kernels as for 5 x 5; the phones do not. If
none of the measured networks has one, networks that do are predicted worse with this
computer's table than without.
"""

from __future__ import annotations

import csv
import gzip
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwnas.config import DeviceConfig, ProfileConfig
from hwnas.core.arch import Architecture
from hwnas.core.families import fbnet
from hwnas.core.ops import Classifier, Conv, Head, Op
from hwnas.core.option import make_divisible
from hwnas.core.published import published
from hwnas.core.space import MacroSpace
from hwnas.core.spaces import mobile32
from hwnas.core.statistics import spearman
from hwnas.core.table import LatencyTable, TableHeader
from hwnas.devices.device import HOST, connect
from hwnas.devices.session import Bench
from hwnas.export.timing import timing_file
from hwnas.profile import stage as profiling
from hwnas.tables.fit import count_ops, fit_table
from hwnas.tables.prior import Prior
from hwnas.tables.regression import fit_costs

DRAWS = 20
FBNET_COUNTS = (10, 20, 50)
PHONE_COUNTS = (5, 10)


def data(name: str) -> Path:
    folder = os.environ.get("HWNAS_TEST_DATA")
    if not folder:
        pytest.skip(
            "HWNAS_TEST_DATA is not set: it names a folder with help_latency and"
            " mobile_ml_benchmark"
        )
    return Path(folder, name)


def affine(x_N: np.ndarray, ms_N: np.ndarray) -> tuple[np.ndarray, float]:
    """(slope, intercept) with the least squared relative error, and that error."""
    columns = np.stack([x_N, np.ones(len(x_N))], axis=1) / ms_N[:, None]
    coefficients = np.linalg.lstsq(columns, np.ones(len(x_N)), rcond=None)[0]
    if coefficients[0] <= 0:
        coefficients = np.array([0.0, 1 / np.mean(1 / ms_N)])
    return coefficients, float(((columns @ coefficients - 1) ** 2).mean())


def mape(predicted: np.ndarray, ms: np.ndarray) -> float:
    return float(np.abs(predicted / ms - 1).mean())


def rank(predicted: np.ndarray, ms: np.ndarray) -> float:
    return spearman(predicted, ms) if np.ptp(predicted) > 0 else 0.0


# A new device of HELP


@dataclass(frozen=True)
class Help:
    """HELP's FBNet networks: counts of ops [5000, ops], milliseconds per setting, known
    latencies of ops and an intercept [settings, ops + 1].
    """

    ops: tuple[Op, ...]
    networks: list[Architecture]
    counts: np.ndarray
    macs: np.ndarray
    ms: dict[str, np.ndarray]
    known: np.ndarray

    @property
    def settings(self) -> list[str]:
        return list(self.ms)


def device_of(setting: str) -> str:
    """The device of a setting: ``titanx_32`` is batch 32 on a Titan X, ``gold_6240`` a
    Xeon's name.
    """
    name, _, batch = setting.rpartition("_")
    return name if batch in ("1", "32", "64") else setting


@cache
def help_data() -> Help:
    with np.load(data("help_latency/fbnet.npz")) as stored:
        codes = stored["op_idx"].astype(int)
        ms = {
            key.removeprefix("lat_"): stored[key].astype(float)
            for key in stored.files
            if key.startswith("lat_")
        }
    flat = fbnet(resolution=32, classes=100, head=1504)
    strides = (1, 1, 1, 2, 2, 1, 2, 1, 1)  # HW-NAS-Bench's space for 32-pixel images
    stages = [
        {**stage.model_dump(), "stride": stride}
        for stage, stride in zip(flat.stages, strides, strict=True)
    ]
    space = MacroSpace.model_validate({**flat.model_dump(), "stages": stages})
    networks = [space.decode(space.at(row)) for row in codes]
    counts = count_ops(space.ops, networks)
    prior = Prior.of(space.ops)
    fits = [fit_costs(prior, counts, values) for values in ms.values()]
    known = np.array([[*fit.op_ms, fit.intercept_ms] for fit in fits])
    return Help(
        space.ops, networks, counts, np.array([float(arch.macs) for arch in networks]), ms, known
    )


METHODS = ("ours", "best known", "hindsight", "no device", "MACs")


def one_draw(study: Help, setting: str, known: list[int], seen: np.ndarray) -> np.ndarray:
    """(MAPE, Spearman) of each method on the networks that are not ``seen``: float
    [methods, 2].
    """
    ms, rest = study.ms[setting], np.setdiff1d(np.arange(len(study.macs)), seen)
    names = tuple(study.settings[i] for i in known)
    prior, roofline = Prior(study.ops, names, study.known[known]), Prior.of(study.ops)
    sums = study.known[known] @ np.c_[study.counts, np.ones(len(ms))].T
    maps = [affine(row[seen], ms[seen]) for row in sums]
    scaled = [
        coefficients[0] * row[rest] + coefficients[1]
        for (coefficients, _), row in zip(maps, sums, strict=True)
    ]
    slope, intercept = affine(study.macs[seen], ms[seen])[0]
    predictions = [
        fit_costs(prior, study.counts[seen], ms[seen]).of(study.counts[rest]),
        scaled[int(np.argmin([error for _, error in maps]))],
        min(scaled, key=lambda predicted: mape(predicted, ms[rest])),
        fit_costs(roofline, study.counts[seen], ms[seen]).of(study.counts[rest]),
        slope * study.macs[rest] + intercept,
    ]
    return np.array(
        [(mape(predicted, ms[rest]), rank(predicted, ms[rest])) for predicted in predictions]
    )


def transfer(study: Help) -> dict[tuple[str, int], np.ndarray]:
    """Setting and number of networks -> (MAPE, Spearman) per draw and method: float
    [draws, methods, 2].
    """
    results = {}
    for setting in study.settings:
        others = [
            i for i, name in enumerate(study.settings) if device_of(name) != device_of(setting)
        ]
        for count in FBNET_COUNTS:
            draws = [
                np.random.default_rng([draw, count]).choice(len(study.macs), count, replace=False)
                for draw in range(DRAWS)
            ]
            results[setting, count] = np.stack(
                [one_draw(study, setting, others, seen) for seen in draws]
            )
    return results


def show(results: dict[tuple[str, int], np.ndarray], count: int) -> None:
    print(
        f"\n{count} networks: MAPE / Spearman on the others, means of {DRAWS} draws; * behind 'best"
        " known' by over a standard error"
    )
    print(f"{'':16}" + "".join(f"{method:>17}" for method in METHODS))
    rows = {setting: values for (setting, n), values in results.items() if n == count}
    for setting, values in rows.items():
        behind = behind_by(values) > 1
        cells = [
            f"{a:7.2%}{'*' if m == 0 and behind[0] else ' '}/"
            f" {b:.3f}{'*' if m == 0 and behind[1] else ' '}"
            for m, (a, b) in enumerate(values.mean(axis=0))
        ]
        print(f"{setting:16}" + "".join(f"{cell:>17}" for cell in cells))
    means = np.mean([values.mean(axis=0) for values in rows.values()], axis=0)
    print(f"{'mean':16}" + "".join(f"{f'{a:7.2%} / {b:.3f} ':>17}" for a, b in means), flush=True)


def behind_by(values: np.ndarray) -> np.ndarray:
    """How far ours is behind the best known device in MAPE and Spearman, in standard
    errors of the draws' differences: float [2].
    """
    worse = (values[:, 0] - values[:, 1]) * np.array([1, -1])
    margins: np.ndarray = worse.mean(axis=0) / np.maximum(
        worse.std(axis=0, ddof=1) / np.sqrt(len(worse)), 1e-12
    )
    return margins


def test_a_new_device_is_predicted_from_few_networks(benchmark: Any) -> None:
    results = benchmark.pedantic(transfer, args=(help_data(),), rounds=1, iterations=1)
    for count in FBNET_COUNTS:
        show(results, count)
    margins = np.stack([behind_by(values) for values in results.values()])
    print(
        f"behind 'best known' by over one standard error: {(margins > 1).sum()} of {margins.size};"
        f" over two: {(margins > 2).sum()}"
    )
    assert margins.max() <= 2


def test_the_table_says_whether_more_networks_would_help(benchmark: Any) -> None:
    """The gain that a fit to 20 networks of a device promises from 20 more, against the
    error with 40.
    """
    study = help_data()
    unknown = TableHeader.model_validate(
        {**dict.fromkeys(TableHeader.model_fields, "unknown"), "space": "fbnet"}
    )

    def promises() -> Iterator[tuple[str, float, float, float | None, float]]:
        for setting, ms in study.ms.items():
            prior = Prior.of(study.ops)
            for draw in range(3):
                order = np.random.default_rng([draw, 40]).permutation(len(ms))
                few, many, rest = order[:20], order[:40], order[40:]
                table = fit_table(
                    study.ops,
                    [(study.networks[i], ms[i]) for i in few],
                    unknown,
                    np.random.default_rng(0),
                )
                assert table.calibration is not None and table.calibration.held_out is not None
                advice = table.provenance["more_networks"]
                promised = (
                    float(advice.removesuffix("%").rpartition(" ")[2]) / 100
                    if "would bring" in advice
                    else None
                )
                true = [
                    mape(
                        fit_costs(prior, study.counts[part], ms[part]).of(study.counts[rest]),
                        ms[rest],
                    )
                    for part in (few, many)
                ]
                yield setting, table.calibration.held_out.mape, true[0], promised, true[1]

    fits = benchmark.pedantic(lambda: list(promises()), rounds=1, iterations=1)
    helped = [row for row in fits if row[3] is not None]
    others = [row for row in fits if row[3] is None]
    print(f"\n20 networks, no known device: {len(fits)} fits on {len(study.ms)} settings")
    cross_validated, true = (np.mean([row[i] for row in fits]) for i in (1, 2))
    print(f"  cross-validated error {cross_validated:.2%}, on the other 4,960 networks {true:.2%}")
    for label, rows in (("expected to help", helped), ("expected hardly to", others)):
        gain = np.mean([1 - row[4] / row[2] for row in rows])
        print(
            f"  20 more {label}: {len(rows)} fits, whose error then fell by {gain:.0%} on average"
        )
    print(f"  promised there: {np.mean([1 - (row[3] or 0) / row[1] for row in helped]):.0%}")
    assert cross_validated == pytest.approx(true, rel=0.2)


# Two phones


def chain(
    name: str,
    stem: int,
    blocks: Sequence[tuple[int, int, int, int, bool, str]],
    head: int,
    hidden: int,
    act: str,
) -> Architecture:
    """``blocks`` are (width, expanded width, kernel, stride, SE, activation); an
    expanded width of 0 is a separable block.
    """
    ops = [Conv(224, 3, stem, kernel=3, stride=2, act=act)]
    for width, mid, kernel, stride, squeezed, block_act in blocks:
        size, in_ch = ops[-1].out_size, ops[-1].out_ch
        se_ch = make_divisible((mid or in_ch) / 4) if squeezed else 0
        kind, residual = "mbconv" if mid else "dsconv", in_ch == width and stride == 1
        ops.append(
            Op(
                kind,
                size,
                in_ch,
                width,
                mid,
                kernel,
                stride,
                1,
                se_ch,
                block_act,
                residual,
                "hsig" if squeezed else "sigmoid",
            )
        )
    ops.append(Conv(ops[-1].out_size, ops[-1].out_ch, head, act=act))
    if hidden:
        ops.append(Head(ops[-1].out_size, head, hidden, act=act))
    ops.append(Classifier(ops[-1].out_size, ops[-1].out_ch, 1000))
    return Architecture(name=name, blocks=tuple(ops))


def mobilenet_v2(name: str, width: float, expand_first: bool) -> Architecture:
    """pytorchcv truncates widths instead of rounding them; its ``mobilenetv2`` expands
    the first block by 1, ``mobilenetv2b`` not at all.
    """
    blocks, in_ch = [], int(32 * width)
    for t, channels, count, first_stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for stride in (first_stride, *[1] * (count - 1)):
            blocks.append(
                (
                    int(channels * width),
                    in_ch * t if t > 1 or expand_first else 0,
                    3,
                    stride,
                    False,
                    "relu6",
                )
            )
            in_ch = int(channels * width)
    return chain(name, int(32 * width), blocks, 1280, 0, "relu6")


V3_LARGE = (
    "16,16,3,1 24,64,3,2 24,72,3,1 40,72,5,2,se 40,120,5,1,se 40,120,5,1,se 80,240,3,2 80,200,3,1"
    " 80,184,3,1 80,184,3,1 112,480,3,1,se 112,672,3,1,se 160,672,5,2,se 160,960,5,1,se"
    " 160,960,5,1,se"
)
V3_SMALL = (
    "16,16,3,2,se 24,72,3,2 24,88,3,1 40,96,5,2,se 40,240,5,1,se 40,240,5,1,se 48,120,5,1,se"
    " 48,144,5,1,se 96,288,5,2,se 96,576,5,1,se 96,576,5,1,se"
)
"""MobileNetV3: width, expanded width, kernel, stride, SE."""


def mobilenet_v3(name: str, width: float, text: str, relu_blocks: int, head: int) -> Architecture:
    """As in pytorchcv: both widths are scaled and rounded to multiples of 8, and the
    small one also has a hidden layer of 1280.
    """

    def scaled(channels: int) -> int:
        return channels if width == 1 else make_divisible(channels * width)

    blocks = []
    for i, block in enumerate(text.split()):
        channels, mid, kernel, stride = (int(part) for part in block.removesuffix(",se").split(","))
        act = "relu" if i < relu_blocks else "hswish"
        blocks.append(
            (
                scaled(channels),
                scaled(mid) if mid > channels else 0,
                kernel,
                stride,
                block.endswith("se"),
                act,
            )
        )
    return chain(name, scaled(16), blocks, scaled(head) if width > 1 else head, 1280, "hswish")


@cache
def phone_networks() -> dict[str, Architecture]:
    """The networks of mobile-ml-benchmark whose blocks are ops of ours, by its
    (pytorchcv's) names.
    """
    by_name = {}
    for suffix, width in {"w1": 1.0, "w3d4": 0.75, "wd2": 0.5, "wd4": 0.25}.items():
        for kind, expand_first in {"mobilenetv2": True, "mobilenetv2b": False}.items():
            by_name[f"{kind}_{suffix}"] = mobilenet_v2(f"{kind}_{suffix}", width, expand_first)
    for suffix, width in {"w7d20": 0.35, "wd2": 0.5, "w3d4": 0.75, "w1": 1.0, "w5d4": 1.25}.items():
        by_name[f"mobilenetv3_large_{suffix}"] = mobilenet_v3(
            f"mobilenetv3_large_{suffix}", width, V3_LARGE, 6, 960
        )
        by_name[f"mobilenetv3_small_{suffix}"] = mobilenet_v3(
            f"mobilenetv3_small_{suffix}", width, V3_SMALL, 3, 576
        )
    same = (
        "mnasnet_a1",
        "mnasnet_b1",
        "proxylessnas_cpu",
        "proxylessnas_gpu",
        "proxylessnas_mobile",
    )
    ours = dict(zip(same, same, strict=True)) | {
        "proxylessnas_mobile14": "proxylessnas_mobile_14",
        "spnasnet": "single_path_nas",
        "fbnet_cb": "fbnet_c",
    }
    return by_name | {name: published(published_name) for name, published_name in ours.items()}


def phone_ops() -> tuple[Op, ...]:
    """Every op of the phones' networks."""
    return tuple(dict.fromkeys(op for arch in phone_networks().values() for op in arch.blocks))


def phone_rows() -> dict[str, dict[str, str]]:
    with gzip.open(data("mobile_ml_benchmark/tflite_cnn_real_e2e.csv.gz"), "rt") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def cpu_table(dtype: str, folder: Path) -> LatencyTable:
    """This computer's LiteRT table of those networks: read, or measured and kept."""
    path = (
        Path(os.environ.get("HWNAS_CPU_TABLES", folder)) / f"phone_networks-litert-{dtype}-1t.json"
    )
    if not path.exists():
        networks = list(phone_networks().values())
        plan = profiling.Plan(phone_ops(), tuple(networks[::2]), tuple(networks[1::2]))
        settings, config = DeviceConfig(runtime="litert", dtype=dtype), ProfileConfig()
        with pytest.MonkeyPatch.context() as patch:
            # a profile needs a space, and these networks belong to none
            patch.setattr(profiling, "make_plan", lambda *_: plan)
            table = profiling.profile(
                Bench(HOST, connect(HOST), settings, timing_file, path.parent / path.stem),
                mobile32(),
                config,
            )
        header = table.header.model_copy(update={"space": "phone_networks"})
        table.model_copy(
            update={"header": header, "provenance": {"method": table.provenance["method"]}}
        ).save(path)
    return LatencyTable.load(path)


def test_the_networks_are_those_of_the_file(benchmark: Any) -> None:
    """Their files hold float weights and biases; FLOPs are twice the MACs, plus a
    little for SE and hard swish.
    """
    rows, networks = phone_rows(), benchmark.pedantic(phone_networks, rounds=1, iterations=1)
    for name, arch in networks.items():
        # in the file, a BN is only a bias
        folded = sum(layer.out_ch for op in arch.blocks for layer in op.layers if layer.norm)
        assert 4 * (arch.params - folded) == pytest.approx(float(rows[name]["size"]), rel=0.01), (
            name
        )
        assert 2 * arch.macs == pytest.approx(
            float(rows[name]["FLOPS"]), rel=0.035 if "v3" in name else 0.003
        ), name
    print(f"\n{len(networks)} networks, {len(phone_ops())} ops")


PHONE_METHODS = (
    "with this CPU's table",
    "roofline alone",
    "this CPU's table, affine",
    "MACs, affine",
)


def phones(tables: dict[str, LatencyTable]) -> dict[tuple[str, int], np.ndarray]:
    """Setting and number of networks -> MAPE per method on the other networks: float
    [methods].
    """
    rows, networks = phone_rows(), phone_networks()
    counts, macs = (
        count_ops(phone_ops(), list(networks.values())),
        np.array([float(arch.macs) for arch in networks.values()]),
    )
    roofline = Prior.of(phone_ops())
    priors = {
        kind: Prior.of(phone_ops(), [tables[dtype]])
        for kind, dtype in (("float", "fp32"), ("quant", "int8"))
    }
    results: dict[tuple[str, int], list[list[float]]] = defaultdict(list)
    for column in [
        name.removesuffix("|mean") for name in rows["mnasnet_b1"] if name.endswith("|mean")
    ]:
        ms = np.array([float(rows[name][f"{column}|mean"]) for name in networks]) / 1e3
        prior = priors[column.rpartition("|")[2]]
        sums = counts @ prior.known_KP[0, :-1] + prior.known_KP[0, -1]
        for count in PHONE_COUNTS:
            for draw in range(DRAWS):
                order = np.random.default_rng([draw, count]).permutation(len(ms))
                seen, rest = order[:count], order[count:]
                maps = [affine(x[seen], ms[seen])[0] for x in (sums, macs)]
                predictions = [
                    fit_costs(chosen, counts[seen], ms[seen]).of(counts[rest])
                    for chosen in (prior, roofline)
                ]
                predictions += [
                    slope * x[rest] + fixed
                    for (slope, fixed), x in zip(maps, (sums, macs), strict=True)
                ]
                results[column, count].append(
                    [mape(predicted, ms[rest]) for predicted in predictions]
                )
    return {key: np.mean(values, axis=0) for key, values in results.items()}


def test_two_phones_are_predicted_from_few_networks(benchmark: Any, tmp_path: Path) -> None:
    tables = {dtype: cpu_table(dtype, tmp_path) for dtype in ("fp32", "int8")}
    results = benchmark.pedantic(phones, args=(tables,), rounds=1, iterations=1)
    print(
        f"\nMAPE on the others of {len(phone_networks())} networks, means of {DRAWS} draws, from"
        f" {' / '.join(map(str, PHONE_COUNTS))}"
    )
    print(f"{'':24}" + "".join(f"{method:>26}" for method in PHONE_METHODS))
    for column in dict.fromkeys(column for column, _ in results):
        cells = [
            " / ".join(f"{results[column, count][m]:.1%}" for count in PHONE_COUNTS)
            for m in range(len(PHONE_METHODS))
        ]
        print(f"{column:24}" + "".join(f"{cell:>26}" for cell in cells))
    for kind in ("float", "quant"):
        means = {
            count: np.mean(
                [
                    values
                    for (column, n), values in results.items()
                    if n == count and column.endswith(kind)
                ],
                axis=0,
            )
            for count in PHONE_COUNTS
        }
        cells = [
            " / ".join(f"{means[count][m]:.1%}" for count in PHONE_COUNTS)
            for m in range(len(PHONE_METHODS))
        ]
        print(f"{f'mean, {kind}':24}" + "".join(f"{cell:>26}" for cell in cells))
        assert all(means[count][:2].max() < means[count][2:].min() for count in PHONE_COUNTS)
