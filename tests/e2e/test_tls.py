# SPDX-License-Identifier: BSD-3-Clause
"""Pairs over TLS: what is replicated, who is refused and with which words, and what is refused before serving."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbd
import pytest

from certificates import Authority, EndpointWithTwoDoors, SecondaryWithTwoDoors, psk_file
from checkout import REPOSITORY
from content import KIB, MIB, make_raw, pattern
from lab import Lab
from nodes import Primary, Server, nbdkit_has, refused
from replication.disk.connection import Connection
from replication.tls import Tls
from waiting import DEADLINE_S, wait_until

SIZE = 8 * MIB


class Secrets:
    """Certificates and keys of two hosts, and of strangers."""

    def __init__(self, folder: Path) -> None:
        self.ours = Authority(folder / "ours", "our-ca")
        self.theirs = Authority(folder / "theirs", "their-ca")
        self.server = self.ours.server()
        self.client = self.ours.client()
        self.psk = psk_file(folder / "psk", "pair", "other")


@pytest.fixture
def secrets(tmp_path: Path) -> Secrets:
    return Secrets(tmp_path)


def options(secrets: Secrets, kind: str) -> tuple[list[str], list[str]]:
    """nbdkit's options on the secondary, the plugin's keys on the primary."""
    if kind == "psk":
        return [f"--tls-psk={secrets.psk}"], [f"tls-psk={secrets.psk}", "tls-username=pair"]
    server = [f"--tls-certificates={secrets.server}", "--tls-verify-peer"]
    return server, [f"tls-certificates={secrets.client}"]


def pair(lab: Lab, server: list[str], client: list[str], uri: Callable[[SecondaryWithTwoDoors], str]) -> Primary:
    """A secondary that demands TLS, and a primary that has not been started to replicate."""
    secondary = SecondaryWithTwoDoors(lab.folder, [SIZE], options=["--tls=require", *server])
    lab.start(secondary)
    secondary.start_replication()
    return lab.start(Primary(lab.folder, uri(secondary), [SIZE], extra_arguments=client))


@pytest.mark.parametrize("protocol", ["async", "sync"])
@pytest.mark.parametrize("kind", ["certificates", "psk"])
def test_a_pair_over_tls(lab: Lab, secrets: Secrets, kind: str, protocol: str) -> None:
    """Four threads write and verify at once; after a barrier the two disks are equal."""
    server, client = options(secrets, kind)
    primary = pair(lab, server, [*client, f"protocol={protocol}"], lambda secondary: secondary.tcp_uri())
    primary.start_replication()
    part = SIZE // 4

    def work(number: int) -> bytes:
        handle = primary.connect("disk0")
        chance = random.Random(number)
        model = bytearray(part)
        for round_ in range(60):
            length = chance.choice((512, 4 * KIB, 16 * KIB, 100 * KIB, 700 * KIB))
            offset = chance.randrange(0, (part - length) // 512) * 512
            if round_ % 10 == 9:
                handle.zero(length, number * part + offset)
                model[offset : offset + length] = bytes(length)
            else:
                data = pattern(number * 1000 + round_, length)
                handle.pwrite(data, number * part + offset)
                model[offset : offset + length] = data
            assert bytes(handle.pread(length, number * part + offset)) == model[offset : offset + length]
        return bytes(model)

    with ThreadPoolExecutor(4) as pool:
        content = b"".join(pool.map(work, range(4)))
    primary.checkpoint()
    assert (lab.folder / "primary-disk0.raw").read_bytes() == content
    assert (lab.folder / "secondary-disk0.raw").read_bytes() == content
    assert primary.status()["error"] is None


def test_a_disk_behind_tls(lab: Lab, secrets: Secrets) -> None:
    """The keys hold for disk= as for secondary=; here on a secondary, which has no other use for them yet."""
    raw = make_raw(lab.folder / "far.raw", MIB)
    server, client = options(secrets, "psk")
    far = lab.start(EndpointWithTwoDoors(lab.folder, path=raw, options=["--tls=require", *server]))
    arguments = ["mode=secondary", f"state={lab.folder}/state", f"disk={far.tcp_uri()}", "top-id=top", *client]
    process = lab.start(Server(lab.folder, "secondary", arguments))
    data = pattern(3, 100 * KIB)
    handle = process.connect("disk0")
    handle.pwrite(data, 5000)
    handle.flush()
    assert raw.read_bytes()[5000 : 5000 + len(data)] == data


# -- who is refused ----------------------------------------------------------------------------------------------------


def start_refusal(primary: Primary) -> str:
    text = refused(primary, "xen-set-replication", {"enable": True, "primary": True})
    assert "\n" not in text
    assert primary.status()["stage"] == "none"
    return text


Wrong = tuple[list[str], list[str], str]


def unknown_ca(secrets: Secrets) -> Wrong:
    theirs = secrets.theirs.server()
    return [f"--tls-certificates={theirs}"], [f"tls-certificates={secrets.client}"], "(its CA is not the one in"


def expired(secrets: Secrets) -> Wrong:
    old = secrets.ours.server("old", days=0)
    text = (
        "certificate has expired (server-cert.pem in the folder of the server's --tls-certificates is valid from "
        f"Jan  1 00:00:00 2020 GMT until Jan  2 00:00:00 2020 GMT; {secrets.client}/ca-cert.pem is valid from "
    )
    return [f"--tls-certificates={old}"], [f"tls-certificates={secrets.client}"], text


def wrong_host(secrets: Secrets) -> Wrong:
    other = secrets.ours.server("other", "DNS:elsewhere")
    text = "the server's certificate is refused: Hostname mismatch, certificate is not valid for 'localhost'"
    return [f"--tls-certificates={other}"], [f"tls-certificates={secrets.client}"], text


def client_without_certificate(secrets: Secrets) -> Wrong:
    server = [f"--tls-certificates={secrets.server}", "--tls-verify-peer"]
    text = "the server refuses the client certificate, or there is none in tls-certificates"
    return server, [f"tls-certificates={secrets.ours.nobody()}"], text


def client_of_another_ca(secrets: Secrets) -> Wrong:
    server = [f"--tls-certificates={secrets.server}", "--tls-verify-peer"]
    stranger = secrets.theirs.client("stranger")
    (stranger / "ca-cert.pem").write_bytes(secrets.ours.certificate.read_bytes())
    return server, [f"tls-certificates={stranger}"], "the server refuses the client certificate"


def other_key(secrets: Secrets) -> Wrong:
    other = psk_file(secrets.psk.with_name("psk2"), "pair")
    text = "the server refuses the key of 'pair': tls-psk has to be the same there"
    return [f"--tls-psk={secrets.psk}"], [f"tls-psk={other}", "tls-username=pair"], text


def unknown_user(secrets: Secrets) -> Wrong:
    other = psk_file(secrets.psk.with_name("psk2"), "stranger")
    text = "the server refuses the key of 'stranger'"
    return [f"--tls-psk={secrets.psk}"], [f"tls-psk={other}", "tls-username=stranger"], text


def key_for_certificates(secrets: Secrets) -> Wrong:
    client = [f"tls-psk={secrets.psk}", "tls-username=pair"]
    return [f"--tls-certificates={secrets.server}"], client, "the server wants certificates, but tls-psk was given"


def certificates_for_key(secrets: Secrets) -> Wrong:
    return [f"--tls-psk={secrets.psk}"], [f"tls-certificates={secrets.client}"], "perhaps it wants tls-psk"


@pytest.mark.parametrize(
    "wrong",
    [
        unknown_ca,
        expired,
        wrong_host,
        client_without_certificate,
        client_of_another_ca,
        other_key,
        unknown_user,
        key_for_certificates,
        certificates_for_key,
    ],
    ids=lambda wrong: wrong.__name__,
)
def test_a_handshake_that_fails_says_why(lab: Lab, secrets: Secrets, wrong: Callable[[Secrets], Wrong]) -> None:
    server, client, text = wrong(secrets)
    uris: list[str] = []

    def uri(secondary: SecondaryWithTwoDoors) -> str:
        uris.append(secondary.tcp_uri())
        return uris[-1]

    said = start_refusal(pair(lab, server, client, uri))
    assert said.startswith(f"cannot start: cannot connect to {uris[0]}: ")
    assert text in said


def test_without_keys_a_server_that_nobody_can_verify_is_not_used(lab: Lab, secrets: Secrets) -> None:
    """libnbd 1.14 would use it."""
    primary = pair(lab, [f"--tls-certificates={secrets.server}"], [], lambda secondary: secondary.tcp_uri())
    said = start_refusal(primary)
    assert "tls-certificates" in said
    assert "does not verify the server" in said or "certificate is refused" in said


SYSTEM_CAS = "/etc/ssl/certs/ca-certificates.crt"
WITH_SYSTEM_CA = f"""
import subprocess, sys
subprocess.run(["mount", "--bind", sys.argv[2], "{SYSTEM_CAS}"], check=True)
from replication.disk.connection import Connection
from replication.errors import DiskError
from replication.tls import Tls
try:
    connection = Connection(sys.argv[1], "", 20.0, Tls(sys.argv[3] if sys.argv[3:] else None))
    print("connected")
    connection.close()
