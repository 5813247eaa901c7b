"""The result of validation, as a document and as text."""

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
    "post_processing_ms",
    "app_post_processing_ms",
    "app_ms",
    "timed_on",
    "min_score",
    "app_score",
    "network_ms",
)
"""Fields that apply only to files whose answers depend on a score threshold, or whose
graph contains more than the network.
"""


def _sparse(content: dict[str, Any]) -> dict[str, Any]:
    """The content without fields that do not apply to the files, and without an empty
    list of warnings.
    """
    # verdicts from before these fields existed must keep their hash
    sparse = {}
    for name, value in content.items():
        if value is not None or name not in OPTIONAL_FIELDS:
            sparse[name] = value
    if not sparse.get("warnings", True):
        del sparse["warnings"]
    return sparse


class FileVerdict(Record):
    """One file on the device. Its latency is checked if a table of the same runtime,
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
            "for float files; none for int8 and for NMS in the graph, where only the metric counts"
        )
    )
    metrics: dict[str, float] = Field(description="its metrics on the device, by name")
    # a drop in the metric: the key is older than this word, and documents contain it
    loss: float = Field(description="how far the verdict's metric drops against PyTorch")
    quality_passed: bool
    network_ms: float | None = Field(
        None,
        description=(
            "for a file with more in its graph (a detector's decoding, normalisation, softmax): the"
            " time of the network by itself, which is checked if a table predicts it"
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
        None, description="the same for detections with a score of app_score or more"
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
            "with NMS in the graph, whose time depends on the image: the kind of image on which"
            " measured_ms and app_ms were measured"
        ),
    )

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _sparse(handler(self))

    @property
    def passed(self) -> bool:
        """Whether everything that was checked is within its tolerance."""
        # None means that a check does not apply to this file, which is no failure
        return self.quality_passed and False not in (self.latency_passed, self.parity_passed)


class Verdict(Document):
    """The result of validation. ``passed`` only if every checked number is within its
    tolerance.

    ``warnings`` come from the earlier search and training: a network that learned
    nothing can still pass every check. Version 1 had fields of accuracy for classifiers
    and of AP for detectors.
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
        description="why the table predicts nothing here; none if it does"
    )
    drift: float | None = Field(
        description=("time of the network's blocks now / in the table; none if no table applies")
    )
    tolerances: ValidateConfig
    images: int
    task: str
    metric: str = Field(description="the metric that files are evaluated by")
    metrics: dict[str, float] = Field(description="PyTorch's on the same images, by name")
    min_score: float | None = Field(
        None, description="for a detector: the lowest score of detections that count for AP"
    )
    app_score: float | None = Field(
        None,
        description=(
            "for a detector: a higher score, as an app needs it, at which NMS was timed as well"
        ),
    )
    files: tuple[FileVerdict, ...]
    not_run: dict[str, str] = Field(
        {}, description="files of the bundle that were left out, and why"
    )
    passed: bool
    warnings: tuple[Caution, ...] = Field(
        (), description="why the network is worse than the verdict suggests"
    )

    @model_serializer(mode="wrap")
    def _sparse(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _sparse(handler(self))

    @field_serializer("tolerances", mode="wrap")
    def _known(
        self, value: ValidateConfig, handler: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        """The tolerances without ``app_score`` unless the user set it. Verdicts are
        older than that key, and their hashes must not change.
        """
        content: dict[str, Any] = handler(value)
        if "app_score" not in value.model_fields_set:
            content.pop("app_score", None)
        return content

    @property
    def words(self) -> Words:
        """The words in which its metric is reported."""
        return task_named(self.task).words

    @classmethod
    def migrate(cls, version: int, content: dict[str, Any]) -> dict[str, Any]:
        """Translate the field names of version 1."""
        for name, metric, task in (("accuracy", ACCURACY, "classify"), ("ap", AP, "detect")):
            value = content.pop(f"torch_{name}", None)
            if value is None:
                continue
            content |= {"task": task, "metric": metric, "metrics": {metric: value}}
            content["files"] = [_renamed(file, name, metric) for file in content.get("files", ())]
        return content


def _renamed(file: dict[str, Any], name: str, metric: str) -> dict[str, Any]:
    """A file of a version 1 verdict, whose metric fields began with ``name``."""
    old = (name, f"{name}_loss", f"{name}_passed")
    kept = {key: value for key, value in file.items() if key not in old}
    values = {
        "metrics": {metric: file.get(name)},
        "loss": file.get(f"{name}_loss"),
        "quality_passed": file.get(f"{name}_passed"),
    }
    return {**kept, **values}


def drift_note(verdict: Verdict) -> str | None:
    """One sentence about a device that is no longer as fast as when it was profiled;
    None if it is within the tolerance.
    """
    if verdict.drift is None or abs(verdict.drift - 1) <= verdict.tolerances.latency_tolerance:
        return None
    direction = "slower" if verdict.drift > 1 else "faster"
    change = (
        f"{verdict.device} is {abs(verdict.drift - 1):.0%} {direction} now than when it was"
        " profiled (its clock, temperature or load changed)"
    )
    max_drift = verdict.tolerances.max_drift
    if abs(verdict.drift - 1) > max_drift:
        return f"{change}, more than the {max_drift:.0%} allowed: profile it again."
    return f"{change}; predictions are checked at the profiled speed."


def _post_processing(verdict: Verdict, file: FileVerdict) -> str:
    """The time of NMS at both thresholds: in the file's time, or in addition to it."""
    for_ap = f"{verdict.min_score:g}, as AP needs" if verdict.min_score is not None else ""
    if file.app_ms is not None:
        return (
            f" at score {for_ap}, {file.app_ms:.4g} ms at {verdict.app_score:g}, on"
            f" {_IMAGE_WORDS[file.timed_on or 'noise']}"
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


_IMAGE_WORDS = {"test image": "a test image", "noise": "noise"}


def lines(verdict: Verdict) -> list[str]:
    """A verdict as lines for a terminal."""
    out = [_file_line(verdict, file) for file in verdict.files]
    out += [f"{name}: not run, {why}" for name, why in verdict.not_run.items()]

    note = drift_note(verdict)
    if note is None and verdict.unpredicted:
        note = f"latency is not checked: {verdict.unpredicted}."
    if note is not None:
        out.append(f"note: {note}")

    remedies = []
    for file in verdict.files:
        remedy = _remedy(verdict, file)
        if remedy:
            remedies.append(f"what to do: {remedy}")
    out += dict.fromkeys(remedies)  # several files often need the same remedy
    return [*out, _conclusion(verdict)]


def _file_line(verdict: Verdict, file: FileVerdict) -> str:
    """A file's latency, metric and parity with their marks."""
    # the time that an app sees comes first; the corrected error explains it
    latency = f"{file.measured_ms:.4g} ms"
    if file.predicted_ms is not None and file.latency_error is not None:
        mark = _mark(file.latency_passed)
        latency += (
            f", drift {(verdict.drift or 1) - 1:+.1%}, error {file.latency_error:+.1%} of"
            f" {file.predicted_ms:.4g} ms predicted ({mark})"
        )
    if file.network_ms is not None:
        latency += f" ({file.network_ms:.4g} for the network by itself)"
    latency += _post_processing(verdict, file)

    outputs = ""
    if file.parity is not None:
        outputs = f", outputs within {file.parity.relative_error:.1e}"
    on_device = file.metrics[verdict.metric]
    in_pytorch = verdict.metrics[verdict.metric]
    quality = f"{verdict.words.metric} {on_device:.2%} against {in_pytorch:.2%}"
    # parity is None for int8 and for NMS in the graph, where outputs need not match
    mark = _mark(file.quality_passed and file.parity_passed is not False)
    return f"{file.name}: {latency}; {quality} in PyTorch{outputs} ({mark})"


def _mark(passed: bool | None) -> str:
    return "ok" if passed else "OUT OF TOLERANCE"


def _remedy(verdict: Verdict, file: FileVerdict) -> str | None:
    """What to do about a file that fails a check; None if it passes all."""
    config = verdict.tolerances
    # Wrong outputs come first: they explain a drop in the metric, and a bug in the export
    # makes the time meaningless.
    if file.parity_passed is False:
        return (
            f"the outputs of {file.name} differ from PyTorch's: this is a bug in the export or in"
            " the device's runtime, so report it."
        )
    if not file.quality_passed:
        key = f"validate.{config.tolerance_key(verdict.metric, file.dtype)}"
        # only int8 has ranges to calibrate
        more = "more export.calibration_images may help; " if file.dtype == "int8" else ""
        return (
            f"{file.name} loses more than {key} allows: {more}raise {key} if the file is good"
            " enough."
        )
    if file.latency_passed is not False:
        return None
    # Of the causes of a wrong latency, drift and noise are ruled out before the table is
    # blamed, because each of them also makes a correct table look wrong.
    if verdict.drift is not None and abs(verdict.drift - 1) > config.max_drift:
        return (
            "profile this device again in its current state (hwnas profile with --fresh), and run"
            " the rest again."
        )
    if file.spread > config.latency_tolerance:
        return (
            f"rounds of {file.name} differ by {file.spread:.1%}, but the latency tolerance is only"
            f" {config.latency_tolerance:.0%}: measure again on a quieter device (hwnas validate"
            " with --fresh) or in more rounds (validate.rounds)."
        )
    return (
        f"the error of the table for {file.name} is larger than validate.latency_tolerance ="
        f" {config.latency_tolerance:g}: profile again with more profile.rounds and"
        " profile.fit_networks, or raise the tolerance if the prediction is good enough."
    )


def _conclusion(verdict: Verdict) -> str:
    """The last line: passed or failed, and the warnings."""
    result = "passed" if verdict.passed else "FAILED"
    if not verdict.warnings:
        return f"verdict: {result}"
    warnings = "; ".join(str(caution).removesuffix(".") for caution in verdict.warnings)
    # a warning contrasts with a pass and adds to a failure
    conjunction = "but" if verdict.passed else "and"
    return f"verdict: {result}, {conjunction} {warnings}."
