"""Conformance tests that third-party plug-ins inherit. A plug-in that passes them works
in every stage.

    from hwnas.testing import StrategyConformance

    class TestMine(StrategyConformance):
        def strategy(self):
            return Mine(Mine.Config())

The tests are plain pytest classes. They run the real code on small problems with known
answers; no network is trained.
"""

from __future__ import annotations

import copy
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from hwnas.core.arch import Architecture, Picks
from hwnas.core.cost import CostModel
from hwnas.core.objective import AbsoluteObjective
from hwnas.core.ops import Classifier, Conv, MBConv, Op
from hwnas.core.space import MacroSpace, SearchSpace, SpaceStage
from hwnas.core.table import Calibration, Entry, LatencyTable, TableHeader
from hwnas.data.images import Images, evaluation_batches, sampled_images
from hwnas.devices.device import HOST, Connection, connect
from hwnas.export.interface import Interface
from hwnas.export.metadata import ModelCard
from hwnas.export.target import Target, Trained
from hwnas.export.timing import timing_file
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.nn.network import Network
from hwnas.search.proposal import one_hot
from hwnas.search.strategy import Gates, Metrics, Probes, SearchContext, Strategy
from hwnas.task import EvaluationSettings, Task


def tiny_space() -> MacroSpace:
    """Four open slots of inverted residuals and a searched width: 3,200 architectures."""
    first = ("ir_k3_e3", "ir_k5_e3", "ir_k3_e6", "ir_k5_e6")
    later = (*first, "skip")
    stages = (
        SpaceStage(widths=(16,), slots=(("cn_k3",),)),
        SpaceStage(widths=(24, 32), stride=2, slots=(first, later)),
        SpaceStage(widths=(40,), stride=2, slots=(first, later)),
        SpaceStage(widths=(64,), slots=(first,)),
        SpaceStage(widths=(96,), slots=(("cn_k1",),)),
    )
    return MacroSpace(name="tiny", resolution=32, classes=10, stages=stages)


def synthetic_table(space: SearchSpace) -> LatencyTable:
    """A table in which every op takes its MACs at 1e9 per second, plus 10 microseconds."""
    header = TableHeader(
        device="synthetic",
        cpu="synthetic",
        machine="synthetic",
        runtime="synthetic",
        runtime_version="1",
        dtype="fp32",
        threads=1,
        cores=(0,),
        governor="synthetic",
        layout="NHWC",
        batch=1,
        date="2000-01-01",
        space=space.name,
    )
    entries = {op.key: Entry(ms=op.macs / 1e6 + 0.01) for op in space.ops}
    return LatencyTable(
        header=header,
        entries=entries,
        calibration=Calibration(intercept_ms=0.0, slope=1.0, networks=0),
    )


