"""All stages on a small experiment: what is skipped, what is redone, and that a SIGKILL
changes nothing.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hwnas.config import load_experiment
from hwnas.core.arch import Architecture
from hwnas.core.cost import latency_ms
from hwnas.core.spaces import load_space
from hwnas.core.table import LatencyTable
from hwnas.document import file_sha256
from hwnas.errors import ConfigError, SpaceError
from hwnas.experiments import experiment_space
from hwnas.nn.checkpoint import load_network
from hwnas.nn.supernet import load_supernet
from hwnas.pipeline import STAGES, Pipeline
from hwnas.progress import Progress
from hwnas.runs import MANIFEST, JsonLines, StageManifest, stage
from hwnas.search.result import SearchResult
from hwnas.verdict import Verdict
from tests.commands import Command
from tests.conftest import write_tiny

LASTING = ("profile/table.json", "search/arch.json", "search/search.json", "search/supernet.safetensors", "train/model.safetensors",
           "export/model-fp32.tflite", "export/model-int8.tflite")  # fmt: skip


class Lines(Progress):
    """Keeps the messages of a run."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def info(self, message: str) -> None:
        self.messages.append(message)


def hashes(run: Path) -> dict[str, str]:
    return {name: file_sha256(run / name) for name in LASTING}


def test_an_interrupted_stage_says_that_it_resumes(tmp_path: Path) -> None:
    lines, inputs = Lines(), {"seed": "0"}
    pipeline = Pipeline(load_experiment(write_tiny(tmp_path)), tmp_path / "run", lines)
    folder = tmp_path / "run" / "search"
    with pytest.raises(KeyboardInterrupt), stage(folder, "search", inputs, ["arch.json"]):
        raise KeyboardInterrupt
    assert pipeline.prepare_work("search", inputs, fresh=False)
    assert lines.messages == ["search: resumes"]


