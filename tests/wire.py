# SPDX-License-Identifier: BSD-3-Clause
"""Two hosts on one machine, and a network between them that fails when it is told to.

    host a  --veth--  relay  --veth--  host b

A host is a named network namespace with one address; a process started behind `Host.prefix` is on that host. The
relay is a process in a third namespace that passes frames from one AF_PACKET socket to the other and does to them
what `Wire.shape`, `cut`, `blackhole` and `reset` say. It is a process of its own, and not the kernel's netem, because
netem is a module that many kernels lack (a container's host, a minimal VM's), cannot reset connections, and cannot
repeat a run.

    with Wire(seed=1) as wire:
        server = subprocess.Popen([*wire.b.prefix, "nbdkit", ...])
        wire.shape(delay=50, loss=1)
        with wire.a.entered():
            handle.connect_uri(f"nbd://{wire.b.address}/disk0")

Invariants
* The relay owns the namespaces and removes them when it ends. It ends when it is told to, on SIGTERM, and when the
  process that opened the Wire is gone, however that died. What is left if the relay itself is killed is removed by
  `Wire.close`, or by the next relay.
* Every queue is bounded, and so is every wait for the relay.
* What happens to a frame depends on the seed, on the frames before it in its direction, and on the clock.

Not reproduced: frames are not corrupted or duplicated, and jitter does not change their order (`reorder` does).
Neighbour entries are permanent, as if the hosts were behind routers: silence is never turned into EHOSTUNREACH.
Needs root, /usr/bin/python3 with pyroute2, and nsenter.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import socket
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from namespaces import WireError, hosts_of, remove_namespace
from shape import QUEUE_BYTES, Counters, Shape

PYTHON = "/usr/bin/python3"
"""Debian's, which has pyroute2; a test may run in another."""

MTU = 9000
"""Bytes. Six times Ethernet's, because the relay's work is by the frame."""

ANSWER_S = 10.0
"""Longest wait for the relay's answer to a command."""

START_S = 30.0
"""Longest wait for the two hosts to be there: a Python start and some dozens of system calls on a busy machine."""

MESSAGE_BYTES_MAX = 64 << 10


class Control:
    """A conversation with a relay; raises WireError when it refuses, or does not answer within ANSWER_S.

    Raises PermissionError instead where the kernel did not let it make the network.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    @classmethod
    def connected(cls, path: str | os.PathLike[str]) -> Control:
        """To a relay that listens at `path`; raises OSError if none does."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.settimeout(ANSWER_S)
            connection.connect(os.fspath(path))
        except OSError:
            connection.close()
            raise
        return cls(connection)

    def call(self, command: str, **arguments: Any) -> Any:
        """Have the relay do `command` and return its answer."""
        try:
            self._socket.settimeout(ANSWER_S)
            self._socket.send(json.dumps({"do": command, **arguments}).encode())
        except OSError as error:
            raise WireError(f"the relay is gone: {error.strerror or error}") from error
        return self.answer(ANSWER_S)

    def answer(self, timeout_s: float) -> Any:
        """The relay's next message."""
        self._socket.settimeout(timeout_s)
        try:
            message = self._socket.recv(MESSAGE_BYTES_MAX)
        except TimeoutError:
            raise WireError(f"the relay has not answered within {timeout_s:g} s") from None
        except OSError as error:
            raise WireError(f"the relay is gone: {error.strerror or error}") from error
        if not message:
            raise WireError("the relay has ended")
        answer = json.loads(message)
        if answer.get("forbidden"):
            raise PermissionError(errno.EPERM, answer["error"])
        if "error" in answer:
            raise WireError(answer["error"])
        return answer["return"]

    def wait_end(self) -> None:
        """Return when the relay has ended, which it does after it has removed everything."""
        self._socket.settimeout(ANSWER_S)
        try:
            while self._socket.recv(MESSAGE_BYTES_MAX):
                pass
        except TimeoutError:
            raise WireError(f"the relay has not ended within {ANSWER_S:g} s") from None
        except ConnectionError:
            return  # it ended with something of ours unread

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def start_relay(
    name: str, seed: int, mtu: int = MTU, listen: str | None = None, log: Any = None
) -> tuple[subprocess.Popen[bytes], Control]:
    """Make the hosts `name`-a and `name`-b and the relay between them.

    With `listen` the relay is a daemon with a control socket at that path; without, it lives as long as the Control.
    `log` gets its standard error. Raises PermissionError without root, or in a container that is not allowed to do
    this, and WireError for all else.
    """
    if os.geteuid() != 0:
        raise PermissionError(errno.EPERM, "network namespaces need root")
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control = Control(ours)
    relay = os.fspath(Path(__file__).resolve().with_name("relay.py"))
    command = [PYTHON, relay, name, str(seed), str(mtu), *([listen] if listen else [])]
    with its:
        # A session of its own: Ctrl-C ends the test, which then ends the relay in good order.
        process = subprocess.Popen(
            command, stdin=its, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True, cwd="/"
        )
    try:
        control.answer(START_S)
    except BaseException:
        control.close()
        end_relay(process)
        raise
    return process, control


