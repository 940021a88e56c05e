# SPDX-License-Identifier: BSD-3-Clause
"""The two hosts and the network between them (tests/wire.py, scripts/lab): every failure seen with plain sockets."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbd
import pytest

from lab import Lab
from namespaces import Host, WireError, namespace_path
from shape import QUEUE_BYTES, Counters
from waiting import wait_until
from wire import Wire

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "scripts/lab"
DEADLINE_S = 20.0
PORT = 5000
SO_RCVBUFFORCE = 33
SIOCGIFFLAGS, IFF_RUNNING = 0x8913, 0x40

pytestmark = pytest.mark.usefixtures("networks")


@pytest.fixture
def make_wire() -> Iterator[Callable[[int], Wire]]:
    """Makes Wires, each from a seed, that end with the test."""
    with contextlib.ExitStack() as wires:
        yield lambda seed: wires.enter_context(Wire(seed))


@pytest.fixture
def wire() -> Iterator[Wire]:
    """A perfect network."""
    with Wire() as made:
        yield made


class Datagrams:
    """Numbered datagrams from host a to host b."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.sent = 0
        with wire.b.entered():
            self.receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
            self.receiver.bind((wire.b.address, PORT))
        with wire.a.entered():
            self.sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sender.connect((wire.b.address, PORT))
        self.receiver.settimeout(DEADLINE_S)

    def __enter__(self) -> Datagrams:
        return self

    def __exit__(self, *_: object) -> None:
        self.receiver.close()
        self.sender.close()

    def send(self, count: int, length: int = 100) -> None:
        for _ in range(count):
            self.sender.send(self.sent.to_bytes(length, "big"))
            self.sent += 1

    def one_way(self) -> float:
        """Milliseconds that one datagram takes."""
        begin = time.monotonic()
        self.send(1)
        self.receiver.recv(65536)
        return (time.monotonic() - begin) * 1000

    def settled(self) -> list[int]:
        """The numbers that have arrived, in that order, when the relay has passed or dropped each datagram."""

        def all_decided() -> bool:
            now = self.wire.counters()["ab"]
            return now.frames + now.lost + now.overflow + now.silenced == self.sent

        wait_until(all_decided, "the relay has decided on each datagram", DEADLINE_S)
        numbers = []
        # The last step, from cable to socket, is the kernel's, and on a busy machine it may take a while.
        self.receiver.settimeout(1.0)
        with contextlib.suppress(TimeoutError):
            while True:
                numbers.append(int.from_bytes(self.receiver.recv(65536), "big"))
        return numbers


@contextlib.contextmanager
def connection(wire: Wire) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection; the ends on host a and on host b."""
    with wire.b.entered():
        listener = socket.create_server((wire.b.address, PORT))
    with listener:
        with wire.a.entered():
            client = socket.create_connection((wire.b.address, PORT), DEADLINE_S)
        with client:
            listener.settimeout(DEADLINE_S)
            server, _ = listener.accept()
            with server:
                server.settimeout(DEADLINE_S)
                yield client, server


def transfer_s(source: socket.socket, target: socket.socket, length: int) -> float:
    """Seconds that `length` bytes take."""
    feeder = threading.Thread(target=source.sendall, args=(bytes(length),))
    begin = time.monotonic()
    feeder.start()
    left = length
    while left:
        left -= len(target.recv(min(left, 1 << 20)))
    feeder.join(DEADLINE_S)
    return time.monotonic() - begin


def has_carrier(host: Host) -> bool:
    """Whether the host's network card says that its cable works."""
    with host.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as anything:
        answer = fcntl.ioctl(anything, SIOCGIFFLAGS, struct.pack("16sH14x", b"eth0", 0))
    (flags,) = struct.unpack_from("H", answer, 16)
    return bool(flags & IFF_RUNNING)


def assert_silent(end: socket.socket, timeout_s: float = 0.1) -> None:
    """Nothing arrives, not even the end of the connection."""
    end.settimeout(timeout_s)
    with pytest.raises(TimeoutError):
        end.recv(1)
    end.settimeout(DEADLINE_S)


