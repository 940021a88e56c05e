# SPDX-License-Identifier: BSD-3-Clause
"""The agent of Pacemaker, action by action, with real nodes on two hosts; the cluster is the test."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

from clusteragent import AGENT, ClusterHost, two_hosts
from qmp import QmpError
from replication.cluster.codes import Code
from waiting import DEADLINE_S, wait_until

BOTH = {"notify_active_uname": "a b", "notify_stop_uname": " "}
Hosts = tuple[ClusterHost, ClusterHost]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Nothing runs yet; all is stopped in the end."""
    folder = Path(tempfile.mkdtemp(prefix="rc-"))
    found = two_hosts(folder)
    yield found
    for host in found:
        host.act("stop")
    shutil.rmtree(folder)


def write(host: ClusterHost, text: bytes) -> None:
    """As the guest there."""
    guest = nbd.NBD()
    guest.connect_uri(host.guest_uri)
    guest.pwrite(text.ljust(512, b"."), 0)
    guest.shutdown()


def read(host: ClusterHost, length: int) -> bytes:
    guest = nbd.NBD()
    guest.connect_uri(host.guest_uri)
    found = bytes(guest.pread(512, 0))[:length]
    guest.shutdown()
    return found


def checkpointed(owner: ClusterHost) -> None:
    """Everything until now is in a checkpoint."""

    def taken() -> bool:
        try:
            owner.qmp("replication-checkpoint")
        except QmpError:
            return False  # the machine was too busy for the link, which comes back
        return True

    wait_until(lambda: owner.link == "in-sync" and taken(), "in sync, with a checkpoint of that")


def scored(host: ClusterHost, score: int) -> None:
    """It is so good a candidate, if not since its start, which waits some seconds for a peer, then since a monitor."""

    def known() -> bool:
        if host.score != score:
            host.does("monitor")
        return host.score == score

    wait_until(known, f"{host.folder.name} has the score {score}")


def paired(a: ClusterHost, b: ClusterHost) -> None:
    """Both run, a person has made `a` the owner, and the cluster has promoted it."""
    for host in (a, b):
        assert host.act("monitor")[0] == Code.NOT_RUNNING
        host.does("start")
        assert host.score is None, "a new node is no candidate"
    a.qmp("replication-set-role", role="primary")
    a.does("monitor")
    assert a.score == 10000
    a.does("promote", **BOTH)
    checkpointed(a)
    b.does("monitor")
    assert (a.act("monitor")[0], b.act("monitor")[0], b.score) == (Code.PROMOTED, Code.OK, 1000)


def test_a_move_loses_nothing_and_is_repeated_without_harm(hosts: Hosts) -> None:
    a, b = hosts
    paired(a, b)
    write(a, b"last")
    for _ in range(2):
        a.does("demote", **BOTH, notify_promote_uname="b")
    assert (a.role, a.score) == ("secondary", None)
    assert a.act("promote", **BOTH)[0] == Code.GENERIC, "another one is to go on"
    for _ in range(2):
        b.does("promote", **BOTH)
    assert (b.role, b.score, read(b, 4)) == ("primary", 10000, b"last")
    checkpointed(b)
    a.does("monitor")
    assert a.score == 1000, "it is a candidate again"


def test_an_owner_that_only_stops_is_the_best_candidate_when_it_comes_back(hosts: Hosts) -> None:
    a, b = hosts
    paired(a, b)
    a.does("demote", notify_active_uname="a b", notify_stop_uname="a b")
    assert a.role == "primary", "nobody is to go on"
    for host in (a, b):
        host.does("stop")
        assert (host.act("monitor")[0], host.score) == (Code.NOT_RUNNING, None)
    b.does("start")
    a.does("start")
    scored(a, 10000)
    assert b.score == 1000
    a.does("promote", **BOTH)


def test_a_failover_and_the_old_owner_that_comes_back(hosts: Hosts) -> None:
    a, b = hosts
    paired(a, b)
    write(a, b"safe")
    checkpointed(a)
    a.kill()
    wait_until(lambda: a.act("monitor")[0] == Code.NOT_RUNNING, "gone")
    b.does("promote", notify_active_uname="a b", notify_stop_uname="a")
    assert (read(b, 4), b.act("monitor")[0]) == (b"safe", Code.PROMOTED)
    write(b, b"more")
    a.boot()
    a.does("start")
    assert (a.role, a.score) == ("secondary", None)
    checkpointed(b)
    a.does("notify", notify_type="post", notify_operation="promote")
    assert a.score == 1000


