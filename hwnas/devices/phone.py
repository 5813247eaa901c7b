"""The state of an Android phone: chip, cores and clock rates, battery, temperature.

``QUESTIONS`` is one command for the phone's shell, and ``read`` parses what it prints.
Vendors differ in what they reveal to adb's user. Whatever is missing is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

QUESTIONS = r"""
getprop | grep -E '^\[ro\.(product|soc|board|hardware|build\.version)'
first_line() { line= && { read -r line < "$1" ; } 2> /dev/null ; echo "$line" ; }
for cpu in /sys/devices/system/cpu/cpu[0-9]* ; do
    echo "core ${cpu##*/cpu}"
    for name in online cpufreq/cpuinfo_max_freq cpufreq/scaling_cur_freq cpufreq/scaling_governor
    do first_line $cpu/$name ; done
done
dumpsys battery
dumpsys thermalservice 2> /dev/null | grep 'Thermal Status'
"""
"""A constant command that only reads. It starts few programs, since it runs often."""


@dataclass(frozen=True)
class Core:
    """A core that is switched on. Frequencies are in MHz, None if the phone hides them."""

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
        """The instruction sets that the phone runs, its native one first:
        ``("arm64-v8a", "armeabi-v7a")``.
        """
        listed = self.properties.get("ro.product.cpu.abilist") or self.properties.get(
            "ro.product.cpu.abi", ""
        )
        return tuple(name.strip() for name in listed.split(",") if name.strip())

    @property
    def chip(self) -> str:
        """The chip: ``Google Tensor``. Before Android 12 only the vendor's name of the
        board is known: ``sm8150``.
        """
        get = self.properties.get
        chip = f"{get('ro.soc.manufacturer', '')} {get('ro.soc.model', '')}".strip()
        return chip or get("ro.board.platform") or get("ro.hardware") or "unknown"

    @property
    def machine(self) -> str:
        """Instruction set, model and system, all of which affect latency:
        ``arm64-v8a, Google Pixel 6, Android 14``.
        """
        get = self.properties.get
        abi = self.abis[0] if self.abis else "unknown ABI"
        model = f"{get('ro.product.manufacturer', '')} {get('ro.product.model', '')}".strip()
        android = get("ro.build.version.release") or "unknown"
        return f"{abi}, {model or 'unknown model'}, Android {android}"

    def fastest(self, count: int) -> tuple[int, ...]:
        """The ``count`` cores with the highest maximum clock rate, sorted by number. Among
        cores whose rates are equal or unknown, the last ones are taken.
        """
        by_clock = sorted(
            self.cores, key=lambda core: (core.max_mhz or 0.0, core.number), reverse=True
        )
        return tuple(sorted(core.number for core in by_clock[:count]))

    def governor(self, cores: tuple[int, ...]) -> str:
        """The frequency governors of these cores, comma-separated: ``schedutil``."""
        used = [core for core in self.cores if core.number in cores]
        governors = {core.governor for core in used if core.governor}
        return ",".join(sorted(governors)) or "unknown"

    def conditions(self, cores: tuple[int, ...]) -> dict[str, float | str]:
        """Whatever may change during a measurement, as the values of a conditions row."""
        clocks = [core.mhz for core in self.cores if core.number in cores and core.mhz is not None]
        values = {
            "battery_percent": self.battery_percent,
            "celsius": self.celsius,
            "plugged": self.plugged,
            "thermal_status": self.thermal_status,
            "governor": self.governor(cores),
            "mhz": min(clocks, default=None),
        }
        return {name: value for name, value in values.items() if value is not None}

    def heat(self, max_celsius: float) -> str | None:
        """Why the phone is too hot to measure, in a few words: its battery temperature, or
        Android's own report of throttling. None if it is cool enough.
        """
        if self.celsius is not None and self.celsius > max_celsius:
            return f"{self.celsius:g} °C"
        if self.thermal_status:
            return f"throttled by Android (thermal status {self.thermal_status})"
        return None


def read(answers: str) -> PhoneState:
    """Parse the output of ``QUESTIONS``."""
    battery: dict[str, str] = {}
    for key, value in re.findall(r"^\s*([\w ]+): (\S+)\s*$", answers, re.MULTILINE):
        # The first value counts: some vendors print a log of earlier ones further down.
        battery.setdefault(key.lower(), value)
    percent = _number(battery.get("level"))
    tenths = _number(battery.get("temperature"))
    sources = [
        name
        for name in ("ac", "usb", "wireless", "dock")
        if battery.get(f"{name} powered") == "true"
    ]
    no_source = "unknown" if percent is None else "no"
    return PhoneState(
        properties=dict(re.findall(r"^\[([\w.]+)\]: \[(.+)\]\s*$", answers, re.MULTILINE)),
        cores=_cores(answers),
        battery_percent=percent,
        celsius=None if tenths is None else tenths / 10,
        plugged=",".join(sources) or no_source,
        thermal_status=_number(battery.get("thermal status")),
    )


def _cores(answers: str) -> tuple[Core, ...]:
    """The cores that are switched on, sorted by number."""
    lines = [line.strip() for line in answers.splitlines()]
    cores = []
    for position, line in enumerate(lines):
        if re.fullmatch(r"core \d+", line):
            core = _core(int(line[5:]), lines[position + 1 : position + 5])
            if core is not None:
                cores.append(core)
    return tuple(sorted(cores, key=lambda core: core.number))


def _core(number: int, lines: list[str]) -> Core | None:
    """A core from the lines that follow its number; None if it is switched off."""
    online, max_khz, khz, governor = [*lines, "", "", "", ""][:4]
    # Cores that cannot be switched off have an empty line here.
    if online == "0":
        return None
    return Core(number, _mhz(max_khz), _mhz(khz), governor)


def _mhz(khz_text: str) -> float | None:
    khz = _number(khz_text)
    return None if khz is None else khz / 1e3


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else None
