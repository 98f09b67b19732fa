"""`fedmezo export --as journal` and `fedmezo rebuild`: a small file, and the same weights."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedmezo import Coordinator
from fedmezo_core.config import parse_run
from fedmezo_core.errors import ConfigError, FedMezoError, JournalCorruptError, MismatchError
from fedmezo_core.journal.codec import encode_record
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.party_copy import verified
from fedmezo_core.journal.signed_heads import open_signer
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.records import Answered, Committed, Evaluated, Genesis, Record, SignedHead
from fedmezo_core.zo.party import open_party
from tests.home.conftest import LORA, ROUNDS, FinishedRun, invoked
from tests.integration.support.harness import records_of, run_values, served
from tests.integration.support.parties import save_model

pytestmark = pytest.mark.slow


def written(run: FinishedRun, out: Path, *more: str) -> dict[str, object]:
    said = invoked(
        "export", out, "--as", "journal", "--journal", run.journal, "--format", "json", *more
    )
    values: dict[str, object] = json.loads(said)
    return values


def rebuilt(file: Path, run: FinishedRun, out: Path, *more: str) -> dict[str, object]:
    said = invoked(
        "rebuild", file, "--model", run.model, "--out", out, "--threads", "1", "--format", "json",
        *more,
    )  # fmt: skip
    values: dict[str, object] = json.loads(said)
    return values


def test_it_rebuilds_the_weights_of_the_run(full_run: FinishedRun, tmp_path: Path) -> None:
    file = tmp_path / "away" / "run.journal"
    said = written(full_run, file)
    assert [path.name for path in file.parent.iterdir()] == ["run.journal"]
    assert said["round"] == said["evaluated_round"] == ROUNDS
    assert said["bytes"] == file.stat().st_size < 100_000
    found = rebuilt(file, full_run, tmp_path / "model")
    last = full_run.evaluations[-1]
    assert found["weights_digest"] == last.weights_digest.hex()
    assert (found["checked_round"], found["head"]) == (ROUNDS, said["head"])
    assert "sound" in invoked("journal", "verify", file)


def test_it_holds_commits_and_evaluations_and_no_word_of_a_worker(
    lora_run: FinishedRun, tmp_path: Path
) -> None:
    file = tmp_path / "run.journal"
    written(lora_run, file)
    kinds = [type(record) for record in records_of(file)]
    assert set(kinds) == {Genesis, Committed, Evaluated, SignedHead}
    original = records_of(lora_run.journal)
    assert any(isinstance(record, Answered) for record in original)
    kept = (Genesis, Committed, Evaluated)
    assert [r for r in records_of(file) if not isinstance(r, SignedHead)] == sorted(
        [r for r in original if isinstance(r, kept)],
        key=lambda r: 0 if isinstance(r, Genesis) else 2 if isinstance(r, Evaluated) else 1,
    )
    assert b"clinic-a" in lora_run.journal.read_bytes()
    assert b"clinic" not in file.read_bytes()


def test_an_earlier_round(full_run: FinishedRun, tmp_path: Path) -> None:
    file = tmp_path / "run.journal"
    assert written(full_run, file, "--round", "2")["round"] == 2
    found = rebuilt(file, full_run, tmp_path / "two")
    assert found["weights_digest"] == full_run.evaluations[2].weights_digest.hex()
    again = rebuilt(file, full_run, tmp_path / "one", "--round", "1")
    assert again["weights_digest"] == full_run.evaluations[1].weights_digest.hex()
    with pytest.raises(ConfigError, match="--round 3 is not committed yet"):
        rebuilt(file, full_run, tmp_path / "three", "--round", "3")


def test_the_key_beside_a_journal_signs_any_round(full_run: FinishedRun, tmp_path: Path) -> None:
    copied = tmp_path / "journal.db"
    copied.write_bytes(full_run.journal.read_bytes())
    key = open_signer(tmp_path / "journal.db.key").public_key
    said = written(replace(full_run, journal=copied), tmp_path / "out", "--round", "3")
    assert (said["signed_round"], said["key"]) == (3, key.hex())
    assert f"signed up to round 3 by {key.hex()}" in invoked("journal", "verify", tmp_path / "out")
    # A copy of the copy keeps the signature, also where there is no key.
    (tmp_path / "journal.db.key").unlink()
    again = invoked(
        "export", tmp_path / "again", "--as", "journal", "--journal", tmp_path / "out",
    )  # fmt: skip
    assert f"signed up to round 3 by {key.hex()}" in again
    assert records_of(tmp_path / "again") == records_of(tmp_path / "out")


def test_the_adapter_that_a_run_began_from_goes_with_it(
    lora_run: FinishedRun, exported: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = exported(lora_run, "--as", "adapter")
    assert "if the run began from an adapter, rebuild needs that too (--adapter)" in invoked(
        "export", tmp_path / "first", "--as", "journal", "--journal", lora_run.journal
    )
    config = parse_run(run_values(run_id="second", lora=LORA), "run", None)
    party = open_party(config, str(lora_run.model), adapter=adapter, threads=1)
    Coordinator(party.genesis(), tmp_path / "journal.db").close()
    second = replace(lora_run, journal=tmp_path / "journal.db")
    file, beside = tmp_path / "run.journal", tmp_path / "run.journal.adapter"
    with pytest.raises(ConfigError, match=r"gone cannot be copied"):
        written(second, file, "--adapter", str(tmp_path / "gone"))
    assert not file.exists()
    assert not beside.exists()
    assert written(second, file, "--adapter", str(adapter))["adapter"] == str(beside)
    rebuilt(file, second, tmp_path / "model")
    beside.rename(tmp_path / "elsewhere")
    with pytest.raises(MismatchError, match=r"the same adapter, or none \(--adapter\)"):
        rebuilt(file, second, tmp_path / "other")

    # A coordinator keeps a fitted one beside its journal. A new file never meets another's adapter.
    shutil.copytree(adapter, tmp_path / "journal.db.adapter")
    assert written(second, tmp_path / "b")["adapter"] == str(tmp_path / "b.adapter")
    (tmp_path / "b").unlink()
    with pytest.raises(ConfigError, match=r"b\.adapter exists; name another file"):
        written(second, tmp_path / "b")


async def test_a_running_coordinators_own_signature(full_run: FinishedRun, tmp_path: Path) -> None:
    copied = tmp_path / "journal.db"
    copied.write_bytes(full_run.journal.read_bytes())
    async with served(copied, signer=open_signer(tmp_path / "a.key")) as at:
        said = await asyncio.to_thread(
            invoked, "export", tmp_path / "out", "--as", "journal", "--coordinator", at.address
        )
    assert f"signed up to round {ROUNDS} by " in said


def changed(file: Path, change: type[Record], into: Record, out: Path) -> None:
    """A copy of a journal, sound in itself, with another record in the place of one."""
    source, target = Journal(SqliteStore(file)), Journal(SqliteStore(out))
    records: list[Record] = [record for _, record in verified(source)]
    place = next(n for n, record in reversed(list(enumerate(records))) if type(record) is change)
    records[place] = into
    target.append([encode_record(record) for record in records])
    source.close()
    target.close()


def test_what_was_tampered_with_is_not_rebuilt(full_run: FinishedRun, tmp_path: Path) -> None:
    file = tmp_path / "run.journal"
    written(full_run, file)
    last = full_run.evaluations[-1]
    other = Evaluated(last.round, last.loss, last.accuracy, last.rows, bytes(32))
    changed(file, Evaluated, other, tmp_path / "digest.journal")
    with pytest.raises(FedMezoError, match="those evaluated had 0000"):
        rebuilt(tmp_path / "digest.journal", full_run, tmp_path / "a")
    again = Committed(2, (), 0)
    changed(file, Committed, again, tmp_path / "twice.journal")
    with pytest.raises(JournalCorruptError, match="commit of round 2 where one of round 4 must"):
        rebuilt(tmp_path / "twice.journal", full_run, tmp_path / "a")
    body = bytearray(file.read_bytes())
    head = bytes.fromhex(str(written(full_run, tmp_path / "second")["head"]))
    place = body.index(head)
    body[place] ^= 1
    (tmp_path / "spoiled.journal").write_bytes(body)
    with pytest.raises(JournalCorruptError):
        rebuilt(tmp_path / "spoiled.journal", full_run, tmp_path / "b")
    save_model(tmp_path / "another", change=0.5)
    with pytest.raises(MismatchError, match="base weights loaded here differ"):
        invoked("rebuild", file, "--model", tmp_path / "another", "--out", tmp_path / "c")
    assert not [path for path in tmp_path.iterdir() if path.name in "abc"]


def test_wrong_files(full_run: FinishedRun, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    with pytest.raises(ConfigError, match="there exists; name another file"):
        written(full_run, tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"
    with pytest.raises(ConfigError, match="cannot be written to"):
        written(full_run, tmp_path / "there" / "below")
    with pytest.raises(FedMezoError, match="There is no journal at"):
        rebuilt(tmp_path / "missing", full_run, tmp_path / "out")
    with pytest.raises(ConfigError, match="the file is a journal already"):
        rebuilt(tmp_path / "there", full_run, tmp_path / "out", "--as", "journal")
