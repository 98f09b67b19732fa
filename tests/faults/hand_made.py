"""Journals and sealed states that somebody made by hand: sound bytes, hashes and chains around
records that make no sense. Whoever reads them may refuse them in a sentence, and no other way.

    python -m tests.faults.hand_made 10000    # as many of each kind
"""

from __future__ import annotations

import asyncio
import io
import logging
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from rich.console import Console

from fedmezo_coordinator.daemon import Daemon
from fedmezo_coordinator.programs.fedmezo_command import _line, _verified_run
from fedmezo_coordinator.programs.plain_values import json_line, record_values, status_values
from fedmezo_coordinator.programs.view import run_view
from fedmezo_core.errors import FedMezoError
from fedmezo_core.events import AnswerReceived, Assign, Ready, Tick, Ticket, WorkerReady
from fedmezo_core.journal.codec import decode_record, encode_record
from fedmezo_core.journal.journal import (
    COMMITTED,
    ZERO_HASH,
    Journal,
    MemoryStore,
    chain_after,
    head_after,
)
from fedmezo_core.journal.party_copy import JournalCopy, verified
from fedmezo_core.journal.sealed import SealedState, StoredState, seal
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.machines.state_codec import STATE_VERSION, state_to_pb
from fedmezo_core.records import Committed, Scalars, SignedHead
from fedmezo_core.zo.commits import commits_of
from fedmezo_proto.v1 import journal_pb2 as pb
from fedmezo_proto.v1 import origin_pb2
from tests.sim.world import World

WORLDS = 60
CHANGES = (1, 1, 1, 1, 2, 3)
"""How many changes a journal or a state may have; more are mostly refused at the first."""

_INTEGERS = (0, 1, 2, 3, 7, 255, 4095, 4096, 2**16, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1)
_FLOATS = (0.0, -0.0, -1.0, 0.5, 1.0, 1e-300, 1e-45, 3e38, 1e300, math.inf, -math.inf, math.nan)
_TEXTS = ("", "a", "replica", "w0", "w1", "x" * 5000, "a\nb\x1b[2J", "\U0001f600")
_BYTES = (b"", b"\0", b"x" * 31, b"x" * 32, b"x" * 33, b"x" * 64)


@lru_cache(maxsize=WORLDS)
def bodies_of(seed: int) -> tuple[bytes, ...]:
    """The records that a simulated federation left."""
    world = World(seed)
    world.run()
    return tuple(entry.row.body for entry in Journal(world.store).load())


def copy_of(bodies: Sequence[bytes]) -> list[bytes]:
    """A party's own copy of a run: genesis, the head that it began from, and the commits."""
    began = SignedHead(1, 0, head_after(ZERO_HASH, bodies[0]))
    commits = [body for body in bodies if body[:1] == COMMITTED]
    return [bodies[0], encode_record(began), *commits]


# ---------------------------------------------------------------- changes


def change(rng: random.Random, message: Any) -> None:
    """Change one field somewhere in a message; one without fields stays as it is."""
    if not message.DESCRIPTOR.fields:
        return
    field = rng.choice(message.DESCRIPTOR.fields)
    value = getattr(message, field.name)
    if field.message_type is None:
        _set(rng, message, field)
    elif field.label == field.LABEL_REPEATED:
        if value and rng.random() < 0.6:
            change(rng, rng.choice(value))
        else:
            _change_list(rng, value, value.add)
    elif rng.random() < 0.2:
        message.ClearField(field.name)
    elif message.HasField(field.name):
        change(rng, value)
    else:
        value.SetInParent()


_INTEGERS_MOST = {
    FieldDescriptor.CPPTYPE_INT32: 2**31 - 1,
    FieldDescriptor.CPPTYPE_INT64: 2**63 - 1,
    FieldDescriptor.CPPTYPE_UINT32: 2**32 - 1,
    FieldDescriptor.CPPTYPE_UINT64: 2**64 - 1,
}


