"""The shared weights of a search: every promise of ``SearchContext`` against plain
autograd on the same super-net and batches.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hwnas.config import DataConfig, Experiment, OptimizerConfig, SearchConfig, SupernetConfig
from hwnas.core.arch import Picks
from hwnas.core.space import MacroSpace
from hwnas.data.images import load_images, training_batches
from hwnas.engine import CrossEntropy, Engine
from hwnas.nn.supernet import MacroSupernet
from hwnas.nn.unrolled import SGDStep, unrolled_gate_gradients
from hwnas.search.evaluator import SupernetEvaluator
from hwnas.search.proposal import one_hot
from hwnas.search.weights import Batches, SupernetWeights
from tests.conftest import digits_space

torch.set_num_threads(1)

DATA = DataConfig(name="digits", resolution=8, channels=1, mean=(0.3,), std=(0.4,), augment="none")
SMOOTHING = 0.1
BATCH = 24


def weights_of(folder: Path, optimizer: str = "momentum", **settings: Any) -> SupernetWeights:
    """The shared weights of a super-net on digits, in a search of 20 steps."""
    experiment = Experiment(
        data=DATA,
        search=SearchConfig(batch_size=BATCH, recalibration_images=64, evaluation_images=100),
    )
    supernet = MacroSupernet(
        digits_space(),
        torch.Generator().manual_seed(0),
        SupernetConfig(**({"sharing": "separate"} | settings)),
    )
    with torch.no_grad():
        supernet.classifier.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    config = OptimizerConfig(
        name=optimizer, lr=1.0, momentum=0.9, weight_decay=0.05, options={}, warmup=0.0
    )
    engine = Engine(supernet, config, 20, BATCH, 0, folder, CrossEntropy(SMOOTHING))
    train, held_out = load_images(DATA, "train"), load_images(DATA, "held_out")
    return SupernetWeights(
        engine,
        supernet,
        Batches(train, held_out, DATA, BATCH, 0, 20),
        SupernetEvaluator(supernet, experiment),
    )


def sampled(count: int, seed: int = 0) -> list[Picks]:
    rng = np.random.default_rng(seed)
    return [digits_space().sample(rng) for _ in range(count)]


def gates_of(picks: list[Picks]) -> list[dict[str, np.ndarray]]:
    return [one_hot(each, digits_space()) for each in picks]


def mixed() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        choice.key: rng.dirichlet(np.full(len(choice.options), 2.0))
        for choice in digits_space().choices
    }


def grads(supernet: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in supernet.named_parameters()
        if parameter.grad is not None
    }


def by_hand(
    weights: SupernetWeights, parts: list[tuple[Tensor, Tensor, Mapping[str, Any], float]]
) -> tuple[dict[str, Tensor], list[float]]:
    """On a copy of the super-net: the gradients of sum_i weight_i * loss_i, and the
    losses.
    """
    supernet = copy.deepcopy(weights.supernet).train()
    supernet.zero_grad(set_to_none=True)
    losses = [
        F.cross_entropy(supernet(x, gates), y, label_smoothing=SMOOTHING)
        for x, y, gates, _ in parts
    ]
    sum(weight * loss for loss, (*_, weight) in zip(losses, parts, strict=True)).backward()  # type: ignore[union-attr]
    return grads(supernet), [float(loss.detach()) for loss in losses]


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether the gradients agree, and are not all close to zero."""
    close = all(
        torch.allclose(actual[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected
    )
    return (
        actual.keys() == expected.keys()
        and close
        and max(float(g.abs().max()) for g in actual.values()) > 1e-3
    )


def test_the_gradients_of_several_gates_on_one_batch_are_summed(tmp_path: Path) -> None:
    weights = weights_of(tmp_path)
    x_NCHW, y = weights.batches.train(0)
    gates = gates_of(sampled(3))
    expected, losses = by_hand(weights, [(x_NCHW, y, path_gates, 1.0) for path_gates in gates])
    metrics = weights.train(gates, split=False, teach=False, skip_dropout=0.0)
    assert same(grads(weights.supernet), expected)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_split_takes_the_mean_over_the_parts_of_the_batch(tmp_path: Path) -> None:
    """Five parts of 24 images have 5, 5, 5, 5 and 4."""
    weights = weights_of(tmp_path)
    x_NCHW, y = weights.batches.train(0)
    gates, cuts = gates_of(sampled(5)), [0, 5, 10, 15, 20, 24]
    parts = [
        (x_NCHW[a:b], y[a:b], path_gates, (b - a) / 24)
        for a, b, path_gates in zip(cuts[:-1], cuts[1:], gates, strict=True)
    ]
    expected, _ = by_hand(weights, parts)
    weights.train(gates, split=True, teach=False, skip_dropout=0.0)
    assert same(grads(weights.supernet), expected)


def test_a_step_updates_only_what_was_executed(tmp_path: Path) -> None:
    """With separate sharing, options that do not run get no gradient, no momentum and
    no decay, whatever came before.
    """
    weights = weights_of(tmp_path)
    first, second = (
        {key: np.eye(len(gate))[0] for key, gate in mixed().items()},
        {key: np.eye(len(gate))[1] for key, gate in mixed().items()},
    )
    weights.train([first], split=False, teach=False, skip_dropout=0.0)
    before = {
        name: parameter.detach().clone() for name, parameter in weights.supernet.named_parameters()
    }
    momentum = {
        p: weights.engine.optimizer.state[p]["momentum_buffer"].clone()
        for p in weights.engine.optimizer.state
    }
    weights.engine.step = 1
    weights.train([second], split=False, teach=False, skip_dropout=0.0)
    fixed = ("slots.0.", "slots.4.", "classifier.")  # stem, head: slots of one option
    for name, parameter in weights.supernet.named_parameters():
        runs = name.startswith(fixed) or ".ir_k5_e3|" in name
        assert (parameter.grad is not None) == runs, name
        assert torch.equal(parameter, before[name]) == (not runs), name
        if not runs and parameter in momentum:
            assert torch.equal(
                weights.engine.optimizer.state[parameter]["momentum_buffer"], momentum[parameter]
            ), name
    assert any(
        "ir_k3_e3|" in name and parameter in momentum
        for name, parameter in weights.supernet.named_parameters()
    )


def test_batches_of_every_kth_step_come_from_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream begins at the first step and wherever the distance between steps
    changes; its batches are those of a fresh stream.
    """
    starts: list[int] = []

    def counted(*arguments: Any, **settings: Any) -> Any:
        starts.append(settings["steps"].start)
        return training_batches(*arguments, **settings)

    monkeypatch.setattr("hwnas.search.weights.training_batches", counted)
    train, held_out = load_images(DATA, "train"), load_images(DATA, "held_out")
    batches = Batches(train, held_out, DATA, BATCH, 3, 60)
    for steps, streams in ((range(4, 50, 5), [4, 9]), (range(50, 58, 2), [50, 52])):
        starts.clear()
        batches_at = {
            step: (batches.held_out(step, 2), batches.held_out(step, 2)) for step in steps
        }
        assert starts == streams
        for step, (once, twice) in batches_at.items():
            fresh = Batches(train, held_out, DATA, BATCH, 3, 60).held_out(step, 2)
            assert once is twice
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(once, fresh, strict=True))
    starts.clear()
    for step in range(60):
        batches.train(step)
    assert starts == [0]
    starts.clear()
    for step in (10, 11, 12, 5):  # back to a checkpoint
        assert torch.equal(
            batches.train(step)[0], Batches(train, held_out, DATA, BATCH, 3, 60).train(step)[0]
        )


def test_qualities_are_accuracies_on_parts_of_the_held_out_batch(tmp_path: Path) -> None:
    weights = weights_of(tmp_path)
    for step in range(4):  # so that not all accuracies are at chance
        weights.engine.step = step
        weights.train(gates_of(sampled(1, step)), split=False, teach=False, skip_dropout=0.0)
    gates = gates_of(sampled(3))
    qualities = weights.qualities(gates, 3)
    x_NCHW, y = weights.batches.held_out(weights.engine.step, 3)
    assert len(y) == 3 * BATCH
    expected = []
    for number, path_gates in enumerate(gates):
        part = slice(number * BATCH, (number + 1) * BATCH)
        expected.append(
            float((weights.supernet(x_NCHW[part], path_gates).argmax(1) == y[part]).float().mean())
        )
    assert qualities == pytest.approx(expected)
    assert weights.qualities(gates, 3) == qualities  # a step has one held-out batch


def test_qualities_are_scored_in_eval_mode(tmp_path: Path) -> None:
    """Dropout, path dropout and random channels are off, and tracked statistics are
    used but not updated. The qualities equal those by hand, also the second time.
    """
    settings: tuple[dict[str, Any], ...] = (
        {"dropout": 0.5},
        {"path_dropout": 0.9},
        {"channels": "random", "sharing": "collapsed"},
        {"channels": "chunk", "sharing": "collapsed"},
        {"bn_track": True},
    )
    for setting in settings:
        weights = weights_of(tmp_path, **setting)
        for step in range(3):
            weights.engine.step = step
            weights.train(gates_of(sampled(1, step)), split=False, teach=False, skip_dropout=0.0)
        weights.engine.step = 19
        state = copy.deepcopy(weights.supernet.state_dict())
        x_NCHW, y = weights.batches.held_out(19, 1)
        # narrower than the super-net
        gates = gates_of([digits_space().at([0] * len(digits_space().choices))])
        with torch.no_grad():
            expected = (
                (copy.deepcopy(weights.supernet).eval()(x_NCHW, gates[0]).argmax(1) == y)
                .float()
                .mean()
            )
        torch.manual_seed(1)
        assert (
            weights.qualities(gates, 1)
            == weights.qualities(gates, 1)
            == [pytest.approx(float(expected))]
        ), setting
        assert all(
            torch.equal(value, state[name]) for name, value in weights.supernet.state_dict().items()
        ), setting
        logits = [weights.supernet(x_NCHW, gates[0]), weights.supernet.train()(x_NCHW, gates[0])]
        assert not torch.allclose(*logits), setting  # the mode makes a difference here


def test_first_order_gate_gradients(tmp_path: Path) -> None:
    """Held-out cross-entropy without label smoothing in training mode; at a mixture,
    and at a path with probes.
    """
    weights = weights_of(tmp_path)
    x_NCHW, y = weights.batches.held_out(0, 1)
    path = {key: np.eye(len(gate))[1] for key, gate in mixed().items()}
    probes = {key: [0, 2] for key in path}
    for gates, probed in ((mixed(), {}), (path, probes)):
        value, gradients = weights.gate_gradients(gates, probed, 1, 0.0)
        leaves = {
            key: torch.tensor(gate, dtype=torch.float32, requires_grad=True)
            for key, gate in gates.items()
        }
        loss = F.cross_entropy(weights.supernet.train()(x_NCHW, leaves, probed), y)
        expected = torch.autograd.grad(loss, list(leaves.values()))
        assert value == pytest.approx(float(loss.detach()), rel=1e-6)
        for key, gradient in zip(leaves, expected, strict=True):
            assert np.allclose(gradients[key], gradient.numpy(), rtol=1e-4, atol=1e-6), key
            assert gradients[key].dtype == np.float64
            assert (
                (gradients[key] != 0)
                == ((gates[key] != 0) | np.isin(np.arange(len(gates[key])), probed.get(key, [])))
            ).all()


@pytest.mark.parametrize("optimizer", ["momentum", "rmsproptf"])
def test_second_order_gate_gradients(optimizer: str, tmp_path: Path) -> None:
    """``unrolled_gate_gradients`` with the engine's rate, decay per group, and SGD's
    momentum buffers.
    """
    weights = weights_of(tmp_path, optimizer)
    weights.train([mixed()], split=False, teach=False, skip_dropout=0.0)
    weights.engine.step = 7
    value, gradients = weights.gate_gradients(mixed(), {}, 2, 0.0)
    train, held_out = weights.batches.train(7), weights.batches.held_out(7, 1)
    supernet, engine = weights.supernet.train(), weights.engine
    decayed = {
        name
        for name, p in supernet.named_parameters()
        if p.ndim > 1 and name != "classifier.weight"
    }
    named = dict(supernet.named_parameters())
    expected_value, expected = unrolled_gate_gradients(
        lambda gates: F.cross_entropy(
            supernet(train[0], gates), train[1], label_smoothing=SMOOTHING
        ),
        lambda gates: F.cross_entropy(supernet(held_out[0], gates), held_out[1]),
        list(named.values()),
        {key: torch.tensor(gate, dtype=torch.float32) for key, gate in mixed().items()},
        SGDStep(
            engine.lr,
            0.9 if optimizer == "momentum" else 0.0,
            [
                engine.optimizer.state[p].get("momentum_buffer")
                if optimizer == "momentum"
                else None
                for p in named.values()
            ],
            [0.05 if name in decayed else 0.0 for name in named],
        ),
    )
    assert value == pytest.approx(expected_value, rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        # a finite difference in float32
        assert np.allclose(gradients[key], gradient.numpy(), atol=0.02 * largest), key
    first = weights.gate_gradients(mixed(), {}, 1, 0.0)[1]
    assert (
        max(float(np.abs(first[key] - gradients[key]).max()) for key in gradients) > 0.1 * largest
    )


@pytest.mark.parametrize("order", [1, 2])
def test_gate_gradients_change_nothing_else(order: int, tmp_path: Path) -> None:
    """Neither the weights, nor their gradients, nor the running statistics; and the
    next training step is the same as without them.
    """
    after = []
    for asked in (False, True):
        weights = weights_of(tmp_path, bn_track=True, remat=True)
        weights.train([mixed()], split=False, teach=False, skip_dropout=0.0)
        weights.engine.step = 1
        state = {name: value.clone() for name, value in weights.supernet.state_dict().items()}
        gradients = grads(weights.supernet)
        if asked:
            weights.gate_gradients(mixed(), {}, order, 0.0)
        assert all(
            torch.equal(value, state[name]) for name, value in weights.supernet.state_dict().items()
        )
        assert gradients.keys() == grads(weights.supernet).keys()
        assert all(
            torch.equal(value, gradients[name]) for name, value in grads(weights.supernet).items()
        )
        weights.train([mixed()], split=False, teach=False, skip_dropout=0.0)
        after.append(weights.supernet.state_dict())
    assert all(torch.equal(value, after[1][name]) for name, value in after[0].items())


def test_dropout_behind_skips_is_passed_on(tmp_path: Path) -> None:
    """P-DARTS: dropping skips changes the loss of a mixture, but not that of a path
    without skips.
    """
    weights = weights_of(tmp_path)

    def loss(gates: dict[str, np.ndarray], rate: float) -> float:
        torch.manual_seed(0)
        return weights.gate_gradients(gates, {}, 1, rate)[0]

    assert loss(mixed(), 0.7) != loss(mixed(), 0.0)
    without = {key: np.eye(len(gate))[0] for key, gate in mixed().items()}
    assert loss(without, 0.7) == loss(without, 0.0)


def test_dropout_behind_skips_acts_in_the_weight_step(tmp_path: Path) -> None:
    """The loss and the gradients of a step are those of the super-net with dropout, by
    the same draws; without dropout, the loss is different.
    """
    losses = {}
    for rate in (0.0, 0.7):
        weights = weights_of(tmp_path)
        supernet = copy.deepcopy(weights.supernet).train()
        x_NCHW, y = weights.batches.train(0)
        torch.manual_seed(4)
        loss = F.cross_entropy(supernet(x_NCHW, mixed(), None, rate), y, label_smoothing=SMOOTHING)
        loss.backward()
        torch.manual_seed(4)
        metrics = weights.train([mixed()], split=False, teach=False, skip_dropout=rate)
        assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert same(grads(weights.supernet), grads(supernet))
        losses[rate] = metrics["loss"]
    assert losses[0.7] != pytest.approx(losses[0.0], rel=1e-3)


def soft_labels(weights: SupernetWeights, x_NCHW: Tensor) -> Tensor:
    assert weights.teacher is not None
    with torch.no_grad():
        return torch.softmax(weights.teacher.train()(x_NCHW), 1)


@pytest.mark.parametrize("split", [False, True])
def test_teaching_adds_the_soft_cross_entropy(split: bool, tmp_path: Path) -> None:
    """Of the teacher's probabilities for the same images, with the BN statistics of the
    batch that the student sees.
    """
    weights = weights_of(tmp_path)
    teacher, student = sampled(2)
    weights.remember_teacher(teacher)
    x_NCHW, y = weights.batches.train(0)
    gates = gates_of([student, teacher])
    halves = [slice(0, 12), slice(12, 24)] if split else [slice(0, 24)] * 2
    supernet = copy.deepcopy(weights.supernet).train()
    losses = []
    for half, path_gates in zip(halves, gates, strict=True):
        logits = supernet(x_NCHW[half], path_gates)
        soft = -(soft_labels(weights, x_NCHW[half]) * torch.log_softmax(logits, 1)).sum(1).mean()
        losses.append(
            (F.cross_entropy(logits, y[half], label_smoothing=SMOOTHING) + soft)
            * (0.5 if split else 1.0)
        )
    sum(losses).backward()  # type: ignore[union-attr]
    weights.train(gates, split=split, teach=True, skip_dropout=0.0)
    assert same(grads(weights.supernet), grads(supernet))
    with pytest.raises(AssertionError, match="no teacher"):
        weights_of(tmp_path).train(gates, split=split, teach=True, skip_dropout=0.0)


def test_the_teacher_stays_as_it_was_and_survives_a_checkpoint(tmp_path: Path) -> None:
    weights = weights_of(tmp_path)
    picks = sampled(1)[0]
    weights.remember_teacher(picks)
    assert weights.teacher is not None
    before = {
        name: parameter.detach().clone() for name, parameter in weights.teacher.named_parameters()
    }
    weights.train(gates_of([picks]), split=False, teach=True, skip_dropout=0.0)
    assert all(
        torch.equal(parameter, before[name])
        for name, parameter in weights.teacher.named_parameters()
    )
    assert not any(
        torch.equal(p, before[name])
        for name, p in weights.supernet.extract(picks).named_parameters()
        if "conv.weight" in name
    )

    buffer = io.BytesIO()
    torch.save(weights.state_dict(), buffer)
    buffer.seek(0)
    restored = weights_of(tmp_path / "other")
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    x_NCHW, _ = weights.batches.train(3)
    assert torch.equal(soft_labels(restored, x_NCHW), soft_labels(weights, x_NCHW))
    assert restored.state_dict()["picks"] == picks

    restored.load_state_dict(weights_of(tmp_path).state_dict())  # of a run that has no teacher yet
    assert restored.teacher is None


def test_accuracies_are_forgotten_when_the_weights_change(tmp_path: Path) -> None:
    weights = weights_of(tmp_path)
    picks = sampled(1)[0]
    space: MacroSpace = weights.supernet.space
    assert weights.evaluator.evaluate(picks) == weights.evaluator.evaluate(picks)
    for step in range(3):
        weights.engine.step = step
        weights.train(gates_of([picks]), split=False, teach=False, skip_dropout=0.0)
    network = weights.evaluator.network(picks)
    assert network.arch.blocks == space.decode(picks).blocks
    x_NCHW, y = load_images(DATA, "held_out").__getitems__(
        [(i, 0) for i in range(len(load_images(DATA, "held_out")))]
    )
    order = np.random.default_rng(0).permutation(len(y))[:100]
    with torch.no_grad():
        right = (network.eval()(x_NCHW[order]).argmax(1) == y[order]).float().mean()
    assert weights.evaluator.evaluate(picks) == pytest.approx(float(right))
