"""The Helm chart, rendered by Helm itself and checked against Kubernetes's schemas."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_core.layered_settings import load_settings
from fedmezo_worker.worker_settings import WorkerSettings
from tests.deploy.tools import DEPLOY, TOOLS, needs_tools

CHART = DEPLOY / "helm/fedmezo"
CONFIG = (DEPLOY / "compose/run.toml").read_text()
WORKER = {"name": "clinic-a", "joinSecret": "a-join", "dataClaim": "a", "data": "/data/rows.jsonl"}


def rendered(values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("render_chart.py")
    return subprocess.run(
        [f"{TOOLS}/python", str(script), str(CHART)],
        input=json.dumps(values),
        capture_output=True,
        text=True,
    )


def documents(values: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    done = rendered(values)
    assert done.returncode == 0, done.stderr
    return {(one["kind"], one["metadata"]["name"]): one for one in json.loads(done.stdout)}


@needs_tools
def test_one_run_with_workers_of_both_kinds() -> None:
    found = documents(
        {
            "coordinator": {"config": CONFIG},
            "workers": [
                {**WORKER, "gpus": 2, "settings": {"threads": 2}},
                {**WORKER, "name": "clinic-b", "stays": True},
            ],
        }
    )
    pod = found["StatefulSet", "demo-fedmezo"]["spec"]["template"]["spec"]
    [coordinator] = pod["containers"]
    assert coordinator["readinessProbe"]["grpc"] == {"port": 7468}
    assert pod["securityContext"]["runAsNonRoot"]
    job = found["Job", "demo-fedmezo-clinic-a"]["spec"]["template"]["spec"]["containers"][0]
    assert job["resources"]["limits"] == {"nvidia.com/gpu": 2}
    for kind, name in (("Job", "clinic-a"), ("Deployment", "clinic-b")):
        container = found[kind, f"demo-fedmezo-{name}"]["spec"]["template"]["spec"]["containers"][0]
        load_settings(WorkerSettings, container["args"], program="worker")
    assert ("PodDisruptionBudget", "demo-fedmezo") in found
    assert ("NetworkPolicy", "demo-fedmezo-workers") in found


@needs_tools
def test_the_coordinator_takes_what_the_chart_gives_it(tmp_path: Path) -> None:
    found = documents({"coordinator": {"config": CONFIG}, "hostNames": ["fleet.example.org"]})
    text = found["ConfigMap", "demo-fedmezo-coordinator"]["data"]["coordinator.toml"]
    (tmp_path / "coordinator.toml").write_text(text)
    [one] = found["StatefulSet", "demo-fedmezo"]["spec"]["template"]["spec"]["containers"]
    arguments = [part.replace("/etc/fedmezo", str(tmp_path)) for part in one["args"]]
    read = load_settings(CoordinatorSettings, arguments, program="coordinator")
    assert read.run_config("[run]").run_id == "reviews"
    assert read.join_address == "fleet.example.org:7465"


@needs_tools
def test_postgresql_with_a_standby_and_metrics() -> None:
    found = documents(
        {
            "coordinator": {
                "config": CONFIG,
                "postgresqlSecret": "db",
                "standby": True,
                "persistence": {"accessMode": "ReadWriteMany"},
            },
            "metrics": {"enabled": True, "serviceMonitor": {"enabled": True, "secret": "scraper"}},
        }
    )
    pods = found["StatefulSet", "demo-fedmezo"]["spec"]
    assert pods["replicas"] == 2
    [coordinator] = pods["template"]["spec"]["containers"]
    assert "--standby" in coordinator["args"]
    assert not [one for one in coordinator["args"] if one.startswith("--journal")]
    assert ("ServiceMonitor", "demo-fedmezo") in found


@needs_tools
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "coordinator.config is missing"),
        ({"coordinator": {"config": "x", "standby": True}}, "needs coordinator.postgresqlSecret"),
        ({"coordinator": {"runs": True, "postgresqlSecret": "db"}}, "takes no PostgreSQL"),
        (
            {"coordinator": {"config": "x", "standby": True, "postgresqlSecret": "db"}},
            "ReadWriteMany",
        ),
        ({"coordinator": {"runs": True, "replicas": 3}}, "replicas"),
        ({"coordinator": {"runs": True}, "workers": [{"name": "A_b"}]}, "name"),
        (
            {
                "coordinator": {"runs": True},
                "metrics": {"serviceMonitor": {"enabled": True}},
            },
            "needs metrics.enabled",
        ),
        (
            {
                "coordinator": {"runs": True},
                "metrics": {"enabled": True, "serviceMonitor": {"enabled": True}},
            },
            "metrics.serviceMonitor.secret is missing",
        ),
    ],
)
def test_values_that_cannot_work_are_refused_with_a_sentence(
    values: dict[str, Any], said: str
) -> None:
    done = rendered(values)
    assert done.returncode == 1
    assert said in done.stderr
