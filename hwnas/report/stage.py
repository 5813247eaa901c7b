"""The report stage: a run folder in, one HTML file out that opens anywhere, offline.

Sections whose documents do not exist yet are left out, and the top of the page says
which stages are missing. The same documents give the same bytes.
"""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hwnas import __version__
from hwnas.core.arch import Placed
from hwnas.core.caution import Caution
from hwnas.core.metric import shown
from hwnas.core.ops import Op
from hwnas.core.space import SearchSpace
from hwnas.document import content_sha256, file_sha256, write_atomic
from hwnas.export.bundle import BundleFile
from hwnas.report import charts, comparing, drawing, pictures, ranking, shrinking
from hwnas.report.charts import Series
from hwnas.report.documents import Rows, RunDocuments, read, sources
from hwnas.report.style import DARK, LIGHT
from hwnas.runs import StageContext
from hwnas.stages import Stage
from hwnas.task import Task
from hwnas.tasks.pictures import MIN_SCORE
from hwnas.verdict import FileVerdict, drift_note

CURVE_COLOURS = ("orange", "blue", "green")
"""Of the metrics of a validation curve."""

__all__ = ["Report", "render", "run"]


class Report(Stage):
    """Draws what the run folder holds."""

    name = "report"
    result = "report.html"
    outputs = ["report.html"]

    def inputs(self) -> dict[str, str]:
        """The documents that are there, and the configuration."""
        paths = [self.at.path(stage, name) for stage, name in sources()]
        found = [path for path in [*paths, self.at.table_path] if path.is_file()]
        hashes = {f"{path.parent.name}/{path.name}": file_sha256(path) for path in found}
        return {
            **hashes,
            "config": content_sha256(self.at.experiment.model_dump(mode="json", by_alias=True)),
        }

    def summary(self) -> str:
        """Where it will be."""
        return str(self.at.path("report", "report.html"))

    def run(self, ctx: StageContext) -> None:
        """Write ``report.html``."""
        run(ctx, self.at.space, self.at.table_path)


def run(ctx: StageContext, space: SearchSpace, table_path: Path) -> None:
    """Write ``report.html`` from what the run folder holds."""
    page = render(read(ctx, space, table_path))
    write_atomic(ctx.folder / "report.html", page.encode())
    ctx.progress.info(f"report: {ctx.folder / 'report.html'}")


def render(documents: RunDocuments) -> str:
    """The page as a string of HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "ms": ms,
        "percent": percent,
        "signed": signed,
        "against": against,
        "bytes": size,
        "big": big,
        "huge": huge,
        "amount": amount,
        "quality": quality,
        "sentence": sentence,
    }
    verb = (documents.study_verb if documents.only_study else None) or "run"
    return environment.get_template("template.html").render(
        run=documents,
        version=__version__,
        themes={"light": LIGHT, "dark": DARK},
        files=file_rows(documents),
        judged=judged_file(documents),
        failures=failures(documents),
        cautions=cautions(documents),
        notices=notices(documents),
        conditions=conditions(documents),
        blocks=block_rows(documents),
        figures=figures(documents),
        task=documents.task,
        trained=trained_numbers(documents),
        torch=torch_metrics(documents),
        per_class=class_rows(documents),
        min_score=MIN_SCORE,
        ranks=ranking.score_rows(documents.study) if documents.study is not None else [],
        methods=(
            comparing.method_rows(documents.comparison) if documents.comparison is not None else []
        ),
        pairwise=comparing.pairwise_rows(documents.comparison)
        if documents.comparison is not None
        else [],
        shrunk=shrinking.rows(documents.shrinking) if documents.shrinking is not None else [],
        config=json.dumps(
            documents.experiment.model_dump(mode="json", by_alias=True),
            indent=2,
            ensure_ascii=False,
        ),
        command=(
            f"hwnas {verb} {shlex.quote(documents.folder)} --out"
            f" {shlex.quote(documents.folder + '-again')}"
        ),
    )


@dataclass(frozen=True)
class FileRow:
    """An exported file: what the bundle says of it and what the device said, if it was asked."""

    file: BundleFile
    verdict: FileVerdict | None


def file_rows(documents: RunDocuments) -> list[FileRow]:
    """The exported files in the bundle's order."""
    verdicts = (
        {file.name: file for file in documents.verdict.files}
        if documents.verdict is not None
        else {}
    )
    return (
        [FileRow(file, verdicts.get(file.name)) for file in documents.bundle.files]
        if documents.bundle is not None
        else []
    )