@pytest.mark.slow
def test_every_stage_ran_and_their_results_agree(finished_run: Path) -> None:
    for name in STAGES:
        assert StageManifest.load(finished_run / name / MANIFEST).state == "done"
    result = SearchResult.load(finished_run / "search" / "search.json")
    arch = Architecture.load(finished_run / "search" / "arch.json")
    table = LatencyTable.load(finished_run / "profile" / "table.json")
    assert result.candidates[0].predicted == pytest.approx(latency_ms(arch, table))
    assert abs(result.candidates[0].predicted / result.target - 1) <= 0.02
    verdict = Verdict.load(finished_run / "validate" / "verdict.json")
    assert {file.name for file in verdict.files} == {
        "model-fp32.tflite",
        "model-int8.tflite",
        "model.onnx",
    }
    assert all(abs(file.loss) < 0.05 for file in verdict.files if file.dtype == "fp32")
    assert (finished_run / "report" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_a_second_run_skips_everything(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    before = {
        path: path.stat().st_mtime_ns
        for path in run.rglob("*")
        if path.is_file() and path.name != "config.json"
    }
    lines = Lines()
    Pipeline(load_experiment(finished_run.parent / "tiny.toml"), run, lines).run()
    assert lines.messages == [f"{name}: up to date, skipped" for name in STAGES]
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_a_changed_stage_is_redone_and_the_old_one_kept(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    experiment = load_experiment(finished_run.parent / "tiny.toml", ["train.epochs=1"])
    lines = Lines()
    Pipeline(experiment, run, lines).run()
    assert [line for line in lines.messages if "skipped" in line] == [
        "profile: up to date, skipped",
        "search: up to date, skipped",
    ]
    assert file_sha256(run / "train.old-1" / "model.safetensors") == file_sha256(
        finished_run / "train" / "model.safetensors"
    )
    assert file_sha256(run / "train" / "model.safetensors") != file_sha256(
        finished_run / "train" / "model.safetensors"
    )


@pytest.mark.slow
def test_training_starts_from_the_super_nets_weights(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    Pipeline(
        load_experiment(finished_run.parent / "tiny.toml", ["train.weights=supernet"]),
        run,
        Progress(),
    ).run_stage("train")
    scratch, inherited = (
        JsonLines(folder / "train" / "metrics.jsonl").read() for folder in (finished_run, run)
    )
    assert inherited[0]["loss"] < scratch[0]["loss"] - 0.01
    colour = ["data.channels=3", "data.mean=[0,0,0]", "data.std=[1,1,1]", "space.name=mobile32"]
    other = load_experiment(
        finished_run.parent / "tiny.toml",
        ["train.weights=supernet", "train.arch=mobilenet_v2", *colour],
    )
    with pytest.raises(ConfigError, match="only fits the searched architecture"):
        Pipeline(other, run, Progress()).run_stage("train")


@pytest.mark.slow
def test_a_published_network_needs_no_search_and_no_table(tmp_path: Path) -> None:
    config = write_tiny(tmp_path)
    overrides = [
        "train.arch=mobilenet_v2",
        "space.name=mobile32",
        "data.channels=3",
        "data.mean=[0.3,0.3,0.3]",
        "data.std=[0.4,0.4,0.4]",
    ]
    overrides += [
        "data.resolution=32",
        "train.epochs=0.05",
        "validate.images=8",
        "export.calibration_images=4",
        "export.parity_images=4",
    ]
    Pipeline(load_experiment(config, overrides), tmp_path / "run", Progress()).run()
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == [
        "export",
        "report",
        "train",
        "validate",
    ]
    verdict = Verdict.load(tmp_path / "run" / "validate" / "verdict.json")
    assert (
        verdict.unpredicted == "there is no table of this device"
        and verdict.files[0].measured_ms > 0
    )


def test_an_architecture_can_be_given_in_the_notation_of_the_space(tmp_path: Path) -> None:
    cell = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|none~1|nor_conv_1x1~2|"
    overrides = [
        f"train.arch='{cell}'",
        "space.name=nasbench201",
        "space.width=0.25",
        "train.epochs=0.01",
    ]
    experiment = load_experiment(write_tiny(tmp_path), overrides)
    Pipeline(experiment, tmp_path / "run", Progress()).run_stage("train")
    trained = load_network(tmp_path / "run" / "train" / "model.safetensors").arch
    assert (
        trained.identity
        == experiment_space(experiment).decode(experiment_space(experiment).read(cell)).identity
    )
    with pytest.raises(SpaceError, match="did you mean 'nor_conv_3x3'"):
        wrong = load_experiment(
            tmp_path / "tiny.toml", [*overrides, f"train.arch='{cell.replace('3x3', '3x4')}'"]
        )
        Pipeline(wrong, tmp_path / "other", Progress())


def test_nasbench101_cells_train_and_positions_name_an_architecture(tmp_path: Path) -> None:
    """NAS-Bench-101's space has no cost per choice, so neither the plan nor the report
    may ask for it.
    """
    cell = """'{"matrix": [[0, 1, 0], [0, 0, 1], [0, 0, 0]], "ops": ["input", "conv1x1-bn-relu", "output"]}'"""
    overrides = [
        "space.name=nasbench101",
        "space.width=0.0625",
        "train.epochs=0.01",
        f"train.arch={cell}",
    ]
    pipeline = Pipeline(
        load_experiment(write_tiny(tmp_path), overrides), tmp_path / "run", Progress()
    )
    assert "train" in pipeline.plan() and "profile" not in pipeline.plan()
    pipeline.run_stage("train")
    pipeline.run_stage("report")
    assert 'id="course"' in (tmp_path / "run" / "report" / "report.html").read_text()
    by_positions = load_experiment(
        tmp_path / "tiny.toml", ["space.name=nasbench_macro", "train.arch=22212220"]
    )
    assert (
        by_positions.train.arch == "22212220"
        and Pipeline(by_positions, tmp_path / "other", Progress()).plan()
    )


def test_a_strategy_that_cannot_search_the_space_is_refused_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    wrong = load_experiment(write_tiny(tmp_path), ["space.name=nasbench201"])
    with pytest.raises(SpaceError, match="'tunas' is for chains of blocks"):
        Pipeline(wrong, tmp_path / "run", Progress()).run()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_tampered_output_is_redone(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "validate" / "verdict.json").write_text("{}")
    Pipeline(load_experiment(finished_run.parent / "tiny.toml"), run, Progress()).run()
    assert Verdict.load(run / "validate" / "verdict.json").passed
    assert (run / "validate.old-1" / "verdict.json").read_text() == "{}"


@pytest.mark.slow
def test_a_deleted_super_net_is_trained_again(finished_run: Path, tmp_path: Path) -> None:
    """Other runs may refer to it by ``search.weights``, so a search without it is not
    up to date.
    """
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "search" / "shared.safetensors").unlink()
    lines = Lines()
    Pipeline(load_experiment(finished_run.parent / "tiny.toml"), run, lines).run_stage("search")
    assert (
        lines.messages[0] == "search: inputs changed; the earlier results are now in search.old-1"
    )
    manifest = StageManifest.load(run / "search" / MANIFEST)
    assert manifest.state == "done" and manifest.outputs["shared.safetensors"] == file_sha256(
        run / "search" / "shared.safetensors"
    )


@pytest.mark.slow
def test_a_search_with_a_trained_super_net_stores_none_and_is_up_to_date(
    finished_run: Path, tmp_path: Path
) -> None:
    """It also notices when that super-net changes."""
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished_run, other)
    finder = "search.finder={name = 'random', architectures = 3}"
    overrides = [
        f"search.weights={other}",
        finder,
        f"search.table={finished_run / 'profile' / 'table.json'}",
        "search.random_samples=0",
    ]
    experiment = load_experiment(finished_run.parent / "tiny.toml", overrides)
    Pipeline(experiment, run, Progress()).run_stage("search")
    assert not (run / "search" / "shared.safetensors").exists()
    Pipeline(experiment, run, lines := Lines()).run_stage("search")
    assert lines.messages == ["search: up to date, skipped"]
    supernet = load_supernet(
        other / "search" / "shared.safetensors", load_space(str(finished_run.parent / "space.json"))
    )
    with torch.no_grad():
        supernet.classifier.bias.add_(0.5)
    supernet.save(other / "search" / "shared.safetensors")
    Pipeline(experiment, run, lines := Lines()).run_stage("search")
    assert lines.messages[0].startswith("search: inputs changed")


@pytest.mark.slow
def test_a_proxys_weights_cannot_initialise_training(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    for proxy in ("proxy_depth=1", "proxy_width=0.5"):
        short = [
            f"search.supernet.{proxy}",
            "search.epochs=0.2",
            "search.candidates=1",
            "search.random_samples=0",
        ]
        config, inherits = finished_run.parent / "tiny.toml", "train.weights=supernet"
        with pytest.raises(
            ConfigError,
            match=(
                r"needs a super-net of full size, and search\.supernet\.proxy_width or proxy_depth"
                r" makes it"
            ),
        ):
            Pipeline(load_experiment(config, [*short, inherits]), run, Progress()).run_stage(
                "search"
            )
        Pipeline(load_experiment(config, short), run, Progress()).run_stage("search")
        with pytest.raises(
            ConfigError,
            match=(
                r"needs a super-net of full size, and this one was a proxy: set train\.weights ="
                r" 'scratch'"
            ),
        ):
            Pipeline(load_experiment(config, [inherits]), run, Progress()).run_stage("train")
    assert file_sha256(run / "train" / "model.safetensors") == file_sha256(
        finished_run / "train" / "model.safetensors"
    )


@pytest.mark.slow
def test_changed_images_make_the_stages_that_read_them_run_again(
    finished_run: Path, tmp_path: Path
) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(finished_run, run)
    rng = np.random.default_rng(0)

    def write() -> None:
        data.mkdir(exist_ok=True)
        for name in ("train", "test"):
            np.savez(
                data / f"{name}.npz",
                x=rng.integers(0, 255, (200, 8, 8), dtype=np.uint8),
                y=rng.integers(0, 10, 200),
            )

    experiment = load_experiment(
        finished_run.parent / "tiny.toml", ["data.name=npz", f"data.path={data}"]
    )
    for expected in ["search: inputs changed", "search: inputs changed"]:
        write()
        lines = Lines()
        Pipeline(experiment, run, lines).run_stage("profile")
        Pipeline(experiment, run, lines).run_stage("search")
        assert lines.messages[0] == "profile: up to date, skipped"
        assert lines.messages[1].startswith(expected)
    Pipeline(experiment, run, lines := Lines()).run_stage("search")
    assert lines.messages == ["search: up to date, skipped"]


def lines_in(path: Path, count: int) -> Callable[[], bool]:
    return lambda: path.exists() and path.read_bytes().count(b"\n") >= count


def started(folder: Path) -> Callable[[], bool]:
    return (folder / MANIFEST).exists


@pytest.mark.slow
def test_a_run_killed_in_every_stage_ends_the_same(finished_run: Path, tmp_path: Path) -> None:
    """One run, killed with SIGKILL in the middle of each stage, against one that was
    not. The delay slows the simulated device down, so that there is time to kill it.
    """
    config = write_tiny(tmp_path, delay_ms=4)
    run = tmp_path / "run"
    arguments = ["run", str(config), "--out", str(run), "-q"]
    moments = {
        "profile": lines_in(run / "profile" / "samples.jsonl", 20),
        "search": lines_in(run / "search" / "metrics.jsonl", 20),
        "train": lines_in(run / "train" / "metrics.jsonl", 15),
        "export": (run / "export" / "model-fp32.tflite").exists,
        "validate": started(run / "validate"),
        "report": started(run / "report"),
    }
    for name, reached in moments.items():
        command = Command(arguments)
        assert command.kill_once(reached) == -signal.SIGKILL, (
            f"{name} was over before it could be killed: {command.stderr}"
        )
        assert StageManifest.load(run / name / MANIFEST).state == "started", (
            f"{name} was over before it could be killed"
        )
    assert Command(arguments).wait() == 0
    assert StageManifest.load(run / "report" / MANIFEST).state == "done"
    assert hashes(run) == hashes(finished_run)
    assert not list(tmp_path.rglob("*.old-*")) and list(run.rglob(".*")) == [run / ".lock"]
