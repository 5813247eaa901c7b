"""Failures of the machine during a stage, as sentences: too little memory, shared memory
or open files, and loader processes that were killed.

They are recognised by the words of torch, numpy and the operating system, because most
of them arrive as a plain RuntimeError.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from hwnas.config import Experiment
from hwnas.errors import ResourceError

GPU_MEMORY = re.compile(
    r"(CUDA|HIP|MPS|XPU)( error:| backend)? out of memory|CU\w+_STATUS_ALLOC_FAILED"
)
"""What torch says if a GPU has too little memory."""

MEMORY = re.compile(
    r"can't allocate memory|not enough memory|Cannot allocate memory|bad_alloc|MemoryError"
    r"|Unable to allocate"
)
"""What torch, numpy and Python say if the computer has too little memory."""

OPEN_FILES = re.compile(r"Too many open files|received 0 items of ancdata")
"""What Python and torch say if a process may open no more files."""

SHARED_MEMORY = re.compile(
    r"out of shared memory|shared memory \(shm\)|shared memory\(shm\)|unable to mmap"
    r"|unable to write to file </torch_"
)
"""What torch says if loader processes have too little shared memory for their batches."""

LOADER = re.compile(r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)")
"""What torch says if a loader process has ended before its time."""

NO_PROCESS = re.compile(r"can't start new thread|Resource temporarily unavailable")
"""What Python says if it may start no more processes or threads."""

BATCH_SIZES = {
    "profile": None,
    "train": "train.batch_size",
    "export": None,
    "validate": None,
    "report": None,
}
"""Stage -> the key of its batch size, None if it has none. All other stages, and the
parts of studies, train or evaluate super-nets by ``search.batch_size``.
"""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is too little memory, on a GPU or on the
    computer.
    """
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch has subclasses of RuntimeError for GPUs, and none for the computer's memory
    text = str(error)
    return isinstance(error, RuntimeError) and bool(GPU_MEMORY.search(text) or MEMORY.search(text))


@contextmanager
def explained(stage: str, experiment: Experiment) -> Iterator[None]:
    """A context in which failures of the machine become a ResourceError: one sentence
    with what happened and the settings to lower. ``stage`` is the name of a stage or of
    a part of a study.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        sentence = _sentence(error, stage, experiment)
        if sentence is None:
            raise
        raise ResourceError(sentence) from error


def _sentence(
    error: MemoryError | OSError | RuntimeError, stage: str, experiment: Experiment
) -> str | None:
    """The sentence about a failure of the machine; None for any other error."""
    text = str(error)
    smaller = f"a lower {_batch_settings(stage, experiment)} helps, but starts the stage again"
    # first, because messages about shared memory also name what it lacks
    if OPEN_FILES.search(text):
        resume = _resume(experiment, "raise the limit of open files (ulimit -n)")
        return f"{stage} may not open more files: {resume}."
    if SHARED_MEMORY.search(text):
        resume = _resume(experiment, "provide more shared memory (docker run --shm-size)")
        return f"the loader processes of {stage} ran out of shared memory: {resume}; {smaller}."
    if LOADER.search(text):
        resume = _resume(experiment, "end other programs")
        return (
            f"a loader process of {stage} was killed, most likely because memory ran out: {resume};"
            f" {smaller}."
        )
    if NO_PROCESS.search(text):
        resume = _resume(experiment, "raise the limit of processes (ulimit -u)")
        return f"{stage} may not start more processes or threads: {resume}."
    if not is_out_of_memory(error):
        return None
    if GPU_MEMORY.search(text):
        return (
            f"{stage} ran out of GPU memory ({_refused(text)}): end other programs on the GPU, then"
            f" the same command resumes; {smaller}."
        )
    resume = _resume(experiment, "end other programs")
    return f"{stage} ran out of memory ({_refused(text)}): {resume}; {smaller}."


def _resume(experiment: Experiment, other: str) -> str:
    """What to do so that the same command can resume: lower the number of processes, or
    something ``other``.
    """
    counts = []
    if experiment.data.workers:
        counts.append(f"data.workers (now {experiment.data.workers})")
    if experiment.study.processes > 1:
        counts.append(f"study.processes (now {experiment.study.processes})")
    lower = f"lower {' or '.join(counts)}, or " if counts else ""
    return f"{lower}{other}, then the same command resumes"


def _batch_settings(stage: str, experiment: Experiment) -> str:
    """The settings that decide how much memory a batch takes."""
    resolution = f"data.resolution (now {experiment.data.resolution})"
    key = BATCH_SIZES.get(stage, "search.batch_size")
    if key is None:
        return resolution
    settings = experiment.train if key == "train.batch_size" else experiment.search
    return f"{key} (now {settings.batch_size}) or {resolution}"


def _refused(text: str) -> str:
    """How much memory was refused, from a message of torch or numpy."""
    size = re.search(r"(?:[Tt]ried to|Unable to) allocate ([\d.]+) ?(bytes|[KMGTP]iB)", text)
    if size is None:
        return "the system refused more"
    amount, unit = size.groups()
    if unit == "bytes":
        return f"the system refused {float(amount) / 2**20:,.0f} MiB"
    return f"the system refused {amount} {unit}"
