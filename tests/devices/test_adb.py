"""Phones over adb: the real adb client and server, a fake phone (fake_phone.py) that
runs real models, and everything that can go wrong.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwnas.core.detector import PostProcessing
from hwnas.core.ops import Classifier
from hwnas.devices import adb as adb_module
from hwnas.devices.adb import Adb
from hwnas.devices.adb_session import AdbSession
from hwnas.devices.device import HOST, Device
from hwnas.devices.host import Host
from hwnas.errors import ConfigError, DeviceError
from hwnas.export.tflite_detector import tasks
from hwnas.export.tflite_writer import write_heads
from hwnas.export.timing import timing_file
from tests.devices import fake_benchmark_model
from tests.devices.fake_phone import OPS, FakePhone, adb_server, phone, phones, plan, split_rows
from tests.export.detectors import images, lively_network, run_tflite

__all__ = ["adb_server", "phone", "phones"]  # fixtures


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adb_module, "RETURN_POLL_S", 0.05)
    monkeypatch.setattr(adb_module, "COOL_DOWN_POLL_S", 0.01)


def announced(rows: Iterator[dict[str, Any]], first: threading.Event) -> Iterator[dict[str, Any]]:
    """Yield the rows, and set ``first`` as soon as one of an item has arrived: tests
    wait for it before they unplug the phone, so that this row cannot be lost.
    """
    for row in rows:
        if "id" in row:
            first.set()
        yield row


def ids(wanted: dict[str, Any]) -> list[str]:
    return [item["id"] for item in wanted["items"]]


def test_measures(phone: FakePhone, tmp_path: Path) -> None:
    wanted = plan(warmup_ms=1.0)
    header, rows, notes, conditions = split_rows(Adb(phone.device()).measure(wanted, tmp_path))
    assert header["runtime_package"] == "benchmark_model xnnpack"
    assert header["runtime_version"].startswith("sha256:")
    assert header["cpu"] == "Google Tensor"
    assert header["machine"] == "x86_64, Fake Phone 1, Android 14"
    assert (header["cores"], header["governor"], header["threads"]) == ([6], "schedutil", 1)
    assert [row["id"] for row in rows] == ids(wanted)
    for row in rows:
        assert len(row["ms"]) == len(row["runs"]) == 2
        assert row["delegated"] is True
        assert 0 < min(row["ms"]) <= max(row["ms"]) < 100
        assert min(row["runs"]) >= 5
    assert notes == []
    assert (
        conditions
        == [
            {
                "battery_percent": 81,
                "celsius": 31.5,
                "plugged": "usb",
                "thermal_status": 0,
                "governor": "schedutil",
                "mhz": 2802.0,
            }
        ]
        * 2
    ), "before and after the batch"
    assert phone.masks == ["40"] * 6, "core 6, two processes of each of three models"
    assert {run["num_threads"] for run in phone.runs} == {"1"}
    assert {run["min_secs"] for run in phone.runs} == {"0.000500"} and {
        run["warmup_min_secs"] for run in phone.runs
    } == {"0.001000"}
    left = sorted(path.name.partition("-")[0] for path in phone.folder.iterdir())
    assert left == ["benchmark_model", "models"], "the run's folder and its lock are gone"
    assert list(tmp_path.iterdir()) == []


def test_later_rounds_send_no_model_again(
    phone: FakePhone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models are sent once, many in one push; later, only the list and script are."""
    sent: list[int] = []
    phone.on_received = sent.append
    device, wanted = Adb(phone.device()), plan(5)
    assert len(split_rows(device.measure(wanted, tmp_path))[1]) == 5
    models = sum(Path(item["path"]).stat().st_size for item in wanted["items"])
    assert sum(sent) > models
    sent.clear()
    assert len(split_rows(device.measure(wanted, tmp_path))[1]) == 5
    assert sum(sent) < 10_000
    sent.clear()
    monkeypatch.setattr(adb_module, "BATCH_ITEMS", 2)
    _, rows, _, conditions = split_rows(device.measure(wanted, tmp_path))
    assert [row["id"] for row in rows] == ids(wanted)
    assert len(conditions) == 4, "before and after each of three batches"


