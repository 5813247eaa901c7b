"""Which training settings decide whether a super-net ranks correctly? They are changed
one at a time, on NAS-Bench-Macro.

HWNAS_TEST_DATA=../shared/data pytest tests/benchmarks/test_heuristics.py --benchmark-only -s

Every row is ``hwnas study rank configs/experiments/nasbench-macro-rank.toml`` with the
settings ``SMALL`` and those of the row: images of 16 px, half of the channels and few
epochs, as the study would otherwise take days on a CPU; and separate weights for each
option, as in SPOS. It shows Kendall's tau with the true accuracies of the same
``ARCHITECTURES`` networks, for the recalibrated accuracy (with its 95 % interval over
architectures), the recalibrated loss, the accuracy without recalibration and the angle,
and for comparison that of MACs. There is one seed, so the interval does not cover
differences between seeds.

Runs are kept in ``$HWNAS_HEURISTICS`` (default runs/heuristics), so a stopped benchmark
resumes.
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hwnas.study.documents import RankStudy

CONFIG = "configs/experiments/nasbench-macro-rank.toml"
ARCHITECTURES = 100
SMALL = (
    "data.resolution=16",
    "data.held_out=0.1",
    "search.epochs=2",
    # all steps at full resolution, none at 8 px
    (
        "search.supernet={sharing = 'separate', proxy_width = 0.5, proxy_resolution = 8,"
        " full_resolution = 1.0}"
    ),
    "search.evaluation_images=1000",
    f"study.architectures={ARCHITECTURES}",
    "study.scores=['accuracy', 'loss', 'unrecalibrated', 'angle', 'macs']",
    "study.combinations=[]",
)
SGD = (
    "search.optimizer={name = 'sgd', lr = 0.4, momentum = 0.9, weight_decay = 4e-5, warmup = 0.1,"
    " clip_norm = 5.0}"
)
VARIANTS: dict[str, tuple[str, ...]] = {
    "the base": (),
    "all channels": ("search.supernet.proxy_width=1.0",),
    "half the epochs": ("search.epochs=1",),
    "twice the epochs": ("search.epochs=4",),
    "rate / 4": ("search.optimizer.lr=0.003",),
    "rate x 4": ("search.optimizer.lr=0.048",),
    "no weight decay": ("search.optimizer.weight_decay=0",),
    "weight decay x 5": ("search.optimizer.weight_decay=0.1",),
    "SGD, rate 0.4, decay 4e-5": (SGD,),
    "SGD, PyTorch's initialisation": (SGD, "search.supernet.initialisation='torch'"),
    "SGD, decay 5e-4, all weights": (
        SGD.replace("4e-5", "5e-4").replace("}", ", inactive_weights = 'decay'}"),
    ),
    "BN without scale and shift": ("search.supernet.bn_affine=false",),
    "BN with tracked statistics": ("search.supernet.bn_track=true",),
    "fair sampling": ("search.strategy.sampling='fair'",),
    "sampling of decisions": ("search.strategy.sampling='decisions'",),
    "collapsed sharing": ("search.supernet.sharing='collapsed'",),
    "batches of 128": ("search.batch_size=128",),
}
SCORES = ("accuracy", "loss", "unrecalibrated", "angle", "macs")


def root() -> Path:
    return Path(os.environ.get("HWNAS_HEURISTICS", "runs/heuristics")).absolute()


@pytest.fixture(scope="module")
def data() -> Path:
    if "HWNAS_TEST_DATA" not in os.environ:
        pytest.skip("needs CIFAR-10 and NAS-Bench-Macro: set HWNAS_TEST_DATA")
    source, folder = Path(os.environ["HWNAS_TEST_DATA"]), root() / "data"
    subprocess.run([sys.executable, str(source / "unpack.py"), str(folder), "cifar10"], check=True)
    with (
        gzip.open(source / "nasbench_macro/nasbench_macro_cifar10.csv.gz") as packed,
        open(folder / "macro.csv", "wb") as file,
    ):
        shutil.copyfileobj(packed, file)
    return folder


def study(data: Path, settings: tuple[str, ...], out: Path) -> float:
    """The seconds that the study took, or 0 if it had been done before."""
    done, started = (out / "rank" / "study.json").exists(), time.monotonic()
    sources = (f"data.path={data / 'cifar10'}", f"study.truth={data / 'macro.csv'}")
    options = [
        argument for setting in (*sources, *SMALL, *settings) for argument in ("-s", setting)
    ]
    command = [
        sys.executable,
        "-m",
        "hwnas",
        "study",
        "rank",
        CONFIG,
        *options,
        "--out",
        str(out),
        "-q",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return 0.0 if done else time.monotonic() - started


def test_settings_are_changed_one_at_a_time(benchmark: Any, data: Path) -> None:
    folders = {
        name: root() / "".join(letter if letter.isalnum() else "-" for letter in name)
        for name in VARIANTS
    }

    def measure() -> dict[str, float]:
        return {name: study(data, settings, folders[name]) for name, settings in VARIANTS.items()}

    seconds = benchmark.pedantic(measure, rounds=1, iterations=1)
    print(
        f"\n{'':28} {'accuracy':26} {'loss':>8} {'not rec.':>8} {'angle':>8} {'MACs':>8}"
        f" {'seconds':>8}"
    )
    for name, folder in folders.items():
        scores = {
            score.name: score.supernets[0]["kendall"]
            for score in RankStudy.load(folder / "rank" / "study.json").scores
        }
        tau = scores["accuracy"]
        others = "".join(f" {scores[score_name].value:8.3f}" for score_name in SCORES[1:])
        print(
            f"{name:28} {tau.value:.3f} ({tau.low:.3f} to {tau.high:.3f})   {others}"
            f" {seconds[name]:8.0f}"
        )
        # better than chance: for 100 networks in random order, tau is below 0.14 in
        # 95 % of cases
        assert scores["loss"].value > 0.3
