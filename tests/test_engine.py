"""The training loop: it learns, its schedule follows the formula, and a killed and
resumed run ends like an uninterrupted one, bit for bit.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from hwnas.config import DataConfig, OptimizerConfig
from hwnas.core.arch import Architecture
from hwnas.core.space import MacroSpace, SpaceStage
from hwnas.data.images import evaluation_batches, load_images, training_batches
from hwnas.engine import CrossEntropy, Engine, Metrics, Microbatch, accuracy, lr_factor, steps_of
from hwnas.errors import CheckpointError, ConfigError, DivergenceError
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.progress import Progress, ProgressBar
from hwnas.runs import JsonLines
from hwnas.state_file import StateFile

torch.set_num_threads(1)

DATA = DataConfig(name="digits", resolution=8, channels=1, mean=(0.3,), std=(0.35,), augment="crop")
SGD = OptimizerConfig(name="sgd", lr=1.6, options={})
RMSPROP = OptimizerConfig()  # the default: TuNAS's


class Stopped(Exception):  # noqa: N818 - stands for a kill
    """Raised in the middle of a run."""


def architecture() -> Architecture:
    stages = (
        SpaceStage(widths=(16,), slots=(("cn_k3",),)),
        SpaceStage(widths=(24,), stride=2, slots=(("ir_k3_e3",), ("ir_k3_e3",))),
        SpaceStage(widths=(64,), slots=(("cn_k1",),)),
    )
    return MacroSpace(name="tiny", resolution=8, in_channels=1, classes=10, stages=stages).decode(
        {}
    )


def make(
    folder: Path, steps: int = 30, optimizer: OptimizerConfig = RMSPROP, **changes: Any
) -> Engine:
    network = ClassificationNetwork(
        architecture(), dropout=0.2, generator=torch.Generator().manual_seed(0)
    )
    return Engine(
        network, optimizer, steps, 32, 1, folder, **{"checkpoint_seconds": 0.0, **changes}
    )


def train(engine: Engine, stop_at: int | None = None, nan_at: int | None = None) -> None:
    """Train as a stage does, on the batches from the engine's current step on.
    ``stop_at`` kills the run in the middle of that step; ``nan_at`` makes that step's
    images NaN.
    """
    images = load_images(DATA, "train", augment=True)
    batches = training_batches(images, 32, seed=1, steps=range(engine.step, engine.steps))

    def step(number: int) -> Metrics:
        x_NCHW, y = next(batches)
        if number == nan_at:
            x_NCHW = torch.full_like(x_NCHW, math.nan)
        metrics = engine.train_step(x_NCHW, y)
        if number == stop_at:
            raise Stopped
        return metrics

    engine.fit(step, Progress(), "training")


def assert_same(a: Any, b: Any, place: str = "") -> None:
    """Assert equality bit for bit, recursing into containers."""
    assert type(a) is type(b), place
    if isinstance(a, Tensor):
        assert torch.equal(a, b), place
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for i, (first, second) in enumerate(zip(a, b, strict=True)):
            assert_same(first, second, f"{place}[{i}]")
    else:
        assert a == b, place


@pytest.mark.slow
def test_it_learns_digits(tmp_path: Path) -> None:
    engine = make(tmp_path, 160, SGD, checkpoint_seconds=60.0)
    test = load_images(DATA, "test")
    before = accuracy(engine.model, evaluation_batches(test, 128))
    train(engine)
    assert before < 0.3
    assert accuracy(engine.model, evaluation_batches(test, 128)) > 0.8


def test_the_schedule_by_hand() -> None:
    """10 % of 40 steps of warm-up: 1/5, 2/5, 3/5, 4/5; then half a cosine from 1 to 0."""
    assert [lr_factor(step, 40, 0.1) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert lr_factor(4, 40, 0.1) == 1.0
    assert lr_factor(22, 40, 0.1) == pytest.approx(0.5)
    assert lr_factor(13, 40, 0.1) == pytest.approx(0.5 + 0.5 * math.sqrt(0.5))
    assert lr_factor(39, 40, 0.1) == pytest.approx(0.5 * (1 + math.cos(math.pi * 35 / 36)))
    assert lr_factor(0, 40, 0.0) == 1.0


TIMM_SCHEDULES: dict[str, tuple[dict[str, Any], Callable[[torch.optim.Optimizer], Scheduler]]] = {
    "cosine to a floor": (
        {"kind": "cosine", "final": 0.05},
        lambda optimizer: CosineLRScheduler(optimizer, t_initial=60, lr_min=0.05),
    ),
    "warm restarts": (
        {"kind": "cosine", "final": 0.1, "cycles": 3},
        lambda optimizer: CosineLRScheduler(optimizer, t_initial=20, lr_min=0.1, cycle_limit=3),
    ),
    "steps": (
        {"kind": "step", "rate": 0.1, "times": 3},
        lambda optimizer: StepLRScheduler(optimizer, decay_t=15, decay_rate=0.1),
    ),
}


@pytest.mark.parametrize("name", TIMM_SCHEDULES)
def test_schedules_are_timms(name: str) -> None:
    settings, make = TIMM_SCHEDULES[name]
    config = OptimizerConfig.model_validate({"schedule": settings})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = make(optimizer)
    for step in range(60):
        theirs.step(step)
        [group] = optimizer.param_groups
        assert lr_factor(step, 60, 0.0, config.schedule) == pytest.approx(group["lr"], abs=1e-8)


def test_schedules_follow_the_warm_up() -> None:
    config = OptimizerConfig.model_validate({"schedule": {"kind": "step", "rate": 0.5, "times": 3}})
    factors = [lr_factor(step, 10, 0.2, config.schedule) for step in range(10)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125])
    constant = OptimizerConfig.model_validate({"schedule": {"kind": "constant"}}).schedule
    assert [lr_factor(step, 10, 0.2, constant) for step in range(10)] == [1 / 3, 2 / 3] + 8 * [1.0]


@pytest.mark.parametrize(
    "schedule",
    [
        {"kind": "cosine", "final": 1.5},
        {"kind": "step", "rate": 0},
        {"kind": "step", "cycles": 2},
        {"kind": "linear"},
        {"kind": "cosine", "cycles": 0},
    ],
    ids=str,
)
def test_impossible_schedules_are_refused(schedule: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="schedule"):
        OptimizerConfig.model_validate({"schedule": schedule})
    assert steps_of(2.5, 100, 32) == 8
    assert steps_of(0.001, 100, 32) == 1


def test_the_learning_rate_follows_the_schedule_and_the_batch_size(tmp_path: Path) -> None:
    engine = make(tmp_path, 40, OptimizerConfig(name="sgd", lr=0.8, options={}, warmup=0.1))
    x_NCHW, y = next(training_batches(load_images(DATA, "train"), 32, seed=0, steps=range(0, 1)))
    for step, factor in ((0, 0.2), (4, 1.0), (22, 0.5)):
        engine.step = step
        engine.train_step(x_NCHW, y)
        assert [group["lr"] for group in engine.optimizer.param_groups] == pytest.approx(
            [0.8 * 32 / 256 * factor] * 2
        )


def test_one_step_of_sgd_by_hand(tmp_path: Path) -> None:
    """w <- w - lr (dL/dw + wd w), with no decay of biases and norms; label smoothing by
    its formula.
    """
    model = nn.Linear(4, 3)
    start, bias = model.weight.detach().clone(), model.bias.detach().clone()
    config = OptimizerConfig(
        name="momentum", lr=2.56, momentum=0.0, weight_decay=0.1, options={}, warmup=0.0
    )
    engine = Engine(
        nn.Sequential(nn.Flatten(), model).double(), config, 10, 10, 0, tmp_path, CrossEntropy(0.3)
    )
    x, y = (
        torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).double(),
        torch.arange(10) % 3,
    )
    metrics = engine.train_step(x[:, :, None, None], y)
    logits = x @ start.double().T + bias.double()
    p, target = torch.softmax(logits, 1), 0.7 * F.one_hot(y, 3) + 0.3 / 3
    assert metrics["loss"] == pytest.approx(float(-(target * p.log()).sum(1).mean()))
    assert metrics["train_accuracy"] == pytest.approx(
        float((logits.argmax(1) == y).double().mean())
    )
    gradient = (p - target) / 10
    assert torch.allclose(
        model.weight, start.double() - 0.1 * (gradient.T @ x + 0.1 * start.double())
    )
    assert torch.allclose(model.bias, bias.double() - 0.1 * gradient.sum(0))


def test_only_convolutions_are_decayed(tmp_path: Path) -> None:
    """Biases, norms and the classifier are not, as in TuNAS."""
    x_NCHW, y = next(training_batches(load_images(DATA, "train"), 32, seed=0, steps=range(0, 1)))
    states = []
    for decay in (0.0, 0.5):
        config = OptimizerConfig(
            name="momentum", lr=0.8, weight_decay=decay, options={}, warmup=0.0
        )
        engine = make(tmp_path, 10, config)
        torch.manual_seed(0)
        engine.train_step(x_NCHW, y)
        states.append(dict(engine.model.named_parameters()))
    decayed = {
        name for name, parameter in states[0].items() if not torch.equal(parameter, states[1][name])
    }
    assert decayed == {name for name, parameter in states[0].items() if parameter.ndim == 4}
    assert len(decayed) == 8


def test_gradients_are_clipped_to_the_norm(tmp_path: Path) -> None:
    x_NCHW, y = next(training_batches(load_images(DATA, "train"), 32, seed=0, steps=range(0, 1)))
    moved = []
    for clip in (None, 1e-3):
        config = OptimizerConfig(
            name="momentum",
            lr=8.0,
            momentum=0.0,
            weight_decay=0.0,
            options={},
            warmup=0.0,
            clip_norm=clip,
        )
        engine = make(tmp_path, 10, config)
        before = [parameter.detach().clone() for parameter in engine.model.parameters()]
        engine.train_step(x_NCHW, y)
        squares = [
            ((now - then) ** 2).sum()
            for now, then in zip(engine.model.parameters(), before, strict=True)
        ]
        moved.append(float(torch.stack(squares).sum().sqrt()))
    assert moved[0] > 1e-2
    assert moved[1] == pytest.approx(1e-3, rel=0.02)  # learning rate 8 * 32 / 256 = 1


def test_moving_average_by_hand(tmp_path: Path) -> None:
    """average <- d average + (1 - d) w, with timm's warm-up
    d = min(decay, 1 - (1 + t)^(-2/3)), t = step - 1, and d = 0 while t <= 0.
    """
    engine = make(tmp_path, 12, SGD, ema_decay=0.6)
    expected = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    batches = training_batches(load_images(DATA, "train"), 32, seed=0, steps=range(0, 12))

    def step(number: int) -> Metrics:
        metrics = engine.train_step(*next(batches))
        decay = min(0.6, 1 - (1 + max(0, number - 1)) ** (-2 / 3))
        for name, tensor in engine.model.state_dict().items():
            expected[name] = (
                decay * expected[name] + (1 - decay) * tensor
                if tensor.is_floating_point()
                else tensor.clone()
            )
        return metrics

    engine.fit(step, Progress(), "training")
    averaged = engine.ema_model.state_dict()
    for name, tensor in expected.items():
        assert torch.allclose(averaged[name], tensor, rtol=1e-4, atol=1e-6), name
    weight = "blocks.0.layers.conv.conv.weight"
    assert not torch.allclose(averaged[weight], engine.model.state_dict()[weight], rtol=1e-4)
    without = make(tmp_path / "without")
    assert without.ema_model is without.model


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["rmsproptf", "sgd", "adamw"])
def test_a_resumed_run_is_the_same_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    """30 uninterrupted steps, and 30 steps killed in the 14th and in the 20th."""
    config = (
        RMSPROP
        if optimizer == "rmsproptf"
        else OptimizerConfig(name=optimizer, lr={"sgd": 1.0, "adamw": 0.02}[optimizer], options={})
    )
    straight = make(tmp_path / "straight", optimizer=config, ema_decay=0.9)
    assert straight.resume() is False
    train(straight)
    for stop in (13, 19, None):
        killed = make(tmp_path / "killed", optimizer=config, ema_decay=0.9)
        assert killed.resume() is (stop != 13)
        assert killed.step == {13: 0, 19: 13, None: 19}[stop]
        if stop is not None:
            with pytest.raises(Stopped):
                train(killed, stop_at=stop)
        else:
            train(killed)
    assert_same(killed.model.state_dict(), straight.model.state_dict())
    assert_same(killed.optimizer.state_dict(), straight.optimizer.state_dict())
    assert_same(killed.ema_model.state_dict(), straight.ema_model.state_dict())
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (
        tmp_path / "straight/metrics.jsonl"
    ).read_bytes()
    assert [row["step"] for row in JsonLines(tmp_path / "killed/metrics.jsonl").read()] == list(
        range(30)
    )
    first, last = straight.metrics.read()[0]["loss"], straight.metrics.read()[-1]["loss"]
    assert last < first


@pytest.mark.slow
def test_resuming_drops_metrics_newer_than_the_checkpoint(tmp_path: Path) -> None:
    """A checkpoint may be older than the log; the steps in between are repeated and
    logged again.
    """

    class Interrupting(Progress):
        @contextmanager
        def task(self, description: str, total: int, done: int = 0) -> Any:
            class Bar(ProgressBar):
                def advance(self, steps: int = 1, note: str = "") -> None:
                    nonlocal done
                    done += steps
                    if done == 13:
                        raise Stopped

            yield Bar()

    engine = make(tmp_path, checkpoint_seconds=1e9)
    batches = training_batches(
        load_images(DATA, "train", augment=True), 32, seed=1, steps=range(0, 30)
    )

    def step(number: int) -> Metrics:
        if number == 5:
            engine.save()
        return engine.train_step(*next(batches))

    with pytest.raises(Stopped):
        engine.fit(step, Interrupting(), "training")
    assert len(engine.metrics.read()) == 13
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')  # a line cut off by the kill
    again = make(tmp_path)
    assert again.resume() is True
    assert [row["step"] for row in again.metrics.read()] == list(range(5))
    train(again)
    straight = make(tmp_path / "straight")
    train(straight)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (
        tmp_path / "straight/metrics.jsonl"
    ).read_bytes()
    assert_same(again.model.state_dict(), straight.model.state_dict())


@pytest.mark.slow
def test_divergence_keeps_the_last_good_state(tmp_path: Path) -> None:
    straight = make(tmp_path / "straight", 20)
    train(straight)
    engine = make(tmp_path / "run", 20)
    with pytest.raises(DivergenceError, match="nan at step 7 of 20") as caught:
        train(engine, nan_at=7)
    assert "optimizer.lr" in str(caught.value)
    resumed = make(tmp_path / "run", 20)
    assert resumed.resume() is True
    assert resumed.step == 7
    assert all(torch.isfinite(tensor).all() for tensor in resumed.model.state_dict().values())
    assert [row["step"] for row in resumed.metrics.read()] == list(range(7))
    train(resumed)
    assert_same(resumed.model.state_dict(), straight.model.state_dict())


def checkpoint(folder: Path) -> Engine:
    """An engine after three steps, whose checkpoint is the only one."""
    engine = make(folder, ema_decay=0.9, extra={"counter": Counter()})
    images = load_images(DATA, "train")
    for x_NCHW, y in training_batches(images, 32, seed=0, steps=range(0, 3)):
        engine.train_step(x_NCHW, y)
        engine.step += 1
    engine.save()
    return engine


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The content of a checkpoint."""
    return checkpoint(tmp_path_factory.mktemp("saved")).checkpoint.read_bytes()


