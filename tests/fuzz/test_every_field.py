"""Every field of what others send, and every setting, with values that nobody would choose."""

from __future__ import annotations

import contextlib
import logging
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmezo.run_policy import RunPolicy
from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_core.config import LoraConfig, RunConfig, TaskConfig
from fedmezo_core.errors import ConfigError, FedMezoError
from fedmezo_core.journal.codec import encode_record
from fedmezo_core.layered_settings import settings_of
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import journal_pb2 as pb
from fedmezo_proto.v1 import secure_sum_pb2
from fedmezo_worker.data_sets import DataSet
from fedmezo_worker.worker_settings import WorkerSettings
from tests.fuzz.corpus import ANSWER, REPORT, UNABLE, inputs_of, page_of
from tests.fuzz.page_target import SESSION, cookie, read_page_request
from tests.fuzz.run_targets import (
    RUN_METHODS,
    pieces_of,
    read_run_call,
    read_sum_asks,
    read_sum_replies,
)
from tests.fuzz.targets import GENESIS, METHODS, hello, read_call, read_record, read_stream
from tests.integration.support.harness import run_values

SOME = settings(max_examples=60, suppress_health_check=list(HealthCheck))
FEW = settings(SOME, max_examples=20)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A coordinator that refuses hundreds of calls says nothing meanwhile."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


# ---------------------------------------------------------------- messages


def values_of(field: Any) -> st.SearchStrategy[Any]:
    """Any value of a field that is no message."""
    match field.cpp_type:
        case field.CPPTYPE_STRING if field.type == field.TYPE_BYTES:
            values: st.SearchStrategy[Any] = st.binary(max_size=100)
        case field.CPPTYPE_STRING:
            values = st.text(max_size=300)
        case field.CPPTYPE_BOOL:
            values = st.booleans()
        case field.CPPTYPE_FLOAT:
            values = st.floats(width=32)
        case field.CPPTYPE_DOUBLE:
            values = st.floats()
        case field.CPPTYPE_ENUM:
            values = st.integers(-2, 100)
        case field.CPPTYPE_UINT32 | field.CPPTYPE_UINT64:
            most = 2**32 - 1 if field.cpp_type == field.CPPTYPE_UINT32 else 2**64 - 1
            odd = [0, 1, 2**31, 2**32 - 1, most]
            values = st.one_of(st.sampled_from(odd), st.integers(0, most))
        case _:
            raise AssertionError(f"no values for {field.full_name}")
    return st.lists(values, max_size=20) if field.label == field.LABEL_REPEATED else values


