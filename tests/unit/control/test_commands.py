# SPDX-License-Identifier: BSD-3-Clause
"""The command table: what each command accepts, what it asks of the node, and what it answers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import pytest

from replication.conditions import Conditions
from replication.control import qmp
from replication.control.commands import TABLE, Commands
from replication.errors import CommandError
from replication.reason import Reason
from replication.record.lineage import Lineage
from replication.stage import Mode

JOBS = [{"id": "commit-disk0", "type": "commit", "status": "running", "current-progress": 1, "total-progress": 2}]


class Node:
    """Records what it is asked; raises `refusal` if there is one."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error: str | None = None
        self.refusal: Exception | None = None

    def _record(self, *call: Any) -> None:
        self.calls.append(call)
        if self.refusal is not None:
            raise self.refusal

    def start(self, mode: Mode | None, secondary: str | None, sync: str) -> None:
        self._record("start", mode, secondary, sync)

    def checkpoint(self) -> tuple[int, float]:
        self._record("checkpoint")
        return 7, 0.25

    def get_error(self) -> str | None:
        self._record("get_error")
        return self.error

    def stop(self, failover: bool, force: bool = False, conditions: Conditions | None = None) -> None:
        self._record("stop", failover, force, *([] if conditions is None else [conditions]))

    def retry(self, force: bool = False) -> None:
        self._record("retry", force)

    def hold(self) -> int:
        self._record("hold")
        return 8

    def commit(self, epoch: int) -> tuple[int, float]:
        self._record("commit", epoch)
        return epoch, 0.5

    def abort(self, epoch: int) -> None:
        self._record("abort", epoch)

    def verify(self, rate: int | None, repair: bool) -> None:
        self._record("verify", rate, repair)

    def cancel_verify(self) -> None:
        self._record("cancel_verify")

    def resize(self, name: str | None, size: int | None) -> list[dict[str, object]]:
        self._record("resize", name, size)
        return [{"name": "disk0", "size": 4096}]

    def start_test(self, name: str, timeout_s: float | None) -> dict[str, Any]:
        self._record("start_test", name, timeout_s)
        return {"name": name}

    def stop_test(
        self, name: str | None, result: str | None, rto_s: float | None, reason: str | None, id_: str | None = None
    ) -> dict[str, Any]:
        self._record("stop_test", name, result, rto_s, reason, id_)
        return {"name": "x"}

    def demote(self) -> None:
        self._record("demote")

    def discard(self) -> None:
        self._record("discard")

    def lost_heartbeat(self) -> None:
        self._record("lost_heartbeat")

    def query(self) -> dict[str, Any]:
        self._record("query")
        return {"mode": "primary", "stage": "running"}

    def query_latency(self) -> dict[str, Any]:
        self._record("query_latency")
        return {"bounds": []}

    def query_failover(self) -> dict[str, Any]:
        self._record("query_failover")
        return {"allowed": True, "force": False}

    def set_role(
        self, primary: bool, peer: str | None, force: bool, lossless: bool = False, fenced: bool = False
    ) -> None:
        self._record("set_role", primary, peer, force, lossless, *([True] if fenced else []))

    def suspend_io(self, timeout_s: float) -> None:
        self._record("suspend_io", timeout_s)

    def resume_io(self, fenced: bool = False) -> None:
        self._record("resume_io", fenced)

    def renew(self) -> float:
        self._record("renew")
        return 10.0

    def outdate(self, text: str) -> None:
        self._record("outdate", text)

    def query_role(self) -> dict[str, Any]:
        self._record("query_role")
        return {"role": "primary", "score": 10000, "may-run": True}

    def compare(self, lineage: Lineage) -> dict[str, Any]:
        self._record("compare", lineage)
        return {"relation": "same"}

    def query_jobs(self) -> list[dict[str, Any]]:
        self._record("query_jobs")
        return JOBS

    def cancel_job(self, id: str) -> None:
        self._record("cancel_job", id)

    def dismiss_job(self, id: str) -> None:
        self._record("dismiss_job", id)

    def shutdown(self) -> None:
        self._record("shutdown")


@pytest.fixture
def node() -> Node:
    return Node()


