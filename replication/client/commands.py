# SPDX-License-Identifier: BSD-3-Clause
"""The commands of replctl: each asks something of one node, and prints what has come of it.

What cannot be done is Refused, by the node or here, or Unusable; replctl/outcome.py makes exit codes of them.

With --json a command prints one object (`events` and --watch: one a line): status, jobs and events what the node
answers, all others {"done": BOOL, ...}, where done is false if there was nothing to do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from .live import LIVE_TEXT, LiveMove
from .progress import job_progress, show_jobs, watch_jobs
from .qmp import Refused
from .session import Session, Unusable
from .status import console, event_line, status_view
from .switchover import Move
from .values import human_bytes, human_seconds, human_value, printable

# rich is imported where it draws: failover has to work on a host that lacks it.
# ruff: noqa: PLC0415

FAILOVER_TEXT = """\
Failover makes this secondary the owner of the disk. From that instant on nothing that the primary
writes is accepted any more, and what it has written since the last checkpoint is lost. It cannot be undone:
the two sides go separate ways until one is resynchronised from the other.
Do this only if the primary is dead, or will never write again."""

SWITCHOVER_TEXT = """\
Switch-over makes the secondary the owner of the disk, with all that the primary has written. Its own guest's writes are
dropped. Stop the guest on the primary first, and start it on the secondary afterwards."""

DISCARD_TEXT = """\
Discard allows the primary that connects next to overwrite what has been written to this node's disks since the two
parted. It cannot be undone. Copy what you need of it first."""

DISCARD_CHECKPOINT_TEXT = """\
The last checkpoint of this secondary is given up, so that the primary can send all that is missing. Until that is
complete and the next checkpoint is taken, there is nothing to fail over to."""

DEMOTE_TEXT = """\
Demotion makes the owner of the disks a secondary again. Its guest must have been moved away: what it still writes is
lost."""


def tell(options: argparse.Namespace, text: str, *, done: bool = True, **facts: Any) -> None:
    """Say what has come of it."""
    print(json.dumps({"done": done, **facts}) if options.json else text)


def status(client: Session, options: argparse.Namespace) -> None:
    """Show what the node says of itself, once or again and again."""
    if options.json:
        while True:
            answer = client.call("query-replication")
            print(json.dumps(answer, indent=None if options.watch else 2), flush=True)
            if options.watch is None:
                return
            time.sleep(options.watch)
    screen = console()
    view = status_view(client.call("query-replication"))
    if options.watch is None or not screen.is_terminal:
        screen.print(view)
        while options.watch is not None:
            time.sleep(options.watch)
            screen.print(status_view(client.call("query-replication")))
            sys.stdout.flush()
        return
    from rich.live import Live

    with Live(view, console=screen, auto_refresh=False) as live:
        while True:
            time.sleep(options.watch)
            live.update(status_view(client.call("query-replication")), refresh=True)


def start(client: Session, options: argparse.Namespace) -> None:
    """Start replication."""
    given = {name: getattr(options, name) for name in ("mode", "secondary", "sync")}
    if options.discard_checkpoint:
        given["discard-checkpoint"] = True
    given |= forced(options)
    client.call("replication-start", **{name: value for name, value in given.items() if value is not None})
    stage = end_reached(client)
    if stage is None:
        tell(options, "replication started")
    else:
        text = f"nothing to do: the stage is {stage}; in done, `start --mode primary --secondary URI` makes a new pair"
        tell(options, text, done=False, stage=stage)


def checkpoint(client: Session, options: argparse.Namespace) -> None:
    """Take a checkpoint."""
    answer = client.call("replication-checkpoint")
    stage = end_reached(client)
    if stage is not None:
        tell(options, f"nothing to do: the stage is {stage}", done=False, stage=stage)
    else:
        text = f"checkpoint {human_value(answer.get('epoch'))} took {human_seconds(answer.get('duration'))}"
        tell(options, text, epoch=answer.get("epoch"), duration=answer.get("duration"))


def end_reached(client: Session) -> str | None:
    """The stage, if it is one in which the node takes start and checkpoint and does nothing, as QEMU's does."""
    stage = client.call("query-replication").get("stage")
    return stage if stage in ("failover", "done") else None


def retry(client: Session, options: argparse.Namespace) -> None:
    """Have a failed commit go on."""
    client.call("replication-retry", **forced(options))
    tell(options, "the commit goes on; `replctl jobs --watch` shows it")


