"""Files that somebody else made: they choose no folder, run nothing, and say nothing to
the terminal but text. Settings that make no sense are refused before any work.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from hwnas.core.table import LatencyTable
from hwnas.runs import save_config
from tests.conftest import digits_space, write_tiny
from tests.fuzz.driving import Outcome, contents, run, survives
from tests.report import test_comparing, test_report

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\u2066"
"""It would set the title of a terminal, clear it, and reverse what follows."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small experiment, from which commands are run."""
    write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome
    assert len(outcome.errors) == 1 and outcome.err.splitlines()[-1] == outcome.errors[0], outcome
    for word in words:
        assert word in outcome.errors[0], outcome


@pytest.mark.parametrize(
    "name", ["/etc/x", "../..", "..", ".", "a/b", "a\\b", "", "  ", "x\ny", "\x1b[2J", "\u202ex", "n" * 300]
)  # fmt: skip
def test_a_name_is_no_path(folder: Path, name: str) -> None:
    text = (folder / "tiny.toml").read_text().replace('name = "tiny"', f"name = {json.dumps(name)}")
    (folder / "tiny.toml").write_text(text)
    before = contents(folder)
    refused(
        run("profile", "tiny.toml"), "name = ", "printable characters without / and \\", "--out"
    )
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["tiny", "CIFAR-10, 30 epochs", "caf\u00e9", "v1.2_b", ".hidden"])
def test_names_of_before_are_names(folder: Path, name: str) -> None:
    outcome = run("run", "tiny.toml", "--plan", "-q", "-s", f"name='{name}'")
    assert outcome.code == 0 and f"runs/{name}/report" in outcome.out, outcome


def test_the_name_of_a_file_is_no_path_either(folder: Path) -> None:
    (folder / "..toml").write_text("")
    refused(run("profile", "..toml"), "..toml gives its run folder no name")
    (folder / "good.toml").write_text("")
    assert "runs/good/report" in run("run", "good.toml", "--plan", "-q").out


def test_documents_cannot_control_the_terminal(folder: Path) -> None:
    table = test_report.make_table(digits_space())
    header = table.header.model_copy(update={"device": EVIL, "cpu": EVIL})
    LatencyTable.model_validate({**dict(table), "header": header}).save(folder / "table.json")
    digits_space(EVIL).save(folder / "space.json")
    for arguments in (
        ("table", "show", "table.json"),
        ("table", "show", "table.json", "--json"),
        ("table", "compare", "table.json", "table.json"),
        ("space", "space.json"),
        ("space", "space.json", "--json"),
        ("run", "tiny.toml", "--plan", "-q"),
    ):
        outcome = survives(folder, *arguments)
        assert outcome.code == 0 and "\\u202egnp.exe" in outcome.out, outcome
        if "--json" in arguments:
            assert json.loads(outcome.out)["schema"].startswith("hwnas.")


def test_errors_cannot_control_the_terminal(folder: Path) -> None:
    content = json.loads(digits_space().to_json())
    (folder / "space.json").write_text(json.dumps({**content, EVIL: 1}, ensure_ascii=False))
    refused(survives(folder, "space", "space.json"), "unknown key", "gnp.exe")
    refused(survives(folder, "space", f"{EVIL}.json"), "\\u202egnp.exe\\u2066.json does not exist")
    refused(survives(folder, "run", "tiny.toml", "-s", f"data.name={EVIL}"), "gnp.exe")


@pytest.mark.slow
def test_a_report_shows_names_as_text(tmp_path: Path) -> None:
    experiment = test_report.experiment(name="<script>alert(1)</script>".replace("/", "-"))
    root = test_report.fill(tmp_path / "run", experiment, until="profile").root
    table = LatencyTable.load(root / "profile" / "table.json")
    header = table.header.model_copy(update={"device": "<img src=x onerror=alert(1)>", "cpu": EVIL})
    table.model_copy(update={"header": header}).save(root / "profile" / "table.json")
    save_config(root, experiment)
    assert run("report", root).code == 0
    page = (root / "report" / "report.html").read_text()
    assert "<script>alert" not in page and "<img src=x" not in page
    assert "\x1b" not in page and "\u202e" not in page and "\\u202egnp.exe" in page


@pytest.mark.slow
def test_documents_that_contradict_each_other_are_one_sentence(tmp_path: Path) -> None:
    root = tmp_path / "run"
    test_comparing.make_study(architectures=0).save(root / "compare" / "compare.json")
    save_config(root, test_report.experiment())
    refused(
        survives(tmp_path, "report", root, writes=("run/report/",)),
        "contradict each other (ZeroDivisionError('division by zero'))",
        "restore those that were changed",
    )
    assert not (root / "report" / "report.html").exists()


