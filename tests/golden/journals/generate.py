"""Write a journal of each kind of run as this version writes them, with what it comes to.

Run it to add the journals of a new version, never to fix a test. The journals of earlier versions
stay, byte for byte.

python -m tests.golden.journals.generate v2
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmezo_core.config import RunConfig
from fedmezo_core.journal.codec import decode_record, encode_records
from fedmezo_core.journal.journal import Journal, MemoryStore
from fedmezo_core.journal.party_copy import JournalCopy
from fedmezo_core.journal.sealed import SealedState, seal
from fedmezo_core.journal.signed_heads import Signer
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.machines.aggregate import to_binary32
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.machines.state_codec import state_to_pb
from fedmezo_core.records import (
    Answered,
    Committed,
    Diverged,
    Evaluated,
    Genesis,
    Opened,
    Paused,
    Record,
    Resumed,
    Scalars,
    SeedRange,
    SignedHead,
    Started,
    Stopped,
)
from tests.core.journal.test_golden_journals import HERE, outcome
from tests.integration.support.harness import config_of, genesis_of
from tests.sim.world import World

Test = Callable[[RunConfig, list[Record]], bool]


WANTED: dict[str, Test] = {
    "per-worker": lambda config, records: (
        config.seed_policy == "per_worker"
        and any(isinstance(record, Diverged) for record in records)
    ),
    "shared": lambda config, _records: config.seed_policy == "shared" and config.report_losses,
    "pool": lambda config, records: (
        config.seed_policy == "pool"
        and any(isinstance(r, Committed) and r.from_base for r in records)
    ),
}
"""Name of a journal -> what makes a simulated run one of that kind."""
ROWS_MAX = 300


def main() -> None:
    folder = HERE / sys.argv[1]
    folder.mkdir()
    outcomes: dict[str, Any] = {}
    for name, wanted in WANTED.items():
        store = simulated(wanted)
        write(store, folder / f"{name}.db")
        outcomes[name] = outcome(folder / f"{name}.db")
    write(paused(), folder / "paused.db")
    outcomes["paused"] = outcome(folder / "paused.db")
    write(copied(simulated(WANTED["per-worker"])), folder / "copy.db")
    outcomes["copy"] = outcome(folder / "copy.db")
    for name in ("per-worker", "pool"):
        write(compacted(simulated(WANTED[name])), folder / f"{name}-compacted.db")
        outcomes[f"{name}-compacted"] = outcome(folder / f"{name}-compacted.db")
    (folder / "outcomes.json").write_text(json.dumps(outcomes, indent=1) + "\n")


def simulated(wanted: Test) -> MemoryStore:
    """The journal of the first seed whose run is of the wanted kind and not long."""
    for seed in range(100_000):
        world = World(seed)
        world.run()
        records = [decode_record(entry.row.body) for entry in Journal(world.store).load()]
        if len(records) <= ROWS_MAX and wanted(world.scenario.config, records):
            return world.store
    raise AssertionError("no simulated run is of this kind")


def paused() -> MemoryStore:
    """A run with every kind of record that no simulated one has."""
    config = config_of(
        workers_min=1, quorum=1, dtype="bfloat16", weight_decay=1.0, digest_every_rounds=2
    )
    store = MemoryStore()
    journal = Journal(store)
    evaluated = Evaluated(1, 0.7, 0.5, 40, b"w" * 32, 0.6)
    journal.append(
        encode_records(
            [
                genesis_of(config),
                Started(1),
                Opened(1, 0, ("w1",), (2e-3,), 1e-4),
                Answered(1, 0, Scalars((0.5, -2.0), None, 12)),
                Committed(1, (SeedRange(1 << 16, (1e-3, -4e-3)),), 77, to_binary32(0.999)),
                evaluated,
                Paused(1, "held-out loss is 3 times its best"),
                Started(2),
                Resumed(0.5),
                Opened(2, 0, ("w1", "w2")),
                Answered(2, 1, Scalars((1.0, 1.5), None, None)),
                Committed(2, (SeedRange(2 << 16, (2e-3, 3e-3)),), 78, to_binary32(0.9995)),
                Stopped(2, "no better for 5 evaluations"),
            ]
        )
    )
    return store


def compacted(store: MemoryStore) -> MemoryStore:
    """The journal without its first records: without those before its last commit from the base,
    if it has one."""
    entries = list(Journal(store).load())
    state = RunState()
    begins = len(entries) // 2
    for entry in entries:
        record = decode_record(entry.row.body)
        if isinstance(record, Committed) and record.from_base:
            begins = entry.row.seqno
    for entry in entries[:begins]:
        state.apply(decode_record(entry.row.body))
    last = entries[begins - 1]
    body = entries[0].row.body
    origin = SealedState(begins, last.row.chain, last.head, body, state_to_pb(state))
    store.drop_before(seal(origin, signer()))
    return store


def signer() -> Signer:
    """Always the same."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Signer(Ed25519PrivateKey.from_private_bytes(b"golden journals of fedmezo, key."))


def copied(store: MemoryStore) -> MemoryStore:
    """A worker's signed copy of a journal."""
    target = MemoryStore()
    copy = JournalCopy(Journal(target))
    entries = list(Journal(store).load())
    genesis = decode_record(entries[0].row.body)
    assert isinstance(genesis, Genesis)
    list(copy.begin(entries[0].row.body, 1, signer().public_key))
    for entry in entries:
        record = decode_record(entry.row.body)
        if isinstance(record, Committed):
            round_, head = record.round, entry.head
            signature = signer().sign(genesis.config.run_id, round_, head)
            copy.add([entry.row.body], SignedHead(2, round_, head, signer().public_key, signature))
    return target


def write(store: MemoryStore, path: Path) -> None:
    file = SqliteStore(path)
    origin = store.origin()
    if origin is not None:
        file.drop_before(origin)
    file.append(store.read(0, len(store)))
    file.close()


if __name__ == "__main__":
    main()
