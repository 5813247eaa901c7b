"""This computer as a device: the standalone runner in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import numpy as np

from hwnas.config import TARGETS
from hwnas.devices.device import Device, pinned_cores
from hwnas.devices.messages import last_line
from hwnas.document import write_atomic
from hwnas.errors import DeviceError, StorageError
from hwnas.resources import resource_path

SILENT = "it gave no reason."


class Host:
    """Runs ``deploy/runner.py`` with this interpreter. The measuring process does not
    load torch.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.runner = resource_path("deploy") / "runner.py"

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, plus the files that teach the runner the runtimes
        of plug-in targets.
        """
        # the runner itself knows the runtimes of the built-in targets
        plugins = [TARGETS.get(name) for name in TARGETS if name not in TARGETS.builtin]
        files = [str(target.runner) for target in plugins if target.runner is not None]
        return {**os.environ, "HWNAS_RUNNER_MODELS": os.pathsep.join(files)}

    def cores(self, threads: int) -> tuple[int, ...]:
        """The cores of the device document, or else the last ones that this process may
        use. Empty if the document says not to pin. Raises DeviceError if there are fewer
        than ``threads``.
        """
        return pinned_cores(self.device, threads, _allowed_cores)

    def runtimes(self) -> dict[str, str]:
        """The runtimes that are installed in this Python environment."""
        runtimes: dict[str, str] = self._inspected["runtimes"]
        return runtimes

    def missing(self) -> dict[str, str]:
        """The runtimes that do not work here, each with a sentence that says why and how to
        install it.
        """
        missing: dict[str, str] = self._inspected["missing"]
        return missing

    @cached_property
    def _inspected(self) -> dict[str, Any]:
        """The output of the runner's ``inspect``. Raises DeviceError."""
        done = subprocess.run(
            [sys.executable, str(self.runner), "inspect"],
            capture_output=True,
            text=True,
            check=False,
            env=self.environment,
        )
        if done.returncode != 0:
            raise DeviceError(
                f"the runner does not start on {self.device.id}: {last_line(done.stderr) or SILENT}"
            )
        return self._row(done.stdout)

    def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
        """Run a plan in a new process, and yield its rows as they are printed."""
        path = folder / "plan.json"
        write_atomic(path, json.dumps(plan).encode())
        command = [sys.executable, str(self.runner), "measure", str(path)]
        piped: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "env": self.environment}
        # stderr goes to a file, because nobody reads it while rows arrive: a full pipe
        # would block the runner forever
        with (
            TemporaryFile("w+") as errors,
            subprocess.Popen(command, stderr=errors, **piped) as process,
        ):
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if line.endswith("\n"):  # otherwise the runner died in the middle of it
                        yield self._row(line)
            finally:
                # The caller has stopped reading: without this, Popen's exit would wait
                # for the rest of the plan.
                if process.poll() is None and sys.exc_info()[0] is not None:
                    process.kill()
            if process.wait() != 0:
                errors.seek(0)
                raise DeviceError(
                    f"the runner on {self.device.id} stopped with exit status"
                    f" {process.returncode}: {last_line(errors.read()) or SILENT}"
                )

    def _row(self, line: str) -> dict[str, Any]:
        try:
            row: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError as error:
            raise DeviceError(
                f"the runner on {self.device.id} printed a line that is not JSON:"
                f" {line.strip()[:80]!r}."
            ) from error
        return row

    def predict(self, model: Path, images_NHWC: np.ndarray, folder: Path) -> np.ndarray:
        """Run a model file on images, in a new process. Raises DeviceError if it does not
        run, StorageError if the images do not fit into ``folder``.
        """
        # A new folder per call, so that files of a killed run are never mixed up with
        # this one's.
        with TemporaryDirectory(dir=folder, prefix=".predict-") as work:
            inputs = Path(work) / "inputs.npy"
            outputs = Path(work) / "outputs.npy"
            try:
                np.save(inputs, images_NHWC)
            except OSError as error:
                raise StorageError(
                    f"cannot write {images_NHWC.nbytes / 1e6:.0f} MB of images to {folder}"
                    f" ({error.strerror}): free some disk space."
                ) from error

            arguments = ["predict", str(model), str(inputs), str(outputs)]
            done = subprocess.run(
                [sys.executable, str(self.runner), *arguments],
                capture_output=True,
                text=True,
                check=False,
                env=self.environment,
            )
            if done.returncode != 0:
                raise DeviceError(
                    f"{model.name} does not run on {self.device.id}:"
                    f" {last_line(done.stderr) or SILENT}"
                )
            result: np.ndarray = np.load(outputs)
        return result


def _allowed_cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # only Linux has it
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
