"""A phone for tests: the real ``adb`` client and server talk to our ``adbd`` over a
folder of this machine.

Its shell is /bin/sh with stand-ins for Android's own programs, and its benchmark_model
runs LiteRT's real interpreter. Everything that can go wrong with a phone can be made
to: see ``FakePhone`` and ``Adbd``. ``phone`` and ``phones`` are pytest fixtures; adb's
server is one of the test session's own, with a home of its own.
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
    # The first line as long as it is the only one; each look at the battery uses one line up.
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
    """A phone with four slow, two faster and two fast cores."""

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
        """What ``getprop`` answers."""
        (self.root / "properties").write_text(
            "".join(f"[{name}]: [{value}]\n" for name, value in properties.items())
        )

    def set_battery(self, level: int, celsius: list[float]) -> None:
        """Charge in percent, and the temperatures that it will tell, one at a time; the
        last one stays.
        """
        (self.root / "battery").write_text(BATTERY.format(level=level, tenths="TENTHS"))
        (self.root / "celsius").write_text("".join(f"{round(10 * value)}\n" for value in celsius))

    def set_thermal_status(self, status: int) -> None:
        """0: Android does not throttle."""
        (self.root / "thermal").write_text(f"{status}\n")

    @property
    def folder(self) -> Path:
        """Our folder on the phone."""
        return self.local("/data/local/tmp/hwnas")

    @property
    def masks(self) -> list[str]:
        """What ``taskset`` was asked, process by process."""
        path = self.root / "masks"
        return path.read_text().split() if path.exists() else []

    def device(self, **options: str) -> Device:
        """A document of this phone."""
        return Device(
            id="fake", soc="none", connection="adb", options={"serial": self.serial, **options}
        )

    def connect(self) -> None:
        """Plug it in, and tell adb's server."""
        self.plug()
        adb("connect", self.serial)

    def close(self) -> None:
        """Unplug it for good."""
        self.unplug()
        self._chip.close()
        adb("disconnect", self.serial)


def adb(*arguments: str) -> str:
    """The real adb."""
    return subprocess.run(
        ["adb", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    ).stdout


def compile_launcher(folder: Path) -> Path:
    """What hwnas takes for the downloaded benchmark_model: a program of this machine's own kind."""
    source, program = folder / "launcher.c", folder / "benchmark_model"
    source.write_text(fake_benchmark_model.LAUNCHER)
    subprocess.run(["gcc", "-w", "-o", str(program), str(source)], check=True, capture_output=True)
    return program


@pytest.fixture(scope="session")
def adb_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An adb server of our own, and the program that stands for benchmark_model: its
    path, also in the environment.
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
        own = {"HOME": str(home), "ANDROID_USER_HOME": str(home), "ADB_MDNS": "0"}
        subprocess.run(
            ["adb", "start-server"], env={**os.environ, **own}, check=True, capture_output=True
        )
        program = compile_launcher(home)
        patch.setenv("HWNAS_BENCHMARK_MODEL", str(program))
        yield program
        adb("kill-server")


@pytest.fixture
def phones(adb_server: Path) -> Iterator[Callable[[], FakePhone]]:
    """Makes phones that are plugged in and connected."""
    made: list[FakePhone] = []
    # short: a Unix socket's path has a limit
    with tempfile.TemporaryDirectory(prefix="phones-") as folder:

        def make() -> FakePhone:
            root = Path(folder) / str(len(made))
            root.mkdir()
            made.append(FakePhone(root))
            made[-1].connect()
            return made[-1]

        yield make
        for phone in made:
            with suppress(OSError):
                phone.close()


@pytest.fixture
def phone(phones: Callable[[], FakePhone]) -> FakePhone:
    """A phone that is plugged in and connected."""
    return phones()


def plan(count: int = 3, runtime: str = "litert", **changes: Any) -> dict[str, Any]:
    """Small models, two processes of a few milliseconds each."""
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


def sorted_out(
    rows: Iterator[dict[str, Any]],
) -> tuple[dict[str, Any], list[dict[str, Any]], list[str], list[dict[str, Any]]]:
    """Header, rows of items, notes, conditions."""
    header, *others = rows
    items = [row for row in others if "id" in row]
    notes, conditions = (
        [row[key] for row in others if key in row] for key in ("note", "conditions")
    )
    return header, items, notes, conditions
