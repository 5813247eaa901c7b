#!/usr/bin/env python3
"""Time and run model files on a device. Standalone: needs only Python >= 3.8, numpy and
one runtime, and nothing from hwnas.

    python runner.py measure PLAN.json
    python runner.py predict MODEL INPUTS.npy OUTPUTS.npy [--threads N]
    python runner.py inspect

``measure`` reads a plan:

    {"runtime": "litert" | "onnxruntime", "threads": 1, "cores": [0] | null (not pinned),
     "warmup_ms": 5, "min_ms": 20, "min_runs": 5, "max_runs": 200,
     "items": [{"id": "any", "path": "x.tflite", "round": 0, "input": "image.npy"}, ...]}

``input`` is optional: a file with one image [1, H, W, C], float32 or uint8 as for
``predict``. It is for models whose time depends on the image (NMS). Other models get
noise.

``measure`` prints JSON lines: first a header that describes the machine, then for each
item, in the order of the plan, ``{"id", "round", "delegated", "ms": [every single
run]}``, with ``"input": "image"`` if an image was fed, or ``{"id", "round", "error"}``.
Times are the wall-clock times of single invocations, in milliseconds. ``delegated``
(LiteRT only) tells whether XNNPACK runs the whole graph: true, false, or "unknown" if
the runtime does not reveal it. The header's ``cores`` are those that this process may
use; ``pinned`` tells whether that is because the plan names them. With several threads,
idle-priority loops keep the pinned cores awake (see ``keep_awake``), and the line
``{"conditions": {"cores": "kept awake"}}`` follows the header.

``predict`` feeds images [N, H, W, C] one by one and writes float32 outputs [N, ...]. It
quantises inputs and dequantises outputs of int8 models, and transposes images to NCHW
for ONNX files. If a model has several outputs, each row holds all of them, flattened
and concatenated in the order of the file. Images are float32, or uint8 for models that
take raw pixels.

``inspect`` prints one JSON line: the machine, its cores, and for each runtime the
package and version that would be used. Runtimes that do not work are under "missing",
each with a sentence that includes the command to install it.

A computer that controls this one through a connection has to store no files here except
the models:

- ``measure -`` reads the plan from a line of stdin, and stops when stdin is closed.
- ``predict MODEL - -`` reads a line with the shape and then the images from stdin, and
  writes the outputs to stdout in the same form: ``[2, 224, 224, 3]``, then float32
  values, little-endian. Uint8 images follow ``[2, 224, 224, 3, "uint8"]``.
- ``--receive FOLDER``, for both, takes files first. It reads a line ``{"name": [bytes,
  "sha256"], ...}`` from stdin, writes a line with the names that FOLDER does not have
  with these contents to stdout, and then reads their contents, one after the other,
  from stdin. A file is either complete or absent. Relative paths of models start in
  FOLDER, which is relative to the home folder, and which only this user can enter. Only
  one job at a time runs in FOLDER.

Exit status: 0 done, 2 bad arguments or plan, 3 the runtime is not installed or too old, 4
FOLDER is not writable or belongs to another user, or another job is running in it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import stat
import subprocess
import sys
import sysconfig
import threading
import time
from typing import Any, ClassVar, Iterator

try:
    import numpy as np
except ImportError:  # inspect must work without it, to report that it is missing
    np = None  # type: ignore[assignment]

PROTOCOL = 1
LOCK_SECONDS = 3  # a job whose connection was lost needs a moment to notice it
LOCK = ".hwnas-lock"
PART = ".hwnas-part"  # suffix of files that are not complete yet
DEFAULTS = {"warmup_ms": 5, "min_ms": 20, "min_runs": 5, "max_runs": 200}
SHOWN_CHARACTERS = 600  # of an error message; its cause may stand at its end
WARMUP_RUNS = 2  # at least, whatever warmup_ms is: the first run allocates and packs weights


class Refusal(Exception):  # noqa: N818 - the user's to fix, not a bug
    """A problem that the user can fix: one sentence for stderr, and the exit status."""

    def __init__(self, sentence: str, status: int = 2) -> None:
        super().__init__(sentence)
        self.status = status


class LiteRTModel:
    """A TFLite file in the interpreter's default configuration: XNNPACK for the operators
    that it supports, TFLite's own kernels for the others.
    """

    packages: ClassVar[dict[str, str]] = {
        "ai-edge-litert": "ai_edge_litert.interpreter",
        "tflite-runtime": "tflite_runtime.interpreter",
    }

    def __init__(self, module: Any, path: str, threads: int) -> None:
        self._interpreter = module.Interpreter(model_path=path, num_threads=threads)
        self._interpreter.allocate_tensors()
        self._inputs = self._interpreter.get_input_details()
        self._outputs = self._interpreter.get_output_details()
        self.invoke = self._interpreter.invoke

    def randomise(self) -> None:
        for tensor in self._inputs:
            self._interpreter.set_tensor(tensor["index"], noise(tensor["shape"], tensor["dtype"]))

    def feed(self, image_NHWC: Any) -> None:
        entry = only(self._inputs, "input")
        if not takes_pixels(image_NHWC, entry["dtype"]):
            image_NHWC = quantise(image_NHWC, entry)
        self._interpreter.set_tensor(entry["index"], image_NHWC)

    def predict(self, image_NHWC: Any) -> Any:
        self.feed(image_NHWC)
        self.invoke()
        outputs = []
        for tensor in self._outputs:
            values = self._interpreter.get_tensor(tensor["index"])
            outputs.append(dequantise(values, tensor))
        return in_a_row(outputs)

    def facts(self) -> dict[str, Any]:
        """Whether one delegate runs the whole graph.

        The operators that a delegate has replaced stay in the list of nodes, so their
        number tells nothing. The edges do: a single delegate must produce all outputs,
        and must not read from any operator outside itself.
        """
        try:
            # There is no public call for this, and some versions lack the private one.
            nodes = self._interpreter._get_ops_details()
        except (AttributeError, RuntimeError, ValueError):
            return {"delegated": "unknown"}
        delegates = [node for node in nodes if node["op_name"] == "DELEGATE"]
        if len(delegates) != 1:
            return {"delegated": False}
        others = [node for node in nodes if node["op_name"] != "DELEGATE"]
        from_others = set()
        for node in others:
            from_others |= {int(index) for index in node["outputs"]}
        written = {int(index) for index in delegates[0]["outputs"]}
        read = {int(index) for index in delegates[0]["inputs"]}
        outputs = {int(tensor["index"]) for tensor in self._outputs}
        return {"delegated": outputs <= written and not read & from_others}


class OnnxModel:
    """An ONNX file on the CPU provider with all graph optimisations."""

    packages: ClassVar[dict[str, str]] = {"onnxruntime": "onnxruntime"}
    # hwnas writes IR 8, opset 18, which 1.14 was the first to read
    oldest: ClassVar[dict[str, list[int]]] = {"onnxruntime": [1, 14]}
    dtypes: ClassVar[dict[str, str]] = {
        "tensor(float)": "float32",
        "tensor(int8)": "int8",
        "tensor(uint8)": "uint8",
    }

    def __init__(self, module: Any, path: str, threads: int) -> None:
        options = module.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = module.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = module.GraphOptimizationLevel.ORT_ENABLE_ALL
        self._session = module.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        # Bound tensors, because session.run would convert inputs and outputs in the timed call.
        self._binding = self._session.io_binding()
        for tensor in self._session.get_outputs():
            self._binding.bind_output(tensor.name, "cpu")

    def invoke(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def randomise(self) -> None:
        for tensor in self._session.get_inputs():
            self._binding.bind_cpu_input(tensor.name, noise(tensor.shape, self.dtypes[tensor.type]))

    def feed(self, image_NHWC: Any) -> None:
        entry = only(self._session.get_inputs(), "input")
        takes_pixels(image_NHWC, self.dtypes[entry.type])
        self._binding.bind_cpu_input(
            entry.name, np.ascontiguousarray(image_NHWC.transpose(0, 3, 1, 2))
        )

    def predict(self, image_NHWC: Any) -> Any:
        self.feed(image_NHWC)
        self.invoke()
        return in_a_row(
            [output.astype(np.float32) for output in self._binding.copy_outputs_to_cpu()]
        )

    def facts(self) -> dict[str, Any]:
        return {}


MODELS: dict[str, Any] = {"litert": LiteRTModel, "onnxruntime": OnnxModel}
SUFFIXES = {".tflite": "litert", ".onnx": "onnxruntime"}
PLUGINS = "HWNAS_RUNNER_MODELS"


def load_plugins() -> None:
    """Add the runtimes of plug-ins. An environment variable lists their Python files, and
    each file defines MODELS and SUFFIXES as above.
    """
    for path in filter(None, os.environ.get(PLUGINS, "").split(os.pathsep)):
        specification = importlib.util.spec_from_file_location("hwnas_runner_models", path)
        if specification is None or specification.loader is None:
            raise Refusal(f"{PLUGINS} names {path}, which is not a Python file")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        MODELS.update(module.MODELS)
        SUFFIXES.update(module.SUFFIXES)


def import_runtime(runtime: str) -> tuple[str, Any]:
    """The first package of a runtime that works on this machine, and its module."""
    if np is None:
        raise Refusal(f"This Python has no numpy{remedy(*packages_for(runtime))}", status=3)
    packages: dict[str, str] = MODELS[runtime].packages
    broken = []
    for package, name in packages.items():
        version = version_of(package)
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            if version != "unknown":  # installed, so the user should know why it fails
                broken.append(f"{package} {version} does not import ({one_sentence(error)})")
            continue
        if version == "unknown":  # a build under another name, such as onnxruntime-gpu
            version = str(getattr(module, "__version__", version))
        # the targets of plug-ins need not set a limit
        oldest = getattr(MODELS[runtime], "oldest", {}).get(package, [])
        if numbers(version) and numbers(version) < oldest:
            needed = ".".join(map(str, oldest))
            reason = (
                f"{package} {version} is too old for the files of hwnas; {needed} or later works"
            )
            raise Refusal(f"{reason}{remedy(f'{package}>={needed}', 'numpy')}", status=3)
        # Up to 2.14, tflite-runtime was built for numpy 1. With numpy 2, the import
        # works, but every model fails.
        old_build = package == "tflite-runtime" and [2] <= numbers(version) < [2, 15]
        if old_build and numbers(np.__version__) >= [2]:
            reason = f"tflite-runtime {version} does not work with numpy {np.__version__}"
            raise Refusal(f"{reason}{remedy('tflite-runtime', 'numpy<2')}", status=3)
        return package, module
    reason = "; ".join(broken) or f"This Python has no {' and no '.join(packages)}"
    raise Refusal(f"{reason}{remedy(*packages_for(runtime))}", status=3)


def packages_for(runtime: str) -> tuple[str, str]:
    """What to install for a runtime on this machine."""
    # ai-edge-litert has no wheels for 32-bit boards and old Pythons
    is_64_bit = platform.machine() in ("x86_64", "AMD64", "aarch64", "arm64")
    if runtime == "litert" and not (is_64_bit and sys.version_info >= (3, 10)):
        return "tflite-runtime", "numpy<2"
    return next(iter(MODELS[runtime].packages)), "numpy"


def remedy(*packages: str) -> str:
    """The end of a sentence: the shell command that installs packages for this Python."""
    python = shlex.quote(sys.executable or "python3")
    wanted = " ".join(map(shlex.quote, packages))
    in_venv = sys.prefix != sys.base_prefix
    marker = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    if not in_venv and os.path.exists(marker):
        # pip refuses to install into a Python that belongs to the system (PEP 668)
        venv = "" if importlib.util.find_spec("ensurepip") else "sudo apt install python3-venv && "
        command = f"{venv}{python} -m venv ~/hwnas && ~/hwnas/bin/python -m pip install {wanted}"
        return (
            "; the system manages the packages of this Python, so create an environment and use its"
            f" ~/hwnas/bin/python: {command}"
        )
    pip = ""
    if not importlib.util.find_spec("pip"):
        pip = f"{python} -m ensurepip && " if in_venv else "sudo apt install python3-pip && "
    return f": {pip}{python} -m pip install {wanted}"


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def numbers(version: str) -> list[int]:
    """The first two numbers of a version; empty for "unknown"."""
    return [int(part) for part in version.split(".")[:2] if part.isdigit()]


def only(tensors: Any, kind: str) -> Any:
    if len(tensors) != 1:
        raise Refusal(f"predict needs a model with one {kind}, but this one has {len(tensors)}")
    return tensors[0]


def in_a_row(outputs: Any) -> Any:
    """A single output unchanged; several outputs flattened and concatenated to [1, total
    size].
    """
    if len(outputs) == 1:
        return outputs[0]
    return np.concatenate([output.reshape(1, -1) for output in outputs], axis=1)


def noise(shape: Any, dtype: Any) -> Any:
    """Seeded noise: normal for floats, uniform over the whole range for integers."""
    rng = np.random.default_rng(0)
    if np.issubdtype(dtype, np.floating):
        return rng.standard_normal(tuple(shape)).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, tuple(shape), dtype=dtype, endpoint=True)


def takes_pixels(images: Any, dtype: Any) -> bool:
    """Whether images are raw pixels, and the input of type ``dtype`` takes raw pixels.

    Raises Refusal if only one of the two holds.
    """
    are_pixels = images.dtype == np.uint8
    wants_pixels = np.dtype(dtype) == np.uint8
    if are_pixels and not wants_pixels:
        raise Refusal(
            f"This model takes {np.dtype(dtype)} images, but these are uint8: normalise them first"
        )
    if wants_pixels and not are_pixels:
        raise Refusal(
            f"This model takes raw uint8 pixels, but these images are {images.dtype}: do not"
            " normalise them"
        )
    return bool(are_pixels)


def quantise(values: Any, tensor: Any) -> Any:
    if np.issubdtype(tensor["dtype"], np.floating):
        return values.astype(tensor["dtype"], copy=False)
    scale, zero_point = tensor["quantization"]
    limits = np.iinfo(tensor["dtype"])
    rounded = np.round(values / scale) + zero_point
    return np.clip(rounded, limits.min, limits.max).astype(tensor["dtype"])


def dequantise(values: Any, tensor: Any) -> Any:
    if not np.issubdtype(tensor["dtype"], np.floating):
        scale, zero_point = tensor["quantization"]
        values = (values.astype(np.float32) - zero_point) * scale
    return values.astype(np.float32)


def read_plan(path: str) -> dict[str, Any]:
    """Read and check a plan, and fill in its defaults."""
    try:
        text = sys.stdin.buffer.readline().decode() if path == "-" else read(path)
        plan = {**DEFAULTS, "cores": None, **json.loads(text)}
        items = [{"round": 0, "input": None, **item} for item in plan["items"]]
        keys = ("id", "path", "round", "input")
        plan["items"] = [{key: item[key] for key in keys} for item in items]
        numbers = {key: plan[key] for key in ("threads", *DEFAULTS)}
        runtime = plan["runtime"]
    except OSError as error:
        raise Refusal(f"Cannot read the plan {path}: {error.strerror}") from error
    except KeyError as error:
        raise Refusal(f"The plan {path} lacks the key {error}") from error
    except (ValueError, TypeError) as error:
        raise Refusal(f"The plan {path} is not JSON in the documented format: {error}") from error
    if runtime not in MODELS:
        raise Refusal(f"The plan's runtime is {runtime!r}; choose one of {', '.join(MODELS)}")
    for key, value in numbers.items():
        types: Any = (int,)
        kind, minimum = "an integer", 1
        if key.endswith("_ms"):
            types = (int, float)
            kind, minimum = "a number", 0
        # JSON's true would pass as an int
        if isinstance(value, bool) or not isinstance(value, types) or value < minimum:
            raise Refusal(f"The plan's {key} is {value!r}; it must be {kind}, at least {minimum}")
    return plan


def pin(cores: Any) -> Any:
    """Restrict this process to these cores, if any. Returns the resulting cores, or
    "unknown" if the system has no such call.
    """
    if not hasattr(os, "sched_setaffinity"):
        return "unknown"
    if cores is not None:
        try:
            os.sched_setaffinity(0, cores)
        except (OSError, TypeError, ValueError, OverflowError) as error:
            available = sorted(os.sched_getaffinity(0))
            raise Refusal(
                f"Cannot run on cores {cores!r}; this machine has {available}: choose from these"
                " with device.cores, or set device.cores = [] to let the system choose"
            ) from error
    return sorted(os.sched_getaffinity(0))


KEEP_AWAKE = """
import os, sys
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
os.sched_setaffinity(0, [int(sys.argv[1])])
while os.getppid() == int(sys.argv[2]):
    for _ in range(1000000):
        pass
