"""Measured networks from CSV files: every way to write one, and what is refused, with
the line and the fix.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.core.families import fbnet
from hwnas.core.published import published
from hwnas.core.space import MacroSpace, SearchSpace
from hwnas.core.spaces import load_space, ofa_mobilenet_v3, proxylessnas
from hwnas.errors import DocumentError, TableError
from hwnas.tables.networks import fit_from_csv, read_networks
from tests.conftest import digits_space

FAST = settings(deadline=None, derandomize=True, max_examples=30)
TINY = digits_space()


def written(folder: Path, text: str) -> Path:
    path = folder / "nets.csv"
    path.write_text(text)
    return path


def test_positions_picks_documents_and_names_stand_for_the_same_network(tmp_path: Path) -> None:
    space = fbnet()
    arch = published("fbnet_c")
    picks = space.encode(arch)
    (tmp_path / "nets").mkdir()
    arch.save(tmp_path / "nets/c.json")
    cells = ["fbnet_c", "nets/c.json", " ".join(map(str, space.index(picks))), json.dumps(picks)]
    with open(tmp_path / "nets.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["note", "ms", "architecture"])
        rows.writerows([f"row {i}", 10 + i, cell] for i, cell in enumerate(cells))
    [(network, ms)] = read_networks(tmp_path / "nets.csv", space)
    assert network.blocks == arch.blocks
    assert ms == 11.5  # the median of 10, 11, 12 and 13


def test_cells_are_written_in_the_notation_of_their_benchmark(tmp_path: Path) -> None:
    cell = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|none~1|nor_conv_1x1~2|"
    space = load_space("nasbench201")
    networks = read_networks(written(tmp_path, f"architecture,ms\n{cell},2\n"), space)
    assert [(arch.identity, ms) for arch, ms in networks] == [
        (space.decode(space.read(cell)).identity, 2.0)
    ]


def test_names_are_built_at_the_spaces_largest_resolution_and_classes(tmp_path: Path) -> None:
    space = ofa_mobilenet_v3(resolution=160, classes=10)
    path = written(tmp_path, "architecture,ms\nmobilenet_v2,3\n")
    with pytest.raises(
        TableError,
        match=(
            "network 'mobilenet_v2' contains op conv-h160-i3-o32-k3-s2-relu6, which is"
            " not in space ofa_mobilenet_v3"
        ),
    ):
        read_networks(path, space)
    assert (
        read_networks(
            written(tmp_path, "architecture,ms\nproxylessnas_mobile,3\n"),
            proxylessnas(act="relu6", classes=10),
        )[0][0].classes
        == 10
    )


@FAST
@given(seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=6), as_picks=st.booleans())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, seeds: list[int], as_picks: bool
) -> None:
    path = tmp_path_factory.mktemp("csv") / "nets.csv"
    expected: dict[tuple[str, ...], list[float]] = {}
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["architecture", "ms"])
        for i, seed in enumerate(seeds):
            picks = TINY.sample(np.random.default_rng(seed))
            rows.writerow(
                [json.dumps(picks) if as_picks else " ".join(map(str, TINY.index(picks))), i + 1]
            )
            expected.setdefault(tuple(op.key for op in TINY.decode(picks).blocks), []).append(
                i + 1.0
            )
    networks = read_networks(path, TINY)
    assert {tuple(op.key for op in arch.blocks): ms for arch, ms in networks} == {
        key: float(np.median(ms)) for key, ms in expected.items()
    }


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode("utf-8-sig"),
        lambda text: gzip.compress(text.encode()),
        lambda text: text.replace("\n", "\r\n").encode(),
    ],
)
def test_byte_order_marks_gzip_blank_lines_and_carriage_returns(
    tmp_path: Path, encode: object
) -> None:
    path = tmp_path / "nets.csv"
    path.write_bytes(encode("\n architecture , ms \n\n0 0 0, 1.5\n,\n0 0 1,2\n"))  # type: ignore[operator]
    assert [ms for _, ms in read_networks(path, TINY)] == [1.5, 2.0]


ROW = "architecture,ms\n0 0 0,1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: write the header 'architecture,ms', then one network per line."),
        ("network,latency\n0 0 0,1\n", "has the header 'network,latency', which must contain 'architecture' and"),
        ("architecture,ms,ms\n0 0 0,1,2\n", "has the header 'architecture,ms,ms', which must contain"),
        ("architecture;ms\n0 0 0;1\n", "has the header 'architecture;ms', which must contain"),
        (ROW + "0 0 1\n", "line 3: it has 1 cells, fewer than the header needs: complete the line."),
        (ROW + "0 0 1,fast\n", "line 3: ms is 'fast': give a latency in milliseconds above 0, or remove the line."),
        (ROW + "0 0 1,0\n", "line 3: ms is '0': give"),
        (ROW + "0 0 1,-2\n", "line 3: ms is '-2': give"),
        (ROW + "0 0 1,nan\n", "line 3: ms is 'nan': give"),
        (ROW + "0 0 1,inf\n", "line 3: ms is 'inf': give"),
        (ROW + "\n0 0,2\n", "line 4: '0 0' has 2 positions, but space tiny has 3 choices: give one for each."),
        (ROW + "0 0 4,2\n", "line 3: '0 0 4' has position 4 at choice 's2.b0', whose options are 0 to 3."),
        (ROW + "0 -1 0,2\n", "line 3: '0 -1 0' is not an architecture of space tiny: give the positions"),
        (ROW + "mobilenet_v2,2\n", "line 3: network 'mobilenet_v2' contains op conv-h8-i3-o32-k3-s2-relu6, which is not in space"),
        (ROW + "mobilnet_v2,2\n", "line 3: 'mobilnet_v2' is not an architecture: give a published network, the path of a .json document, "),
        (ROW + "mobilnet_v2,2\n", "or picks as JSON; of published networks, did you mean 'mobilenet_v2'?"),
        (ROW + f"0 0 {'9' * 5000},2\n", "is not an architecture"),
        (ROW + ",2\n", "line 3: '' is not an architecture"),
        (ROW + "gone.json,2\n", "gone.json does not exist: check the path."),
        (ROW + '"{""s1.b0"": 1",2\n', "line 3: '{\"s1.b0\": 1' is not valid JSON"),
        (ROW + '"{""s1.b0"": [1]}",2\n', "line 3: pick 's1.b0' is [1]: give the name or number of an option."),
        (ROW + '"{""s1.b0"": true}",2\n', "line 3: pick 's1.b0' is True: give"),
        (ROW + '"{""s1.b0"": ""ir_k3_e3""}",2\n', "line 3: picks for space tiny lack s1.b1, s2.b0: pick an option for each."),
        (ROW + '"0 0 1,2\n', "line 3: unexpected end of data: this is not CSV; quote cells that contain commas or quotes."),
    ],
)  # fmt: skip
def test_refusals_name_the_line_and_the_fix(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(TableError, match=re.escape(message)) as caught:
        read_networks(path, TINY)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_files_that_are_missing_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="does not exist"):
        read_networks(tmp_path / "gone.csv", TINY)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TableError, match="is not text"):
        read_networks(tmp_path / "binary.csv", TINY)


def test_a_table_from_a_file_names_it_and_is_reproducible(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [
        f"{' '.join(map(str, TINY.index(TINY.sample(rng))))},{rng.uniform(1, 2)}" for _ in range(8)
    ]
    path = written(tmp_path, "\n".join(["architecture,ms", *lines]))
    table = fit_from_csv(path, TINY)
    assert table == fit_from_csv(path, TINY)
    assert (table.header.device, table.header.space, table.header.runtime, table.header.batch) == (
        "nets",
        "tiny",
        "unknown",
        "unknown",
    )
    assert (table.provenance["file"], table.provenance["space_sha256"]) == ("nets.csv", TINY.sha256)
    with pytest.raises(TableError, match="at least 3 different networks, got 2"):
        fit_from_csv(written(tmp_path, "\n".join(["architecture,ms", *lines[:2]])), TINY)


def test_help_as_csv(tmp_path: Path) -> None:
    """HELP's FBNet networks as rows that anyone might write, on a GPU whose latencies
    are nearly sums over blocks.
    """
    folder = os.environ.get("HWNAS_TEST_DATA")
    if not folder:
        pytest.skip("HWNAS_TEST_DATA is not set: it names a folder with help_latency")
    space: SearchSpace = load_space("fbnet", resolution=32, classes=100)
    assert isinstance(space, MacroSpace)
    with np.load(Path(folder, "help_latency/fbnet.npz")) as data:
        rows = [
            f"{' '.join(map(str, row))},{ms}"
            for row, ms in zip(data["op_idx"][:60], data["lat_titanxp_32"], strict=False)
        ]
    table = fit_from_csv(written(tmp_path, "\n".join(["architecture,ms", *rows])), space)
    assert table.calibration is not None and table.calibration.held_out is not None
    assert (
        table.calibration.held_out.mape < 0.02 and (table.calibration.held_out.spearman or 0) > 0.95
    )
