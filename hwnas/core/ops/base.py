"""The measurable unit: one block of a network with everything that determines its
latency, and nothing else.

An op is an instance of a frozen dataclass, its kind, whose ``write`` says what it
computes. In tables and files it is written as a key, for instance::

    mbconv-h56-i32-o32-m96-k5-relu-id

The kind comes first, then its fields: numbers after a letter, words as they are, flags
if they are set. ``h`` is the input height = width (``h20w40``: height 20, width 40),
``i`` and ``o`` are the input and output channels; the other fields are specific to the
kind. Fields at their defaults are
left out, so adding a field does not change old keys. ``Op.parse(op.key) == op``.

To add a kind, register one class with its fields, its checks and its program.
Everything else follows from them: counting, timing, building, weight sharing, training,
export, drawing.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self, TypeVar

from pydantic import BeforeValidator, InstanceOf, PlainSerializer

from hwnas.core.ir import Node, Program, ProgramWriter
from hwnas.core.size import Rectangle, Size, sides, size_of, strided
from hwnas.errors import SpaceError

ACTIVATIONS = ("none", "relu", "relu6", "hswish", "silu")

O = TypeVar("O", bound="type[Op]")  # noqa: E741

_KINDS: dict[str, type[Op]] = {}
_NOUNS = {"act": "activation", "se_gate": "SE gate"}


def number(letter: str, default: int | None = None) -> Any:
    """A field that a key writes as a letter and a number, such as ``k5``. Without a
    default it is required.
    """
    metadata = {"letter": letter}
    if default is None:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


def word(choices: Sequence[str], default: str) -> Any:
    """A field that a key writes as one of several words."""
    return field(default=default, metadata={"words": tuple(choices)})


def flag(name: str) -> Any:
    """A boolean field: a key contains its name if it is set."""
    return field(default=False, metadata={"flag": name})


def activation(default: str = "none") -> Any:
    """The field of a block's activation."""
    return word(ACTIVATIONS, default)


def register(kind: O) -> O:
    """Class decorator that makes a kind of op known to ``Op.parse``. Raises SpaceError
    if another class has the same name.
    """
    known = _KINDS.setdefault(kind.KIND, kind)
    if known is not kind:
        raise SpaceError(
            f"op kind {kind.KIND!r} is taken by {known.__module__}.{known.__qualname__}: choose"
            " another name."
        )
    return kind


def source_files() -> tuple[Path, ...]:
    """The source files of the registered kinds and of this module. Caches of built
    models depend on them.
    """
    files = {Path(inspect.getfile(kind)) for kind in _KINDS.values()}
    return tuple(sorted(files | {Path(__file__)}))


def kinds() -> tuple[str, ...]:
    """The names of all registered kinds."""
    return tuple(_KINDS)


@dataclass(frozen=True)
class _Field:
    """How a key writes a field: after a ``letter``, as one of several ``words``, or as
    a ``flag``. ``default`` may be MISSING.
    """

    name: str
    default: Any
    letter: str = ""
    words: tuple[str, ...] = ()
    flag: str = ""

    def part(self, value: Any) -> str:
        """The part of a key that stands for ``value``."""
        if isinstance(value, Rectangle):
            return f"{self.letter}{value.height}w{value.width}"
        if self.letter:
            return f"{self.letter}{value}"
        return self.flag or str(value)


@cache
def _fields(kind: type[Op]) -> tuple[_Field, ...]:
    """The fields of a kind, in the order of its keys."""
    return tuple(_Field(item.name, item.default, **item.metadata) for item in fields(kind))


@cache
def _required(kind: type[Op]) -> frozenset[str]:
    """The names of the fields of a kind that have no default."""
    return frozenset(item.name for item in _fields(kind) if item.default is MISSING)


class _Part(NamedTuple):
    """A part of a key that was read: the position of its field among those of the kind,
    the field's name and value, and whether a key would write it like this.
    """

    position: int
    name: str
    value: Any
    canonical: bool


@lru_cache(maxsize=2**14)
def _parsed(kind: type[Op], part: str) -> _Part | None:
    """Read one part of a key; None if it is not a field of the kind. Cached, because the
    keys of a table have few different parts.
    """
    match = re.fullmatch(r"([a-z])([0-9]+)(w[0-9]+)?", part)
    for position, item in enumerate(_fields(kind)):
        value: Any
        if match and item.letter == match[1] and (not match[3] or item.name == "size"):
            value = int(match[2])
            if match[3]:
                value = size_of(value, int(match[3][1:]))
        elif item.flag and item.flag == part:
            value = True
        elif part in item.words:
            value = part
        else:
            continue
        canonical = value != item.default and item.part(value) == part
        return _Part(position, item.name, value, canonical)
    return None


