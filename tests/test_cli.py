"""The command line: its verbs and flags, their output and exit codes, and that asking
for help costs nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main

from hwnas import __version__, cli
from hwnas.core.space import MacroSpace
from hwnas.core.spaces import mobile32, proxylessnas
from hwnas.core.table import Entry, LatencyTable, TableHeader
from hwnas.resources import resource_path

COMMON = {"-s", "--out", "--fresh", "--resume", "--json", "-q", "-v", "--debug"}
LOOK = {"--json", "--debug"}
VERBS = {  # frozen: new settings go into the configuration, not here
    "run": (["config"], COMMON | {"--plan"}),
    "profile": (["config"], COMMON),
    "search": (["config"], COMMON),
    "train": (["config"], COMMON),
    "export": (["config"], COMMON),
    "validate": (["config"], COMMON),
    "report": (["config"], COMMON),
    "study rank": (["config"], COMMON),
    "study compare": (["config"], COMMON),
    "study shrink": (["config"], COMMON),
    "space": (["config", "table"], LOOK | {"-s"}),
    "data": (["config"], LOOK | {"-s", "-q"}),
    "devices": ([], LOOK),
    "doctor": ([], LOOK),
    "table show": (["path"], LOOK),
    "table import": (["file"], LOOK | {"--format", "--out"}),
    "table compare": (["a", "b"], LOOK),
    "table fit": (["file"], LOOK | {"--space", "--prior", "--out"}),
}
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.toml"
Hwnas = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hwnas(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Hwnas:
    """Run the command in this process, in an empty folder; returns the exit code,
    standard output and standard error.
    """
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hwnas", *map(str, arguments)])
        try:
            cli.main()
            code: object = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        printed = capsys.readouterr()
        assert isinstance(code, int)
        return code, printed.out, printed.err

    return run


def commands(group: Any, prefix: str = "") -> dict[str, Any]:
    by_name: dict[str, Any] = {}
    for name, command in group.commands.items():
        by_name |= (
            commands(command, f"{name} ")
            if hasattr(command, "commands")
            else {prefix + name: command}
        )
    return by_name


def test_the_verbs_and_flags_are_exactly_these() -> None:
    verbs = {}
    for name, command in commands(typer.main.get_command(cli.app)).items():
        arguments = [
            parameter.name
            for parameter in command.params
            if parameter.param_type_name == "argument"
        ]
        flags = {
            flag
            for parameter in command.params
            if parameter.param_type_name == "option"
            for flag in (*parameter.opts, *parameter.secondary_opts)
        }
        verbs[name] = (arguments, flags)
    assert verbs == VERBS


def test_asking_for_help_imports_nothing_heavy() -> None:
    code = """
import sys
import hwnas.cli
heavy = {"torch", "pydantic", "numpy", "rich", "timm", "torchvision", "onnx", "matplotlib"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
sys.argv = ["hwnas", "--help"]
try:
    hwnas.cli.main()
except SystemExit as exit_:
    assert not exit_.code
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("[]", "[]")
    for verb in VERBS:
        assert verb.split()[0] in done.stdout


@pytest.mark.slow
def test_spaces_and_tables_are_shown_without_pytorch() -> None:
    """PyTorch takes seconds to import and half a gigabyte."""
    table = resource_path("latency_tables/amd-epyc-2core/fbnet-litert-fp32-1t.json")
    commands_of_no_network = [
        ["space", "mobile32"],
        ["space", "fbnet", str(table), "--json"],
        ["table", "show", str(table)],
        ["table", "compare", str(table), str(table)],
        ["devices"],
    ]
    code = """
import sys
import hwnas.cli
for arguments in {commands}:
    sys.argv = ["hwnas", *arguments]
    try:
        hwnas.cli.main()
    except SystemExit as exit_:
        assert not exit_.code
    heavy = [name for name in ("torch", "timm", "torchvision") if name in sys.modules]
    assert not heavy, (arguments, heavy)
"""
    code = code.replace("{commands}", repr(commands_of_no_network))
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(hwnas: Hwnas, verb: str) -> None:
    code, out, _ = hwnas(*verb.split(), "--help")
    assert code == 0
    assert out.startswith("Usage: ")
    for flag in VERBS[verb][1]:
        assert flag in out


def test_version_and_no_arguments(hwnas: Hwnas) -> None:
    assert hwnas("--version")[:2] == (0, f"hwnas {__version__}\n")
    code, out, err = hwnas()
    assert code == 2
    assert "Commands:" in out + err


@pytest.mark.parametrize("arguments", [["serch"], ["run", "--bogus"], ["space"], ["table", "show"]])
def test_wrong_usage_exits_with_2(hwnas: Hwnas, arguments: list[str]) -> None:
    code, _, err = hwnas(*arguments)
    assert code == 2
    assert "Usage: " in err


def refused(outcome: tuple[int, str, str], *words: str) -> None:
    code, out, err = outcome
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.slow
def test_a_real_process_ends_with_the_exit_code_and_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hwnas", "space", "proxyless"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(QUICKSTART.parents[1])},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "error: unknown space 'proxyless'; did you mean 'proxylessnas'? A path must end in"
        " .json.\n"
    )


