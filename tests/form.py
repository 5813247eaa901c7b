"""Count the lines that check what kind of thing they have, and the places that know a
particular kind: ``python tests/form.py [FOLDER]``.

Counts the lines of ``hwnas/`` that match each pattern; run it on two commits to compare
them. It sets no limits and is not a test.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PATTERNS = {
    "tests of detector or task": (
        r"\.detector is (not )?None|\btask [!=]= |isinstance\([^)]*(DetectionNetwork|CocoImages)\b"
    ),
    "isinstance(space, ...)": r"isinstance\([\w.]*space, ",
    "isinstance(supernet, ...)": r"isinstance\([\w.]*supernet, ",
    "walks over what a block computes": (
        r"\bin (enumerate\()?[\w.]*(\.layers|program\.nodes)\b|\.program\.nodes\)"
    ),
    "places that know an inverted bottleneck": r"\bmbconv\b|\bMBConv\b",
    "places that know a target by name": (
        r"\"(tflite-int8|tflite-fp32|onnx-nms|onnx|tflite-(fp32|int8)-tasks)\"|\"(litert|onnxruntime)\""
    ),
}


def count(folder: Path) -> dict[str, tuple[int, int]]:
    """For each pattern, the number of matching lines of code and of files with a match.
    Docstrings are not code.
    """
    counts: dict[str, tuple[int, int]] = {}
    sources = {path: _code(path.read_text()) for path in sorted(folder.rglob("*.py"))}
    for name, pattern in PATTERNS.items():
        hits = {
            path: sum(bool(re.search(pattern, line)) for line in lines)
            for path, lines in sources.items()
        }
        counts[name] = sum(hits.values()), sum(map(bool, hits.values()))
    counts["lines in all"] = sum(map(len, sources.values())), len(sources)
    return counts


def _code(text: str) -> list[str]:
    without = re.sub(r'"""(?s:.*?)"""', "", text)
    return [
        line for line in without.splitlines() if line.strip() and not line.strip().startswith("#")
    ]


if __name__ == "__main__":
    for pattern_name, (lines, files) in count(
        Path(sys.argv[1] if len(sys.argv) > 1 else "hwnas")
    ).items():
        print(f"{pattern_name:42} {lines:6} lines in {files:3} files")