except DiskError as error:
    print(error)
"""


@pytest.mark.skipif(os.getuid() != 0 or not os.path.exists(SYSTEM_CAS), reason="lends the machine a CA, as root")
@pytest.mark.parametrize("folder", [False, True], ids=["without a folder", "with a folder of another CA"])
def test_the_systems_cas_count_where_there_is_no_folder_and_only_there(
    lab: Lab, secrets: Secrets, folder: bool
) -> None:
    options = ["--tls=require", f"--tls-certificates={secrets.theirs.server()}"]
    far = lab.start(EndpointWithTwoDoors(lab.folder, size=MIB, options=options))
    arguments = [far.tcp_uri(), str(secrets.theirs.certificate), *([str(secrets.client)] if folder else [])]
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", WITH_SYSTEM_CA, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if folder:
        assert "the server's certificate is refused" in done.stdout
    elif hasattr(nbd.NBD, "set_tls_hostname"):
        assert done.stdout == "connected\n"
    else:
        assert "this libnbd does not verify the server without tls-certificates" in done.stdout


def test_over_a_unix_socket_a_server_of_this_ca_is_used(lab: Lab, secrets: Secrets) -> None:
    """That one of another CA is used as well, as with libnbd 1.14, or is not, as with 1.22, is no promise."""
    options = ["--tls=require", f"--tls-certificates={secrets.server}"]
    far = lab.start(EndpointWithTwoDoors(lab.folder, size=MIB, options=options))
    uri = f"nbds+unix:///?socket={far.socket_path}"
    connection = Connection(uri, "", DEADLINE_S, Tls(str(secrets.client)))
    assert connection.size == MIB
    connection.close()


def test_who_does_not_use_tls_is_refused_by_a_server_that_demands_it(lab: Lab, secrets: Secrets) -> None:
    uris: list[str] = []

    def uri(secondary: SecondaryWithTwoDoors) -> str:
        uris.append(secondary.tcp_uri("nbd"))
        return uris[-1]

    server, _ = options(secrets, "psk")
    said = start_refusal(pair(lab, server, [], uri))
    assert said == f"cannot start: the server at {uris[0]} requires TLS: use an nbds: URI"
    for export in ("disk0", "top0", ""):
        handle = nbd.NBD()
        handle.set_export_name(export)
        with pytest.raises(nbd.Error):
            handle.connect_uri(uris[0])


def test_a_server_without_tls_is_refused(lab: Lab, secrets: Secrets) -> None:
    secondary = lab.start(SecondaryWithTwoDoors(lab.folder, [SIZE]))
    client = [f"tls-certificates={secrets.client}"]
    primary = lab.start(Primary(lab.folder, secondary.tcp_uri(), [SIZE], extra_arguments=client))
    said = start_refusal(primary)
    assert said == f"cannot start: the server at {secondary.tcp_uri()} does not offer TLS: it has to be started with it"


def test_parameters_in_the_uri_take_the_place_of_the_keys(lab: Lab, secrets: Secrets) -> None:
    client = [f"tls-certificates={secrets.client}"]
    query = f"?tls-psk-file={secrets.psk}"

    def uri(secondary: SecondaryWithTwoDoors) -> str:
        return f"nbds://other@localhost:{secondary.port}/{query}"

    primary = pair(lab, [f"--tls-psk={secrets.psk}"], client, uri)
    primary.start_replication()
    primary.connect("disk0").pwrite(b"x" * 4096, 0)
    primary.checkpoint()
    assert (lab.folder / "secondary-disk0.raw").read_bytes()[:4096] == b"x" * 4096


# -- who has the certificate of another ------------------------------------------------------------------------------


def test_the_pair_and_the_guest_are_for_the_certificates_that_are_named(lab: Lab, secrets: Secrets) -> None:
    """Others of the same CA get neither, nor does each what is the other's."""
    if not nbdkit_has("peer_tls_dn"):
        pytest.skip("this nbdkit does not say which certificate a client has shown")
    server, client = options(secrets, "certificates")
    secondary = SecondaryWithTwoDoors(
        lab.folder,
        [SIZE],
        options=["--tls=require", *server],
        extra_arguments=["primary-identity=CN=client", "guest-identity=CN=guest"],
    )
    lab.start(secondary)
    secondary.start_replication()
    guest, stranger = secrets.ours.client("guest"), secrets.ours.client("stranger")
    for folder, who in ((stranger, "stranger"), (guest, "guest")):
        named = {"name": who, "extra_arguments": [f"tls-certificates={folder}"]}
        start_refusal(lab.start(Primary(lab.folder, secondary.tcp_uri(), [SIZE], **named)))
        said = f"is for 'CN=client', and the client at 127.0.0.1 port [0-9]+ has shown the certificate of 'CN={who}'"
        wait_until(lambda said=said: re.search(said, secondary.stderr()), "the log says who it was")
    primary = lab.start(Primary(lab.folder, secondary.tcp_uri(), [SIZE], extra_arguments=client))
    primary.start_replication()
    primary.connect("disk0").pwrite(b"x" * 4096, 0)
    primary.checkpoint()
    assert guest_reads(secondary, guest) == b"x" * 4096
    for folder in (stranger, secrets.client):
        with pytest.raises(nbd.Error):
            guest_reads(secondary, folder)