def _value(rng: random.Random, field: Any) -> Any:
    match field.cpp_type:
        case field.CPPTYPE_STRING:
            return rng.choice(_BYTES if field.type == field.TYPE_BYTES else _TEXTS)
        case field.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case field.CPPTYPE_FLOAT | field.CPPTYPE_DOUBLE:
            return rng.choice((*_FLOATS, rng.gauss(0, 1)))
        case field.CPPTYPE_ENUM:
            return rng.choice((*field.enum_type.values_by_number, 99))
        case _:
            most = _INTEGERS_MOST[field.cpp_type]
            return rng.choice((*(one for one in _INTEGERS if one <= most), rng.randrange(20)))


def _set(rng: random.Random, message: Any, field: Any) -> None:
    if field.label != field.LABEL_REPEATED:
        if rng.random() < 0.1:
            message.ClearField(field.name)
        elif field.cpp_type in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64) and rng.random() < 0.5:
            near = getattr(message, field.name) + rng.choice((-1, 1))
            setattr(message, field.name, max(near, 0) % 2**32)
        else:
            setattr(message, field.name, _value(rng, field))
        return
    items = getattr(message, field.name)
    if items and rng.random() < 0.5:
        items[rng.randrange(len(items))] = _value(rng, field)
    else:
        _change_list(rng, items, lambda: items.append(_value(rng, field)))


def _change_list(rng: random.Random, items: Any, add: Callable[[], Any]) -> None:
    match rng.randrange(4) if items else 0:
        case 0:
            add()
        case 1:
            del items[rng.randrange(len(items))]
        case 2:
            items.extend([items[rng.randrange(len(items))]])
        case 3:
            del items[rng.randrange(len(items)) :]


# ---------------------------------------------------------------- journals


def hand_made_bodies(seed: int) -> list[bytes]:
    """The records of a run, of which some were changed, moved, doubled or left out."""
    rng = random.Random(seed)
    bodies = list(bodies_of(rng.randrange(WORLDS)))
    if rng.random() < 0.2:
        bodies = copy_of(bodies)
    # Where it ends decides what state is left to go on from.
    del bodies[rng.randrange(1, len(bodies) + 1) :]
    for _ in range(rng.choice(CHANGES)):
        at = rng.randrange(len(bodies))
        if rng.random() < 0.8:
            record = pb.Record.FromString(bodies[at])
            kind = record.WhichOneof("kind")
            if kind is not None and rng.random() < 0.95:
                change(rng, getattr(record, kind))
            else:
                change(rng, record)
            bodies[at] = record.SerializeToString(deterministic=True)
        elif rng.random() < 0.3:
            bodies[at] = rng.choice(bodies_of(rng.randrange(WORLDS)))
        elif rng.random() < 0.5:
            bodies.insert(at, rng.choice(bodies))
        elif len(bodies) > 1:
            del bodies[at]
    return bodies


def store_of(bodies: list[bytes]) -> MemoryStore:
    """A store with a sound chain over these bodies."""
    store = MemoryStore()
    Journal(store).append(bodies)
    return store


def read_everywhere(store: MemoryStore, seed: int) -> list[str]:
    """Let all readers of a journal have this one; returns the names of the errors they raise.

    Any error but a `FedMezoError` is raised.
    """
    rng, readers = random.Random(seed), (_verify, _inspect, _copy, _serve)
    found = []
    for reader in readers:
        try:
            reader(store, rng)
        except FedMezoError as error:
            found.append(type(error).__name__)
    return found


def _verify(store: MemoryStore, _: random.Random) -> None:
    _verified_run(Journal(store))


def _inspect(store: MemoryStore, _: random.Random) -> None:
    for entry, record in verified(Journal(store)):
        _line(entry.row, record)
        json_line(record_values(entry.row, record))
        if isinstance(record, Committed):
            commits_of([record])


def _copy(store: MemoryStore, _: random.Random) -> None:
    genesis = bytes(next(iter(store.read(0, 1))).body) if store.read(0, 1) else b""
    list(JournalCopy(Journal(store)).begin(genesis, 1, b""))


def _serve(store: MemoryStore, rng: random.Random) -> None:
    """Start a coordinator, and let workers come and answer."""
    served = MemoryStore()
    origin = store.origin()
    if origin is not None:
        served.drop_before(origin)
    served.append(store.read(0, len(store)))
    if store.seals():
        served.keep_seals(store.seals())
    daemon = Daemon(Journal(served))
    asyncio.run(daemon.load())
    machine = daemon._machine
    daemon.describe(1, "", rng.randrange(5))
    _go_on(machine, rng)
    status = daemon.status("")
    json_line(status_values(status))
    Console(file=io.StringIO()).print(run_view(status))


