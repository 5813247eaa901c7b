"""Conformance cases that third-party plug-ins inherit: a plug-in that passes them works
in every stage.

    from hwnas.testing import StrategyConformance

    class TestMine(StrategyConformance):
        def strategy(self):
            return Mine(Mine.Config())

The cases are plain pytest classes. They run the real thing on small problems whose
answers are known: no network is trained.
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
from hwnas.task import Evaluation, Task


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
    """A table in which every op costs its MACs at 1e9 a second, plus 10 microseconds."""
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
    """A search whose answer is known: every option of ``tiny_space`` adds a given
    amount to the quality.

    Slower options add more, but less than overrunning the target costs, so the budget
    binds: the best architecture without it is far too slow. The options of one
    architecture near the target, drawn from ``seed``, add a little extra; the optimum
    under the budget is found by trying everything.
    """

    def __init__(self, seed: int) -> None:
        self.space = tiny_space()
        self.cost = CostModel.of_table(self.space, synthetic_table(self.space))
        low, high = self.cost.range()
        self.target_ms, self.tolerance = low + 0.45 * (high - low), 0.02
        rng = np.random.default_rng(seed)
        planted: Picks = {}
        while (
            not planted or abs(self.cost.cost(planted) / self.target_ms - 1) > 0.25 * self.tolerance
        ):
            planted = self.space.sample(rng)
        smallest = {choice.key: choice.options[0] for choice in self.space.choices}
        self.gains: dict[str, np.ndarray] = {}
        for choice in self.space.choices:
            ms = np.array(
                [self.cost.cost({**smallest, choice.key: option}) for option in choice.options]
            )
            bonus = 0.004 * np.array([option == planted[choice.key] for option in choice.options])
            self.gains[choice.key] = 0.06 * (ms - ms.min()) / (high - low) + bonus
        self.index_NC = np.array(
            list(itertools.product(*(range(len(choice.options)) for choice in self.space.choices)))
        )
        latency_N = self.cost.costs(self.index_NC)
        quality_N = 0.5 + np.sum(
            [
                self.gains[choice.key][self.index_NC[:, i]]
                for i, choice in enumerate(self.space.choices)
            ],
            axis=0,
        )
        within_N = np.abs(latency_N / self.target_ms - 1) <= self.tolerance
        reward_N = np.where(
            within_N, quality_N - 0.1 * np.abs(latency_N / self.target_ms - 1), -np.inf
        )
        assert latency_N[quality_N.argmax()] > 1.3 * self.target_ms, "the budget must bind"
        assert 10 <= within_N.sum() <= 0.2 * len(within_N), (
            "the budget must leave a choice, and not everything"
        )
        self.best = self.space.at(self.index_NC[reward_N.argmax()])

    def quality(self, gates: Gates) -> float:
        """The quality in 0..1 of an architecture or mixture, as an infinitely large
        held-out set would tell it.
        """
        return 0.5 + sum(
            float(np.dot(np.asarray(gates[key], dtype=float), gain))
            for key, gain in self.gains.items()
        )

    def context(self, steps: int, batch_size: int = 256) -> SearchContext:
        """A search context without a super-net: weights have nothing to learn."""
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
        """Proposals by reward, best first: what the search stage does with them."""

        def reward(picks: Picks) -> float:
            quality = 0.5 + sum(
                gain[self.space.index(picks)[i]] for i, gain in enumerate(self.gains.values())
            )
            return AbsoluteObjective().reward(quality, self.cost.cost(picks), self.target_ms)

        return sorted(proposals, key=reward, reverse=True)


class KnownWeights:
    """The shared weights of a ``Problem``: whatever they are trained on, every
    architecture is as good as its gains say.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def train(
        self, gates: Sequence[Gates], *, split: bool, teach: bool, skip_dropout: float
    ) -> Metrics:
        """Check the gates; there is nothing to learn."""
        del split, teach, skip_dropout
        assert gates, "an update needs gates"
        for each in gates:
            self._check(each)
        return {}

    def qualities(self, gates: Sequence[Gates], multiple: int) -> list[float]:
        """The exact qualities."""
        del multiple
        return [self.problem.quality(each) for each in gates]

    def gate_gradients(
        self, gates: Gates, probes: Probes, order: int, skip_dropout: float
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Loss 1 - quality: its derivative is minus the gain of every option that is
        executed or probed, and 0 elsewhere.
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
        """Weights that are known do not begin anew."""

    def _check(self, gates: Gates) -> None:
        gains = self.problem.gains
        assert gates.keys() == gains.keys(), (
            f"gates for {sorted(gates)}, but the choices are {sorted(gains)}"
        )
        for key, gate in gates.items():
            total = float(np.sum([float(weight) for weight in gate]))
            assert math.isclose(total, 1.0, abs_tol=1e-6), f"the gates of {key} add up to {total}"


def prepared(strategy: Strategy, ctx: SearchContext, seed: int) -> None:
    """Set a strategy up as the search stage does: with a generator that no step has."""
    ctx.rng = np.random.default_rng([seed, ctx.steps, 1])
    strategy.setup(ctx)


def searched(
    strategy: Strategy, ctx: SearchContext, seed: int, first: int = 0, last: int | None = None
) -> list[Metrics]:
    """Run a strategy's steps as the search stage does: a new generator from (seed,
    step) for each.
    """
    metrics = []
    for number in range(first, ctx.steps if last is None else last):
        ctx.step, ctx.rng = number, np.random.default_rng([seed, number])
        metrics.append(strategy.step(ctx))
    return metrics


def proposed(strategy: Strategy, ctx: SearchContext, seed: int, count: int) -> list[Picks]:
    """Its proposals after the last step."""
    ctx.step, ctx.rng = ctx.steps, np.random.default_rng([seed, ctx.steps])
    return strategy.propose(ctx, count)


class StrategyConformance(ABC):
    """What every search method has to do. Inherit, and return a new strategy from ``strategy``.

    ``steps`` and ``proposals`` are how much it gets to find the optimum of a ``Problem``.
    """

    steps: ClassVar[int] = 1200
    proposals: ClassVar[int] = 8

    @abstractmethod
    def strategy(self) -> Strategy:
        """A new strategy, not yet set up."""

    def _search(
        self, problem: Problem, seed: int, steps: int
    ) -> tuple[Strategy, SearchContext, list[Metrics]]:
        strategy, ctx = self.strategy(), problem.context(steps)
        prepared(strategy, ctx, seed)
        return strategy, ctx, searched(strategy, ctx, seed)

    def test_proposals_are_valid_distinct_and_within_the_tolerance(self) -> None:
        """Before and after learning, and for targets near both ends of the reach."""
        problem = Problem(0)
        low, high = problem.cost.range()
        for target_ms in (problem.target_ms, 1.01 * low, 0.99 * high):
            strategy, ctx = self.strategy(), problem.context(40)
            ctx.target = target_ms
            strategy.setup(ctx)
            for steps in (0, 40):
                searched(strategy, ctx, 0, 0, steps)
                proposals = proposed(strategy, ctx, 0, 6)
                assert 1 <= len(proposals) <= 6, (
                    f"{len(proposals)} proposals of at most 6 at {target_ms} ms"
                )
                for picks in proposals:
                    problem.space.check(picks)
                    latency = problem.cost.cost(picks)
                    assert abs(latency / target_ms - 1) <= ctx.tolerance, (
                        f"{latency} ms is not within 2 % of {target_ms} ms"
                    )
                names = {problem.space.decode(picks).identity for picks in proposals}
                assert len(names) == len(proposals), "a proposal came twice"

    def test_metrics_are_finite_numbers(self) -> None:
        """Every step reports numbers that a log can hold."""
        _, _, metrics = self._search(Problem(0), 0, 40)
        for row in metrics:
            for name, value in row.items():
                assert isinstance(value, float | int) and math.isfinite(value), (
                    f"metric {name} is {value!r}"
                )

    def test_deterministic_under_a_seed(self) -> None:
        """The same seed gives the same run; another seed another."""
        problem = Problem(0)
        runs = []
        for seed in (3, 3, 4):
            strategy, ctx, metrics = self._search(problem, seed, 60)
            runs.append((metrics, proposed(strategy, ctx, seed, 6)))
        assert runs[0] == runs[1], "two runs with one seed differ"
        assert runs[0] != runs[2], "the seed changes nothing"

    def test_continues_identically_from_its_state(self) -> None:
        """A state taken at any step, and put into a new strategy, goes on as the old
        one would have.
        """
        problem = Problem(0)
        strategy, ctx, straight = self._search(problem, 1, 60)
        expected = proposed(strategy, ctx, 1, 6)
        for stop in (0, 7, 33, 60):
            early, early_ctx = self.strategy(), problem.context(60)
            prepared(early, early_ctx, 1)
            before = searched(early, early_ctx, 1, 0, stop)
            state = copy.deepcopy(early.state_dict())
            # what goes on after a checkpoint must not leak into it
            searched(early, early_ctx, 1, stop, min(stop + 5, 60))
            late, late_ctx = self.strategy(), problem.context(60)
            prepared(late, late_ctx, 1)
            late.load_state_dict(state)
            after = searched(late, late_ctx, 1, stop)
            assert before + after == straight, f"stopped at step {stop}, it went on differently"
            assert proposed(late, late_ctx, 1, 6) == expected, (
                f"stopped at step {stop}, it proposes something else"
            )

    def test_state_survives_a_checkpoint(self, tmp_path: Path) -> None:
        """The state is what ``torch.load(weights_only=True)`` reads: tensors, numbers,
        strings and containers of them.
        """
        strategy, ctx, _ = self._search(Problem(0), 2, 40)
        torch.save(strategy.state_dict(), tmp_path / "state.pt")
        again = self.strategy()
        again.setup(ctx)
        again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert proposed(again, ctx, 2, 6) == proposed(strategy, ctx, 2, 6)

    def test_finds_the_known_optimum(self) -> None:
        """On five problems of five seeds, under a budget that binds."""
        for seed in range(5):
            problem = Problem(seed)
            strategy, ctx, _ = self._search(problem, seed, self.steps)
            best = problem.ranked(proposed(strategy, ctx, seed, self.proposals))[0]
            assert best == problem.best, (
                f"seed {seed}: found {best}, but the optimum is {problem.best}"
            )


class DeviceConformance(ABC):
    """What every connection to a device has to do. Inherit, and return one from ``connection``."""

    runtime: ClassVar[str] = "litert"
    dtype: ClassVar[str] = "fp32"
    reads_files: ClassVar[bool] = True
    """False where model files are not opened, so that a broken one cannot be noticed."""

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
        items = [
            {
                "id": name,
                "path": str(timing_file(ops, self.runtime, self.dtype)),
                "round": number,
                "ops": [op.key for op in ops],
            }
            for number in range(rounds)
            for name, ops in chains.items()
        ]
        cores = list(self.connection().cores(1))
        return {
            "runtime": self.runtime,
            "threads": 1,
            "cores": cores,
            "min_ms": 1.0,
            "min_runs": 3,
            "items": items,
        }

    def measured(self, plan: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
        """Header and rows of a plan, without notes and conditions, which may come
        anywhere between.
        """
        rows = list(self.connection().measure(plan, folder))
        for row in rows:
            if "note" in row:
                assert isinstance(row["note"], str) and row["note"], f"note {row['note']!r}"
            if "conditions" in row:
                assert all(
                    isinstance(value, int | float | str) for value in row["conditions"].values()
                ), f"conditions {row}"
        return [row for row in rows if not row.keys() & {"note", "conditions"}]

    def test_header_then_one_row_per_item(self, tmp_path: Path) -> None:
        """Ids and rounds in the plan's order, and every single run in milliseconds."""
        plan = self.plan(rounds=2)
        header, *rows = self.measured(plan, tmp_path)
        assert "runner" in header, f"the first row is no header: {header}"
        assert [(row["id"], row["round"]) for row in rows] == [
            (item["id"], item["round"]) for item in plan["items"]
        ]
        for row in rows:
            assert len(row["ms"]) >= plan["min_runs"], f"{row['id']} ran {len(row['ms'])} times"
            assert all(math.isfinite(ms) and ms > 0 for ms in row["ms"]), (
                f"{row['id']} took {row['ms']}"
            )

    def test_header_describes_the_measurement(self, tmp_path: Path) -> None:
        """What a table's header needs; the cores are those that the plan asked for."""
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
        """The one that is tested among them, with its version."""
        version = self.connection().runtimes()[self.runtime]
        assert isinstance(version, str) and version, (
            f"runtime {self.runtime} has version {version!r}"
        )

    def test_cores(self) -> None:
        """As many different cores as threads."""
        cores = self.connection().cores(1)
        assert len(cores) >= 1 and len(set(cores)) == len(cores)

    def test_a_broken_file_is_an_error_of_its_item(self, tmp_path: Path) -> None:
        """And of no other item."""
        if not self.reads_files:
            import pytest

            pytest.skip("this device does not open model files (reads_files = False)")
        plan = self.plan()
        broken = tmp_path / "broken.tflite"
        broken.write_bytes(b"this is no model")
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
        alone = self.connection().predict(model, images[1:2], tmp_path)
        assert np.allclose(alone[0], outputs[1], atol=1e-6)

    def test_predicts_from_pixels(self, tmp_path: Path) -> None:
        """Images of uint8 go into a file that takes them as they are."""
        network = timing_file(self.OPS, "litert", "fp32").read_bytes()
        interface = Interface("uint8", False, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
        files = {"network": network, "pixels": interface.around(network, "litert")}
        for name, content in files.items():
            (tmp_path / f"{name}.tflite").write_bytes(content)
        images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
        found = self.connection().predict(tmp_path / "pixels.tflite", images, tmp_path)
        wanted = self.connection().predict(
            tmp_path / "network.tflite", interface.seen(images), tmp_path
        )
        assert found.shape == (3, 10) and found.dtype == np.float32
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


class TargetConformance(ABC):
    """What every target has to do. Inherit, and name the class in ``target``. Its
    runtime has to be installed on this computer.
    """

    target: ClassVar[type[Target]]
    tolerance: ClassVar[float] = 1e-4
    """Largest error of an exact target's outputs, relative to the largest."""

    KEYS: ClassVar[tuple[str, ...]] = (
        "conv-h16-i3-o8-k3-s2-relu",
        "mbconv-h8-i8-o8-m24-k3-q8-relu-id",
        "classifier-h8-i8-o10",
    )

    def network(self, keys: Sequence[str] | None = None) -> ClassificationNetwork:
        """A small classifier, or the ops of other keys."""
        blocks = tuple(map(Op.parse, keys or self.KEYS))
        arch = Architecture(name="small", in_channels=blocks[0].in_ch, blocks=blocks)
        return ClassificationNetwork(arch, generator=torch.Generator().manual_seed(0)).eval()

    def trained(self) -> Trained:
        """The classifier with plain ends."""
        images = np.random.default_rng(1).standard_normal((8, 16, 16, 3)).astype(np.float32)
        interface = Interface("float32", False, (0.5,) * 3, (0.25,) * 3)
        card = ModelCard(
            "small", 3, tuple("abcdefghij"), "logits", interface.normalisation, "as it is"
        )
        return Trained(self.network(), interface, images, card)

    def test_its_fields(self) -> None:
        """A plain file name, an order of axes, installed packages."""
        made = self.target()
        assert made.file == Path(made.file).name and Path(made.file).suffix
        assert made.layout in ("NHWC", "NCHW") and made.runtime and made.dtype
        for package in made.packages:
            assert version(package)

    def test_its_files_compute_what_pytorch_does(self, tmp_path: Path) -> None:
        """Up to rounding where it is exact; the same best class of most images where it is not."""
        made, trained = self.target(), self.trained()
        path = tmp_path / made.file
        path.write_bytes(made.write(trained))
        images_NHWC = np.random.default_rng(2).standard_normal((16, 16, 16, 3)).astype(np.float32)
        found = connect(HOST).predict(path, images_NHWC, tmp_path)
        with torch.inference_mode():
            wanted = trained.network(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)).numpy()
        assert found.shape == wanted.shape and found.dtype == np.float32
        if made.exact:
            assert np.abs(found - wanted).max() <= self.tolerance * np.abs(wanted).max()
        else:
            assert (found.argmax(1) == wanted.argmax(1)).mean() >= 0.7

    def test_ops_and_networks_are_timed(self, tmp_path: Path) -> None:
        """Files of one op and of several, by the runner."""
        made, items = self.target(), list[dict[str, Any]]()
        for keys in ((self.KEYS[0],), (self.KEYS[1],), self.KEYS):
            path = tmp_path / f"{len(items)}{Path(made.file).suffix}"
            path.write_bytes(made.timing_file(self.network(keys)))
            items.append({"id": path.name, "path": str(path), "round": 0, "ops": list(keys)})
        host = connect(HOST)
        plan = {
            "runtime": made.runtime,
            "threads": 1,
            "cores": list(host.cores(1)),
            "min_ms": 1.0,
            "min_runs": 3,
            "items": items,
        }
        header, *rows = host.measure(plan, tmp_path)
        assert header["runtime"] == made.runtime
        assert [row["id"] for row in rows] == [item["id"] for item in items]
        assert all(min(row["ms"]) > 0 for row in rows), rows


class TaskConformance(ABC):
    """What every task has to do. Inherit, name the class in ``task``, and give a
    network of it and test images that it can be judged by.
    """

    task: ClassVar[type[Task]]
    tolerance: ClassVar[float] = 0.005
    """Of the metrics of a file that puts out what PyTorch does: of answers that are
    about as good, rounding may choose another.
    """

    @abstractmethod
    def network(self) -> Network:
        """A small one, in eval mode."""

    @abstractmethod
    def images(self) -> Images:
        """Test images of the network's size."""

    def test_its_fields(self) -> None:
        """Its metric comes first wherever metrics are listed, and a point of its curve
        can be paid.
        """
        made = self.task()
        assert (
            made.numbers[0] == made.tiles[0] == made.metric
            and next(iter(made.curve.values())) == made.metric
        )
        assert (
            made.curve_images > 0
            and made.curve_cost > 0
            and made.network_kind == self.network().arch.task
        )

    def test_its_loss_has_a_gradient(self) -> None:
        """Of a batch of the images, by every weight."""
        made, network = self.task(), self.network().train()
        x_NCHW, y = self.images().__getitems__([(index, 0) for index in range(4)])
        loss, _ = made.criterion(network.arch)(network(x_NCHW), y)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        assert torch.isfinite(loss) and all(
            torch.isfinite(gradient).all() for gradient in gradients
        )

    def test_pytorchs_outputs_are_pytorchs(self) -> None:
        """Compared with themselves they are equal, and as many as is said of a file."""
        made, network = self.task(), self.network()
        reference = made.torch_outputs(network, sampled_images(self.images(), 4))
        found = made.parity("decoded", reference, reference, network.arch)
        assert (found.images, found.relative_error, found.agreement) == (4, 0.0, 1.0)
        described = made.outputs("decoded", network.arch, "logits")
        assert reference.size == 4 * sum(math.prod(output.shape) for output in described)

    def test_answers_are_worth_the_same_wherever_they_are_from(self) -> None:
        """PyTorch's, those read from a bundle, and those of a file that puts out what
        PyTorch does; and so says the evaluation.
        """
        made, network, images = self.task(), self.network(), self.images()
        answers = made.torch_answers(network, images, 0)
        kept = made.kept(answers.arrays())
        of_file = made.answers("decoded", network.arch)
        for x_NCHW, _ in evaluation_batches(images, 5):
            of_file.add(made.torch_outputs(network, x_NCHW.permute(0, 2, 3, 1).numpy()))
        assert len(answers) == len(kept) == len(of_file) == len(images)
        for limit in (None, len(images) // 2):
            wanted = answers.metrics(images, limit)
            assert next(iter(wanted)) == made.metric and set(wanted) <= set(made.numbers)
            assert kept.metrics(images, limit) == wanted
            evaluated, read = (
                made.evaluate(network, images, Evaluation(5, limit)).metrics,
                of_file.metrics(images, limit),
            )
            assert all(
                abs(value - (evaluated[name] or 0.0)) < 1e-6 for name, value in wanted.items()
            )
            assert all(abs(value - read[name]) < self.tolerance for name, value in wanted.items())

    def test_it_finds_words(self) -> None:
        """For what it has measured."""
        made, images = self.task(), self.images()
        metrics = made.evaluate(self.network(), images, Evaluation(5)).metrics
        assert f"{len(images):,} test images" in made.said(metrics, len(images))
        assert f"{len(images):,} test images" in made.said_of_file(
            metrics[made.metric] or 0.0, len(images)
        )
