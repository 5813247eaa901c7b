"""Documents of every kind, damaged: each command that reads one ends with its result or
one sentence.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from hwnas.core.spaces import SPACES
from hwnas.devices.device import Device
from hwnas.runs import JsonLines, save_config
from tests.conftest import digits_space, write_tiny
from tests.fuzz.damage import VALUES, changed, damaged, damaged_json, fuzzed
from tests.fuzz.driving import survives
from tests.report import test_comparing, test_ranking, test_report, test_shrinking

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the damaged files of one example after the other."""
    return tmp_path_factory.mktemp("fuzz")


def stored(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def as_written(document: Any) -> Any:
    return json.loads(document.to_json())


SPACE_DOCUMENTS = [as_written(digits_space())] + [
    as_written(SPACES[name]()) for name in ("mobile32", "nasbench201", "nasbench101", "darts")
]
TABLE = as_written(test_report.make_table(digits_space()))


@fuzzed(30)
@given(content=st.sampled_from(SPACE_DOCUMENTS).flatmap(damaged_json))
def test_spaces(folder: Path, content: bytes) -> None:
    path = stored(folder, "space.json", content)
    survives(folder, "space", path)


@fuzzed(20)
@given(content=damaged_json(TABLE))
def test_tables(folder: Path, content: bytes) -> None:
    path = stored(folder, "table.json", content)
    survives(folder, "table", "show", path)
    other = stored(folder, "other.json", json.dumps(TABLE).encode())
    survives(folder, "table", "compare", path, other)
    space = stored(folder, "space.json", json.dumps(SPACE_DOCUMENTS[0]).encode())
    survives(folder, "space", space, path)


DEVICES = [
    as_written(Device(id="a", soc="b", connection="simulated", options={"delay_ms": "0"})),
    as_written(Device(id="a", soc="b", connection="ssh", options={"host": "u@h", "port": "22"})),
    as_written(Device(id="a", soc="b", connection="adb", cores=(0, 1), options={"serial": "x"})),
]


@fuzzed(20)
@given(content=st.sampled_from(DEVICES).flatmap(damaged_json))
def test_devices(folder: Path, content: bytes) -> None:
    config = write_tiny(folder)
    stored(folder, "device.json", content)
    survives(folder, "run", config, "--plan", "-q", "--out", folder / "none")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with documents of every kind. They are made in code, so that nothing
    is trained.
    """
    root = tmp_path_factory.mktemp("finished") / "run"
    test_report.fill(root, test_report.experiment())
    save_config(root, test_report.experiment())
    detection = test_report.fill_detection(root.parent / "detection").root
    shutil.copy(detection / "train" / "pictures.json", root / "train")
    studies = {
        "rank/study.json": test_ranking.make_study(),
        "compare/compare.json": test_comparing.make_study(),
        "shrink/shrink.json": test_shrinking.make_study(),
    }
    for name, study in studies.items():
        study.save(root / name)
    rows = JsonLines(root / "train" / "metrics.jsonl").read()
    for log in ("search/metrics.jsonl", "train/metrics.jsonl", "train/validation.jsonl"):
        JsonLines(root / log).rewrite([{**row, "images": 360} for row in rows[::50]])
    return root


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Figures are laid out but not written, which would take most of the time."""
    page = '<svg viewBox="0 0 1 1"></svg>'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _, file, **__: file.write(page))
        yield


REPORTED = (
    "config.json",
    "profile/table.json",
    "search/search.json",
    "search/arch.json",
    "train/stage.json",
    "train/train.json",
    "train/pictures.json",
    "export/bundle.json",
    "validate/verdict.json",
    "rank/study.json",
    "compare/compare.json",
    "shrink/shrink.json",
)


STUDIES = ("rank", "compare", "shrink")
LOGS = ("search/metrics.jsonl", "train/metrics.jsonl", "train/validation.jsonl")


def reported(folder: Path, finished: Path, name: str, content: bytes) -> None:
    """The report of the finished run with one damaged file. Where that file is a study or
    a log, there is little else, because most of the time goes into the figures.
    """
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    stage = name.partition("/")[0]
    if stage in STUDIES:
        run.mkdir()
        shutil.copy(finished / "config.json", run)
    elif name in LOGS:
        run.mkdir()
        shutil.copy(finished / "config.json", run)
        shutil.copytree(finished / stage, run / stage, ignore=shutil.ignore_patterns("*.json"))
    else:
        shutil.copytree(finished, run, ignore=shutil.ignore_patterns(*STUDIES, "*.jsonl"))
    stored(run, name, content)
    survives(folder, "report", run, writes=("run/report/", "run/config.json"))


@pytest.mark.parametrize("name", REPORTED)
@fuzzed(4)
@given(data=st.data())
def test_documents_of_a_run(
    folder: Path, finished: Path, undrawn: None, name: str, data: st.DataObject
) -> None:
    content = json.loads((finished / name).read_text())
    reported(folder, finished, name, data.draw(damaged_json(content)))


@pytest.mark.parametrize("name", LOGS)
@fuzzed(4)
@given(data=st.data())
def test_logs_of_a_run(
    folder: Path, finished: Path, undrawn: None, name: str, data: st.DataObject
) -> None:
    rows = [json.loads(line) for line in (finished / name).read_text().splitlines()]
    rows = data.draw(changed(rows))
    rows.insert(data.draw(st.integers(0, 3)), data.draw(st.sampled_from(VALUES)))
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if data.draw(st.booleans()):
        lines = data.draw(damaged(lines))
    reported(folder, finished, name, lines)
