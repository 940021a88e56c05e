# SPDX-License-Identifier: BSD-3-Clause
"""The agent of Pacemaker with real nodes and without a cluster: what it tells the cluster is written down.

`make test-cluster` has the real Pacemaker.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkout import REPOSITORY
from content import MIB, make_raw
from qmp import Qmp
from services import folders
from waiting import DEADLINE_S

AGENT = REPOSITORY / "scripts/ocf/replication"
NODE = "vm1"

# What of crm_attribute the agent uses: a score of this host, and the register of all.
CRM_ATTRIBUTE = """\
#!/bin/sh
echo "$*" >>"$HOST_FOLDER/told"
for last; do :; done
case "$*" in
    *--promotion*--delete*) rm -f "$HOST_FOLDER/score" ;;
    *--promotion*--update*) echo "${last#--update=}" >"$HOST_FOLDER/score" ;;
    *crm_config*--query*) cat "$CLUSTER_FOLDER/register" 2>/dev/null || true ;;
    *crm_config*--update*) printf %s "$last" >"$CLUSTER_FOLDER/register" ;;
    *) exit 64 ;;
esac
"""

FILE = """\
role = "auto"
peer = "nbd+unix:///disk0?socket={peer}"
autostart = true
checkpoint-interval = 0.2
timeout = 30

[disk.disk0]
disk = "{disk}"
top-id = "guest"
"""


class ClusterHost:
    """One host of two, with a node and its agent. `folder` is the host's, `cluster` what both share."""

    def __init__(self, folder: Path, cluster: Path, peer: Path) -> None:
        self.folder = folder
        self._cluster = cluster
        for below in ("etc", "run/crm", "bin"):
            (folder / below).mkdir(parents=True)
        self.disk = folder / "disk.raw"
        make_raw(self.disk, MIB)
        (folder / f"etc/{NODE}.toml").write_text(FILE.format(peer=peer / f"run/{NODE}/guest.sock", disk=self.disk))
        tool = folder / "bin/crm_attribute"
        tool.write_text(CRM_ATTRIBUTE)
        tool.chmod(0o755)
        self.control = folder / f"run/{NODE}/control.sock"
        self.guest_uri = f"nbd+unix:///guest?socket={folder}/run/{NODE}/guest.sock"

    def act(self, action: str, *, timeout_s: float = DEADLINE_S, **told: str) -> tuple[int, str]:
        """One action: its exit code and stderr. `told` is what the cluster says: `notify_stop_uname` and the like, or a
        parameter, with a capital letter at its head."""
        environment: dict[str, str] = {
            **os.environ,
            **folders(self.folder),
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "HOST_FOLDER": str(self.folder),
            "CLUSTER_FOLDER": str(self._cluster),
            "HA_RSCTMP": str(self.folder / "run/crm"),
            "OCF_RESOURCE_INSTANCE": "disk:0",
            "OCF_RESKEY_crm_feature_set": "3.16.1",
            "OCF_RESKEY_node": NODE,
            "OCF_RESKEY_service": "process",
            "OCF_RESKEY_log": str(self.folder / "node.log"),
            "OCF_RESKEY_CRM_meta_on_node": self.folder.name,
            "OCF_RESKEY_CRM_meta_timeout": str(int(timeout_s * 1000)),
            "OCF_RESKEY_CRM_meta_interval": "10000" if action == "monitor" else "0",
        }
        for name, value in told.items():
            meta = not name[0].isupper()
            environment[f"OCF_RESKEY_CRM_meta_{name}" if meta else f"OCF_RESKEY_{name.lower()}"] = value
        done = subprocess.run(
            [AGENT, action],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment,
            timeout=2 * DEADLINE_S,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stderr

    def does(self, action: str, **told: str) -> None:
        """It succeeds."""
        code, said = self.act(action, **told)
        assert code == 0, (action, code, said)

    @property
    def register(self) -> Path:
        """What the cluster keeps of the last owner."""
        return self._cluster / "register"

    def impatient(self) -> None:
        """From its next start on the node takes a peer that stands still for lost after a few seconds. In other tests
        none does, and a busy machine is no reason to lose a link."""
        path = self.folder / f"etc/{NODE}.toml"
        path.write_text(path.read_text().replace("timeout = 30", "timeout = 3"))

    def cut_off(self) -> None:
        """From its next start on the node does not reach the other one."""
        path = self.folder / f"etc/{NODE}.toml"
        path.write_text(path.read_text().replace("guest.sock", "nobody.sock"))

    @property
    def score(self) -> int | None:
        """What the cluster knows; None: it is not promoted without one, or never."""
        path = self.folder / "score"
        text = path.read_text().strip() if path.exists() else "-INFINITY"
        return None if text == "-INFINITY" else int(text)

    def qmp(self, command: str, arguments: Mapping[str, Any] | None = None, /, **more: Any) -> Any:
        """One command to the node."""
        with Qmp(self.control) as qmp:
            return qmp.execute(command, arguments, **more)

    @property
    def role(self) -> str:
        return str(self.qmp("query-role")["role"])

    @property
    def link(self) -> str:
        return str(self.qmp("query-replication")["link"]["state"])

    @property
    def pid(self) -> int:
        """Of the node."""
        return int((self.folder / f"run/crm/nbdkit-replication-{NODE}.pid").read_text().split()[0])

    def kill(self) -> None:
        """The node is gone without a word."""
        os.kill(self.pid, signal.SIGKILL)

    def boot(self) -> None:
        """What a host forgets when it is off."""
        (self.folder / f"run/crm/nbdkit-replication-{NODE}.promoted").unlink(missing_ok=True)
        (self.folder / "score").unlink(missing_ok=True)


def two_hosts(folder: Path) -> tuple[ClusterHost, ClusterHost]:
    """Hosts `a` and `b`, on which nothing runs."""
    cluster = folder / "cluster"
    cluster.mkdir()
    a, b = folder / "a", folder / "b"
    return ClusterHost(a, cluster, b), ClusterHost(b, cluster, a)
