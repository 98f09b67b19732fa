"""A trace of the rounds of a run: OpenTelemetry spans, made as records become durable.

The environment says where they go and under which name, as for every program that sends traces
(OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, ...).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from fedmezo_core.errors import ConfigError
from fedmezo_core.journal.codec import decode_record
from fedmezo_core.journal.journal import ANSWERED, Entry
from fedmezo_core.records import Committed, Evaluated, Opened, Paused, Resumed, Stopped

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

SEND_WITHIN_S = 3.0
"""Longest time that a collector gets to take spans, also when the process stops."""


_tracer: Tracer | None = None
"""What makes this process's spans; None while it makes none."""


class Followed(Protocol):
    """A run whose records can be followed."""

    def follow(self, fold: Callable[[Entry], None]) -> None:
        """Call `fold` with each further record but answers, once it is durable."""


@contextlib.contextmanager
def tracing() -> Iterator[Tracer]:
    """What makes spans, which are sent by OTLP over HTTP; the last ones when it ends.

    Raises `ConfigError` without the packages.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError(
            f"otel needs OpenTelemetry; run: {sys.executable} -m pip install 'fedmezo[otel]'"
        ) from None
    named = Resource({SERVICE_NAME: "fedmezo-coordinator"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=named)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=SEND_WITHIN_S)))
    global _tracer
    _tracer = provider.get_tracer("fedmezo")
    try:
        yield _tracer
    finally:
        _tracer = None
        provider.shutdown()


def follow_rounds(run: Followed, run_id: str) -> None:
    """Make spans of the rounds that a loaded run commits from now on, if this process traces."""
    if _tracer is not None:
        run.follow(RoundSpans(_tracer, run_id).take)


class RoundSpans:
    """A span for each round, from its opening to its commit, with what happened meanwhile."""

    def __init__(self, tracer: Tracer, run_id: str) -> None:
        self._tracer = tracer
        self._run_id = run_id
        self._open: Span | None = None
        self._round = 0

    def take(self, entry: Entry) -> None:
        """Follow one more record, when it is durable; single answers leave no trace."""
        if entry.row.kind == ANSWERED:
            return
        match decode_record(entry.row.body):
            case Opened(round=round_, workers=workers):
                if round_ != self._round:
                    self.end()
                    self._begin(round_)
                self._event("slots", {"fedmezo.slots": len(workers)})
            case Committed() as commit:
                if self._open is not None and commit.round == self._round:
                    self._open.set_attribute("fedmezo.pairs", commit.pairs)
                    self.end()
            case Evaluated() as found:
                values = {"fedmezo.loss": found.loss, "fedmezo.accuracy": found.accuracy}
                self._event("evaluated", {"fedmezo.round": found.round, **values})
            case Paused(reason=reason):
                self._event("paused", {"fedmezo.reason": reason})
            case Resumed():
                self._event("resumed", {})
            case Stopped(reason=reason):
                self._event("stopped", {"fedmezo.reason": reason})
                self.end()
            case _:
                pass

    def end(self) -> None:
        """End the span of a round that is open; nothing follows it."""
        if self._open is not None:
            self._open.end()
            self._open = None

    def _begin(self, round_: int) -> None:
        self._round = round_
        attributes: dict[str, str | int] = {
            "fedmezo.run_id": self._run_id,
            "fedmezo.round": round_,
        }
        self._open = self._tracer.start_span("round", attributes=attributes)

    def _event(self, name: str, attributes: dict[str, str | int | float]) -> None:
        """An event of the round that is open; else a span of its own."""
        if self._open is not None:
            self._open.add_event(name, attributes)
            return
        attributes["fedmezo.run_id"] = self._run_id
        self._tracer.start_span(name, attributes=attributes).end()
