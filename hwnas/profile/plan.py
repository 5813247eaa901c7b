"""What a profile measures: the ops of a space, and networks spread over its range of
sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hwnas.config import ProfileConfig
from hwnas.core.arch import Architecture
from hwnas.core.ops import Op
from hwnas.core.search_space import SearchSpace

CALIBRATION_STREAM = 77
"""Gives the sampling of networks a random stream of its own, next to the seed."""
CANDIDATES_PER_NETWORK = 50
"""Architectures that are sampled for each one that is chosen."""


@dataclass(frozen=True)
class Plan:
    """What a profile measures: single ops, networks to fit the calibration to, and
    networks to test it on.
    """

    ops: tuple[Op, ...]
    fit: tuple[Architecture, ...]
    test: tuple[Architecture, ...]

    @property
    def networks(self) -> tuple[Architecture, ...]:
        """The networks in the order of their numbers: fit networks, then test networks."""
        return (*self.fit, *self.test)

    @property
    def items(self) -> dict[str, tuple[Op, ...]]:
        """All items in order: name -> ops. Ops are named by their keys, networks
        ``net-<n>``.
        """
        networks = {f"net-{i}": arch.ops() for i, arch in enumerate(self.networks)}
        return {op.key: (op,) for op in self.ops} | networks

    def built(self, name: str) -> tuple[Op, ...] | Architecture:
        """What the model file of an item is built from."""
        number = name.removeprefix("net-")
        if number == name:
            return self.items[name]
        arch = self.networks[int(number)]
        return arch.ops() if arch.is_chain else arch


def make_plan(
    space: SearchSpace, config: ProfileConfig, seed: int, named: Sequence[Architecture] = ()
) -> Plan:
    """Plan every op of the space and of ``named`` networks, and networks for the
    calibration. Fit and test networks alternate over the range of sizes.

    In mode ``networks``, plan the configured number of networks and the named ones, but
    no ops.
    """
    rng = np.random.default_rng([seed, CALIBRATION_STREAM])
    if config.mode == "networks":
        sampled = spread_networks(space, config.sampled, rng)
        return Plan(ops=(), fit=(*sampled, *named), test=())

    count = config.fit_networks + config.test_networks
    networks = spread_networks(space, count, rng)
    # Test networks stand in the middle of equal parts of the range of sizes.
    test_positions = set()
    for i in range(config.test_networks):
        test_positions.add(int((i + 0.5) * count / config.test_networks))
    fit = []
    test = []
    for i, arch in enumerate(networks):
        if i in test_positions:
            test.append(arch)
        else:
            fit.append(arch)
    return Plan(planned_ops(space, named), tuple(fit), tuple(test))


def planned_ops(space: SearchSpace, named: Sequence[Architecture]) -> tuple[Op, ...]:
    """The ops of a space, then ops of named networks that the space lacks, each once."""
    ops = list(space.ops)
    for arch in named:
        ops += arch.ops()
    return tuple(dict.fromkeys(ops))


def spread_networks(space: SearchSpace, count: int, rng: np.random.Generator) -> list[Architecture]:
    """``count`` architectures spread evenly over the space's range of MACs, in ascending
    order.
    """
    if count == 0:
        return []
    orders = _cheap_first(space)
    candidates = []
    for _ in range(CANDIDATES_PER_NETWORK * count):
        candidates.append(_biased_sample(space, orders, rng))
    candidates.sort(key=lambda arch: arch.macs)

    macs = np.array([arch.macs for arch in candidates], dtype=float)
    targets = np.linspace(macs[0], macs[-1], count)
    chosen = dict.fromkeys(int(np.abs(macs - target).argmin()) for target in targets)
    # One candidate can be the closest to several targets: random ones fill the gaps.
    for i in rng.permutation(len(candidates)).tolist():
        if len(chosen) == count:
            break
        chosen.setdefault(i)
    return [candidates[i] for i in sorted(chosen)]


def _biased_sample(
    space: SearchSpace, orders: dict[str, np.ndarray], rng: np.random.Generator
) -> Architecture:
    """An architecture with a random bias towards cheap or expensive options.

    Uniform picks would crowd around the middle of the range of sizes.
    """
    # Weights from e^-bias for the cheapest option to e^bias for the most expensive one.
    bias = rng.normal(0.0, 2.0)
    picks = {}
    for choice in space.choices:
        p = np.exp(bias * np.linspace(-1, 1, len(choice.options)))
        rank = rng.choice(len(p), p=p / p.sum())
        picks[choice.key] = choice.options[int(orders[choice.key][rank])]
    return space.decode(picks)


def _cheap_first(space: SearchSpace) -> dict[str, np.ndarray]:
    """Choice key -> option positions by ascending MACs, averaged over the other choices
    that the terms depend on.
    """
    macs = {choice.key: np.zeros(len(choice.options)) for choice in space.choices}
    for term in space.terms():
        op_macs = [0 if op is None else op.macs for op in term.ops]
        term_macs = np.array(op_macs, dtype=float).reshape(term.shape)
        for axis, key in enumerate(term.keys):
            other_axes = tuple(i for i in range(term_macs.ndim) if i != axis)
            macs[key] += term_macs.mean(axis=other_axes)
    return {key: np.argsort(values, kind="stable") for key, values in macs.items()}
