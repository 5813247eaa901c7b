"""The report of a ranking study: its table, scatter plots and failures, and that it
does not miss anything that such a study never has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwnas.config import Experiment, StudyConfig
from hwnas.core.spaces import mobile32
from hwnas.report import ranking, stage
from hwnas.report.documents import read
from hwnas.runs import StageContext, StageManifest
from hwnas.study.documents import (
    Gap,
    IntervalEstimate,
    MeanStd,
    Point,
    RankStudy,
    ScoreResult,
    SupernetResult,
    TruthInfo,
)
from hwnas.study.rank import METRICS, estimates
from tests.report.test_report import Page

SPACE = mobile32(resolution=16, in_channels=1)


def make_study(seeds: tuple[int, ...] = (0,), **changes: Any) -> RankStudy:
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.8, 0.93, 40)
    scores = {
        "accuracy": truth - 0.3 + rng.normal(0, 0.02, 40),
        "macs": 1e6 * rng.uniform(5, 90, 40),
    }
    config = StudyConfig(bootstrap=40)
    results = []
    for name, score in scores.items():
        per_supernet = tuple(estimates(config, score, truth, scores["macs"]) for _ in seeds)
        std = 0.012 if len(seeds) > 1 else None
        over_supernets = {
            metric: MeanStd(mean=per_supernet[0][metric].value, std=std) for metric in METRICS
        }
        results.append(
            ScoreResult(name=name, supernets=per_supernet, over_supernets=over_supernets)
        )
    points = [
        Point(
            name=str(i),
            truth=float(truth[i]),
            scores={name: float(score[i]) for name, score in scores.items()},
        )
        for i in range(len(truth))
    ]
    study = RankStudy(
        space=SPACE.name, space_sha256=SPACE.sha256, architectures=40, threshold=0.001, top_k=10,
        bootstrap=40,
        truth=TruthInfo(file="truth.csv", sha256="0", networks=6561, repeats=3, columns=("acc1",), kendall=0.881, kendall_top=0.185),
        confidence=0.95, recalibration_images=512, evaluation_images=1000, scores=tuple(results), points=tuple(points),
        supernets=tuple(
            SupernetResult(seed=seed, strategy="spos", sha256="0", scored=40, gap=Gap(supernet=0.56, standalone=0.87)) for seed in seeds
        ),
    )  # fmt: skip
    return study.model_copy(update=changes)


def test_a_study_of_version_1_is_read() -> None:
    study = make_study((0, 1))
    content = json.loads(study.to_json())
    content["schema"] = "hwnas.rank-study/1"
    for supernet in content["supernets"]:
        supernet["gap"]["alone"] = supernet["gap"].pop("standalone")
    content["supernets"][1]["gap"] = None
    for score in content["scores"]:
        score["spread"] = score.pop("over_supernets")
    supernets = (study.supernets[0], study.supernets[1].model_copy(update={"gap": None}))
    assert RankStudy.parse(json.dumps(content)) == study.model_copy(update={"supernets": supernets})


def written(root: Path, study: RankStudy) -> str:
    (root / "rank").mkdir(parents=True)
    study.save(root / "rank" / "study.json")
    StageManifest(stage="rank", state="done", hwnas="0.1.0", inputs={}).save(
        root / "rank" / "stage.json"
    )
    data = {"resolution": 16, "channels": 1, "classes": 10, "mean": [0.31], "std": [0.37]}
    config = Experiment.model_validate({"name": "macro", "data": data})
    ctx = StageContext(config, root, root / "report")
    stage.write(ctx, read(ctx, SPACE, root / "profile" / "table.json"))
    return (root / "report" / "report.html").read_text()


@pytest.mark.slow
def test_a_study_has_its_table_and_a_plot_per_score(tmp_path: Path) -> None:
    text = written(tmp_path / "run", make_study())
    page = Page(text)
    assert page.ids.count("ranking") == 1 and page.tags["svg"] == 2
    tau = make_study().scores[0].supernets[0]["kendall"]
    assert tau.value is not None and tau.low is not None
    for words in (
        f"{tau.value:.3f}",
        f"{tau.low:.3f} to",
        "0.881",
        "0.185",
        "56.0% with",
        "87.0% after standalone training",
        "P@10",
    ):
        assert words in page.text, words
    assert "hwnas study rank" in page.text and "no score can be expected" not in page.text
    assert "Not finished yet" not in page.text and "not validated" not in page.text
    assert "Latency: batch 1" not in page.text and "MACs: multiply-accumulates" in page.text


def test_the_best_score_comes_first_and_several_supernets_show_their_deviation(
    tmp_path: Path,
) -> None:
    study = make_study((0, 1))
    rows = ranking.score_rows(study.model_copy(update={"scores": study.scores[::-1]}))
    assert [row.name for row in rows] == ["accuracy", "macs"]
    assert rows[0].cells[0][1] == "± 0.012"
    assert [title.partition(":")[0] for title, _ in ranking.scatters(study)] == [
        "Recalibrated accuracy",
        "MACs",
    ]


def test_failures_are_shown(tmp_path: Path) -> None:
    study = make_study(failed_trainings={"7": "the loss is <nan>"})
    supernets = (study.supernets[0].model_copy(update={"failed": {"00000000": "out of memory"}}),)
    page = Page(written(tmp_path / "run", study.model_copy(update={"supernets": supernets})))
    assert "Seed 7 has no super-net: the loss is <nan>" in page.text
    assert "1 without a score" in page.text and "00000000: out of memory" in page.text


@pytest.mark.parametrize("value", [None, -0.25])
def test_undefined_and_negative_numbers_are_shown(value: float | None) -> None:
    study = make_study()
    estimate = IntervalEstimate(value=value)
    changed = ScoreResult(
        name="macs",
        supernets=(dict.fromkeys(METRICS, estimate),),
        over_supernets={metric: MeanStd(mean=value) for metric in METRICS},
    )
    study = study.model_copy(update={"scores": (changed,)})
    shown = ranking.score_rows(study)[0].cells[0]
    assert shown == ("–" if value is None else "−0.250", "")
    assert len(ranking.scatters(study)) == 1


def test_an_earlier_study_is_shown_without_the_metric_that_it_lacks() -> None:
    full = make_study().scores[0]
    older = full.model_copy(
        update={
            "supernets": tuple(
                {name: value for name, value in by_metric.items() if name != "over_macs"}
                for by_metric in full.supernets
            ),
            "over_supernets": {
                name: value for name, value in full.over_supernets.items() if name != "over_macs"
            },
        }
    )
    rows = ranking.score_rows(make_study(scores=(older,)))
    assert rows[0].cells[METRICS.index("over_macs")] == ("–", "")


def test_a_few_networks_that_learnt_nothing_are_counted_and_not_drawn() -> None:
    study = make_study()
    assert "lie outside" not in ranking.scatters(study)[0][1]
    points = [
        point.model_copy(update={"truth": 0.1}) if i < 2 else point
        for i, point in enumerate(study.points)
    ]
    assert (
        "2 of 40 lie outside"
        in ranking.scatters(study.model_copy(update={"points": tuple(points)}))[0][1]
    )
