"""Options of simulated devices, and the noise that they can have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hwnas.devices.device import Device, connect
from hwnas.devices.simulated import Simulated, simulated_ms
from hwnas.errors import ConfigError, DeviceError
from tests.conftest import digits_space

OP = digits_space().ops[0]


def device(**options: str) -> Device:
    return Device(id="sim", soc="none", connection="simulated", options=options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"delay_ms": "-1"}, "delay_ms = '-1': input should be greater than or equal to 0"),
        ({"delay_ms": "nan"}, "delay_ms = 'nan'"),
        ({"delay_ms": "1e400"}, "delay_ms = '1e400'"),
        ({"delay_ms": "1e9"}, "delay_ms = '1e9': input should be less than or equal to 60000"),
        ({"delay_ms": "soon"}, "delay_ms = 'soon'"),
        ({"delay_ms": "9" * 5000}, "delay_ms = "),
        ({"noise": "-0.1"}, "noise = '-0.1'"),
        ({"noise": "inf"}, "noise = 'inf'"),
        ({"delay": "1"}, "unknown key 'delay'; did you mean 'delay_ms'"),
    ],
)
def test_odd_options_are_one_sentence(options: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        connect(device(**options))
    assert str(caught.value).startswith("options of device 'sim': ")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 200


def test_cores() -> None:
    assert Simulated(device()).cores(2) == (0, 1)
    assert Simulated(device().model_copy(update={"cores": (4, 5)})).cores(1) == (4, 5)
    assert Simulated(device().model_copy(update={"cores": ()})).cores(2) == ()
    with pytest.raises(DeviceError, match=r"needs 2 cores, but sim has only 1"):
        Simulated(device().model_copy(update={"cores": (4,)})).cores(2)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_rounds_are_as_noisy_as_asked(noise: float, tmp_path: Path) -> None:
    rounds = 200
    items = [{"id": "a", "round": number, "ops": [OP.key]} for number in range(rounds)]
    plan = {"runtime": "litert", "threads": 1, "cores": [0], "items": items}
    _, *rows = Simulated(device(noise=str(noise))).measure(plan, tmp_path)
    logs = np.log([np.median(row["ms"]) / simulated_ms(OP) for row in rows])
    assert np.std(logs) == pytest.approx(noise, abs=0.03)