@pytest.mark.slow
def test_rows_arrive_as_they_are_measured(phone: FakePhone, tmp_path: Path) -> None:
    """Leaving early ends the batch on the phone and removes the batch's files."""
    wanted = plan(2)
    wanted["items"] = [{**wanted["items"][0], "round": number} for number in range(30)]
    wanted["min_ms"] = 400.0
    rows = Adb(phone.device()).measure(wanted, tmp_path)
    assert next(row for row in rows if "id" in row)["round"] == 0
    assert len(phone.runs) <= 4
    rows.close()
    deadline, count = time.monotonic() + 40, -1  # a busy computer notices late
    while count != len(phone.runs) and time.monotonic() < deadline:
        count = len(phone.runs)
        time.sleep(1.0)
    assert len(phone.runs) == count < 120
    assert not list(phone.folder.glob("run-*"))


def test_without_cores(phone: FakePhone, tmp_path: Path) -> None:
    header, rows, _, _ = split_rows(Adb(phone.device()).measure(plan(1, cores=None), tmp_path))
    assert header["cores"] == "unknown" and len(rows) == 1 and phone.masks == []


@pytest.mark.parametrize(
    ("delegate", "flag", "delegated"),
    [("gpu", "use_gpu", "unknown"), ("none", "use_xnnpack", "unknown")],
)
def test_delegates(
    delegate: str, flag: str, delegated: bool | str, phone: FakePhone, tmp_path: Path
) -> None:
    header, rows, _, _ = split_rows(Adb(phone.device(delegate=delegate)).measure(plan(1), tmp_path))
    assert phone.runs[0][flag] == ("true" if delegate == "gpu" else "false")
    assert header["runtime_package"] == f"benchmark_model {delegate}"
    assert rows[0]["delegated"] == delegated


def test_cores(phone: FakePhone, tmp_path: Path) -> None:
    """The fastest cores are used, unless the document names others."""
    device = Adb(phone.device())
    assert device.cores(1) == (7,)
    assert device.cores(3) == (5, 6, 7)
    assert Adb(phone.device().model_copy(update={"cores": (0, 1)})).cores(2) == (0, 1)
    with pytest.raises(
        DeviceError,
        match=r"device\.threads = 9 needs 9 cores, but fake has only 8: lower device\.threads",
    ):
        device.cores(9)
    with pytest.raises(
        DeviceError,
        match=(
            "cannot run on core 12 of fake: choose from its cores 0, 1, 2, 3, 4, 5, 6, 7 with"
            r" device\.cores, or set device\.cores = \[\] to let Android choose"
        ),
    ):
        next(device.measure(plan(1, cores=[12]), tmp_path))


@pytest.mark.parametrize(
    ("taskset", "reason"),
    [
        (
            'echo "taskset: failed to set pid 26174\'s affinity: Invalid argument"; exit 1',
            r"\(taskset: failed to set pid 26174's affinity: Invalid argument\)",
        ),
        (
            "echo '/system/bin/sh: taskset: inaccessible or not found'; exit 127",
            r"\(the phone cannot start it: .*taskset: inaccessible or not found\)",
        ),
    ],
    ids=["a core is switched off", "no taskset"],
)
def test_a_phone_that_cannot_pin_says_so_and_is_measured_unpinned(
    taskset: str, reason: str, phone: FakePhone, tmp_path: Path
) -> None:
    (phone.root / "system/bin/taskset").write_text(f"#!/bin/sh\n{taskset}\n")
    with pytest.raises(
        DeviceError,
        match=rf"^fake cannot pin a program to the cores 6 {reason}: .*set device\.cores = \[\] to",
    ):
        list(Adb(phone.device()).measure(plan(1), tmp_path))
    unpinned = Adb(phone.device().model_copy(update={"cores": ()}))
    assert unpinned.cores(3) == ()
    header, rows, _, _ = split_rows(unpinned.measure(plan(1, cores=None), tmp_path))
    assert header["pinned"] is False and len(rows[0]["ms"]) == 2


