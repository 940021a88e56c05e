# SPDX-License-Identifier: BSD-3-Clause
"""The actions against a node that is played, so that it can be in any state and fail at any step; the nodes of
tests/e2e/test_cluster_agent.py are real."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Self

import pytest

from replication.client.qmp import Refused
from replication.client.session import NotRunning, Unanswered, Unusable
from replication.cluster import asking
from replication.cluster.agent import Agent
from replication.cluster.codes import Code, Failed
from replication.cluster.pacemaker import ClusterError, Pacemaker
from replication.cluster.serials import Known, read_known
from replication.cluster.told import read

G1 = {"current": "g1", "ancestors": []}
G2 = {"current": "g2", "ancestors": ["g1"]}


class Node:
    """What it answers, and what it was asked to do."""

    def __init__(self) -> None:
        self.runs = True
        self.role: dict[str, Any] = {"role": "primary", "score": 10000, "may-run": True, "reason": ""}
        self.status: dict[str, Any] = {
            "mode": "primary",
            "stage": "running",
            "link": {"state": "in-sync"},
            "checkpoint": {"age": 1.0},
            "lineage": G1,
        }
        self.relation = "same"
        self.lossless = False
        self.fails: dict[str, Exception] = {}
        self.done: list[tuple[str, dict[str, Any]]] = []

    def is_copy(self, age_s: float = 1.0) -> None:
        self.role = {"role": "secondary", "score": 900, "may-run": False, "code": "is-secondary", "reason": "it is one"}
        self.status = {**self.status, "mode": "secondary", "checkpoint": {"age": age_s}, "link": {"state": "lost"}}

    def call(self, command: str, **arguments: Any) -> Any:
        if command in self.fails:
            raise self.fails[command]
        if command == "query-role":
            return self.role
        if command == "query-replication":
            return self.status
        if command == "query-failover":
            return {"lossless": self.lossless}
        if command == "replication-compare":
            return {"relation": self.relation}
        self.done.append((command, arguments))
        if command == "replication-set-role" and arguments["role"] == "secondary":
            self.is_copy()
        if command == "replication-stop":
            self.role = {"role": "primary", "score": 10000, "may-run": True, "reason": ""}
        return None


class Runner:
    """Of the node's process."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def start(self) -> None:
        self._node.runs = True

    def check(self) -> None:
        pass

    def alive(self) -> bool:
        return self._node.runs

    def stop(self) -> bool:
        self._node.runs = False
        return True

    def reload(self) -> None:
        pass


class Cluster(Pacemaker):
    """Pacemaker's tool, and what it holds; none of it is run."""

    register_text = ""
    score: str | None = None
    fails = False
    refuses = False
    """It says what is in the register, and takes nothing."""

    def _run(self, *command: str) -> str:
        if self.fails:
            raise ClusterError("no cluster")
        kind = type(self)
        if "--promotion" in command:
            kind.score = None if "--delete" in command else command[-1].removeprefix("--update=")
        elif "--query" in command:
            return kind.register_text
        elif self.refuses:
            raise ClusterError("no quorum")
        else:
            kind.register_text = command[-1]
        return ""


class Host:
    """`a`, its node, and its agent."""

    def __init__(self, folder: Path) -> None:
        self.node = Node()
        self.folder = folder
        self.cluster: type[Cluster] = type("Cluster", (Cluster,), {})
        self.deadline = 0.0
        self.until: set[float] = set()
        """When the conversations with the node end."""

    def registered(self, host: str, lineage: dict[str, Any], **more: Any) -> None:
        self.cluster.register_text = json.dumps({"host": host, "lineage": lineage, **more})

    @property
    def register(self) -> dict[str, Any]:
        """Without what tells promotions apart."""
        found: dict[str, Any] = json.loads(self.cluster.register_text)
        return {name: value for name, value in found.items() if name not in ("serial", "id", "past")}

    @property
    def promotion(self) -> Known:
        """Of the register."""
        return read_known(json.loads(self.cluster.register_text))

    @property
    def serial(self) -> int:
        """Its number."""
        return self.promotion.serial

    @property
    def kept(self) -> Path:
        """The host's own file."""
        return self.folder / "state-cluster/vm1.json"

    def knows(self, **promotion: Any) -> None:
        """What is in it."""
        self.kept.parent.mkdir(exist_ok=True)
        self.kept.write_text(json.dumps({"disk": promotion}))

    def act(self, action: str, **told: str) -> int:
        environment = {
            "OCF_RESOURCE_INSTANCE": "disk:0",
            "OCF_RESKEY_crm_feature_set": "3.16.1",
            "OCF_RESKEY_node": "vm1",
            "HA_RSCTMP": str(self.folder),
            "OCF_RESKEY_CRM_meta_on_node": "a",
            "OCF_RESKEY_CRM_meta_interval": "10000" if action == "monitor" else "0",
        }
        for name, value in told.items():
            meta = not name[0].isupper()
            environment[f"OCF_RESKEY_CRM_meta_{name}" if meta else f"OCF_RESKEY_{name.lower()}"] = value
        found = read(environment)
        self.deadline = found.deadline
        self.until.clear()
        try:
            return Agent(found, self.cluster(found), Runner(self.node)).actions[action]()
        except Failed as error:
            return error.code

    def marked(self) -> Path:
        path = self.folder / "nbdkit-replication-vm1.promoted"
        path.touch()
        return path


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    found = Host(tmp_path)
    monkeypatch.setenv("NBDKIT_REPLICATION_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("NBDKIT_REPLICATION_CONFIG_DIR", str(tmp_path / "etc"))

    class Session:
        def __init__(self, _path: str, _timeout_s: float, until: float = math.inf) -> None:
            found.until.add(until)
            if not found.node.runs:
                raise NotRunning("nobody listens")

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_exception: object) -> None:
            pass

        def again(self, _timeout_s: float) -> Self:
            return self

        def call(self, command: str, **arguments: Any) -> Any:
            return found.node.call(command, **arguments)

    monkeypatch.setattr(asking, "Session", Session)
    monkeypatch.setattr(asking.nodes, "control_of", str)
    return found


