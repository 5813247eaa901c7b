"""The report stage: turns a run folder into one HTML file that opens anywhere, offline.

Sections whose documents do not exist yet are left out, and the top of the page lists
the missing stages. The same documents give the same bytes.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from markupsafe import Markup

from hwnas import __version__
from hwnas.core.arch import Position
from hwnas.core.caution import Caution
from hwnas.core.metric import shown
from hwnas.core.ops import Op
from hwnas.document import content_sha256, file_sha256, write_atomic
from hwnas.errors import DocumentError, HwnasError
from hwnas.export.bundle import BundleFile
from hwnas.printable import printable, quoted
from hwnas.report import charts, comparing, drawing, pictures, ranking, shrinking
from hwnas.report.charts import Marks, Series
from hwnas.report.documents import Rows, RunDocuments, read, sources
from hwnas.report.style import DARK, LIGHT
from hwnas.runs import StageContext
from hwnas.stages import Stage
from hwnas.task import Task
from hwnas.tasks.pictures import MIN_SCORE, Pictures
from hwnas.verdict import FileVerdict, drift_note

D = TypeVar("D")
T = TypeVar("T")

CURVE_COLOURS = ("orange", "blue", "green")
"""Colours of the metrics of a validation curve, in order."""

__all__ = ["Report", "render", "write"]


class Report(Stage):
    """Draws what the run folder contains."""

    name = "report"
    result = "report.html"
    outputs = ["report.html"]
    runs_networks = False

    def inputs(self) -> dict[str, str]:
        """The documents that exist, and the configuration."""
        paths = [self.at.path(stage, name) for stage, name in sources()]
        paths.append(self.at.table_path)
        hashes = {}
        for path in paths:
            if path.is_file():
                hashes[f"{path.parent.name}/{path.name}"] = file_sha256(path)
        content = self.at.experiment.model_dump(mode="json", by_alias=True)
        # the page shows the configuration, so any key makes it stale
        return {**hashes, "config": content_sha256(content)}

    def summary(self) -> str:
        """The path of the report."""
        return str(self.at.path("report", "report.html"))

    @cached_property
    def documents(self) -> RunDocuments:
        """What the page shows."""
        ctx = StageContext(self.at.experiment, self.at.root, self.at.root / self.name)
        return read(ctx, self.at.space, self.at.table_path)

    def check_ready(self) -> None:
        """Raise DocumentError if a document that the page shows is damaged."""
        _ = self.documents

    def run(self, ctx: StageContext) -> None:
        """Write ``report.html``."""
        write(ctx, self.documents)


def write(ctx: StageContext, documents: RunDocuments) -> None:
    """Write ``report.html`` from what the run folder contains."""
    write_atomic(ctx.folder / "report.html", render(documents).encode())
    ctx.progress.info(f"report: {ctx.folder / 'report.html'}")


def render(documents: RunDocuments) -> str:
    """The page as a string of HTML. Raises DocumentError if the documents, each of them
    valid, contradict each other.
    """
    try:
        page = _filled(documents)
    except HwnasError:
        raise
    # numbers of one document that lead nowhere in another, such as a rank among 0 networks
    except (ArithmeticError, LookupError, TypeError, ValueError, TemplateError) as error:
        raise DocumentError(
            f"the documents in {documents.folder} contradict each other ({quoted(error)}): restore"
            " those that were changed, or repeat their stages with --fresh; --debug shows where."
        ) from error
    # names from files cannot reverse the reading direction of the page
    return printable(page)


def _filled(documents: RunDocuments) -> str:
    """The template with the documents in it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,  # a misspelt name is an error, not an empty string
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
    study = documents.study
    comparison = documents.comparison
    shrunk = documents.shrinking
    experiment = documents.experiment.model_dump(mode="json", by_alias=True)
    return environment.get_template("template.html").render(
        run=documents,
        version=__version__,
        themes={"light": LIGHT, "dark": DARK},
        files=file_rows(documents),
        headline_file=headline_file(documents),
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
        ranks=_if_present(study, ranking.score_rows) or [],
        methods=_if_present(comparison, comparing.method_rows) or [],
        pairwise=_if_present(comparison, comparing.pairwise_rows) or [],
        shrunk=_if_present(shrunk, shrinking.rows) or [],
        config=json.dumps(experiment, indent=2, ensure_ascii=False),
        command=_command(documents),
    )


