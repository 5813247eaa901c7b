"""What validation found, as a document and in words."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_serializer,
    model_serializer,
)

from hwnas.config import ValidateConfig
from hwnas.core.caution import Caution
from hwnas.core.metric import ACCURACY, AP
from hwnas.document import Document, Record
from hwnas.task import Parity, Words, task_named

OPTIONAL_FIELDS = (
    *(
        "post_processing_ms",
        "app_post_processing_ms",
        "app_ms",
        "timed_on",
        "min_score",
        "app_score",
    ),
    *("network_ms",),
)
"""What verdicts have of files that answer with a threshold, or that hold more than
their network.
"""


def _sparse(content: dict[str, Any]) -> dict[str, Any]:
    """Without what does not apply to the files, and without a list of no warnings."""
    found = {
        name: value
        for name, value in content.items()
        if value is not None or name not in OPTIONAL_FIELDS
    }
    if not found.get("warnings", True):
        del found["warnings"]
    return found


class FileVerdict(Record):
    """One file on the device. Latency is judged where a table of the same runtime,
    dtype and threads predicts it.
    """

    name: str
    runtime: str
    runtime_version: str
    dtype: str
    measured_ms: float = Field(description="median over rounds of the median over runs")
    spread: float = Field(description="interquartile range of the rounds' medians / median")
    predicted_ms: float | None
    latency_error: float | None = Field(
        description="measured_ms / drift against predicted_ms, as a fraction"
    )
    latency_passed: bool | None
    parity: Parity | None = Field(
        None, description="outputs on this device against PyTorch's, on the bundle's images"
    )
    parity_passed: bool | None = Field(
        description=(
            "for float files; none for int8, and for NMS in the graph, which are judged by the"
            " metric alone"
        )
    )
    metrics: dict[str, float] = Field(description="how good it is on the device, by name")
    loss: float = Field(description="what it loses of the verdict's metric against PyTorch")
    quality_passed: bool
    network_ms: float | None = Field(
        None,
        description=(
            "of a file with more in its graph (a detector's decoding, normalisation, softmax): the"
            " time of the network alone, which is judged where a table predicts it"
        ),
    )
    post_processing_ms: float | None = Field(
        None,
        description=(
            "median time of the NumPy post-processing of one image, on the computer that validates;"
            " not in measured_ms"
        ),
    )
    app_post_processing_ms: float | None = Field(
        None, description="the same, of what scores app_score or more"
    )
    app_ms: float | None = Field(
        None,
        description=(
            "with NMS in the graph: measured_ms of the same file with the threshold app_score"
        ),
    )
    timed_on: Literal["test image", "noise"] | None = Field(
        None,
        description=(
            "with NMS in the graph, whose time depends on what is seen: what measured_ms and app_ms"
            " are of"
        ),
    )

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _sparse(handler(self))

    @property
    def passed(self) -> bool:
        """Whether all that was judged is within its tolerance."""
        return self.quality_passed and False not in (self.latency_passed, self.parity_passed)


class Verdict(Document):
    """What validation found. ``passed`` only if every judged number is within its tolerance.

    That is about promises of latency and parity. ``warnings`` are about the search and
    the training that came before: promises are kept just as well by a network that
    learned nothing. Version 1 had fields of accuracy for classifiers, and of AP for
    detectors.
    """

    SCHEMA: ClassVar[str] = "hwnas.verdict"
    VERSION: ClassVar[int] = 2

    device: str
    cpu: str
    cores: tuple[int, ...]
    governor: str
    threads: int
    date: str
    bundle_sha256: str
    table: str | None
    table_sha256: str | None
    unpredicted: str | None = Field(
        description="why the table predicts nothing here; none where it does"
    )
    drift: float | None = Field(
        description=(
            "time of the network's blocks now / in the table; none without a table that applies"
        )
    )
    tolerances: ValidateConfig
    images: int
    task: str
    metric: str = Field(description="what files are judged by")
    metrics: dict[str, float] = Field(description="PyTorch's on the same images, by name")
    min_score: float | None = Field(
        None, description="of a detector: the score from which detections count for AP"
    )
    app_score: float | None = Field(
        None,
        description=(
            "of a detector: the higher score at which NMS was timed, too, as an app needs it"
        ),
    )
    files: tuple[FileVerdict, ...]
    not_run: dict[str, str] = Field(
        {}, description="files of the bundle that were left out, and why"
    )
    passed: bool
    warnings: tuple[Caution, ...] = Field(
        (), description="why the network is less than it looks like"
    )

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _sparse(handler(self))

    @field_serializer("tolerances", mode="wrap")
    def _known(
        self, value: ValidateConfig, handler: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        """Without what verdicts had not when they began, while nobody chose it: their
        hashes stay.
        """
        content: dict[str, Any] = handler(value)
        return {
            name: each
            for name, each in content.items()
            if name != "app_score" or "app_score" in value.model_fields_set
        }

    @property
    def words(self) -> Words:
        """How to speak of its metric."""
        return task_named(self.task).words

    @classmethod
    def migrate(cls, version: int, content: dict[str, Any]) -> dict[str, Any]:
        """The names of version 1."""
        for name, metric, task in (("accuracy", ACCURACY, "classify"), ("ap", AP, "detect")):
            value = content.pop(f"torch_{name}", None)
            if value is None:
                continue
            content |= {"task": task, "metric": metric, "metrics": {metric: value}}
            content["files"] = [_renamed(file, name, metric) for file in content.get("files", ())]
        return content


def _renamed(file: dict[str, Any], name: str, metric: str) -> dict[str, Any]:
    """A file of a verdict of version 1, whose fields began with ``name``."""
    old = (name, f"{name}_loss", f"{name}_passed")
    kept = {key: value for key, value in file.items() if key not in old}
    values = {
        "metrics": {metric: file.get(name)},
        "loss": file.get(f"{name}_loss"),
        "quality_passed": file.get(f"{name}_passed"),
    }
    return {**kept, **values}


def drift_note(verdict: Verdict) -> str | None:
    """A sentence about a device that is not as fast as when it was profiled; None while
    it is within the tolerance.
    """
    if verdict.drift is None or abs(verdict.drift - 1) <= verdict.tolerances.latency_tolerance:
        return None
    how = "slower" if verdict.drift > 1 else "faster"
    said = (
        f"{verdict.device} is {abs(verdict.drift - 1):.0%} {how} now than when it was profiled (its"
        " clock, temperature or load changed)"
    )
    if abs(verdict.drift - 1) > verdict.tolerances.max_drift:
        return (
            f"{said}, more than the {verdict.tolerances.max_drift:.0%} allowed: profile it again."
        )
    return f"{said}; predictions are judged at the profiled speed."


def _post_processing(verdict: Verdict, file: FileVerdict) -> str:
    """What NMS takes beside a file's time, or in it, at both thresholds."""
    for_ap = f"{verdict.min_score:g}, as AP needs" if verdict.min_score is not None else ""
    if file.app_ms is not None:
        return (
            f" at score {for_ap}, {file.app_ms:.4g} ms at {verdict.app_score:g}, on"
            f" {_A[file.timed_on or 'noise']}"
        )
    if file.app_post_processing_ms is not None and file.post_processing_ms is not None:
        at_app = (
            f" + {file.app_post_processing_ms:.3g} ms of post-processing in NumPy at score"
            f" {verdict.app_score:g}"
        )
        return f"{at_app} ({file.post_processing_ms:.3g} ms at {for_ap})"
    if file.post_processing_ms is not None:
        return f" and {file.post_processing_ms:.3g} ms of post-processing in NumPy"
    return ""