def guest_reads(secondary: SecondaryWithTwoDoors, folder: Path) -> bytes:
    handle = nbd.NBD()
    handle.set_tls_certificates(str(folder))
    handle.connect_uri(secondary.tcp_uri(export="top0"))
    return bytes(handle.pread(4096, 0))


# -- renewal -----------------------------------------------------------------------------------------------------------


def renew(folder: Path, fresh: Path) -> None:
    """As a person does: each new file is put in place by a rename."""
    for name in ("client-key.pem", "client-cert.pem"):
        copy = folder / f"{name}.new"
        copy.write_bytes((fresh / name).read_bytes())
        copy.rename(folder / name)


def test_a_client_certificate_that_is_renewed_on_disk_counts_at_the_next_connection(lab: Lab, secrets: Secrets) -> None:
    """A link that is up goes on with the old one; one that was refused for it comes up by itself."""
    server, client = options(secrets, "certificates")
    primary = pair(lab, server, client, lambda secondary: secondary.tcp_uri())
    primary.start_replication()
    renew(secrets.client, secrets.ours.client("expired", days=0))
    primary.connect("disk0").pwrite(b"a" * 4096, 0)
    primary.checkpoint()
    assert primary.status()["link"]["state"] == "in-sync"
    primary.restart(signal.SIGKILL)

    def reason() -> str | None:
        found: str | None = primary.status()["link"]["reason"]
        return found if found and "client certificate" in found else None

    said = wait_until(reason, "the link is refused")
    assert f"{secrets.client}/client-cert.pem is valid from Jan  1 00:00:00 2020 GMT until Jan  2" in str(said)
    primary.connect("disk0").pwrite(b"b" * 4096, 0)
    renew(secrets.client, secrets.ours.client("renewed"))
    wait_until(lambda: primary.status()["link"]["state"] == "in-sync", "the link is up by itself")
    primary.checkpoint()
    assert (lab.folder / "secondary-disk0.raw").read_bytes()[:4096] == b"b" * 4096


