"""Block options: the short strings that a space offers at a slot, in timm's notation.

======================  =====================================================================
``ir_k5_e6``            inverted residual: 5 x 5 depthwise, expansion 6 (relative to the input width)
``ir_k3_e4_se0.25``     the same with squeeze-and-excitation, ratio of the expanded width
``ir_k3_e1_g2``         the same with both 1 x 1 convolutions in 2 groups
``ds_k3``               depthwise-separable convolution, no expansion
``cn_k1``               plain convolution
``skip``                nothing: the slot is left out
======================  =====================================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from hwnas.core.op import Op
from hwnas.errors import SpaceError

SKIP = "skip"
_PATTERN = re.compile(r"(ir|ds|cn)_k(\d+)(?:_e(\d+(?:\.\d+)?))?(?:_se(0?\.\d+))?(?:_g(\d+))?")


@dataclass(frozen=True)
class BlockOption:
    """A parsed option. ``expansion`` is 0 for kinds that have none, ``se_ratio`` 0 where there is no SE."""

    kind: str
    kernel: int
    expansion: float = 0.0
    se_ratio: float = 0.0
    groups: int = 1

    def __str__(self) -> str:
        parts = [self.kind, f"k{self.kernel}"]
        parts += [f"e{self.expansion:g}"] if self.kind == "ir" else []
        parts += [f"se{self.se_ratio:g}"] if self.se_ratio else []
        parts += [f"g{self.groups}"] if self.groups > 1 else []
        return "_".join(parts)

    def op(self, in_ch: int, out_ch: int, size: int, stride: int, act: str, residual: bool) -> Op:
        """The op this option becomes between two widths at an input size."""
        if self.kind == "cn":
            return Op("conv", size, in_ch, out_ch, kernel=self.kernel, stride=stride, groups=self.groups, act=act)
        mid = scale_width(in_ch, self.expansion) if self.kind == "ir" else 0
        se = make_divisible((mid or in_ch) * self.se_ratio) if self.se_ratio else 0
        kind = "mbconv" if self.kind == "ir" else "dsconv"
        return Op(kind, size, in_ch, out_ch, mid, self.kernel, stride, self.groups, se, act, residual)


@cache
def parse_option(text: str) -> BlockOption | None:
    """The option of a string, None for ``skip``. Raises SpaceError where the string is neither."""
    if text == SKIP:
        return None
    match = _PATTERN.fullmatch(text)
    if not match or (match[1] == "ir") != (match[3] is not None) or (match[1] == "cn" and match[4]):
        raise SpaceError(f"{text!r} is not a block option: write for instance 'ir_k3_e6', 'ds_k3', 'cn_k1' or 'skip'.")
    option = BlockOption(match[1], int(match[2]), float(match[3] or 0), float(match[4] or 0), int(match[5] or 1))
    if str(option) != text or (option.kind == "ir" and not option.expansion):
        raise SpaceError(f"{text!r} is not how a block option is written; write {str(option)!r} with an expansion above 0.")
    return option


def scale_width(channels: int, multiplier: float, base: int = 8) -> int:
    """``max(base, floor(channels * multiplier / base + 1/2) * base)``: TuNAS's filter scaling, rounding half up."""
    return max(base, int(channels * multiplier / base + 0.5) * base)


def make_divisible(channels: float, divisor: int = 8) -> int:
    """MobileNetV3's rounding: to the nearest multiple of ``divisor``, but never below 90 % of ``channels``."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


@dataclass(frozen=True)
class Factors:
    """A slot's options taken apart: skip or not, then one independent axis per attribute that varies.

    TuNAS searches kernel, expansion and skip as separate decisions; the others see one list. ``axes`` is empty for a slot
    whose options are no full grid, which then stays one decision. ``grid[i]`` gives the axis positions of option i,
    None for skip.
    """

    axes: tuple[tuple[str, tuple[float, ...]], ...]
    grid: tuple[tuple[int, ...] | None, ...]

    @property
    def skippable(self) -> bool:
        """Whether skip is one of the options."""
        return None in self.grid

    @property
    def decisions(self) -> tuple[int, ...]:
        """Sizes of the separate decisions, skip first."""
        return ((2,) if self.skippable and len(self.grid) > 1 else ()) + tuple(len(values) for _, values in self.axes)


@cache
def factorise(options: tuple[str, ...]) -> Factors:
    """Take a slot's options apart into independent axes.

    Example:
        >>> factorise(("ir_k3_e3", "ir_k3_e6", "ir_k5_e3", "ir_k5_e6", "skip")).decisions
        (2, 2, 2)
    """
    parsed = [parse_option(text) for text in options]
    blocks = [option for option in parsed if option is not None]
    if not blocks:
        return Factors((), (None,))
    axes = []
    for name in ("kernel", "expansion", "se_ratio", "groups"):
        values = tuple(sorted({float(getattr(option, name)) for option in blocks}))
        if len(values) > 1:
            axes.append((name, values))
    cells = {tuple(values.index(float(getattr(option, name))) for name, values in axes) for option in blocks}
    full = 1
    for _, values in axes:
        full *= len(values)
    if len({option.kind for option in blocks}) > 1 or full != len(blocks) or len(cells) != len(blocks):
        order = iter(range(len(blocks)))
        return Factors(
            (("option", tuple(float(i) for i in range(len(blocks)))),),
            tuple(None if option is None else (next(order),) for option in parsed),
        )
    grid = tuple(
        None if option is None else tuple(values.index(float(getattr(option, name))) for name, values in axes) for option in parsed
    )
    return Factors(tuple(axes), grid)
