"""What architectures are worth when each is trained alone: read from a file that
somebody already has.

A CSV file, gzipped or not, has a header with one of the columns ``architecture`` or
``arch``, and accuracies of test or validation images; a JSON file is an object from
architectures to an accuracy, to a list of them, or to an object with them.
``architecture`` is one of

- the positions of the picked options in the order of the space's choices, as digits
  (``22212220``: NAS-Bench-Macro) or apart (``2 2 10 1``);
- picks as a JSON object (``{"s1.b0": "ir_k3_e3", ...}``);
- the space's own notation (``|nor_conv_3x3~0|+|...``: NAS-Bench-201, whose column
  ``arch_str`` is understood too; DARTS's genotypes; NAS-Bench-101's matrix and ops as
  JSON).

Repeated trainings (``acc1``, ``acc2``, ... or a list) are averaged, and say how much
two trainings of the same networks agree. The mean is steadier than one training, so
that a score may agree with it a little better. Accuracies are parts of 1, or
percentages where one is above 1.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from hwnas.config import StudyConfig
from hwnas.core.arch import Picks
from hwnas.core.space import SearchSpace
from hwnas.document import nearest
from hwnas.errors import ConfigError, UserError
from hwnas.study.documents import TruthInfo
from hwnas.study.metrics import best_tenth, kendall
from hwnas.tables.reading import Source

NAMES = ("architecture", "arch", "arch_str")
"""Columns that say which architecture a line is about."""
ACCURACY = re.compile(r"(test_|val_)?acc(uracy)?_?\d*")
"""Columns that are taken for accuracies where none are named."""
AVERAGE = re.compile(r"(mean_acc|acc_mean|mean)(uracy)?")
"""A column that is taken where there is no other."""


@dataclass(frozen=True)
class Truth:
    """Architectures with their accuracies: ``names`` as the file has them, ``picks``,
    and accuracies in 0..1, float [N, repeats].
    """

    names: tuple[str, ...]
    picks: tuple[Picks, ...]
    accuracy_NR: np.ndarray
    columns: tuple[str, ...]
    sha256: str

    @property
    def mean(self) -> np.ndarray:
        """The mean of the repeats: float [N]. Added up exactly, so that equal sets of
        accuracies stay ties in any order.
        """
        return np.array([math.fsum(row) / len(row) for row in self.accuracy_NR])

    def sample(self, count: int) -> np.ndarray:
        """Positions of ``count`` random architectures; always the same, and those of a
        smaller count come first.
        """
        return np.random.default_rng(0).permutation(len(self.names))[:count]

    def info(self, file: str) -> TruthInfo:
        """What a document says of it; ``file`` is where it was read from."""
        everywhere, top = (
            value if math.isfinite(value) else None
            for value in self.agreement() or (math.nan, math.nan)
        )
        return TruthInfo(
            file=Path(file).name,
            sha256=self.sha256,
            networks=len(self.names),
            repeats=self.accuracy_NR.shape[1],
            columns=self.columns,
            kendall=everywhere,
            kendall_top=top,
        )

    def agreement(self) -> tuple[float, float] | None:
        """Tau between repeats, the mean over all pairs of them: of all architectures,
        and of the best tenth. None without repeats.
        """
        pairs = list(combinations(range(self.accuracy_NR.shape[1]), 2))
        if not pairs:
            return None
        top = best_tenth(self.mean)
        everywhere = [kendall(self.accuracy_NR[:, i], self.accuracy_NR[:, j]) for i, j in pairs]
        return float(np.mean(everywhere)), float(
            np.mean([kendall(self.accuracy_NR[top, i], self.accuracy_NR[top, j]) for i, j in pairs])
        )


def configured_truth(config: StudyConfig, space: SearchSpace) -> Truth:
    """The ground truth of a study. Raises ConfigError where none is named, or
    TableError naming the line.
    """
    if config.truth is None:
        raise ConfigError(
            "study.truth is not set: name a file of architectures and their accuracies (.csv or"
            " .json)."
        )
    path = Path(config.truth).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"study.truth = {config.truth!r} does not exist: name a file of architectures and"
            " accuracies (.csv or .json)."
        )
    return read_truth(path, space, config.accuracies)


def read_truth(path: str | Path, space: SearchSpace, columns: Sequence[str] = ()) -> Truth:
    """The architectures of a file and their accuracies; ``columns`` names those of
    repeated trainings.

    Raises TableError naming the line or the architecture, DocumentError where there is no file.
    """
    source = Source.load(path)
    in_json = source.text.lstrip("\ufeff \r\n\t").startswith("{")
    used, rows = _json_rows(source, columns) if in_json else _csv_rows(source, columns)
    names: list[str] = []
    picks: list[Picks] = []
    accuracies: list[list[float]] = []
    seen: dict[bytes, str] = {}
    for place, name, values in rows:
        try:
            found = space.read(name)
        except UserError as error:
            raise source.wrong(f"{place}: {error}") from error
        blocks = space.canonical(space.index(found)).tobytes()
        if blocks in seen:
            raise source.wrong(
                f"{place}: {name} is the same network as {seen[blocks]}: keep one of them."
            )
        if accuracies and len(values) != len(accuracies[0]):
            raise source.wrong(
                f"{place}: there are {len(values)} accuracies of {name}, but {len(accuracies[0])}"
                f" of {names[0]}: give as many."
            )
        if not values:
            raise source.wrong(f"{place}: there is no accuracy of {name}: give one or more.")
        seen[blocks] = name
        names.append(name)
        picks.append(found)
        accuracies.append([source.number(value, f"the accuracy of {name}") for value in values])
    if len(names) < 2:
        raise source.wrong(
            f"holds {len(names)} architectures, and a ranking needs two or more: add some."
        )
    accuracy_NR = np.array(accuracies, dtype=float)
    accuracy_NR = accuracy_NR / 100 if accuracy_NR.max() > 1 else accuracy_NR
    outside = np.argwhere((accuracy_NR < 0) | (accuracy_NR > 1))
    if len(outside):
        raise source.wrong(
            f"has {accuracies[outside[0][0]][outside[0][1]]:g} as an accuracy of"
            f" {names[outside[0][0]]}: give 0 to 100."
        )
    return Truth(tuple(names), tuple(picks), accuracy_NR, used, source.sha256)


_Row = tuple[str, str, list[Any]]
"""Where it stands, the architecture, its accuracies."""


def _csv_rows(source: Source, columns: Sequence[str]) -> tuple[tuple[str, ...], Iterator[_Row]]:
    lines = csv.reader(io.StringIO(source.text.removeprefix("\ufeff"), newline=""), strict=True)
    try:
        header = [cell.strip() for cell in next(lines, [])]
        named = [name for name in NAMES if name in header]
        if not named:
            raise source.wrong(
                f"has no column architecture or arch (it has {', '.join(header)[:80] or 'none'}):"
                " name it so in the first line."
            )
        used = _columns(source, header, columns)
        rows = [(lines.line_num, row) for row in lines if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise source.wrong(
            f"line {lines.line_num}: it is not valid CSV ({error}): correct it."
        ) from error
    at = [header.index(name) for name in (named[0], *used)]
    for number, row in rows:
        if len(row) <= max(at):
            raise source.wrong(
                f"line {number}: there are {len(row)} cells, too few for the columns of the header:"
                " complete it."
            )
    return used, (
        (f"line {number}", row[at[0]].strip(), [row[column] for column in at[1:]])
        for number, row in rows
    )


def _json_rows(source: Source, columns: Sequence[str]) -> tuple[tuple[str, ...], Iterator[_Row]]:
    content = source.json_object()
    first = next(iter(content.values()), None)
    if not isinstance(first, Mapping):
        if columns:
            raise source.wrong(
                f"names no accuracies, so study.accuracies = {list(columns)} chooses none of them:"
                " remove that key."
            )
        return (), (
            (f"architecture {name!r}", name, _listed(value)) for name, value in content.items()
        )
    used = _columns(source, list(first), columns)
    rows = []
    for name, value in content.items():
        missing = [key for key in used if not isinstance(value, Mapping) or key not in value]
        if missing:
            raise source.wrong(f"architecture {name!r} has no {missing[0]!r}: complete it.")
        rows.append(
            (f"architecture {name!r}", name, [each for key in used for each in _listed(value[key])])
        )
    return used, iter(rows)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _columns(source: Source, header: Sequence[str], columns: Sequence[str]) -> tuple[str, ...]:
    """The columns of accuracies: those named, else all that look like it, else an average."""
    for name in columns:
        if name not in header:
            raise source.wrong(
                f"has no column {name!r} of study.accuracies; {nearest(name, header)}"
            )
    found = tuple(columns) or tuple(name for name in header if ACCURACY.fullmatch(name))
    found = found or tuple(name for name in header if AVERAGE.fullmatch(name))[:1]
    if not found:
        raise source.wrong(
            f"has no column that looks like an accuracy ({', '.join(header)[:80]}): name it in"
            " study.accuracies."
        )
    return found
