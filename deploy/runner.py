#!/usr/bin/env python3
"""Time and run model files on a device. Standalone: Python >= 3.8, numpy and one
runtime; nothing of hwnas.

    python runner.py measure PLAN.json
    python runner.py predict MODEL INPUTS.npy OUTPUTS.npy [--threads N]
    python runner.py inspect

``measure`` reads a plan

    {"runtime": "litert" | "onnxruntime", "threads": 1, "cores": [0] | null,
     "warmup_ms": 5, "min_ms": 20, "min_runs": 5, "max_runs": 200,
     "items": [{"id": "any", "path": "x.tflite", "round": 0, "input": "image.npy"}, ...]}

where ``input`` is optional: a file of one image [1, H, W, C], float32 or uint8 as for
``predict``, for models whose time depends on what they see (NMS). Others get noise.

JSON lines go to stdout: a header that describes the machine, then for each item, in the
plan's order, ``{"id", "round", "delegated", "ms": [every single run]}``, with
``"input": "image"`` where an image was fed, or ``{"id", "round", "error"}``. Times are
the wall clock of one invocation, in milliseconds. ``delegated`` (LiteRT only) says
whether XNNPACK took the whole graph: true, false, or "unknown" where the runtime does
not tell. With several threads, idle-priority loops keep the pinned cores awake
(``keep_awake`` says why), and after the header a line ``{"conditions": {"cores": "kept
awake"}}`` says so.

``predict`` feeds images [N, H, W, C] one by one and writes float32 outputs [N, ...]. It
quantises and dequantises for int8 models, and transposes to NCHW for ONNX files.
Several outputs become one row per image: each is flattened, and they follow one another
in the file's order. Images are float32, or uint8 for a model that takes pixels as they
are.

``inspect`` writes a JSON line: what this machine is, its cores, and for each runtime
the package and version that would run, or else, under "missing", a sentence with the
command that installs it.

A computer that drives this one through a connection needs no files here but the models:

- ``measure -`` reads the plan from a line of stdin, and ends when stdin does.
- ``predict MODEL - -`` reads a line with the shape and then the images from stdin, and
  writes the outputs to stdout in the same form: ``[2, 224, 224, 3]``, then float32
  values, little-endian. Images of bytes come after ``[2, 224, 224, 3, "uint8"]``.
- ``--receive FOLDER``, for both, takes files first: from stdin a line ``{"name": bytes,
  ...}``; to stdout a line that lists the names which FOLDER does not have in these
  sizes; from stdin their contents, one after the other. A file is either whole or not
  there. Relative paths of models begin in FOLDER, which begins in the home folder, and
  one job at a time runs in it.

Exit status: 0 done, 2 bad arguments or plan, 3 the runtime is not installed, 4 FOLDER
takes no files, or another job runs in it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import threading
import time
from typing import Any, ClassVar, Iterator

try:
    import numpy as np
except ImportError:  # a fact for inspect to tell
    np = None  # type: ignore[assignment]

PROTOCOL = 1
LOCK_SECONDS = 3  # a job whose connection was lost needs a moment to notice
# the second ends the name of a file that is not whole yet
LOCK, PART = ".hwnas-lock", ".hwnas-part"
DEFAULTS = {"warmup_ms": 5, "min_ms": 20, "min_runs": 5, "max_runs": 200}
WARMUP_RUNS = 2  # the first run allocates and packs weights, whatever warmup_ms says


class Refusal(Exception):  # noqa: N818 - not an error of ours
    """Something the user can fix: one sentence for stderr, and the exit status that
    goes with it.
    """

    def __init__(self, sentence: str, status: int = 2) -> None:
        super().__init__(sentence)
        self.status = status


class LiteRTModel:
    """A TFLite file on the interpreter's default path: XNNPACK where it can, reference
    kernels elsewhere.
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
        image_NHWC = (
            image_NHWC if pixels(image_NHWC, entry["dtype"]) else quantise(image_NHWC, entry)
        )
        self._interpreter.set_tensor(entry["index"], image_NHWC)

    def predict(self, image_NHWC: Any) -> Any:
        self.feed(image_NHWC)
        self.invoke()
        return in_a_row(
            [
                dequantise(self._interpreter.get_tensor(exit_["index"]), exit_)
                for exit_ in self._outputs
            ]
        )

    def facts(self) -> dict[str, Any]:
        """Whether one delegate runs everything between inputs and outputs.

        The operators that a delegate replaced stay listed beside it, so the answer is
        in the edges: there is one delegate, it makes every output, and it waits for no
        operator outside itself.
        """
        try:
            # No public call tells, and some versions lack this one.
            nodes = self._interpreter._get_ops_details()
        except (AttributeError, RuntimeError, ValueError):
            return {"delegated": "unknown"}
        delegates = [node for node in nodes if node["op_name"] == "DELEGATE"]
        if len(delegates) != 1:
            return {"delegated": False}
        outside = {
            int(t) for node in nodes if node["op_name"] != "DELEGATE" for t in node["outputs"]
        }
        made, used = ({int(t) for t in delegates[0][side]} for side in ("outputs", "inputs"))
        return {
            "delegated": {int(t["index"]) for t in self._outputs} <= made and not used & outside
        }


