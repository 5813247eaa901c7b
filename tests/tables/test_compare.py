"""Comparing two tables: ratios, ranks, ops that only one has, and the text for a narrow
terminal.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import scipy.stats

from hwnas.core.ops import Op
from hwnas.core.table import Entry, LatencyTable, TableHeader
from hwnas.errors import DocumentError, TableError
from hwnas.resources import resource_path
from hwnas.tables.compare import compare, describe_comparison

KEYS = [f"mbconv-h14-i80-o80-m{mid}-k5-relu-id" for mid in range(80, 580, 20)]
LONG = "mbconv-h14-i136-o192-m816-k7-s2-q208-hsig-hswish"


def table(entries: dict[str, float], device: str = "a") -> LatencyTable:
    unknown = "unknown"
    header = TableHeader(
        device=device, cpu=unknown, machine=unknown, runtime=unknown, runtime_version=unknown, dtype=unknown, threads=unknown,
        cores=unknown, governor=unknown, layout=unknown, batch=unknown, date=unknown, space=unknown,
    )  # fmt: skip
    return LatencyTable(header=header, entries={key: Entry(ms=ms) for key, ms in entries.items()})


def test_ratios_are_sorted_and_summarised() -> None:
    rng = np.random.default_rng(0)
    a_ms, b_ms = rng.uniform(1, 5, (2, len(KEYS)))
    comparison = compare(
        table({**dict(zip(KEYS, a_ms, strict=True)), "conv-h32-i3-o8-k3-relu": 1.0}),
        table(dict(zip(KEYS, b_ms, strict=True)), "b"),
    )
    assert [row.ratio for row in comparison.ratios] == pytest.approx(np.sort(a_ms / b_ms))
    assert (comparison.median, comparison.lowest, comparison.highest) == pytest.approx(
        (np.median(a_ms / b_ms), *np.sort(a_ms / b_ms)[[0, -1]])
    )
    assert comparison.spearman == pytest.approx(scipy.stats.spearmanr(a_ms, b_ms).statistic)
    assert (comparison.only_a, comparison.only_b) == (("conv-h32-i3-o8-k3-relu",), ())
    assert (
        json.loads(json.dumps(comparison.to_dict()))["ratios"][0]["op"] == comparison.ratios[0].op
    )


def test_relu_and_relu6_at_the_same_cost_are_one_row() -> None:
    relu, relu6 = "conv-h32-i3-o8-k3-relu", "conv-h32-i3-o8-k3-relu6"
    imported = table({relu: 2.0, relu6: 2.0})
    assert [row.op for row in compare(imported, imported).ratios] == [relu]
    measured = compare(imported, table({relu6: 1.0, KEYS[0]: 3.0}))
    assert [(row.op, row.ratio) for row in measured.ratios] == [(relu6, 2.0)]
    assert (measured.only_a, measured.only_b) == ((), (KEYS[0],))
    different = compare(table({relu: 2.0, relu6: 3.0}), table({relu: 1.0, relu6: 1.0}))
    assert [(row.op, row.ratio) for row in different.ratios] == [(relu, 2.0), (relu6, 3.0)]


def test_ops_that_cost_nothing_have_no_ratio() -> None:
    comparison = compare(table({KEYS[0]: 0.0, KEYS[1]: 2.0}), table({KEYS[0]: 1.0, KEYS[1]: 1.0}))
    assert ([row.op for row in comparison.ratios], comparison.zero, comparison.spearman) == (
        [KEYS[1]],
        (KEYS[0],),
        None,
    )
    with pytest.raises(TableError, match="cost 0 ms in one of them"):
        compare(table({KEYS[0]: 0.0}), table({KEYS[0]: 1.0}))


def test_what_cannot_be_compared() -> None:
    with pytest.raises(
        TableError, match=r"tables a and b have no op in common \(mbconv-h14.*same space"
    ):
        compare(table({KEYS[0]: 1.0}), table({KEYS[1]: 1.0}, "b"))
    positional = table({KEYS[0]: 1.0}).model_copy(
        update={"entries": {}, "slots": {"s1.b0": {"skip": -1.0}}}
    )
    for pair in ((positional, table({KEYS[0]: 1.0})), (table({KEYS[0]: 1.0}), positional)):
        with pytest.raises(TableError, match="has costs for positions of a space"):
            compare(*pair)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_text_fits_the_terminal(width: int) -> None:
    a = table(
        {key: 1.0 + i for i, key in enumerate(KEYS)} | {LONG: 3.0},
        "a-board-with-quite-a-long-name-that-says-all-about-its-cpu-cores-too",
    )
    b = table({LONG: 1.5, KEYS[0]: 1.0}, "b")
    text = describe_comparison(compare(a, b), width)
    assert max(map(len, text.splitlines())) <= width
    assert "2 ops in both: a / b from 1.00 to 2.00, median 1.50" in text
    assert f"only in a: {len(KEYS) - 1}" in text and f"and {len(KEYS) - 11} more" in text
    assert LONG in text
    assert ("a ms" in text) == (width > 60)


def test_shipped_tables_compare_as_ever() -> None:
    """Numbers and texts of the first implementation, which looked every op up one by one."""
    folder = resource_path("latency_tables") / "amd-epyc-2core"
    fp32 = LatencyTable.load(folder / "fbnet-litert-fp32-1t.json")
    int8 = LatencyTable.load(folder / "fbnet-litert-int8-1t.json")
    found = compare(fp32, int8)
    assert (len(found.ratios), found.only_a, found.only_b) == (105, (), ())
    assert (found.median, found.spearman) == (1.6536796536796534, 0.935589881816297)
    assert sha256(json.dumps(found.to_dict(), indent=1)).startswith("2b11fd39054c8998")
    assert sha256(describe_comparison(found, 60)).startswith("c8e3dcc08f8ac2bb")
    assert sha256(describe_comparison(found, 120)).startswith("5365f06bb808a3f2")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_keys_of_a_second_table_of_a_space_are_not_parsed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parsing the keys takes most of the time that a large table takes to load."""
    content = table(dict.fromkeys(KEYS, 1.0)).to_json()

    def fail(key: str) -> Op:
        raise AssertionError(f"{key} is parsed again")

    monkeypatch.setattr(Op, "parse", fail)
    assert list(LatencyTable.parse(content).entries) == sorted(KEYS)
    with pytest.raises(DocumentError, match="norm-h14-i8-o8 is parsed again"):
        LatencyTable.parse(content.replace(KEYS[0], "norm-h14-i8-o8"))
