"""Block options: the short strings that a space offers at a slot, in timm's notation.

Parts that timm's notation lacks are marked "(ours)".

========================  ==============================================================
``ir_k5_e6``              inverted residual: 5 x 5 depthwise, expansion 6 (relative to
                          the input width)
``ir_k3_e4_se0.25``       with squeeze-and-excitation, relative to the expanded width
``ir_k3_e4_se0.25_hsig``  with squeeze-and-excitation gated by a hard sigmoid
                          (``hsig``: ours)
``ir_k3_e1_g2``           with both 1 x 1 convolutions in 2 groups and a channel shuffle
                          between them (``g``: ours)
``ds_k3``                 depthwise-separable convolution, no expansion
``ir_k3_e4_eca3``         with channel attention of kernel 3 after the projection
                          (``eca3``: ours)
``er_k3_e4``              fused inverted residual: the expansion is a 3 x 3 convolution
                          (EfficientNetV2, MobileNetV4)
``uir_a3_k5_e4``          universal inverted residual: depthwise 3 x 3 before the
                          expansion and 5 x 5 after it; a kernel of 0 leaves the
                          convolution out
``cn_k1``                 plain convolution; ``cn_k3_skip`` adds its input if the shapes
                          are equal
``hd``                    pooled head (ours): global average pooling, then a 1 x 1
                          convolution with bias and without BN; ``hd_bn`` has BN
``ds_k3_nre``             any block with an activation of its own: ``nre`` ReLU, ``nr6``
                          ReLU6, ``nhs`` hard-swish, ``nsw`` SiLU, ``nli`` none (linear;
                          ours)
``skip``                  the slot is left out
========================  ==============================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from hwnas.core.ops import UIB, Conv, Fused, Head, Op, separable
from hwnas.core.size import Size
from hwnas.errors import SpaceError

SKIP = "skip"
# "nli" is ours; timm has the others.
_ACTS = {"nre": "relu", "nr6": "relu6", "nhs": "hswish", "nsw": "silu", "nli": "none"}
_NUMBER = r"\d+"
_PARTS: tuple[tuple[str, str, str], ...] = (
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
"""The parts of an option in the order in which they are written: the field of
``BlockOption``, its text with {} for the value, and a regular expression of the value.
"""


@dataclass(frozen=True)
class BlockOption:
    """A parsed option; see the module for the notation.

    ``start`` is the kernel of the depthwise convolution before the expansion and
    ``eca`` that of channel attention. ``expansion``, ``se_ratio``, ``start`` and
    ``eca`` are 0 if the block has no such part. ``act`` is None if the block uses the
    activation of its stage. ``norm`` tells whether a pooled head has BN, ``skip``
    whether a plain convolution adds its input.
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
        kind = _KINDS[self.kind]
        parts = [self.kind]
        for field, text, _ in _PARTS:
            value = getattr(self, field)
            differs = value != _DEFAULTS[field]
            if field in kind.needs or (field in kind.may and differs):
                parts.append(text.format(_text(field, value)))
        return "_".join(parts)

    @property
    def adds_input(self) -> bool:
        """Whether the block adds its input to its output if their shapes are equal and
        the stage asks for it.
        """
        return _KINDS[self.kind].residual

    def op(self, in_ch: int, out_ch: int, size: Size, stride: int, act: str, residual: bool) -> Op:
        """The op that this option stands for, from ``in_ch`` to ``out_ch`` channels at
        an input height = width of ``size``. ``act`` and ``residual`` are those of the
        stage.
        """
        same_shape = in_ch == out_ch and stride == 1
        residual = residual or (self.skip and same_shape)
        slot = _SlotShape(size, in_ch, out_ch, stride, self.act or act, residual)
        return _KINDS[self.kind].make(self, slot)


@dataclass(frozen=True)
class _SlotShape:
    """The properties of an op that come from its slot rather than its option."""

    size: Size
    in_ch: int
    out_ch: int
    stride: int
    act: str
    residual: bool

    @property
    def shape(self) -> tuple[Size, int, int]:
        """The first fields of every op."""
        return self.size, self.in_ch, self.out_ch


