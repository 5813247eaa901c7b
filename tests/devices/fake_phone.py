"""A phone for tests: the real ``adb`` client and server talk to our ``adbd``,
which serves a folder of this machine.

Its shell is /bin/sh with stand-ins for Android's own programs, and its benchmark_model
runs LiteRT's real interpreter. Tests can make it fail in every way that a phone can:
see ``FakePhone`` and ``Adbd``. ``phone`` and ``phones`` are pytest fixtures; the test
session has its own adb server, with its own home folder.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hwnas.core.ops import MBConv
from hwnas.devices.device import Device
from hwnas.export.timing import timing_file
from tests.devices import fake_benchmark_model
from tests.devices.adbd import Adbd

PROPERTIES = {
    "ro.product.manufacturer": "Fake",
    "ro.product.model": "Phone 1",
    "ro.soc.manufacturer": "Google",
    "ro.soc.model": "Tensor",
    "ro.product.cpu.abilist": "x86_64,x86",
    "ro.build.version.release": "14",
}
CORES_MHZ = {0: 1803, 1: 1803, 2: 1803, 3: 1803, 4: 2253, 5: 2253, 6: 2802, 7: 2802}
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: true
  Wireless powered: false
  Max charging current: 500000
  status: 2
  health: 2
  present: true
  level: {level}
  scale: 100
  temperature: {tenths}
  technology: Li-ion
"""

OPS = tuple(
    MBConv(8, 8, 8, expanded, 3, act="relu", residual=True) for expanded in (16, 24, 32, 40, 48, 56)
)

STAND_INS = {
    "getprop": 'cat "$PHONE/properties"',
    # Each look at the battery uses up one line of $PHONE/celsius; the last one stays.
    "dumpsys": (
        """
case $1 in
    battery) set -- $(head -n 1 "$PHONE/celsius") && sed "s/TENTHS/$1/" "$PHONE/battery"
        [ "$(wc -l < "$PHONE/celsius")" -gt 1 ] && sed -i 1d "$PHONE/celsius" ;;
    thermalservice) echo "IsStatusOverride: false"; echo "Thermal Status: $(cat "$PHONE/thermal")" ;;
esac
"""
    ),
    "taskset": 'echo "$1" >> "$PHONE/masks"; shift; exec "$@"',
}


class FakePhone(Adbd):
    """A phone with four slow, two medium and two fast cores."""

    def __init__(self, root: Path) -> None:
        bin_folder = root / "system" / "bin"
        environment = {
            "PATH": f"{bin_folder}:/usr/bin:/bin",
            "PHONE": str(root),
            "PHONE_CHIP": str(root / "chip"),
        }
        super().__init__(root, environment)
        (root / "data" / "local" / "tmp").mkdir(parents=True)
        bin_folder.mkdir(parents=True)
        for name, program in STAND_INS.items():
            (bin_folder / name).write_text(f"#!/bin/sh\n{program}\n")
            (bin_folder / name).chmod(0o755)
        for number, mhz in CORES_MHZ.items():
            clocks = root / "sys" / "devices" / "system" / "cpu" / f"cpu{number}" / "cpufreq"
            clocks.mkdir(parents=True)
            for name, text in (
                ("cpuinfo_max_freq", f"{mhz}000"),
                ("scaling_cur_freq", f"{mhz}000"),
                ("scaling_governor", "schedutil"),
            ):
                (clocks / name).write_text(f"{text}\n")
        self.set_properties(PROPERTIES)
        self.set_battery(81, [31.5])
        self.set_thermal_status(0)
        self.runs: list[dict[str, str]] = []
        self.on_run: Callable[[int], None] = lambda count: None
        self.tool: fake_benchmark_model.Tool = fake_benchmark_model.litert
        self._chip = fake_benchmark_model.serve(root / "chip", self._run)

    def _run(self, flags: dict[str, str], folder: Path, say: fake_benchmark_model.Say) -> int:
        self.runs.append(flags)
        self.on_run(len(self.runs))
        return self.tool(flags, folder, say)

    def set_properties(self, properties: dict[str, str]) -> None:
        """Set what ``getprop`` prints."""
        (self.root / "properties").write_text(
            "".join(f"[{name}]: [{value}]\n" for name, value in properties.items())
        )

    def set_battery(self, level: int, celsius: list[float]) -> None:
        """Set the charge in percent, and the temperatures that successive looks report;
        the last one stays.
        """
        (self.root / "battery").write_text(BATTERY.format(level=level, tenths="TENTHS"))
        (self.root / "celsius").write_text("".join(f"{round(10 * value)}\n" for value in celsius))

    def set_thermal_status(self, status: int) -> None:
        """Set Android's thermal status; at 0, it does not throttle."""
        (self.root / "thermal").write_text(f"{status}\n")

    @property
    def folder(self) -> Path:
        """hwnas's folder on the phone."""
        return self.local("/data/local/tmp/hwnas")

    @property
    def masks(self) -> list[str]:
        """The masks that ``taskset`` was given, one per process."""
        path = self.root / "masks"
        return path.read_text().split() if path.exists() else []

    def device(self, **options: str) -> Device:
        """A device document for this phone."""
        return Device(
            id="fake", soc="none", connection="adb", options={"serial": self.serial, **options}
        )

    def connect(self) -> None:
        """Plug it in, and connect adb's server to it."""
        self.plug()
        adb("connect", self.serial)

    def close(self) -> None:
        """Unplug it for good."""
        self.unplug()
        self._chip.close()
        adb("disconnect", self.serial)


