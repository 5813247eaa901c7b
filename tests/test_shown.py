"""``hwnas space``: the run's own space, and published networks priced by its own profile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hwnas.config import load_experiment
from hwnas.core.cost import latency_ms
from hwnas.core.describe import coverage, describe_networks, why_uncovered
from hwnas.core.published import published
from hwnas.core.spaces import mobile32
from hwnas.core.table import LatencyTable
from hwnas.errors import ConfigError, SpaceError, UserError
from hwnas.experiments import experiment_space
from hwnas.networks import named_networks
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.shown import shown_space
from hwnas.testing import synthetic_table
from tests.conftest import write_tiny


def hwnas(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "hwnas", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def named(config: Path, *names: str) -> list[str]:
    return [f"profile.networks={json.dumps(names)}", "profile.rounds=1", "profile.max_rounds=1"]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a profile of the tiny space and of two published networks."""
    folder = tmp_path_factory.mktemp("named")
    config = write_tiny(folder)
    experiment = load_experiment(config, named(config, "mobilenet_v2", "mobilenet_v3_small-w0.5"))
    Pipeline(experiment, folder / "run", Progress()).run_stage("profile")
    return folder / "run"


@pytest.mark.slow
def test_the_plan_holds_the_networks_ops_and_they_are_priced(profiled: Path) -> None:
    table = LatencyTable.load(profiled / "profile" / "table.json")
    for name in ("mobilenet_v2", "mobilenet_v3_small-w0.5"):
        arch = published(name, resolution=8, classes=10, in_channels=1)
        assert latency_ms(arch, table) > 0
        lines = [
            line
            for line in hwnas("space", profiled).splitlines()
            if line.startswith("network ") and arch.name in line
        ]
        assert len(lines) == 1
        assert (
            f"{latency_ms(arch, table):.4g} ms predicted" in lines[0]
            and f"{arch.macs / 1e6:.1f} M MACs" in lines[0]
        )


@pytest.mark.slow
def test_a_run_folder_is_shown_with_its_own_space_and_table(profiled: Path) -> None:
    text = hwnas("space", profiled)
    space = Pipeline(load_experiment(profiled.parent / "tiny.toml"), profiled, Progress()).space
    assert f"coverage     {len(space.ops)} of {len(space.ops)} ops in table simulated" in text
    found = json.loads(hwnas("space", profiled, "--json"))
    assert (found["covered"], found["ops"], found["missing"]) == (
        len(space.ops),
        len(space.ops),
        [],
    )
    assert [network["name"] for network in found["networks"]] == [
        "mobilenet_v2",
        "mobilenet_v3_small-w0.5",
    ]


def test_the_end_of_a_profile_says_what_the_networks_would_take(tmp_path: Path) -> None:
    class Heard(Progress):
        lines: list[str] = []

        def info(self, message: str) -> None:
            self.lines.append(message)

    config = write_tiny(tmp_path)
    Pipeline(
        load_experiment(config, named(config, "mnasnet_b1")), tmp_path / "run", Heard()
    ).run_stage("profile")
    assert any("mnasnet_b1" in line and "ms predicted" in line for line in Heard.lines)


@pytest.mark.slow
def test_an_experiment_is_covered_against_the_space_of_its_data_and_overrides(
    tmp_path: Path,
) -> None:
    overrides = ["space.width=0.5", "data.resolution=48", "data.classes=7", "space.act=hswish"]
    space = mobile32(resolution=48, classes=7, act="hswish", width=0.5)
    synthetic_table(space).save(tmp_path / "table.json")
    grey_no_more = ["data.channels=3", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]"]
    flags = [part for each in (*overrides, *grey_no_more) for part in ("-s", each)]
    text = hwnas("space", "configs/quickstart.toml", tmp_path / "table.json", *flags)
    assert f"coverage     {len(space.ops)} of {len(space.ops)} ops" in text
    assert shown_space("mobile32", overrides).space == space
    assert shown_space("proxylessnas", ["space.width=0.5"]).space.resolution == 224
    plain = hwnas("space", "mobile32", tmp_path / "table.json")
    assert (
        "has ops of 48 px, this space of 32 px; of 7 classes, this space of 10 classes; of hswish"
        " activations, this space of relu" in plain
    )
    with pytest.raises(UserError, match="is a run folder with its own configuration"):
        shown_space(str(tmp_path), ["seed=1"])


