"""Latency tables: the latency of each op on one device, how it was measured, and how
well the ops of a network add up to its latency.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal, Self, TypeAlias

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from hwnas.core.ops import Op, check_key
from hwnas.core.size import area
from hwnas.document import Document, Record


class TableHeader(Record):
    """The conditions of the measurement. All fields are required; unknown values are
    written as ``"unknown"``.
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


NotNegative: TypeAlias = Annotated[float, Field(ge=0)]
AtLeastOne: TypeAlias = Annotated[int, Field(ge=1)]


class Entry(Record):
    """One op's latency in milliseconds.

    ``ms`` is the median over rounds of the median over runs; ``p10_ms`` and ``p90_ms``
    are over all runs; ``spread`` is the interquartile range of the rounds' medians
    divided by ``ms``. ``noisy`` entries stayed above the allowed spread even after
    re-measurement: they are used, but always reported.
    """

    ms: float = Field(ge=0)
    p10_ms: NotNegative | Literal["unknown"] = "unknown"
    p90_ms: NotNegative | Literal["unknown"] = "unknown"
    runs: AtLeastOne | Literal["unknown"] = "unknown"
    rounds: AtLeastOne | Literal["unknown"] = "unknown"
    spread: NotNegative | Literal["unknown"] = "unknown"
    noisy: bool = False
    delegated: bool | Literal["unknown"] = Field(
        "unknown", description="LiteRT: whether the delegate (XNNPACK) took the whole op"
    )

    @field_validator("p90_ms")
    @classmethod
    def _in_order(cls, value: float | str, info: ValidationInfo) -> float | str:
        # ``ms`` may be outside of both: rounds differ in their number of runs, and a slow
        # round with few runs counts as much as a fast one with many.
        p10_ms = info.data.get("p10_ms")
        if isinstance(value, float) and isinstance(p10_ms, float) and p10_ms > value:
            raise ValueError(f"it is below p10_ms = {p10_ms:g}; correct them, or profile again")
        return value


class HeldOutErrors(Record):
    """Calibrated prediction against measurement, on networks that the calibration was
    not fitted on.
    """

    networks: int = Field(ge=0)
    mape: float = Field(ge=0, description="mean absolute percentage error, as a fraction")
    max_error: float = Field(ge=0, description="largest absolute percentage error, as a fraction")
    spearman: float | None = Field(
        description="rank correlation; none for fewer than three networks, or all alike"
    )
    raw_mape: float = Field(ge=0, description="the error of the uncalibrated sum of entries")
    pairs: tuple[tuple[float, float], ...] = Field(
        description="(predicted, measured) milliseconds per network"
    )


class Calibration(Record):
    """``network_ms = intercept_ms + sum over ops of (slope * entry + cache_miss(op))``,
    fitted on whole networks.

    ``cache_miss(op)`` is the cost that timing an op in isolation hides. In isolation,
    its weights, input and output are in the cache in every run; inside a network they
    come from memory. Values that do not fit into the cache come from memory in both
    cases, which is why the cost has a cap. It is either
    ``cache_miss_ms_per_mparam * parameters / 10^6``, or ``cache_miss_ms_per_mvalue *
    min(parameters + inputs + outputs, cache_mvalues * 10^6) / 10^6``, whichever fits
    the measured networks better. It is a cost per op, so the cost of a network stays a
    sum.

    In documents these fields keep their original names, ``cold_...``, because a table
    is identified by the hash of its document.
    """

    model_config = ConfigDict(populate_by_name=True)

    intercept_ms: float
    slope: float = Field(gt=0)
    cache_miss_ms_per_mparam: float = Field(0.0, ge=0, alias="cold_ms_per_mparam")
    cache_miss_ms_per_mvalue: float = Field(0.0, ge=0, alias="cold_ms_per_mvalue")
    cache_mvalues: float | None = Field(
        None,
        gt=0,
        alias="cold_cap_mvalues",
        description="million values that the cache holds; none: no cap",
    )
    networks: int = Field(ge=0, description="how many networks it was fitted on")
    noisy_networks: int = Field(
        0,
        ge=0,
        description="networks above the allowed spread; left out where three quiet ones remain",
    )
    held_out: HeldOutErrors | None = None

    def op_ms(self, entry_ms: float, op: Op) -> float:
        """What an op costs inside a network, in milliseconds."""
        cache_miss_ms = (
            self.cache_miss_ms_per_mparam * op.params / 1e6
            + self.cache_miss_ms_per_mvalue * _mvalues(op, self.cache_mvalues)
        )
        return self.slope * entry_ms + cache_miss_ms

    def network_ms(self, ops: Iterable[Op], sum_ms: float) -> float:
        """Milliseconds of a network of these ops, whose entries add up to
        ``sum_ms``.
        """
        # With an entry of 0 ms, ``op_ms`` is the cost of cache misses only.
        return self.intercept_ms + self.slope * sum_ms + sum(self.op_ms(0.0, op) for op in ops)

    def __str__(self) -> str:
        terms = [f"{self.intercept_ms:.4g} ms", f"{self.slope:.4g} x sum"]
        if self.cache_miss_ms_per_mparam:
            terms.append(f"{self.cache_miss_ms_per_mparam:.4g} ms x million parameters")
        if self.cache_miss_ms_per_mvalue:
            term = f"{self.cache_miss_ms_per_mvalue:.4g} ms x million weights and activations"
            if self.cache_mvalues is not None:
                term += f", at most {self.cache_mvalues:g} per op"
            terms.append(term)
        return " + ".join(terms)


class LatencyTable(Document):
    """Latency per op (``entries``), or per slot and option (``slots``), on one device
    under stated conditions.

    ``slots`` hold positional models, such as TuNAS's published linear regression, whose
    coefficients differ between equal blocks at different positions. Negative
    coefficients are normal in such models.
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
            check_key(key)
        if not self.entries and not self.slots:
            raise ValueError("a table needs entries or slots")
        return self

    @property
    def title(self) -> str:
        """Short name: the device, and the runtime, dtype and threads, if known."""
        header = self.header
        # Unknown threads become "unknownt", which the next line drops as well.
        parts = (header.runtime, header.dtype, f"{header.threads}t")
        known = "-".join(part for part in parts if not part.startswith("unknown"))
        return f"{header.device}/{known}" if known else header.device


def _mvalues(op: Op, cap: float | None) -> float:
    """Millions of weights, inputs and outputs of an op, at most ``cap``."""
    values = (op.params + op.in_ch * area(op.size) + op.out_ch * area(op.out_size)) / 1e6
    if cap is None:
        return values
    return min(values, cap)