def _if_present(document: D | None, show: Callable[[D], T]) -> T | None:
    """What ``show`` makes of a document; None if the document does not exist."""
    return None if document is None else show(document)


def _command(documents: RunDocuments) -> str:
    """The command that repeats the run in another folder."""
    verb = (documents.study_verb if documents.only_study else None) or "run"
    folder = documents.folder
    return f"hwnas {verb} {shlex.quote(folder)} --out {shlex.quote(folder + '-again')}"


@dataclass(frozen=True)
class FileRow:
    """An exported file, as the bundle describes it, and its verdict if it ran on the
    device.
    """

    file: BundleFile
    verdict: FileVerdict | None


def file_rows(documents: RunDocuments) -> list[FileRow]:
    """The exported files in the bundle's order."""
    if documents.bundle is None:
        return []
    verdicts = {}
    if documents.verdict is not None:
        verdicts = {file.name: file for file in documents.verdict.files}
    return [FileRow(file, verdicts.get(file.name)) for file in documents.bundle.files]


def headline_file(documents: RunDocuments) -> FileVerdict | None:
    """The file for the headline: the first one whose latency the table predicts, else
    the first one.
    """
    files = documents.verdict.files if documents.verdict is not None else ()
    for file in files:
        if file.predicted_ms is not None:
            return file
    return files[0] if files else None


@dataclass(frozen=True)
class TorchMetrics:
    """PyTorch's metrics by name, and the number of test images."""

    values: dict[str, float | None]
    images: int


def torch_metrics(documents: RunDocuments) -> TorchMetrics | None:
    """PyTorch's metrics, each from the latest document that has it: older documents of
    detectors only have AP.
    """
    train = documents.train
    bundle = documents.bundle
    verdict = documents.verdict
    values: dict[str, float | None] = {}
    images = 0
    if train is not None:
        values = values | train.metrics
        images = train.test_images
    if bundle is not None:
        values = {**values, **bundle.metrics}
        images = bundle.test_images
    if verdict is not None:
        values = {**values, **verdict.metrics}
        images = verdict.images
    return TorchMetrics(values, images) if values else None


def trained_numbers(documents: RunDocuments) -> dict[str, float | None]:
    """All metrics of the trained network, in the task's order."""
    metrics = documents.train.metrics if documents.train is not None else {}
    return {name: metrics[name] for name in documents.task.numbers if name in metrics}


def failures(documents: RunDocuments) -> list[str]:
    """Every failed check in one sentence."""
    verdict = documents.verdict
    if verdict is None:
        return []

    tolerances = verdict.tolerances
    sentences = []
    for file in verdict.files:
        error = file.latency_error
        if file.latency_passed is False and error is not None and file.predicted_ms is not None:
            # what was checked: the network's own time, corrected for the drift
            profiled_ms = (file.network_ms or file.measured_ms) / (verdict.drift or 1)
            sentences.append(
                f"{file.name} takes {ms(profiled_ms)} ms at the profiled speed, {against(error)}"
                f" the {ms(file.predicted_ms)} ms predicted; {tolerances.latency_tolerance:.1%} are"
                " allowed."
            )
        if not file.quality_passed:
            allowed = 100 * tolerances.tolerance(verdict.metric, file.dtype)
            sentences.append(
                f"{file.name} loses {100 * file.loss:.2f} points of {verdict.words.metric} against"
                f" PyTorch; {allowed:.2f} are allowed."
            )
        if file.parity_passed is False and file.parity is not None:
            sentences.append(
                f"the outputs of {file.name} differ from PyTorch's on {verdict.device}: relative"
                f" error {file.parity.relative_error:.1e}; {tolerances.parity_tolerance:.1e} is"
                " allowed."
            )
    return sentences