def test_an_owner_from_which_another_went_on_is_no_candidate_though_it_reaches_nobody(hosts: Hosts) -> None:
    """Both lost power after a failover. The cluster's register tells the stale one."""
    a, b = hosts
    paired(a, b)
    checkpointed(a)
    a.kill()
    b.does("promote", notify_active_uname="b")
    write(b, b"newer")
    b.kill()
    for host in hosts:
        host.boot()
    a.does("start")
    assert (a.role, a.score) == ("secondary", None)
    code, said = a.act("promote", notify_active_uname="a")
    assert code == Code.GENERIC
    assert "ocf-exit-reason:promotion is refused: " in said
    b.does("start")
    assert b.score == 10000
    b.does("promote", **BOTH)
    assert read(b, 5) == b"newer"


def test_split_brain_stays_down_and_says_so(hosts: Hosts) -> None:
    """Both have gone on: a person decides."""
    a, b = hosts
    paired(a, b)
    b.kill()
    wait_until(lambda: a.link == "lost", "lost")
    write(a, b"alone")
    a.kill()
    b.boot()
    b.does("start")
    assert b.score == 1000, "nobody has told the cluster yet that a went on"
    b.does("promote", notify_active_uname="b")
    a.boot()
    a.does("start")
    code, said = a.act("monitor")
    assert (code, a.score, a.role) == (Code.DEGRADED, None, "secondary")
    assert "split brain" in said
    assert "replctl discard" in said
    a.qmp("replication-discard")
    checkpointed(b)
    assert (a.act("monitor")[0], a.score) == (Code.OK, 1000)


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "that meet"])
def test_a_register_that_does_not_know_the_last_promotion_judges_nobody(hosts: Hosts, apart: bool) -> None:
    """A part of the cluster that was cut off has entered its own owner, and its configuration is what survives."""
    a, b = hosts
    paired(a, b)
    b.kill()
    wait_until(lambda: a.link == "lost", "lost")
    before = a.register.read_text()
    write(a, b"alone")
    assert a.act("monitor")[0] == Code.PROMOTED
    of_a = a.register.read_text()
    a.kill()
    a.register.write_text(before)
    b.boot()
    b.does("start")
    b.does("promote", notify_active_uname="b")
    write(b, b"newer")
    a.register.write_text(of_a)
    assert b.act("monitor")[0] == Code.PROMOTED, "it was promoted after that one"
    register = json.loads(a.register.read_text())
    assert (register["host"], register["serial"]) == ("b", json.loads(of_a)["serial"] + 1)

    # All power is lost, and the entry of `a` is there again.
    b.kill()
    a.register.write_text(of_a)
    for host in hosts:
        host.boot()
        if apart:
            host.cut_off()
        host.does("start", notify_active_uname=" ", notify_start_uname="a b")
    for host in hosts:
        code, said = host.act("monitor")
        assert (code, host.score) == (Code.DEGRADED, None), said
        assert "split brain" in said
        assert "replctl demote" in said
        assert host.act("promote", **BOTH)[0] == Code.GENERIC
    if not apart:
        return  # what they tell each other decides nothing
    assert (a.role, b.role) == ("primary", "primary")

    # A person says that what `b` has counts.
    a.qmp("replication-set-role", role="secondary")
    assert a.act("monitor")[0] == Code.OK
    b.does("monitor")
    assert b.score == 10000
    b.does("promote", **BOTH)
    assert (read(b, 5), a.score) == (b"newer", None)


def test_a_copy_is_no_candidate_once_the_cluster_knows_that_its_owner_went_on(hosts: Hosts) -> None:
    a, b = hosts
    paired(a, b)
    b.kill()
    wait_until(lambda: a.link == "lost", "lost")
    write(a, b"alone")
    assert a.act("monitor")[0] == Code.PROMOTED
    a.kill()
    b.boot()
    b.does("start")
    assert b.score is None
    assert "went on from what is here" in b.act("promote", notify_active_uname="b")[1]
    a.boot()
    a.does("start")
    assert a.score == 10000