def state_of(content: bytes) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    return state


def refused(folder: Path, content: bytes) -> str:
    """Why a checkpoint of this content, with no other, is refused."""
    (folder / "checkpoint.pt").write_bytes(content)
    fresh = make(folder, ema_decay=0.9, extra={"counter": Counter()})
    with pytest.raises(CheckpointError) as caught:
        fresh.resume()
    assert str(fresh.checkpoint) in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert fresh.step == 0
    return str(caught.value)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_checkpoint(part: float, tmp_path: Path, saved: bytes) -> None:
    refused(tmp_path, saved[: int(part * len(saved))])


def test_corrupt_checkpoint(tmp_path: Path) -> None:
    for content in (b"hello", b"PK\x03\x04" + bytes(200), bytes(1000)):
        refused(tmp_path, content)


def saved_as(state: Any) -> bytes:
    """A checkpoint of a state as it was written before it had a hash."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def flipped_bits(content: bytes) -> Iterator[bytes]:
    """300 copies with one flipped bit each."""
    for position in np.random.default_rng(0).integers(0, 8 * len(content), 300):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << (position % 8)
        yield bytes(flipped)


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path: Path, saved: bytes) -> None:
    file = StateFile(tmp_path)
    for flipped in flipped_bits(saved):
        file.path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="damaged"):
            file.read(torch.device("cpu"), Progress())


@pytest.mark.slow
def test_checkpoints_without_a_hash_are_read_and_flipped_bits_of_tensors_noticed(
    tmp_path: Path, saved: bytes
) -> None:
    content = saved_as(state_of(saved))
    file = StateFile(tmp_path)
    file.path.write_bytes(content)
    assert_same(file.read(torch.device("cpu"), Progress()), state_of(saved))
    weights = state_of(saved)["model"]["blocks.0.layers.conv.conv.weight"].numpy().tobytes()
    place = content.index(weights)
    for flipped in flipped_bits(weights):
        file.path.write_bytes(content[:place] + flipped + content[place + len(flipped) :])
        with pytest.raises(CheckpointError, match="damaged"):
            file.read(torch.device("cpu"), Progress())


@pytest.mark.slow
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(tmp_path: Path) -> None:
    straight = make(tmp_path / "straight")
    train(straight)
    killed = make(tmp_path / "killed")
    with pytest.raises(Stopped):
        train(killed, stop_at=13)
    damaged = bytearray(killed.checkpoint.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    killed.checkpoint.write_bytes(damaged)

    resumed = make(tmp_path / "killed")
    said = Warnings()
    assert resumed.resume(said) is True
    assert resumed.step == 12
    assert [row["step"] for row in resumed.metrics.read()] == list(range(12))
    assert said.warnings == [
        f"checkpoint {resumed.checkpoint} is damaged: resuming from the one before it instead."
    ]
    # the damaged file is not the one before the next
    assert not resumed.state_file.previous.exists()
    train(resumed)
    assert_same(resumed.model.state_dict(), straight.model.state_dict())
    assert resumed.metrics.read() == straight.metrics.read()


class Warnings(Progress):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, message: str) -> None:
        self.warnings.append(message)


def test_two_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.previous.pt").write_bytes(b"PK\x03\x04")
    assert "and so is checkpoint.previous.pt" in refused(tmp_path, b"hello")
    assert (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("kill_at", range(10))
def test_a_kill_while_a_checkpoint_is_written_leaves_a_usable_one(
    kill_at: int, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each call that changes names, and after it, also on file systems without
    links.
    """
    calls = 0

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == kill_at // 2 + 1 and kill_at % 2 == 0:
                raise Stopped
            function(*arguments, **options)
            if calls == kill_at // 2 + 1:
                raise Stopped

        return call

    def refuse(*arguments: Any) -> None:
        raise OSError(95, "Operation not supported")

    file = StateFile(tmp_path)
    for step in (1, 2):
        file.write({"step": step})
    with monkeypatch.context() as patch:
        patch.setattr("os.link", killing(os.link) if links else refuse)
        for name in ("os.replace", "os.fsync"):
            patch.setattr(name, killing(getattr(os, name[3:])))
        try:
            file.write({"step": 3})
        except Stopped:
            assert calls == kill_at // 2 + 1
        else:
            assert calls <= kill_at // 2
    assert file.exists()
    assert file.read(torch.device("cpu"), Progress())["step"] in (2, 3)


