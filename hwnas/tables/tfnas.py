"""TF-NAS's elastic-width tables (arXiv 2008.05314,
``latency_pkl/latency_{cpu,gpu}.pkl`` as JSON): block -> expanded channels -> ms.

``{"cpu": {"base": ms, "MBInvertedResBlock_56_24_48_24_k3_s1_relu": {"1": ms, ... "192":
ms}}, "gpu": ...}``, where the name gives input pixels, input channels,
squeeze-and-excitation channels, output channels, kernel, stride and activation. The
widths between the measured ones are the authors' fit.

- an expanded width equal to the input's has no expansion convolution there
  (``dsconv``); below it no such block is built, the values are the fit's continuation,
  some of them negative: not mapped
- ``swish`` (x * sigmoid(x)) is no activation of our ops: those blocks are not mapped
- ``base`` is the sum of stem, first block, last convolution, pooling and classifier: no
  op of ours, not mapped
"""

from __future__ import annotations

import re

from hwnas.core.ops import Op, separable
from hwnas.errors import SpaceError
from hwnas.tables.reading import Reading, Source, Timed, entries_of

_N = r"(\d{1,6})"
_BLOCK = re.compile(rf"MBInvertedResBlock_{_N}_{_N}_{_N}_{_N}_k{_N}_s{_N}_([a-z0-9-]+)")
_ACTS = {"h-swish": "hswish"}


def tfnas(source: Source, column: str) -> Reading:
    """TF-NAS's tables; ``column`` is ``cpu`` or ``gpu``."""
    content = source.json_object()
    blocks = content.get(column)
    if not isinstance(blocks, dict):
        devices = ", ".join(
            key for key, value in content.items() if isinstance(value, dict) and "base" in value
        )
        raise source.wrong(
            f"has no device {column!r}: choose --format tfnas:COLUMN from"
            f" {devices or 'none, or another --format'}."
        )
    timed: list[Timed] = []
    unmapped: dict[str, str] = {}
    for name, widths in blocks.items():
        if name == "base":
            unmapped[name] = (
                "stem, first block, last convolution and classifier in one,"
                f" {source.ms(widths, name):g} ms"
            )
        elif not isinstance(widths, dict):
            raise source.wrong(
                f"has no times by width for {name!r}: it is corrupt, or needs another --format."
            )
        else:
            _read_block(source, name, widths, timed, unmapped)
    if not timed:
        raise source.wrong("holds no block of format 'tfnas': choose another --format.")
    covers = (
        "blocks by expanded channels, measured at some and fitted between them; no stem or head"
    )
    return Reading("unknown", covers, entries_of(timed), unmapped=unmapped, column=column)


def _read_block(
    source: Source,
    name: str,
    widths: dict[str, object],
    timed: list[Timed],
    unmapped: dict[str, str],
) -> None:
    """Add a block's times at all its widths; what no op stands for goes to ``unmapped``."""
    left_out: list[str] = []
    try:
        for width, value in widths.items():
            ms = source.number(value, f"width {width} of {name}")
            op = _op(name, width)
            if op is None or ms < 0:
                left_out.append(width)
            else:
                timed.append(Timed(op, ms))
    except SpaceError as error:
        unmapped[name] = str(error)
    if left_out:
        reason = "no block is built below the input's width, and none takes less than 0 ms"
        unmapped[f"{name}, widths {', '.join(left_out)}"] = reason


def _op(name: str, width: str) -> Op | None:
    """The op of a block at a width, None below its input's. Raises SpaceError where no
    op is that block.
    """
    match = _BLOCK.fullmatch(name)
    if match is None or not re.fullmatch(_N, width):
        raise SpaceError(f"not a block and width of this format (width {width[:20]!r})")
    size, in_ch, se_ch, out_ch, kernel, stride = map(int, match.groups()[:6])
    act, mid = _ACTS.get(match[7], match[7]), int(width)
    expanded, residual = 0 if mid <= in_ch else mid, in_ch == out_ch and stride == 1
    op = separable(
        size,
        in_ch,
        out_ch,
        expanded,
        kernel=kernel,
        stride=stride,
        se_ch=se_ch,
        act=act,
        residual=residual,
    )
    return None if mid < in_ch else op
