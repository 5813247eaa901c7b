"""The published tables themselves: every one loads, and sums over networks match what
others computed from them (nas-facts 0, 2.5, 9.5).
"""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from hwnas.core.cost import CostModel, check_coverage, latency_ms
from hwnas.core.ops import Op
from hwnas.core.published import published
from hwnas.core.spaces import fbnet, ofa_mobilenet_v3, proxylessnas_original
from hwnas.core.table import LatencyTable
from hwnas.errors import CoverageError, TableError
from hwnas.tables.compare import compare
from hwnas.tables.formats import import_table

TRIM = "proxylessnas_mobile_lut/mobile_trim.yaml"
PIPE = "proxylessnas_mobile_lut/pipe_224_mobile_big_small_gpu.yaml"
CIFAR = "proxylessnas_mobile_lut/pipe_cifar_big_small_gpu.csv.gz"
TINY = "proxylessnas_mobile_lut/pipe_tiny64_big_small_gpu.csv.gz"
SPNAS = "spnas_pixel1_lut/pixel1_runtime_model.json"
TFNAS = "tfnas_lut/tfnas_latency.json.gz"
FBNET = "fbnet_cpu_lut/lookup_table.txt"
NOTE10 = "ofa_note10_lut/note10_{}.yaml"
TABLES = {  # file, format: entries, what is not mapped, device
    # 71 of 72 count twice, under relu and relu6; the classifier has no activation
    (TRIM, "proxylessnas"): (143, 0, "pixel1"),
    (PIPE, "proxylessnas"): (151, 0, "pixel1"),
    (PIPE, "proxylessnas:big"): (151, 0, "unknown"),
    (PIPE, "proxylessnas:small"): (151, 0, "unknown"),
    (PIPE, "proxylessnas:gpu"): (151, 0, "unknown"),
    (CIFAR, "proxylessnas:cpu_b"): (2902, 0, "unknown"),
    (TINY, "proxylessnas:gpu"): (2909, 0, "unknown"),
    (SPNAS, "single_path"): (90, 0, "pixel1"),
    (FBNET, "fbnet"): (102, 16, "unknown"),
    (TFNAS, "tfnas:cpu"): (1372, 67, "xeon-gold-6130"),
    (TFNAS, "tfnas:gpu"): (1372, 67, "titan-rtx"),
    # pooling is part of the head
    **{
        (NOTE10.format(size), "ofa"): (95, 0, "samsung-note10")
        for size in (160, 176, 192, 208, 224)
    },
}


def data(name: str) -> Path:
    folder = os.environ.get("HWNAS_TEST_DATA")
    if not folder:
        pytest.skip("HWNAS_TEST_DATA is not set: it names a folder with the published tables")
    return Path(folder, name)


def table(name: str, format_name: str) -> LatencyTable:
    return import_table(data(name), format_name).table


@pytest.mark.parametrize(("name", "format_name"), TABLES)
def test_every_table_loads(name: str, format_name: str) -> None:
    imported = import_table(data(name), format_name)
    entries, unmapped, device = TABLES[name, format_name]
    assert (len(imported.table.entries), len(imported.unmapped), imported.table.header.device) == (
        entries,
        unmapped,
        device,
    )
    assert LatencyTable.parse(imported.table.to_json()) == imported.table
    assert imported.table.calibration is None
    header = imported.table.header
    assert (header.dtype, header.date, header.layout, header.governor, header.runtime_version) == (
        "unknown",
    ) * 5
    provenance = imported.table.provenance
    assert (
        provenance["file"] == Path(name).name
        and len(provenance["sha256"]) == 64
        and provenance["licence"] != "unknown"
    )
    assert all(key in provenance["unmapped"] for key in imported.unmapped)


def test_published_and_uniform_networks_in_the_pixel_1_table() -> None:
    trim = table(TRIM, "proxylessnas")
    assert latency_ms(published("mnasnet_b1"), trim) == pytest.approx(82.9, abs=0.05)
    assert latency_ms(published("single_path_nas"), trim) == pytest.approx(89.4, abs=0.05)
    space = proxylessnas_original()
    cost = CostModel.of_table(space, trim, allow_uncalibrated=True)
    for option, expected_ms in (("ir_k3_e3", 76.0), ("ir_k5_e6", 159.0)):
        assert cost.cost({choice.key: option for choice in space.choices}) == pytest.approx(
            expected_ms, abs=0.05
        )


def test_proxylessnas_mobile_names_its_three_missing_ops() -> None:
    """Its first searched stage has 32 channels, the table's 24; the covered ops sum to
    63.7 ms.
    """
    trim, network = table(TRIM, "proxylessnas"), published("proxylessnas_mobile")
    with pytest.raises(CoverageError) as caught:
        check_coverage(network.ops(), trim, "proxylessnas_mobile")
    assert caught.value.missing == (
        "mbconv-h112-i16-o32-m48-k5-s2-relu6",
        "mbconv-h56-i32-o32-m96-k3-relu6-id",
        "mbconv-h56-i32-o40-m96-k7-s2-relu6",
    )
    assert all(key in str(caught.value) for key in caught.value.missing)
    covered = [op for op in network.ops() if op.key not in caught.value.missing]
    assert sum(trim.entries[op.key].ms for op in covered) == pytest.approx(63.7, abs=0.05)


