# SPDX-License-Identifier: BSD-3-Clause
"""The project's secondary as a System: nbdkit with plugin.py, its control socket and its disks."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any

from lab import Lab
from model.faces import RealSecondary
from nodes import Secondary


class NbdkitSecondary(RealSecondary):
    """A secondary with raw disks that hold `contents`, in a process that may be restarted."""

    def __init__(self, lab: Lab, contents: Sequence[bytes]) -> None:
        self.server: Secondary = lab.secondary([len(content) for content in contents], contents=contents)
        super().__init__(self.server.connect)

    def execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """Run a QMP command; raises QmpError."""
        return self.server.execute(command, arguments)

    def failover(self, wait: bool = True) -> None:
        """Fail over, and `wait` for the end of the commit."""
        self.command("xen-set-replication", enable=False, primary=False, failover=True)
        if wait:
            self.settle()

    def restart(self, kill: bool) -> None:
        """End the process, by SIGKILL or by SIGTERM, and start it again on the same disks and state."""
        self.forget()
        self.server.restart(signal.SIGKILL if kill else signal.SIGTERM)

    def settle(self) -> None:
        """Wait until no commit is under way; raises AssertionError if one has failed."""
        status = self.server.wait_stage("none", "running", "done", "failover-failed")
        if status["stage"] == "failover-failed":
            raise AssertionError(f"the commit failed: {status}")
