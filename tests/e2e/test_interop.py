# SPDX-License-Identifier: BSD-3-Clause
"""Stock tools on faces, overlays and control socket: qemu-img, qemu-io, QEMU, libnbd's tools, fio, QMP clients."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbd
import pytest
from qemu.qmp import ExecuteError, QMPClient

from content import KIB, MIB, make_raw, pattern, qemu_img
from endpoints import Qemu
from lab import Lab
from nodes import Pair, Secondary, Server, drained, nbd_refusal
from waiting import wait_until

BEFORE = pattern(21, MIB)
BLOCK = 4 * KIB


def run(*command: str, text: str | None = None, timeout_s: float = 60.0) -> str:
    """Run a tool that must succeed; its standard output."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"{command}: {done.returncode}: {done.stderr}{done.stdout}"
    return done.stdout


def failure(*command: str) -> str:
    """Run a tool that must fail; what it says."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0, f"{command}: {done.stdout}"
    return done.stderr + done.stdout


class Running:
    """A running pair with one difference on each face since the last checkpoint."""

    def __init__(self, lab: Lab) -> None:
        self.pair: Pair = lab.pair(contents=[BEFORE])
        self.pair.start_replication()
        self.primary, self.secondary = self.pair.primary, self.pair.secondary
        self.primary_content = bytearray(BEFORE)
        self.guest_content = bytearray(BEFORE)
        self.write_primary(10 * BLOCK + 100, pattern(31, 3 * BLOCK))
        self.write_guest(12 * BLOCK + 1, pattern(32, 3 * BLOCK))
        self.write_guest(200 * BLOCK, bytes(BLOCK))

    def write_primary(self, offset: int, data: bytes) -> None:
        handle = self.primary.connect()
        handle.pwrite(data, offset)
        handle.shutdown()
        drained(self.primary)
        self.primary_content[offset : offset + len(data)] = data

    def write_guest(self, offset: int, data: bytes) -> None:
        handle = self.secondary.connect("top0")
        if any(data):
            handle.pwrite(data, offset)
        else:
            handle.zero(len(data), offset)
        handle.shutdown()
        self.guest_content[offset : offset + len(data)] = data


@pytest.fixture
def running(lab: Lab) -> Running:
    return Running(lab)


def faces(running: Running) -> list[tuple[str, bytes]]:
    """URI and content of every export."""
    return [
        (running.primary.uri("disk0"), bytes(running.primary_content)),
        (running.secondary.uri("disk0"), bytes(running.primary_content)),
        (running.secondary.uri("top0"), bytes(running.guest_content)),
    ]


# -- qemu-img --------------------------------------------------------------------------------------------------


def test_qemu_img_reads_every_face(running: Running, lab: Lab) -> None:
    for uri, content in faces(running):
        copy = lab.folder / "copy.raw"
        qemu_img("convert", "-f", "raw", "-O", "raw", uri, str(copy))
        assert copy.read_bytes() == content
        assert "Images are identical" in qemu_img("compare", "-f", "raw", "-F", "raw", uri, str(copy))
        assert json.loads(qemu_img("info", "--output=json", "-f", "raw", uri))["virtual-size"] == MIB
        mapped = json.loads(qemu_img("map", "--output=json", "-f", "raw", uri))
        assert sum(extent["length"] for extent in mapped) == MIB
        for extent in mapped:
            if extent["zero"]:
                assert not any(content[extent["start"] : extent["start"] + extent["length"]])


def test_qemu_img_map_shows_the_zeroes_of_the_guest(running: Running) -> None:
    mapped = json.loads(qemu_img("map", "--output=json", "-f", "raw", running.secondary.uri("top0")))
    assert any(extent["zero"] and extent["start"] == 200 * BLOCK and extent["length"] == BLOCK for extent in mapped)


def test_qemu_img_convert_into_the_primary_arrives_on_the_secondary(running: Running, lab: Lab) -> None:
    image = make_raw(lab.folder / "new.raw", MIB, pattern(33, 300 * KIB))
    qemu_img("convert", "-n", "-f", "raw", "-O", "raw", str(image), running.primary.uri())
    drained(running.primary)
    assert running.primary.disks[0].read_bytes() == image.read_bytes()
    assert running.secondary.disks[0].read_bytes() == image.read_bytes()
    assert running.secondary.connect("top0").pread(MIB, 0) == running.guest_content


def test_images_in_use_are_locked_as_qemu_locks_them(running: Running, lab: Lab) -> None:
    secondary = running.secondary
    for image in (secondary.overlay("active"), secondary.overlay("hidden")):
        for command in ("info", "check", "map"):
            assert 'Failed to get shared "write" lock' in failure("qemu-img", command, str(image))
        assert 'Failed to get "write" lock' in failure("qemu-img", "commit", str(image))
        assert json.loads(qemu_img("info", "-U", "--output=json", str(image)))["virtual-size"] == MIB
        assert "No errors" in qemu_img("check", "-U", str(image))
    for disk in (secondary.disks[0], running.primary.disks[0]):
        # `qemu-img info` of a raw file reads nothing and asks for no lock; converting does.
        reading = failure("qemu-img", "convert", "-f", "raw", "-O", "raw", str(disk), str(lab.folder / "copy.raw"))
        assert 'Failed to get shared "write" lock' in reading
        assert 'Failed to get "write" lock' in failure("qemu-io", "-f", "raw", "-c", "write 0 512", str(disk))
    # What the guest sees is in the images at every moment, for whoever insists.
    copy = lab.folder / "copy.raw"
    qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", str(secondary.overlay("active")), str(copy))
    assert copy.read_bytes() == running.guest_content
    assert secondary.status()["stage"] == "running"


@pytest.mark.parametrize("end", ["killed", "ended"])
@pytest.mark.parametrize("what", ["checkpoint and the guest's writes", "checkpoint only"])
def test_qemu_img_alone_gets_the_data_back(running: Running, end: str, what: str) -> None:
    """The process is gone and nothing of this project is left to help."""
    secondary = running.secondary
    active, hidden = secondary.overlay("active"), secondary.overlay("hidden")
    if end == "killed":
        secondary.kill()
    else:
        secondary.terminate()
    disk = secondary.disks[0]
    assert disk.read_bytes() == running.primary_content
    for image in (active, hidden):
        assert "No errors" in qemu_img("check", str(image))
    if what == "checkpoint only":
        qemu_img("commit", "-f", "qcow2", str(hidden))
        assert disk.read_bytes() == BEFORE
    else:
        qemu_img("commit", "-f", "qcow2", "-b", str(disk), str(active))
        assert disk.read_bytes() == running.guest_content


# -- qemu-io ---------------------------------------------------------------------------------------------------


def test_qemu_io_works_on_all_three_exports(running: Running) -> None:
    for uri, _ in faces(running):
        if uri == running.secondary.uri("disk0"):
            # Another client than the primary may write there only when no primary is connected.
            assert "Operation not permitted" in failure("qemu-io", "-f", "raw", "-c", "write 0 4k", uri)
            running.primary.execute("replication-stop")
        output = run(
            *("qemu-io", "-f", "raw"),
            *("-c", "write -P 0x55 513 70000", "-c", "read -P 0x55 513 70000"),
            *("-c", "write -f -P 0x56 4k 4k", "-c", "read -P 0x56 4k 4k"),
            *("-c", "write -z 64k 4k", "-c", "read -P 0 64k 4k"),
            *("-c", "write -z -u 128k 4k", "-c", "read -P 0 128k 4k"),
            *("-c", "discard 192k 64k", "-c", "read -P 0 192k 64k"),
            *("-c", "aio_write -P 0x57 256k 128k", "-c", "aio_write -P 0x58 384k 1k", "-c", "aio_flush"),
            *("-c", "read -P 0x57 256k 128k", "-c", "read -P 0x58 384k 1k", "-c", "flush", "-c", "map"),
            uri,
        )
        assert "failed" not in output.lower()


# -- QEMU ------------------------------------------------------------------------------------------------------

_LISTEN = """
import os, socket, sys
unix, port_file, *command = sys.argv[1:]
first = socket.socket(socket.AF_UNIX); first.bind(unix); first.listen()
second = socket.socket(); second.bind(("127.0.0.1", 0)); second.listen()
with open(port_file, "w") as file: file.write(str(second.getsockname()[1]))
kept = [os.dup2(os.dup(s.fileno()), 10 + i, False) for i, s in enumerate((first, second))]
for i, fd in enumerate(kept): os.dup2(fd, 3 + i, True)
os.environ.update(LISTEN_FDS="2", LISTEN_PID=str(os.getpid()))
os.execvp(command[0], command)
"""


class TwoListeners(Server):
    """One nbdkit on a Unix socket and a TCP port, given to it as systemd gives them (sd_listen_fds)."""

    @property
    def port(self) -> int:
        return int((self.folder / f"{self.name}.port").read_text())

    def command(self) -> list[str]:
        command = super().command()
        at = command.index("-U")
        del command[at : at + 2]
        port_file = self.folder / f"{self.name}.port"
        return [sys.executable, "-c", _LISTEN, str(self.socket_path), str(port_file), *command]


def two_listeners(lab: Lab, content: bytes) -> TwoListeners:
    disk = make_raw(lab.folder / "p.raw", MIB, content)
    return lab.start(TwoListeners(lab.folder, "two", ["mode=primary", f"state={lab.folder}/s", f"disk={disk}"]))


def test_one_process_serves_a_unix_socket_and_a_port_by_socket_activation(lab: Lab) -> None:
    server = two_listeners(lab, BEFORE)
    by_port, by_socket = nbd.NBD(), server.connect()
    by_port.connect_uri(f"nbd://127.0.0.1:{server.port}/disk0")
    by_socket.pwrite(b"x" * 512, 0)
    assert by_port.pread(1024, 0) == b"x" * 512 + BEFORE[512:1024]
    by_port.shutdown()


def export(qemu: Qemu, node: str) -> nbd.NBD:
    """A handle on a node of QEMU's block layer, through QEMU's own NBD server."""
    qemu.qmp.execute("block-export-add", {"type": "nbd", "id": node, "node-name": node, "writable": True})
    handle = nbd.NBD()
    handle.set_export_name(node)
    handle.connect_unix(str(qemu.socket_path))
    return handle


def nbd_node(qemu: Qemu, node: str, server: Server, name: str) -> None:
    """blockdev-add driver=nbd, with raw on top as QEMU's documentation has it."""
    address = {"type": "unix", "path": str(server.socket_path)}
    file = {"driver": "nbd", "server": address, "export": name}
    qemu.qmp.execute("blockdev-add", {"driver": "raw", "node-name": node, "file": file})


