#!/usr/bin/env python3
"""Time and run model files on a device. Standalone: Python >= 3.8, numpy and one runtime; nothing of hwnas.

    python runner.py measure PLAN.json
    python runner.py predict MODEL INPUTS.npy OUTPUTS.npy [--threads N]

``measure`` reads a plan

    {"runtime": "litert" | "onnxruntime", "threads": 1, "cores": [0] | null,
     "warmup_ms": 5, "min_ms": 20, "min_runs": 5, "max_runs": 200,
     "items": [{"id": "any", "path": "x.tflite", "round": 0}, ...]}

and writes JSON lines to stdout: a header that describes the machine, then for each item, in the plan's
order, ``{"id", "round", "delegated", "ms": [every single run]}`` or ``{"id", "round", "error"}``. Times are
the wall clock of one invocation, in milliseconds. ``delegated`` (LiteRT only) says whether XNNPACK took the
whole graph: true, false, or "unknown" where the runtime does not tell.

``predict`` feeds float32 images [N, H, W, C] one by one and writes float32 outputs [N, ...]. It quantises and
dequantises for integer models, and transposes to NCHW for ONNX files.

Exit status: 0 done, 2 bad arguments or plan, 3 the runtime is not installed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from typing import Any, ClassVar

try:
    import numpy as np
except ImportError:
    sys.stderr.write("numpy is not installed here: pip install numpy\n")
    sys.exit(3)

PROTOCOL = 1
DEFAULTS = {"warmup_ms": 5, "min_ms": 20, "min_runs": 5, "max_runs": 200}
WARMUP_RUNS = 2  # the first run allocates and packs weights, whatever warmup_ms says


class Refusal(Exception):  # noqa: N818 - not an error of ours
    """Something the user can fix: one sentence for stderr, and the exit status that goes with it."""

    def __init__(self, sentence: str, status: int = 2) -> None:
        super().__init__(sentence)
        self.status = status


class LiteRTModel:
    """A TFLite file on the interpreter's default path: XNNPACK where it can, reference kernels elsewhere."""

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

    def predict(self, image_NHWC: Any) -> Any:
        entry, exit_ = only(self._inputs, "input"), only(self._outputs, "output")
        self._interpreter.set_tensor(entry["index"], quantise(image_NHWC, entry))
        self.invoke()
        return dequantise(self._interpreter.get_tensor(exit_["index"]), exit_)

    def facts(self) -> dict[str, Any]:
        """Whether one delegate runs everything between inputs and outputs.

        The operators that a delegate replaced stay listed beside it, so the answer is in the edges: there is
        one delegate, it makes every output, and it waits for no operator outside itself.
        """
        try:
            # No public call tells, and some versions lack this one.
            nodes = self._interpreter._get_ops_details()
        except (AttributeError, RuntimeError, ValueError):
            return {"delegated": "unknown"}
        delegates = [node for node in nodes if node["op_name"] == "DELEGATE"]
        if len(delegates) != 1:
            return {"delegated": False}
        outside = {int(t) for node in nodes if node["op_name"] != "DELEGATE" for t in node["outputs"]}
        made, used = ({int(t) for t in delegates[0][side]} for side in ("outputs", "inputs"))
        return {"delegated": {int(t["index"]) for t in self._outputs} <= made and not used & outside}


class OnnxModel:
    """An ONNX file on the CPU provider with all graph optimisations."""

    packages: ClassVar[dict[str, str]] = {"onnxruntime": "onnxruntime"}
    dtypes: ClassVar[dict[str, Any]] = {
        "tensor(float)": np.float32,
        "tensor(int8)": np.int8,
        "tensor(uint8)": np.uint8,
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

    def predict(self, image_NHWC: Any) -> Any:
        entry = only(self._session.get_inputs(), "input")
        self._binding.bind_cpu_input(entry.name, np.ascontiguousarray(image_NHWC.transpose(0, 3, 1, 2)))
        self.invoke()
        return only(self._binding.copy_outputs_to_cpu(), "output").astype(np.float32)

    def facts(self) -> dict[str, Any]:
        return {}


MODELS: dict[str, Any] = {"litert": LiteRTModel, "onnxruntime": OnnxModel}


def import_runtime(packages: dict[str, str]) -> tuple[str, Any]:
    """The first of these (pip package: module) that imports, as package and module."""
    for package, module in packages.items():
        try:
            return package, importlib.import_module(module)
        except ImportError:
            continue
    raise Refusal(f"No runtime for this job is installed here: pip install {next(iter(packages))}", status=3)


def only(tensors: Any, kind: str) -> Any:
    if len(tensors) != 1:
        raise Refusal(f"predict handles models with one {kind}, and this one has {len(tensors)}")
    return tensors[0]


def noise(shape: Any, dtype: Any) -> Any:
    """Seeded: normal for floats, uniform over the whole range for integers."""
    rng = np.random.default_rng(0)
    if np.issubdtype(dtype, np.floating):
        return rng.standard_normal(tuple(shape)).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, tuple(shape), dtype=dtype, endpoint=True)


