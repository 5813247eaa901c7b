"""Readers of table formats, on sources written here: keys to ops, TuNAS's constants,
what is not mapped, what is refused.
"""

from __future__ import annotations

import base64
import gzip
import json
import struct
from pathlib import Path

import pytest
import yaml

from hwnas.core.cost import CostModel
from hwnas.core.spaces import picks_of_codes, proxylessnas
from hwnas.errors import ConfigError, DocumentError, TableError
from hwnas.tables.formats import FORMATS, Imported, import_table
from tests.golden.test_tunas_pixel1 import BIAS_MS, T1_INDICES, T2_CODES, picks_of_indices, pixel1

BLOCK = "expanded_conv-input:28x28x40-output:14x14x80-expand:6-kernel:5-stride:2-idskip:0"
OFA_BLOCK = (
    "expanded_conv-input:14x14x96-output:14x14x136-expand:288-kernel:5-stride:1-idskip:0-se:1-hs:1"
)
FIRST_LINE = "v+BSoUAWgjNBA6MnwIDO7D6KQL3AE4FiQKTftD/x1H5A+wl9wIfvlT+hSfm/kt4sQNH/GkASp35B"
"""The first line of the kernel in TuNAS's cost_model_data.py."""


def imported(folder: Path, content: object, format_name: str) -> Imported:
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    (folder / "source").write_text(text)
    return import_table(folder / "source", format_name)


def mean(ms: object) -> dict[str, object]:
    return {"count": 5, "mean": ms, "var": 0.1}


def tunas_file(values: list[float], bias_ms: float = BIAS_MS) -> str:
    def constant(name: str, numbers: list[float]) -> str:
        text = base64.b64encode(struct.pack(f">{len(numbers)}f", *numbers)).decode()
        lines = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
        return f'_PROXYLESSNAS_SEARCH_{name} = b"""\n{lines}\n"""\n'

    return (
        f"# coding=utf-8\n{constant('KERNEL', values)}\n{constant('BIAS', [bias_ms])}\nSERIALIZATION_DTYPE"
        " = '>f4'\n"
    )


def coefficients() -> list[float]:
    return [ms for options in pixel1().slots.values() for ms in options.values()]


def test_the_tunas_model_is_the_golden_one(tmp_path: Path) -> None:
    table = imported(tmp_path, tunas_file(coefficients()), "tunas").table
    assert list(table.slots) == list(pixel1().slots)
    for slot, options in pixel1().slots.items():
        assert table.slots[slot] == pytest.approx(options, abs=1e-6)
    assert (table.header.device, table.header.space, table.provenance["licence"]) == (
        "pixel1",
        "proxylessnas",
        "Apache-2.0",
    )
    cost = CostModel.of_table(proxylessnas(), table)
    assert cost.cost(picks_of_indices(list(map(int, T1_INDICES.split(","))))) == pytest.approx(
        84.0167, abs=1e-3
    )
    assert cost.cost(
        picks_of_codes(proxylessnas(), list(map(int, T2_CODES.split(","))))
    ) == pytest.approx(84.416, abs=1e-3)


