# SPDX-License-Identifier: BSD-3-Clause
"""The commands by which a manager decides: whose the disks are, whether a guest may run, and what to wait for.

Exit codes are all that a script needs: nodes that are down or hang have codes of their own here, however they are
named, and every wait is short (replctl(8), EXIT STATUS).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from typing import Any

from .commands import confirm, fenced, forced, tell
from .qmp import Refused
from .session import Session, Unreachable, Unusable
from .values import human_value, printable

_AGAIN_S = 0.1

MAY, MAY_NOT, CANNOT_TELL, TIMED_OUT = 0, 1, 3, 5
"""Exit codes of may-run, and of a wait whose time is over."""


def role(client: Session, options: argparse.Namespace) -> None:
    """Print the role."""
    answer = client.call("query-role")
    print(json.dumps(answer) if options.json else printable(answer["role"]))


def score(client: Session, options: argparse.Namespace) -> None:
    """Print how good an owner of the disks the node would be."""
    answer = client.call("query-role")
    print(json.dumps(answer) if options.json else printable(answer["score"]))


PROMOTE_TEXT = """\
Promotion makes this node the owner of its disks. If it is a secondary whose primary has not left in good order, what
that has written since the last checkpoint is lost. Make sure first that the guest does not run on the other node."""


def promote(client: Session, options: argparse.Namespace) -> None:
    """Make the node the owner of its disks."""
    if not options.yes:
        confirm(options, PROMOTE_TEXT, "promotion")
    peer = {"peer": options.peer} if options.peer else {}
    client.call("replication-set-role", role="primary", **peer, **forced(options), **fenced(options))
    tell(options, "this node owns its disks; it looks for its peer in the background, if it knows where that is")


def ask_may_run(path: str, timeout_s: float) -> tuple[object, dict[str, Any]]:
    """Whether a guest may run on the node at that socket now (anything but a bool: it cannot be told), and if not, the
    `code` and the `reason`."""
    try:
        with Session(path, timeout_s) as client:
            answer = client.call("query-role")
        return answer["may-run"], {"code": answer.get("code"), "reason": answer.get("reason")}
    except (Refused, Unreachable, KeyError, TypeError) as error:
        return None, {"code": "no-answer", "reason": str(error)}


def may_run(path: str, options: argparse.Namespace) -> int:
    """Whether a guest may run on this node now: the exit code."""
    may, why = ask_may_run(path, options.timeout)
    said = "yes" if may is True else "no" if may is False else "cannot tell"
    if options.json:
        print(json.dumps({"may-run": may, **why}))
    else:
        print(said if may is True else f"{said}: {printable(why['reason'])}")
    return MAY if may is True else MAY_NOT if may is False else CANNOT_TELL


def wait(path: str, options: argparse.Namespace) -> int:
    """Wait until the node is as it is wanted; also for one that is not there yet."""
    wanted = {name: getattr(options, name) for name in ("stage", "link", "role") if getattr(options, name)}
    if not wanted:
        raise Unusable("say what to wait for: --stage, --link or --role")
    deadline = time.monotonic() + options.wait_s
    seen: dict[str, Any] = {}
    why = ""
    with contextlib.ExitStack() as stack:
        client: Session | None = None
        while True:
            left_s = deadline - time.monotonic()
            try:
                if client is None:
                    client = stack.enter_context(Session(path, max(_AGAIN_S, min(left_s, options.timeout))))
                seen, why = _standing(client, "role" in wanted), ""
            except (Refused, Unreachable) as error:
                stack.close()
                client, seen, why = None, {}, str(error)
            if all(seen.get(name) in values for name, values in wanted.items()):
                tell(options, ", ".join(f"{name} {seen[name]}" for name in wanted), **seen)
                return MAY
            if deadline - time.monotonic() <= 0:
                return _too_late(options, wanted, seen, why)
            time.sleep(_AGAIN_S)


def _standing(client: Session, with_role: bool) -> dict[str, Any]:
    status = client.call("query-replication")
    link = status.get("link")
    found = {"stage": status.get("stage"), "link": link.get("state") if isinstance(link, dict) else None}
    return {**found, "role": client.call("query-role").get("role")} if with_role else found


def _too_late(options: argparse.Namespace, wanted: dict[str, list[str]], seen: dict[str, Any], why: str) -> int:
    is_now = ", ".join(f"{name} {human_value(seen.get(name))}" for name in wanted) if seen else why
    text = f"not reached within {options.wait_s:g} s: {is_now}"
    if options.json:
        print(json.dumps({"failed": {"code": TIMED_OUT, "reason": "timed-out", "text": text}}))
    print(f"replctl: {printable(text)}", file=sys.stderr)
    return TIMED_OUT


def outdate(client: Session, options: argparse.Namespace) -> None:
    """Another node went on."""
    client.call("replication-outdate", **({"reason": options.reason} if options.reason else {}))
    tell(options, "this node is outdated: it is not promoted before it is resynchronised, unless by force")


def resume_io(client: Session, options: argparse.Namespace) -> None:
    """Let the guest go on."""
    client.call("replication-resume-io", **fenced(options))
    tell(options, "the guest goes on")


def renew(client: Session, options: argparse.Namespace) -> None:
    """The cluster has the primary go on."""
    answer = client.call("replication-renew")
    tell(options, f"the primary may serve its guest for another {answer['seconds']:g} s", **answer)


def quit_node(client: Session, options: argparse.Namespace) -> None:
    """End the node."""
    client.call("quit")
    tell(options, "the node ends")
