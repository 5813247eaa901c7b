"""Trainings on a Ray cluster (hwnas/study/trainings.py), each a task.

**A cluster** shares no disk with this computer. The package itself, the space and the
latency table travel with each training, and so do the files of its folder, as bytes,
there and back: a checkpoint comes home at most every ``HOME_SECONDS``, so that a
training whose machine is lost goes on elsewhere with the next command. Images, and
tables that ``search.limits`` name, are read where the training runs: they must be
there, under the same path. So must Python, torch and what else hwnas imports, in the
same versions.
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
"""How often, at most, the files of a training come home from a cluster."""
CONNECT_SECONDS = 5.0
"""How long a cluster may take to answer."""

CHECKPOINT = "checkpoint.pt"
"""What is read first and written last, so that a log is never older than the checkpoint
beside it.
"""


def on_cluster(
    trainings: Sequence[Training], config: StudyConfig, threads: int | None
) -> Generator[tuple[Training, Event], None, None]:
    """What happens in the trainings, each a task of the cluster. Files that come home
    are written before what happened is told.
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
        running = {
            task.remote(
                {**training.order(), "threads": threads, "cwd": str(Path.cwd())},
                _files(training.folder, {}),
            ): training
            for training in trainings
        }
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
                _bring(training.folder, event["files"], event["gone"])
            else:
                yield training, event


@contextmanager
def _cluster(address: str, threads: int, gpus: float) -> Iterator[Any]:
    """Ray, connected. Raises ConfigError where it is not installed, does not answer, or
    has no machine large enough.
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
            f"study.ray_address = {address!r} is a Ray client's: run this on a machine of the"
            " cluster, and give HOST:PORT."
        )
    if address != "auto":
        if not host or not port.isdecimal():
            raise ConfigError(
                f"study.ray_address = {address!r} is no address: give HOST:PORT, or 'auto' on a"
                " machine of the cluster."
            )
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
            f"study.ray_address = {address!r} is no Ray cluster that can be used ({reason(error)}):"
            f" {advice}"
        ) from error
    try:
        largest = max(
            (node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0
        )
        if largest < threads:
            raise ConfigError(
                f"study.threads = {threads}, but the largest machine of {address} has {largest:g}"
                " CPUs: lower it."
            )
        if gpus and not any(
            node["Resources"].get("GPU", 0) >= gpus for node in ray.nodes() if node["Alive"]
        ):
            raise ConfigError(
                f"study.ray_gpus = {gpus:g}, but no machine of {address} has as many: lower it."
            )
        yield ray
    finally:
        ray.shutdown()


def _on_worker(order: dict[str, Any], files: dict[str, bytes]) -> Iterator[Event]:
    """Perform an order on a machine of the cluster: its events, and its files whenever
    they have changed for a while.
    """
    with tempfile.TemporaryDirectory(prefix="hwnas-") as root:
        folder = Path(root) / order["name"]
        _bring(folder, files, [])
        known = _stamps(folder)
        home = time.monotonic()
        where = Path(order["cwd"])
        for event in child({**order, "root": root}, folder=where if where.is_dir() else None):
            over = event["event"] in ("done", "failed")
            if over or time.monotonic() - home > HOME_SECONDS:
                stamps, home = _stamps(folder), time.monotonic()
                yield {
                    "event": "files",
                    "files": _files(folder, known),
                    "gone": sorted(known.keys() - stamps.keys()),
                }
                known = stamps
            yield event


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """The files of a folder with what tells that they have changed; those under way
    (dot files) are left out.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            status = path.stat()
            found[path.relative_to(folder).as_posix()] = (status.st_mtime_ns, status.st_size)
    return found


def _files(folder: Path, known: Mapping[str, tuple[int, int]]) -> dict[str, bytes]:
    """The files of a folder that have changed, the checkpoint read first."""
    found = {}
    for name in sorted(
        (name for name, stamp in _stamps(folder).items() if known.get(name) != stamp),
        key=lambda name: name != CHECKPOINT,
    ):
        # removed in between, as a checkpoint is in the end
        with contextlib.suppress(FileNotFoundError):
            found[name] = (folder / name).read_bytes()
    return found


def _bring(folder: Path, files: Mapping[str, bytes], gone: Sequence[str]) -> None:
    """Write files that came from elsewhere, the checkpoint last, and remove those that
    are gone there.
    """
    for name in sorted(files, key=lambda name: name == CHECKPOINT):
        write_atomic(folder / name, files[name])
    for name in gone:
        (folder / name).unlink(missing_ok=True)