class Problem:
    """A search with a known answer: every option of ``tiny_space`` adds a given amount
    to the quality.

    Slower options add more, but overrunning the target costs more than they add. So the
    budget binds: the best architecture without it is far too slow. The options of one
    architecture near the target, drawn with ``seed``, add a little extra. The optimum
    under the budget is found by exhaustive search.
    """

    def __init__(self, seed: int) -> None:
        self.space = tiny_space()
        self.cost = CostModel.of_table(self.space, synthetic_table(self.space))
        low, high = self.cost.range()
        self.target_ms = low + 0.45 * (high - low)
        self.tolerance = 0.02
        planted = self._near_target(np.random.default_rng(seed))

        smallest = {choice.key: choice.options[0] for choice in self.space.choices}
        self.gains: dict[str, np.ndarray] = {}
        for choice in self.space.choices:
            costs = [self.cost.cost({**smallest, choice.key: option}) for option in choice.options]
            ms = np.array(costs)
            bonus = 0.004 * np.array([option == planted[choice.key] for option in choice.options])
            self.gains[choice.key] = 0.06 * (ms - ms.min()) / (high - low) + bonus

        options = [range(len(choice.options)) for choice in self.space.choices]
        self.index_NC = np.array(list(itertools.product(*options)))
        self.best = self.space.at(self.index_NC[self._rewards().argmax()])

    def _near_target(self, rng: np.random.Generator) -> Picks:
        """A random architecture whose latency is close to the target."""
        while True:
            picks = self.space.sample(rng)
            if abs(self.cost.cost(picks) / self.target_ms - 1) <= 0.25 * self.tolerance:
                return picks

    def _rewards(self) -> np.ndarray:
        """The rewards [N] of all architectures; -inf for those that miss the target."""
        latency_N = self.cost.costs(self.index_NC)
        gains = []
        for column, choice in enumerate(self.space.choices):
            gains.append(self.gains[choice.key][self.index_NC[:, column]])
        quality_N = 0.5 + np.sum(gains, axis=0)
        error_N = np.abs(latency_N / self.target_ms - 1)
        within_N = error_N <= self.tolerance
        # otherwise a strategy could pass without looking at latency, or by luck
        assert latency_N[quality_N.argmax()] > 1.3 * self.target_ms, "the budget must bind"
        assert 10 <= within_N.sum() <= 0.2 * len(within_N), (
            "some architectures must meet the budget, but not most"
        )
        return np.where(within_N, quality_N - 0.1 * error_N, -np.inf)

    def quality(self, gates: Gates) -> float:
        """The quality in 0..1 of an architecture or mixture, as an infinitely large
        held-out set would measure it.
        """
        gains = 0.0
        for key, gain in self.gains.items():
            gains += float(np.dot(np.asarray(gates[key], dtype=float), gain))
        return 0.5 + gains

    def context(self, steps: int, batch_size: int = 256) -> SearchContext:
        """A search context without a super-net: there are no weights to learn."""
        known = KnownWeights(self)
        return SearchContext(
            self.space,
            self.cost,
            AbsoluteObjective(),
            self.target_ms,
            self.tolerance,
            steps,
            batch_size,
            weights=known,
            evaluator=known,
        )

    def ranked(self, proposals: list[Picks]) -> list[Picks]:
        """Proposals by reward, best first, as the search stage ranks them."""

        def reward(picks: Picks) -> float:
            index = self.space.index(picks)
            quality = 0.5 + sum(gain[i] for i, gain in zip(index, self.gains.values(), strict=True))
            return AbsoluteObjective().reward(quality, self.cost.cost(picks), self.target_ms)

        return sorted(proposals, key=reward, reverse=True)


class KnownWeights:
    """The shared weights of a ``Problem``. Whatever they are trained on, every
    architecture is exactly as good as its gains.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def train(
        self, gates: Sequence[Gates], *, split: bool, teach: bool, skip_dropout: float
    ) -> Metrics:
        """Check the gates; there is nothing to learn."""
        del split, teach, skip_dropout
        assert gates, "an update needs gates"
        for path_gates in gates:
            self._check(path_gates)
        return {}

    def qualities(self, gates: Sequence[Gates], multiple: int) -> list[float]:
        """The exact qualities."""
        del multiple
        return [self.problem.quality(path_gates) for path_gates in gates]

    def gate_gradients(
        self, gates: Gates, probes: Probes, order: int, skip_dropout: float
    ) -> tuple[float, dict[str, np.ndarray]]:
        """The loss is 1 - quality: its derivative is minus the gain of every option
        that is executed or probed, and 0 for all others.
        """
        del order, skip_dropout
        self._check(gates)
        gradients = {}
        for key, gain in self.problem.gains.items():
            executed = np.asarray(gates[key]) != 0
            executed[list(probes.get(key, ()))] = True
            gradients[key] = np.where(executed, -np.asarray(gain), 0.0)
        return 1 - self.problem.quality(gates), gradients

    def evaluate(self, picks: Picks) -> float:
        """The exact quality."""
        return self.problem.quality(one_hot(picks, self.problem.space))

    def remember_teacher(self, picks: Picks) -> None:
        """There is nothing to teach."""
        self.problem.space.check(picks)

    def grow(self, number: int) -> None:
        """There are no weights to grow."""

    def _check(self, gates: Gates) -> None:
        gains = self.problem.gains
        assert gates.keys() == gains.keys(), (
            f"gates for {sorted(gates)}, but the choices are {sorted(gains)}"
        )
        for key, gate in gates.items():
            total = float(np.sum([float(weight) for weight in gate]))
            assert math.isclose(total, 1.0, abs_tol=1e-6), f"the gates of {key} add up to {total}"


def prepared(strategy: Strategy, ctx: SearchContext, seed: int) -> None:
    """Set a strategy up as the search stage does, with a generator that no step uses."""
    ctx.rng = np.random.default_rng([seed, ctx.steps, 1])
    strategy.setup(ctx)


def searched(
    strategy: Strategy, ctx: SearchContext, seed: int, first: int = 0, last: int | None = None
) -> list[Metrics]:
    """Run a strategy's steps as the search stage does, each with a new generator from
    (seed, step), so that a resumed search draws the same numbers.
    """
    end = ctx.steps if last is None else last
    metrics = []
    for number in range(first, end):
        ctx.step = number
        ctx.rng = np.random.default_rng([seed, number])
        metrics.append(strategy.step(ctx))
    return metrics


def proposed(strategy: Strategy, ctx: SearchContext, seed: int, count: int) -> list[Picks]:
    """The strategy's proposals after the last step."""
    ctx.step = ctx.steps
    ctx.rng = np.random.default_rng([seed, ctx.steps])
    return strategy.propose(ctx, count)


