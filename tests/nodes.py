# SPDX-License-Identifier: BSD-3-Clause
"""nbdkit with the plugin: a secondary, a primary, and the pair of both."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import nbd

from checkout import PLUGIN
from content import MIB, make_raw
from nbdprocess import NbdProcess, nbdkit_command
from qmp import Qmp, QmpError
from waiting import DEADLINE_S, wait_until


class Server(NbdProcess):
    """One nbdkit that runs plugin.py with `arguments` (KEY=VALUE, in order).

    `threads` is nbdkit's -t, `filters` the names of its filters with `filter_arguments`, `options` more options of
    nbdkit's own, `extra_environment` (NBDKIT_REPLICATION_PAUSE=..., say) is added to the test's.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        arguments: Sequence[str],
        *,
        threads: int | None = None,
        filters: Sequence[str] = (),
        filter_arguments: Sequence[str] = (),
        options: Sequence[str] = (),
        extra_environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(folder, name)
        self.arguments = list(arguments)
        self.threads = threads
        self.filters = list(filters)
        self.filter_arguments = list(filter_arguments)
        self.options = list(options)
        self.extra_environment = dict(extra_environment or {})

    def command(self) -> list[str]:
        command = nbdkit_command(self.socket_path)
        if self.threads is not None:
            command += ["-t", str(self.threads)]
        command += [f"--filter={name}" for name in self.filters]
        return command + self.options + ["python", str(PLUGIN), *self.arguments, *self.filter_arguments]

    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.extra_environment}

    @property
    def control_path(self) -> Path:
        """The control socket: `control=`, or in `state=`."""
        values = dict(argument.split("=", 1) for argument in self.arguments)
        if "control" in values:
            return Path(values["control"])
        if "state" in values:
            return Path(values["state"]) / "control.sock"
        raise AssertionError(f"{self.name} was given neither control= nor state=")

    def qmp(self, *, negotiate: bool = True) -> Qmp:
        """A new QMP connection to the control socket."""
        return Qmp(self.control_path, negotiate=negotiate)

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None, /, **more: Any) -> Any:
        """Run one QMP command on a connection of its own."""
        with self.qmp() as qmp:
            return qmp.execute(command, arguments, **more)

    def status(self) -> dict[str, Any]:
        """`query-replication`."""
        status: dict[str, Any] = self.execute("query-replication")
        return status

    def wait_stage(self, *stages: str, timeout_s: float = DEADLINE_S) -> dict[str, Any]:
        """Wait until the stage is one of `stages` and return the status."""
        with self.qmp() as qmp:

            def reached() -> dict[str, Any] | None:
                status: dict[str, Any] = qmp.execute("query-replication")
                return status if status["stage"] in stages else None

            reached_status: dict[str, Any] = wait_until(reached, f"{self.name} reaches stage {stages}", timeout_s)
            return reached_status

    @classmethod
    def failed_start(
        cls, folder: Path, arguments: Sequence[str], *, options: Sequence[str] = (), timeout_s: float = DEADLINE_S
    ) -> tuple[int, str]:
        """Start with `arguments` that must be refused: (exit code, stderr). AssertionError if it serves."""
        socket_path = folder / "refused.sock"
        process = subprocess.Popen(
            [*nbdkit_command(socket_path), *options, "python", str(PLUGIN), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            _, stderr = process.communicate(timeout=DEADLINE_S)
            raise AssertionError(f"nbdkit serves {arguments}: {stderr}") from None
        if process.returncode == 0:
            raise AssertionError(f"nbdkit ended with 0 for {arguments}: {stderr}")
        return process.returncode, stderr


def disk_name(index: int) -> str:
    """NAME of disk number `index`: the target face's export."""
    return f"disk{index}"


def top_id(index: int) -> str:
    """TOP-ID of disk number `index`: the guest face's export."""
    return f"top{index}"


class Secondary(Server):
    """A secondary with raw disks of `sizes` (bytes) that hold `contents`; NAME disk0..., TOP-ID top0...

    Overlays are in the state folder unless `overlays` names another one. Existing disks are used as they are.
    """

    def __init__(
        self,
        folder: Path,
        sizes: Sequence[int] = (MIB,),
        *,
        name: str = "secondary",
        contents: Sequence[bytes] = (),
        overlays: Path | None = None,
        extra_arguments: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.state = folder / f"{name}.state"
        self.sizes = list(sizes)
        self.disks = _make_disks(folder, name, sizes, contents)
        self._overlays = overlays
        arguments = ["mode=secondary", f"state={self.state}"]
        for index, path in enumerate(self.disks):
            arguments += [f"disk={disk_name(index)}:{path}", f"top-id={top_id(index)}"]
            if overlays is not None:
                arguments += [f"{kind}={self.overlay(kind, index)}" for kind in ("active", "hidden")]
        super().__init__(folder, name, [*arguments, *extra_arguments], **options)

    def overlay(self, kind: str, index: int = 0) -> Path:
        """The image file of `kind` ("active" or "hidden") of disk number `index`."""
        if self._overlays is not None:
            return self._overlays / f"{disk_name(index)}-{kind}.qcow2"
        found = [path for path in self.state.rglob(f"*{kind}*.qcow2") if disk_name(index) in str(path)]
        if len(found) != 1:
            raise AssertionError(f"one {kind} image of {disk_name(index)} expected in {self.state}, found {found}")
        return found[0]

    def lose_checkpoint(self) -> None:
        """While no process has it: its record says that the last checkpoint is lost."""
        path = self.state / "state.json"
        record = {**json.loads(path.read_text()), "inconsistent": "it was lost"}
        (self.state / "state.json.twin").unlink(missing_ok=True)
        path.unlink()
        path.write_text(json.dumps(record))

    def start_replication(self) -> None:
        """Start as QEMU's management does."""
        self.execute("xen-set-replication", enable=True, primary=False)

    def checkpoint(self) -> None:
        """Take a checkpoint."""
        self.execute("xen-colo-do-checkpoint")

    def failover(self, timeout_s: float = DEADLINE_S) -> None:
        """Fail over and wait until the commit is done."""
        self.execute("xen-set-replication", enable=False, primary=False, failover=True)
        status = self.wait_stage("done", "failover-failed", timeout_s=timeout_s)
        if status["stage"] != "done":
            raise AssertionError(f"failover failed: {status}")


class Primary(Server):
    """A primary that forwards to `secondary` (a URI), with raw disks of `sizes`; without sizes it only forwards."""

    def __init__(
        self,
        folder: Path,
        secondary: str,
        sizes: Sequence[int] = (MIB,),
        *,
        name: str = "primary",
        contents: Sequence[bytes] = (),
        extra_arguments: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.state = folder / f"{name}.state"
        self.sizes = list(sizes)
        self.disks = _make_disks(folder, name, sizes, contents)
        arguments = ["mode=primary", f"state={self.state}", f"secondary={secondary}"]
        arguments += [f"disk={disk_name(index)}:{path}" for index, path in enumerate(self.disks)]
        super().__init__(folder, name, [*arguments, *extra_arguments], **options)

    def start_replication(self) -> None:
        """Start as QEMU's management does."""
        self.execute("xen-set-replication", enable=True, primary=True)

    def checkpoint(self) -> dict[str, Any]:
        """The barrier; with the peer channel up, also the secondary's checkpoint."""
        result: dict[str, Any] = self.execute("replication-checkpoint")
        return result


def _make_disks(folder: Path, name: str, sizes: Sequence[int], contents: Sequence[bytes]) -> list[Path]:
    """The raw files NAME-disk0.raw and so on, made unless they are there."""
    paths = []
    for index, size in enumerate(sizes):
        path = folder / f"{name}-{disk_name(index)}.raw"
        if not path.exists():
            make_raw(path, size, contents[index] if index < len(contents) else b"")
        paths.append(path)
    return paths


class Pair:
    """A secondary and the primary that forwards to it over a Unix socket, with equal disks."""

    def __init__(
        self,
        folder: Path,
        sizes: Sequence[int] = (MIB,),
        *,
        contents: Sequence[bytes] = (),
        primary_arguments: Sequence[str] = (),
        secondary_arguments: Sequence[str] = (),
        primary_options: Mapping[str, Any] | None = None,
        secondary_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.secondary = Secondary(
            folder, sizes, contents=contents, extra_arguments=secondary_arguments, **(secondary_options or {})
        )
        self.primary = Primary(
            folder,
            self.secondary.uri(),
            sizes,
            contents=contents,
            extra_arguments=primary_arguments,
            **(primary_options or {}),
        )

    def start(self) -> Self:
        """Start both processes; replication is not started."""
        self.secondary.start()
        self.primary.start()
        return self

    def start_replication(self) -> None:
        """Start replication on both, the secondary first, as QEMU's documentation says."""
        self.secondary.start_replication()
        self.primary.start_replication()

    def close(self) -> None:
        """End both, the primary first."""
        self.primary.close()
        self.secondary.close()


def drained(primary: Server) -> dict[str, Any]:
    """Wait until the secondary of `primary` has everything, without a checkpoint; the status then."""

    def all_there() -> dict[str, Any] | None:
        status = primary.status()
        waiting = sum(disk["forward-queue-bytes"] + disk["out-of-sync-bytes"] for disk in status["disks"])
        return None if waiting else status

    there: dict[str, Any] = wait_until(all_there, f"the secondary of {primary.name} has everything")
    return there


def refused(server: Server, command: str, arguments: Mapping[str, Any] | None = None) -> str:
    """The description with which `command` is refused."""
    try:
        answer = server.execute(command, arguments)
    except QmpError as error:
        return error.desc
    raise AssertionError(f"{command} should have been refused, but returned {answer}")


def code_of(server: Server, command: str, **arguments: Any) -> str | None:
    """The code with which a command is refused."""
    try:
        answer = server.execute(command, **arguments)
    except QmpError as error:
        return error.code
    raise AssertionError(f"{command} should have been refused, but returned {answer}")


def in_sync(server: Server) -> None:
    """Wait until the server says that its link is."""
    wait_until(lambda: server.status()["link"]["state"] == "in-sync", f"{server.name} is in sync")


def error_kept(folder: Path) -> bool:
    """Whether the record in a state folder has an error. It is shown a moment before: a node that is killed in between
    forgets the error, and not what it says of the disks, which other files keep."""
    try:
        return json.loads((folder / "state.json").read_bytes())["fault"] is not None
    except ValueError:  # it is just being overwritten
        return False


@contextlib.contextmanager
def nbd_refusal(number: int) -> Iterator[None]:
    """The body must end with an nbd.Error of errno `number`."""
    try:
        yield
    except nbd.Error as error:
        if error.errnum != number:
            raise AssertionError(f"errno {number} ({os.strerror(number)}) expected, got {error}") from error
    else:
        raise AssertionError(f"errno {number} ({os.strerror(number)}) expected, but it succeeded")


def nbdkit_has(function: str) -> bool:
    """Whether the Python module of the nbdkit here has this function."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(f"import nbdkit\nprint('has', hasattr(nbdkit, {function!r}), flush=True)\n")
        script.flush()
        said = subprocess.run(
            ["nbdkit", "python", script.name, "--dump-plugin"],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,  # it is no plugin
        )
    found = re.search(r"^has (True|False)$", said.stdout, re.MULTILINE)
    assert found is not None, said
    return found[1] == "True"
