"""This computer as a device: the stand-alone runner in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import numpy as np

from hwnas.config import TARGETS
from hwnas.devices.device import Device
from hwnas.document import write_atomic
from hwnas.errors import DeviceError, StorageError
from hwnas.resources import resource_path


class Host:
    """Runs ``deploy/runner.py`` with this interpreter. Nothing of torch is loaded in
    the measuring process.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.runner = resource_path("deploy") / "runner.py"

    @property
    def environment(self) -> dict[str, str]:
        """This process's, with what teaches the runner the runtimes of further targets."""
        # the runner knows the others
        further = (TARGETS.get(name).runner for name in TARGETS if name not in TARGETS.builtin)
        return {
            **os.environ,
            "HWNAS_RUNNER_MODELS": os.pathsep.join(
                str(path) for path in further if path is not None
            ),
        }

    def cores(self, threads: int) -> tuple[int, ...]:
        """The device document's cores, else the last ones allowed: the first serves the
        system's interrupts.
        """
        allowed = (
            sorted(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else list(range(os.cpu_count() or 1))
        )
        cores = self.device.cores or tuple(allowed[-threads:])
        if len(cores) < threads:
            raise DeviceError(
                f"{threads} threads need as many cores, but {self.device.id} offers {len(cores)}:"
                " lower device.threads."
            )
        return cores

    def runtimes(self) -> dict[str, str]:
        """What the runner finds installed here."""
        done = subprocess.run(
            [sys.executable, str(self.runner), "inspect"],
            capture_output=True,
            text=True,
            check=False,
            env=self.environment,
        )
        if done.returncode != 0:
            raise DeviceError(
                f"the runner does not start on {self.device.id}: {_last_line(done.stderr)}"
            )
        found: dict[str, str] = self._row(done.stdout)["runtimes"]
        return found

    def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
        """Run a plan in a new process and yield its rows as they are printed."""
        path = folder / "plan.json"
        write_atomic(path, json.dumps(plan).encode())
        command = [sys.executable, str(self.runner), "measure", str(path)]
        # a file for stderr: nobody reads it while rows come, and a full pipe would stop
        # the runner for good
        piped: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "env": self.environment}
        with (
            TemporaryFile("w+") as errors,
            subprocess.Popen(command, stderr=errors, **piped) as process,
        ):
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if line.endswith("\n"):  # else the runner died in the middle of it
                        yield self._row(line)
            finally:
                process.kill() if process.poll() is None and sys.exc_info()[0] is not None else None
            if process.wait() != 0:
                errors.seek(0)
                raise DeviceError(
                    f"the runner on {self.device.id} stopped with status {process.returncode}:"
                    f" {_last_line(errors.read())}"
                )

    def _row(self, line: str) -> dict[str, Any]:
        try:
            row: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError as error:
            raise DeviceError(
                f"the runner on {self.device.id} printed what is no row: {line.strip()[:80]!r}."
            ) from error
        return row

    def predict(self, model: Path, images_NHWC: np.ndarray, folder: Path) -> np.ndarray:
        """Outputs of a model file for images, in a new process. A folder of its own
        keeps it apart from a killed run's.
        """
        with TemporaryDirectory(dir=folder, prefix=".predict-") as work:
            inputs, outputs = Path(work) / "inputs.npy", Path(work) / "outputs.npy"
            try:
                np.save(inputs, images_NHWC)
            except OSError as error:
                raise StorageError(
                    f"{folder} takes no {images_NHWC.nbytes / 1e6:.0f} MB ({error.strerror}): free"
                    " some space."
                ) from error
            command = [
                sys.executable,
                str(self.runner),
                "predict",
                str(model),
                str(inputs),
                str(outputs),
            ]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env=self.environment
            )
            if done.returncode != 0:
                raise DeviceError(
                    f"{model.name} does not run on {self.device.id}: {_last_line(done.stderr)}"
                )
            result: np.ndarray = np.load(outputs)
        return result


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it gave no reason."
