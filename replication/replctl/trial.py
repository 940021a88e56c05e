# SPDX-License-Identifier: BSD-3-Clause
"""Whether something works on a test of a failover: a command that ends well, says something, or a guest whose agent
answers; within a deadline, and with everything that it has started ended afterwards."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

from replication.client.qmp import Refused
from replication.client.quiesce import Agent
from replication.client.session import Unusable

INTERRUPTS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

_LOOK_S = 0.2
_AGENT_S = 1.0
"""Longest wait for the agent at a time; what the console says waits meanwhile."""
_END_S = 5.0
"""From SIGTERM to SIGKILL."""
_READ = 1 << 16
_ECHO_MAX = 1 << 20
"""What is kept for a reader of the output that does not read at the moment; the rest of it gets lost."""
_ECHO_S = 1.0
"""Longest wait for such a reader at the end."""
_LAST_WORDS = 64
"""Pieces that are read when the command has ended, of which some may be of what it has started, and which goes on."""


class _Echo:
    """Prints what a command says, for whom wants it: a reader that has gone, or does not read, is in nobody's way."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._left = b""

    def say(self, data: bytes) -> None:
        """Print it, or what there is room for."""
        self._left = (self._left + data)[:_ECHO_MAX]
        self._print(0.0)

    def end(self) -> None:
        """Print what is left."""
        deadline = time.monotonic() + _ECHO_S
        while self._left and time.monotonic() < deadline:
            self._print(_LOOK_S)

    def _print(self, wait_s: float) -> None:
        try:
            # So much fits where there is room at all, and nothing blocks.
            while self._left and select.select([], [self._fd], [], wait_s)[1]:
                self._left = self._left[os.write(self._fd, self._left[: select.PIPE_BUF]) :]
        except (OSError, ValueError):  # it has seen enough
            self._fd, self._left = -1, b""


class Trial:
    """One command."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        marker: str | None,
        agent: str | None,
        deadline: float,
    ) -> None:
        """`marker`: what it says when it works; `agent`: the socket of a guest agent that answers then. Without either
        it ends with exit code 0. `deadline`: by time.monotonic()."""
        self._command = command
        self._environment = environment
        self._marker = None if marker is None else marker.encode()
        self._agent = agent
        self._deadline = deadline
        self._said = b""

    def run(self, quiet: bool = False) -> str | None:
        """Why it has failed; None if it works. What it says is printed, to stderr if `quiet`. Unusable if it cannot
        be run."""
        echo = _Echo((sys.stderr if quiet else sys.stdout).fileno())
        process: subprocess.Popen[bytes] | None = None
        try:
            with _interrupts_later():
                process = self._start()
            return self._watch(process, echo)
        finally:
            if process is not None:
                _end(process)
                echo.end()
                if process.stdout is not None:
                    process.stdout.close()

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment},
                start_new_session=True,
            )
        except OSError as error:
            raise Unusable(f"{self._command[0]} cannot be run: {error.strerror}") from error

    def _watch(self, process: subprocess.Popen[bytes], echo: _Echo) -> str | None:
        assert process.stdout is not None
        output, speaks, last_words = process.stdout.fileno(), True, _LAST_WORDS
        while time.monotonic() < self._deadline:
            ended = process.poll() is not None  # before the look at what it has said: then that is all of it
            if not speaks:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_LOOK_S)
            elif select.select([output], [], [], 0 if ended else _LOOK_S)[0]:
                data = os.read(output, _READ)
                echo.say(data)
                if self._hears(data):
                    return None
                speaks = bool(data)
                last_words -= ended
                if not ended or (speaks and last_words):
                    continue
            if ended:
                return self._ended(process.returncode)
            if self._agent is not None and _answers(self._agent):
                return None
        return f"{self._command[0]} was not done in time"

    def _hears(self, data: bytes) -> bool:
        """Whether the marker has come, in however many pieces."""
        if self._marker is None:
            return False
        self._said = self._said[-len(self._marker) :] + data
        return self._marker in self._said

    def _ended(self, code: int) -> str | None:
        how = f"{self._command[0]} has ended with {code}"
        if self._marker is not None:
            return f"{how}, and has not said {self._marker.decode()}"
        if self._agent is not None:
            return f"{how} before the guest agent has answered"
        return how if code else None


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """An interrupt comes when the body is over: a process runs before it is known which one it is, and nobody could end
    it. Of the main thread."""
    came: list[int] = []
    former = {number: signal.signal(number, lambda number, _frame: came.append(number)) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _answers(agent: str) -> bool:
    try:
        Agent(agent, _AGENT_S).close()
    except (Unusable, Refused):
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it, and what it has started: that has the signals as well, and the second one also when it itself has ended
    by the first. An interrupt meanwhile (one, see rehearsal.py) leaves nothing running; and what does not even end by
    SIGKILL, because a disk does not answer, is not waited for."""
    ended = False
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            _signal(process, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
        ended = True
    finally:
        if not ended:
            _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def boot(uris: Sequence[str], options: argparse.Namespace) -> Iterator[tuple[list[str], str | None]]:
    """QEMU's command line for a machine with these disks that nothing outside can tell from a dead one, and the socket
    of its guest agent, if that is waited for. More arguments of QEMU are `options.command`."""
    program = options.qemu or shutil.which(f"qemu-system-{platform.machine()}")
    if program is None:
        raise Unusable(f"qemu-system-{platform.machine()} is not installed: name one with --qemu")
    command = [program, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-name", "test"]
    command += ["-machine", "accel=kvm:tcg", "-m", str(options.memory), "-serial", "stdio"]
    command += ["-nic", "user,restrict=on,model=virtio-net-pci" if options.network else "none"]
    for uri in uris:
        if uri.startswith("nbds"):
            raise Unusable("--boot does not speak TLS: name another place of the node with --uri, or run QEMU yourself")
        command += ["-drive", f"file={uri.replace(',', ',,')},format=raw,if=virtio,cache=none,discard=unmap"]
    with tempfile.TemporaryDirectory(prefix="replctl-test-") as folder:
        agent = None
        if options.agent:
            agent = os.path.join(folder, "agent.sock")
            command += ["-chardev", f"socket,id=agent,path={agent.replace(',', ',,')},server=on,wait=off"]
            command += ["-device", "virtio-serial-pci"]
            command += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
        yield [*command, *options.command], agent