def quantise(values: Any, tensor: Any) -> Any:
    if np.issubdtype(tensor["dtype"], np.floating):
        return values.astype(tensor["dtype"], copy=False)
    scale, zero_point = tensor["quantization"]
    limits = np.iinfo(tensor["dtype"])
    return np.clip(np.round(values / scale) + zero_point, limits.min, limits.max).astype(tensor["dtype"])


def dequantise(values: Any, tensor: Any) -> Any:
    scale, zero_point = tensor["quantization"]
    is_float = np.issubdtype(tensor["dtype"], np.floating)
    return (values if is_float else (values.astype(np.float32) - zero_point) * scale).astype(np.float32)


def read_plan(path: str) -> dict[str, Any]:
    """The plan with its defaults filled in."""
    try:
        with open(path, encoding="utf-8") as file:
            plan = {**DEFAULTS, "cores": None, **json.load(file)}
        keys = ("id", "path", "round")
        plan["items"] = [{key: {"round": 0, **item}[key] for key in keys} for item in plan["items"]]
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
    """Keep this process on these cores. Returns the affinity in force, "unknown" where there is none."""
    if not hasattr(os, "sched_setaffinity"):
        return "unknown"
    if cores is not None:
        try:
            os.sched_setaffinity(0, cores)
        except (OSError, TypeError, ValueError, OverflowError) as error:
            available = sorted(os.sched_getaffinity(0))
            raise Refusal(f"Cannot run on cores {cores!r}; available here: {available}") from error
    return sorted(os.sched_getaffinity(0))


def describe(plan: dict[str, Any], package: str, cores: Any) -> dict[str, Any]:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    used = cores if isinstance(cores, list) else [0]
    path = "/sys/devices/system/cpu/cpu{}/cpufreq/scaling_governor"
    governors = {text_of(path.format(core)).strip() for core in used}
    return {
        "runner": PROTOCOL,
        "runtime": plan["runtime"],
        "runtime_package": package,
        "runtime_version": version,
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
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


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
    cores = pin(plan["cores"])  # before the runtime is imported, so that its threads inherit the affinity
    model_class = MODELS[plan["runtime"]]
    package, module = import_runtime(model_class.packages)
    emit(describe(plan, package, cores))
    gc.disable()  # as timeit does; models go by reference counting, as soon as the next item is due
    for item in plan["items"]:
        line = {"id": item["id"], "round": item["round"]}
        try:
            model = model_class(module, item["path"], plan["threads"])
            model.randomise()
            line.update(model.facts())
            line["ms"] = time_runs(model, plan)
        except Exception as error:  # a runtime may raise anything, and one bad file must not end the run
            line["error"] = one_sentence(error)
        model = None
        emit(line)


def emit(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def one_sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300] or 'no message'}"


def predict(model_path: str, inputs_path: str, outputs_path: str, threads: int) -> None:
    model_class = MODELS["onnxruntime" if model_path.endswith(".onnx") else "litert"]
    _, module = import_runtime(model_class.packages)
    try:
        images_NHWC = np.load(inputs_path, mmap_mode="r")
        if images_NHWC.dtype != np.float32 or images_NHWC.ndim != 4 or len(images_NHWC) == 0:
            raise ValueError(f"inputs are {images_NHWC.dtype} {images_NHWC.shape}, not float32 [N, H, W, C]")
        model = model_class(module, model_path, threads)
        rows = range(len(images_NHWC))
        outputs = np.stack([model.predict(np.array(images_NHWC[row : row + 1]))[0] for row in rows])
    except Refusal:
        raise
    except Exception as error:  # runtimes raise types of their own for missing, broken and misfitting files
        raise Refusal(f"Cannot run {model_path} on {inputs_path}: {one_sentence(error)}") from error
    temporary = f"{outputs_path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        np.save(file, outputs)
    os.replace(temporary, outputs_path)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="runner.py", description="Time and run model files on this device.")
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("measure", help="time the models of a plan; JSON lines on stdout")
    job.add_argument("plan", help="the plan, a JSON file")
    job = jobs.add_parser("predict", help="run a model over images")
    job.add_argument("model", help="a .tflite or .onnx file")
    job.add_argument("inputs", help="float32 images [N, H, W, C], a .npy file")
    job.add_argument("outputs", help="where to write the float32 outputs [N, ...], a .npy file")
    job.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    try:
        if options.job == "measure":
            measure(options.plan)
        else:
            predict(options.model, options.inputs, options.outputs, options.threads)
    except Refusal as refusal:
        sys.stderr.write(f"{refusal}\n")
        return refusal.status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
