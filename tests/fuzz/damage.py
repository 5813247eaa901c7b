"""Strategies of hypothesis that damage documents, texts and files, as people, editors,
disks and attackers do.
"""

from __future__ import annotations

import copy
import json
import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

MORE = int(os.environ.get("HWNAS_FUZZ", "1"))
"""How many times as many examples to try as usual, for a longer search than in the suite."""


def fuzzed(examples: int) -> settings:
    """Settings of a test with this number of examples."""
    return settings(
        derandomize=MORE == 1,
        deadline=None,
        max_examples=MORE * examples,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


NUMBERS = (
    0, -1, 1, 2, 3, 7, 0.5, -0.5, 1e-300, 5e-324, 1e300, -1e300, 2**31, 2**63, 2**64, -(2**63), 10**40,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip

TEXTS = (
    "", " ", "unknown", "host", "../..", "/etc/passwd", "~nobody-at-all/x", "a\0b", "x" * 5000,
    "\x1b[2J\x1b]0;title\x07", "\u202egnp.exe", "\x9b31m", "line\nbreak", "\ud800", "<script>alert(1)</script>", "{{7*7}}",
    "\N{PILE OF POO}" * 40, "nan", "1e999", "9" * 5000, "[" * 3000, "%s%n", "mobile32", "0",
)  # fmt: skip

VALUES: tuple[Any, ...] = (
    *NUMBERS, *TEXTS, None, True, False, [], {}, [[]], [{}], {"": 0}, {"a": {"b": {"c": None}}}, [0] * 3000,
)  # fmt: skip

Place = tuple[str | int, ...]


def places(content: Any, above: Place = ()) -> list[Place]:
    """The places of all values in a JSON value, the value itself first."""
    found = [above]
    if isinstance(content, dict):
        for key, value in content.items():
            found += places(value, (*above, key))
    elif isinstance(content, list):
        for number, value in enumerate(content[:8]):  # the rest is like the beginning
            found += places(value, (*above, number))
    return found


def value_at(content: Any, place: Place) -> Any:
    """The value at a place."""
    for part in place:
        content = content[part]
    return content


@st.composite
def changed(draw: st.DrawFn, content: Any) -> Any:
    """A JSON value with one change: a value that is dropped, doubled, renamed, moved or
    replaced.
    """
    content = copy.deepcopy(content)
    place = draw(st.sampled_from(places(content)[1:]))
    parent, part = value_at(content, place[:-1]), place[-1]
    kinds = ["replace", "replace", "replace", "drop", "exchange", "wrap", "empty"]
    kinds += ["rename", "add"] if isinstance(parent, dict) else ["double"]
    kind = draw(st.sampled_from(kinds))
    if kind == "replace":
        parent[part] = draw(st.sampled_from(VALUES))
    elif kind == "drop":
        del parent[part]
    elif kind == "exchange":
        parent[part] = copy.deepcopy(value_at(content, draw(st.sampled_from(places(content)))))
    elif kind == "wrap":
        parent[part] = draw(
            st.sampled_from(([parent[part]], {"a": parent[part]}, str(parent[part])))
        )
    elif kind == "empty":
        parent[part] = type(parent[part])()
    elif kind == "rename":
        parent[draw(st.sampled_from(TEXTS))] = parent.pop(part)
    elif kind == "add":
        parent[draw(st.sampled_from(TEXTS))] = draw(st.sampled_from(VALUES))
    else:
        parent.insert(part, copy.deepcopy(parent[part]))
    return content


@st.composite
def damaged_json(draw: st.DrawFn, content: Any) -> bytes:
    """A JSON document with one to three changes, or whose text is damaged."""
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        if len(places(content)) > 1:
            content = draw(changed(content))
    stored = json.dumps(content).encode()
    if draw(st.sampled_from((False, False, False, True))):
        stored = draw(damaged(stored))
    return stored


SNIPPETS = (
    b"", b"\0", b"\n", b"\r\n", b"{", b"}", b"[", b"]" , b'"', b",", b":", b"null", b"NaN", b"1e999", b"-", b"\xff\xfe",
    b"\xef\xbb\xbf", b"\x1b[2J", b"9" * 5000, b"[" * 5000, b'{"a":' * 3000, b"0x" + b"f" * 9000, b"x" * 100_000, b"&a [*a]",
    b"!!python/object/apply:os.system ['touch pwned']", b"\xed\xa0\x80", b"#", b"'''",
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that are cut off, have a flipped bit, or lost or won a piece."""
    at = draw(st.integers(0, len(content)))
    kind = draw(st.sampled_from(("cut", "flip", "insert", "insert", "delete", "double", "swap")))
    if kind == "cut":
        return content[:at]
    if kind == "flip" and content:
        at = min(at, len(content) - 1)
        return (
            content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
        )
    if kind == "insert":
        return content[:at] + draw(st.sampled_from(SNIPPETS)) + content[at:]
    end = draw(st.integers(at, len(content)))
    if kind == "delete":
        return content[:at] + content[end:]
    if kind == "double":
        return content[:end] + content[at:]
    return content[end:] + content[:at]