def local_node(qemu: Qemu, node: str, path: Path) -> None:
    file = {"driver": "file", "filename": str(path)}
    qemu.qmp.execute("blockdev-add", {"driver": "raw", "node-name": node, "file": file})


def test_qemu_attaches_the_primary_by_unix_uri_tcp_uri_and_blockdev(lab: Lab) -> None:
    server = two_listeners(lab, BEFORE)
    qemu = lab.qemu()
    qemu.serve_nbd()
    uris = {"unix": server.uri("disk0"), "tcp": f"nbd://127.0.0.1:{server.port}/", "named": server.uri()}
    for node, uri in uris.items():
        options = f"if=none,id={node},node-name={node}-node,format=raw,cache=none,file={uri}"
        said = qemu.qmp.execute("human-monitor-command", {"command-line": f'drive_add 0 "{options}"'})
        assert "OK" in said
    nbd_node(qemu, "blockdev", server, "disk0")
    content = bytearray(BEFORE)
    for number, node in enumerate([*(f"{name}-node" for name in uris), "blockdev"]):
        handle = export(qemu, node)
        data, offset = pattern(40 + number, 3000), number * 9000 + 333
        handle.pwrite(data, offset)
        handle.flush()
        content[offset : offset + len(data)] = data
        handle.shutdown()
    assert (lab.folder / "p.raw").read_bytes() == content


