"""Latency tables: what each op costs on one device, how that was measured, and how well it adds up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hwnas.core.ops import Op
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
    delegated: bool | Literal["unknown"] = Field("unknown", description="LiteRT: whether the delegate (XNNPACK) took the whole op")


class HeldOut(_Part):
    """Calibrated prediction against measurement on networks that the calibration has not seen."""

    networks: int
    mape: float = Field(description="mean absolute percentage error, as a fraction")
    max_error: float = Field(description="largest absolute percentage error, as a fraction")
    spearman: float | None = Field(description="rank correlation; none for fewer than three networks, or all alike")
    raw_mape: float = Field(description="the error of the uncalibrated sum of entries")
    pairs: tuple[tuple[float, float], ...] = Field(description="(predicted, measured) milliseconds per network")


class Calibration(_Part):
    """``network_ms = intercept_ms + sum over ops of (slope * entry + cold(op))``, fitted on whole networks.

    ``cold(op)`` is what an op that is timed alone does not pay: it finds its weights, its input and the place of its output in the
    cache every time, while inside a network they come from further away, unless they never fitted. So it is
    ``cold_ms_per_mparam * parameters / 10^6`` or ``cold_ms_per_mvalue * min(parameters + inputs + outputs, cap) / 10^6``, whichever
    the networks speak for. It stays a price per op, so nothing else changes.
    """

    intercept_ms: float
    slope: float = Field(gt=0)
    cold_ms_per_mparam: float = Field(0.0, ge=0)
    cold_ms_per_mvalue: float = Field(0.0, ge=0)
    cold_cap_mvalues: float | None = Field(None, gt=0, description="million values that the cache holds; none: no cap")
    networks: int = Field(description="how many networks it was fitted on")
    noisy_networks: int = Field(0, description="networks, fitted or held out, that stayed above the allowed spread; they are left out")
    held_out: HeldOut | None = None

    def op_ms(self, entry_ms: float, op: Op) -> float:
        """What an op costs inside a network, in milliseconds."""
        cold = self.cold_ms_per_mparam * op.params / 1e6 + self.cold_ms_per_mvalue * _mvalues(op, self.cold_cap_mvalues)
        return self.slope * entry_ms + cold

    def network_ms(self, ops: Iterable[Op], sum_ms: float) -> float:
        """What a network of these ops costs, whose entries add up to ``sum_ms``."""
        return self.intercept_ms + self.slope * sum_ms + sum(self.op_ms(0.0, op) for op in ops)

    def __str__(self) -> str:
        cold = f" + {self.cold_ms_per_mparam:.4g} ms x million parameters" if self.cold_ms_per_mparam else ""
        cap = f", at most {self.cold_cap_mvalues:g} per op" if self.cold_cap_mvalues is not None else ""
        cold += f" + {self.cold_ms_per_mvalue:.4g} ms x million weights and activations{cap}" if self.cold_ms_per_mvalue else ""
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
        """Short name: device, and of runtime, dtype and threads those that are known."""
        header = self.header
        parts = (header.runtime, header.dtype, f"{header.threads}t")
        known = "-".join(part for part in parts if not part.startswith("unknown"))
        return f"{header.device}/{known}" if known else header.device


FIT_COLD_FROM = 8
"""Networks from which on the price of cold memory is fitted too; with fewer, a third coefficient would fit noise."""
CAPS_MVALUES = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, None)
"""Caps that are tried: 250 kB to 16 MB of float32, the caches of phones to those of servers."""


def fit_calibration(networks: Sequence[Sequence[Op]], sums_ms: Sequence[float], measured_ms: Sequence[float]) -> Calibration:
    """The map from sums of entries to whole networks (chains of ops): least squares of the *relative* error.

    Relative, because a table serves fast and slow networks alike. Three or more networks whose sums differ by 5 % are needed; with
    fewer, or where the fit would have a slope below zero, the slope alone is fitted. From ``FIT_COLD_FROM`` networks on, the price
    of cold memory is fitted in each of its forms; the form that predicts every network best from the others is taken, and none
    where its price would be negative.
    """
    x, y = np.asarray(sums_ms, dtype=float), np.asarray(measured_ms, dtype=float)
    plain = Calibration(intercept_ms=0.0, slope=float(np.median(y / x)), networks=len(x))
    if len(x) < 3 or np.ptp(x) <= 0.05 * x.mean():
        return plain
    shapes = [plain]
    if len(x) >= FIT_COLD_FROM:
        shapes.append(plain.model_copy(update={"cold_ms_per_mparam": 1.0}))
        shapes += [plain.model_copy(update={"cold_ms_per_mvalue": 1.0, "cold_cap_mvalues": cap}) for cap in CAPS_MVALUES]
    fits = [fit for fit in (_fit_shape(shape, networks, x, y) for shape in shapes) if fit is not None]
    return min(fits, key=lambda fit: fit[0])[1] if fits else plain


def _fit_shape(shape: Calibration, networks: Sequence[Sequence[Op]], x: np.ndarray, y: np.ndarray) -> tuple[float, Calibration] | None:
    """``shape``, which says with prices of 1 what cold memory is, fitted; with the mean error of leaving each network out.

    None where the slope or the price comes out below zero. A network's error by the fit to all others is its residual divided by
    1 - leverage, the leverages being the diagonal of the hat matrix.
    """
    cold = np.array([sum(shape.op_ms(0.0, op) for op in ops) for ops in networks])
    columns = [x, np.ones(len(x)), *([cold] if cold.any() else [])]
    design = np.stack(columns, axis=1) / y[:, None]
    coefficients = np.linalg.lstsq(design, np.ones(len(y)), rcond=None)[0]
    slope, intercept, price = (*coefficients, 0.0)[:3]
    if slope <= 0 or price < 0:
        return None
    leverage = np.einsum("ij,ji->i", design, np.linalg.pinv(design))
    left_out = np.abs(design @ coefficients - 1) / np.maximum(1 - leverage, 1e-9)
    prices = {name: float(price) * getattr(shape, name) for name in ("cold_ms_per_mparam", "cold_ms_per_mvalue")}
    return float(left_out.mean()), shape.model_copy(update={"slope": float(slope), "intercept_ms": float(intercept), **prices})


def _mvalues(op: Op, cap: float | None) -> float:
    """Million weights and activations that an op touches outside itself, at most ``cap``."""
    values = (op.params + op.in_ch * op.size**2 + op.out_ch * op.out_size**2) / 1e6
    return values if cap is None else min(values, cap)


def judge(calibration: Calibration, networks: Sequence[Sequence[Op]], sums_ms: Sequence[float], measured_ms: Sequence[float]) -> HeldOut:
    """The calibrated error on held-out networks."""
    x, y = np.asarray(sums_ms), np.asarray(measured_ms)
    predicted = np.array([calibration.network_ms(ops, sum_ms) for ops, sum_ms in zip(networks, sums_ms, strict=True)])
    return held_out(predicted, x, y)


def held_out(predicted_ms: np.ndarray, raw_ms: np.ndarray, measured_ms: np.ndarray) -> HeldOut:
    """How far predictions are from measurements, each float [N], beside those of the uncalibrated sums ``raw_ms``."""
    errors = np.abs(predicted_ms / measured_ms - 1)
    ranked = len(errors) > 2 and np.ptp(predicted_ms) > 0 and np.ptp(measured_ms) > 0
    return HeldOut(
        networks=len(errors),
        mape=float(errors.mean()),
        max_error=float(errors.max()),
        spearman=spearman(predicted_ms, measured_ms) if ranked else None,
        raw_mape=float(np.abs(raw_ms / measured_ms - 1).mean()),
        pairs=tuple((float(p), float(m)) for p, m in zip(predicted_ms, measured_ms, strict=True)),
    )


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two samples, ties sharing their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank: np.ndarray = np.cumsum(counts) - (counts - 1) / 2
    return mean_rank[inverse]
