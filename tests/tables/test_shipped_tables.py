"""The tables in ``latency_tables/``: complete, calibrated, evaluated on networks that
the calibration did not see, and described correctly in the README there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hwnas.core.cost import CostModel
from hwnas.core.spaces import load_space
from hwnas.core.table import LatencyTable
from hwnas.resources import resource_path

FOLDER = resource_path("latency_tables")
TABLES = sorted(path for path in FOLDER.glob("*/*.json") if path.name != "device.json")
CONDITIONS = {
    ("litert", "fp32", 1),
    ("litert", "fp32", 2),
    ("litert", "int8", 1),
    ("litert", "int8", 2),
    ("onnxruntime", "fp32", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_table_covers_its_space_and_was_evaluated_on_unseen_networks(path: Path) -> None:
    table = LatencyTable.load(path)
    header = table.header
    assert (path.parent.name, path.stem) == (
        header.device,
        f"{header.space}-{header.runtime}-{header.dtype}-{header.threads}t",
    )
    assert "unknown" not in (
        header.cpu,
        header.machine,
        header.runtime_version,
        header.threads,
        header.cores,
        header.date,
    )
    space = load_space(header.space)
    cost = CostModel.of_table(space, table)  # refuses a table that lacks an op
    low, high = cost.range()
    assert 0 < low < cost.cost(space.sample(np.random.default_rng(0))) < high
    held_out = table.calibration.held_out if table.calibration is not None else None
    assert held_out is not None and held_out.networks >= 19 and held_out.spearman is not None
    strict = header.dtype == "fp32" and header.threads == 1
    assert held_out.mape <= (0.03 if strict else 0.05)
    assert held_out.spearman >= (0.99 if strict else 0.98)
    assert sum(entry.noisy for entry in table.entries.values()) <= 0.1 * len(table.entries)
    line = next(
        line for line in (FOLDER / "README.md").read_text().splitlines() if path.name in line
    )
    assert f"| {len(table.entries):,} |" in line
    assert (
        f"| {held_out.mape:.1%} | {held_out.max_error:.1%} | {held_out.spearman:.3f} |"
        f" {held_out.raw_mape:.1%} |" in line
    )


def test_this_projects_own_cpu_has_every_condition_in_three_spaces() -> None:
    shipped = {
        (table.header.space, (table.header.runtime, table.header.dtype, table.header.threads))
        for table in map(LatencyTable.load, TABLES)
    }
    for space in ("proxylessnas", "fbnet", "mobilenet_v3_like"):
        assert {conditions for name, conditions in shipped if name == space} >= CONDITIONS
