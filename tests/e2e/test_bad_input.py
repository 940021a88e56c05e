# SPDX-License-Identifier: BSD-3-Clause
"""Wrong options, broken images, a hostile control client and mistaken NBD clients, through a real nbdkit.

Every refused start is checked the same way (`Refused`): a failing exit code, exactly one line on stderr that says
what is wrong, no traceback, no disk, image or state file made or changed, and no NBD socket left.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import nbd
import pytest

from checkout import PLUGIN
from content import MIB, make_raw, pattern, qemu_img
from lab import Lab
from nodes import Secondary
from qmp import Qmp, QmpError
from waiting import DEADLINE_S, wait_until

LAYOUT = "extended_l2=on,cluster_size=128k,preallocation=metadata,data_file="
OWN = re.compile(r"(lock|epoch|[0-9A-Za-z._-]*control\.sock[0-9A-Za-z._-]*)\Z")
"""Files in a state folder that say nothing about any disk: an empty claim on the folder."""


def snapshot(folder: Path) -> dict[str, object]:
    """Every file below `folder` with its content, or its kind."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = "folder" if path.is_dir() else "special"
    return found


class Refused:
    """A folder with a disk in it, and starts of nbdkit that must be refused."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.folder = lab.folder / "w"
        self.folder.mkdir()
        self.disk = make_raw(self.folder / "disk.raw", MIB, pattern(1, MIB))
        self.state = self.folder / "state"
        self.active = self.folder / "active.qcow2"
        self.hidden = self.folder / "hidden.qcow2"

    def __call__(self, *arguments: str, claims_state: bool = False) -> str:
        """The one line. With `claims_state` the options are all right, so the state folder may have been claimed."""
        before = snapshot(self.folder)
        served = set(os.listdir(self.lab.folder))
        code, stderr = self.lab.failed_start(arguments)
        assert code > 0
        assert "Traceback" not in stderr
        lines = stderr.splitlines()
        assert len(lines) == 1, stderr
        assert lines[0].startswith("nbdkit: error: "), stderr
        after = snapshot(self.folder)
        if claims_state:
            assert set(after) - set(before) <= {"state", "state/lock", "state/epoch"}
            after = {name: content for name, content in after.items() if name in before}
        assert after == before
        assert set(os.listdir(self.lab.folder)) == served
        return lines[0]

    def secondary(self, *more: str, disk: object = None, state: bool = True) -> list[str]:
        """A secondary with images of its own."""
        return [
            "mode=secondary",
            f"state={self.state}",
            f"disk=disk0:{disk or self.disk}",
            "top-id=top0",
            f"active={self.active}",
            f"hidden={self.hidden}",
            *more,
        ]

    def make(
        self,
        path: Path,
        backing: Path,
        backing_format: str = "raw",
        options: str | None = None,
        size: int = MIB,
    ) -> Path:
        """qemu-img create; the layout is ours unless `options` says another one."""
        if options is None:
            options = LAYOUT + str(path.with_suffix(".data"))
        option = ("-o", options) if options else ()
        base = ("-b", str(backing), "-F", backing_format)
        qemu_img("create", "-q", "-u", "-f", "qcow2", *option, *base, str(path), str(size))
        return path

    def make_both(self) -> None:
        """Good overlays."""
        self.make(self.hidden, self.disk)
        self.make(self.active, self.hidden, "qcow2")


@pytest.fixture
def refused(lab: Lab) -> Refused:
    return Refused(lab)


def patch(path: Path, offset: int, form: str, *values: int) -> None:
    """Overwrite a field of an image."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(struct.pack(form, *values))


def word(path: Path, offset: int) -> int:
    """A 64-bit field of an image."""
    with open(path, "rb") as file:
        file.seek(offset)
        return int(struct.unpack(">Q", file.read(8))[0])


def l1_of(path: Path) -> int:
    return word(path, 40)


def l2_of(path: Path) -> int:
    return word(path, l1_of(path)) & ~(1 << 63)


