"""What a look at the images has found, as text and as JSON."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import Any

from hwnas.config import DataConfig
from hwnas.data.inspection import Inspection, Part
from hwnas.data.wording import counted, shown

WIDTH = 80
INDENT = 13
"""Columns of the text, and of the titles in front of it."""


def as_text(inspection: Inspection, config: DataConfig) -> str:
    """Lines for a terminal: the parts, then notes, then problems."""
    folder = f" in {shown(config.path)}" if config.path else ""
    lines = [f"{'data':{INDENT}}{config.name}{folder}"]
    for part in inspection.parts:
        lines += _part_lines(part, config)
    lines += [_wrapped("note", note) for note in inspection.notes]
    lines += [_wrapped("problem", problem) for problem in inspection.problems]
    return "\n".join(lines)


def _wrapped(title: str, text: str) -> str:
    """A text of several lines beside its title."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=title.ljust(INDENT),
        subsequent_indent=" " * INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def as_json(inspection: Inspection, config: DataConfig) -> dict[str, Any]:
    """The same numbers, with those of every class, as the content of a JSON object."""
    return {
        "data": config.name,
        "path": config.path,
        "parts": {part.name: _part_numbers(part, config) for part in inspection.parts},
        "notes": inspection.notes,
        "problems": inspection.problems,
        "unreadable": inspection.unreadable,
    }


def _part_numbers(part: Part, config: DataConfig) -> dict[str, Any]:
    numbers: dict[str, Any] = {"images": len(part.images)}
    if config.name == "coco":
        numbers["boxes"] = sum(part.counts.values())
    numbers["classes"] = part.counts
    readable = [examined for examined in part.examined.values() if examined.reason is None]
    if readable:
        sizes = sorted(
            [(examined.width, examined.height) for examined in readable],
            key=lambda size: (size[0] * size[1], size),
        )
        numbers["sizes"] = {
            "smallest": sizes[0],
            "median": sizes[len(sizes) // 2],
            "largest": sizes[-1],
        }
        modes = Counter(examined.mode for examined in readable)
        numbers["modes"] = dict(modes.most_common())
    return numbers


def _part_lines(part: Part, config: DataConfig) -> list[str]:
    numbers = _part_numbers(part, config)
    things = counted(numbers["images"], "image")
    if "boxes" in numbers:
        things += f" with {counted(numbers['boxes'], 'box', 'boxes')}"
    counts = numbers["classes"]
    lines = [f"{part.title:{INDENT}}{things} of {counted(len(counts), 'class', 'classes')}"]
    if counts:
        smallest, largest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        per_class = f"{counts[smallest]:,}"
        if counts[smallest] < counts[largest]:
            per_class += f" ({shown(smallest)}) to {counts[largest]:,} ({shown(largest)})"
        lines.append(f"  per class  {per_class}")
    if "sizes" in numbers:
        smallest, median, largest = (f"{w} x {h}" for w, h in numbers["sizes"].values())
        sizes = f"{smallest} px"
        if smallest != largest:
            sizes = f"{smallest} to {largest} px, median {median}"
        lines.append(f"  sizes      {sizes}")
        modes = ", ".join(f"{mode} {count:,}" for mode, count in numbers["modes"].items())
        lines.append(f"  modes      {modes}")
    return lines
