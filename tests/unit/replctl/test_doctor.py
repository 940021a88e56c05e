# SPDX-License-Identifier: BSD-3-Clause
"""`replctl doctor`: for each check the fault is made, and found; and a sound pair has none."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from certificates import Authority
from commandline import replctl
from mounts import SmallFolder
from namednodes import give_name
from nodes import Pair, Secondary
from replication.replctl import doctor, finding, hostchecks, peerchecks
from replication.replctl.finding import Check, Finding, Look, Result, Subject
from waiting import DEADLINE_S, wait_until

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "config"
    made.mkdir()
    monkeypatch.setenv("NBDKIT_REPLICATION_CONFIG_DIR", str(made))
    monkeypatch.setenv("NBDKIT_REPLICATION_RUN_DIR", str(tmp_path / "run"))
    return made


class Node:
    """A node's file; `subject` reads it anew."""

    def __init__(self, folder: Path, tmp_path: Path, mode: str) -> None:
        self.folder, self.disk, self.state = folder, tmp_path / "disk.img", tmp_path / "state"
        self.disk.write_bytes(bytes(MIB))
        self.mode = mode
        self.top: dict[str, str] = {"mode": mode, "state": str(self.state)}
        self.service: list[str] = []
        self.more = ['top-id = "guest"'] if mode == "secondary" else []

    def subject(self) -> Subject:
        lines = [f"{key} = {json.dumps(value)}" for key, value in self.top.items()]
        disk = ["[disk.disk0]", f"disk = {json.dumps(str(self.disk))}", *self.more]
        (self.folder / "web1.toml").write_text("\n".join([*lines, "[service]", *self.service, *disk, ""]))
        return Subject("web1")


@pytest.fixture
def primary(folder: Path, tmp_path: Path) -> Node:
    return Node(folder, tmp_path, "primary")


@pytest.fixture
def secondary(folder: Path, tmp_path: Path) -> Node:
    return Node(folder, tmp_path, "secondary")


def found(look: Look, node: Subject) -> dict[Result, str]:
    """What a check says, with its advice, by result."""
    said: dict[Result, str] = {}
    for one in look(node):
        said[one.result] = said.get(one.result, "") + f"{one.text} -> {one.advice}\n"
        assert (one.advice is None) == (one.result is Result.OK)
    return said


def bad(look: Look, node: Subject | Node) -> str:
    return found(look, node.subject() if isinstance(node, Node) else node).get(Result.BAD, "")


def warned(look: Look, node: Subject | Node) -> str:
    return found(look, node.subject() if isinstance(node, Node) else node).get(Result.WARNING, "")


# The programs and the kernel


def shim(folder: Path, text: str) -> Path:
    folder.mkdir()
    path = folder / "nbdkit"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return folder


def test_missing_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt install nbdkit qemu-utils" in bad(hostchecks.software, Subject(""))


def test_nbdkit_without_its_python_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{shim(tmp_path / 'bin', 'exit 1')}:{os.environ['PATH']}")
    assert "nbdkit-plugin-python" in bad(hostchecks.software, Subject(""))


def test_an_old_nbdkit_and_an_old_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{shim(tmp_path / 'bin', 'echo nbdkit 1.24.1')}:{os.environ['PATH']}")
    assert "1.24.1 is older" in warned(hostchecks.software, Subject(""))
    real = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*real[:2], "4.9.0-13-amd64", *real[3:])))
    assert "losses may stay unknown" in bad(hostchecks.software, Subject(""))


@pytest.mark.parametrize(("version", "may_stay"), [("1.32.5", True), ("1.34.0", False)])
def test_the_defect_of_nbdkit_in_debian_12_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, may_stay: bool
) -> None:
    monkeypatch.setenv("PATH", f"{shim(tmp_path / 'bin', f'echo nbdkit {version}')}:{os.environ['PATH']}")
    said = found(hostchecks.software, Subject(""))
    assert (f"nbdkit {version}" in said[Result.OK], "may stay" in said[Result.OK]) == (True, may_stay)
    assert not warned(hostchecks.software, Subject(""))


