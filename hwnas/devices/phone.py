"""What an Android phone says of itself: chip, cores and clocks, battery, temperature.

``QUESTIONS`` is one command for its shell, and ``read`` understands the answers.
Whatever a phone does not tell, or not to adb's user, is left out: vendors differ in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

QUESTIONS = r"""
getprop | grep -E '^\[ro\.(product|soc|board|hardware|build\.version)'
first_line() { line= && { read -r line < "$1" ; } 2> /dev/null ; echo "$line" ; }
for cpu in /sys/devices/system/cpu/cpu[0-9]* ; do
    echo "core ${cpu##*/cpu}"
    for name in online cpufreq/cpuinfo_max_freq cpufreq/scaling_cur_freq cpufreq/scaling_governor ; do first_line $cpu/$name ; done
done
dumpsys battery
dumpsys thermalservice 2> /dev/null | grep 'Thermal Status'
"""
"""Constant, and safe to ask at any time. Few of the programs are started, as it is asked often."""


@dataclass(frozen=True)
class Core:
    """A core that is switched on. Frequencies in MHz, None where the phone does not tell."""

    number: int
    max_mhz: float | None
    mhz: float | None
    governor: str


@dataclass(frozen=True)
class PhoneState:
    """The answers to ``QUESTIONS`` at one moment."""

    properties: dict[str, str] = field(default_factory=dict)
    cores: tuple[Core, ...] = ()
    battery_percent: int | None = None
    celsius: float | None = None
    plugged: str = "unknown"
    thermal_status: int | None = None

    @property
    def abis(self) -> tuple[str, ...]:
        """The instruction sets that it runs, its own first: ``("arm64-v8a", "armeabi-v7a")``."""
        listed = self.properties.get("ro.product.cpu.abilist") or self.properties.get(
            "ro.product.cpu.abi", ""
        )
        return tuple(name.strip() for name in listed.split(",") if name.strip())

    @property
    def chip(self) -> str:
        """The chip, by its own name since Android 12, else by the vendor's name of the
        board: ``Google Tensor``, ``sm8150``.
        """
        get = self.properties.get
        maker, model = get("ro.soc.manufacturer", ""), get("ro.soc.model", "")
        return (
            f"{maker} {model}".strip()
            or get("ro.board.platform")
            or get("ro.hardware")
            or "unknown"
        )

    @property
    def machine(self) -> str:
        """Instruction set, model and system, all of which decide how fast a network is:
        ``arm64-v8a, Google Pixel 6, Android 14``.
        """
        get = self.properties.get
        model = (
            f"{get('ro.product.manufacturer', '')} {get('ro.product.model', '')}".strip()
            or "unknown model"
        )
        return (
            f"{self.abis[0] if self.abis else 'unknown ABI'}, {model}, Android"
            f" {get('ro.build.version.release') or 'unknown'}"
        )

    def fastest(self, count: int) -> tuple[int, ...]:
        """The ``count`` cores of the highest clock, in order of their numbers; the last
        ones where clocks are equal or not told.
        """
        by_clock = sorted(
            self.cores, key=lambda core: (core.max_mhz or 0.0, core.number), reverse=True
        )
        return tuple(sorted(core.number for core in by_clock[:count]))

    def governor(self, cores: tuple[int, ...]) -> str:
        """What sets the clocks of these cores: ``schedutil``."""
        return (
            ",".join(
                sorted(
                    {core.governor for core in self.cores if core.number in cores and core.governor}
                )
            )
            or "unknown"
        )

    def conditions(self, cores: tuple[int, ...]) -> dict[str, float | str]:
        """What may change while it measures: a row of conditions."""
        clocks = [core.mhz for core in self.cores if core.number in cores and core.mhz is not None]
        told = {
            "battery_percent": self.battery_percent,
            "celsius": self.celsius,
            "plugged": self.plugged,
            "thermal_status": self.thermal_status,
            "governor": self.governor(cores),
            "mhz": min(clocks, default=None),
        }
        return {name: value for name, value in told.items() if value is not None}

    def heat(self, max_celsius: float) -> str | None:
        """Why it is too hot to measure, in a few words: its battery's temperature, or
        Android's own word that it throttles.
        """
        if self.celsius is not None and self.celsius > max_celsius:
            return f"{self.celsius:g} °C"
        if self.thermal_status:
            return f"throttled by Android (thermal status {self.thermal_status})"
        return None


def read(answers: str) -> PhoneState:
    """The answers to ``QUESTIONS``."""
    lines = [line.strip() for line in answers.splitlines()]
    cores = [
        _core(int(line[5:]), lines[at + 1 : at + 5])
        for at, line in enumerate(lines)
        if re.fullmatch(r"core \d+", line)
    ]
    battery: dict[str, str] = {}
    for key, value in re.findall(r"^\s*([\w ]+): (\S+)\s*$", answers, re.MULTILINE):
        battery.setdefault(key.lower(), value)  # some vendors print a log of earlier values below
    level, tenths, status = (
        _number(battery.get(key)) for key in ("level", "temperature", "thermal status")
    )
    sources = [
        name
        for name in ("ac", "usb", "wireless", "dock")
        if battery.get(f"{name} powered") == "true"
    ]
    return PhoneState(
        properties=dict(re.findall(r"^\[([\w.]+)\]: \[(.+)\]\s*$", answers, re.MULTILINE)),
        cores=tuple(
            sorted((core for core in cores if core is not None), key=lambda core: core.number)
        ),
        battery_percent=level,
        celsius=None if tenths is None else tenths / 10,
        plugged=",".join(sources) or ("unknown" if level is None else "no"),
        thermal_status=status,
    )


def _core(number: int, told: list[str]) -> Core | None:
    """A core of its lines; None where it is switched off. One that cannot be has no
    line about it.
    """
    online, max_khz, khz, governor = [*told, "", "", "", ""][:4]
    clocks = [None if value is None else value / 1e3 for value in (_number(max_khz), _number(khz))]
    return None if online == "0" else Core(number, clocks[0], clocks[1], governor)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else None