def adb(*arguments: str) -> str:
    """The output of the real adb."""
    return subprocess.run(
        ["adb", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    ).stdout


def compile_launcher(folder: Path) -> Path:
    """Compile what hwnas takes for the downloaded benchmark_model, for this machine."""
    source, program = folder / "launcher.c", folder / "benchmark_model"
    source.write_text(fake_benchmark_model.LAUNCHER)
    subprocess.run(["gcc", "-w", "-o", str(program), str(source)], check=True, capture_output=True)
    return program


@pytest.fixture(scope="session")
def adb_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Starts an adb server of our own. Yields the path of the program that stands in
    for benchmark_model, and puts it in the environment.
    """
    for program, package in (("adb", "adb"), ("gcc", "gcc")):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program} (apt install {package})")
    home = tmp_path_factory.mktemp("adb-home")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ANDROID_SERIAL", "ADB_VENDOR_KEYS", "ADB_SERVER_SOCKET"):
            patch.delenv(name, raising=False)
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
        environment = {"HOME": str(home), "ANDROID_USER_HOME": str(home), "ADB_MDNS": "0"}
        subprocess.run(
            ["adb", "start-server"],
            env={**os.environ, **environment},
            check=True,
            capture_output=True,
        )
        program = compile_launcher(home)
        patch.setenv("HWNAS_BENCHMARK_MODEL", str(program))
        yield program
        adb("kill-server")


@pytest.fixture
def phones(adb_server: Path) -> Iterator[Callable[[], FakePhone]]:
    """A function that makes phones, plugged in and connected."""
    connected: list[FakePhone] = []
    # a short path: that of a Unix socket has a length limit
    with tempfile.TemporaryDirectory(prefix="phones-") as folder:

        def make() -> FakePhone:
            root = Path(folder) / str(len(connected))
            root.mkdir()
            connected.append(FakePhone(root))
            connected[-1].connect()
            return connected[-1]

        yield make
        for phone in connected:
            with suppress(OSError):
                phone.close()


@pytest.fixture
def phone(phones: Callable[[], FakePhone]) -> FakePhone:
    """A phone that is plugged in and connected."""
    return phones()


def plan(count: int = 3, runtime: str = "litert", **changes: Any) -> dict[str, Any]:
    """A plan of small models, each timed by two processes for a few milliseconds."""
    items = [
        {
            "id": op.key,
            "path": str(timing_file((op,), "litert", "fp32")),
            "round": 0,
            "ops": [op.key],
        }
        for op in OPS[:count]
    ]
    return {
        "runtime": runtime,
        "threads": 1,
        "cores": [6],
        "warmup_ms": 0.0,
        "min_ms": 1.0,
        "min_runs": 2,
        "items": items,
        **changes,
    }


def split_rows(
    rows: Iterator[dict[str, Any]],
) -> tuple[dict[str, Any], list[dict[str, Any]], list[str], list[dict[str, Any]]]:
    """The header, the rows of items, the notes and the conditions."""
    header, *others = rows
    items = [row for row in others if "id" in row]
    notes, conditions = (
        [row[key] for row in others if key in row] for key in ("note", "conditions")
    )
    return header, items, notes, conditions