def changed(state: Any, path: str, value: Any) -> Any:
    """A copy of a state with another value at a place; ``...`` leaves it out."""
    key, _, rest = path.partition("/")
    place: Any = int(key) if key.isdecimal() else key
    copied = dict(state) if isinstance(state, dict) else list(state)
    if rest:
        copied[place] = changed(copied[place], rest, value)
    elif value is ...:
        del copied[place]
    else:
        copied[place] = value
    return copied


WEIGHT = "blocks.0.layers.conv.conv.weight"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("steps", 31, "belongs to a run of 31 steps, not 30"),
        ("step", ..., "lacks 'step'"),
        ("extra", ..., "lacks 'extra'"),
        ("step", -1, "saved at step -1 of 30"),
        ("step", 31, "saved at step 31 of 30"),
        ("step", True, "saved at step True of 30"),
        ("step", 3.0, "saved at step 3.0 of 30"),
        ("step", "3", "saved at step '3' of 30"),
        ("step", torch.zeros(2), "saved at step tensor"),
        ("model", nn.Linear(3, 3).state_dict(), "lacks the weight"),
        ("model", [], "lacks the weights"),
        (f"model/{WEIGHT}", torch.zeros(3), "holds [3] numbers in"),
        (f"model/{WEIGHT}", 3.0, "holds a float in"),
        (f"model/{WEIGHT}", torch.zeros(16, 1, 3, 3).double(), "holds torch.float64 in"),
        (f"model/{WEIGHT}", torch.full((16, 1, 3, 3), math.nan), "holds NaN in"),
        ("model/more", torch.zeros(3), "holds the weight 'more'"),
        ("ema", None, "lacks the weights"),
        (f"ema/{WEIGHT}", ..., f"lacks the weight '{WEIGHT}'"),
        ("optimizer", {}, "lacks the state of the optimiser"),
        ("optimizer", None, "lacks the state of the optimiser"),
        ("optimizer/state", {}, "lacks the state of the optimiser after 3 steps"),
        ("optimizer/state", [], "lacks the state of the optimiser"),
        ("optimizer/state/0", {}, "lacks 'momentum_buffer' in the optimiser's state of weight 0"),
        ("optimizer/state/0", None, "lacks the optimiser's state of weight 0"),
        ("optimizer/state/0/square_avg", torch.zeros(2), "holds [2] numbers in"),
        ("optimizer/state/0/square_avg", 1.0, "holds a float in"),
        ("optimizer/state/999", {}, "weight 999, which has none"),
        ("optimizer/param_groups", [], "belongs to an optimiser of other weights"),
        ("optimizer/param_groups", 1, "lacks the settings of the optimiser"),
        ("optimizer/param_groups/0/params", [0], "belongs to an optimiser of other weights"),
        ("optimizer/param_groups/0/weight_decay", "x", "holds a str in"),
        ("optimizer/param_groups/0/weight_decay", ..., "another run or network"),
        ("extra", [], "lacks the state of 'counter'"),
        ("extra", {}, "lacks the state of 'counter'"),
        ("extra/counter", 3, "holds a int in the state of 'counter'"),
        ("extra/counter/values", torch.zeros(4), "holds [4] numbers in"),
        ("extra/counter/values", ..., "another run or network"),
        ("extra/counter/name", "someone", "another run or network"),
    ],
)
def test_a_checkpoint_with_an_impossible_part_is_refused(
    path: str, value: Any, words: str, tmp_path: Path, saved: bytes
) -> None:
    assert words in refused(tmp_path, saved_as(changed(state_of(saved), path, value)))