@pytest.mark.parametrize("order", ["local first", "forward first", "attached later"])
def test_qemus_quorum_forwards_through_a_primary_without_a_disk(lab: Lab, order: str) -> None:
    """docs/block-replication.txt of QEMU: the guest's disk is a quorum of its local disk and the replication child."""
    secondary = lab.secondary(contents=[BEFORE])
    forward = lab.start(
        Server(lab.folder, "primary", ["mode=primary", f"state={lab.folder}/s1", f"secondary={secondary.uri('disk0')}"])
    )
    secondary.start_replication()
    forward.execute("xen-set-replication", enable=True, primary=True)
    local = make_raw(lab.folder / "local.raw", MIB, BEFORE)
    qemu = lab.qemu()
    qemu.serve_nbd()
    local_node(qemu, "local0", local)
    nbd_node(qemu, "forward0", forward, "disk0")
    children = {"local first": ["local0", "forward0"], "forward first": ["forward0", "local0"]}.get(order, ["local0"])
    quorum = {"driver": "quorum", "node-name": "colo", "vote-threshold": 1, "read-pattern": "fifo"}
    qemu.qmp.execute("blockdev-add", {**quorum, "children": children})
    if order == "attached later":
        qemu.qmp.execute("x-blockdev-change", {"parent": "colo", "node": "forward0"})
    guest = export(qemu, "colo")
    content = bytearray(BEFORE)
    for offset, length in ((0, BLOCK), (70000, 5000), (MIB - 512, 512)):
        content[offset : offset + length] = pattern(offset + 1, length)
        guest.pwrite(pattern(offset + 1, length), offset)
    guest.zero(8192, 300 * KIB)
    content[300 * KIB : 300 * KIB + 8192] = bytes(8192)
    assert guest.pread(MIB, 0) == content
    guest.flush()
    drained(forward)
    assert local.read_bytes() == content
    assert secondary.disks[0].read_bytes() == content
    assert secondary.connect("top0").pread(MIB, 0) == BEFORE
    with nbd_refusal(errno.EIO):
        forward.connect("disk0").pread(512, 0)
    wait_until(lambda: "'disk0' only forwards" in forward.stderr(), "the log says why")
    assert "Traceback" not in forward.stderr()
    forward.execute("replication-checkpoint")
    assert secondary.connect("top0").pread(MIB, 0) == content
    guest.shutdown()
    if order == "attached later":
        # As after the loss of the secondary: the child goes, the guest's disk stays.
        qemu.qmp.execute("x-blockdev-change", {"parent": "colo", "child": "children.1"})