"""


def keep_awake(cores: Any) -> bool:
    """Keep cores from falling asleep while this process lives. Returns whether that
    is possible.

    A thread that finishes its part of a layer early sleeps until the next layer. If its
    core falls asleep as well, waking it takes up to 0.1 ms, which is as long as a small
    block, and more on a virtual machine. How often that happens depends on everything
    else that runs, so the times of blocks would not add up to the times of networks.
    The loops run at idle priority, only when nothing else needs the core.
    """
    if not isinstance(cores, list) or not hasattr(os, "SCHED_IDLE"):
        return False
    for core in cores:
        command = [sys.executable, "-c", KEEP_AWAKE, str(core), str(os.getpid())]
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    return True


def describe(plan: dict[str, Any], package: str, cores: Any) -> dict[str, Any]:
    used = cores if isinstance(cores, list) else [0]
    path = "/sys/devices/system/cpu/cpu{}/cpufreq/scaling_governor"
    governors = {text_of(path.format(core)).strip() for core in used}
    return {
        "runner": PROTOCOL,
        "runtime": plan["runtime"],
        "runtime_package": package,
        "runtime_version": version_of(package),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cores": cores,
        "pinned": plan["cores"] is not None and isinstance(cores, list),
        "governor": ",".join(sorted(governors - {""})) or "unknown",
        "threads": plan["threads"],
    }


def cpu_name() -> str:
    pairs = [line.split(":", 1) for line in text_of("/proc/cpuinfo").splitlines() if ":" in line]
    fields = {key.strip(): value.strip() for key, value in pairs}
    keys = ("model name", "Hardware", "Model")  # x86 and some ARM kernels; Android; Raspberry Pi
    return next((fields[key] for key in keys if fields.get(key)), "unknown")


def text_of(path: str) -> str:
    try:
        return read(path)
    except OSError:
        return ""


def read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def time_runs(model: Any, plan: dict[str, Any]) -> list[float]:
    """Warm up, then time single runs until min_ms and min_runs are both reached, or max_runs."""
    invoke, clock = model.invoke, time.perf_counter_ns
    warm_at_ns = clock() + plan["warmup_ms"] * 1e6
    warmup_runs = 0
    while warmup_runs < WARMUP_RUNS or clock() < warm_at_ns:
        invoke()
        warmup_runs += 1

    min_ns = plan["min_ms"] * 1e6
    min_runs = plan["min_runs"]
    max_runs = plan["max_runs"]
    total_ns = 0
    times_ms: list[float] = []
    while len(times_ms) < max_runs and (total_ns < min_ns or len(times_ms) < min_runs):
        start_ns = clock()
        invoke()
        elapsed_ns = clock() - start_ns
        times_ms.append(round(elapsed_ns / 1e6, 6))
        total_ns += elapsed_ns
    return times_ms


def measure(plan_path: str) -> None:
    plan = read_plan(plan_path)
    # before the import of the runtime, so that its threads inherit the affinity
    cores = pin(plan["cores"])
    if plan_path == "-":
        end_with_stdin()
    model_class = MODELS[plan["runtime"]]
    package, module = import_runtime(plan["runtime"])
    emit(describe(plan, package, cores))
    if plan["threads"] > 1 and plan["cores"] is not None and keep_awake(cores):
        emit({"conditions": {"cores": "kept awake"}})
    # As timeit does. Models are freed by their reference counts.
    gc.disable()
    for item in plan["items"]:
        line = {"id": item["id"], "round": item["round"]}
        try:
            model = model_class(module, item["path"], plan["threads"])
            if item["input"] is None:
                model.randomise()
            else:
                model.feed(next(images_of(item["input"])))
                line["input"] = "image"
            line.update(model.facts())
            line["ms"] = time_runs(model, plan)
        # A runtime may raise anything, and one bad file must not end the run.
        except Exception as error:
            line["error"] = one_sentence(error)
        model = None  # freed before the next one is loaded
        emit(line)


def end_with_stdin() -> None:
    """Exit when the other end closes stdin. Nobody is reading then, and this process would
    disturb the next measurement.
    """

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def emit(line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def one_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    if len(text) > SHOWN_CHARACTERS:
        # Messages of C++ begin with what was attempted and end with why it failed.
        text = f"{text[: SHOWN_CHARACTERS // 3]} ... {text[-(2 * SHOWN_CHARACTERS // 3) :]}"
    return f"{type(error).__name__}: {text}"


def predict(model_path: str, inputs_path: str, outputs_path: str, threads: int) -> None:
    suffix = os.path.splitext(model_path)[1]
    runtime = SUFFIXES.get(suffix, "litert")
    _, module = import_runtime(runtime)
    try:
        model = MODELS[runtime](module, model_path, threads)
        outputs = np.stack([model.predict(image_NHWC)[0] for image_NHWC in images_of(inputs_path)])
    except Refusal:
        raise
    # Runtimes have their own exceptions for missing, broken and unsuitable files.
    except Exception as error:
        raise Refusal(f"Cannot run {model_path} on {inputs_path}: {one_sentence(error)}") from error
    if outputs_path == "-":
        emit(outputs.shape)
        sys.stdout.buffer.write(outputs.astype("<f4").tobytes())
        sys.stdout.buffer.flush()
        return
    # written under another name first, so that an interrupted run leaves no partial file
    temporary = f"{outputs_path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        np.save(file, outputs)
    os.replace(temporary, outputs_path)


def images_of(path: str) -> Iterator[Any]:
    """Yield the images one by one, [1, H, W, C] each, so that only one is in memory."""
    if path != "-":
        images_NHWC = np.load(path, mmap_mode="r")
        is_known_dtype = images_NHWC.dtype in (np.float32, np.uint8)
        if not is_known_dtype or images_NHWC.ndim != 4 or len(images_NHWC) == 0:
            raise ValueError(
                f"inputs are {images_NHWC.dtype} {images_NHWC.shape}, not float32 or uint8 [N, H,"
                " W, C]"
            )
        for row in range(len(images_NHWC)):
            yield np.array(images_NHWC[row : row + 1])
        return
    count, *shape = json.loads(sys.stdin.buffer.readline())
    dtype = np.dtype(shape.pop() if len(shape) == 4 else "<f4")
    size = dtype.itemsize * shape[0] * shape[1] * shape[2]
    for row in range(count):
        data = sys.stdin.buffer.read(size)
        if len(data) < size:
            raise EOFError(f"the images ended after {row} of {count}")
        yield np.frombuffer(data, dtype).astype(dtype.newbyteorder("=")).reshape(1, *shape)


def inspect() -> None:
    """Print what the computer that controls this one has to know about it."""
    cores = list(range(os.cpu_count() or 1))
    if hasattr(os, "sched_getaffinity"):  # only Linux has it
        cores = sorted(os.sched_getaffinity(0))

    runtimes = {}
    missing = {}
    for runtime in MODELS:
        try:
            package, _ = import_runtime(runtime)
            runtimes[runtime] = f"{package} {version_of(package)}"
        except Refusal as refusal:
            missing[runtime] = str(refusal)
    emit(
        {
            "runner": PROTOCOL,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cpu": cpu_name(),
            "cores": cores,
            "numpy": None if np is None else np.__version__,
            "runtimes": runtimes,
            "missing": missing,
        }
    )


def enter(folder: str) -> None:
    """Make this the working folder, close it to other users, and lock it for as long as
    this process lives. Raises Refusal if another job holds the lock.
    """
    import fcntl  # Windows does not have it, and only --receive needs it

    path = os.path.join(os.path.expanduser("~"), os.path.expanduser(folder))
    os.umask(0o077)
    try:
        os.makedirs(path, exist_ok=True)
        os.chdir(path)
        keep_private(path)
        lock = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise Refusal(f"Cannot use the folder {path}: {error.strerror}", status=4) from error
    give_up = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() > give_up:
                holder = os.read(lock, 20).decode().strip() or "unknown"
                reason = (
                    f"Another job is running here (process {holder}), and two jobs would disturb"
                    " each other's times"
                )
                raise Refusal(
                    f"{reason}: wait for it, or end it with: kill {holder}", status=4
                ) from error
            time.sleep(0.1)
    # On a full disk, the lock still works, but does not name its holder.
    with contextlib.suppress(OSError):
        os.ftruncate(lock, 0)
        os.write(lock, b"%d\n" % os.getpid())


def keep_private(path: str) -> None:
    """Close the working folder, which is ``path``, to other users. Raises Refusal if it
    belongs to another one, who could replace the files in it, or to all users.
    """
    state = os.stat(".")
    remedy = "set the device option folder to one of your own"
    if state.st_uid != os.geteuid():
        raise Refusal(f"The folder {path} belongs to another user: {remedy}", status=4)
    if state.st_mode & stat.S_ISVTX:  # like /tmp, which must stay open to everybody
        raise Refusal(f"The folder {path} is shared by all users: {remedy}", status=4)
    # a home folder may be open on purpose, and our files in it are closed anyway
    is_home = os.path.samefile(".", os.path.expanduser("~"))
    if stat.S_IMODE(state.st_mode) & (stat.S_IRWXG | stat.S_IRWXO) and not is_home:
        os.chmod(".", stat.S_IRWXU)


def receive() -> None:
    """Receive the files announced on stdin that the working folder does not have yet."""
    try:
        announced = json.loads(sys.stdin.buffer.readline())
        wanted = {str(name): (int(size), str(digest)) for name, (size, digest) in announced.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise Refusal(
            f"The announced files are not JSON in the documented format: {error}"
        ) from error
    # Plain names only: no path may lead out of the folder, and no name may hide the lock.
    invalid = [name for name in wanted if os.path.basename(name) != name or name[:1] in (".", "")]
    if invalid:
        raise Refusal(f"{invalid[0]!r} is not a valid name for a file in {os.getcwd()}")
    missing = [name for name in wanted if not is_stored(name, *wanted[name])]
    emit(missing)
    try:
        for name in os.listdir("."):
            if name.endswith(PART):  # left behind when the machine was switched off
                os.unlink(name)
        for name in missing:
            store(name, *wanted[name])
    except OSError as error:
        here = shlex.quote(os.getcwd())
        reason = f"Cannot write to {os.getcwd()} ({error.strerror})"
        raise Refusal(
            f"{reason}: free some space, for instance by deleting earlier models: rm"
            f" {here}/*.tflite {here}/*.onnx",
            status=4,
        ) from error


def is_stored(name: str, size: int, digest: str) -> bool:
    """Whether a file is there with this content. Its name alone proves nothing: a card
    that is wearing out returns other bytes than were written.
    """
    try:
        if os.path.getsize(name) != size:
            return False
        return sha256_of(name) == digest
    except OSError:
        return False


def sha256_of(name: str) -> str:
    digest = hashlib.sha256()
    with open(name, "rb") as file:
        for content in iter(lambda: file.read(1 << 20), b""):
            digest.update(content)
    return digest.hexdigest()


def store(name: str, size: int, digest: str) -> None:
    """Write the next ``size`` bytes of stdin to a file."""
    try:
        with open(name + PART, "wb") as file:
            while size > 0:
                content = sys.stdin.buffer.read(min(size, 1 << 20))
                if not content:
                    raise Refusal(f"The connection ended in the middle of {name}")
                size -= file.write(content)
        if sha256_of(name + PART) != digest:
            raise Refusal(
                f"{name} was damaged on its way to {os.getcwd()}: run the command again, and check"
                " the disk if that happens again",
                status=4,
            )
        os.replace(name + PART, name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name + PART)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="runner.py", description="Time and run model files on this device."
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    jobs.add_parser("inspect", help="describe this machine and its runtimes in a line of JSON")
    measuring = jobs.add_parser("measure", help="time the models of a plan; prints JSON lines")
    measuring.add_argument("plan", help="the plan: a JSON file, or - for stdin")
    predicting = jobs.add_parser("predict", help="run a model on images")
    predicting.add_argument("model", help="a .tflite or .onnx file")
    predicting.add_argument(
        "inputs", help="float32 or uint8 images [N, H, W, C]: a .npy file, or - for stdin"
    )
    predicting.add_argument(
        "outputs",
        help="where to write the float32 outputs [N, ...]: a .npy file, or - for stdout",
    )
    predicting.add_argument("--threads", type=int, default=1)
    for job in (measuring, predicting):
        job.add_argument(
            "--receive",
            metavar="FOLDER",
            help="first receive files from stdin into FOLDER; relative paths of models start there",
        )
    options = parser.parse_args(arguments)
    try:
        load_plugins()
        if getattr(options, "receive", None) is not None:
            enter(options.receive)
            receive()
        if options.job == "inspect":
            inspect()
        elif options.job == "measure":
            measure(options.plan)
        else:
            predict(options.model, options.inputs, options.outputs, options.threads)
    except Refusal as refusal:
        sys.stderr.write(f"{refusal}\n")
        return refusal.status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
