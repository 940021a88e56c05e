# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark's arithmetic, names, tables and plot data; what it starts is tested end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Semaphore
from typing import Any

import pytest
from rich.console import Console

from bench import fio, usage
from bench.disks import Disks, full, sparse
from bench.figures import FIGURES, Figure, Verdict, behind, verdicts
from bench.measure import Checkpoints, Plan, prepare
from bench.operations import OPERATIONS
from bench.plot import bars, plot
from bench.report import (
    behind_text,
    cell_text,
    cost_table,
    figures_table,
    ratio_text,
    reasons,
    seconds_text,
    speed_table,
    value_text,
    verdict_text,
    wanted_text,
)
from bench.results import LIMIT, QEMU, Results, Sample, Unit, Work, median
from bench.subjects import Spec, Subject
from bench.workloads import GIB, KIB, MIB, USUAL, WORKLOADS, Workload
from qmp import QmpError

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
OURS = "replication"
RATE = Work("primary-randwrite-4k-16", Unit.RATE, 4 * KIB)
TIME = Work("checkpoint-4g", Unit.SECONDS)


def results(work: Work, **values: list[float | None]) -> Results:
    """Results with these values of each subject, round by round; None is a failure."""
    samples = [
        Sample(work.name, subject, round_, value)
        if value is not None
        else Sample(work.name, subject, round_, None, reason="failed: broken", failed=True)
        for subject, of in values.items()
        for round_, value in enumerate(of)
    ]
    return Results([work], samples)


