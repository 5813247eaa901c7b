"""Every search method at equal cost, followed by the same standalone training, compared
with random networks within the same budget.

HWNAS_TEST_DATA=../shared/data pytest tests/benchmarks/test_methods.py --benchmark-only -s

On a part of CIFAR-10 (``IMAGES`` training images, all test images), space mobile32 at
half width, the table of this CPU, one latency budget, seeds 0 to ``HWNAS_SEEDS`` - 1
(default 3). *Equal cost*: the CPU seconds of each method per step, and per architecture
that its finder evaluates, are measured first, in this process; it gets as many steps as
then fit into ``SEARCH_SECONDS`` of one core. The last ranking of eight candidates, the
same for all, is extra. Two runs execute at a time, on one core each. They are kept in
``$HWNAS_METHODS`` (default runs/methods), so a stopped benchmark resumes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.config import Experiment, load_experiment
from hwnas.core.arch import Architecture
from hwnas.core.space import MacroSpace
from hwnas.core.table import LatencyTable
from hwnas.experiments import experiment_space
from hwnas.search.proposal import sample_feasible
from hwnas.search.searching import prepare
from hwnas.search.settings import search_context

CONFIG = "configs/experiments/methods-cifar10.toml"
IMAGES, SEARCH_SECONDS, RANDOM_NETWORKS = 10_000, 100.0, 5
PROBE_STEPS = 24
"""Steps of the short search that measures a method's seconds per step; it has all of
the method's phases.
"""

EVOLUTION = "generations = 4, population = 10, parents = 5, mutations = 5, crossovers = 5"
EVALUATIONS = {"spos": 40, "progressive_shrinking": 40, "fairnas": 40, "random_standalone": 5}
"""The most architectures that a method's finder evaluates."""

# options for a search of a few hundred steps: the rates are ours, as the papers' are
# for tens of thousands of steps
METHODS = {
    "tunas": '{name = "tunas", rl_lr = 0.02}',
    "proxylessnas": '{name = "proxylessnas", alpha_lr = 0.05, arch_every = 2}',
    "fbnet": '{name = "fbnet", theta_lr = 0.05, theta_every = 2}',
    "darts": '{name = "darts", order = 1, alpha_lr = 0.03}',
    "pdarts": '{name = "pdarts", alpha_lr = 0.06}',
    "spos": f'{{name = "spos", {EVOLUTION}}}',
    "fairnas": '{name = "fairnas", generations = 4, population = 10}',
    "progressive_shrinking": f'{{name = "progressive_shrinking", {EVOLUTION}}}',
    "random": '{name = "random"}',
    "random_standalone": '{name = "random_standalone", trainings = 5}',
}


def root() -> Path:
    return Path(os.environ.get("HWNAS_METHODS", "runs/methods")).absolute()


