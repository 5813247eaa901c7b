"""ProxylessNAS's and once-for-all's tables: one entry per block, with the block's shape
as the key.

Sources: ProxylessNAS (arXiv 1812.00332), ``mobile_trim.yaml``; once-for-all (arXiv
1908.09791), ``note10/*_lookup_table.yaml``::

    expanded_conv-input:28x28x40-output:14x14x80-expand:6-kernel:5-stride:2-idskip:0:
    {count: 164, mean: 2.48, var: 0.01}

What an entry covers:

- ``Conv`` is the 3 x 3 stem, ``Conv_1`` the last 1 x 1 convolution before pooling. Their
  strides follow from the sizes.
- ``expanded_conv`` is an inverted residual. ProxylessNAS writes the expansion as a ratio.
  Once-for-all writes the expanded channels, and adds ``-se`` (squeeze-and-excitation with
  a quarter of them and a hard-sigmoid gate) and ``-hs`` (hard-swish instead of ReLU). If
  the expansion is 1, or the expanded channels equal the input's, neither builds an
  expansion convolution: ``dsconv``.
- ProxylessNAS's ``Logits`` is everything after ``Conv_1``: pooling and the fully
  connected layer, our ``classifier``.
- Once-for-all's ``AvgPool2D`` and ``Conv_2`` together are our ``head``. Its ``Logits``
  is only the fully connected layer, a ``classifier`` with an input of 1 pixel.

ProxylessNAS's keys do not name the activation, so each block is entered for ReLU and for
ReLU6. ``ms`` is the source's mean; its variance is dropped. A CSV file with a column
``block_name`` and one column of milliseconds per device can be read as well.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from yaml.composer import ComposerError

from hwnas.core.ops import Classifier, Conv, DSConv, Head, MBConv, Op, separable
from hwnas.core.option import make_divisible
from hwnas.core.size import strided
from hwnas.errors import SpaceError
from hwnas.tables.reading import CLAMPS, UNKNOWN, Reading, Source, TimedOp, entries_of

_N = r"(\d{1,6})"
_LAYER = re.compile(rf"(Conv|Conv_1)-input:{_N}x{_N}x{_N}-output:{_N}x{_N}x{_N}")
_LOGITS = re.compile(rf"Logits-input:{_N}x{_N}x{_N}-output:{_N}")
_POOL = re.compile(rf"AvgPool2D-input:{_N}x{_N}x{_N}-output:1x1x{_N}")
_AFTER_POOL = re.compile(rf"Conv_2-input:1x1x{_N}-output:1x1x{_N}")
_BLOCK = re.compile(
    rf"expanded_conv-input:{_N}x{_N}x{_N}-output:{_N}x{_N}x{_N}"
    rf"-expand:{_N}-kernel:{_N}-stride:{_N}-idskip:([01])(?:-se:([01])-hs:([01]))?"
)

MOST_RUNS = 10**9
"""A larger count of measurements comes from a damaged file."""

Row = tuple[str, float, int | Literal["unknown"]]
"""Key, milliseconds, and the number of measurements."""


@dataclass(frozen=True)
class _Pool:
    """Once-for-all's entry of the global pooling."""

    key: str
    size: int
    ms: float


@dataclass(frozen=True)
class _AfterPool:
    """Once-for-all's entry of the convolution after the global pooling."""

    key: str
    in_ch: int
    out_ch: int
    ms: float
    runs: int | Literal["unknown"]


