"""What other tools read of a run is what its journal says."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedmezo_coordinator.telemetry.round_spans import RoundSpans
from fedmezo_coordinator.web.event_files import write_event_file
from fedmezo_core.errors import ConfigError
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Entry, Journal, MemoryStore
from fedmezo_core.records import (
    Answered,
    Committed,
    Evaluated,
    Opened,
    Paused,
    Record,
    Resumed,
    Scalars,
    SeedRange,
    Started,
    Stopped,
)
from tests.coordinator.runs.hosting_runs import hosted

RECORDS: list[Record] = [
    Started(1),
    Opened(1, 0, ("a", "b")),
    Answered(1, 0, Scalars((0.5,), 0.75, None)),
    Answered(1, 1, Scalars((0.5,), 0.25, None)),
    Committed(1, (SeedRange(7, (0.5, 0.25)),), 1),
    Evaluated(1, 0.5, 0.75, 8, bytes(32)),
    Opened(2, 0, ("a",)),
    Opened(2, 1, ("b",)),
    Answered(2, 0, Scalars((0.5,), 0.125, None)),
    Paused(1, "too large"),
    Resumed(0.5),
    Committed(2, (SeedRange(9, (0.5,)),), 1),
    Opened(3, 0, ("a",)),
    Stopped(2, "enough"),
]


@pytest.fixture
def entries() -> Sequence[Entry]:
    return Journal(MemoryStore()).append(encode_records(RECORDS))


def test_an_event_file_holds_the_curves(tmp_path: Path) -> None:
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    journal = Journal(MemoryStore())
    journal.append(encode_records(RECORDS))
    assert write_event_file(Journal(journal._store), tmp_path) == 6
    [path] = tmp_path.iterdir()
    found: dict[tuple[str, int], float] = {}
    content, place = path.read_bytes(), 0
    while place < len(content):  # A length, its checksum, the event, its checksum.
        (length,) = struct.unpack_from("<Q", content, place)
        event = event_pb2.Event.FromString(content[place + 12 : place + 12 + length])
        found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
        place += length + 16
    assert found == {
        ("loss/train", 1): 0.5,
        ("loss/train", 2): 0.125,
        ("loss/heldout", 1): 0.5,
        ("accuracy/heldout", 1): 0.75,
        ("answers", 1): 2,
        ("answers", 2): 1,
    }


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file cannot be written \(.*\); name another folder"):
        write_event_file(Journal(MemoryStore()), tmp_path / "file")


def test_a_round_is_a_span(entries: Sequence[Entry]) -> None:
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    provider = trace.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    spans = RoundSpans(provider.get_tracer("test"), "reviews")
    for entry in entries:
        spans.take(entry)
    found = [
        (
            span.name,
            span.attributes.get("fedmezo.round"),
            span.attributes.get("fedmezo.pairs"),
            [event.name for event in span.events],
        )
        for span in exporter.get_finished_spans()
    ]
    assert found == [
        ("round", 1, 2, ["slots"]),
        ("evaluated", 1, None, []),
        ("round", 2, 1, ["slots", "slots", "paused", "resumed"]),
        ("round", 3, None, ["slots", "stopped"]),
    ]
    assert {span.attributes["fedmezo.run_id"] for span in exporter.get_finished_spans()} == {
        "reviews"
    }


async def test_the_rounds_of_many_runs_are_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    exporter = memory.InMemorySpanExporter()
    monkeypatch.setattr(
        trace.TracerProvider,
        "add_span_processor",
        lambda self, _: self._active_span_processor.add_span_processor(
            export.SimpleSpanProcessor(exporter)
        ),
    )
    async with hosted(tmp_path / "runs", monkeypatch, otel=True) as at:
        await at.create("one", "two", rounds=2)
        for run_id in ("one", "two"):
            async with at.worker(run_id) as hand:
                await hand.open()
                await hand.work_to_the_end()
    found = [
        (span.attributes["fedmezo.run_id"], span.attributes["fedmezo.round"])
        for span in exporter.get_finished_spans()
    ]
    assert sorted(found) == [("one", 1), ("one", 2), ("two", 1), ("two", 2)]
