"""The study on cells, from the configuration to the document: strings in, scores of a trained super-net out."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from hwnas.config import Experiment
from hwnas.core.spaces import nasbench201
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.study.documents import RankStudy
from tests.search.staging import experiment

SPACE = nasbench201(width=0.25, resolution=8, in_channels=1).changed("cells", cells=(1, 1))
SCORES = ("accuracy", "loss", "unrecalibrated", "angle", "macs", "params", "grad_norm", "snip", "synflow")


def test_a_study_of_cells(tmp_path: Path) -> None:
    SPACE.save(tmp_path / "cells.json")
    rng = np.random.default_rng(0)
    texts = sorted({SPACE.write(SPACE.sample(rng)) for _ in range(30)})[:12]
    with open(tmp_path / "truth.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["idx", "arch_str", "test"])
        lines.writerows((i, text, 50 + SPACE.decode(SPACE.read(text)).macs / 1e5) for i, text in enumerate(texts))
    plain = experiment("spos", evaluation_images=64, target_range=None, epochs=0.3, recalibration_images=64)
    study = {
        "truth": str(tmp_path / "truth.csv"), "accuracies": ["test"], "architectures": 8, "top_k": 3, "bootstrap": 20, "scores": SCORES,
        "combinations": [("accuracy", "angle")],
    }  # fmt: skip
    content = plain.model_dump(mode="json", by_alias=True) | {"space": {"name": str(tmp_path / "cells.json")}, "study": study}
    Pipeline(Experiment.model_validate(content), tmp_path / "run", Progress()).study_rank()
    found = RankStudy.load(tmp_path / "run" / "rank" / "study.json")
    assert found.space == "cells" and found.supernets[0].scored == 8
    by_name = {score.name: score.supernets[0]["kendall"].value for score in found.scores}
    assert by_name["macs"] == pytest.approx(1.0)
    assert by_name.keys() == {*SCORES, "accuracy+angle"}
    for point in found.points:
        assert SPACE.write(SPACE.read(point.name)) == point.name
        assert 0 < point.scores["angle"] < np.pi
    Pipeline(Experiment.model_validate(content), tmp_path / "run", Progress()).run_stage("report")
    assert "accuracy+angle" in (tmp_path / "run" / "report" / "report.html").read_text()