def ask(node: Node, command: str, arguments: dict[str, Any] | None = None) -> Any:
    """The whole answer, through the protocol as a client sees it."""
    session = qmp.Session(Commands(node, node.shutdown).execute)
    request = {"execute": command} if arguments is None else {"execute": command, "arguments": arguments}
    stream = json.dumps({"execute": "qmp_capabilities"}) + json.dumps(request)
    negotiated, answer = (json.loads(line) for line in session.feed(stream.encode()))
    assert negotiated == {"return": {}}
    return answer


def failure(desc: str, error_class: str = "GenericError") -> dict[str, Any]:
    return {"error": {"class": error_class, "desc": desc}}


SET = "xen-set-replication"


@pytest.mark.parametrize(
    ("command", "arguments", "calls", "value"),
    [
        (SET, {"enable": True, "primary": True}, [("start", Mode.PRIMARY, None, "auto")], {}),
        (SET, {"enable": True, "primary": False}, [("start", Mode.SECONDARY, None, "auto")], {}),
        (SET, {"enable": False, "primary": True}, [("stop", False, False)], {}),
        (SET, {"enable": False, "primary": False, "failover": False}, [("stop", False, False)], {}),
        (SET, {"enable": False, "primary": True, "failover": True}, [("stop", True, False)], {}),
        ("xen-colo-do-checkpoint", None, [("checkpoint",)], {}),
        ("query-xen-replication-status", None, [("get_error",)], {"error": False}),
        ("x-colo-lost-heartbeat", None, [("lost_heartbeat",)], {}),
        ("replication-retry", None, [("retry", False)], {}),
        ("replication-retry", {"force": False}, [("retry", False)], {}),
        ("replication-retry", {"force": True}, [("retry", True)], {}),
        ("replication-start", None, [("start", None, None, "auto")], {}),
        (
            "replication-start",
            {"mode": "primary", "secondary": "nbd://b", "sync": "full"},
            [("start", Mode.PRIMARY, "nbd://b", "full")],
            {},
        ),
        ("replication-start", {"mode": "secondary"}, [("start", Mode.SECONDARY, None, "auto")], {}),
        ("replication-start", {"sync": "none"}, [("start", None, None, "none")], {}),
        ("replication-checkpoint", None, [("checkpoint",)], {"epoch": 7, "duration": 0.25}),
        ("replication-checkpoint", {"hold": False}, [("checkpoint",)], {"epoch": 7, "duration": 0.25}),
        ("replication-checkpoint", {"hold": True}, [("hold",)], {"epoch": 8}),
        ("replication-checkpoint-commit", {"epoch": 8}, [("commit", 8)], {"epoch": 8, "duration": 0.5}),
        ("replication-checkpoint-abort", {"epoch": 8}, [("abort", 8)], {}),
        ("replication-verify", None, [("verify", None, False)], {}),
        ("replication-verify", {"rate": 65536, "repair": True}, [("verify", 65536, True)], {}),
        ("replication-verify-cancel", None, [("cancel_verify",)], {}),
        ("replication-resize", None, [("resize", None, None)], {"disks": [{"name": "disk0", "size": 4096}]}),
        (
            "replication-resize",
            {"disk": "a", "size": 8192},
            [("resize", "a", 8192)],
            {"disks": [{"name": "disk0", "size": 4096}]},
        ),
        ("replication-test-start", None, [("start_test", "test", None)], {"name": "test"}),
        ("replication-test-start", {"name": "a", "timeout": 5}, [("start_test", "a", 5.0)], {"name": "a"}),
        ("replication-test-stop", None, [("stop_test", None, None, None, None, None)], {"name": "x"}),
        (
            "replication-test-stop",
            {"name": "a", "id": "1a", "result": "passed", "rto": 1.5, "reason": "so"},
            [("stop_test", "a", "passed", 1.5, "so", "1a")],
            {"name": "x"},
        ),
        ("replication-demote", None, [("demote",)], {}),
        ("replication-discard", None, [("discard",)], {}),
        ("replication-get-error", None, [("get_error",)], {}),
        ("replication-stop", None, [("stop", False, False)], {}),
        ("replication-stop", {"failover": True}, [("stop", True, False)], {}),
        ("replication-stop", {"failover": True, "force": True}, [("stop", True, True)], {}),
        ("replication-stop", {"failover": True, "max-age": 2}, [("stop", True, False, Conditions(2))], {}),
        (
            "replication-stop",
            {"failover": True, "only-in-sync": True, "lossless": True},
            [("stop", True, False, Conditions(None, True, True))],
            {},
        ),
        ("replication-stop", {"failover": True, "lossless": False}, [("stop", True, False)], {}),
        (
            "replication-stop",
            {"failover": True, "max-age": 2, "fenced": True},
            [("stop", True, False, Conditions(2, early=True))],
            {},
        ),
        ("replication-stop", {"failover": True, "fenced": True, "force": True}, [("stop", True, True)], {}),
        (
            "replication-set-role",
            {"role": "primary", "fenced": True},
            [("set_role", True, None, False, False, True)],
            {},
        ),
        ("replication-outdate", {"reason": "fenced"}, [("outdate", "fenced")], {}),
        (
            "replication-set-role",
            {"role": "primary", "peer": "nbd://b"},
            [("set_role", True, "nbd://b", False, False)],
            {},
        ),
        ("replication-set-role", {"role": "secondary"}, [("set_role", False, None, False, False)], {}),
        ("replication-set-role", {"role": "secondary", "lossless": True}, [("set_role", False, None, False, True)], {}),
        ("replication-suspend-io", {"timeout": 5}, [("suspend_io", 5.0)], {}),
        ("replication-suspend-io", {"timeout": 0}, [("suspend_io", 0.0)], {}),
        ("replication-resume-io", None, [("resume_io", False)], {}),
        ("replication-resume-io", {"fenced": True}, [("resume_io", True)], {}),
        ("replication-renew", None, [("renew",)], {"seconds": 10.0}),
        ("replication-outdate", None, [("outdate", "somebody who knows it has said so")], {}),
        ("replication-stop", {"failover": False, "force": False}, [("stop", False, False)], {}),
        ("query-replication", {}, [("query",)], {"mode": "primary", "stage": "running"}),
        ("query-failover", None, [("query_failover",)], {"allowed": True, "force": False}),
        ("query-role", None, [("query_role",)], {"role": "primary", "score": 10000, "may-run": True}),
        (
            "replication-compare",
            {"lineage": Lineage("1" * 16).to_json()},
            [("compare", Lineage("1" * 16))],
            {"relation": "same"},
        ),
        ("query-replication-latency", None, [("query_latency",)], {"bounds": []}),
        ("query-jobs", None, [("query_jobs",)], JOBS),
        ("job-cancel", {"id": "a"}, [("cancel_job", "a")], {}),
        ("job-dismiss", {"id": "a"}, [("dismiss_job", "a")], {}),
        ("query-version", None, [], qmp.version()),
        ("quit", None, [("shutdown",)], {}),
    ],
)
def test_what_a_command_does(
    node: Node, command: str, arguments: dict[str, Any] | None, calls: list[Any], value: Any
) -> None:
    assert ask(node, command, arguments) == {"return": value}
    assert node.calls == calls


