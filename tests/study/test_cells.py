"""Studies of cells, from the configuration to the document: strings in, scores of a
trained super-net out.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from hwnas.config import Experiment
from hwnas.core.cells import CellSpace
from hwnas.core.spaces import darts, load_space, nasbench201
from hwnas.errors import ConfigError
from hwnas.nn.supernet import read_supernet
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from hwnas.studies import study_rank, study_shrink
from hwnas.study import supernets
from hwnas.study.documents import RankStudy, ShrinkStudy
from tests.search.staging import experiment

SPACE = nasbench201(width=0.25, resolution=8, in_channels=1).changed("cells", cells=(1, 1))
SCORES = (
    "accuracy",
    "loss",
    "unrecalibrated",
    "angle",
    "macs",
    "params",
    "grad_norm",
    "snip",
    "synflow",
)


@pytest.mark.slow
def test_cells_are_ranked(tmp_path: Path) -> None:
    SPACE.save(tmp_path / "cells.json")
    rng = np.random.default_rng(0)
    texts = sorted({SPACE.write(SPACE.sample(rng)) for _ in range(30)})[:12]
    with open(tmp_path / "truth.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["idx", "arch_str", "test"])
        lines.writerows(
            (i, text, 50 + SPACE.decode(SPACE.read(text)).macs / 1e5)
            for i, text in enumerate(texts)
        )
    plain = experiment(
        "spos", evaluation_images=64, target_range=None, epochs=0.3, recalibration_images=64
    )
    study = {
        "truth": str(tmp_path / "truth.csv"), "accuracies": ["test"], "architectures": 8, "top_k": 3, "bootstrap": 20, "scores": SCORES,
        "combinations": [("accuracy", "angle")],
    }  # fmt: skip
    content = plain.model_dump(mode="json", by_alias=True) | {
        "space": {"name": str(tmp_path / "cells.json")},
        "study": study,
    }
    study_rank(Pipeline(Experiment.model_validate(content), tmp_path / "run", Progress()))
    ranking = RankStudy.load(tmp_path / "run" / "rank" / "study.json")
    assert ranking.space == "cells" and ranking.supernets[0].scored == 8
    by_name = {score.name: score.supernets[0]["kendall"].value for score in ranking.scores}
    assert by_name["macs"] == pytest.approx(1.0)
    assert by_name.keys() == {*SCORES, "accuracy+angle"}
    for point in ranking.points:
        assert SPACE.write(SPACE.read(point.name)) == point.name
        assert 0 < point.scores["angle"] < np.pi
    Pipeline(Experiment.model_validate(content), tmp_path / "run", Progress()).run_stage("report")
    assert "accuracy+angle" in (tmp_path / "run" / "report" / "report.html").read_text()


def test_a_super_net_that_is_initialised_again_has_no_angle() -> None:
    space = darts(channels=4, layers=8, resolution=8, in_channels=1)
    for scores in (["angle", "loss"], ["loss"]):
        plain = experiment("pdarts", target_range=None).model_dump(mode="json", by_alias=True)
        config = Experiment.model_validate(plain | {"study": {"scores": scores}})
        if "angle" in scores:
            with pytest.raises(
                ConfigError,
                match=r"initialises its super-net again as it grows.* remove angle from study\.scores",
            ):
                supernets.check(config, space)
        else:
            supernets.check(config, space)


@pytest.mark.slow
def test_cells_are_shrunk(tmp_path: Path) -> None:
    """Stage by stage, with the weights of the previous stage. The remaining space is a
    document that can be searched.
    """
    SPACE.save(tmp_path / "cells.json")
    plain = experiment(
        "spos", evaluation_images=64, target_range=None, epochs=0.3, recalibration_images=64
    )
    shrink = {
        "metrics": ["angle", "magnitude"], "samples": 4, "dropped": 12, "until": 80, "first_epochs": 0.3, "epochs": 0.1, "alpha_every": 2,
    }  # fmt: skip
    content = plain.model_dump(mode="json", by_alias=True) | {
        "space": {"name": str(tmp_path / "cells.json")},
        "shrink": shrink,
    }
    study_shrink(Pipeline(Experiment.model_validate(content), tmp_path / "run", Progress()))
    result = ShrinkStudy.load(tmp_path / "run" / "shrink" / "shrink.json")
    for path in result.paths:
        remaining = load_space(str(tmp_path / "run" / f"shrink-{path.metric}" / "space.json"))
        assert isinstance(remaining, CellSpace) and remaining.sha256 == path.shrunk_sha256
        assert [step.size_after for step in path.steps][
            -1
        ] == remaining.size <= 80 < SPACE.size and len(path.steps) == 2
        before = read_supernet(
            tmp_path / "run" / "shrink-first" / "shared.safetensors"
        ).state_dict()
        initial = read_supernet(
            tmp_path / "run" / f"shrink-{path.metric}" / "stage-1" / "initial.safetensors"
        ).state_dict()
        first = read_supernet(
            tmp_path / "run" / "shrink-first" / "initial.safetensors"
        ).state_dict()
        assert initial.keys() < before.keys() and all(
            tensor.equal(first[name]) for name, tensor in initial.items()
        )
    edges = Experiment.model_validate(content | {"shrink": {**shrink, "operation_on": ["edge"]}})
    with pytest.raises(ConfigError, match="every edge of space cells has a single input"):
        study_shrink(Pipeline(edges, tmp_path / "no", Progress()))
