"""The ranking study from configuration to document: trained, killed and resumed, with a
failed training or architecture, and with the super-net of an earlier search.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from hwnas.config import Experiment, StudyConfig
from hwnas.core.arch import Picks
from hwnas.core.limits import MacsLimit
from hwnas.errors import ConfigError, DivergenceError, HwnasError, TableError
from hwnas.nn.supernet import load_supernet
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.runs import JsonLines
from hwnas.search.angle import Angles
from hwnas.search.strategy import Metrics, SearchContext
from hwnas.studies import study_rank
from hwnas.study.documents import IntervalEstimate, RankStudy
from hwnas.study.rank import METRICS, estimates
from hwnas.study.scores import Scorer
from hwnas.study.truth import read_truth
from tests.search.staging import Killed, Killing, Saying, elastic_digits_space, experiment

pytestmark = pytest.mark.slow

SPACE = elastic_digits_space()
SCORES = ("accuracy", "loss", "angle", "macs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A space document, and a ground truth that follows the MACs except for noise."""
    root = tmp_path_factory.mktemp("study")
    SPACE.save(root / "tiny.json")
    rng, archs = np.random.default_rng(0), {}
    while len(archs) < 30:
        picks = SPACE.sample(rng)
        archs.setdefault(SPACE.canonical(SPACE.index(picks)).tobytes(), picks)
    macs = np.array([SPACE.decode(picks).macs for picks in archs.values()])
    accuracy = 0.5 + 0.4 * macs / macs.max() + rng.normal(size=len(macs)) * 0.03
    with open(root / "truth.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["arch", "acc1", "acc2"])
        for picks, value in zip(archs.values(), accuracy, strict=True):
            lines.writerow(
                [json.dumps(picks), f"{value:.4f}", f"{value + rng.normal() * 0.01:.4f}"]
            )
    return root


def study(folder: Path, search: dict[str, Any] | None = None, **settings: Any) -> Experiment:
    plain = experiment(
        "spos", evaluation_images=64, **{"target_range": None, "epochs": 0.3, **(search or {})}
    )
    wanted = {
        "truth": str(folder / "truth.csv"), "architectures": 12, "top_k": 3, "bootstrap": 30, "scores": SCORES,
        "combinations": [("accuracy", "angle")], **settings,
    }  # fmt: skip
    content = plain.model_dump(mode="json", by_alias=True) | {
        "space": {"name": str(folder / "tiny.json")},
        "study": wanted,
    }
    return Experiment.model_validate(content)


def ranked(config: Experiment, root: Path, progress: Progress | None = None) -> RankStudy:
    study_rank(Pipeline(config, root, progress or Progress()))
    return RankStudy.load(root / "rank" / "study.json")


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, RankStudy]:
    """A study of two super-nets."""
    return folder / "run", ranked(study(folder, seeds=[5, 6]), folder / "run")


def test_metrics_are_those_of_the_scores(finished: tuple[Path, RankStudy]) -> None:
    _, ranking = finished
    assert [result.name for result in ranking.scores] == [*SCORES, "accuracy+angle"]
    assert [supernet.seed for supernet in ranking.supernets] == [5, 6]
    assert len(ranking.points) == ranking.architectures == 12
    truth, macs = np.array([(point.truth, point.scores["macs"]) for point in ranking.points]).T
    of_macs = next(result for result in ranking.scores if result.name == "macs")
    assert of_macs.supernets[0]["kendall"].value == pytest.approx(kendalltau(macs, truth).statistic)
    assert of_macs.over_supernets["kendall"].std == 0
    assert all(
        by_metric["over_macs"] == IntervalEstimate(value=0, low=0, high=0)
        for by_metric in of_macs.supernets
    )
    loss = next(result for result in ranking.scores if result.name == "loss").supernets[0]
    assert loss["over_macs"].value == pytest.approx(
        loss["kendall"].value - kendalltau(macs, truth).statistic
    )  # type: ignore[operator]
    for result in ranking.scores:
        for by_metric in result.supernets:
            assert set(by_metric) == set(METRICS)
            tau = by_metric["kendall"]
            assert result.name == "accuracy" or (
                tau.low is not None and tau.high is not None and tau.low <= tau.high
            )
    angle = next(result for result in ranking.scores if result.name == "angle")
    values = [by_metric["kendall"].value for by_metric in angle.supernets]
    assert values[0] != values[1]
    assert angle.over_supernets["kendall"].mean == pytest.approx(np.mean(values))  # type: ignore[arg-type]
    assert angle.over_supernets["kendall"].std == pytest.approx(np.std(values, ddof=1))  # type: ignore[call-overload]