BOTH = {"enable": True, "primary": True}


@pytest.mark.parametrize(
    ("command", "arguments", "desc"),
    [
        (SET, None, "Parameter 'enable' is missing"),
        (SET, {"primary": True}, "Parameter 'enable' is missing"),
        (SET, {"enable": True}, "Parameter 'primary' is missing"),
        (SET, {"enable": False}, "Parameter 'primary' is missing"),
        # Missing comes before unexpected, as in QEMU.
        (SET, {"zz": 1}, "Parameter 'enable' is missing"),
        (SET, BOTH | {"zz": 1}, "Parameter 'zz' is unexpected"),
        (SET, BOTH | {"enable": 1}, "Invalid parameter type for 'enable', expected: boolean"),
        (SET, BOTH | {"enable": None}, "Invalid parameter type for 'enable', expected: boolean"),
        (SET, BOTH | {"primary": "true"}, "Invalid parameter type for 'primary', expected: boolean"),
        (SET, BOTH | {"failover": 0}, "Invalid parameter type for 'failover', expected: boolean"),
        (SET, BOTH | {"failover": True}, "Parameter 'failover' is only for stopping replication"),
        (SET, BOTH | {"failover": False}, "Parameter 'failover' is only for stopping replication"),
        ("replication-start", {"mode": "third"}, "Parameter 'mode' does not accept value 'third'"),
        ("replication-start", {"mode": "PRIMARY"}, "Parameter 'mode' does not accept value 'PRIMARY'"),
        ("replication-start", {"mode": True}, "Invalid parameter type for 'mode', expected: string"),
        ("replication-start", {"sync": "often"}, "Parameter 'sync' does not accept value 'often'"),
        ("replication-start", {"sync": None}, "Invalid parameter type for 'sync', expected: string"),
        ("replication-start", {"secondary": 5}, "Invalid parameter type for 'secondary', expected: string"),
        ("replication-stop", {"failover": "yes"}, "Invalid parameter type for 'failover', expected: boolean"),
        ("replication-stop", {"failover": True, "force": 1}, "Invalid parameter type for 'force', expected: boolean"),
        ("replication-stop", {"force": True}, "Parameter 'force' is only for failover"),
        ("replication-stop", {"failover": False, "force": True}, "Parameter 'force' is only for failover"),
        ("replication-stop", {"failover": True, "max-age": -1}, "Parameter 'max-age' expects seconds"),
        ("replication-stop", {"max-age": 1}, "Conditions are only for failover without 'force'"),
        ("replication-stop", {"fenced": True}, "Conditions are only for failover without 'force'"),
        (
            "replication-stop",
            {"failover": True, "force": True, "lossless": True},
            "Conditions are only for failover without 'force'",
        ),
        ("replication-retry", {"force": "yes"}, "Invalid parameter type for 'force', expected: boolean"),
        ("replication-retry", {"failover": True}, "Parameter 'failover' is unexpected"),
        ("query-failover", {"force": True}, "Parameter 'force' is unexpected"),
        ("replication-compare", {"lineage": {}}, "Invalid parameter 'lineage': 'current'"),
        ("replication-compare", None, "Parameter 'lineage' is missing"),
        ("replication-checkpoint", {"hold": 1}, "Invalid parameter type for 'hold', expected: boolean"),
        ("replication-checkpoint", {"epoch": 8}, "Parameter 'epoch' is unexpected"),
        ("replication-checkpoint-commit", None, "Parameter 'epoch' is missing"),
        ("replication-checkpoint-commit", {"epoch": "8"}, "Invalid parameter type for 'epoch', expected: integer"),
        ("replication-checkpoint-abort", {}, "Parameter 'epoch' is missing"),
        ("replication-checkpoint-abort", {"epoch": 8.0}, "Invalid parameter type for 'epoch', expected: integer"),
        ("replication-demote", {"force": True}, "Parameter 'force' is unexpected"),
        ("replication-discard", {"force": True}, "Parameter 'force' is unexpected"),
        ("replication-test-start", {"timeout": -1}, "Parameter 'timeout' expects seconds, 31536000 at most"),
        ("replication-test-stop", {"rto": 1.0}, "Parameters 'rto' and 'reason' are for a result"),
        ("replication-test-stop", {"result": "good"}, "Parameter 'result' does not accept value 'good'"),
        ("replication-verify", {"rate": 65535}, "Parameter 'rate' expects 65536 to 1099511627776 bytes a second"),
        ("replication-resize", {"size": 0}, "Parameter 'size' expects 1 to 140737488355328 bytes"),
        ("replication-resize", {"size": "1G"}, "Invalid parameter type for 'size', expected: integer"),
        (SET, {"enable": False, "primary": False, "force": True}, "Parameter 'force' is unexpected"),
        ("job-cancel", None, "Parameter 'id' is missing"),
        ("job-cancel", {"id": 3}, "Invalid parameter type for 'id', expected: string"),
        ("job-cancel", {"id": "a", "force": True}, "Parameter 'force' is unexpected"),
        ("job-dismiss", {}, "Parameter 'id' is missing"),
        ("job-dismiss", {"id": ["a"]}, "Invalid parameter type for 'id', expected: string"),
    ],
)
def test_arguments_that_are_refused_reach_nobody(
    node: Node, command: str, arguments: dict[str, Any] | None, desc: str
) -> None:
    assert ask(node, command, arguments) == failure(desc)
    assert node.calls == []