def notices(documents: RunDocuments) -> list[str]:
    """What a reader must know before trusting the numbers: missing stages, and
    documents that do not belong together.
    """
    sentences = []
    missing = []
    for stage in documents.stages:
        if not stage.finished:
            step = f" (interrupted at step {stage.step:,})" if stage.step else ""
            missing.append(f"{stage.name}{step}")
    if missing:
        sentences.append(
            f"Not finished yet: {', '.join(missing)}. Resume with: hwnas run"
            f" {shlex.quote(documents.folder)}"
        )

    search = documents.search
    table = documents.table
    bundle = documents.bundle
    arch = documents.arch
    # stages can be run one by one, so a folder may mix documents of different runs
    if search is not None and table is not None and search.table_sha256 != table.sha256:
        sentences.append("The search used a different latency table from the one shown here.")
    if bundle is not None and arch is not None and bundle.architecture.sha256 != arch.sha256:
        sentences.append(
            "The exported files contain an earlier architecture than the one shown here."
        )
    sentences += _notices_of_verdict(documents)
    if table is not None and table.calibration is None:
        sentences.append(
            "The latency table has no calibration against whole networks: its sums are not"
            " latencies of networks."
        )
    return sentences


def _notices_of_verdict(documents: RunDocuments) -> list[str]:
    verdict = documents.verdict
    if verdict is None:
        return []
    sentences = []
    # a report of a verdict without its bundle has nothing to compare
    bundle_sha256 = documents.hashes.get("export/bundle.json", verdict.bundle_sha256)
    if verdict.bundle_sha256 != bundle_sha256:
        sentences.append("The verdict is about an earlier bundle than the one shown here.")
    for name, why in verdict.not_run.items():
        sentences.append(f"{name} was not validated: {why}.")
    note = drift_note(verdict)
    if note is not None:
        sentences.append(sentence(note))
    return sentences


def cautions(documents: RunDocuments) -> list[Caution]:
    """Why the results are worse than they look: the warnings of the verdict, the search
    and the training, each once.
    """
    verdict = documents.verdict
    search = documents.search
    train = documents.train
    warnings = list(verdict.warnings) if verdict is not None else []
    if search is not None and search.learning is not None:
        warnings += search.learning.cautions
    if train is not None and train.caution is not None:
        warnings.append(train.caution)
    # a verdict repeats the warnings of the stages before it
    return list(dict.fromkeys(warnings))