@dataclass(frozen=True)
class _Kind:
    """A kind of option: the fields that it ``needs`` and ``may`` have, and the function
    ``make`` that makes its op. For ``residual`` see ``BlockOption.adds_input``.
    """

    make: Callable[[BlockOption, _SlotShape], Op]
    needs: frozenset[str]
    may: frozenset[str] = frozenset()
    residual: bool = True


def _conv(option: BlockOption, slot: _SlotShape) -> Op:
    return Conv(*slot.shape, option.kernel, slot.stride, option.groups, slot.act, slot.residual)


def _head(option: BlockOption, slot: _SlotShape) -> Op:
    return Head(*slot.shape, norm=option.norm, act=slot.act)


def _separable(option: BlockOption, slot: _SlotShape) -> Op:
    mid = 0  # no expansion convolution
    if option.expansion:
        mid = scale_width(slot.in_ch, option.expansion)
    # SE works on the width of the depthwise convolution
    return separable(
        *slot.shape,
        mid,
        kernel=option.kernel,
        stride=slot.stride,
        groups=option.groups,
        eca=option.eca,
        act=slot.act,
        residual=slot.residual,
        **_se_fields(option, mid or slot.in_ch),
    )


def _fused(option: BlockOption, slot: _SlotShape) -> Op:
    mid = scale_width(slot.in_ch, option.expansion)
    return Fused(
        *slot.shape,
        mid,
        option.kernel,
        slot.stride,
        **_se_fields(option, mid),
        act=slot.act,
        residual=slot.residual,
    )


def _universal(option: BlockOption, slot: _SlotShape) -> Op:
    mid = scale_width(slot.in_ch, option.expansion)
    return UIB(*slot.shape, mid, option.start, option.kernel, slot.stride, slot.act, slot.residual)


def _se_fields(option: BlockOption, mid: int) -> dict[str, Any]:
    """The op fields of squeeze-and-excitation on ``mid`` channels."""
    se_ch = 0
    if option.se_ratio:
        se_ch = make_divisible(mid * option.se_ratio)
    return {"se_ch": se_ch, "se_gate": option.se_gate}


_SE_PARTS = frozenset({"se_ratio", "se_gate"})
_KINDS: dict[str, _Kind] = {
    "ir": _Kind(
        _separable, frozenset({"kernel", "expansion"}), _SE_PARTS | {"eca", "groups", "act"}
    ),
    "ds": _Kind(_separable, frozenset({"kernel"}), _SE_PARTS | {"eca", "groups", "act"}),
    "er": _Kind(_fused, frozenset({"kernel", "expansion"}), _SE_PARTS | {"act"}),
    "uir": _Kind(_universal, frozenset({"start", "kernel", "expansion"}), frozenset({"act"})),
    "cn": _Kind(_conv, frozenset({"kernel"}), frozenset({"groups", "skip", "act"}), residual=False),
    "hd": _Kind(_head, frozenset(), frozenset({"norm", "act"}), residual=False),
}
"""The kinds of options. To add a block, write an op and an entry here."""
_DEFAULTS = {field.name: field.default for field in fields(BlockOption)}


def _option_pattern() -> re.Pattern[str]:
    """A regular expression for options: a kind, then the parts, all optional."""
    pattern = "(?P<kind>[a-z]+)"
    for field, text, value in _PARTS:
        part = text.format(f"(?P<{field}>{value})")
        pattern += f"(?:_{part})?"
    return re.compile(pattern)


_OPTION = _option_pattern()


def _text(field: str, value: Any) -> str:
    """The value of a field as options write it."""
    if field == "act":
        return next(name for name, act in _ACTS.items() if act == value)
    if field == "norm":
        return "bn"
    if field == "skip":
        return "skip"
    if isinstance(value, float):
        return f"{value:g}"  # "6", not "6.0"
    return str(value)


def _value(field: str, text: str) -> Any:
    """The value of a field from its text in an option."""
    if field == "act":
        return _ACTS[text]
    if field in ("norm", "skip"):
        return True
    if field == "se_gate":
        return text
    if field in ("expansion", "se_ratio"):
        return float(text)
    return int(text)