def test_a_failover_is_refused_while_the_owner_lives(hosts: Hosts) -> None:
    """A move by force, with the link cut: the owner has stopped its guest, and has more than what is here."""
    a, b = hosts
    a.impatient()
    paired(a, b)
    os.kill(a.pid, signal.SIGSTOP)
    wait_until(lambda: b.link == "lost", "lost")
    code, said = b.act("promote", **BOTH)
    os.kill(a.pid, signal.SIGCONT)
    assert (code, b.role) == (Code.GENERIC, "secondary")
    assert "a still has the disks" in said


def test_an_owner_that_is_stopped_with_its_link_lost_is_not_given_up(hosts: Hosts) -> None:
    """`crm node standby` a moment after the pair's network was cut: what was written since counts."""
    a, b = hosts
    a.impatient()
    paired(a, b)
    promoted = {"notify_active_uname": "a b", "notify_stop_uname": "a", "notify_promote_uname": "b"}
    os.kill(b.pid, signal.SIGSTOP)
    wait_until(lambda: a.link == "lost", "lost")
    write(a, b"alone")
    a.does("demote", **promoted)
    a.does("stop")
    os.kill(b.pid, signal.SIGCONT)
    code, said = b.act("promote", **promoted)
    assert (code, b.role) == (Code.GENERIC, "secondary"), said
    a.does("start")
    a.does("promote", **BOTH)
    assert read(a, 5) == b"alone"


def test_an_old_checkpoint_is_not_promoted(hosts: Hosts) -> None:
    a, b = hosts
    paired(a, b)
    a.kill()
    wait_until(lambda: b.qmp("query-replication")["checkpoint"]["age"] > 1, "an old one")
    b.does("monitor", Max_Age="1")
    assert b.score is None
    code, said = b.act("promote", notify_active_uname="b", Max_Age="1")
    assert (code, b.role) == (Code.GENERIC, "secondary")
    assert "must not be older than 1 s" in said
    b.does("promote", notify_active_uname="b", Max_Age="0")


def test_a_node_that_hangs_is_a_failure_in_time(hosts: Hosts) -> None:
    a, b = hosts
    paired(a, b)
    for host, code in ((a, Code.FAILED_PROMOTED), (b, Code.GENERIC)):
        os.kill(host.pid, signal.SIGSTOP)
        began = time.monotonic()
        assert host.act("monitor", timeout_s=3.0)[0] == code
        # The agent's own time, and a busy machine's.
        assert time.monotonic() - began < DEADLINE_S
    os.kill(b.pid, signal.SIGCONT)
    pid = a.pid
    a.does("stop")
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()


def test_somebodys_hand(hosts: Hosts) -> None:
    """A person makes the promoted node a secondary: the cluster learns of it."""
    a, b = hosts
    paired(a, b)
    a.qmp("replication-set-role", role="secondary")
    assert a.act("monitor")[0] == Code.FAILED_PROMOTED
    a.does("demote", **BOTH)
    assert a.act("monitor")[0] == Code.OK


def test_a_guest_face_that_is_closed_is_opened_by_the_promotion_alone(hosts: Hosts) -> None:
    """And by the monitor, when the node was started again without the cluster, as systemd does it."""
    a, b = hosts
    for host in hosts:
        path = host.folder / "etc/vm1.toml"
        path.write_text(f'guest-face = "closed-until-promoted"\n{path.read_text()}')
    paired(a, b)
    write(a, b"open")
    for restart in ("by the cluster", "by itself"):
        if restart == "by itself":
            a.kill()
            wait_until(lambda: a.act("monitor")[0] == Code.NOT_RUNNING, "gone")
            marked = a.folder / "run/crm/nbdkit-replication-vm1.promoted"
            a.does("start")
            marked.touch()
            assert a.act("monitor")[0] == Code.PROMOTED
        else:
            a.does("demote", notify_active_uname="a b", notify_stop_uname="a")
            a.does("stop")
            a.does("start")
            scored(a, 10000)
            with pytest.raises(nbd.Error):
                read(a, 4)
            a.does("promote", **BOTH)
        assert read(a, 4) == b"open", restart


