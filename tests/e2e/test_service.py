# SPDX-License-Identifier: BSD-3-Clause
"""A node as a service: started by its name, with sockets of systemd's or its own, and what it tells systemd."""

from __future__ import annotations

import os
import pwd
import secrets
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

import nbd
import pytest

from checkout import REPOSITORY
from content import MIB
from lab import Lab
from nbdprocess import silent
from services import LAUNCHER, NotifySocket, ServiceNode, folders, primary_file, secondary_file
from waiting import DEADLINE_S, wait_until


def launched(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The launcher, which must end by itself."""
    return subprocess.run(
        [*LAUNCHER, *arguments],
        env={**os.environ, **folders(folder), **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def content(uri: str) -> bytes:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    try:
        return bytes(handle.pread(4096, 0))
    finally:
        handle.shutdown()


def size(uri: str) -> int:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    try:
        return int(handle.get_size())
    finally:
        handle.shutdown()


def in_sync(primary: ServiceNode) -> None:
    wait_until(lambda: primary.status()["link"]["state"] == "in-sync", "the link is up and nothing is missing")


def test_a_pair_by_name_over_a_restart_of_each(lab: Lab, port: int) -> None:
    listen = f'listen = ["127.0.0.1:{port}"]'
    secondary = lab.start(ServiceNode(lab.folder, secondary_file(lab.folder, "autostart = true", listen), name="b"))
    file = primary_file(lab.folder, f"nbd://127.0.0.1:{port}", "autostart = true")
    primary = lab.start(ServiceNode(lab.folder, file, name="a"))
    primary.notify.wait_for("STATUS", "primary, running; link in-sync")
    primary.connect("disk0").pwrite(b"x" * 4096, 0)
    primary.execute("replication-checkpoint")
    for node in (primary, secondary):
        node.restart(signal.SIGKILL)
        in_sync(primary)
        node.restart(signal.SIGTERM)
        assert node.notify.count("STOPPING") == 1
        assert node.status()["stage"] == "running"
        in_sync(primary)
    primary.connect("disk0").pwrite(b"y" * 4096, 0)
    primary.execute("replication-checkpoint")
    assert content(f"nbd+unix:///guest?socket={secondary.socket_path}") == b"y" * 4096
    assert content(f"nbd://127.0.0.1:{port}/guest") == b"y" * 4096


def test_a_stop_with_a_client_ends_in_time(lab: Lab) -> None:
    node = lab.start(ServiceNode(lab.folder, secondary_file(lab.folder)))
    client = node.connect("guest")
    os.kill(node.pid, signal.SIGTERM)
    node.wait_ended()  # of itself: nbdkit alone would wait for the client
    assert node.notify.count("STOPPING") == 1
    with pytest.raises(nbd.Error):
        client.pread(512, 0)


def test_folders_and_sockets_have_their_modes(lab: Lab) -> None:
    group = os.getgid()
    node = lab.start(ServiceNode(lab.folder, secondary_file(lab.folder, service='socket-mode = "0620"')))
    modes = {path: oct(stat.S_IMODE(path.stat().st_mode)) for path in (node.run, node.state, node.socket_path)}
    assert modes == {node.run: "0o755", node.state: "0o700", node.socket_path: "0o620"}
    assert stat.S_IMODE(node.control_path.stat().st_mode) == 0o600
    assert node.socket_path.stat().st_gid == group


def test_the_guests_socket_is_given_to_a_group(lab: Lab) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    node = lab.start(ServiceNode(lab.folder, secondary_file(lab.folder, service='socket-group = "nogroup"')))
    assert node.socket_path.stat().st_gid == pwd.getpwnam("nobody").pw_gid
    assert stat.S_IMODE(node.socket_path.stat().st_mode) == 0o660


def test_another_user_runs_it(lab: Lab) -> None:
    """As the unit does: a user of its own, who may write to its folders and to nothing else."""
    if os.geteuid():
        pytest.skip("needs root")
    nobody = pwd.getpwnam("nobody")
    node = ServiceNode(
        lab.folder,
        secondary_file(lab.folder),
        before=["setpriv", "--reuid=nobody", "--clear-groups", "--regid=nogroup"],
    )
    may = subprocess.run([*node.before, "test", "-r", REPOSITORY / "plugin.py"], check=False, timeout=DEADLINE_S)
    if may.returncode:
        node.notify.close()
        pytest.skip("nobody may not read the sources here")
    for path in (lab.folder, lab.folder / "b.raw", Path(node.notify.name)):
        path.chmod(0o777)
    for path in (node.run.parent, node.state.parent):
        path.mkdir()
        os.chown(path, nobody.pw_uid, nobody.pw_gid)
    lab.start(node)
    assert {path.stat().st_uid for path in (node.run, node.state, *node.state.iterdir())} == {nobody.pw_uid}
    node.restart(signal.SIGKILL)
    assert node.status()["mode"] == "secondary"


def test_only_one_process_is_a_node(lab: Lab) -> None:
    node = lab.start(ServiceNode(lab.folder, secondary_file(lab.folder)))
    done = launched(lab.folder, "vm1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (f"nbdkit-replication: node vm1 is running already: another process holds {node.run}/.lock\n")
    assert node.connect("guest").get_size() == MIB  # its socket is still its own


# -- sockets of systemd's --------------------------------------------------------------------------------------


def activated(lab: Lab, *listen: str, file: str) -> ServiceNode:
    """Started by systemd-socket-activate, which waits for the first client."""
    before = ["systemd-socket-activate", "-E", "NOTIFY_SOCKET"]
    before += [word for name in folders(lab.folder) for word in ("-E", name)]
    before += [word for place in listen for word in ("-l", place)]
    return lab.add(ServiceNode(lab.folder, file, before=before))


@pytest.mark.parametrize("passed", ["both", "the guest's", "the pair's"])
def test_sockets_of_systemd_and_its_own_add_up(lab: Lab, port: int, passed: str) -> None:
    address = f"127.0.0.1:{port}"
    file = secondary_file(lab.folder, service=f'listen = ["{address}"]')
    path = lab.folder / "run/vm1/guest.sock"
    path.parent.mkdir(parents=True)
    places = {"both": [str(path), address], "the guest's": [str(path)], "the pair's": [address]}[passed]
    node = activated(lab, *places, file=file)
    uris = [f"nbd+unix:///guest?socket={path}", f"nbd://{address}/guest"]
    # The first client starts it, by a socket of systemd's.
    first = socket.socket(socket.AF_UNIX) if passed != "the pair's" else socket.socket()
    ready = node.wait_ready

    def call_and_wait() -> None:
        wait_until(
            lambda: first.connect_ex(str(path) if passed != "the pair's" else ("127.0.0.1", port)) == 0, "listening"
        )
        ready()

    node.wait_ready = call_and_wait  # type: ignore[method-assign]
    with first:
        node.start()
    for uri in uris:
        assert size(uri) == MIB


def test_what_was_not_passed_to_this_process_is_left_alone(lab: Lab) -> None:
    """LISTEN_PID is another process's: the descriptors are not ours."""
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "2"}
    node = lab.start(ServiceNode(lab.folder, secondary_file(lab.folder), extra_environment=environment))
    assert node.connect("guest").get_size() == MIB