class OnnxModel:
    """An ONNX file on the CPU provider with all graph optimisations."""

    packages: ClassVar[dict[str, str]] = {"onnxruntime": "onnxruntime"}
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
        # Bound tensors: a plain session.run would convert inputs and outputs inside the timed call.
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
        pixels(image_NHWC, self.dtypes[entry.type])
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
FURTHER = "HWNAS_RUNNER_MODELS"


def learn() -> None:
    """Add the runtimes of the Python files that an environment variable names: each has
    MODELS and SUFFIXES as above.
    """
    for path in filter(None, os.environ.get(FURTHER, "").split(os.pathsep)):
        specification = importlib.util.spec_from_file_location("hwnas_runner_models", path)
        if specification is None or specification.loader is None:
            raise Refusal(f"{FURTHER} names {path}, which is not a Python file")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        MODELS.update(module.MODELS)
        SUFFIXES.update(module.SUFFIXES)


def import_runtime(runtime: str) -> tuple[str, Any]:
    """The first package of a runtime that works here, and its module."""
    if np is None:
        raise Refusal(f"This Python has no numpy{remedy(*packages_for(runtime))}", status=3)
    packages: dict[str, str] = MODELS[runtime].packages
    broken = []
    for package, name in packages.items():
        version = version_of(package)
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            broken += (
                [f"{package} {version} does not import ({one_sentence(error)})"]
                if version != "unknown"
                else []
            )
            continue
        # Up to 2.14 it was built for numpy 1: it imports beside numpy 2, and then fails
        # at every model.
        if (
            package == "tflite-runtime"
            and [2] <= numbers(version) < [2, 15]
            and numbers(np.__version__) >= [2]
        ):
            reason = f"tflite-runtime {version} does not work with numpy {np.__version__}"
            raise Refusal(f"{reason}{remedy('tflite-runtime', 'numpy<2')}", status=3)
        return package, module
    reason = "; ".join(broken) or f"This Python has no {' and no '.join(packages)}"
    raise Refusal(f"{reason}{remedy(*packages_for(runtime))}", status=3)


def packages_for(runtime: str) -> tuple[str, str]:
    """What to install for a runtime on this machine. ai-edge-litert has no files for
    32-bit boards or old Pythons.
    """
    served = platform.machine() in ("x86_64", "AMD64", "aarch64", "arm64") and sys.version_info >= (
        3,
        10,
    )
    if runtime == "litert" and not served:
        return "tflite-runtime", "numpy<2"
    return next(iter(MODELS[runtime].packages)), "numpy"


def remedy(*packages: str) -> str:
    """The end of a sentence: the shell command that installs packages for this Python."""
    python, wanted = shlex.quote(sys.executable or "python3"), " ".join(map(shlex.quote, packages))
    own = sys.prefix != sys.base_prefix
    if not own and os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")):
        venv = "" if importlib.util.find_spec("ensurepip") else "sudo apt install python3-venv && "
        command = f"{venv}{python} -m venv ~/hwnas && ~/hwnas/bin/python -m pip install {wanted}"
        return (
            "; as its packages belong to the system, make an environment and use its"
            f" ~/hwnas/bin/python: {command}"
        )
    pip = (
        ""
        if importlib.util.find_spec("pip")
        else f"{python} -m ensurepip && "
        if own
        else "sudo apt install python3-pip && "
    )
    return f": {pip}{python} -m pip install {wanted}"


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def numbers(version: str) -> list[int]:
    """The first two numbers of a version; none of "unknown"."""
    return [int(part) for part in version.split(".")[:2] if part.isdigit()]


def only(tensors: Any, kind: str) -> Any:
    if len(tensors) != 1:
        raise Refusal(f"predict handles models with one {kind}, and this one has {len(tensors)}")
    return tensors[0]


def in_a_row(outputs: Any) -> Any:
    """One output as it is; several as [1, the numbers of all]."""
    return (
        outputs[0]
        if len(outputs) == 1
        else np.concatenate([output.reshape(1, -1) for output in outputs], axis=1)
    )


