"""Rounds of a session over several runtimes: what they measure, and what counts as
noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hwnas.config import DeviceConfig
from hwnas.core.table import Entry
from hwnas.devices.device import Device
from hwnas.devices.session import (
    Bench,
    Conditions,
    Failure,
    Header,
    Item,
    Measurement,
    Note,
    Schedule,
    Session,
    parse_row,
)
from hwnas.devices.simulated import Simulated, simulated_ms
from hwnas.errors import DeviceError
from hwnas.progress import Progress
from hwnas.runs import JsonLines
from hwnas.testing import synthetic_table
from tests.conftest import digits_space

DEVICE = Device(id="simulated", soc="none", connection="simulated")
OPS = digits_space().ops[:3]


class Loud(Simulated):
    """Records the plans that it gets; rounds of some items differ by a factor of 2."""

    def __init__(self, *loud: str) -> None:
        super().__init__(DEVICE)
        self.loud, self.plans = loud, list[dict[str, Any]]()

    def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
        self.plans.append(plan)
        for row in super().measure(plan, folder):
            louder = row.get("id") in self.loud and row["round"] % 2 == 1
            yield {**row, "ms": [2 * ms for ms in row["ms"]]} if louder else row

    def requests(self) -> list[tuple[str, int, set[str]]]:
        return [
            (plan["runtime"], plan["items"][0]["round"], {item["id"] for item in plan["items"]})
            for plan in self.plans
        ]


def items(image: Path | None = None) -> list[Item]:
    files = [
        Item("a.onnx", "onnxruntime", Path("a.onnx"), OPS, image),
        Item("a.tflite", "litert", Path("a.tflite"), OPS),
    ]
    return [
        *files,
        *(Item(op.key, "litert", Path("op"), (op,), repeat_if_noisy=False) for op in OPS),
    ]


def make_session(
    device: Simulated, folder: Path, schedule: Schedule, samples: JsonLines | None = None
) -> Session:
    return Session(
        Bench(DEVICE, device, DeviceConfig(threads=2), lambda *_: Path("unread"), folder),
        items(),
        schedule,
        samples,
    )


LITERT = {"a.tflite", *(op.key for op in OPS)}


def test_a_round_goes_through_every_runtime(tmp_path: Path) -> None:
    device = Loud()
    session = make_session(device, tmp_path, Schedule(rounds=2))
    session.run("measuring")
    assert device.requests() == [
        (runtime, number, ids)
        for number in (0, 1)
        for runtime, ids in (("litert", LITERT), ("onnxruntime", {"a.onnx"}))
    ]
    assert all(
        (plan["threads"], plan["cores"]) == (2, [0, 1]) and not {"min_ms", "min_runs"} & plan.keys()
        for plan in device.plans
    )
    assert set(session.headers) == {"litert", "onnxruntime"} and session.header("litert").cores == [
        0,
        1,
    ]
    assert session.ms(OPS[0].key) == pytest.approx(simulated_ms(OPS[0]), rel=0.02)
    assert session.ms("a.onnx") == pytest.approx(
        1.05 * sum(map(simulated_ms, OPS)) + 0.02, rel=0.02
    )


@pytest.mark.parametrize("together", [True, False])
def test_noisy_items_are_measured_again(together: bool, tmp_path: Path) -> None:
    """Alone, or with all the items that belong together; an item with
    ``repeat_if_noisy=False`` triggers nothing.
    """
    device = Loud("a.onnx", OPS[0].key)
    session = make_session(
        device, tmp_path, Schedule(rounds=2, max_rounds=4, max_spread=0.1, together=together)
    )
    session.run("measuring")
    again = [("litert", LITERT)] if together else []
    assert device.requests()[4:] == [
        (runtime, number, ids)
        for number in (2, 3)
        for runtime, ids in [*again, ("onnxruntime", {"a.onnx"})]
    ]
    assert session.noisy == ["a.onnx"]
    assert len(session.rounds("a.tflite")) == (4 if together else 2)
    calm = make_session(
        Loud(OPS[0].key),
        tmp_path,
        Schedule(rounds=2, max_rounds=4, max_spread=0.1, together=together),
    )
    calm.run("measuring")
    assert calm.noisy == [] and len(calm.rounds("a.onnx")) == 2


def test_drift_is_the_time_of_all_blocks_relative_to_the_table(tmp_path: Path) -> None:
    """An op that occurs twice in the network counts twice."""
    session = make_session(Loud(), tmp_path, Schedule(rounds=3))
    session.run("measuring")
    entries = {
        op.key: Entry(ms=session.ms(op.key) / factor)
        for op, factor in zip(OPS, (1.5, 1.5, 3), strict=True)
    }
    table = synthetic_table(digits_space()).model_copy(update={"entries": entries})
    assert session.drift(OPS[:2], table) == pytest.approx(1.5)
    a, b = session.ms(OPS[0].key), session.ms(OPS[2].key)
    assert session.drift((OPS[0], OPS[0], OPS[2]), table) == pytest.approx(
        (2 * a + b) / (2 * a / 1.5 + b / 3)
    )


def test_rows_kept_from_other_conditions_are_refused(tmp_path: Path) -> None:
    samples = JsonLines(tmp_path / "samples.jsonl")
    make_session(Loud(), tmp_path, Schedule(rounds=1), samples).run("measuring")
    samples.rewrite(
        [{**row, "governor": "powersave"} if "runner" in row else row for row in samples.read()]
    )
    # allowed: nothing is left to measure
    make_session(Loud(), tmp_path, Schedule(rounds=1), samples).run("measuring")
    with pytest.raises(
        DeviceError,
        match=(
            r"^governor was 'powersave' when this session began and is 'simulated' now: .*"
            r" --fresh\.$"
        ),
    ):
        make_session(Loud(), tmp_path, Schedule(rounds=2), samples).run("measuring")
    make_session(Loud(), tmp_path, Schedule(rounds=2)).run("measuring")


def test_a_refused_device_leaves_no_row_so_restoring_it_helps(tmp_path: Path) -> None:
    class Governed(Loud):
        governor = "performance"

        def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
            for row in super().measure(plan, folder):
                yield {**row, "governor": self.governor} if "runner" in row else row

    samples = JsonLines(tmp_path / "samples.jsonl")
    device = Governed()
    make_session(device, tmp_path, Schedule(rounds=1), samples).run("measuring")
    kept = samples.path.read_bytes()
    device.governor = "powersave"
    with pytest.raises(DeviceError, match=r"^governor was 'performance' when this session began"):
        make_session(device, tmp_path, Schedule(rounds=2), samples).run("measuring")
    assert samples.path.read_bytes() == kept

    # earlier versions left the header of the refused device, which must not count either
    with samples.appending() as append:
        append({"runner": 1, "runtime": "litert", "governor": "powersave"})
    device.governor = "performance"
    found = make_session(device, tmp_path, Schedule(rounds=2), samples)
    found.run("measuring")
    assert len(found.rounds(OPS[0].key)) == 2


DAMAGED = (
    "[]",
    "null",
    "17",
    '"text"',
    "{}",
    '{"id": "KEY"}',
    '{"id": "KEY", "round": 1}',
    '{"id": "KEY", "round": 1, "ms": []}',
    '{"id": "KEY", "round": 1, "ms": [NaN]}',
    '{"id": "KEY", "round": 1, "ms": [Infinity, 1]}',
    '{"id": "KEY", "round": 1, "ms": [1e400]}',
    '{"id": "KEY", "round": 1, "ms": [-1.0]}',
    '{"id": "KEY", "round": 1, "ms": [0, 0, 1]}',
    '{"id": "KEY", "round": 1, "ms": [5e-324]}',
    '{"id": "KEY", "round": 1, "ms": 1.0}',
    '{"id": "KEY", "round": 1, "ms": ["1"]}',
    '{"id": "KEY", "round": 1, "ms": [true]}',
    '{"id": "KEY", "round": 1, "ms": {"a": 1}}',
    f'{{"id": "KEY", "round": 1, "ms": [{"9" * 4000}]}}',
    '{"id": "KEY", "round": "1", "ms": [1.0]}',
    '{"id": "KEY", "round": [1], "ms": [1.0]}',
    '{"id": "KEY", "round": true, "ms": [1.0]}',
    '{"id": "KEY", "round": -1, "ms": [1.0]}',
    '{"id": ["KEY"], "round": 1, "ms": [1.0]}',
    '{"conditions": [1]}',
    '{"conditions": {"celsius": NaN}}',
    '{"conditions": {"celsius": null}}',
)


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_row_is_measured_again(line: str, tmp_path: Path) -> None:
    straight = make_session(Loud(), tmp_path, Schedule(rounds=2))
    straight.run("measuring")
    samples = JsonLines(tmp_path / "samples.jsonl")
    make_session(Loud(), tmp_path, Schedule(rounds=2), samples).run("measuring")
    key = OPS[0].key
    kept = [row for row in samples.read() if (row.get("id"), row.get("round")) != (key, 1)]
    samples.rewrite(kept)
    with samples.path.open("a") as file:
        file.write(line.replace("KEY", key) + "\n")

    device = Loud()
    resumed = make_session(device, tmp_path, Schedule(rounds=2), samples)
    resumed.run("measuring")
    assert device.requests() == [("litert", 1, {key})]
    assert resumed.ms(key) == straight.ms(key)
    with pytest.raises(DeviceError, match=r"^the device sent .*, which is not a row of a"):
        parse_row(json.loads(line))


def test_damaged_rows_are_reported(tmp_path: Path) -> None:
    class Saying(Progress):
        said: list[str] = []

        def info(self, message: str) -> None:
            self.said.append(message)

    samples = JsonLines(tmp_path / "samples.jsonl")
    samples.path.write_text('{"id": 1}\n{}\n')
    bench = Bench(DEVICE, Loud(), DeviceConfig(), lambda *_: Path("unread"), tmp_path, Saying())
    Session(bench, items(), Schedule(), samples)
    assert Saying.said == ["damaged rows in samples.jsonl: 2; what they held is measured again"]


def test_a_header_of_other_types_is_unknown() -> None:
    assert parse_row(
        {"runner": 1, "cores": ["a"], "threads": True, "pinned": "yes", "cpu": "A\x1b[2J"}
    ) == Header(cpu="A\\u001b[2J")
    # two spaces as some chips have them in their names: tables are compared by them
    assert parse_row({"runner": 1, "cpu": "A  B"}) == Header(cpu="A  B")


def test_cores_of_the_configuration_come_before_those_of_the_device(tmp_path: Path) -> None:
    document = DEVICE.model_copy(update={"cores": (5,)})

    def bench(cores: tuple[int, ...] | None) -> Bench:
        settings = DeviceConfig(cores=cores)
        return Bench(document, Simulated(document), settings, lambda *_: tmp_path, tmp_path)

    assert bench(None).cores == (5,)
    assert bench((2, 3)).cores == (2, 3)
    assert bench(()).cores == ()


def test_not_pinned_is_null_in_the_plan_of_the_runner(tmp_path: Path) -> None:
    device = Loud()
    settings = DeviceConfig(threads=2, cores=())
    bench = Bench(DEVICE, device, settings, lambda *_: Path("unread"), tmp_path)
    found = Session(bench, items(), Schedule())
    found.run("measuring")
    assert {str(plan["cores"]) for plan in device.plans} == {"None"}
    assert found.header("litert").pinned is False and found.cores == ()


def test_an_image_is_fed(tmp_path: Path) -> None:
    class Fed(Loud):
        def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
            images = {item["id"]: item["input"] for item in plan["items"] if "input" in item}
            for row in super().measure(plan, folder):
                yield {**row, "input": "image"} if row.get("id") in images else row

    device, image = Fed(), tmp_path / "image.npy"
    bench = Bench(DEVICE, device, DeviceConfig(), lambda *_: Path("unread"), tmp_path)
    session = Session(bench, items(image), Schedule())
    session.run("measuring")
    assert session.fed == {"a.onnx"}
    assert [
        item.get("input")
        for plan in device.plans
        if plan["runtime"] == "onnxruntime"
        for item in plan["items"]
    ] == [str(image)]


def test_rows_are_parsed_by_their_keys() -> None:
    assert parse_row({"note": "it cools"}) == Note("it cools")
    assert parse_row({"conditions": {"celsius": 31.5}}) == Conditions({"celsius": 31.5})
    assert parse_row({"id": "x", "round": 1, "error": "no such operator"}) == Failure(
        "x", "no such operator"
    )
    assert parse_row({"id": "x", "round": 1, "ms": [1.0]}) == Measurement(
        "x", 1, [1.0], "unknown", False
    )
    fed = {"id": "x", "round": 1, "ms": [1.0], "delegated": False, "input": "image"}
    assert parse_row(fed) == Measurement("x", 1, [1.0], False, True)
    assert parse_row({"runner": 1, "cpu": "A", "cores": [3], "threads": 1}) == Header(
        cpu="A", cores=[3], threads=1
    )
    assert parse_row({"runner": 1, "cores": "unknown"}) == Header()
    with pytest.raises(DeviceError, match="which is not a row of a measurement"):
        parse_row({"id": "x"})
