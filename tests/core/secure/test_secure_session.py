"""A worker's session in a run with secure aggregation: what it says, and what it never says."""

from __future__ import annotations

import pytest

from fedmezo_core.errors import ProtocolError
from fedmezo_core.events import (
    Assigned,
    Connected,
    KeysGiven,
    KeysWanted,
    Measured,
    SendAnswer,
    SendSumStep,
    SendUnable,
    SumAsked,
    Ticket,
    Welcomed,
    Work,
)
from fedmezo_core.machines.seeds import seeds_of
from fedmezo_core.machines.session import SessionMachine
from fedmezo_core.records import Genesis, Scalars
from tests.core.secure.test_secure_sum import config_of, genesis_of

HEAD = b"h" * 32
TICKET = Ticket(1, 1, 2)
ASKED = SumAsked(TICKET, 1, KeysWanted(), b"e" * 32)


def online(genesis: Genesis) -> SessionMachine:
    machine = SessionMachine.of_worker(genesis, HEAD, "a")
    machine.step(Connected())
    machine.step(Welcomed(1, 0, HEAD))
    return machine


def work_of(genesis: Genesis) -> Work:
    return Work(seeds_of(genesis.config, 1, 0, None), 0.5, 1e-3, want_digest=True)


def test_an_answer_says_that_it_was_measured_and_no_number() -> None:
    genesis = genesis_of(config_of())
    machine = online(genesis)
    machine.step(Assigned(TICKET, work_of(genesis)))
    [sent] = machine.step(Measured(TICKET, Scalars((1.0, 2.0, 3.0), 0.5, 77, 8)))
    assert isinstance(sent, SendAnswer)
    assert sent.scalars == Scalars((), None, 77, None)
    [step] = machine.step(ASKED)
    assert isinstance(step, SendSumStep)
    assert isinstance(step.step, KeysGiven)


def test_a_worker_without_the_measurement_says_so() -> None:
    genesis = genesis_of(config_of())
    [unable] = online(genesis).step(ASKED)
    assert unable == SendUnable(TICKET, "this worker does not hold the round's measurement")


def test_another_epoch_is_no_business_of_this_session() -> None:
    machine = online(genesis_of(config_of()))
    assert machine.step(SumAsked(Ticket(2, 1, 2), 1, KeysWanted(), b"e" * 32)) == ()


def test_other_directions_are_not_measured() -> None:
    genesis = genesis_of(config_of())
    machine = online(genesis)
    work = Work((1, 2, 3), 0.5, 1e-3, want_digest=True)
    with pytest.raises(ProtocolError, match="other directions"):
        machine.step(Assigned(TICKET, work))
    assert not machine.measuring


def test_a_plain_run_has_no_sums() -> None:
    plain = config_of().model_copy(update={"secure_aggregation": False})
    with pytest.raises(ProtocolError, match="without secure_aggregation"):
        online(genesis_of(plain)).step(ASKED)
