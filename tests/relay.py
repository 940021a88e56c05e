# SPDX-License-Identifier: BSD-3-Clause
"""The process between the two hosts of a Wire (wire.py): makes them, passes frames or does to them what it is told, and
removes them. lanes.py has the frames, tcpflows.py the connections.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import math
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lanes import Lane, Port
from namespaces import (
    HOSTS,
    Host,
    WireError,
    hosts_of,
    leave_network_namespace,
    remove_namespace,
    remove_stale_namespaces,
)
from shape import DIRECTIONS, Shape
from tcpflows import Flows
from wire import MESSAGE_BYTES_MAX, Control

_SIOCETHTOOL = 0x8946
_OFFLOADS = {  # ETHTOOL_S... of linux/ethtool.h
    "transmit checksums": 0x17,
    "scatter-gather": 0x19,
    "TCP segmentation": 0x1F,
    "generic segmentation": 0x24,
}
_ACTIVE_S = 30.0
_CLIENTS_MAX = 8


def _without_offloads(interface: str) -> None:
    """Have the kernel finish its frames: the relay would else see segments of 64 KiB without a checksum."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as anything:
        for what, command in _OFFLOADS.items():
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP", interface.encode(), ctypes.addressof(value))
            try:
                fcntl.ioctl(anything, _SIOCETHTOOL, request)
            except OSError as error:
                raise WireError(f"cannot turn off {what} on {interface}: {error.strerror}") from error


class Relay:
    """The process between the hosts: makes them, passes frames, and removes them."""

    def __init__(self, name: str, seed: int, mtu: int) -> None:
        self._name = name
        self._seed = seed
        self._mtu = mtu
        self._made: list[str] = []
        self._cut = False
        self._ended = False
        self._clients: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self._flows = Flows()
        self._lanes: dict[str, Lane] = {}

    def make(self) -> None:
        """Make the hosts, the cables, and the namespace in which the relay is, which goes with the process."""
        # Here, so that the tests themselves do not need it: it takes a quarter of a second to load.
        from pyroute2 import IPRoute, netns  # noqa: PLC0415

        remove_stale_namespaces()
        leave_network_namespace()
        # Before there is an interface. IPv6 would send things that no test has asked for.
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1", encoding="ascii")
        with IPRoute() as route:
            for name, host in hosts_of(self._name).items():
                remove_namespace(host.namespace)  # of a relay that was killed
                self._made.append(host.namespace)
                netns.create(host.namespace)
                mac = HOSTS[name][1]
                peer = {"ifname": "eth0", "net_ns_fd": host.namespace, "address": mac, "mtu": self._mtu}
                route.link("add", ifname=name, kind="veth", mtu=self._mtu, peer=peer)
                route.link("set", index=route.link_lookup(ifname=name)[0], state="up")
                self._furnish(host)
                _wait_active(route, name)
        ports = {name: Port(name, mac) for name, (_, mac) in HOSTS.items()}
        for name in DIRECTIONS:
            self._lanes[name] = Lane(ports[name[0]], ports[name[1]], self._flows, f"{self._seed} {name}")

    @staticmethod
    def _furnish(host: Host) -> None:
        """Give a host its address and its loopback."""
        from pyroute2 import IPRoute  # noqa: PLC0415

        with host.entered(), IPRoute() as route:
            Path("/proc/sys/net/ipv6/conf/eth0/disable_ipv6").write_text("1", encoding="ascii")
            _without_offloads("eth0")
            (index,) = route.link_lookup(ifname="eth0")
            route.addr("add", index=index, address=host.address, prefixlen=24)
            route.link("set", index=index, state="up")
            route.link("set", index=route.link_lookup(ifname="lo")[0], state="up")
            for name, (address, mac) in HOSTS.items():
                if name != host.name:
                    route.neigh("add", dst=address, lladdr=mac, ifindex=index, state=0x80)  # NUD_PERMANENT

    def listen(self, path: str) -> None:
        """Take commands at a socket as well, for root only; raises WireError if another relay does already."""
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            Control.connected(path).close()
            raise WireError(f"a relay listens at {path} already")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # of a relay that was killed
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        mask = os.umask(0o077)
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
        self._listener = listener
        listener.listen(_CLIENTS_MAX)

    def unmake(self) -> None:
        """Remove the hosts and the control socket."""
        for namespace in self._made:
            remove_namespace(namespace)
        if self._listener is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._listener.getsockname())

    def run(self, parent: socket.socket) -> None:
        """Pass frames and obey until `end`, or, unless there is a socket to listen at, until the parent is gone."""
        self._clients = [parent]
        by_socket = {lane.source.socket: lane for lane in self._lanes.values()}
        while not self._ended:
            due = min(lane.due for lane in by_socket.values())
            timeout_s = None if due == math.inf else max(0.0, due - time.monotonic())
            listeners = [self._listener] if self._listener and len(self._clients) < _CLIENTS_MAX else []
            # select, because epoll counts in milliseconds.
            readable, _, _ = select.select([*by_socket, *listeners, *self._clients], [], [], timeout_s)
            for lane in by_socket.values():
                lane.deliver(time.monotonic())
            for ready in readable:
                if ready in by_socket:
                    by_socket[ready].drain(time.monotonic())
                elif ready is self._listener:
                    self._clients.append(ready.accept()[0])
                else:
                    self._serve(ready)
            if parent not in self._clients and self._listener is None:
                return

    def _serve(self, client: socket.socket) -> None:
        """Do one command of a client's and answer it; drop one that has gone or does not take its answers."""
        try:
            message = client.recv(MESSAGE_BYTES_MAX, socket.MSG_DONTWAIT)
            if message:
                client.send(json.dumps(self._answer(message)).encode(), socket.MSG_DONTWAIT)
                return
        except OSError as error:
            print(f"relay: a client was dropped: {error.strerror}", file=sys.stderr)
        self._clients.remove(client)
        client.close()

    def _answer(self, message: bytes) -> dict[str, Any]:
        commands: dict[str, Callable[..., Any]] = {
            "blackhole": self._do_blackhole,
            "cut": self._do_cut,
            "end": self._do_end,
            "mend": self._do_mend,
            "reset": self._do_reset,
            "shape": self._do_shape,
            "status": self._do_status,
        }
        try:
            request = json.loads(message)
            command = request.pop("do") if isinstance(request, dict) and "do" in request else None
            if command not in commands:
                raise WireError(f"there is no command {command!r}")
            return {"return": commands[command](**request)}
        except (WireError, ValueError, TypeError) as error:
            return {"error": str(error)}

    def _chosen(self, direction: str | None) -> list[Lane]:
        if direction is None:
            return list(self._lanes.values())
        if direction not in self._lanes:
            raise WireError(f"there is no direction {direction!r}: {' and '.join(DIRECTIONS)} are the two")
        return [self._lanes[direction]]

    def _do_shape(self, shape: dict[str, Any], direction: str | None = None) -> None:
        for lane in self._chosen(direction):
            lane.shape = Shape(**shape)

    def _do_blackhole(self, direction: str | None = None) -> None:
        for lane in self._chosen(direction):
            lane.silent = True
            lane.forget(lambda _: True)

    def _do_cut(self) -> None:
        self._set_cables("down")
        self._cut = True
        for lane in self._lanes.values():
            lane.forget(lambda _: True)

    def _do_mend(self) -> None:
        for lane in self._lanes.values():
            lane.silent = False
        if self._cut:
            self._set_cables("up")
            self._cut = False

    def _do_reset(self) -> int:
        if self._cut or any(lane.silent for lane in self._lanes.values()):
            raise WireError("a reset could not get through: mend the network first")
        refused = self._flows.refuse_all()
        for lane in self._lanes.values():
            lane.forget(lambda segment: segment is not None and segment.flow.refused)
        lanes = {socket.inet_aton(HOSTS[name[0]][0]): lane for name, lane in self._lanes.items()}
        for flow in refused:
            lanes[flow.addresses[:4]].reset_source(flow, flow.awaits or 0)
        return len(refused) // 2

    def _do_status(self) -> dict[str, Any]:
        for lane in self._lanes.values():
            lane.note_gauges()
        silent = [name for name, lane in self._lanes.items() if lane.silent]
        return {
            "name": self._name,
            "pid": os.getpid(),
            "seed": self._seed,
            "mtu": self._mtu,
            "link": "cut" if self._cut else "black hole " + " and ".join(silent) if silent else "up",
            "hosts": {name: asdict(host) for name, host in hosts_of(self._name).items()},
            "shapes": {name: asdict(lane.shape) for name, lane in self._lanes.items()},
            "counters": {name: asdict(lane.counters) for name, lane in self._lanes.items()},
        }

    def _do_end(self) -> None:
        self._ended = True

    @staticmethod
    def _set_cables(state: str) -> None:
        """Take the relay's ends up or down; the hosts' ends lose their carrier with them."""
        from pyroute2 import IPRoute  # noqa: PLC0415

        with IPRoute() as route:
            for name in HOSTS:
                route.link("set", index=route.link_lookup(ifname=name)[0], state=state)


