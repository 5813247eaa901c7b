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

import contextlib
import difflib
import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from hwnas.errors import DocumentError, StorageError


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

    model_config = ConfigDict(frozen=True, extra="forbid")

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
        except (AttributeError, KeyError, TypeError) as error:
            raise DocumentError(
                f"{source} is not a {cls.SCHEMA}/{version} document ({error!r}): it is corrupt;"
                " create it again."
            ) from error

    @classmethod
    def parse(cls, text: str | bytes, source: str = "document") -> Self:
        """Read a document from JSON text. Raises DocumentError, which names ``source``
        and what is wrong with it.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DocumentError(
                f"{source} is not valid JSON ({error}): it is corrupt or was cut off; create it"
                " again."
            ) from error
        if not isinstance(content, dict):
            raise DocumentError(
                f"{source} holds a JSON {type(content).__name__}, not a {cls.SCHEMA} document."
            )
        schema = content.pop("schema", None)
        name, _, version = str(schema).partition("/")
        if name != cls.SCHEMA or not version.isdecimal():
            raise DocumentError(
                f"{source} has schema {schema!r}, but a {cls.SCHEMA}/{cls.VERSION} document is"
                " needed here."
            )
        if int(version) > cls.VERSION:
            raise DocumentError(
                f"{source} has schema {schema}, newer than this hwnas can read ({cls.VERSION}):"
                " upgrade hwnas."
            )
        try:
            if int(version) < cls.VERSION:
                content = cls._migrated(int(version), content, source)
            return cls.model_validate_json(json.dumps(content), strict=True)
        except ValidationError as error:
            raise DocumentError(f"{source}: {explain(error, cls)}") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a document from a file."""
        return cls.parse(read_bytes(path), str(path))

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


def read_bytes(path: str | Path) -> bytes:
    """The content of a file that the user named. Raises DocumentError if it cannot be
    read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DocumentError(f"{path} does not exist: check the path.") from error
    except OSError as error:
        raise DocumentError(f"{path} cannot be read ({error.strerror}).") from error


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
    place = ".".join(str(part) for part in first["loc"]) or "(top level)"
    if first["type"] == "extra_forbidden":
        fields = _fields_at(model, first["loc"][:-1])
        return f"unknown key {place!r}; {nearest(str(first['loc'][-1]), fields)}"
    if first["type"] == "missing":
        return f"key {place!r} is missing; add it."
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and isinstance(first["input"], Mapping):
        # a rule about a whole table names the keys itself, and the table is too long
        return message

    value = repr(first["input"])
    if len(value) > 60:
        value = value[:57] + "..."
    reason = message[0].lower() + message[1:]
    return f"{place} = {value}: {reason.removesuffix('.')}."


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
