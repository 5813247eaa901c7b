"""Users' mistakes on the command line: each gets one sentence that names the value and
the fix, and exit code 2; nothing is lost.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hwnas import cli
from hwnas.core.spaces import mobile32
from hwnas.core.table import LatencyTable
from hwnas.document import file_sha256

# the fixtures copy a finished run, for tests to change
pytestmark = pytest.mark.slow

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def hwnas(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; returns the exit code and standard error."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["hwnas", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return int(exit_.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture
def project(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run with its configuration beside it: ``tiny.toml`` and ``run``."""
    shutil.copytree(finished_run, tmp_path / "run")
    shutil.copy(finished_run.parent / "tiny.toml", tmp_path / "tiny.toml")
    return tmp_path


def refused(outcome: tuple[int, str], *words: str, code: int = 2) -> None:
    status, text = outcome
    assert status == code, text
    error = text[text.index("error: ") :].strip()
    assert "\n" not in error and "Traceback" not in text, text
    for word in words:
        assert word in error, error


def test_unknown_key(hwnas: Run, project: Path) -> None:
    refused(
        hwnas("run", project / "tiny.toml", "-s", "search.taget_ms=3"),
        "search.taget_ms",
        "did you mean 'target_ms'?",
    )


def test_wrong_type(hwnas: Run, project: Path) -> None:
    refused(
        hwnas("run", project / "tiny.toml", "-s", "train.epochs=many"),
        "train.epochs",
        "'many'",
        "number",
    )


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("search.strategy.name=tunass", "did you mean 'tunas'?"),
        ("search.strategy.rl_rate=1", "rl_rate"),
        ("space.name=mobil32", "did you mean 'mobile32'?"),
        ("data.name=digit", "did you mean 'digits'?"),
        ("device.name=hots", "did you mean 'host'?"),
        ("train.arch=mobilenet_v4", "did you mean 'mobilenet_v2'?"),
        ("train.optimizer.name=admaw", "admaw"),
    ],
)
def test_unknown_names(hwnas: Run, project: Path, override: str, hint: str) -> None:
    refused(hwnas("run", project / "tiny.toml", "--out", project / "run", "-s", override), hint)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("task=detect", "data.name=coco", "data.augment=ssd", "export.softmax=true"),
            ("export.softmax is for classifiers", "scores already", "remove it"),
        ),
        (("export.input=int8",), ("export.input = 'int8'", "'float32' or 'uint8'")),
    ],
)
def test_impossible_export_settings_are_refused(
    hwnas: Run, tmp_path: Path, overrides: tuple[str, ...], words: tuple[str, ...]
) -> None:
    (tmp_path / "empty.toml").write_text("")
    flags = [part for override in overrides for part in ("-s", override)]
    refused(hwnas("export", tmp_path / "empty.toml", *flags), *words)


def test_missing_configuration(hwnas: Run, tmp_path: Path) -> None:
    refused(hwnas("run", tmp_path / "no.toml"), "no.toml", "does not exist")


def test_table_of_another_space_names_the_missing_ops(hwnas: Run, project: Path) -> None:
    table = project / "run" / "profile" / "table.json"
    data = ["-s", "space.name=mobile32", "-s", f"search.table={table}"]
    outcome = hwnas("search", project / "tiny.toml", "--out", project / "other", *data)
    missing = next(
        op.key
        for op in mobile32(resolution=8, in_channels=1).ops
        if op.key not in LatencyTable.load(table).entries
    )
    refused(outcome, "lacks", "mobile32", missing, "Profile this space")


def test_table_without_calibration(hwnas: Run, project: Path) -> None:
    table = LatencyTable.load(project / "run" / "profile" / "table.json").model_copy(
        update={"calibration": None}
    )
    table.save(project / "raw.json")
    overrides = ["-s", f"search.table={project / 'raw.json'}"]
    refused(
        hwnas("search", project / "tiny.toml", "--out", project / "other", *overrides),
        "no calibration",
        "fit_networks",
    )


