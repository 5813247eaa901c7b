"""Android phones over adb: LiteRT's benchmark_model, driven by a script of ours that
runs many models in one go.

On the phone is one folder, ``/data/local/tmp/hwnas``: the tool and ``models``, named by
their contents so that nothing is sent twice, and a folder for each call, removed at its
end. A batch is two round trips: one push of what is missing, and one shell that runs
``deploy/android.sh`` over it and prints each result as it comes. Between batches the
phone is asked for its state, and left to cool where it is hot. Where it goes away in
the middle, items that have a row keep it, and the others go on when it is back.

Two runs on one phone do not touch each other's files, and wait for each other's
batches. Phones do not know of each other.

``benchmark_model.py`` says what the times are; deploy/ANDROID.md where to get the tool,
and what each option means.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from pydantic import Field, ValidationError, field_validator

from hwnas.config import Section
from hwnas.devices import benchmark_model as tool
from hwnas.devices.adb_client import AdbClient, PhoneGoneError, check_serial, choose
from hwnas.devices.adb_session import AdbSession, Ended, Program, ask, find_program, guide
from hwnas.devices.device import Device
from hwnas.devices.phone import PhoneState
from hwnas.document import explain
from hwnas.errors import ConfigError, DeviceError

BATCH_ITEMS = 32
"""Models of one round trip: some ten seconds, after which the phone's temperature is
looked at again.
"""

INPUT_BYTES = 32 * 2**20
"""Images that are on the phone at once, while it predicts."""

COOL_DOWN_S, COOL_DOWN_POLL_S = 900.0, 10.0
"""How long to wait for a hot phone, at most, and how often to look."""

RETURN_POLL_S = 1.0
ATTEMPTS = 3
"""How often in a row a phone may go away before any new row came."""

LOW_BATTERY_PERCENT = 15

Row = dict[str, Any]


class AdbOptions(Section):
    """Options of a device document with ``"connection": "adb"``."""

    serial: str | None = Field(
        None,
        description="serial number, as 'adb devices' lists it; default: the only phone attached",
    )
    benchmark_model: str | None = Field(
        None, description="path of the tool; default: $HWNAS_BENCHMARK_MODEL, else found on PATH"
    )
    delegate: Literal["xnnpack", "gpu", "nnapi", "none"] = Field(
        "xnnpack", description="what models run on"
    )
    max_celsius: float = Field(
        38.0, gt=0, description="battery temperature above which it waits for the phone to cool"
    )
    wait_s: float = Field(600.0, ge=0, description="how long to wait for a phone that went away")
    folder: str = Field(
        "/data/local/tmp/hwnas",
        pattern=r"^(/[A-Za-z0-9_][A-Za-z0-9._-]*)+$",
        description="our folder on the phone",
    )

    @field_validator("serial")
    @classmethod
    def _possible(cls, value: str | None) -> str | None:
        return None if value is None else check_serial(value)


class Adb:
    """A phone. It is not asked anything before a method is called; once it was reached,
    its absence is waited for.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        try:
            self.options = AdbOptions.model_validate(device.options)
        except ValidationError as error:
            raise ConfigError(
                f"options of device {device.id!r}: {explain(error, AdbOptions)}"
            ) from error
        self._client: AdbClient | None = None
        self._losses = 0
        self._patient = True

    def _phone(self) -> AdbClient:
        """The phone that this is about from the first call on."""
        if self._client is None:
            self._client = AdbClient(choose(self.options.serial))
        return self._client

    def cores(self, threads: int) -> tuple[int, ...]:
        """The device document's cores, else those of the phone that have the highest
        clock; none where it does not list them.
        """
        state = None if self.device.cores else ask(self._phone())
        if state is not None and not state.cores:
            return ()  # the phone does not tell, and is left to choose
        cores = self.device.cores or (state.fastest(threads) if state is not None else ())
        if len(cores) < threads:
            raise DeviceError(
                f"{threads} threads need as many cores, but {self.device.id} offers {len(cores)}:"
                " lower device.threads."
            )
        return cores

    def runtimes(self) -> dict[str, str]:
        """LiteRT, as it is linked into the tool at hand."""
        program, phone = find_program(self.options.benchmark_model), self._phone()
        program.check(phone.serial, ask(phone))
        return {"litert": f"{self._package} {program.version}"}

    @property
    def _package(self) -> str:
        return f"benchmark_model {self.options.delegate}"

    def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[Row]:
        """Batch after batch. An item's ``ms`` are medians of processes
        (benchmark_model.py), ``runs`` how many runs each stands for.
        """
        if plan["runtime"] != "litert":
            raise DeviceError(
                f"{self.device.id} runs LiteRT files only: set device.runtime = 'litert', not"
                f" {plan['runtime']!r}."
            )
        program, items = find_program(self.options.benchmark_model), plan["items"]
        position, introduced = 0, False
        with AdbSession(self._phone(), self.options.folder, program, folder) as session:
            while not introduced or position < len(items):
                try:
                    state = session.open()
                    if not introduced:
                        yield from self._introduction(plan, program, state)
                        introduced = True
                    yield from self._cool_down(session)
                    for row in self._batch(session, plan, items[position : position + BATCH_ITEMS]):
                        if "id" in row:
                            position, self._losses = position + 1, 0
                        yield row
                    yield {"conditions": session.ask().conditions(_cores(plan))}
                except PhoneGoneError as error:
                    session.forget()
                    if not introduced or position < len(items):
                        yield from self._return(
                            error,
                            "" if not introduced else f" while it ran {items[position]['id']}",
                        )

    def _introduction(self, plan: Row, program: Program, state: PhoneState) -> Iterator[Row]:
        """The header, and the state before the first batch."""
        cores = _cores(plan)
        missing = sorted(set(cores) - {core.number for core in state.cores}) if state.cores else []
        if missing:
            on = ", ".join(str(core.number) for core in state.cores)
            raise DeviceError(
                f"cannot run on core {missing[0]} of {self.device.id}: its cores are {on}."
            )
        yield {
            "runner": 1,
            "runtime": "litert",
            "runtime_package": self._package,
            "runtime_version": program.version,
            "python": "none",
            "machine": state.machine,
            "cpu": state.chip,
            "cores": list(cores) or "unknown",
            "governor": state.governor(cores),
            "threads": plan["threads"],
        }
        yield {"conditions": state.conditions(cores)}
        if state.battery_percent is not None and state.battery_percent < LOW_BATTERY_PERCENT:
            yield {
                "note": (
                    f"the battery of {self.device.id} is at {state.battery_percent} %: phones slow"
                    " down when it is low"
                )
            }

    def _cool_down(self, session: AdbSession) -> Iterator[Row]:
        """Wait until the phone is cool. Where it does not cool down, say so and never
        wait again: it may be a hot day.
        """
        end = time.monotonic() + COOL_DOWN_S
        heat = session.open().heat(self.options.max_celsius)
        if heat and self._patient:
            yield {
                "note": (
                    f"{self.device.id} is hot ({heat}): waiting until it is at"
                    f" {self.options.max_celsius:g} °C or below"
                )
            }
        while heat and self._patient:
            if time.monotonic() >= end:
                self._patient = False
                yield {
                    "note": (
                        f"{self.device.id} is still hot ({heat}) after {COOL_DOWN_S / 60:g}"
                        " minutes: measuring all the same"
                    )
                }
            else:
                time.sleep(COOL_DOWN_POLL_S)
                heat = session.ask().heat(self.options.max_celsius)

    def _batch(self, session: AdbSession, plan: Row, items: Sequence[Row]) -> Iterator[Row]:
        """Rows of the first items, at least of one: a file that is not here ends a
        batch, or is one, so that the order is kept.
        """
        models: list[str] = []
        for item in items:
            try:
                models.append(session.add(Path(item["path"])))
            except OSError as error:
                if not models:
                    yield {**_named(item), "error": f"{item['path']}: {error.strerror}"}
                    return
                break
        session.send(
            {
                "batch": (
                    "".join(f"{number} {model}\n" for number, model in enumerate(models)).encode()
                )
            }
        )
        cores, count = _cores(plan), tool.processes(plan)
        mask = f"{sum(1 << core for core in cores):x}" if cores else "all"
        flags = tool.timing_flags(plan, self.options.delegate)
        timings: dict[int, list[tool.Timing]] = defaultdict(list)
        failed: set[int] = set()
        for ended in self._impatient(
            session.run(["measure", mask, str(count), session.program.name, *flags])
        ):
            if not isinstance(ended, Ended):
                yield ended
            elif (
                ended.number not in failed
            ):  # an item's other processes may follow one whose output is no good
                item, found = items[ended.number], timings[ended.number]
                try:
                    found.append(tool.parse(ended.lines, ended.status, self.options.delegate))
                except tool.BenchmarkError as error:
                    failed.add(ended.number)
                    yield {**_named(item), "error": str(error)}
                    continue
                if len(found) == count:
                    values = {
                        "ms": [timing.ms for timing in found],
                        "runs": [timing.runs for timing in found],
                    }
                    yield {
                        **_named(item),
                        "delegated": (
                            found[0].delegated if self.options.delegate != "none" else "unknown"
                        ),
                        **values,
                    }

    def _impatient(self, run: Iterator[Ended | None]) -> Iterator[Ended | Row]:
        """A note instead of the first sign that another run is at work on the phone,
        and nothing instead of the others.
        """
        waited = False
        for ended in run:
            if ended is not None:
                yield ended
            elif not waited:
                waited = True
                yield {"note": f"another run is at work on {self.device.id}: waiting for it"}

    def predict(self, model: Path, images_NHWC: np.ndarray, folder: Path) -> np.ndarray:
        """Outputs of a model file for images: one process for each, ``INPUT_BYTES`` of
        them on the phone at once.
        """
        program, phone = find_program(self.options.benchmark_model), self._phone()
        entry, exits = self._tensors(model)
        step = max(1, INPUT_BYTES // len(tool.to_inputs(images_NHWC[:1], entry)))
        outputs: list[np.ndarray] = []
        with AdbSession(phone, self.options.folder, program, folder) as session:
            for start in range(0, len(images_NHWC), step):
                while len(outputs) * step <= start:
                    try:
                        session.open()
                        inputs = tool.to_inputs(images_NHWC[start : start + step], entry)
                        outputs.append(self._outputs(session, model, inputs, entry, exits))
                        self._losses = 0
                    except PhoneGoneError as error:
                        session.forget()
                        for _ in self._return(error, f" while it ran {model.name}"):
                            pass  # nobody listens for notes here
        return np.concatenate(outputs)

    def _tensors(self, model: Path) -> tuple[Row, list[Row]]:
        """TFLite's details of the one input and of the outputs of a file."""
        try:
            interpreter = Interpreter(str(model))
            inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
        except (OSError, RuntimeError, ValueError) as error:
            raise DeviceError(f"{model.name} does not run on {self.device.id}: {error}") from error
        if len(inputs) != 1:
            raise DeviceError(f"{model.name} has {len(inputs)} inputs; predictions need one.")
        return inputs[0], outputs

    def _outputs(
        self, session: AdbSession, model: Path, inputs: bytes, entry: Row, exits: Sequence[Row]
    ) -> np.ndarray:
        """Outputs float32 [N, ...] for the bytes of N inputs."""
        name = session.add(model)
        session.send({"inputs": inputs})
        input_bytes, output_bytes = tool.output_bytes([entry]), tool.output_bytes(exits)
        flags = tool.prediction_flags(entry["shape"], self.options.delegate)
        for ended in session.run(["predict", name, str(input_bytes), session.program.name, *flags]):
            if ended is None:
                continue
            if ended.status != 0:
                raise DeviceError(
                    f"{model.name} does not run on {self.device.id}:"
                    f" {tool.complaint(ended.lines, ended.status)}"
                )
            if ended.output_bytes != output_bytes:
                raise DeviceError(
                    f"{session.program.path} wrote {ended.output_bytes} bytes of output where"
                    f" {model.name} gives {output_bytes}: it is too old, or another tool; {guide()}"
                    " says where to get one that writes outputs."
                )
        data, due = session.receive("outputs"), len(inputs) // input_bytes * output_bytes
        if len(data) != due:
            raise DeviceError(
                f"{self.device.id} sent {len(data)} bytes of outputs of {model.name}, not {due}:"
                " run the command again."
            )
        return tool.from_outputs(data, exits)

    def _return(self, error: PhoneGoneError, moment: str) -> Iterator[Row]:
        """Wait for a phone that went away. Raises DeviceError where it does not come
        back, or goes again and again.
        """
        self._losses += 1
        if self._losses >= ATTEMPTS:
            raise DeviceError(
                f"{self.device.id} went away {self._losses} times in a row{moment}: {error}"
            ) from error
        yield {
            "note": (
                f"{self.device.id} went away{moment} (unplugged?): waiting up to"
                f" {self.options.wait_s:g} s for it to return"
            )
        }
        if not self._phone().wait(self.options.wait_s, RETURN_POLL_S):
            raise DeviceError(
                f"{self.device.id} did not come back within {self.options.wait_s:g} s: plug it in,"
                " and start the same command again; what it has measured is kept."
            ) from error
        yield {"note": f"{self.device.id} is back"}


def _named(item: Row) -> Row:
    """How a row says which item it is about."""
    return {"id": item["id"], "round": item.get("round", 0)}


def _cores(plan: Row) -> tuple[int, ...]:
    """The cores that a plan pins to; none where it leaves that to the phone."""
    return tuple(plan.get("cores") or ())