@cache
def parse_option(text: str) -> BlockOption | None:
    """Parse an option; None for ``skip``. Raises SpaceError if ``text`` is not an
    option.
    """
    if text == SKIP:
        return None

    match = _OPTION.fullmatch(text)
    kind = None if match is None else _KINDS.get(match["kind"])
    texts: dict[str, str] = {}
    if match is not None:
        for field, _, _ in _PARTS:
            if match[field] is not None:
                texts[field] = match[field]
    gate_without_se = "se_gate" in texts and "se_ratio" not in texts
    if (
        match is None
        or kind is None
        or not kind.needs <= texts.keys() <= kind.needs | kind.may
        or gate_without_se
    ):
        raise SpaceError(
            f"{text!r} is not a block option: write for instance 'ir_k3_e6', 'ds_k3',"
            " 'uir_a3_k5_e4', 'cn_k1' or 'skip'."
        )

    values = {field: _value(field, part) for field, part in texts.items()}
    option = BlockOption(match["kind"], **values)
    # Options are compared as text, so a block may have only one spelling: e6, not e6.0.
    if str(option) != text or ("expansion" in kind.needs and not option.expansion):
        raise SpaceError(
            f"{text!r} is not the canonical spelling of a block option; write {str(option)!r}"
            " with an expansion above 0."
        )
    return option


def scale_width(channels: int, multiplier: float, base: int = 8) -> int:
    """TuNAS's filter scaling: ``channels * multiplier`` rounded to the nearest multiple
    of ``base`` (half up), and at least ``base``.
    """
    return max(base, int(channels * multiplier / base + 0.5) * base)


def make_divisible(channels: float, divisor: int = 8) -> int:
    """MobileNetV3's rounding: to the nearest multiple of ``divisor``, at least
    ``divisor`` and at least 90 % of ``channels``.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    if rounded < 0.9 * channels:
        rounded += divisor
    return rounded


@dataclass(frozen=True)
class Factors:
    """The options of a slot as separate decisions: skip or not, then one independent
    axis for every attribute that varies.

    TuNAS searches kernel, expansion and skip as separate decisions; other strategies
    see one list of options. If the options do not form a full grid, they stay one
    decision: a single axis ``"option"``. ``axes`` has the name and the values of
    every axis; ``grid[i]`` gives the position of option i on every axis, None for skip.
    """

    axes: tuple[tuple[str, tuple[float, ...]], ...]
    grid: tuple[tuple[int, ...] | None, ...]

    @property
    def skippable(self) -> bool:
        """Whether skip is one of the options."""
        return None in self.grid

    @property
    def decisions(self) -> tuple[int, ...]:
        """The number of options of every separate decision, skip first."""
        sizes = [len(values) for _, values in self.axes]
        if self.skippable and len(self.grid) > 1:
            sizes.insert(0, 2)
        return tuple(sizes)


@cache
def factorise(options: tuple[str, ...]) -> Factors:
    """Split the options of a slot into independent axes.

    Example:
        >>> options = ("ir_k3_e3", "ir_k3_e6", "ir_k5_e3", "ir_k5_e6", "skip")
        >>> factorise(options).decisions
        (2, 2, 2)
    """
    parsed = [parse_option(text) for text in options]
    blocks = [option for option in parsed if option is not None]
    if not blocks:
        return Factors((), (None,))

    axes: list[tuple[str, tuple[float, ...]]] = []
    for name in ("start", "kernel", "expansion", "se_ratio", "groups"):
        values = tuple(sorted({float(getattr(option, name)) for option in blocks}))
        if len(values) > 1:
            axes.append((name, values))

    positions = []
    for option in blocks:
        position = []
        for name, values in axes:
            position.append(values.index(float(getattr(option, name))))
        positions.append(tuple(position))
    # A full grid has one option in every cell. Options that differ in something else,
    # for instance the activation, share a cell.
    one_kind = len({option.kind for option in blocks}) == 1
    distinct = len(set(positions)) == len(blocks)
    full = math.prod(len(values) for _, values in axes) == len(blocks)
    if not (one_kind and distinct and full):
        numbers = range(len(blocks))
        axes = [("option", tuple(map(float, numbers)))]
        positions = [(number,) for number in numbers]

    # ``positions`` are those of the blocks in order; put None where the options skip
    of_blocks = iter(positions)
    grid: list[tuple[int, ...] | None] = []
    for parsed_option in parsed:
        grid.append(next(of_blocks) if parsed_option is not None else None)
    return Factors(tuple(axes), tuple(grid))