def test_a_lower_loss_ranks_higher(finished: tuple[Path, RankStudy]) -> None:
    root, ranking = finished
    rows = {row["architecture"]: row["scores"]["loss"] for row in _rows(root)[0]}
    truth = {point.name: point.truth for point in ranking.points}
    loss = next(result for result in ranking.scores if result.name == "loss").supernets
    expected = kendalltau([-rows[name] for name in truth], list(truth.values())).statistic
    assert any(by_metric["kendall"].value == pytest.approx(expected) for by_metric in loss)


def _rows(root: Path) -> list[list[dict[str, Any]]]:
    return [JsonLines(path).read() for path in sorted((root / "scores").iterdir())]


def test_the_gap_and_the_noise_of_the_truth(finished: tuple[Path, RankStudy]) -> None:
    _, ranking = finished
    gap = ranking.supernets[0].gap
    assert gap is not None
    assert gap.standalone == pytest.approx(np.mean([point.truth for point in ranking.points]))
    assert gap.difference == pytest.approx(gap.standalone - gap.supernet) and gap.difference > 0
    assert (ranking.truth.networks, ranking.truth.repeats, ranking.truth.columns) == (
        30,
        2,
        ("acc1", "acc2"),
    )
    assert ranking.truth.kendall is not None and 0.5 < ranking.truth.kendall < 1


def test_a_second_run_does_nothing_and_more_architectures_keep_the_old_scores(
    folder: Path, finished: tuple[Path, RankStudy]
) -> None:
    root, before = finished
    progress = Saying()
    ranked(study(folder, seeds=[5, 6]), root, progress)
    assert {
        "supernet-5: up to date, skipped",
        "supernet-6: up to date, skipped",
        "rank: up to date, skipped",
    } <= set(progress.said)
    copy = folder / "more"
    shutil.copytree(root, copy)
    after = ranked(study(folder, seeds=[5, 6], architectures=15), copy)
    assert [
        point for point in after.points if point.name in {p.name for p in before.points}
    ] == list(before.points)
    assert all(len(rows) == 15 for rows in _rows(copy))  # twelve of them existed
    wider = ranked(study(folder, seeds=[5, 6], architectures=15, scores=[*SCORES, "synflow"]), copy)
    assert {"synflow", *SCORES} == set(wider.points[0].scores)
    progress = Saying()
    config = study(folder, seeds=[5, 6])
    evaluated = config.search.model_copy(
        update={"evaluation_images": 77, "recalibration_images": 66}
    )
    other = ranked(config.model_copy(update={"search": evaluated}), copy, progress)
    assert {"supernet-5: up to date, skipped", "supernet-6: up to date, skipped"} <= set(
        progress.said
    )
    assert [point.scores["loss"] for point in other.points] != [
        point.scores["loss"] for point in before.points
    ]


@pytest.mark.parametrize(
    ("where", "steps"), [("training a super-net", 5), ("scoring", 4), ("bootstrap", 2)]
)
def test_a_killed_study_ends_like_an_uninterrupted_one(
    folder: Path, finished: tuple[Path, RankStudy], tmp_path: Path, where: str, steps: int
) -> None:
    config = study(folder, seeds=[5, 6])
    with pytest.raises(Killed):
        ranked(config, tmp_path / "run", Killing(where, steps))
    assert ranked(config, tmp_path / "run") == finished[1]