def test_unreachable_target_prints_the_range(hwnas: Run, project: Path) -> None:
    text = (project / "tiny.toml").read_text().replace("target_range = 0.5", "target_ms = 500.0")
    (project / "tiny.toml").write_text(text)
    table = ["-s", f"search.table={project / 'run' / 'profile' / 'table.json'}"]
    refused(
        hwnas("search", project / "tiny.toml", "--out", project / "other", *table),
        "500 ms is out of reach",
        " to ",
        "choose search.target_ms",
    )


@pytest.mark.parametrize("cut", [0, 1, 200, -30])
def test_corrupt_and_truncated_documents(hwnas: Run, project: Path, cut: int) -> None:
    table = project / "run" / "profile" / "table.json"
    broken = project / "broken.json"
    broken.write_bytes(table.read_bytes()[:cut])
    refused(
        hwnas(
            "search",
            project / "tiny.toml",
            "--out",
            project / "other",
            "-s",
            f"search.table={broken}",
        ),
        "broken.json",
        "corrupt",
    )


def test_document_with_a_wrong_value(hwnas: Run, project: Path) -> None:
    content = json.loads((project / "run" / "profile" / "table.json").read_text())
    next(iter(content["entries"].values()))["ms"] = -1
    (project / "bad.json").write_text(json.dumps(content))
    refused(hwnas("table", "show", project / "bad.json"), "bad.json", "ms", "-1")


def test_corrupt_checkpoint(hwnas: Run, project: Path) -> None:
    weights = project / "run" / "train" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(
        hwnas("export", project / "tiny.toml", "--out", project / "run"),
        "model.safetensors",
        "corrupt",
    )
    assert (project / "run" / "export" / "bundle.json").exists()


def test_missing_data_folder(hwnas: Run, project: Path) -> None:
    overrides = ["-s", "data.name=npz", "-s", "data.path=/no/such/place"]
    refused(
        hwnas("search", project / "tiny.toml", "--out", project / "run", *overrides),
        "/no/such/place",
        "not a folder",
    )


def test_image_that_does_not_decode(hwnas: Run, project: Path) -> None:
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in range(2):
            folder = project / "images" / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(8):
                Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(
                    folder / f"{i}.png"
                )
    broken = project / "images" / "val" / "class1" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    overrides = ["data.name=folder", f"data.path={project / 'images'}"]
    flags = [part for override in overrides for part in ("-s", override)]
    refused(
        hwnas(
            "train",
            project / "tiny.toml",
            "--out",
            project / "run",
            *flags,
            "-s",
            "train.batch_size=4",
        ),
        "3.png",
        "does not decode",
    )


def test_diverging_training_stops_and_keeps_a_checkpoint(hwnas: Run, project: Path) -> None:
    overrides = ["-s", "train.optimizer.lr=1e12", "-s", "train.optimizer.warmup=0.9"]
    refused(
        hwnas("train", project / "tiny.toml", "--out", project / "run", *overrides),
        # whether the loss or a weight overflows first depends on the CPU
        "at step",
        "lower optimizer.lr",
        "last good state is kept in",
        code=1,
    )


