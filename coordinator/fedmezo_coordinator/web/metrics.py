"""Metrics for Prometheus: few labels, each of a bounded number of values, and no worker's name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from fedmezo_coordinator.serving.loop_lag import APPEND_BOUNDS_S, AppendTimes
from fedmezo_coordinator.web.run_alarms import counted_by_kind
from fedmezo_coordinator.web.run_json import PHASES, STATES, states_of
from fedmezo_coordinator.web.runs_in_view import RunInView, RunsInView
from fedmezo_core.errors import FedMezoError
from fedmezo_core.machines.divergence import REPLICA_PARTY
from fedmezo_proto.v1 import coordinator_pb2 as wire

REASONS_MAX = 50
"""Most reasons of refused answers that are told apart. There are fewer kinds of errors."""


class _Families:
    """The families of one scrape, in the order in which they were first asked for."""

    def __init__(self) -> None:
        self._found: dict[str, Metric] = {}

    def gauge(self, name: str, about: str, value: float, **labels: str) -> None:
        """Add a value that goes up and down."""
        self._family(GaugeMetricFamily, name, about, labels).add_metric(
            list(labels.values()), value
        )

    def counter(self, name: str, about: str, value: float, **labels: str) -> None:
        """Add a count since the coordinator's start; `name` lacks the ending `_total`."""
        self._family(CounterMetricFamily, name, about, labels).add_metric(
            list(labels.values()), value
        )

    def times(self, name: str, about: str, times: AppendTimes, run: str) -> None:
        """Add a histogram of times in seconds."""
        bounds = [*map(str, APPEND_BOUNDS_S), "+Inf"]
        buckets = list(zip(bounds, map(float, accumulate(times.counts)), strict=True))
        family = self._family(HistogramMetricFamily, name, about, {"run": run})
        family.add_metric([run], buckets=buckets, sum_value=times.total_s)

    def _family(self, kind: Any, name: str, about: str, labels: Iterable[str]) -> Any:
        if name not in self._found:
            self._found[name] = kind(name, about, labels=list(labels))
        return self._found[name]

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._found.values())


class Metrics(Collector):
    """Makes the metrics of all runs whenever they are scraped."""

    TYPE = CONTENT_TYPE_LATEST

    def __init__(
        self,
        runs: RunsInView,
        certificate_ends_s: Callable[[], int | None],
        watchers: Callable[[], int],
    ) -> None:
        """`certificate_ends_s` is when the server's certificate expires; None without one."""
        self._runs = runs
        self._certificate_ends_s = certificate_ends_s
        self._watchers = watchers
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """The metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: the families are made anew for each scrape."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The metrics as they are now."""
        families = _Families()
        views = self._runs.all()
        families.gauge("fedmezo_runs", "Runs of this coordinator.", len(views))
        families.gauge(
            "fedmezo_page_watchers", "Browsers that watch the page now.", self._watchers()
        )
        limit = self._runs.session_limit
        families.gauge("fedmezo_sessions", "Open sessions of all runs.", limit.sessions)
        families.counter(
            "fedmezo_sessions_refused",
            "Sessions refused because too many were open or joining.",
            limit.refused,
        )
        families.gauge(
            "fedmezo_event_loop_lag_p99_seconds",
            "How late the event loop was over the last minute, for 99 of 100 events.",
            self._runs.lag.percentile_ms(0.99) / 1000,
        )
        ends_s = self._certificate_ends_s()
        if ends_s is not None:
            families.gauge(
                "fedmezo_certificate_expiry_timestamp_seconds",
                "When the server's certificate expires, in seconds since 1970.",
                ends_s,
            )
        for view in views:
            _of_run(families, view)
        return list(families)


def _of_run(families: _Families, view: RunInView) -> None:
    run, name = view.run, view.run.run_id
    for phase, word in PHASES.items():
        families.gauge(
            "fedmezo_run_phase",
            "1 for the phase that the run is in.",
            run.run_phase == phase,
            run=name,
            phase=word,
        )
    for kind, count in counted_by_kind(view.alarms()).items():
        families.gauge(
            "fedmezo_alarms",
            "Things that a person should look at, by kind.",
            count,
            run=name,
            kind=str(kind),
        )
    families.counter(
        "fedmezo_answers_accepted",
        "Answers accepted since the coordinator's start.",
        view.answers_live,
        run=name,
    )
    for reason, count in run.refused_answers.most_common(REASONS_MAX):
        families.counter(
            "fedmezo_answers_refused",
            "Answers refused since the coordinator's start, by the error's name.",
            count,
            run=name,
            reason=reason,
        )
    families.times(
        "fedmezo_journal_append_seconds",
        "How long it took until records were durable.",
        run.append_times,
        name,
    )
    families.gauge(
        "fedmezo_journal_records", "Records in the journal.", run.records_shown, run=name
    )
    try:
        status = view.status()
    except FedMezoError:
        return
    if status is not None:
        _of_status(families, view, status)


def _of_status(families: _Families, view: RunInView, status: wire.GetStatusResponse) -> None:
    name = view.run.run_id
    families.gauge("fedmezo_round", "Last committed round.", status.round, run=name)
    families.gauge(
        "fedmezo_rounds_planned", "Rounds of the contract.", status.config.rounds, run=name
    )
    states = Counter(states_of(view.run.run_phase, status))
    for state in STATES:
        families.gauge(
            "fedmezo_workers",
            "Workers seen since the coordinator's start, by what they do.",
            states[state],
            run=name,
            state=state,
        )
    for direction in ("up", "down"):
        families.counter(
            "fedmezo_session_bytes",
            "Bytes of workers' sessions since the coordinator's start; up is from them.",
            sum(getattr(one, f"bytes_{direction}") for one in status.workers),
            run=name,
            direction=direction,
        )
    losses = [one.mean_loss for one in status.recent_rounds if one.HasField("mean_loss")]
    if losses:
        families.gauge(
            "fedmezo_training_loss", "Mean training loss of a round, in nats.", losses[-1], run=name
        )
    if status.evaluations:
        newest = status.evaluations[-1]
        families.gauge("fedmezo_heldout_loss", "Held-out loss, in nats.", newest.loss, run=name)
        families.gauge(
            "fedmezo_heldout_accuracy", "Held-out accuracy, 0 to 1.", newest.accuracy, run=name
        )
    replica = [digest.round for digest in status.digests if digest.party == REPLICA_PARTY]
    if replica:
        families.gauge(
            "fedmezo_replica_lag_rounds",
            "Committed rounds that the replica has not digested yet.",
            max(status.round - replica[-1], 0),
            run=name,
        )