def test_qemus_secondary_runs_on_the_guest_face_over_checkpoint_and_failover(running: Running, lab: Lab) -> None:
    qemu = lab.qemu()
    qemu.serve_nbd()
    nbd_node(qemu, "top", running.secondary, "top0")
    guest = export(qemu, "top")
    assert guest.pread(MIB, 0) == running.guest_content
    running.primary.execute("replication-checkpoint")
    content = running.primary_content
    assert guest.pread(MIB, 0) == content
    guest.pwrite(b"q" * 5000, 777)
    content[777:5777] = b"q" * 5000
    running.secondary.failover()
    assert guest.pread(MIB, 0) == content
    guest.pwrite(b"r" * 512, 0)
    content[:512] = b"r" * 512
    guest.flush()
    assert running.secondary.disks[0].read_bytes() == content
    guest.shutdown()


# -- libnbd's tools --------------------------------------------------------------------------------------------


def test_nbdcopy_reads_every_face_and_writes_the_primary(running: Running, lab: Lab) -> None:
    for uri, content in faces(running):
        copy = lab.folder / "copy.raw"
        copy.unlink(missing_ok=True)
        run("nbdcopy", uri, str(copy))
        assert copy.read_bytes() == content
    image = make_raw(lab.folder / "new.raw", MIB, pattern(34, 100 * KIB))
    run("nbdcopy", "--flush", "--connections=4", "--request-size=65536", str(image), running.primary.uri())
    drained(running.primary)
    assert running.secondary.disks[0].read_bytes() == image.read_bytes()
    assert running.secondary.connect("top0").pread(MIB, 0) == running.guest_content


