# SPDX-License-Identifier: BSD-3-Clause
"""uri.py: a URI means to us what it means to libnbd, which is asked."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import nbd
import pytest

from replication.errors import ConfigError
from replication.uri import absolute, export_of, parameters

NAMES = ["x1", "x2", "x 1+y", "x1;socket=x2", "x%31", "ü"]

MEANINGS = [
    ("socket=x1", "x1"),
    ("socket=x%31", "x1"),
    ("so%63ket=x1", "x1"),
    ("socket=x%201+y", "x 1+y"),
    ("socket=x%201%2By", "x 1+y"),
    ("socket=x%2531", "x%31"),
    ("socket=%c3%bc", "ü"),
    ("socket=x2&socket=x1", "x1"),
    ("socket=x2;socket=x1", "x1"),
    ("socket=x1;socket=x2&more=1", "x1;socket=x2"),
    ("socket=x1&SOCKET=x2", "x2" if hasattr(nbd.NBD, "set_tls_hostname") else "x1"),  # libnbd 1.22, 1.14
    ("more&&socket=x1&", "x1"),
    ("=x2&socket=x1", "x1"),
    ("socket=x1#socket=x2", "x1"),
]


def reached(uri: str, folder: Path) -> list[str]:
    """Which of the sockets named NAMES in the folder libnbd connects to."""
    with contextlib.ExitStack() as stack:
        listeners = []
        for name in NAMES:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(folder / name))
            stack.callback((folder / name).unlink)
            listener.listen()
            listener.setblocking(False)
            listeners.append(listener)
        handle = nbd.NBD()
        with contextlib.suppress(nbd.Error):
            handle.aio_connect_uri(uri)
        found = []
        for name, listener in zip(NAMES, listeners, strict=True):
            with contextlib.suppress(BlockingIOError):
                listener.accept()[0].close()
                found.append(name)
        return found


@pytest.mark.parametrize(("query", "name"), MEANINGS)
def test_the_socket_is_the_one_that_libnbd_takes(
    query: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"nbd+unix:///?{query}"
    assert reached(uri, tmp_path) == [name]
    assert parameters(uri)["socket"] == name


@pytest.mark.parametrize(("query", "name"), MEANINGS)
def test_an_absolute_uri_leads_to_the_same_socket_from_everywhere(
    query: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a folder & more;+%"
    folder.mkdir()
    monkeypatch.chdir("/")
    uri = absolute(f"nbd+unix:///an+export?{query}", str(folder))
    assert reached(uri, folder) == [name]
    assert export_of(uri) == "an+export"
    assert absolute(uri, "/elsewhere") == uri


@pytest.mark.parametrize(
    "uri",
    [
        "nbd://host",
        "nbd://host:10809/disk0",
        "nbd+unix:///?socket=/run/b.sock",
        "nbd+unix:///a?socket=/run/b%20+.sock&socket=",
        "nbds://me@host/?tls-certificates=/etc/pki;tls-psk-file=/etc/psk#part",
        "nbds://host/?TLS-Certificates=/etc/pki&more=relative",
        "nbd://host/?",
    ],
)
def test_what_has_no_relative_path_stays_as_it_is(uri: str) -> None:
    assert absolute(uri, "/start") == uri


def test_the_files_of_tls_become_absolute_in_any_case_of_their_names() -> None:
    uri = absolute("nbds://host/?TLS-Certificates=pki+1&tls-psk-file=keys.psk", "/start")
    assert uri == "nbds://host/?TLS-Certificates=/start/pki%2B1&tls-psk-file=/start/keys.psk"
    assert parameters(uri) == {"tls-certificates": "/start/pki+1", "tls-psk-file": "/start/keys.psk"}


def test_a_path_of_bytes_that_are_no_text_is_kept(tmp_path: Path) -> None:
    uri = absolute("nbd+unix:///?socket=%ff.sock", os.fspath(tmp_path))
    assert parameters(uri)["socket"] == os.path.join(os.fspath(tmp_path), os.fsdecode(b"\xff.sock"))


def test_a_socket_path_that_no_address_holds_is_refused() -> None:
    fits = absolute("nbd+unix:///?socket=b", "/" + "a" * 104)
    assert fits.endswith("a/b")
    with pytest.raises(ConfigError, match=r"a/bb is too long for the path of a Unix socket, which has 107 bytes"):
        absolute("nbd+unix:///?socket=bb", "/" + "a" * 104)