def conditions(documents: RunDocuments) -> list[tuple[str, str]]:
    """Where and how latency was measured, as (name, value). Without a table only the
    device; for studies nothing, because then they use no device.
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
    """A block of the architecture with its counts and its cost. ``share`` is its
    fraction of the sum over all blocks.
    """

    position: Position
    op: Op
    ms: float | None
    share: float | None


def block_rows(documents: RunDocuments) -> list[BlockRow]:
    """The blocks that are not skipped, from input to output."""
    costs = block_costs(documents)
    total = sum(cost or 0.0 for cost in costs)
    rows = []
    for position, cost in zip(documents.positions(), costs, strict=True):
        if position.op is None:
            continue
        share = cost / total if cost is not None and total else None
        rows.append(BlockRow(position, position.op, cost, share))
    return rows


def block_costs(documents: RunDocuments) -> list[float | None]:
    """The latency of each position in ms; None if the slot is skipped or the table
    lacks its op.
    """
    entries = documents.table.entries if documents.table is not None else {}
    costs: list[float | None] = []
    for position in documents.positions():
        entry = entries.get(position.op.key) if position.op is not None else None
        costs.append(entry.ms if entry is not None else None)
    return costs


def figures(documents: RunDocuments) -> dict[str, Any]:
    """Every figure whose documents exist: name -> SVG, and the two rows of curves as
    lists of (title, SVG).
    """
    search = documents.search
    table = documents.table
    study = documents.study
    comparison = documents.comparison
    shrunk = documents.shrinking
    positions = documents.positions()
    start = _first_learning_step(documents.search_rows)
    architecture = None
    if positions:
        architecture = drawing.architecture(positions, block_costs(documents))
    entries = None
    if table is not None and table.entries:
        entries = charts.entries(table.entries)
    held_out = None
    if table is not None and table.calibration is not None:
        evaluated = table.calibration.held_out
        if evaluated is not None and evaluated.pairs:
            held_out = charts.held_out_errors(evaluated)
    return {
        "architecture": architecture,
        "pareto": _if_present(search, charts.pareto),
        "search": _search_curves(documents, start),
        "search_start": start,
        "train": _training_curves(documents),
        "detections": _if_present(documents.pictures, _detections),
        "held_out": held_out,
        "ranking": _if_present(study, ranking.scatters) or [],
        "comparing": _if_present(comparison, comparing.ranks),
        "shrinking": _if_present(shrunk, shrinking.plot_curves),
        "entries": entries,
    }


def _detections(document: Pictures) -> Markup:
    return pictures.detections(document.pictures)


def _first_learning_step(rows: Rows) -> int | None:
    """The step at which the search began to learn more than weights; None if it never
    did.
    """
    for row in rows:
        if row.get("reward") is not None or row.get("held_out_loss") is not None:
            return int(row["step"])
    return None


def _search_curves(documents: RunDocuments, start: int | None) -> list[tuple[str, Markup]]:
    """The curves of the search as (title, SVG); those without values are left out."""
    rows = documents.search_rows
    unit = documents.unit
    scale = 1 / unit.scale
    target = documents.target
    budget = Marks(
        target=None if target is None else target / unit.scale,
        tolerance=documents.experiment.search.tolerance,
        start=start,
    )
    begin = Marks(start=start)
    sampled = Series(unit.quantity, "sampled", "pale-blue", factor=scale)
    expected = Series(unit.expected, "expected", exact=True, factor=scale)
    reward = [Series("reward", "reward")]
    held_out_loss = [Series("held_out_loss", "loss")]
    entropy = [Series("entropy", "entropy", exact=True)]
    loss = [Series("loss", "loss")]
    curves = [
        ("Reward", charts.plot_curves("reward", "reward", rows, reward, marks=begin)),
        (
            "Held-out loss",
            charts.plot_curves("heldoutloss", "held-out loss", rows, held_out_loss, marks=begin),
        ),
        (
            sentence(unit.axis),
            charts.plot_curves("latency", unit.noun, rows, [sampled, expected], marks=budget),
        ),
        (
            "Entropy of the policy, nats",
            charts.plot_curves("entropy", "entropy", rows, entropy, marks=begin),
        ),
        ("Loss", charts.plot_curves("loss", "loss", rows, loss, marks=begin)),
    ]
    # If only weights are learned, their accuracy is all that shows progress.
    if start is None:
        accuracy = [Series("train_accuracy", "training batch")]
        curve = charts.plot_curves("accuracy", "accuracy", rows, accuracy, percent=True)
        curves.append(("Accuracy on training batches", curve))
    return _drawn(curves)


def _training_curves(documents: RunDocuments) -> list[tuple[str, Markup]]:
    """The curves of the training as (title, SVG); those without values are left out."""
    rows = documents.train_rows
    loss = [Series("loss", "loss")]
    parts = [Series("class_loss", "classes"), Series("box_loss", "boxes", "orange")]
    return _drawn(
        [
            ("Loss", charts.plot_curves("trainloss", "training loss", rows, loss)),
            (
                "Parts of the loss",
                charts.plot_curves("trainparts", "parts of the loss", rows, parts),
            ),
            _metric_curves(documents.task, rows, documents.validation_rows),
        ]
    )


def _metric_curves(task: Task, rows: Rows, validation_rows: Rows) -> tuple[str, Markup | None]:
    """The task's metrics over the training: on test images at the steps where the
    network was evaluated, and on training batches for tasks that log an accuracy.
    """
    on_batches = [Series("train_accuracy", "training batch", "blue")]
    if not validation_rows:
        curve = charts.plot_curves(
            "trainaccuracy", "training accuracy", rows, on_batches, percent=True
        )
        return "Accuracy on training batches", curve

    merged = sorted([*rows, *validation_rows], key=lambda row: float(row["step"]))
    # a single curve needs no name of its metric: the title has it
    labels = task.curve if len(task.curve) > 1 else dict.fromkeys(task.curve, "test images")
    on_test_images = []
    for (key, label), colour in zip(labels.items(), CURVE_COLOURS, strict=False):
        on_test_images.append(Series(key, label, colour, exact=True))
    name = f"train{task.metric.lower()}"
    title = f"{task.metric} on test images"
    curve = charts.plot_curves(name, title, merged, [*on_batches, *on_test_images], percent=True)
    return f"{sentence(title)} during training", curve


def class_rows(documents: RunDocuments) -> list[tuple[str, float | None]]:
    """The classes with the task's metric, the best first, those without
    objects last.
    """

    def value_of(row: tuple[str, float | None]) -> float:
        _, value = row
        return -1.0 if value is None else value

    rows = documents.train.per_class.items() if documents.train is not None else ()
    return sorted(rows, key=value_of, reverse=True)


def _drawn(curves: list[tuple[str, Markup | None]]) -> list[tuple[str, Markup]]:
    return [(title, svg) for title, svg in curves if svg is not None]


def ms(value: float | None) -> str:
    """Milliseconds with three significant digits, zeros kept: 1.50, 23.4, 0.0120; an en
    dash for None.
    """
    if value is None:
        return "–"
    if value <= 0:
        return f"{value:.3g}"
    decimals = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:.{decimals}f}"


def percent(value: float | str | None, digits: int = 1) -> str:
    """A fraction as a percentage; strings are returned unchanged, None is
    an en dash.
    """
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:.{digits}%}"


def quality(value: float, metric: str) -> str:
    """A search's quality, formatted as its metric requires."""
    return shown(metric, value)


