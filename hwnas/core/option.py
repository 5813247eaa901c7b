"""Block options: the short strings that a space offers at a slot, in timm's notation.

========================  ===================================================================
``ir_k5_e6``              inverted residual: 5 x 5 depthwise, expansion 6 (relative to the input width)
``ir_k3_e4_se0.25``       the same with squeeze-and-excitation, ratio of the expanded width
``ir_k3_e4_se0.25_hsig``  ... gated by a hard sigmoid (ours: timm's notation has no word for it)
``ir_k3_e1_g2``           the same with both 1 x 1 convolutions in 2 groups, channels shuffled between them (g: ours)
``ds_k3``                 depthwise-separable convolution, no expansion
``ir_k3_e4_eca3``         ... with channel attention of kernel 3 behind the projection (eca and a number: ours)
``er_k3_e4``              fused inverted residual: the expansion is a 3 x 3 convolution (EfficientNetV2, MobileNetV4)
``uir_a3_k5_e4``          universal inverted residual: depthwise 3 x 3 before the expansion, 5 x 5 behind it; 0 leaves one out
``cn_k1``                 plain convolution; ``cn_k3_skip`` adds its input where the shapes are equal
``hd``                    pooled head: global average pooling, 1 x 1 convolution with bias and no BN (ours); ``hd_bn``: with BN
``ds_k3_nre``             any of them with an activation of its own: ``nre`` ReLU, ``nr6`` ReLU6, ``nhs`` hard-swish,
                          ``nsw`` SiLU; ``nli`` linear, which is none (ours)
``skip``                  nothing: the slot is left out
========================  ===================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from hwnas.core.ops import UIB, Conv, Fused, Head, Op, separable
from hwnas.errors import SpaceError

SKIP = "skip"
_ACTS = {"nre": "relu", "nr6": "relu6", "nhs": "hswish", "nsw": "silu", "nli": "none"}
_NUMBER = r"\d+"
_PARTS: tuple[tuple[str, str, str], ...] = (
    # field, pattern of its text in an option, with {} for the value; the order is that of the text
    ("start", "a{}", _NUMBER),
    ("kernel", "k{}", _NUMBER),
    ("expansion", "e{}", r"\d+(?:\.\d+)?"),
    ("se_ratio", "se{}", r"0?\.\d+"),
    ("se_gate", "{}", "hsig"),
    ("eca", "eca{}", _NUMBER),
    ("groups", "g{}", _NUMBER),
    ("norm", "{}", "bn"),
    ("skip", "{}", "skip"),
    ("act", "{}", "|".join(_ACTS)),
)


@dataclass(frozen=True)
class BlockOption:
    """A parsed option. ``expansion`` is 0 for kinds that have none, ``se_ratio`` 0
    where there is no SE, ``act`` None for the stage's.

    ``start`` is the kernel of a convolution before the expansion, ``eca`` that of
    channel attention, 0 where there is none.
    """

    kind: str
    kernel: int = 1
    expansion: float = 0.0
    se_ratio: float = 0.0
    groups: int = 1
    se_gate: str = "sigmoid"
    act: str | None = None
    start: int = 0
    eca: int = 0
    norm: bool = False
    skip: bool = False

    def __str__(self) -> str:
        found, parts = _KINDS[self.kind], [self.kind]
        for field, text, _ in _PARTS:
            value = getattr(self, field)
            if field in found.needs or (field in found.may and value != _DEFAULTS[field]):
                parts.append(text.format(_text(field, value)))
        return "_".join(parts)

    @property
    def adds_input(self) -> bool:
        """Whether the block adds its input to its output where their shapes are equal
        and the stage has it so.
        """
        return _KINDS[self.kind].residual

    def op(self, in_ch: int, out_ch: int, size: int, stride: int, act: str, residual: bool) -> Op:
        """The op this option becomes between two widths at an input size, in a stage
        with activation ``act``.
        """
        residual = residual or (self.skip and in_ch == out_ch and stride == 1)
        return _KINDS[self.kind].make(
            self, _Place(size, in_ch, out_ch, stride, self.act or act, residual)
        )


@dataclass(frozen=True)
class _Place:
    """Where an option is put: what its op takes from the slot."""

    size: int
    in_ch: int
    out_ch: int
    stride: int
    act: str
    residual: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """The first fields of every op."""
        return self.size, self.in_ch, self.out_ch


@dataclass(frozen=True)
class _Kind:
    """A kind of option: the parts it ``needs``, those it ``may`` have, and the op that it makes."""

    make: Callable[[BlockOption, _Place], Op]
    needs: frozenset[str]
    may: frozenset[str] = frozenset()
    residual: bool = True


def _conv(option: BlockOption, at: _Place) -> Op:
    return Conv(*at.shape, option.kernel, at.stride, option.groups, at.act, at.residual)


def _head(option: BlockOption, at: _Place) -> Op:
    return Head(*at.shape, norm=option.norm, act=at.act)


def _separable(option: BlockOption, at: _Place) -> Op:
    mid = scale_width(at.in_ch, option.expansion) if option.expansion else 0
    return separable(
        *at.shape,
        mid,
        kernel=option.kernel,
        stride=at.stride,
        groups=option.groups,
        eca=option.eca,
        act=at.act,
        residual=at.residual,
        **_squeezed(option, mid or at.in_ch),
    )


def _fused(option: BlockOption, at: _Place) -> Op:
    mid = scale_width(at.in_ch, option.expansion)
    return Fused(
        *at.shape,
        mid,
        option.kernel,
        at.stride,
        **_squeezed(option, mid),
        act=at.act,
        residual=at.residual,
    )


def _universal(option: BlockOption, at: _Place) -> Op:
    mid = scale_width(at.in_ch, option.expansion)
    return UIB(*at.shape, mid, option.start, option.kernel, at.stride, at.act, at.residual)


def _squeezed(option: BlockOption, mid: int) -> dict[str, Any]:
    """The fields of squeeze-and-excitation of ``mid`` channels."""
    return {
        "se_ch": make_divisible(mid * option.se_ratio) if option.se_ratio else 0,
        "se_gate": option.se_gate,
    }


_SQUEEZED = frozenset({"se_ratio", "se_gate"})
_KINDS: dict[str, _Kind] = {
    "ir": _Kind(
        _separable, frozenset({"kernel", "expansion"}), _SQUEEZED | {"eca", "groups", "act"}
    ),
    "ds": _Kind(_separable, frozenset({"kernel"}), _SQUEEZED | {"eca", "groups", "act"}),
    "er": _Kind(_fused, frozenset({"kernel", "expansion"}), _SQUEEZED | {"act"}),
    "uir": _Kind(_universal, frozenset({"start", "kernel", "expansion"}), frozenset({"act"})),
    "cn": _Kind(_conv, frozenset({"kernel"}), frozenset({"groups", "skip", "act"}), residual=False),
    "hd": _Kind(_head, frozenset(), frozenset({"norm", "act"}), residual=False),
}
"""Kinds of options. A new block is an entry here and an op."""
_DEFAULTS = {field.name: field.default for field in fields(BlockOption)}
_PATTERN = re.compile(
    "(?P<kind>[a-z]+)"
    + "".join(f"(?:_{text.format(f'(?P<{name}>{value})')})?" for name, text, value in _PARTS)
)


def _text(field: str, value: Any) -> str:
    """A value as options write it."""
    if field == "act":
        return next(name for name, act in _ACTS.items() if act == value)
    if field in ("norm", "skip"):
        return {"norm": "bn", "skip": "skip"}[field]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _value(field: str, text: str) -> Any:
    """What a text says of a field."""
    if field == "act":
        return _ACTS[text]
    if field in ("norm", "skip"):
        return True
    if field == "se_gate":
        return text
    return float(text) if field in ("expansion", "se_ratio") else int(text)


@cache
def parse_option(text: str) -> BlockOption | None:
    """The option of a string, None for ``skip``. Raises SpaceError where the string is neither."""
    if text == SKIP:
        return None
    match = _PATTERN.fullmatch(text)
    given = (
        {name: value for name, value in match.groupdict().items() if value is not None}
        if match
        else {}
    )
    kind = _KINDS.get(given.pop("kind", ""))
    gated = "se_gate" not in given or "se_ratio" in given
    if (
        match is None
        or kind is None
        or not kind.needs <= given.keys() <= kind.needs | kind.may
        or not gated
    ):
        raise SpaceError(
            f"{text!r} is not a block option: write for instance 'ir_k3_e6', 'ds_k3',"
            " 'uir_a3_k5_e4', 'cn_k1' or 'skip'."
        )
    option = BlockOption(
        match["kind"], **{name: _value(name, value) for name, value in given.items()}
    )
    if str(option) != text or ("expansion" in kind.needs and not option.expansion):
        raise SpaceError(
            f"{text!r} is not how a block option is written; write {str(option)!r} with an"
            " expansion above 0."
        )
    return option


def scale_width(channels: int, multiplier: float, base: int = 8) -> int:
    """``max(base, floor(channels * multiplier / base + 1/2) * base)``: TuNAS's filter
    scaling, rounding half up.
    """
    return max(base, int(channels * multiplier / base + 0.5) * base)


def make_divisible(channels: float, divisor: int = 8) -> int:
    """MobileNetV3's rounding: to the nearest multiple of ``divisor``, but never below
    90 % of ``channels``.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