# -- options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "Missing the option mode"),
        (("mode=",), "The option mode's value should be primary or secondary"),
        (("mode=colo",), "The option mode's value should be primary or secondary"),
        (("mode=primary", "mode=primary"), "mode is given twice"),
        (("mode=primary", "disk={disk}", "state={state}", "bogus=1"), "bogus"),
        (("mode=primary", "disk={disk}"), "state or control"),
        (("mode=primary", "state={state}"), "disk or secondary"),
        (("mode=primary", "state={state}", "disk={disk}", "top-id=t"), "does not support option top-id"),
        (("mode=primary", "state={state}", "disk={disk}", "active={active}"), "does not support option active"),
        (("mode=primary", "state={state}", "top-id=t", "disk={disk}"), "top-id"),
        (("mode=primary", "state={state}", "disk={disk}", "timeout=never"), "timeout"),
        (("mode=primary", "state={state}", "disk={disk}", "timeout=1\nnever"), "timeout"),
        (("mode=primary", "state={state}", "disk={disk}", "queue-limit=big"), "queue-limit"),
        (("mode=primary", "state={state}", "disk={disk}", "protocol=C"), "protocol"),
        (("mode=primary", "state={state}", "disk={disk}", "autostart=perhaps"), "autostart"),
        (("mode=primary", "state={state}", "disk={disk}", "secondary=host:10809"), "secondary"),
        (("mode=primary", "state={state}", "disk={disk}", "secondary=nbd://[::1/x"), "secondary"),
        (("mode=primary", "state=", "disk={disk}"), "state"),
        (("mode=primary", "state={state}", "disk="), "disk"),
        (("mode=primary", "state={state}", "disk={disk}", "disk=b:{disk}"), "{disk}"),
        (("mode=primary", "state={state}", "disk=a:{disk}", "disk=a:{disk}"), "'a'"),
        (("mode=primary", "state={state}", "disk=a b:{disk}"), "'a b'"),
        (("mode=secondary", "state={state}", "disk={disk}"), "Missing the option top-id"),
        (("mode=secondary", "state={state}"), "Missing the option disk"),
        (
            ("mode=secondary", "state={state}", "disk={disk}", "top-id=t", "secondary=nbd://x"),
            "support option secondary",
        ),
        (("mode=secondary", "state={state}", "disk={disk}", "top-id=t", "secondary=nbd://h"), "secondary"),
        (("mode=secondary", "state={state}", "disk={disk}", "top-id=.control"), "top-id"),
        (("mode=secondary", "control={state}", "disk={disk}", "top-id=t"), "active"),
        (("config={folder}/none.toml",), "{folder}/none.toml"),
        (("config={folder}",), "{folder}"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line_and_changes_nothing(
    refused: Refused, arguments: tuple[str, ...], named: str
) -> None:
    names = {"disk": refused.disk, "state": refused.state, "active": refused.active, "folder": refused.folder}
    assert named.format(**names) in refused(*(argument.format(**names) for argument in arguments))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"mode = ", "pair.toml"),
        (b"\xff", "pair.toml"),
        (b"bogus = 1", "bogus"),
        (b'mode = ["primary"]', "mode"),
        (b'disk = "d.raw"', "[disk.NAME]"),
        (b'mode = "primary"\nstate = "STATE"\n[disk.a]\ntop-id = "t"', "[disk.a]"),
        (b'mode = "primary"\nstate = "STATE"\n[disk.a]\ndisk = "x\\u0000y"', "disk"),
        (b'mode = "primary"\nstate = "STATE"\ntimeout = "1\\n2"', "timeout"),
        (b'mode = "primary"\nx = ' + b"[" * 5000, "pair.toml"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_bad_config_file_is_refused_in_one_line(refused: Refused, text: bytes, named: str) -> None:
    config = refused.folder / "pair.toml"
    config.write_bytes(text.replace(b"STATE", os.fsencode(refused.state)))
    assert named in refused(f"config={config}")


# -- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["primary", "secondary"])
@pytest.mark.parametrize("kind", ["missing", "folder", "device", "empty", "pipe", "dangling link"])
def test_a_disk_that_is_no_disk_is_refused_by_path(refused: Refused, mode: str, kind: str) -> None:
    path = refused.folder / "bad"
    if kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/null")
    elif kind == "empty":
        path.touch()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    more = ["top-id=t"] if mode == "secondary" else []
    arguments = [f"mode={mode}", f"state={refused.state}", f"disk={path}", *more]
    assert str(path) in refused(*arguments, claims_state=True)


@pytest.mark.parametrize("mode", ["primary", "secondary"])
def test_a_disk_in_use_by_qemu_nbd_is_refused_in_qemus_words(refused: Refused, mode: str) -> None:
    refused.lab.qemu_nbd(refused.disk)
    more = ["top-id=t"] if mode == "secondary" else []
    said = refused(f"mode={mode}", f"state={refused.state}", f"disk={refused.disk}", *more, claims_state=True)
    assert "lock: is another process using the image" in said
    assert str(refused.disk) in said


def test_the_same_disk_twice_is_refused(refused: Refused) -> None:
    (refused.folder / "link").symlink_to("disk.raw")
    arguments = ["mode=primary", f"state={refused.state}", f"disk=a:{refused.disk}", f"disk=b:{refused.folder}/link"]
    assert "is given twice: as disk= of disk 'a' and as disk= of disk 'b'" in refused(*arguments)


def test_disks_images_and_state_of_a_running_secondary_are_refused_to_another(refused: Refused, lab: Lab) -> None:
    running = lab.secondary()
    other = make_raw(lab.folder / "other.raw", MIB)
    before = snapshot(running.state)

    def start(*arguments: str) -> str:
        _, stderr = lab.failed_start(["mode=secondary", *arguments])
        assert len(stderr.splitlines()) == 1
        return stderr

    state = f"state={lab.folder}/state2"
    assert f"{running.state} is in use" in start(f"state={running.state}", f"disk={other}", "top-id=t")
    assert str(running.disks[0]) in start(state, f"disk={running.disks[0]}", "top-id=t")
    hidden = running.overlay("hidden")
    said = start(state, f"disk={other}", "top-id=t", f"hidden={hidden}")
    assert "lock" in said
    assert str(hidden) in said
    control = f"control={running.control_path}"
    assert str(running.control_path) in start(f"state={lab.folder}/state3", f"disk={other}", "top-id=t", control)
    assert snapshot(running.state) == before
    running.start_replication()  # unharmed


@pytest.mark.parametrize("kind", ["file", "below a file", "garbage", "other mode", "other disks"])
def test_a_state_folder_that_cannot_be_ours_is_refused(refused: Refused, kind: str) -> None:
    state = refused.state
    if kind == "file":
        state.write_bytes(b"")
    elif kind == "below a file":
        state = refused.disk / "state"
    else:
        state.mkdir()
        (state / "lock").touch()
        (state / "epoch").write_bytes(bytes(4096))
        record: dict[str, object] = {"format": 1, "mode": "primary", "stage": "none", "backup": "running"}
        record |= {"secondary": None, "fault": None, "disks": {}}
        if kind == "other mode":
            record["mode"] = "secondary"
        if kind == "other disks":
            record["disks"] = {"disk0": 2 * MIB}
        (state / "state.json").write_text("{" if kind == "garbage" else json.dumps(record))
    assert str(state) in refused("mode=primary", f"state={state}", f"disk={refused.disk}")


def test_a_control_socket_that_cannot_be_made_is_refused_by_path(refused: Refused) -> None:
    path = refused.folder / "none" / "socket"
    arguments = ["mode=primary", f"state={refused.state}", f"disk={refused.disk}"]
    assert str(path) in refused(*arguments, f"control={path}", claims_state=True)


def test_a_control_socket_that_is_a_file_is_refused_and_kept(refused: Refused) -> None:
    path = refused.folder / "precious"
    path.write_bytes(b"precious")
    before = path.read_bytes()
    _, stderr = refused.lab.failed_start(
        ["mode=primary", f"state={refused.state}", f"disk={refused.disk}", f"control={path}"]
    )
    assert str(path) in stderr
    assert len(stderr.splitlines()) == 1
    assert path.read_bytes() == before


# -- images ----------------------------------------------------------------------------------------------------


def test_good_images_made_by_hand_are_served(refused: Refused) -> None:
    """The counterpart of the tests below: without the damage the same command line works."""
    refused.make_both()
    secondary = Secondary(refused.folder, name="disk", overlays=refused.folder)
    # Secondary's own names, with the images made here.
    secondary.arguments = refused.secondary()
    secondary.state = refused.state
    refused.lab.start(secondary)
    secondary.start_replication()
    handle = secondary.connect("top0")
    assert handle.pread(4096, 0) == pattern(1, 4096)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: os.truncate(path, 0),
    "cut in the header": lambda path: os.truncate(path, 80),
    "cut in L1": lambda path: os.truncate(path, l1_of(path) + 4),
    "cut in L2": lambda path: os.truncate(path, l2_of(path) + 100),
    "data file cut": lambda path: os.truncate(path.with_suffix(".data"), MIB - 4096),
    "data file gone": lambda path: path.with_suffix(".data").unlink(),
    "L1 entry": lambda path: patch(path, l1_of(path), ">Q", 1 << 63 | 1 << 50),
    "L1 at 2^63": lambda path: patch(path, 40, ">Q", 1 << 63),
    "L2 entry": lambda path: patch(path, l2_of(path) + 32, ">Q", 1 << 63 | 5 << 17),
    "data and zero": lambda path: patch(path, l2_of(path) + 8, ">II", 1 << 7, 1 << 7),
    "dirty": lambda path: patch(path, 72, ">Q", 4 | 16 | 1),
    "marked corrupt": lambda path: patch(path, 72, ">Q", 4 | 16 | 2),
    "huge clusters": lambda path: patch(path, 20, ">I", 0xFFFFFFFF),
    "not qcow2": lambda path: patch(path, 0, ">I", 0),
    "encrypted": lambda path: patch(path, 32, ">I", 2),
    "with snapshot": lambda path: patch(path, 60, ">I", 1),
}


