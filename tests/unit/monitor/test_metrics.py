# SPDX-License-Identifier: BSD-3-Clause
"""The metrics of fake nodes; and that documentation, alerts and dashboard name no other ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from checkout import REPOSITORY
from fakenode import FakeNode
from replication.fault import Case
from replication.monitor import metrics
from replication.monitor.fleet import Fleet, Found
from replication.primary.link import LinkState
from replication.stage import Mode, Stage
from waiting import wait_until

Nodes = Callable[..., FakeNode]
Fleets = Callable[..., Fleet]
PREFIX = "nbdkit_replication_"


def values(fleet: Fleet) -> dict[str, dict[tuple[str, ...], float]]:
    """Of each metric, its values by their labels other than `node`, which is first."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(metrics.render(fleet).decode()):
        for sample in family.samples:
            others = tuple(value for key, value in sorted(sample.labels.items()) if key != "node")
            key = (sample.labels.get("node", ""), *others)
            assert key not in found.setdefault(sample.name.removeprefix(PREFIX), {})
            found[sample.name.removeprefix(PREFIX)][key] = sample.value
    return found


def all_up(fleet: Fleet) -> dict[str, dict[tuple[str, ...], float]]:
    wait_until(lambda: all(watcher.sight.up for watcher in fleet.watchers()), "all are up")
    return values(fleet)


JOB = {"id": "resync-disk0", "type": "resync", "status": "running", "current-progress": 25, "total-progress": 100}


def test_a_pair(node: Nodes, fleet: Fleets) -> None:
    first, second = node("a"), node("b", "secondary", **{"last-verify": {"time": 5, "different-bytes": 4096}})
    first.answers["query-jobs"] = [JOB]
    first.answers["query-replication"]["guest-stalls"] = {"bounds": [0.001, 0.01], "counts": [3, 2, 1], "sum": 0.5}
    watched = fleet({"a": str(first.path), "b": str(second.path)})
    found = all_up(watched)
    assert found["up"] == {("a",): 1, ("b",): 1}
    assert found["role"] == {("a", "primary"): 1, ("a", "secondary"): 0, ("b", "primary"): 0, ("b", "secondary"): 1}
    assert sum(value for key, value in found["stage"].items() if key[0] == "a") == 1
    assert found["stage"]["a", "running"] == 1
    assert found["link_state"]["b", "in-sync"] == 1
    assert found["link_state"]["b", "lost"] == 0
    assert found["checkpoint_timestamp_seconds"]["a",] == first.answers["query-replication"]["checkpoint"]["time"]
    assert found["forward_queue_bytes"] == {("a", "disk0"): 4096}
    assert found["written_bytes_total"] == {("a", "disk0"): 20, ("b", "disk0"): 2}
    assert found["read_bytes_total"] == {("a", "disk0"): 10, ("b", "disk0"): 1}
    assert found["forwarded_bytes_total"] == {("a", "disk0"): 30}
    assert found["received_bytes_total"] == {("b", "disk0"): 4}
    assert found["overlay_bytes"] == {("b", "disk0", "active"): 4096, ("b", "disk0", "hidden"): 8192}
    assert found["resync_running"] == {("a", "resync-disk0"): 1}
    assert found["resync_done_bytes"] == {("a", "resync-disk0"): 25}
    assert found["resync_size_bytes"] == {("a", "resync-disk0"): 100}
    assert found["failover_allowed"] == {("b",): 1}
    assert found["last_verify_different_bytes"] == {("b",): 4096}
    assert found["guest_stall_seconds_bucket"] == {("a", "0.001"): 3, ("a", "0.01"): 5, ("a", "+Inf"): 6}
    assert found["guest_stall_seconds_sum"] == {("a",): 0.5}
    first.emit("REPLICATION_CHECKPOINT", epoch=8, duration=0.004)
    first.emit("REPLICATION_ERROR", case=8, disk="disk0", count=3, first=1.0)
    wait_until(lambda: values(watched)["errors_total"]["a", "8"] == 3, "the failures are counted")
    assert values(watched)["checkpoint_duration_seconds_bucket"]["a", "0.005"] == 1


