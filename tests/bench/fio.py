# SPDX-License-Identifier: BSD-3-Clause
"""fio with its NBD engine: the command line of a workload, and what a run of it has measured."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import nbd

from bench.workloads import READS_OF_MIXED, Workload

FILL_S = 240.0
"""Longest time for filling an overlay."""
STARTUP_S = 60.0
"""Added to a run's own time before it counts as stuck."""


class FioError(Exception):
    """fio failed, or said what cannot be understood; the text is for the user."""


@dataclass(frozen=True)
class FioResult:
    """What fio saw; times in seconds unless the name says otherwise."""

    bytes: int
    requests: int
    runtime_s: float
    p50_us: float
    p99_us: float


def command(workload: Workload, uri: str, seconds: float, size: int, seed: int) -> list[str]:
    """fio's command line for a disk of `size` bytes.

    A run that writes ends when it has moved as many bytes as the disk has, also before `seconds` are over: after that
    the overlays would have everything already, and the faster server would be measured mostly in this easier state.
    """
    arguments = {
        "name": workload.name,
        "ioengine": "nbd",
        "uri": uri,
        "rw": workload.pattern,
        "bs": str(workload.block),
        "iodepth": str(workload.depth),
        "runtime": f"{round(seconds * 1000)}ms",
        "randseed": str(seed),
        "output-format": "json",
        "percentile_list": "50:99",
    }
    if workload.writes:
        arguments["io_size"] = str(size)
    flags = ["norandommap", "thread"]
    if workload.pattern == "randrw":
        arguments["rwmixread"] = str(READS_OF_MIXED)
    if workload.fsync_every:
        arguments["fsync"] = str(workload.fsync_every)
    if not workload.writes:
        flags.append("time_based")
    return ["fio", *(f"--{key}={value}" for key, value in arguments.items()), *(f"--{flag}" for flag in flags)]


def fill(uri: str, length: int) -> None:
    """Write the first `length` bytes with random data, in order; raises FioError."""
    _write(uri, length, {"rw": "write", "bs": "1m", "size": str(length)})


def scatter(uri: str, length: int) -> None:
    """Write `length` bytes of random data in pieces of 4 KiB at random places; raises FioError."""
    _write(uri, length, {"rw": "randwrite", "bs": "4k", "io_size": str(length)})


def _write(uri: str, length: int, more: dict[str, str]) -> None:
    arguments = {"name": "fill", "ioengine": "nbd", "uri": uri, "iodepth": "16", "refill_buffers": "1", **more}
    arguments["output-format"] = "json"
    result = run(["fio", *(f"--{key}={value}" for key, value in arguments.items()), "--thread"], FILL_S)
    if result.bytes != length:
        raise FioError(f"fio has written {result.bytes} bytes instead of {length}")


Beside = Callable[[int], AbstractContextManager[object]]
"""Makes, from fio's pid, what lasts as long as fio."""


def run(arguments: list[str], seconds: float, beside: Beside = lambda pid: nullcontext()) -> FioResult:
    """Run fio to its end; raises what `beside` does, and FioError, also when it takes a minute more than `seconds`."""
    # fio leaves files beside itself when it is asked for logs, and some versions always do.
    with tempfile.TemporaryDirectory(prefix="fio-") as folder:
        process = subprocess.Popen(
            arguments,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            with beside(process.pid):
                output, errors = process.communicate(timeout=seconds + STARTUP_S)
        except subprocess.TimeoutExpired:
            raise FioError(f"fio did not end within {seconds + STARTUP_S:g} s") from None
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
    if process.returncode != 0:
        said = (errors.strip() or output.strip()).splitlines()
        raise FioError(f"fio ended with {process.returncode}: {said[0] if said else 'no message'}")
    return parse(output)


def parse(output: str) -> FioResult:
    """What `--output-format=json` has printed; FioError if there is nothing measured in it."""
    begin = output.find("{")  # "fio: connected to NBD server" and notes come before it
    if begin < 0:
        raise FioError(f"fio printed no JSON: {output.strip()[:200]!r}")
    try:
        job = json.loads(output[begin:])["jobs"][0]
    except (ValueError, LookupError) as error:
        raise FioError(f"fio printed JSON that lacks a job: {error}") from error
    if job.get("error"):
        raise FioError(f"fio's job failed with errno {job['error']}")
    directions = [job[name] for name in ("read", "write") if job[name]["total_ios"]]
    runtime_s = max((part["runtime"] for part in directions), default=0) / 1000
    if not runtime_s:
        raise FioError("fio did nothing that takes a millisecond: make the disk or the time larger")
    return FioResult(
        bytes=sum(part["io_bytes"] for part in directions),
        requests=sum(part["total_ios"] for part in directions),
        runtime_s=runtime_s,
        p50_us=max(_percentile_us(part, "50.000000") for part in directions),
        p99_us=max(_percentile_us(part, "99.000000") for part in directions),
    )


def _percentile_us(part: dict[str, Any], name: str) -> float:
    """A percentile of the completion latency in microseconds; 0 where fio was not asked for any."""
    return float(part["clat_ns"].get("percentile", {}).get(name, 0)) / 1000


def read(uri: str, offset: int, length: int) -> bytes:
    """What an export shows; nbd.Error."""
    handle = nbd.NBD()
    handle.connect_uri(uri)
    try:
        return bytes(handle.pread(length, offset))
    finally:
        handle.shutdown()
