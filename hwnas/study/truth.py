"""The accuracies of architectures when each is trained standalone, read from a file that
exists already.

A CSV file, gzipped or not, has a header with a column ``architecture`` or ``arch``, and
columns of test or validation accuracies. A JSON file is an object that maps
architectures to an accuracy, a list of accuracies, or an object with accuracies.
``architecture`` is one of

- the positions of the picked options in the order of the space's choices, as digits
  (``22212220``: NAS-Bench-Macro) or separated (``2 2 10 1``);
- picks as a JSON object (``{"s1.b0": "ir_k3_e3", ...}``);
- the notation of the space (``|nor_conv_3x3~0|+|...``: NAS-Bench-201, whose column
  ``arch_str`` is accepted as well; genotypes of DARTS; matrix and ops of NAS-Bench-101
  as JSON).

Repeated training runs (``acc1``, ``acc2``, ... or a list) are averaged; they also show how
far two training runs of the same networks agree. The mean is less noisy than one run,
so a score may agree with it a little better. Accuracies are in 0..1, or percentages if
any of them is above 1.
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
from hwnas.document import nearest, user_path
from hwnas.errors import ConfigError, UserError
from hwnas.study.documents import TruthInfo
from hwnas.study.metrics import best_tenth, kendall
from hwnas.tables.reading import Source

ARCHITECTURE_COLUMNS = ("architecture", "arch", "arch_str")
"""Names of the column that holds the architecture."""

ACCURACY = re.compile(r"(test_|val_)?acc(uracy)?_?\d*")
"""Columns that are read as accuracies if ``study.accuracies`` names none."""

AVERAGE = re.compile(r"(mean_acc|acc_mean|mean)(uracy)?")
"""Columns of which the first is read if none matches ``ACCURACY``."""


@dataclass(frozen=True)
class Truth:
    """Architectures with their true accuracies.

    ``names`` are the architectures as the file writes them, ``accuracy_NR`` their
    accuracies in 0..1, float [N, repeats].
    """

    names: tuple[str, ...]
    picks: tuple[Picks, ...]
    accuracy_NR: np.ndarray
    columns: tuple[str, ...]
    sha256: str

    @property
    def mean(self) -> np.ndarray:
        """The mean of the repeats: float [N]."""
        # Added up exactly, so that equal sets of accuracies are ties in any order.
        return np.array([math.fsum(row) / len(row) for row in self.accuracy_NR])

    def sample(self, count: int) -> np.ndarray:
        """The indices of ``count`` random architectures, the same on every call. A
        smaller sample is the beginning of a larger one.
        """
        return np.random.default_rng(0).permutation(len(self.names))[:count]

    def info(self, file: str) -> TruthInfo:
        """The summary for a document; ``file`` is the path that it was read from."""
        everywhere, top = self.agreement() or (math.nan, math.nan)
        return TruthInfo(
            file=Path(file).name,
            sha256=self.sha256,
            networks=len(self.names),
            repeats=self.accuracy_NR.shape[1],
            columns=self.columns,
            kendall=_finite(everywhere),
            kendall_top=_finite(top),
        )

    def agreement(self) -> tuple[float, float] | None:
        """Kendall's tau between repeats, averaged over all pairs of repeats: over all
        architectures, and over the best tenth. None without repeats.
        """
        pairs = list(combinations(range(self.accuracy_NR.shape[1]), 2))
        if not pairs:
            return None
        top = best_tenth(self.mean)
        everywhere = []
        among_top = []
        for i, j in pairs:
            everywhere.append(kendall(self.accuracy_NR[:, i], self.accuracy_NR[:, j]))
            among_top.append(kendall(self.accuracy_NR[top, i], self.accuracy_NR[top, j]))
        return float(np.mean(everywhere)), float(np.mean(among_top))


def _finite(value: float) -> float | None:
    """None for nan: JSON has no nan."""
    return value if math.isfinite(value) else None


def configured_truth(config: StudyConfig, space: SearchSpace) -> Truth:
    """The ground truth of a study. Raises ConfigError if no existing file is named, or
    TableError with the line of an error in it.
    """
    if config.truth is None:
        raise ConfigError(
            "study.truth is not set: name a file of architectures and their accuracies (.csv or"
            " .json)."
        )
    path = user_path(config.truth, "study.truth")
    if not path.is_file():
        raise ConfigError(
            f"study.truth = {config.truth!r} does not exist: name a file of architectures and"
            " accuracies (.csv or .json)."
        )
    return read_truth(path, space, config.accuracies)


def read_truth(path: str | Path, space: SearchSpace, columns: Sequence[str] = ()) -> Truth:
    """The architectures and accuracies of a file. ``columns`` names the columns of
    accuracies, one for each repeated training run; without it they are recognised by
    name.

    Raises TableError with the line or architecture of an error, or DocumentError if the
    file does not exist.
    """
    source = Source.load(path)
    in_json = source.text.lstrip(" \r\n\t").startswith("{")
    if in_json:
        used, rows = _json_rows(source, columns)
    else:
        used, rows = _csv_rows(source, columns)
    names: list[str] = []
    picks: list[Picks] = []
    accuracies: list[list[float]] = []
    seen: dict[bytes, str] = {}
    for location, name, values in rows:
        try:
            architecture = space.read(name)
        except UserError as error:
            raise source.wrong(f"{location}: {error}") from error
        # Different picks can build the same network, which would then count twice.
        network = space.canonical(space.index(architecture)).tobytes()
        if network in seen:
            raise source.wrong(
                f"{location}: {name} is the same network as {seen[network]}: keep one of them."
            )
        if accuracies and len(values) != len(accuracies[0]):
            raise source.wrong(
                f"{location}: there are {len(values)} accuracies of {name}, but"
                f" {len(accuracies[0])} of {names[0]}: give the same number for both."
            )
        if not values:
            raise source.wrong(f"{location}: there is no accuracy of {name}: give one or more.")
        seen[network] = name
        names.append(name)
        picks.append(architecture)
        accuracies.append([source.number(value, f"the accuracy of {name}") for value in values])
    if len(names) < 2:
        raise source.wrong(
            f"contains {len(names)} architectures, and a ranking needs two or more: add some."
        )
    accuracy_NR = np.array(accuracies, dtype=float)
    if accuracy_NR.max() > 1:
        accuracy_NR = accuracy_NR / 100
    outside = np.argwhere((accuracy_NR < 0) | (accuracy_NR > 1))
    if len(outside):
        network, repeat = outside[0]
        raise source.wrong(
            f"has {accuracies[network][repeat]:g} as an accuracy of {names[network]}: give 0 to"
            " 100."
        )
    return Truth(tuple(names), tuple(picks), accuracy_NR, used, source.sha256)


_Row = tuple[str, str, list[Any]]
"""The location of a row in the file, its architecture, and its accuracies."""


def _csv_rows(source: Source, columns: Sequence[str]) -> tuple[tuple[str, ...], Iterator[_Row]]:
    """The columns of accuracies and the rows of a CSV file."""
    lines = csv.reader(io.StringIO(source.text, newline=""), strict=True)
    try:
        header = [cell.strip() for cell in next(lines, [])]
        named = [name for name in ARCHITECTURE_COLUMNS if name in header]
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
    name_column = header.index(named[0])
    accuracy_columns = [header.index(name) for name in used]
    for number, row in rows:
        if len(row) <= max(name_column, *accuracy_columns):
            raise source.wrong(
                f"line {number}: it has {len(row)} cells, fewer than the header needs: complete the"
                " line."
            )

    def located_rows() -> Iterator[_Row]:
        for number, row in rows:
            accuracies = [row[column] for column in accuracy_columns]
            yield f"line {number}", row[name_column].strip(), accuracies

    return used, located_rows()


def _json_rows(source: Source, columns: Sequence[str]) -> tuple[tuple[str, ...], Iterator[_Row]]:
    """The names of the accuracies (none for plain numbers) and the rows of a JSON file."""
    content = source.json_object()
    first = next(iter(content.values()), None)
    if not isinstance(first, Mapping):
        if columns:
            raise source.wrong(
                f"names no accuracies, so study.accuracies = {list(columns)} chooses none of them:"
                " remove that key."
            )
        return (), (
            (f"architecture {name!r}", name, _as_list(value)) for name, value in content.items()
        )

    used = _columns(source, list(first), columns)
    rows = []
    for name, value in content.items():
        missing = [key for key in used if not isinstance(value, Mapping) or key not in value]
        if missing:
            raise source.wrong(f"architecture {name!r} has no {missing[0]!r}: complete it.")
        accuracies = []
        for key in used:
            accuracies += _as_list(value[key])
        rows.append((f"architecture {name!r}", name, accuracies))
    return used, iter(rows)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _columns(source: Source, header: Sequence[str], columns: Sequence[str]) -> tuple[str, ...]:
    """The columns of accuracies: the named ones, else all whose name looks like an
    accuracy, else the first that looks like an average.
    """
    for name in columns:
        if name not in header:
            raise source.wrong(
                f"has no column {name!r} of study.accuracies; {nearest(name, header)}"
            )
    if columns:
        return tuple(columns)
    matches = tuple(name for name in header if ACCURACY.fullmatch(name))
    if not matches:
        matches = tuple(name for name in header if AVERAGE.fullmatch(name))[:1]
    if not matches:
        raise source.wrong(
            f"has no column that looks like an accuracy ({', '.join(header)[:80]}): name it in"
            " study.accuracies."
        )
    return matches