def test_a_plan_of_nothing_yields_the_header(phone: FakePhone, tmp_path: Path) -> None:
    rows = Adb(phone.device()).measure(plan(0), tmp_path)
    assert next(rows)["runner"] == 1
    rows.close()  # type: ignore[attr-defined]
    assert not list(phone.folder.glob("run-*")) and phone.runs == []


def test_only_litert(phone: FakePhone, tmp_path: Path) -> None:
    with pytest.raises(
        DeviceError,
        match=r"fake runs LiteRT files only: set device\.runtime = 'litert' instead of 'onnxruntime'",
    ):
        next(Adb(phone.device()).measure(plan(1, runtime="onnxruntime"), tmp_path))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"serail": "x"}, "options of device 'fake': unknown key 'serail'; did you mean 'serial'"),
        (
            {"delegate": "npu"},
            "delegate = 'npu': input should be 'xnnpack', 'gpu', 'nnapi' or 'none'",
        ),
        ({"wait_s": "-1"}, "wait_s = '-1': input should be greater than or equal to 0"),
        ({"max_celsius": "warm"}, "max_celsius = 'warm'"),
        ({"folder": "/data/local/tmp/$(reboot)"}, r"folder = '/data/local/tmp/\$\(reboot\)'"),
        ({"folder": "relative"}, "folder = 'relative'"),
        (
            {"serial": "$(touch pwned)"},
            r"serial = '\$\(touch pwned\)': not a valid serial number; 'adb devices' lists",
        ),
        ({"serial": "a;b"}, "not a valid serial number"),
        ({"serial": "-d"}, "not a valid serial number"),
        ({"serial": "a\nb"}, "not a valid serial number"),
        ({"serial": "a\0b"}, "not a valid serial number"),
        ({"serial": "a\n"}, "not a valid serial number"),
        ({"folder": "/data/local/tmp/x\n"}, "folder = "),
        ({"max_celsius": "nan"}, "max_celsius = 'nan'"),
        ({"max_celsius": "1e400"}, "max_celsius = '1e400'"),
        ({"wait_s": "9" * 5000}, "wait_s = "),
    ],
)
def test_wrong_options_are_refused_without_a_phone(options: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Adb(Device(id="fake", soc="none", connection="adb", options=options))


def test_unplugged_while_it_runs(phone: FakePhone, tmp_path: Path) -> None:
    """Measuring resumes when the phone is back, with the items that have no row yet."""
    first = threading.Event()

    def pull_the_plug(count: int) -> None:
        if count == 4:  # the second process of the second model
            first.wait(20)
            phone.unplug()
            threading.Timer(0.4, phone.plug).start()

    phone.on_run = pull_the_plug
    wanted = plan(4)
    _, rows, notes, _ = split_rows(announced(Adb(phone.device()).measure(wanted, tmp_path), first))
    assert [row["id"] for row in rows] == ids(wanted)
    assert all(len(row["ms"]) == 2 for row in rows)
    assert notes == [
        (
            f"fake went away while it ran {OPS[1].key} (unplugged?): waiting up to 600 s for it to"
            " return"
        ),
        "fake is back",
    ]
    graphs = [run["graph"] for run in phone.runs]
    assert graphs.count(graphs[0]) == 2, "the first model is not measured again"
    assert not list(phone.folder.glob("run-*"))


def test_unplugged_while_models_are_sent(phone: FakePhone, tmp_path: Path) -> None:
    """A model that was sent only in part never ends up among the models."""
    received = 0

    def pull_the_plug(count_bytes: int) -> None:
        nonlocal received
        received += count_bytes
        if received > 30_000:
            received = -(10**9)
            phone.unplug()
            threading.Timer(0.3, phone.plug).start()

    phone.on_received = pull_the_plug
    wanted = plan(3)
    _, rows, notes, _ = split_rows(Adb(phone.device()).measure(wanted, tmp_path))
    assert [row["id"] for row in rows] == ids(wanted) and all("ms" in row for row in rows)
    assert len(notes) == 2
    sizes = sorted(Path(item["path"]).stat().st_size for item in wanted["items"])
    assert sorted(path.stat().st_size for path in (phone.folder / "models").iterdir()) == sizes


def test_unplugged_between_two_calls(phone: FakePhone, tmp_path: Path) -> None:
    """A phone that was once attached is waited for."""
    device = Adb(phone.device())
    list(device.measure(plan(1), tmp_path))
    phone.unplug()
    threading.Timer(0.3, phone.plug).start()
    header, rows, notes, _ = split_rows(header_first(device.measure(plan(1), tmp_path)))
    assert "runner" in header and len(rows) == 1 and len(notes) == 2


def header_first(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows, header first: notes precede it if the phone was away at the start."""
    return iter(sorted(rows, key=lambda row: "runner" not in row))


def test_a_phone_that_does_not_come_back(phone: FakePhone, tmp_path: Path) -> None:
    first = threading.Event()

    def pull_the_plug(count: int) -> None:
        if count == 3:
            first.wait(20)
            phone.unplug()

    phone.on_run = pull_the_plug
    rows = announced(Adb(phone.device(wait_s="0.3")).measure(plan(3), tmp_path), first)
    received = []
    with pytest.raises(
        DeviceError,
        match=r"fake did not come back within 0\.3 s: plug it in, and run the same command again to resume",
    ):
        for row in rows:
            received.append(row)
    assert [row["id"] for row in received if "id" in row] == [OPS[0].key], (
        "rows measured before that have been yielded"
    )


def test_a_model_that_kills_the_phone(phone: FakePhone, tmp_path: Path) -> None:
    """It is named, and not retried forever."""
    first = threading.Event()

    def die(flags: dict[str, str], folder: Path, say: fake_benchmark_model.Say) -> int:
        if len(phone.runs) > 2:
            first.wait(20)
            phone.unplug()
            phone.plug()
        return fake_benchmark_model.litert(flags, folder, say)

    phone.tool = die
    with pytest.raises(
        DeviceError, match=f"fake went away 3 times in a row while it ran {OPS[1].key}"
    ):
        list(announced(Adb(phone.device()).measure(plan(3), tmp_path), first))


@pytest.mark.parametrize(
    "output",
    [
        [],
        ["\x00\x01\x02 \udcff\udcfe binary", "run-000000000000 end 0 0 0", "count=50"],
        [
            "INFO: Running benchmark for at least 1",
            "count=many",
            "INFO: Running benchmark for at least 1",
            "count=",
        ],
    ],
)
def test_garbage_from_the_tool(output: list[str], phone: FakePhone, tmp_path: Path) -> None:
    """One error for that item, and no value from its other processes ends up in the
    next item's.
    """

    def garbage(flags: dict[str, str], folder: Path, say: fake_benchmark_model.Say) -> int:
        count = len(phone.runs)
        good = [
            "Running benchmark for at least 1",
            "count=2 curr=9(all same)",
            "Running benchmark for at least 5",
            f"count=5 curr={count}000",
        ]
        # the fourth run is the first of the second model's three processes
        for line in output if count == 4 else good:
            say(line)
        return 0

    phone.tool = garbage
    wanted = plan(3, min_runs=3)
    _, rows, _, _ = split_rows(Adb(phone.device()).measure(wanted, tmp_path))
    assert [row["id"] for row in rows] == ids(wanted)
    assert [row.get("ms") for row in rows] == [[1.0, 2.0, 3.0], None, [7.0, 8.0, 9.0]]
    assert rows[1]["error"].startswith("its output has no statistics in a format that hwnas knows")


def test_a_crash_of_the_tool(phone: FakePhone, tmp_path: Path) -> None:
    phone.tool = lambda flags, folder, say: 139
    _, rows, _, _ = split_rows(Adb(phone.device()).measure(plan(1), tmp_path))
    assert rows == [{"id": OPS[0].key, "round": 0, "error": "killed by signal 11: nothing"}]


def test_waits_for_a_hot_phone(phone: FakePhone, tmp_path: Path) -> None:
    phone.set_battery(81, [44.0, 43.0, 39.0, 37.9])
    _, rows, notes, conditions = split_rows(Adb(phone.device()).measure(plan(1), tmp_path))
    assert len(rows) == 1
    assert notes == ["fake is hot (44 °C): waiting until it is at 38 °C or below"]
    assert [row["celsius"] for row in conditions] == [44.0, 37.9]


def test_does_not_wait_forever(
    phone: FakePhone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A phone that stays throttled is measured after a while, without another wait."""
    monkeypatch.setattr(adb_module, "COOL_DOWN_S", 0.2)
    monkeypatch.setattr(adb_module, "BATCH_ITEMS", 1)
    phone.set_thermal_status(2)
    _, rows, notes, _ = split_rows(Adb(phone.device()).measure(plan(2), tmp_path))
    assert len(rows) == 2
    assert len(notes) == 2 and "is still hot (throttled by Android (thermal status 2))" in notes[1]


def test_a_low_battery_is_reported(phone: FakePhone, tmp_path: Path) -> None:
    phone.set_battery(9, [25.0])
    _, _, notes, _ = split_rows(Adb(phone.device()).measure(plan(1), tmp_path))
    assert notes == [
        "the battery of fake is at 9 %: phones with a low battery are slower, so charge it"
    ]


def test_two_phones_at_once(phones: Callable[[], FakePhone], tmp_path: Path) -> None:
    """Each measures its own models, at the same time, from the same work folder."""
    both = [phones(), phones()]
    wanted = [plan(3), plan(3) | {"items": plan(6)["items"][3:]}]
    assert ids(wanted[0]) != ids(wanted[1])
    meeting = threading.Barrier(2, timeout=20)
    for fake in both:
        # neither starts before the other
        fake.on_run = lambda count: meeting.wait() if count == 1 else None
    with ThreadPoolExecutor() as pool:
        results = list(
            pool.map(
                lambda pair: list(Adb(pair[0].device()).measure(pair[1], tmp_path)),
                zip(both, wanted, strict=True),
            )
        )
    for fake, plan_of_fake, rows in zip(both, wanted, results, strict=True):
        assert [row["id"] for row in rows if "id" in row] == ids(plan_of_fake)
        assert len({run["graph"] for run in fake.runs}) == 3
        assert len(list((fake.folder / "models").iterdir())) == 3


def test_two_runs_on_one_phone(phone: FakePhone, tmp_path: Path) -> None:
    """They share the models, and never run at the same time."""
    running, most_at_once = [0], [0]

    def count(flags: dict[str, str], folder: Path, say: fake_benchmark_model.Say) -> int:
        running[0] += 1
        most_at_once[0] = max(most_at_once[0], running[0])
        time.sleep(0.05)
        status = fake_benchmark_model.litert(flags, folder, say)
        running[0] -= 1
        return status

    phone.tool = count
    wanted = plan(4)
    with ThreadPoolExecutor() as pool:
        results = list(
            pool.map(lambda _: split_rows(Adb(phone.device()).measure(wanted, tmp_path)), range(2))
        )
    for _, rows, _, _ in results:
        assert [row["id"] for row in rows] == ids(wanted) and all("ms" in row for row in rows)
    assert most_at_once == [1]
    assert [note for _, _, notes, _ in results for note in notes] == [
        "another run is using fake: waiting for it to finish"
    ]


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_predicts_as_this_computer_does(
    dtype: str, phone: FakePhone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several parts, and across an unplugging."""
    model = timing_file((OPS[1], Classifier(8, 8, 10)), "litert", dtype)
    images = np.random.default_rng(0).standard_normal((7, 8, 8, 8)).astype(np.float32)
    # room for three images in a part
    monkeypatch.setattr(adb_module, "INPUT_BYTES", 3 * 8 * 8 * 8 * (4 if dtype == "fp32" else 1))

    def pull_the_plug(count: int) -> None:
        if count == 5:  # the second image of the second part
            phone.unplug()
            threading.Timer(0.2, phone.plug).start()

    phone.on_run = pull_the_plug
    outputs = Adb(phone.device()).predict(model, images, tmp_path)
    assert outputs.shape == (7, 10) and outputs.dtype == np.float32
    assert np.array_equal(outputs, Host(HOST).predict(model, images, tmp_path))
    assert outputs.std() > 1e-3
    assert 3 + 2 + 3 + 1 <= len(phone.runs) <= 3 + 3 + 3 + 1, (
        "only the interrupted part is computed again"
    )
    assert not list(phone.folder.glob("run-*")) and list(tmp_path.iterdir()) == []


def test_predicts_several_outputs_in_a_row(
    phone: FakePhone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The four of a detector, as the tool writes them: image by image, one output after
    another, in two parts.
    """
    network = lively_network()
    model = tmp_path / "detector.tflite"
    model.write_bytes(tasks(write_heads(network), network, PostProcessing(detections=5)))
    x_NHWC = np.ascontiguousarray(images().permute(0, 2, 3, 1).numpy())
    monkeypatch.setattr(adb_module, "INPUT_BYTES", 2 * x_NHWC[0].nbytes)
    rows = Adb(phone.device()).predict(model, x_NHWC, tmp_path)
    assert rows.shape == (3, 5 * 4 + 5 + 5 + 1) and rows[:, -1].tolist() == [5, 5, 5]
    assert np.array_equal(rows, Host(HOST).predict(model, x_NHWC, tmp_path))
    expected = [
        np.concatenate([value.reshape(-1) for value in outputs.values()])
        for outputs in run_tflite(model.read_bytes(), images())
    ]
    np.testing.assert_allclose(rows, np.stack(expected), atol=1e-5)


def test_outputs_that_arrive_truncated(
    phone: FakePhone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = AdbSession.receive
    monkeypatch.setattr(AdbSession, "receive", lambda session, name: receive(session, name)[:-6])
    with pytest.raises(
        DeviceError,
        match=r"fake sent 4090 bytes of outputs of \S+\.tflite instead of 4096: run the command again",
    ):
        Adb(phone.device()).predict(
            timing_file((OPS[0],), "litert", "fp32"), np.zeros((2, 8, 8, 8), np.float32), tmp_path
        )


def test_predict_with_a_broken_model(phone: FakePhone, tmp_path: Path) -> None:
    model = tmp_path / "broken.tflite"
    model.write_bytes(b"no model")
    with pytest.raises(DeviceError, match=r"broken\.tflite does not run on fake"):
        Adb(phone.device()).predict(model, np.zeros((1, 8, 8, 3), np.float32), tmp_path)


def test_predict_with_a_tool_that_writes_nothing(phone: FakePhone, tmp_path: Path) -> None:
    """An old build ignores --output_filepath, which it does not know."""

    def old(flags: dict[str, str], folder: Path, say: fake_benchmark_model.Say) -> int:
        return fake_benchmark_model.litert(
            {name: value for name, value in flags.items() if name != "output_filepath"}, folder, say
        )

    phone.tool = old
    model = timing_file((OPS[0],), "litert", "fp32")
    with pytest.raises(
        DeviceError,
        match=(
            r"wrote 0 bytes of output, but the outputs of \S+ have 2048: it is too old or not"
            r" benchmark_model; .*ANDROID\.md"
        ),
    ):
        Adb(phone.device()).predict(model, np.zeros((2, 8, 8, 8), np.float32), tmp_path)


def test_predict_with_a_tool_that_fails(phone: FakePhone, tmp_path: Path) -> None:
    def failing(flags: dict[str, str], folder: Path, say: fake_benchmark_model.Say) -> int:
        say("ERROR: Failed to apply XNNPACK delegate.")
        return 1

    phone.tool = failing
    with pytest.raises(
        DeviceError, match=r"does not run on fake: Failed to apply XNNPACK delegate\.$"
    ):
        Adb(phone.device()).predict(
            timing_file((OPS[0],), "litert", "fp32"), np.zeros((2, 8, 8, 8), np.float32), tmp_path
        )
    assert len(phone.runs) == 1