def hwnas(*arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hwnas", *arguments, "-q"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first ``IMAGES`` training images, in an order drawn once, and all test images."""
    if "HWNAS_TEST_DATA" not in os.environ:
        pytest.skip("needs CIFAR-10: set HWNAS_TEST_DATA")
    folder = root() / "data"
    if not (folder / "test.npz").exists():
        whole = tmp_path_factory.mktemp("cifar")
        subprocess.run(
            [
                sys.executable,
                str(Path(os.environ["HWNAS_TEST_DATA"], "unpack.py")),
                str(whole),
                "cifar10",
            ],
            check=True,
        )
        folder.mkdir(parents=True, exist_ok=True)
        with (
            np.load(whole / "cifar10/train.npz") as train,
            np.load(whole / "cifar10/test.npz") as test,
        ):
            kept = np.random.default_rng(0).permutation(len(train["y"]))[:IMAGES]
            np.savez(folder / "train.npz", x=train["x"][kept], y=train["y"][kept])
            np.savez(folder / "test.npz", x=test["x"], y=test["y"])
    return folder


@pytest.fixture(scope="module")
def table(data: Path) -> Path:
    """This CPU's table of the space."""
    hwnas("profile", CONFIG, "-s", f"data.path={data}", "--out", str(root() / "profile"))
    return root() / "profile/profile/table.json"


def experiment(data: Path, strategy: str, seed: int, epochs: float | None = None) -> Experiment:
    changed = [f"data.path={data}", f"search.strategy={strategy}", f"seed={seed}"]
    return load_experiment(CONFIG, changed + ([f"search.epochs={epochs}"] if epochs else []))


def steps_per_epoch(config: Experiment) -> float:
    return IMAGES * (1 - config.data.held_out) / config.search.batch_size


def measured(data: Path, table: Path, strategy: str, folder: Path) -> dict[str, float]:
    """Seconds per step, on average over a short search without its first step, and per
    evaluated architecture.
    """
    torch.set_num_threads(1)
    config = experiment(data, strategy, 0)
    config = experiment(data, strategy, 0, PROBE_STEPS / steps_per_epoch(config))
    space = experiment_space(config)
    assert isinstance(space, MacroSpace)
    prepared = prepare(
        config, space, search_context(config, space, LatencyTable.load(table)), folder
    )
    assert prepared.search.steps == PROBE_STEPS
    started = 0.0
    for step in range(PROBE_STEPS):
        started = time.process_time() if step == 1 else started
        torch.manual_seed(step)
        prepared.engine.step = step
        prepared.step(step)
    per_step = (time.process_time() - started) / (PROBE_STEPS - 1)
    members = prepared.strategy.standalone or [
        space.sample(np.random.default_rng(i)) for i in range(4)
    ]
    prepared.evaluator.evaluate(members[0])
    started = time.process_time()
    for picks in members[1:]:
        prepared.evaluator.evaluate(picks)
    return {"step": per_step, "judged": (time.process_time() - started) / (len(members) - 1)}


def trained(out: Path, data: Path, arguments: list[str], seed: int) -> dict[str, Any]:
    hwnas(
        "train",
        CONFIG,
        "-s",
        f"data.path={data}",
        "-s",
        f"seed={seed}",
        *arguments,
        "--out",
        str(out),
    )
    result: dict[str, Any] = json.loads((out / "train/train.json").read_text())
    return result


def searched(name: str, data: Path, table: Path, epochs: float, seed: int) -> dict[str, Any]:
    """Search and train; return the results, and how long the search took including
    finding and ranking.
    """
    out = root() / f"{name.replace(' ', '-').strip('()')}-{seed}"
    settings = [
        "-s",
        f"search.strategy={METHODS[name]}",
        "-s",
        f"search.epochs={epochs}",
        "-s",
        f"search.table={table}",
    ]
    started = time.perf_counter()
    hwnas(
        "search",
        CONFIG,
        "-s",
        f"data.path={data}",
        "-s",
        f"seed={seed}",
        *settings,
        "--out",
        str(out),
    )
    seconds = time.perf_counter() - started
    seconds_file = out / "seconds.json"  # kept, as a second call skips the search
    if not seconds_file.exists():
        seconds_file.write_text(json.dumps(seconds))
    result = json.loads((out / "search/search.json").read_text())
    accuracy = trained(out, data, settings, seed)["metrics"]["accuracy"]
    latency = result["candidates"][0]["predicted"] / result["target"] - 1
    return {
        "method": name,
        "accuracy": accuracy,
        "latency": latency,
        "seconds": json.loads(seconds_file.read_text()),
    }


def random_network(number: int, data: Path, table: Path, seed: int) -> dict[str, Any]:
    """One of the random networks within the budget, drawn and trained with a seed."""
    config = experiment(data, METHODS["random"], seed)
    space = experiment_space(config)
    context = search_context(config, space, LatencyTable.load(table))
    picks = sample_feasible(context, RANDOM_NETWORKS, np.random.default_rng([seed, 7]))[number]
    out = root() / f"random-network-{number}-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    arch: Architecture = space.decode(picks, f"random-{number}-{seed}")
    if not (out / "arch.json").exists():
        arch.save(out / "arch.json")
    accuracy = trained(out, data, ["-s", f"train.arch={out / 'arch.json'}"], seed)["metrics"][
        "accuracy"
    ]
    return {
        "method": "random network in the budget",
        "accuracy": accuracy,
        "latency": context.cost_model.cost(picks) / context.target - 1,
        "seconds": 0.0,
    }


def test_methods_at_equal_cost(benchmark: Any, data: Path, table: Path, tmp_path: Path) -> None:
    seeds = range(int(os.environ.get("HWNAS_SEEDS", "3")))
    plan = root() / "plan.json"
    if not plan.exists():
        plan.write_text(
            json.dumps(
                {
                    name: measured(data, table, options, tmp_path)
                    for name, options in METHODS.items()
                },
                indent=1,
            )
        )
    cost = json.loads(plan.read_text())
    per_epoch = steps_per_epoch(experiment(data, METHODS["random"], 0))
    seconds_left = {
        name: SEARCH_SECONDS - EVALUATIONS.get(name, 0) * cost[name]["judged"] for name in METHODS
    }
    epochs = {name: seconds_left[name] / cost[name]["step"] / per_epoch for name in METHODS}

    def everything() -> list[dict[str, Any]]:
        with ThreadPoolExecutor(2) as pool:
            runs = [
                pool.submit(random_network, number, data, table, seed)
                for seed in seeds
                for number in range(RANDOM_NETWORKS)
            ]
            runs += [
                pool.submit(searched, name, data, table, epochs[name], seed)
                for seed in seeds
                for name in METHODS
            ]
            return [run.result() for run in runs]

    rows = benchmark.pedantic(everything, rounds=1, iterations=1)
    print(
        f"\n{'method':30} {'top-1 %: mean, spread':>24} {'latency - target':>18} {'steps':>6}"
        f" {'ms/step':>8} {'search s':>9}"
    )
    for name in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == name]
        accuracies = [100 * row["accuracy"] for row in of_method]
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else float("nan")
        worst = max((row["latency"] for row in of_method), key=abs)
        steps = (
            f"{epochs[name] * per_epoch:6.0f} {1000 * cost[name]['step']:8.0f}"
            if name in epochs
            else f"{'-':>6} {'-':>8}"
        )
        seconds = statistics.mean(row["seconds"] for row in of_method)
        print(
            f"{name:30} {statistics.mean(accuracies):15.1f} +- {spread:5.1f} {worst:+18.1%} {steps}"
            f" {seconds:9.0f}"
        )
        assert all(abs(row["latency"]) <= 0.02 for row in of_method), (
            "a searched network missed the budget"
        )
