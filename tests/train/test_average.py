"""The moving average of a detector's weights (``train.ema_decay``)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hwnas.config import Experiment
from hwnas.core.spaces import mobile32
from hwnas.engine import Metrics
from hwnas.networks import architecture
from hwnas.nn.checkpoint import load_network
from hwnas.progress import Progress
from hwnas.runs import StageContext
from hwnas.train import training
from tests.train.rectangles import settings

torch.set_num_threads(1)

DECAY = 0.6


class StoppedError(Exception):
    """Ends a training in the middle."""


class Follower:
    """Averages the weights of a training by hand: average <- d average + (1 - d) w, with
    timm's warm-up d = min(decay, 1 - (1 + t)^(-2/3)), t = step - 1.
    """

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    def train(self, ctx: StageContext, stop: int) -> None:
        """Begin or resume, and stop before the step ``stop``."""
        arch = architecture(ctx.experiment, mobile32(), ctx.root)
        run = training.begin(ctx, arch)
        model = run.engine.model
        if not self.average:
            self.average = {name: tensor.clone() for name, tensor in model.state_dict().items()}

        def step(number: int) -> Metrics:
            if number == stop:
                raise StoppedError
            metrics = run.step(number)
            decay = min(DECAY, 1 - (1 + max(0, number - 1)) ** (-2 / 3))
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point():
                    tensor = decay * self.average[name] + (1 - decay) * tensor
                self.average[name] = tensor.clone()
            return metrics

        run.engine.fit(step, Progress(), "training")


@pytest.mark.slow
def test_a_trained_detector_has_the_average_of_its_weights(tmp_path: Path) -> None:
    """Of its backbone, its extras and its predictors, in a training that stops twice: the
    average is resumed as well.
    """
    config = settings(tmp_path, epochs=3, ema_decay=DECAY)
    experiment = Experiment.model_validate({**config, "checkpoint_seconds": 0})
    folder = tmp_path / "run" / "train"
    folder.mkdir(parents=True)
    ctx = StageContext(experiment, tmp_path / "run", folder)
    follower = Follower()
    for stop in (4, 7):
        with pytest.raises(StoppedError):
            follower.train(ctx, stop)
    follower.train(ctx, stop=9)
    last = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    training.run(ctx, architecture(experiment, mobile32(), tmp_path))
    saved = load_network(folder / "model.safetensors").state_dict()
    assert saved.keys() == follower.average.keys()
    for name, tensor in follower.average.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-4, atol=1e-6)
    averaged = set()
    for name, tensor in last.items():
        if not torch.allclose(saved[name], tensor, rtol=1e-3):
            averaged.add(name.split(".")[0])
    assert averaged == {"blocks", "extras", "heads"}
