"""Shrinking from configuration to documents: killed and resumed, what the rounds pass
on, and the space that searches accept.
"""

from __future__ import annotations

import csv
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.config import Experiment
from hwnas.core.space import MacroSpace
from hwnas.core.spaces import load_space
from hwnas.errors import ConfigError, SpaceError
from hwnas.nn.supernet import read_supernet
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.search.shrinking import shrinkable
from hwnas.studies import study_shrink
from hwnas.study import shrink, supernets
from hwnas.study.documents import ShrinkPath, ShrinkStep, ShrinkStudy
from hwnas.testing import synthetic_table
from tests.search.staging import (
    OPTIONS,
    Killed,
    Killing,
    Saying,
    elastic_digits_space,
    experiment,
    run,
)

pytestmark = pytest.mark.slow

SPACE = elastic_digits_space()
METRICS = ("angle", "accuracy", "magnitude", "random")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A space document, and a ground truth: later options of a choice are better."""
    root = tmp_path_factory.mktemp("shrink")
    SPACE.save(root / "tiny.json")
    rng = np.random.default_rng(0)
    with open(root / "truth.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["arch", "acc"])
        for index in np.ndindex(*(len(choice.options) for choice in SPACE.choices)):
            picks = SPACE.at(index)
            better = sum(choice.options.index(picks[choice.key]) for choice in shrinkable(SPACE))
            lines.writerow([json.dumps(picks), f"{50 + better + rng.normal() * 0.1:.4f}"])
    return root


def study(
    folder: Path, search: dict[str, Any] | None = None, truth: bool = True, **settings: Any
) -> Experiment:
    plain = experiment(
        "spos",
        evaluation_images=64,
        **{"recalibration_images": 64, "target_range": None, **(search or {})},
    )
    shrink = {
        "metrics": METRICS, "samples": 4, "dropped": 3, "until": 40, "first_epochs": 0.3, "epochs": 0.2, "refresh_after": 3,
        "alpha_lr": 0.01, "alpha_every": 2, **settings,
    }  # fmt: skip
    content = plain.model_dump(mode="json", by_alias=True) | {
        "space": {"name": str(folder / "tiny.json")},
        "shrink": shrink,
    }
    return Experiment.model_validate(
        content | {"study": {"truth": str(folder / "truth.csv") if truth else None}}
    )


def shrunk(config: Experiment, root: Path, progress: Progress | None = None) -> ShrinkStudy:
    study_shrink(Pipeline(config, root, progress or Progress()))
    return ShrinkStudy.load(root / "shrink" / "shrink.json")


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, ShrinkStudy]:
    return folder / "run", shrunk(study(folder), folder / "run")


def test_every_metric_has_its_path_and_its_space(finished: tuple[Path, ShrinkStudy]) -> None:
    root, result = finished
    assert tuple(path.metric for path in result.paths) == METRICS
    for path in result.paths:
        assert ShrinkPath.load(root / f"shrink-{path.metric}" / "path.json") == path
        remaining = MacroSpace.load(root / f"shrink-{path.metric}" / "space.json")
        assert (remaining.sha256, remaining.size) == (path.shrunk_sha256, path.steps[-1].size_after)
        assert remaining.size <= 40 < path.steps[-1].size  # it stops as soon as it is small enough
        assert [step.size for step in path.steps[1:]] == [
            step.size_after for step in path.steps[:-1]
        ]
        for number, step in enumerate(path.steps):
            scores = {
                (key, option): score
                for key, options in step.scores.items()
                for option, score in options.items()
            }
            assert len(step.dropped) == 3
            kept = min(score for operator, score in scores.items() if operator not in step.dropped)
            single = {
                key
                for key, options in step.scores.items()
                if len(options) - sum(k == key for k, _ in step.dropped) == 1
            }
            assert all(scores[dropped] <= kept for dropped in step.dropped) or single
            after = MacroSpace.load(
                root / f"shrink-{path.metric}" / f"stage-{number}" / "space.json"
            )
            assert after.size == step.size_after
        # once, when more than three operators are dropped
        assert [step.refreshed for step in path.steps[:3]] == [False, True, False][
            : len(path.steps)
        ]


def test_all_share_the_first_training_and_random_needs_none(
    finished: tuple[Path, ShrinkStudy],
) -> None:
    root, result = finished
    assert not list(root.glob("shrink-*/stage-0/*.safetensors")) and not list(
        root.glob("shrink-random/*/*.safetensors")
    )
    first = read_supernet(root / "shrink-first" / "shared.safetensors")
    params = sum(weight.numel() for weight in first.parameters())
    by_metric = {path.metric: path.steps for path in result.paths}
    assert [by_metric[name][0].params for name in METRICS] == [params, params, params, None]
    assert [steps[0].children > 0 for steps in by_metric.values()] == [True, True, False, False]
    for name in METRICS[:3]:
        assert by_metric[name][1].params < params  # type: ignore[operator]
    alphas = json.loads((root / "shrink-first" / "alphas.json").read_text())
    assert alphas["s1.b1"] == by_metric["magnitude"][0].scores["s1.b1"]


def test_weights_and_base_weights_are_passed_on(finished: tuple[Path, ShrinkStudy]) -> None:
    """A round takes over the previous round's W0 or, at the refresh, its W."""
    root, result = finished
    assert result.paths[0].steps[1].refreshed
    last = {
        number: [read_supernet(folder / f"{name}.safetensors") for name in ("initial", "shared")]
        for number, folder in enumerate(
            (root / "shrink-first", root / "shrink-angle/stage-1", root / "shrink-angle/stage-2")
        )
    }
    fixed = [[net.slots[0].state_dict() for net in nets] for nets in last.values()]

    def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(a[key], b[key]) for key in a)

    assert same(fixed[0][0], fixed[1][0]) and not same(fixed[0][0], fixed[0][1])
    assert not same(fixed[1][0], fixed[2][0]) and same(fixed[1][1], fixed[2][0])