def noise(shape: Any, dtype: Any) -> Any:
    """Seeded: normal for floats, uniform over the whole range for integers."""
    rng = np.random.default_rng(0)
    if np.issubdtype(dtype, np.floating):
        return rng.standard_normal(tuple(shape)).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, tuple(shape), dtype=dtype, endpoint=True)


def pixels(images: Any, dtype: Any) -> bool:
    """Whether images are pixels, for an input of ``dtype`` that takes them as they are.
    The one is refused without the other.
    """
    given, taken = images.dtype == np.uint8, np.dtype(dtype) == np.uint8
    if given and not taken:
        raise Refusal(
            f"These images are uint8, and the model takes {np.dtype(dtype)}: normalise them first"
        )
    if taken and not given:
        raise Refusal(
            f"This model takes uint8 images, pixels as they are, and these are {images.dtype}: do"
            " not normalise them"
        )
    return bool(given)


def quantise(values: Any, tensor: Any) -> Any:
    if np.issubdtype(tensor["dtype"], np.floating):
        return values.astype(tensor["dtype"], copy=False)
    scale, zero_point = tensor["quantization"]
    limits = np.iinfo(tensor["dtype"])
    return np.clip(np.round(values / scale) + zero_point, limits.min, limits.max).astype(
        tensor["dtype"]
    )


def dequantise(values: Any, tensor: Any) -> Any:
    scale, zero_point = tensor["quantization"]
    is_float = np.issubdtype(tensor["dtype"], np.floating)
    return (values if is_float else (values.astype(np.float32) - zero_point) * scale).astype(
        np.float32
    )


def read_plan(path: str) -> dict[str, Any]:
    """The plan with its defaults filled in."""
    try:
        text = sys.stdin.buffer.readline().decode() if path == "-" else read(path)
        plan = {**DEFAULTS, "cores": None, **json.loads(text)}
        keys = ("id", "path", "round", "input")
        plan["items"] = [
            {key: {"round": 0, "input": None, **item}[key] for key in keys}
            for item in plan["items"]
        ]
        numbers = {key: plan[key] for key in ("threads", *DEFAULTS)}
        runtime = plan["runtime"]
    except OSError as error:
        raise Refusal(f"Cannot read the plan {path}: {error.strerror}") from error
    except KeyError as error:
        raise Refusal(f"The plan {path} lacks the key {error}") from error
    except (ValueError, TypeError) as error:
        raise Refusal(f"The plan {path} is not JSON of the documented form: {error}") from error
    if runtime not in MODELS:
        raise Refusal(f"The plan's runtime is {runtime!r}; choose one of {', '.join(MODELS)}")
    for key, value in numbers.items():
        floor, kinds = (0, (int, float)) if key.endswith("_ms") else (1, (int,))
        if isinstance(value, bool) or not isinstance(value, kinds) or value < floor:
            raise Refusal(f"The plan's {key} is {value!r}; it must be a number of at least {floor}")
    return plan


def pin(cores: Any) -> Any:
    """Keep this process on these cores. Returns the affinity in force, "unknown" where
    there is none.
    """
    if not hasattr(os, "sched_setaffinity"):
        return "unknown"
    if cores is not None:
        try:
            os.sched_setaffinity(0, cores)
        except (OSError, TypeError, ValueError, OverflowError) as error:
            available = sorted(os.sched_getaffinity(0))
            raise Refusal(f"Cannot run on cores {cores!r}; available here: {available}") from error
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
    """Keep cores from falling asleep while this process lives; whether that could be done.

    A thread that has done its part of a layer early sleeps until the next. Where its
    core then sleeps too, waking it takes up to 0.1 ms: as long as a small block, and
    more on a virtual machine. How often that happens hangs on everything else that
    runs, so times of blocks would not add up to times of networks. The loops that
    prevent it run only where nothing else wants the core.
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
    min_ns, min_runs, max_runs = plan["min_ms"] * 1e6, plan["min_runs"], plan["max_runs"]
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
    # before the runtime is imported, so that its threads inherit the affinity
    cores = pin(plan["cores"])
    if plan_path == "-":
        end_with_stdin()
    model_class = MODELS[plan["runtime"]]
    package, module = import_runtime(plan["runtime"])
    emit(describe(plan, package, cores))
    if plan["threads"] > 1 and keep_awake(cores):
        emit({"conditions": {"cores": "kept awake"}})
    gc.disable()  # as timeit does; models go by reference counting, as soon as the next item is due
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
        except (
            Exception
        ) as error:  # a runtime may raise anything, and one bad file must not end the run
            line["error"] = one_sentence(error)
        model = None
        emit(line)


def end_with_stdin() -> None:
    """Leave when the other end hangs up: nobody reads on there, and whoever measures
    next wants this machine quiet.
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
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300] or 'no message'}"