def test_the_byte_order_is_that_of_the_published_file(tmp_path: Path) -> None:
    text = tunas_file(coefficients())
    ours = text.split('KERNEL = b"""\n')[1].splitlines()[0]
    published = struct.unpack(">14f", base64.b64decode(FIRST_LINE)[:56])
    assert struct.unpack(">14f", base64.b64decode(ours)[:56]) == pytest.approx(published, abs=5e-5)
    other = text.replace(ours, FIRST_LINE)
    assert imported(tmp_path, other, "tunas").table.slots["s1.b0"]["ds_k3"] == pytest.approx(
        published[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "format_name", "message"),
    [
        (
            tunas_file([1.0] * 143),
            "tunas",
            "contains 572 bytes of KERNEL, not 144 finite float32 numbers",
        ),
        (tunas_file([float("nan")] * 144), "tunas", "not 144 finite float32 numbers"),
        (
            tunas_file([1.0] * 144)[:400],
            "tunas",
            "contains no constant _PROXYLESSNAS_SEARCH_KERNEL",
        ),
        (
            tunas_file([1.0] * 144).replace("P4AA", "P4A", 1),
            "tunas",
            "contains a KERNEL that is not base64",
        ),
        (tunas_file([1.0] * 144), "tunas:mobilenet_v3_like_search", "has costs of widths"),
        (
            {BLOCK: mean("fast")},
            "proxylessnas",
            "has 'fast' for mean of expanded_conv.*which is not a number",
        ),
        ({BLOCK: mean(-1)}, "proxylessnas", "has -1 for mean"),
        ({BLOCK: mean(float("nan"))}, "proxylessnas", "has nan for"),
        ({BLOCK: mean(float("inf"))}, "proxylessnas", "has inf for"),
        ({BLOCK: mean(True)}, "proxylessnas", "has True for"),
        ({BLOCK: mean(None)}, "proxylessnas", "has None for"),
        ({BLOCK: 3.0}, "proxylessnas", "is not a mapping of keys to entries"),
        ({}, "proxylessnas", "is not a mapping of keys to entries"),
        ("", "proxylessnas", "is not a mapping of keys to entries"),
        (
            {BLOCK: mean(1.0), "Conv": {"count": 1, "mean": 1.0}},
            "proxylessnas",
            "has no 'var' in entry 'Conv': it was cut off",
        ),
        (f"{BLOCK}: {{mean: 1.0", "proxylessnas", "is not valid YAML in line"),
        ("a: !!python/object/apply:os.system ['true']", "ofa", "is not valid YAML"),
        ("[" * 5000, "ofa", "is not valid YAML"),
        ("index,block_name,gpu\n0," + BLOCK + ",\n", "proxylessnas:gpu", "has '' for gpu of"),
        ("block_name,gpu\n" + BLOCK, "proxylessnas:gpu", "has None for gpu of"),
        ("[1, 2]", "single_path", "contains a JSON list instead of an object"),
        (json.dumps({"cpu": {"base": 1.0}}), "tfnas:cpu", "contains no block of format 'tfnas'"),
        (json.dumps({"cpu": {"base": 1.0, "x": 3}}), "tfnas:cpu", "has no times by width for 'x'"),
        (
            "ir_k3_e1 ir_k3_s2 ir_k3_e3 ir_k3_e6 ir_k5_e1 ir_k5_s2 ir_k5_e3 ir_k5_e6 skip\n1 2 3\n",
            "fbnet",
            "22 lines of 9 numbers",
        ),
    ],
)
def test_broken_sources_are_refused(
    tmp_path: Path, content: object, format_name: str, message: str
) -> None:
    with pytest.raises(TableError, match=message) as caught:
        imported(tmp_path, content, format_name)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "source"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    packed = gzip.compress(yaml.safe_dump({BLOCK: mean(1.0)}).encode())
    (tmp_path / "whole.gz").write_bytes(packed)
    (tmp_path / "cut.gz").write_bytes(packed[:-12])
    assert len(import_table(tmp_path / "whole.gz", "proxylessnas").table.entries) == 2
    with pytest.raises(TableError, match="cannot be unpacked"):
        import_table(tmp_path / "cut.gz", "proxylessnas")
    with pytest.raises(DocumentError, match="does not exist"):
        import_table(tmp_path / "absent", "ofa")
    with pytest.raises(
        ConfigError, match="unknown table_format 'proxyless'; did you mean 'proxylessnas'"
    ):
        import_table(tmp_path / "whole.gz", "proxyless")
    assert list(FORMATS) == ["fbnet", "ofa", "proxylessnas", "single_path", "tfnas", "tunas"]