@pytest.mark.parametrize("role", ["active", "hidden"])
@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_broken_image_is_refused_by_path_and_left_as_it_is(refused: Refused, role: str, damage: str) -> None:
    refused.make_both()
    path = getattr(refused, role)
    DAMAGE[damage](path)
    said = refused(*refused.secondary(), claims_state=True)
    assert str(path.with_suffix("")) in said


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qemu-img's default", ""),
        ("64k clusters", "extended_l2=on,cluster_size=64k,preallocation=metadata,data_file={data}"),
        ("no extended L2", "cluster_size=128k,data_file={data}"),
        ("no preallocation", "extended_l2=on,cluster_size=128k,data_file={data}"),
        ("no data file", "extended_l2=on,cluster_size=128k,preallocation=metadata"),
        ("version 2", "compat=0.10"),
    ],
)
def test_an_image_in_another_layout_is_refused_with_the_right_command(
    refused: Refused, name: str, options: str
) -> None:
    refused.make(refused.hidden, refused.disk, options=options.format(data=refused.folder / "hidden.data"))
    refused.make(refused.active, refused.hidden, "qcow2")
    said = refused(*refused.secondary(), claims_state=True)
    assert f"{refused.hidden} does not have the layout" in said
    assert f"qemu-img create -f qcow2 -o {LAYOUT}{refused.folder}/hidden.data" in said