BOTH = {"notify_active_uname": "a b", "notify_stop_uname": " "}
ALONE = {"notify_active_uname": "a b", "notify_stop_uname": "b"}


@pytest.mark.parametrize("wrong", [{"Max_Age": "1m"}, {"Max_Age": "1.5"}, {"Service": "upstart"}])
def test_a_parameter_that_is_wrong_fails_nothing_that_would_end_in_fencing(host: Host, wrong: dict[str, str]) -> None:
    host.marked()
    assert host.act("monitor", **wrong) == Code.PROMOTED
    for action in ("demote", "notify", "reload-agent"):
        assert host.act(action, **BOTH, **wrong) == Code.OK
    assert host.act("monitor", **wrong) == Code.DEGRADED, "somebody has to look at it"
    assert host.act("stop", **wrong) == Code.OK
    assert not host.node.runs
    assert host.act("monitor", **wrong) == Code.NOT_RUNNING
    assert host.act("validate-all", **wrong) == Code.CONFIGURED


def test_a_name_that_is_none_stops_nothing(host: Host) -> None:
    for name in ("*", ""):
        assert host.act("stop", Node=name) == Code.OK
        assert host.node.runs
        assert host.act("start", Node=name) == Code.CONFIGURED


def test_with_an_age_that_is_wrong_a_copy_goes_on_only_without_loss(host: Host) -> None:
    host.node.is_copy()
    host.registered("b", G1)
    assert host.act("promote", **ALONE, Max_Age="1m") == Code.GENERIC
    assert host.node.done == []
    host.node.lossless = True
    assert host.act("promote", **ALONE, Max_Age="1m") == Code.OK
    assert ("replication-stop", {"failover": True, "lossless": True}) in host.node.done


def test_a_copy_that_has_everything_is_promoted_whatever_its_age(host: Host) -> None:
    host.node.is_copy(age_s=3600.0)
    host.registered("b", G1)
    host.act("monitor")
    assert host.act("promote", **BOTH) == Code.GENERIC
    host.node.lossless = True
    host.act("monitor")
    assert host.cluster.score == "1000"
    assert host.act("promote", **BOTH) == Code.OK


@pytest.mark.parametrize("link", ["synchronizing", "in-sync"])
def test_a_copy_is_no_candidate_before_the_first_owner_was_promoted(host: Host, link: str) -> None:
    """Else it may be promoted before the owner, which a person has made, has said what it is."""
    host.node.is_copy()
    host.node.status["link"] = {"state": link}
    host.act("monitor")
    assert host.cluster.score == "-INFINITY"
    host.registered("b", G1)
    host.act("monitor")
    assert host.cluster.score == "1000"


def test_without_notify_nobody_is_known_to_be_gone(host: Host) -> None:
    host.node.is_copy()
    host.registered("b", G1)
    assert host.act("promote") == Code.GENERIC
    assert host.node.done == []
    assert host.act("promote", **ALONE) == Code.OK


def test_a_hand_over_that_is_not_answered_in_time_is_no_success(host: Host) -> None:
    host.node.fails["replication-set-role"] = Unanswered("late")
    assert host.act("demote", **BOTH, notify_promote_uname="b") == Code.GENERIC
    host.node.fails["replication-set-role"] = Refused("no")
    assert host.act("demote", **BOTH, notify_promote_uname="b") == Code.OK


def test_an_owner_hands_over_only_without_loss(host: Host) -> None:
    """The link may be lost between the look at it and the hand-over."""
    assert host.act("demote", **BOTH, notify_promote_uname="b") == Code.OK
    assert host.node.done == [("replication-set-role", {"role": "secondary", "lossless": True})]


@pytest.mark.parametrize("error", [Unanswered("late"), Refused("no")])
def test_an_owner_that_cannot_give_way_yet_is_no_failure(host: Host, error: Exception) -> None:
    host.node.status["outdated-reason"] = {"reason": "b went on"}
    host.node.fails["replication-set-role"] = error
    assert host.act("monitor") == Code.OK
    assert host.cluster.score == "-INFINITY"


