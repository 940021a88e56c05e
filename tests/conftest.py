# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures of all tests: the laboratory, which ends what it started."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings

from hangs import Watchdog
from lab import Lab
from mounts import SharingFolder, SmallFolder
from replication import log, node
from replication.disk import files
from waiting import DEADLINE_S
from wire import Wire

# A script's background job ignores SIGINT, and so would all that the tests start, and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes, or its invention, says how busy the machine is, and how many of the first ones are too
# large or do not fit is chance. Whether a test hangs is pytest's timeout to tell.
settings.register_profile(
    "unhurried",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.load_profile("unhurried")


def pytest_configure(config: pytest.Config) -> None:
    """pytest calls it when it begins."""
    config.pluginmanager.register(Watchdog())


@pytest.fixture
def port() -> Iterator[int]:
    """A TCP port that nobody else gets: it stays bound, and the listener of the test shares it."""
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        yield kept.getsockname()[1]


@pytest.fixture(scope="session")
def networks() -> None:
    """Skips the test where network namespaces are not allowed."""
    try:
        Wire().close()
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A Lab of this test alone. Ending it fails the test if a process had ended by itself or had to be killed."""
    laboratory = Lab()
    try:
        yield laboratory
    finally:
        said = laboratory.stderr()
        if said:
            request.node.add_report_section("teardown", "processes", said)
        laboratory.close()


@pytest.fixture(autouse=True)
def _log(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test has logged does not count for the next."""
    monkeypatch.setattr(log, "LOG", log.Log(lambda text: print(text, file=sys.stderr, flush=True)))


@pytest.fixture(autouse=True)
def _patient_failovers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nodes in this process: one that is to be answered within two seconds is refused where the tests beside this
    one keep the disk busy. (Those of other processes are tried again: qmp.py.)"""
    monkeypatch.setattr(node, "FAILOVER_S", DEADLINE_S)


@pytest.fixture
def small_folder(lab: Lab) -> Callable[[int], SmallFolder]:
    """Makes a SmallFolder of so many bytes in this test's lab; skips the test where that is not allowed."""

    def made(size: int) -> SmallFolder:
        try:
            return lab.small_folder(size)
        except PermissionError as error:
            pytest.skip(str(error))

    return made


@pytest.fixture
def sharing_folder(lab: Lab) -> SharingFolder:
    """A folder whose files can share blocks; skips the test where mounting is not allowed."""
    try:
        return lab.sharing_folder()
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.fixture
def no_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit in this process copies, on any file system."""

    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(files, "clone_range", refuse)
