"""Many independent trainings: one after another, in several processes of this computer,
or on a Ray cluster.

- ``study.processes = 1``: in this process, one after another.
- ``study.processes = n``: n processes at a time; each trains one network of the study
  and ends.
- ``study.ray_address``: each training is a task of a Ray cluster. As many run at a time
  as the cluster has CPUs (``study.threads`` each) and GPUs (``study.ray_gpus`` each);
  see hwnas/study/cluster.py.

**The numbers do not depend on where trainings run.** A training knows nothing of the
others: its random draws are functions of its seed and step. The number of threads it
computes with, which affects the last bits of a float, is a setting of the study. One,
two or twenty processes therefore give the same bits on machines of the same kind. Other
processors or other versions of torch may not.

**Failures.** A training that fails, or whose process is killed, is reported in one line
and does not affect the others. The same command resumes it from its checkpoint. If all
trainings run in one process, a kill ends the study, which also resumes with the same
command.

A child process reads its order, one line of JSON, from standard input, and exits when
standard input is closed, so that no orphan keeps writing after its parent was killed.
It answers with events, each a line of JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import hwnas
from hwnas.config import Experiment, StudyConfig
from hwnas.core.space import SearchSpace
from hwnas.core.spaces import parse_space
from hwnas.core.table import LatencyTable
from hwnas.engine import flush_denormals
from hwnas.errors import HwnasError
from hwnas.failures import explained
from hwnas.progress import Progress, ProgressBar
from hwnas.runs import StageContext, stage

EVENT_SECONDS = 0.5
"""The shortest time between two progress events of a training in another process."""

Event = dict[str, Any]
"""An event of a training: ``event`` is begin, advance, end, info, debug, warning,
files, done or failed.
"""


@dataclass(frozen=True)
class Training:
    """One training: a stage in ``root / name`` with ``inputs`` and ``outputs`` for its
    manifest (hwnas/runs.py).

    ``function`` is written as ``module:function``, so that another process can import
    it. It is called with a StageContext of ``experiment``, the space, and the table (None
    if the search needs none), and resumes from the files in its folder.
    """

    name: str
    function: str
    experiment: Experiment
    space: SearchSpace
    table: LatencyTable | None
    root: Path
    inputs: Mapping[str, str]
    outputs: Sequence[str]

    @property
    def folder(self) -> Path:
        """The folder that the training reads and writes."""
        return self.root / self.name

    def order(self) -> dict[str, Any]:
        """The training as JSON, for another process."""
        return {
            "name": self.name,
            "function": self.function,
            "experiment": self.experiment.model_dump(mode="json", by_alias=True),
            "space": self.space.to_json(),
            "table": None if self.table is None else self.table.to_json(),
            "root": str(self.root),
            "inputs": dict(self.inputs),
            "outputs": list(self.outputs),
        }

    @classmethod
    def of(cls, order: Mapping[str, Any]) -> Training:
        """The training of an ``order``."""
        return cls(
            name=order["name"],
            function=order["function"],
            experiment=Experiment.model_validate(order["experiment"]),
            space=parse_space(order["space"]),
            table=None if order["table"] is None else LatencyTable.parse(order["table"]),
            root=Path(order["root"]),
            inputs=order["inputs"],
            outputs=order["outputs"],
        )


def threads_of(config: StudyConfig, trainings: int) -> int | None:
    """The number of threads of each training; None means torch's default.

    ``trainings`` is the number of trainings of the whole study.
    """
    # It depends on the study, not on how many processes run it: the number of threads
    # affects the last bits of the results.
    if config.threads is not None:
        return config.threads
    return 1 if trainings > 1 else None


def run(
    trainings: Sequence[Training], config: StudyConfig, threads: int | None, progress: Progress
) -> dict[str, str]:
    """Perform all trainings. Returns the reasons of failed trainings by name. Raises
    ConfigError if the cluster cannot be reached.
    """
    if config.ray_address is None and config.processes == 1:
        return _run_here(trainings, threads, progress)
    if not trainings:
        return {}
    if config.ray_address is None:
        events = _local(trainings, config.processes, threads)
    else:
        # Imported here, because that module imports this one.
        from hwnas.study.cluster import on_cluster

        events = on_cluster(trainings, config, threads)
    failed: dict[str, str] = {}
    with progress.tasks() as begin, contextlib.closing(events):
        lines = {training.name: _Line(training.name, progress, begin) for training in trainings}
        for training, event in events:
            if event["event"] == "failed":
                failed[training.name] = event["reason"]
            lines[training.name].show(event)
    return failed


def _run_here(
    trainings: Sequence[Training], threads: int | None, progress: Progress
) -> dict[str, str]:
    """Perform all trainings in this process."""
    failed: dict[str, str] = {}
    for training in trainings:
        titled = _Titled(training.name, progress)
        started = time.monotonic()
        try:
            perform(training, threads, titled)
        # Any exception: as with separate processes, it must not stop the other trainings.
        except Exception as error:
            failed[training.name] = reason(error)
            titled.warning(failed[training.name])
        else:
            titled.info(f"done in {time.monotonic() - started:.0f} s")
    return failed


def perform(training: Training, threads: int | None, progress: Progress) -> None:
    """Perform a training in this process with ``threads`` threads (None: torch's
    default). It resumes from the files in its folder.
    """
    module, _, name = training.function.partition(":")
    function: Callable[[StageContext, SearchSpace, LatencyTable | None], None] = getattr(
        importlib.import_module(module), name
    )
    ctx = StageContext(training.experiment, training.root, training.folder, progress)
    training.folder.mkdir(parents=True, exist_ok=True)
    with (
        explained(training.name, training.experiment),
        stage(training.folder, training.name, training.inputs, list(training.outputs)),
        _threads(threads),
    ):
        function(ctx, training.space, training.table)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """A context with ``count`` torch threads (None: as many as before)."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reason(error: BaseException) -> str:
    """Why something failed, in one line."""
    first_line = str(error).strip().partition("\n")[0]
    if isinstance(error, HwnasError):
        return first_line
    # Messages of other errors, for instance KeyError, may say nothing without their type.
    return f"{type(error).__name__}: {first_line}".removesuffix(": ")


