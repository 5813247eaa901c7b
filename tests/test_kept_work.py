"""Work is kept: a stage is repeated for changes of what it reads, and for nothing else."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hwnas.config import load_experiment
from hwnas.core.table import LatencyTable
from hwnas.errors import DataError, DocumentError, UnreadableImageError, UserError
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress, ProgressBar
from hwnas.runs import MANIFEST, stage
from hwnas.search.result import SearchResult
from hwnas.testing import synthetic_table
from hwnas.unreadable import FILE, Unreadable
from tests.conftest import digits_space, write_tiny
from tests.data.test_fingerprint import write_folder


class Lines(Progress):
    """Keeps the messages of a run."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def info(self, message: str) -> None:
        self.messages.append(message)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small experiment on two classes of images in a folder, with a table."""
    write_tiny(tmp_path)
    space = digits_space().model_copy(update={"classes": 2})
    space.save(tmp_path / "space.json")
    synthetic_table(space).save(tmp_path / "table.json")
    write_folder(tmp_path / "data", per_class=20)
    return tmp_path


def pipeline(
    project: Path, *overrides: str, progress: Progress | None = None, root: str = "run"
) -> Pipeline:
    settings = [
        "data.name=folder",
        f"data.path={project / 'data'}",
        f"search.table={project / 'table.json'}",
        "search.epochs=3",
        "search.batch_size=8",
        "search.recalibration_images=8",
        "train.epochs=1",
        *overrides,
    ]
    experiment = load_experiment(project / "tiny.toml", settings)
    return Pipeline(experiment, project / root, progress or Progress())


def inputs_of(project: Path, stage: str, *overrides: str) -> dict[str, str]:
    return pipeline(project, *overrides).stage(stage).inputs()


def moved_data(project: Path) -> list[str]:
    shutil.move(project / "data", project / "elsewhere")
    return [f"data.path={project / 'elsewhere'}"]


def changed_test_images(project: Path) -> list[str]:
    (project / "data/val/cat/0.png").unlink()
    return []


def stray_files(project: Path) -> list[str]:
    (project / "data/train/cat/.DS_Store").write_bytes(b"macOS")
    (project / "data/train/cat/notes.txt").write_text("x")
    (project / "data/train/.ipynb_checkpoints").mkdir()
    return []


def copied_table(project: Path) -> list[str]:
    shutil.copy(project / "table.json", project / "the same.json")
    return [f"search.table={project / 'the same.json'}"]


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        (lambda project: [f"data.path={project}/data/../data"], ("search", "train")),
        (lambda project: ["data.workers=2"], ("search", "train")),
        (lambda project: ['data.unreadable="skip"'], ("search", "train")),
        (moved_data, ("search", "train")),
        (stray_files, ("search", "train")),
        (copied_table, ("search", "train")),
        (changed_test_images, ("search",)),
        (lambda project: ["data.held_out=0.3"], ("train",)),
    ],
    ids=["spelling", "workers", "unreadable", "moved", "stray", "table", "val", "held_out"],
)
def test_a_change_of_what_a_stage_does_not_read_keeps_its_work(
    change: Callable[[Path], list[str]], stages: tuple[str, ...], project: Path
) -> None:
    arch = ['train.arch="0 0 0"']
    before = {stage: inputs_of(project, stage, *arch) for stage in ("search", "train")}
    overrides = change(project)
    after = {stage: inputs_of(project, stage, *arch, *overrides) for stage in before}
    assert {stage for stage in before if before[stage] == after[stage]} == {*stages}


def removed_image(project: Path) -> list[str]:
    (project / "data/train/cat/0.png").unlink()
    return []


def other_table(project: Path) -> list[str]:
    table = LatencyTable.load(project / "table.json")
    header = table.header.model_copy(update={"threads": 4})
    table.model_copy(update={"header": header}).save(project / "table.json")
    return []


@pytest.mark.parametrize(
    "change",
    [
        lambda project: ["data.held_out=0.3"],
        lambda project: ["search.epochs=4"],
        removed_image,
        other_table,
    ],
    ids=["held_out", "epochs", "image", "table"],
)
def test_a_change_of_what_a_search_reads_is_noticed(
    change: Callable[[Path], list[str]], project: Path
) -> None:
    before = inputs_of(project, "search")
    overrides = change(project)
    assert inputs_of(project, "search", *overrides) != before


# Images that do not decode


def damage(image: Path) -> None:
    """Cut a file off, as an interrupted copy does."""
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])


class DamagesAnImage(Progress):
    """Damages a training image in the middle of the search, after everything was checked."""

    def __init__(self, image: Path, at_step: int) -> None:
        self.image = image
        self.at_step = at_step

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[ProgressBar]:
        outer = self

        class Bar(ProgressBar):
            def advance(self, steps: int = 1, note: str = "") -> None:
                if "searching" not in description:
                    return
                outer.at_step -= steps
                if outer.at_step == 0:
                    damage(outer.image)

        yield Bar()


def logged_steps(project: Path) -> int:
    return (project / "run/search/metrics.jsonl").read_bytes().count(b"\n")


@pytest.mark.slow
@pytest.mark.parametrize("repair", ["removed", "replaced"])
def test_a_search_resumes_once_an_image_that_stopped_it_is_gone(repair: str, project: Path) -> None:
    image = project / "data/train/cat/7.png"
    original = image.read_bytes()
    with pytest.raises(UnreadableImageError) as caught:
        pipeline(project, progress=DamagesAnImage(image, 3)).run_stage("search")
    message = str(caught.value)
    assert "cat/7.png" in message and "resumes" in message and "\n" not in message
    done = logged_steps(project)
    assert 3 <= done < 12

    # until the user has done something, the same command asks for it again
    with pytest.raises(DataError, match=r"cat/7\.png"):
        pipeline(project).run_stage("search")

    if repair == "removed":
        image.unlink()
    else:
        image.write_bytes(original)
    lines = Lines()
    pipeline(project, progress=lines).run_stage("search")
    assert "search: resumes" in lines.messages
    assert any(FILE in line for line in lines.messages)
    assert list(Unreadable.of_run(project / "run").images) == ["train/cat/7.png"]
    assert SearchResult.load(project / "run/search/search.json").steps == 12
    assert not list(project.glob("run/*.old-*"))

    lines = Lines()
    pipeline(project, progress=lines).run_stage("search")
    assert lines.messages[-1] == "search: up to date, skipped"


@pytest.mark.slow
def test_with_skip_a_search_goes_past_an_image_by_itself(project: Path) -> None:
    image = project / "data/train/dog/3.png"
    skip = 'data.unreadable="skip"'
    pipeline(project, skip, progress=DamagesAnImage(image, 3)).run_stage("search")
    assert list(Unreadable.of_run(project / "run").images) == ["train/dog/3.png"]
    lines = Lines()
    pipeline(project, skip, progress=lines).run_stage("search")
    assert lines.messages[-1] == "search: up to date, skipped"


def test_images_are_left_out_before_the_search_starts(project: Path) -> None:
    damage(project / "data/train/cat/7.png")
    with pytest.raises(DataError, match=r"cat/7\.png"):
        pipeline(project).run_stage("search")
    assert not (project / "run").exists()

    subject = pipeline(project, 'data.unreadable="skip"', "search.epochs=0.5")
    subject.run_stage("search")
    assert subject.experiment.data.skip == ("train/cat/7.png",)
    assert "truncated" in Unreadable.of_run(project / "run").images["train/cat/7.png"]


def test_a_finished_search_is_kept_when_a_later_check_asks_to_remove_an_image(
    project: Path,
) -> None:
    pipeline(project, "search.epochs=0.5").run_stage("search")
    image = project / "data/train/cat/7.png"
    size = image.stat().st_size
    # damaged without a change of its size, so no fingerprint can tell
    image.write_bytes(b"\0" * size)
    with pytest.raises(DataError, match=r"cat/7\.png"):
        pipeline(project, "search.epochs=0.5").run_stage("search")
    image.unlink()
    lines = Lines()
    pipeline(project, "search.epochs=0.5", progress=lines).run_stage("search")
    assert lines.messages[-1] == "search: up to date, skipped"


def test_a_fresh_run_uses_a_replaced_image_again(project: Path) -> None:
    run = project / "run"
    run.mkdir()
    Unreadable(images={"train/cat/7.png": "truncated"}).save(run / FILE)
    subject = pipeline(project, "search.epochs=0.5", 'train.arch="0 0 0"')
    assert subject.experiment.data.skip == ("train/cat/7.png",)
    subject._forget_left_out()
    assert subject.experiment.data.skip == () and not (run / FILE).exists()
    assert (run / f"{FILE}.old-1").is_file()


def test_a_report_needs_no_images(project: Path) -> None:
    """The data of a finished run may be gone."""
    Unreadable(images={"train/cat/7.png": "truncated"}).save(project / "run" / FILE)
    subject = pipeline(project, "data.classes=2")
    shutil.rmtree(project / "data")
    subject.run_stage("report")
    assert "train/cat/7.png" in (project / "run/report/report.html").read_text()


# Damaged run folders


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"schema": "hwnas.stage/1"}'])
def test_a_damaged_manifest_names_the_way_out_and_nothing_is_moved(
    content: bytes, tmp_path: Path
) -> None:
    """As a power cut may leave it. What is beside it may be worth days."""
    subject = Pipeline(load_experiment(write_tiny(tmp_path)), tmp_path / "run", Progress())
    folder = tmp_path / "run/search"
    inputs = {"seed": "0"}
    with pytest.raises(KeyboardInterrupt), stage(folder, "search", inputs, []):
        raise KeyboardInterrupt
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(DocumentError) as caught:
        subject.prepare_work("search", inputs, fresh=False)
    assert "--fresh" in str(caught.value) and "\n" not in str(caught.value)
    assert (folder / MANIFEST).read_bytes() == content

    assert subject.prepare_work("search", inputs, fresh=True)
    assert (tmp_path / "run/search.old-1" / MANIFEST).read_bytes() == content


def test_a_file_that_is_not_what_its_stage_wrote_is_reported(tmp_path: Path) -> None:
    subject = Pipeline(load_experiment(write_tiny(tmp_path)), tmp_path / "run", Progress())
    folder = tmp_path / "run/train"
    folder.mkdir(parents=True)
    with stage(folder, "train", {}, ["model.safetensors"]):
        (folder / "model.safetensors").write_bytes(b"weights")
    path = folder / "model.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subject.folder.hash_of(path, "train")
    path.write_bytes(b"wEights")
    with pytest.warns(UserWarning, match=r"is not the file that 'hwnas train' wrote"):
        subject.folder.hash_of(path, "train")


@pytest.mark.slow
def test_a_damaged_input_does_not_set_earlier_results_aside(
    finished_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    config = finished_run.parent / "tiny.toml"
    for name, file in (("export", "train/model.safetensors"), ("report", "search/search.json")):
        content = (run / file).read_bytes()
        (run / file).write_bytes(content[:-100])
        with pytest.raises(UserError):
            Pipeline(load_experiment(config), run, Progress()).run_stage(name)
        assert (run / name / MANIFEST).is_file()
        (run / file).write_bytes(content)
    assert not list(tmp_path.rglob("*.old-*"))
