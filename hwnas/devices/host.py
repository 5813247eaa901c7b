"""This computer as a device: the stand-alone runner in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hwnas.devices.device import Device
from hwnas.document import write_atomic
from hwnas.errors import DeviceError
from hwnas.share import share_folder


class Host:
    """Runs ``deploy/runner.py`` with this interpreter. Nothing of torch is loaded in the measuring process."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.runner = share_folder("deploy") / "runner.py"

    def cores(self, threads: int) -> tuple[int, ...]:
        """The device document's cores, else the last ones allowed: the first serves the system's interrupts."""
        allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        cores = self.device.cores or tuple(allowed[-threads:])
        if len(cores) < threads:
            raise DeviceError(f"{threads} threads need as many cores, but {self.device.id} offers {len(cores)}: lower device.threads.")
        return cores

    def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
        """Run a plan in a new process and yield its rows as they are printed."""
        path = folder / "plan.json"
        write_atomic(path, json.dumps(plan).encode())
        command = [sys.executable, str(self.runner), "measure", str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            try:
                for line in process.stdout:
                    yield json.loads(line)
            finally:
                process.kill() if process.poll() is None and sys.exc_info()[0] is not None else None
            errors = process.stderr.read()
            if process.wait() != 0:
                raise DeviceError(f"the runner on {self.device.id} stopped with status {process.returncode}: {_last_line(errors)}")

    def predict(self, model: Path, images_NHWC: np.ndarray, folder: Path) -> np.ndarray:
        """Outputs of a model file for images, in a new process."""
        inputs, outputs = folder / "inputs.npy", folder / "outputs.npy"
        np.save(inputs, images_NHWC)
        command = [sys.executable, str(self.runner), "predict", str(model), str(inputs), str(outputs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise DeviceError(f"{model.name} does not run on {self.device.id}: {_last_line(done.stderr)}")
        result: np.ndarray = np.load(outputs)
        inputs.unlink()
        outputs.unlink()
        return result


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it gave no reason."