def test_a_guest_that_waits_for_fencing_goes_on_when_the_other_host_is_gone(hosts: Hosts) -> None:
    a, b = hosts
    path = a.folder / "etc/vm1.toml"
    path.write_text(f'fencing = "suspend-io"\n{path.read_text()}')
    paired(a, b)
    b.kill()
    wait_until(lambda: a.qmp("query-role").get("code") == "suspended", "its guest stands still")
    event = {"notify_type": "post", "notify_operation": "stop"}
    a.does("notify", **event, notify_active_uname="a b", notify_stop_uname=" ")
    assert a.act("monitor")[0] == Code.PROMOTED
    assert a.qmp("query-role")["code"] == "suspended", "the other one is there"
    a.does("notify", **event, notify_active_uname="a b", notify_stop_uname="b")
    assert a.qmp("query-role")["may-run"]
    write(a, b"goes on")


def test_nobody_is_promoted_by_a_cluster_that_cannot_be_asked(hosts: Hosts) -> None:
    a, b = hosts
    paired(a, b)
    a.kill()
    (b.folder / "bin/crm_attribute").write_text("#!/bin/sh\necho no cluster >&2\nexit 102\n")
    code, said = b.act("promote", notify_active_uname="b")
    assert (code, b.role) == (Code.GENERIC, "secondary")
    assert "who owned the disks last cannot be known" in said


def test_a_file_that_is_wrong(hosts: Hosts) -> None:
    a, _ = hosts
    path = a.folder / "etc/vm1.toml"
    a.does("validate-all")
    text = path.read_text()
    path.write_text(text.replace('role = "auto"', 'mode = "secondary"'))
    code, said = a.act("validate-all")
    assert (code, 'role = "auto"' in said) == (Code.CONFIGURED, True)
    code, said = a.act("start")
    assert (code, 'role = "auto"' in said) == (Code.INSTALLED, True)
    path.write_text("\n".join(line for line in text.splitlines() if not line.startswith("peer")))
    for action, code in (("validate-all", Code.CONFIGURED), ("start", Code.INSTALLED)):
        found, said = a.act(action)
        assert (found, "peer is missing" in said) == (code, True)
    assert a.act("monitor")[0] == Code.NOT_RUNNING
    path.write_text(text.replace("checkpoint-interval", "checkpoint-inteval"))
    assert a.act("validate-all")[0] == Code.CONFIGURED
    code, said = a.act("start")
    assert (code, "node.log" in said) == (Code.INSTALLED, True)
    path.unlink()
    for action in ("validate-all", "start", "monitor"):
        assert a.act(action)[0] == Code.INSTALLED
    a.does("stop")
    assert a.act("validate-all", Max_Age="soon")[0] == Code.CONFIGURED
    assert a.act("dance")[0] == Code.UNIMPLEMENTED


def test_metadata_are_valid(tmp_path: Path) -> None:
    done = subprocess.run([AGENT, "meta-data"], capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    (tmp_path / "x.xml").write_text(done.stdout)
    (tmp_path / "ra-api-1.dtd").write_text(DTD)
    lint = subprocess.run(
        ["xmllint", "--noout", "--valid", "x.xml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (lint.returncode, lint.stderr) == (0, "")
    for action in ("reload-agent", "promote", "demote", "notify", "validate-all"):
        assert f'<action name="{action}"' in done.stdout


# The part of resource-agents' DTD that says which elements there are.
DTD = """\
<!ELEMENT resource-agent (version,longdesc,shortdesc,parameters?,actions) >
<!ATTLIST resource-agent name CDATA #REQUIRED version CDATA #IMPLIED>
<!ELEMENT version (#PCDATA)>
<!ELEMENT parameters (parameter*)>
<!ELEMENT actions (action*)>
<!ELEMENT parameter (longdesc+,shortdesc+,content)>
<!ATTLIST parameter name CDATA #REQUIRED required (1|0) "0" unique (1|0) "0">
<!ELEMENT longdesc ANY>
<!ATTLIST longdesc lang NMTOKEN #IMPLIED>
<!ELEMENT shortdesc ANY>
<!ATTLIST shortdesc lang NMTOKEN #IMPLIED>
<!ELEMENT content EMPTY>
<!ATTLIST content type (string|integer|boolean|time) #REQUIRED default CDATA #IMPLIED>
<!ELEMENT action EMPTY>
<!ATTLIST action name (start|stop|monitor|promote|demote|notify|meta-data|validate-all) #REQUIRED
    timeout CDATA #REQUIRED interval CDATA #IMPLIED role CDATA #IMPLIED depth CDATA #IMPLIED>
"""
