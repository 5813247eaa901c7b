"""What ``hwnas doctor`` says of an installation that is not complete."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

import pytest

from hwnas import doctor
from hwnas.doctor import Finding, examine


def unexpected(*_: object) -> NoReturn:
    raise AssertionError("nothing is tried that needs the missing package")


@pytest.mark.parametrize("package", ["torch", "onnxruntime", "ai-edge-quantizer"])
def test_a_missing_package_is_the_only_complaint(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version_without(name: str) -> str:
        if name == package:
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", version_without)
    monkeypatch.setattr(doctor, "_torch", unexpected)
    monkeypatch.setattr(doctor, "_runtime", unexpected)
    [finding] = [finding for finding in examine() if not finding.good]
    assert finding.subject == package
    assert finding.text.endswith(f": pip install {package}")


def test_runtimes_are_not_tried_with_a_torch_that_does_not_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = Finding("torch works", False, "torch and torchvision do not import together")
    monkeypatch.setattr(doctor, "_torch", lambda: broken)
    monkeypatch.setattr(doctor, "_runtime", unexpected)
    assert [finding for finding in examine() if not finding.good] == [broken]