HUGE = "9" * 5000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"seed = {HUGE}", "is not valid TOML"),
        ("seed = 0x" + "f" * 9000, "seed = a number of thousands of digits"),
        ("name = " + "[" * 5000, "is not valid TOML"),
        ("name = " + "{a = " * 3000, "is not valid TOML"),
        ("[" + ".".join(["a"] * 3000) + "]", "is nested more than 32 levels deep"),
        (f'[space]\nname = "{"x" * 5000}.json"', "File name too long"),
        (f'[data]\nname = "npz"\npath = "{"x" * 5000}"', "File name too long"),
        ("name = '\\x'\nname = 'y'", "is not valid TOML"),
    ],
)  # fmt: skip
def test_toml_that_would_break_its_reader(folder: Path, text: str, words: str) -> None:
    (folder / "bad.toml").write_text(text)
    started = time.process_time()
    refused(survives(folder, "run", "bad.toml", "--plan", "-q"), words)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("verb", "key", "value", "words"),
    [
        ("search", "search.table", "~nobody-at-all/x", "of a user who does not exist"),
        ("search", "search.table", '"a\\u0000b"', "is not a path (embedded null byte)"),
        ("search", "search.table", "x" * 5000, "File name too long"),
        ("search", "search.weights", "~nobody-at-all/x", "of a user who does not exist"),
        ("train", "train.arch", "x" * 5000 + ".json", "File name too long"),
        ("train", "train.backbone", "~nobody-at-all/x", "train.backbone"),
        ("profile", "profile.prior", "['~nobody-at-all/x']", "of a user who does not exist"),
        ("study rank", "study.truth", "~nobody-at-all/x", "of a user who does not exist"),
    ],
)
def test_what_cannot_be_a_path(folder: Path, verb: str, key: str, value: str, words: str) -> None:
    more = {
        "profile.prior": ["-s", "profile.mode=networks"],
        "search.weights": ["-s", "search.table=tiny.toml"],
    }
    arguments = (*verb.split(), "tiny.toml", "-s", f"{key}={value}", *more.get(key, []))
    refused(survives(folder, *arguments, writes=("runs/",)), words)


def test_a_configuration_without_an_end_is_not_read_to_its_end(folder: Path) -> None:
    refused(survives(folder, "run", "/dev/zero", "--plan", "-q"), "/dev/zero is not valid TOML")


@pytest.mark.parametrize(
    ("content", "name"),
    [("\ufeffname = 'bom'".encode(), "bom"), ("name = 'wide'".encode("utf-16"), "wide")],
)
def test_a_configuration_of_windows_is_read(folder: Path, content: bytes, name: str) -> None:
    (folder / "x.toml").write_bytes(content)
    assert f"experiment {name} in runs/{name}" in run("run", "x.toml", "--plan", "-q").out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (f"seed={HUGE}", "seed"),
        ("train.epochs=" + "[" * 5000, "train.epochs"),
        (".".join(["a"] * 5000) + "=1", "nested more than 32 levels"),
        ("study.seeds=[" + ",".join(map(str, range(20_000))) + "]", "at most 1000 items"),
        ("data.skip=" + "{a=" * 3000, "data.skip"),
    ],
)
def test_overrides_that_would_break_their_reader(folder: Path, override: str, words: str) -> None:
    started = time.process_time()
    refused(survives(folder, "run", "tiny.toml", "--plan", "-q", "-s", override), words)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "override",
    [
        "train.optimizer.clip_norm=0", "search.optimizer.clip_norm=-1", "train.optimizer.momentum=1",
        "train.optimizer.momentum=-0.1", "train.optimizer.lr=1e30", "train.optimizer.weight_decay=1e300",
        "train.optimizer.options={alpha=1e300}", "space.width=1e300", "space.width=17", "data.classes=1000000",
        "data.resolution=100000", "data.workers=100000", "train.epochs=1e300", "train.epochs=nan", "train.batch_size=1e10",
        "search.candidates=10000000", "profile.rounds=1000000", "profile.min_ms=1e300", "device.threads=100000",
        "study.processes=100000", "study.seeds=[-1]", "shrink.samples=100000000", "checkpoint_seconds=1e300",
        "search.target_ms=1e300", "search.limits=[{kind='macs', max_macs=1e300}]", "search.objective={name='absolute', beta=-1e300}",
        "validate.accuracy_tolerance=2", "train.epochs=true", "seed=false", "data.classes=true", "data.mean=[true]",
        "profile.networks=true", "search.limits=[{kind='macs', max_macs=true}]", "device.cores=[true]",
        "export.formats=['onnx', 'onnx']", "space.restrict={resolution=[true]}",
        "search.strategy={name='tunas', entropy=1e300}", "search.strategy={name='tunas', entropy=nan}",
        "search.strategy={name='tunas', architectures=true}", "search.strategy={name='spos', population=10000000}",
        "search.strategy={name='pdarts', cells=[1, 3, 1000000]}",
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_at_once(folder: Path, override: str) -> None:
    started = time.process_time()
    key = re.findall(r"(\w+) ?=", override)[-1]
    refused(survives(folder, "run", "tiny.toml", "--plan", "-q", "-s", override), key)
    assert time.process_time() - started < 3