def text_of(table: Any) -> str:
    """What a table looks like on a wide terminal."""
    console = Console(width=250, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    console.print(table)
    console.file.close()
    return console.export_text()


# --- Arithmetic -----------------------------------------------------------------------------------------------


def test_the_median_leaves_out_what_was_not_measured() -> None:
    assert median([3, None, 1, 2]) == 2
    assert median([1, 2]) == 1.5
    assert median([None]) is None


def test_a_ratio_is_taken_pair_by_pair_and_then_the_median() -> None:
    # The machine was ten times slower in the second round; the medians alone would give 40 / 10 = 4.
    found = results(RATE, qemu=[10, 1, 10], replication=[40, 5, 60])
    assert list(found.ratios(RATE.name, OURS, QEMU)) == [4, 5, 6]
    assert found.ratio(RATE.name, OURS, QEMU) == 5


def test_of_times_the_shorter_one_is_better() -> None:
    assert results(TIME, qemu=[4.0], replication=[0.01]).ratio(TIME.name, OURS, QEMU) == pytest.approx(400)


def test_a_round_that_one_of_the_two_lacks_does_not_count() -> None:
    found = results(RATE, qemu=[10, None, 10], replication=[20, 1000, None])
    assert found.ratio(RATE.name, OURS, QEMU) == 2
    assert found.ratio(RATE.name, OURS, LIMIT) is None


def test_only_what_went_wrong_counts_as_a_failure() -> None:
    found = results(RATE, qemu=[None], replication=[1])
    found.samples.append(Sample(RATE.name, LIMIT, 0, None, reason="has no resync"))
    assert [sample.subject for sample in found.failures()] == [QEMU]


def test_qemu_comes_first_and_the_limit_last() -> None:
    assert results(RATE, file=[1], b=[1], qemu=[1], a=[1]).subjects() == [QEMU, "b", "a", LIMIT]


def test_json_has_all_samples_and_a_summary_of_each_cell() -> None:
    content = json.loads(json.dumps(results(RATE, qemu=[10, 30], replication=[20, None]).plain()))
    assert len(content["samples"]) == 4
    qemu, ours = content["summary"]
    assert (qemu["subject"], qemu["value"], qemu["unit"]) == (QEMU, 20, "requests/s")
    assert (ours["value"], ours["ratio_to_qemu"], ours["reason"]) == (20, 2, "failed: broken")


# --- Figures --------------------------------------------------------------------------------------------------


def verdict_of(found: Results, figure: Figure) -> Verdict:
    (verdict,) = verdicts(found, [figure])
    return verdict


@pytest.mark.parametrize(("ours", "reached"), [(39.9, False), (40, True), (41, True)])
def test_a_figure_is_reached_from_its_ratio_on(ours: float, reached: bool) -> None:
    assert verdict_of(results(RATE, qemu=[10], replication=[ours]), Figure(RATE.name, 4)).reached is reached


@pytest.mark.parametrize(("seconds", "reached"), [(0.010, True), (0.011, False)])
def test_a_figure_may_have_an_absolute_bound_beside_its_ratio(seconds: float, reached: bool) -> None:
    found = results(TIME, qemu=[100], replication=[seconds])
    assert verdict_of(found, Figure(TIME.name, 100, at_most_s=0.010)).reached is reached


@pytest.mark.parametrize(("p99_us", "reached"), [(10, True), (11, False), (None, False)])
def test_a_figure_may_ask_for_the_p99_too(p99_us: float | None, reached: bool) -> None:
    found = results(RATE)
    details = {} if p99_us is None else {"p99_us": p99_us}
    found.samples += [Sample(RATE.name, QEMU, 0, 1, {"p99_us": 10}), Sample(RATE.name, OURS, 0, 9, details)]
    assert verdict_of(found, Figure(RATE.name, 4, tail=1)).reached is reached
    assert verdict_of(found, Figure(RATE.name, 4)).reached is True


def test_what_is_behind_qemu_is_named_and_fails_a_check() -> None:
    found = results(RATE, qemu=[10, 10, 10], replication=[9, 8, 20], new=[10, 10, 9], file=[1, 1, 1])
    assert list(found.behind(QEMU)) == [(RATE.name, OURS, 0.9)]
    assert behind_text(RATE.name, OURS, 0.9) == f"{RATE.name}: {OURS} is behind QEMU: 0.90"
    starts = results(Work("start-15t", Unit.SECONDS), qemu=[1], replication=[4])
    assert list(starts.behind(QEMU))
    assert not list(behind(starts)), "only the seconds count"
    code = (
        "import argparse, importlib.machinery as m, importlib.util as u, sys\n"
        "loader = m.SourceFileLoader('bench_script', sys.argv[1])\n"
        "script = u.module_from_spec(u.spec_from_loader('bench_script', loader))\n"
        "loader.exec_module(script)\n"
        "work = script.Work('free', script.Unit.RATE)\n"
        "samples = [script.Sample('free', 'qemu', 0, 2.0), script.Sample('free', 'own', 0, float(sys.argv[2]))]\n"
        "progress = script.Progress(script.Results([work], samples), 2)\n"
        "sys.exit(script.exit_code(argparse.Namespace(check=sys.argv[3] == 'check'), progress))\n"
    )
    for rate, check, expected in (("1", "check", 1), ("1", "", 0), ("2", "check", 0)):
        command = [sys.executable, "-c", code, str(BENCH), rate, check]
        assert subprocess.run(command, check=False, timeout=60).returncode == expected, (rate, check)


@pytest.mark.parametrize(("seconds", "reached"), [(4.9, True), (5.1, False), (None, None)])
def test_a_figure_of_seconds_alone_asks_nothing_of_qemu(seconds: float | None, reached: bool | None) -> None:
    figure = Figure(TIME.name, 0, at_most_s=5)
    verdict = verdict_of(results(TIME, qemu=[None], replication=[seconds]), figure)
    assert verdict.reached is reached
    assert wanted_text(figure) == "<= 5 s"


def test_a_figure_against_the_limit_does_not_look_at_qemu() -> None:
    verdict = verdict_of(results(RATE, qemu=[1], replication=[45], file=[100]), Figure(RATE.name, 0.5, LIMIT))
    assert (verdict.ratio, verdict.reached) == (0.45, False)


def test_a_verdict_says_what_the_limit_reaches_against_qemu() -> None:
    found = results(RATE, qemu=[10], replication=[20], file=[35])
    verdict = verdict_of(found, Figure(RATE.name, 4))
    assert (verdict.ratio, verdict.limit) == (2, 3.5)
    assert verdict_of(found, Figure(RATE.name, 0.5, LIMIT)).limit is None


def test_a_figure_that_qemu_cannot_produce_is_neither_reached_nor_missed() -> None:
    verdict = verdict_of(results(RATE, qemu=[None], replication=[10]), Figure(RATE.name, 4))
    assert verdict.reached is None
    assert verdict_text(verdict) == "nothing to compare"


def test_every_revision_has_a_verdict_of_its_own() -> None:
    found = verdicts(results(RATE, qemu=[1], old=[2], new=[5], file=[9]), [Figure(RATE.name, 4)])
    assert [(verdict.subject, verdict.reached) for verdict in found] == [("old", False), ("new", True)]


def test_figures_are_of_work_that_there_is_and_that_runs_usually() -> None:
    assert {figure.work for figure in FIGURES} <= {*USUAL, *OPERATIONS}


def test_usual_work_exists_and_is_named_once() -> None:
    assert set(USUAL) <= set(WORKLOADS)
    assert len(set(USUAL)) == len(USUAL)


# --- Workloads and fio ----------------------------------------------------------------------------------------


def test_a_workloads_name_says_what_is_done() -> None:
    assert Workload("guest", "randwrite", 4 * KIB, 16, fsync_every=8).name == "guest-randwrite-4k-16-fsync8"
    assert Workload("primary", "write", MIB, 1, warm=True).name == "primary-write-1m-1-warm"


def test_a_write_ends_after_one_pass_over_the_disk_and_a_read_only_with_its_time() -> None:
    write = fio.command(WORKLOADS["guest-write-1m-16"], "nbd:x", 1.5, 64 * MIB, 1)
    read = fio.command(WORKLOADS["guest-read-1m-16"], "nbd:x", 1.5, 64 * MIB, 1)
    assert f"--io_size={64 * MIB}" in write
    assert "--time_based" not in write
    assert "--time_based" in read
    assert "--runtime=1500ms" in write


def job(**directions: tuple[int, int, float]) -> dict[str, Any]:
    """A job of fio's with requests, milliseconds and p99 in ns of each direction."""
    found: dict[str, Any] = {"error": 0}
    for name in ("read", "write"):
        requests, runtime, p99 = directions.get(name, (0, 0, 0))
        percentile = {"50.000000": p99 / 2, "99.000000": p99}
        found[name] = {"total_ios": requests, "io_bytes": requests * 4096, "runtime": runtime}
        found[name]["clat_ns"] = {"percentile": percentile} if requests else {}
    return found


def test_fios_json_is_found_behind_what_the_nbd_engine_prints() -> None:
    found = fio.parse("fio: connected to NBD server\n" + json.dumps({"jobs": [job(write=(1000, 500, 80_000))]}))
    assert found == fio.FioResult(4096 * 1000, 1000, 0.5, 40, 80)


def test_mixed_work_counts_both_directions_and_the_slower_ones_latency() -> None:
    found = fio.parse(json.dumps({"jobs": [job(read=(700, 990, 10_000), write=(300, 1000, 50_000))]}))
    assert (found.requests, found.runtime_s, found.p99_us) == (1000, 1.0, 50)


@pytest.mark.parametrize(
    "output",
    ["", "fio: no", "{", "{}", '{"jobs": []}', json.dumps({"jobs": [job()]}), json.dumps({"jobs": [{"error": 5}]})],
)
def test_output_in_which_nothing_was_measured_is_an_error(output: str) -> None:
    with pytest.raises(fio.FioError):
        fio.parse(output)


def test_what_fio_complains_about_is_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(fio.FioError, match=r"fio ended with 1: .*No such file or directory"):
        fio.fill(f"nbd+unix:///x?socket={tmp_path}/nobody", MIB)


# --- Processes and disks --------------------------------------------------------------------------------------


def test_a_process_is_counted_with_those_that_it_has_started() -> None:
    script = "read line; sleep 60 & echo $!; read line; kill $!"
    shell = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert shell.stdin
    assert shell.stdout
    try:
        assert usage.with_children([shell.pid]) == [shell.pid]
        print(file=shell.stdin, flush=True)
        child = int(shell.stdout.readline())
        assert usage.with_children([shell.pid]) == [shell.pid, child]
    finally:
        shell.communicate("\n", timeout=30)


def test_processor_time_and_peak_memory_are_those_of_the_process() -> None:
    before_s = usage.processor_s([os.getpid()])
    usage.reset_peak([os.getpid()])
    small = usage.memory([os.getpid()])
    block = bytearray(os.urandom(64)) * MIB
    del block
    large = usage.memory([os.getpid()])
    while usage.processor_s([os.getpid()]) < before_s + 0.05:
        sum(range(10_000))
    assert large.peak - small.peak > 48 * MIB
    assert abs(large.private - small.private) < 48 * MIB


def test_full_disks_are_alike_and_cannot_be_compressed(tmp_path: Path) -> None:
    disks = Disks(tmp_path / "disks", full(8 * MIB))
    first, second = disks.disk("a").read_bytes(), disks.disk("b").read_bytes()
    assert first == second
    assert len(first) == 8 * MIB
    assert first[: 4 * MIB] != first[4 * MIB :]
    assert max(first.count(byte) for byte in range(256)) < 1.1 * len(first) / 256


def test_a_disk_is_made_once_and_a_folder_for_overlays_is_empty_each_time(tmp_path: Path) -> None:
    disks = Disks(tmp_path / "disks", sparse(MIB))
    disks.disk("a").write_bytes(b"kept")
    (disks.fresh("overlays") / "old").touch()
    assert disks.disk("a").read_bytes() == b"kept"
    assert not list(disks.fresh("overlays").iterdir())
    disks.remove_fresh()
    assert [path.name for path in disks.folder.iterdir()] == ["a.raw"]
    disks.remove()
    assert not disks.folder.exists()


# --- Output ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "value", "text"),
    [
        (RATE, 15_784.6, "15,785 /s"),
        (Work("x", Unit.RATE, 256 * KIB), 2000, "524 MB/s"),
        (TIME, 0.00164, "1.64 ms"),
        (TIME, 4.953, "4.95 s"),
    ],
)
def test_values_are_shown_with_a_unit_that_suits_them(work: Work, value: float, text: str) -> None:
    assert value_text(work, value) == text


