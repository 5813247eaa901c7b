"""Signals that ask the program to end: Ctrl-C (SIGINT), ``kill`` (SIGTERM), and a
terminal that closes (SIGHUP).

``raising`` turns them into an exception, so that files and devices are left in order.
``deferred`` holds them back until a moment at which work can be saved. A signal that
the program was started to ignore, as ``nohup`` does with SIGHUP, stays ignored.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that ask the program to end."""

ECHO_SECONDS = 1.0
"""Signals within this time of the first are the same request: when a terminal closes,
both the kernel and the shell send SIGHUP.
"""

Handler = Callable[[int, FrameType | None], Any]


class Interrupted(KeyboardInterrupt):
    """A signal has asked the program to end. ``number`` is the signal's."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


class Interruption:
    """The first signal of a context; ``number`` is None as long as there was none."""

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        self.received_at = 0.0

    def receive(self, number: int) -> bool:
        """Take note of a signal. Returns whether the user insists: this is a second
        request, as the first did not end the program soon enough.
        """
        if self.number is None:
            self.number = signal.Signals(number)
            self.received_at = time.monotonic()
            return False
        return time.monotonic() - self.received_at > ECHO_SECONDS


@contextmanager
def raising() -> Iterator[Interruption]:
    """A context in which the first signal raises Interrupted in the main thread, and a
    second one ends the process at once.
    """
    interruption = Interruption()

    def handle(number: int, frame: FrameType | None) -> None:
        is_first = interruption.number is None
        if interruption.receive(number):
            _end(number)
        if is_first:
            raise Interrupted(signal.Signals(number))

    outer = _install(handle)
    try:
        yield interruption
    finally:
        _restore(outer)


@contextmanager
def deferred() -> Iterator[Interruption]:
    """A context whose body decides when a signal takes effect: it leaves as soon as it
    can once ``number`` is set. Then the signal does what it would have done before the
    context and, if that was nothing, Interrupted is raised. A second signal does not
    wait for the body.
    """
    interruption = Interruption()
    outer: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        if interruption.receive(number):
            _restore(outer)
            signal.raise_signal(number)

    outer |= _install(handle)
    try:
        yield interruption
    finally:
        _restore(outer)
        if interruption.number is not None:
            signal.raise_signal(interruption.number)
            raise Interrupted(interruption.number)


def ignore_in_loader(worker: int) -> None:
    """Ignore the signals that a terminal sends to all its processes, in a process that
    loads images: the training needs its batches to complete the step. It ends with
    the process that started it. ``worker`` is its number.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _install(handle: Handler) -> dict[int, Any]:
    """Install a handler of all ``ENDING`` signals that are not ignored. Returns the
    handlers before. Does nothing outside of the main thread, which alone may do it.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    owner = os.getpid()

    def handle_here(number: int, frame: FrameType | None) -> None:
        # a forked process inherits the handler, but what it protects is not there
        if os.getpid() != owner:
            _end(number)
        handle(number, frame)

    outer: dict[int, Any] = {}
    for number in ENDING:
        # None: a handler that was not installed by Python, and cannot be restored by it
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            outer[number] = signal.signal(number, handle_here)
    return outer


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _end(number: int) -> None:
    """End this process by a signal, as if nobody handled it."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