def places_in(kind: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each field of a kind of message that is no message itself."""
    for field in kind.fields:
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            yield (*before, field)
        else:
            yield from places_in(field.message_type, (*before, field))


def put(message: Any, place: tuple[Any, ...], data: st.DataObject) -> None:
    """Set the field at `place` to any value; of repeated messages, in the first one."""
    *way, field = place
    for step in way:
        inside = getattr(message, step.name)
        if step.label != step.LABEL_REPEATED:
            message = inside
        else:
            message = inside[0] if inside else inside.add()
    if field.message_type is not None:
        getattr(message, field.name)[data.draw(st.text())] = data.draw(st.text())
        return
    value = data.draw(values_of(field))
    if field.label == field.LABEL_REPEATED:
        message.ClearField(field.name)
        getattr(message, field.name).extend(value)
    else:
        setattr(message, field.name, value)


def named(place: tuple[Any, ...]) -> str:
    """A place as text."""
    return ".".join(field.name for field in place)


def _fields_of(methods: Mapping[str, Any]) -> list[Any]:
    return [
        pytest.param(method, place, id=f"{method}-{named(place)}")
        for method, kind in methods.items()
        for place in places_in(kind.DESCRIPTOR)
        if method != "PollSession" or len(place) == 1  # Its messages are those of a stream.
    ]


@pytest.mark.parametrize(("method", "place"), _fields_of(METHODS))
def test_any_value_of_a_request_s_field_is_answered_or_refused(
    method: str, place: tuple[Any, ...]
) -> None:
    number = list(METHODS).index(method)

    @SOME
    @given(st.data())
    def answered_or_refused(data: st.DataObject) -> None:
        request = METHODS[method]()
        put(request, place, data)
        read_call(bytes([number]) + request.SerializeToString())

    answered_or_refused()


@pytest.mark.parametrize(("method", "place"), _fields_of(RUN_METHODS))
def test_any_value_in_a_request_about_runs_is_answered_or_refused(
    method: str, place: tuple[Any, ...]
) -> None:
    """In each sound request of that kind."""
    number = list(RUN_METHODS).index(method)
    sound = [data[1:] for data in inputs_of("run-calls") if data[0] == number]

    @FEW
    @given(st.data(), st.sampled_from(sound))
    def answered_or_refused(data: st.DataObject, body: bytes) -> None:
        request = RUN_METHODS[method].FromString(body)
        put(request, place, data)
        read_run_call(bytes([number]) + request.SerializeToString())

    answered_or_refused()


@pytest.mark.parametrize("kind", ["hello", "answer", "unable", "weights_report", "sum_reply"])
def test_any_value_of_a_stream_s_field_is_answered_or_refused(kind: str) -> None:
    sound = {"hello": hello("w3"), "answer": ANSWER, "unable": UNABLE, "weights_report": REPORT}
    field = wire.SessionRequest.DESCRIPTOR.fields_by_name[kind]
    places = list(places_in(field.message_type, (field,)))

    @SOME
    @given(st.data())
    def answered_or_refused(data: st.DataObject) -> None:
        message = wire.SessionRequest()
        message.CopyFrom(sound.get(kind, message))
        put(message, data.draw(st.sampled_from(places)), data)
        begins = [] if kind == "hello" else [hello("w3")]
        read_stream(page_of(m.SerializeToString() for m in [*begins, message]))

    answered_or_refused()


@pytest.mark.parametrize("name", ["sum-asks", "sum-replies"])
def test_any_value_in_a_step_of_a_hidden_sum_is_taken_or_refused(name: str) -> None:
    kind: Any = {"sum-asks": secure_sum_pb2.SumAsk, "sum-replies": secure_sum_pb2.SumReply}[name]
    read = {"sum-asks": read_sum_asks, "sum-replies": read_sum_replies}[name]
    steps = pieces_of(inputs_of(name)[0])

    @settings(SOME, max_examples=150)
    @given(st.data(), st.integers(0, len(steps) - 1))
    def taken_or_refused(data: st.DataObject, at: int) -> None:
        message = kind.FromString(steps[at])
        chosen = message.WhichOneof("kind")
        places = [
            place for place in places_in(kind.DESCRIPTOR) if place[0].name in ("step", chosen)
        ]
        put(message, data.draw(st.sampled_from(places)), data)
        read(page_of([*steps[:at], message.SerializeToString(), *steps[at + 1 :]]))

    taken_or_refused()


@pytest.mark.parametrize(
    "place",
    [pytest.param(place, id=named(place)) for place in places_in(pb.RunConfig.DESCRIPTOR)],
)
def test_any_value_of_a_contract_s_field_is_read_or_refused(place: tuple[Any, ...]) -> None:
    @FEW
    @given(st.data())
    def read_or_refused(data: st.DataObject) -> None:
        record = pb.Record.FromString(encode_record(GENESIS))
        put(record.genesis.config, place, data)
        with contextlib.suppress(FedMezoError):
            read_record(record.SerializeToString())

    read_or_refused()


# ---------------------------------------------------------------- settings

HOSTILE = st.one_of(
    st.sampled_from(
        [
            *(-1, 0, 2**31, 2**63, 2**64, 10**400, float("nan"), float("inf"), -1e308, 5e-324),
            *("", "\0", "\ud800", "\N{RIGHT-TO-LEFT OVERRIDE}", "../..", "~nobody/x", "x" * 70_000),
            *(True, [], {}, [[]], [{}], {"": {}}),
        ]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=40),
    st.lists(st.one_of(st.text(max_size=9), st.integers()), max_size=4),
    st.dictionaries(
        st.text(max_size=9) | st.just("k" * 9000),
        st.one_of(st.text(max_size=9), st.integers()),
        max_size=3,
    ),
)
"""What a settings file can hold, and an environment can."""
DATA = {"data": {"reviews": {"path": "reviews.jsonl"}}}


def _settings() -> Iterator[Any]:
    """Kind of settings, the table that a key is in, and the key."""
    tables: list[tuple[Any, tuple[str, ...], Any]] = [
        (CoordinatorSettings, (), CoordinatorSettings),
        (CoordinatorSettings, ("run",), RunConfig),
        (CoordinatorSettings, ("run", "task"), TaskConfig),
        (CoordinatorSettings, ("run", "lora"), LoraConfig),
        (WorkerSettings, (), WorkerSettings),
        (WorkerSettings, ("data", "reviews"), DataSet),
        (WorkerSettings, ("policy",), RunPolicy),
    ]
    for kind, table, model in tables:
        names = [*model.model_fields, *(["preset"] if table == ("run",) else []), "unknown"]
        for name in names:
            yield pytest.param(kind, (*table, name), id=".".join((kind.__name__, *table, name)))


@pytest.mark.parametrize(("kind", "key"), list(_settings()))
def test_any_value_of_a_setting_is_taken_or_refused_by_its_name(
    kind: Any, key: tuple[str, ...]
) -> None:
    @FEW
    @given(HOSTILE)
    def taken_or_refused(value: Any) -> None:
        values: dict[str, Any] = {"run": run_values()} if kind is CoordinatorSettings else DATA
        values = _with(values, key, value)
        try:
            taken = settings_of(kind, values, "the file")
            if isinstance(taken, CoordinatorSettings):
                taken.run_config("the file")
        except ConfigError as error:
            sentence = str(error)
            assert len(sentence) < 8192
            assert sentence.isprintable(), sentence

    taken_or_refused()


def _with(values: Any, key: tuple[str, ...], value: Any) -> dict[str, Any]:
    if not key:
        return value  # type: ignore[no-any-return]
    first, *rest = key
    return {**values, first: _with(values.get(first, {}), tuple(rest), value)}


# ---------------------------------------------------------------- the page


@pytest.mark.parametrize("name", ["run", "sort", "order", "state", "name", "page"])
@pytest.mark.parametrize("path", ["workers", "live"])
def test_any_value_of_a_query_of_the_page_is_answered_or_refused(path: str, name: str) -> None:
    @FEW
    @given(st.one_of(st.text(max_size=80), st.integers().map(str)))
    def answered_or_refused(value: str) -> None:
        sound = {"run": "reviews"} | {name: value}
        query = urllib.parse.urlencode(sound, errors="replace").encode()
        head = b"GET /" + path.encode() + b"?" + query + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        read_page_request(head + cookie(SESSION) + b"\r\n")

    answered_or_refused()
