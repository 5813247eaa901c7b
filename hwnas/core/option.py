"""Block options: the short strings that a space offers at a slot, in timm's notation.

========================  ===================================================================
``ir_k5_e6``              inverted residual: 5 x 5 depthwise, expansion 6 (relative to the input width)
``ir_k3_e4_se0.25``       the same with squeeze-and-excitation, ratio of the expanded width
``ir_k3_e4_se0.25_hsig``  ... gated by a hard sigmoid (ours: timm's notation has no word for it)
``ir_k3_e1_g2``           the same with both 1 x 1 convolutions in 2 groups, channels shuffled between them (g: ours)
``ds_k3``                 depthwise-separable convolution, no expansion
``cn_k1``                 plain convolution
``hd``                    pooled head: global average pooling, 1 x 1 convolution with bias and no BN (ours)
``ds_k3_nre``             any of them with an activation of its own: ``nre`` ReLU, ``nr6`` ReLU6, ``nhs`` hard-swish;
                          ``nli`` linear, which is none (ours)
``skip``                  nothing: the slot is left out
========================  ===================================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from hwnas.core.ops import Conv, Head, Op, separable
from hwnas.errors import SpaceError

SKIP = "skip"
_ACTS = {"nre": "relu", "nr6": "relu6", "nhs": "hswish", "nli": "none"}
_PATTERN = re.compile(
    r"(?P<kind>ir|ds|cn|hd)(?:_k(?P<kernel>\d+))?(?:_e(?P<e>\d+(?:\.\d+)?))?(?:_se(?P<se>0?\.\d+))?(?:_(?P<gate>hsig))?"
    r"(?:_g(?P<groups>\d+))?(?:_(?P<act>nre|nr6|nhs|nli))?"
)
_PARTS = {"ir": {"kernel", "e", "se", "gate", "groups"}, "ds": {"kernel", "se", "gate", "groups"}, "cn": {"kernel", "groups"}, "hd": set()}
"""What each kind may be made of, beside an activation."""


@dataclass(frozen=True)
class BlockOption:
    """A parsed option. ``expansion`` is 0 for kinds that have none, ``se_ratio`` 0 where there is no SE, ``act`` None for the stage's."""

    kind: str
    kernel: int = 1
    expansion: float = 0.0
    se_ratio: float = 0.0
    groups: int = 1
    se_gate: str = "sigmoid"
    act: str | None = None

    def __str__(self) -> str:
        parts = [self.kind]
        parts += [f"k{self.kernel}"] if self.kind != "hd" else []
        parts += [f"e{self.expansion:g}"] if self.kind == "ir" else []
        parts += [f"se{self.se_ratio:g}"] if self.se_ratio else []
        parts += [self.se_gate] if self.se_gate != "sigmoid" else []
        parts += [f"g{self.groups}"] if self.groups > 1 else []
        parts += [name for name, act in _ACTS.items() if act == self.act]
        return "_".join(parts)

    def op(self, in_ch: int, out_ch: int, size: int, stride: int, act: str, residual: bool) -> Op:
        """The op this option becomes between two widths at an input size, in a stage with activation ``act``."""
        act = self.act or act
        if self.kind == "cn":
            return Conv(size, in_ch, out_ch, kernel=self.kernel, stride=stride, groups=self.groups, act=act)
        if self.kind == "hd":
            return Head(size, in_ch, out_ch, act=act)
        mid = scale_width(in_ch, self.expansion) if self.kind == "ir" else 0
        se = make_divisible((mid or in_ch) * self.se_ratio) if self.se_ratio else 0
        shape = {"kernel": self.kernel, "stride": stride, "groups": self.groups}
        return separable(size, in_ch, out_ch, mid, **shape, se_ch=se, se_gate=self.se_gate, act=act, residual=residual)


@cache
def parse_option(text: str) -> BlockOption | None:
    """The option of a string, None for ``skip``. Raises SpaceError where the string is neither."""
    if text == SKIP:
        return None
    match = _PATTERN.fullmatch(text)
    given = {name: value for name, value in match.groupdict().items() if value is not None} if match else {}
    kind, act = given.pop("kind", ""), given.pop("act", "")
    required = _PARTS.get(kind, set()) & {"kernel", "e"}
    if not match or not required <= given.keys() <= _PARTS[kind] or ("gate" in given and "se" not in given):
        raise SpaceError(f"{text!r} is not a block option: write for instance 'ir_k3_e6', 'ds_k3', 'cn_k1' or 'skip'.")
    option = BlockOption(
        kind,
        int(given.get("kernel", 1)),
        float(given.get("e", 0)),
        float(given.get("se", 0)),
        int(given.get("groups", 1)),
        given.get("gate", "sigmoid"),
        _ACTS.get(act),
    )
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