def test_a_perfect_network_is_fast_and_counts_what_it_passes(wire: Wire) -> None:
    length = 32 << 20
    with connection(wire) as (client, server):
        seconds = transfer_s(client, server, length)
    counters = wire.counters()
    assert length * 8 / seconds > 200e6
    assert length <= counters["ab"].payload < length * 1.05
    assert counters["ab"].bytes > counters["ab"].payload
    assert counters["ba"].payload == 0
    assert counters["ba"].frames > 0
    assert counters["ab"].lost == counters["ab"].overflow == counters["ab"].silenced == 0


def test_delay_is_one_way_and_in_the_direction_asked_for(wire: Wire) -> None:
    with Datagrams(wire) as datagrams:
        undelayed = [datagrams.one_way() for _ in range(20)]
        wire.shape(delay=30, direction="ab")
        delayed = [datagrams.one_way() for _ in range(20)]
        wire.shape(delay=30, direction="ba")
        wire.shape(direction="ab")
        other = [datagrams.one_way() for _ in range(20)]
    # A busy machine makes a datagram later, and never makes it earlier.
    assert min(undelayed) < 10
    assert 30 <= min(delayed) < 45
    assert min(other) < 10


def test_jitter_spreads_the_delay_and_keeps_the_order(wire: Wire) -> None:
    wire.shape(delay=20, jitter=15)
    with Datagrams(wire) as datagrams:
        times = [datagrams.one_way() for _ in range(20)]
        assert 5 <= min(times) < 35
        assert max(times) - min(times) > 8
        datagrams.send(100)
        assert datagrams.settled() == list(range(20, 120))


def test_loss_is_counted_and_the_seed_repeats_it(make_wire: Callable[[int], Wire]) -> None:
    arrived = []
    for seed in (1, 1, 2):
        wire = make_wire(seed)
        wire.shape(loss=10)
        with Datagrams(wire) as datagrams:
            datagrams.send(1000)
            arrived.append(datagrams.settled())
        assert len(arrived[-1]) == 1000 - wire.counters()["ab"].lost
        assert 50 < wire.counters()["ab"].lost < 150
    assert arrived[0] == arrived[1] != arrived[2]


def test_reordered_frames_overtake(wire: Wire) -> None:
    # Long enough for all to be sent before the first that has to wait arrives.
    wire.shape(delay=1500, reorder=20)
    with Datagrams(wire) as datagrams:
        datagrams.send(200)
        numbers = datagrams.settled()
    overtaking = wire.counters()["ab"].reordered
    assert 15 < overtaking < 80
    assert sorted(numbers) == list(range(200))
    # The first to arrive are those that skipped the delay, each group in its own order.
    assert numbers == sorted(numbers[:overtaking]) + sorted(numbers[overtaking:])
    assert numbers != sorted(numbers)


def test_rate_is_kept(wire: Wire) -> None:
    wire.shape(rate=40e6)
    with connection(wire) as (client, server):
        length = 1_000_000
        rates = [length * 8 / transfer_s(client, server, length) for _ in range(3)]
    # A busy machine may stop the sender for a while, but never makes the network faster.
    assert 40e6 * 0.7 < max(rates) < 40e6 * 1.3


def test_a_full_queue_drops(wire: Wire) -> None:
    def decided() -> Counters | None:
        now = wire.counters()["ab"]
        return now if now.waiting + now.frames + now.overflow == 100 else None

    wire.shape(rate=100e3)
    with Datagrams(wire) as datagrams:
        datagrams.send(100, 8000)
        counters = wait_until(decided, "the relay has decided on each datagram", DEADLINE_S)
    assert QUEUE_BYTES * 0.9 < counters.waiting * 8000 < QUEUE_BYTES * 1.1
    assert counters.overflow > 50


def test_a_cut_takes_the_carrier_and_resets_nothing(wire: Wire) -> None:
    def carriers() -> list[bool]:
        return [has_carrier(wire.a), has_carrier(wire.b)]

    wait_until(lambda: carriers() == [True, True], "both hosts have their carrier", DEADLINE_S)
    with connection(wire) as (client, server):
        wire.cut()
        wait_until(lambda: carriers() == [False, False], "both hosts lose their carrier", DEADLINE_S)
        client.sendall(b"there")
        server.sendall(b"back")
        assert_silent(server)
        assert_silent(client)
        wire.mend()
        assert server.recv(100) == b"there"
        assert client.recv(100) == b"back"
    wait_until(lambda: carriers() == [True, True], "both hosts have their carrier again", DEADLINE_S)


