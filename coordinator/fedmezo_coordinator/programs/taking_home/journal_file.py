"""One small file that rebuilds a run's weights from its base: `fedmezo export --as journal`.

It is a journal in SQLite, of the kind that a worker keeps as its `journal_copy`, so that whatever
reads a journal reads it. It holds the genesis record and the commits exactly as they were written,
the evaluations, and one signed head. It has no cohorts, so no worker's name, and no answers, so no
worker's loss, signature or number of rows.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fedmezo_coordinator.programs.taking_home.rebuilding import check_follows
from fedmezo_coordinator.stores.companions import Companions
from fedmezo_coordinator.stores.location import path_beside
from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ConfigError, JournalCorruptError
from fedmezo_core.folders import sync, whole_folder
from fedmezo_core.journal.codec import encode_record
from fedmezo_core.journal.journal import GENESIS, MOVES_HEAD, Journal
from fedmezo_core.journal.party_copy import verified
from fedmezo_core.journal.signed_heads import Signer
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.program import long_step
from fedmezo_core.records import Committed, Evaluated, Genesis, SignedHead, Started
from fedmezo_core.zo.model.adapter_layout import ADAPTER_FILES


@dataclass(frozen=True, slots=True)
class JournalFile:
    """A journal that was written for others, and what it can prove."""

    run: RunConfig
    round: int
    """Its last commit."""
    head: bytes
    """Head after that commit, 32 bytes."""
    signed: SignedHead
    """The newest head that the coordinator signed; without a signature if it signed none."""
    evaluated_round: int | None
    """The newest round whose digest it has; None: a rebuild has nothing to compare with."""
    byte_count: int


def signer_of(journal: str) -> Signer | None:
    """The key beside a coordinator's journal; None if there is none, as beside a copy."""
    return Companions(journal).signer() if path_beside(journal, ".key").exists() else None


def write_journal_file(
    journal: Journal,
    target: Path,
    last_round: int | None,
    *,
    signer: Signer | None = None,
    known_head: SignedHead | None = None,
) -> JournalFile:
    """Write what rebuilds the weights after `last_round` (None: the last one) to the file `target`.

    The head of that round is signed by `signer`. Without one, the newest signed head up to it is
    taken over, from the journal or from `known_head`. Raises `ConfigError` if `target` exists or
    cannot be written, for a round that is not there, and for a journal whose first commits were
    dropped.
    """
    target = target.expanduser().absolute()
    if target.exists():
        raise ConfigError(f"{target} exists; name another file or remove it.")
    if journal.origin() is not None:
        raise ConfigError(
            "The journal's first commits were dropped, so no file of it rebuilds the weights from "
            "the base; give the journal_copy of a worker that has them all, or export the model."
        )
    bodies: list[tuple[int, bytes]] = []
    "Round of the commit that a record comes after, and its body."
    heads: list[bytes] = []
    signed_heads = [] if known_head is None else [known_head]
    epoch, genesis, evaluated = 0, None, []
    for entry, record in verified(journal):
        match record:
            case Genesis():
                genesis = record
                bodies.append((0, entry.row.body))
                heads.append(entry.head)
            case Committed():
                check_follows(record, len(heads) - 1, genesis)
                bodies.append((record.round, entry.row.body))
                heads.append(entry.head)
            case Evaluated():
                evaluated.append(record.round)
                bodies.append((record.round, entry.row.body))
            case Started():
                epoch = record.epoch
            case SignedHead():
                epoch = record.epoch
                signed_heads.append(record)
    if genesis is None:
        raise JournalCorruptError("The journal does not begin with a genesis record.")
    newest = len(heads) - 1
    last = newest if last_round is None else last_round
    if last > newest:
        raise ConfigError(
            f"--round {last} is not committed yet, the journal ends at round {newest}; choose an "
            "earlier one."
        )
    run_id = genesis.config.run_id
    signed = SignedHead(epoch, last, heads[last])
    if signer is not None:
        signature = signer.sign(run_id, last, heads[last])
        signed = SignedHead(epoch, last, heads[last], signer.public_key, signature)
    else:
        usable = [one for one in signed_heads if one.signature and one.round <= last]
        signed = max(usable, key=lambda one: one.round, default=signed)
    kept: list[bytes] = []
    for round_, body in bodies:
        if round_ > last:
            continue
        kept.append(body)
        if body[:1] == GENESIS and signed.round > 0:
            # As in every copy, it says whose copy this is before the first commit.
            kept.append(encode_record(SignedHead(signed.epoch, 0, heads[0], signed.key)))
        if body[:1] in MOVES_HEAD and round_ == signed.round:
            kept.append(encode_record(signed))
    byte_count = _write(target, kept)
    return JournalFile(
        run=genesis.config,
        round=last,
        head=heads[last],
        signed=signed,
        evaluated_round=max((round_ for round_ in evaluated if round_ <= last), default=None),
        byte_count=byte_count,
    )


def adapter_beside(target: Path) -> Path:
    """The folder where `fedmezo rebuild` looks for the adapter that a journal's run began from.

    Raises `ConfigError` if it is there: a new file must not meet the adapter of another run.
    """
    beside = path_beside(str(target), ".adapter")
    if beside.exists():
        raise ConfigError(f"{beside} exists; name another file or remove it.")
    return beside


def copy_adapter(source: Path, target: Path) -> None:
    """Copy an adapter's files to the new folder `target`, whole or not at all.

    Raises `ConfigError` if one cannot be read or written.
    """
    try:
        with whole_folder(target, ConfigError) as folder:
            for name in ADAPTER_FILES:
                shutil.copyfile(source / name, folder / name)
    except OSError as error:
        raise ConfigError(
            f"The adapter {source} cannot be copied to {target} ({error.strerror}); check both."
        ) from None


def _write(target: Path, bodies: list[bytes]) -> int:
    """Write a journal of these records, whole and durably or not at all; returns its size."""
    folder = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        made = Journal(SqliteStore(folder / target.name))
        try:
            with long_step(f"writing {target}", len(bodies), "records") as step:
                for first in range(0, len(bodies), Journal.PAGE_ROWS):
                    step.advance(len(made.append(bodies[first : first + Journal.PAGE_ROWS])))
            # What is handed over is what a reader accepts, the signature included.
            for _ in verified(made):
                pass
        finally:
            made.close()
        (folder / target.name).rename(target)
        sync(target.parent)
        return target.stat().st_size
    except OSError as error:
        raise ConfigError(
            f"The journal cannot be written to {target} ({error.strerror}); name another file."
        ) from None
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