def test_a_server_certificate_that_is_renewed_counts_when_nbdkit_is_restarted(lab: Lab, secrets: Secrets) -> None:
    """The primary, with its guest, goes on; the link comes back by itself."""
    old = secrets.ours.server("old", days=0)
    secondary = SecondaryWithTwoDoors(lab.folder, [SIZE], options=["--tls=require", f"--tls-certificates={old}"])
    lab.start(secondary)
    secondary.start_replication()
    client = [f"tls-certificates={secrets.client}"]
    primary = lab.start(Primary(lab.folder, secondary.tcp_uri(), [SIZE], extra_arguments=client))
    assert "certificate has expired" in start_refusal(primary)
    for name in ("server-key.pem", "server-cert.pem"):
        (old / name).write_bytes((secrets.server / name).read_bytes())
    assert "certificate has expired" in start_refusal(primary), "it was read when nbdkit started"
    secondary.restart(signal.SIGTERM)
    primary.start_replication()
    primary.connect("disk0").pwrite(b"x" * 4096, 0)
    primary.checkpoint()


# -- before serving ----------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_said_before_anything_is_served(lab: Lab, secrets: Secrets) -> None:
    raw = make_raw(lab.folder / "raw", MIB)
    mine = ["mode=primary", f"state={lab.folder}/state", f"disk={raw}", "secondary=nbds://localhost:1"]
    _, said = lab.failed_start([*mine, f"tls-certificates={lab.folder}/nowhere"])
    assert said.count("\n") == 1
    assert f"tls-certificates: cannot read {lab.folder}/nowhere/ca-cert.pem: No such file or directory" in said
    assert not (lab.folder / "state").exists()