def test_a_cut_loses_what_is_under_way(wire: Wire) -> None:
    wire.shape(delay=60_000)
    with Datagrams(wire) as datagrams:
        datagrams.send(10)
        wait_until(lambda: wire.counters()["ab"].waiting == 10, "the datagrams are at the relay", DEADLINE_S)
        wire.cut()
        assert datagrams.settled() == []
    assert wire.counters()["ab"].silenced == 10
    assert wire.counters()["ab"].waiting == 0


def test_a_black_hole_is_silent_and_the_connection_goes_on_after_it(wire: Wire) -> None:
    with connection(wire) as (client, server):
        wire.blackhole()
        client.sendall(b"there")
        server.sendall(b"back")
        assert_silent(server)
        assert_silent(client)
        assert wire.counters()["ab"].silenced > 0
        wire.mend()
        assert server.recv(100) == b"there"
        assert client.recv(100) == b"back"


def test_a_black_hole_in_one_direction(wire: Wire) -> None:
    with connection(wire) as (client, server):
        wire.blackhole("ba")
        client.sendall(b"there")
        assert server.recv(100) == b"there"
        server.sendall(b"back")
        assert_silent(client)
        wire.mend()
        assert client.recv(100) == b"back"


def test_reset_of_an_idle_connection_reaches_both_ends_and_spares_the_next(wire: Wire) -> None:
    with connection(wire) as (client, server):
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        assert wire.reset() == 1
        for end in (client, server):
            with pytest.raises(ConnectionResetError):
                end.recv(1)
    assert wire.reset() == 0
    with connection(wire) as (client, server):
        client.sendall(b"y")
        assert server.recv(1) == b"y"


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, id="perfect"),
        pytest.param({"delay": 10.0}, id="delay"),
        pytest.param({"delay": 5.0, "loss": 5.0, "reorder": 5.0}, id="lossy"),
    ],
)
def test_reset_in_mid_transfer_reaches_both_ends(wire: Wire, shape: dict[str, float]) -> None:
    """Also where frames under way make the number that an end awaits unknown to the relay."""
    wire.shape(**shape)
    with connection(wire) as (client, server):
        errors: dict[str, OSError] = {}

        def until_it_fails(name: str, step: Callable[[], object]) -> None:
            try:
                while step():
                    pass
            except OSError as error:
                errors[name] = error

        block = bytes(1 << 16)
        ends = [
            threading.Thread(target=until_it_fails, args=("a", lambda: client.send(block))),
            threading.Thread(target=until_it_fails, args=("b", lambda: server.recv(1 << 16))),
        ]
        for end in ends:
            end.start()
        wait_until(lambda: wire.counters()["ab"].payload > 1 << 18, "data flows", DEADLINE_S)
        assert wire.reset() == 1
        for end in ends:
            end.join(DEADLINE_S)
    assert {name: error.errno for name, error in errors.items()} == {"a": errno.ECONNRESET, "b": errno.ECONNRESET}


def test_reset_refuses_a_connection_that_is_being_opened(wire: Wire) -> None:
    wire.shape(delay=1000)
    with wire.a.entered(), socket.socket() as client:
        client.setblocking(False)
        assert client.connect_ex((wire.b.address, PORT)) == errno.EINPROGRESS
        # SYN frames have no payload, and this one is still under way, so asking is all that can be seen of it.
        assert wait_until(wire.reset, "the relay has seen the SYN", DEADLINE_S) == 1
        client.setblocking(True)
        client.settimeout(DEADLINE_S)
        with pytest.raises(ConnectionError):
            client.recv(1)


def test_a_reset_that_cannot_get_through_is_refused(wire: Wire) -> None:
    for break_it in (wire.cut, wire.blackhole):
        break_it()
        with pytest.raises(WireError, match="mend the network first"):
            wire.reset()
        wire.mend()
    assert wire.reset() == 0


def test_bad_shapes_and_directions_change_nothing(wire: Wire) -> None:
    with pytest.raises(ValueError, match="percentages"):
        wire.shape(loss=101)
    with pytest.raises(WireError, match="no direction 'ac'"):
        wire.shape(delay=500, direction="ac")
    with Datagrams(wire) as datagrams:
        assert datagrams.one_way() < 100