class _Titled(Progress):
    """Another progress, with a title before each line."""

    def __init__(self, title: str, progress: Progress) -> None:
        self.title, self.progress = title, progress

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[ProgressBar]:
        with self.progress.task(f"{self.title}: {description}", total, done) as task:
            yield task

    def info(self, message: str) -> None:
        self.progress.info(f"{self.title}: {message}")

    def debug(self, message: str) -> None:
        self.progress.debug(f"{self.title}: {message}")

    def warning(self, message: str) -> None:
        self.progress.warning(f"{self.title}: {message}")


class _Line:
    """The line of one of several concurrent trainings: shows its events as a bar and as
    messages.
    """

    def __init__(
        self, name: str, progress: Progress, begin: Callable[[str, int, int], ProgressBar]
    ) -> None:
        self.name = name
        self.messages = _Titled(name, progress)
        self.bar: ProgressBar | None = None
        self._begin = begin

    def show(self, event: Event) -> None:
        """Show an event."""
        kind = event["event"]
        if kind in ("begin", "end", "done", "failed") and self.bar is not None:
            self.bar.end()
            self.bar = None
        if kind == "begin":
            self.bar = self._begin(
                f"{self.name}: {event['description']}", event["total"], event["done"]
            )
        elif kind == "advance" and self.bar is not None:
            self.bar.advance(event["steps"], event["note"])
        elif kind == "info":
            self.messages.info(event["text"])
        elif kind == "debug":
            self.messages.debug(event["text"])
        elif kind == "warning":
            self.messages.warning(event["text"])
        elif kind == "done":
            self.messages.info(f"done in {event['seconds']:.0f} s")
        elif kind == "failed":
            self.messages.warning(event["reason"])
            self.messages.debug(event.get("traceback", ""))


def _local(
    trainings: Sequence[Training], processes: int, threads: int | None
) -> Generator[tuple[Training, Event], None, None]:
    """Yield the events of the trainings, of which ``processes`` run at a time. Closing
    this generator kills them.
    """
    waiting: queue.SimpleQueue[Training] = queue.SimpleQueue()
    events: queue.SimpleQueue[tuple[Training, Event] | None] = queue.SimpleQueue()
    alive: set[subprocess.Popen[str]] = set()
    stopped = threading.Event()
    for training in trainings:
        waiting.put(training)

    def work() -> None:
        try:
            while not stopped.is_set():
                training = waiting.get_nowait()
                for event in child({**training.order(), "threads": threads}, alive):
                    events.put((training, event))
        except queue.Empty:
            pass
        finally:
            # After any error as well, or the study would wait for this worker for ever.
            events.put(None)

    workers = [
        threading.Thread(target=work, daemon=True) for _ in range(min(processes, len(trainings)))
    ]
    for worker in workers:
        worker.start()
    try:
        running = len(workers)
        while running:
            event = events.get()
            if event is None:
                running -= 1
            else:
                yield event
    finally:
        stopped.set()
        # A loop, because a worker may have been about to start its next child.
        while any(worker.is_alive() for worker in workers):
            for process in list(alive):
                process.kill()
            time.sleep(0.01)