def _go_on(machine: RoundMachine, rng: random.Random) -> None:
    names = ["w0", "w1", "w2", "w3"]
    if machine.state.open is not None:
        names += machine.state.open.cohort[:4]
    assigned: list[Assign] = []

    def take(ready: Ready) -> None:
        for record in ready.records:
            machine.apply(record)
        assigned.extend(m for m in ready.messages if isinstance(m, Assign))

    for name in names:
        take(machine.step(WorkerReady(name)))
    for turn in range(3):
        given, assigned[:] = list(assigned), []
        for assign in given:
            grads = tuple(rng.gauss(0, 1) for _ in assign.work.seeds)
            digest = 1 if assign.work.want_digest else None
            ticket = Ticket(assign.ticket.epoch, assign.ticket.round, assign.ticket.slot)
            try:
                answer = AnswerReceived(assign.worker, ticket, Scalars(grads, 0.5, digest, 7))
                take(machine.step(answer))
            except FedMezoError:
                pass
        take(machine.step(Tick((turn + 1) * 10**10)))


# ---------------------------------------------------------------- sealed states


def hand_made_seal(seed: int) -> MemoryStore:
    """A journal whose origin, or a sealed state beside it, was changed in up to three fields."""
    rng = random.Random(seed)
    bodies = list(bodies_of(rng.randrange(WORLDS)))
    cut = rng.randrange(1, len(bodies))
    del bodies[rng.randrange(cut + 1, len(bodies) + 1) :]
    store = store_of(bodies)
    state, chain = RunState(), bytes(32)
    for seqno, body in enumerate(bodies[:cut]):
        state.apply(decode_record(body))
        chain = chain_after(chain, seqno, body)
    head = list(Journal(store).load())[cut - 1].head
    stored = seal(SealedState(cut, chain, head, bodies[0], state_to_pb(state), STATE_VERSION))
    outer = origin_pb2.SealedOrigin.FromString(stored.sealed)
    origin = origin_pb2.Origin.FromString(outer.body)
    for _ in range(rng.choice(CHANGES)):
        roll = rng.random()
        if roll < 0.85:
            change(rng, origin.state)
        elif roll < 0.9:
            genesis = pb.Record.FromString(bodies[0])
            change(rng, genesis.genesis)
            origin.genesis = genesis.SerializeToString(deterministic=True)
        else:
            change(rng, origin)
    outer.body = origin.SerializeToString(deterministic=True)
    if rng.random() < 0.05:
        change(rng, outer)
    sealed = outer.SerializeToString(deterministic=True)
    if rng.random() < 0.5:
        store.keep_seals([StoredState.of(cut, sealed)])
    else:
        dropped = MemoryStore()
        is_received = rng.random() < 0.3
        dropped.drop_before(
            StoredState.received(sealed) if is_received else StoredState.of(cut, sealed)
        )
        dropped.append(store.read(cut, len(bodies)))
        store = dropped
    return store


def try_journal(seed: int) -> list[str]:
    """Read the hand-made journal of a seed everywhere."""
    return read_everywhere(store_of(hand_made_bodies(seed)), seed)


def try_seal(seed: int) -> list[str]:
    """Read the journal with the hand-made sealed state of a seed everywhere."""
    try:
        store = hand_made_seal(seed)
    except FedMezoError as error:
        return [type(error).__name__]
    return read_everywhere(store, seed)


def main() -> int:
    """Try many, and print what they came to."""
    logging.disable()
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for attempt in (try_journal, try_seal):
        found: Counter[str] = Counter()
        untyped: dict[str, int] = {}
        for seed in range(first, first + count):
            try:
                found.update(attempt(seed) or ["none"])
            except Exception as error:
                frame = error.__traceback__
                while frame is not None and frame.tb_next is not None:
                    frame = frame.tb_next
                assert frame is not None
                where = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"
                untyped.setdefault(f"{type(error).__name__}: {str(error)[:100]} ({where})", seed)
        print(attempt.__name__, count, dict(found))
        for what, seed in untyped.items():
            print(f"  seed {seed}: {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