def judged_file(documents: RunDocuments) -> FileVerdict | None:
    """The file that stands in the headline: the one whose latency the table predicts,
    else the first.
    """
    files = documents.verdict.files if documents.verdict is not None else ()
    return next(
        (file for file in files if file.predicted_ms is not None), files[0] if files else None
    )


@dataclass(frozen=True)
class TorchMetrics:
    """How good PyTorch is, by name, on how many test images."""

    values: dict[str, float | None]
    images: int


def torch_metrics(documents: RunDocuments) -> TorchMetrics | None:
    """PyTorch's metrics by the latest document that has each: older ones of detectors
    say AP alone.
    """
    train, bundle, verdict = documents.train, documents.bundle, documents.verdict
    values: dict[str, float | None] = {}
    images = 0
    if train is not None:
        values, images = values | train.metrics, train.test_images
    if bundle is not None:
        values, images = {**values, **bundle.metrics}, bundle.test_images
    if verdict is not None:
        values, images = {**values, **verdict.metrics}, verdict.images
    return TorchMetrics(values, images) if values else None


def trained_numbers(documents: RunDocuments) -> dict[str, float | None]:
    """What the trained network is worth by all that its task measures, in the task's order."""
    metrics = documents.train.metrics if documents.train is not None else {}
    return {name: metrics[name] for name in documents.task.numbers if name in metrics}


def failures(documents: RunDocuments) -> list[str]:
    """Every broken promise in one sentence."""
    verdict = documents.verdict
    if verdict is None:
        return []
    allowed, found = verdict.tolerances, []
    for file in verdict.files:
        if (
            file.latency_passed is False
            and file.latency_error is not None
            and file.predicted_ms is not None
        ):
            found.append(
                f"{file.name} takes"
                f" {ms((file.network_ms or file.measured_ms) / (verdict.drift or 1))} ms at the"
                f" profiled speed, {against(file.latency_error)} the {ms(file.predicted_ms)} ms"
                f" predicted; {allowed.latency_tolerance:.1%} are allowed."
            )
        if not file.quality_passed:
            found.append(
                f"{file.name} loses {100 * file.loss:.2f} points of {verdict.words.metric} against"
                f" PyTorch; {100 * allowed.tolerance(verdict.metric, file.dtype):.2f} are allowed."
            )
        if file.parity_passed is False and file.parity is not None:
            found.append(
                f"{file.name} gives other outputs than PyTorch on {verdict.device}: relative error"
                f" {file.parity.relative_error:.1e}; {allowed.parity_tolerance:.1e} is allowed."
            )
    return found


def notices(documents: RunDocuments) -> list[str]:
    """What a reader must know before believing the numbers: missing stages, and
    documents that do not belong together.
    """
    found = []
    missing = [
        f"{stage.name} (interrupted at step {stage.step:,})" if stage.step else stage.name
        for stage in documents.stages
        if not stage.finished
    ]
    if missing:
        found.append(
            f"Not finished yet: {', '.join(missing)}. Go on with: hwnas run"
            f" {shlex.quote(documents.folder)}"
        )
    search, table, bundle, arch = (
        documents.search,
        documents.table,
        documents.bundle,
        documents.arch,
    )
    if search is not None and table is not None and search.table_sha256 != table.sha256:
        found.append("The search used another latency table than the one shown here.")
    if bundle is not None and arch is not None and bundle.architecture.sha256 != arch.sha256:
        found.append("The exported files are of an earlier architecture than the one shown here.")
    verdict = documents.verdict
    if verdict is not None and verdict.bundle_sha256 != documents.hashes.get(
        "export/bundle.json", verdict.bundle_sha256
    ):
        found.append("The verdict is about an earlier bundle than the one shown here.")
    found += [
        f"{name} was not validated: {why}."
        for name, why in (verdict.not_run if verdict is not None else {}).items()
    ]
    note = drift_note(verdict) if verdict is not None else None
    found += [sentence(note)] if note is not None else []
    if table is not None and table.calibration is None:
        found.append(
            "The latency table has no calibration against whole networks: its sums are not"
            " latencies of networks."
        )
    return found


