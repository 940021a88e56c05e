# SPDX-License-Identifier: BSD-3-Clause
"""addresses.py: a name of which one address answers nothing. In a network namespace with a hosts file of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from certificates import Authority
from replication.addresses import Rivals, connect
from waiting import DEADLINE_S

ROOT = Path(__file__).parents[3]
PORT = 10809

SCRIPT = """
import contextlib, os, socket, subprocess, sys, time
from replication.disk.connection import Connection
from replication.errors import DiskError
from replication.tls import Tls, explain

folder, scheme, host, timeout_s, *options = sys.argv[1:]
dead = socket.create_server(("127.0.0.2", 10809), backlog=0)
filling = []
for _ in range(8):  # until the kernel lets no more wait: it does not answer the next one
    filling.append(socket.socket())
    filling[-1].setblocking(False)
    filling[-1].connect_ex(("127.0.0.2", 10809))
time.sleep(0.1)
certificates = options[0] if options else None
tls = Tls(certificates) if scheme == "nbds" else None
secured = ["--tls=require", f"--tls-certificates={options[1]}"] if tls else []
with subprocess.Popen(["nbdkit", "-f", "--log=null", "-i127.0.0.1", *secured, "memory", "1M"]) as server:
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", 10809), 0.1):
                break
            time.sleep(0.02)
        descriptors = len(os.listdir("/proc/self/fd"))
        begun = time.monotonic()
        try:
            connection = Connection(f"{scheme}://{host}", None, float(timeout_s), tls)
        except DiskError as error:
            print(f"failed after {time.monotonic() - begun:.1f} s: {error}")
        else:
            reached = connection._socket
            print("connected", connection.size, reached.getpeername()[0], reached.getsockopt(6, 1))
            connection.close()
            del connection, reached
        left = len(os.listdir("/proc/self/fd")) - descriptors
        print("descriptors left", left)
    finally:
        server.terminate()
"""


def run(folder: Path, hosts: str, scheme: str, host: str, timeout_s: float = 5.0, *options: Path) -> list[str]:
    """What the script prints, with these lines as /etc/hosts."""
    file = folder / "hosts"
    file.write_text(hosts)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    setup = f'ip link set lo up && mount --bind {file} /etc/hosts && exec "$@"'
    command = ["unshare", "--mount", "--net", "sh", "-c", setup, "sh"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a network namespace and a mount need root")
    done = subprocess.run(
        [*command, sys.executable, script, folder, scheme, host, str(timeout_s), *options],
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE_S,
        check=False,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("order", [("127.0.0.2", "127.0.0.1"), ("127.0.0.1", "127.0.0.2")], ids=["dead-first", "last"])
@pytest.mark.parametrize("scheme", ["nbd", "nbds"])
def test_the_address_that_answers_is_found(tmp_path: Path, scheme: str, order: tuple[str, str]) -> None:
    """Over TLS the certificate is still held against the name."""
    authority = Authority(tmp_path / "ca")
    options = (authority.client(), authority.server(hosts="DNS:twice")) if scheme == "nbds" else ()
    hosts = "".join(f"{address} twice\n" for address in order)
    assert run(tmp_path, hosts, scheme, "twice", 5.0, *options) == [
        "connected 1048576 127.0.0.1 1",
        "descriptors left 0",
    ]


def test_certificate_of_another_name_is_refused_whichever_address_was_taken(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    options = (authority.client(), authority.server(hosts="DNS:another"))
    said, left = run(tmp_path, "127.0.0.2 twice\n127.0.0.1 twice\n", "nbds", "twice", 5.0, *options)
    assert "certificate is refused" in said
    assert "ostname mismatch" in said, "and why is found out over the address that answers"
    assert left == "descriptors left 0"


def test_name_of_which_no_address_answers_fails_in_time(tmp_path: Path) -> None:
    """One refuses at once, which does not end the wait for the other."""
    said, left = run(tmp_path, "127.0.0.2 twice\n127.0.0.3 twice\n", "nbd", "twice", 1.0)
    took = re.match(r"failed after (\d+\.\d) s: ", said)
    assert took is not None
    assert 1.0 <= float(took[1]) < DEADLINE_S
    assert "no answer within 1 s" in said
    assert left == "descriptors left 0"


def test_one_address_is_left_to_libnbd() -> None:
    assert not Rivals("127.0.0.1", 1).left
    assert not Rivals("no such name.invalid", 1).left
    with pytest.raises(ConnectionRefusedError):
        connect("127.0.0.1", 1, time.monotonic() + DEADLINE_S)