@dataclass(frozen=True)
class Op(ABC):
    """A block and its shape: input height and width, input channels, output channels.
    The module's docstring describes the key.
    """

    KIND: ClassVar[str]
    WEIGHTS: ClassVar[str] = "layers."
    """Prefix of the weights in the op's torch module, so part of the names in
    checkpoints.
    """
    WORD: ClassVar[str] = ""
    """Its name in drawings, if that is not its kind."""

    size: Size = number("h")  # noqa: RUF009 - it makes a field
    in_ch: int = number("i")
    out_ch: int = number("o")

    # Values for kinds without such a field, so that every op has these attributes.
    # Without annotations, they are not fields of the dataclass.
    kernel = 1
    stride = 1
    groups = 1
    mid_ch = 0
    se_ch = 0
    act = "none"
    residual = False

    def __post_init__(self) -> None:
        values = vars(self)
        for item in _fields(type(self)):
            value = values[item.name]
            # A default of 0 means that the block has no such part, so 0 is allowed.
            least = 0 if item.default == 0 else 1
            if item.letter and min(sides(value)) < least:
                raise SpaceError(
                    f"op {self.key} has a size, width, kernel, stride or group count below 1."
                )
            if item.words and value not in item.words:
                raise SpaceError(
                    f"{_NOUNS.get(item.name, item.name)} {value!r} is unknown; known:"
                    f" {', '.join(item.words)}."
                )
        if self.kernel % 2 == 0 and not self.even_kernel:
            raise SpaceError(
                f"op {self.key}: kernels must be odd, because they are padded by kernel // 2; only"
                " pooling may have an even kernel, equal to its stride."
            )
        # Before the groups: ``layers`` writes the program, which needs valid fields.
        self.check()
        if self.groups > 1:
            for node in self.layers:
                if node.in_ch % node.groups or node.out_ch % node.groups:
                    raise SpaceError(
                        f"op {self.key}: {self.groups} groups do not divide its channels."
                    )
        if self.residual and (self.in_ch != self.out_ch or self.stride != 1):
            raise SpaceError(f"op {self.key}: a residual needs equal input and output shapes.")

    @property
    def even_kernel(self) -> bool:
        """Whether the op may have an even kernel."""
        return False

    def check(self) -> None:  # noqa: B027 - not every kind has something to check
        """Raise SpaceError if the fields contradict each other. Messages begin with
        ``self.key``.
        """

    @abstractmethod
    def write(self, write: ProgramWriter) -> int | tuple[int, ...]:
        """Write the op's program, which reads value 0, and return its output or
        outputs.
        """

    @cached_property
    def program(self) -> Program:
        """The computation of the op."""
        return _program(self)

    @property
    def kind(self) -> str:
        """The name of its kind."""
        return self.KIND

    @cached_property
    def key(self) -> str:
        """The op's name in tables and files: ``[a-z0-9-]+``."""
        parts = [self.KIND]
        values = vars(self)  # read directly, because tables have very many keys
        for item in _fields(type(self)):
            value = values[item.name]
            # Without defaults, so that a new field does not change the keys of old tables.
            if value != item.default:
                parts.append(item.part(value))
        return "-".join(parts)

    @staticmethod
    def parse(key: str) -> Op:
        """The op of a key. Raises SpaceError if ``key`` is not an op key."""
        name, *parts = key.split("-")
        if name not in _KINDS:
            raise SpaceError(
                f"{key!r} is not an op key: op kind {name!r} is unknown; known:"
                f" {', '.join(_KINDS)}."
            )
        kind = _KINDS[name]
        values = {}
        canonical = True
        last = -1
        for part in parts:
            parsed = _parsed(kind, part)
            if parsed is None:
                raise SpaceError(f"{key!r} is not an op key: {part!r} is not a field of {name}.")
            values[parsed.name] = parsed.value
            canonical = canonical and parsed.canonical and parsed.position > last
            last = parsed.position
        missing = _required(kind).difference(values)
        if missing:
            raise SpaceError(f"{key!r} is not an op key: it lacks {', '.join(sorted(missing))}.")
        op = kind(**values)
        # Keys identify ops in tables, so every op must have exactly one spelling.
        if not canonical:
            raise SpaceError(f"{key!r} is not how this op is written; write {op.key!r}.")
        return op

    @property
    def out_size(self) -> Size:
        """Output height and width; 1 after global pooling."""
        return strided(self.size, self.stride)

    @property
    def pooled(self) -> bool:
        """Whether the op begins with global average pooling, so that its output is not
        a feature map.
        """
        return False

    @property
    def layers(self) -> tuple[Node, ...]:
        """The nodes with weights or statistics, and pooling, in execution order."""
        return self.program.layers

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image, in convolutions and fully connected
        layers.
        """
        return self.program.macs

    @property
    def params(self) -> int:
        """Trainable parameters, including BN scales and shifts."""
        return self.program.params

    @property
    def branch(self) -> Self:
        """The op without its residual connection."""
        if not self.residual:
            return self
        # In a dict, because only some kinds have the field, which mypy cannot see.
        return replace(self, **{"residual": False})

    def resized(self, in_ch: int, out_ch: int) -> Self:
        """The op's branch with other input and output channels."""
        return replace(self.branch, in_ch=in_ch, out_ch=out_ch)


@lru_cache(maxsize=2**16)
def _program(op: Op) -> Program:
    """The program of an op, cached because a search makes many equal ops."""
    write = ProgramWriter(op.in_ch, op.size)
    outputs = op.write(write)
    if not isinstance(outputs, tuple):
        outputs = (outputs,)
    return write.program(*outputs)


@lru_cache(maxsize=2**17)
def check_key(key: str) -> None:
    """Raise SpaceError if ``key`` is not an op key. Cached, because a command often reads
    several tables of one space.
    """
    Op.parse(key)


def _parse_key(value: Any) -> Any:
    return Op.parse(value) if isinstance(value, str) else value


OpKey = Annotated[
    InstanceOf[Op], BeforeValidator(_parse_key), PlainSerializer(lambda op: op.key, return_type=str)
]
"""An op as a field of a document, which stores its key."""