@pytest.mark.parametrize("state", [[1, 2], {"step": 3}, torch.zeros(3), 7])
def test_a_file_of_something_else_is_refused(state: Any, tmp_path: Path) -> None:
    refused(tmp_path, saved_as(state))


OPTIMIZERS = ("sgd", "adamw", "rmsproptf", "adafactor", "lamb", "lion", "lookahead_lion", "muon")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_another_optimiser_is_refused(name: str, tmp_path: Path) -> None:
    """Its own is not, whatever the optimiser keeps."""

    def engine_of(name: str) -> Engine:
        config = OptimizerConfig(name=name, lr=0.1, options={})
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
        return Engine(model, config, 7, 8, 0, tmp_path, checkpoint_seconds=1e9)

    engine = engine_of(name)
    x_NCHW = torch.ones(8, 1, 4, 4)
    labels = torch.arange(8) % 3
    engine.fit(lambda step: engine.train_step(x_NCHW, labels), Progress(), "training")
    again = engine_of(name)
    assert again.resume() is True
    assert_same(again.optimizer.state_dict(), engine.optimizer.state_dict())
    for other in OPTIMIZERS:
        # a wrapper keeps what is in it
        if other.removeprefix("lookahead_") != name.removeprefix("lookahead_"):
            with pytest.raises(CheckpointError, match="--fresh"):
                engine_of(other).resume()


