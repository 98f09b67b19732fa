"""Journals whose oldest records were dropped, as a daemon leaves them, with its snapshots."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedmezo import Coordinator, Session
from fedmezo_core.journal.codec import decode_record, encode_records
from fedmezo_core.journal.journal import Journal, JournalStore
from fedmezo_core.journal.sealed import SealedState, seal
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.machines.state_codec import STATE_VERSION, state_to_pb
from fedmezo_core.records import Snapshotted
from fedmezo_core.wire.snapshots import file_name


def drop_records(store: JournalStore, coordinator: Coordinator) -> None:
    """Drop all records so far; the coordinator is of no more use."""
    journal, machine = Journal(store), RoundMachine()
    for entry in journal.load():
        machine.apply(decode_record(entry.row.body))
    sealed = SealedState(
        len(journal),
        journal.chain,
        journal.head,
        coordinator.genesis_bytes,
        state_to_pb(machine.state),
        STATE_VERSION,
        machine.state.agreed,
    )
    Coordinator(None, store)  # A start is a record behind what is dropped.
    store.drop_before(seal(sealed))


def keep_snapshot(store: JournalStore, session: Session, folder: Path) -> Path:
    """Write a session's weights as the snapshot of its round, and record it; returns its file."""
    folder.mkdir(exist_ok=True)
    path = folder / file_name(session.config.run_id, session.round)
    session.save(folder).rename(path)
    data = path.read_bytes()
    sha256, digest = hashlib.sha256(data).digest(), session.engine.digest()
    journal = Journal(store)
    list(journal.load())
    journal.append(encode_records([Snapshotted(session.round, digest, sha256, len(data))]))
    return path
