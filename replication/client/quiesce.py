# SPDX-License-Identifier: BSD-3-Clause
"""A checkpoint of clean file systems: the guest's QEMU agent freezes them, the epoch is cut, and they are thawed.

    freeze      guest-fsfreeze-freeze: the guest's applications (its hooks) and file systems write everything and stop
    cut         replication-checkpoint with `hold`, which answers at once, or when another command of the node's has
                ended: so long, and HOLD_S at most, the guest stands still
    thaw        guest-fsfreeze-thaw, whatever has become of the cut
    commit      what was cut is brought over, and becomes the checkpoint, while the guest works again; a node keeps it
                for its `timeout`, so the thaw must not take longer

The guest is thawed whatever happens to this program: a process beside it (`_guard`) has the agent's connection as well,
and thaws when this one dies, or when it has not been told within GUARD_S that this one has done it. Either connects
again if the connection is gone. What is left is an agent that does not answer at all: that is said, and what to do.

What somebody else has frozen, a backup say, stays frozen: the agent is asked before, and nothing is thawed after a
freeze that it has refused, which has frozen nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from . import commands
from .lines import Late, Lines, Nonsense, Trouble
from .qmp import Refused
from .session import Session, Unanswered, Unusable
from .values import human_seconds, human_value, printable

FREEZE_S = 10.0
"""Longest wait for an answer of the agent: a guest that has much to write needs seconds."""

GUARD_S = 2 * FREEZE_S
"""After so long the guard thaws: the longest that the file systems stay frozen, of an agent that answers."""

HOLD_S = 3.0
"""Longest wait for the cut."""

SLOW_THAW_S = 1.0
"""A thaw that took so long is perhaps why the node has what was cut no longer: the shortest sensible `timeout`."""

AGAIN_S = 0.1
"""Between two attempts at a connection that was lost."""

_RESET = b"\xff"
"""What the agent's parser takes for the end of whatever a former client has left unfinished (QEMU, guest-sync)."""

_SYNC = "guest-sync"
_STATUS = {"execute": "guest-fsfreeze-status"}
_FREEZE = {"execute": "guest-fsfreeze-freeze"}
_THAW = {"execute": "guest-fsfreeze-thaw"}

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What a terminal or a service manager ends all of a command's processes with."""


class _Lost(Unusable):
    """There is no agent at the socket (any more), or what there is does not talk as one."""


class _Unfrozen(Refused):
    """The agent has refused to freeze: it has undone by itself what it had frozen already."""