@pytest.mark.parametrize("command", TABLE)
def test_every_command_refuses_what_it_does_not_know(node: Node, command: str) -> None:
    filler = {"boolean": False, "string": "primary", "integer": 1, "number": 1.5, "array": [], "object": {}}
    needed = {name: filler[a.type] for name, a in TABLE[command].arguments.items() if a.required}
    assert ask(node, command, needed | {"zz": 1}) == failure("Parameter 'zz' is unexpected")
    assert node.calls == []


def test_a_boolean_is_no_integer() -> None:
    declared = {"n": qmp.Argument("integer", required=True)}
    qmp.check_arguments(declared, {"n": 2})
    for wrong in (True, 1.5, "1", None):
        with pytest.raises(CommandError, match=r"Invalid parameter type for 'n', expected: integer"):
            qmp.check_arguments(declared, {"n": wrong})


def test_a_number_may_have_a_fraction_or_none_and_is_no_boolean() -> None:
    declared = {"n": qmp.Argument("number", required=True)}
    for right in (2, 1.5, -0.25, 0):
        qmp.check_arguments(declared, {"n": right})
    for wrong in (True, False, "1", None, [1], {}):
        with pytest.raises(CommandError, match=r"Invalid parameter type for 'n', expected: number"):
            qmp.check_arguments(declared, {"n": wrong})


