"""Latency tables: what each op costs on one device, how that was measured, and how well
it adds up.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hwnas.core.ops import Op
from hwnas.document import Document


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TableHeader(_Part):
    """The conditions of the measurement. All are required; what is not known is written
    ``"unknown"``.
    """

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

    ``ms`` is the median over rounds of the median over runs; ``p10_ms`` and ``p90_ms``
    are over all runs; ``spread`` is the interquartile range of the rounds' medians
    divided by ``ms``. ``noisy`` entries stayed above the allowed spread even after
    re-measurement: they are used, but never silently.
    """

    ms: float = Field(ge=0)
    p10_ms: float | Literal["unknown"] = "unknown"
    p90_ms: float | Literal["unknown"] = "unknown"
    runs: int | Literal["unknown"] = "unknown"
    rounds: int | Literal["unknown"] = "unknown"
    spread: float | Literal["unknown"] = "unknown"
    noisy: bool = False
    delegated: bool | Literal["unknown"] = Field(
        "unknown", description="LiteRT: whether the delegate (XNNPACK) took the whole op"
    )


class HeldOut(_Part):
    """Calibrated prediction against measurement on networks that the calibration has not seen."""

    networks: int
    mape: float = Field(description="mean absolute percentage error, as a fraction")
    max_error: float = Field(description="largest absolute percentage error, as a fraction")
    spearman: float | None = Field(
        description="rank correlation; none for fewer than three networks, or all alike"
    )
    raw_mape: float = Field(description="the error of the uncalibrated sum of entries")
    pairs: tuple[tuple[float, float], ...] = Field(
        description="(predicted, measured) milliseconds per network"
    )


class Calibration(_Part):
    """``network_ms = intercept_ms + sum over ops of (slope * entry + cold(op))``,
    fitted on whole networks.

    ``cold(op)`` is what an op that is timed alone does not pay: it finds its weights,
    its input and the place of its output in the cache every time, while inside a
    network they come from further away, unless they never fitted. So it is
    ``cold_ms_per_mparam * parameters / 10^6`` or ``cold_ms_per_mvalue * min(parameters
    + inputs + outputs, cap) / 10^6``, whichever the networks speak for. It stays a
    price per op, so nothing else changes.
    """

    intercept_ms: float
    slope: float = Field(gt=0)
    cold_ms_per_mparam: float = Field(0.0, ge=0)
    cold_ms_per_mvalue: float = Field(0.0, ge=0)
    cold_cap_mvalues: float | None = Field(
        None, gt=0, description="million values that the cache holds; none: no cap"
    )
    networks: int = Field(description="how many networks it was fitted on")
    noisy_networks: int = Field(
        0, description="networks above the allowed spread; left out where three quiet ones remain"
    )
    held_out: HeldOut | None = None

    def op_ms(self, entry_ms: float, op: Op) -> float:
        """What an op costs inside a network, in milliseconds."""
        cold = self.cold_ms_per_mparam * op.params / 1e6 + self.cold_ms_per_mvalue * _mvalues(
            op, self.cold_cap_mvalues
        )
        return self.slope * entry_ms + cold

    def network_ms(self, ops: Iterable[Op], sum_ms: float) -> float:
        """What a network of these ops costs, whose entries add up to ``sum_ms``."""
        return self.intercept_ms + self.slope * sum_ms + sum(self.op_ms(0.0, op) for op in ops)

    def __str__(self) -> str:
        cold = (
            f" + {self.cold_ms_per_mparam:.4g} ms x million parameters"
            if self.cold_ms_per_mparam
            else ""
        )
        cap = (
            f", at most {self.cold_cap_mvalues:g} per op"
            if self.cold_cap_mvalues is not None
            else ""
        )
        cold += (
            f" + {self.cold_ms_per_mvalue:.4g} ms x million weights and activations{cap}"
            if self.cold_ms_per_mvalue
            else ""
        )
        return f"{self.intercept_ms:.4g} ms + {self.slope:.4g} x sum{cold}"


class LatencyTable(Document):
    """Latency per op (``entries``), or per slot and option (``slots``), on one device
    under stated conditions.

    ``slots`` hold models that price positions instead of ops, such as TuNAS's published
    linear regression, whose coefficients differ between equal blocks at different
    places; negative coefficients are normal there.
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


def _mvalues(op: Op, cap: float | None) -> float:
    """Million weights and activations that an op touches outside itself, at most ``cap``."""
    values = (op.params + op.in_ch * op.size**2 + op.out_ch * op.out_size**2) / 1e6
    return values if cap is None else min(values, cap)
