"""A plan's estimates of time, memory and disk space, from timing a few steps."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from hwnas.config import Experiment, ProgressiveConfig, SupernetConfig, load_experiment
from hwnas.core.published import resolve_arch
from hwnas.estimate import plan, searching, training
from hwnas.estimate.context import Context
from hwnas.estimate.parts import Part, Stopwatch, TimeEstimate, size, span, total
from hwnas.estimate.sample import sample
from hwnas.experiments import experiment_space
from hwnas.nn.supernet import make_supernet
from hwnas.pipeline import Pipeline
from hwnas.progress import Progress
from tests.conftest import write_tiny


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 7.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


def test_a_stage_is_the_sum_of_its_parts() -> None:
    estimate = TimeEstimate(
        (Part("measuring", 7, 10.0, most=15), Part("building", 61, 0.5)), 4 * 10**8, 2.5e6
    )
    assert estimate.seconds == 7 * 10 + 61 * 0.5
    assert estimate.most_seconds == 15 * 10 + 61 * 0.5
    assert (
        str(estimate)
        == "about 2 to 3 min (measuring 70 s to 2 min, building 30 s), 400 MB of memory, 2.5 MB on"
        " disk"
    )
    assert str(TimeEstimate(unknown="no images")) == "unknown: no images"
    assert str(TimeEstimate(current=True)) == "up to date, skipped"


def test_the_total_of_all_stages() -> None:
    stages = [
        TimeEstimate((Part("a", 1, 600),), 10**9, 1e6),
        TimeEstimate((Part("b", 1, 60),), 2 * 10**9, 3e6),
        TimeEstimate(current=True),
    ]
    assert total(stages) == "about 11 min, 2 GB of memory, 4 MB on disk"
    assert (
        total([*stages, TimeEstimate(unknown="no device")])
        == "at least 11 min, 2 GB of memory, 4 MB on disk"
    )
    assert total([TimeEstimate(current=True)]) == "nothing to do"
    assert total([TimeEstimate(unknown="no device")]) == "unknown"


@pytest.mark.parametrize(
    ("least", "most", "words"),
    [(100, 110, "2 min"), (170, 360, "3 to 6 min"), (40, 300, "40 s to 5 min")],
)
def test_spans_in_words(least: float, most: float, words: str) -> None:
    assert span(least, most) == words


def test_sizes_in_words() -> None:
    assert [size(count) for count in (3_400, 2_500_000, 39_400_000, 1.25e9)] == [
        "3 kB",
        "2.5 MB",
        "39 MB",
        "1.2 GB",
    ]


def test_the_first_call_only_warms_up_and_time_is_bounded() -> None:
    clock = Clock()
    watch = Stopwatch(100, clock)
    calls = [lambda seconds=seconds: clock.work(seconds) for seconds in (9.0, 2.0, 4.0, 3.0)]
    assert watch.mean(calls, 0.5) == 3.0
    assert watch.mean([lambda: clock.work(60.0), *calls], 0.1) == 60.0, (
        "if the first call takes all the time, it is all that is known"
    )
    assert watch.used == 78.0
    assert not watch.over


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return load_experiment(
        write_tiny(tmp_path_factory.mktemp("tiny")), ["search.epochs=6", "train.epochs=6"]
    )


def estimates(experiment: Experiment, *needed: str) -> plan.Estimates:
    return plan.Estimates(experiment, experiment_space(experiment), needed)


@pytest.mark.slow
def test_every_stage_of_a_small_experiment_has_an_estimate(tiny: Experiment) -> None:
    planned = estimates(tiny, "profile", "search", "train", "export", "validate", "report")
    assert list(planned.stages) == ["profile", "search", "train", "export", "validate"]
    for name, stage in planned.stages.items():
        assert stage.seconds == sum(part.count * part.each for part in stage.parts)
        assert all(math.isfinite(part.seconds) and part.seconds > 0 for part in stage.parts), name
        assert stage.memory_bytes and 5e7 < stage.memory_bytes < 2e10
        assert not stage.unknown or (name, bool(stage.parts)) == ("export", True)
    counts = {part.name: part.count for stage in planned.stages.values() for part in stage.parts}
    train_images = 1438  # four fifths of 1,797 digits
    assert counts["training"] == round(6 * train_images / 64)
    assert counts["ranking"] == tiny.search.candidates
    assert counts["testing"] == 1797 - train_images
    assert 2 < counts["scoring random networks"] <= 4, (
        "two of each kind, and one kind uses at most as many images"
    )
    disk = planned.stages["search"].disk_bytes
    assert 4 * searching.weights_of(experiment_space(tiny)) / 10 < disk < 1e8
    assert planned.summary.startswith("about ") or planned.summary.startswith("at least ")


@pytest.mark.parametrize(("every", "evaluations"), [(0.0, None), (2.0, 3), (4.0, 2)])
def test_the_training_estimate_includes_the_validation_curve(
    tiny: Experiment, every: float, evaluations: int | None, tmp_path: Path
) -> None:
    """With six epochs: after the second, fourth and last, or the fourth and last."""
    changed = tiny.model_copy(
        update={"train": tiny.train.model_copy(update={"validate_every": every})}
    )
    arch = experiment_space(tiny).decode(experiment_space(tiny).sample(np.random.default_rng(0)))
    estimate = training.of_training(
        Context(changed, experiment_space(tiny), tmp_path, Stopwatch(1), known=arch)
    )
    parts = {part.name: part for part in estimate.parts}
    curve = parts.get("validation curve")
    assert (curve and curve.count) == evaluations
    if curve is not None:
        assert curve.each == pytest.approx(359 * parts["testing"].each), (
            "all 359 test images, as there are fewer than 2,000"
        )


@pytest.mark.parametrize("needed", [("validate",), ("train", "validate")])
def test_the_validation_estimate_counts_images_with_or_without_training(
    tiny: Experiment, needed: tuple[str, ...]
) -> None:
    """If the training is up to date, nothing else has counted them."""
    arch = experiment_space(tiny).decode(experiment_space(tiny).sample(np.random.default_rng(0)))
    planned = plan.Estimates(tiny, experiment_space(tiny), needed, arch=arch)
    sampled = planned.context.sample
    accuracy = next(
        part for part in planned.stages["validate"].parts if part.name == "accuracy of the files"
    )
    assert accuracy.each == pytest.approx(sampled.start + 359 * sampled.networks.ms / 1e3)


def of_cells(tiny: Experiment) -> Experiment:
    space = tiny.space.model_copy(update={"name": "nasbench201"})
    data = tiny.data.model_copy(
        update={"resolution": 32, "channels": 3, "mean": (0.3,) * 3, "std": (0.4,) * 3}
    )
    return tiny.model_copy(update={"space": space, "data": data})


@pytest.mark.parametrize("cells", [False, True])
def test_one_op_and_one_network_are_built_even_if_no_time_is_left(
    tiny: Experiment, tmp_path: Path, cells: bool
) -> None:
    experiment = of_cells(tiny) if cells else tiny
    sampled = sample(experiment, experiment_space(experiment), None, tmp_path, Stopwatch(0))
    assert len(list(tmp_path.rglob("*.tflite"))) == 2
    assert sampled.ops.size_bytes > 0 and sampled.networks.ms > 0


@pytest.mark.slow
def test_twice_the_epochs_are_twice_the_steps(tiny: Experiment) -> None:
    longer = {
        "search": tiny.search.model_copy(update={"epochs": 12}),
        "train": tiny.train.model_copy(update={"epochs": 12}),
    }
    short, long = (
        estimates(config, "search", "train").stages
        for config in (tiny, tiny.model_copy(update=longer))
    )
    for stage in ("search", "train"):
        first, second = (
            next(part for part in stages[stage].parts if part.name == "training")
            for stages in (short, long)
        )
        assert second.count == pytest.approx(2 * first.count, abs=1)
        assert second.seconds == second.count * second.each


def test_every_stage_of_a_rising_resolution_is_timed(
    tiny: Experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes: list[int] = []

    def recording(x_NCHW: torch.Tensor, size: int) -> torch.Tensor:
        sizes.append(size)
        return x_NCHW

    monkeypatch.setattr("hwnas.train.training.resized", recording)
    progressive = ProgressiveConfig(start=0.5, stages=2)
    train = tiny.train.model_copy(update={"progressive": progressive})
    experiment = tiny.model_copy(update={"train": train})
    context = Context(experiment, experiment_space(tiny), tmp_path, Stopwatch(0.2))
    estimate = training.of_training(context)
    assert set(sizes) == {4, 8}
    assert estimate.parts[0].seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ["tunas", "progressive_shrinking", "fbnet", "proxylessnas", "pdarts", "spos"]
)
def test_every_phase_of_a_strategy_is_timed(
    tiny: Experiment, strategy: str, tmp_path: Path
) -> None:
    """Steps are timed out of order, including the first of every phase, where a teacher
    is remembered or a stage begins.
    """
    changed = tiny.search.model_copy(
        update={"strategy": tiny.search.strategy.model_validate({"name": strategy})}
    )
    experiment = tiny.model_copy(update={"search": changed})
    estimate = searching.of_search(
        Context(experiment, experiment_space(tiny), tmp_path, Stopwatch(0.5))
    )
    assert not estimate.unknown
    assert estimate.parts[0].name == "training"
    assert estimate.parts[0].seconds > 0
    assert ("finding" in {part.name for part in estimate.parts}) == (
        strategy in ("progressive_shrinking", "spos")
    )


def test_what_is_missing_is_unknown_and_the_rest_is_timed(tiny: Experiment) -> None:
    data = tiny.data.model_copy(update={"name": "npz", "path": "absent"})
    stages = estimates(tiny.model_copy(update={"data": data}), "profile", "search", "train").stages
    assert str(stages["search"]) == str(stages["train"])
    assert str(stages["search"]).startswith("unknown: data.path 'absent' is not a")
    assert stages["profile"].seconds > 0


def test_the_estimate_for_an_unreachable_device_is_unknown(tiny: Experiment) -> None:
    device = tiny.device.model_copy(update={"name": "ssh:nobody@host.invalid"})
    estimate = estimates(tiny.model_copy(update={"device": device}), "profile").stages["profile"]
    assert estimate.unknown
    assert not estimate.parts


def test_a_super_net_too_large_to_try_is_unknown(
    tiny: Experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(searching, "MOST_WEIGHTS", 1000)
    estimate = searching.of_search(Context(tiny, experiment_space(tiny), tmp_path, Stopwatch(1)))
    assert re.fullmatch(r"a super-net of \d+ M weights is not built for a plan", estimate.unknown)
    assert list(tmp_path.iterdir()) == []


def test_the_estimated_size_of_a_super_net_is_about_right(tiny: Experiment) -> None:
    space = experiment_space(tiny)
    for sharing in ("separate", "collapsed"):
        config = SupernetConfig(sharing=sharing, kernels="own")
        supernet = make_supernet(space, torch.Generator().manual_seed(0), config)
        count = sum(weight.numel() for weight in supernet.parameters())
        assert 0.6 < searching.weights_of(space, collapsed=sharing == "collapsed") / count < 1.7


def test_a_single_class_is_in_the_singular(tmp_path: Path) -> None:
    overrides = [
        "space.name=mobile32",
        "data.resolution=64",
        "task=detect",
        "data.name=coco",
        "data.path=absent",
        "data.classes=1",
    ]
    config = load_experiment(write_tiny(tmp_path), overrides)
    data_line = Pipeline(config, tmp_path / "run", Progress()).plan().splitlines()[1]
    assert data_line == "data: coco in absent, 1 class, 1 x 64 px; that path does not exist yet"


@pytest.mark.slow
def test_a_named_architecture_needs_no_search(tiny: Experiment) -> None:
    data = tiny.data.model_copy(
        update={"resolution": 32, "channels": 3, "mean": (0.3,) * 3, "std": (0.4,) * 3}
    )
    arch = resolve_arch("mobilenet_v2", None, resolution=32, classes=10)
    experiment = tiny.model_copy(update={"data": data})
    estimate = plan.Estimates(experiment, experiment_space(tiny), ("train",), arch=arch).stages[
        "train"
    ]
    assert estimate.disk_bytes > 4 * 2 * arch.params, (
        "the weights, and those of the checkpoint with their momenta"
    )


@pytest.mark.slow
def test_a_finished_run_has_nothing_to_do(finished_run: Path) -> None:
    from hwnas.runs import load_config

    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    text = Pipeline(load_config(finished_run), finished_run, Progress()).plan(timed=True)
    assert text.count("up to date, skipped") == 6
    assert "total     nothing to do" in text
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


@pytest.mark.slow
def test_a_trained_super_net_is_not_trained_again(
    finished_run: Path, tiny: Experiment, tmp_path: Path
) -> None:
    experiment = tiny.model_copy(
        update={"search": tiny.search.model_copy(update={"weights": str(finished_run)})}
    )
    estimate = searching.of_search(
        Context(experiment, experiment_space(tiny), tmp_path, Stopwatch(5))
    )
    counts = {part.name: part.count for part in estimate.parts}
    assert list(counts) == ["reading images", "finding", "ranking", "scoring random networks"]
    assert 1 < counts["finding"] <= experiment_space(tiny).architectures
