#!/usr/bin/nbdkit python
# SPDX-License-Identifier: BSD-3-Clause
"""nbdkit plugin: continuous disk replication behind NBD. See README.md and man/.

Only nbdkit's callbacks are here; what they do is in the package `replication`, whose docstring says where to start.
Errors leave through one place, `_boundary`: those raised on purpose become one line and an errno, anything else a
traceback, because it is a bug.
"""

import contextlib
import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar

import nbdkit

# nbdkit does not put the script's folder on the path, and a link in its plugin folder may have led here.
sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
# nbdkit's Python takes its prefix from the first python3 on PATH; the modules that it needs (nbd, numpy) are Debian's.
sys.path.append("/usr/lib/python3/dist-packages")

import replication.compiled  # before the others: it decides which they are
from replication import VERSION
from replication.control.commands import Commands
from replication.control.inband import ControlExport
from replication.control.paircommands import PairCommands
from replication.control.qmp import Answer
from replication.control.server import ControlServer
from replication.errors import ConfigError, DiskError, Refusal, ReplicationError
from replication.events import EventHub
from replication.image.qcow2 import BLOCK
from replication.log import LOG, debug, log, log_defect, log_uncaught, printable
from replication.node import Node
from replication.options import Durability, OptionParser, Options
from replication.record.state import StateFolder
from replication.secondary.pairing import Channel
from replication.server import clients, later
from replication.server.abilities import Abilities
from replication.server.disconnect import Disconnector
from replication.server.errorlines import ErrorLines
from replication.server.export import Export, Exports
from replication.server.hangup import HangupGuard
from replication.server.placement import Placement
from replication.server.presence import Presence
from replication.server.threads import ThreadStates
from replication.service.guard import Guard
from replication.service.notify import Notifier
from replication.service.pulse import Pulse
from replication.service.reload import Reloader

API_VERSION = 2

AnyExport = Export | ControlExport


class Handle:
    """nbdkit's handle of a client."""

    __slots__ = ("export", "socket", "threads")

    def __init__(self, export: AnyExport, socket: int | None) -> None:
        self.export = export
        self.socket = socket
        self.threads = ThreadStates()


R = TypeVar("R")

MAX_BLOCK = 32 << 20
"""Largest request that every NBD client and server can handle (NBD specification)."""


class Process:
    """This process's half of the pair, from the first option to the end."""

    abilities = Abilities(nbdkit)
    parser = OptionParser()
    options: Options
    node: Node | None = None
    exports: Exports
    control: ControlServer | None = None
    commands: Commands
    disconnector: Disconnector
    hangup_guard = HangupGuard()
    error_lines = ErrorLines(LOG.put)
    placement: Placement | None = None
    host_watch = clients.HostWatch()
    presence: Presence
    pulse: Pulse | None = None
    reloader: Reloader | None = None


_format_exception: Callable[..., list[str]] = traceback.format_exception


def _format_one_line(*arguments: Any, **options: Any) -> list[str]:
    """nbdkit prints an exception with traceback.format_exception(type, error, traceback): those raised on purpose
    are one line."""
    error = arguments[1] if len(arguments) > 1 else None
    Process.error_lines.kind = (type(error), error.errno if isinstance(error, DiskError) else 0)
    # nbdkit sends it to the client, if it is the one to print it.
    Process.error_lines.direct = isinstance(error, Refusal) and Process.abilities.tells_tls_names
    if isinstance(error, ReplicationError):
        return [printable(str(error))]
    return _format_exception(*arguments, **options)


setattr(traceback, "format_exception", _format_one_line)  # noqa: B010 (an assignment would need a type: ignore)


def _boundary(callback: Callable[..., R]) -> Callable[..., R]:
    """Give the client of a failed callback its errno. nbdkit prints the exception, and since 1.42 sends the client what
    it has printed: so the reason is printed here, unless it is for the client, and nbdkit gets a text without it."""

    @functools.wraps(callback)
    def guarded(*args: Any) -> R:
        try:
            return callback(*args)
        except (DiskError, MemoryError) as error:
            _tell_client(error)
            if isinstance(error, Refusal):
                raise
            log(str(error) or type(error).__name__)
            number = error.wire_errno if isinstance(error, DiskError) else errno.ENOMEM
            raise DiskError(f"{os.strerror(number)}; the server's log says why", number) from None
        except Exception as defect:  # noqa: BLE001 (printed, and raised as another)
            log_defect(defect)
            raise DiskError("internal error; the server's log has more") from None

    return guarded


_FUA: Final = int(nbdkit.FLAG_FUA)


def _request(callback: Callable[..., R]) -> Callable[..., R]:
    """A request, served by one of nbdkit's threads for that client: given the export instead of the handle. What
    `_boundary` does is done here again, because a call more is a twentieth of a small request."""

    @functools.wraps(callback)
    def serve(h: Handle, *args: Any) -> R:
        try:
            h.threads.keep()
            return callback(h.export, *args)
        except (DiskError, MemoryError) as error:
            _tell_client(error)
            raise

    return serve


