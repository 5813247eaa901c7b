"""The stages that ask the device."""

from __future__ import annotations

from collections.abc import Sequence

from hwnas.core.ops import Op
from hwnas.estimate.context import Context
from hwnas.estimate.parts import Estimate, Part, peak_memory
from hwnas.export.timing import timing_path
from hwnas.networks import named_networks
from hwnas.profile.plan import planned_ops


def of_profile(ctx: Context) -> Estimate:
    """Building what the cache lacks, then all rounds; noisy entries are measured again
    in up to ``profile.max_rounds``.
    """
    experiment, space, found = ctx.experiment, ctx.space, ctx.sample
    config, device = experiment.profile, experiment.device
    fitted = config.mode == "networks"
    named = named_networks(experiment, space)
    networks = config.sampled + len(named) if fitted else config.fit_networks + config.test_networks
    ops: Sequence[Op] = () if fitted else planned_ops(space, named)
    missing = sum(not timing_path((op,), device.runtime, device.dtype).exists() for op in ops)
    of_network = found.networks
    per_round = found.start + len(ops) * found.ops.measuring + networks * of_network.measuring
    parts = [
        Part("building", 1, missing * found.ops.building + networks * of_network.building),
        Part("measuring", config.rounds, per_round, max(config.rounds, config.max_rounds)),
    ]
    disk = missing * found.ops.size_bytes + networks * of_network.size_bytes
    return Estimate(tuple(parts), peak_memory(), disk)


def of_validation(ctx: Context) -> Estimate:
    """Every file on all test images, then files and blocks in rounds, up to twice as
    many while they are noisy.
    """
    ctx.check_data()
    config, files = ctx.experiment.validation, len(ctx.experiment.export_formats)
    found, test_images = ctx.sample, ctx.test_images
    images = min(test_images, config.images or test_images)
    blocks = len(dict.fromkeys(ctx.arch.ops()))
    of_network = found.networks
    per_round = 2 * found.start + files * of_network.measuring + blocks * found.ops.measuring
    measuring = Part("measuring", config.rounds, per_round, 2 * config.rounds)
    accuracy = Part("accuracy of the files", files, found.start + images * of_network.ms / 1e3)
    return Estimate((accuracy, measuring), peak_memory())
