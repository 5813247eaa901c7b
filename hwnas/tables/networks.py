"""Measured networks from a CSV file that somebody already has: ``architecture,ms``, one
network a line.

``architecture`` is one of

- a published network's name (``mobilenet_v2``), at the space's largest resolution and
  number of classes;
- the path of an architecture document (``nets/a.json``, relative to the CSV file);
- positions of the picked options in the order of the space's choices (``7 8 1 8 4``),
  as HW-NAS-Bench and HELP write networks, picks as a JSON object (``{"s1.b0":
  "ir_k3_e3", ...}``), or the space's own notation (``|nor_conv_3x3~0|+|...``); see
  ``SearchSpace.read``.

Other columns are ignored. A network that comes several times has the median of its times.
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
from hwnas.core.space import SearchSpace
from hwnas.core.table import LatencyTable, TableHeader
from hwnas.document import file_sha256, nearest
from hwnas.errors import SpaceError, UserError
from hwnas.tables.fit import fit_table
from hwnas.tables.reading import UNKNOWN, Source

ARCHITECTURE, MS = "architecture", "ms"


def fit_from_csv(
    path: str | Path, space: SearchSpace, known: Sequence[LatencyTable] = ()
) -> LatencyTable:
    """The table of ``space`` fitted to the networks of a CSV file (``read_networks``),
    from ``known`` tables of other devices (``fit``).

    Its device is the file's name; what else a header says, a CSV file does not, so it
    is ``"unknown"``. To validate against it, write the device, the runtime, dtype and
    threads into its header.
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
        np.random.default_rng(0),
        known=known,
        provenance=provenance,
    )


def read_networks(path: str | Path, space: SearchSpace) -> list[tuple[Architecture, float]]:
    """The networks of a CSV file, gzipped or not, with their latencies in milliseconds:
    each once, in order of appearance.

    Raises TableError, naming the line, where the file or one of its networks is not of
    ``space``; DocumentError where there is no file.
    """
    source = Source.load(path)
    rows = csv.reader(io.StringIO(source.text.removeprefix("\ufeff"), newline=""), strict=True)
    found: dict[tuple[Op, ...], tuple[Architecture, list[float]]] = {}
    ops = frozenset(space.ops)
    columns: tuple[int, int] | None = None
    try:
        for row in rows:
            cells = [cell.strip() for cell in row]
            line = f"line {rows.line_num}:"
            if not any(cells):
                continue
            if columns is None:
                columns = _columns(source, cells)
                continue
            if len(cells) <= max(columns):
                raise source.wrong(
                    f"{line} there are {len(cells)} cells, too few for the columns of the header:"
                    " complete it."
                )
            text, ms = (cells[column] for column in columns)
            try:
                arch = architecture(text, space, Path(path).parent)
            except UserError as error:
                raise source.wrong(f"{line} {error}") from error
            foreign = [op.key for op in arch.ops() if op not in ops]
            if foreign:
                raise source.wrong(
                    f"{line} network {arch.name!r} holds {foreign[0]}, which space {space.name}"
                    " does not: remove it, or name its space."
                )
            found.setdefault(arch.ops(), (arch, []))[1].append(_milliseconds(source, line, ms))
    except csv.Error as error:
        raise source.wrong(
            f"line {rows.line_num}: {error}: this is not CSV; quote cells that hold commas or"
            " quotes."
        ) from error
    if columns is None:
        raise source.wrong(
            f"is empty: its first line is '{ARCHITECTURE},{MS}', then one network a line."
        )
    return [(arch, float(np.median(times))) for arch, times in found.values()]


def architecture(text: str, space: SearchSpace, folder: Path) -> Architecture:
    """The network that ``text`` stands for in ``space``; paths are relative to
    ``folder``. Raises SpaceError or DocumentError.
    """
    if text.endswith(".json"):
        return Architecture.load(folder / text)
    if not is_name(text):
        return space.decode(space.read(text), "picks")
    if text not in NETWORKS:
        raise SpaceError(
            f"{text!r} is no architecture: give a published network, the path of a .json document,"
            " positions of options, or picks as JSON; of published networks,"
            f" {nearest(text, NETWORKS)}"
        )
    return published(
        text, resolution=max(op.size for op in space.ops), classes=space.ops[-1].out_ch
    )


def _columns(source: Source, cells: list[str]) -> tuple[int, int]:
    """Where the two columns are. Raises TableError unless the header names each once."""
    if cells.count(ARCHITECTURE) != 1 or cells.count(MS) != 1:
        shown = ",".join(cells)[:80]
        raise source.wrong(
            f"begins with {shown!r}: the first line names the columns, once each {ARCHITECTURE!r}"
            f" and {MS!r}."
        )
    return cells.index(ARCHITECTURE), cells.index(MS)


def _milliseconds(source: Source, line: str, text: str) -> float:
    try:
        ms = float(text)
    except ValueError:
        ms = math.nan
    if not 0 < ms < math.inf:
        raise source.wrong(
            f"{line} ms is {text!r}: give a latency in milliseconds above 0, or remove the line."
        )
    return ms