@pytest.mark.parametrize("role", ["active", "hidden"])
def test_a_wrong_backing_file_is_refused_naming_both(refused: Refused, role: str) -> None:
    stranger = make_raw(refused.folder / "stranger.raw", MIB)
    refused.make_both()
    path = getattr(refused, role)
    qemu_img("rebase", "-u", "-F", "raw", "-b", str(stranger), str(path))
    said = refused(*refused.secondary(), claims_state=True)
    assert str(path) in said
    assert str(stranger) in said


@pytest.mark.parametrize("target", ["disk", "other overlay's data", "other overlay"])
def test_a_data_file_that_is_another_part_of_the_stack_is_refused(refused: Refused, target: str) -> None:
    """Copies of the guest's data written there would destroy the disk."""
    refused.make_both()
    data = {"disk": refused.disk, "other overlay's data": refused.folder / "hidden.data"}.get(target, refused.hidden)
    own = refused.folder / "active.data"
    own.unlink()
    own.symlink_to(data)
    refused(*refused.secondary(), claims_state=True)


def test_one_image_in_both_roles_is_refused(refused: Refused) -> None:
    refused.make_both()
    arguments = [argument for argument in refused.secondary() if not argument.startswith("active=")]
    refused(*arguments, f"active={refused.hidden}", claims_state=True)


