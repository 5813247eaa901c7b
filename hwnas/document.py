"""Documents: the files that stages hand to each other.

A document is a frozen pydantic model that is stored as JSON, which begins with its
schema id::

    {"schema": "hwnas.space/1", "name": "proxylessnas", ...}

- strict: unknown keys and wrong types are errors that name the place and the nearest
  known key;
- canonical: the same value always gives the same bytes (sorted keys), so that its
  sha256 identifies it;
- atomic: a file is either the old one or the new one, never half of it;
- versioned: the integer counts changes of the format, and ``migrate`` keeps older
  versions readable.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import gc
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, Tag, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from hwnas.errors import DocumentError, StorageError, UserError
from hwnas.printable import quoted, shortened


class Record(BaseModel):
    """Base class of the parts of documents: frozen, without unknown keys, NaN or
    infinity.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Document(BaseModel):
    """Base class of all documents. Subclasses set ``SCHEMA`` (``"hwnas.table"``) and
    ``VERSION``.
    """

    SCHEMA: ClassVar[str]
    VERSION: ClassVar[int] = 1

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with changes. Unlike pydantic's own, it drops values that were
        computed and cached from the old fields (``sha256``).
        """
        copied = super().model_copy(update=update, deep=deep)
        for name in copied.__dict__.keys() - type(self).model_fields.keys():
            del copied.__dict__[name]
        return copied

    @classmethod
    def migrate(cls, version: int, content: dict[str, Any]) -> dict[str, Any]:
        """Turn the content of an older schema ``version`` into the current one.
        Override it when ``VERSION`` grows.
        """
        return content

    @classmethod
    def _migrated(cls, version: int, content: dict[str, Any], source: str) -> dict[str, Any]:
        """``migrate``, which may rely on the content having the right structure. Raises
        DocumentError if it does not.
        """
        try:
            return cls.migrate(version, content)
        except DocumentError as error:
            raise DocumentError(f"{source}: {error}") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise DocumentError(
                f"{source} is not a {cls.SCHEMA}/{version} document ({quoted(error)}): it is"
                " corrupt;"
                " create it again."
            ) from error

    @classmethod
    def parse(cls, text: str | bytes, source: str = "document") -> Self:
        """Read a document from JSON text. Raises DocumentError, which names ``source``
        and what is wrong with it.
        """
        content = read_json(text, source)
        if not isinstance(content, dict):
            raise DocumentError(
                f"{source} holds a JSON {type(content).__name__}, not a {cls.SCHEMA} document."
            )
        schema = content.pop("schema", None)
        name, _, version = schema.partition("/") if isinstance(schema, str) else ("", "", "")
        if name != cls.SCHEMA or not _VERSION.fullmatch(version):
            raise DocumentError(
                f"{source} has schema {quoted(schema)}, but a {cls.SCHEMA}/{cls.VERSION} document"
                " is"
                " needed here."
            )
        if int(version) > cls.VERSION:
            raise DocumentError(
                f"{source} has schema {schema}, newer than this hwnas can read ({cls.VERSION}):"
                " upgrade hwnas."
            )
        if int(version) < cls.VERSION:
            content = cls._migrated(int(version), content, source)
        try:
            return cls.model_validate_json(_as_json(content), strict=True)
        except RecursionError as error:
            raise DocumentError(f"{source} is nested too deeply: create it again.") from error
        except ValidationError as error:
            raise DocumentError(f"{source}: {explain(error, cls)}") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a document from a file."""
        text = read_bytes(path, at_most=LARGEST_BYTES)
        with uncollected():
            return cls.parse(text, quoted_path(path))

    def to_json(self) -> str:
        """The stored form: sorted keys, one value per line, a newline at the end."""
        content = {
            "schema": f"{self.SCHEMA}/{self.VERSION}",
            **self.model_dump(mode="json", by_alias=True),
        }
        text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
        return text + "\n"

    def save(self, path: str | Path) -> None:
        """Write the document atomically."""
        write_atomic(path, self.to_json().encode())

    @cached_property
    def sha256(self) -> str:
        """The identity of the content: the sha256 of its canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """A context without garbage collection. A large document is a million objects, none of
    them garbage, and a quarter of the time would go into visiting them again and again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _as_json(content: Any) -> str | bytes:
    """A value as JSON text, for pydantic to read. pydantic writes it several times as fast
    as ``json``, but no halves of surrogate pairs, and nothing that is nested deeply.
    """
    try:
        return to_json(content)
    except PydanticSerializationError:
        return json.dumps(content)


