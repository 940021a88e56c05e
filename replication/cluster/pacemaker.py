# SPDX-License-Identifier: BSD-3-Clause
"""What the agent tells the cluster and keeps in it, by Pacemaker's own tools.

The score is an attribute of this host that the cluster forgets with a restart of the host. The register is in the
cluster's configuration, so that every host has it, and has it after a restart: who was promoted last, and the lineage
of its disks.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from typing import Any

from .serials import Known, read_known, to_json
from .told import Told

_SET = "nbdkit-replication"
_TOOL_S = 10.0
"""Longest wait for one of Pacemaker's tools."""


class ClusterError(Exception):
    """The cluster cannot be asked, or does not take what it is told."""


@dataclass(frozen=True)
class Register:
    """The last owner."""

    host: str
    lineage: dict[str, Any]
    kept: bool = False
    """It was stopped in good order and has not handed over: its host is not gone, it only does not run there."""
    promotion: Known = field(default_factory=Known)
    """Which one that was, and those that it knew of."""
    disputed: str | None = None
    """The host that has gone on as well, and was not promoted before this one: a person decides."""
    alone: bool = False
    """It was promoted without the other one, which may have just this lineage, and has not been in sync with it since:
    the lineage moves with the guest's first write, and that is here only with the next monitor."""

    def to_text(self) -> str:
        more: dict[str, Any] = to_json(self.promotion)
        if self.kept:
            more["kept"] = True
        if self.disputed is not None:
            more["disputed"] = self.disputed
        if self.alone:
            more["alone"] = True
        return json.dumps({"host": self.host, "lineage": self.lineage, **more}, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Register:
        """ValueError, KeyError or TypeError for what `to_text` has not written."""
        found = json.loads(text)
        disputed = found.get("disputed")
        if not (disputed is None or isinstance(disputed, str)):
            raise ValueError("disputed cannot be read")
        kept, alone = found.get("kept") is True, found.get("alone") is True
        return cls(str(found["host"]), dict(found["lineage"]), kept, read_known(found), disputed, alone)


class Pacemaker:
    """The cluster, as one resource knows it. Where there is none (ocf-tester), nothing is told and nothing known."""

    def __init__(self, told: Told) -> None:
        self._told = told
        self._name = f"nbdkit-replication-owner-{told.resource}"

    def publish(self, score: int | None) -> None:
        """How good an owner this host would be; None: none at all, whatever a person prefers (a host without a score is
        promoted by a preference for it, which `crm resource move` leaves behind). ClusterError."""
        if not self._told.clustered:
            return
        self._run("crm_attribute", "--promotion", f"--update={'-INFINITY' if score is None else score}")

    def forget(self) -> None:
        """The resource does not run here. ClusterError."""
        if self._told.clustered:
            self._run("crm_attribute", "--promotion", "--delete")

    def register(self) -> Register | None:
        """The last owner, None if there was none yet. ClusterError if that cannot be known."""
        if not self._told.clustered:
            return None
        text = self._run("crm_attribute", *self._where, "--query", "--quiet", "--default", "").strip()
        if not text:
            return None
        try:
            return Register.from_text(text)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ClusterError(f"the cluster's property {self._name} is not what the agent has written") from error

    def enter(self, register: Register) -> None:
        """This is the owner from now on. ClusterError."""
        if not self._told.clustered:
            return
        self._run("crm_attribute", *self._where, "--update", register.to_text())

    @property
    def _where(self) -> tuple[str, ...]:
        return "--type", "crm_config", "--set-name", _SET, "--name", self._name

    def _run(self, *command: str) -> str:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=max(0.1, min(_TOOL_S, self._told.left_s)),
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ClusterError(f"{command[0]}: {error}") from error
        if done.returncode != 0:
            why = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise ClusterError(f"{command[0]}: {why[0]}")
        return done.stdout
