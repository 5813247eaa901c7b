"""What stages declare: which of them are needed, their inputs and their outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hwnas.config import load_experiment
from hwnas.document import content_sha256, file_sha256
from hwnas.errors import UserError
from hwnas.export.bundle import Bundle
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.runs import MANIFEST, StageManifest
from hwnas.stages import STAGES, stage_class
from tests.conftest import write_tiny

ARCH = [
    "train.arch=mobilenet_v2",
    "data.channels=3",
    "data.mean=[0,0,0]",
    "data.std=[1,1,1]",
    "space.name=mobile32",
]


def pipeline(folder: Path, *overrides: str) -> Pipeline:
    return Pipeline(
        load_experiment(write_tiny(folder), list(overrides)), folder / "run", Progress()
    )


def test_each_stage_is_found_by_its_name(tmp_path: Path) -> None:
    assert [stage_class(name).name for name in STAGES] == [
        "profile",
        "search",
        "train",
        "export",
        "validate",
        "report",
    ]
    run = pipeline(tmp_path)
    for name in STAGES:
        assert run.stage(name).result in run.stage(name).outputs
        assert run.stage(name).summary()


@pytest.mark.parametrize(
    ("overrides", "left_out"),
    [([], ()), (["search.table=table.json"], ("profile",)), (ARCH, ("profile", "search"))],
    ids=str,
)
def test_which_stages_are_needed(
    overrides: list[str], left_out: tuple[str, ...], tmp_path: Path
) -> None:
    assert set(STAGES) - set(pipeline(tmp_path, *overrides).needed) == set(left_out)


@pytest.mark.slow
def test_the_inputs_of_each_stage(finished_run: Path) -> None:
    """What each stage depends on, by name, and the hashes of what can be hashed here."""
    inputs = {name: StageManifest.load(finished_run / name / MANIFEST).inputs for name in STAGES}
    table = file_sha256(finished_run / "profile" / "table.json")
    settings = {
        "profile": {"device", "profile", "seed"},
        "search": {"search", "seed", "data", "train images"},
        "train": {"train", "seed", "data", "train images", "test images"},
        "export": {"export", "data", "train images", "test images"},
        "validate": {"validate", "device", "data", "test images"},
    }
    bundle = Bundle.load(finished_run / "export" / "bundle.json")
    files = {
        "profile": {"space.json", "device.json"},
        "search": {"space.json", "table"},
        "train": {"arch.json", "architecture"},
        "export": {"model.safetensors"},
        "validate": {
            "bundle.json",
            "parity.npz",
            "device.json",
            "table",
            *(file.name for file in bundle.files),
        },
    }
    for stage, names in settings.items():
        optional = {"warnings"} if stage == "validate" else set()
        assert inputs[stage].keys() - optional == names | files[stage] | {"hwnas"}, stage

    assert inputs["search"]["table"] == inputs["validate"]["table"] == table
    assert inputs["search"]["train images"] == inputs["train"]["train images"]
    assert inputs["train"]["arch.json"] == file_sha256(finished_run / "search" / "arch.json")
    weights = finished_run / "train" / "model.safetensors"
    assert inputs["export"]["model.safetensors"] == file_sha256(weights)
    for name in files["validate"] - {"device.json", "table"}:
        assert inputs["validate"][name] == file_sha256(finished_run / "export" / name)
    config = json.loads((finished_run / "config.json").read_text())
    assert inputs["report"]["config"] == content_sha256(config)
    assert inputs["report"]["profile/table.json"] == table


def test_the_error_for_a_missing_input_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"table\.json does not exist yet: run 'hwnas profile' with the same --out first",
    ):
        pipeline(tmp_path).stage("search").inputs()
    with pytest.raises(
        UserError, match=r"^search\.table = 'nowhere\.json' does not exist: check the path\.$"
    ):
        pipeline(tmp_path, "search.table=nowhere.json").stage("search").inputs()
    with pytest.raises(
        UserError, match=r"model\.safetensors does not exist yet: run 'hwnas train'"
    ):
        pipeline(tmp_path).stage("export").inputs()


def test_a_format_that_cannot_be_timed_is_refused_before_a_table_is_set_aside(
    tmp_path: Path,
) -> None:
    finished = tmp_path / "run" / "profile"
    finished.mkdir(parents=True)
    (finished / "table.json").write_text("{}")
    unsupported = pipeline(tmp_path, "device.runtime=onnxruntime", "device.dtype=int8")
    with pytest.raises(UserError, match=r"device\.dtype = 'int8' is not supported"):
        unsupported.run_stage("profile")
    assert (finished / "table.json").read_text() == "{}"
    assert [path.name for path in finished.parent.iterdir() if path.is_dir()] == ["profile"]
