"""ProxylessNAS's and once-for-all's tables: one entry per block, whose shape is its key.

Sources: ProxylessNAS (arXiv 1812.00332), ``mobile_trim.yaml``; once-for-all (arXiv
1908.09791), ``note10/*_lookup_table.yaml``::

    expanded_conv-input:28x28x40-output:14x14x80-expand:6-kernel:5-stride:2-idskip:0:
    {count: 164, mean: 2.48, var: 0.01}

What an entry covers:

- ``Conv`` is the 3 x 3 stem, ``Conv_1`` the last 1 x 1 convolution before pooling;
  their strides follow from the sizes
- ``expanded_conv`` is an inverted residual; ProxylessNAS writes the expansion as a
  ratio, once-for-all as the expanded channels and adds ``-se`` (a quarter of them,
  hard-sigmoid gate) and ``-hs`` (hard-swish instead of ReLU). Without expansion (1, or
  the input's channels) both build no expansion convolution: ``dsconv``
- ProxylessNAS's ``Logits`` is everything after ``Conv_1``: pooling and the fully
  connected layer, our ``classifier``
- once-for-all's ``AvgPool2D`` and ``Conv_2`` together are our ``head``; its ``Logits``
  is the fully connected layer alone, a ``classifier`` whose input has 1 pixel

ProxylessNAS's keys name no activation: each is entered for ReLU and for ReLU6. ``ms``
is the source's mean; its variance is not kept. A CSV with a column ``block_name`` and
one column of milliseconds per device is read as well.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import yaml

from hwnas.core.ir import out_size
from hwnas.core.ops import Classifier, Conv, DSConv, Head, MBConv, Op, separable
from hwnas.core.option import make_divisible
from hwnas.errors import SpaceError
from hwnas.tables.reading import CLAMPS, UNKNOWN, Reading, Source, Timed, entries_of

_N = r"(\d{1,6})"
_LAYER = re.compile(rf"(Conv|Conv_1)-input:{_N}x{_N}x{_N}-output:{_N}x{_N}x{_N}")
_LOGITS = re.compile(rf"Logits-input:{_N}x{_N}x{_N}-output:{_N}")
_POOL = re.compile(rf"AvgPool2D-input:{_N}x{_N}x{_N}-output:1x1x{_N}")
_AFTER_POOL = re.compile(rf"Conv_2-input:1x1x{_N}-output:1x1x{_N}")
_BLOCK = re.compile(
    rf"expanded_conv-input:{_N}x{_N}x{_N}-output:{_N}x{_N}x{_N}-expand:{_N}-kernel:{_N}-stride:{_N}-idskip:([01])(?:-se:([01])-hs:([01]))?"
)

Row = tuple[str, float, int | Literal["unknown"]]
"""Key, milliseconds, and how often it was measured."""


def proxylessnas(source: Source, column: str) -> Reading:
    """ProxylessNAS's YAML, and its CSV. ``column`` is what is read of each entry:
    ``mean`` where nothing is said.
    """
    first = source.text.partition("\n")[0]
    if "block_name" in first.split(","):
        rows = _csv_rows(source, column)
    else:
        column = column or "mean"
        rows = _yaml_rows(source, column)
    timed: list[Timed] = []
    unmapped: dict[str, str] = {}
    for key, ms, runs in rows:
        try:
            timed += [
                Timed(op, ms, runs)
                for op in dict.fromkeys(_op(key, act, absolute=False) for act in CLAMPS)
            ]
        except SpaceError as error:
            unmapped[key] = str(error)
    _check_blocks(source, timed, "proxylessnas", "ofa")
    covers = (
        "Conv is the 3 x 3 stem, Logits all after Conv_1; activations are not given: each block is"
        " entered for relu and relu6"
    )
    return Reading(
        "proxylessnas_original", covers, entries_of(timed), unmapped=unmapped, column=column
    )


def ofa(source: Source, column: str) -> Reading:
    """Once-for-all's YAML. ``column`` is what is read of each entry: ``mean`` where
    nothing is said.
    """
    column = column or "mean"
    timed: list[Timed] = []
    unmapped: dict[str, str] = {}
    pooling: dict[int, tuple[str, int, float]] = {}
    after: list[tuple[str, int, int, Row]] = []
    for row in _yaml_rows(source, column):
        key, ms, runs = row
        if match := _POOL.fullmatch(key):
            pooling[int(match[3])] = (key, int(match[1]), ms)
        elif match := _AFTER_POOL.fullmatch(key):
            after.append((key, int(match[1]), int(match[2]), row))
        else:
            try:
                timed.append(Timed(_op(key, "hswish", absolute=True), ms, runs))
            except SpaceError as error:
                unmapped[key] = str(error)
    for key, in_ch, out_ch, (_, ms, runs) in after:
        if in_ch not in pooling:
            unmapped[key] = "the pooling before it has no entry"
        else:
            timed.append(
                Timed(
                    Head(pooling[in_ch][1], in_ch, out_ch, act="hswish"),
                    ms + pooling[in_ch][2],
                    runs,
                )
            )
    unmapped |= {
        key: "the convolution after it has no entry"
        for in_ch, (key, _, _) in pooling.items()
        if in_ch not in {one[1] for one in after}
    }
    _check_blocks(source, timed, "ofa", "proxylessnas")
    return Reading(
        "ofa_mobilenet_v3",
        "AvgPool2D and Conv_2 together are one head",
        entries_of(timed),
        unmapped=unmapped,
        column=column,
    )


def _op(key: str, act: str, *, absolute: bool) -> Op:
    """The op of a key. ``absolute`` reads once-for-all's keys. Raises SpaceError where
    no op is that block.
    """
    if match := _LAYER.fullmatch(key):
        kind, (size, width, in_ch, out, out_width, out_ch) = match[1], map(int, match.groups()[1:])
        _check_square((size, width), (out, out_width))
        stride = next((stride for stride in (1, 2) if out_size(size, stride) == out), None)
        if stride is None:
            raise SpaceError(f"no stride leads from {size} to {out} pixels")
        return Conv(size, in_ch, out_ch, kernel=3 if kind == "Conv" else 1, stride=stride, act=act)
    if match := _LOGITS.fullmatch(key):
        size, width, in_ch, out_ch = map(int, match.groups())
        _check_square((size, width))
        return Classifier(size, in_ch, out_ch)
    match = _BLOCK.fullmatch(key)
    if match is None or (match[12] is not None) != absolute:
        raise SpaceError("not a key of this format")
    size, width, in_ch, out, out_width, out_ch, expand, kernel, stride, skip = map(
        int, match.groups()[:10]
    )
    _check_square((size, width), (out, out_width))
    if not stride or out_size(size, stride) != out:
        raise SpaceError(f"stride {stride} does not lead from {size} to {out} pixels")
    mid = expand if absolute else in_ch * expand
    squeezed = match[11] == "1"
    return separable(
        size,
        in_ch,
        out_ch,
        0 if mid == in_ch else mid,
        kernel=kernel,
        stride=stride,
        se_ch=make_divisible(mid * 0.25) if squeezed else 0,
        act="relu" if match[12] == "0" else act,
        residual=skip == 1,
        se_gate="hsig" if squeezed else "sigmoid",
    )


def _check_square(*sizes: tuple[int, int]) -> None:
    for height, width in sizes:
        if height != width:
            raise SpaceError(f"{height} x {width} pixels: only squares are built here")


def _check_blocks(source: Source, timed: Iterable[Timed], name: str, other: str) -> None:
    if not any(isinstance(row.op, DSConv | MBConv) for row in timed):
        raise source.wrong(
            f"holds no block of format {name!r}: try --format {other}, or another of the formats."
        )


def _yaml_rows(source: Source, column: str) -> Iterator[Row]:
    """The entries of a YAML mapping. Raises TableError where it does not parse, or an
    entry lacks what the others have.
    """
    try:
        content = yaml.safe_load(source.text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = (
            f" in line {error.problem_mark.line + 1}"
            if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark
            else ""
        )
        raise source.wrong(
            f"is not valid YAML{line}: it is corrupt, was cut off, or needs another --format."
        ) from error
    if (
        not isinstance(content, dict)
        or not all(isinstance(entry, dict) for entry in content.values())
        or not content
    ):
        raise source.wrong(
            "is no mapping of keys to entries: it was cut off, or needs another --format."
        )
    entries: list[tuple[str, dict[str, Any]]] = [
        (str(key), entry) for key, entry in content.items()
    ]
    shared = set(entries[0][1]).intersection(*(entry for _, entry in entries[:-1]))
    for key, entry in entries:
        missing = sorted(({column} | shared) - entry.keys(), key=str)
        if missing:
            raise source.wrong(
                f"has no {missing[0]!r} in entry {key!r}: it was cut off, or choose another column"
                " with --format NAME:COLUMN."
            )
        runs = entry.get("count")
        yield (
            key,
            source.ms(entry[column], f"{column} of {key}"),
            runs if isinstance(runs, int) and not isinstance(runs, bool) else UNKNOWN,
        )


def _csv_rows(source: Source, column: str) -> Iterator[Row]:
    """The rows of a CSV with a column ``block_name``; the others are milliseconds."""
    try:
        rows = list(csv.DictReader(io.StringIO(source.text)))
    except csv.Error as error:
        raise source.wrong(
            f"is not valid CSV ({error}): it is corrupt, or needs another --format."
        ) from error
    columns = [name for name in (rows[0] if rows else {}) if name and name != "block_name"]
    if column not in columns:
        given = f"no column {column!r}" if column else "several columns"
        raise source.wrong(
            f"has {given}: choose one of {', '.join(columns)} with --format proxylessnas:COLUMN."
        )
    for row in rows:
        key = row["block_name"] or ""
        yield key, source.ms(row[column], f"{column} of {key}"), UNKNOWN
