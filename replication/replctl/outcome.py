# SPDX-License-Identifier: BSD-3-Clause
"""How a command of replctl ends: the exit code, the line on stderr, and the same as JSON.

replctl(8) promises the numbers. A socket that is given by its path has 2 where a node by its name has 3 or 4, for the
commands of version 0.2: programs that have used replctl with a path since its first version tell "refused" from
"anything else" by it. Later commands are `distinct`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from enum import IntEnum

from replication.client.qmp import Refused
from replication.client.session import NotRunning, Unreachable, Unusable
from replication.client.values import printable


class Exit(IntEnum):
    """The exit codes."""

    DONE = 0
    REFUSED = 1
    """The node answered with an error; or what was looked at is not as it should be."""
    USAGE = 2
    """Wrong usage, an unknown name, a file that cannot be used; a socket given by path at which nobody answers."""
    NOT_RUNNING = 3
    NO_ANSWER = 4
    TIMED_OUT = 5
    """What was waited for has not come."""
    INTERRUPTED = 130
    """128 + SIGINT, as a shell reports it."""


class Failed(Exception):
    """A command that has said all there is to say, and ends with this code."""

    def __init__(self, code: Exit) -> None:
        super().__init__(code.name)
        self.code = code


@dataclass(frozen=True)
class Failure:
    """What a command that has raised something ends with."""

    code: Exit
    reason: str
    """Of the JSON form: refused, usage, not-running, no-answer, unexpected."""
    text: str
    refusal: str | None = None
    """Of the node: the code of its reason."""


def failure(error: Exception, node: str | None, *, distinct: bool = False) -> Failure:
    """What `error` comes to. `node`: the name by which the node was given, if it was. `distinct`: of a command that
    tells also by a path what is wrong."""
    distinct |= node is not None
    match error:
        case Refused():
            return Failure(Exit.REFUSED, "refused", str(error), error.code)
        case NotRunning():
            text = str(error) if node is None else f"{node} is not running: {error}"
            return Failure(Exit.NOT_RUNNING if distinct else Exit.USAGE, "not-running", text)
        case Unreachable():
            return Failure(Exit.NO_ANSWER if distinct else Exit.USAGE, "no-answer", str(error))
        case Unusable():
            return Failure(Exit.USAGE, "usage", str(error))
        case ImportError():
            package = {"rich": "python3-rich", "nbd": "python3-libnbd"}.get(str(error.name), error.name)
            other = ", or use --json" if error.name == "rich" else ""
            return Failure(Exit.USAGE, "usage", f"{error.name} is missing: install {package}{other}")
        case _:
            # An answer in a form that nobody expected: one line for the person, not a trace.
            return Failure(Exit.USAGE, "unexpected", f"unexpected {type(error).__name__}: {error}")


def report(failed: Failure, *, as_json: bool) -> None:
    """Print it: a line on stderr, and with --json an object on stdout as well."""
    if as_json:
        said = {"code": int(failed.code), "reason": failed.reason, "text": failed.text}
        if failed.refusal is not None:
            said["refusal"] = failed.refusal
        print(json.dumps({"failed": said}), flush=True)
    print(f"replctl: {printable(failed.text)}", file=sys.stderr)