@dataclass(frozen=True)
class Factors:
    """A slot's options taken apart: skip or not, then one independent axis per
    attribute that varies.

    TuNAS searches kernel, expansion and skip as separate decisions; the others see one
    list. ``axes`` is empty for a slot whose options are no full grid, which then stays
    one decision. ``grid[i]`` gives the axis positions of option i, None for skip.
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
        return ((2,) if self.skippable and len(self.grid) > 1 else ()) + tuple(
            len(values) for _, values in self.axes
        )


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
    for name in ("start", "kernel", "expansion", "se_ratio", "groups"):
        values = tuple(sorted({float(getattr(option, name)) for option in blocks}))
        if len(values) > 1:
            axes.append((name, values))
    cells = {
        tuple(values.index(float(getattr(option, name))) for name, values in axes)
        for option in blocks
    }
    full = 1
    for _, values in axes:
        full *= len(values)
    if (
        len({option.kind for option in blocks}) > 1
        or full != len(blocks)
        or len(cells) != len(blocks)
    ):
        order = iter(range(len(blocks)))
        return Factors(
            (("option", tuple(float(i) for i in range(len(blocks)))),),
            tuple(None if option is None else (next(order),) for option in parsed),
        )
    grid = tuple(
        (
            None
            if option is None
            else tuple(values.index(float(getattr(option, name))) for name, values in axes)
        )
        for option in parsed
    )
    return Factors(tuple(axes), grid)
