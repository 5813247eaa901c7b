"""Descriptions of spaces and tables: their numbers are those of the documents."""

from __future__ import annotations

import numpy as np

from hwnas.core.calibration import held_out_errors
from hwnas.core.describe import columns, describe_space, describe_table
from hwnas.core.spaces import darts, mobile32, nasbench101, nasbench201, proxylessnas
from hwnas.core.table import Calibration, Entry, LatencyTable, TableHeader


def table(**changes: object) -> LatencyTable:
    unknown = "unknown"
    header = TableHeader(
        device="board", cpu="A53", machine=unknown, runtime="litert", runtime_version=unknown, dtype="fp32", threads=1, cores=(2, 3),
        governor=unknown, layout=unknown, batch=1, date=unknown, space="mobile32",
    )  # fmt: skip
    entries = {
        op.key: Entry(ms=0.1 * (i + 1), p10_ms=0.05, spread=0.123, noisy=i == 3)
        for i, op in enumerate(mobile32().ops[:5])
    }
    return LatencyTable(header=header, entries=entries, **changes)


def test_columns_line_up() -> None:
    assert columns([("a", "bcd"), ("efg", "h")]) == "a    bcd\nefg  h"
    assert columns([]) == ""


def test_a_space_shows_its_size_plan_and_a_sample() -> None:
    text = describe_space(proxylessnas())
    lines = text.splitlines()
    assert lines[0] == f"space proxylessnas  (sha256 {proxylessnas().sha256[:12]})"
    assert "2.16e+21 raw combinations" in text
    assert "22, 6.65e+17 architectures" in text
    assert "ops          72 to measure" in text
    assert lines.count("  dsconv-h112-i32-o16-k7-relu") >= 1
    arch = proxylessnas().decode(proxylessnas().sample(np.random.default_rng(0)))
    assert f"{arch.macs / 1e6:.1f} M MACs, {arch.params / 1e6:.2f} M parameters" in text
    assert "coverage" not in text


def test_cell_spaces_show_their_architectures_and_the_genotype_of_the_sample() -> None:
    lines = describe_space(nasbench201()).splitlines()
    assert "choices      6, 15,625 architectures" in lines
    picks = nasbench201().sample(np.random.default_rng(0))
    assert f"genotype     {nasbench201().write(picks)}" in lines
    assert nasbench201().read(nasbench201().write(picks)) == picks
    darts_lines = describe_space(darts()).splitlines()
    assert any(
        line.startswith(
            "choices      34, 9.12e+18 architectures (6.27e+29 combinations of options;"
        )
        for line in darts_lines
    )
    assert any(line.startswith("genotype     Genotype(normal=[('") for line in darts_lines)
    assert "26, 423,624 architectures (509,607,936 combinations" in describe_space(nasbench101())


def test_coverage_names_what_is_missing() -> None:
    space = mobile32()
    text = describe_space(space, table())
    assert f"5 of {len(space.ops)} ops in table board/litert-fp32-1t; missing:" in text
    assert text.endswith("\n".join(f"  {op.key}" for op in space.ops[5:]))
    full = table().model_copy(update={"entries": {op.key: Entry(ms=1) for op in space.ops}})
    assert describe_space(space, full).endswith(
        f"{len(space.ops)} of {len(space.ops)} ops in table board/litert-fp32-1t"
    )


def test_a_table_shows_its_conditions_and_entries_slowest_first() -> None:
    text = describe_table(table())
    assert text.startswith("table board/litert-fp32-1t\n")
    assert "cpu              A53" in text
    assert "cores            2, 3" in text
    assert "calibration  none: sums of entries are not latencies of networks" in text
    assert "entries      5 (1 noisy)" in text
    rows = text.splitlines()[-5:]
    assert [row.split()[1] for row in rows] == ["0.5000", "0.4000", "0.3000", "0.2000", "0.1000"]
    assert rows[1].endswith("noisy")
    assert rows[0].split()[2:] == ["0.0500", "unknown", "12.3%"]


def test_a_table_shows_how_well_it_adds_up() -> None:
    fitted = Calibration(intercept_ms=1.0, slope=2.0, networks=5)
    evaluated = fitted.model_copy(
        update={"held_out": held_out_errors(fitted, [()] * 3, [1.0, 2.0, 4.0], [3.0, 4.0, 10.0])}
    )
    text = describe_table(table(calibration=evaluated))
    assert "1 ms + 2 x sum, fitted on 5 networks" in text
    assert (
        "3 networks: mean error 11.7%, largest 25.0%, Spearman 1.000; uncalibrated sum 58.9%"
        in text
    )


def test_a_table_of_slots_lists_their_costs() -> None:
    text = describe_table(
        table().model_copy(
            update={"entries": {}, "slots": {"s2.b1": {"ir_k3_e3": -4.248, "skip": -9.738}}}
        )
    )
    assert text.endswith("s2.b1:ir_k3_e3  -4.2480\ns2.b1:skip      -9.7380")
    assert "entries      0 (0 noisy)" in text
