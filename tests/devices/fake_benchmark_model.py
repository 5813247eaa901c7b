"""benchmark_model for the fake phone: LiteRT's real interpreter, with the flags and
the output of LiteRT's tool.

``LAUNCHER`` is the program on the phone. It only sends its folder and arguments to the
socket in $PHONE_CHIP and prints the answer, so it starts in milliseconds. ``serve`` is
the other side, in the tests' own process.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

Say = Callable[[str], None]
Tool = Callable[[dict[str, str], Path, Say], int]
"""Takes the flags without their dashes, the folder that it was started in, and a
function that prints a line; returns the exit status.
"""

LAUNCHER = r"""
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int main(int argc, char **argv) {
    struct sockaddr_un chip = {.sun_family = AF_UNIX};
    char buffer[4096], status = 1;
    int wire = socket(AF_UNIX, SOCK_STREAM, 0);
    strncpy(chip.sun_path, getenv("PHONE_CHIP"), sizeof chip.sun_path - 1);
    if (connect(wire, (struct sockaddr *)&chip, sizeof chip) != 0) return 1;
    argv[0] = getcwd(buffer, sizeof buffer);
    for (int i = 0; i < argc; i++) write(wire, argv[i], strlen(argv[i]) + 1);
    write(wire, "", 1);
    shutdown(wire, SHUT_WR);
    read(wire, &status, 1);
    for (ssize_t count; (count = read(wire, buffer, sizeof buffer)) > 0;) write(2, buffer, count);
    return status;
}
"""


def serve(path: Path, tool: Tool) -> socket.socket:
    """Run ``tool`` for each program that connects to a socket, until that is closed."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(
                    target=_answer, args=(listener.accept()[0], tool), daemon=True
                ).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener


def _answer(wire: socket.socket, tool: Tool) -> None:
    with wire, wire.makefile("rb") as stream, suppress(BrokenPipeError):
        request = stream.read().decode()
        if not request.endswith("\0\0"):
            return  # the program was killed before it had sent everything
        folder, *arguments = request.rstrip("\0").split("\0")
        flags = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
        lines: list[str] = []
        status = tool(flags, Path(folder), lines.append)
        wire.sendall(
            bytes([status])
            + "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
        )


def litert(flags: dict[str, str], folder: Path, say: Say) -> int:
    """What builds of the tool since 2024 do with the flags that hwnas uses."""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    say("INFO: STARTING!")
    say(f"INFO: Graph: [{flags['graph']}]")
    try:
        resolver = (
            OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            if flags.get("use_xnnpack") == "false"
            else OpResolverType.AUTO
        )
        model = Interpreter(
            str(folder / flags["graph"]),
            num_threads=int(flags["num_threads"]),
            experimental_op_resolver_type=resolver,
        )
        model.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        for line in str(error).splitlines():
            say(f"ERROR: {line}")
        say("ERROR: Benchmarking failed.")
        return 1
    say(f"INFO: Loaded model {flags['graph']}")
    if flags.get("use_xnnpack") == "true":
        say(
            "INFO: Explicitly applied XNNPACK delegate, and the model graph will be completely"
            " executed by the delegate."
        )
    input_details, outputs = model.get_input_details()[0], model.get_output_details()
    values = (
        np.random.default_rng(0)
        .uniform(-0.5, 0.5, input_details["shape"])
        .astype(input_details["dtype"])
    )
    if "input_layer_value_files" in flags:
        data = (folder / flags["input_layer_value_files"].split(":")[1]).read_bytes()
        assert flags["input_layer_shape"] == ",".join(map(str, input_details["shape"]))
        if len(data) != values.nbytes:
            say(
                f"ERROR: The size of input is {len(data)} bytes. It should be {values.nbytes}"
                " bytes."
            )
            return 134
        values = np.frombuffer(data, input_details["dtype"]).reshape(input_details["shape"])
    model.set_tensor(input_details["index"], values)
    for runs, seconds in (("warmup_runs", "warmup_min_secs"), ("num_runs", "min_secs")):
        say(
            f"INFO: Running benchmark for at least {flags[runs]} iterations and at least"
            f" {float(flags[seconds]):g} seconds but terminate if"
        )
        say(
            f"INFO: {_statistics(_times_us(model.invoke, int(flags[runs]), float(flags[seconds])))}"
        )
    say(
        "INFO: Inference timings in us: Init: 1, First inference: 1, Warmup (avg): 1, Inference"
        " (avg): 1"
    )
    if "output_filepath" in flags:
        (folder / flags["output_filepath"]).write_bytes(
            b"".join(model.get_tensor(output["index"]).tobytes() for output in outputs)
        )
    return 0


def _times_us(invoke: Callable[[], Any], runs: int, seconds: float) -> list[int]:
    times_us: list[int] = []
    end = time.perf_counter() + seconds
    while len(times_us) < runs or time.perf_counter() < end:
        start = time.perf_counter()
        invoke()
        times_us.append(max(1, round(1e6 * (time.perf_counter() - start))))
    return times_us


def _statistics(times_us: list[int]) -> str:
    """Statistics of the times, as stats_calculator.h prints them."""
    if not times_us:
        return "count=0 p5=0 median=0 p95=0"
    ranked = sorted(times_us)
    p5, median, p95 = (ranked[len(ranked) * percent // 100] for percent in (5, 50, 95))
    if ranked[0] == ranked[-1]:
        return (
            f"count={len(ranked)} curr={ranked[0]}{'(all same)' if len(ranked) > 1 else ''} p5={p5}"
            f" median={median} p95={p95}"
        )
    average = sum(ranked) / len(ranked)
    extremes = f"first={times_us[0]} curr={times_us[-1]} min={ranked[0]} max={ranked[-1]}"
    return f"count={len(ranked)} {extremes} avg={average:g} std=0 p5={p5} median={median} p95={p95}"