def test_an_object_is_no_array_and_nothing_else() -> None:
    declared = {"o": qmp.Argument("object", required=True)}
    for right in ({}, {"a": 1}):
        qmp.check_arguments(declared, {"o": right})
    for wrong in ([], [1], "{}", None, 1, True):
        with pytest.raises(CommandError, match=r"Invalid parameter type for 'o', expected: object"):
            qmp.check_arguments(declared, {"o": wrong})


@pytest.mark.parametrize("command", ["foo", "", "Query-Version", "_quit", "TABLE"])
def test_unknown_command(node: Node, command: str) -> None:
    assert ask(node, command) == failure(f"The command {command} has not been found", "CommandNotFound")


def test_refusal_of_the_node_is_the_answer(node: Node) -> None:
    node.refusal = CommandError("Block replication is not running", "DeviceNotActive")
    for command in ("replication-start", "replication-checkpoint", "replication-stop", "replication-get-error"):
        assert ask(node, command) == failure("Block replication is not running", "DeviceNotActive")


def test_a_reason_has_its_code_beside_the_text(node: Node) -> None:
    node.refusal = CommandError("not now", reason=Reason.BUSY)
    assert ask(node, "replication-checkpoint")["error"] == {"class": "GenericError", "desc": "not now", "code": "busy"}


def test_error_of_replication_is_reported_in_both_ways(node: Node) -> None:
    node.error = "I/O error occurred"
    assert ask(node, "replication-get-error") == failure("I/O error occurred")
    assert ask(node, "query-xen-replication-status") == {"return": {"error": True, "desc": "I/O error occurred"}}
    node.refusal = CommandError("Block replication is not running")
    assert ask(node, "query-xen-replication-status") == {
        "return": {"error": True, "desc": "Block replication is not running"}
    }


def test_quit_answers_first(node: Node) -> None:
    session = qmp.Session(Commands(node, node.shutdown).execute)
    messages = session.feed(b'{"execute": "qmp_capabilities"}{"execute": "quit"}')
    assert [json.loads(next(messages)) for _ in range(2)] == [{"return": {}}] * 2
    assert node.calls == []
    assert list(messages) == []
    assert node.calls == [("shutdown",)]


