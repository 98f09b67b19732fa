"""A worker's session in a run with secure aggregation: what it says, and what it never says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedmezo_core.errors import ProtocolError
from fedmezo_core.events import (
    Assigned,
    CommitReceived,
    Connected,
    KeysGiven,
    KeysWanted,
    Measure,
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
from fedmezo_core.records import Committed, Genesis, Scalars
from fedmezo_core.trust.secure_aggregation.sum_memory import SumMemory, numbers_digest_of
from tests.core.secure.test_secure_sum import config_of, genesis_of

HEAD = b"h" * 32
TICKET = Ticket(1, 1, 2)
ASKED = SumAsked(TICKET, 1, KeysWanted(), b"e" * 32)


def online(genesis: Genesis, memory: SumMemory | None = None) -> SessionMachine:
    machine = SessionMachine.of_worker(genesis, HEAD, "a", sum_memory=memory)
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


# ---------------------------------------------------------------- what outlives a machine

OTHERS = {
    "a new machine of the same run": {},
    "another run": {"run_id": "again"},
    "a run without secure aggregation": {"run_id": "plain", "secure_aggregation": False},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_numbers_in_a_sum_are_not_measured_again(changes: dict[str, Any]) -> None:
    """A machine that is made anew in the same process says nothing about rounds up to that one."""
    genesis = genesis_of(config_of())
    memory = SumMemory()
    memory.reveal(numbers_digest_of(genesis, "a"), 1)
    other = replace(genesis_of(config_of().model_copy(update=changes)), base_digest=b"B" * 32)
    machine = online(other, memory)
    [said] = machine.step(Assigned(TICKET, work_of(other)))
    assert isinstance(said, SendUnable)
    assert "with another seed" in said.reason
    assert not machine.measuring
    later = Ticket(1, 2, 2)
    machine.step(CommitReceived(Committed(1, (), 0), b"bytes"))
    seeds = seeds_of(other.config, 2, 0, None)
    [measure] = machine.step(Assigned(later, Work(seeds, 0.5, 1e-3, want_digest=True)))
    assert isinstance(measure, Measure)


@pytest.mark.parametrize(("seed", "worker"), [(2, "a"), (1, "b")])
def test_other_numbers_are_measured(seed: int, worker: str) -> None:
    genesis = genesis_of(config_of())
    memory = SumMemory()
    memory.reveal(numbers_digest_of(genesis_of(config_of(seed=seed)), worker), 1)
    [measure] = online(genesis, memory).step(Assigned(TICKET, work_of(genesis)))
    assert isinstance(measure, Measure)