def proxylessnas(source: Source, column: str) -> Reading:
    """Read ProxylessNAS's YAML or CSV. ``column`` is the value that is read of each
    entry; in YAML, the default is ``mean``.
    """
    first = source.text.partition("\n")[0]
    if "block_name" in first.split(","):
        rows = _csv_rows(source, column)
    else:
        column = column or "mean"
        rows = _yaml_rows(source, column)
    timed: list[TimedOp] = []
    unmapped: dict[str, str] = {}
    for key, ms, runs in rows:
        try:
            # An op without an activation is the same for all of them: enter it once.
            ops = dict.fromkeys(_op(key, act, absolute=False) for act in CLAMPS)
        except SpaceError as error:
            unmapped[key] = str(error)
        else:
            timed += [TimedOp(op, ms, runs) for op in ops]
    _check_blocks(source, timed, "proxylessnas", "ofa")
    covers = (
        "Conv is the 3 x 3 stem, Logits all after Conv_1; activations are not given: each block is"
        " entered for relu and relu6"
    )
    return Reading(
        "proxylessnas_original", covers, entries_of(timed), unmapped=unmapped, column=column
    )


def ofa(source: Source, column: str) -> Reading:
    """Read once-for-all's YAML. ``column`` is the value that is read of each entry; the
    default is ``mean``.
    """
    column = column or "mean"
    timed: list[TimedOp] = []
    unmapped: dict[str, str] = {}
    pools: dict[int, _Pool] = {}
    convolutions: list[_AfterPool] = []
    for key, ms, runs in _yaml_rows(source, column):
        if match := _POOL.fullmatch(key):
            pools[int(match[3])] = _Pool(key, int(match[1]), ms)
        elif match := _AFTER_POOL.fullmatch(key):
            convolutions.append(_AfterPool(key, int(match[1]), int(match[2]), ms, runs))
        else:
            try:
                timed.append(TimedOp(_op(key, "hswish", absolute=True), ms, runs))
            except SpaceError as error:
                unmapped[key] = str(error)

    # Pooling and the convolution after it are one op here. They belong together if their
    # channels are the same.
    used = set[int]()
    for conv in convolutions:
        used.add(conv.in_ch)
        pool = pools.get(conv.in_ch)
        if pool is None:
            unmapped[conv.key] = "the pooling before it has no entry"
        else:
            head = Head(pool.size, conv.in_ch, conv.out_ch, act="hswish")
            timed.append(TimedOp(head, conv.ms + pool.ms, conv.runs))
    for channels, pool in pools.items():
        if channels not in used:
            unmapped[pool.key] = "the convolution after it has no entry"
    _check_blocks(source, timed, "ofa", "proxylessnas")
    return Reading(
        "ofa_mobilenet_v3",
        "AvgPool2D and Conv_2 together are one head",
        entries_of(timed),
        unmapped=unmapped,
        column=column,
    )


def _op(key: str, act: str, *, absolute: bool) -> Op:
    """The op of a key. ``absolute`` means once-for-all's keys, which give the expansion
    in channels. Raises SpaceError if our ops cannot express the block.
    """
    if match := _LAYER.fullmatch(key):
        return _layer(match, act)
    if match := _LOGITS.fullmatch(key):
        size, width, in_ch, out_ch = map(int, match.groups())
        _check_square((size, width))
        return Classifier(size, in_ch, out_ch)
    match = _BLOCK.fullmatch(key)
    # Only once-for-all's keys end in ``-se`` and ``-hs``.
    if match is None or (match[12] is not None) != absolute:
        raise SpaceError("not a key of this format")
    return _block(match, act, absolute=absolute)


def _layer(match: re.Match[str], act: str) -> Conv:
    size, width, in_ch, out, out_width, out_ch = map(int, match.groups()[1:])
    _check_square((size, width), (out, out_width))
    for stride in (1, 2):
        if strided(size, stride) == out:
            kernel = 3 if match[1] == "Conv" else 1
            return Conv(size, in_ch, out_ch, kernel=kernel, stride=stride, act=act)
    # The reasons why blocks are not mapped are in the provenance of an imported table, so
    # its hash depends on their wording.
    raise SpaceError(f"no stride leads from {size} to {out} pixels")