class StrategyConformance(ABC):
    """What every search method has to do. Inherit, and return a new strategy from
    ``strategy``.

    It gets ``steps`` steps and ``proposals`` proposals to find the optimum of a
    ``Problem``.
    """

    steps: ClassVar[int] = 1200
    proposals: ClassVar[int] = 8

    @abstractmethod
    def strategy(self) -> Strategy:
        """A new strategy, not yet set up."""

    def _search(
        self, problem: Problem, seed: int, steps: int
    ) -> tuple[Strategy, SearchContext, list[Metrics]]:
        strategy = self.strategy()
        ctx = problem.context(steps)
        prepared(strategy, ctx, seed)
        return strategy, ctx, searched(strategy, ctx, seed)

    def test_proposals_are_valid_distinct_and_within_the_tolerance(self) -> None:
        """Before and after learning, also for targets near both ends of the range."""
        problem = Problem(0)
        low, high = problem.cost.range()
        for target_ms in (problem.target_ms, 1.01 * low, 0.99 * high):
            strategy = self.strategy()
            ctx = problem.context(40)
            ctx.target = target_ms
            strategy.setup(ctx)
            for steps in (0, 40):
                searched(strategy, ctx, 0, 0, steps)
                proposals = proposed(strategy, ctx, 0, 6)
                assert 1 <= len(proposals) <= 6, (
                    f"{len(proposals)} proposals at {target_ms} ms, but 1 to 6 were wanted"
                )
                for picks in proposals:
                    problem.space.check(picks)
                    latency = problem.cost.cost(picks)
                    assert abs(latency / target_ms - 1) <= ctx.tolerance, (
                        f"{latency} ms is not within 2 % of {target_ms} ms"
                    )
                names = {problem.space.decode(picks).identity for picks in proposals}
                assert len(names) == len(proposals), "a proposal was made twice"

    def test_metrics_are_finite_numbers(self) -> None:
        """Every step reports numbers that a log can hold."""
        _, _, metrics = self._search(Problem(0), 0, 40)
        for row in metrics:
            for name, value in row.items():
                assert isinstance(value, float | int) and math.isfinite(value), (
                    f"metric {name} is {value!r}"
                )

    def test_deterministic_under_a_seed(self) -> None:
        """The same seed gives the same run, another seed a different one."""
        problem = Problem(0)
        runs = []
        for seed in (3, 3, 4):
            strategy, ctx, metrics = self._search(problem, seed, 60)
            runs.append((metrics, proposed(strategy, ctx, seed, 6)))
        assert runs[0] == runs[1], "two runs with the same seed differ"
        assert runs[0] != runs[2], "the seed changes nothing"

    def test_continues_identically_from_its_state(self) -> None:
        """A new strategy that loads the state of any step continues as the old one would
        have.
        """
        problem = Problem(0)
        strategy, ctx, straight = self._search(problem, 1, 60)
        expected = proposed(strategy, ctx, 1, 6)
        for stop in (0, 7, 33, 60):
            early, early_ctx = self.strategy(), problem.context(60)
            prepared(early, early_ctx, 1)
            before = searched(early, early_ctx, 1, 0, stop)
            state = copy.deepcopy(early.state_dict())
            # steps after a checkpoint must not leak into it
            searched(early, early_ctx, 1, stop, min(stop + 5, 60))
            late, late_ctx = self.strategy(), problem.context(60)
            prepared(late, late_ctx, 1)
            late.load_state_dict(state)
            after = searched(late, late_ctx, 1, stop)
            assert before + after == straight, f"after a stop at step {stop}, the metrics differ"
            assert proposed(late, late_ctx, 1, 6) == expected, (
                f"after a stop at step {stop}, the proposals differ"
            )

    def test_state_survives_a_checkpoint(self, tmp_path: Path) -> None:
        """``torch.load(weights_only=True)`` must be able to read the state: tensors,
        numbers, strings and containers of them.
        """
        strategy, ctx, _ = self._search(Problem(0), 2, 40)
        torch.save(strategy.state_dict(), tmp_path / "state.pt")
        again = self.strategy()
        again.setup(ctx)
        again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert proposed(again, ctx, 2, 6) == proposed(strategy, ctx, 2, 6)

    def test_finds_the_known_optimum(self) -> None:
        """On three problems from three seeds, with a budget that binds."""
        for seed in range(3):
            problem = Problem(seed)
            strategy, ctx, _ = self._search(problem, seed, self.steps)
            best = problem.ranked(proposed(strategy, ctx, seed, self.proposals))[0]
            assert best == problem.best, (
                f"seed {seed}: found {best}, but the optimum is {problem.best}"
            )


