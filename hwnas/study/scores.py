"""Scores of an architecture, by a super-net or only by the shape of its network.

- ``accuracy``: top-1 on held-out images of the one-path network with re-estimated BN
  statistics.
- ``loss``: its cross-entropy (lower is better).
- ``unrecalibrated``: top-1 of the super-net as it is. BN uses its tracked statistics
  (``supernet.bn_track``), else those of the evaluated batch.
- ``angle``: the angle in radians by which training has turned the weights of the
  one-path network (see search/angle.py), measured from the initial weights or from
  those after ``study.base_epochs``. Needs no images.
- ``macs``, ``params``: multiply-accumulates and parameters, which any other score should
  beat.
- ``grad_norm``: the norm of the gradient of the loss by the weights at initialisation,
  on one batch of ``search.batch_size`` held-out images.
- ``snip``: the sum of abs(weight * gradient) on that batch (Lee et al., arXiv
  1810.02340).
- ``synflow``: the same sum without images, with the absolute values of the weights, an
  input of ones, and the sum of the logits as the loss (Tanaka et al., arXiv 2006.05467).

*Differences from the papers*: the zero-cost scores use the initial weights of the
super-net, the same for all architectures, and not a new initialisation for each.
synflow leaves BN out (with statistics of 0 and 1 and a scale of 1 it does nothing)
instead of computing batch statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.config import ScoreName
from hwnas.core.arch import Picks
from hwnas.core.size import Size
from hwnas.nn.classifier import ClassificationNetwork
from hwnas.nn.supernet import Supernet, resized
from hwnas.search.angle import Angles, weights
from hwnas.search.evaluator import SupernetEvaluator, to_network_input
from hwnas.study.prefixes import Maps, Prefixes

LOWER_IS_BETTER = ("loss",)


class Scorer:
    """Scores architectures by a trained super-net, which is also that of ``evaluator``.

    ``initial`` is the super-net before its training. The angle is measured from ``base``,
    or from ``initial`` if ``base`` is None.
    """

    def __init__(
        self,
        evaluator: SupernetEvaluator,
        trained: Supernet,
        initial: Supernet,
        base: Supernet | None = None,
    ) -> None:
        self.evaluator = evaluator
        self.supernet = trained
        self.initial = initial.eval()
        self.angles = Angles(base or self.initial, self.supernet)
        self._prefixes: dict[tuple[Size, bool], Prefixes] = {}
        self.calculations: dict[ScoreName, Callable[[Picks], dict[str, float]]] = {
            "accuracy": self._recalibrated,
            "loss": self._recalibrated,
            "unrecalibrated": self._unrecalibrated,
            "angle": lambda picks: {"angle": self.angles.of(picks)},
            "macs": self._shape,
            "params": self._shape,
            "grad_norm": self._gradients,
            "snip": self._gradients,
            "synflow": lambda picks: {"synflow": synflow(_classifier(self.initial, picks))},
        }

    def score(self, picks: Picks, names: Sequence[ScoreName]) -> dict[str, float]:
        """The named scores of an architecture. Raises ArithmeticError if one is not
        finite.
        """
        scores: dict[str, float] = {}
        for name in names:
            # One calculation may give several scores, for instance accuracy and loss.
            if name not in scores:
                scores |= self.calculations[name](picks)
            if not math.isfinite(scores[name]):
                raise ArithmeticError(f"its {name} is {scores[name]}")
        return {name: scores[name] for name in names}

    def _recalibrated(self, picks: Picks) -> dict[str, float]:
        return self._evaluated(picks, recalibrated=True)

    def _unrecalibrated(self, picks: Picks) -> dict[str, float]:
        return {"unrecalibrated": self._evaluated(picks, recalibrated=False)["accuracy"]}

    def _evaluated(self, picks: Picks, recalibrated: bool) -> dict[str, float]:
        """Top-1 accuracy in 0..1 and mean cross-entropy over the evaluation images."""
        network = _classifier(self.supernet, picks).to(memory_format=torch.channels_last)
        prefixes = self._prefixes_of(network.arch.size, recalibrated)
        logits_NK = torch.cat(prefixes.logits(network)).float()
        y_N = torch.cat([y for _, y in self.evaluator.evaluation()]).to(logits_NK.device)
        return {
            "accuracy": int((logits_NK.argmax(1) == y_N).sum()) / len(y_N),
            "loss": float(F.cross_entropy(logits_NK, y_N)),
        }

    def _prefixes_of(self, size: Size, recalibrated: bool) -> Prefixes:
        """The prefixes that run networks of a resolution. Those of other resolutions are
        freed: their maps take much memory, and architectures come sorted by resolution.
        """
        if (size, recalibrated) not in self._prefixes:
            for other in [key for key in self._prefixes if key[0] != size]:
                del self._prefixes[other]
            recalibration = self.evaluator.recalibration() if recalibrated else ()
            device = _device(self.supernet)
            images = Maps(
                [to_network_input(x_NCHW, device, size) for x_NCHW, _ in recalibration],
                [
                    to_network_input(x_NCHW, device, size)
                    for x_NCHW, _ in self.evaluator.evaluation()
                ],
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
        batch_size = self.evaluator.config.batch_size
        x_NCHW, y = self.evaluator.evaluation()[0]
        x_NCHW, y = x_NCHW[:batch_size], y[:batch_size]
        x_NCHW = resized(x_NCHW.to(_device(network)), network.arch.size)
        network.train()
        loss = F.cross_entropy(network(x_NCHW), y.to(x_NCHW.device))
        loss.backward()  # type: ignore[no-untyped-call]
        pairs = _weights_with_gradients(network)
        return {
            "grad_norm": math.sqrt(sum(float(grad.double().square().sum()) for _, grad in pairs)),
            "snip": sum(float((weight * grad).double().abs().sum()) for weight, grad in pairs),
        }


def synflow(network: ClassificationNetwork) -> float:
    """The logarithm of the sum of abs(weight * derivative of the summed logits), with all
    weights positive, an input of ones, and no BN.

    Changes the weights of ``network``.
    """
    # In float64: products over all layers easily leave the range of float32.
    network = network.double().eval()
    with torch.no_grad():
        for weight in weights(network):
            weight.abs_()
    arch = network.arch
    shape = (1, arch.in_channels, *arch.size_HW)
    ones_NCHW = torch.ones(shape, dtype=torch.float64, device=_device(network))
    network(ones_NCHW).sum().backward()
    pairs = _weights_with_gradients(network)
    total = sum(float((weight * grad).abs().sum()) for weight, grad in pairs)
    return math.log(total) if total > 0 else -math.inf


def _weights_with_gradients(network: ClassificationNetwork) -> list[tuple[Tensor, Tensor]]:
    """The weights that the output depends on, each with its gradient."""
    pairs = []
    for weight in weights(network):
        if weight.grad is not None:
            pairs.append((weight.detach(), weight.grad))
    return pairs


def _classifier(supernet: Supernet, picks: Picks) -> ClassificationNetwork:
    """The one-path network; always a classifier, because only those can be studied."""
    network = supernet.extract(picks)
    assert isinstance(network, ClassificationNetwork)
    return network


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
