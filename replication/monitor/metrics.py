# SPDX-License-Identifier: BSD-3-Clause
"""What Prometheus reads: one set of families over the last look at each node.

Invariants: a state is one series for each value that it may have, 0 or 1; a time is a time, never an age, so that a
monitor that stands still does not look fine; counters are the node's own. A node that is down has `up` 0, the time of
its last checkpoint and its counters of events, and nothing that would claim to be its present state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from replication.monitor.fleet import Fleet
from replication.monitor.journal import BUCKETS_S, Histogram
from replication.monitor.sight import Json, Sight, members, number, text
from replication.monitor.watcher import Watcher

PREFIX = "nbdkit_replication"
CONTENT_TYPE = CONTENT_TYPE_LATEST

ROLES = ("primary", "secondary")
STAGES = ("none", "running", "failover", "failover-failed", "done")
LINK_STATES = ("connecting", "synchronizing", "in-sync", "lost", "disconnected")
CASES = tuple(str(case) for case in range(1, 9))
"""Of REPLICATION_ERROR: docs/failures.md."""

JOB_TYPES = ("resync", "commit", "verify")

Labels = tuple[str, ...]
Value = tuple[Labels, float | None]


def render(fleet: Fleet) -> bytes:
    """All metrics of all nodes, in the text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(fleet))
    return bytes(generate_latest(registry))


