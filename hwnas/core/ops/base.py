"""The measurable unit: one block of a network with everything that decides its latency,
and nothing else.

An op is a frozen dataclass of its kind, which says what it computes (``write``), and is
written as a key, for instance::

    mbconv-h56-i32-o32-m96-k5-relu-id

kind, then its fields: numbers by their letters, words as they are, flags where they are
set. ``h`` is the input height = width, ``i`` and ``o`` are input and output channels,
and the other fields are the kind's own. Fields at their defaults are left out, so a
field added later leaves old keys as they are. ``Op.parse(op.key) == op``.

A new kind is one registered class with its fields, its checks and its program.
Everything else follows: counting, timing, building, sharing weights, training, files,
drawing.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BeforeValidator, InstanceOf, PlainSerializer

from hwnas.core.ir import Node, Program, ProgramWriter, out_size
from hwnas.errors import SpaceError

ACTIVATIONS = ("none", "relu", "relu6", "hswish", "silu")

O = TypeVar("O", bound="type[Op]")  # noqa: E741

_KINDS: dict[str, type[Op]] = {}
_NOUNS = {"act": "activation", "se_gate": "SE gate"}


def number(letter: str, default: int | None = None) -> Any:
    """A field that a key writes as a letter and a number, such as ``k5``. Without a
    default it must be given.
    """
    return (
        field(metadata={"letter": letter})
        if default is None
        else field(default=default, metadata={"letter": letter})
    )


def word(choices: Sequence[str], default: str) -> Any:
    """A field that a key writes as one of several words."""
    return field(default=default, metadata={"words": tuple(choices)})


def flag(name: str) -> Any:
    """A field that a key names where it is set."""
    return field(default=False, metadata={"flag": name})


def activation(default: str = "none") -> Any:
    """The field of a block's activation."""
    return word(ACTIVATIONS, default)


def register(kind: O) -> O:
    """Make a kind of op known by its name, for ``Op.parse``. Raises SpaceError where
    another class has that name.
    """
    known = _KINDS.setdefault(kind.KIND, kind)
    if known is not kind:
        raise SpaceError(
            f"op kind {kind.KIND!r} is taken by {known.__module__}.{known.__qualname__}: choose"
            " another name."
        )
    return kind


def source_files() -> tuple[Path, ...]:
    """Where the registered kinds are written, and what all have in common."""
    return tuple(
        sorted({Path(__file__), *(Path(inspect.getfile(kind)) for kind in _KINDS.values())})
    )


def kinds() -> tuple[str, ...]:
    """The names of all registered kinds."""
    return tuple(_KINDS)


@dataclass(frozen=True)
class _Written:
    """How a key writes a field: by a ``letter``, as one of several ``words``, or as a
    ``flag``. ``default`` may be MISSING.
    """

    name: str
    default: Any
    letter: str = ""
    words: tuple[str, ...] = ()
    flag: str = ""

    def part(self, value: Any) -> str:
        """The part of a key that says ``value``."""
        return f"{self.letter}{value}" if self.letter else self.flag or str(value)


@cache
def _written(kind: type[Op]) -> tuple[_Written, ...]:
    """The fields of a kind, in the order of its keys."""
    return tuple(_Written(each.name, each.default, **each.metadata) for each in fields(kind))


