# SPDX-License-Identifier: BSD-3-Clause
"""replctl test: what a failover would give now, to look at, to boot, to throw away."""

from __future__ import annotations

import argparse
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from replication.client.commands import tell
from replication.client.session import Session, Unusable
from replication.client.values import human_value

from . import nodes


def test(client: Session, options: argparse.Namespace) -> None:
    """Start or stop one."""
    if options.action == "stop":
        _stop(client, options)
    else:
        _start(client, options)


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
    return [
        {**export, "uri": urlunsplit(place._replace(path=f"/{quote(str(export.get('export')), safe='')}"))}
        for export in exports
    ]
