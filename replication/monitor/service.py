# SPDX-License-Identifier: BSD-3-Clause
"""replication-monitor: a fleet of watchers, and a web server in front of it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType

from replication.errors import ConfigError
from replication.log import log
from replication.monitor.access import Access
from replication.monitor.fleet import Fleet, Found
from replication.monitor.handlers import Handlers
from replication.monitor.web import WebServer
from replication.service.config import load, names
from replication.service.handlers import Handler
from replication.service.notify import Notifier

HANDLERS_STOP_S = 5.0


class Given:
    """The nodes that the command line names, each as SOCKET or NAME=SOCKET."""

    def __init__(self, nodes: Sequence[str]) -> None:
        """ConfigError when two have one name."""
        self._sockets: dict[str, str] = {}
        for node in nodes:
            name, path = split_node(node)
            if name in self._sockets:
                raise ConfigError(f"--node={node}: there is another node of the name {name}")
            self._sockets[name] = path

    def __call__(self) -> Found:
        """Always the same."""
        return Found(self._sockets)

    def handlers(self, _node: str) -> tuple[Handler, ...]:
        """None: they stand in the files of the nodes."""
        return ()


def split_node(node: str) -> tuple[str, str]:
    """Name and socket. Without a name the path is the name: a folder's last part is often the same for all nodes."""
    name, equals, path = node.partition("=")
    if not equals or "/" in name:
        name, path = node, node
    if not name or not path:
        raise ConfigError(f"--node={node} is not SOCKET or NAME=SOCKET")
    return name[:200], os.path.abspath(path)


class Configured:
    """The nodes that have a file in the configuration folder. One whose file cannot be read stays where it was."""

    def __init__(self) -> None:
        self._sockets: dict[str, str] = {}
        # Replaced as a whole by the fleet's thread, read by those of the nodes.
        self._handlers: dict[str, tuple[Handler, ...]] = {}

    def __call__(self) -> Found:
        """What there is now; ConfigError if the folder cannot be read."""
        found, handlers, troubles = {}, {}, []
        for name in names():
            try:
                config = load(name)
                found[name], handlers[name] = config.control, config.handlers
            except ConfigError as error:
                troubles.append(str(error))
                if name in self._sockets:
                    found[name], handlers[name] = self._sockets[name], self._handlers[name]
        self._sockets, self._handlers = found, handlers
        return Found(dict(found), "; ".join(troubles) or None)

    def handlers(self, node: str) -> tuple[Handler, ...]:
        """The handlers of a node, as its file had them last."""
        return self._handlers.get(node, ())


class Service:
    """What runs until it is told to stop."""

    def __init__(self, find: Given | Configured, access: Access) -> None:
        """ConfigError when the address cannot be listened on."""
        self.handlers = Handlers(find.handlers)
        self.fleet = Fleet(find, listener=self.handlers)
        try:
            self.web = WebServer(self.fleet, access)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--listen={access.host}:{access.port}: cannot listen there: {reason}") from error

    @property
    def url(self) -> str:
        """Where it can be read."""
        host, port = self.web.server_address[:2]
        scheme = "http" if self.web.access.tls is None else "https"
        shown = f"[{host!s}]" if ":" in str(host) else str(host)
        return f"{scheme}://{shown}:{port}"

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        stopping, systemd = threading.Event(), Notifier(os.environ)

        def stop(_number: int, _frame: FrameType | None) -> None:
            stopping.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        self.fleet.start()
        serving = threading.Thread(target=self.web.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)
        serving.start()
        log(f"replication-monitor: {len(self.fleet.watchers())} nodes, {self.url}")
        systemd.tell(READY=1)
        # A loop, because a wait without an end would keep Python from seeing the signal.
        while not stopping.wait(1.0):
            pass
        systemd.tell(STOPPING=1)
        self.fleet.stop()
        self.handlers.stop(HANDLERS_STOP_S)
        self.web.shutdown()
        self.web.server_close()