def child(
    order: Mapping[str, Any],
    alive: set[subprocess.Popen[str]] | None = None,
    folder: Path | None = None,
) -> Iterator[Event]:
    """Perform an order in a new process and yield its events, of which the last is done
    or failed.

    The process runs in ``folder`` (None: the current one), and is in ``alive`` as long as
    it runs.
    """
    # The child must import the same hwnas, even if it is not installed.
    paths = [str(Path(hwnas.__file__).parent.parent)]
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            # Ctrl-C must reach only the parent, which then ends its children.
            start_new_session=True,
        )
    except OSError as error:
        yield {"event": "failed", "reason": f"its process cannot be started ({error.strerror})"}
        return
    alive = set() if alive is None else alive
    alive.add(process)
    assert process.stdin is not None and process.stdout is not None
    last = ""
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            try:
                event: Event = json.loads(line)
                last = event["event"]
            except (ValueError, LookupError, TypeError):
                continue  # a line cut off by a kill, or printed by a library
            yield event
        code = process.wait()
        if last not in ("done", "failed"):
            yield {"event": "failed", "reason": _ended(code)}
    finally:
        process.kill()
        process.wait()
        alive.discard(process)
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _ended(code: int) -> str:
    """Why a process with this exit code has failed, if it has not said so itself."""
    resumes = "the same command resumes from its checkpoint"
    # Popen reports the signal that killed a process as a negative exit code.
    if code >= 0:
        return f"its process ended with exit code {code}; {resumes}"
    killed = f"its process was killed ({signal.Signals(-code).name})"
    if -code == signal.SIGKILL:
        return (
            f"{killed}, most likely because memory ran out: lower study.processes or data.workers,"
            f" then {resumes}"
        )
    return f"{killed}; {resumes}"


class _EventProgress(Progress):
    """The progress of a child process: writes events."""

    def __init__(self, write: Callable[[Event], None]) -> None:
        self.write = write

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[ProgressBar]:
        self.write({"event": "begin", "description": description, "total": total, "done": done})
        task = _EventBar(self.write)
        yield task
        task.tell()
        self.write({"event": "end"})

    def info(self, message: str) -> None:
        self.write({"event": "info", "text": message})

    def debug(self, message: str) -> None:
        self.write({"event": "debug", "text": message})

    def warning(self, message: str) -> None:
        self.write({"event": "warning", "text": message})


class _EventBar(ProgressBar):
    def __init__(self, write: Callable[[Event], None]) -> None:
        self.write = write
        self.steps = 0
        self.note = ""
        self.told_at = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.steps += steps
        self.note = note or self.note
        if time.monotonic() - self.told_at > EVENT_SECONDS:
            self.tell()

    def tell(self) -> None:
        """Write the steps since the last event."""
        self.write({"event": "advance", "steps": self.steps, "note": self.note})
        self.steps = 0
        self.told_at = time.monotonic()


def _main() -> None:
    """The child process: reads an order from standard input, performs it, and writes
    events to standard output.
    """
    # Libraries may print to standard output, so that becomes standard error; events go to
    # a copy of the original.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def write(event: Event) -> None:
        events.write(json.dumps(event) + "\n")

    started = time.monotonic()
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with, args=(sys.stdin,), daemon=True).start()
    try:
        flush_denormals()
        perform(Training.of(order), order["threads"], _EventProgress(write))
    # Any exception: the parent reports it and continues with the other trainings.
    except Exception as error:
        write({"event": "failed", "reason": reason(error), "traceback": traceback.format_exc()})
        sys.exit(1)
    write({"event": "done", "seconds": time.monotonic() - started})


def _end_with(parent: TextIO) -> None:
    """Wait until the parent closes the pipe or is gone, and then end this process."""
    parent.read()
    os._exit(1)


if __name__ == "__main__":
    _main()