def test_nbdinfo_lists_the_exports_with_their_size_and_abilities(running: Running) -> None:
    for server, names in ((running.primary, {"disk0"}), (running.secondary, {"disk0", "top0"})):
        listed = json.loads(run("nbdinfo", "--json", "--list", server.uri()))["exports"]
        assert {item["export-name"] for item in listed} == names
        for item in listed:
            assert item["export-size"] == MIB
            assert not item["is_read_only"]
            for ability in ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_cache", "can_df"):
                assert item[ability], ability
            assert "base:allocation" in item["contexts"]
            sizes = (item["block_size_minimum"], item["block_size_preferred"], item["block_size_maximum"])
            assert sizes == (1, BLOCK, 32 * MIB)
            assert item["description"]


def test_nbdinfo_map_covers_every_face_and_tells_no_lies(running: Running) -> None:
    for uri, content in faces(running):
        at = 0
        for extent in json.loads(run("nbdinfo", "--json", "--map", uri)):
            assert extent["offset"] == at
            at += extent["length"]
            if extent["type"] & nbd.STATE_ZERO:
                assert not any(content[extent["offset"] : at])
        assert at == MIB


# -- fio -------------------------------------------------------------------------------------------------------


def fio(uri: str, *, seed: int) -> subprocess.Popen[str]:
    """Random writes of mixed sizes with a checksum in every block, then read back and verified."""
    command = [
        *("fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bsrange=512-64k"),
        *("--bs_unaligned=0", "--size=8M", "--loops=6", "--iodepth=8", "--verify=crc32c", "--do_verify=1"),
        *("--verify_fatal=1", "--verify_state_save=0", "--fsync=64", f"--randseed={seed}", "--serialize_overlap=1"),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], meanwhile: Callable[[], object] = lambda: None) -> int:
    """Wait for fio, which must find nothing wrong; how often `meanwhile` was called."""
    calls = 0
    try:
        while process.poll() is None:
            meanwhile()
            calls += 1
            try:
                process.wait(0.02)
            except subprocess.TimeoutExpired:
                assert calls < 3000, "fio never ends"
        output = process.communicate(timeout=10)[0]
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=10)
    assert process.returncode == 0, output
    assert "verify:" not in output, output
    assert re.search(r"err= *0", output), output
    return calls


def test_fio_verifies_the_primary_while_checkpoints_are_taken(lab: Lab) -> None:
    pair = lab.pair((8 * MIB,))
    pair.start_replication()

    def checkpoint() -> None:
        pair.primary.execute("replication-checkpoint")

    assert finish(fio(pair.primary.uri(), seed=1), checkpoint) >= 3
    checkpoint()
    assert pair.primary.disks[0].read_bytes() == pair.secondary.disks[0].read_bytes()
    handle = pair.secondary.connect("top0")
    assert handle.pread(8 * MIB, 0) == pair.primary.disks[0].read_bytes()


