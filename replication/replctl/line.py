# SPDX-License-Identifier: BSD-3-Clause
"""What was typed, from the command line to an exit code.

    replctl [OPTIONS] COMMAND ...         a node by --control, --state, --node or the environment, or none
    replctl [OPTIONS] NAME COMMAND ...    the node NAME of this host

The first word that belongs to no option is a command if there is one of that name, and otherwise a node.
"""

from __future__ import annotations

import argparse
import os
import sys

from replication.client.session import Session, Unusable

from . import completion, nodes
from .outcome import Exit, Failed, failure, report
from .table import SOON_S, TABLE, TIMEOUT_S, On, Row, positive_seconds, row_of

_EPILOG = (
    "Exit codes: 0 done; 1 the node answered with an error; 2 wrong usage; 3 the node is not running; 4 it does not "
    "answer; 5 a wait was in vain. (Without a NAME, a node that cannot be reached is 2 for commands of version 0.2.)"
)

_VALUED = ("--control", "--state", "--node", "--timeout")
"""Options before the command that take a value."""


def parser() -> argparse.ArgumentParser:
    """argparse's form of the table."""
    whole = argparse.ArgumentParser(
        prog="replctl",
        usage="replctl [-h] [--control SOCKET | --state DIR | [--node] NAME] [--timeout SECONDS] COMMAND ...",
        description="Inspect and control the nodes of this host. The manual page is replctl(8).",
        epilog=_EPILOG,
    )
    where = whole.add_mutually_exclusive_group()
    where.add_argument("-s", "--control", metavar="SOCKET", help="the control socket (default: $REPLCTL_SOCKET)")
    where.add_argument("--state", metavar="DIR", help="the node's state folder; its socket is DIR/control.sock")
    where.add_argument("-n", "--node", metavar="NAME", help="the node NAME of this host; plain NAME is the same")
    whole.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=positive_seconds,
        help=f"longest wait for an answer of the node (default: {TIMEOUT_S:g}, or {SOON_S:g} where a manager decides)",
    )
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    for row in TABLE:
        _add(commands, row)
    return whole


def _add(commands: argparse._SubParsersAction[argparse.ArgumentParser], row: Row) -> None:
    command = commands.add_parser(row.name, help=row.text, description=row.text[0].upper() + row.text[1:] + ".")
    for names, settings in row.arguments:
        command.add_argument(*names, **{key: value for key, value in settings.items() if key != "complete"})
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(row=row, command=[])


def with_node(arguments: list[str]) -> list[str]:
    """`NAME COMMAND` becomes `--node NAME COMMAND`."""
    index = 0
    while index < len(arguments):
        word = arguments[index]
        if not word.startswith("-"):
            named = row_of(word) is None and len(arguments) > index + 1
            return [*arguments[:index], "--node", *arguments[index:]] if named else arguments
        takes_next = word in ("-s", "-n") or (
            len(word) > 2 and "=" not in word and any(name.startswith(word) for name in _VALUED)
        )
        index += 2 if takes_next else 1
    return arguments


def _apart(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is for replctl, and the command behind `--` of a row that takes one. (argparse takes a `*` for empty as soon
    as an option follows the words before it.)"""
    if "--" in arguments:
        at = arguments.index("--")
        if any(row is not None and row.takes_command for row in map(row_of, arguments[:at])):
            return arguments[:at], arguments[at + 1 :]
    return arguments, []


def run(arguments: list[str]) -> Exit:
    """Run one command line; SystemExit of argparse for wrong usage and --help."""
    if arguments[:1] == ["--complete"]:
        completion.show(arguments[1:])
        return Exit.DONE
    words, command = _apart(arguments)
    options = parser().parse_args(with_node(words))
    options.command = command or options.command
    if options.timeout is None:
        options.timeout = options.row.timeout_s
    try:
        _run(options)
        sys.stdout.flush()
    except Failed as said:
        sys.stdout.flush()
        return said.code
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # Our reader (head, say) has seen enough. What Python still has buffered must not fail again on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:  # noqa: BLE001
        failed = failure(error, options.node, distinct=options.row.distinct)
        report(failed, as_json=options.json)
        return failed.code
    return Exit.DONE


def _run(options: argparse.Namespace) -> None:
    row: Row = options.row
    given = options.control is not None or options.state is not None
    if row.on not in (On.NODE, On.SOCKET) and given:
        raise Unusable(f"{row.name} takes no control socket and no state folder")
    if row.on is On.HOST:
        if options.node is not None:
            raise Unusable(f"{row.name} takes no node")
        row.function()(options)
        return
    if row.on is On.ANY:
        row.function()(options)
        return
    if row.on is On.CONFIG:
        if options.node is None:
            raise Unusable(f"say for which node: replctl NAME {row.name}")
        row.function()(options.node, options)
        return
    path = socket_path(options)
    if row.on is On.SOCKET:
        if code := int(row.function()(path, options)):
            raise Failed(Exit(code))
        return
    if row.asks(options) and not sys.stdin.isatty():
        # Before connecting: the answer is the same whatever the node would say.
        raise Unusable(f"{row.name} asks for confirmation, and there is no terminal to ask on; use --yes")
    with Session(path, options.timeout) as client:
        row.function()(client, options)


def socket_path(options: argparse.Namespace) -> str:
    """The socket that the command line or the environment names."""
    if options.control is not None:
        return str(options.control)
    if options.state is not None:
        return os.path.join(options.state, "control.sock")
    if options.node is not None:
        return nodes.control_of(options.node)
    path = os.environ.get("REPLCTL_SOCKET")
    if not path:
        raise Unusable(
            "no control socket given: use --control SOCKET, --state DIR or $REPLCTL_SOCKET, or the NAME of a node"
        )
    return path
