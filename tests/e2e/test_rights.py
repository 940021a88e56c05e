# SPDX-License-Identifier: BSD-3-Clause
"""What is made is its owner's alone, and nbdkit's options -u and -g leave a node that works."""

from __future__ import annotations

import os
import pwd
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import Lab
from nodes import Pair, Secondary, Server

NOBODY = pwd.getpwnam("nobody").pw_uid


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    former = os.umask(0o022)

    def use(mask: int) -> None:
        os.umask(mask)

    yield use
    os.umask(former)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o277])
def test_files_are_made_for_their_owner_alone(lab: Lab, umask: Callable[[int], None], mask: int) -> None:
    pair = Pair(lab.folder)
    umask(mask)
    try:
        for server in (pair.secondary, pair.primary):
            lab.start(server)
        pair.start_replication()
        pair.primary.checkpoint()
    finally:
        umask(0o022)
    for server in (pair.primary, pair.secondary):
        assert stat.S_IMODE(server.state.stat().st_mode) == 0o700
        modes = {path.name: f"{stat.S_IMODE(path.stat().st_mode):04o}" for path in server.state.iterdir()}
        assert len(modes) > 3
        assert {name: mode for name, mode in modes.items() if mode != "0600"} == {}
        assert "others may enter" not in server.stderr()


def test_a_folder_that_others_may_enter_is_warned_of(lab: Lab) -> None:
    overlays = lab.folder / "overlays"
    secondary = lab.add(Secondary(lab.folder, overlays=overlays))
    for folder in (overlays, secondary.state):
        folder.mkdir()
        folder.chmod(0o750)
    secondary.start()
    state = f"the state folder {secondary.state} (its mode is 0750): chmod 0700 keeps them out"
    for folder in (state, f"the overlays' folder {overlays} (its mode is 0750)"):
        secondary.wait_said(f"others may enter {folder}")


@pytest.fixture
def dropped(lab: Lab) -> Path:
    """A folder in which nobody may work."""
    if os.geteuid():
        pytest.skip("needs root")
    lab.folder.chmod(0o777)
    return lab.folder


AS_NOBODY = ["-u", "nobody", "-g", "nogroup"]


def test_a_node_that_drops_its_rights_works_and_comes_back(lab: Lab, dropped: Path) -> None:
    options = {"options": AS_NOBODY}
    pair = Pair(dropped, primary_options=options, secondary_options=options)
    nodes = (pair.secondary, pair.primary)
    for server in nodes:
        lab.add(server)
        for disk in server.disks:
            disk.chmod(0o666)
        server.start()
        server.socket_path.chmod(0o777)  # nbdkit's own, and root's
    pair.start_replication()
    for server in nodes:
        assert {path.stat().st_uid for path in server.state.iterdir()} == {NOBODY}
    handle = pair.primary.connect("disk0")
    handle.pwrite(b"x" * 4096, 0)
    pair.primary.checkpoint()
    for server in reversed(nodes):
        server.kill()
    for server in nodes:
        server.start()
        server.socket_path.chmod(0o777)
        assert server.status()["stage"] == "running"
    pair.primary.checkpoint()
    pair.primary.kill()
    pair.secondary.failover()
    assert pair.secondary.connect("top0").pread(4096, 0) == b"x" * 4096
    pair.secondary.restart(signal.SIGTERM)
    assert pair.secondary.status()["stage"] == "done"


@pytest.mark.parametrize("what", ["state", "disk"])
def test_what_the_later_user_cannot_use_is_refused_before_anything_is_served(
    lab: Lab, dropped: Path, what: str
) -> None:
    secondary = Secondary(dropped)
    for disk in secondary.disks:
        disk.chmod(0o600 if what == "disk" else 0o666)
    if what == "state":
        secondary.state.mkdir(mode=0o700)
    code, said = Server.failed_start(dropped, secondary.arguments, options=AS_NOBODY)
    assert code == 1
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert "Permission denied (with the rights of nbdkit's -u nobody -g nogroup)" in line
    assert str(secondary.state if what == "state" else secondary.disks[0]) in line
    if what == "disk":
        assert not list(secondary.state.glob("*.qcow2"))


@pytest.mark.parametrize("key", ["primary-identity", "guest-identity"])
def test_an_identity_that_this_nbdkit_cannot_tell_is_refused(lab: Lab, key: str) -> None:
    version = subprocess.run(["nbdkit", "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    if tuple(map(int, version.split(".")[:2])) >= (1, 40):
        pytest.skip("this one can")
    secondary = Secondary(lab.folder, extra_arguments=[f"{key}=CN=x"])
    code, said = Server.failed_start(lab.folder, secondary.arguments)
    assert code == 1
    assert f"{key} needs an nbdkit that says which certificate a client has shown" in said