def predict(model_path: str, inputs_path: str, outputs_path: str, threads: int) -> None:
    suffix = os.path.splitext(model_path)[1]
    runtime = SUFFIXES.get(suffix, "litert")
    _, module = import_runtime(runtime)
    try:
        model = MODELS[runtime](module, model_path, threads)
        outputs = np.stack([model.predict(image_NHWC)[0] for image_NHWC in images_of(inputs_path)])
    except Refusal:
        raise
    except (
        Exception
    ) as error:  # runtimes raise types of their own for missing, broken and misfitting files
        raise Refusal(f"Cannot run {model_path} on {inputs_path}: {one_sentence(error)}") from error
    if outputs_path == "-":
        emit(outputs.shape)
        sys.stdout.buffer.write(outputs.astype("<f4").tobytes())
        sys.stdout.buffer.flush()
        return
    temporary = f"{outputs_path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        np.save(file, outputs)
    os.replace(temporary, outputs_path)


def images_of(path: str) -> Iterator[Any]:
    """The images one by one, [1, H, W, C] each, so that memory holds one of them."""
    if path != "-":
        images_NHWC = np.load(path, mmap_mode="r")
        if (
            images_NHWC.dtype not in (np.float32, np.uint8)
            or images_NHWC.ndim != 4
            or len(images_NHWC) == 0
        ):
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
    """What a computer that drives this one has to know about it."""
    cores = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )
    runtimes, missing = {}, {}
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
    """Make this the working folder, and this process the only one at work in it for as
    long as it lives.
    """
    import fcntl

    path = os.path.join(os.path.expanduser("~"), os.path.expanduser(folder))
    try:
        os.makedirs(path, exist_ok=True)
        os.chdir(path)
        lock = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o666)
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
                why = (
                    f"Another job runs here (process {holder}), and two would spoil each other's"
                    " times"
                )
                raise Refusal(
                    f"{why}: wait for it, or end it with: kill {holder}", status=4
                ) from error
            time.sleep(0.1)
    with contextlib.suppress(OSError):  # on a full disk the lock holds, but has no name
        os.ftruncate(lock, 0)
        os.write(lock, b"%d\n" % os.getpid())


def receive() -> None:
    """Take the files that are announced on stdin and not here yet into the working folder."""
    try:
        sizes = {
            str(name): int(size) for name, size in json.loads(sys.stdin.buffer.readline()).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise Refusal(
            f"The announced files are not JSON of the documented form: {error}"
        ) from error
    outside = [name for name in sizes if os.path.basename(name) != name or name[:1] in (".", "")]
    if outside:
        raise Refusal(f"{outside[0]!r} is no name for a file in {os.getcwd()}")
    missing = [
        name
        for name, size in sizes.items()
        if not (os.path.isfile(name) and os.path.getsize(name) == size)
    ]
    emit(missing)
    try:
        for name in os.listdir("."):
            if name.endswith(PART):  # of a machine that was switched off
                os.unlink(name)
        for name in missing:
            store(name, sizes[name])
    except OSError as error:
        here = shlex.quote(os.getcwd())
        full = f"{os.getcwd()} takes no more files ({error.strerror})"
        raise Refusal(
            f"{full}: free some space, for instance from earlier models: rm {here}/*.tflite"
            f" {here}/*.onnx",
            status=4,
        ) from error


def store(name: str, size: int) -> None:
    try:
        with open(name + PART, "wb") as file:
            while size > 0:
                content = sys.stdin.buffer.read(min(size, 1 << 20))
                if not content:
                    raise Refusal(f"The connection ended in the middle of {name}")
                size -= file.write(content)
        os.replace(name + PART, name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name + PART)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="runner.py", description="Time and run model files on this device."
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    jobs.add_parser("inspect", help="describe this machine and its runtimes; a JSON line on stdout")
    measuring = jobs.add_parser("measure", help="time the models of a plan; JSON lines on stdout")
    measuring.add_argument("plan", help="the plan, a JSON file; or -")
    predicting = jobs.add_parser("predict", help="run a model over images")
    predicting.add_argument("model", help="a .tflite or .onnx file")
    predicting.add_argument(
        "inputs", help="float32 or uint8 images [N, H, W, C], a .npy file; or -"
    )
    predicting.add_argument(
        "outputs", help="where to write the float32 outputs [N, ...], a .npy file; or -"
    )
    predicting.add_argument("--threads", type=int, default=1)
    for job in (measuring, predicting):
        job.add_argument(
            "--receive",
            metavar="FOLDER",
            help="take files from stdin first; paths of models begin there",
        )
    options = parser.parse_args(arguments)
    try:
        learn()
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