def discard(client: Session, options: argparse.Namespace) -> None:
    """Allow the next primary to overwrite what was written here."""
    # Nothing but what the person has agreed to: a primary may connect, or leave, while the text is read.
    status = client.call("query-replication")
    stands_in_the_way = "discard --checkpoint" in str(status.get("checkpoint-obstacle"))
    checkpoint = options.checkpoint or (stands_in_the_way and bool((status.get("link") or {}).get("primary")))
    if not options.yes:
        confirm(options, DISCARD_CHECKPOINT_TEXT if checkpoint else DISCARD_TEXT, "discard")
    client.call("replication-discard", checkpoint=checkpoint)
    if checkpoint:
        tell(options, "the last checkpoint was given up; the next one is taken when the primary has sent everything")
    else:
        tell(options, "what was written here may be overwritten by the primary that connects next")


def demote(client: Session, options: argparse.Namespace) -> None:
    """Make the owner of the disks a secondary again."""
    if not options.yes:
        confirm(options, DEMOTE_TEXT, "demotion")
    try:
        client.call("replication-set-role", role="secondary", **({"lossless": True} if options.lossless else {}))
    except Refused as refused:
        if refused.error_class != "CommandNotFound" or options.lossless:
            raise
        client.call("replication-demote")  # of version 0.2
    if client.call("query-replication").get("stage") == "none":
        tell(options, "this is a secondary, which has not been started")
    else:
        tell(options, "this is a secondary again, and runs; now start the primary with it")


def stop(client: Session, options: argparse.Namespace) -> None:
    """Stop replication as planned."""
    client.call("replication-stop")
    state = client.call("query-replication")
    lacking = [disk for disk in state.get("disks", []) if disk.get("out-of-sync-bytes")]
    if state.get("mode") == "primary" and state.get("stage") == "done" and lacking:
        unsent = ", ".join(
            f"{human_bytes(disk['out-of-sync-bytes'])} of disk {printable(disk.get('name'))}" for disk in lacking
        )
        raise Refused(f"replication stopped, but the secondary lacks {unsent}: that was not sent")
    tell(options, "replication stopped")


def forced(options: argparse.Namespace) -> dict[str, bool]:
    """The argument `force`, if it was given."""
    return {"force": True} if options.force else {}


def fenced(options: argparse.Namespace) -> dict[str, bool]:
    """The argument `fenced`, if it was given."""
    return {"fenced": True} if options.fenced else {}


def confirm(options: argparse.Namespace, text: str, what: str) -> None:
    """Ask the person; raises Unusable unless the answer is yes."""
    if options.json:
        raise Unusable(f"{what} asks for confirmation, which is no JSON; use --yes")
    print(text)
    try:
        agreed = input("Type yes to go on: ").strip() == "yes"
    except EOFError:
        agreed = False
    if not agreed:
        raise Unusable(f"{what} was not confirmed, nothing done")


def preflight_lines(answer: dict[str, Any]) -> Iterator[str]:
    """What query-failover says, for a person who is about to decide."""
    allowed = human_value(answer.get("allowed"))
    reason = f": {printable(answer['reason'])}" if answer.get("reason") else ""
    yield f"failover allowed   {allowed}{reason}"
    age = answer.get("checkpoint-age")
    lost = (
        "there is no checkpoint" if age is None else f"{human_seconds(age)} old: what the primary wrote since is lost"
    )
    if answer.get("force") and answer.get("code") not in ("outdated", "leased"):
        lost = "which is not valid any more"
    yield f"last checkpoint    number {human_value(answer.get('epoch'))}, {lost}"
    if answer.get("primary") is not None:
        yield f"primary            node {printable(answer['primary'])} is connected, and was heard of just now"
    to_commit, seconds = human_bytes(answer.get("bytes-to-commit")), human_seconds(answer.get("predicted-seconds"))
    yield f"to commit          {to_commit}, about {seconds}; the guest need not wait for it"


def check_conditions(answer: dict[str, Any], conditions: dict[str, Any]) -> None:
    """Refused, as the node will, when its answer to query-failover already says that a condition does not hold."""
    if conditions.get("no-primary") and answer.get("primary") is not None:
        raise Refused(f"the primary (node {printable(answer['primary'])}) is connected", code="has-primary")
    age, most = answer.get("checkpoint-age"), conditions.get("max-age")
    if most is not None and (age is None or age > most):
        raise Refused(f"the last checkpoint is older than {most:g} s, or there is none", code="too-old")
    if conditions.get("only-in-sync") and answer.get("in-sync") is not True:
        text = "this secondary was not in sync when its primary was last heard of"
        raise Refused(text, code="not-in-sync")
    if conditions.get("lossless") and answer.get("lossless") is not True:
        raise Refused("something would be lost, or it is not known that nothing would", code="not-lossless")


