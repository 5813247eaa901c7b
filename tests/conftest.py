"""Shared fixtures. Data that the project does not ship is found through HWNAS_TEST_DATA."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.devices.device import Device
from tests import commands

TINY_CONFIG = """
name = "tiny"
checkpoint_seconds = 0
[space]
name = "{folder}/space.json"
[device]
name = "{folder}/device.json"
[data]
name = "digits"
resolution = 8
channels = 1
mean = [0.3]
std = [0.4]
augment = "none"
[profile]
rounds = 3
max_rounds = 3
fit_networks = 4
test_networks = 4
[search]
target_range = 0.5
strategy = {{name = "tunas", rl_lr = 0.05}}
epochs = 2
candidates = 3
random_samples = 2
recalibration_images = 128
[train]
epochs = 2
[export]
calibration_images = 16
parity_images = 16
[validate]
latency_tolerance = 10
accuracy_tolerance = 0.05
int8_accuracy_tolerance = 1
rounds = 1
"""
"""Latency is simulated, so its tolerance means nothing here; all else is real."""


def digits_space(name: str = "tiny") -> MacroSpace:
    """A space for scikit-learn's digits, 8-pixel greyscale: three searched slots."""
    options = ("ir_k3_e3", "ir_k5_e3", "ir_k3_e6", "ir_k5_e6")
    stages = (
        SpaceStage(widths=(8,), slots=(("cn_k3",),)),
        SpaceStage(widths=(16,), stride=2, slots=(options, (*options, "skip"))),
        SpaceStage(widths=(24,), stride=2, slots=(options,)),
        SpaceStage(widths=(32,), slots=(("cn_k1",),)),
    )
    return MacroSpace(name=name, resolution=8, in_channels=1, classes=10, stages=stages)


def write_tiny(folder: Path, delay_ms: float = 0.0) -> Path:
    """Write a complete small experiment into a folder: space, simulated device and
    configuration. Returns the configuration's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digits_space().save(folder / "space.json")
    Device(
        id="simulated", soc="formula", connection="simulated", options={"delay_ms": str(delay_ms)}
    ).save(folder / "device.json")
    config = folder / "tiny.toml"
    config.write_text(TINY_CONFIG.format(folder=folder))
    return config


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give the session its own cache: models are built once per session, and the user's
    cache is left alone.
    """
    import os

    os.environ["HWNAS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _usual_arithmetic() -> Iterator[None]:
    """Undo what training sets for the whole process: flushing denormal numbers to zero.
    Other tests depend on those numbers.
    """
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small experiment that ran through all stages uninterrupted. Do
    not write into it.

    A separate process runs it: tests change torch's number of threads, which affects
    the last bits of the results.
    """
    folder = tmp_path_factory.mktemp("finished")
    commands.run(["run", str(write_tiny(folder)), "--out", str(folder / "run"), "-q"])
    return folder / "run"


def read_json(path: Path) -> dict[str, object]:
    """The content of a JSON file."""
    content: dict[str, object] = json.loads(path.read_text())
    return content
