"""Signals, killed loader processes and too little memory: one sentence, the exit code,
and nothing lost.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwnas import cli, interruption
from hwnas.config import DataConfig, Experiment, load_experiment
from hwnas.core.arch import Architecture
from hwnas.data.images import Batch, Images, Request, load_images, training_batches
from hwnas.engine import Engine, Metrics
from hwnas.errors import ResourceError
from hwnas.failures import explained
from hwnas.interruption import Interrupted, deferred, raising
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.runs import JsonLines, StageContext
from hwnas.train import training
from tests.conftest import digits_space, write_tiny
from tests.test_engine import assert_same, make

DIGITS = DataConfig(
    name="digits", resolution=8, channels=1, mean=(0.3,), std=(0.35,), augment="none"
)
STEPS = 7


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def _same_handlers_after_as_before() -> Iterator[None]:
    before = [signal.getsignal(number) for number in interruption.ENDING]
    yield
    assert [signal.getsignal(number) for number in interruption.ENDING] == before


def fit(engine: Engine, in_step: Callable[[int], None] = lambda step: None) -> None:
    """Train; ``in_step`` is called in the middle of every step, after the update."""
    batches = training_batches(
        load_images(DIGITS, "train"), 32, seed=1, steps=range(engine.step, engine.steps)
    )

    def step(number: int) -> Metrics:
        metrics = engine.train_step(*next(batches))
        in_step(number)
        return metrics

    engine.fit(step, Progress(), "training")


@pytest.mark.parametrize("number", interruption.ENDING)
def test_a_signal_saves_the_step_and_the_resumed_run_ends_the_same(
    number: signal.Signals, tmp_path: Path
) -> None:
    straight = make(tmp_path / "straight", STEPS, ema_decay=0.9, checkpoint_seconds=1e9)
    fit(straight)

    interrupted = make(tmp_path / "interrupted", STEPS, ema_decay=0.9, checkpoint_seconds=1e9)
    with raising() as received, pytest.raises(Interrupted) as caught:
        fit(interrupted, lambda step: send(number) if step == 4 else None)
    assert caught.value.number == received.number == number

    resumed = make(tmp_path / "interrupted", STEPS, ema_decay=0.9, checkpoint_seconds=1e9)
    assert resumed.resume() is True
    assert resumed.step == 5
    fit(resumed)
    assert_same(resumed.model.state_dict(), straight.model.state_dict())
    assert_same(resumed.optimizer.state_dict(), straight.optimizer.state_dict())
    assert_same(resumed.ema_model.state_dict(), straight.ema_model.state_dict())
    assert resumed.metrics.read() == straight.metrics.read()


def test_without_the_command_line_a_signal_does_what_it_did_before(tmp_path: Path) -> None:
    engine = make(tmp_path, STEPS, checkpoint_seconds=1e9)
    with pytest.raises(KeyboardInterrupt):
        fit(engine, lambda step: send(signal.SIGINT) if step == 4 else None)
    assert torch.load(engine.checkpoint, weights_only=True)["step"] == 5


def test_a_handler_that_returns_does_not_make_a_training_look_finished(tmp_path: Path) -> None:
    engine = make(tmp_path, STEPS, checkpoint_seconds=1e9)
    outer = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        with pytest.raises(Interrupted):
            fit(engine, lambda step: send(signal.SIGTERM) if step == 4 else None)
    finally:
        signal.signal(signal.SIGTERM, outer)
    assert engine.step == 5


def test_a_second_signal_does_not_wait_for_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interruption, "ECHO_SECONDS", 0.0)
    engine = make(tmp_path, STEPS, checkpoint_seconds=1e9)

    def insist(step: int) -> None:
        if step == 4:
            send(signal.SIGINT)
            time.sleep(0.001)
            send(signal.SIGINT)
            raise AssertionError("the second signal waited for the end of the step")

    with pytest.raises(KeyboardInterrupt):
        fit(engine, insist)
    # that of the start: the step in the middle must not be saved
    assert torch.load(engine.checkpoint, weights_only=True)["step"] == 0


def test_the_echo_of_a_signal_is_no_second_request(tmp_path: Path) -> None:
    """A terminal that closes sends SIGHUP twice."""
    engine = make(tmp_path, STEPS, checkpoint_seconds=1e9)

    def twice(step: int) -> None:
        if step == 4:
            send(signal.SIGHUP)
            send(signal.SIGHUP)

    with raising(), pytest.raises(Interrupted):
        fit(engine, twice)
    assert torch.load(engine.checkpoint, weights_only=True)["step"] == 5


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As SIGHUP below nohup."""
    outer = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raising() as received:
            engine = make(tmp_path, STEPS, checkpoint_seconds=1e9)
            fit(engine, lambda step: send(signal.SIGHUP) if step == 4 else None)
        assert engine.step == STEPS
        assert received.number is None
    finally:
        signal.signal(signal.SIGHUP, outer)