@pytest.mark.parametrize(
    ("key", "format_name", "ops"),
    [
        (
            BLOCK,
            "proxylessnas",
            {"mbconv-h28-i40-o80-m240-k5-s2-relu", "mbconv-h28-i40-o80-m240-k5-s2-relu6"},
        ),
        ("Logits-input:7x7x1280-output:1000", "proxylessnas", {"classifier-h7-i1280-o1000"}),
        (
            "Conv-input:225x225x3-output:113x113x8",
            "proxylessnas",
            {"conv-h225-i3-o8-k3-s2-relu", "conv-h225-i3-o8-k3-s2-relu6"},
        ),
        (OFA_BLOCK, "ofa", {"mbconv-h14-i96-o136-m288-k5-q72-hsig-hswish"}),
        ("Conv_1-input:7x7x192-output:7x7x1152", "ofa", {"conv-h7-i192-o1152-hswish"}),
        (
            OFA_BLOCK.replace("288", "96").replace("se:1-hs:1", "se:0-hs:0"),
            "ofa",
            {"dsconv-h14-i96-o136-k5-relu"},
        ),
    ],
)
def test_keys_become_ops(tmp_path: Path, key: str, format_name: str, ops: set[str]) -> None:
    always = {"proxylessnas": BLOCK, "ofa": OFA_BLOCK}[format_name]
    base = set(imported(tmp_path, {always: mean(1.0)}, format_name).table.entries)
    table = imported(tmp_path, {always: mean(1.0), key: mean(1.0)}, format_name).table
    assert set(table.entries) == base | ops
    entry = table.entries[min(ops)]
    assert (entry.ms, entry.runs, entry.p10_ms, entry.rounds, entry.spread) == (
        1.0,
        5,
        "unknown",
        "unknown",
        "unknown",
    )


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("Pool-input:7x7x8-output:1x1x8", "not a key of this format"),
        (BLOCK.replace("28x28", "28x30"), "28 x 30 pixels"),
        (BLOCK.replace("14x14", "15x15"), "stride 2 does not lead from 28 to 15"),
        (BLOCK.replace("stride:2", "stride:0"), "stride 0 does not lead"),
        (BLOCK.replace("kernel:5", "kernel:4"), "kernels must be odd"),
        (BLOCK.replace("idskip:0", "idskip:1"), "a residual needs equal"),
        (BLOCK.replace("28x28x40", "28x28x0"), "below 1"),
        (BLOCK + "-se:1-hs:1", "not a key of this format"),
        (BLOCK.replace("expand:6", "expand:" + "9" * 5000), "not a key of this format"),
        ("Conv-input:224x224x3-output:7x7x32", "no stride leads from 224 to 7"),
    ],
)
def test_keys_that_no_op_stands_for_are_named(tmp_path: Path, key: str, reason: str) -> None:
    result = imported(tmp_path, {BLOCK: mean(1.0), key: mean(2.0)}, "proxylessnas")
    assert list(result.unmapped) == [key]
    assert reason in result.unmapped[key]
    assert f"{key} (" in result.table.provenance["unmapped"]
    assert len(result.table.entries) == 2


def test_pooling_and_the_convolution_after_it_are_one_head(tmp_path: Path) -> None:
    pool, conv = "AvgPool2D-input:7x7x1152-output:1x1x1152", "Conv_2-input:1x1x1152-output:1x1x1536"
    whole = imported(tmp_path, {OFA_BLOCK: mean(1.0), pool: mean(0.5), conv: mean(2.0)}, "ofa")
    assert whole.table.entries["head-h7-i1152-o1536-hswish"].ms == 2.5
    assert not whole.unmapped
    for alone in (pool, conv):
        assert list(
            imported(tmp_path, {OFA_BLOCK: mean(1.0), alone: mean(0.5)}, "ofa").unmapped
        ) == [alone]


def test_the_header_of_an_unknown_file_says_unknown(tmp_path: Path) -> None:
    table = imported(tmp_path, {BLOCK: mean(1.0)}, "proxylessnas").table
    header = table.header.model_dump()
    assert header.pop("space") == "proxylessnas_original"
    assert set(header.values()) == {"unknown"}
    assert (table.provenance["licence"], table.provenance["file"], table.provenance["format"]) == (
        "unknown",
        "source",
        "proxylessnas:mean",
    )


def test_tfnas_names_what_it_leaves_out(tmp_path: Path) -> None:
    widths = {"15": -0.5, "16": 1.0, "17": 2.0, "18": -1.0}
    blocks = {
        "base": 9.0,
        "MBInvertedResBlock_112_16_16_24_k3_s2_relu": widths,
        "MBInvertedResBlock_7_16_0_16_k3_s1_h-swish": {"32": 3.0},
    }
    result = imported(
        tmp_path, json.dumps({"cpu": {**blocks, "Bottleneck_1": {"4": 1.0}}}), "tfnas:cpu"
    )
    assert {key: entry.ms for key, entry in result.table.entries.items()} == {
        "dsconv-h112-i16-o24-k3-s2-q16-relu": 1.0,
        "mbconv-h112-i16-o24-m17-k3-s2-q16-relu": 2.0,
        "mbconv-h7-i16-o16-m32-k3-hswish-id": 3.0,
    }
    assert list(result.unmapped) == [
        "base",
        "MBInvertedResBlock_112_16_16_24_k3_s2_relu, widths 15, 18",
        "Bottleneck_1",
    ]
