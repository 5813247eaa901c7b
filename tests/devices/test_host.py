"""Real measurements on this computer, and what happens when the runner misbehaves."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwnas.config import DeviceConfig
from hwnas.core.ops import Classifier, MBConv, Op
from hwnas.devices.device import HOST, Device, connect, find_device
from hwnas.devices.host import Host
from hwnas.devices.messages import excerpt, last_line
from hwnas.devices.session import Bench
from hwnas.errors import ConfigError, DeviceError, DocumentError
from hwnas.export.timing import timing_file

SMALL = MBConv(8, 8, 8, 24, 3, act="relu", residual=True)
LARGE = MBConv(32, 48, 48, 288, 5, act="relu", residual=True)


def plan(
    ops: list[Op], runtime: str, dtype: str, cores: list[int], rounds: int = 1
) -> dict[str, Any]:
    items = [
        {
            "id": op.key,
            "path": str(timing_file((op,), runtime, dtype)),
            "round": number,
            "ops": [op.key],
        }
        for number in range(rounds)
        for op in ops
    ]
    return {
        "runtime": runtime,
        "threads": 1,
        "cores": cores,
        "min_ms": 5.0,
        "min_runs": 5,
        "items": items,
    }


@pytest.mark.parametrize(
    ("runtime", "dtype", "ops"),
    [("litert", "fp32", 2), ("litert", "int8", 2), ("onnxruntime", "fp32", 1)],
)
def test_measures(runtime: str, dtype: str, ops: int, tmp_path: Path) -> None:
    host = Host(HOST)
    core = sorted(os.sched_getaffinity(0))[0]
    wanted = plan([SMALL, LARGE][:ops], runtime, dtype, [core], rounds=2)
    header, *rows = host.measure(wanted, tmp_path)
    assert header["runtime"] == runtime
    assert header["cores"] == [core]
    assert header["threads"] == 1
    assert header["runtime_version"][0].isdigit()
    assert header["cpu"] not in ("", "unknown") or header["machine"] != "x86_64"
    assert [(row["id"], row["round"]) for row in rows] == [
        (item["id"], item["round"]) for item in wanted["items"]
    ]
    medians = {}
    for row in rows:
        assert len(row["ms"]) >= 5
        assert min(row["ms"]) > 0
        assert sum(row["ms"]) >= 5.0 or len(row["ms"]) == 200
        medians.setdefault(row["id"], []).append(float(np.median(row["ms"])))
    if ops == 2:  # it has 250 times as many multiplications
        assert min(medians[LARGE.key]) > 5 * max(medians[SMALL.key])


def test_rows_arrive_as_they_are_measured(tmp_path: Path) -> None:
    """The first row arrives long before the last one is due, and leaving early ends the
    runner.
    """
    wanted = plan([SMALL], "litert", "fp32", [sorted(os.sched_getaffinity(0))[-1]])
    wanted["items"] = [{**wanted["items"][0], "round": number} for number in range(40)]
    wanted |= {"min_ms": 250.0, "max_runs": 10**6}
    started = time.monotonic()
    rows = Host(HOST).measure(wanted, tmp_path)
    next(rows)
    assert next(rows)["round"] == 0
    rows.close()
    assert time.monotonic() - started < 8  # all of them would take ten seconds or more


def test_cores() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    assert Host(HOST).cores(1) == (allowed[-1],)
    assert Host(Device(id="x", soc="x", connection="host", cores=(4, 5))).cores(2) == (4, 5)
    with pytest.raises(DeviceError, match=r"lower device\.threads"):
        Host(HOST).cores(len(allowed) + 1)


def test_a_document_and_a_configuration_without_cores_do_not_pin(tmp_path: Path) -> None:
    device = Device(id="x", soc="x", connection="host", cores=())
    assert Host(device).cores(10**6) == ()
    settings = DeviceConfig(threads=3, cores=())
    assert settings.cores == ()
    assert Bench(HOST, Host(HOST), settings, timing_file, tmp_path).cores == ()


@pytest.mark.parametrize("cores", [[-1], [2**31], [10**40], [True], [0.5], ["0"], [0, -1]])
def test_cores_that_no_machine_has_are_one_sentence(cores: list[Any]) -> None:
    content = {"schema": "hwnas.device/1", "id": "x", "soc": "x", "connection": "host"}
    with pytest.raises(DocumentError, match=r"^document: cores\.\d = .*: input should be"):
        Device.parse(json.dumps({**content, "cores": cores}))


@pytest.mark.parametrize("field", ["id", "soc", "connection", "governor"])
@pytest.mark.parametrize("value", ["a\x1b[2J", "a\nb", "a\0", "\u202eb", "a\x7f"])
def test_documents_do_not_reach_the_terminal(field: str, value: str) -> None:
    content = {"schema": "hwnas.device/1", "id": "x", "soc": "x", "connection": "host"}
    with pytest.raises(DocumentError, match="cannot be displayed; leave it out") as caught:
        Device.parse(json.dumps({**content, field: value}))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name",
    [
        *("x\0.json", "/dev/null/x.json", "~nobody-of-that-name/x.json", "x" * 5000 + ".json"),
        *("", "\x1b[2J", "host\0", "host;touch executed", "$(touch executed)", "x" * 100_000),
        *("ssh", "ssh:", "ssh:$(x)", "ssh:-oProxyCommand=x", "ssh:a\nb", "ssh:\x1b[2J", "ssh:a;b"),
        *("adb:-d", "adb:$(x)", "adb:\n", "adb:a;b", "adb:\0"),
    ],
)
def test_odd_names_of_devices_are_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, DocumentError)) as caught:
        connect(find_device(name))
    assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


def test_text_of_devices_loses_control_characters_and_its_middle() -> None:
    assert excerpt("a\x1b[2J\n\tb\0") == "a\\u001b[2J b\\u0000"
    assert excerpt("x" * 600) == "x" * 600
    long = excerpt("begins " + "x" * 10_000 + " ends")
    assert long.startswith("begins x") and long.endswith("x ends") and len(long) < 610
    assert last_line("first\n second \n\n") == "second"
    assert last_line(" \n") == ""


def test_a_core_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"Cannot run on cores \[4000\]; .*device\.cores = \[\]"):
        list(Host(HOST).measure(plan([SMALL], "litert", "fp32", [4000]), tmp_path))


def fake_runner(tmp_path: Path, program: str) -> Host:
    """A host whose runner is another program: a real process, with the faults of real
    runners.
    """
    host = Host(HOST)
    host.runner = tmp_path / "runner.py"
    host.runner.write_text("import json, sys, time\n" + program)
    return host


def test_a_talkative_runtime_does_not_block(tmp_path: Path) -> None:
    """Runtimes write warnings to stderr for every model: more than a pipe holds, if
    nobody reads it.
    """
    program = """