def test_single_path_sums_without_stem_and_head() -> None:
    spnas = table(SPNAS, "single_path")

    def blocks_ms(ops: tuple[Op, ...]) -> float:
        return sum(spnas.entries[op.key].ms for op in ops if op.kind in ("dsconv", "mbconv"))

    space = proxylessnas_original()
    assert blocks_ms(published("mnasnet_b1").ops()) == pytest.approx(66.8, abs=0.15)
    assert blocks_ms(published("single_path_nas").ops()) == pytest.approx(71.3, abs=0.15)
    for option, expected_ms in (("ir_k3_e3", 56.1), ("ir_k5_e6", 122.9)):
        arch = space.decode({choice.key: option for choice in space.choices})
        assert blocks_ms(arch.ops()) == pytest.approx(expected_ms, abs=0.15)


def test_equal_layers_of_single_path_are_one_entry() -> None:
    source = json.loads(data(SPNAS).read_text())
    entry = table(SPNAS, "single_path").entries["mbconv-h56-i24-o24-m72-k3-relu-id"]
    values = [source[layer]["0"] for layer in ("2", "3", "4")]
    assert (entry.ms, entry.rounds) == (sorted(values)[1], 3)
    assert entry.spread == pytest.approx(np.subtract(*np.percentile(values, [75, 25])) / entry.ms)
    assert table(SPNAS, "single_path").entries["dsconv-h112-i32-o16-k3-relu"].rounds == 4


def test_the_two_pixel_1_tables_differ_by_factors_of_0_44_to_2_01() -> None:
    comparison = compare(table(TRIM, "proxylessnas"), table(SPNAS, "single_path"))
    assert (round(comparison.lowest, 2), round(comparison.highest, 2)) == (0.44, 2.01)
    assert comparison.ratios[0].op == "mbconv-h7-i192-o320-m576-k3-relu"
    assert comparison.ratios[-1].op == "mbconv-h56-i24-o40-m72-k3-s2-relu"
    assert len(comparison.ratios) == 45  # 11 shapes of 4 blocks, and the separable one
    assert comparison.only_b == ()
    assert len(comparison.only_a) == 72 - 45
    assert all("-k7-" in key or not key.startswith("mbconv") for key in comparison.only_a)


@pytest.mark.parametrize("size", [160, 176, 192, 208, 224])
def test_ofa_costs_of_networks_are_sums_over_its_keys(size: int) -> None:
    """Checked by summing the same networks over the source's own keys, written out from
    the description of the space.
    """
    source = yaml.safe_load(data(NOTE10.format(size)).read_text())
    space = ofa_mobilenet_v3(width=1.2, resolution=size).restrict({"resolution": [size]})
    cost = CostModel.of_table(space, table(NOTE10.format(size), "ofa"), allow_uncalibrated=True)
    rng = np.random.default_rng(size)
    for _ in range(20):
        picks = space.sample(rng)
        assert cost.cost(picks) == pytest.approx(ofa_sum_ms(source, picks, size), rel=1e-12)