def test_a_node_that_is_gone_claims_nothing(node: Nodes, fleet: Fleets) -> None:
    there = node()
    watched = fleet({"a": str(there.path)})
    before = all_up(watched)
    there.die()
    wait_until(lambda: values(watched)["up"]["a",] == 0, "it is down")
    found = values(watched)
    assert found["checkpoint_timestamp_seconds"] == before["checkpoint_timestamp_seconds"]
    assert {name for name, of in found.items() if any(key[0] == "a" for key in of)} <= {
        "up",
        "look_timestamp_seconds",
        "checkpoint_timestamp_seconds",
        "errors_total",
        *(f"checkpoint_duration_seconds_{part}" for part in ("bucket", "sum", "count")),
    }


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"disks": 5, "link": [], "checkpoint": "never", "error": {}},
        {"disks": [5, {"name": 7, "size": "big", "totals": []}, {"name": "x", "size": True}, {"name": "x"}]},
        {"mode": ["primary"], "stage": 7, "consistent": "yes", "epoch": 10**400},
        {"stage": 'a-stage\n of a later"version\\', "guest-stalls": {"bounds": [1], "counts": [1, "x"], "sum": 1}},
    ],
)
def test_whatever_one_answers_the_figures_of_the_other_are_complete(
    node: Nodes, fleet: Fleets, odd: dict[str, Any]
) -> None:
    strange, sound = node("a"), node("b")
    strange.answers["query-replication"] = odd
    strange.answers["query-jobs"] = [{"type": "resync"}, 7, {"type": "resync", "total-progress": {}}]
    found = all_up(fleet({"a": str(strange.path), "b": str(sound.path)}))
    assert found["written_bytes_total"]["b", "disk0"] == 20
    assert found["up"]["a",] == 1


def test_the_guest_of_an_owner_stands_still(node: Nodes, fleet: Fleets) -> None:
    stands = {"guest-suspended": "nobody has promoted it"}
    nodes = {
        "a": node("a", **stands),
        "b": node("b", "secondary", **stands),
        "c": node("c", "secondary", stage="done", **stands),
        "d": node("d", **{"guest-suspended": None}),
        "e": node("e", **stands, **{"guest-suspended-reason": {"code": "not-promoted", "reason": "x"}}),
        "f": node("f", **stands, **{"guest-suspended-reason": {"code": "fencing", "reason": "x"}}),
        "old": node("old"),
    }
    found = all_up(fleet({name: str(there.path) for name, there in nodes.items()}))
    assert found["guest_suspended"] == {("a",): 1, ("b",): 0, ("c",): 1, ("d",): 0, ("e",): 0, ("f",): 1}


def test_split_brain_by_code_and_by_words(node: Nodes, fleet: Fleets) -> None:
    link = {"state": "lost", "reason": "split brain: both sides have taken writes since they parted"}
    first, second = node("a", link=link), node("b", link={"state": "lost", "reason": "-", "code": "split-brain"})
    third = node("c", link={"state": "lost", "reason": "Connection refused"})
    found = all_up(fleet({"a": str(first.path), "b": str(second.path), "c": str(third.path)}))
    assert found["split_brain"] == {("a",): 1, ("b",): 1, ("c",): 0}


def test_the_values_are_those_of_the_node() -> None:
    assert set(metrics.ROLES) == {mode.value for mode in Mode}
    assert set(metrics.STAGES) == {stage.value for stage in Stage}
    assert set(metrics.LINK_STATES) == {state.value for state in LinkState}
    assert set(metrics.CASES) == {str(case.value) for case in Case}


# What names them

FAMILIES = {
    sample
    for family in text_string_to_metric_families(metrics.render(Fleet(lambda: Found({}))).decode())
    for sample in [family.name.removeprefix(PREFIX) + ("_total" if family.type == "counter" else "")]
}


def named(text: str) -> set[str]:
    """The metrics that a text names, histograms by their family."""
    found = set(re.findall(rf"\b{PREFIX}([a-z0-9_]+)", text))
    return {re.sub(r"^(.*_seconds)_(?:bucket|sum|count)$", r"\1", name) for name in found}


def test_the_documentation_names_every_metric_and_no_other() -> None:
    text = (REPOSITORY / "docs/monitoring.md").read_text()
    stated = set(re.findall(rf"^\| `{PREFIX}([a-z0-9_]+)", text, re.MULTILINE))
    assert stated == FAMILIES
    assert named(text) - {"up"} <= FAMILIES


def test_alerts_and_dashboard_name_metrics_that_exist() -> None:
    for name in ("alerts.yml", "alerts_test.yml", "grafana.json"):
        text = (REPOSITORY / "monitoring" / name).read_text()
        assert named(text), name
        assert named(text) <= FAMILIES, name


def test_every_alert_is_tested_and_documented() -> None:
    alerts = re.findall(r"alert: (\w+)", (REPOSITORY / "monitoring/alerts.yml").read_text())
    tested = (REPOSITORY / "monitoring/alerts_test.yml").read_text()
    documented = re.findall(r"^\| `(Replication\w+)`", (REPOSITORY / "docs/monitoring.md").read_text(), re.MULTILINE)
    assert sorted(alerts) == sorted(documented)
    assert all(f"alertname: {alert}\n        exp_alerts:" in tested for alert in alerts)


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads((REPOSITORY / "monitoring/grafana.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(target["expr"] for panel in panels for target in panel["targets"])
