"""Android phones over adb: LiteRT's benchmark_model, driven by a script of ours that
times many models in one call.

On the phone there is one folder, ``/data/local/tmp/hwnas``. It holds the tool and the
models, named by their contents so that nothing is sent twice, and a folder for each
call, removed at its end. A batch takes two round trips: one push of the missing files,
and one shell that runs ``deploy/android.sh`` on the batch and prints each result as it
is measured. Between batches, the phone is asked for its state and may cool down. If it
goes away in the middle, the items that already have a row keep it, and the others
resume when the phone is back.

Two runs on one phone do not touch each other's files, and wait for each other's
batches. Runs on different phones are independent.

``benchmark_model.py`` explains what the times mean. deploy/ANDROID.md explains the
options, and where to get the tool.
"""

from __future__ import annotations

import re
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
from hwnas.devices.device import Device, pinned_cores
from hwnas.devices.phone import PhoneState
from hwnas.document import explain
from hwnas.errors import ConfigError, DeviceError

BATCH_ITEMS = 32
"""Models per batch. A batch takes some ten seconds, and the phone's temperature is
checked after each.
"""

INPUT_BYTES = 32 * 2**20
"""How many bytes of images are on the phone at once during predictions."""

COOL_DOWN_S, COOL_DOWN_POLL_S = 900.0, 10.0
"""The longest wait for a hot phone, and the interval of the checks."""

RETURN_POLL_S = 1.0
"""Interval of the checks whether a phone is back."""
ATTEMPTS = 3
"""After this many losses of the phone without a new row in between, the run fails."""

LOW_BATTERY_PERCENT = 15

UNPINNED = "set device.cores = [] to let Android choose"
"""What to do if a phone cannot pin a program to a core."""

Row = dict[str, Any]


