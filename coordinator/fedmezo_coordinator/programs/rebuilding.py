"""How to rebuild a model's weights from a journal: what to begin from, which commits to apply."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedmezo_core.errors import ConfigError, DivergedError, JournalCorruptError
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.party_copy import verified
from fedmezo_core.machines.state_codec import state_of
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
    best: Evaluated | None
    """The evaluation for which the round was chosen; None if it was not chosen for one."""

    def check(self, digest: bytes) -> None:
        """Raise `DivergedError` if the weights that were rebuilt are not those evaluated."""
        if self.best is not None and self.best.weights_digest != digest:
            raise DivergedError(
                f"The weights rebuilt for round {self.best.round} have digest {digest.hex()}, "
                f"those evaluated had {self.best.weights_digest.hex()}; check this machine's "
                "memory and the base model, then try again."
            )

    def facts(self, weights_digest: bytes) -> dict[str, str]:
        """What the card of an exported model tells of the run: values by name."""
        run = self.genesis.config
        facts = {"Prompt": _code(run.task.template)}
        if run.task.verbalizers:
            words = (f"{_code(word)} for {label}" for label, word in run.task.verbalizers.items())
            facts["Words for the classes"] = ", ".join(words)
        facts["Round"] = f"{self.round} of {run.rounds}"
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


def _code(text: str) -> str:
    """`text` as a JSON string in Markdown, so that its spaces and line breaks can be seen."""
    return f"`{json.dumps(text, ensure_ascii=False)}`"


def plan_of(journal: Journal, last_round: int | None, *, best: bool = False) -> Plan:
    """Verify a journal and plan how to rebuild the weights after `last_round`; None: the last one.

    With `best`, the round is that of the evaluation with the smallest loss. Raises `ConfigError`
    for a round whose weights cannot be rebuilt.
    """
    origin = journal.origin()
    first_round = 0 if origin is None else origin.round
    genesis = None if origin is None else origin.genesis
    heads = {} if origin is None else {origin.round: origin.head}
    answers: Counter[int] = Counter()
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
                genesis, heads[0] = record, entry.head
            case Answered():
                answers[record.round] += 1
            case Committed():
                commits.append(record)
                heads[record.round] = entry.head
            case Snapshotted():
                recorded.append(record)
            case Evaluated():
                evaluations.append(record)
    if genesis is None:
        raise JournalCorruptError("The journal does not begin with a genesis record.")
    newest = first_round + len(commits)
    chosen = _best_of(evaluations) if best else None
    if chosen is not None:
        last_round = chosen.round
    last = newest if last_round is None else last_round
    if last > newest:
        raise ConfigError(
            f"--round {last} is not committed yet, the journal ends at round {newest}; choose an "
            "earlier one."
        )
    commits = commits[: max(last - first_round, 0)]
    from_base = [number for number, commit in enumerate(commits) if commit.from_base]
    snapshot = None
    if from_base:
        commits = commits[from_base[-1] :]
    elif origin is not None:
        snapshot = _snapshot_before(last, first_round, recorded, heads, evaluations if best else [])
        commits = commits[snapshot.round - first_round :]
    return Plan(
        genesis,
        snapshot,
        commits,
        last,
        heads[last],
        answers=None if origin else sum(n for round_, n in answers.items() if round_ <= last),
        evaluated=next((one for one in reversed(evaluations) if one.round <= last), None),
        best=chosen,
    )


def _snapshot_before(
    last: int,
    first_round: int,
    recorded: list[Snapshotted],
    heads: dict[int, bytes],
    evaluations: list[Evaluated],
) -> Snapshot:
    """The newest snapshot up to round `last` of a journal without records up to `first_round`."""
    usable = [one for one in recorded if first_round <= one.round <= last]
    if not usable:
        rounds = [one.round for one in recorded if one.round >= first_round]
        raise ConfigError(
            f"The weights after round {last} cannot be rebuilt: the records up to round "
            f"{first_round} were dropped, and there are snapshots of rounds "
            f"{', '.join(map(str, rounds)) or '(none)'}; choose one of these or a later --round"
            f"{_best_left(evaluations, rounds)}."
        )
    found = usable[-1]
    return Snapshot(
        found.round, heads[found.round], found.weights_digest, found.file_sha256, found.file_bytes
    )


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