def test_an_error_that_a_signal_causes_elsewhere_is_an_interruption() -> None:
    """A supervisor ends all processes of a job at once, loaders included."""
    with raising(), pytest.raises(Interrupted), deferred():
        send(signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 3) is killed by signal: Terminated.")


def test_a_forked_process_does_not_inherit_the_handlers() -> None:
    with raising(), deferred():
        child = os.fork()
        if child == 0:
            send(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[object, list[str]]:
    """The exit code of a command in this process, and what it prints on standard error."""
    monkeypatch.setattr(sys, "argv", ["hwnas", *map(str, arguments)])
    code: object = 0
    try:
        cli.main()
    except SystemExit as exit_:
        code = exit_.code or 0
    return code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "interrupted by SIGTERM"),
        (signal.SIGHUP, 129, "interrupted by SIGHUP"),
    ],
)
def test_a_signal_is_said_and_is_the_exit_code(
    number: signal.Signals,
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_tiny(tmp_path)
    monkeypatch.setattr(Pipeline, "run", lambda pipeline, *, fresh: send(number))
    found = run_command(monkeypatch, capsys, "run", config, "--out", tmp_path / "run")
    assert found == (code, [f"{words}: run the same command again to resume"])


def test_a_terminal_that_closed_does_not_hide_the_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hang_up(pipeline: Pipeline, *, fresh: bool) -> None:
        try:
            send(signal.SIGHUP)
        finally:
            raise OSError(5, "Input/output error")

    config = write_tiny(tmp_path)
    monkeypatch.setattr(Pipeline, "run", hang_up)
    code, _ = run_command(monkeypatch, capsys, "run", config, "--out", tmp_path / "run")
    assert code == 129


def training_context(folder: Path, *changes: str) -> tuple[StageContext, Architecture]:
    """A short training of a network of digits."""
    config = write_tiny(folder)
    experiment = load_experiment(config, ["train.epochs=1", "checkpoint_seconds=1e9", *changes])
    (folder / "train").mkdir(exist_ok=True)
    space = digits_space()
    picks = {choice.key: choice.options[0] for choice in space.choices}
    return StageContext(experiment, folder, folder / "train"), space.decode(picks)


def patch_step(
    monkeypatch: pytest.MonkeyPatch, in_step: Callable[[], None], at: int
) -> Callable[..., Metrics]:
    """Call ``in_step`` before the update of a step."""
    optimizer_step = Engine.optimizer_step

    def step(engine: Engine, *batch: Any) -> Metrics:
        if engine.step == at:
            in_step()
        return optimizer_step(engine, *batch)

    monkeypatch.setattr(Engine, "optimizer_step", step)
    return optimizer_step


@pytest.mark.slow
def test_a_killed_loader_is_one_sentence_and_the_training_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, arch = training_context(tmp_path, "data.workers=2", "train.batch_size=16")

    def kill() -> None:
        # SIGKILL, as by the kernel when memory runs out
        killed = multiprocessing.active_children()[0]
        assert killed.pid is not None
        os.kill(killed.pid, signal.SIGKILL)

    optimizer_step = patch_step(monkeypatch, kill, at=3)
    with pytest.raises(ResourceError) as caught, explained("train", ctx.experiment):
        training.run(ctx, arch)
    assert str(caught.value) == (
        "a loader process of train was killed, most likely because memory ran out: lower"
        " data.workers (now 2), or end other programs, then the same command resumes; a lower"
        " train.batch_size (now 16) or data.resolution (now 8) helps, but starts the stage again."
    )
    assert caught.value.exit_code == 2

    assert (ctx.folder / "checkpoint.pt").exists()
    monkeypatch.setattr(Engine, "optimizer_step", optimizer_step)
    training.run(ctx, arch)
    steps = [row["step"] for row in JsonLines(ctx.folder / "metrics.jsonl").read()]
    assert steps == list(range(len(steps)))


@pytest.mark.slow
def test_ctrl_c_does_not_end_the_loaders_before_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The terminal sends it to them as well."""
    ctx, arch = training_context(tmp_path, "data.workers=2")

    def interrupt() -> None:
        for loader in multiprocessing.active_children():
            assert loader.pid is not None
            os.kill(loader.pid, signal.SIGINT)
            os.kill(loader.pid, signal.SIGHUP)
        # long enough for a loader to end
        time.sleep(0.3)
        send(signal.SIGINT)

    patch_step(monkeypatch, interrupt, at=3)
    with raising(), pytest.raises(Interrupted):
        training.run(ctx, arch)
    assert torch.load(ctx.folder / "checkpoint.pt", weights_only=True)["step"] == 4


def experiment(*changes: str) -> Experiment:
    return load_experiment(None, ["train.batch_size=64", "search.batch_size=32", *changes])


def failing(error: Exception, stage: str = "train", *changes: str) -> str:
    with pytest.raises(ResourceError) as caught, explained(stage, experiment(*changes)):
        raise error
    assert caught.value.exit_code == 2
    assert str(caught.value).count(".\n") == 0
    return str(caught.value)


GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 7.79 GiB of"
    " which 1.19 GiB is free. Process 1234 has 6.55 GiB memory in use."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"
    " tried to allocate 4000000000 bytes. Error code 12 (Cannot allocate memory)"
)


def test_too_little_gpu_memory_is_one_sentence() -> None:
    again = (
        "a lower train.batch_size (now 64) or data.resolution (now 8) helps, but starts the stage"
        " again."
    )
    expected = (
        "train ran out of GPU memory (the system refused 2.50 GiB): end other programs on the GPU,"
        f" then the same command resumes; {again}"
    )
    small = "data.resolution=8"
    assert failing(torch.OutOfMemoryError(GPU), "train", small) == expected
    assert "search.batch_size (now 32)" in failing(torch.OutOfMemoryError(GPU), "supernet-3")
    for words in ("CUDA error: out of memory\nCUDA kernel errors", "CUBLAS_STATUS_ALLOC_FAILED"):
        assert "ran out of GPU memory" in failing(RuntimeError(words))


def test_too_little_memory_is_one_sentence() -> None:
    sizes = [
        (RuntimeError(CPU), "3,815 MiB"),
        (OSError(12, "Cannot allocate memory"), "more"),
        (MemoryError(), "more"),
        (RuntimeError("Caught _ArrayMemoryError in DataLoader worker process 0."), "more"),
    ]
    for error, refused in sizes:
        assert failing(error, "search", "data.workers=4", "study.processes=2").startswith(
            f"search ran out of memory (the system refused {refused}): lower data.workers (now 4)"
            " or study.processes (now 2), or end other programs, then the same command resumes; a"
            " lower search.batch_size (now 32) or data.resolution"
        )
    assert "batch_size" not in failing(MemoryError(), "export")


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(10**16),
        lambda: np.empty(10**16),
        lambda: bytearray(10**17),
    ],
)
def test_memory_that_torch_numpy_or_python_is_refused_is_one_sentence(
    allocate: Callable[[], Any],
) -> None:
    with (
        pytest.raises(ResourceError, match="search ran out of memory"),
        explained("search", experiment()),
    ):
        allocate()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(24, "Too many open files"), "may not open more files: .*ulimit -n"),
        (
            RuntimeError(
                "unable to open shared memory object </torch_7_1> in read-write mode: Too many"
                " open files (24)"
            ),
            "may not open more files: .*ulimit -n",
        ),
        (RuntimeError("received 0 items of ancdata"), "may not open more files: .*ulimit -n"),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"
                " dataloader's workers are out of shared memory. Please try to raise your shared"
                " memory limit."
            ),
            "ran out of shared memory: .*--shm-size",
        ),
        (
            RuntimeError(
                "unable to write to file </torch_7_1>: No space left on device (28)",
            ),
            "ran out of shared memory: .*--shm-size",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
            "a loader process of train was killed",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "a loader process of train was killed",
        ),
        (RuntimeError("can't start new thread"), "may not start more processes or threads"),
        (
            BlockingIOError(11, "Resource temporarily unavailable"),
            "may not start more processes or threads",
        ),
    ],
)
def test_what_the_system_refuses_loaders_is_one_sentence(error: Exception, words: str) -> None:
    with (
        pytest.raises(ResourceError, match=words) as caught,
        explained("train", experiment("data.workers=3")),
    ):
        raise error
    assert "lower data.workers (now 3), or" in str(caught.value)
    assert "the same command resumes" in str(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), OSError(2, "No such file"), KeyError("x")]
)
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explained("train", experiment()):
        raise error
    assert caught.value is error


class Huge(Images):
    """Images for which there is not enough memory."""

    labels = np.zeros(8, dtype=np.int64)

    def __init__(self, allocate: Callable[[], Any]) -> None:
        self.allocate = allocate

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        self.allocate()
        raise AssertionError("so much memory exists")


@pytest.mark.parametrize("allocate", [lambda: torch.empty(10**16), lambda: np.empty(10**16)])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_is_refused_memory_says_so(workers: int, allocate: Callable[[], Any]) -> None:
    batches = training_batches(Huge(allocate), 4, seed=0, steps=range(2), workers=workers)
    with (
        pytest.raises(ResourceError, match="train ran out of memory"),
        explained("train", experiment()),
    ):
        next(batches)