def cautions(documents: RunDocuments) -> list[Caution]:
    """Why a result is less than it looks like: what the verdict says, and what the
    search and the training say themselves.
    """
    verdict, search, train = documents.verdict, documents.search, documents.train
    found = list(verdict.warnings) if verdict is not None else []
    if search is not None and search.learning is not None:
        found += search.learning.cautions
    if train is not None and train.caution is not None:
        found.append(train.caution)
    return list(dict.fromkeys(found))


def conditions(documents: RunDocuments) -> list[tuple[str, str]]:
    """Where and how latency was measured, as (name, value); without a table the device,
    but for studies, which use none then.
    """
    if documents.table is None:
        return [] if documents.only_study else [("device", documents.experiment.device.name)]
    header = documents.table.header
    cores = header.cores if isinstance(header.cores, str) else ", ".join(map(str, header.cores))
    return [
        ("device", header.device),
        ("CPU", header.cpu),
        ("runtime", f"{header.runtime} {header.runtime_version}"),
        ("dtype", header.dtype),
        ("threads", str(header.threads)),
        ("cores", cores),
        ("governor", header.governor),
        ("layout", header.layout),
        ("measured on", header.date),
    ]


@dataclass(frozen=True)
class BlockRow:
    """A block of the architecture with its counts and its price. ``share`` is its part
    of the sum over all blocks.
    """

    place: Placed
    op: Op
    ms: float | None
    share: float | None


def block_rows(documents: RunDocuments) -> list[BlockRow]:
    """The kept blocks, input to output."""
    prices = block_prices(documents)
    total = sum(price or 0.0 for price in prices)
    return [
        BlockRow(place, place.op, price, price / total if price is not None and total else None)
        for place, price in zip(documents.places(), prices, strict=True)
        if place.op is not None
    ]


def block_prices(documents: RunDocuments) -> list[float | None]:
    """The table's entry of each place; None where a slot is skipped or the table has none."""
    entries = documents.table.entries if documents.table is not None else {}
    return [
        entries[place.op.key].ms if place.op is not None and place.op.key in entries else None
        for place in documents.places()
    ]


def figures(documents: RunDocuments) -> dict[str, Any]:
    """Every figure whose documents exist: name -> SVG, and the two rows of curves as
    lists of (title, SVG).
    """
    search, table, rows, places = (
        documents.search,
        documents.table,
        documents.search_rows,
        documents.places(),
    )
    tolerance, unit = documents.experiment.search.tolerance, documents.unit
    target = None if documents.target is None else documents.target / unit.scale
    learns = [
        row for row in rows if row.get("reward") is not None or row.get("held_out_loss") is not None
    ]
    start = int(learns[0]["step"]) if learns else None
    sampled = Series(unit.quantity, "sampled", "pale-blue", factor=1 / unit.scale)
    expected = Series(unit.expected, "expected", exact=True, factor=1 / unit.scale)
    searching = [
        (
            "Reward",
            charts.course("reward", "reward", rows, [Series("reward", "reward")], start=start),
        ),
        (
            "Held-out loss",
            charts.course(
                "heldoutloss", "held-out loss", rows, [Series("held_out_loss", "loss")], start=start
            ),
        ),
        (
            sentence(unit.axis),
            charts.course(
                "latency",
                unit.noun,
                rows,
                [sampled, expected],
                target=target,
                tolerance=tolerance,
                start=start,
            ),
        ),
        (
            "Entropy of the policy, nats",
            charts.course(
                "entropy", "entropy", rows, [Series("entropy", "entropy", exact=True)], start=start
            ),
        ),
        ("Loss", charts.course("loss", "loss", rows, [Series("loss", "loss")], start=start)),
    ]
    accuracies = [Series("train_accuracy", "training batch")]
    if start is None:  # nothing is learnt but weights, so how well those do
        searching.append(
            (
                "Accuracy on training batches",
                charts.course("accuracy", "accuracy", rows, accuracies, percent=True),
            )
        )
    rows = documents.train_rows
    training = [
        ("Loss", charts.course("trainloss", "training loss", rows, [Series("loss", "loss")])),
        (
            "Its parts",
            charts.course(
                "trainparts",
                "parts of the loss",
                rows,
                [Series("class_loss", "classes"), Series("box_loss", "boxes", "orange")],
            ),
        ),
        _metric_course(documents.task, rows, documents.validation_rows),
    ]
    judged = (
        table.calibration.held_out if table is not None and table.calibration is not None else None
    )
    return {
        "architecture": drawing.architecture(places, block_prices(documents)) if places else None,
        "pareto": charts.pareto(search) if search is not None else None,
        "search": _drawn(searching),
        "search_start": start,
        "train": _drawn(training),
        "detections": (
            pictures.detections(documents.pictures.pictures)
            if documents.pictures is not None
            else None
        ),
        "held_out": charts.held_out(judged) if judged is not None and judged.pairs else None,
        "ranking": ranking.scatters(documents.study) if documents.study is not None else [],
        "comparing": (
            comparing.ranks(documents.comparison) if documents.comparison is not None else None
        ),
        "shrinking": (
            shrinking.course(documents.shrinking) if documents.shrinking is not None else None
        ),
        "entries": charts.entries(table.entries) if table is not None and table.entries else None,
    }


