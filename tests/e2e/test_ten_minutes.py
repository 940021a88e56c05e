# SPDX-License-Identifier: BSD-3-Clause
"""The section "One VM on two hosts" of README.md, as it is written: its commands are run on two hosts that are folders
here, each with nodes, states and sockets of its own. What only a real host has stands in OF_THE_HOST."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from certificates import Authority
from checkout import REPOSITORY
from content import MIB
from lab import Lab
from services import ServiceNode, folders
from waiting import DEADLINE_S, wait_until

OF_THE_HOST = {"apt", "chown", "adduser", "virsh"}
SIZE = 8 * MIB


def steps() -> dict[int, list[str]]:
    """The commands of each step, without their comments."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = readme.split("## One VM on two hosts\n")[1].split("\n## ")[0]
    found = {}
    for text in re.split(r"^\*\*(?=\d)", section, flags=re.MULTILINE)[1:]:
        lines = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()
        found[int(text[0])] = [line.partition(" #")[0].strip() for line in lines]
    return found


class Host:
    """Runs the commands of a step."""

    def __init__(self, lab: Lab, name: str, port: int) -> None:
        self.lab, self.port = lab, port
        self.folder = lab.folder / name
        (self.folder / "etc").mkdir(parents=True)
        self.disk = self.folder / "disk.img"
        self.node: ServiceNode | None = None

    def type(self, line: str, *more: str, refused: bool = False) -> str:
        """Run a line, with `more` arguments: what it prints; `refused`: the command may say no (exit code 1)."""
        line = line.replace("/srv/vm/disk.img", str(self.disk)).replace("20G", str(SIZE))
        words = [*shlex.split(line.replace("hostb", f"127.0.0.1:{self.port}")), *more]
        if words[0] in OF_THE_HOST:
            return ""
        if words[0] == "systemctl":
            assert words[1:] == ["enable", "--now", "nbdkit-replication@web1"]
            text = (self.folder / "etc/web1.toml").read_text()
            self.node = self.lab.start(ServiceNode(self.folder, text, name="web1"))
            return ""
        if words[0] == "replctl":
            words[0] = str(REPOSITORY / "scripts/replctl")
        else:
            assert words[0] == "truncate", line
        environment = {**os.environ, **folders(self.folder)}
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False, cwd="/"
        )
        assert done.returncode in ((0, 1) if refused else (0,)), f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    def doctor(self) -> list[dict[str, Any]]:
        """What `replctl doctor` has found."""
        done = subprocess.run(
            [REPOSITORY / "scripts/replctl", "doctor", "web1", "--json"],
            env={**os.environ, **folders(self.folder)},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return rows


def test_from_nothing_to_a_protected_vm_and_over_a_failover(lab: Lab, port: int) -> None:
    found = steps()
    to_type = [*found[1], *found[1], *found[2], *found[3], *found[4]]
    assert len(to_type) <= 16  # in ten minutes
    a, b = Host(lab, "a", port), Host(lab, "b", port)
    a.disk.write_bytes(os.urandom(SIZE))
    for line in found[2]:
        b.type(line, *(("--listen", f"127.0.0.1:{port}") if " init " in line else ()))
    for line in found[3]:
        a.type(line)
    shown = [a.type(line) for line in found[4]]
    assert f'socket="{a.folder}/run/web1/guest.sock"' in "".join(shown)
    assert "web1" in shown[-1]

    def protected() -> bool:
        [entry] = json.loads(a.type("replctl list --json"))
        return entry["link"] == "in-sync" and entry["lag-bytes"] == 0 and entry["checkpoint-age"] is not None

    wait_until(protected, "everything is on host B")
    # The primary knows of its checkpoint a moment before the secondary says that it may take over.
    wait_until(
        lambda: "failed" not in json.loads(b.type(found[5][0], "--check", "--json", refused=True)), "a checkpoint"
    )
    assert a.node is not None
    assert b.node is not None
    a.node.kill()
    b.type(found[5][0], "--yes")
    arguments = json.loads(b.type("replctl web1 qemu-args --json"))["arguments"]
    face = json.loads(arguments[1])["file"]
    assert face["server"]["path"] == str(b.node.socket_path)
    assert bytes(b.node.connect(face["export"]).pread(SIZE, 0)) == a.disk.read_bytes()


def test_the_same_with_tls_and_what_doctor_says_of_a_wrong_name(lab: Lab, port: int, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    a, b = Host(lab, "a", port), Host(lab, "b", port)
    a.disk.write_bytes(bytes(SIZE))
    b.type("truncate -s 20G /srv/vm/disk.img")
    server, client = str(authority.server()), authority.client()
    for name in ("client-cert.pem", "client-key.pem"):
        shutil.copy(client / name, server)
    listen = ("--listen", f"127.0.0.1:{port}")
    b.type("replctl init web1 --mode secondary --disk /srv/vm/disk.img", "--tls", server, *listen)
    a.type("replctl init web1 --mode primary --disk /srv/vm/disk.img --peer hostb", "--tls", str(client))
    for host in (b, a):
        host.type("systemctl enable --now nbdkit-replication@web1")
        host.type("replctl web1 start")
    wait_until(lambda: json.loads(a.type("replctl list --json"))[0]["link"] == "in-sync", "the link is up")
    assert not [row for row in a.doctor() if row["result"] == "bad"]
    assert {"sizes", "versions", "certificates"} <= {row["check"] for row in a.doctor() if row["result"] == "ok"}
    assert "protocol='nbd' name=\"guest\" tls='yes'" in b.type("replctl web1 domain-xml")
    arguments = json.loads(b.type("replctl web1 qemu-args --json"))["arguments"]
    begun = tmp_path / "qsd.pid"
    daemon = subprocess.Popen(
        ["qemu-storage-daemon", "--pidfile", begun, *(f"-{each}" if each[0] == "-" else each for each in arguments[:4])]
    )
    try:
        # It writes the file when it has opened the export, and ends if it cannot.
        wait_until(lambda: begun.exists() or daemon.poll() is not None, "QEMU has connected")
        assert daemon.poll() is None
    finally:
        daemon.kill()
        daemon.wait(DEADLINE_S)
    elsewhere = authority.server("elsewhere", hosts="DNS:elsewhere")
    text = (b.folder / "etc/web1.toml").read_text()
    assert b.node is not None
    b.node.kill()
    b.node.write(text.replace(server, str(elsewhere)))
    b.node.start()
    [row] = [row for row in a.doctor() if row["check"] == "sizes"]
    assert row["result"] == "bad"
    assert "the server's certificate is refused" in row["text"]
    assert "the name in the URI has to be in the server's" in row["advice"]


def test_every_command_is_one_that_a_host_has() -> None:
    words = {shlex.split(line)[0] for lines in steps().values() for line in lines}
    assert words <= OF_THE_HOST | {"replctl", "systemctl", "truncate", "eval"}
    assert Path(REPOSITORY / "debian").is_dir()
