"""The report of a comparison of methods: its tables, strips and failures, and that it
does not miss anything that such a study never has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hwnas.config import Experiment, StudyConfig
from hwnas.core.spaces import mobile32
from hwnas.report import comparing, stage
from hwnas.report.documents import read
from hwnas.runs import StageContext, StageManifest
from hwnas.search.cost_counter import SearchCost
from hwnas.study import metrics
from hwnas.study.compare import report_lines
from hwnas.study.documents import (
    CompareStudy,
    IntervalEstimate,
    MethodResult,
    PairwiseResult,
    RandomSearch,
    SearchOutcome,
    TruthInfo,
)
from tests.report.test_report import Page

SPACE = mobile32(resolution=16, in_channels=1)
RANKS = {"spos": (12, 40, 7), "random": (300, 40, 150)}


def method(name: str, ranks: tuple[int, ...], **changes: Any) -> MethodResult:
    outcomes = tuple(
        SearchOutcome(
            seed=seed, name=f"{rank:08}", picks={}, macs=50_000_000, accuracy=0.93 - rank / 1e4, rank=rank, regret=rank / 1e4,
            supernet_quality=0.5, cost=SearchCost(macs=10**15, training_images=1000, evaluated=8), cpu_seconds=61.0 if seed else None,
        )
        for seed, rank in enumerate(ranks)
    )  # fmt: skip
    middle = float(np.median(ranks))
    content = MethodResult(
        name=name, strategy=name, found=outcomes, rank=middle, accuracy=0.93 - middle / 1e4, regret=middle / 1e4, cost=1.25,
        equal=RandomSearch(trainings=2, rank=130.0, accuracy=0.917, ranks=(20, 55, 117, 200, 274)),
        p_better_than_one=IntervalEstimate(value=0.9, low=0.81, high=0.97),
        p_better_than_random=IntervalEstimate(value=0.75, low=0.6, high=0.9),
    )  # fmt: skip
    return content.model_copy(update=changes)


def make_study(**changes: Any) -> CompareStudy:
    spos, random = (method(name, ranks) for name, ranks in RANKS.items())
    a, b = (np.array([row.accuracy for row in result.found]) for result in (spos, random))
    won = metrics.wins(a, b)
    pair = PairwiseResult(
        first="random",
        second="spos",
        beats=IntervalEstimate(value=1 - won.mean(), low=0.0, high=0.4),
        p_value=metrics.mann_whitney(b, a),
    )
    study = CompareStudy(
        space=SPACE.name, space_sha256=SPACE.sha256, budget="49.09 to 60 M MACs", target_ms=54.5, tolerance=0.1, architectures=400,
        truth=TruthInfo(file="truth.csv", sha256="0", networks=6561, repeats=3, columns=("acc1",), kendall=0.881, kendall_top=0.185),
        best="22212202", best_accuracy=0.9313, standalone_epochs=50, standalone_images=50_000, standalone_macs=4e14,
        bootstrap=StudyConfig().bootstrap, confidence=0.95, seeds=(0, 1, 2), methods=(random, spos), pairwise=(pair,),
        random=RandomSearch(trainings=1, rank=200.5, accuracy=0.91, ranks=(40, 100, 200, 300, 360)),
    )  # fmt: skip
    return study.model_copy(update=changes)


def test_a_study_of_version_1_is_read() -> None:
    study = make_study()
    content = json.loads(study.to_json())
    content["schema"], content["duels"] = "hwnas.compare-study/1", content.pop("pairwise")
    for row in content["methods"]:
        row["beats_one"], row["beats_equal"] = (
            row.pop("p_better_than_one"),
            row.pop("p_better_than_random"),
        )
        for outcome in row["found"]:
            outcome["cost"]["judged"] = outcome["cost"].pop("evaluated")
    assert CompareStudy.parse(json.dumps(content)) == study


def written(root: Path, study: CompareStudy) -> str:
    (root / "compare").mkdir(parents=True)
    study.save(root / "compare" / "compare.json")
    StageManifest(stage="compare", state="done", hwnas="0.1.0", inputs={}).save(
        root / "compare" / "stage.json"
    )
    data = {"resolution": 16, "channels": 1, "classes": 10, "mean": [0.31], "std": [0.37]}
    config = Experiment.model_validate({"name": "macro", "data": data})
    ctx = StageContext(config, root, root / "report")
    stage.write(ctx, read(ctx, SPACE, root / "profile" / "table.json"))
    return (root / "report" / "report.html").read_text()


def test_a_comparison_has_its_strips_and_its_tables(tmp_path: Path) -> None:
    page = Page(written(tmp_path / "run", make_study()))
    assert page.ids.count("comparison") == 1 and page.tags["svg"] == 1
    for words in (
        "12 40 7",
        "3.0%",
        "92.88%",
        "1.25",
        "61 s",
        "0.90",
        "0.81 to 0.97",
        "of 2, 0.60 to 0.90",
        "p = 0.2",
        "22212202",
    ):
        assert words in page.text, words
    assert "hwnas study compare" in page.text and "a study of methods" in page.text
    assert "Not finished yet" not in page.text and "not validated" not in page.text
    assert "Latency: batch 1" not in page.text and "MACs: multiply-accumulates" in page.text


def test_the_best_median_comes_first_and_pairs_are_shown_from_both_sides() -> None:
    study = make_study()
    assert [row.name for row in comparing.method_rows(study)] == ["spos", "random"]
    spos, random = comparing.pairwise_rows(study)
    assert spos.cells[0] == random.cells[1] == ("", "")
    assert float(spos.cells[1][0]) + float(random.cells[0][0]) == 1
    # 12 and 7 beat all three, 40 beats two and equals one
    assert float(spos.cells[1][0]) == round(8.5 / 9, 2)


def test_failures_are_shown(tmp_path: Path) -> None:
    lost = MethodResult(name="darts", strategy="darts", found=(), failed={"1": "the loss is <nan>"})
    study = make_study(methods=(*make_study().methods, lost))
    page = Page(written(tmp_path / "run", study))
    assert "darts has no result for seed 1: the loss is <nan>" in page.text
    assert comparing.method_rows(study)[-1].cells[0] == ("–", "")
    assert "darts has no result for seed 1: the loss is <nan>" in report_lines(study)
    assert comparing.ranks(make_study(methods=(lost,), pairwise=())) is None


def test_the_printed_lines_state_the_results() -> None:
    printed = report_lines(make_study())
    assert printed[0].startswith(
        "400 of 6561 architectures are in the budget of 49.09 to 60 M MACs; the best, 22212202, has"
        " 93.13%"
    )
    assert printed[1].startswith(
        "spos: median true rank 12 of 400 (by seed: 12, 40, 7), 92.88%; beats a random architecture"
        " with probability 0.90"
    )
    assert (
        "random search by 2 training runs (its cost: 1.25) with probability 0.75 (0.60 to 0.90)"
        in printed[1]
    )
    assert printed[3] == "random beats spos with probability 0.06 (0.00 to 0.40), p = 0.2"