def test_a_failed_training_is_reported_and_leaves_the_others(
    folder: Path, finished: tuple[Path, RankStudy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hwnas.search.spos import SPOS

    step = SPOS.step

    def diverging(self: SPOS, ctx: SearchContext) -> Metrics:
        if ctx.rng.bit_generator.seed_seq.entropy[0] == 5:  # type: ignore[attr-defined]
            raise DivergenceError("the loss is nan at step 0.")
        return step(self, ctx)

    monkeypatch.setattr(SPOS, "step", diverging)
    progress = Saying()
    config = study(folder, seeds=[5, 6])
    ranking = ranked(config, tmp_path / "run", progress)
    assert ranking.failed_trainings == {"5": "the loss is nan at step 0."}
    assert ranking.supernets == finished[1].supernets[1:]
    assert any("seed 5 has no super-net: the loss is nan" in line for line in progress.said)
    with pytest.raises(HwnasError, match=r"no super-net was trained.*the loss is nan"):
        ranked(study(folder, seeds=[5]), tmp_path / "alone")
    monkeypatch.undo()
    assert ranked(config, tmp_path / "run") == finished[1]  # the same command tries again


def test_a_failed_architecture_is_reported_and_leaves_the_others(
    folder: Path, finished: tuple[Path, RankStudy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = finished[1].points[4].name
    score = Scorer.score

    def failing(self: Scorer, picks: Picks, names: Any) -> dict[str, float]:
        if json.dumps(picks) == bad:
            raise ArithmeticError("its loss is nan\nand more")
        return score(self, picks, names)

    monkeypatch.setattr(Scorer, "score", failing)
    ranking = ranked(study(folder), tmp_path / "run")
    assert ranking.supernets[0].failed == {bad: "its loss is nan"}
    assert ranking.supernets[0].scored == 11
    assert [point.name for point in ranking.points] == [
        point.name for point in finished[1].points if point.name != bad
    ]


def test_the_super_net_of_an_earlier_search_can_be_used(
    folder: Path, tmp_path: Path, finished: tuple[Path, RankStudy]
) -> None:
    plain = study(
        folder,
        search={
            "target_range": 0.5,
            "random_samples": 0,
            "candidates": 1,
            "strategy": {"name": "spos", "generations": 1},
        },
    )
    search = plain.search.model_copy(update={"budget": MacsLimit(kind="macs"), "tolerance": 0.5})
    Pipeline(
        plain.model_copy(update={"search": search}), tmp_path / "searched", Progress()
    ).run_stage("search")
    ranking = ranked(study(folder, supernets=[str(tmp_path / "searched")]), tmp_path / "run")
    assert not (tmp_path / "run" / "supernet-5").exists()
    assert ranking.supernets[0].strategy == "spos"
    of_first = [result.supernets[:1] for result in finished[1].scores]
    # the same training as the study's own of that seed
    assert [result.supernets for result in ranking.scores] == of_first


@pytest.mark.parametrize(
    ("search", "settings", "words"),
    [
        ({}, {"truth": None}, "study.truth is not set"),
        ({}, {"architectures": 31}, "study.architectures = 31, but .* has 30"),
        ({}, {"supernets": ["nowhere"]}, "study.supernets = 'nowhere' is not a folder"),
        ({"weights": "x"}, {}, "name the folder in study.supernets"),
        ({"strategy": {"name": "random_standalone"}}, {}, "no super-net to study"),
        ({}, {"accuracies": ["acc3"]}, "no column 'acc3'"),
    ],
)
def test_impossible_studies_are_refused_before_any_training(
    folder: Path, tmp_path: Path, search: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises((ConfigError, TableError), match=words):
        ranked(study(folder, search, **settings), tmp_path / "run")
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seeds": [1], "supernets": ["a"]}, "remove one of them"),
        ({"top_k": 12}, "lower it"),
        ({"seeds": [1, 1]}, "study.seeds has 1 twice"),
        ({"combinations": [["accuracy", "synflow"]]}, "give two or more of study.scores"),
        ({"combinations": [["accuracy"]]}, "give two or more of study.scores"),
    ],
)
def test_contradictory_settings_are_refused(
    folder: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        study(folder, **settings)


def test_the_angle_is_from_the_weights_after_the_base_epochs(folder: Path, tmp_path: Path) -> None:
    """Killed before and after them, a training gives the same angles as one that was
    not killed.
    """
    config = study(folder, scores=["angle"], combinations=[], base_epochs=0.1)
    straight = ranked(config, tmp_path / "straight")
    base, last = (
        load_supernet(tmp_path / "straight/supernet-5" / name, SPACE)
        for name in ("base.safetensors", "shared.safetensors")
    )
    angles = Angles(base, last)
    truth = read_truth(folder / "truth.csv", SPACE)
    picks = dict(zip(truth.names, truth.picks, strict=True))
    assert all(
        point.scores["angle"] == angles.of(picks[point.name]) > 0 for point in straight.points
    )
    from_the_start = ranked(study(folder, scores=["angle"], combinations=[]), tmp_path / "whole")
    assert all(
        a.scores != b.scores for a, b in zip(straight.points, from_the_start.points, strict=True)
    )
    for steps in (1, 4):
        with pytest.raises(Killed):
            ranked(config, tmp_path / "killed", Killing("training a super-net", steps))
    assert ranked(config, tmp_path / "killed").points == straight.points


def test_impossible_base_epochs_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"base_epochs = 0\.3 is not below search\.epochs = 0\.3"):
        ranked(study(folder, base_epochs=0.3), tmp_path)
    with pytest.raises(ConfigError, match=r"study\.supernets keep only the last weights"):
        ranked(study(folder, base_epochs=0.1, supernets=["x"]), tmp_path)


def test_differences_to_macs_are_paired_by_network() -> None:
    """A score that follows the MACs closely is told apart from them even though the
    intervals of the two taus overlap.
    """
    rng = np.random.default_rng(0)
    truth_N = rng.normal(size=200)
    macs_N = truth_N + rng.normal(size=200)
    score_N = 0.8 * macs_N + 0.2 * truth_N
    config = StudyConfig(bootstrap=200)
    score, macs = estimates(config, score_N, truth_N, macs_N), estimates(config, macs_N, truth_N)
    assert score["kendall"].low < macs["kendall"].high and score["over_macs"].low > 0  # type: ignore[operator]
    assert macs["over_macs"] == IntervalEstimate(value=None)
