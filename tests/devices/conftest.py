"""Device fixtures that the tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from hwnas.devices.ssh import Ssh
from tests.devices import sshd
from tests.devices.sshd import Server


@pytest.fixture(scope="session")
def _sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with sshd.running(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def server(_sshd: Server) -> Iterator[Server]:
    """A board reachable over ssh, without models or login scripts. Each test must leave
    it idle.
    """
    shutil.rmtree(_sshd.home)
    _sshd.home.mkdir()
    yield _sshd
    assert sshd.gone(_sshd.runners()), "a runner outlived its client"


@pytest.fixture
def board(server: Server) -> Ssh:
    """A connection to ``server``."""
    return Ssh(server.device())