def test_why_a_table_covers_nothing_is_said_only_where_it_does() -> None:
    table = synthetic_table(mobile32())
    assert why_uncovered(mobile32().ops, table) is None
    grey = why_uncovered(mobile32(resolution=16, in_channels=1).ops, table)
    assert (
        grey == "the table (made for mobile32) has ops of 32 px, this space of 16 px; of 3 input"
        " channels, this space of 1 input channels."
    )
    assert coverage(mobile32(), table)["covered"] == len(mobile32().ops)


def test_what_is_missing_of_a_network_is_said() -> None:
    arch = published("mobilenet_v2", resolution=32, classes=10)
    (line,) = describe_networks([arch], synthetic_table(mobile32()))
    assert "mobilenet_v2" in line and f"of {len(arch.ops())} ops: conv-h32-i3-o32" in line


def test_names_are_answered_with_the_nearest_and_numbers_keep_their_meaning() -> None:
    experiment = load_experiment(None, ["profile.networks=['mobilenet_v22']"])
    with pytest.raises(
        SpaceError,
        match=(
            r"profile\.networks names 'mobilenet_v22': unknown network 'mobilenet_v22'; did you"
            r" mean 'mobilenet_v2'"
        ),
    ):
        named_networks(experiment, experiment_space(experiment))
    with pytest.raises(UserError, match="did you mean 'mobilenet_v2'"):
        Pipeline(experiment, Path("unused"), Progress())
    number = load_experiment(None, ["profile.mode=networks", "profile.networks=30"])
    assert named_networks(number, experiment_space(number)) == () and number.profile.sampled == 30
    both = load_experiment(
        None, ["profile.mode=networks", "profile.networks=mobilenet_v2", "space.width=0.5"]
    )
    assert both.profile.sampled == 40
    # as wide as published
    assert [arch.name for arch in named_networks(both, experiment_space(both))] == ["mobilenet_v2"]
    with pytest.raises(ConfigError, match=r"profile\.networks"):
        load_experiment(None, ["profile.networks=2"])


def test_networks_of_one_name_are_two_inputs_of_a_profile(tmp_path: Path) -> None:
    """What two searches have found has the same name."""
    names = [str(tmp_path / f"{name}.json") for name in ("mobilenet_v2", "mnasnet_b1")]
    for path in names:
        arch = published(Path(path).stem, resolution=32, classes=10)
        arch.model_copy(update={"name": "found", "origin": None}).save(Path(path))
    experiment = load_experiment(None, [f"profile.networks={json.dumps(names)}"])
    inputs = Pipeline(experiment, tmp_path, Progress()).stage("profile").inputs()
    assert inputs["profile.networks[0]"] != inputs["profile.networks[1]"]


def test_a_folder_does_not_hide_a_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mobile32").mkdir()
    monkeypatch.chdir(tmp_path)
    assert shown_space("mobile32", []).space.name == "mobile32"


@pytest.mark.slow
def test_networks_are_listed_without_a_table_too(tmp_path: Path) -> None:
    """Their sizes need none."""
    output = hwnas("space", "mobile32", "-s", 'profile.networks=["mobilenet_v2"]')
    arch = published("mobilenet_v2", resolution=32, classes=10)
    assert (
        f"mobilenet_v2  {arch.macs / 1e6:.1f} M MACs  {arch.params / 1e6:.2f} M parameters"
        in output
        and "predicted" not in output
    )
