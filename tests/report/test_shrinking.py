"""The report of a shrinking study: its table and figure, with and without a truth."""

from __future__ import annotations

from pathlib import Path

import pytest

from hwnas.config import Experiment
from hwnas.core.spaces import mobile32
from hwnas.report import shrinking, stage
from hwnas.report.documents import read
from hwnas.runs import StageContext, StageManifest
from hwnas.study.documents import (
    Chance,
    Remaining,
    ShrinkCurve,
    ShrinkPath,
    ShrinkStep,
    ShrinkStudy,
    TruthInfo,
)
from tests.report.test_report import Page

SPACE = mobile32(resolution=16, in_channels=1)


def path(metric: str) -> ShrinkPath:
    steps = [
        ShrinkStep(
            size=size,
            epochs=1.0,
            children=0,
            scores={"s1.b0": {"<a>": 0.0, "b": 1.0}},
            dropped=(("s1.b0", "<a>"),),
            size_after=after,
        )
        for size, after in ((6561, 1944), (1944, 576))
    ]
    return ShrinkPath(
        metric=metric,
        space="macro",
        space_sha256="0",
        seed=0,
        steps=tuple(steps),
        shrunk_sha256="1",
    )


def left(networks: int, mean: float, tenth: float) -> Remaining:
    return Remaining(networks=networks, mean=mean, best=0.931, worst=0.5, best_tenth=tenth)


def make_study(truth: bool = True) -> ShrinkStudy:
    study = ShrinkStudy(
        space="macro", space_sha256="0", seed=0, paths=(path("angle"), path("random"))
    )
    if not truth:
        return study
    by_angle = (left(6561, 0.90, 1), left(1944, 0.91, 0.75), left(576, 0.92, 0.5))
    by_chance = (left(6561, 0.90, 1), left(1944, 0.89, 0.25), Remaining(networks=0))
    curves = (
        ShrinkCurve(name="angle", remaining=by_angle, operator_kendall=(0.5, -0.25)),
        ShrinkCurve(name="random", remaining=by_chance, operator_kendall=(None, None)),
    )
    return study.model_copy(
        update={
            "truth": TruthInfo(
                file="truth.csv", sha256="0", networks=6561, repeats=3, columns=("acc1",)
            ),
            "curves": curves,
            "oracle": ShrinkCurve(name="oracle", remaining=curves[0].remaining),
            "chance": Chance(
                repeats=200,
                mean=((0.9, 0.9, 0.9), (0.901, 0.89, 0.91)),
                best_tenth=((1, 1, 1), (0.3, 0.1, 0.6)),
            ),
        }
    )


def test_the_rows_in_words() -> None:
    angle, random, chance, truth = shrinking.rows(make_study())
    assert (angle.sizes, angle.means) == ("6,561 → 1,944 → 576", "90.00 → 91.00 → 92.00")
    assert angle.dropped == "1/2, 1/2"
    assert (angle.rises, angle.best_tenth, angle.best, angle.kendall) == (
        "yes",
        "50.00",
        "93.10",
        "+0.50, −0.25",
    )
    assert (random.rises, random.best_tenth, random.kendall) == ("0 of 2", "–", "–, –")
    assert chance.means == "90.00 → 90.10 (89.00 to 91.00)"
    assert truth.rises == "yes"
    assert [row.name for row in (angle, random, chance, truth)] == [
        "angle",
        "random (one run)",
        "chance",
        "oracle",
    ]


@pytest.mark.slow
def test_the_page_has_the_table_and_the_figure(tmp_path: Path) -> None:
    for name, study in (("with", make_study()), ("without", make_study(truth=False))):
        root = tmp_path / name
        (root / "shrink").mkdir(parents=True)
        study.save(root / "shrink" / "shrink.json")
        StageManifest(stage="shrink", state="done", hwnas="0.1.0", inputs={}).save(
            root / "shrink" / "stage.json"
        )
        data = {"resolution": 16, "channels": 1, "classes": 10, "mean": [0.31], "std": [0.37]}
        config = Experiment.model_validate({"name": "macro", "data": data})
        ctx = StageContext(config, root, root / "report")
        stage.write(ctx, read(ctx, SPACE, root / "profile" / "table.json"))
        page = Page((root / "report" / "report.html").read_text())
        assert page.ids.count("shrinking") == 1 and page.tags["svg"] == (name == "with")
        assert "hwnas study shrink" in page.text and "6,561 → 1,944 → 576" in page.text
        assert ("6,561 networks in truth.csv" in page.text) == (name == "with")
        named = (
            {"random (one run)": 2, "chance, 5 to 95 %": 1}
            if name == "with"
            else {"random (one run)": 1, "chance": 0, "oracle": 0}
        )
        assert {words: page.text.count(words) for words in named} == named
        assert (
            "Latency: batch 1" not in page.text
            and "device" not in page.text.partition("Provenance")[0]
        )
        assert "Not finished yet" not in page.text and "not validated" not in page.text
