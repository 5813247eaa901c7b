"""NAS-Bench-Macro: all 6,561 networks have the benchmark's own MACs and parameters."""

from __future__ import annotations

import csv
import gzip
import os
from pathlib import Path

import pytest

from hwnas.core.spaces import nasbench_macro


@pytest.mark.skipif(
    "HWNAS_TEST_DATA" not in os.environ,
    reason="needs nasbench_macro/nasbench_macro_cifar10.csv.gz: set HWNAS_TEST_DATA",
)
def test_macs_and_parameters_of_every_network() -> None:
    path, space = (
        Path(os.environ["HWNAS_TEST_DATA"], "nasbench_macro/nasbench_macro_cifar10.csv.gz"),
        nasbench_macro(),
    )
    with gzip.open(path, "rt") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == space.size == 3**8
    for row in rows:
        ops = space.decode(space.at([int(digit) for digit in row["arch"]])).ops()
        assert (sum(op.macs for op in ops), sum(op.params for op in ops)) == (
            int(row["flops"]),
            int(row["params"]),
        ), row["arch"]