def _tell_client(error: DiskError | MemoryError) -> None:
    nbdkit.set_error(error.wire_errno if isinstance(error, DiskError) else errno.ENOMEM)


# -- start and end -----------------------------------------------------------------------------------------


def dump_plugin() -> None:
    """`nbdkit plugin.py --dump-plugin`."""
    print(f"replication_version={VERSION}")
    print(f"replication_compiled={'yes' if replication.compiled.RUNS else 'no'}")


def thread_model() -> int:
    """Requests of one connection run side by side: most of their time they wait for a disk or the peer."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def config(key: str, value: str) -> None:
    """KEY=VALUE of the command line."""
    Process.parser.add(key, value)


def config_complete() -> None:
    """All keys are there."""
    Process.options = Process.parser.finish()


def get_ready() -> None:
    """Open control socket, disks and images, while errors are still seen. nbdkit may fork after this.

    The socket before the images: what is refused because of it has made no image yet. All of it with the rights that
    nbdkit is going to have.
    """
    user = later.current()
    with LOG.held(unless=ConfigError), contextlib.nullcontext() if user is None else user.at_work():
        _get_ready()


def _get_ready() -> None:
    hub = EventHub()
    _check_identities()
    options = Process.options
    guard = Guard.of(Process.parser.handlers, {"mode": options.mode.value, "control": options.control or ""})
    state = StateFolder(Process.options.state, durable=Process.options.durability is Durability.POWER)
    try:
        if Process.options.control is not None:
            control = ControlServer(Process.options.control, _execute, hub)
            control.bind()
            Process.control = control
        node = Node(Process.options, hub, state)
    except ConfigError:
        if Process.control is not None:
            Process.control.stop()
        state.close()
        raise
    node.before_resync = guard.ask
    Process.node = node
    Process.pulse = Pulse(Notifier(os.environ), Process.options.control, hub)
    Process.reloader = reloader = Reloader.of(os.environ, node.configure, Process.pulse)
    Process.disconnector = Disconnector(
        _shutdown,
        Process.options.control,
        _unended,
        cleanup,
        None if reloader is None else reloader.reload,
        _let_go_of_guest,
        node.gate.newcomers_held,
    )
    commands = Commands(node, Process.disconnector.end)
    Process.commands = commands

    def control_export() -> ControlExport:
        channel = Channel(node.tenure.era)
        execute = PairCommands(node, commands, channel).execute
        return ControlExport(execute, hub, partial(node.channel_closed, channel), partial(node.heard, channel))

    Process.presence = Presence(Process.options.control)
    Process.exports = Exports(node, control_export, Process.options)


def _check_identities() -> None:
    """ConfigError for a key that this nbdkit cannot hold: a rule that is not checked must not seem to be one."""
    options = Process.options
    for key, identity in (("primary-identity", options.primary_identity), ("guest-identity", options.guest_identity)):
        if identity is not None and not Process.abilities.tells_tls_names:
            raise ConfigError(
                f"{key} needs an nbdkit that says which certificate a client has shown (1.40 or later), and this is an "
                "older one"
            )


def _execute(name: str, arguments: dict[str, Any]) -> Answer:
    """A control command; clients are served only after `after_fork`, when all is there."""
    if not name.startswith("query-"):
        debug(f"command {name}")
    return Process.commands.execute(name, arguments)


def _shutdown() -> None:
    """The process was told to end."""
    if Process.pulse is not None:
        Process.pulse.stop()
    _let_go_of_guest()
    if Process.node is not None:
        if Process.node.passing is not None and Process.node.passing.busy:
            Process.disconnector.cut()  # the owner has not answered in all that time
        _turn_away(Process.node)
    nbdkit.shutdown()


def _let_go_of_guest() -> None:
    """The process is ending, and waits for requests. Those of a guest that stands still get no answer: an error would
    be a fault of its disk, and a connection that is lost is one that it makes again."""
    node = Process.node
    if node is not None and (node.admission.still.waits or (node.passing is not None and node.passing.waits)):
        Process.disconnector.cut()
        _turn_away(node)


def _turn_away(node: Node) -> None:
    """Requests that wait fail."""
    node.admission.end()
    if node.passing is not None:
        node.passing.end()


def _unended() -> bool:
    """While nbdkit ends: it waits for threads that will never come, and no request is in flight any more."""
    return Process.hangup_guard.stuck > 0 and (Process.node is None or Process.node.gate.idle)


def after_fork() -> None:
    """Start threads, which do not survive a fork."""
    assert Process.node is not None
    LOG.start()
    log_uncaught()
    Process.error_lines.install()
    if not Process.abilities.survives_hangups:
        Process.hangup_guard.install()
    Process.disconnector.start()
    Process.host_watch.start()
    Process.node.launch()
    if Process.control is not None:
        Process.control.start()
    if Process.options.placement:
        Process.placement = Placement(Process.node.traffic, nbdkit.debug)
        Process.placement.start()
    if Process.reloader is not None:
        Process.reloader.start()
    if Process.pulse is not None:
        Process.pulse.start()


def cleanup() -> None:
    """No request is in flight any more, and none will come."""
    if Process.pulse is not None:
        Process.pulse.stop()
    Process.host_watch.stop()
    if Process.placement is not None:
        Process.placement.stop()
    if Process.control is not None:
        Process.control.stop()
    if Process.node is not None:
        Process.node.close()
    if not LOG.flush():
        # Nobody reads the log. The C library would wait for whoever does, at the end of the process.
        os._exit(0)


# -- exports -----------------------------------------------------------------------------------------------


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    """All of them."""
    return Process.exports.names()


def default_export(readonly: bool, is_tls: bool) -> str:
    """What an empty export name means."""
    return Process.exports.default()


@_boundary
def open(readonly: bool) -> Handle:
    """A client has chosen an export; the name is whatever it sent, so it is looked up here, once."""
    served = Process.disconnector.admit()
    socket = None
    try:
        client = clients.current(Process.abilities)
        clients.watch(client)
        name = nbdkit.export_name()
        nbdkit.debug(f"export {name!r}: {client.details}")
        debug(f"export {name!r}: {client.details}")
        socket = Process.presence.note(client)
        return Handle(Process.exports.open(name, client, partial(_has_gone, socket)), socket)
    except BaseException:
        Process.presence.forget(socket)
        if served:
            Process.disconnector.left()
        raise


def _has_gone(socket: int | None) -> bool:
    """Whether the client has, by itself: a process that ends closes the receiving half of each (disconnect.py), and
    that looks the same."""
    return not Process.disconnector.ending and Process.presence.gone(socket)


def close(h: Handle) -> None:
    """The client has gone. When it was sent away because the process ends, its session ends with the process."""
    try:
        if not Process.disconnector.ending:
            h.export.close()
    finally:
        Process.presence.forget(h.socket)
        Process.disconnector.left()
        h.threads.let_go()


def get_size(h: Handle) -> int:
    """Bytes."""
    return h.export.size


def export_description(h: Handle) -> str:
    """For nbdinfo."""
    return h.export.description


def block_size(h: Handle) -> tuple[int, int, int]:
    """Any alignment is accepted; whole blocks of the overlays are fastest."""
    return (1, BLOCK, MAX_BLOCK)


def can_multi_conn(h: Handle) -> bool:
    """A flush on one connection covers what was answered on all: Export.flush. A control connection is one session."""
    return isinstance(h.export, Export)


def can_write(h: Handle) -> bool:
    """Both faces and the primary are written to."""
    return True


def can_flush(h: Handle) -> bool:
    """Everywhere."""
    return True


def can_trim(h: Handle) -> bool:
    """Everywhere, as zeroes."""
    return True


def can_zero(h: Handle) -> bool:
    """Everywhere."""
    return True


def can_fast_zero(h: Handle) -> bool:
    """No: copy-before-write may have to read and write what a zero destroys."""
    return False


def can_fua(h: Handle) -> int:
    """Passed down to the disk."""
    return int(nbdkit.FUA_NATIVE)


def can_cache(h: Handle) -> int:
    """nbdkit reads, which fills the page cache below."""
    return int(nbdkit.CACHE_EMULATE)


def can_extents(h: Handle) -> bool:
    """Everywhere."""
    return True


# -- requests ----------------------------------------------------------------------------------------------


def pread(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    """Read. Like `pwrite` without `_request`, whose call more is a part of it that can be measured."""
    try:
        h.threads.keep()
        h.export.read(buf, offset)
    except (DiskError, MemoryError) as error:
        _tell_client(error)
        raise


def pwrite(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    """Write."""
    try:
        h.threads.keep()
        h.export.write(buf, offset, flags & _FUA != 0)
    except (DiskError, MemoryError) as error:
        _tell_client(error)
        raise


@_request
def zero(h: AnyExport, count: int, offset: int, flags: int) -> None:
    """Write zeroes."""
    h.zero(offset, count, bool(flags & nbdkit.FLAG_MAY_TRIM), bool(flags & nbdkit.FLAG_FUA))


@_request
def trim(h: AnyExport, count: int, offset: int, flags: int) -> None:
    """Trim: zeroes, as holes where possible, so that both sides of the pair read the same afterwards."""
    h.zero(offset, count, True, bool(flags & nbdkit.FLAG_FUA))


@_request
def flush(h: AnyExport, flags: int) -> None:
    """Flush."""
    h.flush()


@_request
def extents(h: AnyExport, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """Block status."""
    return [
        (item.offset, item.length, nbdkit.EXTENT_ZERO * item.zero | nbdkit.EXTENT_HOLE * item.hole)
        for item in h.extents(offset, count, bool(flags & nbdkit.FLAG_REQ_ONE))
    ]