REFUSED = [
    (
        ("search.strategy.architectures=33",),
        ("'tunas'", "33 microbatches", "search.batch_size = 64", "set it to 66 or more"),
    ),
    (
        ("search.strategy={name = 'proxylessnas', gradient = 'reinforce', rl_samples = 33}",),
        ("'proxylessnas'", "33 microbatches", "set it to 66 or more"),
    ),
    (
        ("search.limits=[{kind = 'latency', table = 'board.json', max_ms = 1.0}]",),
        ("board.json does not exist", "check the path"),
    ),
    (
        ("search.limits=[{kind = 'macs', max_macs = 10}]",),
        ("limit macs <= 10 is out of reach", "search.limits[0].max_macs"),
    ),
    (("search.limits=[{kind = 'watts', max_watts = 10}]",), ("search.limits", "watts", "macs")),
    (
        ("space.width=0.5",),
        ("space.json", "takes no overrides", "edit the document, or remove width"),
    ),
    (("space.act=hswish",), ("space.json", "takes no overrides", "remove act")),
    (
        ("space.layers=8",),
        ("space.layers = 8 only applies to darts, darts_imagenet, nds_darts", "space.json"),
    ),
    (
        ("train.arch='mobilenet v2'",),
        ("'mobilenet v2' is not an architecture", "positions of its options"),
    ),
    (
        ("space.restrict={resolutoin = [8]}",),
        ("has no choice 'resolutoin'", "did you mean 'resolution'?"),
    ),
    (
        ("space.restrict={resolution = [4]}",),
        ("'resolution' cannot be restricted to [4]", "its options are 8"),
    ),
    (
        ("search.weights={run}", "search.supernet.dropout=0.5"),
        ("search.supernet.dropout = 0.5", "has 0.0", "remove the key"),
    ),
    (
        ("search.weights={run}", "search.supernet.bn_track=true", "search.recalibration_images=0"),
        ("tracks no BN statistics", "search.recalibration_images to 2 or more"),
    ),
    (("search.recalibration_images=0",), ("recalibration_images is 0", "supernet.bn_track = true")),
    (("search.weights={folder}",), ("has no shared.safetensors", "name the search folder")),
]
"""Overrides, and parts of the one-sentence error that they cause before anything of the
finished run is set aside.
"""


@pytest.mark.parametrize(
    ("overrides", "words"), REFUSED, ids=[" ".join(overrides) for overrides, _ in REFUSED]
)
def test_impossible_searches_are_refused_before_anything_is_set_aside(
    hwnas: Run, project: Path, overrides: tuple[str, ...], words: tuple[str, ...]
) -> None:
    paths = {"{run}": str(project / "run"), "{folder}": str(project)}
    flags = [part for override in overrides for part in ("-s", override)]
    flags = [
        next((part.replace(key, path) for key, path in paths.items() if key in part), part)
        for part in flags
    ]
    before = sorted(path.name for path in (project / "run").iterdir())
    refused(hwnas("search", project / "tiny.toml", "--out", project / "run", *flags), *words)
    assert sorted(path.name for path in (project / "run").iterdir()) == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("search.data_portion=0.05",),
            (
                "search.data_portion = 0.05 leaves",
                "less than a batch of 64",
                "lower search.batch_size",
            ),
        ),
        (
            ("search.strategy={name = 'random_standalone', trainings = 8}", "search.epochs=0.2"),
            ("8 training runs share 4 steps", "raise search.epochs"),
        ),
    ],
)
def test_too_little_to_train_on(
    hwnas: Run, project: Path, overrides: tuple[str, ...], words: tuple[str, ...]
) -> None:
    """Noticed only once the images are loaded, after the old search is set aside."""
    flags = [part for override in overrides for part in ("-s", override)]
    refused(hwnas("search", project / "tiny.toml", "--out", project / "run", *flags), *words)
    assert (project / "run" / "search.old-1" / "search.json").exists()


def test_output_below_a_file(hwnas: Run, project: Path) -> None:
    refused(
        hwnas("run", project / "tiny.toml", "--out", project / "tiny.toml" / "run"),
        "cannot be created",
        "--out",
    )


@pytest.mark.parametrize(
    "override",
    [
        "search.strategy.name=tunass",
        "search.target_range=7",
        "search.table=missing.json",
        "data.name=digit",
        "search.target_ms=500",
    ],
)
def test_a_refusal_leaves_the_finished_run_unchanged(
    hwnas: Run, project: Path, override: str
) -> None:
    files = [path for path in (project / "run").rglob("*") if path.is_file()]
    before = {path: file_sha256(path) for path in files}
    refused(hwnas("run", project / "tiny.toml", "--out", project / "run", "-s", override))
    assert {path: file_sha256(path) for path in files} == before


def test_validation_out_of_tolerance_exits_with_1(hwnas: Run, project: Path) -> None:
    status, text = hwnas(
        "validate",
        project / "tiny.toml",
        "--out",
        project / "run",
        "-s",
        "validate.latency_tolerance=1e-9",
    )
    assert status == 1 and "OUT OF TOLERANCE" in text