@pytest.mark.slow
def test_a_warning_from_hwnas_is_one_plain_line(tmp_path: Path) -> None:
    """Tested with a renamed key, in a real process. The source file and line that
    Python prints by default mean nothing to a user.
    """
    old_key = "search.optimizer.unused=move"
    done = subprocess.run(
        [sys.executable, "-m", "hwnas", "run", "--plan", "-q", "-s", old_key],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(QUICKSTART.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("warning: ")
    assert "search.optimizer.inactive_weights = 'decay'" in line
    assert ".py:" not in line


def test_debug_shows_the_traceback(hwnas: Hwnas) -> None:
    with pytest.raises(ValueError, match="unknown space 'nothing'"):
        hwnas("space", "nothing", "--debug")


def test_a_space_shows_its_size_and_plan(hwnas: Hwnas) -> None:
    code, out, err = hwnas("space", "proxylessnas")
    assert (code, err) == (0, "")
    assert "6.65e+17 architectures" in out
    assert "ops          72 to measure" in out
    assert "classifier-h7-i1280-o1000" in out


def test_a_space_as_json_is_the_document(hwnas: Hwnas, tmp_path: Path) -> None:
    code, out, _ = hwnas("space", "proxylessnas", "--json")
    assert code == 0
    assert MacroSpace.parse(out) == proxylessnas()
    (tmp_path / "mine.json").write_text(out)
    assert "6.65e+17" in hwnas("space", tmp_path / "mine.json")[1]


def table_file(folder: Path) -> Path:
    unknown = "unknown"
    header = TableHeader(
        device="board", cpu=unknown, machine=unknown, runtime="litert", runtime_version=unknown, dtype="fp32", threads=1, cores=unknown,
        governor=unknown, layout=unknown, batch=1, date=unknown, space="mobile32",
    )  # fmt: skip
    entries = {op.key: Entry(ms=0.5) for op in mobile32().ops[3:]}
    LatencyTable(header=header, entries=entries).save(folder / "table.json")
    return folder / "table.json"


def test_a_tables_coverage_of_a_space_is_shown(hwnas: Hwnas, tmp_path: Path) -> None:
    out = hwnas("space", "mobile32", table_file(tmp_path))[1]
    assert (
        f"{len(mobile32().ops) - 3} of {len(mobile32().ops)} ops in table board/litert-fp32-1t;"
        " missing:" in out
    )
    assert out.rstrip().splitlines()[-3:] == [f"  {op.key}" for op in mobile32().ops[:3]]


def test_a_table_is_shown(hwnas: Hwnas, tmp_path: Path) -> None:
    path = table_file(tmp_path)
    code, out, _ = hwnas("table", "show", path)
    assert code == 0
    assert "table board/litert-fp32-1t" in out and "calibration  none" in out
    assert LatencyTable.parse(hwnas("table", "show", path, "--json")[1]) == LatencyTable.load(path)


def test_missing_files_and_other_documents_are_refused(hwnas: Hwnas, tmp_path: Path) -> None:
    refused(hwnas("table", "show", "absent.json"), "absent.json does not exist: check the path")
    mobile32().save(tmp_path / "space.json")
    refused(
        hwnas("table", "show", tmp_path / "space.json"),
        "has schema 'hwnas.space/1'",
        "hwnas.table/1 document is needed",
    )
    refused(hwnas("space", "mobile32", "absent.json"), "absent.json does not exist")
    refused(hwnas("space", "absent.json"), "absent.json does not exist")
    refused(hwnas("space", table_file(tmp_path)), "has schema 'hwnas.table/1'")


BLOCK = (
    "expanded_conv-input:28x28x40-output:14x14x80-expand:6-kernel:{}-stride:2-idskip:0: {{count: 9,"
    " mean: {}, var: 0.1}}\n"
)


def test_a_foreign_table_is_imported_and_compared(
    hwnas: Hwnas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    (tmp_path / "a.yaml").write_text(
        BLOCK.format(3, 3.0) + BLOCK.format(5, 4.0) + BLOCK.format(4, 1.0)
    )
    (tmp_path / "b.yaml").write_text(BLOCK.format(3, 2.0) + BLOCK.format(5, 8.0))
    code, out, _ = hwnas(
        "table",
        "import",
        tmp_path / "a.yaml",
        "--format",
        "proxylessnas",
        "--out",
        tmp_path / "a.json",
    )
    assert code == 0
    assert (
        "4 entries; 1 of the source not mapped:" in out
        and "kernel:4" in out
        and "kernels must be odd" in out
    )
    printed = json.loads(
        hwnas(
            "table",
            "import",
            tmp_path / "b.yaml",
            "--format",
            "proxylessnas",
            "--out",
            tmp_path / "b.json",
            "--json",
        )[1]
    )
    assert printed == {
        "path": str(tmp_path / "b.json"),
        "entries": 4,
        "prices": 4,
        "unmapped": {},
    }
    assert "calibration  none" in hwnas("table", "show", tmp_path / "a.json")[1]

    code, out, _ = hwnas("table", "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 60
    assert "2 ops in both: a / b from 0.50 to 1.50, median 1.00" in out
    comparison = json.loads(
        hwnas("table", "compare", tmp_path / "a.json", tmp_path / "b.json", "--json")[1]
    )
    assert [(row["op"], row["ratio"]) for row in comparison["ratios"]] == [
        ("mbconv-h28-i40-o80-m240-k5-s2-relu", 0.5),
        ("mbconv-h28-i40-o80-m240-k3-s2-relu", 1.5),
    ]


def test_an_import_that_fails_writes_nothing(hwnas: Hwnas, tmp_path: Path) -> None:
    whole, out = tmp_path / "a.yaml", tmp_path / "out" / "table.json"
    whole.write_text(BLOCK.format(3, 3.0))
    (tmp_path / "cut.yaml").write_text(BLOCK.format(3, 3.0)[:-9])
    refused(
        hwnas("table", "import", whole, "--format", "proxyless", "--out", out),
        "'proxyless'; did you mean 'proxylessnas'?",
    )
    refused(
        hwnas("table", "import", whole, "--format", "ofa", "--out", out),
        "a.yaml contains no block of format 'ofa'",
    )
    refused(
        hwnas("table", "import", tmp_path / "cut.yaml", "--format", "proxylessnas", "--out", out),
        "cut.yaml is not valid YAML",
    )
    refused(
        hwnas("table", "import", "absent.yaml", "--format", "proxylessnas", "--out", out),
        "absent.yaml does not exist",
    )
    refused(
        hwnas("table", "import", whole, "--format", "proxylessnas", "--out", whole),
        "is also the file to import",
    )
    assert not out.parent.exists()
    assert whole.read_text() == BLOCK.format(3, 3.0)
    hwnas("table", "import", whole, "--format", "proxylessnas", "--out", out)
    refused(hwnas("table", "compare", out, table_file(tmp_path)), "have no op in common")


def test_a_table_is_fitted_to_timed_networks(hwnas: Hwnas, tmp_path: Path) -> None:
    """Networks given by the positions of their options and timed by a formula: the
    table predicts them, and states its error on networks that it was not fitted to.
    """
    space, rng = mobile32(), np.random.default_rng(0)
    lines = ["architecture,ms"]
    for _ in range(40):
        picks = space.sample(rng)
        ms = 0.5 + space.decode(picks).macs / 1e7
        lines.append(f"{' '.join(map(str, space.index(picks)))},{ms:.5f}")
    timed, space_file, out = tmp_path / "timed.csv", tmp_path / "space.json", tmp_path / "mine.json"
    timed.write_text("\n".join(lines))
    space.save(space_file)
    code, printed, err = hwnas("table", "fit", timed, "--space", space_file, "--out", out)
    assert (code, err) == (0, "") and "40 networks: " in printed
    table = LatencyTable.load(out)
    assert table.header.device == "timed" and table.header.cpu == "unknown"
    assert table.calibration is not None and table.calibration.held_out is not None
    assert table.calibration.held_out.mape < 0.03
    assert json.loads(
        hwnas(
            "table",
            "fit",
            timed,
            "--space",
            space_file,
            "--prior",
            out,
            "--out",
            tmp_path / "b.json",
            "--json",
        )[1]
    )["path"]
    refused(
        hwnas("table", "fit", timed, "--space", "mobile23", "--out", out),
        "unknown space 'mobile23'",
    )
    refused(
        hwnas("table", "fit", timed, "--space", space_file, "--out", timed),
        "is also an input, and would be overwritten",
    )
    refused(
        hwnas("table", "fit", timed, "--space", "fbnet", "--out", tmp_path / "c.json"), "timed.csv"
    )
    refused(
        hwnas(
            "table",
            "fit",
            timed,
            "--space",
            space_file,
            "--prior",
            table_file(tmp_path),
            "--out",
            tmp_path / "c.json",
        ),
        "lacks",
    )
    assert timed.read_text() == "\n".join(lines) and not (tmp_path / "c.json").exists()


def test_devices(hwnas: Hwnas) -> None:
    code, out, _ = hwnas("devices")
    assert code == 0
    assert any(line.split()[:2] == ["host", "host"] for line in out.splitlines())
    listed = json.loads(hwnas("devices", "--json")[1])
    assert listed["host"]["connection"] == "host"
    assert (
        "ssh:USER@HOST" in out and {line.split()[0] for line in out.splitlines()} >= listed.keys()
    )


def test_doctor_finds_nothing_wrong_with_this_installation(hwnas: Hwnas) -> None:
    code, out, _ = hwnas("doctor")
    assert code == 0, out
    assert "MISSING" not in out
    findings = json.loads(hwnas("doctor", "--json")[1])
    assert {"python", "torch", "ai-edge-litert", "configs/"} <= {
        finding["subject"] for finding in findings
    }
    assert all(finding["good"] for finding in findings)


def test_a_plan_touches_nothing(hwnas: Hwnas, tmp_path: Path) -> None:
    code, out, err = hwnas("run", QUICKSTART, "--plan", "-q", "-s", "profile.fit_networks=5")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[2:]] == [
        "profile",
        "search",
        "train",
        "export",
        "validate",
        "report",
    ]
    assert "41 ops and 13 networks of space mobile32 on host (litert, fp32, 1 thread)" in out
    assert list(tmp_path.rglob("*")) == [tmp_path / "cwd"]


def test_the_plan_names_the_target_and_milliseconds_take_precedence(hwnas: Hwnas) -> None:
    assert (
        "at 35% of the way from the fastest to the slowest"
        in hwnas("run", QUICKSTART, "--plan", "-q")[1]
    )
    assert (
        "at 2.5 ms"
        in hwnas(
            "run",
            QUICKSTART,
            "--plan",
            "-q",
            "-s",
            "search.target_ms=2.5",
            "-s",
            "search.target_range=0.5",
        )[1]
    )


def test_a_plan_leaves_out_stages_whose_results_are_given(hwnas: Hwnas, tmp_path: Path) -> None:
    out = hwnas(
        "run",
        QUICKSTART,
        "--plan",
        "-q",
        "--out",
        tmp_path / "x",
        "-s",
        "search.table=t.json",
        "-s",
        "search.target_range=0.5",
    )[1]
    assert [line.split()[0] for line in out.splitlines()[2:]] == [
        "search",
        "train",
        "export",
        "validate",
        "report",
    ]
    out = hwnas(
        "run", QUICKSTART, "--plan", "-q", "--out", tmp_path / "x", "-s", "train.arch=mobilenet_v2"
    )[1]
    assert [line.split()[0] for line in out.splitlines()[2:]] == [
        "train",
        "export",
        "validate",
        "report",
    ]
    assert "mobilenet_v2 for 30 epochs" in out
    assert str(tmp_path / "x" / "report" / "report.html") in out
    assert list(tmp_path.iterdir()) == [tmp_path / "cwd"]


def test_the_built_in_defaults_can_be_planned(hwnas: Hwnas) -> None:
    assert hwnas("run", "--plan", "-q")[0] == 0


@pytest.mark.parametrize("space", ["mobile32", "proxylessnas"])
def test_every_space_can_be_planned(hwnas: Hwnas, space: str) -> None:
    code, out, err = hwnas(
        "run",
        "--plan",
        "-q",
        "-s",
        f"space.name={space}",
        "-s",
        "space.act=hswish",
        "-s",
        "data.resolution=64",
    )
    assert (code, err) == (0, "")
    assert f"of space {space} on host" in out


def test_mistakes_get_one_sentence_and_change_nothing(hwnas: Hwnas, tmp_path: Path) -> None:
    refused(hwnas("run", "absent.toml"), "configuration absent.toml does not exist")
    refused(
        hwnas("run", QUICKSTART, "-s", "search.taget_ms"), "-s 'search.taget_ms' is not KEY=VALUE"
    )
    refused(
        hwnas("run", QUICKSTART, "-s", "search.taget_ms=3"),
        "search.taget_ms",
        "did you mean 'target_ms'?",
    )
    refused(
        hwnas("run", QUICKSTART, "-s", "space.name=mobil32"),
        "unknown space 'mobil32'; did you mean 'mobile32'?",
    )
    refused(
        hwnas("run", QUICKSTART, "-s", "space.act=gelu"),
        "activation 'gelu' is unknown; known: none, relu, relu6, hswish",
    )
    refused(hwnas("profile", QUICKSTART, "-s", "seed=x"), "seed = 'x'")
    refused(hwnas("run", tmp_path), "is not a run folder")
    refused(hwnas("run", tmp_path, "-s", "seed=3"), "is a run folder with its own configuration")
    (tmp_path / "bad.toml").write_text("[search\n")
    refused(hwnas("search", tmp_path / "bad.toml"), "bad.toml is not valid TOML")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bad.toml", "cwd"]


def test_a_stage_whose_input_is_missing_says_what_to_run_first(
    hwnas: Hwnas, tmp_path: Path
) -> None:
    refused(
        hwnas("search", QUICKSTART, "--out", tmp_path / "r"),
        "table.json does not exist yet: run 'hwnas profile' with the same --out first",
    )
    refused(
        hwnas("train", QUICKSTART, "--out", tmp_path / "r"),
        "arch.json does not exist yet: run 'hwnas search'",
    )
    refused(
        hwnas("export", QUICKSTART, "--out", tmp_path / "r"),
        "model.safetensors does not exist yet: run 'hwnas train'",
    )
    refused(
        hwnas("validate", QUICKSTART, "--out", tmp_path / "r"),
        "bundle.json does not exist yet: run 'hwnas export'",
    )
