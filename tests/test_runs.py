"""Run folders: which stages are up to date, which resume, which start over, and that
nothing earlier is lost.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas import __version__
from hwnas.config import load_experiment
from hwnas.document import file_sha256
from hwnas.errors import DocumentError, StorageError, UserError
from hwnas.runs import (
    MANIFEST,
    JsonLines,
    StageManifest,
    load_config,
    locked,
    prepare,
    save_config,
    set_aside,
    stage,
    state_of,
)

INPUTS = {"space.json": "11", "table.json": "22"}


def finished(folder: Path, inputs: dict[str, str] = INPUTS) -> Path:
    """A stage that wrote two files."""
    with stage(folder, "search", inputs, ["arch.json", "sub.bin"]):
        (folder / "arch.json").write_text("arch")
        (folder / "sub.bin").write_bytes(b"\0\1")
        (folder / "metrics.jsonl").write_text("{}\n")
    return folder


def interrupted(folder: Path) -> Path:
    """A stage that was killed in the middle."""
    with pytest.raises(KeyboardInterrupt), stage(folder, "search", INPUTS, ["arch.json"]):
        (folder / "checkpoint.pt").write_bytes(b"half")
        raise KeyboardInterrupt
    return folder


def test_a_folder_that_is_absent_or_empty_is_new(tmp_path: Path) -> None:
    assert state_of(tmp_path / "absent", INPUTS) == "new"
    (tmp_path / "empty").mkdir()
    assert state_of(tmp_path / "empty", INPUTS) == "new"


def test_a_finished_stage_is_done(tmp_path: Path) -> None:
    folder = finished(tmp_path / "search")
    assert state_of(folder, INPUTS) == "done"
    assert state_of(folder, dict(reversed(INPUTS.items()))) == "done"
    manifest = StageManifest.load(folder / MANIFEST)
    assert (manifest.stage, manifest.state, manifest.hwnas, manifest.inputs) == (
        "search",
        "done",
        __version__,
        INPUTS,
    )
    assert manifest.outputs == {
        name: file_sha256(folder / name) for name in ("arch.json", "sub.bin")
    }


def test_an_interrupted_stage_resumes_with_its_files(tmp_path: Path) -> None:
    folder = interrupted(tmp_path / "search")
    assert state_of(folder, INPUTS) == "resume"
    with stage(folder, "search", INPUTS, ["arch.json"]):
        assert (folder / "checkpoint.pt").read_bytes() == b"half"
        assert state_of(folder, INPUTS) == "resume"
        (folder / "arch.json").write_text("arch")
    assert state_of(folder, INPUTS) == "done"
    assert [path.name for path in tmp_path.iterdir()] == ["search"]


@pytest.mark.parametrize(
    "inputs",
    [{**INPUTS, "table.json": "23"}, {"space.json": "11"}, {**INPUTS, "arch.json": "33"}, {}],
)
def test_changed_inputs_make_a_stage_stale(tmp_path: Path, inputs: dict[str, str]) -> None:
    assert state_of(finished(tmp_path / "done"), inputs) == "stale"
    assert state_of(interrupted(tmp_path / "started"), inputs) == "stale"


def test_tampered_or_missing_outputs_make_a_stage_stale(tmp_path: Path) -> None:
    folder = finished(tmp_path / "search")
    (folder / "sub.bin").write_bytes(b"\0\2")
    assert state_of(folder, INPUTS) == "stale"
    (folder / "sub.bin").write_bytes(b"\0\1")
    assert state_of(folder, INPUTS) == "done"
    (folder / "metrics.jsonl").write_text("not an output\n")
    assert state_of(folder, INPUTS) == "done"
    (folder / "arch.json").unlink()
    assert state_of(folder, INPUTS) == "stale"


def test_files_without_a_manifest_are_stale(tmp_path: Path) -> None:
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "arch.json").write_text("whose?")
    assert state_of(tmp_path / "search", INPUTS) == "stale"


def test_a_corrupt_manifest_is_named(tmp_path: Path) -> None:
    folder = finished(tmp_path / "search")
    manifest = folder / MANIFEST
    manifest.write_bytes(manifest.read_bytes()[:50])
    with pytest.raises(DocumentError, match=r"search/stage\.json is not valid JSON"):
        state_of(folder, INPUTS)


def test_an_output_that_was_not_written_leaves_the_stage_unfinished(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match="promised"),
        stage(tmp_path / "s", "search", INPUTS, ["promised.json"]),
    ):
        pass
    assert state_of(tmp_path / "s", INPUTS) == "resume"


def test_setting_aside_numbers_the_folders_and_keeps_everything(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        folder = finished(tmp_path / "search", {**INPUTS, "table.json": f"new {number}"})
        assert set_aside(folder) == tmp_path / f"search.old-{number}"
        assert (tmp_path / f"search.old-{number}" / "arch.json").read_text() == "arch"
        assert (
            state_of(tmp_path / f"search.old-{number}", {**INPUTS, "table.json": f"new {number}"})
            == "done"
        )
    assert not (tmp_path / "search").exists()


def test_a_run_folder_is_for_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(UserError, match="another hwnas is running"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass


def test_setting_aside_returns_the_new_place_or_says_why_it_failed(tmp_path: Path) -> None:
    (tmp_path / "train.old-1").mkdir()
    folder = finished(tmp_path / "train")
    assert set_aside(folder) == tmp_path / "train.old-2"
    assert not folder.exists()
    with pytest.raises(
        StorageError, match=r"train cannot be moved to train\.old-3 \(No such file or directory\)"
    ):
        set_aside(folder)


def test_a_run_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StorageError,
        match=r"file/run cannot be created \(Not a directory\): choose another --out folder",
    ):
        prepare(tmp_path / "file" / "run")
    prepare(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_the_configuration_of_a_run_reads_back(tmp_path: Path) -> None:
    experiment = load_experiment(
        None,
        ["search.target_ms=2", "validate.rounds=3", "search.strategy={name='tunas', rl_lr=0.5}"],
    )
    save_config(tmp_path, experiment)
    assert load_config(tmp_path) == experiment
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["validate"]["rounds"] == 3
    assert stored["train"]["label_smoothing"] == 0.1  # defaults are written out
    with pytest.raises(
        UserError, match=r"is not a run folder .*give the --out folder of an earlier hwnas run"
    ):
        load_config(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not a run folder"):
        load_config(tmp_path)


# ---- JSON lines

ROWS = [
    {"step": 0, "loss": 1.5},
    {"step": 1, "loss": 1.25, "name": "Ü\n"},
    {"step": 2, "loss": 1.125},
]


def written(path: Path) -> JsonLines:
    lines = JsonLines(path)
    with lines.appending() as append:
        for row in ROWS:
            append(row)
    return lines


def test_rows_read_back(tmp_path: Path) -> None:
    lines = written(tmp_path / "deep" / "metrics.jsonl")
    assert lines.read() == ROWS
    lines.rewrite(ROWS[:1])
    assert lines.read() == ROWS[:1]
    assert JsonLines(tmp_path / "absent.jsonl").read() == []


def test_a_row_is_in_the_file_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m.jsonl")
    with lines.appending() as append:
        for count, row in enumerate(ROWS, start=1):
            append(row)
            assert lines.read() == ROWS[:count]


def test_a_file_cut_off_anywhere_gives_its_complete_lines_and_can_be_appended_to(
    tmp_path: Path,
) -> None:
    path = tmp_path / "m.jsonl"
    content = written(path).path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        complete = ROWS[: sum(end <= length for end in ends)]
        assert JsonLines(path).read() == complete
        with JsonLines(path).appending() as append:
            append({"step": 9})
        assert JsonLines(path).read() == [*complete, {"step": 9}]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(garbage=st.binary(max_size=30))
def test_garbage_in_a_file_is_skipped(
    tmp_path_factory: pytest.TempPathFactory, garbage: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.jsonl"
    path.write_bytes(b'{"step": 0}\n\xff\xfe{' + garbage.replace(b"\n", b"") + b'\n{"step": 1}\n')
    assert JsonLines(path).read() == [{"step": 0}, {"step": 1}]


@pytest.mark.parametrize(
    "line",
    ["null", "3", "[1]", '"step"', "{}", '{"loss": 1}', '{"step": NaN}', '{"step": "2"}', '{"step": true}',
     '{"step": 1e999}', "[" * 5000, "9" * 5000, '{"step": 1' + "0" * 400 + "}"],
)  # fmt: skip
def test_lines_that_are_no_rows_are_left_out(tmp_path: Path, line: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n' + line + '\n{"step": 1}\n')
    assert JsonLines(path).read(numbers=("step",)) == [{"step": 0}, {"step": 1}]


def test_rows_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step"')
    rows = JsonLines(path).each()
    assert next(rows) == {"step": 0}
    assert list(rows) == [{"step": 1}]


def test_a_row_keeps_what_no_number_is_asked_of(tmp_path: Path) -> None:
    """A resumed run rewrites its rows, and those of others."""
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0, "reward": NaN, "name": "x"}\n')
    assert str(JsonLines(path).read(numbers=("step",))) == (
        "[{'step': 0, 'reward': nan, 'name': 'x'}]"
    )


def test_what_the_body_raises_is_not_said_to_be_the_log(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m.jsonl")
    with pytest.raises(FileNotFoundError, match="an image"), lines.appending() as append:
        append(ROWS[0])
        raise FileNotFoundError("an image")
    assert lines.read() == ROWS[:1]


def test_a_log_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match=r"m\.jsonl cannot be written"),
        JsonLines(tmp_path / "file" / "m.jsonl").appending(),
    ):
        pass


# A limit on the size of files stands in for a full disk, and needs no root.
FULL_DISK = """
import resource, sys
from pathlib import Path
from hwnas.errors import StorageError
from hwnas.runs import JsonLines
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
count = 0
try:
    with JsonLines(Path(sys.argv[1])).appending() as append:
        while True:
            append({"step": count})
            count += 1
except StorageError as error:
    print(count, error)
"""


def test_a_full_disk_stops_the_log_at_a_complete_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True
    )
    count, message = done.stdout.strip().split(" ", 1)
    assert (
        message
        == f"{path} cannot be written (File too large): free some space or choose another --out"
        " folder."
    )
    assert JsonLines(path).read() == [{"step": step} for step in range(int(count))]
    assert int(count) > 50
