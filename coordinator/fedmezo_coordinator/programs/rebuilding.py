"""How to rebuild a model's weights from a journal: what to begin from, which commits to apply."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedmezo_core.errors import ConfigError, DivergedError, JournalCorruptError
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.party_copy import verified
from fedmezo_core.machines.state_codec import state_of
from fedmezo_core.records import Committed, Evaluated, Genesis, Snapshotted
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
    evaluated: Evaluated | None = None
    """The evaluation for which the round was chosen; None if it was not chosen for one."""

    def check(self, digest: bytes) -> None:
        """Raise `DivergedError` if the weights that were rebuilt are not those evaluated."""
        if self.evaluated is not None and self.evaluated.weights_digest != digest:
            raise DivergedError(
                f"The weights rebuilt for round {self.evaluated.round} have digest {digest.hex()}, "
                f"those evaluated had {self.evaluated.weights_digest.hex()}; check this machine's "
                "memory and the base model, then try again."
            )


def plan_of(journal: Journal, last_round: int | None, *, best: bool = False) -> Plan:
    """Verify a journal and plan how to rebuild the weights after `last_round`; None: the last one.

    With `best`, the round is that of the evaluation with the smallest loss. Raises `ConfigError`
    for a round whose weights cannot be rebuilt.
    """
    origin = journal.origin()
    first_round = 0 if origin is None else origin.round
    genesis = None if origin is None else origin.genesis
    heads = {} if origin is None else {origin.round: origin.head}
    commits: list[Committed] = []
    recorded: list[Snapshotted] = []
    evaluations: list[Evaluated] = []
    if best and origin is not None:
        before = state_of(origin)
        evaluations = [before.health.best] if before.health.best is not None else []
        evaluations += before.evaluations
    for entry, record in verified(journal):
        match record:
            case Genesis():
                genesis = record
            case Committed():
                commits.append(record)
                if origin is not None:
                    heads[record.round] = entry.head
            case Snapshotted():
                recorded.append(record)
            case Evaluated():
                evaluations.append(record)
    if genesis is None:
        raise JournalCorruptError("The journal does not begin with a genesis record.")
    newest = first_round + len(commits)
    evaluated = _best_of(evaluations) if best else None
    if evaluated is not None:
        last_round = evaluated.round
    last = newest if last_round is None else last_round
    if last > newest:
        raise ConfigError(
            f"--round {last} is not committed yet, the journal ends at round {newest}; choose an "
            "earlier one."
        )
    commits = commits[: max(last - first_round, 0)]
    from_base = [number for number, commit in enumerate(commits) if commit.from_base]
    if origin is None or from_base:
        commits = commits[from_base[-1] :] if from_base else commits
        return Plan(genesis, None, commits, evaluated)
    usable = [one for one in recorded if first_round <= one.round <= last]
    if not usable:
        rounds = [one.round for one in recorded if one.round >= first_round]
        raise ConfigError(
            f"The weights after round {last} cannot be rebuilt: the records up to round "
            f"{first_round} were dropped, and there are snapshots of rounds "
            f"{', '.join(map(str, rounds)) or '(none)'}; choose one of these or a later --round"
            f"{_best_left(evaluations, rounds) if best else ''}."
        )
    found = usable[-1]
    snapshot = Snapshot(
        found.round, heads[found.round], found.weights_digest, found.file_sha256, found.file_bytes
    )
    return Plan(genesis, snapshot, commits[found.round - first_round :], evaluated)


def _best_of(evaluations: list[Evaluated]) -> Evaluated:
    if not evaluations:
        raise ConfigError(
            "--best: the journal holds no evaluation; the coordinator makes them if it has model "
            "and heldout. Leave --best out, or choose a --round."
        )
    return min(evaluations, key=lambda one: one.loss)


def _best_left(evaluations: list[Evaluated], rounds: list[int]) -> str:
    """Which --round has the best evaluation of those that can be rebuilt; empty if none can be."""
    left = [one for one in evaluations if rounds and one.round >= min(rounds)]
    if not left:
        return ""
    found = _best_of(left)
    return f", of which {found.round} has the best evaluation (loss {found.loss:.4f})"


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