def test_query_commands_names_all_that_can_be_called(node: Node) -> None:
    names = [entry["name"] for entry in ask(node, "query-commands")["return"]]
    assert len(names) == len(set(names))
    assert set(names) == {
        "qmp_capabilities",
        "xen-set-replication",
        "xen-colo-do-checkpoint",
        "query-xen-replication-status",
        "x-colo-lost-heartbeat",
        "replication-start",
        "replication-checkpoint",
        "replication-checkpoint-commit",
        "replication-checkpoint-abort",
        "replication-demote",
        "replication-discard",
        "replication-verify",
        "replication-verify-cancel",
        "replication-resize",
        "replication-test-start",
        "replication-test-stop",
        "replication-get-error",
        "replication-stop",
        "replication-retry",
        "query-replication",
        "query-replication-latency",
        "query-failover",
        "query-role",
        "replication-outdate",
        "replication-resume-io",
        "replication-suspend-io",
        "replication-renew",
        "replication-set-role",
        "replication-compare",
        "query-jobs",
        "job-cancel",
        "job-dismiss",
        "query-commands",
        "query-version",
        "quit",
    }
    for name in names:
        assert ask(node, name, {"zz": 1})["error"]["class"] == "GenericError"


# Messages that QEMU answers with an error whatever machine it runs, one answer each.
REFUSED_BY_BOTH = [
    '{"execute": "qmp_capabilities"}',
    '{"execute": "qmp_capabilities", "arguments": {"foo": 1}, "id": 1}',
    '{"execute": "qmp_capabilities", "arguments": {"enable": 1}}',
    '{"execute": "qmp_capabilities", "arguments": {"enable": [1]}}',
    '{"execute": "foo", "id": [1, {"a": null}]}',
    "[1]",
    '"abc"',
    "null",
    "{}",
    '{"id": 3}',
    '{"execute": 1, "id": "\\u00e9"}',
    '{"execute": "query-version", "foo": 1, "id": 99999999999999999999}',
    '{"execute": "query-version", "arguments": []}',
    '{"execute": "query-version", "arguments": {"x": 1}}',
    '{"exec-oob": "query-version", "id": 1.5}',
    '{"execute": "query-version", "execute": "query-version"}',
    '{"id": "\\ud83d"}',
    '{"execute": "xen-set-replication"}',
    '{"execute": "xen-set-replication", "arguments": {"primary": true}}',
    '{"execute": "xen-set-replication", "arguments": {"enable": true}}',
    '{"execute": "xen-set-replication", "arguments": {"zz": 1}}',
    '{"execute": "xen-set-replication", "arguments": {"enable": 1, "primary": true}}',
    '{"execute": "xen-set-replication", "arguments": {"enable": null, "primary": true}}',
    '{"execute": "xen-set-replication", "arguments": {"enable": true, "primary": true, "zz": 1}}',
    '{"execute": "xen-set-replication", "arguments": {"enable": true, "primary": true, "failover": "x"}}',
    '{"execute": "xen-set-replication", "arguments": {"enable": true, "primary": true, "failover": true}}',
    '{"execute": "xen-colo-do-checkpoint", "arguments": {"a": 1}}',
    '{"execute": "job-cancel"}',
    '{"execute": "job-cancel", "arguments": {"id": 3}}',
    '{"execute": "job-cancel", "arguments": {"id": "zz"}}',
    '{"execute": "job-dismiss", "arguments": {"id": "zz"}}',
]


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no qemu-system-x86_64 to compare with")
def test_errors_are_those_of_qemu_itself(node: Node) -> None:
    stream = "\n".join(
        ['{"execute": "query-version"}', '{"execute": "qmp_capabilities"}', *REFUSED_BY_BOTH, '{"execute": "quit"}', ""]
    )
    qemu = subprocess.run(
        ["qemu-system-x86_64", "-M", "none", "-display", "none", "-nodefaults", "-qmp", "stdio"],
        input=stream,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    greeting, *theirs = (m for m in map(json.loads, qemu.stdout.splitlines()) if "event" not in m)
    node.refusal = CommandError("Job not found")
    session = qmp.Session(Commands(node, lambda: None).execute)
    ours = [json.loads(message) for message in session.feed(stream.encode())]
    assert set(greeting["QMP"]) == set(json.loads(session.greeting())["QMP"])
    assert len(ours) == len(REFUSED_BY_BOTH) + 3
    for answer in theirs:
        if "error" in answer:  # QEMU 11 says where in the line a JSON error is
            answer["error"]["desc"] = re.sub(r"^\d+:\d+: ", "", answer["error"]["desc"])
    assert ours == theirs
    assert all("error" in answer for answer in ours[2:-1])
    assert set(node.calls) == {("cancel_job", "zz"), ("dismiss_job", "zz")}