def test_the_truth_evaluates_what_remains(finished: tuple[Path, ShrinkStudy]) -> None:
    _, result = finished
    assert result.truth is not None and result.oracle is not None and result.chance is not None
    assert result.truth.networks == SPACE.size == 400
    for curve, path in zip(result.curves, result.paths, strict=True):
        assert [remaining.networks for remaining in curve.remaining] == [
            400,
            *(step.size_after for step in path.steps),
        ]
        assert len(curve.operator_kendall) == len(path.steps)
    means = [remaining.mean for remaining in result.oracle.remaining]
    assert all(a < b for a, b in pairwise(means))  # type: ignore[operator]
    assert result.oracle.remaining[-1].best == result.oracle.remaining[0].best
    assert means[-1] > result.chance.mean[-1][2]  # type: ignore[operator]
    low, high = result.chance.mean[-1][1:]
    assert low < result.chance.mean[0][0] < high  # chance changes the mean, but not on average
    assert abs(result.chance.mean[-1][0] - result.chance.mean[0][0]) < 0.005


@pytest.mark.parametrize(
    ("metric", "where", "steps"),
    [
        ("angle", "super-net of all metrics", 4),
        ("angle", "angle: training", 5),
        ("accuracy", "scoring", 4),
        ("magnitude", "magnitude: training", 3),
    ],
)
def test_a_killed_study_ends_like_an_uninterrupted_one(
    folder: Path,
    finished: tuple[Path, ShrinkStudy],
    tmp_path: Path,
    metric: str,
    where: str,
    steps: int,
) -> None:
    """And like a study of several metrics, though architecture parameters are trained
    beside the weights only if a metric needs them.
    """
    config = study(folder, metrics=(metric,))
    with pytest.raises(Killed):
        shrunk(config, tmp_path / "run", Killing(where, steps))
    result = shrunk(config, tmp_path / "run")
    assert result.paths == tuple(path for path in finished[1].paths if path.metric == metric)
    assert result.curves == tuple(curve for curve in finished[1].curves if curve.name == metric)


