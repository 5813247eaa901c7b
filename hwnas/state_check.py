"""Does a checkpoint fit the training that wants to resume from it?

What is wrong is returned as a phrase that follows "checkpoint checkpoint.pt ...", or
None. ``torch.load`` has read the state, so it consists of tensors, numbers, strings and
containers, in any structure.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

KEYS = ("step", "steps", "model", "optimizer", "ema", "extra")
"""What a checkpoint holds."""


LATE_VALUE = "lookahead_slow_buff"
"""What timm's Lookahead keeps for a weight only after some steps."""


def counts_problem(state: Any, steps: int) -> str | None:
    """What is wrong with the keys of a state, and with its step, for a training of
    ``steps`` steps.
    """
    if not isinstance(state, dict):
        return "does not hold the state of a training"
    missing = [key for key in KEYS if key not in state]
    if missing:
        return f"lacks {missing[0]!r}"
    # ``type``, because True is an int as well
    if type(state["steps"]) is not int or state["steps"] != steps:
        return f"belongs to a run of {state['steps']!r} steps, not {steps}"
    step = state["step"]
    if type(step) is not int or not 0 <= step <= steps:
        return f"was saved at step {step!r} of {steps}"
    return None


def weights_problem(model: nn.Module, found: Any) -> str | None:
    """What is wrong with a state of ``model``."""
    if not isinstance(found, dict):
        return "lacks the weights"
    expected = model.state_dict()
    learned = {name for name, _ in model.named_parameters()}
    for name, tensor in expected.items():
        if name not in found:
            return f"lacks the weight {name!r}"
        problem = form_problem(tensor, found[name], name)
        if problem is not None:
            return problem
        # a training stops rather than save such weights; BN statistics may hold anything
        if name in learned and bool(torch.isnan(found[name]).any()):
            return f"holds NaN in {name!r}"
    unknown = sorted(map(str, found.keys() - expected.keys()))
    if unknown:
        return f"holds the weight {unknown[0]!r}, which the network does not have"
    return None


def optimizer_problem(
    model: nn.Module,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    found: Any,
    step: int,
) -> str | None:
    """What is wrong with the state of an optimiser of ``model`` after ``step`` steps.
    ``make`` creates an optimiser of the right kind for a model.
    """
    if not isinstance(found, dict) or not isinstance(found.get("state"), dict):
        return "lacks the state of the optimiser"
    groups = found.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return "lacks the settings of the optimiser"
    expected = _after_a_step(model, make)
    numbers = [group["params"] for group in expected["param_groups"]]
    if [group.get("params") for group in groups] != numbers:
        return "belongs to an optimiser of other weights"
    if step > 0 and expected["state"] and not found["state"]:
        return f"lacks the state of the optimiser after {step} steps"
    for number, values in found["state"].items():
        if number not in expected["state"]:
            return f"holds the optimiser's state of weight {number!r}, which has none"
        problem = _values_problem(expected["state"][number], values, number)
        if problem is not None:
            return problem
    return form_problem(expected["param_groups"], groups, "the optimiser's settings")


def _after_a_step(
    model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer]
) -> dict[str, Any]:
    """The state of an optimiser after its first step, in which it creates what it keeps
    for each weight. A copy of the model takes that step.
    """
    copied = copy.deepcopy(model)
    optimizer = make(copied)
    for weight in copied.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer.state_dict()


def _values_problem(expected: Mapping[str, Any], values: Any, number: int) -> str | None:
    """What is wrong with the values that an optimiser keeps for a weight."""
    place = f"the optimiser's state of weight {number}"
    if not isinstance(values, dict):
        return f"lacks {place}"
    missing = sorted(expected.keys() - values.keys())
    if missing:
        return f"lacks {missing[0]!r} in {place}"
    unknown = sorted(map(str, values.keys() - expected.keys() - {LATE_VALUE}))
    if unknown:
        return f"holds {unknown[0]!r}, of another optimiser, in {place}"
    return form_problem(expected, values, place)


def part_problem(name: str, expected: Any, states: Any) -> str | None:
    """What is wrong with the state of a part beside the weights, such as a strategy's.
    ``expected`` is the state of that part before the first step, ``states`` holds those
    of all parts by name.
    """
    if not isinstance(states, dict) or name not in states:
        return f"lacks the state of {name!r}"
    return form_problem(expected, states[name], f"the state of {name!r}")


def form_problem(expected: Any, found: Any, place: str) -> str | None:
    """How the form of a value differs from that of an expected one: another type, or
    another shape of a tensor.

    Only keys that both have are compared, and None or an empty container says nothing of
    what comes later.
    """
    if expected is None:
        return None
    if isinstance(expected, Tensor):
        return _tensor_problem(expected, found, place)
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            return _another_type(found, place)
        pairs = [(expected[key], found[key], key) for key in expected if key in found]
    elif isinstance(expected, list | tuple):
        if not isinstance(found, list | tuple):
            return _another_type(found, place)
        # not strict: lists may grow
        both = zip(expected, found, strict=False)
        pairs = [(inner, value, i) for i, (inner, value) in enumerate(both)]
    else:
        return _scalar_problem(expected, found, place)
    for inner, value, key in pairs:
        problem = form_problem(inner, value, f"{place}, {key}")
        if problem is not None:
            return problem
    return None


def _tensor_problem(expected: Tensor, found: Any, place: str) -> str | None:
    if not isinstance(found, Tensor):
        return _another_type(found, place)
    if found.shape != expected.shape:
        return f"holds {list(found.shape)} numbers in {place}, not {list(expected.shape)}"
    if found.dtype != expected.dtype:
        return f"holds {found.dtype} in {place}, not {expected.dtype}"
    return None


def _scalar_problem(expected: Any, found: Any, place: str) -> str | None:
    if isinstance(expected, bool) or isinstance(found, bool):
        is_alike = type(expected) is type(found)
    elif isinstance(expected, int | float):
        is_alike = isinstance(found, int | float)
    else:
        is_alike = isinstance(found, type(expected))
    return None if is_alike else _another_type(found, place)


def _another_type(found: Any, place: str) -> str:
    return f"holds a {type(found).__name__} in {place}"