# -- what is refused -------------------------------------------------------------------------------------------


def test_what_is_wrong_in_the_file_has_a_code_of_its_own(lab: Lab) -> None:
    done = launched(lab.folder, "vm9")
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr == (
        f"nbdkit-replication: cannot read config={lab.folder}/etc/vm9.toml: No such file or directory\n"
    )
    assert launched(lab.folder).returncode == 2


@pytest.mark.parametrize(
    ("service", "said"),
    [
        ('socket-group = "no-such-group"', "socket-group = 'no-such-group': there is no such group"),
        ('guest-socket = "/proc/x"', "cannot listen on guest-socket = '/proc/x'"),
        ('guest-socket = "/etc/passwd"', "guest-socket = '/etc/passwd': there is a file in the way that is no socket"),
        ('listen = ["no-such-host.invalid:1"]', "cannot listen on no-such-host.invalid:1: "),
    ],
)
def test_a_socket_that_cannot_be_had_is_named(lab: Lab, service: str, said: str) -> None:
    ServiceNode(lab.folder, secondary_file(lab.folder, service=service)).notify.close()
    done = launched(lab.folder, "vm1")
    assert done.returncode == 1
    assert done.stderr.startswith(f"nbdkit-replication: {said}")
    assert done.stderr.count("\n") == 1


