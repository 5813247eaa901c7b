"""``hwnas space``: a run's own space, and published networks with the latencies that
its own profile predicts.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hwnas.config import load_experiment
from hwnas.core.cost import latency_ms
from hwnas.core.describe import coverage, describe_networks, why_uncovered
from hwnas.core.published import published
from hwnas.core.size import Rectangle
from hwnas.core.spaces import mobile32
from hwnas.core.table import LatencyTable
from hwnas.errors import ConfigError, SpaceError, UserError
from hwnas.experiments import experiment_space
from hwnas.networks import named_networks
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.shown import shown_space
from hwnas.testing import synthetic_table
from tests.commands import run
from tests.conftest import write_tiny


def hwnas(*arguments: object) -> str:
    return run([str(argument) for argument in arguments]).stdout


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
def test_the_profile_includes_the_named_networks_ops(profiled: Path) -> None:
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
    shown = json.loads(hwnas("space", profiled, "--json"))
    assert (shown["covered"], shown["ops"], shown["missing"]) == (
        len(space.ops),
        len(space.ops),
        [],
    )
    assert [network["name"] for network in shown["networks"]] == [
        "mobilenet_v2",
        "mobilenet_v3_small-w0.5",
    ]


def test_a_profile_ends_with_the_predicted_latency_of_the_networks(tmp_path: Path) -> None:
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
def test_coverage_is_that_of_the_space_after_data_and_overrides(
    tmp_path: Path,
) -> None:
    overrides = ["space.width=0.5", "data.resolution=48", "data.classes=7", "space.act=hswish"]
    space = mobile32(resolution=48, classes=7, act="hswish", width=0.5)
    synthetic_table(space).save(tmp_path / "table.json")
    colour = ["data.channels=3", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]"]
    flags = [part for override in (*overrides, *colour) for part in ("-s", override)]
    text = hwnas("space", "configs/quickstart.toml", tmp_path / "table.json", *flags)
    assert f"coverage     {len(space.ops)} of {len(space.ops)} ops" in text
    assert shown_space("mobile32", overrides).space == space
    assert shown_space("proxylessnas", ["space.width=0.5"]).space.resolution == 224
    plain = hwnas("space", "mobile32", tmp_path / "table.json")
    assert (
        "has ops for 48 px, but this space uses 32 px; for 7 classes, but this space uses 10"
        " classes; for hswish activations, but this space uses relu" in plain
    )
    with pytest.raises(UserError, match="is a run folder with its own configuration"):
        shown_space(str(tmp_path), ["seed=1"])


def test_why_a_table_covers_nothing_is_said_only_if_it_covers_nothing() -> None:
    table = synthetic_table(mobile32())
    assert why_uncovered(mobile32().ops, table) is None
    grey = why_uncovered(mobile32(resolution=16, in_channels=1).ops, table)
    assert (
        grey
        == "the table (made for mobile32) has ops for 32 px, but this space uses 16 px; for 3 input"
        " channels, but this space uses 1 input channels."
    )
    assert coverage(mobile32(), table)["covered"] == len(mobile32().ops)


def test_the_missing_ops_of_a_network_are_named() -> None:
    arch = published("mobilenet_v2", resolution=32, classes=10)
    (line,) = describe_networks([arch], synthetic_table(mobile32()))
    assert "mobilenet_v2" in line and f"of {len(arch.ops())} ops: conv-h32-i3-o32" in line


def test_unknown_networks_get_a_hint_and_numbers_keep_their_meaning() -> None:
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
    # published networks keep their width, whatever space.width is
    assert [arch.name for arch in named_networks(both, experiment_space(both))] == ["mobilenet_v2"]
    with pytest.raises(ConfigError, match=r"profile\.networks"):
        load_experiment(None, ["profile.networks=2"])


def test_networks_with_the_same_name_are_separate_inputs_of_a_profile(tmp_path: Path) -> None:
    """Architectures found by two searches have the same name."""
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
def test_networks_are_also_listed_without_a_table(tmp_path: Path) -> None:
    """Their sizes do not need one."""
    output = hwnas("space", "mobile32", "-s", 'profile.networks=["mobilenet_v2"]')
    arch = published("mobilenet_v2", resolution=32, classes=10)
    assert (
        f"mobilenet_v2  {arch.macs / 1e6:.1f} M MACs  {arch.params / 1e6:.2f} M parameters"
        in output
        and "predicted" not in output
    )


def test_a_space_of_rectangles_takes_overrides(tmp_path: Path) -> None:
    path = tmp_path / "wide.json"
    mobile32(resolution=Rectangle(16, 24)).save(path)
    assert shown_space(str(path), ["search.epochs=3"]).space.resolution == Rectangle(16, 24)