def test_ratios_and_times_have_few_digits() -> None:
    assert [ratio_text(ratio) for ratio in (None, 0.284, 3016.4)] == ["-", "0.28", "3,016"]
    assert seconds_text(0.0101) == "10.1 ms"


def test_the_tables_show_medians_ratios_costs_and_verdicts() -> None:
    found = results(RATE, qemu=[10], replication=[50], file=[200])
    details = {"p50_us": 12.0, "p99_us": 34.0, "memory_peak": 5 * MIB, "memory_private": 3 * MIB}
    found.samples.append(Sample(RATE.name, OURS, 1, 50, details))
    found.samples.append(Sample(RATE.name, QEMU, 1, 10, {"p99_us": 68.0}))
    speed = text_of(speed_table(found))
    for text in ("10 /s", "50 /s", "200 /s", "5.00", "0.25", ">= 3 x QEMU, p99 1 x"):
        assert text in speed
    cost = text_of(cost_table(found))
    assert "2.00" in speed, "the p99"
    assert "12/34" in cost
    assert "5/3" in cost
    assert "NOT" not in text_of(figures_table(list(verdicts(found))))


def test_what_qemu_cannot_do_is_shown_with_its_reason() -> None:
    found = results(RATE, qemu=[None, None], replication=[1, 2])
    assert list(reasons(found)) == [f"{RATE.name}: qemu: failed: broken (2 of 2 rounds)"]
    assert "failed" in text_of(speed_table(found))