def test_only_the_calling_thread_is_on_the_host(wire: Wire) -> None:
    def namespace() -> int:
        return os.stat("/proc/thread-self/ns/net").st_ino

    home, seen = namespace(), []
    entered, looked = threading.Event(), threading.Event()

    def look() -> None:
        entered.wait(DEADLINE_S)
        seen.append(namespace())
        looked.set()

    other = threading.Thread(target=look)
    other.start()
    with pytest.raises(ZeroDivisionError), wire.a.entered():  # noqa: PT012
        entered.set()
        looked.wait(DEADLINE_S)
        inside = namespace()
        raise ZeroDivisionError
    other.join(DEADLINE_S)
    assert inside == namespace_path(wire.a.namespace).stat().st_ino
    assert seen == [home]
    assert namespace() == home != inside


def test_a_command_on_a_host_keeps_its_pid_and_its_signals(wire: Wire) -> None:
    process = subprocess.Popen([*wire.a.prefix, "sleep", "60"])
    try:
        comm = Path(f"/proc/{process.pid}/comm")
        wait_until(lambda: comm.read_text() == "sleep\n", "nsenter has become sleep", DEADLINE_S)
        assert os.stat(f"/proc/{process.pid}/ns/net").st_ino == namespace_path(wire.a.namespace).stat().st_ino
    finally:
        process.terminate()
        assert process.wait(DEADLINE_S) == -signal.SIGTERM


def test_libnbd_connects_from_host_to_host(wire: Wire, lab: Lab) -> None:
    with nbdkit_on(wire.b, lab.folder):
        handle = nbd.NBD()
        with wire.a.entered():
            handle.connect_uri(f"nbd://{wire.b.address}")
        # From here on on no host: the socket stays where it was made.
        handle.pwrite(b"x" * 4096, 0)
        assert bytes(handle.pread(4096, 0)) == b"x" * 4096
        assert wire.counters()["ab"].payload > 4096
        wire.reset()
        with pytest.raises(nbd.Error) as failure:
            handle.pread(4096, 0)
        assert failure.value.errnum in (errno.ECONNRESET, errno.ENOTCONN)


@contextlib.contextmanager
def nbdkit_on(host: Host, folder: Path) -> Iterator[None]:
    """A memory disk of 1 MiB served on a host."""
    pidfile = folder / "nbdkit.pid"
    process = subprocess.Popen([*host.prefix, "nbdkit", "-f", "-P", pidfile, "memory", "1M"])
    try:
        wait_until(pidfile.exists, "nbdkit listens", DEADLINE_S)
        yield
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


# --- What is left behind --------------------------------------------------------------------------------------


def left_of(name: str) -> list[Path]:
    return [path for host in "ab" if (path := namespace_path(f"{name}-{host}")).exists()]


def test_nothing_is_left_of_a_process_that_was_killed() -> None:
    """Not while its relay lives; and if that was killed as well, the next relay cleans up."""
    program = (
        f"import sys, time; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from wire import Wire\nwire = Wire()\nprint(wire.name, wire.pid, flush=True)\ntime.sleep(60)"
    )
    for relay_too in (False, True):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            name, relay = process.stdout.readline().split()
            assert len(left_of(name)) == 2
            if relay_too:
                os.kill(int(relay), signal.SIGKILL)
        finally:
            process.kill()
            process.communicate(timeout=DEADLINE_S)
        if relay_too:
            assert len(left_of(name)) == 2
            Wire().close()
        wait_until(lambda name=name: not left_of(name), "the namespaces are removed", DEADLINE_S)


def test_close_removes_what_a_killed_relay_has_left(wire: Wire) -> None:
    os.kill(wire.pid, signal.SIGKILL)
    with pytest.raises(WireError, match="relay"):
        wire.cut()
    wire.close()
    assert left_of(wire.name) == []
    wire.close()


# --- scripts/lab, as a person uses it -------------------------------------------------------------------------


