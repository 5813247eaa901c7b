"""The comparison from configuration to document: ranks and costs are recounted here;
studies are killed and resumed, have a failed search, or are refused.
"""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwnas.cli import main
from hwnas.config import Experiment
from hwnas.errors import ConfigError, DivergenceError, HwnasError, TargetError
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.runs import JsonLines
from hwnas.search.result import SearchResult
from hwnas.search.strategy import Metrics, SearchContext
from hwnas.studies import study_compare
from hwnas.study.compare import (
    QUANTILES,
    chosen_by_random,
    comparison_pool,
    method_experiment,
    random_search,
)
from hwnas.study.documents import CompareStudy
from tests.search.staging import (
    EVOLUTION,
    Killed,
    Killing,
    Saying,
    elastic_digits_space,
    experiment,
)

SPACE = elastic_digits_space()
MAX_MACS = 200_000
METHODS = [
    {"strategy": {"name": "spos", **EVOLUTION}},
    {"name": "one-shot", "strategy": "random", "search": {"epochs": 0.1}},
]
EVALUATION, RECALIBRATION, BATCH = 64, 256, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A space document, and a ground truth of all its architectures that follows the
    MACs except for noise.
    """
    root = tmp_path_factory.mktemp("compare")
    SPACE.save(root / "tiny.json")
    rng, archs = np.random.default_rng(0), {}
    for row in itertools.product(*(range(len(choice.options)) for choice in SPACE.choices)):
        archs.setdefault(SPACE.canonical(np.array(row)).tobytes(), SPACE.at(list(row)))
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
        "spos",
        evaluation_images=EVALUATION,
        **{"target_range": None, "epochs": 0.2, "tolerance": 0.3, **(search or {})},
    )
    compared = {
        "methods": METHODS,
        "max_macs": MAX_MACS,
        "standalone_epochs": 0.1,
        "standalone_images": 1000,
    }
    wanted = {
        "truth": str(folder / "truth.csv"), "bootstrap": 50, "seeds": [5, 6], **settings, "compare": compared | settings.get("compare", {}),
    }  # fmt: skip
    content = plain.model_dump(mode="json", by_alias=True) | {
        "space": {"name": str(folder / "tiny.json")},
        "study": wanted,
    }
    return Experiment.model_validate(content)


def compared(config: Experiment, root: Path, progress: Progress | None = None) -> CompareStudy:
    study_compare(Pipeline(config, root, progress or Progress()))
    return CompareStudy.load(root / "compare" / "compare.json")


def counted(comparison: CompareStudy) -> dict[str, Any]:
    """All of the document but measured times."""
    content = comparison.model_dump(mode="json")
    for method in content["methods"]:
        for row in method["found"]:
            del row["cpu_seconds"]
    return content


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, CompareStudy]:
    return folder / "run", compared(study(folder), folder / "run")


def budgeted(folder: Path) -> dict[str, tuple[int, list[float]]]:
    """MACs and accuracies of the file's architectures within the budget, read and
    counted without the study's own code.
    """
    with open(folder / "truth.csv") as file:
        rows = {
            row["arch"]: [float(row["acc1"]), float(row["acc2"])] for row in csv.DictReader(file)
        }
    macs = {name: SPACE.decode(json.loads(name)).macs for name in rows}
    return {
        name: (macs[name], rows[name])
        for name in rows
        if MAX_MACS * 0.7 / 1.3 <= macs[name] <= MAX_MACS
    }


def test_ranks_are_those_among_the_architectures_in_the_budget(
    folder: Path, finished: tuple[Path, CompareStudy]
) -> None:
    root, comparison = finished
    inside = {name: np.mean(values) for name, (_, values) in budgeted(folder).items()}
    assert 20 < comparison.architectures == len(inside) < comparison.truth.networks
    assert comparison.best_accuracy == pytest.approx(max(inside.values())) and inside[
        comparison.best
    ] == max(inside.values())
    assert [method.name for method in comparison.methods] == [
        "spos",
        "one-shot",
    ] and comparison.seeds == (
        5,
        6,
    )
    for method in comparison.methods:
        assert [row.seed for row in method.found] == [5, 6]
        for row in method.found:
            searched = SearchResult.load(root / f"{method.name}-{row.seed}" / "search.json")
            own = inside[row.name]
            assert SPACE.decode(json.loads(row.name)) == SPACE.decode(searched.candidates[0].picks)
            assert row.macs == SPACE.decode(row.picks).macs == searched.candidates[0].predicted
            assert row.accuracy == pytest.approx(own) and row.regret == pytest.approx(
                max(inside.values()) - own
            )
            assert row.rank == sum(value >= own for value in inside.values())
            assert row.cpu_seconds is not None and row.cpu_seconds > 0
        assert method.rank == np.median([row.rank for row in method.found])
        expected = np.mean(
            [
                [(row.accuracy > value) + (row.accuracy == value) / 2 for value in inside.values()]
                for row in method.found
            ]
        )
        assert method.p_better_than_one.value == pytest.approx(expected)
    (pair,) = comparison.pairwise
    wins = [
        (a.accuracy > b.accuracy) + (a.accuracy == b.accuracy) / 2
        for a in comparison.methods[0].found
        for b in comparison.methods[1].found
    ]
    assert pair.beats.value == np.mean(wins) and (pair.first, pair.second) == ("spos", "one-shot")


def test_costs_are_counted(finished: tuple[Path, CompareStudy]) -> None:
    """Random search trains one path per step, whose MACs are in its log, and evaluates
    its candidates once, on all held-out images.
    """
    root, comparison = finished
    for row in comparison.methods[1].found:
        folder = root / f"one-shot-{row.seed}"
        result, steps = (
            SearchResult.load(folder / "search.json"),
            JsonLines(folder / "metrics.jsonl").read(),
        )
        # a gradient costs three forward passes
        trained = sum(3 * BATCH * step["macs"] for step in steps)
        # 288: a fifth of the 1,438 digits
        evaluated = sum(
            (RECALIBRATION + 288) * candidate.predicted for candidate in result.candidates
        )
        assert row.cost.macs == pytest.approx(trained + evaluated, rel=1e-9)
        assert (row.cost.training_images, row.cost.evaluated) == (
            BATCH * len(steps),
            len(result.candidates),
        )
    spos = comparison.methods[0].found[0].cost
    assert (
        spos.evaluated == 6 + 3 + 3 + 3
    )  # the evolution's, and the candidates of the last ranking
    mean = np.mean([row.cost.macs for row in comparison.methods[0].found])
    assert comparison.methods[0].cost == pytest.approx(mean / comparison.standalone_macs)
    assert (
        comparison.methods[0].equal is not None
        and comparison.methods[0].equal.trainings
        == int(np.ceil(mean / comparison.standalone_macs))
        > 1
    )


def test_random_search_agrees_with_many_simulated_ones(
    folder: Path, finished: tuple[Path, CompareStudy]
) -> None:
    pool = comparison_pool(study(folder), SPACE)
    inside = [values for _, values in budgeted(folder).values()]
    accuracy_NR, rng = np.array(inside), np.random.default_rng(0)
    mean_N = accuracy_NR.mean(1)
    rank_N = np.array([(mean_N >= value).sum() for value in mean_N])
    assert finished[1].standalone_macs == pytest.approx(
        3 * 0.1 * 1000 * np.mean([macs for macs, _ in budgeted(folder).values()])
    )
    for trainings in (1, 4):
        assert chosen_by_random(pool, trainings).sum() == pytest.approx(1)
        drawn = rng.integers(len(mean_N), size=(20_000, trainings))
        repeat = rng.integers(2, size=20_000)
        chosen = drawn[np.arange(20_000), accuracy_NR[drawn, repeat[:, None]].argmax(1)]
        exact = random_search(pool, trainings)
        assert exact.rank == pytest.approx(rank_N[chosen].mean(), rel=0.03)
        assert exact.accuracy == pytest.approx(mean_N[chosen].mean(), abs=1e-3)
        assert exact.ranks == pytest.approx(
            np.quantile(rank_N[chosen], QUANTILES), abs=0.02 * len(mean_N) + 1
        )


@pytest.mark.slow
def test_a_second_run_does_nothing_and_a_new_seed_keeps_earlier_results(
    folder: Path, finished: tuple[Path, CompareStudy]
) -> None:
    root, before = finished
    progress = Saying()
    assert compared(study(folder), root, progress) == before
    assert set(progress.said) == {
        f"{name}: up to date, skipped"
        for name in ("spos-5", "one-shot-5", "spos-6", "one-shot-6", "compare")
    }
    assert not list(root.glob("*/*.safetensors"))
    shutil.copytree(root, folder / "more")
    after = compared(study(folder, seeds=[5, 6, 7]), folder / "more", progress)
    assert [method.found[:2] for method in after.methods] == [
        method.found for method in before.methods
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "steps"), [("one-shot-5: searching", 2), ("spos-6: evolution", 5)]
)
def test_a_killed_study_ends_like_an_uninterrupted_one(
    folder: Path, finished: tuple[Path, CompareStudy], tmp_path: Path, where: str, steps: int
) -> None:
    with pytest.raises(Killed):
        compared(study(folder), tmp_path / "run", Killing(where, steps))
    after = compared(study(folder), tmp_path / "run")
    assert counted(after) == counted(finished[1])
    interrupted = [row.cpu_seconds is None for method in after.methods for row in method.found]
    assert sum(interrupted) == 1  # only a part of its time was measured


@pytest.mark.slow
def test_a_failed_search_is_reported_and_leaves_the_others(
    folder: Path,
    finished: tuple[Path, CompareStudy],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hwnas.search.spos import SPOS

    step = SPOS.step

    def diverging(self: SPOS, ctx: SearchContext) -> Metrics:
        if ctx.rng.bit_generator.seed_seq.entropy[0] == 5:  # type: ignore[attr-defined]
            raise DivergenceError("the loss is nan at step 0.")
        return step(self, ctx)

    monkeypatch.setattr(SPOS, "step", diverging)
    progress = Saying()
    comparison = compared(study(folder), tmp_path / "run", progress)
    assert comparison.methods[0].failed == {"5": "the loss is nan at step 0."}
    assert [row.seed for row in comparison.methods[0].found] == [6]
    assert [row.rank for row in comparison.methods[1].found] == [
        row.rank for row in finished[1].methods[1].found
    ]
    assert "spos has no result for seed 5: the loss is nan at step 0." in progress.said
    with pytest.raises(HwnasError, match=r"every search failed.*the loss is nan"):
        compared(study(folder, seeds=[5], compare={"methods": METHODS[:1]}), tmp_path / "alone")
    monkeypatch.undo()
    # the same command tries again
    assert counted(compared(study(folder), tmp_path / "run")) == counted(finished[1])


@pytest.mark.parametrize(
    ("search", "settings", "words"),
    [
        ({}, {"truth": None}, "study.truth is not set"),
        ({}, {"seeds": []}, "study.seeds is empty"),
        ({}, {"compare": {"methods": []}}, "study.compare.methods is empty"),
        ({}, {"compare": {"methods": ["sposs"]}}, "'sposs'.*did you mean 'spos'"),
        (
            {},
            {"compare": {"methods": [{"strategy": {"name": "spos", "generation": 2}}]}},
            "generation",
        ),
        (
            {},
            {"compare": {"methods": [{"strategy": "spos", "search": {"epoch": 2}}]}},
            "'spos'.*epoch",
        ),
        (
            {},
            {"compare": {"methods": [{"strategy": "spos", "search": {"finder": "evolutoin"}}]}},
            "evolutoin",
        ),
        ({}, {"compare": {"max_macs": None}}, "study.compare.max_macs is not set"),
        (
            {},
            {"compare": {"max_macs": 1000}},
            "no architecture of .*truth.csv has 538 to 1000 MACs; they have",
        ),
        ({"limits": [{"kind": "params", "max_params": 1}]}, {}, "params"),
        ({"weights": "x"}, {}, "search.weights, search.backbone and search.pretrained"),
        ({"table": "x.json"}, {}, "remove it, or limit MACs"),
    ],
)
def test_impossible_comparisons_are_refused_before_any_training(
    folder: Path, tmp_path: Path, search: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises((ConfigError, TargetError), match=words) as error:
        compared(study(folder, search, **settings), tmp_path / "run")
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"compare": {"methods": ["spos", "spos"]}}, "has 'spos' twice"),
        (
            {"compare": {"methods": [{"strategy": "spos", "search": {"tolerance": 0.5}}]}},
            "sets search.tolerance, which all methods",
        ),
        ({"compare": {"methods": [{"strategy": "spos", "name": "a/b"}]}}, "name"),
    ],
)
def test_contradictory_settings_are_refused(
    folder: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        study(folder, **settings)


def test_a_truth_that_lacks_architectures_is_refused(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "truth.csv").read_text().splitlines()
    (tmp_path / "part.csv").write_text("\n".join(lines[: len(lines) // 2]))
    with pytest.raises(
        ConfigError,
        match=(
            r"part.csv' has no accuracy for \{.*a random search proposes: a comparison needs every"
        ),
    ):
        compared(study(folder, truth=str(tmp_path / "part.csv")), tmp_path / "run")


def test_a_method_changes_only_what_it_names(folder: Path) -> None:
    config = study(folder)
    first, second = (
        method_experiment(config, method, 9) for method in config.study.compare.methods
    )
    assert (first.seed, first.search.epochs, second.search.epochs, second.search.strategy.name) == (
        9,
        0.2,
        0.1,
        "random",
    )
    assert first.search.main_budget == second.search.main_budget
    assert first.search.main_budget.most == pytest.approx(200_000 / 1.3)


def test_old_keys_inside_a_method_are_read(folder: Path) -> None:
    method = {"strategy": "spos", "search": {"optimizer": {"unused": "move"}}}
    config = study(folder, compare={"methods": [method]})
    with pytest.warns(
        FutureWarning,
        match=r"study\.compare\.methods, 'spos': search\.optimizer\.unused = 'move' is now",
    ):
        search = method_experiment(config, config.study.compare.methods[0], 5).search
    assert search.optimizer.inactive_weights == "decay"
    assert search.optimizer.lr == config.search.optimizer.lr


def test_the_command_and_its_exit_code(
    folder: Path,
    finished: tuple[Path, CompareStudy],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["hwnas", "study", "compare", str(finished[0]), "--json", "-q"]
    )
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    assert CompareStudy.parse(capsys.readouterr().out) == finished[1]
    monkeypatch.setattr(
        sys, "argv", ["hwnas", "study", "compare", "-q", "-s", "study.compare.methods=['spos']"]
    )
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert "error: study.seeds is empty" in capsys.readouterr().err
