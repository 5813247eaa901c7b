"""Many independent trainings: one after another, in several processes of this computer,
or on a Ray cluster.

    study.processes = 1     in this process, one after another
    study.processes = n     n processes at a time, each of which trains one network of the study and ends
    study.ray_address       a task of a Ray cluster each, as many at a time as it has CPUs (``study.threads`` each) and
                            ``study.ray_gpus``; see hwnas/study/cluster.py

**The same numbers either way.** A training knows nothing of the others: its random
draws are functions of its seed and step, and the threads it computes with, which decide
the last bits of a float, are a setting of the study. One, two or twenty processes
therefore give the same bits on like machines; processors of another kind, or other
versions of torch, may not.

**Failures.** A training that fails, or whose process is killed, is reported by one line
and leaves the others alone; the same command tries it again from its checkpoint. Within
one process a kill ends the study, which goes on with the next command.

A child process reads its order from standard input, one line of JSON, and ends with it:
no orphan goes on writing after its parent was killed. It answers in events, a line of
JSON each.
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
from hwnas.progress import Progress, Task
from hwnas.runs import StageContext, stage

EVENT_SECONDS = 0.5
"""How often, at most, a training in another process says that it has advanced."""

Event = dict[str, Any]
"""What happened in a training: ``event`` is begin, advance, end, say, detail, warn,
files, done or failed.
"""


@dataclass(frozen=True)
class Training:
    """One training, a stage of its own in ``root / name``; ``inputs`` and ``outputs``
    are its manifest's (hwnas/runs.py).

    ``function`` is named as ``module:function``, so that another process finds it. It
    is called with a StageContext of ``experiment``, the space and the table (None where
    none is needed), and goes on from the files that it finds in its folder.
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
        """Where it reads and writes."""
        return self.root / self.name

    def order(self) -> dict[str, Any]:
        """All of it as JSON, for another process."""
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
        """The reverse of ``order``."""
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
    """The threads of each training; None: as many as torch takes. What has to be
    trained decides, not how many processes do it.
    """
    if config.threads is not None:
        return config.threads
    return 1 if trainings > 1 else None


def run(
    trainings: Sequence[Training], config: StudyConfig, threads: int | None, progress: Progress
) -> dict[str, str]:
    """Perform all trainings; why some failed, by name. Raises ConfigError where the
    cluster cannot be reached.
    """
    if config.ray_address is None and config.processes == 1:
        return _here(trainings, threads, progress)
    if not trainings:
        return {}
    if config.ray_address is None:
        events = _local(trainings, config.processes, threads)
    else:
        from hwnas.study.cluster import on_cluster  # it performs its trainings by this module

        events = on_cluster(trainings, config, threads)
    failed: dict[str, str] = {}
    with progress.tasks() as begin, contextlib.closing(events):
        shown = {training.name: _Line(training.name, progress, begin) for training in trainings}
        for training, event in events:
            if event["event"] == "failed":
                failed[training.name] = event["reason"]
            shown[training.name].show(event)
    return failed


def _here(trainings: Sequence[Training], threads: int | None, progress: Progress) -> dict[str, str]:
    failed: dict[str, str] = {}
    for training in trainings:
        line = _Titled(training.name, progress)
        started = time.monotonic()
        try:
            perform(training, threads, line)
        except Exception as error:  # as in a process of its own: whatever it is, the others go on
            failed[training.name] = reason(error)
            line.warning(failed[training.name])
        else:
            line.info(f"done in {time.monotonic() - started:.0f} s")
    return failed


def perform(training: Training, threads: int | None, progress: Progress) -> None:
    """Do a training in this process, with so many threads, going on where its folder says."""
    module, _, name = training.function.partition(":")
    function: Callable[[StageContext, SearchSpace, LatencyTable | None], None] = getattr(
        importlib.import_module(module), name
    )
    ctx = StageContext(training.experiment, training.root, training.folder, progress)
    training.folder.mkdir(parents=True, exist_ok=True)
    with (
        stage(training.folder, training.name, training.inputs, list(training.outputs)),
        _threads(threads),
    ):
        function(ctx, training.space, training.table)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reason(error: BaseException) -> str:
    """Why something failed, in one line."""
    first = str(error).strip().partition("\n")[0]
    return (
        first
        if isinstance(error, HwnasError)
        else f"{type(error).__name__}: {first}".removesuffix(": ")
    )