_A = {"test image": "a test image", "noise": "noise"}


def lines(verdict: Verdict) -> list[str]:
    """A verdict as lines for a terminal."""
    out = []
    for file in verdict.files:
        latency = f"{file.measured_ms:.4g} ms"
        if file.predicted_ms is not None and file.latency_error is not None:
            mark = "ok" if file.latency_passed else "OUT OF TOLERANCE"
            latency += (
                f", drift {(verdict.drift or 1) - 1:+.1%}, error {file.latency_error:+.1%} of"
                f" {file.predicted_ms:.4g} ms predicted ({mark})"
            )
        mark = (
            "ok" if file.quality_passed and file.parity_passed is not False else "OUT OF TOLERANCE"
        )
        outputs = (
            "" if file.parity is None else f", outputs within {file.parity.relative_error:.1e}"
        )
        if file.network_ms is not None:
            latency += f" ({file.network_ms:.4g} for the network alone)"
        latency += _post_processing(verdict, file)
        values = file.metrics[verdict.metric], verdict.metrics[verdict.metric]
        quality = f"{verdict.words.metric} {values[0]:.2%} against {values[1]:.2%}"
        out.append(f"{file.name}: {latency}; {quality} in PyTorch{outputs} ({mark})")
    out += [f"{name}: not run, {why}" for name, why in verdict.not_run.items()]
    note = drift_note(verdict) or (
        f"latency is not judged: {verdict.unpredicted}." if verdict.unpredicted else None
    )
    remedies = [
        f"what to do: {remedy}"
        for remedy in (_remedy(verdict, file) for file in verdict.files)
        if remedy
    ]
    return [
        *out,
        *([f"note: {note}"] if note else []),
        *dict.fromkeys(remedies),
        _conclusion(verdict),
    ]


def _remedy(verdict: Verdict, file: FileVerdict) -> str | None:
    """What to do about a file that is not as promised; None where it is."""
    config = verdict.tolerances
    if file.parity_passed is False:
        return (
            f"the outputs of {file.name} are not PyTorch's: this is a fault of the export or of the"
            " device's runtime, so report it."
        )
    if not file.quality_passed:
        key = f"validate.{config.tolerance_key(verdict.metric, file.dtype)}"
        more = "more export.calibration_images may help; " if file.dtype == "int8" else ""
        return f"{file.name} loses more than {key} allows: {more}raise {key} if it is good enough."
    if file.latency_passed is not False:
        return None
    if verdict.drift is not None and abs(verdict.drift - 1) > config.max_drift:
        return (
            "profile this device again, as it is now (hwnas profile with --fresh), and run the rest"
            " again."
        )
    if file.spread > config.latency_tolerance:
        return (
            f"rounds of {file.name} differ by {file.spread:.1%}, and {config.latency_tolerance:.0%}"
            " are allowed in all: measure again on a quieter device (hwnas validate with --fresh),"
            " or in more rounds (validate.rounds)."
        )
    return (
        f"the table predicts {file.name} less well than validate.latency_tolerance ="
        f" {config.latency_tolerance:g}: profile again with more profile.rounds and"
        " profile.fit_networks, or raise the tolerance if that is good enough."
    )


def _conclusion(verdict: Verdict) -> str:
    """The last line: passed or failed, and what else is wrong."""
    if not verdict.warnings:
        return f"verdict: {'passed' if verdict.passed else 'FAILED'}"
    beside = "; ".join(str(caution).removesuffix(".") for caution in verdict.warnings) + "."
    return f"verdict: passed, but {beside}" if verdict.passed else f"verdict: FAILED, and {beside}"
