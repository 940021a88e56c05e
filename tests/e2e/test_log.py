# SPDX-License-Identifier: BSD-3-Clause
"""The log: it cannot fail, it cannot hold anybody up, it is bounded, and it arrives where nbdkit's own lines do."""

from __future__ import annotations

import os
import subprocess
import time

import nbd
import pytest

from checkout import PLUGIN
from content import MIB, make_raw
from lab import Lab
from nodes import Secondary
from qmp import Qmp
from waiting import DEADLINE_S, wait_until


def refused(handle: nbd.NBD, times: int) -> int:
    """Read from a face that refuses it so often; how often it did."""
    count = 0
    for _ in range(times):
        with pytest.raises(nbd.Error):
            handle.pread(512, 0)
        count += 1
    return count


def test_refused_requests_write_a_bounded_number_of_lines(lab: Lab) -> None:
    secondary = lab.add(Secondary(lab.folder)).start()
    handle = secondary.connect("top0")
    begun = time.monotonic()
    refused(handle, 3000)
    took_s = time.monotonic() - begun
    wait_until(lambda: "were left out" in secondary.stderr(), "the count of what was left out")
    lines = secondary.stderr().splitlines()
    assert len(lines) < 40 + 12 * took_s
    assert any("pread: error: " in line for line in lines)
    # What is of another kind is not lost among them.
    with pytest.raises(nbd.Error):
        secondary.connect("nonesuch")
    wait_until(lambda: "there is no export 'nonesuch'" in secondary.stderr(), "another kind of error")


class OnFd:
    """A node whose standard error is what the test gives it."""

    def __init__(self, lab: Lab, stderr: int) -> None:
        self.folder = lab.folder
        make_raw(lab.folder / "disk", MIB)
        self.process = subprocess.Popen(
            ["nbdkit", "-f", "-U", str(lab.folder / "n.sock"), "python", str(PLUGIN), "mode=secondary",
             f"disk={lab.folder / 'disk'}", "top-id=top", f"state={lab.folder / 'state'}"],
            stderr=stderr, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(self._listens, "it listens")

    def handle(self) -> nbd.NBD:
        handle = nbd.NBD()
        handle.connect_uri(f"nbd+unix:///top?socket={self.folder / 'n.sock'}")
        return handle

    def _listens(self) -> bool:
        try:
            self.handle().shutdown()
        except nbd.Error:
            return False
        return True

    def works(self) -> bool:
        with Qmp(self.folder / "state" / "control.sock") as qmp:
            return bool(qmp.execute("query-replication")["stage"] == "none")

    def end(self) -> int:
        self.process.terminate()
        try:
            return self.process.wait(DEADLINE_S)
        finally:
            self.process.kill()
            self.process.wait(DEADLINE_S)


@pytest.mark.parametrize("way", ["a pipe that nobody reads", "a pipe whose reader has gone", "a full disk"])
def test_a_log_that_takes_nothing_holds_nobody_up(lab: Lab, way: str) -> None:
    reading = -1
    if way == "a full disk":
        stderr = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, stderr = os.pipe()
        if way != "a pipe that nobody reads":
            os.close(reading)
            reading = -1
        else:
            os.set_blocking(stderr, False)
            try:
                while True:
                    os.write(stderr, b"x" * 4096)
            except BlockingIOError:
                os.set_blocking(stderr, True)
    node = OnFd(lab, stderr)
    os.close(stderr)
    try:
        handle = node.handle()
        refused(handle, 200)
        assert node.works()
        handle.shutdown()
    finally:
        code = node.end()
        if reading >= 0:
            os.close(reading)
    assert code == 0


SYSLOG = """
import os, socket, subprocess, sys
dev, command = sys.argv[1], sys.argv[2:]
os.makedirs(dev)
for name, minor in (("null", 3), ("zero", 5), ("random", 8), ("urandom", 9)):
    os.mknod(f"{dev}/{name}", 0o020666, os.makedev(1, minor))
    os.chmod(f"{dev}/{name}", 0o666)
subprocess.run(["mount", "--bind", dev, "/dev"], check=True)
listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
listener.bind("/dev/log")
listener.settimeout(60)
subprocess.Popen(command, stdin=subprocess.DEVNULL)
while True:
    print(listener.recv(65536).decode(errors="replace"), flush=True)
"""


@pytest.mark.parametrize(
    "options", [[], ["--log=syslog", "-f"], ["--log=null", "-f"]], ids=["background", "-f", "null"]
)
def test_lines_go_where_nbdkits_own_go(lab: Lab, options: list[str]) -> None:
    if os.geteuid():
        pytest.skip("mounting needs root")
    make_raw(lab.folder / "disk", MIB)
    state, pid = lab.folder / "state", lab.folder / "pid"
    uri = "nbd+unix:///?socket=/nowhere"
    command = ["nbdkit", *options, "-U", str(lab.folder / "n.sock"), "-P", str(pid), "python", str(PLUGIN),
               "mode=primary", f"disk={lab.folder / 'disk'}", f"state={state}",
               f"secondary={uri}", "autostart=true"]  # fmt: skip
    log = lab.folder / "syslog"
    with open(log, "wb") as out:
        script = ["unshare", "-m", "/usr/bin/python3", "-c", SYSLOG, str(lab.folder / "dev")]
        listener = subprocess.Popen([*script, *command], stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: pid.exists() and pid.read_text().strip(), "it runs")
        if "--log=null" in options:
            wait_until((state / "control.sock").exists, "it serves")
            time.sleep(0.5)
            assert "autostart" not in log.read_text()
        else:
            wait_until(lambda: "autostart: cannot start: cannot connect to" in log.read_text(), "the line is in syslog")
    finally:
        if pid.exists() and pid.read_text().strip():
            os.kill(int(pid.read_text()), 9)
        listener.kill()
        listener.wait(DEADLINE_S)