def test_a_second_run_does_nothing_and_other_metrics_keep_what_exists(
    folder: Path, finished: tuple[Path, ShrinkStudy]
) -> None:
    copy, progress = folder / "again", Saying()
    shutil.copytree(finished[0], copy)
    shrunk(study(folder), copy, progress)
    assert (
        all(line.endswith("up to date, skipped") for line in progress.said)
        and len(progress.said) == 6
    )
    progress = Saying()
    fewer = shrunk(study(folder, metrics=("magnitude", "angle")), copy, progress)
    assert fewer.paths == (finished[1].paths[2], finished[1].paths[0])
    assert {"shrink-first: up to date, skipped", "shrink-angle: up to date, skipped"} <= set(
        progress.said
    )
    changed = study(folder, metrics=("magnitude", "angle"), dropped=2, until=200)
    # operators are scored again, but the first training is the same
    other = shrunk(changed, copy, progress := Saying())
    assert "shrink-first: up to date, skipped" in progress.said
    assert len(other.paths[1].steps[0].dropped) == 2
    assert other.paths[1].steps[0].scores == finished[1].paths[0].steps[0].scores


def test_weights_are_shared_less_round_by_round(folder: Path, tmp_path: Path) -> None:
    """PWSNAS's second strategy: the space shrinks and the super-net does not."""
    settings: dict[str, Any] = {"metrics": ("angle",), "dropped": 1, "until": 150}
    plain = shrunk(study(folder, truth=False, **settings), tmp_path / "plain").paths[0].steps
    split = (
        shrunk(
            study(folder, truth=False, operation_on=("node", "edge", "op"), **settings),
            tmp_path / "split",
        )
        .paths[0]
        .steps
    )
    assert [step.operation_on for step in split[:3]] == ["node", "edge", "op"][: len(split)]
    assert split[0] == plain[0]
    assert split[0].params < split[1].params < split[2].params  # type: ignore[operator]
    assert plain[0].params > plain[1].params  # type: ignore[operator]


def test_without_a_truth_there_is_nothing_to_compare(folder: Path, tmp_path: Path) -> None:
    result = shrunk(
        study(folder, truth=False, metrics=("random",), drop="each", keep=2),
        tmp_path / "run",
        progress := Saying(),
    )
    assert (result.truth, result.curves, result.oracle, result.chance) == (None, (), None, None)
    assert not (tmp_path / "run" / "shrink-first").exists()
    sizes = [step.size_after for step in result.paths[0].steps]
    assert sizes == [3 * 4 * 4 * 4, 2 * 3 * 3 * 4, 2 * 2 * 2 * 4]
    assert any(
        line.startswith("random, round 0: 3 of 14 scored operators dropped (")
        for line in progress.said
    )
    assert any(
        "; a choice's last operator is kept and not scored); 400 architectures -> 192" in line
        for line in progress.said
    )


def test_it_ends_when_no_more_operators_may_be_dropped(folder: Path, tmp_path: Path) -> None:
    result = shrunk(study(folder, metrics=("random",), until=1, keep=4), tmp_path / "run")
    steps = result.paths[0].steps
    # two choices have five options
    assert sum(len(step.dropped) for step in steps) == 2 and not steps[-1].dropped


@pytest.mark.parametrize("strategy", ["spos", "fairnas", "proxylessnas", "darts", "pdarts"])
def test_searches_accept_the_space_before_and_after(
    strategy: str, finished: tuple[Path, ShrinkStudy], tmp_path: Path
) -> None:
    after = load_space(str(finished[0] / "shrink-angle" / "space.json"))
    assert isinstance(after, MacroSpace) and after.size < SPACE.size
    options = {"name": strategy, **OPTIONS[strategy]}
    for number, space in enumerate((SPACE, after)):
        config = experiment(
            strategy,
            strategy=options,
            epochs=0.1,
            tolerance=0.5,
            evaluation_images=32,
            recalibration_images=32,
            candidates=1,
            random_samples=0,
        )
        run(tmp_path / str(number) / "search", config, synthetic_table(space), space=space)
        picks = json.loads((tmp_path / str(number) / "search" / "search.json").read_text())[
            "candidates"
        ][0]["picks"]
        space.check(picks)


