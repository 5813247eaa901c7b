"""The estimates of the stages that measure on the device: profiling and validation."""

from __future__ import annotations

from collections.abc import Sequence

from hwnas.core.ops import Op
from hwnas.estimate.context import Context
from hwnas.estimate.parts import Part, TimeEstimate, peak_memory
from hwnas.export.timing import timing_path
from hwnas.networks import named_networks
from hwnas.profile.plan import planned_ops


def of_profile(ctx: Context) -> TimeEstimate:
    """Building the files that the cache lacks, then all rounds of measuring. Noisy
    entries are measured again, in up to ``profile.max_rounds`` rounds.
    """
    experiment = ctx.experiment
    sample = ctx.sample
    config = experiment.profile
    device = experiment.device
    named = named_networks(experiment, ctx.space)
    ops: Sequence[Op]
    if config.mode == "networks":
        # The table is fitted to networks only.
        ops = ()
        networks = config.sampled + len(named)
    else:
        ops = planned_ops(ctx.space, named)
        networks = config.fit_networks + config.test_networks
    missing = sum(not timing_path((op,), device.runtime, device.dtype).exists() for op in ops)

    op = sample.ops
    network = sample.networks
    building = missing * op.building + networks * network.building
    per_round = sample.start + len(ops) * op.measuring + networks * network.measuring
    most_rounds = max(config.rounds, config.max_rounds)
    parts = (
        Part("building", 1, building),
        Part("measuring", config.rounds, per_round, most_rounds),
    )
    disk_bytes = missing * op.size_bytes + networks * network.size_bytes
    return TimeEstimate(parts, peak_memory(), disk_bytes)


def of_validation(ctx: Context) -> TimeEstimate:
    """Evaluating every file on the test images, then measuring files and blocks in
    rounds, up to twice as many if they are noisy.
    """
    ctx.check_data()
    config = ctx.experiment.validation
    files = len(ctx.experiment.export_formats)
    sample = ctx.sample
    network = sample.networks
    images = min(ctx.test_images, config.images or ctx.test_images)
    blocks = len(dict.fromkeys(ctx.arch.ops()))
    per_round = 2 * sample.start + files * network.measuring + blocks * sample.ops.measuring
    measuring = Part("measuring", config.rounds, per_round, 2 * config.rounds)
    accuracy = Part("accuracy of the files", files, sample.start + images * network.ms / 1e3)
    return TimeEstimate((accuracy, measuring), peak_memory())