@pytest.mark.parametrize("tool", ["qemu-nbd", "another plugin"])
def test_an_image_in_use_is_refused(refused: Refused, tool: str) -> None:
    refused.make_both()
    if tool == "qemu-nbd":
        user = refused.lab.qemu_nbd(refused.active, image_format="qcow2")
    else:
        user = refused.lab.add(Secondary(refused.folder, name="user"))
        copy = make_raw(refused.folder / "copy.raw", MIB)
        qemu_img("rebase", "-u", "-F", "raw", "-b", str(copy), str(refused.hidden))
        user.arguments = refused.secondary(disk=copy)
        user.arguments[1] = f"state={refused.folder}/user.state"
        user.start()
    said = refused(*refused.secondary(), claims_state=True)
    assert "lock: is another process using the image" in said
    assert user.running


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link", "device"])
def test_an_overlay_that_is_no_file_is_refused_by_path(refused: Refused, kind: str) -> None:
    refused.make_both()
    path = refused.active
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null" if kind == "device" else "nowhere")
    assert str(path) in refused(*refused.secondary(), claims_state=True)


def test_an_overlay_whose_folder_is_missing_is_refused_and_nothing_is_made(refused: Refused) -> None:
    refused.make(refused.hidden, refused.disk)
    refused.active = refused.folder / "none" / "active.qcow2"
    assert str(refused.active) in refused(*refused.secondary(), claims_state=True)


def test_a_bad_active_disk_does_not_leave_a_new_hidden_disk_behind(refused: Refused) -> None:
    """Hidden is made first, active is bad: whoever corrects the mistake must find what was there before."""
    refused.active.write_bytes(b"not qcow2" * 1000)
    assert str(refused.active) in refused(*refused.secondary(), claims_state=True)


def test_a_second_bad_disk_does_not_leave_the_first_ones_overlays_behind(refused: Refused) -> None:
    arguments = ["mode=secondary", f"state={refused.state}", f"disk=a:{refused.disk}", "top-id=ta"]
    said = refused(*arguments, f"disk=b:{refused.folder}/none.raw", "top-id=tb", claims_state=True)
    assert f"{refused.folder}/none.raw" in said


# -- control socket --------------------------------------------------------------------------------------------


def test_a_control_client_that_breaks_every_rule_changes_nothing(lab: Lab) -> None:
    secondary = lab.secondary()
    secondary.start_replication()
    bad: list[bytes] = [
        b"{\n",
        b"}\n",
        b'{"execute": "replication-stop"\x00}\n',
        b"\xff\xfe\n",
        b"[]\n",
        b'"replication-stop"\n',
        b"{}\n",
        b'{"execute": 1}\n',
        b'{"execute": null, "id": 1}\n',
        b'{"execute": "replication-stop", "arguments": []}\n',
        b'{"execute": "replication-stop", "arguments": {"failover": "yes"}}\n',
        b'{"execute": "replication-stop", "arguments": {"failover": 1}}\n',
        b'{"execute": "replication-stop", "arguments": {"bogus": true}}\n',
        b'{"execute": "replication-stop", "bogus": 1}\n',
        b'{"execute": "xen-set-replication", "arguments": {"enable": false}}\n',
        b'{"execute": "xen-set-replication", "arguments": {"enable": 0, "primary": false}}\n',
        b'{"execute": "xen-set-replication", "arguments": {"enable": true, "primary": true}}\n',
        b'{"execute": "xen-set-replication", "arguments": {"enable": true, "primary": false, "failover": true}}\n',
        b'{"execute": "replication-start", "arguments": {"mode": "tertiary"}}\n',
        b'{"execute": "replication-start", "arguments": {"sync": "some"}}\n',
        b'{"execute": "job-cancel", "arguments": {"id": 1}}\n',
        b'{"execute": "no-such-command"}\n',
        b'{"execute": "' + b"[" * 1000 + b'"}\n',
        b"[" * 2000 + b"\n",
        b"9" * 10000 + b"\n",
    ]
    for message in bad:
        with secondary.qmp() as qmp:
            qmp.send(message)
            # An unbalanced brace is only complained about when more comes: a lone 0xFF ends any message (QMP).
            qmp.send(b"\xff\n")
            answer = qmp.receive()
            assert "error" in answer, (message[:60], answer)
    assert secondary.status()["stage"] == "running"
    assert "Traceback" not in secondary.stderr()