_VERSION = re.compile("[1-9][0-9]{0,8}")
"""The version in a schema id."""

LONGEST_INTEGER = 300
"""Digits of the longest integer in a document. Longer ones are no floating-point number,
so that no arithmetic is possible with them.
"""


def read_json(text: str | bytes, source: str) -> Any:
    """The value of a JSON text that belongs to a document. Raises DocumentError, which
    names ``source``, if it is not JSON, or has a key twice, NaN or an infinity.
    """
    try:
        content = json.loads(
            text,
            object_pairs_hook=_with_each_key_once,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except DocumentError as error:
        raise DocumentError(f"{source} {error}") from error
    except (ValueError, RecursionError) as error:
        raise DocumentError(
            f"{source} is not valid JSON ({error}): it is corrupt or was cut off; create it again."
        ) from error
    return content


def _with_each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises DocumentError if a key is there twice: one of the values would
    be lost, and nobody knows which is meant.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DocumentError(f"has the key {quoted(twice)} twice: remove one of them.")
    return content


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_INTEGER:
        raise DocumentError(
            f"holds an integer of {len(digits)} digits ({digits[:20]}...): correct that value."
        )
    return int(digits)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise DocumentError(
            f"holds {text[:40]}, where a finite number is needed: correct that value, or create the"
            " file again."
        )
    return number


LARGEST_BYTES = 2**29
"""The size of the largest document: ten times a table of 100,000 ops. A larger file, or
a device such as /dev/zero, would only fill the memory.
"""


def read_bytes(path: str | Path, at_most: int = -1) -> bytes:
    """The content of a file that the user named. Raises DocumentError if it cannot be
    read, or has more than ``at_most`` bytes; -1: no limit.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read() if at_most < 0 else file.read(at_most + 1)
    except FileNotFoundError as error:
        raise DocumentError(f"{quoted_path(path)} does not exist: check the path.") from error
    except OSError as error:
        raise DocumentError(
            f"{quoted_path(path)} cannot be read ({error.strerror}): check the path."
        ) from error
    except ValueError as error:  # a null byte, or half of a surrogate pair
        raise DocumentError(
            f"{quoted_path(path)} is not a path ({error}): check the path."
        ) from error
    if 0 <= at_most < len(content):
        raise DocumentError(
            f"{quoted_path(path)} has more than {at_most // 2**20} MiB, too much for a file of its"
            " kind: check the path."
        )
    return content


def user_path(text: str, key: str) -> Path:
    """The path that the user wrote for ``key``, with the home folder in place of ``~``.
    Nothing need be there yet.

    Raises UserError if no file can be there: an unknown user after ``~``, a name that is
    too long, a null byte, a folder that this user may not look into.
    """
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path  # callers say in their own words what should be there
    except RuntimeError as error:
        raise UserError(
            f"{key} = {quoted(text)} begins with the home folder of a user who does not exist:"
            " write"
            " the whole path."
        ) from error
    except OSError as error:
        raise UserError(
            f"{key} = {quoted(text)} cannot be opened ({error.strerror}): check the path."
        ) from error
    except ValueError as error:  # a null byte, or half of a surrogate pair
        raise UserError(f"{key} = {quoted(text)} is not a path ({error}): correct it.") from error
    return path


def quoted_path(path: str | Path) -> str:
    """A path for messages: as it is, and in the middle of a very long one an ellipsis."""
    text = str(path)
    if len(text) <= LONGEST_PATH:
        return text
    half = (LONGEST_PATH - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


LONGEST_PATH = 300
"""Longer paths are shortened in messages, to this many characters."""


_ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    # before those of UTF-16, because one of them begins like one of these
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks, and the encodings that drop them."""


def decoded_text(content: bytes) -> str:
    """The text in a file's bytes: that of the encoding whose byte order mark it begins
    with, as programs on Windows write it, otherwise UTF-8. Raises UnicodeDecodeError.
    """
    for mark, encoding in _ENCODINGS.items():
        if content.startswith(mark):
            return content.decode(encoding)
    return content.decode()


def write_atomic(path: str | Path, content: bytes) -> None:
    """Write ``content`` so that readers see either the old file or the whole new one,
    even after a crash at any moment. Raises StorageError.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the content is on disk before the name is
        # mkstemp makes files private; give this one the mode that open() would
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        raise StorageError(
            f"{path} cannot be written ({error.strerror}): free some space or choose another --out"
            " folder."
        ) from error


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(value: Any) -> str:
    """The sha256 of any JSON value in canonical form."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: ``did you mean 'x'?``, or the list of known names."""
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if matches:
        return f"did you mean {matches[0]!r}?"
    return f"known: {', '.join(names) or 'none'}."


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a pydantic error as one sentence with the place, the value
    and the fix.
    """
    first = error.errors()[0]
    keys = _without_tags(model, first["loc"])
    place = ".".join(shortened(str(part)) for part in keys) or "(top level)"
    if first["type"] == "extra_forbidden":
        fields = _fields_at(model, first["loc"][:-1])
        return f"unknown key {place!r}; {nearest(shortened(str(first['loc'][-1])), fields)}"
    if first["type"] == "union_tag_invalid":
        return (
            f"{place}.kind = {first['ctx']['tag']!r} is unknown; known:"
            f" {first['ctx']['expected_tags']}."
        )
    if first["type"] == "missing":
        return f"key {place!r} is missing; add it."
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and isinstance(first["input"], Mapping):
        # a rule about a whole table names the keys itself, and the table is too long
        return message

    reason = message[0].lower() + message[1:]
    return f"{place} = {quoted(first['input'])}: {reason.removesuffix('.')}."


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys, as written in a file, of the nested model at ``location``; if the type
    there is a union, of all its models.
    """
    models = [model]
    for part in location:
        inner: list[type[BaseModel]] = []
        for outer in models:
            for name, field in outer.model_fields.items():
                if part == (field.alias or name):
                    inner += _models_in(field.annotation)
        # positions, keys of mappings and tags of unions are not fields: they lead to no
        # other model
        models = inner or models

    keys = []
    for inner_model in models:
        keys += [field.alias or name for name, field in inner_model.model_fields.items()]
    return keys


def _without_tags(model: type[BaseModel], location: tuple[int | str, ...]) -> list[int | str]:
    """The parts of a location that a file has: not the tags of unions, which pydantic puts
    after the name of the field.
    """
    models = [model]
    tags: set[str] = set()
    kept: list[int | str] = []
    for part in location:
        if part in tags:
            tags = set()
            continue
        kept.append(part)
        inner: list[type[BaseModel]] = []
        tags = set()
        for outer in models:
            for name, field in outer.model_fields.items():
                if part == (field.alias or name):
                    inner += _models_in(field.annotation)
                    tags |= _tags_in(field.annotation)
        models = inner or models
    return kept


def _tags_in(annotation: Any) -> set[str]:
    """The tags of the unions inside a type."""
    tags = {item.tag for item in getattr(annotation, "__metadata__", ()) if isinstance(item, Tag)}
    for argument in get_args(annotation):
        tags |= _tags_in(argument)
    return tags


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models inside a type: ``tuple[Stage, ...] | None`` -> ``[Stage]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    models: list[type[BaseModel]] = []
    for argument in get_args(annotation):
        models += _models_in(argument)
    return models


def merged(
    base: Mapping[str, Any], changes: Mapping[str, Any], *, replace: Collection[str] = ()
) -> dict[str, Any]:
    """Nested mappings merged; ``changes`` win. A mapping under a key in ``replace`` is
    replaced, not merged, if its ``name`` or ``kind`` changes.
    """
    out = dict(base)
    for key, value in changes.items():
        old = out.get(key)
        if not (isinstance(value, Mapping) and isinstance(old, Mapping)):
            out[key] = value
        elif key in replace and _is_another_kind(old, value):
            # the options of one plug-in mean nothing to another
            out[key] = value
        else:
            out[key] = merged(old, value, replace=replace)
    return out


def _is_another_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return any(new.get(word, old.get(word)) != old.get(word) for word in ("name", "kind"))