def end_relay(process: subprocess.Popen[bytes], ended_s: float = 0.0) -> None:
    """End the relay if it does not end by itself within `ended_s`; raises WireError if it had to be killed."""
    for signal_number, patience_s in ((signal.SIGTERM, ended_s), (signal.SIGKILL, ANSWER_S)):
        try:
            process.wait(patience_s)
            return
        except subprocess.TimeoutExpired:
            process.send_signal(signal_number)
    process.wait(ANSWER_S)
    raise WireError(f"the relay did not end within {ANSWER_S:g} s and was killed")


class Wire:
    """Two hosts and the network between them, for one process and as long as that lives."""

    _serial = itertools.count()

    def __init__(self, seed: int = 0, mtu: int = MTU) -> None:
        """Make them. The same `seed` loses and reorders the same frames. Raises as start_relay."""
        self.name = f"wire-{os.getpid()}-{next(self._serial)}"
        hosts = hosts_of(self.name)
        self.a, self.b = hosts["a"], hosts["b"]
        self._relay, self._control = start_relay(self.name, seed, mtu)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The relay's process."""
        return self._relay.pid

    def shape(
        self,
        *,
        rate: float = 0,
        delay: float = 0,
        jitter: float = 0,
        loss: float = 0,
        reorder: float = 0,
        queue: int = QUEUE_BYTES,
        direction: str | None = None,
    ) -> None:
        """From now on frames meet with this, in both directions or in one; units as in Shape.

        What is not given is perfect again, so `shape()` undoes all shaping. The other direction stays as it is.
        """
        shape = Shape(rate, delay, jitter, loss, reorder, queue)
        self._control.call("shape", direction=direction, shape=asdict(shape))

    def cut(self) -> None:
        """Pull the cable: both hosts lose the carrier, what is under way is lost."""
        self._control.call("cut")

    def blackhole(self, direction: str | None = None) -> None:
        """Drop everything in both directions or in one; the hosts see a network in order."""
        self._control.call("blackhole", direction=direction)

    def mend(self) -> None:
        """End cut and blackhole; the shape stays."""
        self._control.call("mend")

    def reset(self) -> int:
        """Reset every open TCP connection on both ends, as a firewall does, and return how many there were.

        What is under way is lost. New connections are not affected.
        """
        return int(self._control.call("reset"))

    def counters(self) -> dict[str, Counters]:
        """By direction."""
        return {name: Counters(**values) for name, values in self._control.call("status")["counters"].items()}

    def close(self) -> None:
        """Remove both hosts; processes that still run there are left without a network. Can be called again."""
        self._control.close()
        try:
            end_relay(self._relay, ANSWER_S)
        finally:
            for host in (self.a, self.b):
                remove_namespace(host.namespace)
