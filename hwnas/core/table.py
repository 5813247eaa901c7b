"""Latency tables: what each op costs on one device, how that was measured, and how well it adds up."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hwnas.core.op import Op
from hwnas.document import Document


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TableHeader(_Part):
    """The conditions of the measurement. All are required; what is not known is written ``"unknown"``."""

    device: str
    cpu: str
    machine: str
    runtime: str
    runtime_version: str = Field(description="package and version, e.g. 'ai-edge-litert 2.3.0'")
    dtype: str
    threads: int | Literal["unknown"]
    cores: tuple[int, ...] | Literal["unknown"]
    governor: str
    layout: str
    batch: int | Literal["unknown"]
    date: str
    space: str


class Entry(_Part):
    """One op's latency in milliseconds.

    ``ms`` is the median over rounds of the median over runs; ``p10_ms`` and ``p90_ms`` are over all runs; ``spread`` is the
    interquartile range of the rounds' medians divided by ``ms``. ``noisy`` entries stayed above the allowed spread even
    after re-measurement: they are used, but never silently.
    """

    ms: float = Field(ge=0)
    p10_ms: float | Literal["unknown"] = "unknown"
    p90_ms: float | Literal["unknown"] = "unknown"
    runs: int | Literal["unknown"] = "unknown"
    rounds: int | Literal["unknown"] = "unknown"
    spread: float | Literal["unknown"] = "unknown"
    noisy: bool = False
    delegated: bool | Literal["unknown"] = Field("unknown", description="LiteRT: whether XNNPACK took the whole op")


class HeldOut(_Part):
    """Calibrated prediction against measurement on networks that the calibration has not seen."""

    networks: int
    mape: float = Field(description="mean absolute percentage error, as a fraction")
    max_error: float = Field(description="largest absolute percentage error, as a fraction")
    spearman: float | None = Field(description="rank correlation; none for fewer than three networks, or all alike")
    raw_mape: float = Field(description="the error of the uncalibrated sum of entries")
    pairs: tuple[tuple[float, float], ...] = Field(description="(predicted, measured) milliseconds per network")


class Calibration(_Part):
    """``network_ms = intercept_ms + sum over ops of (slope * entry + cold_ms_per_mparam * parameters / 10^6)``.

    Fitted on whole networks. The last term is for weights: a block that is timed alone finds its own in the cache every time,
    inside a network they come from further away. It stays a price per op, so nothing else changes.
    """

    intercept_ms: float
    slope: float = Field(gt=0)
    cold_ms_per_mparam: float = Field(0.0, ge=0)
    networks: int = Field(description="how many networks it was fitted on")
    noisy_networks: int = Field(0, description="networks, fitted or held out, that stayed above the allowed spread; they are left out")
    held_out: HeldOut | None = None

    def op_ms(self, entry_ms: float, params: int) -> float:
        """What an op costs inside a network, in milliseconds."""
        return self.slope * entry_ms + self.cold_ms_per_mparam * params / 1e6

    def __str__(self) -> str:
        cold = f" + {self.cold_ms_per_mparam:.4g} ms x million parameters" if self.cold_ms_per_mparam else ""
        return f"{self.intercept_ms:.4g} ms + {self.slope:.4g} x sum{cold}"


class LatencyTable(Document):
    """Latency per op (``entries``), or per slot and option (``slots``), on one device under stated conditions.

    ``slots`` hold models that price positions instead of ops, such as TuNAS's published linear regression, whose
    coefficients differ between equal blocks at different places; negative coefficients are normal there.
    """

    SCHEMA: ClassVar[str] = "hwnas.table"

    header: TableHeader
    entries: dict[str, Entry] = {}
    slots: dict[str, dict[str, float]] = {}
    calibration: Calibration | None = None
    provenance: dict[str, str] = {}

    @model_validator(mode="after")
    def _keys(self) -> Self:
        for key in self.entries:
            Op.parse(key)
        if not self.entries and not self.slots:
            raise ValueError("a table needs entries or slots")
        return self

    @property
    def title(self) -> str:
        """Short name: device, runtime, dtype, threads."""
        header = self.header
        return f"{header.device}/{header.runtime}-{header.dtype}-{header.threads}t"


FIT_COLD_FROM = 8
"""Networks from which on the price of cold weights is fitted too; with fewer, a third coefficient would fit noise."""


def fit_calibration(sums_ms: list[float], measured_ms: list[float], mparams: list[float] | None = None) -> Calibration:
    """The map from sums of entries (and million parameters) to whole networks: least squares of the *relative* error.

    Relative, because a table serves fast and slow networks alike. Three or more networks whose sums differ
    by 5 % are needed; with fewer, or where the fit would have a slope below zero, the slope alone is fitted. The price of cold
    weights is fitted from ``FIT_COLD_FROM`` networks on, and dropped where it would be negative.
    """
    x, y = np.asarray(sums_ms), np.asarray(measured_ms)
    if mparams is not None and len(x) >= FIT_COLD_FROM:
        slope, cold, intercept = _relative_fit(y, x, np.asarray(mparams), np.ones(len(x)))
        if slope > 0 and cold > 0:
            return Calibration(intercept_ms=intercept, slope=slope, cold_ms_per_mparam=cold, networks=len(x))
    if len(x) >= 3 and np.ptp(x) > 0.05 * x.mean():
        slope, intercept = _relative_fit(y, x, np.ones(len(x)))
        if slope > 0:
            return Calibration(intercept_ms=intercept, slope=slope, networks=len(x))
    return Calibration(intercept_ms=0.0, slope=float(np.median(y / x)), networks=len(x))


def _relative_fit(y: np.ndarray, *columns: np.ndarray) -> list[float]:
    """Coefficients of ``columns`` that minimise the sum of (prediction / y - 1)^2."""
    design = np.stack([column / y for column in columns], axis=1)
    coefficients: list[float] = np.linalg.lstsq(design, np.ones(len(y)), rcond=None)[0].tolist()
    return coefficients


def judge(calibration: Calibration, sums_ms: list[float], measured_ms: list[float], mparams: list[float] | None = None) -> HeldOut:
    """The calibrated error on held-out networks."""
    x, y = np.asarray(sums_ms), np.asarray(measured_ms)
    cold = calibration.cold_ms_per_mparam * np.asarray(mparams) if mparams is not None else 0.0
    predicted = calibration.intercept_ms + calibration.slope * x + cold
    errors = np.abs(predicted / y - 1)
    return HeldOut(
        networks=len(x),
        mape=float(errors.mean()),
        max_error=float(errors.max()),
        spearman=spearman(predicted, y) if len(x) > 2 and np.ptp(predicted) > 0 and np.ptp(y) > 0 else None,
        raw_mape=float(np.abs(x / y - 1).mean()),
        pairs=tuple((float(p), float(m)) for p, m in zip(predicted, y, strict=True)),
    )


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two samples, ties sharing their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank: np.ndarray = np.cumsum(counts) - (counts - 1) / 2
    return mean_rank[inverse]
