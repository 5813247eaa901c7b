"""The registry of foreign formats, and the import of a foreign file as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hwnas.core.table import Calibration, LatencyTable, TableHeader
from hwnas.registry import Registry
from hwnas.tables.known import KNOWN
from hwnas.tables.reading import UNKNOWN, Publication, PublishedConditions, Reading, Source

Reader = Callable[[Source, str], Reading]
"""Reads a source. The string is the requested column, or empty if none was requested.
Raises TableError.
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
    """A table, and the parts of the source that it lacks: name -> reason."""

    table: LatencyTable
    unmapped: dict[str, str]


def import_table(path: str | Path, format_name: str) -> Imported:
    """Import a foreign table. ``format_name`` is a format, or ``format:column`` for files
    with several columns of times.

    Header fields that neither the source nor its publication states are ``"unknown"``.
    The table has no calibration, because sums of such entries are not latencies of
    networks. Only a positional model has one: its intercept, fitted on 0 networks.

    Raises ConfigError if the format is unknown, TableError if the file has another
    format or is damaged, DocumentError if there is no file.

    Example:
        >>> imported = import_table("mobile_trim.yaml", "proxylessnas")  # doctest: +SKIP
        >>> imported.table.header.device  # doctest: +SKIP
        'pixel1'
    """
    name, _, column = format_name.partition(":")
    read: Reader = FORMATS.get(name)
    source = Source.load(path)
    reading = read(source, column)
    # Some formats have just one published file. Others are recognised by their bytes.
    publication = reading.publication or KNOWN.get(source.sha256)
    conditions = PublishedConditions()
    if publication is not None:
        if reading.column not in publication.columns:
            raise source.wrong(
                f"has no usable values in column {reading.column!r}: choose from"
                f" {', '.join(publication.columns)}."
            )
        conditions = publication.columns[reading.column]
    calibration = None
    if reading.intercept_ms is not None:
        calibration = Calibration(intercept_ms=reading.intercept_ms, slope=1.0, networks=0)
    table = LatencyTable(
        header=_header(conditions, reading.space),
        entries=reading.entries,
        slots=reading.slots,
        calibration=calibration,
        provenance=_provenance(
            Path(path).name, source.sha256, name, reading, publication or Publication()
        ),
    )
    return Imported(table, reading.unmapped)


def _header(conditions: PublishedConditions, space: str) -> TableHeader:
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
    """The origin of the table. Empty facts are left out."""
    if reading.column:
        format_name += f":{reading.column}"
    unmapped = [f"{name} ({reason})" for name, reason in reading.unmapped.items()]
    facts = {
        "file": file,
        "sha256": sha256,
        "licence": publication.licence,
        "origin": publication.origin,
        "format": format_name,
        "covers": reading.covers,
        "remark": publication.remark,
        "unmapped": "; ".join(unmapped),
    }
    return {name: text for name, text in facts.items() if text}
