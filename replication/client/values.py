# SPDX-License-Identifier: BSD-3-Clause
"""One value of a node's answer, as a person reads it."""

from __future__ import annotations

import json
import os
from datetime import datetime


def printable(value: object) -> str:
    """`value` as one line in which nothing can drive a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(value))


def human_bytes(value: object) -> str:
    """A number of bytes with a unit, anything else as it is."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "-" if value is None else printable(value)
    amount, units = float(value), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while abs(amount) >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:.0f} {units[0]}" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def human_seconds(value: object) -> str:
    """A duration in seconds with a unit that suits it."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "-" if value is None else printable(value)
    if value < 0.001:
        return f"{value * 1e6:.0f} us"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.1f} s"


def human_time(value: object) -> str:
    """A Unix time as local time; "never" for None."""
    if value is None:
        return "never"
    try:
        return datetime.fromtimestamp(float(value)).strftime("%Y-%m-%d %H:%M:%S")  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, OSError):
        return printable(value)


def human_value(value: object) -> str:
    """A value of a kind this tool knows nothing about."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict | list):
        return printable(json.dumps(value))
    return printable(value)


def human_error(error: object) -> str:
    """query-replication's `error`: the description, then its cause as far as it is known."""
    if not isinstance(error, dict):
        return "none" if error is None else printable(error)
    names = ("case", "disk", "operation", "offset", "length")
    cause = [f"{name} {human_value(error[name])}" for name in names if error.get(name) is not None]
    number = error.get("errno")
    if isinstance(number, int) and not isinstance(number, bool):
        cause.append(os.strerror(number))
    elif number is not None:
        cause.append(human_value(number))
    if error.get("count") is not None:
        cause.append(f"{human_value(error['count'])} times")
    cause += [f"{key} {human_time(error[key])}" for key in ("first", "last") if error.get(key) is not None]
    known = {*names, "errno", "count", "first", "last", "desc"}
    cause += [f"{printable(key)} {human_value(value)}" for key, value in error.items() if key not in known]
    desc = printable(error.get("desc", "failed"))
    return f"{desc} ({', '.join(cause)})" if cause else desc


def human_checkpoint(checkpoint: object) -> str:
    """query-replication's `checkpoint`."""
    if not isinstance(checkpoint, dict):
        return human_value(checkpoint)
    if checkpoint.get("time") is None:
        return "never"
    age = f", {human_seconds(checkpoint['age'])} old" if checkpoint.get("age") is not None else ""
    return f"{human_time(checkpoint['time'])}{age}, took {human_seconds(checkpoint.get('duration'))}"


def human_link(link: object) -> str:
    """query-replication's `link`."""
    if not isinstance(link, dict):
        return human_value(link)
    rest = [f"{printable(key)} {human_value(value)}" for key, value in link.items() if key != "state"]
    return ", ".join([human_value(link.get("state")), *rest])


def human_lineage(lineage: object) -> str:
    """query-replication's `lineage`, without the ids of all that it comes from."""
    if not isinstance(lineage, dict) or not isinstance(lineage.get("history"), list):
        return human_value(lineage)
    if not lineage.get("current"):
        return "never part of a pair" if not lineage.get("incoming") else f"receiving {printable(lineage['incoming'])}"
    came_from = f", comes from {printable(lineage['history'][0])}" if lineage["history"] else ""
    shared = ", the other node may have it" if lineage.get("shared") else ""
    incoming = f", receiving {printable(lineage['incoming'])}" if lineage.get("incoming") else ""
    return f"{printable(lineage['current'])}{came_from}{shared}{incoming}"


def human_stall(stall: object) -> str:
    """query-replication's `longest-stall`."""
    if not isinstance(stall, dict):
        return "none" if stall is None else human_value(stall)
    when = "under way" if stall.get("under-way") is True else f"at {human_time(stall.get('time'))}"
    what = f"{human_value(stall.get('operation'))} on {human_value(stall.get('export'))}"
    why = f"{human_value(stall.get('reason'))}: {human_value(stall.get('text'))}"
    return f"{human_seconds(stall.get('seconds'))}, {what}, {when} ({why})"


def human_verify(progress: object) -> str:
    """query-replication's `verify`: the comparison that is under way."""
    if not isinstance(progress, dict):
        return "no" if progress is None else human_value(progress)
    done, total = (human_bytes(progress.get(f"{which}-progress")) for which in ("current", "total"))
    waits = f", waits: {printable(progress['waits-for'])}" if progress.get("waits-for") else ""
    return f"{done} of {total}, {human_bytes(progress.get('different-bytes'))} differ{waits}"


def human_last_verify(outcome: object) -> str:
    """query-replication's `last-verify`: how the last comparison has ended."""
    if not isinstance(outcome, dict):
        return "never" if outcome is None else human_value(outcome)
    text = f"{human_time(outcome.get('time'))}, {human_value(outcome.get('result'))}"
    if outcome.get("different-bytes"):
        text += f", {human_bytes(outcome['different-bytes'])} differed"
    return f"{text} ({printable(outcome['reason'])})" if outcome.get("reason") else text


def human_tests(tests: object) -> str:
    """query-replication's `tests`: those of a failover that there are now."""
    if not isinstance(tests, list) or not all(isinstance(test, dict) for test in tests):
        return human_value(tests)

    def one(test: dict[str, object]) -> str:
        ended = f", ended: {printable(test['ended'])}" if test.get("ended") else ""
        of = f"of checkpoint {human_value(test.get('epoch'))}, {human_bytes(test.get('bytes'))}"
        return f"{printable(test.get('name'))} ({of}{ended})"

    return ", ".join(map(one, tests)) or "none"


def human_last_test(outcome: object) -> str:
    """query-replication's `last-test`: how the last test of a failover has ended."""
    if not isinstance(outcome, dict):
        return "never" if outcome is None else human_value(outcome)
    text = f"{human_time(outcome.get('time'))}, {human_value(outcome.get('result'))}"
    if outcome.get("rto") is not None:
        text += f" in {human_seconds(outcome['rto'])}"
    return f"{text} ({printable(outcome['reason'])})" if outcome.get("reason") else text


def human_outdated(outdated: object) -> str:
    """query-replication's `outdated-reason`."""
    if not isinstance(outdated, dict):
        return "-" if outdated is None else human_value(outdated)
    return f"since {human_time(outdated.get('time'))}: {printable(outdated.get('reason'))}"


def human_member(name: str, value: object) -> str:
    """A member this tool knows only by its name."""
    return human_bytes(value) if name.endswith("bytes") else human_value(value)
