"""Training runs on a Ray cluster, each as a task (see hwnas/study/trainings.py).

**A cluster** shares no disk with this computer. The package itself, the space and the
latency table are sent with each training run. The files of its folder are sent, as bytes,
in both directions: a checkpoint comes back at most every ``HOME_SECONDS``, so that a
training run whose machine is lost resumes elsewhere with the next command. Images, and
tables that ``search.limits`` name, are read where it runs. They must exist
there under the same path, and so must Python, torch and the other packages that hwnas
imports, in the same versions.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hwnas
from hwnas.config import StudyConfig
from hwnas.document import write_atomic
from hwnas.errors import ConfigError
from hwnas.study.trainings import Event, Training, child, reason

HOME_SECONDS = 30.0
"""The shortest time between two transfers of a training run's files from the cluster."""

CONNECT_SECONDS = 5.0
"""How long a cluster may take to accept a connection."""

CHECKPOINT = "checkpoint.pt"
"""The file that is read first and written last, so that a log is never older than the
checkpoint in the same folder.
"""


def on_cluster(
    trainings: Sequence[Training], config: StudyConfig, threads: int | None
) -> Generator[tuple[Training, Event], None, None]:
    """Yield the events of the training runs, each a task of the cluster. Files that come
    back are written before the event that follows them.
    """
    assert config.ray_address is not None
    with _cluster(config.ray_address, threads or 1, config.ray_gpus) as ray:
        task = ray.remote(_on_worker).options(
            num_cpus=threads or 1,
            num_gpus=config.ray_gpus,
            max_retries=0,
            num_returns="streaming",
            name="hwnas training",
        )
        running = {}
        for training in trainings:
            order = {**training.order(), "threads": threads, "cwd": str(Path.cwd())}
            running[task.remote(order, _changed_files(training.folder, {}))] = training
        while running:
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            training = running[ready]
            try:
                event = ray.get(next(ready))
            except StopIteration:
                del running[ready]
                continue
            except ray.exceptions.RayError as error:
                del running[ready]
                event = {
                    "event": "failed",
                    "reason": f"its machine of the cluster failed: {reason(error)}",
                }
            if event["event"] == "files":
                _write_files(training.folder, event["files"], event["gone"])
            else:
                yield training, event


@contextmanager
def _cluster(address: str, threads: int, gpus: float) -> Iterator[Any]:
    """Ray, connected. Raises ConfigError if it is not installed, does not answer, or has
    no machine that is large enough.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"study.ray_address = {address!r} needs Ray, which is not installed: run pip install"
            " 'hwnas[ray]', or remove the key."
        ) from error
    host, _, port = address.rpartition(":")
    advice = (
        "start one by 'ray start --head', or remove the key to train in processes of this computer."
    )
    if address.startswith("ray://"):
        raise ConfigError(
            f"study.ray_address = {address!r} is an address for Ray clients: run this on a machine"
            " of the cluster, and give HOST:PORT."
        )
    if address != "auto":
        if not host or not port.isdecimal():
            raise ConfigError(
                f"study.ray_address = {address!r} is not an address: give HOST:PORT, or 'auto' on"
                " a machine of the cluster."
            )
        # ray.init takes long to give up on an address where nothing answers.
        try:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"study.ray_address = {address!r} cannot be reached ({error}): {advice}"
            ) from error
    package = str(Path(hwnas.__file__).parent)
    try:
        ray.init(
            address,
            runtime_env={"py_modules": [package]},
            log_to_driver=False,
            logging_level="error",
            configure_logging=False,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"study.ray_address = {address!r} is not a usable Ray cluster ({reason(error)}):"
            f" {advice}"
        ) from error
    try:
        # Ray queues a task that no machine can hold, without an error and for ever.
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most_cpus = max((machine.get("CPU", 0) for machine in resources), default=0)
        if most_cpus < threads:
            raise ConfigError(
                f"study.threads = {threads}, but the largest machine of {address} has"
                f" {most_cpus:g} CPUs: lower it."
            )
        most_gpus = max((machine.get("GPU", 0) for machine in resources), default=0)
        if gpus and most_gpus < gpus:
            raise ConfigError(
                f"study.ray_gpus = {gpus:g}, but no machine of {address} has that many: lower it."
            )
        yield ray
    finally:
        ray.shutdown()


def _on_worker(order: dict[str, Any], files: dict[str, bytes]) -> Iterator[Event]:
    """Perform an order on a machine of the cluster. Yield its events, and at intervals
    the files that have changed.
    """
    with tempfile.TemporaryDirectory(prefix="hwnas-") as root:
        folder = Path(root) / order["name"]
        _write_files(folder, files, [])
        known = _stamps(folder)
        sent = time.monotonic()
        # Relative paths of the configuration hold on machines that have the same folder.
        cwd = Path(order["cwd"])
        for event in child({**order, "root": root}, folder=cwd if cwd.is_dir() else None):
            ended = event["event"] in ("done", "failed")
            if ended or time.monotonic() - sent > HOME_SECONDS:
                stamps = _stamps(folder)
                sent = time.monotonic()
                yield {
                    "event": "files",
                    "files": _changed_files(folder, known),
                    "gone": sorted(known.keys() - stamps.keys()),
                }
                known = stamps
            yield event


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """The files of a folder with their modification time (ns) and size (bytes), by which
    changes are detected. Dot files are left out: they are still being written.
    """
    stamps = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            status = path.stat()
            stamps[path.relative_to(folder).as_posix()] = (status.st_mtime_ns, status.st_size)
    return stamps


def _changed_files(folder: Path, known: Mapping[str, tuple[int, int]]) -> dict[str, bytes]:
    """The files of a folder whose stamp is not in ``known``, the checkpoint read first."""
    changed = [name for name, stamp in _stamps(folder).items() if known.get(name) != stamp]
    contents = {}
    for name in sorted(changed, key=lambda name: name != CHECKPOINT):
        # The file may be gone by now: a checkpoint is removed when its training ends.
        with contextlib.suppress(FileNotFoundError):
            contents[name] = (folder / name).read_bytes()
    return contents


def _write_files(folder: Path, files: Mapping[str, bytes], gone: Sequence[str]) -> None:
    """Write files from another machine, the checkpoint last, and remove those that no
    longer exist there.
    """
    for name in sorted(files, key=lambda name: name == CHECKPOINT):
        write_atomic(folder / name, files[name])
    for name in gone:
        (folder / name).unlink(missing_ok=True)