def _block(match: re.Match[str], act: str, *, absolute: bool) -> Op:
    size, width, in_ch, out, out_width, out_ch, expand, kernel, stride, skip = map(
        int, match.groups()[:10]
    )
    _check_square((size, width), (out, out_width))
    if not stride or strided(size, stride) != out:
        raise SpaceError(f"stride {stride} does not lead from {size} to {out} pixels")
    expanded = expand if absolute else in_ch * expand
    # ``-se`` and ``-hs``, which only once-for-all's keys have.
    se_ch = 0
    se_gate = "sigmoid"
    if match[11] == "1":
        se_ch = make_divisible(expanded * 0.25)
        se_gate = "hsig"
    if match[12] == "0":
        act = "relu"
    return separable(
        size,
        in_ch,
        out_ch,
        0 if expanded == in_ch else expanded,
        kernel=kernel,
        stride=stride,
        se_ch=se_ch,
        act=act,
        residual=skip == 1,
        se_gate=se_gate,
    )


def _check_square(*sizes: tuple[int, int]) -> None:
    for height, width in sizes:
        if height != width:
            raise SpaceError(f"{height} x {width} pixels: only squares are built here")


def _check_blocks(source: Source, timed: Iterable[TimedOp], name: str, other: str) -> None:
    """Raise TableError if nothing in the file is a block: it has another format."""
    if not any(isinstance(row.op, DSConv | MBConv) for row in timed):
        raise source.wrong(
            f"contains no block of format {name!r}: try --format {other}, or another of the"
            " formats."
        )


def _yaml_rows(source: Source, column: str) -> Iterator[Row]:
    """The entries of a YAML mapping. Raises TableError if it does not parse, or if an
    entry lacks a value that the others have.
    """
    entries = _yaml_entries(source)
    # A file that was cut off can still be valid YAML, with a last entry that is too
    # short. So every entry must have what all but the last have in common.
    shared = set(entries[0][1]).intersection(*(entry for _, entry in entries[:-1]))
    for key, entry in entries:
        missing = sorted(({column} | shared) - entry.keys(), key=str)
        if missing:
            raise source.wrong(
                f"has no {missing[0]!r} in entry {key!r}: it was cut off, or choose another column"
                " with --format NAME:COLUMN."
            )
        ms = source.ms(entry[column], f"{column} of {key}")
        runs = entry.get("count")
        if not isinstance(runs, int) or isinstance(runs, bool) or not 0 < runs < MOST_RUNS:
            runs = UNKNOWN
        yield key, ms, runs


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader, which creates numbers, strings, lists and mappings only,
    without aliases. No published table has any, and a few lines of aliases of aliases
    stand for billions of values.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node. Raises ComposerError if it is an alias."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise ComposerError(None, None, "aliases are not read", mark)
        return super().compose_node(parent, index)


def _yaml_entries(source: Source) -> list[tuple[str, dict[str, Any]]]:
    """The keys and entries of the file, at least one."""
    try:
        content = yaml.load(source.text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = ""
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            line = f" in line {error.problem_mark.line + 1}"
        raise source.wrong(
            f"is not valid YAML{line}: it is corrupt, was cut off, or needs another --format."
        ) from error
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(entry, dict) for entry in content.values())
    ):
        raise source.wrong(
            "is not a mapping of keys to entries: it was cut off, or needs another --format."
        )
    return [(str(key), entry) for key, entry in content.items()]


def _csv_rows(source: Source, column: str) -> Iterator[Row]:
    """The rows of a CSV file with a column ``block_name``. All other columns are
    milliseconds.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(source.text)))
    except csv.Error as error:
        raise source.wrong(
            f"is not valid CSV ({error}): it is corrupt, or needs another --format."
        ) from error
    header = rows[0] if rows else {}
    columns = [name for name in header if name and name != "block_name"]
    if column not in columns:
        problem = f"no column {column!r}" if column else "several columns"
        raise source.wrong(
            f"has {problem}: choose one of {', '.join(columns)} with --format proxylessnas:COLUMN."
        )
    for row in rows:
        key = row["block_name"] or ""
        yield key, source.ms(row[column], f"{column} of {key}"), UNKNOWN
