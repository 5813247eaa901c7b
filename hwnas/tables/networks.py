"""Measured networks from an existing CSV file: ``architecture,ms``, one network per line.

``architecture`` is one of

- the name of a published network (``mobilenet_v2``), which is built for the space's
  largest resolution and number of classes;
- the path of an architecture document (``nets/a.json``), relative to the CSV file;
- the positions of the picked options in the order of the space's choices
  (``7 8 1 8 4``), as in HW-NAS-Bench and HELP; the picks as a JSON object (``{"s1.b0":
  "ir_k3_e3", ...}``); or the space's own notation (``|nor_conv_3x3~0|+|...``). See
  ``SearchSpace.read``.

Other columns are ignored. If a network is listed several times, the median of its times
is used.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hwnas.core.arch import Architecture
from hwnas.core.ops import Op
from hwnas.core.published import NETWORKS, is_name, published
from hwnas.core.size import area
from hwnas.core.space import SearchSpace
from hwnas.core.table import LatencyTable, TableHeader
from hwnas.document import file_sha256, nearest
from hwnas.errors import SpaceError, UserError
from hwnas.printable import quoted
from hwnas.tables.fit import fit_table
from hwnas.tables.reading import UNKNOWN, Source

ARCHITECTURE = "architecture"
MS = "ms"
"""The names of the two columns."""


def fit_from_csv(
    path: str | Path, space: SearchSpace, known: Sequence[LatencyTable] = ()
) -> LatencyTable:
    """Fit the table of ``space`` to the networks of a CSV file (see ``read_networks``).
    ``known`` are tables of other devices to start from (see ``fit_table``).

    The device in the header is the file's name. A CSV file has no other header fields, so
    they are ``"unknown"``. To validate against the table, write the device, runtime,
    dtype and threads into its header.
    """
    unknown = dict.fromkeys(TableHeader.model_fields, UNKNOWN)
    header = TableHeader.model_validate(
        {**unknown, "device": Path(path).name.split(".")[0], "space": space.name}
    )
    provenance = {
        "file": Path(path).name,
        "sha256": file_sha256(path),
        "space_sha256": space.sha256,
    }
    return fit_table(
        space.ops,
        read_networks(path, space),
        header,
        np.random.default_rng(0),  # the same file always gives the same table
        known=known,
        provenance=provenance,
    )


def read_networks(path: str | Path, space: SearchSpace) -> list[tuple[Architecture, float]]:
    """The networks of a CSV file, gzipped or not, with their latencies in milliseconds:
    each network once, in order of appearance.

    Raises TableError, with the line number, if the file is not valid or one of its
    networks is not in ``space``; DocumentError if there is no file.
    """
    source = Source.load(path)
    rows = csv.reader(io.StringIO(source.text, newline=""), strict=True)
    # By ops, because one network can be written in several ways.
    networks: dict[tuple[Op, ...], tuple[Architecture, list[float]]] = {}
    ops = frozenset(space.ops)
    columns: tuple[int, int] | None = None
    try:
        for row in rows:
            cells = [cell.strip() for cell in row]
            line = f"line {rows.line_num}:"
            if not any(cells):
                continue
            if columns is None:
                # The header is the first line that is not empty.
                columns = _columns(source, cells)
                continue
            if len(cells) <= max(columns):
                raise source.wrong(
                    f"{line} it has {len(cells)} cells, fewer than the header needs: complete the"
                    " line."
                )
            name, ms = (cells[column] for column in columns)
            try:
                arch = architecture(name, space, Path(path).parent)
            except UserError as error:
                raise source.wrong(f"{line} {error}") from error
            # Published networks and documents can contain ops that the space lacks.
            foreign = [op.key for op in arch.ops() if op not in ops]
            if foreign:
                raise source.wrong(
                    f"{line} network {arch.name!r} contains op {foreign[0]}, which is not in space"
                    f" {space.name}: remove the network, or name its space."
                )
            _, times = networks.setdefault(arch.ops(), (arch, []))
            times.append(_milliseconds(source, line, ms))
    except csv.Error as error:
        raise source.wrong(
            f"line {rows.line_num}: {error}: this is not CSV; quote cells that contain commas"
            " or quotes."
        ) from error
    if columns is None:
        raise source.wrong(
            f"is empty: write the header '{ARCHITECTURE},{MS}', then one network per line."
        )
    return [(arch, float(np.median(times))) for arch, times in networks.values()]


def architecture(text: str, space: SearchSpace, folder: Path) -> Architecture:
    """The network of ``space`` that ``text`` describes; paths are relative to ``folder``.
    Raises SpaceError or DocumentError.
    """
    if text.endswith(".json"):
        return Architecture.load(folder / text)
    if not is_name(text):
        return space.decode(space.read(text), "picks")
    if text not in NETWORKS:
        raise SpaceError(
            f"{text!r} is not an architecture: give a published network, the path of a .json"
            " document, positions of options, or picks as JSON; of published networks,"
            f" {nearest(text, NETWORKS)}"
        )
    resolution = max((op.size for op in space.ops), key=area)
    return published(text, resolution=resolution, classes=space.ops[-1].out_ch)


def _columns(source: Source, cells: list[str]) -> tuple[int, int]:
    """Positions of the two columns. Raises TableError unless the header names each once."""
    if cells.count(ARCHITECTURE) != 1 or cells.count(MS) != 1:
        shown = ",".join(cells)[:80]
        raise source.wrong(
            f"has the header {shown!r}, which must contain {ARCHITECTURE!r} and {MS!r} exactly once"
            " each."
        )
    return cells.index(ARCHITECTURE), cells.index(MS)


def _milliseconds(source: Source, line: str, text: str) -> float:
    try:
        ms = float(text)
    except ValueError:
        ms = math.nan
    if not 0 < ms < math.inf:  # NaN fails this as well
        raise source.wrong(
            f"{line} ms is {quoted(text)}: give a latency in milliseconds above 0, or remove the"
            " line."
        )
    return ms
