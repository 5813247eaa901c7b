"""Scores of architectures: against plain formulas on their networks, and that each uses
the weights and statistics that it should.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hwnas.config import Experiment
from hwnas.nn.supernet import MacroSupernet
from hwnas.search.angle import initial_supernet
from hwnas.search.evaluator import SupernetEvaluator
from hwnas.study.scores import Scorer, synflow
from tests.search.staging import elastic_digits_space, experiment

SPACE = elastic_digits_space()
PICKS = [SPACE.sample(np.random.default_rng(seed)) for seed in range(4)]
SMALLEST = {
    choice.key: choice.options[-1] if "skip" in choice.options else choice.options[0]
    for choice in SPACE.choices
}


@pytest.fixture(scope="module")
def config() -> Experiment:
    return experiment("spos", recalibration_images=64, evaluation_images=100)


def scorer(config: Experiment, seed: int = 3, moved: float = 0.1) -> Scorer:
    """A scorer of a super-net whose weights have moved at random from their
    initialisation, by ``moved`` of their mean size.
    """
    supernet = MacroSupernet(SPACE, torch.Generator().manual_seed(seed), config.search.supernet)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in supernet.parameters():
            weight += moved * torch.randn(weight.shape, generator=generator) * weight.abs().mean()
    return Scorer(SupernetEvaluator(supernet, config), supernet, initial_supernet(supernet, seed))


def flat(network: torch.nn.Module) -> np.ndarray:
    layers = [
        module
        for module in network.modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    ]
    return np.concatenate([layer.weight.detach().double().numpy().ravel() for layer in layers])


def test_the_initialisation_is_reproduced(config: Experiment) -> None:
    unmoved = scorer(config, moved=0.0)
    assert all(
        torch.equal(a, b)
        for a, b in zip(unmoved.initial.parameters(), unmoved.supernet.parameters(), strict=True)
    )
    assert unmoved.score(PICKS[0], ["angle"])["angle"] == pytest.approx(0, abs=1e-6)
    assert (
        initial_supernet(unmoved.supernet, 4)
        .classifier.weight.ne(unmoved.supernet.classifier.weight)
        .any()
    )


def test_the_angle_is_one_cosine_of_all_weights(config: Experiment) -> None:
    moved = scorer(config)
    for picks in PICKS:
        a, b = flat(moved.initial.extract(picks)), flat(moved.supernet.extract(picks))
        expected = math.acos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        assert moved.score(picks, ["angle"])["angle"] == pytest.approx(expected, abs=1e-9)
        assert expected > 0.05


def test_identity_adds_nothing_to_the_angle(config: Experiment) -> None:
    moved = scorer(config)
    before = moved.score(SMALLEST, ["angle"])
    skipped = [
        module
        for module, slot in zip(moved.supernet.slots, SPACE.slots, strict=True)
        if SMALLEST.get(slot.key) == "skip"
    ]
    assert skipped
    with torch.no_grad():
        for module in skipped:
            for weight in module.parameters():
                weight.fill_(7)
    assert moved.score(SMALLEST, ["angle"]) == before


def test_opposite_weights_are_pi_apart(config: Experiment) -> None:
    negated = scorer(config, moved=0.0)
    with torch.no_grad():
        for weight in negated.supernet.parameters():
            weight.neg_()
    assert negated.angles.of(PICKS[0]) == pytest.approx(math.pi)


def test_recalibrated_accuracy_is_the_evaluators_and_loss_is_of_the_same_network(
    config: Experiment,
) -> None:
    moved = scorer(config)
    scores = moved.score(PICKS[1], ["accuracy", "loss"])
    assert scores["accuracy"] == moved.evaluator.evaluate(PICKS[1])
    network = moved.evaluator.network(PICKS[1])
    batches = moved.evaluator.evaluation()
    with torch.no_grad():
        logits = torch.cat([network(x_NCHW) for x_NCHW, _ in batches])
    y = torch.cat([labels for _, labels in batches])
    assert len(y) == 100
    assert scores["loss"] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)


def test_unrecalibrated_uses_tracked_statistics_if_there_are_any(config: Experiment) -> None:
    tracking = experiment(
        "spos", recalibration_images=64, evaluation_images=100, supernet={"bn_track": True}
    )
    without, with_statistics = scorer(config), scorer(tracking)
    with torch.no_grad():
        for module in with_statistics.supernet.modules():
            if isinstance(module, torch.nn.BatchNorm2d) or hasattr(module, "running_var"):
                module.running_var.fill_(1e8)
    plain, tracked = (
        of_net.score(PICKS[2], ["unrecalibrated", "accuracy"])
        for of_net in (without, with_statistics)
    )
    assert plain["accuracy"] == tracked["accuracy"]  # its statistics are estimated again
    assert plain["unrecalibrated"] != tracked["unrecalibrated"]


def test_macs_and_params_are_those_of_the_architecture(config: Experiment) -> None:
    arch = SPACE.decode(PICKS[3])
    assert scorer(config).score(PICKS[3], ["macs", "params"]) == {
        "macs": arch.macs,
        "params": arch.params,
    }


def test_zero_cost_scores_are_of_the_initialisation(config: Experiment) -> None:
    names = ["grad_norm", "snip", "synflow"]
    scores = [scorer(config, moved=moved).score(PICKS[0], names) for moved in (0.0, 1.0)]  # type: ignore[arg-type]
    assert scores[0] == scores[1]
    reference = scorer(config)
    network = reference.initial.extract(PICKS[0]).train()
    x_NCHW, y = (part[:32] for part in reference.evaluator.evaluation()[0])  # search.batch_size
    F.cross_entropy(network(x_NCHW), y).backward()
    pairs = [
        (m.weight.detach(), m.weight.grad)
        for m in network.modules()
        if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)
    ]
    assert scores[0]["grad_norm"] == pytest.approx(
        math.sqrt(sum(float((g**2).sum()) for _, g in pairs)), rel=1e-4
    )
    assert scores[0]["snip"] == pytest.approx(
        sum(float((w * g).abs().sum()) for w, g in pairs), rel=1e-4
    )


def test_synflow_scales_with_every_layer(config: Experiment) -> None:
    """The summed logits are multilinear in the layers of a chain without residuals:
    doubling one adds log 2.
    """
    moved = scorer(config)
    networks = [moved.initial.extract(SMALLEST) for _ in range(2)]
    with torch.no_grad():
        networks[1].blocks[-1].linear.weight.mul_(2)  # type: ignore[operator,union-attr]
    low, high = (synflow(network) for network in networks)
    assert high - low == pytest.approx(math.log(2), abs=1e-9)


def test_a_score_that_is_nan_is_named(config: Experiment) -> None:
    broken = scorer(config)
    with torch.no_grad():
        broken.supernet.classifier.bias.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="its loss is nan"):
        broken.score(PICKS[0], ["macs", "loss"])