@pytest.mark.parametrize(
    ("search", "settings", "error", "words"),
    [
        (
            {"strategy": {"name": "darts"}},
            {},
            ConfigError,
            "'darts' does not train single paths .* use spos or fairnas",
        ),
        ({}, {"until": 400}, ConfigError, "shrink.until = 400, but space tiny has 400"),
        ({}, {"metrics": ["angel"]}, ConfigError, "did you mean 'angle'"),
        (
            {},
            {"operation_on": ["edge"]},
            ConfigError,
            "magnitude mixes options, so an input has no single producer",
        ),
        (
            {"supernet": {"wsbn": True}},
            {},
            ConfigError,
            "magnitude mixes options, so an input has no single producer",
        ),
        ({}, {"max_macs": 10.0}, SpaceError, "within shrink.max_macs = 10 was found"),
    ],
)
def test_impossible_shrinkings_are_refused(
    folder: Path,
    tmp_path: Path,
    search: dict[str, Any],
    settings: dict[str, Any],
    error: Any,
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        shrunk(study(folder, search, **settings), tmp_path / "run")


def test_steps_are_documents(finished: tuple[Path, ShrinkStudy]) -> None:
    for path in finished[1].paths:
        for number, step in enumerate(path.steps):
            assert (
                ShrinkStep.load(
                    finished[0] / f"shrink-{path.metric}" / f"stage-{number}" / "step.json"
                )
                == step
            )


def test_w0_is_from_the_end_of_the_base_epochs(folder: Path, tmp_path: Path) -> None:
    """In the first training only; the last weights are the same."""
    roots = [tmp_path / "at-once", tmp_path / "later"]
    for root, base in zip(roots, (0.0, 0.2), strict=True):
        shrunk(study(folder, metrics=["angle"], until=300, base_epochs=base), root)
    files = ("initial.safetensors", "shared.safetensors")
    initial, last = (
        [read_supernet(root / "shrink-first" / file) for root in roots] for file in files
    )
    with pytest.raises(Killed):  # after the base epochs
        shrunk(
            study(folder, metrics=["angle"], until=300, base_epochs=0.1),
            tmp_path / "killed",
            Killing("super-net of all metrics", 5),
        )
    shrunk(study(folder, metrics=["angle"], until=300, base_epochs=0.1), tmp_path / "killed")
    shrunk(study(folder, metrics=["angle"], until=300, base_epochs=0.1), tmp_path / "straight")
    files_of = [
        (root / "shrink-first/initial.safetensors").read_bytes()
        for root in (tmp_path / "killed", tmp_path / "straight", roots[0])
    ]
    assert files_of[0] == files_of[1] != files_of[2]
    same = [
        all(
            torch.equal(*pair)
            for pair in zip(*(supernet.parameters() for supernet in both), strict=True)
        )
        for both in (initial, last)
    ]
    assert same == [False, True]
    assert [ShrinkPath.load(root / "shrink-angle" / "path.json").base_epochs for root in roots] == [
        0.0,
        0.2,
    ]
    with pytest.raises(ValueError, match=r"base_epochs = 0\.3 is not below first_epochs = 0\.3"):
        study(folder, base_epochs=0.3)


def test_a_training_depends_on_how_policies_are_rewarded() -> None:
    """Evaluating by the loss changes the rewards, too, so neither study takes over a
    super-net that was trained with accuracy.
    """
    by_metric, by_loss, fewer = (
        experiment("tunas", **settings)
        for settings in ({}, {"quality": "loss"}, {"evaluation_images": 7})
    )
    assert (
        shrink.first_sha256(by_metric) == shrink.first_sha256(fewer) != shrink.first_sha256(by_loss)
    )
    assert (
        supernets.training(by_metric, 0)
        == supernets.training(fewer, 0)
        != supernets.training(by_loss, 0)
    )
    assert supernets.training(by_loss, 0).search.quality == "loss"