def test_rows_of_the_log_that_are_no_steps_are_dropped(tmp_path: Path, saved: bytes) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(saved)
    rows = ["[1, 2]", "3", '{"loss": 1}', '{"step": "0"}', '{"step": 1, "loss": 2}', "null"]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
    engine = make(tmp_path, ema_decay=0.9, extra={"counter": Counter()})
    assert engine.resume() is True
    assert engine.metrics.read() == [{"step": 1, "loss": 2}]


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_too_little_memory_for_a_checkpoint_does_not_condemn_it(
    words: str, tmp_path: Path, saved: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise RuntimeError(words)

    (tmp_path / "checkpoint.pt").write_bytes(saved)
    for name in ("torch.load", "torch.nn.Module.load_state_dict"):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=words):
            patch.setattr(name, refuse)
            make(tmp_path, ema_decay=0.9, extra={"counter": Counter()}).resume()
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved


class Trap:
    """A pickled object that would run code when it is loaded."""

    sprung = False

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return setattr, (Trap, "sprung", True)


def test_a_pickled_object_is_refused(tmp_path: Path, saved: bytes) -> None:
    trapped = saved_as({**state_of(saved), "extra": {"trap": Trap()}})
    for content in (trapped, pickle.dumps(OrderedDict(trap=Trap()))):
        refused(tmp_path, content)
        assert Trap.sprung is False


