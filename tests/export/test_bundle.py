"""The files of a bundle: what is damaged, missing or not a number is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwnas.config import DataConfig
from hwnas.data.images import load_images
from hwnas.document import file_sha256
from hwnas.errors import DocumentError, ExportError
from hwnas.export.bundle import (
    PARITY_FILE,
    Bundle,
    BundleFile,
    load_parity,
    preprocessing,
    write_labels,
    write_parity,
)
from hwnas.export.metadata import LABELS_FILE
from hwnas.validate.exported import load_bundle
from tests.conftest import digits_space

MODEL = "model-fp32.tflite"
ARRAYS: dict[str, np.ndarray] = {
    "images": np.linspace(0, 1, 8 * 64, dtype=np.float32).reshape(8, 8, 8, 1),
    "logits": np.linspace(-1, 1, 80, dtype=np.float32).reshape(8, 10),
    "predictions": np.arange(8),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a bundle, whose model is a few bytes."""
    space = digits_space()
    arch = space.decode({choice.key: choice.options[0] for choice in space.choices})
    data = DataConfig(name="digits", resolution=8, channels=1, mean=(0.3,), std=(0.4,))
    (tmp_path / MODEL).write_bytes(bytes(range(200)))
    file = BundleFile.model_validate(
        {
            "name": MODEL,
            "format": "tflite-fp32",
            "runtime": "litert",
            "dtype": "float32",
            "size_bytes": 200,
            "sha256": file_sha256(tmp_path / MODEL),
            "parity": {"images": 8, "relative_error": 1e-6, "agreement": 1.0},
        }
    )
    labels = tuple("0123456789")
    bundle = Bundle(
        architecture=arch,
        task="classify",
        labels=labels,
        preprocessing=preprocessing(data, load_images(data, "test")),
        macs=arch.macs,
        params=arch.params,
        metric="accuracy",
        metrics={"accuracy": 0.98},
        test_images=8,
        files=(file,),
        labels_file=write_labels(tmp_path, labels),
        parity_file=write_parity(tmp_path, ARRAYS),
        versions={},
    )
    bundle.save(tmp_path / "bundle.json")
    return tmp_path


def change(folder: Path, **changes: Any) -> None:
    """Change keys of ``bundle.json``; ``...`` removes one."""
    path = folder / "bundle.json"
    content = json.loads(path.read_text()) | changes
    kept = {key: value for key, value in content.items() if value is not ...}
    path.write_text(json.dumps(kept))


def refused(folder: Path) -> str:
    with pytest.raises(DocumentError) as caught:
        load_bundle(folder)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_whole_bundle_is_read(folder: Path) -> None:
    assert load_bundle(folder) == Bundle.load(folder / "bundle.json")
    found = load_parity(folder, "images", "logits")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("name", [MODEL, PARITY_FILE, LABELS_FILE])
def test_a_damaged_or_missing_file_is_noticed(name: str, folder: Path) -> None:
    path = folder / name
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(flipped) // 2] ^= 1
    for damaged in (bytes(flipped), content[:-1], content[: len(content) // 2], b""):
        path.write_bytes(damaged)
        assert f"{path} is missing or not the file that bundle.json describes" in refused(folder)
    path.unlink()
    assert "export again" in refused(folder)


def test_a_bundle_that_is_cut_off_is_noticed(folder: Path) -> None:
    path = folder / "bundle.json"
    content = path.read_bytes()
    for length in range(0, len(content) - 2, 97):
        path.write_bytes(content[:length])
        assert str(path) in refused(folder)


def test_bundles_without_the_hash_are_read(folder: Path) -> None:
    change(folder, parity_file=...)
    assert load_bundle(folder).parity_file is None
    assert load_parity(folder).keys() == ARRAYS.keys()


def test_damaged_arrays_without_a_hash_are_noticed_where_they_are_read(folder: Path) -> None:
    path = folder / PARITY_FILE
    content = path.read_bytes()
    for length in range(0, len(content), 29):
        path.write_bytes(content[:length])
        with pytest.raises(DocumentError, match=r"parity\.npz is damaged .*: export again"):
            load_parity(folder)
    for damaged in (b"\x80\x04N.", b"\x93NUMPY", bytes(500)):
        path.write_bytes(damaged)
        with pytest.raises(DocumentError, match="export again"):
            load_parity(folder)
    path.unlink()
    with pytest.raises(DocumentError, match="does not exist"):
        load_parity(folder)


def test_arrays_that_are_missing_or_hold_nan_are_refused(folder: Path) -> None:
    np.savez(folder / PARITY_FILE, images=ARRAYS["images"])
    with pytest.raises(DocumentError, match="lacks the array 'logits'"):
        load_parity(folder, "images", "logits")
    wrong = ARRAYS["logits"].copy()
    wrong[3, 4] = np.nan
    np.savez(folder / PARITY_FILE, images=ARRAYS["images"], logits=wrong)
    with pytest.raises(DocumentError, match="holds NaN in 'logits'"):
        load_parity(folder, "images", "logits")
    with pytest.raises(ExportError, match=r"logits for test images hold NaN: .*train.optimizer.lr"):
        write_parity(folder, {**ARRAYS, "logits": wrong})


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_bundle_with_nan_is_refused(number: float, folder: Path) -> None:
    files = json.loads((folder / "bundle.json").read_text())["files"]
    change(folder, metrics={"accuracy": number})
    assert str(folder / "bundle.json") in refused(folder)
    parity = {"images": 8, "relative_error": number, "agreement": 1.0}
    change(folder, metrics={"accuracy": 0.98}, files=[{**files[0], "parity": parity}])
    assert str(folder / "bundle.json") in refused(folder)
