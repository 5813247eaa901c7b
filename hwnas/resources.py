"""Paths of the files that ship with the code: ``configs``, ``latency_tables``,
``deploy``.
"""

from __future__ import annotations

from pathlib import Path


def resource_path(name: str) -> Path:
    """The folder ``name``: inside an installed package (``hwnas/share``), or at the top
    of a checkout.
    """
    package = Path(__file__).parent
    installed = package / "share" / name
    return installed if installed.is_dir() else package.parent / name
