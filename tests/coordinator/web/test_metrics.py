"""Metrics: what a scrape says, and that dashboard and alarms ask for what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.operation.made_run import MadeRun
from fedmezo_coordinator.serving.loop_lag import LoopLag
from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_coordinator.web.metrics import Metrics
from fedmezo_coordinator.web.run_alarms import AlarmKind
from fedmezo_coordinator.web.runs_in_view import RunsInView, WatchedRun
from fedmezo_core.errors import NotReadyError
from fedmezo_proto.v1 import runs_pb2 as runs

DEPLOY = Path(__file__).parents[3] / "deploy"
DASHBOARD = DEPLOY / "grafana/fedmezo.json"
RULES = DEPLOY / "prometheus/fedmezo-alerts.yaml"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def full_run(run_id: str = "reviews") -> MadeRun:
    """A run with a value for every metric."""
    run = MadeRun(run_id, 20, 40)
    run.refused_answers["StaleTicketError"] += 3
    run.append_times.add(0.0007)
    run.append_times.add(4.0)
    run.told.digests.add(party="replica", round=18, weights_digest=bytes(32))
    return run


async def scraped(*watched: WatchedRun) -> Samples:
    limit, lag = SessionLimit(sessions_max=1), LoopLag()
    for _ in range(7):
        with limit.session(), pytest.raises(NotReadyError), limit.session():
            pass
    lag.add(0.012)
    view = RunsInView(lambda: watched, limit, lag)
    for one in view.all():
        await one.follow()
    text = Metrics(view, lambda: 2_000_000_000, lambda: 2).text().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


async def test_a_scrape_says_how_a_run_does() -> None:
    found = await scraped(full_run())

    def of(name: str, **labels: str) -> float:
        return value(found, f"fedmezo_{name}", run="reviews", **labels)

    assert value(found, "fedmezo_runs") == 1
    assert value(found, "fedmezo_page_watchers") == 2
    assert value(found, "fedmezo_sessions") == 0
    assert value(found, "fedmezo_sessions_refused_total") == 7
    assert value(found, "fedmezo_event_loop_lag_p99_seconds") == pytest.approx(0.012)
    assert value(found, "fedmezo_certificate_expiry_timestamp_seconds") == 2_000_000_000
    assert (of("round"), of("rounds_planned")) == (20, 20)
    assert of("run_phase", phase="running") == 1
    assert of("run_phase", phase="failed") == 0
    assert of("answers_refused_total", reason="StaleTicketError") == 3
    assert of("workers", state="away") == 2
    assert of("session_bytes_total", direction="up") == 20 * 40 * 180
    assert of("journal_append_seconds_bucket", le="0.001") == 1
    assert of("journal_append_seconds_count") == 2
    assert of("journal_append_seconds_sum") == pytest.approx(4.0007)
    assert of("replica_lag_rounds") == 2
    assert of("alarms", kind="away") == 1
    assert 0 < of("training_loss") < 1
    assert 0 < of("heldout_accuracy") <= 1


async def test_accepted_answers_count_from_this_start_on() -> None:
    run = MadeRun("reviews", 20, 4)
    view = RunsInView(lambda: [run])
    [seen] = view.all()
    await seen.follow()
    assert (seen.answers_live, seen.series.answers_total) == (0, 80)
    run.commit()
    await seen.follow()
    assert (seen.answers_live, seen.series.answers_total) == (4, 84)


async def test_no_label_grows_with_the_workers() -> None:
    few, many = await scraped(MadeRun("r", 5, 2)), await scraped(MadeRun("r", 5, 1000))
    assert few.keys() == many.keys()
    assert not any("device" in text for _, labels in many for _, text in labels)


async def test_a_run_without_a_journal_is_counted_and_told_as_failed() -> None:
    run = MadeRun("lost", 0, 0)
    run.run_phase = runs.RUN_PHASE_FAILED
    run.is_served = False
    found = await scraped(run)
    assert value(found, "fedmezo_alarms", run="lost", kind=AlarmKind.FAILED) == 1
    assert ("fedmezo_round", frozenset({("run", "lost")})) not in found


def _expressions(value: Any) -> list[str]:
    """Every `expr` and `query` in a file, wherever it stands."""
    if isinstance(value, dict):
        own = [text for key in ("expr", "query") if isinstance(text := value.get(key), str)]
        return own + [text for one in value.values() for text in _expressions(one)]
    if isinstance(value, list):
        return [text for one in value for text in _expressions(one)]
    return []


def _asked_in(path: Path) -> list[str]:
    """The PromQL of a dashboard or of rules."""
    text = path.read_text()
    return _expressions(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))


@pytest.mark.parametrize("path", [DASHBOARD, RULES], ids=lambda path: path.name)
async def test_dashboard_and_rules_ask_for_metrics_and_labels_that_there_are(path: Path) -> None:
    found = await scraped(full_run())
    names = {name for name, _ in found}
    labels: dict[str, dict[str, set[str]]] = {}
    for name, pairs in found:
        for key, text in pairs:
            labels.setdefault(name, {}).setdefault(key, set()).add(text)
    expressions = _asked_in(path)
    assert len(expressions) >= 8
    asked = [
        asked
        for expression in expressions
        for asked in re.findall(r"\b(fedmezo_\w+|process_\w+)(?:\{([^}]*)\})?", expression)
    ]
    assert len(asked) >= len(expressions)
    for name, chosen in asked:
        assert name in names, f"{path.name} asks for {name}"
        for key, wanted in re.findall(r'(\w+)\s*=~?\s*"([^"]*)"', chosen):
            if key in ("job", "instance"):
                continue
            assert key in labels[name], f"{name} has no label {key}"
            if not wanted.startswith("$"):
                assert set(wanted.split("|")) <= labels[name][key], f"{name}: {key} = {wanted}"


def test_each_rule_says_what_to_do_and_how_urgent_it_is() -> None:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("critical", "warning")
            assert rule["annotations"]["summary"]
            assert rule["annotations"]["description"]
