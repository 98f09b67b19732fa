"""How to rebuild a model's weights from a journal: what to begin from, which commits to apply."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedmezo_core.errors import ConfigError, JournalCorruptError
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.party_copy import verified
from fedmezo_core.records import Answered, Committed, Evaluated, Genesis, Snapshotted
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.download import downloaded
from fedmezo_core.wire.snapshots import Snapshot, file_name

if TYPE_CHECKING:
    from fedmezo_core.zo.weights import Weights

DOWNLOAD_PATIENCE_S = 60.0
"""Time without the coordinator after which a download of a snapshot is given up."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to rebuild the weights after a round."""

    genesis: Genesis
    snapshot: Snapshot | None
    """The snapshot to begin from; None: the base."""
    commits: list[Committed]
    """The commits to apply, oldest first."""
    round: int
    """The round whose weights it leads to."""
    head: bytes
    """The journal's head after that round's commit."""
    answers: int | None
    """Answers of the rounds up to it; None if the journal's first records were dropped."""
    evaluated: Evaluated | None
    """The newest evaluation up to that round."""

    def facts(self, weights_digest: bytes) -> dict[str, str]:
        """What the card of an exported model tells of the run: values by name."""
        run = self.genesis.config
        facts = {"Round": f"{self.round} of {run.rounds}"}
        if self.answers is not None:
            rows = run.local_steps * run.batch_size
            facts["Rows"] = f"{self.answers} answers, each measured on {rows} rows"
        if self.evaluated is not None:
            facts["Evaluation"] = (
                f"loss {self.evaluated.loss:.4f}, accuracy {100 * self.evaluated.accuracy:.1f} % "
                f"on {self.evaluated.rows} rows, after round {self.evaluated.round}"
            )
        return {
            **facts,
            "Head of the journal": f"`{self.head.hex()}`",
            "Digest of the trained weights": f"`{weights_digest.hex()}`",
            "Digest of the base": f"`{self.genesis.base_digest.hex()}`",
        }


def plan_of(journal: Journal, last_round: int | None) -> Plan:
    """Verify a journal and plan how to rebuild the weights after `last_round`; None: the last one.

    Raises `ConfigError` for a round whose weights cannot be rebuilt.
    """
    origin = journal.origin()
    first_round = 0 if origin is None else origin.round
    genesis = None if origin is None else origin.genesis
    heads = {} if origin is None else {origin.round: origin.head}
    head = b"" if origin is None else origin.head
    answers = 0
    evaluated: Evaluated | None = None
    commits: list[Committed] = []
    recorded: list[Snapshotted] = []
    for entry, record in verified(journal):
        match record:
            case Genesis():
                genesis, head = record, entry.head
            case Answered() | Evaluated() if last_round is not None and record.round > last_round:
                pass
            case Answered():
                answers += 1
            case Evaluated():
                evaluated = record
            case Committed():
                commits.append(record)
                if last_round is None or record.round <= last_round:
                    head = entry.head
                if origin is not None:
                    heads[record.round] = entry.head
            case Snapshotted():
                recorded.append(record)
    if genesis is None:
        raise JournalCorruptError("The journal does not begin with a genesis record.")
    newest = first_round + len(commits)
    last = newest if last_round is None else last_round
    if last > newest:
        raise ConfigError(
            f"--round {last} is not committed yet, the journal ends at round {newest}; choose an "
            "earlier one."
        )
    commits = commits[: max(last - first_round, 0)]
    from_base = [number for number, commit in enumerate(commits) if commit.from_base]
    if origin is None or from_base:
        kept = commits[from_base[-1] :] if from_base else commits
        counted = answers if origin is None else None
        return Plan(genesis, None, kept, last, head, counted, evaluated)
    usable = [one for one in recorded if first_round <= one.round <= last]
    if not usable:
        rounds = ", ".join(str(one.round) for one in recorded if one.round >= first_round)
        raise ConfigError(
            f"The weights after round {last} cannot be rebuilt: the records up to round "
            f"{first_round} were dropped, and there are snapshots of rounds {rounds or '(none)'}; "
            "choose one of these or a later --round."
        )
    found = usable[-1]
    snapshot = Snapshot(
        found.round, heads[found.round], found.weights_digest, found.file_sha256, found.file_bytes
    )
    kept = commits[found.round - first_round :]
    return Plan(genesis, snapshot, kept, last, head, None, evaluated)


def take_snapshot(
    weights: Weights,
    snapshot: Snapshot,
    folder: Path | None,
    connect: Callable[[], CoordinatorClient],
    run_id: str,
) -> None:
    """Set `weights` to those of a snapshot in `folder`; None: download it from the coordinator.

    Raises `SnapshotError` if the snapshot is missing or is not what the journal says.
    """
    from fedmezo_core.zo.snapshot_files import install_snapshot

    if folder is not None:
        install_snapshot(folder.expanduser() / file_name(run_id, snapshot.round), weights, snapshot)
        return

    async def work() -> None:
        async with (
            connect() as client,
            downloaded(
                client,
                run_id,
                snapshot,
                folder=Path(tempfile.gettempdir()),
                weights_bytes=snapshot.file_bytes,
                give_up_after_s=DOWNLOAD_PATIENCE_S,
            ) as path,
        ):
            install_snapshot(path, weights, snapshot)

    asyncio.run(work())
