"""Real searches that learn nothing, and what they say about it, up to the verdict and
the report.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from hwnas.config import Experiment
from hwnas.runs import JsonLines
from hwnas.search.result import SearchResult
from hwnas.testing import synthetic_table
from hwnas.train.result import TrainResult
from hwnas.verdict import Verdict
from tests.commands import Command
from tests.commands import run as run_command
from tests.conftest import write_tiny
from tests.search.staging import OPTIONS, Saying, elastic_digits_space, experiment, run

pytestmark = pytest.mark.slow

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits with shuffled labels: there is nothing to learn but which
    label is the most frequent.
    """
    folder = tmp_path_factory.mktemp("shuffled")
    pixels, labels = load_digits(return_X_y=True)
    x_NHWC = (pixels.reshape(-1, 8, 8, 1) / 16 * 255).astype(np.uint8)
    labels = np.random.default_rng(0).permutation(labels)
    np.savez(folder / "train.npz", x=x_NHWC[:1400], y=labels[:1400])
    np.savez(folder / "test.npz", x=x_NHWC[1400:], y=labels[1400:])
    return folder


def on_noise(folder: Path, name: str, **search: Any) -> Experiment:
    config = experiment(
        strategy={"name": name, **OPTIONS[name], **search.pop("options", {})}, **search
    )
    content = config.model_dump(mode="json", by_alias=True)
    content["data"] |= {"name": "npz", "path": str(folder)}
    return Experiment.model_validate(content)


@pytest.mark.parametrize(
    "strategy", ["tunas", "darts", "fairnas", "progressive_shrinking", "random_standalone"]
)
def test_a_search_on_shuffled_labels_says_that_it_learned_nothing(
    strategy: str, shuffled: Path, tmp_path: Path
) -> None:
    """For every kind of training: paths, mixtures, several passes, a teacher's second
    cross-entropy, networks that share nothing.
    """
    progress = Saying()
    options = {"order": 1} if strategy == "darts" else {}
    config = on_noise(
        shuffled,
        strategy,
        options=options,
        epochs=1.5,
        candidates=2,
        random_samples=1,
        recalibration_images=64,
    )
    run(tmp_path / "search", config, synthetic_table(elastic_digits_space()), progress)
    learning = SearchResult.load(tmp_path / "search/search.json").learning
    assert learning is not None and learning.learned is False
    assert learning.weights is not None and not learning.weights.learned
    # ten classes, nearly as frequent
    assert learning.weights.chance == pytest.approx(math.log(10), abs=0.003)
    assert learning.weights.last.mean == pytest.approx(math.log(10), abs=0.12)
    first, *others = learning.cautions
    assert first.headline == "the search learned nothing" and "search.epochs" in first.text
    assert all("the policy has hardly moved" in caution.headline for caution in others)
    assert progress.said[-1 - len(others) :] == [str(first), *map(str, others)]


def test_a_search_that_learns_says_so(tmp_path: Path) -> None:
    """The same digits with their true labels. Random search is not compared with random
    networks, because its proposals are random too.
    """
    progress = Saying()
    run(
        tmp_path / "search",
        experiment("random", epochs=3.0),
        synthetic_table(elastic_digits_space()),
        progress,
    )
    learning = SearchResult.load(tmp_path / "search/search.json").learning
    assert learning is not None and learning.learned is True and learning.cautions == ()
    assert (
        learning.weights is not None
        and learning.weights.learned
        and learning.held_out is not None
        and learning.held_out.learned
    )
    assert not any("learned nothing" in line for line in progress.said)


def test_a_policy_that_learns_is_recognised(tmp_path: Path) -> None:
    """TuNAS at a learning rate that moves the policy; rewards rise as the weights
    train.
    """
    config = experiment(strategy={"name": "tunas", "rl_lr": 0.05}, epochs=4.0, random_samples=0)
    run(tmp_path / "search", config, synthetic_table(elastic_digits_space()))
    learning = SearchResult.load(tmp_path / "search/search.json").learning
    assert learning is not None and learning.policy is not None and learning.policy.rise is not None
    rewards = [
        row["reward"]
        for row in JsonLines(tmp_path / "search/metrics.jsonl").read()
        if "reward" in row
    ]
    fifth = round(len(rewards) / 5)
    assert learning.policy.rise.value == pytest.approx(
        np.mean(rewards[-fifth:]) - np.mean(rewards[:fifth])
    )
    assert learning.policy.moved and learning.policy.rise.positive and learning.learned is True


@pytest.fixture(scope="module")
def command(shuffled: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Command]:
    """``hwnas run`` on shuffled labels: its folder and the finished process."""
    folder = tmp_path_factory.mktemp("nothing")
    overrides = ["data.name=npz", f"data.path={shuffled}", "validate.images=300", "train.epochs=1"]
    arguments = ["run", str(write_tiny(folder)), "--out", str(folder / "run")]
    for override in overrides:
        arguments += ["-s", override]
    finished = Command(arguments)
    finished.wait()
    return folder / "run", finished


def test_the_command_does_not_end_with_a_plain_passed(
    command: tuple[Path, Command],
) -> None:
    """Latency and parity are as promised, so the exit code is 0."""
    _, finished = command
    assert finished.wait() == 0, finished.stderr
    lines = finished.stderr.splitlines()
    assert any(
        line.startswith("warning: the search learned nothing: the super-net's loss ended at 2.3")
        for line in lines
    )
    assert any(line.startswith("warning: the trained network learned nothing: ") for line in lines)
    [last] = [line for line in lines if line.startswith("verdict: ")]
    assert last.startswith(
        "verdict: passed, but the search learned nothing: the super-net's loss ended at 2.3"
    )
    assert "; the trained network learned nothing: " in last


def test_the_documents_carry_the_warnings(command: tuple[Path, Command], shuffled: Path) -> None:
    root, _ = command
    learning = SearchResult.load(root / "search/search.json").learning
    trained = TrainResult.load(root / "train/train.json")
    assert learning is not None and learning.learned is False and trained.caution is not None
    with np.load(shuffled / "test.npz") as arrays:
        assert trained.guess == np.bincount(arrays["y"]).max() / 397
    verdict = Verdict.load(root / "validate/verdict.json")
    assert verdict.passed and verdict.warnings == (*learning.cautions, trained.caution)
    headlines = [caution.headline for caution in verdict.warnings]
    assert (headlines[0], headlines[-1]) == (
        "the search learned nothing",
        "the trained network learned nothing",
    )


def test_the_report_carries_the_warnings(
    command: tuple[Path, Command],
) -> None:
    root, _ = command
    page = (root / "report/report.html").read_text()
    [badge] = re.findall(r'<span class="badge caution">(.*)</span>', page)
    assert badge.startswith("✓ passed · search learned nothing") and badge.endswith(
        " · trained network learned nothing"
    )
    assert "badge good" not in page
    assert "<p>The search learned nothing</p>The super-net&#39;s loss ended at 2.3" in page


def test_a_second_validation_is_up_to_date(
    command: tuple[Path, Command],
) -> None:
    """The warnings of the verdict come from inputs that stay unchanged."""
    root, _ = command
    assert "validate: up to date, skipped" in run_command(["validate", str(root)]).stderr