print(json.dumps({"runner": 1}), flush=True)
for i in range(4):
    sys.stderr.write("INFO: delegate created " * 3000)
    sys.stderr.flush()
    print(json.dumps({"id": "x", "round": i, "ms": [1.0]}), flush=True)
"""
    import faulthandler

    # a blocked pipe would never come back
    faulthandler.dump_traceback_later(30, exit=True)
    try:
        rows = list(fake_runner(tmp_path, program).measure({"items": []}, tmp_path))
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert [row.get("round") for row in rows] == [None, 0, 1, 2, 3]


def test_a_runner_that_dies_says_why(tmp_path: Path) -> None:
    program = (
        'print(json.dumps({"runner": 1}), flush=True)\nsys.stderr.write("loading\\nout of'
        ' memory\\n")\nsys.exit(7)\n'
    )
    rows = fake_runner(tmp_path, program).measure({"items": []}, tmp_path)
    assert next(rows) == {"runner": 1}
    with pytest.raises(DeviceError, match="status 7: out of memory"):
        next(rows)


def test_a_runner_that_is_killed_in_the_middle_of_a_line(tmp_path: Path) -> None:
    program = (
        'import os\nprint(json.dumps({"runner": 1}), flush=True)\nsys.stdout.write("{\\"id\\":'
        ' \\"x")\nsys.stdout.flush()\nos._exit(9)\n'
    )
    with pytest.raises(DeviceError, match="status 9"):
        list(fake_runner(tmp_path, program).measure({"items": []}, tmp_path))


def test_predict(tmp_path: Path) -> None:
    """The same outputs as from TFLite's own interpreter, image by image."""
    from ai_edge_litert.interpreter import Interpreter

    model = timing_file((SMALL, Classifier(8, 8, 10)), "litert", "fp32")
    images = np.random.default_rng(0).standard_normal((3, 8, 8, 8)).astype(np.float32)
    outputs = Host(HOST).predict(model, images, tmp_path)
    interpreter = Interpreter(str(model))
    interpreter.allocate_tensors()
    for image, output in zip(images, outputs, strict=True):
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None])
        interpreter.invoke()
        assert np.allclose(
            interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0],
            output,
            atol=1e-6,
        )
    assert outputs.std() > 1e-3
    assert list(tmp_path.iterdir()) == []


def test_predict_with_a_broken_model(tmp_path: Path) -> None:
    model = tmp_path / "broken.tflite"
    model.write_bytes(b"no model")
    with pytest.raises(DeviceError, match=r"broken\.tflite does not run on host"):
        Host(HOST).predict(model, np.zeros((1, 8, 8, 3), np.float32), tmp_path)
    assert list(tmp_path.iterdir()) == [model]


def test_devices_by_address() -> None:
    assert find_device("ssh:pi@board.local") == Device(
        id="ssh-pi-board.local", soc="unknown", connection="ssh", options={"host": "pi@board.local"}
    )
    assert find_device("adb:R58M123") == Device(
        id="adb-R58M123", soc="unknown", connection="adb", options={"serial": "R58M123"}
    )
    assert find_device("adb") == Device(id="adb", soc="unknown", connection="adb")


def test_devices_by_name(tmp_path: Path) -> None:
    assert find_device("host") is HOST
    with pytest.raises(ConfigError, match="unknown device 'hots'; did you mean 'host'"):
        find_device("hots")
    path = tmp_path / "mine.json"
    Device(id="mine", soc="none", connection="nowhere").save(path)
    assert find_device(str(path)).id == "mine"
    with pytest.raises(ConfigError, match="unknown connection 'nowhere'"):
        connect(find_device(str(path)))
