"""The evaluator of architectures against the same steps by hand, and a finder that is
killed while it evaluates.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hwnas.config import Experiment
from hwnas.core.arch import Picks
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.core.table import LatencyTable
from hwnas.data.images import evaluation_batches, load_images
from hwnas.engine import accuracy
from hwnas.nn.bn import recalibrate
from hwnas.nn.supernet import MacroSupernet, resized
from hwnas.runs import JsonLines
from hwnas.search.evaluator import EVALUATIONS, SupernetEvaluator
from hwnas.search.proposal import one_hot
from hwnas.search.result import SearchResult
from hwnas.search.searching import prepare
from hwnas.search.settings import search_context
from hwnas.search.weights import Batches
from hwnas.testing import synthetic_table
from tests.search.staging import EVOLUTION, Killed, Killing, elastic_digits_space, experiment, run

torch.set_num_threads(1)


def supernet_of(space: MacroSpace) -> MacroSupernet:
    """A super-net with random weights, including a classifier whose logits differ
    between images.
    """
    supernet = MacroSupernet(space, torch.Generator().manual_seed(0))
    with torch.no_grad():
        supernet.classifier.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return supernet


def by_hand(
    supernet: MacroSupernet, config: Experiment, picks: Picks, size: int, images: int | None
) -> float:
    """Accuracy on the first ``images`` held-out images, recalibrated and evaluated at
    ``size`` pixels.
    """
    network = supernet.extract(picks)
    train, held_out = load_images(config.data, "train"), load_images(config.data, "held_out")
    count = config.search.recalibration_images
    recalibrate(
        network,
        [
            resized(x, size)
            for x, _ in evaluation_batches(train, config.search.batch_size, limit=count)
        ],
    )
    batches = [(resized(x, size), y) for x, y in evaluation_batches(held_out, 50, limit=images)]
    assert sum(len(y) for _, y in batches) == (images or len(held_out))
    return accuracy(network, batches)


def test_finders_evaluate_on_few_images_and_the_final_ranking_on_all() -> None:
    config = experiment(evaluation_images=70)
    supernet = supernet_of(elastic_digits_space())
    evaluator = SupernetEvaluator(supernet, config)
    picks = elastic_digits_space().at([0] * len(elastic_digits_space().choices))
    on_few, on_all = (by_hand(supernet, config, picks, 8, images) for images in (70, None))
    assert on_few != on_all
    assert evaluator.evaluate(picks) == pytest.approx(on_few)
    assert evaluator.on_all_images(evaluator.network(picks)) == pytest.approx(on_all)


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_a_search_sees_images_as_the_test_set_has_them(tmp_path: Path, resize: str) -> None:
    """All images are one photograph: BN recalibration, finders, the final ranking and
    rewards must see it as the test set does.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50), dtype=np.uint8)
    for folder in (tmp_path / part / name for part in ("train", "val") for name in "0123456789"):
        folder.mkdir(parents=True)
        for number in range(4):
            Image.fromarray(pixels).save(folder / f"{number}.png")
    settings = experiment(recalibration_images=8, evaluation_images=4, batch_size=4).model_dump(
        by_alias=True
    )
    settings["data"] |= {
        "name": "folder",
        "path": str(tmp_path),
        "augment": "crop_flip",
        "resize": resize,
    }
    config = Experiment.model_validate(settings)
    expected = load_images(config.data, "test").__getitems__([(0, 0)])[0]
    evaluator = SupernetEvaluator(supernet_of(elastic_digits_space()), config)
    rewards = Batches(evaluator.train, load_images(config.data, "held_out"), config.data, 4, 0, 3)
    seen = [
        *evaluator.recalibration(),
        *evaluator.evaluation(),
        *evaluation_batches(evaluator.held_out, 4),
        rewards.held_out(0, 1),
    ]
    assert sum(len(x_NCHW) for x_NCHW, _ in seen) >= 8 + 4 + 8 + 4
    for x_NCHW, _ in seen:
        assert torch.equal(x_NCHW, expected.expand_as(x_NCHW))


