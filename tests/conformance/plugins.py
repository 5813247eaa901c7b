"""Plug-ins of third parties, installed for one test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hwnas.registry import Registry


def install(
    registry: Registry, name: str, value: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leave a distribution with the entry point ``name = value`` in ``folder``, as pip
    would; ``registry`` has not seen it yet.
    """
    info = folder / "site" / "acme-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[hwnas.{registry.noun}]\n{name} = {value}\n")
    monkeypatch.setattr(sys, "path", [str(info.parent), *sys.path])
    monkeypatch.setattr(registry, "_targets", dict(registry._targets))
    monkeypatch.setattr(registry, "_discovered", False)
