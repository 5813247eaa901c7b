"""TF-NAS's elastic-width tables (arXiv 2008.05314,
``latency_pkl/latency_{cpu,gpu}.pkl`` as JSON): block -> expanded channels -> ms.

``{"cpu": {"base": ms, "MBInvertedResBlock_56_24_48_24_k3_s1_relu": {"1": ms, ... "192":
ms}}, "gpu": ...}``, where the name gives input pixels, input channels,
squeeze-and-excitation channels, output channels, kernel, stride and activation. Only
some widths were measured; the others are the authors' interpolation.

- If the expanded width equals the input's, TF-NAS builds no expansion convolution
  (``dsconv``). It builds no block with a smaller width: those values are extrapolated,
  some of them negative, and are not mapped.
- ``swish`` (x * sigmoid(x)) is not among the activations of our ops, so those blocks are
  not mapped.
- ``base`` is the sum of stem, first block, last convolution, pooling and classifier. It
  does not correspond to one op, so it is not mapped.
"""

from __future__ import annotations

import re

from hwnas.core.ops import Op, separable
from hwnas.errors import SpaceError
from hwnas.tables.reading import Reading, Source, TimedOp, entries_of

_N = r"(\d{1,6})"
_BLOCK = re.compile(rf"MBInvertedResBlock_{_N}_{_N}_{_N}_{_N}_k{_N}_s{_N}_([a-z0-9-]+)")
_ACTS = {"h-swish": "hswish"}


def tfnas(source: Source, column: str) -> Reading:
    """TF-NAS's tables; ``column`` is ``cpu`` or ``gpu``."""
    content = source.json_object()
    blocks = content.get(column)
    if not isinstance(blocks, dict):
        devices = []
        for key, value in content.items():
            if isinstance(value, dict) and "base" in value:
                devices.append(key)
        raise source.wrong(
            f"has no device {column!r}: choose --format tfnas:COLUMN from"
            f" {', '.join(devices) or 'none, or another --format'}."
        )
    timed: list[TimedOp] = []
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
        raise source.wrong("contains no block of format 'tfnas': choose another --format.")
    covers = (
        "blocks by expanded channels, measured at some and fitted between them; no stem or head"
    )
    return Reading("unknown", covers, entries_of(timed), unmapped=unmapped, column=column)


def _read_block(
    source: Source,
    name: str,
    widths: dict[str, object],
    timed: list[TimedOp],
    unmapped: dict[str, str],
) -> None:
    """Add a block's times at all its widths to ``timed``. Names and widths without an op
    go to ``unmapped``.
    """
    left_out: list[str] = []
    try:
        for width, value in widths.items():
            ms = source.number(value, f"width {width} of {name}")
            op = _op(name, width)
            if op is None or ms < 0:
                left_out.append(width)
            else:
                timed.append(TimedOp(op, ms))
    except SpaceError as error:
        unmapped[name] = str(error)
    if left_out:
        reason = "no block is built below the input's width, and none takes less than 0 ms"
        unmapped[f"{name}, widths {', '.join(left_out)}"] = reason


def _op(name: str, width: str) -> Op | None:
    """The op of a block at an expanded width, or None if the width is below the input's.
    Raises SpaceError if our ops cannot express the block.
    """
    match = _BLOCK.fullmatch(name)
    if match is None or not re.fullmatch(_N, width):
        raise SpaceError(f"not a block and width of this format (width {width[:20]!r})")
    size, in_ch, se_ch, out_ch, kernel, stride = map(int, match.groups()[:6])
    mid_ch = int(width)
    # Built even if it is not returned, so that a block that cannot be expressed raises
    # its error whatever its first width is.
    op = separable(
        size,
        in_ch,
        out_ch,
        0 if mid_ch <= in_ch else mid_ch,
        kernel=kernel,
        stride=stride,
        se_ch=se_ch,
        act=_ACTS.get(match[7], match[7]),
        residual=in_ch == out_ch and stride == 1,
    )
    if mid_ch < in_ch:
        return None
    return op