def test_a_host_that_must_not_be_promoted_says_never_and_one_where_it_does_not_run_nothing(host: Host) -> None:
    """A preference that `crm resource move` has left would win over a score that is only missing."""
    host.node.is_copy(age_s=3600.0)
    host.act("monitor")
    assert host.cluster.score == "-INFINITY"
    host.node.runs = False
    assert host.act("monitor") == Code.NOT_RUNNING
    assert host.cluster.score is None
    host.cluster.score = "1000"
    assert host.act("stop") == Code.OK
    assert host.cluster.score is None


def test_what_a_stop_keeps_is_not_given_up_by_the_next_promotion(host: Host) -> None:
    host.registered("a", G1)
    host.node.status["lineage"] = G2
    host.node.status["link"] = {"state": "lost"}
    host.marked()
    stopped = {"notify_active_uname": "a b", "notify_stop_uname": "a", "notify_promote_uname": "b"}
    assert host.act("demote", **stopped) == Code.OK
    assert host.register == {"host": "a", "lineage": G2}, "demoted"
    assert host.act("stop", **stopped) == Code.OK
    assert host.register == {"host": "a", "lineage": G2, "kept": True}
    host.act("start")
    host.act("monitor")
    assert host.register["kept"], "it has not been promoted"
    assert host.act("promote", **BOTH) == Code.OK
    assert host.register == {"host": "a", "lineage": G2}
    host.registered("a", G2, kept=True)
    assert host.act("monitor") == Code.PROMOTED
    assert host.register == {"host": "a", "lineage": G2}, "it runs, so it can die"


def test_a_copy_is_not_promoted_in_place_of_an_owner_that_was_only_stopped(host: Host) -> None:
    host.node.is_copy()
    host.registered("b", G1, kept=True)
    assert host.act("promote", **ALONE) == Code.GENERIC
    assert host.node.done == []
    host.node.lossless = True
    assert host.act("promote", **ALONE) == Code.OK
    assert host.register == {"host": "a", "lineage": G1}


@pytest.mark.parametrize("why", ["died", "hangs", "is a copy", "another one was promoted", "is unfit"])
def test_a_stop_keeps_nothing_else(host: Host, why: str) -> None:
    host.registered("b" if why == "another one was promoted" else "a", G1)
    before = host.register
    if why == "died":
        host.node.runs = False
    elif why == "hangs":
        host.node.fails["query-role"] = Unanswered("late")
    elif why == "is a copy":
        host.node.is_copy()
    elif why == "is unfit":
        host.node.status["outdated-reason"] = {"reason": "b went on"}
    assert host.act("stop") == Code.OK
    assert host.register == before


def test_an_owner_that_is_demoted_does_not_write_over_the_one_that_was_promoted_since(host: Host) -> None:
    host.registered("b", G2)
    host.node.relation = "older"
    host.node.status["link"] = {"state": "lost"}
    assert host.act("demote", **BOTH) == Code.OK
    assert host.register["host"] == "b"