@pytest.mark.parametrize(
    ("reason", "failed", "text"),
    [("failed: x", True, "failed"), ("skipped: x", False, "skipped"), ("has no", False, "none")],
)
def test_a_cell_without_a_value_says_in_a_word_why(reason: str, failed: bool, text: str) -> None:
    found = Results([RATE], [Sample(RATE.name, OURS, 0, None, reason=reason, failed=failed)])
    assert cell_text(found, RATE, OURS) == text


def test_the_plot_has_the_ratios_the_limit_and_what_is_wanted() -> None:
    data = bars(results(RATE, qemu=[10], replication=[50], file=[200]))
    assert data.works == [RATE.name]
    assert data.ratios == {OURS: [5], LIMIT: [20]}
    assert data.wanted == [3]


def test_there_is_no_plot_without_anything_to_compare(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        plot(results(RATE, replication=[50]), tmp_path / "plot.png")


def test_the_plot_is_a_png_of_a_readable_size(tmp_path: Path) -> None:
    plot(results(RATE, qemu=[10], replication=[50], file=[None]), tmp_path / "plot.png")
    content = (tmp_path / "plot.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert width > 800
    assert height > 200


# --- Checkpoints beside fio ------------------------------------------------------------------------------------


class Fake(Subject):
    """A subject whose checkpoints are only counted, or fail."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(OURS)
        self.taken = Semaphore(0)
        self._error = error

    def checkpoint(self) -> None:
        self.taken.release()
        if self._error is not None:
            raise self._error


def plan_in(folder: Path) -> Plan:
    """A plan that nobody listens to."""
    return Plan([], folder, 16 * MIB, 0.3, 1, lambda sample: None, lambda subject, text: None)


@pytest.mark.parametrize(("name", "checkpoints"), [("guest-write-1m-1", 1), ("guest-read-1m-1", 0)])
def test_overlays_are_emptied_before_each_run_that_writes(tmp_path: Path, name: str, checkpoints: int) -> None:
    fake = Fake()
    for round_ in range(2):
        prepare(plan_in(tmp_path), WORKLOADS[name], fake, round_)
    assert sum(fake.taken.acquire(blocking=False) for _ in range(10)) == 2 * checkpoints


def test_subjects_take_turns_in_being_the_first_of_a_round(tmp_path: Path) -> None:
    plan = replace(plan_in(tmp_path), specs=[Spec(QEMU), Spec(OURS), Spec(LIMIT)])
    orders = [[spec.name for spec in plan.turn(round_)] for round_ in range(4)]
    assert [order[0] for order in orders] == [QEMU, OURS, LIMIT, QEMU]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_checkpoints_are_taken_for_as_long_as_fio_runs() -> None:
    fake = Fake()
    checkpoints = Checkpoints(fake)
    with checkpoints.beside(os.getpid()):
        assert fake.taken.acquire(timeout=30)
        assert fake.taken.acquire(timeout=30)
    details = checkpoints.details()
    assert details["checkpoints"] >= 2
    before = details["checkpoints"] - 2
    assert sum(fake.taken.acquire(blocking=False) for _ in range(1000)) == before


def test_a_failed_checkpoint_is_raised_when_fio_has_ended() -> None:
    fake = Fake(QmpError("Backup job was cancelled unexpectedly", "GenericError"))
    with pytest.raises(QmpError, match="Backup job"), Checkpoints(fake).beside(os.getpid()):
        assert fake.taken.acquire(timeout=30)


# --- The command line -----------------------------------------------------------------------------------------


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the programme to its end."""
    return subprocess.run([sys.executable, BENCH, *arguments], check=False, capture_output=True, text=True, timeout=60)


def test_the_list_marks_what_is_usual_and_what_has_a_figure() -> None:
    done = bench("--list")
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert "* primary-randwrite-4k-16  (figure)" in lines
    assert "  primary-write-64k-1" in lines
    assert "* start-1t" in lines


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--only", "nonsense"], "no work is called 'nonsense'; --list shows the names"),
        (["--size", "3M"], "'3M' is not a size in steps of 4 MiB"),
        (["--seconds", "0"], "'0' is not a number of seconds"),
        (["--rounds", "many"], "'many' is not a number from 1 to 1000"),
        (["--plugin", "/nowhere/plugin.py"], "there is no file /nowhere/plugin.py"),
        (["--skip", "replication"], "only qemu and file can be left out"),
        (["--plugin", f"qemu={BENCH}"], "'qemu' is no name, or there are two of it"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], text: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert text in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_disks_that_do_not_fit_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    done = bench("--only", "guest-read-4k-1", "--size", "900000G", "--folder", str(tmp_path))
    assert done.returncode == 2
    assert "choose another --folder or a smaller --size" in done.stderr
    assert not list(tmp_path.iterdir())


def test_room_for_disks_counts_two_disks_and_two_overlays_of_each_pair() -> None:
    # Stated in docs/benchmark.md, and what check_room relies on.
    done = bench("--only", "guest-read-4k-1", "--size", "900000G", "--skip", "qemu", "--folder", "/tmp")
    needed = float(done.stderr.split("the disks need ")[1].split(":")[0])
    assert needed == pytest.approx((1 + 1 + 4) * 900_000 + 512 * MIB / GIB, rel=1e-6)