class Shell:
    """Runs scripts/lab for a lab of this test."""

    def __init__(self) -> None:
        self.name = f"test-{os.getpid()}"

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """What it prints, if it ends with `code`: on success to standard output, else to standard error."""
        done = subprocess.run(
            [str(LAB), "--lab", self.name, *arguments],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout


@pytest.fixture
def shell() -> Iterator[Shell]:
    """A lab that is up."""
    command = Shell()
    command("up", "--seed", "3")
    yield command
    if left_of(f"lab-{command.name}"):
        command("down")


def test_a_lab_from_up_to_down(shell: Shell) -> None:
    status = json.loads(shell("status", "--json"))
    assert status["link"] == "up"
    assert status["seed"] == 3
    address = status["hosts"]["b"]["address"]
    with subprocess.Popen([str(LAB), "--lab", shell.name, "exec", "b", "nbdkit", "-f", "memory", "1M"]) as server:
        try:
            ask = ("exec", "a", "nbdinfo", "--size", f"nbd://{address}")
            wait_until(
                lambda: f"{server.pid} nbdkit" in shell("status") and tried(shell, ask), "nbdkit answers", DEADLINE_S
            )
            assert shell(*ask) == "1048576\n"
            shell("shape", "--rate", "10mbit", "--delay", "20ms", "--jitter", "1ms", "--loss", "0.5%")
            assert "a -> b   10 mbit/s, queue 256 KiB, delay 20 +- 1 ms, loss 0.5 %\n" in shell("status")
            shell("shape")
            assert shell("status").count("perfect") == 2
        finally:
            server.terminate()
    pid = status["pid"]
    assert shell("down") == ""
    assert left_of(f"lab-{shell.name}") == []
    wait_until(lambda: ended(pid), "the relay has ended", DEADLINE_S)
    assert shell("status", code=2) == (f"lab: there is no lab {shell.name!r}; `scripts/lab up {shell.name}` makes it\n")


def ended(pid: int) -> bool:
    """Whether a process is gone, or waits for an init that may never ask (a container's)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def tried(shell: Shell, command: tuple[str, ...]) -> bool:
    try:
        shell(*command)
    except AssertionError:
        return False
    return True


def test_a_lab_fails_when_told_to(shell: Shell) -> None:
    shell("cut")
    assert shell("status").startswith("link     cut\n")
    assert shell("reset", code=1) == "lab: a reset could not get through: mend the network first\n"
    shell("mend")
    shell("blackhole", "--direction", "ba")
    assert shell("status").startswith("link     black hole ba\n")
    shell("mend")
    assert shell("reset") == "0 connections reset\n"
    assert shell("up", code=1) == f"lab: the lab {shell.name!r} is up already\n"


def test_exec_gives_the_commands_own_code_and_shell_is_on_the_host(shell: Shell) -> None:
    shell("exec", "a", "--", "sh", "-c", "exit 7", code=7)
    done = subprocess.run(
        [str(LAB), "--lab", shell.name, "shell", "b"],
        input="hostname -I; exit 3\n",
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 3
    said, addresses = done.stdout.splitlines()
    assert said == "on host b, 10.77.0.2; the other one is 10.77.0.1; exit with Ctrl-D"
    assert addresses.split() == ["10.77.0.2"]


def test_down_tells_what_still_runs_there(shell: Shell) -> None:
    with subprocess.Popen([str(LAB), "--lab", shell.name, "exec", "a", "sleep", "60"]) as left:
        try:
            wait_until(lambda: f"{left.pid} sleep" in shell("status"), "sleep runs", DEADLINE_S)
            done = subprocess.run(
                [str(LAB), "down", shell.name], capture_output=True, text=True, timeout=DEADLINE_S, check=True
            )
            assert done.stderr == f"still running, without a network now: {left.pid} (sleep)\n"
        finally:
            left.kill()


def test_a_lab_whose_relay_was_killed_can_be_made_again(shell: Shell) -> None:
    relay = json.loads(shell("status", "--json"))["pid"]
    os.kill(relay, signal.SIGKILL)
    wait_until(lambda: "ended by itself" in tried_status(shell), "the relay's death is seen", DEADLINE_S)
    shell("up")
    assert json.loads(shell("status", "--json"))["pid"] != relay


def tried_status(shell: Shell) -> str:
    """What `status` says, whatever its exit code."""
    done = subprocess.run(
        [str(LAB), "--lab", shell.name, "status"], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    return done.stdout + done.stderr
