"""What phones of several vendors report, and how it is read."""

from __future__ import annotations

from hwnas.devices.phone import PhoneState, read

PIXEL = """[ro.board.platform]: [gs101]
[ro.build.version.release]: [14]
[ro.product.cpu.abi]: [arm64-v8a]
[ro.product.cpu.abilist]: [arm64-v8a,armeabi-v7a,armeabi]
[ro.product.manufacturer]: [Google]
[ro.product.model]: [Pixel 6]
[ro.soc.manufacturer]: [Google]
[ro.soc.model]: [Tensor]
core 0

1803000
1803000
sched_pixel
core 7
1
2802000
500000
sched_pixel
core 6
0



Current Battery Service state:
  AC powered: false
  USB powered: true
  Wireless powered: false
  level: 75
  scale: 100
  temperature: 357
  Capacity level: -1
  technology: Li-ion
08-11 18:34:14.721  Sending ACTION_BATTERY_CHANGED: level:72, health:2, voltage:4120, temperature:345
  level: 12
Thermal Status: 1
"""
"""It includes Samsung's log of earlier values."""


def test_a_phone_that_reports_everything() -> None:
    state = read(PIXEL)
    assert state.chip == "Google Tensor"
    assert state.machine == "arm64-v8a, Google Pixel 6, Android 14"
    assert state.abis == ("arm64-v8a", "armeabi-v7a", "armeabi")
    assert [(core.number, core.max_mhz, core.mhz) for core in state.cores] == [
        (0, 1803, 1803),
        (7, 2802, 500),
    ], "core 6 is off"
    assert (state.battery_percent, state.celsius, state.plugged, state.thermal_status) == (
        75,
        35.7,
        "usb",
        1,
    )
    assert state.conditions((0, 7)) == {
        "battery_percent": 75, "celsius": 35.7, "plugged": "usb", "thermal_status": 1, "governor": "sched_pixel", "mhz": 500,
    }  # fmt: skip
    assert read(PIXEL.replace("\n", "\r\n")) == state, "phones before Android 7 end lines like this"


def test_a_phone_that_reports_almost_nothing() -> None:
    """An older or locked phone: no clocks, no battery, no chip. Nothing is made up."""
    state = read(
        "[ro.hardware]: [qcom]\n[ro.product.cpu.abi]: [armeabi-v7a]\ncore 0\n\n\n\n\ncore"
        " 1\n\n\n\n\n"
    )
    assert state.chip == "qcom"
    assert state.machine == "armeabi-v7a, unknown model, Android unknown"
    assert [core.number for core in state.cores] == [0, 1]
    assert state.fastest(1) == (1,)
    assert state.conditions((0,)) == {"plugged": "unknown", "governor": "unknown"}
    assert state.heat(10.0) is None
    assert read("") == PhoneState()


def test_heat() -> None:
    state = read(PIXEL)
    assert state.heat(30.0) == "35.7 °C"
    assert state.heat(40.0) == "throttled by Android (thermal status 1)"
    assert read(PIXEL.replace("Thermal Status: 1", "Thermal Status: 0")).heat(40.0) is None


def test_fastest_cores() -> None:
    clocks = {0: 1803, 1: 1803, 2: 2253, 3: 2802, 4: 2253}
    answers = "".join(
        f"core {number}\n1\n{mhz}000\n{mhz}000\nschedutil\n" for number, mhz in clocks.items()
    )
    assert [read(answers).fastest(count) for count in (1, 2, 3, 4)] == [
        (3,),
        (3, 4),
        (2, 3, 4),
        (1, 2, 3, 4),
    ]