def test_fio_verifies_the_guest_face_while_the_primary_writes_the_same_blocks(lab: Lab) -> None:
    pair = lab.pair((8 * MIB,))
    pair.start_replication()
    guest = fio(pair.secondary.uri("top0"), seed=2)
    try:
        finish(fio(pair.primary.uri(), seed=3))
    finally:
        finish(guest)
    assert pair.secondary.status()["error"] is None


# -- QMP clients -----------------------------------------------------------------------------------------------


def test_the_qemu_qmp_library_drives_a_secondary(lab: Lab) -> None:
    secondary = lab.secondary()

    async def session() -> None:
        client = QMPClient("operator")
        await client.connect(str(secondary.control_path))
        try:
            with client.listener("REPLICATION_STAGE_CHANGE") as stages:
                assert await client.execute("query-xen-replication-status") == {
                    "error": True,
                    "desc": "Block replication is not running",
                }
                await client.execute("xen-set-replication", {"enable": True, "primary": False})
                event = await asyncio.wait_for(stages.get(), 20)
                assert (event["data"]["from"], event["data"]["to"]) == ("none", "running")
                await client.execute("xen-colo-do-checkpoint")
                with pytest.raises(ExecuteError, match="Block replication is running or done"):
                    await client.execute("replication-start")
                await client.execute("replication-stop", {"failover": True})
                event = await asyncio.wait_for(stages.get(), 20)
                assert event["data"]["to"] == "failover"
                event = await asyncio.wait_for(stages.get(), 20)
                assert event["data"]["to"] == "done"
            with pytest.raises(ExecuteError, match="has not been found"):
                await client.execute("no-such-command")
        finally:
            await client.disconnect()

    asyncio.run(asyncio.wait_for(session(), 60))


def test_qmp_shell_drives_a_secondary(lab: Lab) -> None:
    secondary = lab.secondary()
    script = (
        "xen-set-replication enable=true primary=false\nxen-colo-do-checkpoint\n"
        "query-replication\nreplication-stop failover=false\nreplication-get-error\n"
    )
    shell = Path(sys.executable).with_name("qmp-shell")
    assert shell.exists(), "qmp-shell comes with qemu.qmp"
    environment = {**os.environ, "HOME": str(lab.folder)}  # it keeps a history there
    done = subprocess.run(
        [shell, str(secondary.control_path)],
        input=script,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert '"stage": "running"' in done.stdout
    assert '"error": {"' not in done.stdout
    assert secondary.status()["stage"] == "done"


def test_socat_is_enough_of_a_client(lab: Lab) -> None:
    secondary = lab.secondary()
    output = run(
        *("socat", "-t", "10", "-", f"UNIX-CONNECT:{secondary.control_path}"),
        text='{"execute": "qmp_capabilities"}\n{"execute": "replication-start", "id": "s"}\n'
        '{"execute": "query-replication", "id": "q"}',
    )
    messages = [json.loads(line) for line in output.splitlines()]
    assert "QMP" in messages[0]
    answers = {message.get("id"): message for message in messages if "return" in message}
    assert answers["s"] == {"return": {}, "id": "s"}
    assert answers["q"]["return"]["stage"] == "running"
    assert secondary.status()["stage"] == "running"


def test_a_recovered_secondary_goes_on_where_qemu_img_only_looked(lab: Lab) -> None:
    """qemu-img check and a read-only convert between two runs change nothing."""
    secondary: Secondary = lab.secondary(contents=[BEFORE])
    secondary.start_replication()
    handle = secondary.connect("top0")
    handle.pwrite(b"g" * 5000, 50)
    handle.flush()
    secondary.terminate()
    content = bytearray(BEFORE)
    content[50:5050] = b"g" * 5000
    qemu_img("check", str(secondary.overlay("active")))
    copy = lab.folder / "copy.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", str(secondary.overlay("active")), str(copy))
    assert copy.read_bytes() == content
    secondary.start()
    assert secondary.status()["stage"] == "running"
    assert secondary.connect("top0").pread(MIB, 0) == content