class DeviceConformance(ABC):
    """What every connection to a device has to do. Subclass it, and return one from
    ``connection``.
    """

    runtime: ClassVar[str] = "litert"
    dtype: ClassVar[str] = "fp32"
    reads_files: ClassVar[bool] = True
    """False if the device does not open model files and cannot notice a broken one."""

    OPS: ClassVar[tuple[Op, ...]] = (
        Conv(8, 3, 8, kernel=3, act="relu"),
        MBConv(8, 8, 8, 24, 3, act="relu", residual=True),
        Classifier(8, 8, 10),
    )

    @abstractmethod
    def connection(self) -> Connection:
        """A connection to the device."""

    def plan(self, rounds: int = 1) -> dict[str, Any]:
        """A plan of three small ops and the network they form."""
        chains = {**{op.key: (op,) for op in self.OPS}, "net-0": self.OPS}
        items = []
        for number in range(rounds):
            for name, ops in chains.items():
                items.append(
                    {
                        "id": name,
                        "path": str(timing_file(ops, self.runtime, self.dtype)),
                        "round": number,
                        "ops": [op.key for op in ops],
                    }
                )
        return {
            "runtime": self.runtime,
            "threads": 1,
            "cores": list(self.connection().cores(1)),
            "min_ms": 1.0,
            "min_runs": 3,
            "items": items,
        }

    def measured(self, plan: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
        """Header and rows of a plan, without notes and conditions, which may come in
        between.
        """
        rows = list(self.connection().measure(plan, folder))
        for row in rows:
            if "note" in row:
                assert isinstance(row["note"], str) and row["note"], f"note {row['note']!r}"
            for value in row.get("conditions", {}).values():
                assert isinstance(value, int | float | str), f"conditions {row}"
        return [row for row in rows if not row.keys() & {"note", "conditions"}]

    def test_header_then_one_row_per_item(self, tmp_path: Path) -> None:
        """Ids and rounds are in the plan's order, and every run is in milliseconds."""
        plan = self.plan(rounds=2)
        header, *rows = self.measured(plan, tmp_path)
        assert "runner" in header, f"the first row is not a header: {header}"
        assert [(row["id"], row["round"]) for row in rows] == [
            (item["id"], item["round"]) for item in plan["items"]
        ]
        for row in rows:
            assert len(row["ms"]) >= plan["min_runs"], f"{row['id']} ran {len(row['ms'])} times"
            assert all(math.isfinite(ms) and ms > 0 for ms in row["ms"]), (
                f"{row['id']} took {row['ms']}"
            )

    def test_header_describes_the_measurement(self, tmp_path: Path) -> None:
        """It has what the header of a table needs, and the cores of the plan."""
        plan = self.plan()
        header = self.measured(plan, tmp_path)[0]
        for key in ("runtime", "runtime_version", "cpu", "machine", "governor", "python"):
            assert isinstance(header[key], str) and header[key], f"{key} is {header[key]!r}"
        assert header["runtime"] == self.runtime
        assert header["threads"] == 1
        assert header["cores"] == plan["cores"] or header["cores"] == "unknown", (
            f"pinned to {header['cores']}, not {plan['cores']}"
        )

    def test_names_its_runtimes(self) -> None:
        """The tested runtime is among them, with its version."""
        version = self.connection().runtimes()[self.runtime]
        assert isinstance(version, str) and version, (
            f"runtime {self.runtime} has version {version!r}"
        )

    def test_cores(self) -> None:
        """As many different cores as threads."""
        cores = self.connection().cores(1)
        assert len(cores) >= 1 and len(set(cores)) == len(cores)

    def test_a_broken_file_is_an_error_of_its_item(self, tmp_path: Path) -> None:
        """The error is reported for this item and no other."""
        if not self.reads_files:
            import pytest

            pytest.skip("this device does not open model files (reads_files = False)")
        plan = self.plan()
        broken = tmp_path / "broken.tflite"
        broken.write_bytes(b"this is not a model")
        plan["items"][1]["path"] = str(broken)
        plan["items"][2]["path"] = str(tmp_path / "missing.tflite")
        _, *rows = self.measured(plan, tmp_path)
        assert [row["id"] for row in rows] == [item["id"] for item in plan["items"]]
        assert ["error" in row for row in rows] == [False, True, True, False], f"rows: {rows}"

    def test_predicts_row_by_row(self, tmp_path: Path) -> None:
        """One output per image, each a function of its own image."""
        model = timing_file(self.OPS, "litert", "fp32")
        images = np.random.default_rng(0).standard_normal((3, 8, 8, 3)).astype(np.float32)
        outputs = self.connection().predict(model, images, tmp_path)
        assert outputs.shape == (3, 10)
        assert outputs.dtype == np.float32
        assert np.abs(outputs[0] - outputs[1]).max() > 0
        single = self.connection().predict(model, images[1:2], tmp_path)
        assert np.allclose(single[0], outputs[1], atol=1e-6)

    def test_predicts_from_pixels(self, tmp_path: Path) -> None:
        """A file that takes uint8 pixels gets uint8 images, without preprocessing."""
        network = timing_file(self.OPS, "litert", "fp32").read_bytes()
        interface = Interface("uint8", False, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
        files = {"network": network, "pixels": interface.around(network, "litert")}
        for name, content in files.items():
            (tmp_path / f"{name}.tflite").write_bytes(content)
        images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
        actual = self.connection().predict(tmp_path / "pixels.tflite", images, tmp_path)
        expected = self.connection().predict(
            tmp_path / "network.tflite", interface.seen(images), tmp_path
        )
        assert actual.shape == (3, 10) and actual.dtype == np.float32
        assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


class TargetConformance(ABC):
    """What every target has to do. Inherit, and name the class in ``target``. Its
    runtime must be installed on this computer.
    """

    target: ClassVar[type[Target]]
    tolerance: ClassVar[float] = 1e-4
    """The largest error of an exact target's outputs, relative to the largest output.
    """

    KEYS: ClassVar[tuple[str, ...]] = (
        "conv-h16-i3-o8-k3-s2-relu",
        "mbconv-h8-i8-o8-m24-k3-q8-relu-id",
        "classifier-h8-i8-o10",
    )

    def network(self, keys: Sequence[str] | None = None) -> ClassificationNetwork:
        """A small classifier, or one made of the ops with other keys."""
        blocks = tuple(map(Op.parse, keys or self.KEYS))
        arch = Architecture(name="small", in_channels=blocks[0].in_ch, blocks=blocks)
        return ClassificationNetwork(arch, generator=torch.Generator().manual_seed(0)).eval()

    def trained(self) -> Trained:
        """The classifier with float32 inputs and logits as outputs."""
        images = np.random.default_rng(1).standard_normal((8, 16, 16, 3)).astype(np.float32)
        interface = Interface("float32", False, (0.5,) * 3, (0.25,) * 3)
        card = ModelCard(
            "small", 3, tuple("abcdefghij"), "logits", interface.normalisation, "as it is"
        )
        return Trained(self.network(), interface, images, card)

    def test_its_fields(self) -> None:
        """A plain file name, an order of axes, installed packages."""
        target = self.target()
        assert target.file == Path(target.file).name and Path(target.file).suffix
        assert target.layout in ("NHWC", "NCHW") and target.runtime and target.dtype
        for package in target.packages:
            assert version(package)

    def test_its_files_compute_what_pytorch_does(self, tmp_path: Path) -> None:
        """Equal up to rounding if the target is exact; if not, the same best class for
        most images.
        """
        target = self.target()
        trained = self.trained()
        path = tmp_path / target.file
        path.write_bytes(target.write(trained))
        images_NHWC = np.random.default_rng(2).standard_normal((16, 16, 16, 3)).astype(np.float32)
        actual = connect(HOST).predict(path, images_NHWC, tmp_path)
        with torch.inference_mode():
            expected = trained.network(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)).numpy()
        assert actual.shape == expected.shape and actual.dtype == np.float32
        if target.exact:
            assert np.abs(actual - expected).max() <= self.tolerance * np.abs(expected).max()
        else:
            assert (actual.argmax(1) == expected.argmax(1)).mean() >= 0.7

    def test_ops_and_networks_are_timed(self, tmp_path: Path) -> None:
        """The runner times files of one op and of several."""
        target = self.target()
        items: list[dict[str, Any]] = []
        for keys in ((self.KEYS[0],), (self.KEYS[1],), self.KEYS):
            path = tmp_path / f"{len(items)}{Path(target.file).suffix}"
            path.write_bytes(target.timing_file(self.network(keys)))
            items.append({"id": path.name, "path": str(path), "round": 0, "ops": list(keys)})
        host = connect(HOST)
        plan = {
            "runtime": target.runtime,
            "threads": 1,
            "cores": list(host.cores(1)),
            "min_ms": 1.0,
            "min_runs": 3,
            "items": items,
        }
        header, *rows = host.measure(plan, tmp_path)
        assert header["runtime"] == target.runtime
        assert [row["id"] for row in rows] == [item["id"] for item in items]
        assert all(min(row["ms"]) > 0 for row in rows), rows


class TaskConformance(ABC):
    """What every task has to do. Inherit, name the class in ``task``, and provide a
    network of the task and test images to evaluate it on.
    """

    task: ClassVar[type[Task]]
    tolerance: ClassVar[float] = 0.005
    """Tolerance of the metrics of a file with PyTorch's outputs: among answers that are
    about equally good, rounding may select another.
    """

    @abstractmethod
    def network(self) -> Network:
        """A small network, in eval mode."""

    @abstractmethod
    def images(self) -> Images:
        """Test images of the network's size."""

    def test_its_fields(self) -> None:
        """Its metric comes first wherever metrics are listed, and a point of its curve
        has a cost.
        """
        task = self.task()
        assert task.numbers[0] == task.tiles[0] == task.metric
        assert next(iter(task.curve.values())) == task.metric
        assert task.curve_images > 0
        assert task.curve_cost > 0
        assert task.network_kind == self.network().arch.task

    def test_its_loss_has_a_gradient(self) -> None:
        """For a batch of the images, with respect to every weight."""
        task = self.task()
        network = self.network().train()
        x_NCHW, y = self.images().__getitems__([(index, 0) for index in range(4)])
        loss, _ = task.criterion(network.arch)(network(x_NCHW), y)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        assert torch.isfinite(loss)
        for gradient in gradients:
            assert torch.isfinite(gradient).all()

    def test_pytorchs_outputs_are_pytorchs(self) -> None:
        """Compared with themselves they are equal, and they have the size that
        ``outputs`` declares.
        """
        task = self.task()
        network = self.network()
        reference = task.torch_outputs(network, sampled_images(self.images(), 4))
        parity = task.parity("decoded", reference, reference, network.arch)
        assert (parity.images, parity.relative_error, parity.agreement) == (4, 0.0, 1.0)
        declared = task.outputs("decoded", network.arch, "logits")
        assert reference.size == 4 * sum(math.prod(output.shape) for output in declared)

    def test_answers_are_worth_the_same_wherever_they_are_from(self) -> None:
        """PyTorch's answers, those read from a bundle, those of a file with PyTorch's
        outputs, and ``evaluate`` all give the same metrics.
        """
        task = self.task()
        network = self.network()
        images = self.images()
        answers = task.torch_answers(network, images, 0)
        loaded = task.load_answers(answers.arrays())
        of_file = task.answers("decoded", network.arch)
        for x_NCHW, _ in evaluation_batches(images, 5):
            of_file.add(task.torch_outputs(network, x_NCHW.permute(0, 2, 3, 1).numpy()))
        assert len(answers) == len(loaded) == len(of_file) == len(images)
        for limit in (None, len(images) // 2):
            expected = answers.metrics(images, limit)
            assert next(iter(expected)) == task.metric and set(expected) <= set(task.numbers)
            assert loaded.metrics(images, limit) == expected
            evaluated = task.evaluate(network, images, EvaluationSettings(5, limit)).metrics
            file_metrics = of_file.metrics(images, limit)
            for name, value in expected.items():
                assert abs(value - (evaluated[name] or 0.0)) < 1e-6
                assert abs(value - file_metrics[name]) < self.tolerance

    def test_it_finds_words(self) -> None:
        """Its sentences about a network name the number of test images."""
        task = self.task()
        count = len(self.images())
        metrics = task.evaluate(self.network(), self.images(), EvaluationSettings(5)).metrics
        value = metrics[task.metric] or 0.0
        assert f"{count:,} test images" in task.describe_result(metrics, count)
        assert f"{count:,} test images" in task.describe_file_result(value, count)
