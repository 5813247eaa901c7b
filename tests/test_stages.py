"""What stages declare: which of them are needed, their inputs and their outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hwnas.config import load_experiment
from hwnas.document import content_sha256, file_sha256
from hwnas.errors import UserError
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
    """The names and hashes in the manifests stay the same, so that earlier run folders
    stay up to date.
    """
    inputs = {name: StageManifest.load(finished_run / name / MANIFEST).inputs for name in STAGES}
    config = json.loads((finished_run / "config.json").read_text())
    sections = {
        name: content_sha256(config[name])
        for name in ("data", "device", "profile", "search", "train", "export", "validate", "seed")
    }
    data = {name: inputs["search"][name] for name in ("hwnas", "images")} | {
        "data": sections["data"]
    }
    table = {"table.json": file_sha256(finished_run / "profile" / "table.json")}
    space = {"space.json": inputs["profile"]["space.json"]}

    def of(*names: str) -> dict[str, str]:
        return {name: sections[name] for name in names}

    weights, bundle = (
        finished_run / "train" / "model.safetensors",
        finished_run / "export" / "bundle.json",
    )
    warnings = {name: value for name, value in inputs["validate"].items() if name == "warnings"}
    device = {"device.json": inputs["profile"]["device.json"], "hwnas": data["hwnas"]}
    arch = {
        "arch.json": file_sha256(finished_run / "search" / "arch.json"),
        "architecture": inputs["train"]["architecture"],
    }
    assert inputs["profile"] == {**space, **device, **of("device", "profile", "seed")}
    assert inputs["search"] == {**space, **table, **data, **of("search", "seed")}
    assert inputs["train"] == {**arch, **data, **of("train", "seed")}
    assert inputs["export"] == {"model.safetensors": file_sha256(weights), **data, **of("export")}
    assert inputs["validate"] == {
        "bundle.json": file_sha256(bundle),
        **table,
        **data,
        **warnings,
        **of("validate", "device"),
    }
    assert inputs["report"]["config"] == content_sha256(config)
    assert inputs["report"]["profile/table.json"] == table["table.json"]


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
