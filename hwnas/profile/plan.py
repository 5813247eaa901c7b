"""What is profiled: the ops of a space, and networks spread over its range of sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hwnas.config import ProfileConfig
from hwnas.core.arch import Architecture
from hwnas.core.ops import Op
from hwnas.core.search_space import SearchSpace


@dataclass(frozen=True)
class Plan:
    """What is measured: item id -> its chain of ops. Ops come under their keys,
    networks under ``net-<n>``.
    """

    ops: tuple[Op, ...]
    fit: tuple[Architecture, ...]
    test: tuple[Architecture, ...]

    @property
    def items(self) -> dict[str, tuple[Op, ...]]:
        """All items in order."""
        networks = {f"net-{i}": arch.ops() for i, arch in enumerate((*self.fit, *self.test))}
        return {op.key: (op,) for op in self.ops} | networks

    def built(self, name: str) -> tuple[Op, ...] | Architecture:
        """What the file of an item is made of."""
        number = name.removeprefix("net-")
        if number == name:
            return self.items[name]
        arch = (*self.fit, *self.test)[int(number)]
        return arch.ops() if arch.is_chain else arch


def make_plan(
    space: SearchSpace, config: ProfileConfig, seed: int, named: Sequence[Architecture] = ()
) -> Plan:
    """Every op of the space and of ``named`` networks, and the calibration networks:
    fit and test ones alternate over the range of sizes.

    In mode ``networks``: as many networks as asked for, the named ones beside them, and no op.
    """
    if config.mode == "networks":
        return Plan(
            (),
            (*spread_networks(space, config.sampled, np.random.default_rng([seed, 77])), *named),
            (),
        )
    count = config.fit_networks + config.test_networks
    networks = spread_networks(space, count, np.random.default_rng([seed, 77]))
    test = (
        {int((i + 0.5) * count / config.test_networks) for i in range(config.test_networks)}
        if config.test_networks
        else set()
    )
    return Plan(
        planned_ops(space, named),
        tuple(arch for i, arch in enumerate(networks) if i not in test),
        tuple(arch for i, arch in enumerate(networks) if i in test),
    )


def planned_ops(space: SearchSpace, named: Sequence[Architecture]) -> tuple[Op, ...]:
    """The ops of a space, then those of named networks that it lacks, each once."""
    return tuple(dict.fromkeys((*space.ops, *(op for arch in named for op in arch.ops()))))


def spread_networks(space: SearchSpace, count: int, rng: np.random.Generator) -> list[Architecture]:
    """``count`` architectures spread evenly over the space's range of MACs, small to large.

    Uniform picks crowd around the middle, so each candidate draws from its own bias
    towards small or large options.
    """
    if count == 0:
        return []
    orders = _cheap_first(space)
    candidates = []
    for _ in range(50 * count):
        bias, picks = rng.normal(0.0, 2.0), {}
        for choice in space.choices:
            p = np.exp(bias * np.linspace(-1, 1, len(choice.options)))
            picks[choice.key] = choice.options[
                int(orders[choice.key][rng.choice(len(p), p=p / p.sum())])
            ]
        candidates.append(space.decode(picks))
    candidates.sort(key=lambda arch: arch.macs)
    macs = np.array([arch.macs for arch in candidates], dtype=float)
    wanted = np.linspace(macs[0], macs[-1], count)
    chosen = dict.fromkeys(int(np.abs(macs - value).argmin()) for value in wanted)
    spare = (int(i) for i in rng.permutation(len(candidates)) if int(i) not in chosen)
    indices = sorted([*chosen, *(next(spare) for _ in range(count - len(chosen)))])
    return [candidates[i] for i in indices]


def _cheap_first(space: SearchSpace) -> dict[str, np.ndarray]:
    """Choice key -> its option positions, fewest MACs first, averaged over what else
    the terms depend on.
    """
    macs = {choice.key: np.zeros(len(choice.options)) for choice in space.choices}
    for term in space.terms():
        array = np.array([0 if op is None else op.macs for op in term.ops], dtype=float).reshape(
            term.shape
        )
        for axis, key in enumerate(term.keys):
            macs[key] += array.mean(axis=tuple(i for i in range(array.ndim) if i != axis))
    return {key: np.argsort(values, kind="stable") for key, values in macs.items()}
