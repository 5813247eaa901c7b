"""Run files in tflite-runtime: ``old_runtime.py INPUTS.npy OUTPUTS.npz MODEL...``, run
by .venv-tflite-runtime's Python.

Inputs are float32 [N, H, W, C]. Outputs: per file and output, "file:position" -> [N, ...].
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from tflite_runtime.interpreter import Interpreter

inputs_file, outputs_file, *models = sys.argv[1:]
outputs = {}
for model in models:
    interpreter = Interpreter(model, num_threads=1)
    interpreter.allocate_tensors()
    [entry], exits = interpreter.get_input_details(), interpreter.get_output_details()
    rows = []
    for image in np.load(inputs_file):
        interpreter.set_tensor(entry["index"], image[None])
        interpreter.invoke()
        rows.append([interpreter.get_tensor(exit_["index"]).copy() for exit_ in exits])
    outputs |= {
        f"{Path(model).name}:{i}": np.stack(part) for i, part in enumerate(zip(*rows, strict=True))
    }
np.savez(outputs_file, **outputs)