def _wait_active(route: Any, name: str) -> None:
    """Wait until the kernel passes on what is sent from an interface that came up before its cable had another end: it
    learns of the carrier later, in a thread of its own, and drops frames until then. WireError if it does not."""
    (index,) = route.link_lookup(ifname=name)
    until = time.monotonic() + _ACTIVE_S
    while route.get_links(index)[0].get_attr("IFLA_OPERSTATE") != "UP":
        if time.monotonic() > until:
            raise WireError(f"{name} is not up after {_ACTIVE_S:g} s")
        time.sleep(0.001)


def main(name: str, seed: str, mtu: str, listen: str | None = None) -> int:
    """The relay's process; standard input is the parent's socket, which hears when all is made, or why it is not."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    parent = socket.socket(fileno=0)
    relay = Relay(name, int(seed), int(mtu))
    try:
        try:
            if listen is not None:
                relay.listen(listen)
            relay.make()
        except Exception as error:  # noqa: BLE001
            # Whatever it is (pyroute2 has exceptions of its own): the parent is the one to tell.
            text = (error.strerror if isinstance(error, OSError) else None) or str(error)
            message = {"error": f"cannot make the network: {text}", "forbidden": isinstance(error, PermissionError)}
            parent.send(json.dumps(message).encode())
            return 1
        parent.send(json.dumps({"return": None}).encode())
        relay.run(parent)
    finally:
        # From here on nothing may keep the namespaces from being removed.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        relay.unmake()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