def test_names_in_certificates_need_a_newer_nbdkit(
    secondary: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secondary.top["primary-identity"] = "CN=a"
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{shim(tmp_path / 'old', 'echo nbdkit 1.38.5')}:{path}")
    assert "primary-identity need" in bad(hostchecks.identities, secondary)
    monkeypatch.setenv("PATH", f"{shim(tmp_path / 'new', 'echo nbdkit 1.40.4')}:{path}")
    assert not bad(hostchecks.identities, secondary)


# The disks


def test_a_disk_that_is_missing_or_empty(secondary: Node) -> None:
    assert found(hostchecks.disks, secondary.subject()).keys() == {Result.OK}
    secondary.disk.write_bytes(b"")
    assert "is empty -> make it" in bad(hostchecks.disks, secondary)
    secondary.disk.unlink()
    assert "No such file" in bad(hostchecks.disks, secondary)
    os.mkfifo(secondary.disk)
    assert "neither a file nor" in bad(hostchecks.disks, secondary)


def test_a_disk_that_a_state_folder_knows_is_not_to_be_made_anew(secondary: Node) -> None:
    """With an empty one the node would go on as if that held what the folder says."""
    secondary.top["state"] = str(secondary.state)
    secondary.state.mkdir(parents=True, exist_ok=True)
    (secondary.state / "state.json").write_text("{}")
    for spoil in (lambda: secondary.disk.write_bytes(b""), secondary.disk.unlink):
        spoil()
        said = bad(hostchecks.disks, secondary)
        assert "bring it back" in said
        assert "truncate" not in said


def test_a_secondary_whose_disk_got_another_size_starts_when_the_advice_was_followed(pair: Pair) -> None:
    b = pair.secondary
    assert found(hostchecks.disks, Subject("b")).keys() == {Result.OK}
    b.kill()
    os.truncate(b.disks[0], MIB // 2)
    said = bad(hostchecks.disks, Subject("b"))
    assert f"has {MIB // 2} bytes, but {b.state} is of {MIB}: the node does not start" in said
    assert f"of {MIB} bytes, but these are" in b.failed_start(b.folder, b.arguments)[1]
    assert f"move {b.state} away" in said
    b.state.rename(b.state.with_name("away"))
    assert found(hostchecks.disks, Subject("b")).keys() == {Result.OK}
    b.start()
    # And so does one that gets its size back.
    b.kill()
    os.truncate(b.disks[0], MIB)
    shutil.rmtree(b.state)
    b.state.with_name("away").rename(b.state)
    assert found(hostchecks.disks, Subject("b")).keys() == {Result.OK}
    b.start()
    assert b.status()["stage"] == "running"


def test_a_disk_that_has_grown_is_used_as_before_and_the_command_is_named(pair: Pair) -> None:
    b = pair.secondary
    b.kill()
    os.truncate(b.disks[0], 2 * MIB)
    (finding,) = [each for each in hostchecks.disks(Subject("b")) if each.result is Result.WARNING]
    assert f"has {2 * MIB} bytes, but {b.state} is of {MIB}: these are used" in finding.text
    assert "resize" in str(finding.advice)
    b.start()
    assert b.status()["disks"][0]["size"] == MIB


def test_a_disk_that_the_service_may_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "disk"
    path.parent.mkdir()
    path.touch(0o600)
    for above in (path.parent, *path.parent.parents):
        if above.stat().st_uid == os.getuid() and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o001)
    assert not hostchecks.may_write(str(path), "nobody")
    path.chmod(0o666)
    assert hostchecks.may_write(str(path), "nobody")
    path.parent.chmod(0o700)
    assert not hostchecks.may_write(str(path), "nobody")
    assert hostchecks.may_write(str(path), "no-such-user-here")


def test_a_disk_that_qemu_uses(secondary: Node) -> None:
    assert not found(hostchecks.locks, secondary.subject())
    qemu = subprocess.Popen(["qemu-io", "-f", "raw", secondary.disk], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: bad(hostchecks.locks, secondary), "qemu-io locks the disk")
        assert f"qemu-io (process {qemu.pid})" in bad(hostchecks.locks, secondary)
    finally:
        qemu.kill()
        qemu.communicate()


def test_a_disk_that_the_node_itself_uses_and_a_node_that_is_not_its_user(folder: Path, tmp_path: Path) -> None:
    with Secondary(tmp_path, [MIB]) as node:
        path = give_name(folder, "web1", node)
        assert not found(hostchecks.locks, Subject("web1"))
        path.write_text(path.read_text().replace("control = ", 'control = "/nowhere" # '))
        assert "nbdkit (process" in bad(hostchecks.locks, Subject("web1"))


# Folders


@pytest.mark.skipif(hostchecks.file_system("/dev/shm") != "tmpfs", reason="/dev/shm is no tmpfs here")
def test_folders_in_memory(secondary: Node) -> None:
    assert found(hostchecks.state, secondary.subject()).keys() == {Result.OK}
    secondary.top["state"] = "/dev/shm/web1-test/state"
    assert "is in memory (tmpfs)" in bad(hostchecks.state, secondary)
    secondary.top |= {"state": str(secondary.state), "durability": "power"}
    secondary.more += ['hidden = "/dev/shm/web1-test/hidden.qcow2"']
    assert "durability is power" in bad(hostchecks.overlays, secondary)


def test_folders_without_room(
    secondary: Node, small_folder: Callable[[int], SmallFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(hostchecks, "STATE_BYTES_MIN", 1 << 60)  # no folder of this machine has that
        assert "MiB left -> make room" in bad(hostchecks.state, secondary)
    secondary.top["state"] = f"{small_folder(8 * MIB).folder}/state"
    assert found(hostchecks.overlays, secondary.subject()).keys() == {Result.OK}
    os.truncate(secondary.disk, 200 * MIB)
    assert "overwrites between two checkpoints" in warned(hostchecks.overlays, secondary)
    os.truncate(secondary.disk, 2000 * MIB)
    assert "for the overlays of 2000 MiB of disks" in bad(hostchecks.overlays, secondary)


# Ports, the guest's socket, TLS


def test_ports(secondary: Node) -> None:
    assert "listens at no TCP port" in warned(hostchecks.ports, secondary)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        secondary.service = [f'listen = ["{address}"]']
        assert f"somebody listens at {address}" in warned(hostchecks.ports, secondary)
    assert found(hostchecks.ports, secondary.subject()).keys() == {Result.OK}
    (secondary.folder / "web2.toml").write_text((secondary.folder / "web1.toml").read_text())
    assert "also in the file of web2" in bad(hostchecks.ports, secondary)
    secondary.service = ['listen = ["192.0.2.77:10809"]']
    assert "nobody can connect at 192.0.2.77:10809 yet" in warned(hostchecks.ports, secondary)


def test_a_group_that_does_not_exist(primary: Node) -> None:
    primary.service = ['socket-group = "no-such-group"']
    assert "there is no such group" in bad(hostchecks.guest_socket, primary)


def test_certificates(secondary: Node, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")

    def look(path: Path) -> dict[Result, str]:
        secondary.service = ['listen = [":10809"]', 'tls = "require"', f'tls-certificates = "{path}"']
        return found(hostchecks.certificates, secondary.subject())

    sound = authority.server("sound", days=30)
    (sound / "server-key.pem").chmod(0o600)
    assert look(sound).keys() == {Result.OK}
    secondary.service.append("tls-verify-peer = true")
    assert "demands a certificate of its guest" in warned(hostchecks.certificates, secondary)
    (sound / "server-key.pem").chmod(0o644)
    assert "can be read by everybody" in look(sound)[Result.WARNING]
    assert "expires at" in look(authority.server("soon", days=5))[Result.WARNING]
    expired = authority.server("expired", days=0)
    assert "is valid from" in look(expired)[Result.BAD]
    shutil.copy(sound / "server-key.pem", expired / "server-key.pem")
    assert "are no pair" in look(expired)[Result.BAD]
    assert "server-cert.pem: No such file" in look(authority.nobody())[Result.BAD]
    secondary.service = ['listen = [":10809", "127.0.0.1:10810"]']
    assert "no TLS at :10809:" in warned(hostchecks.certificates, secondary)


# The node and its peer


@pytest.fixture
def pair(folder: Path, tmp_path: Path) -> Iterator[Pair]:
    """Nodes `a` and `b`; they run, and replicate."""
    pair = Pair(tmp_path, [MIB])
    give_name(folder, "a", pair.primary)
    give_name(folder, "b", pair.secondary)
    pair.start()
    pair.start_replication()
    pair.primary.checkpoint()
    yield pair
    pair.close()


def test_nodes_that_run_or_have_failed_or_are_alone(pair: Pair) -> None:
    assert "stage running" in found(hostchecks.running, Subject("b"))[Result.OK]
    wait_until(lambda: found(peerchecks.heard, Subject("b")).keys() == {Result.OK}, "the secondary knows its primary")
    pair.primary.kill()
    assert "does not answer" in warned(hostchecks.running, Subject("a"))
    wait_until(lambda: warned(peerchecks.heard, Subject("b")), "the secondary has noticed")
    pair.secondary.execute("job-cancel", id="backup-disk0")
    wait_until(lambda: "has failed" in bad(hostchecks.running, Subject("b")), "the secondary has an error")


def test_what_a_primary_sees_of_its_secondary(pair: Pair, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for look in (peerchecks.sizes, peerchecks.versions, peerchecks.clock):
        assert found(look, Subject("a")).keys() == {Result.OK}
    monkeypatch.setattr(peerchecks, "VERSION", "9.9.9")
    assert "this side runs 9.9.9" in warned(peerchecks.versions, Subject("a"))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 100)
    # Less by what the question takes.
    assert re.search(r"the secondary is (9\d|100) s ahead of", warned(peerchecks.clock, Subject("a")))
    path = folder / "a.toml"
    text = path.read_text()
    os.truncate(pair.primary.disks[0], 2 * MIB)
    assert f"has {2 * MIB} bytes here and {MIB} bytes there -> stop" in bad(peerchecks.sizes, Subject("a"))
    os.truncate(pair.primary.disks[0], MIB // 2)
    assert f"-> what is there behind byte {MIB // 2} is lost with this" in bad(peerchecks.sizes, Subject("a"))
    path.write_text(text.replace("[disk.disk0]", "[disk.other]"))
    assert "has no disk other" in bad(peerchecks.sizes, Subject("a"))
    path.write_text(text.replace("nbd+unix:", "nbds+unix:"))
    assert "-> docs/security.md" in bad(peerchecks.sizes, Subject("a"))
    pair.secondary.kill()
    assert not found(peerchecks.versions, Subject("a"))
    assert "cannot connect" in bad(peerchecks.sizes, Subject("a"))


def test_a_secondary_that_cannot_be_reached(primary: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has no secondary" in warned(peerchecks.reachable, primary)
    primary.top["secondary"] = "nbd://no-such-host.invalid"
    assert "-> put it into /etc/hosts" in bad(peerchecks.reachable, primary)
    with socket.socket() as nobody, socket.create_server(("127.0.0.1", 0), backlog=1) as server:
        nobody.bind(("127.0.0.1", 0))
        primary.top["secondary"] = f"nbd://127.0.0.1:{nobody.getsockname()[1]}"
        assert "nobody listens" in bad(peerchecks.reachable, primary)
        assert "-> see `peer`" in bad(peerchecks.sizes, primary)
        primary.top["secondary"] = f"nbd://127.0.0.1:{server.getsockname()[1]}"
        assert found(peerchecks.reachable, primary.subject()).keys() == {Result.OK}
        monkeypatch.setattr(peerchecks, "CONNECT_S", 0.5)
        waiting = []
        while not (said := bad(peerchecks.reachable, primary)) and len(waiting) < 20:
            waiting.append(socket.socket())  # until the kernel takes no more
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(server.getsockname())
        for each in waiting:
            each.close()
        assert "no answer from 127.0.0.1" in said


# The command


def test_a_check_that_hangs_holds_no_other_up(primary: Node) -> None:
    ever, over = threading.Event(), []

    def hangs(_: Subject) -> Iterator[Finding]:
        ever.wait(DEADLINE_S)
        over.append(True)
        yield finding.ok("at last")

    def breaks(_: Subject) -> Iterator[Finding]:
        yield finding.ok(str(1 // 0))

    checks = (Check("hangs", hangs, 0.2), Check("file", hostchecks.file), Check("breaks", breaks))
    said = list(doctor.examine(primary.subject(), checks))
    assert not over, "nobody has waited for the one that hangs"
    ever.set()
    assert [(name, one.result) for name, one in said] == [
        ("hangs", Result.BAD),
        ("file", Result.OK),
        ("breaks", Result.BAD),
    ]
    assert "no result within 0.2 s" in said[0][1].text


def test_a_sound_pair_and_then_a_broken_file(pair: Pair, folder: Path) -> None:
    done = replctl("doctor", "--json")
    rows = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert {row["node"] for row in rows} == {None, "a", "b"}
    assert all(row.keys() == {"node", "check", "result", "text", "advice"} for row in rows)
    asked = {row["check"] for row in rows if row["result"] == "ok"}
    assert {"software", "file", "running", "disks", "state", "overlays", "sizes", "versions", "clock"} <= asked
    text = replctl("a", "doctor").stdout
    other = replctl("doctor", "a").stdout
    assert re.sub(r"\d+ MiB", "", text) == re.sub(r"\d+ MiB", "", other)
    assert "node a\n  ok       file " in text
    assert "node b" not in text
    (folder / "b.toml").write_text("mode = secondary")
    broken = replctl("doctor")
    assert broken.returncode == 1
    assert "  bad      file          " in broken.stdout
    assert "replctl check-config b" in broken.stdout
    assert replctl("doctor", "c").returncode == 2
