"""Commands that compute nothing do not import PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hwnas.config.formats import TARGETS
from hwnas.config.tasks import TASKS
from hwnas.data import DATASETS
from hwnas.lazy import LazyModule
from hwnas.search import FINDERS, SHRINK_METRICS, STRATEGIES
from hwnas.unused.keys import HAS_MOMENTUM, has_momentum
from tests.conftest import write_tiny

WITHOUT_TORCH = """
import sys


class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "torchvision", "timm"):
            raise AssertionError(f"{name} is imported")


sys.meta_path.insert(0, Refusing())
"""
COMMAND = """
from hwnas.cli import main

main()
"""
PLUGINS = """
from hwnas.config.formats import TARGETS
from hwnas.config.tasks import TASKS
from hwnas.data import DATASETS
from hwnas.search import FINDERS, SHRINK_METRICS, STRATEGIES
from hwnas.stages import STAGES, stage_class

for name in STAGES:
    stage_class(name)
for registry in (STRATEGIES, FINDERS, SHRINK_METRICS, TASKS, DATASETS, TARGETS):
    for name in registry.builtin:
        registry.get(name)
"""


def without_torch(code: str, *arguments: str) -> str:
    """The output of Python code in a process that cannot import PyTorch."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_TORCH + code, *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_plugins_declare_is_read_without_pytorch() -> None:
    for registry in (STRATEGIES, FINDERS, SHRINK_METRICS, TASKS, DATASETS, TARGETS):
        assert registry.builtin
    without_torch(PLUGINS)


@pytest.mark.parametrize(
    "name", ["quickstart", "experiments/coco128", "experiments/darts-cifar10", "experiments/coco"]
)
def test_a_plan_is_made_without_pytorch(name: str, tmp_path: Path) -> None:
    arguments = ["run", f"configs/{name}.toml", "--plan", "-q", "--out", str(tmp_path)]
    assert "export" in without_torch(COMMAND, *arguments)


def test_a_report_is_made_without_pytorch(tmp_path: Path) -> None:
    root = tmp_path / "run"
    without_torch(COMMAND, "report", str(write_tiny(tmp_path)), "--out", str(root))
    assert "<html" in (root / "report" / "report.html").read_text()


def test_a_lazy_module_has_the_attributes_of_the_module() -> None:
    module = LazyModule("json")
    import json

    assert module.loads is json.loads
    assert module.__file__ == json.__file__
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing


@pytest.mark.parametrize("name", HAS_MOMENTUM)
def test_momentum_is_what_timm_says(name: str) -> None:
    from timm.optim import get_optimizer_info

    assert has_momentum(name) is get_optimizer_info(name).has_momentum


def test_momentum_of_other_optimisers() -> None:
    assert has_momentum("lars")
    assert not has_momentum("adagrad")
    assert has_momentum("no such optimiser")  # reported elsewhere, with the known ones