def test_a_disk_that_refuses_is_said_before_anything_is_served(lab: Lab, secrets: Secrets) -> None:
    theirs = secrets.theirs.server()
    far = EndpointWithTwoDoors(lab.folder, size=MIB, options=["--tls=require", f"--tls-certificates={theirs}"])
    lab.start(far)
    mine = ["mode=primary", f"state={lab.folder}/state", f"disk={far.tcp_uri()}"]
    _, said = lab.failed_start([*mine, f"tls-certificates={secrets.client}"])
    assert said.count("\n") == 1
    assert f"disk 'disk0': cannot connect to {far.tcp_uri()}: the server's certificate is refused" in said


# -- a server that is gone in mid-stream -------------------------------------------------------------------------------


def test_a_secondary_that_is_killed_under_load_is_noticed_and_costs_the_guest_nothing(
    lab: Lab, secrets: Secrets
) -> None:
    server, client = options(secrets, "psk")
    secondary = SecondaryWithTwoDoors(lab.folder, [SIZE], options=["--tls=require", *server])
    lab.start(secondary)
    secondary.start_replication()
    primary = lab.start(Primary(lab.folder, secondary.tcp_uri(), [SIZE], extra_arguments=client))
    primary.start_replication()
    handle = primary.connect("disk0")
    written = threading.Event()

    def work() -> bytes:
        model = bytearray(SIZE)
        for number in range(400):
            data = pattern(number, 16 * KIB)
            handle.pwrite(data, number * 16 * KIB)
            model[number * 16 * KIB : (number + 1) * 16 * KIB] = data
            if number == 100:
                written.set()
        return bytes(model)

    with ThreadPoolExecutor(1) as pool, primary.qmp() as qmp:
        end = pool.submit(work)
        assert written.wait(DEADLINE_S)
        secondary.kill()
        model = end.result(DEADLINE_S)
        qmp.wait_event("REPLICATION_LINK", lambda data: data["state"] == "lost")
    assert bytes(handle.pread(SIZE, 0)) == model
