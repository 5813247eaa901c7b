"""Profiling a device whose latencies follow a formula: the table must reproduce it."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from hwnas.config import DeviceConfig, ProfileConfig, load_experiment
from hwnas.core.cost import latency_ms
from hwnas.core.ops import Op
from hwnas.core.space import MacroSpace, SearchSpace, SpaceStage
from hwnas.core.spaces import mobile32, proxylessnas
from hwnas.core.table import LatencyTable
from hwnas.devices.device import Connection, Device, connect
from hwnas.devices.session import Bench, spread_of
from hwnas.devices.simulated import Simulated, simulated_ms
from hwnas.errors import ConfigError, CoverageError, DeviceError
from hwnas.pipeline import Pipeline
from hwnas.profile.plan import make_plan, spread_networks
from hwnas.profile.stage import Profile, profile
from hwnas.progress import Progress, ProgressBar
from hwnas.runs import JsonLines
from tests.conftest import write_tiny

DEVICE = Device(id="simulated", soc="none", connection="simulated")
CONFIG = ProfileConfig(rounds=3, max_rounds=7)


def small_space() -> MacroSpace:
    """A searched width and a skip, but few ops, so that a profile takes seconds."""
    options = ("ir_k3_e3", "ir_k5_e6", "skip")
    stages = (
        SpaceStage(widths=(8, 16), slots=(("cn_k3",),)),
        SpaceStage(widths=(16,), stride=2, slots=(options[:-1], options)),
        SpaceStage(widths=(32,), slots=(("cn_k1",),)),
    )
    return MacroSpace(name="tiny", resolution=16, classes=10, stages=stages)


def unread(ops: tuple[Op, ...], runtime: str, dtype: str) -> Path:
    """A file that is never read: the simulated device only looks at op keys."""
    return Path("unread")


def profiled(
    folder: Path,
    connection: Connection | None = None,
    config: ProfileConfig = CONFIG,
    progress: Progress | None = None,
    space: SearchSpace | None = None,
    settings: DeviceConfig | None = None,
) -> LatencyTable:
    bench = Bench(
        DEVICE,
        connection or connect(DEVICE),
        settings or DeviceConfig(),
        unread,
        folder,
        progress or Progress(),
    )
    return profile(bench, space or small_space(), config)


@pytest.mark.slow
def test_the_table_reproduces_the_formula(tmp_path: Path) -> None:
    """With 1 % noise and five runs in each of seven rounds, medians are within 2 %."""
    space = mobile32()
    table = profiled(tmp_path, space=space, config=ProfileConfig())
    assert list(table.entries) == [op.key for op in space.ops]
    for op in space.ops:
        entry = table.entries[op.key]
        assert entry.ms == pytest.approx(simulated_ms(op), rel=0.02)
        assert isinstance(entry.p10_ms, float)
        assert isinstance(entry.p90_ms, float)
        assert entry.p10_ms < entry.ms < entry.p90_ms
        assert (entry.runs, entry.rounds, entry.noisy) == (35, 7, False)
    header = table.header
    assert (header.device, header.cpu, header.machine, header.space) == (
        "simulated",
        "simulated",
        "simulated",
        "mobile32",
    )
    assert "simulated" in header.runtime_version
    assert (header.runtime, header.dtype, header.threads, header.cores, header.batch) == (
        "litert",
        "fp32",
        1,
        (0,),
        1,
    )
    assert table.provenance["space_sha256"] == space.sha256


@pytest.mark.slow
def test_calibration_recovers_the_formula(tmp_path: Path) -> None:
    """Networks take 1.05 times the sum of their blocks plus 0.02 ms."""
    table = profiled(tmp_path, space=mobile32(), config=ProfileConfig())
    calibration = table.calibration
    assert calibration is not None
    assert calibration.networks == 12
    assert calibration.slope == pytest.approx(1.05, rel=0.03)
    assert calibration.intercept_ms == pytest.approx(0.02, abs=0.02)
    assert calibration.held_out is not None
    assert calibration.held_out.networks == 8
    assert calibration.held_out.mape < 0.01 < calibration.held_out.raw_mape
    assert calibration.held_out.max_error < 0.02
    assert calibration.held_out.spearman is not None
    assert calibration.held_out.spearman > 0.95


def test_settings_reach_the_runner(tmp_path: Path) -> None:
    plans: list[dict[str, Any]] = []

    class Watched(Simulated):
        def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
            plans.append(plan)
            yield from super().measure(plan, folder)

    settings = DeviceConfig(runtime="onnxruntime", threads=2, cores=(3, 5))
    table = profiled(
        tmp_path,
        Watched(DEVICE),
        ProfileConfig(rounds=2, max_rounds=2, min_ms=7.0, min_runs=9),
        settings=settings,
    )
    names = [op.key for op in small_space().ops] + [f"net-{i}" for i in range(20)]
    assert len(plans) == 2
    orders = [[item["id"] for item in plan["items"]] for plan in plans]
    for number, plan in enumerate(plans):
        assert (
            plan["runtime"],
            plan["threads"],
            plan["cores"],
            plan["min_ms"],
            plan["min_runs"],
        ) == ("onnxruntime", 2, [3, 5], 7.0, 9)
        assert sorted(orders[number]) == sorted(names)
        assert {item["round"] for item in plan["items"]} == {number}
    # every round has its own random order
    assert orders[0] != orders[1] != names != orders[0]
    assert (table.header.runtime, table.header.threads, table.header.cores) == (
        "onnxruntime",
        2,
        (3, 5),
    )
    assert table.header.layout == "NCHW"


class Killed(Exception):  # noqa: N818 - stands for a kill
    pass


class Dying(Simulated):
    """Stops answering after a number of rows."""

    def __init__(self, device: Device, rows: int, inner: Simulated | None = None) -> None:
        super().__init__(device)
        self.rows, self.inner = rows, inner

    def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
        for row in (
            self.inner.measure(plan, folder) if self.inner else super().measure(plan, folder)
        ):
            self.rows -= 1
            if self.rows < 0:
                raise Killed
            yield row


class Noisy(Simulated):
    """One op whose rounds differ by 30 % or more: all rounds, or only the first few."""

    def __init__(self, device: Device, key: str, rounds: int = 1000) -> None:
        super().__init__(device)
        self.key, self.noisy_rounds, self.asked = key, rounds, dict[str, list[int]]()

    def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
        for row in super().measure(plan, folder):
            if "id" in row:
                self.asked.setdefault(row["id"], []).append(row["round"])
            if row.get("id") == self.key and row["round"] < self.noisy_rounds:
                factor = 1 + 0.3 * (row["round"] % 3)
                row = {**row, "ms": [factor * ms for ms in row["ms"]]}
            yield row


class Restless(Simulated):
    """Every row is slowed down by up to three times, independently of the others."""

    def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
        for row in super().measure(plan, folder):
            if "ms" in row:
                factor = np.random.default_rng([*row["id"].encode(), row["round"]]).uniform(
                    1.0, 3.0
                )
                row = {**row, "ms": [factor * ms for ms in row["ms"]]}
            yield row


# 10,000 rows are more than a profile has: it is not interrupted
@pytest.mark.slow
@pytest.mark.parametrize("rows", [0, 1, 2, 17, 40, 85, 10_000])
def test_interrupted_and_resumed(rows: int, tmp_path: Path) -> None:
    """The same bytes as without interruption, and nothing is measured twice."""
    uninterrupted = profiled(tmp_path / "uninterrupted")
    if rows < 10_000:
        with pytest.raises(Killed):
            profiled(tmp_path / "killed", Dying(DEVICE, rows))
    else:
        profiled(tmp_path / "killed")
    resumed = profiled(tmp_path / "killed")
    assert resumed.to_json() == uninterrupted.to_json()
    measured = [
        (row["id"], row["round"])
        for row in JsonLines(tmp_path / "killed/samples.jsonl").read()
        if "id" in row
    ]
    assert len(measured) == len(set(measured)) == 3 * (len(small_space().ops) + 20)


@pytest.mark.slow
def test_interrupted_again_and_again_among_noisy_entries(tmp_path: Path) -> None:
    """Kills fall into the additional rounds too: which entries count as noisy must not
    depend on how far a round had got.
    """
    keys = [op.key for op in small_space().ops]

    class VeryNoisy(Simulated):
        """Every item varies, by a factor that depends only on item and round."""

        def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
            for row in super().measure(plan, folder):
                if "id" in row:
                    seed = [len(row["id"]), sum(map(ord, row["id"])), row["round"]]
                    factor = float(np.exp(np.random.default_rng(seed).normal(0, 0.2)))
                    row = {**row, "ms": [factor * ms for ms in row["ms"]]}
                yield row

    config = ProfileConfig(rounds=3, max_rounds=7, fit_networks=3, test_networks=2)
    uninterrupted = profiled(tmp_path / "uninterrupted", VeryNoisy(DEVICE), config)
    # some were measured again and some were not, and some stayed noisy
    assert {entry.rounds for entry in uninterrupted.entries.values()} > {3}
    assert any(uninterrupted.entries[key].noisy for key in keys)
    for _ in range(200):
        try:
            resumed = profiled(tmp_path / "killed", Dying(DEVICE, 4, VeryNoisy(DEVICE)), config)
            break
        except Killed:
            continue
    assert resumed.to_json() == uninterrupted.to_json()


@pytest.mark.slow
def test_a_torn_line_is_measured_again(tmp_path: Path) -> None:
    """A kill in the middle of a write leaves half a line, and a disk error may leave
    garbage.
    """
    uninterrupted = profiled(tmp_path / "uninterrupted")
    with pytest.raises(Killed):
        profiled(tmp_path / "torn", Dying(DEVICE, 20))
    samples = tmp_path / "torn/samples.jsonl"
    samples.write_bytes(samples.read_bytes()[:-30])
    assert profiled(tmp_path / "torn").to_json() == uninterrupted.to_json()
    lines = samples.read_bytes().splitlines(keepends=True)
    samples.write_bytes(b"".join([*lines[:10], b"\x00\xff\x00\n", *lines[11:40], lines[40][:25]]))
    assert profiled(tmp_path / "torn").to_json() == uninterrupted.to_json()
    assert all(json.loads(line) for line in samples.read_bytes().splitlines())


class Listening(Progress):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.advanced: dict[str, int] = {}

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[ProgressBar]:
        outer = self

        class Bar(ProgressBar):
            def advance(self, steps: int = 1, note: str = "") -> None:
                outer.advanced[description] = outer.advanced.get(description, done) + steps

        yield Bar()

    def warning(self, message: str) -> None:
        self.warnings.append(message)


def test_noisy_entries_are_measured_again_then_flagged(tmp_path: Path) -> None:
    victim = small_space().ops[2].key
    connection, progress = Noisy(DEVICE, victim), Listening()
    table = profiled(tmp_path, connection, progress=progress)
    assert sorted(connection.asked[victim]) == list(range(7))
    assert all(
        sorted(rounds) == [0, 1, 2] for name, rounds in connection.asked.items() if name != victim
    )
    assert table.entries[victim].noisy
    assert table.entries[victim].rounds == 7
    assert isinstance(table.entries[victim].spread, float)
    assert table.entries[victim].spread > 0.10
    assert [key for key, entry in table.entries.items() if entry.noisy] == [victim]
    assert len(progress.warnings) == 1
    assert victim in progress.warnings[0]
    assert progress.advanced["measuring"] == 3 * (len(small_space().ops) + 20)


def test_an_entry_that_calms_down_is_not_flagged(tmp_path: Path) -> None:
    """Its additional rounds outvote the bad ones, and no more than needed are taken."""
    victim = small_space().ops[2]
    connection, progress = Noisy(DEVICE, victim.key, rounds=3), Listening()
    table = profiled(tmp_path, connection, ProfileConfig(rounds=3, max_rounds=20), progress)
    assert 3 < len(connection.asked[victim.key]) < 20
    assert not table.entries[victim.key].noisy
    assert table.entries[victim.key].ms == pytest.approx(simulated_ms(victim), rel=0.03)
    assert progress.warnings == []


def test_spread_by_hand() -> None:
    """Medians 1, 2, 3, 4, 5: quartiles 2 and 4, median 3."""
    assert spread_of([[1, 1, 9], [2], [3, 3, 0], [4], [5, 5, 5]]) == pytest.approx(2 / 3)
    assert spread_of([[7.0]]) == 0.0


def test_a_failing_item_is_named(tmp_path: Path) -> None:
    victim = small_space().ops[3].key

    class Failing(Simulated):
        def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
            for row in super().measure(plan, folder):
                yield (
                    {"id": victim, "round": row["round"], "error": "RuntimeError: no such operator"}
                    if row.get("id") == victim
                    else row
                )

    with pytest.raises(DeviceError) as caught:
        profiled(tmp_path, Failing(DEVICE))
    assert victim in str(caught.value)
    assert "no such operator" in str(caught.value)
    # rows measured before the failure count
    assert profiled(tmp_path).to_json() == profiled(tmp_path / "uninterrupted").to_json()


@pytest.mark.slow
@pytest.mark.parametrize(
    "space", [mobile32(), proxylessnas(), small_space()], ids=lambda space: space.name
)
def test_networks_are_spread_over_the_range(space: MacroSpace) -> None:
    """They are the nearest to 20 evenly spaced sizes; uniform picks would crowd around
    the middle.
    """
    networks = spread_networks(space, 20, np.random.default_rng(0))
    macs = np.array([arch.macs for arch in networks], dtype=float)
    assert len(networks) == 20
    assert np.all(np.diff(macs) >= 0)
    samples = [space.decode(space.sample(np.random.default_rng(i))).macs for i in range(300)]
    assert macs[0] <= min(samples)
    assert macs[-1] >= max(samples)
    if space.size > 1000:
        gaps = np.diff(macs) / np.ptp(macs)
        assert gaps.max() < 0.12  # even spacing is 0.053
        assert len({arch.blocks for arch in networks}) == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fit", "test"), [(12, 8), (3, 2), (1, 8), (4, 12), (5, 1), (0, 8), (12, 0), (0, 0)]
)
def test_plan_holds_as_many_networks_as_asked(fit: int, test: int) -> None:
    plan = make_plan(mobile32(), ProfileConfig(fit_networks=fit, test_networks=test), 0)
    assert (len(plan.fit), len(plan.test)) == (fit, test)
    assert len(plan.items) == len(plan.ops) + fit + test
    if (fit, test) == (12, 8):  # evaluated inside the range of the fit
        assert plan.fit[0].macs <= min(arch.macs for arch in plan.test)
        assert plan.fit[-1].macs >= max(arch.macs for arch in plan.test)


def test_no_networks_no_calibration(tmp_path: Path) -> None:
    assert (
        profiled(
            tmp_path, config=ProfileConfig(rounds=1, max_rounds=1, fit_networks=0, test_networks=0)
        ).calibration
        is None
    )


def test_a_table_that_the_search_would_refuse_is_not_measured_first() -> None:
    def check(*overrides: str) -> None:
        Profile.check_settings(load_experiment(None, list(overrides)), small_space())

    with pytest.raises(ConfigError, match=r"^profile\.fit_networks = 0 makes a table without a"):
        check("profile.fit_networks=0")
    check("profile.fit_networks=0", "search.allow_uncalibrated=true")
    check("profile.fit_networks=1")


@pytest.mark.slow
def test_whole_networks_alone_give_a_table(tmp_path: Path) -> None:
    """No op is timed; the simulated clock is a sum over ops, so the fit must predict
    networks that it has not seen.
    """
    space, ops_per_item = mobile32(), []

    class Counting(Simulated):
        def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
            ops_per_item.extend(len(item["ops"]) for item in plan["items"])
            yield from super().measure(plan, folder)

    config = ProfileConfig(rounds=3, max_rounds=3, mode="networks", networks=30)
    table = profiled(tmp_path, Counting(DEVICE), config, space=space)
    assert min(ops_per_item) > 1 and len(ops_per_item) == 90  # 30 networks, 3 rounds
    assert set(table.entries) == {op.key for op in space.ops}
    calibration = table.calibration
    assert calibration is not None and calibration.held_out is not None
    assert (calibration.networks, calibration.held_out.networks) == (30, 30)
    assert calibration.held_out.mape < 0.02
    rng = np.random.default_rng(5)
    for _ in range(20):
        arch = space.decode(space.sample(rng))
        truth = 1.05 * sum(simulated_ms(op) for op in arch.ops()) + 0.02
        assert latency_ms(arch, table) == pytest.approx(truth, rel=0.06)
    assert "30 networks" in table.provenance["more_networks"] and table.header.device == "simulated"


def test_a_prior_of_another_space_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    profiled(tmp_path / "other").save(tmp_path / "other.json")
    config = ProfileConfig(mode="networks", networks=10, prior=(str(tmp_path / "other.json"),))
    with pytest.raises(CoverageError, match="lacks"):
        profiled(tmp_path / "new", config=config, space=mobile32())
    assert not (tmp_path / "new" / "samples.jsonl").exists()


def test_notes_are_reported_and_conditions_kept(tmp_path: Path) -> None:
    """A phone's conditions come with its rows; the table holds their range over the
    whole measurement, which survives a kill.
    """

    class Phone(Simulated):
        def measure(self, plan: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
            yield {"note": "waiting for it to cool"}
            for row in super().measure(plan, folder):
                yield row
                yield {
                    "conditions": {
                        "celsius": 30.5 + plan["items"][0]["round"],
                        "governor": "schedutil",
                    }
                }

    class Recording(Progress):
        messages: list[str] = []

        def info(self, message: str) -> None:
            self.messages.append(message)

    table = profiled(tmp_path, Phone(DEVICE), ProfileConfig(rounds=3, max_rounds=3), Recording())
    assert Recording.messages == ["waiting for it to cool"] * 3
    assert (
        table.provenance["device_celsius"] == "30.5 to 32.5"
        and table.provenance["device_governor"] == "schedutil"
    )
    assert profiled(tmp_path, Phone(DEVICE), ProfileConfig(rounds=3, max_rounds=3)) == table


def test_a_runtime_that_the_device_lacks_is_refused_before_anything_is_built(
    tmp_path: Path,
) -> None:
    class Lacking(Simulated):
        def runtimes(self) -> dict[str, str]:
            return {"onnxruntime": "onnxruntime 1.20"}

    def build(ops: tuple[Op, ...], runtime: str, dtype: str) -> Path:
        raise AssertionError("nothing should be built")

    with pytest.raises(
        DeviceError, match=r"simulated does not run litert \(it has onnxruntime 1.20\)"
    ):
        profile(
            Bench(DEVICE, Lacking(DEVICE), DeviceConfig(), build, tmp_path), small_space(), CONFIG
        )


def simulated(noise: float) -> Simulated:
    return Simulated(DEVICE.model_copy(update={"options": {"noise": str(noise)}}))


def test_a_fit_to_noisy_networks_is_to_all_of_them(tmp_path: Path) -> None:
    """Each by itself: a slowness that all share is none. Running it again would measure
    nothing, so refusing the fit would leave no way out.
    """
    config = ProfileConfig(rounds=3, max_rounds=3, max_spread=0.01, mode="networks", networks=5)
    table = profiled(tmp_path, simulated(0.1), config, space=mobile32())
    calibration = table.calibration
    assert calibration is not None and calibration.held_out is not None
    assert (calibration.networks, calibration.noisy_networks) == (5, 5)
    assert table.provenance["noise"].startswith("5 of 5 entries stayed noisy (spread between")


@pytest.mark.parametrize("mode", ["ops", "networks"])
def test_a_restless_device_gives_a_table_and_a_note(
    mode: Literal["ops", "networks"], tmp_path: Path
) -> None:
    progress = Listening()
    table = profiled(
        tmp_path, simulated(0.2), ProfileConfig(mode=mode, networks=20), progress=progress
    )
    calibration = table.calibration
    assert calibration is not None and calibration.held_out is not None
    assert calibration.noisy_networks > 0
    assert calibration.held_out.mape < 0.2
    assert "entries stayed noisy (spread between rounds up to" in table.provenance["noise"]
    [warning] = progress.warnings
    assert table.provenance["noise"] in warning and "profile again with --fresh" in warning


def test_a_device_that_is_too_busy_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        DeviceError,
        match=(
            r"^simulated was too busy to be measured: \d+ of 30 entries stayed noisy \(spread.*\),"
            r" and the table would be off by \d+% on average: end other .* with --fresh\.$"
        ),
    ):
        profiled(tmp_path, simulated(2.0))


def test_a_quiet_device_gives_no_note(tmp_path: Path) -> None:
    assert profiled(tmp_path, simulated(0.0)).provenance.keys() == {"method", "space_sha256"}


def test_a_table_says_that_it_was_measured_without_pinning(tmp_path: Path) -> None:
    table = profiled(tmp_path, settings=DeviceConfig(cores=()))
    assert table.provenance["pinning"] == "not pinned: the system of the device chose the cores"
    assert table.header.cores == "unknown"


def test_why_a_runtime_is_missing_comes_from_the_device(tmp_path: Path) -> None:
    class Lacking(Simulated):
        def runtimes(self) -> dict[str, str]:
            return {"onnxruntime": "onnxruntime 1.20"}

        def missing(self) -> dict[str, str]:
            return {"litert": "This Python has no ai-edge-litert: python3 -m pip install it"}

    with pytest.raises(
        DeviceError, match=r"^simulated: This Python has no ai-edge-litert: python3 -m pip install"
    ):
        profiled(tmp_path, Lacking(DEVICE))


def test_a_device_without_the_cores_leaves_the_earlier_profile_where_it_is(
    tmp_path: Path,
) -> None:
    config = write_tiny(tmp_path)
    root = tmp_path / "run"
    Pipeline(load_experiment(config), root, Progress()).run_stage("profile")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    other = load_experiment(config, ["device.name=host", "device.cores=[4000]"])
    with pytest.raises(DeviceError, match=r"Cannot run on cores \[4000\]"):
        Pipeline(other, root, Progress()).run_stage("profile")
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_a_board_out_of_reach_leaves_the_earlier_profile_where_it_is(tmp_path: Path) -> None:
    if shutil.which("ssh") is None:
        pytest.skip("there is no ssh client here")
    config = write_tiny(tmp_path)
    root = tmp_path / "run"
    Pipeline(load_experiment(config), root, Progress()).run_stage("profile")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        options = {"host": "127.0.0.1", "port": str(taken.getsockname()[1])}
        Device(id="board", soc="none", connection="ssh", options=options).save(
            tmp_path / "device.json"
        )
        for fresh in (False, True):
            with pytest.raises(DeviceError, match="cannot reach board over ssh"):
                Pipeline(load_experiment(config), root, Progress()).run_stage(
                    "profile", fresh=fresh
                )
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_calibration_of_noisy_networks_uses_all_of_them(tmp_path: Path) -> None:
    """If hardly any are quiet, the few that happen to be tell less than all do."""
    table = profiled(
        tmp_path, Restless(DEVICE), ProfileConfig(rounds=30, max_rounds=30), space=mobile32()
    )
    calibration = table.calibration
    assert calibration is not None and calibration.held_out is not None
    assert calibration.noisy_networks > 17
    assert (calibration.networks, calibration.held_out.networks) == (12, 8)
    assert calibration.held_out.mape < 0.1