class _Collector(Collector):
    """What prometheus_client asks."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """The families."""
        watchers = self._fleet.watchers()
        sights = [watcher.sight for watcher in watchers]
        yield from _nodes(sights)
        yield from _disks([sight for sight in sights if sight.up])
        yield from _jobs([sight for sight in sights if sight.up])
        yield from _reports([sight for sight in sights if sight.up])
        yield from _counted(watchers)
        broken = GaugeMetricFamily(
            f"{PREFIX}_monitor_config_errors", "Whether the monitor cannot read which nodes there are (1) or can (0)."
        )
        broken.add_metric([], float(self._fleet.trouble is not None))
        yield broken


def _gauge(name: str, help_text: str, labels: Sequence[str], values: Iterable[Value]) -> Metric:
    return _filled(GaugeMetricFamily(f"{PREFIX}_{name}", help_text, labels=labels), values)


def _counter(name: str, help_text: str, labels: Sequence[str], values: Iterable[Value]) -> Metric:
    return _filled(CounterMetricFamily(f"{PREFIX}_{name}", help_text, labels=labels), values)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Iterable[Value]) -> Metric:
    """Without what is not known, and the first of what has one name twice."""
    seen = set()
    for labels, value in values:
        if value is not None and labels not in seen:
            seen.add(labels)
            family.add_metric(labels, value)
    found: Metric = family
    return found


def _nodes(sights: list[Sight]) -> Iterator[Metric]:
    """Figures of a node as a whole."""
    up = [sight for sight in sights if sight.up]

    def each(value: Callable[[Sight], float | None], of: list[Sight] = up) -> Iterator[Value]:
        return (((sight.name,), value(sight)) for sight in of)

    def states(
        name: str, label: str, help_text: str, known: tuple[str, ...], state: Callable[[Sight], str | None]
    ) -> Metric:
        # A state that a later version has added is a series as well.
        values: list[Value] = []
        for sight in up:
            current = state(sight)
            if current is not None:
                values += [((sight.name, one), float(one == current)) for one in dict.fromkeys((*known, current))]
        return _gauge(name, help_text, ("node", label), values)

    yield _gauge(
        "up", "Whether the node answers (1) or not (0).", ("node",), each(lambda sight: float(sight.up), sights)
    )
    yield _gauge(
        "look_timestamp_seconds",
        "When the monitor last learned something of the node, or of its absence.",
        ("node",),
        each(lambda sight: sight.looked, sights),
    )
    yield _gauge(
        "info",
        "What does not change while a node runs: its id, its peer's id and its version; always 1.",
        ("node", "id", "peer", "version"),
        (
            (
                (
                    sight.name,
                    text(sight.answer.get("node")) or "",
                    text(sight.answer.get("peer-node")) or "",
                    sight.version or "",
                ),
                1.0,
            )
            for sight in up
        ),
    )
    yield states("role", "role", "Which half of the pair the node is.", ROLES, lambda sight: sight.mode)
    yield states("stage", "stage", "The stage of the node.", STAGES, lambda sight: sight.stage)
    yield states("link_state", "state", "The state of the link.", LINK_STATES, lambda sight: sight.link)
    yield _gauge(
        "consistent",
        "Whether there is a valid checkpoint to go back to (secondary), 1 on a primary.",
        ("node",),
        each(lambda sight: _truth(sight.answer.get("consistent"))),
    )
    yield _gauge(
        "outdated",
        "Whether the node has learnt that another went on without it.",
        ("node",),
        each(lambda sight: _truth(sight.answer.get("outdated"))),
    )
    yield _gauge(
        "guest_suspended",
        "Whether the guest of an owner of disks stands still: its requests wait, or fail, as it says in the status.",
        ("node",),
        each(_guest_suspended),
    )
    yield _gauge(
        "split_brain",
        "Whether the link is refused because both nodes have gone on by themselves.",
        ("node",),
        each(lambda sight: _truth(sight.split_brain)),
    )
    yield _gauge(
        "error",
        "Whether a failure is latched: what `replctl error` reports.",
        ("node",),
        each(lambda sight: float(sight.answer["error"] is not None) if "error" in sight.answer else None),
    )
    yield _gauge(
        "checkpoint_obstacle",
        "Whether a checkpoint would be refused now (secondary).",
        ("node",),
        each(
            lambda sight: (
                float(sight.answer["checkpoint-obstacle"] is not None)
                if "checkpoint-obstacle" in sight.answer
                else None
            )
        ),
    )
    yield _gauge(
        "failover_allowed",
        "Whether a failover would be done without force (secondary).",
        ("node",),
        each(lambda sight: _truth(sight.failover.get("allowed"))),
    )
    yield _gauge(
        "failover_predicted_seconds",
        "How long the commit after a failover would take now (secondary).",
        ("node",),
        each(lambda sight: number(sight.failover.get("predicted-seconds"))),
    )
    yield _gauge(
        "failover_commit_bytes",
        "How much a failover would commit now (secondary).",
        ("node",),
        each(lambda sight: number(sight.failover.get("bytes-to-commit"))),
    )
    yield _gauge(
        "epoch",
        "The number of the last checkpoint.",
        ("node",),
        each(lambda sight: number(sight.answer.get("epoch"))),
    )
    yield _gauge(
        "checkpoint_timestamp_seconds",
        "When the last checkpoint was taken; also of a node that is down, as far as it is known.",
        ("node",),
        each(lambda sight: sight.checkpoint_time, sights),
    )


def _truth(value: object) -> float | None:
    return float(value) if isinstance(value, bool) else None


def _guest_suspended(sight: Sight) -> float | None:
    if "guest-suspended" not in sight.answer:
        return None  # of an older version
    if members(sight.answer.get("guest-suspended-reason")).get("code") == "not-promoted":
        return 0.0  # nobody has decided yet that there is to be one
    owns = sight.mode == "primary" or sight.stage in ("failover", "failover-failed", "done")
    return float(owns and sight.answer["guest-suspended"] is not None)


def _disks(sights: list[Sight]) -> Iterator[Metric]:
    """Figures of a disk."""

    def each(*keys: str) -> Iterator[Value]:
        for sight in sights:
            for name, disk in sight.disks:
                totals = members(disk.get("totals"))
                found = [value for key in keys if (value := number(totals.get(key, disk.get(key)))) is not None]
                yield (sight.name, name), found[0] if found else None

    labels = ("node", "disk")
    yield _gauge("size_bytes", "The size of the disk.", labels, each("size"))
    yield _gauge("forward_queue_bytes", "What waits to be sent to the secondary.", labels, each("forward-queue-bytes"))
    yield _gauge(
        "out_of_sync_bytes",
        "What the secondary lacks (on a primary), or what this disk has lost (on a secondary).",
        labels,
        each("out-of-sync-bytes"),
    )
    for name, what, end in (
        ("overlay_bytes", "What the overlay holds.", "bytes"),
        ("overlay_limit_bytes", "What the overlay can hold, by the room that its file system has.", "limit-bytes"),
    ):
        yield _gauge(
            name,
            what,
            (*labels, "overlay"),
            (
                ((sight.name, disk_name, overlay), number(disk.get(f"{overlay}-{end}")))
                for sight in sights
                for disk_name, disk in sight.disks
                for overlay in ("active", "hidden")
            ),
        )
    yield _counter("read_bytes", "Read by the guest since the start.", labels, each("read", "guest-read"))
    yield _counter("written_bytes", "Written by the guest since the start.", labels, each("written", "guest-written"))
    yield _counter("forwarded_bytes", "Sent to the secondary since the start.", labels, each("forwarded"))
    yield _counter("received_bytes", "Taken from the primary since the start.", labels, each("target-written"))


def _jobs(sights: list[Sight]) -> Iterator[Metric]:
    """Progress of the jobs that end."""
    for kind in JOB_TYPES:
        jobs = [
            ((sight.name, text(job.get("id")) or "?"), job)
            for sight in sights
            for job in sight.jobs
            if job.get("type") == kind
        ]
        labels = ("node", "job")
        yield _gauge(
            f"{kind}_running",
            f"1 while the {kind} is at work, 0 when it has ended with an error.",
            labels,
            ((name, float(job.get("status") not in ("concluded", "null"))) for name, job in jobs),
        )
        for end, what, key in (
            ("done_bytes", "How much of the {} is done.", "current-progress"),
            ("size_bytes", "How much the {} has to do altogether.", "total-progress"),
        ):
            yield _gauge(
                f"{kind}_{end}", what.format(kind), labels, ((name, number(job.get(key))) for name, job in jobs)
            )


def _reports(sights: list[Sight]) -> Iterator[Metric]:
    """The last verify and the last test of a failover, of nodes that report them."""

    def each(report: str, *keys: str) -> Iterator[Value]:
        for sight in sights:
            found = members(sight.answer.get(report))
            values = [number(found.get(key)) for key in keys]
            yield (sight.name,), next((value for value in values if value is not None), None)

    def succeeded(report: str) -> Iterator[Value]:
        for sight in sights:
            result = members(sight.answer.get(report)).get("result")
            yield (sight.name,), None if result is None else float(result in ("equal", "ok", "passed", "success", True))

    for report, what in (("verify", "comparison of the two disks"), ("test", "test of a failover")):
        yield _gauge(
            f"last_{report}_timestamp_seconds",
            f"When the last {what} ended.",
            ("node",),
            each(f"last-{report}", "time"),
        )
        yield _gauge(
            f"last_{report}_success", f"Whether the last {what} went well.", ("node",), succeeded(f"last-{report}")
        )
    yield _gauge(
        "last_verify_different_bytes",
        "What differed at the last comparison of the two disks.",
        ("node",),
        each("last-verify", "different-bytes"),
    )


def _counted(watchers: list[Watcher]) -> Iterator[Metric]:
    """What the monitor has counted itself, or what a node has, as histograms."""
    errors: list[Value] = []
    durations = HistogramMetricFamily(
        f"{PREFIX}_checkpoint_duration_seconds",
        "How long checkpoints took, as far as the monitor has seen them.",
        labels=("node",),
    )
    stalls = HistogramMetricFamily(
        f"{PREFIX}_guest_stall_seconds",
        "How long all requests of the guest were held back at a stretch, by checkpoints and other commands.",
        labels=("node",),
    )
    for watcher in watchers:
        counts = watcher.journal.errors()
        errors += [((watcher.name, case), float(counts.get(case, 0))) for case in dict.fromkeys((*CASES, *counts))]
        _add_histogram(durations, watcher.name, watcher.journal.durations())
        _add_told_histogram(stalls, watcher.name, members(watcher.sight.answer.get("guest-stalls")))
    yield _counter("errors", "Failures by their case, as docs/failures.md numbers them.", ("node", "case"), errors)
    yield durations
    yield stalls


def _add_histogram(family: HistogramMetricFamily, name: str, histogram: Histogram) -> None:
    so_far = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*BUCKETS_S, None), histogram.counts, strict=True):
        so_far += count
        buckets.append(("+Inf" if bound is None else str(float(bound)), float(so_far)))
    family.add_metric([name], buckets=buckets, sum_value=histogram.sum_s)


def _add_told_histogram(family: HistogramMetricFamily, name: str, told: Json) -> None:
    """query-replication's form: `bounds` in seconds, one more of `counts`, `sum` in seconds."""
    bounds, counts, total = told.get("bounds"), told.get("counts"), number(told.get("sum"))
    if not isinstance(bounds, list) or not isinstance(counts, list) or total is None:
        return
    limits, numbers = [number(bound) for bound in bounds], [number(count) for count in counts]
    if len(numbers) != len(limits) + 1 or len(limits) > 100 or None in limits or None in numbers:
        return
    so_far = 0.0
    buckets = []
    for bound, count in zip((*limits, None), numbers, strict=True):
        so_far += count or 0.0
        buckets.append(("+Inf" if bound is None else str(bound), so_far))
    family.add_metric([name], buckets=buckets, sum_value=total)
