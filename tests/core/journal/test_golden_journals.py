"""Journals of every version so far: this version reads them to the same heads, states and weights.

Text golden files would not show what a file on a user's disk is, so these are whole files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmezo_core.journal.codec import decode_record, encode_records
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.party_copy import verified
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.machines.state_codec import state_of
from fedmezo_core.records import Committed, Genesis, Record
from fedmezo_core.zo.commits import commits_of
from fedmezo_core.zo.materialize import materialize
from fedmezo_core.zo.noise import Distribution, Operands, Rounding

HERE = Path(__file__).parents[2] / "golden/journals"
JOURNALS = sorted(HERE.glob("*/*.db"))
SHAPE = (24, 40)


def outcome(path: Path) -> dict[str, Any]:
    """What a journal comes to: its hashes, its folded state, and the weights over one base."""
    store = SqliteStore(path, create=False)
    journal, machine = Journal(store), RoundMachine()
    records: list[Record] = []
    origin = journal.origin()
    if origin is not None:
        machine.restore(state_of(origin))
    for _, record in verified(journal):
        machine.apply(record)
        records.append(record)
    store.close()
    return {
        "records": len(journal),
        "chain": journal.chain.hex(),
        "head": journal.head.hex(),
        "round": machine.round,
        "epoch": machine.epoch,
        "phase": machine.phase.value,
        "weights_sha256": _weights_sha256(
            machine.genesis, [record for record in records if isinstance(record, Committed)]
        ),
    }


def _weights_sha256(genesis: Genesis, commits: list[Committed]) -> str:
    """Of one matrix that every commit is applied to, in the run's types."""
    config = genesis.config
    count = SHAPE[0] * SHAPE[1]
    base = (torch.arange(count, dtype=torch.float32) / count - 0.5).reshape(SHAPE)
    base = base.to(getattr(torch, config.dtype))
    out = torch.empty_like(base)
    # What comes before a commit from the base does not count.
    first = max((n for n, commit in enumerate(commits) if commit.from_base), default=0)
    counting = [replace(commit, from_base=False) for commit in commits[first:]]
    operands = Operands(3, Distribution(config.distribution), Rounding(config.rounding))
    materialize(out, base, commits_of(counting), operands)
    return hashlib.sha256(out.view(torch.uint8).numpy().tobytes()).hexdigest()


def test_there_are_journals_of_every_version() -> None:
    assert {path.parent.name for path in JOURNALS} >= {"v1", "v2"}


def test_a_compacted_journal_comes_to_what_the_whole_one_does() -> None:
    outcomes = json.loads((HERE / "v2/outcomes.json").read_text())
    whole, compacted = outcomes["pool"], outcomes["pool-compacted"]
    assert compacted == whole
    whole, compacted = outcomes["per-worker"], outcomes["per-worker-compacted"]
    # Of these weights only what the commits that are left make of the base can be said.
    assert compacted.pop("weights_sha256") != whole.pop("weights_sha256")
    assert compacted == whole


@pytest.mark.parametrize("path", JOURNALS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_an_earlier_versions_journal_comes_to_what_it_came_to(path: Path, tmp_path: Path) -> None:
    # Opening may migrate the file, so it is a copy that is opened.
    copied = tmp_path / path.name
    shutil.copy(path, copied)
    expected = json.loads((path.parent / "outcomes.json").read_text())[path.stem]
    assert outcome(copied) == expected
    assert outcome(copied) == expected, "and again, after what opening it may have changed"


@pytest.mark.parametrize("path", JOURNALS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_coordinator_can_start_on_it(path: Path, tmp_path: Path) -> None:
    copied = tmp_path / path.name
    shutil.copy(path, copied)
    before = outcome(copied)
    store = SqliteStore(copied, create=False)
    journal, machine = Journal(store), RoundMachine()
    origin = journal.origin()
    if origin is not None:
        machine.restore(state_of(origin))
    for entry in journal.load():
        machine.apply(decode_record(entry.row.body))
    journal.append(encode_records(machine.start().records))
    store.close()
    after = outcome(copied)
    assert after["epoch"] == before["epoch"] + 1
    assert (after["head"], after["weights_sha256"]) == (before["head"], before["weights_sha256"])
