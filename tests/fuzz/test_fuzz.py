"""The kept inputs, and some hundred changes of each: read, or refused in a sentence."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmezo_coordinator.serving.service import OF_THE_RUN
from fedmezo_core.errors import FedMezoError
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.fuzz.corpus import ANSWER, REPORT, UNABLE, inputs_of, page_of
from tests.fuzz.mutations import mutated
from tests.fuzz.targets import METHODS, TARGETS, hello, read_call, read_stream

CHANGES = 200


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A coordinator that refuses hundreds of calls says nothing meanwhile."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def try_one(name: str, data: bytes) -> None:
    """Let a target read an input, which it may refuse."""
    with contextlib.suppress(FedMezoError):
        TARGETS[name].read(data)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_reads_the_kept_inputs_and_changes_of_them(name: str) -> None:
    inputs, rng = inputs_of(name), random.Random(name)
    assert inputs
    for data in inputs:
        try_one(name, data)
    for _ in range(CHANGES):
        try_one(name, mutated(rng, TARGETS[name], rng.choice(inputs), inputs))


@pytest.mark.parametrize(
    "name",
    [
        *("records", "seals", "snapshots", "journals", "copies"),
        *("orders", "signed-answers", "members-files", "identities", "ledgers", "tls-files"),
    ],
)
def test_the_kept_inputs_are_sound(name: str) -> None:
    for data in inputs_of(name):
        TARGETS[name].read(data)


def test_every_method_with_one_request_is_fuzzed() -> None:
    service = wire.DESCRIPTOR.services_by_name["CoordinatorService"]
    assert {method.name for method in service.methods} | OF_THE_RUN == {*METHODS, "Session"}


SOME = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
VALUES = {
    "uint": st.one_of(st.sampled_from([0, 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1)),
    "text": st.text(max_size=300),
    "bytes": st.binary(max_size=100),
    "bool": st.booleans(),
    "float": st.floats(width=32),
}


def values_of(field: Any) -> st.SearchStrategy[Any]:
    """Any value of a field that is no message."""
    kinds = {
        field.CPPTYPE_STRING: "bytes" if field.type == field.TYPE_BYTES else "text",
        field.CPPTYPE_BOOL: "bool",
        field.CPPTYPE_FLOAT: "float",
    }
    values = VALUES[kinds.get(field.cpp_type, "uint")]
    return st.lists(values, max_size=20) if field.label == field.LABEL_REPEATED else values


def fields_in(kind: Any) -> list[Any]:
    """The fields of a kind of message, and of those inside it, that are no messages."""
    found: list[Any] = []
    for field in kind.fields:
        found += [field] if field.message_type is None else fields_in(field.message_type)
    return found


@pytest.mark.parametrize(
    ("method", "name"),
    [(m, f.name) for m, k in METHODS.items() for f in k.DESCRIPTOR.fields if not f.message_type],
)
def test_any_value_of_a_request_s_field_is_answered_or_refused(method: str, name: str) -> None:
    number = list(METHODS).index(method)

    @SOME
    @given(values_of(METHODS[method].DESCRIPTOR.fields_by_name[name]))
    def answered_or_refused(value: object) -> None:
        request = METHODS[method](**{name: value})
        read_call(bytes([number]) + request.SerializeToString())

    answered_or_refused()


@pytest.mark.parametrize("kind", ["hello", "answer", "unable", "weights_report"])
def test_any_value_of_a_stream_s_field_is_answered_or_refused(kind: str) -> None:
    sound = {"hello": hello("w3"), "answer": ANSWER, "unable": UNABLE, "weights_report": REPORT}
    fields = fields_in(wire.SessionRequest.DESCRIPTOR.fields_by_name[kind].message_type)

    @SOME
    @given(st.data())
    def answered_or_refused(data: st.DataObject) -> None:
        field = data.draw(st.sampled_from(fields))
        message = wire.SessionRequest.FromString(sound[kind].SerializeToString())
        holder: Any = getattr(message, kind)
        if field.containing_type.name == "Ticket":
            holder = holder.ticket
        value = data.draw(values_of(field))
        if field.label == field.LABEL_REPEATED:
            holder.ClearField(field.name)
            getattr(holder, field.name).extend(value)
        else:
            setattr(holder, field.name, value)
        begins = [] if kind == "hello" else [hello("w3")]
        read_stream(page_of(m.SerializeToString() for m in [*begins, message]))

    answered_or_refused()
