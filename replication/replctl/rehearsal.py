# SPDX-License-Identifier: BSD-3-Clause
"""replctl test: what a failover would give now, to look at, to boot, to throw away.

`test run` is a test from beginning to end: the node makes it, a command or a virtual machine is tried on it
(replctl/trial.py), the node keeps the result and throws the test away. If this program is killed the node ends the test
by itself, as a failed one, GRACE_S after the deadline.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from urllib.parse import quote, urlsplit

from replication.client.commands import tell
from replication.client.qmp import Refused
from replication.client.session import Session, Unusable
from replication.client.values import human_seconds, human_value

from . import nodes
from .trial import INTERRUPTS, Trial, boot

GRACE_S = 60.0
"""What the node waits longer than the deadline."""

NOT_NOW = ("wrong-mode", "not-running", "failed-over")
"""Codes of a node on which there is nothing to test because it is no secondary at present."""


def test(client: Session, options: argparse.Namespace) -> None:
    """Start or stop one, or do all of it."""
    _check(options)
    match options.action:
        case "start":
            _start(client, options)
        case "stop":
            _stop(client, options)
        case _:
            _run(client, options)


def _check(options: argparse.Namespace) -> None:
    """Unusable for what does not go together."""
    run = options.action == "run"
    for given, name in (
        (options.marker, "--marker"),
        (options.boot, "--boot"),
        (options.if_secondary, "--if-secondary"),
        (options.command, "a command"),
    ):
        if given and not run:
            raise Unusable(f"{name} is for test run")
    if options.agent and not options.boot:
        raise Unusable("--agent is for --boot")
    if run and options.ends is not None:
        raise Unusable("test run has a --deadline: --ends is for test start")
    if run and not options.boot and not options.command:
        raise Unusable("say what is to be tried: --boot, or a command after --")


def _start(client: Session, options: argparse.Namespace) -> None:
    given = {"name": options.name, "timeout": options.ends}
    answer = client.call("replication-test-start", **{key: value for key, value in given.items() if value is not None})
    exports = with_uris(answer.get("exports") or [], options)
    lines = [f"test {human_value(answer.get('name'))}, of checkpoint {human_value(answer.get('epoch'))}:"]
    lines += [f"  {human_value(export.get('disk'))}  {export.get('uri') or export.get('export')}" for export in exports]
    tell(options, "\n".join(lines), **{**answer, "exports": exports})


def _stop(client: Session, options: argparse.Namespace) -> None:
    answer = client.call("replication-test-stop", **({} if options.name is None else {"name": options.name}))
    over = answer.get("reason")
    text = f"test {human_value(answer.get('name'))} is over, and nothing of it is left"
    tell(options, text if over is None else f"{text} (it had ended: {human_value(over)})", **answer)


def with_uris(exports: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each with its URI, if it is known where the node listens."""
    if options.uri is not None:
        place = urlsplit(options.uri)
        if place.scheme not in ("nbd", "nbds", "nbd+unix", "nbds+unix"):
            raise Unusable(f"--uri {options.uri}: it is no NBD URI such as nbd+unix:///?socket=PATH")
    elif options.node is not None:
        place = urlsplit(f"nbd+unix:///?socket={quote(nodes.guest_socket_of(options.node))}")
    else:
        return exports
    query = f"?{place.query}" if place.query else ""

    def uri(export: dict[str, Any]) -> str:
        return f"{place.scheme}://{place.netloc}/{quote(str(export.get('export')), safe='')}{query}"

    return [{**export, "uri": uri(export)} for export in exports]


def _run(client: Session, options: argparse.Namespace) -> None:
    """Refused when it fails, or the node has another reason why it shows nothing."""
    name = "run" if options.name is None else options.name
    begun = time.monotonic()
    try:
        started = client.call("replication-test-start", name=name, timeout=options.deadline + GRACE_S)
    except Refused as error:
        if options.if_secondary and error.code in NOT_NOW:
            tell(options, f"nothing was tested: {error}", done=False)
            return
        raise
    reason: str | None = "it was interrupted"
    try:
        with _interruptible():
            reason = _tried(started, options, begun + options.deadline)
    except Unusable as error:
        reason = str(error)
        raise
    finally:
        rto_s = time.monotonic() - begun
        kept = _kept(client, options, started, reason, rto_s)
    result = kept.get("result")
    if result != "passed":
        raise Refused(f"the test has {'failed' if result else 'no result'}: {human_value(kept.get('reason'))}")
    tell(options, f"the test has passed in {human_seconds(rto_s)}", test={**kept, "rto": rto_s})


def _tried(started: dict[str, Any], options: argparse.Namespace, deadline: float) -> str | None:
    """Why it has failed, None if it has not."""
    exports = with_uris(started.get("exports") or [], options)
    uris = [str(export.get("uri") or "") for export in exports]
    if not all(uris):
        raise Unusable("say where the node listens: --uri URI, or give the node by its NAME")
    environment = {
        "REPLICATION_TEST_NAME": str(started.get("name")),
        "REPLICATION_TEST_EPOCH": str(started.get("epoch")),
        "REPLICATION_TEST_URI": uris[0],
        "REPLICATION_TEST_URIS": "\n".join(uris),
    }
    if not options.boot:
        return Trial(options.command, environment, options.marker, None, deadline).run(quiet=options.json)
    with boot(uris, options) as (command, agent):
        return Trial(command, environment, options.marker, agent, deadline).run(quiet=options.json)


def _kept(
    client: Session, options: argparse.Namespace, started: dict[str, Any], reason: str | None, rto_s: float
) -> dict[str, Any]:
    """What the node has kept of this test, and of no later one of the name. Over a connection of its own: whatever has
    interrupted the other one."""
    given = {"result": "passed", "rto": rto_s} if reason is None else {"result": "failed", "reason": reason}
    which = {key: started[key] for key in ("name", "id") if key in started}
    with client.again(options.timeout) as again:
        kept: dict[str, Any] = again.call("replication-test-stop", **which, **given)
    return kept


@contextmanager
def _interruptible() -> Iterator[None]:
    """What a service manager, or the end of a connection, ends this program with is an interrupt like a terminal's. A
    second one, which may come with the first, changes nothing: what was started has to be ended, which takes its time
    but not for ever."""
    interrupted = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            raise KeyboardInterrupt

    former = {number: signal.signal(number, interrupt) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