@dataclass(frozen=True)
class Op(ABC):
    """A block and its shape: input height = width, input channels, output channels. See
    the module for the key.
    """

    KIND: ClassVar[str]
    WEIGHTS: ClassVar[str] = "layers."
    """Where a module of the op keeps the weights of its nodes; part of the names in checkpoints."""
    WORD: ClassVar[str] = ""
    """What a drawing calls it, where that is not its kind."""

    size: int = number("h")
    in_ch: int = number("i")
    out_ch: int = number("o")

    # What an op is that has no such field.
    kernel = 1
    stride = 1
    groups = 1
    mid_ch = 0
    se_ch = 0
    act = "none"
    residual = False

    def __post_init__(self) -> None:
        for each in _written(type(self)):
            value = getattr(self, each.name)
            if each.letter and value < (0 if each.default == 0 else 1):
                raise SpaceError(
                    f"op {self.key} has a size, width, kernel, stride or group count below 1."
                )
            if each.words and value not in each.words:
                raise SpaceError(
                    f"{_NOUNS.get(each.name, each.name)} {value!r} is unknown; known:"
                    f" {', '.join(each.words)}."
                )
        if self.kernel % 2 == 0 and not self.even_kernel:
            raise SpaceError(
                f"op {self.key}: kernels are odd here, padded by kernel // 2; those of pooling may"
                " be as large as its stride."
            )
        self.check()
        if self.groups > 1 and any(
            node.in_ch % node.groups or node.out_ch % node.groups for node in self.layers
        ):
            raise SpaceError(f"op {self.key}: {self.groups} groups do not divide its channels.")
        if self.residual and (self.in_ch != self.out_ch or self.stride != 1):
            raise SpaceError(f"op {self.key}: a residual needs equal input and output shapes.")

    @property
    def even_kernel(self) -> bool:
        """Whether the op may have an even kernel."""
        return False

    def check(self) -> None:  # noqa: B027 - not every kind has something to check
        """Raise SpaceError where the fields do not fit each other. A kind says what is
        wrong by ``self.key``.
        """

    @abstractmethod
    def write(self, write: ProgramWriter) -> int | tuple[int, ...]:
        """Write what the op computes from value 0, and return its output, or its outputs."""

    @cached_property
    def program(self) -> Program:
        """What the op computes."""
        return _program(self)

    @property
    def kind(self) -> str:
        """The name of its kind."""
        return self.KIND

    @cached_property
    def key(self) -> str:
        """The op's name in tables and files: ``[a-z0-9-]+``."""
        values = ((each, getattr(self, each.name)) for each in _written(type(self)))
        return "-".join(
            [self.KIND, *(each.part(value) for each, value in values if value != each.default)]
        )

    @staticmethod
    def parse(key: str) -> Op:
        """The op of a key. Raises SpaceError where the key is not one."""
        name, *parts = key.split("-")
        if name not in _KINDS:
            raise SpaceError(
                f"{key!r} is not an op key: op kind {name!r} is unknown; known:"
                f" {', '.join(_KINDS)}."
            )
        kind = _KINDS[name]
        values = dict(kind._parsed(key, part) for part in parts)
        missing = [
            each.name
            for each in _written(kind)
            if each.default is MISSING and each.name not in values
        ]
        if missing:
            raise SpaceError(f"{key!r} is not an op key: it lacks {', '.join(sorted(missing))}.")
        op = kind(**values)
        if op.key != key:
            raise SpaceError(f"{key!r} is not how this op is written; write {op.key!r}.")
        return op

    @classmethod
    def _parsed(cls, key: str, part: str) -> tuple[str, Any]:
        """The field that a part of a key is, and its value."""
        match = re.fullmatch(r"([a-z])([0-9]+)", part)
        for each in _written(cls):
            if match and each.letter == match[1]:
                return each.name, int(match[2])
            if each.flag == part:
                return each.name, True
            if part in each.words:
                return each.name, part
        raise SpaceError(f"{key!r} is not an op key: {part!r} is not a field of {cls.KIND}.")

    @property
    def out_size(self) -> int:
        """Output height = width; 1 after global pooling."""
        return out_size(self.size, self.stride)

    @property
    def pooled(self) -> bool:
        """Whether the op begins with global average pooling, and so leaves no feature map."""
        return False

    @property
    def layers(self) -> tuple[Node, ...]:
        """The nodes with weights or statistics, and pooling, in the order they run."""
        return self.program.layers

    @property
    def macs(self) -> int:
        """Multiply-accumulates of convolutions and fully connected layers for one image."""
        return self.program.macs

    @property
    def params(self) -> int:
        """Trainable parameters, BN scales and shifts included."""
        return self.program.params

    @property
    def branch(self) -> Self:
        """The op without its residual connection."""
        return replace(self, **{"residual": False}) if self.residual else self

    def resized(self, in_ch: int, out_ch: int) -> Self:
        """The op's branch between other widths."""
        return replace(self.branch, in_ch=in_ch, out_ch=out_ch)


@lru_cache(maxsize=2**16)
def _program(op: Op) -> Program:
    """The program of an op: equal ops, of which a search makes many, share one."""
    write = ProgramWriter(op.in_ch, op.size)
    outputs = op.write(write)
    return write.program(*(outputs if isinstance(outputs, tuple) else (outputs,)))


def _parse_key(value: Any) -> Any:
    return Op.parse(value) if isinstance(value, str) else value


OpKey = Annotated[
    InstanceOf[Op], BeforeValidator(_parse_key), PlainSerializer(lambda op: op.key, return_type=str)
]
"""An op inside a document, where it is written as its key."""