class AdbOptions(Section):
    """Options of a device document with ``"connection": "adb"``."""

    serial: str | None = Field(
        None,
        description="serial number, as 'adb devices' lists it; default: the only phone attached",
    )
    benchmark_model: str | None = Field(
        None,
        description="path of the tool; default: $HWNAS_BENCHMARK_MODEL, or else the one on PATH",
    )
    delegate: Literal["xnnpack", "gpu", "nnapi", "none"] = Field(
        "xnnpack", description="what models run on"
    )
    max_celsius: float = Field(
        38.0, gt=0, description="battery temperature above which to wait for the phone to cool down"
    )
    wait_s: float = Field(
        600.0, ge=0, description="how long to wait for a phone that went away to return"
    )
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
    """A phone. It is contacted only by the first call of a method. Once it has been
    reached, calls wait for it if it goes away.
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
        """The phone. The first call chooses it, and later calls keep it."""
        if self._client is None:
            self._client = AdbClient(choose(self.options.serial))
        return self._client

    def cores(self, threads: int) -> tuple[int, ...]:
        """The cores of the device document, or else the fastest ones of the phone. Empty if
        the document says not to pin, or if the phone does not list its cores: Android then
        chooses.

        Raises DeviceError if there are fewer than ``threads``.
        """
        if self.device.cores is not None:
            return pinned_cores(self.device, threads, tuple)
        state = ask(self._phone())
        if not state.cores:
            return ()
        return pinned_cores(self.device, threads, lambda: state.fastest(threads))

    def runtimes(self) -> dict[str, str]:
        """LiteRT only, the version that is linked into the tool."""
        program = find_program(self.options.benchmark_model)
        phone = self._phone()
        program.check(phone.serial, ask(phone))
        return {"litert": f"{self._package} {program.version}"}

    @property
    def _package(self) -> str:
        return f"benchmark_model {self.options.delegate}"

    def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[Row]:
        """Run a plan in batches. The ``ms`` of an item are one median per process (see
        benchmark_model.py), and its ``runs`` are the number of runs of each process.
        """
        if plan["runtime"] != "litert":
            raise DeviceError(
                f"{self.device.id} runs LiteRT files only: set device.runtime = 'litert' instead of"
                f" {plan['runtime']!r}."
            )
        program = find_program(self.options.benchmark_model)
        items = plan["items"]
        position = 0
        introduced = False
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
                            position += 1
                            self._losses = 0
                        yield row
                    yield {"conditions": session.ask().conditions(_cores(plan))}
                except PhoneGoneError as error:
                    session.forget()
                    # After the last row the phone is not needed any more.
                    if not introduced or position < len(items):
                        moment = f" while it ran {items[position]['id']}" if introduced else ""
                        yield from self._return(error, moment)

    def _introduction(self, plan: Row, program: Program, state: PhoneState) -> Iterator[Row]:
        """The header, and the state of the phone before the first batch."""
        cores = _cores(plan)
        available = [core.number for core in state.cores]
        missing = sorted(set(cores) - set(available))
        if available and missing:
            raise DeviceError(
                f"cannot run on core {missing[0]} of {self.device.id}: choose from its cores"
                f" {', '.join(map(str, available))} with device.cores, or {UNPINNED}."
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
            "pinned": bool(cores),
        }
        yield {"conditions": state.conditions(cores)}
        if state.battery_percent is not None and state.battery_percent < LOW_BATTERY_PERCENT:
            yield {
                "note": (
                    f"the battery of {self.device.id} is at {state.battery_percent} %:"
                    f" phones with a"
                    " low battery are slower, so charge it"
                )
            }

    def _cool_down(self, session: AdbSession) -> Iterator[Row]:
        """Wait until the phone is cool. If it does not cool down, add a note and never wait
        again: it may be a hot day.
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
                        " minutes: measuring anyway"
                    )
                }
            else:
                time.sleep(COOL_DOWN_POLL_S)
                heat = session.ask().heat(self.options.max_celsius)

    def _batch(self, session: AdbSession, plan: Row, items: Sequence[Row]) -> Iterator[Row]:
        """Measure one batch: the given items, or only those before the first whose file
        cannot be read. If that is the first item, the batch is its error.

        The rows thus keep the order of the items, on which resuming relies.
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
        batch = "".join(f"{number} {model}\n" for number, model in enumerate(models))
        session.send({"batch": batch.encode()})

        cores = _cores(plan)
        count = tool.processes(plan)
        # taskset of the phone takes a hexadecimal mask
        mask = f"{sum(1 << core for core in cores):x}" if cores else "all"
        flags = tool.timing_flags(plan, self.options.delegate)
        run = session.run(["measure", mask, str(count), session.program.name, *flags])
        timings: dict[int, list[tool.Timing]] = defaultdict(list)
        failed: set[int] = set()
        for ended in self._with_waiting_note(run):
            if not isinstance(ended, Ended):
                yield ended
                continue
            # An item fails with its first bad process, but its other processes still run.
            if ended.number in failed:
                continue
            item = items[ended.number]
            measured = timings[ended.number]
            try:
                measured.append(tool.parse(ended.lines, ended.status, self.options.delegate))
            except tool.BenchmarkError as error:
                self._check_pinning(error, cores)
                failed.add(ended.number)
                yield {**_named(item), "error": str(error)}
                continue
            if len(measured) == count:
                yield {**_named(item), **self._values(measured)}

    def _check_pinning(self, error: tool.BenchmarkError, cores: Sequence[int]) -> None:
        """Raise DeviceError if a process failed because it cannot be pinned to ``cores``,
        which has nothing to do with its model.
        """
        if cores and re.search(r"\btaskset\b", str(error)):
            names = ", ".join(map(str, cores))
            raise DeviceError(
                f"{self.device.id} cannot pin a program to the cores {names} ({error}): choose"
                f" others with device.cores if these are switched off, or {UNPINNED}."
            ) from error

    def _values(self, timings: Sequence[tool.Timing]) -> Row:
        """The part of an item's row that its processes measured."""
        delegated = timings[0].delegated if self.options.delegate != "none" else "unknown"
        return {
            "delegated": delegated,
            "ms": [timing.ms for timing in timings],
            "runs": [timing.runs for timing in timings],
        }

    def _with_waiting_note(self, run: Iterator[Ended | None]) -> Iterator[Ended | Row]:
        """The processes of a run. The first None, which means that the run waits for
        another one, becomes a note. Further ones are dropped.
        """
        waited = False
        for ended in run:
            if ended is not None:
                yield ended
            elif not waited:
                waited = True
                yield {"note": f"another run is using {self.device.id}: waiting for it to finish"}

    def predict(self, model: Path, images_NHWC: np.ndarray, folder: Path) -> np.ndarray:
        """Run a model file on images, in one process per image. At most ``INPUT_BYTES`` of
        images are on the phone at once.
        """
        program = find_program(self.options.benchmark_model)
        phone = self._phone()
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
                            pass  # predict has no way to pass on the notes
        return np.concatenate(outputs)

    def _tensors(self, model: Path) -> tuple[Row, list[Row]]:
        """TFLite's details of the input and of the outputs of a file. Raises DeviceError if
        there are several inputs.
        """
        try:
            interpreter = Interpreter(str(model))
            inputs = interpreter.get_input_details()
            outputs = interpreter.get_output_details()
        except (OSError, RuntimeError, ValueError) as error:
            raise DeviceError(f"{model.name} does not run on {self.device.id}: {error}") from error
        if len(inputs) != 1:
            raise DeviceError(
                f"{model.name} has {len(inputs)} inputs; predictions need a model with one."
            )
        return inputs[0], outputs

    def _outputs(
        self, session: AdbSession, model: Path, inputs: bytes, entry: Row, exits: Sequence[Row]
    ) -> np.ndarray:
        """The outputs float32 [N, ...] for the bytes of N inputs."""
        name = session.add(model)
        session.send({"inputs": inputs})
        input_bytes = tool.output_bytes([entry])
        output_bytes = tool.output_bytes(exits)
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
                    f"{session.program.path} wrote {ended.output_bytes} bytes of output, but the"
                    f" outputs of {model.name} have {output_bytes}: it is too old or not"
                    f" benchmark_model; {guide()} explains"
                    f" where to get a build that writes outputs."
                )
        data = session.receive("outputs")
        expected = len(inputs) // input_bytes * output_bytes
        if len(data) != expected:
            raise DeviceError(
                f"{self.device.id} sent {len(data)} bytes of outputs of {model.name} instead of"
                f" {expected}: run the command again."
            )
        return tool.from_outputs(data, exits)

    def _return(self, error: PhoneGoneError, moment: str) -> Iterator[Row]:
        """Wait for a phone that went away. Raises DeviceError if it does not come back, or
        if it keeps going away.
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
                " and run the same command again to resume."
            ) from error
        yield {"note": f"{self.device.id} is back"}


def _named(item: Row) -> Row:
    """The part of a row that identifies its item."""
    return {"id": item["id"], "round": item.get("round", 0)}


def _cores(plan: Row) -> tuple[int, ...]:
    """The cores that a plan pins to. Empty if Android is to choose."""
    return tuple(plan.get("cores") or ())