def test_a_port_in_use_and_a_socket_in_use_are_named(lab: Lab) -> None:
    with socket.socket() as taken, socket.socket(socket.AF_UNIX) as served:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ServiceNode(lab.folder, secondary_file(lab.folder, service=f'listen = ["{address}"]')).notify.close()
        done = launched(lab.folder, "vm1")
        assert (done.returncode, done.stderr) == (
            1,
            f"nbdkit-replication: cannot listen on {address}: Address already in use\n",
        )
        place = str(lab.folder / "mine.sock")
        served.bind(place)
        served.listen()
        (lab.folder / "etc/vm1.toml").write_text(secondary_file(lab.folder, service=f'guest-socket = "{place}"'))
        done = launched(lab.folder, "vm1")
        assert done.stderr == f"nbdkit-replication: guest-socket = '{place}' is in use by another process\n"
        assert served.getsockname() == place


def test_the_command_line_can_be_looked_at(lab: Lab) -> None:
    service = 'tls = "require"\ntls-psk = "/k"\ntls-verify-peer = true\nthreads = 3\nnbdkit = ["-v"]'
    ServiceNode(lab.folder, secondary_file(lab.folder, service=service)).notify.close()
    done = launched(lab.folder, "vm1", "--print")
    words = done.stdout.split()
    assert words[:7] == ["nbdkit", "-f", "--threads=3", "--tls=require", "--tls-psk=/k", "--tls-verify-peer", "-v"]
    assert words[9:] == [
        f"config={lab.folder}/etc/vm1.toml",
        f"state={lab.folder}/var/vm1",
        f"control={lab.folder}/run/vm1/control.sock",
    ]
    assert not (lab.folder / "run").exists()


# -- what systemd is told --------------------------------------------------------------------------------------


def test_an_abstract_notify_socket_is_told(lab: Lab) -> None:
    node = ServiceNode(lab.folder, secondary_file(lab.folder))
    node.notify.close()
    node.notify = NotifySocket(f"@nbdkit-replication-{secrets.token_hex(8)}")
    node.extra_environment["NOTIFY_SOCKET"] = node.notify.name
    lab.start(node)
    assert node.notify.heard[-1]["STATUS"] == "secondary, none; link disconnected; no checkpoint yet"


def test_the_watchdog_hears_of_a_node_that_answers_and_of_no_other(lab: Lab) -> None:
    watchdog_s = 0.4
    environment = {"WATCHDOG_USEC": str(round(watchdog_s * 1e6))}
    node = lab.start(ServiceNode(lab.folder, secondary_file(lab.folder), extra_environment=environment))
    before = node.notify.count("WATCHDOG")
    wait_until(lambda: node.notify.count("WATCHDOG") >= before + 3, "the watchdog hears of the node")
    with silent(node):
        told = len(node.notify.listen())
        node.notify.listen()
        time.sleep(2 * watchdog_s)
        assert len(node.notify.listen()) == told
    node.notify.wait_for("WATCHDOG", since=told)


def test_a_node_that_hangs_while_its_threads_run_is_not_alive(lab: Lab) -> None:
    """Its threads run, but no query comes back: the watchdog hears nothing, and STATUS= says why."""
    pauses = lab.pause_points()
    environment = {"WATCHDOG_USEC": "1600000", **pauses.environment}
    node = lab.start(ServiceNode(lab.folder, secondary_file(lab.folder), extra_environment=environment))
    pauses.arm("query.begun")
    pauses.wait_hit("query.begun")
    # A quarter of the watchdog's time is what an answer may take.
    told = node.notify.wait_for("STATUS", "does not answer: ", since=len(node.notify.listen()))
    assert "WATCHDOG" not in told
    wait_until(lambda: "the node does not answer itself: " in node.stderr(), "the log says so, too")
    pauses.release("query.begun")
    node.notify.wait_for("WATCHDOG", since=len(node.notify.listen()))