def test_ten_megabytes_in_one_line_are_refused_and_the_node_goes_on(lab: Lab) -> None:
    secondary = lab.secondary()
    secondary.start_replication()
    line = b'{"execute": "' + b"x" * (10 * MIB) + b'"}\n'
    with secondary.qmp() as qmp:
        answers = []
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, EOFError):
            qmp.send(line)
            answers.append(qmp.receive())
        assert all("error" in answer for answer in answers)
    assert secondary.status()["stage"] == "running"
    secondary.checkpoint()


def test_a_control_client_that_leaves_in_the_midst_of_a_message_is_forgotten(lab: Lab) -> None:
    secondary = lab.secondary()
    secondary.start_replication()
    descriptors = Path(f"/proc/{secondary.pid}/fd")
    before = len(list(descriptors.iterdir()))
    for cut in (b"", b"{", b'{"execute": "replication-st', b'{"execute": "replication-stop"'):
        for _ in range(10):
            with secondary.qmp() as qmp:
                qmp.send(cut)
    wait_until(lambda: len(list(descriptors.iterdir())) <= before, "the node lets go of the clients")
    assert secondary.status()["stage"] == "running"


def test_a_control_client_that_never_reads_does_not_hold_up_the_others(lab: Lab) -> None:
    secondary = lab.secondary()
    silent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    silent.settimeout(0.5)
    with silent:
        silent.connect(str(secondary.control_path))
        request = b'{"execute": "qmp_capabilities"}\n' + b'{"execute": "query-commands"}\n' * 2000
        with contextlib.suppress(TimeoutError, ConnectionError):
            silent.sendall(request)
        with secondary.qmp() as qmp:
            qmp.timeout_s = 5.0
            assert qmp.execute("query-replication")["stage"] == "none"


# -- NBD clients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bogus", "disk", "disk00", "DISK0", ".control ", "a/b", "../disk0", "n" * 4096])
def test_an_unknown_export_is_refused_naming_the_valid_ones(lab: Lab, name: str) -> None:
    secondary = lab.secondary((MIB, MIB))
    handle = nbd.NBD()
    handle.set_export_name(name)
    with pytest.raises(nbd.Error):
        handle.connect_unix(str(secondary.socket_path))
    # One line, and as a whole: nbdkit writes it in pieces.
    exports = "the exports are 'disk0', 'top0', 'disk1', 'top1'\n"
    wait_until(lambda: exports in secondary.stderr(), "nbdkit says why")
    (line,) = (line for line in secondary.stderr().splitlines() if "there is no export" in line)
    assert exports.rstrip() in line
    assert "Traceback" not in secondary.stderr()
    assert secondary.connect("disk0").get_size() == MIB


def test_a_newline_in_an_export_name_does_not_forge_a_line_of_the_log(lab: Lab) -> None:
    secondary = lab.secondary()
    handle = nbd.NBD()
    handle.set_export_name("x\nnbdkit: error: forged")
    with pytest.raises(nbd.Error):
        handle.connect_unix(str(secondary.socket_path))
    wait_until(lambda: "the exports are 'disk0', 'top0'" in secondary.stderr(), "nbdkit says why")
    said = secondary.stderr()
    assert not any(line.startswith("nbdkit: error: forged") for line in said.splitlines())


def test_the_empty_export_of_a_secondary_is_refused(lab: Lab) -> None:
    secondary = lab.secondary()
    with pytest.raises(nbd.Error):
        secondary.connect("")
    wait_until(lambda: "the exports are 'disk0', 'top0'" in secondary.stderr(), "nbdkit says why")


def test_the_empty_export_of_a_primary_is_its_first_disk(lab: Lab) -> None:
    pair = lab.pair((MIB, 2 * MIB))
    handle = pair.primary.connect("")
    assert handle.get_size() == MIB
    handle.pwrite(b"x" * 512, 0)
    assert pair.primary.connect("disk0").pread(512, 0) == b"x" * 512