def test_unknown_optimisers_and_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sgdd"):
        make(tmp_path, optimizer=OptimizerConfig(name="sgdd", options={}))
    with pytest.raises(ConfigError, match="alhpa"):
        make(tmp_path, optimizer=OptimizerConfig(name="rmsproptf", options={"alhpa": 0.9}))


class Counter:
    """State besides the weights."""

    def __init__(self) -> None:
        self.values = torch.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values, "name": "counter", "numbers": [1, 2.5]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["name"] == "counter"
        self.values = state["values"]


def test_extra_state_is_saved_and_restored(tmp_path: Path) -> None:
    counter = Counter()
    engine = make(tmp_path, steps=5, extra={"counter": counter})
    train(engine)
    counter.values += 4
    engine.save()
    again = Counter()
    resumed = make(tmp_path, steps=5, extra={"counter": again})
    assert resumed.resume() is True
    assert resumed.step == 5
    assert again.values.tolist() == [4, 4, 4]
    resumed.finish()
    assert not list(tmp_path.glob("*.pt"))
    resumed.finish()


def test_accuracy_counts_images_not_batches(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x_NCHW: Tensor) -> Tensor:
            return x_NCHW[:, :, 0, 0]

    x_NCHW = torch.from_numpy(np.eye(4, dtype=np.float32))[:, :, None, None]
    batches = [(x_NCHW[:3], torch.tensor([0, 1, 2])), (x_NCHW[3:], torch.tensor([0]))]
    assert accuracy(Fixed(), batches) == 0.75