def sentence(clause: str) -> str:
    """A clause with a capital first letter.

    Example:
        >>> sentence("the search learned nothing")
        'The search learned nothing'
    """
    return clause[:1].upper() + clause[1:]


def signed(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage with its sign."""
    if value is None:
        return "–"
    return f"{value:+.{digits}%}".replace("-", "−")


def against(value: float) -> str:
    """A relative difference in words: ``1.2% above``, ``0.4% below``."""
    direction = "above" if value >= 0 else "below"
    return f"{abs(value):.1%} {direction}"


def size(count: int) -> str:
    """Bytes as kB or MB (powers of 1000)."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.2f} MB"


def big(count: int) -> str:
    """A count to three digits with its SI prefix: 345 k, 3.88 M, 1.20 G."""
    for factor, letter in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= factor:
            # "#" keeps trailing zeros, and with three digits a final point as well
            return f"{count / factor:#.3g}{letter}".replace(". ", " ")
    return str(count)


def amount(value: float) -> str:
    """The value of a limit: counts with their SI prefix, times as ``ms``
    formats them.
    """
    return big(int(value)) if float(value).is_integer() else ms(value)


def huge(count: int) -> str:
    """A count that may be astronomical: 6.6 × 10¹⁷; below a million in full."""
    if count < 10**6:
        return f"{count:,}"
    digits, exponent = f"{count:.1e}".split("e+")
    power = str(int(exponent)).translate(_SUPERSCRIPT)  # int removes a leading zero
    return f"{digits} × 10{power}"


_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
