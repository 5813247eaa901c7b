"""What a super-net, or nothing but the network's shape, says an architecture is worth.

=================  ================================================================================================
``accuracy``       top-1 of the one-path network with BN statistics re-estimated, on held-out images
``loss``           its cross-entropy (lower is better)
``unrecalibrated`` top-1 of the super-net as it stands: BN by its tracked statistics (``supernet.bn_track``), else by
                   those of the batch that is evaluated
``angle``          by which training has turned the weights of the one-path network, in radians (see search/angle.py),
                   from their initialisation or from ``study.base_epochs`` on. Needs no images
``macs, params``   multiply-accumulates and parameters: what any score must beat
``grad_norm``      norm of the loss's gradient by the weights at initialisation, on one batch of
                   ``search.batch_size`` held-out images
``snip``           sum of abs(weight * gradient) there (Lee et al., arXiv 1810.02340)
``synflow``        the same without images: weights by their absolute values, an input of ones, the sum of the
                   logits for a loss (Tanaka et al., arXiv 2006.05467)
=================
================================================================================================

*Differences from the papers*: the zero-cost scores evaluate the super-net's
initialisation, the same for all architectures, not a new one for each; synflow leaves
BN out (its statistics are 0 and 1 and its scale is 1 then) instead of computing batch
statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from hwnas.config import ScoreName
from hwnas.core.arch import Picks
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.nn.supernet import Supernet, resized
from hwnas.search.angle import Angles, weights
from hwnas.search.evaluator import SupernetEvaluator, placed
from hwnas.study.prefixes import Maps, Prefixes

LOWER_IS_BETTER = ("loss",)
ZERO_COST = ("grad_norm", "snip", "synflow")
OF_SHAPE = ("macs", "params")
"""Scores that no super-net has a part in."""


class Scorer:
    """Scores architectures by a trained super-net, which ``evaluator`` evaluates too.

    ``initial`` is what it was at first; the angle is from there, or from ``base``.
    """

    def __init__(
        self,
        evaluator: SupernetEvaluator,
        trained: Supernet,
        initial: Supernet,
        base: Supernet | None = None,
    ) -> None:
        self.evaluator, self.supernet = evaluator, trained
        self.initial = initial.eval()
        self.angles = Angles(base or self.initial, self.supernet)
        self._prefixes: dict[tuple[int, bool], Prefixes] = {}
        self.calculations: dict[ScoreName, Callable[[Picks], dict[str, float]]] = {
            "accuracy": self._recalibrated,
            "loss": self._recalibrated,
            "unrecalibrated": self._as_it_stands,
            "angle": lambda picks: {"angle": self.angles.of(picks)},
            "macs": self._shape,
            "params": self._shape,
            "grad_norm": self._gradients,
            "snip": self._gradients,
            "synflow": lambda picks: {"synflow": synflow(_classifier(self.initial, picks))},
        }

    def score(self, picks: Picks, names: Sequence[ScoreName]) -> dict[str, float]:
        """Scores of an architecture by name. Raises ArithmeticError where one is not finite."""
        found: dict[str, float] = {}
        for name in names:
            if name not in found:
                found |= self.calculations[name](picks)
            if not math.isfinite(found[name]):
                raise ArithmeticError(f"its {name} is {found[name]}")
        return {name: found[name] for name in names}

    def _recalibrated(self, picks: Picks) -> dict[str, float]:
        return self._evaluated(picks, recalibrated=True)

    def _as_it_stands(self, picks: Picks) -> dict[str, float]:
        return {"unrecalibrated": self._evaluated(picks, recalibrated=False)["accuracy"]}

    def _evaluated(self, picks: Picks, recalibrated: bool) -> dict[str, float]:
        """Top-1 in 0..1 and mean cross-entropy over the images that are evaluated."""
        network = _classifier(self.supernet, picks).to(memory_format=torch.channels_last)
        logits_NK = torch.cat(
            self._prefixes_of(network.arch.resolution, recalibrated).logits(network)
        ).float()
        y_N = torch.cat([y for _, y in self.evaluator.evaluation()]).to(logits_NK.device)
        return {
            "accuracy": int((logits_NK.argmax(1) == y_N).sum()) / len(y_N),
            "loss": float(F.cross_entropy(logits_NK, y_N)),
        }

    def _prefixes_of(self, size: int, recalibrated: bool) -> Prefixes:
        """What runs the networks of a resolution; that of another one is let go."""
        if (size, recalibrated) not in self._prefixes:
            self._prefixes = {key: each for key, each in self._prefixes.items() if key[0] == size}
            recalibration, evaluation = (
                self.evaluator.recalibration() if recalibrated else (),
                self.evaluator.evaluation(),
            )
            images = Maps(
                *(
                    [placed(x_NCHW, _device(self.supernet), size) for x_NCHW, _ in each]
                    for each in (recalibration, evaluation)
                )
            )
            self._prefixes[size, recalibrated] = Prefixes(
                images, by_batch=not recalibrated and not self.supernet.config.bn_track
            )
        return self._prefixes[size, recalibrated]

    def _shape(self, picks: Picks) -> dict[str, float]:
        arch = self.supernet.space.decode(picks)
        return {"macs": float(arch.macs), "params": float(arch.params)}

    def _gradients(self, picks: Picks) -> dict[str, float]:
        network = _classifier(self.initial, picks)
        x_NCHW, y = (
            part[: self.evaluator.config.batch_size] for part in self.evaluator.evaluation()[0]
        )
        x_NCHW = resized(x_NCHW.to(_device(network)), network.arch.resolution)
        network.train()
        F.cross_entropy(network(x_NCHW), y.to(x_NCHW.device)).backward()  # type: ignore[no-untyped-call]
        pairs = [
            (weight.detach(), weight.grad) for weight in weights(network) if weight.grad is not None
        ]
        return {
            "grad_norm": math.sqrt(sum(float(grad.double().square().sum()) for _, grad in pairs)),
            "snip": sum(float((weight * grad).double().abs().sum()) for weight, grad in pairs),
        }


def synflow(network: ClassificationNetwork) -> float:
    """Sum of abs(weight * derivative of the summed logits) with all weights positive,
    an input of ones, and no BN. Logarithm.
    """
    network = network.double().eval()
    with torch.no_grad():
        for weight in weights(network):
            weight.abs_()
    arch = network.arch
    device = _device(network)
    network(
        torch.ones(
            1,
            arch.in_channels,
            arch.resolution,
            arch.resolution,
            dtype=torch.float64,
            device=device,
        )
    ).sum().backward()
    pairs = [
        (weight.detach(), weight.grad) for weight in weights(network) if weight.grad is not None
    ]
    total = sum(float((weight * grad).abs().sum()) for weight, grad in pairs)
    return math.log(total) if total > 0 else -math.inf


def _classifier(supernet: Supernet, picks: Picks) -> ClassificationNetwork:
    """The one-path network. Studies have no detectors."""
    network = supernet.extract(picks)
    assert isinstance(network, ClassificationNetwork)
    return network


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