class Either(nn.Module):
    """Two layers, of which each pass uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 2, bias=False) for _ in range(2))
        with torch.no_grad():
            for number, layer in enumerate(self.layers):
                layer.weight.copy_(torch.arange(6.0).reshape(2, 3) / 6 - number)

    def no_weight_decay(self) -> set[str]:
        return set()

    def forward(self, x_NF: Tensor, which: int) -> Tensor:
        return self.layers[which](x_NF)


USED = [0, 0, 1, 0, 1, 1, 0]


def either(folder: Path, inactive_weights: str, stop_at: int | None = None) -> list[Tensor]:
    """The weights after steps that use one layer each."""
    optimizer = OptimizerConfig.model_validate(
        {
            "name": "momentum",
            "lr": 1.6,
            "weight_decay": 0.1,
            "warmup": 0.0,
            "options": {},
            "inactive_weights": inactive_weights,
        }
    )
    engine = Engine(
        Either(), optimizer, len(USED), 32, 1, folder, CrossEntropy(), checkpoint_seconds=0.0
    )
    x_NF, y = torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([1])

    def step(number: int) -> Metrics:
        if number == stop_at:
            raise Stopped
        return engine.optimizer_step([Microbatch(x_NF, y, (USED[number],))])

    engine.to_device = lambda *batch: batch  # type: ignore[method-assign]  # these are not images
    engine.resume()
    engine.fit(step, Progress(), "training")
    return [layer.weight.detach().clone() for layer in engine.model.layers]


@pytest.mark.parametrize("inactive_weights", ["frozen", "decay"])
def test_weights_that_a_step_does_not_use_stay_or_decay(
    inactive_weights: str, tmp_path: Path
) -> None:
    """They stay as they are, or momentum and decay continue as in torch's own optimiser
    with zero gradients. A killed and resumed run gives the same weights.
    """
    model = Either()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.1)
    seen: set[int] = set()
    for number, which in enumerate(USED):
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(
            model(torch.tensor([[1.0, 2.0, -1.0]]), which), torch.tensor([1])
        ).backward()
        seen.add(which)
        if inactive_weights == "decay" and 1 - which in seen:
            model.layers[1 - which].weight.grad = torch.zeros(2, 3)
        optimizer.param_groups[0]["lr"] = 0.2 * lr_factor(number, len(USED), 0.0)
        optimizer.step()
    expected = [layer.weight.detach() for layer in model.layers]
    weights = either(tmp_path / "straight", inactive_weights)
    for a, b in zip(weights, expected, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(Stopped):
        either(tmp_path / "killed", inactive_weights, stop_at=3)
    assert all(
        torch.equal(a, b)
        for a, b in zip(either(tmp_path / "killed", inactive_weights), weights, strict=True)
    )


def test_inactive_weights_cannot_decay_without_momentum(tmp_path: Path) -> None:
    optimizer = OptimizerConfig(name="momentum", momentum=0.0, options={}, inactive_weights="decay")
    x_NCHW, y = next(training_batches(load_images(DATA, "train"), 32, seed=0, steps=range(0, 1)))
    with pytest.raises(
        ConfigError, match=r"set optimizer\.momentum, or inactive_weights = 'frozen'"
    ):
        make(tmp_path, 2, optimizer).train_step(x_NCHW, y)


def test_every_step_and_every_seed_draws_its_own_dropout_masks(tmp_path: Path) -> None:
    """And a repeated step draws the same ones."""

    def drawn(folder: str, seed: int) -> list[list[float]]:
        engine = make(tmp_path / folder, steps=4)
        engine.seed = seed
        masks: list[list[float]] = []

        def step(number: int) -> Metrics:
            masks.append(torch.rand(3).tolist())
            return {"loss": 1.0}

        engine.fit(step, Progress(), "training")
        return masks

    (tmp_path / "first").mkdir()
    (tmp_path / "again").mkdir()
    (tmp_path / "other").mkdir()
    first, again, other = drawn("first", 1), drawn("again", 1), drawn("other", 2)
    assert first == again
    assert len({tuple(mask) for mask in [*first, *other]}) == 8