class Agent:
    """The QEMU guest agent of a guest, at the socket of its channel. Refused, Unusable."""

    def __init__(self, path: str, timeout_s: float = FREEZE_S) -> None:
        """Connect, and see that there is an agent; what a former client has left unread is passed over. `timeout_s`
        bounds each question."""
        self._path = path
        self._timeout_s = timeout_s
        self._lines = self._connected()

    def _connected(self) -> Lines:
        deadline = time.monotonic() + self._timeout_s
        try:
            lines = Lines(self._path, deadline)
        except Trouble as error:
            late = isinstance(error, Late)
            why = f"no connection within {self._timeout_s:g} s" if late else error.reason
            raise _Lost(f"{self._path}: no guest agent: {why}") from error
        try:
            with self._said(_SYNC):
                lines.send_bytes(_RESET, deadline)
                self._synchronize(lines, [], deadline)
        except BaseException:
            lines.close()
            raise
        return lines

    @staticmethod
    def _synchronize(lines: Lines, messages: list[dict[str, Any]], deadline: float) -> dict[str, Any]:
        """The answer to the last message. They go together with one that synchronises, whose answer is the last: so
        what a former one is answered late is not taken for it."""
        number = int.from_bytes(os.urandom(4), "big")
        latest: dict[str, Any] = {}
        for message in (*messages, {"execute": _SYNC, "arguments": {"id": number}}):
            lines.send(message, deadline)
        while (answer := lines.receive(deadline)).get("return") != number:
            latest = answer
        return latest

    @contextlib.contextmanager
    def _said(self, command: str) -> Iterator[None]:
        try:
            yield
        except Late:
            raise Unusable(
                f"{self._path}: the guest agent has not answered {command} within {self._timeout_s:g} s"
            ) from None
        except Trouble as error:
            ended = "what it says is no answer" if isinstance(error, Nonsense) else "it has closed the connection"
            why = ended if error.cause is None else error.reason
            raise _Lost(f"{self._path}: the guest agent does not talk as one: {why}") from None

    def _ask(self, message: dict[str, Any]) -> Any:
        command = message["execute"]
        with self._said(command):
            answer = self._synchronize(self._lines, [message], time.monotonic() + self._timeout_s)
        if "error" in answer:
            failure = answer["error"]
            desc = failure.get("desc", failure) if isinstance(failure, dict) else failure
            raise Refused(f"the guest agent refuses {command}: {printable(desc)}")
        return answer.get("return")

    @contextlib.contextmanager
    def frozen(self) -> Iterator[int]:
        """In here the guest's file systems are frozen, so many of them. Refused when there are none, and when somebody
        else has frozen them before or thawed them meanwhile; Unusable when it is not known that they are thawed
        afterwards."""
        if self._ask(_STATUS) == "frozen":
            raise Refused("the guest's file systems are frozen already, by somebody else: they were left as they are")
        with self._guard() as done:
            try:
                count = self._freeze()
                yield count
            except _Unfrozen:
                done()
                raise
            except BaseException:
                # Also when nobody knows whether they are frozen: then it answers 0.
                self._thaw()
                done()
                raise
            thawed = self._thaw()
            done()
        if not thawed:
            raise Refused("the guest's file systems were thawed by somebody else, perhaps before the cut")

    def _freeze(self) -> int:
        """How many file systems it has frozen."""
        try:
            count = self._ask(_FREEZE)
        except Refused as error:
            raise _Unfrozen(str(error)) from error
        if not isinstance(count, int) or count < 1:  # its hooks have run all the same, and are to hear of a thaw
            raise Refused("the guest agent has frozen no file system: no checkpoint was taken")
        return count

    def _thaw(self) -> Any:
        """How many file systems were frozen still. A connection that is gone is made again, for as long as an answer
        may take."""
        until = time.monotonic() + self._timeout_s
        while True:
            try:
                return self._ask(_THAW)
            except (Refused, Unusable) as error:
                if not isinstance(error, _Lost) or time.monotonic() > until:
                    raise Unusable(
                        f"the guest's file systems may still be frozen: thaw them with guest-fsfreeze-thaw ({error})"
                    ) from error
            with contextlib.suppress(Unusable):
                lines = self._connected()
                self._lines.close()
                self._lines = lines
                continue
            time.sleep(AGAIN_S)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[Callable[[], object]]:
        """A process that thaws unless it is told that it need not. Unusable if there can be none."""
        # What ends this program must not end that one, not even before it runs: there they stay blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        try:
            theirs, ours = os.pipe()
            child = os.fork()
            if not child:
                self._keep_guard(theirs, ours)
        except OSError as error:
            raise Unusable(f"no process can be started that thaws the guest if this one dies: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(theirs)
        try:
            yield lambda: os.write(ours, b"1")
        finally:
            os.close(ours)
            os.waitpid(child, 0)

    def _keep_guard(self, theirs: int, ours: int) -> NoReturn:
        """In the other process."""
        try:
            os.setsid()
            os.close(ours)
            ready, _, _ = select.select([theirs], [], [], GUARD_S)
            if not ready or not os.read(theirs, 1):
                self._thaw()
        finally:
            os._exit(0)

    def close(self) -> None:
        """Close the connection."""
        self._lines.close()


def checkpoint(client: Session, options: argparse.Namespace) -> None:
    """Take a checkpoint; with --quiesce one of the pair at an instant at which the guest's file systems are clean."""
    if options.quiesce is None:
        commands.checkpoint(client, options)
        return
    status = client.call("query-replication")
    link = status.get("link")
    state = link.get("state") if isinstance(link, dict) else None
    # Before the guest stands still for nothing.
    if status.get("mode") != "primary":
        raise Refused("--quiesce is for the primary, where the guest runs: the guest was not frozen")
    if state != "in-sync":
        raise Refused(f"the link is not in sync ({human_value(state)}): the guest was not frozen")
    epoch: Any = None
    try:
        with contextlib.closing(Agent(options.quiesce)) as agent:
            begun = time.monotonic()
            with agent.frozen() as count:
                epoch = client.attempt(HOLD_S, "replication-checkpoint", hold=True).get("epoch")
                cut = time.monotonic()
        thawed = time.monotonic()
    except Unanswered as error:
        _give_up(client, epoch, math.inf)
        raise Refused(
            "the node did not cut in time, being at another command, a checkpoint perhaps: the guest was thawed, and "
            "no checkpoint of it was taken"
        ) from error
    except BaseException:
        _give_up(client, epoch, HOLD_S)
        raise
    try:
        answer = client.call("replication-checkpoint-commit", epoch=epoch)
    except Refused as error:
        if thawed - cut < SLOW_THAW_S:
            raise
        slow = f"the thaw took {human_seconds(thawed - cut)}, and a node keeps what it has cut for its timeout only"
        raise Refused(f"{error}; {slow}", error.error_class, error.code) from error
    frozen_s = thawed - begun
    text = (
        f"checkpoint {human_value(answer.get('epoch'))} took {human_seconds(answer.get('duration'))}; "
        f"{human_value(count)} file systems were frozen for {human_seconds(frozen_s)}"
    )
    facts: dict[str, Any] = {"file-systems": count, "frozen-seconds": frozen_s}
    commands.tell(options, text, epoch=answer.get("epoch"), duration=answer.get("duration"), **facts)


def _give_up(client: Session, epoch: Any, within_s: float) -> None:
    """Abort what was cut, also if the node cuts it now only (within `within_s`), when nobody is frozen any more."""
    with contextlib.suppress(Refused, Unusable):  # then it is given up by itself, after the node's timeout
        if epoch is None:
            epoch = (client.overdue(within_s) or {}).get("epoch")
        if epoch is not None:
            client.call("replication-checkpoint-abort", epoch=epoch)