def test_a_demotion_waits_for_a_pair_that_is_about_to_be_in_sync(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.node.status["link"] = {"state": "synchronizing"}

    def synchronized(_seconds: float) -> None:
        host.node.status["link"] = {"state": "in-sync"}

    monkeypatch.setattr(asking.time, "sleep", synchronized)
    assert host.act("demote", **BOTH, notify_promote_uname="b") == Code.OK
    assert host.node.role["role"] == "secondary"


def test_an_owner_that_was_passed_over_is_not_promoted_before_it_has_met_the_other(host: Host) -> None:
    host.registered("b", G1)
    host.node.role = {"role": "primary", "score": 5000, "may-run": None, "reason": ""}
    host.act("monitor")
    assert host.cluster.score == "-INFINITY"
    assert host.act("promote", **ALONE) == Code.GENERIC
    host.registered("a", G1)
    assert host.act("promote", **ALONE) == Code.OK


def test_a_guest_that_stands_still_later_goes_on_with_a_monitor_if_the_other_node_is_gone(host: Host) -> None:
    """The word that it is gone is said once: the loss of the link may be noticed later, and the node start again."""
    held = {"role": "primary", "score": 10000, "may-run": False, "code": "suspended", "reason": "no link"}
    free, resumed = host.node.role, ("replication-resume-io", {"fenced": True})
    event = {"notify_type": "post", "notify_operation": "stop"}
    host.registered("a", G1)
    host.act("promote", **BOTH)
    host.node.role = held
    assert host.act("monitor") == Code.PROMOTED
    assert resumed not in host.node.done, "the other one is there"
    host.node.role = free
    host.act("notify", **event, **ALONE)
    assert host.node.done.count(resumed) == 1, "it may notice only later"
    host.node.done.clear()
    host.node.role = held
    host.node.fails["replication-resume-io"] = Refused("no")
    assert host.act("monitor") == Code.PROMOTED
    host.node.fails.clear()
    host.cluster.fails = True
    assert host.act("monitor") == Code.DEGRADED_PROMOTED
    assert resumed not in host.node.done, "a cluster that does not answer knows nothing"
    host.cluster.fails = False
    assert host.act("monitor") == Code.PROMOTED
    assert host.node.done.count(resumed) == 1
    host.act("notify", notify_type="pre", notify_operation="start", notify_active_uname="a", notify_start_uname="b")
    host.act("monitor")
    assert host.node.done.count(resumed) == 1, "the other one is coming back"
    host.act("notify", notify_type="pre", notify_operation="stop", **ALONE)
    host.act("monitor")
    assert host.node.done.count(resumed) == 1, "it is not gone yet"


def test_each_promotion_has_a_number_of_its_own(host: Host) -> None:
    host.act("promote", **BOTH)
    assert host.serial == 1
    host.registered("a", G1, serial=4)
    host.act("promote", **BOTH)
    assert host.serial == 5
    host.cluster.register_text = ""
    host.act("promote", **BOTH)
    assert host.serial == 6, "the state folder has it, too"
    host.registered("b", G1, serial=9)
    host.act("notify", notify_type="post", notify_operation="promote", **BOTH)
    assert host.serial == 9
    (host.folder / "nbdkit-replication-vm1.promoted").unlink()
    host.act("notify", notify_type="post", notify_operation="promote", **BOTH)
    host.cluster.register_text = ""
    host.act("promote", **BOTH)
    assert host.serial == 10, "what was seen counts"


def test_the_number_stays_while_the_lineage_moves(host: Host) -> None:
    host.act("promote", **BOTH)
    host.node.status["lineage"] = G2
    host.act("monitor")
    assert (host.register, host.serial) == ({"host": "a", "lineage": G2}, 1)
    host.act("stop")
    assert (host.register["kept"], host.serial) == (True, 1)


def test_a_file_that_cannot_be_used_keeps_nobody_from_being_promoted(host: Host) -> None:
    """As with a file system that is full: the guest goes on."""
    for text in ("", "{}", "[1]", '{"disk": {"serial": -1}}', '{"disk": 3}', '{"disk": {"id": "x"}}', "[" * 9999):
        host.knows()
        host.kept.write_text(text)
        assert host.act("promote", **BOTH) == Code.OK
        host.cluster.register_text = ""
    host.knows(serial=1 << 62)
    assert host.act("promote", **BOTH) == Code.OK
    assert host.serial == 1 << 62
    host.kept.unlink()
    host.kept.parent.rmdir()
    host.kept.parent.touch()
    assert host.act("promote", **BOTH) == Code.OK
    assert (host.folder / "nbdkit-replication-vm1.promoted").exists()


def test_the_file_is_never_followed_elsewhere(host: Host) -> None:
    host.knows()
    host.kept.unlink()
    victim = host.folder / "victim"
    victim.write_text("mine")
    for link in (host.kept, host.kept.with_suffix(".new")):
        link.symlink_to(victim)
    assert host.act("promote", **BOTH) == Code.OK
    assert victim.read_text() == "mine"
    assert not host.kept.is_symlink()
    host.kept.unlink()
    os.mkfifo(host.kept)
    assert host.act("promote", **BOTH) == Code.OK


A4, A5, B4, B5 = ("a" * 15 + "4", "a" * 15 + "5", "b" * 15 + "4", "b" * 15 + "5")
STARTS = {"notify_active_uname": "b", "notify_start_uname": "a", "notify_promoted_uname": " "}


def diverged(host: Host, own: dict[str, Any], register: dict[str, Any]) -> None:
    host.node.role = {"role": "primary", "score": 10000, "may-run": True, "reason": ""}
    host.node.status["lineage"], host.node.relation = G2, "diverged"
    host.node.done.clear()
    host.knows(**own)
    host.registered("b", G1, **register)


def test_a_promoted_node_enters_itself_over_a_promotion_that_was_before_its_own(host: Host) -> None:
    """Two parts of the cluster have met, and the configuration of the one that knew less has survived."""
    host.marked()
    own = {"serial": 2, "id": A5, "past": [B4]}
    diverged(host, own, {"serial": 9, "id": B4})
    assert host.act("monitor") == Code.PROMOTED
    assert (host.register, host.promotion) == ({"host": "a", "lineage": G2}, Known(2, A5, (B4,)))
    # Neither knew of the other: a person decides, and no guest is stopped for that.
    diverged(host, own, {"serial": 9, "id": B5, "past": [B4]})
    assert host.act("monitor") == Code.DEGRADED_PROMOTED
    assert host.act("monitor") == Code.DEGRADED_PROMOTED
    assert (host.register, host.promotion.id) == ({"host": "b", "lineage": G1, "disputed": "a"}, B5)
    # The other one has taken over from here.
    diverged(host, own, {"serial": 1, "id": B5, "past": [A5]})
    assert host.act("monitor") == Code.FAILED_PROMOTED


@pytest.mark.parametrize(
    ("own", "register"),
    [
        ({"serial": 5, "id": A5, "past": [B4]}, {"serial": 4, "id": B4}),
        ({"serial": 5, "id": A5, "past": [B4]}, {"serial": 5, "id": B5, "past": [B4]}),
        ({"serial": 5, "id": A5, "past": [B4]}, {"serial": 7, "id": B5, "past": [B4]}),
        (None, {"serial": 7, "id": B5, "past": [B4]}),
    ],
    ids=["the register's is before", "neither knew", "neither knew, and it counts more", "it cannot be read"],
)
def test_an_owner_that_the_register_does_not_know_of_does_not_give_way_and_nobody_is_promoted(
    host: Host, own: dict[str, Any] | None, register: dict[str, Any]
) -> None:
    diverged(host, own or {}, register)
    if own is None:
        host.kept.write_text("{")
    assert host.act("start", **STARTS) == Code.OK
    assert host.act("notify", notify_type="post", notify_operation="promote", **BOTH) == Code.OK
    assert (host.node.role["role"], host.node.done, host.cluster.score) == ("primary", [], "-INFINITY")
    assert host.register == {"host": "b", "lineage": G1, "disputed": "a"}
    assert host.act("monitor") == Code.DEGRADED
    assert host.act("promote", **ALONE) == Code.GENERIC
    # What the two tell each other decides nothing.
    host.node.status["outdated-reason"] = {"reason": "b went on", "code": "peer-promoted"}
    assert host.act("monitor") == Code.DEGRADED
    assert host.node.done == []
    # A person has demoted it.
    host.node.is_copy()
    host.node.status["outdated-reason"] = {"reason": "demoted", "code": "demoted"}
    assert host.act("monitor") == Code.DEGRADED, "split brain still"
    assert host.register == {"host": "b", "lineage": G1}


@pytest.mark.parametrize(
    "register", [{"serial": 6, "id": B5, "past": [A5]}, {"serial": 5, "id": A5}, {}], ids=["knew", "the same", "old"]
)
def test_one_from_which_the_registers_went_on_knowingly_gives_way(host: Host, register: dict[str, Any]) -> None:
    diverged(host, {"serial": 5, "id": A5, "past": [B4]}, register)
    assert host.act("start", **STARTS) == Code.OK
    assert host.node.role["role"] == "secondary"
    assert "disputed" not in host.register


def test_beside_one_that_runs_promoted_a_node_gives_way_whatever_it_was(host: Host) -> None:
    """Else the two owners would meet, and the guest that runs would be stopped."""
    own, register = {"serial": 5, "id": A5, "past": [B4]}, {"serial": 5, "id": B5, "past": [B4]}
    for lists in (
        {"notify_promoted_uname": "b"},
        {"notify_active_uname": "b", "notify_promote_uname": "b"},
        {},
    ):
        diverged(host, own, register)
        assert host.act("start", **lists) == Code.OK
        assert host.node.role["role"] == "secondary"
        assert "disputed" not in host.register


@pytest.mark.parametrize("trouble", ["fails", "refuses"])
def test_a_dispute_is_in_the_register_when_a_start_ends(
    host: Host, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """The cluster's tools fail for a moment, when everything starts at once."""
    diverged(host, {"serial": 5, "id": A5}, {"serial": 4, "id": B4})
    setattr(host.cluster, trouble, True)
    monkeypatch.setattr(asking.time, "sleep", lambda _seconds: setattr(host.cluster, trouble, False))
    assert host.act("start", **STARTS) == Code.OK
    assert host.register["disputed"] == "a"


def test_a_dispute_that_is_raised_during_a_promotion_ends_it(host: Host) -> None:
    host.registered("a", G1, serial=4, id=A4)
    former = host.node.call

    def call(command: str, **arguments: Any) -> Any:
        if command == "replication-set-role":
            host.registered("a", G1, serial=4, id=A4, disputed="b")
        return former(command, **arguments)

    host.node.call = call  # type: ignore[method-assign]
    assert host.act("promote", **BOTH) == Code.GENERIC
    assert host.register["disputed"] == "b"


class Meanwhile(Cluster):
    """Whose register becomes another one after so many times that it was read."""

    reads, then = 0, ""

    def _run(self, *command: str) -> str:
        kind, found = type(self), super()._run(*command)
        if "--query" in command:
            kind.reads -= 1
            if kind.reads == 0:
                kind.register_text = kind.then
        return found


def changes(host: Host, reads: int, name: str, lineage: dict[str, Any], **more: Any) -> None:
    kept = host.cluster.register_text
    host.cluster = type("Cluster", (Meanwhile,), {"reads": reads, "score": host.cluster.score})
    host.registered(name, lineage, **more)
    host.cluster.then, host.cluster.register_text = host.cluster.register_text, kept  # type: ignore[attr-defined]


def test_a_promotion_writes_over_nothing_that_has_come_since_it_was_judged(host: Host) -> None:
    """Not even after the last look at the node."""
    for more in ({"disputed": "b"}, {"id": A5}):
        host.registered("a", G1, serial=4, id=A4)
        changes(host, 2, "a", G1, **{"serial": 4, "id": A4} | more)
        assert host.act("promote", **BOTH) == Code.GENERIC
        assert host.register.get("disputed") == more.get("disputed")
        assert host.promotion.id == more.get("id", A4)
    host.registered("a", G1, serial=4, id=A4)
    changes(host, 2, "a", G2, serial=4, id=A4, kept=True)
    assert host.act("promote", **BOTH) == Code.OK, "that is the same promotion"


def test_a_dispute_is_with_the_promotion_that_was_looked_at(host: Host) -> None:
    """Another one, which has come in between, is judged anew."""
    own, theirs = {"serial": 5, "id": A5}, {"serial": 4, "id": B4}
    diverged(host, own, theirs)
    changes(host, 1, "b", G1, serial=6, id=B5, past=[B4, A5])
    host.act("monitor")
    assert (host.register, host.promotion.id) == ({"host": "b", "lineage": G1}, B5)
    # A promoted one does not write over it either.
    host.marked()
    diverged(host, {**own, "past": [B4]}, theirs)
    changes(host, 1, "b", G1, serial=6, id=B5, past=[B4, A5])
    assert host.act("monitor") == Code.DEGRADED_PROMOTED
    assert host.promotion.id == B5


def test_an_entry_of_ones_own_is_followed_although_it_is_another_one_by_now(host: Host) -> None:
    host.marked()
    host.registered("a", G1, serial=4, id=A4)
    host.node.status["lineage"] = G2
    changes(host, 1, "a", {"current": "g0"}, serial=4, id=A4)
    assert host.act("monitor") == Code.PROMOTED
    assert host.register == {"host": "a", "lineage": G2}
    changes(host, 1, "a", G1, serial=4, id=A4, disputed="b")
    host.node.status["lineage"] = G1
    assert host.act("monitor") == Code.DEGRADED_PROMOTED
    assert host.register["disputed"] == "b"


def test_a_start_disputes_again_what_has_changed_meanwhile(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking.time, "sleep", lambda _seconds: None)
    diverged(host, {"serial": 5, "id": A5}, {"serial": 4, "id": B4})
    changes(host, 1, "b", G2, serial=4, id=B4)
    assert host.act("start", **STARTS) == Code.OK
    assert host.register == {"host": "b", "lineage": G2, "disputed": "a"}


def test_the_register_of_a_promoted_node_has_its_last_promotion(host: Host) -> None:
    """An entry of before has come back, or one of an agent that gave no ids."""
    host.marked()
    for entry in ({"serial": 3, "id": A4}, {"serial": 3}, {}):
        host.knows(serial=5, id=A5, past=[A4])
        host.registered("a", G1, **entry)
        assert host.act("monitor") == Code.PROMOTED
        assert host.promotion == Known(5, A5, (A4,))
    host.registered("a", G1, serial=9, id=B5)
    assert host.act("monitor") == Code.PROMOTED
    assert host.promotion.id == B5, "this node knows of none that was after it"
    host.kept.unlink()
    host.registered("a", G1)
    assert host.act("monitor") == Code.PROMOTED
    given = host.promotion
    assert (given.serial, len(given.id)) == (1, 16)
    assert host.act("monitor") == Code.PROMOTED
    assert host.promotion == given, "once"
    assert host.act("promote", **BOTH) == Code.OK
    assert host.promotion.knows(given.id)
    host.kept.write_text("{")
    host.registered("a", G1)
    assert host.act("monitor") == Code.PROMOTED
    assert host.promotion == Known(), "whether there was one cannot be told"


def test_an_owner_that_took_over_from_the_registers_is_not_passed_over_by_it(host: Host) -> None:
    """Its own entry went with the power, or with the other part of the cluster; it had written nothing yet."""
    host.node.role = {**host.node.role, "score": 5000, "may-run": None}
    host.registered("b", G1, serial=5, id=B5, past=[A4])
    host.knows(serial=4, id=A4)
    assert host.act("monitor") == Code.OK
    assert host.cluster.score == "-INFINITY", "that one has gone on since"
    host.knows(serial=6, id=A5, past=[B5, A4])
    assert host.act("monitor", notify_promoted_uname="b") == Code.OK
    assert host.cluster.score == "-INFINITY", "it runs"
    assert host.act("monitor") == Code.OK
    assert host.cluster.score == "5000"
    host.marked()
    assert host.act("monitor") == Code.PROMOTED
    assert (host.register, host.promotion.id) == ({"host": "a", "lineage": G1}, A5)
    (host.folder / "nbdkit-replication-vm1.promoted").unlink()
    host.registered("b", G1, serial=6, id=A5)  # what it had was given to that one
    assert host.act("monitor") == Code.OK
    assert host.cluster.score == "-INFINITY"


def test_what_cannot_be_compared_is_not_promoted(host: Host) -> None:
    host.registered("b", G1)
    host.node.fails["replication-compare"] = Refused("unknown members")
    host.act("monitor")
    assert host.cluster.score == "-INFINITY"
    assert host.act("promote", **ALONE) == Code.GENERIC
    host.marked()
    assert host.act("monitor") == Code.PROMOTED, "no guest is stopped for it"
    host.registered("b", {})
    assert host.act("promote", **ALONE) == Code.OK


def test_the_registers_host_is_no_candidate_while_it_is_disputed_and_concedes_when_it_is_demoted(host: Host) -> None:
    host.registered("a", G1, serial=3, id=A4, disputed="b")
    assert host.act("monitor") == Code.DEGRADED
    assert (host.cluster.score, host.node.role["role"]) == ("-INFINITY", "primary")
    assert host.act("promote", **ALONE) == Code.GENERIC
    host.node.is_copy()
    host.node.status["outdated-reason"] = {"reason": "b went on", "code": "peer-promoted"}
    host.act("monitor")
    assert host.register["disputed"] == "b", "no person has said so"
    host.node.status["outdated-reason"] = {"reason": "demoted", "code": "demoted"}
    host.act("monitor")
    assert (host.register, host.promotion.id) == ({"host": "b", "lineage": {}}, A4)


def test_a_guest_that_runs_is_not_stopped_by_a_dispute(host: Host) -> None:
    host.marked()
    host.registered("a", G1, serial=3, id=A4, disputed="b")
    assert host.act("monitor") == Code.DEGRADED_PROMOTED
    host.node.status["lineage"] = G2
    assert host.act("monitor") == Code.DEGRADED_PROMOTED
    assert host.register == {"host": "a", "lineage": G2, "disputed": "b"}


def test_a_copy_is_no_candidate_while_its_owners_are_in_dispute(host: Host) -> None:
    host.node.is_copy()
    host.node.lossless = True
    host.registered("b", G1, serial=3, disputed="c")
    assert host.act("monitor") == Code.DEGRADED
    assert host.act("promote", **ALONE) == Code.GENERIC
    assert host.register["disputed"] == "c"


@pytest.mark.parametrize(
    "option", [{"notify": "false"}, {"promoted_max": "2"}, {"master_max": "2"}, {"clone_node_max": "2"}]
)
def test_a_clone_that_could_have_two_owners_is_not_started(host: Host, option: dict[str, str]) -> None:
    assert host.act("validate-all", **option) == Code.CONFIGURED
    assert host.act("start", **option) == Code.CONFIGURED
    assert host.act("monitor", **option) == Code.DEGRADED
    host.marked()
    assert host.act("monitor", **option) == Code.PROMOTED, "no guest is stopped for it"
    assert host.act("demote", **option, **BOTH) == Code.OK
    assert host.act("stop", **option) == Code.OK


def test_what_cannot_be_entered_shows_in_the_status(host: Host) -> None:
    host.marked()
    host.registered("a", G1, serial=4, id=A4)
    host.cluster.refuses = True
    assert host.act("monitor") == Code.PROMOTED, "there is nothing to enter"
    host.node.status["lineage"] = G2
    assert host.act("monitor") == Code.DEGRADED_PROMOTED
    host.cluster.refuses = False
    assert host.act("monitor") == Code.PROMOTED
    assert host.register["lineage"] == G2


def test_a_start_that_is_repeated_leaves_the_guest_where_it_runs(host: Host) -> None:
    mark = host.marked()
    host.node.relation = "older"
    host.registered("a", G1)
    assert host.act("start") == Code.OK
    assert mark.exists()
    assert host.node.done == []
    host.node.runs = False
    assert host.act("start") == Code.OK
    assert not mark.exists(), "its process had ended"


def test_a_node_whose_file_has_gone_is_there_as_long_as_it_runs(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_name: str) -> str:
        raise Unusable("there is no such node")

    socket = host.folder / "control.sock"
    monkeypatch.setattr(asking.nodes, "control_of", gone)
    monkeypatch.setattr(asking.nodes, "usual_control", lambda _name: str(socket))
    assert host.act("monitor") == Code.GENERIC, "its process is there, and cannot be asked"
    mark = host.marked()
    assert host.act("monitor") == Code.FAILED_PROMOTED
    socket.touch()
    assert host.act("monitor") == Code.PROMOTED
    mark.unlink()
    assert host.act("monitor") == Code.OK
    assert host.act("stop") == Code.OK
    assert not host.node.runs
    socket.unlink()
    assert host.act("monitor") == Code.INSTALLED
    assert host.act("stop") == Code.OK


@pytest.mark.parametrize("action", ["monitor", "promote", "demote", "notify", "start"])
def test_no_conversation_outlasts_its_action(host: Host, action: str) -> None:
    host.act(action, **BOTH, notify_type="post", notify_operation="start")
    assert host.until == {host.deadline}


def test_an_owner_that_is_not_promoted_hands_over_before_another_one_is(host: Host) -> None:
    """The pair is in sync only since the demotion, or the cluster prefers the other host."""
    event = {"notify_type": "pre", "notify_operation": "promote", **BOTH}
    mark = host.marked()
    host.act("notify", **event, notify_promote_uname="b")
    mark.unlink()
    host.act("notify", **event, notify_promote_uname="a")
    host.node.status["link"] = {"state": "lost"}
    host.act("notify", **event, notify_promote_uname="b")
    host.node.status["link"] = {"state": "in-sync"}
    host.node.fails["replication-set-role"] = Refused("no")
    assert host.act("notify", **event, notify_promote_uname="b") == Code.OK
    host.node.fails["replication-set-role"] = Unanswered("late")
    assert host.act("notify", **event, notify_promote_uname="b") == Code.OK
    assert host.node.done == []
    host.node.fails.clear()
    assert host.act("notify", **event, notify_promote_uname="b") == Code.OK
    assert host.node.done == [("replication-set-role", {"role": "secondary", "lossless": True})]
    assert host.act("notify", **event, notify_promote_uname="b") == Code.OK
    assert len(host.node.done) == 1, "it is a copy"


@pytest.mark.parametrize("action", ["notify", "promote"])
def test_the_node_learns_that_the_other_one_is_gone_before_it_notices(host: Host, action: str) -> None:
    host.registered("a", G1)
    host.marked()
    event = {"notify_type": "post", "notify_operation": "stop"} if action == "notify" else {}
    said = ("replication-resume-io", {"fenced": True})
    host.act(action, **event, **BOTH)
    assert said not in host.node.done
    host.node.fails["replication-resume-io"] = Refused("no")
    assert host.act(action, **event, **ALONE) == Code.OK
    host.node.fails.clear()
    assert host.act(action, **event, **ALONE) == Code.OK
    assert host.node.done.count(said) == 1
    host.node.status["outdated-reason"] = {"reason": "b went on"}
    host.act("notify", notify_type="post", notify_operation="stop", **ALONE)
    assert host.node.done.count(said) == 1, "it is not known to be gone before it went on"


SHARED = {**G1, "shared": True}


def test_a_copy_is_left_out_until_its_owner_that_was_promoted_without_it_is_in_sync_with_it(host: Host) -> None:
    """Else two losses of power within a monitor's interval have the one promoted that lacks the last writes."""
    host.node.status.update(lineage=SHARED, link={"state": "connecting"})
    host.act("promote", **BOTH)
    assert host.register == {"host": "a", "lineage": SHARED, "alone": True}
    assert host.act("monitor") == Code.PROMOTED
    assert host.register["alone"]
    host.node.status["link"] = {"state": "in-sync"}
    assert host.act("monitor") == Code.PROMOTED
    assert host.register == {"host": "a", "lineage": SHARED}
    # The other one's view.
    host.act("stop")
    host.node.runs = True
    host.node.is_copy()
    host.node.lossless = True
    host.registered("b", G1, alone=True)
    host.act("monitor")
    assert host.cluster.score == "-INFINITY"
    assert host.act("promote", **ALONE) == Code.GENERIC
    host.node.relation = "newer"
    assert host.act("promote", **ALONE) == Code.OK, "it has got the rest since"


@pytest.mark.parametrize("action", ["demote", "stop", "notify"])
def test_each_look_at_a_pair_that_is_in_sync_ends_that(host: Host, action: str) -> None:
    host.marked()
    host.registered("a", SHARED, alone=True)
    host.node.status["lineage"] = SHARED
    host.act(action, **BOTH, notify_promote_uname="b", notify_type="post", notify_operation="promote")
    assert "alone" not in host.register


def test_a_promotion_with_a_generation_of_its_own_leaves_nobody_out(host: Host) -> None:
    for lineage, link in (({**G1, "shared": False}, "lost"), (SHARED, "in-sync")):
        host.node.status.update(lineage=lineage, link={"state": link})
        host.act("promote", **BOTH)
        assert "alone" not in host.register
    host.registered("a", SHARED, alone=True)
    host.node.status.update(lineage=G2, link={"state": "lost"})
    host.act("monitor")
    assert host.register == {"host": "a", "lineage": G2}, "it has moved, which everybody sees"


def test_a_failover_is_no_longer_one_when_a_primary_is_heard_that_is_not_known_to_be_gone(host: Host) -> None:
    host.node.is_copy()
    for active, condition in ((ALONE, {}), (BOTH, {"no-primary": True})):
        host.node.done.clear()
        host.node.is_copy()
        host.registered("b" if active is ALONE else "a", G1)
        assert host.act("promote", **active) == Code.OK
        assert host.node.done[0] == ("replication-stop", {"failover": True, "max-age": 60.0, **condition})


@pytest.mark.parametrize("lossless", [False, True])
def test_an_owner_that_is_gone_has_no_lease_any_more(
    host: Host, monkeypatch: pytest.MonkeyPatch, lossless: bool
) -> None:
    """The word is said only where it is asked for: a node of another version does not know it."""
    asked: list[bool] = []
    call = Node.call

    def leased(node: Node, command: str, **arguments: Any) -> Any:
        if command == "replication-stop":
            asked.append("fenced" in arguments)
            if not asked[-1]:
                raise Refused("it may serve its guest still", code="leased")
        return call(node, command, **arguments)

    monkeypatch.setattr(Node, "call", leased)
    host.node.lossless = lossless
    host.node.is_copy()
    host.registered("b", G1)
    assert host.act("promote", **ALONE) == Code.OK
    assert asked == [False, True]
