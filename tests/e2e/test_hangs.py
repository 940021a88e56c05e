# SPDX-License-Identifier: BSD-3-Clause
"""A test that hangs fails, and lets the others run: pytest of its own, with small limits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from checkout import REPOSITORY
from waiting import DEADLINE_S

CONFTEST = """
from hangs import Watchdog

def pytest_configure(config):
    config.pluginmanager.register(Watchdog(kill_s=0.2, exit_s=EXIT_S))
"""

IN_A_LIBRARY = """
import nbd
import pytest

# No test yet: how long it takes to connect is no matter of a limit.
handle = nbd.NBD()
handle.connect_command(["nbdkit", "-s", "--exit-with-parent", "memory", "1M", "--filter=delay", "delay-read=3600"])

def test_hangs():
    handle.pread(512, 0)

@pytest.mark.timeout(60)
def test_next():
    pass
"""

FOR_GOOD = """
import signal
import threading

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})

def test_hangs():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
"""


def run(folder: Path, text: str, exit_s: float) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST.replace("EXIT_S", str(exit_s)))
    (folder / "test_it.py").write_text(text)
    (folder / "pytest.ini").write_text(f"[pytest]\npythonpath = {REPOSITORY / 'tests'}\ntimeout = 2\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_what_waits_in_a_library_fails_when_its_server_is_killed(tmp_path: Path) -> None:
    done = run(tmp_path, IN_A_LIBRARY, DEADLINE_S)
    assert "1 failed, 1 passed" in done.stdout, done
    assert "test_it.py::test_hangs hangs: killed its processes [" in done.stderr, done


def test_what_cannot_be_ended_ends_pytest(tmp_path: Path) -> None:
    done = run(tmp_path, FOR_GOOD, 0.2)
    assert done.returncode == 70, done
    assert "test_it.py::test_hangs hangs, with no process left: pytest ends" in done.stderr, done
    assert "in test_hangs" in done.stderr, done