def failover(client: Session, options: argparse.Namespace) -> None:
    """Show what a failover costs; unless it is only to be shown, fail over."""
    answer = client.call("query-failover")
    conditions = {
        **({} if options.max_age is None else {"max-age": options.max_age}),
        **({"only-in-sync": True} if options.only_in_sync else {}),
        **({"lossless": True} if options.lossless else {}),
        **({"no-primary": True} if options.no_primary else {}),
    }
    if conditions and options.force:
        raise Unusable("--force does not go with conditions: it is for when they do not count")
    if not options.json:
        print("\n".join(preflight_lines(answer)))
    if answer.get("stage") in ("failover", "done"):
        tell(options, "nothing to do", done=False, preflight=answer)
        return
    unleased = options.fenced and answer.get("code") == "leased"  # which is the last refusal: there is no other one
    if not answer.get("allowed") and not unleased and not (options.force and answer.get("force")):
        raise Refused(str(answer.get("reason", "failover is not allowed")), code=answer.get("code"))
    check_conditions(answer, conditions)
    if options.check:
        if options.json:
            tell(options, "", done=False, preflight=answer)
        return
    if not options.yes:
        confirm(options, FAILOVER_TEXT, "failover")
    client.call("replication-stop", failover=True, **forced(options), **fenced(options), **conditions)
    tell(options, "failed over; `replctl jobs --watch` shows the commit", preflight=answer)


def switchover(client: Session, options: argparse.Namespace) -> None:
    """Move the disk to the secondary, with all that the primary has written."""
    if options.live:
        _switch_over_live(client, options)
        return
    with Session(options.peer, options.timeout) as peer:
        sides = {"this side": client, "the peer": peer}
        states = {name: side.call("query-replication") for name, side in sides.items()}
        move = Move(sides, states, _steps(options))
        if not move.over:
            if not options.yes:
                confirm(options, SWITCHOVER_TEXT, "switch-over")
            move.run()
    owner = f"{move.secondary} owns the disk now; start the guest there, on the export of its guest face"
    tell(options, f"switched over: {owner}", owner="this-side" if move.secondary == "this side" else "peer")


def _steps(options: argparse.Namespace) -> Callable[[str], None]:
    """Takes a line for each step that is done: for people, when it is."""
    return lambda text: None if options.json else print(text, flush=True)


def _switch_over_live(client: Session, options: argparse.Namespace) -> None:
    if not options.yes:
        confirm(options, LIVE_TEXT, "switch-over")
    here = "this side"
    with client.again(options.timeout) as mine, Session(options.peer, options.timeout) as peer:
        move = LiveMove({here: mine, "the peer": peer}, options.within, _steps(options))
        move.run()
        move.turn(options.timeout)
    owner = "this-side" if move.secondary == here else "peer"
    text = f"switched over: {move.secondary} owns the disk now, and {move.primary} becomes its secondary"
    tell(options, text, owner=owner, waited=round(move.waited_s, 3))


def jobs(client: Session, options: argparse.Namespace) -> None:
    """Show the jobs, once or until none is left that will end; Refused if one has failed."""
    if not options.watch:
        jobs = client.call("query-jobs")
        if options.json:
            print(json.dumps(jobs, indent=2))
        elif jobs:
            screen = console()
            with job_progress(screen) as progress:
                show_jobs(progress, jobs, {})
        else:
            print("no jobs")
        return
    failed: dict[str, str] = {}
    if options.json:
        watch_jobs(client, failed, lambda jobs: print(json.dumps(jobs), flush=True))
    else:
        tasks: dict[str, Any] = {}
        with job_progress(console()) as progress:
            watch_jobs(client, failed, lambda jobs: show_jobs(progress, jobs, tasks))
    if failed:
        raise Refused("; ".join(f"job {printable(name)}: {printable(desc)}" for name, desc in failed.items()))


def cancel(client: Session, options: argparse.Namespace) -> None:
    """Cancel a job."""
    client.call("job-cancel", id=options.job)
    tell(options, f"job {printable(options.job)} cancelled", job=options.job)


def events(client: Session, options: argparse.Namespace) -> None:
    """Print events for as long as the node lives."""
    for event in client.events():
        print(json.dumps(event) if options.json else event_line(event), flush=True)


def error(client: Session, options: argparse.Namespace) -> None:
    """Refused with the error of replication if there is one."""
    client.call("replication-get-error")
    tell(options, "no error")