class _Titled(Progress):
    """Another progress, each line begun with a title."""

    def __init__(self, title: str, progress: Progress) -> None:
        self.title, self.progress = title, progress

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Task]:
        with self.progress.task(f"{self.title}: {description}", total, done) as task:
            yield task

    def info(self, message: str) -> None:
        self.progress.info(f"{self.title}: {message}")

    def debug(self, message: str) -> None:
        self.progress.debug(f"{self.title}: {message}")

    def warning(self, message: str) -> None:
        self.progress.warning(f"{self.title}: {message}")


class _Line:
    """The line of one training among several that run at once: its events as a bar and
    as messages.
    """

    def __init__(
        self, name: str, progress: Progress, begin: Callable[[str, int, int], Task]
    ) -> None:
        self.messages, self.name, self._begin = _Titled(name, progress), name, begin
        self.bar: Task | None = None

    def show(self, event: Event) -> None:
        """Draw or say what happened."""
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
        elif kind in ("say", "detail", "warn"):
            getattr(self.messages, kind)(event["text"])
        elif kind == "done":
            self.messages.info(f"done in {event['seconds']:.0f} s")
        elif kind == "failed":
            self.messages.warning(event["reason"])
            self.messages.debug(event.get("traceback", ""))


# --- processes of this computer
# -------------------------------------------------------------------------------------------------------


def _local(
    trainings: Sequence[Training], processes: int, threads: int | None
) -> Generator[tuple[Training, Event], None, None]:
    """What happens in the trainings, of which ``processes`` run at a time. All of them
    end with this iterator.
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
            events.put(None)  # whatever happens, or the study would wait for ever

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
        while any(worker.is_alive() for worker in workers):
            for process in list(alive):
                process.kill()
            time.sleep(0.01)


def child(
    order: Mapping[str, Any],
    alive: set[subprocess.Popen[str]] | None = None,
    folder: Path | None = None,
) -> Iterator[Event]:
    """Perform an order in a process of its own, in ``folder`` or in this one's; its
    events, of which the last is done or failed.
    """
    package = str(Path(hwnas.__file__).parent.parent)
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is for the parent, which ends its children
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
                continue  # cut off by a kill, or a library's own words
            yield event
        code = process.wait()
        if last not in ("done", "failed"):
            how = (
                f"was killed ({signal.Signals(-code).name})"
                if code < 0
                else f"ended with exit code {code}"
            )
            yield {
                "event": "failed",
                "reason": f"its process {how}; the same command goes on from its checkpoint",
            }
    finally:
        process.kill()
        process.wait()
        alive.discard(process)
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


class _Telling(Progress):
    """Progress as events, in a child process."""

    def __init__(self, write: Callable[[Event], None]) -> None:
        self.write = write

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Task]:
        self.write({"event": "begin", "description": description, "total": total, "done": done})
        task = _TellingTask(self.write)
        yield task
        task.tell()
        self.write({"event": "end"})

    def info(self, message: str) -> None:
        self.write({"event": "say", "text": message})

    def debug(self, message: str) -> None:
        self.write({"event": "detail", "text": message})

    def warning(self, message: str) -> None:
        self.write({"event": "warn", "text": message})


class _TellingTask(Task):
    def __init__(self, write: Callable[[Event], None]) -> None:
        self.write, self.steps, self.note, self.told = write, 0, "", time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.steps, self.note = self.steps + steps, note or self.note
        if time.monotonic() - self.told > EVENT_SECONDS:
            self.tell()

    def tell(self) -> None:
        self.write({"event": "advance", "steps": self.steps, "note": self.note})
        self.steps, self.told = 0, time.monotonic()


def _main() -> None:
    """A child process: one order from standard input, events to standard output, the
    end with the parent's.
    """
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no event

    def write(event: Event) -> None:
        events.write(json.dumps(event) + "\n")

    started = time.monotonic()
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with, args=(sys.stdin,), daemon=True).start()
    try:
        flush_denormals()
        perform(Training.of(order), order["threads"], _Telling(write))
    except Exception as error:  # whatever it is, the parent reports it and goes on with the others
        write({"event": "failed", "reason": reason(error), "traceback": traceback.format_exc()})
        sys.exit(1)
    write({"event": "done", "seconds": time.monotonic() - started})


def _end_with(parent: TextIO) -> None:
    parent.read()  # until the parent closes it, or is gone
    os._exit(1)


if __name__ == "__main__":
    _main()
