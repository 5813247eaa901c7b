"""Plug-ins by name: they are imported lazily and never overwritten, and a misspelt name
gets the nearest one as a hint.
"""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest

from hwnas.data import DATASETS
from hwnas.devices import CONNECTIONS
from hwnas.errors import ConfigError
from hwnas.registry import Registry
from hwnas.search import STRATEGIES


def test_a_name_stands_for_an_attribute_of_a_module() -> None:
    registry = Registry("thing", {"ordered": "collections:OrderedDict", "join": "os.path:join"})
    assert registry.get("ordered") is OrderedDict
    assert list(registry) == ["join", "ordered"]


def test_an_unknown_name_gets_the_nearest_as_a_hint() -> None:
    registry = Registry("strategy", {"tunas": "a:b", "random": "a:c"})
    with pytest.raises(ConfigError, match=r"unknown strategy 'tuna'; did you mean 'tunas'\?"):
        registry.get("tuna")
    with pytest.raises(ConfigError, match=r"unknown strategy 'zzz'; known: random, tunas\."):
        registry.get("zzz")


def test_nothing_is_overwritten_silently() -> None:
    registry = Registry("thing", {"a": "m:x"})
    registry.register("a", "m:x")
    registry.register("b", "collections:OrderedDict")
    assert registry.get("b") is OrderedDict
    with pytest.raises(
        ConfigError, match=r"thing 'a' is registered twice \(m:x and m:y\): rename one\."
    ):
        registry.register("a", "m:y")


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = """
import sys
from hwnas.registry import Registry
registry = Registry("thing", {"a": "wave:open", "b": "no_such_module:x"})
assert list(registry) == ["a", "b"]
assert "wave" not in sys.modules
registry.get("a")
assert "wave" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_third_parties_register_by_entry_point(tmp_path: Path) -> None:
    """With a real distribution, installed as pip would leave it."""
    (tmp_path / "acme_nas.py").write_text("class Mine:\n    pass\n")
    info = tmp_path / "acme_nas-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-nas\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hwnas.strategy]\nmine = acme_nas:Mine\n")
    code = """
import acme_nas
from hwnas.search import STRATEGIES
assert "mine" in list(STRATEGIES), list(STRATEGIES)
assert STRATEGIES.get("mine") is acme_nas.Mine
assert "tunas" in list(STRATEGIES)
"""
    path = f"{tmp_path}:{Path(__file__).parents[1]}"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path})


@pytest.mark.parametrize(
    "registry", [STRATEGIES, DATASETS, CONNECTIONS], ids=lambda registry: registry.noun
)
def test_every_built_in_plug_in_can_be_imported(registry: Registry) -> None:
    assert list(registry)
    for name in registry:
        assert callable(registry.get(name))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("class Mine:\n    x = undefined\n", r"cannot be loaded \(NameError: name 'undefined'"),
        ("class Mine\n", r"cannot be loaded \(SyntaxError: "),
        (
            "from abc import ABC, abstractmethod\n\n\nclass Mine(ABC):\n"
            "    @abstractmethod\n    def work(self): ...\n",
            r"lacks work: implement what its base class requires\.",
        ),
    ],
)
def test_a_faulty_plug_in_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    (tmp_path / "their_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_module", raising=False)
    registry = Registry("task", {"theirs": "their_module:Mine"})
    with pytest.raises(ConfigError, match=r"task 'theirs' \(their_module:Mine\) " + message):
        registry.get("theirs")