def test_another_processs_watchdog_is_not_fed(lab: Lab) -> None:
    environment = {"WATCHDOG_USEC": "400000", "WATCHDOG_PID": "1"}
    node = lab.start(ServiceNode(lab.folder, secondary_file(lab.folder), extra_environment=environment))
    node.execute("replication-start")
    node.notify.wait_for("STATUS", "secondary, running")
    assert node.notify.count("WATCHDOG") == 0


# -- reload ----------------------------------------------------------------------------------------------------


def reload(node: ServiceNode, text: str) -> None:
    """Another file, and systemd's ExecReload=; returns when the node says that it is done."""
    told = len(node.notify.listen())
    node.write(text)
    os.kill(node.pid, signal.SIGHUP)
    begun = node.notify.wait_for("RELOADING", "1", since=told)
    assert 0 < time.monotonic_ns() // 1000 - int(begun["MONOTONIC_USEC"]) < DEADLINE_S * 1e6
    node.notify.wait_for("READY", "1", since=node.notify.heard.index(begun))


def test_a_reload_takes_over_what_can_change(lab: Lab) -> None:
    secondary = lab.start(ServiceNode(lab.folder, secondary_file(lab.folder, "autostart = true"), name="b"))
    uri = f"nbd+unix:///?socket={secondary.socket_path}"
    primary = lab.start(ServiceNode(lab.folder, primary_file(lab.folder, uri, "autostart = true"), name="a"))
    primary.notify.wait_for("STATUS", "link in-sync")

    fast = 'autostart = true\ncheckpoint-interval = 0.05\nresync-rate = "1M"\nqueue-limit = "2M"'
    reload(primary, primary_file(lab.folder, uri, fast, 'log-level = "debug"\nwatchdog = 60'))
    primary.wait_said("reload: queue-limit, checkpoint-interval, resync-rate, log-level, watchdog changed\n")
    assert primary.notify.wait_for("WATCHDOG_USEC")["WATCHDOG_USEC"] == "60000000"
    epoch = primary.status()["epoch"]
    wait_until(lambda: primary.status()["epoch"] >= epoch + 3, "automatic checkpoints are taken")
    primary.connect("disk0")
    wait_until(lambda: "debug: export 'disk0': " in primary.stderr(), "the client is in the log")

    reload(primary, primary_file(lab.folder, uri, "autostart = true"))
    primary.execute("replication-checkpoint")  # the last automatic one, if it was at work, has ended
    assert "debug: command" not in primary.stderr()
    epoch = primary.status()["epoch"]
    time.sleep(0.3)
    assert primary.status()["epoch"] == epoch


def test_what_cannot_change_is_named_until_the_restart(lab: Lab) -> None:
    node = lab.start(ServiceNode(lab.folder, secondary_file(lab.folder)))
    changed = secondary_file(lab.folder, "timeout = 7\noverlay-watermark = 70", "threads = 3")
    reload(node, changed)
    node.wait_said("reload: overlay-watermark changed\n")
    reload(node, changed)
    node.wait_said("reload: nothing changed\n")
    node.wait_said("reload: the node has to be restarted for another value of timeout, threads\n", 2)
    node.restart()
    reload(node, changed)
    node.wait_said("reload: nothing changed\n", 2)
    assert node.stderr().count("has to be restarted") == 2


def test_a_wrong_file_changes_nothing(lab: Lab) -> None:
    node = lab.start(ServiceNode(lab.folder, secondary_file(lab.folder)))
    reload(node, secondary_file(lab.folder, "overlay-watermark = 70", "thread = 3"))
    node.wait_said(f"reload: {node.config}: unknown key 'thread' in [service]")
    node.wait_said("; nothing has changed\n")
    assert node.status()["mode"] == "secondary"