def ofa_sum_ms(
    source: dict[str, dict[str, float]], picks: dict[str, str | int], size: int
) -> float:
    half, total, channels = -(-size // 2), 0.0, 24
    keys = [f"Conv-input:{size}x{size}x3-output:{half}x{half}x24"]
    keys.append(
        f"expanded_conv-input:{half}x{half}x24-output:{half}x{half}x24-expand:24-kernel:3-stride:1-idskip:1-se:0-hs:0"
    )
    side = half
    stages = [(32, 2, 0, 0), (48, 2, 1, 0), (96, 2, 0, 1), (136, 1, 1, 1), (192, 2, 1, 1)]
    for number, (width, stride, se, hs) in enumerate(stages, 2):
        for block in range(int(picks[f"s{number}.depth"])):
            kernel, e = re.match(r"ir_k(\d)_e(\d)", str(picks[f"s{number}.b{block}"])).groups()
            step = stride if block == 0 else 1
            out = -(-side // step)
            keys.append(
                f"expanded_conv-input:{side}x{side}x{channels}-output:{out}x{out}x{width}-expand:{channels * int(e)}"
                f"-kernel:{kernel}-stride:{step}-idskip:{int(block > 0)}-se:{se}-hs:{hs}"
            )
            side, channels = out, width
    keys += [
        f"Conv_1-input:{side}x{side}x192-output:{side}x{side}x1152",
        f"AvgPool2D-input:{side}x{side}x1152-output:1x1x1152",
    ]
    keys += ["Conv_2-input:1x1x1152-output:1x1x1536", "Logits-input:1x1x1536-output:1000"]
    for key in keys:
        total += source[key]["mean"]
    return total


def test_the_fastest_and_slowest_network_of_the_note10_table() -> None:
    """The 30 ms network of nas-facts T3 is not in the data, but its latency lies
    between these two.
    """
    space = ofa_mobilenet_v3(width=1.2).restrict({"resolution": [224]})
    low, high = CostModel.of_table(
        space, table(NOTE10.format(224), "ofa"), allow_uncalibrated=True
    ).range()
    assert low < 29.97 < high


def test_fbnet_in_milliseconds_for_its_space() -> None:
    lines = [list(map(float, line.split())) for line in data(FBNET).read_text().splitlines()[1:]]
    imported = import_table(data(FBNET), "fbnet")
    by_layer = fbnet().terms()[1:-2]
    assert len(by_layer) == len(lines) == 22
    for number in (0, 1, 21):  # no other layer has the same shape
        for op, value_us in zip(by_layer[number].ops, lines[number], strict=True):
            if op is not None:
                assert imported.table.entries[op.key].ms == pytest.approx(value_us / 1000)
    same = by_layer[2].ops[0]
    assert same is not None
    assert imported.table.entries[same.key].ms == pytest.approx(
        np.median([lines[n][0] for n in (2, 3, 4)]) / 1000
    )
    assert all(name.startswith("skip of layer ") for name in imported.unmapped)
    assert imported.table.header.runtime == "pytorch"


def test_tfnas_by_width() -> None:
    source = json.loads(gzip.decompress(data(TFNAS).read_bytes()))["cpu"]
    imported = import_table(data(TFNAS), "tfnas:cpu")
    entries = imported.table.entries
    assert (
        entries["mbconv-h56-i24-o24-m100-k5-q48-relu-id"].ms
        == source["MBInvertedResBlock_56_24_48_24_k5_s1_relu"]["100"]
    )
    assert (
        entries["dsconv-h112-i16-o24-k3-s2-relu"].ms
        == source["MBInvertedResBlock_112_16_0_24_k3_s2_relu"]["16"]
    )
    assert "base" in imported.unmapped
    swish = [name for name in imported.unmapped if name.endswith("_swish")]
    assert len(swish) == 54 and all(
        "'swish' is unknown" in imported.unmapped[name] for name in swish
    )
    header = imported.table.header
    assert (header.threads, header.batch) == (1, 1)
    assert table(TFNAS, "tfnas:gpu").header.batch == 32


@pytest.mark.parametrize(
    ("name", "format_name", "message"),
    [
        (TRIM, "ofa", "contains no block of format 'ofa': try --format proxylessnas"),
        (
            NOTE10.format(224),
            "proxylessnas",
            "contains no block of format 'proxylessnas': try --format ofa",
        ),
        (SPNAS, "proxylessnas", "holds no 'mean'|has no 'mean' in entry"),
        (FBNET, "proxylessnas", "needs another --format"),
        (TRIM, "fbnet", "does not begin with the line"),
        (TRIM, "single_path", "is not valid JSON"),
        (TFNAS, "single_path", "has no layer 0"),
        (SPNAS, "tfnas:cpu", "has no device 'cpu'"),
        (TFNAS, "tfnas", "choose --format tfnas:COLUMN from cpu, gpu"),
        (TRIM, "tunas", "contains no constant _PROXYLESSNAS_SEARCH_KERNEL"),
        (CIFAR, "proxylessnas", "has several columns: choose one of cpu_b, cpu_s, gpu"),
        (TRIM, "proxylessnas:big", "has no 'big' in entry"),
        (
            PIPE,
            "proxylessnas:count",
            "has no usable values in column 'count': choose from mean, big, small, gpu",
        ),
        (SPNAS, "single_path:mean", "has no columns to choose from"),
        ("ofa_note10_lut/acc_predictor.npz", "ofa", "is not text"),
    ],
)
def test_a_file_of_another_format(name: str, format_name: str, message: str) -> None:
    with pytest.raises(TableError, match=message):
        import_table(data(name), format_name)


@pytest.mark.parametrize(
    ("name", "format_name"),
    [(TRIM, "proxylessnas"), (NOTE10.format(224), "ofa"), (SPNAS, "single_path")],
)
def test_a_truncated_file_is_refused_or_gives_nothing_wrong(
    tmp_path: Path, name: str, format_name: str
) -> None:
    """Cut between two entries, it is a smaller table; cut anywhere else, an error."""
    whole = data(name).read_bytes()
    full = table(name, format_name)
    refused = 0
    for cut in np.random.default_rng(0).integers(1, len(whole), 40):
        (tmp_path / "cut").write_bytes(whole[:cut])
        try:
            entries = import_table(tmp_path / "cut", format_name).table.entries
        except TableError:
            refused += 1
            continue
        for key, entry in entries.items():
            if key in full.entries:
                assert entry.ms == full.entries[key].ms
    assert refused > 30