def _metric_course(task: Task, rows: Rows, validation_rows: Rows) -> tuple[str, Markup | None]:
    """How good a network was as it trained: on test images where it was looked at,
    beside training batches where they have an accuracy.
    """
    batches = [Series("train_accuracy", "training batch", "blue")]
    if not validation_rows:
        return "Accuracy on training batches", charts.course(
            "trainaccuracy", "training accuracy", rows, batches, percent=True
        )
    together = sorted([*rows, *validation_rows], key=lambda row: float(row["step"]))
    names = task.curve if len(task.curve) > 1 else dict.fromkeys(task.curve, "test images")
    looked_at = [
        Series(row, label, colour, exact=True)
        for (row, label), colour in zip(names.items(), CURVE_COLOURS, strict=False)
    ]
    what = f"{task.metric} on test images"
    curve = charts.course(
        f"train{task.metric.lower()}", what, together, [*batches, *looked_at], percent=True
    )
    return f"{sentence(what)} during training", curve


def class_rows(documents: RunDocuments) -> list[tuple[str, float | None]]:
    """The classes with what the task's metric is of each, the best first, those without
    objects last.
    """
    found = documents.train.per_class.items() if documents.train is not None else ()
    return sorted(found, key=lambda pair: -1.0 if pair[1] is None else pair[1], reverse=True)


def _drawn(curves: list[tuple[str, Markup | None]]) -> list[tuple[str, Markup]]:
    return [(title, svg) for title, svg in curves if svg is not None]


def ms(value: float | None) -> str:
    """Milliseconds with three significant digits, zeros kept: 1.50, 23.4, 0.0120; an en
    dash for none.
    """
    if value is None:
        return "–"
    if value <= 0:
        return f"{value:.3g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def percent(value: float | str | None, digits: int = 1) -> str:
    """A fraction as a percentage; words stay, none is an en dash."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.{digits}%}"


def quality(value: float, metric: str) -> str:
    """A quality of a search, whose metric says how it is written."""
    return shown(metric, value)


def sentence(clause: str) -> str:
    """A clause with a capital at its start.

    Example:
        >>> sentence("the search learned nothing")
        'The search learned nothing'
    """
    return clause[:1].upper() + clause[1:]


def signed(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage with its sign."""
    return "–" if value is None else f"{value:+.{digits}%}".replace("-", "−")


def against(value: float) -> str:
    """A relative difference in words: ``1.2% above``, ``0.4% below``."""
    return f"{abs(value):.1%} {'above' if value >= 0 else 'below'}"


def size(count: int) -> str:
    """Bytes as kB or MB (powers of 1000)."""
    return f"{count / 1e3:.0f} kB" if count < 1e6 else f"{count / 1e6:.2f} MB"


def big(count: int) -> str:
    """A count to three digits with its SI prefix: 345 k, 3.88 M, 1.20 G."""
    for factor, letter in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= factor:
            return f"{count / factor:#.3g}{letter}".replace(". ", " ")
    return str(count)


def amount(value: float) -> str:
    """What a limit limits: counts with their SI prefix, times as ``ms`` writes them."""
    return big(int(value)) if float(value).is_integer() else ms(value)


def huge(count: int) -> str:
    """A count that may be astronomical: 6.6 × 10¹⁷; below a million in full."""
    if count < 10**6:
        return f"{count:,}"
    digits, exponent = f"{count:.1e}".split("e+")
    return f"{digits} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"


_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