def test_architectures_can_be_evaluated_by_their_loss() -> None:
    config = experiment(evaluation_images=70, quality="loss")
    supernet = supernet_of(elastic_digits_space())
    evaluator = SupernetEvaluator(supernet, config)
    picks = elastic_digits_space().at([0] * len(elastic_digits_space().choices))
    network = evaluator.network(picks).eval()
    batches = list(evaluation_batches(load_images(config.data, "held_out"), 50, limit=70))
    with torch.no_grad():
        logits_NK = torch.cat([network(x_NCHW) for x_NCHW, _ in batches])
    loss = torch.nn.functional.cross_entropy(logits_NK, torch.cat([y for _, y in batches]))
    assert evaluator.evaluate(picks) == pytest.approx(1 / (1 + float(loss)), rel=1e-5)
    assert evaluator.quality.metric == "1 / (1 + loss)"


@pytest.mark.parametrize("quality", ["metric", "loss"])
def test_rewards_use_the_quality_by_which_architectures_are_evaluated(
    quality: str, tmp_path: Path
) -> None:
    """The quality that TuNAS is rewarded for, on the held-out batch of the step:
    accuracy, or 1 / (1 + cross-entropy).
    """
    config = experiment(
        strategy={"name": "tunas", "rl_lr": 0.05, "rl_delay": 0.0, "warmup": 0.0},
        quality=quality,
        epochs=0.2,
    )
    space = elastic_digits_space()
    prepared = prepare(
        config, space, search_context(config, space, synthetic_table(space)), tmp_path
    )
    prepared.step(0)
    picks = space.at([1] * len(space.choices))
    [scored] = prepared.search.qualities(one_hot(picks, space), multiple=4)
    x_NCHW, y = Batches(
        prepared.evaluator.train,
        prepared.evaluator.held_out,
        config.data,
        32,
        5,
        prepared.search.steps,
    ).held_out(0, 4)
    supernet = prepared.evaluator.supernet.eval()
    with torch.no_grad():
        logits_NK = supernet(x_NCHW.to(memory_format=torch.channels_last), one_hot(picks, space))
    loss = float(torch.nn.functional.cross_entropy(logits_NK, y))
    right = float((logits_NK.argmax(1) == y).float().mean())
    assert scored == pytest.approx(right if quality == "metric" else 1 / (1 + loss), rel=1e-5)
    assert abs(right - 1 / (1 + loss)) > 0.01


def test_an_architecture_is_evaluated_at_its_own_resolution() -> None:
    """Recalibrated and evaluated on images of its size; the same blocks at 8 and at 16
    pixels.
    """
    elastic = MacroSpace.model_validate(
        {**elastic_digits_space().model_dump(), "resolution": 16, "resolutions": [8, 16]}
    )
    config = experiment(evaluation_images=200)
    config = config.model_copy(update={"data": config.data.at(16)})
    supernet = supernet_of(elastic)
    evaluator = SupernetEvaluator(supernet, config)
    picks = elastic.at([0] * len(elastic.choices))
    quality_at = {}
    for size in (8, 16):
        resized_picks = {**picks, "resolution": size}
        quality_at[size] = evaluator.evaluate(resized_picks)
        assert evaluator.network(resized_picks).arch.resolution == size
        assert quality_at[size] == pytest.approx(
            by_hand(supernet, config, resized_picks, size, 200)
        )
        assert evaluator.on_all_images(evaluator.network(resized_picks)) == pytest.approx(
            by_hand(supernet, config, resized_picks, size, None)
        )
    assert quality_at[8] != quality_at[16]
    # on images of the other size, the same network has another accuracy
    wrong = evaluator.network({**picks, "resolution": 8})
    held_out = load_images(config.data, "held_out")
    assert accuracy(wrong, evaluation_batches(held_out, 50, limit=200)) != pytest.approx(
        quality_at[8]
    )