def test_requests_beyond_the_end_or_of_no_length_are_refused_and_change_nothing(lab: Lab) -> None:
    secondary = lab.secondary(contents=[pattern(3, MIB)])
    secondary.start_replication()
    for export in ("disk0", "top0"):
        handle = secondary.connect(export, strict=False)
        for request in (
            lambda: handle.pwrite(b"x" * 512, MIB - 256),  # noqa: B023 (called at once)
            lambda: handle.pread(512, MIB),  # noqa: B023
            lambda: handle.zero(512, MIB - 1),  # noqa: B023
            lambda: handle.trim(1 << 20, 4096),  # noqa: B023
            lambda: handle.pwrite(b"x", 1 << 62),  # noqa: B023
            lambda: handle.block_status(1 << 20, 512, lambda *_: 0),  # noqa: B023
        ):
            with pytest.raises(nbd.Error) as caught:
                request()
            assert caught.value.errnum in (errno.EINVAL, errno.ENOSPC, errno.EIO)
        assert handle.pread(MIB, 0) == pattern(3, MIB)
    assert secondary.execute("replication-get-error") == {}


@pytest.mark.parametrize("export", ["disk0", "top0"])
def test_a_read_only_nbdkit_serves_reads_and_refuses_writes(lab: Lab, export: str) -> None:
    secondary = lab.secondary(contents=[pattern(4, MIB)], options=["-r"])
    secondary.start_replication()
    handle = secondary.connect(export, strict=False)
    assert handle.is_read_only()
    assert handle.pread(4096, 8192) == pattern(4, MIB)[8192:12288]
    for request in (lambda: handle.pwrite(b"x" * 512, 0), lambda: handle.zero(512, 0), lambda: handle.trim(512, 0)):
        with pytest.raises(nbd.Error) as caught:
            request()
        assert caught.value.errnum == errno.EPERM
    assert secondary.disks[0].read_bytes() == pattern(4, MIB)


def test_a_primary_refuses_to_forward_to_a_read_only_secondary(lab: Lab) -> None:
    """It would look like a pair, and every write would be lost to the secondary."""
    secondary = lab.secondary(options=["-r"])
    secondary.start_replication()
    primary = lab.primary(secondary.uri())
    primary.connect().pwrite(b"x" * 4096, 0)
    lacking = primary.status()["disks"][0]["out-of-sync-bytes"]
    assert lacking
    with pytest.raises(QmpError, match=r"^cannot start: .*(read-only|write-zeroes)"):
        primary.start_replication()
    status = primary.status()
    assert status["stage"] == "none"
    assert status["disks"][0]["out-of-sync-bytes"] == lacking
    assert "Traceback" not in primary.stderr()


def test_garbage_on_the_nbd_socket_does_not_disturb_other_clients(lab: Lab) -> None:
    secondary = lab.secondary()
    secondary.start_replication()
    handle = secondary.connect("top0")
    for garbage in (b"", b"GET / HTTP/1.0\r\n\r\n", b"\0\0\0\3IHAVEOPT" + b"\xff" * 64, os.urandom(256)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(DEADLINE_S)
            client.connect(str(secondary.socket_path))
            with contextlib.suppress(ConnectionError):
                client.sendall(garbage)
    handle.pwrite(b"y" * 512, 0)
    assert handle.pread(512, 0) == b"y" * 512


def test_nbdkit_lists_the_exports_and_the_version_without_any_options() -> None:
    done = subprocess.run(
        ["nbdkit", "python", str(PLUGIN), "--dump-plugin"], capture_output=True, text=True, timeout=30, check=True
    )
    assert re.search(r"^replication_version=\S+$", done.stdout, re.MULTILINE)


def test_a_stale_qmp_client_gets_an_answer_after_a_refused_start(lab: Lab) -> None:
    """Another process that is refused the same control socket must not take it away from the first."""
    secondary = lab.secondary()
    with Qmp(secondary.control_path) as qmp:
        disk = make_raw(lab.folder / "other.raw", MIB)
        arguments = [f"state={lab.folder}/o", f"disk={disk}", f"control={secondary.control_path}"]
        lab.failed_start(["mode=primary", *arguments])
        assert qmp.execute("query-replication")["stage"] == "none"
    assert secondary.status()["stage"] == "none"
