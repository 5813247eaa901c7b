"""The formats by name, and a foreign file turned into a table of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hwnas.core.table import Calibration, LatencyTable, TableHeader
from hwnas.registry import Registry
from hwnas.tables.known import KNOWN
from hwnas.tables.reading import UNKNOWN, Conditions, Publication, Reading, Source

Reader = Callable[[Source, str], Reading]
"""Reads a source; the text is the column of it that was asked for, empty where none
was. Raises TableError.
"""

FORMATS = Registry(
    "table_format",
    {
        "proxylessnas": "hwnas.tables.block_keys:proxylessnas",
        "ofa": "hwnas.tables.block_keys:ofa",
        "single_path": "hwnas.tables.layers:single_path",
        "fbnet": "hwnas.tables.layers:fbnet",
        "tfnas": "hwnas.tables.tfnas:tfnas",
        "tunas": "hwnas.tables.tunas:tunas",
    },
)


@dataclass(frozen=True)
class Imported:
    """A table, and what of the source is not in it: name -> reason."""

    table: LatencyTable
    unmapped: dict[str, str]


def import_table(path: str | Path, format_name: str) -> Imported:
    """Read a foreign table. ``format_name`` is a format, or ``format:column`` for files
    with several columns of times.

    What the source and its publication do not give is ``"unknown"`` in the header.
    There is no calibration: sums of such entries are not latencies of networks. A model
    of positions has its intercept, as ``Calibration`` on no networks.

    Raises ConfigError (unknown format), TableError (a file of another format, corrupt,
    cut off) or DocumentError (no file).

    Example:
        >>> import_table("mobile_trim.yaml", "proxylessnas").table.header.device      # doctest: +SKIP
        'pixel1'
    """
    name, _, column = format_name.partition(":")
    read: Reader = FORMATS.get(name)
    source = Source.load(path)
    reading = read(source, column)
    publication = reading.publication or KNOWN.get(source.sha256)
    conditions = Conditions()
    if publication is not None:
        if reading.column not in publication.columns:
            raise source.wrong(
                f"holds nothing of use in {reading.column!r}: choose from"
                f" {', '.join(publication.columns)}."
            )
        conditions = publication.columns[reading.column]
    table = LatencyTable(
        header=_header(conditions, reading.space),
        entries=reading.entries,
        slots=reading.slots,
        calibration=(
            None
            if reading.intercept_ms is None
            else Calibration(intercept_ms=reading.intercept_ms, slope=1.0, networks=0)
        ),
        provenance=_provenance(
            Path(path).name, source.sha256, name, reading, publication or Publication()
        ),
    )
    return Imported(table, reading.unmapped)


def _header(conditions: Conditions, space: str) -> TableHeader:
    return TableHeader(
        device=conditions.device,
        cpu=conditions.cpu,
        machine=UNKNOWN,
        runtime=conditions.runtime,
        runtime_version=UNKNOWN,
        dtype=UNKNOWN,
        threads=conditions.threads,
        cores=UNKNOWN,
        governor=UNKNOWN,
        layout=UNKNOWN,
        batch=conditions.batch,
        date=UNKNOWN,
        space=space,
    )


def _provenance(
    file: str, sha256: str, format_name: str, reading: Reading, publication: Publication
) -> dict[str, str]:
    """Where the table is from; only what there is something to say about."""
    facts = {
        "file": file,
        "sha256": sha256,
        "licence": publication.licence,
        "origin": publication.origin,
        "format": f"{format_name}:{reading.column}" if reading.column else format_name,
        "covers": reading.covers,
        "remark": publication.remark,
        "unmapped": "; ".join(f"{name} ({reason})" for name, reason in reading.unmapped.items()),
    }
    return {name: text for name, text in facts.items() if text}
