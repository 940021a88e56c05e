# SPDX-License-Identifier: BSD-3-Clause
"""scripts/bench as a person runs it, on small disks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.measure import Plan, measure
from bench.subjects import Subject
from bench.workloads import WORKLOADS, Face
from content import MIB
from lab import Lab
from waiting import DEADLINE_S, wait_until

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
SMALL = ("--size", "16M", "--seconds", "0.3", "--rounds", "1")


def command(folder: Path, *arguments: str) -> list[str]:
    """The command line of a small run whose files all are in `folder`."""
    files = ("--folder", str(folder / "disks"), "--json", str(folder / "b.json"), "--plot", str(folder / "b.png"))
    return [sys.executable, str(BENCH), *SMALL, *files, *arguments]


def in_session(session: int) -> list[str]:
    """The processes of a session, zombies apart."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append((folder / "comm").read_text().strip())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    return found


def test_a_run_measures_all_three_and_leaves_nothing_but_its_results(tmp_path: Path) -> None:
    only = ("primary-randwrite-4k-16", "guest-write-1m-16", "*-checkpoints", "checkpoint-64m", "planned-stop")
    work = [argument for name in only for argument in ("--only", name)]
    done = subprocess.run(command(tmp_path, *work), check=False, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "b.json").read_text())
    cells = {(cell["work"], cell["subject"]): cell for cell in content["summary"]}
    for name in ("primary-randwrite-4k-16", "guest-write-1m-16"):
        for subject in ("qemu", "replication", "file"):
            cell = cells[name, subject]
            assert cell["value"] > 0
            assert cell["p99_us"] >= cell["p50_us"] > 0
            assert cell["memory_peak"] >= cell["memory_private"] > 0
            assert cell["seen"] >= cell["value"]
        ours = cells[name, "replication"]
        assert ours["ratio_to_qemu"] == ours["value"] / cells[name, "qemu"]["value"]
    for subject in ("qemu", "replication"):
        mixed = cells["primary-randrw-4k-16-checkpoints", subject]
        # Once in 45 runs under load there was no figure, it is not known whose or why. QEMU may fail if the table says
        # so.
        failed = subject == "qemu" and mixed["reason"].startswith("failed: ")
        assert failed or mixed.get("checkpoints", 0) >= 1, mixed
        assert cells["checkpoint-64m", subject]["dirty"] >= 64 * MIB
    stops = cells["planned-stop", "qemu"], cells["planned-stop", "replication"]
    assert stops[0]["value"] is None
    assert stops[0]["reason"] == "failed: Backup job was cancelled unexpectedly"
    assert 0 < stops[1]["value"] < DEADLINE_S
    assert {verdict["figure"]["work"] for verdict in content["figures"]} == {"primary-randwrite-4k-16"}
    assert "Backup job was cancelled unexpectedly" in done.stdout
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "b.png", "disks"]
    assert not list((tmp_path / "disks").iterdir())


def test_an_interrupted_run_ends_its_processes_and_removes_its_disks(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path, "--only", "primary-*-4k-1", "--rounds", "100"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stderr
        assert process.stderr.readline().startswith("[1/")
        assert any(name.startswith("qemu-system") for name in in_session(process.pid))
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=DEADLINE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "bench: interrupted"
    # The signal may have come while an nbdkit was being started: such a one ends with its parent.
    wait_until(lambda: not in_session(process.pid), "all processes have ended")
    assert not list((tmp_path / "disks").iterdir())


def test_a_process_of_which_an_interrupted_run_knows_nothing_is_ended(tmp_path: Path) -> None:
    """The signal may come between its start and the moment from which it is known."""
    code = (
        "import importlib.machinery as m, importlib.util as u, subprocess, sys\n"
        "loader = m.SourceFileLoader('bench_script', sys.argv[1])\n"
        "script = u.module_from_spec(u.spec_from_loader('bench_script', loader))\n"
        "loader.exec_module(script)\n"
        "unknown = subprocess.Popen(['sleep', '60'])\n"
        "script.end_children()\n"
        "print('goes on' if script.Path(f'/proc/{unknown.pid}').exists() else 'ended')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(BENCH)], check=False, capture_output=True, text=True, timeout=30, cwd=tmp_path
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "ended", "")


def test_a_plugin_that_does_not_start_is_a_failure_and_the_others_are_measured(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('this revision is broken')\n")
    work = ("--only", "guest-randread-4k-1", "--skip", "file", "--plugin", f"old={broken}")
    done = subprocess.run(command(tmp_path, *work), check=False, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    cells = {cell["subject"]: cell for cell in json.loads((tmp_path / "b.json").read_text())["summary"]}
    assert cells["qemu"]["value"] > 0
    assert cells["old"]["value"] is None
    assert "this revision is broken" in cells["old"]["reason"]


class Slow(Subject):
    """A subject that fills a queue in memory at full speed, and needs DRAIN_S until the secondary has it."""

    DRAIN_S = 0.3

    def __init__(self, lab: Lab) -> None:
        super().__init__("slow")
        self._server = lab.endpoint(size=64 * MIB)
        self.processes = [self._server]

    def uri(self, face: Face) -> str:
        return self._server.uri()

    def drain(self) -> None:
        time.sleep(self.DRAIN_S)


@pytest.mark.parametrize(("name", "counted"), [("primary-randwrite-4k-16", True), ("primary-randread-4k-16", False)])
def test_the_time_to_drain_a_queue_counts_for_the_rate_of_writes(
    lab: Lab, tmp_path: Path, name: str, counted: bool
) -> None:
    plan = Plan([], tmp_path, 64 * MIB, 0.2, 1, lambda sample: None, lambda subject, text: None)
    sample = measure(plan, WORKLOADS[name], Slow(lab), 0)
    assert sample.value is not None
    # fio has run for 0.2 s at most, so most of the time is the drain's.
    assert (sample.value < 0.5 * sample.details["seen"]) is counted
    assert (sample.details["drain_s"] >= Slow.DRAIN_S) is counted
    assert sample.details["processor_s_per_gib"] > 0
