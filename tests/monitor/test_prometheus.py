# SPDX-License-Identifier: BSD-3-Clause
"""With Prometheus itself: its checks of names and rules, and a server of its that scrapes. `make test-monitor`."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from certificates import reserved_port
from checkout import REPOSITORY
from fakenode import FakeNode
from lab import Lab
from process import Process
from replication.monitor import metrics
from replication.monitor.access import make_access
from replication.monitor.fleet import Fleet, Found
from replication.monitor.web import WebServer
from waiting import DEADLINE_S, begin, wait_until


def promtool(*arguments: str, folder: Path = REPOSITORY / "monitoring", text: str | None = None) -> None:
    done = subprocess.run(
        ["promtool", *arguments],
        cwd=folder,
        input=text,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lint" not in done.stderr


def fleet_of(lab: Lab) -> Fleet:
    """A fake pair, and a node that is not there."""
    for name, mode in (("a", "primary"), ("b", "secondary")):
        FakeNode(lab.folder / name, mode).start()
    fleet = Fleet(lambda: Found({name: str(lab.folder / name) for name in ("a", "b", "c")}))
    fleet.start()
    wait_until(lambda: sum(watcher.sight.up for watcher in fleet.watchers()) == 2, "the pair is up")
    return fleet


def test_the_names_and_texts_are_as_prometheus_wants_them(lab: Lab) -> None:
    fleet = fleet_of(lab)
    promtool("check", "metrics", text=metrics.render(fleet).decode())
    fleet.stop()


def test_the_alerts() -> None:
    promtool("check", "rules", "alerts.yml")
    promtool("test", "rules", "alerts_test.yml")


class Prometheus(Process):
    """A server that scrapes `port` every second."""

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(folder, "prometheus")
        self.listener, self.port = reserved_port()
        self.config = folder / "prometheus.yml"
        target = {"job_name": "nbdkit-replication", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(REPOSITORY / "monitoring/alerts.yml")],
            "scrape_configs": [target],
        }
        self.config.write_text(json.dumps(config))
        self.folder = folder

    def command(self) -> list[str]:
        return [
            "prometheus",
            f"--config.file={self.config}",
            f"--storage.tsdb.path={self.folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--log.level=error",
        ]

    def start(self) -> Any:
        self.listener.close()
        return super().start()

    def wait_ready(self) -> None:
        def ready() -> bool:
            try:
                return bool(self.get("/-/ready"))
            except OSError:
                return False

        wait_until(ready, "Prometheus is ready")

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=DEADLINE_S) as answer:
            return str(answer.read().decode())

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        found = json.loads(self.get(f"/api/v1/query?query={urllib.parse.quote(expression)}"))["data"]["result"]
        return [(one["metric"], float(one["value"][1])) for one in found]


def test_a_real_prometheus_scrapes_and_evaluates(lab: Lab) -> None:
    fleet = fleet_of(lab)
    server = WebServer(fleet, make_access("127.0.0.1:0"))
    serving = begin(server.serve_forever, 0.05)
    prometheus = lab.start(Prometheus(lab.folder, server.server_port))
    wait_until(lambda: prometheus.query("sum(nbdkit_replication_up)") == [({}, 2.0)], "it has scraped")
    assert prometheus.query("up") == [
        ({"__name__": "up", "instance": f"127.0.0.1:{server.server_port}", "job": "nbdkit-replication"}, 1.0)
    ]
    [(labels, value)] = prometheus.query('nbdkit_replication_written_bytes_total{node="a"}')
    assert (labels["disk"], value) == ("disk0", 20)
    pending = 'ALERTS{alertname="ReplicationNodeDown", node="c"}'
    wait_until(lambda: prometheus.query(pending), "the node that is not there raises an alert")
    assert prometheus.query('ALERTS{node="a"}') == []
    for panel in json.loads((REPOSITORY / "monitoring/grafana.json").read_text())["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$instance", ".*").replace("$node", ".*")
            prometheus.query(expression.replace("$__rate_interval", "1m"))
    server.shutdown()
    serving.result(DEADLINE_S)
    server.server_close()
    fleet.stop()