def test_a_last_recalibration_batch_of_one_image_is_left_out() -> None:
    """BN cannot estimate statistics from one image if the map is 1 x 1, so 65 images in
    batches of 64 give the same statistics as the first 64.
    """
    stages = (
        SpaceStage(widths=(8,), stride=2, slots=(("cn_k3",),)),
        SpaceStage(widths=(16,), stride=2, slots=(("ir_k3_e3", "ir_k3_e6"),)),
        SpaceStage(widths=(24,), stride=2, slots=(("ir_k3_e3", "ir_k3_e6"),)),
    )
    space = MacroSpace(name="deep", resolution=8, in_channels=1, classes=10, stages=stages)
    assert space.slots[-1].out_sizes == (1,)
    supernet, picks = supernet_of(space), space.at([0, 0])
    states = [
        SupernetEvaluator(supernet, experiment(recalibration_images=n, batch_size=64))
        .network(picks)
        .state_dict()
        for n in (64, 65, 66)
    ]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    assert not all(torch.equal(states[2][name], value) for name, value in states[0].items())


class Counting:
    """Counts recalibrations, of which every evaluation makes one. A call returns the
    count and resets it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0

        def counted(*arguments: Any) -> None:
            self.count += 1
            recalibrate(*arguments)

        monkeypatch.setattr("hwnas.search.evaluator.recalibrate", counted)

    def __call__(self) -> int:
        count, self.count = self.count, 0
        return count


@pytest.mark.slow
@pytest.mark.parametrize(
    "finder",
    [{"name": "evolution", **EVOLUTION}, {"name": "nsga2", "generations": 3, "population": 6}],
)
def test_a_killed_finder_evaluates_nothing_twice(
    finder: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed twice on the way, it ends with the same result after as many evaluations
    in total, each of them in the file once.
    """
    table: LatencyTable = synthetic_table(elastic_digits_space())
    run(
        tmp_path / "first/search",
        experiment("random", epochs=0.3, candidates=1, random_samples=0),
        table,
    )
    weights = experiment(
        weights=str(tmp_path / "first"), finder=finder, candidates=1, random_samples=0
    )
    counting = Counting(monkeypatch)
    run(tmp_path / "straight", weights, table)
    straight = counting()
    bar = {"evolution": "evolution", "nsga2": "NSGA-II"}[finder["name"]]
    # the second run first passes the known evaluations, which also advance the bar
    for steps, known in ((3, 3), (5, 5)):
        with pytest.raises(Killed):
            run(tmp_path / "killed", weights, table, Killing(bar, steps))
        assert len(JsonLines(tmp_path / "killed" / EVALUATIONS).read()) == known
    assert counting() == 5
    shutil.copytree(tmp_path / "killed", tmp_path / "torn")
    run(tmp_path / "killed", weights, table)
    assert counting() == straight - 5
    rows = [row["blocks"] for row in JsonLines(tmp_path / "killed" / EVALUATIONS).read()]
    assert len(rows) == len(set(rows)) > 5
    for name in ("search.json", "arch.json", "supernet.safetensors", EVALUATIONS):
        assert (tmp_path / "killed" / name).read_bytes() == (
            tmp_path / "straight" / name
        ).read_bytes()

    # the file's former name is still read, for one release
    (tmp_path / "torn" / EVALUATIONS).rename(tmp_path / "torn" / "judged.jsonl")
    with open(tmp_path / "torn" / "judged.jsonl", "a") as file:  # killed in the middle of a line
        file.write('{"blocks": "0123')
    run(tmp_path / "torn", weights, table)
    assert counting() == straight - 5
    result, expected = (
        SearchResult.load(tmp_path / name / "search.json") for name in ("torn", "straight")
    )
    assert result == expected
