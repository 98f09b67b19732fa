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
from fedmezo_core.program import long_step
from fedmezo_core.records import (
    Answered,
    Committed,
    Evaluated,
    Genesis,
    Opened,
    RoundSlot,
    Snapshotted,
)
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.download import downloaded
from fedmezo_core.wire.snapshots import Snapshot, file_name

if TYPE_CHECKING:
    from fedmezo_core.zo.model.run_file import RunFile
    from fedmezo_core.zo.party import Party
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
    """Answers of the rounds up to it; None if the journal does not have them."""
    workers: int | None
    """Workers that those rounds were opened for; None if the journal does not have that."""
    rows: int | None
    """Rows that these workers have together; None if the journal does not have that."""
    evaluations: list[Evaluated]
    """The evaluations up to that round, by round."""
    best: Evaluated | None
    """The evaluation for which the round was chosen; None if it was not chosen for one."""

    @property
    def known_digests(self) -> dict[int, bytes]:
        """Round -> digest of the weights after it, of rounds that the run has evaluated."""
        return {one.round: one.weights_digest for one in self.evaluations}

    def check(self, round_: int, digest: bytes) -> None:
        """Raise `DivergedError` if the weights that were rebuilt are not those evaluated."""
        known = self.known_digests.get(round_, digest)
        if known != digest:
            raise DivergedError(
                f"The weights rebuilt for round {round_} have digest {digest.hex()}, "
                f"those evaluated had {known.hex()}; check this machine's "
                "memory and the base model, then try again."
            )

    def run_file(self, weights_digest: bytes) -> RunFile:
        """What an exported folder remembers of the run."""
        from fedmezo_core.zo.model.run_file import ExportedEvaluation, RunFile

        return RunFile(
            contract=self.genesis.config,
            round=self.round,
            head=self.head.hex(),
            weights_digest=weights_digest.hex(),
            base_digest=self.genesis.base_digest.hex(),
            evaluations=tuple(
                ExportedEvaluation(
                    round=one.round,
                    loss=one.loss,
                    accuracy=one.accuracy,
                    auc=one.auc,
                    rows=one.rows,
                )
                for one in self.evaluations
            ),
        )

    def facts(self, weights_digest: bytes) -> dict[str, str]:
        """What the card of an exported model tells of the run: values by name."""
        run = self.genesis.config
        facts = {"Prompt": _code(run.task.template)}
        if run.task.verbalizers:
            words = (f"{_code(word)} for {label}" for label, word in run.task.verbalizers.items())
            facts["Words for the classes"] = ", ".join(words)
        facts["Round"] = f"{self.round} of {run.rounds}"
        if self.workers is not None:
            has = "" if self.rows is None else f", with {self.rows} rows together"
            facts["Workers"] = f"{self.workers}{has}"
        if self.answers is not None:
            rows = run.local_steps * run.batch_size
            facts["Rows"] = f"{self.answers} answers, each measured on {rows} rows"
        if self.evaluations:
            newest = self.evaluations[-1]
            facts["Evaluation"] = (
                f"loss {newest.loss:.4f}, accuracy {100 * newest.accuracy:.1f} % "
                f"on {newest.rows} rows, after round {newest.round}"
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
    workers: dict[str, int] = {}
    "Worker -> the first round that was opened for it."
    asked: dict[RoundSlot, str] = {}
    "Slot -> its worker, in a run whose answers say how many rows a worker has."
    rows: dict[str, tuple[int, int]] = {}
    "Worker -> the first round in which it said its number of rows, and that number."
    commits: list[Committed] = []
    recorded: list[Snapshotted] = []
    evaluations: list[Evaluated] = []
    if origin is not None:
        before = state_of(origin)
        evaluations = [before.health.best] if before.health.best is not None else []
        evaluations += before.evaluations
    for entry, record in verified(journal):
        match record:
            case Genesis():
                genesis, heads[0] = record, entry.head
            case Opened():
                for slot, worker in enumerate(record.workers, record.first_slot):
                    workers.setdefault(worker, record.round)
                    if genesis is not None and genesis.config.weighting == "rows":
                        asked[RoundSlot(record.round, slot)] = worker
            case Answered():
                answers[record.round] += 1
                answering = asked.get(RoundSlot(record.round, record.slot))
                if answering is not None and record.rows is not None:
                    rows.setdefault(answering, (record.round, record.rows))
            case Committed():
                check_follows(record, first_round + len(commits), genesis)
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
    whole = origin is None and bool(workers)
    return Plan(
        genesis,
        snapshot,
        commits,
        last,
        heads[last],
        # A party's own copy has no answers, and no cohorts.
        answers=sum(n for round_, n in answers.items() if round_ <= last) if whole else None,
        workers=sum(first <= last for first in workers.values()) if whole else None,
        rows=sum(count for first, count in rows.values() if first <= last) or None,
        evaluations=sorted(
            {one.round: one for one in evaluations if one.round <= last}.values(),
            key=lambda one: one.round,
        ),
        best=chosen,
    )


def check_follows(commit: Committed, round_: int, genesis: Genesis | None) -> None:
    """Raise `JournalCorruptError` unless the commit is the one after `round_`, and the run's."""
    if genesis is None or commit.round != round_ + 1:
        raise JournalCorruptError(
            f"The journal holds a commit of round {commit.round} where one of round {round_ + 1} "
            "must stand; take another copy."
        )
    commit.check_within(genesis.config)


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """Weights that were rebuilt as a `Plan` says."""

    digest: bytes
    """Their digest, 32 bytes."""
    checked_round: int | None
    """The newest round whose digest the run itself had computed, and which is the same here."""


def rebuild_weights(plan: Plan, party: Party) -> Rebuilt:
    """Apply the commits of a plan to a party that has taken its snapshot, or holds the base.

    On the way the weights are compared with the newest digest in the journal. Raises
    `DivergedError` if they have another.
    """
    from fedmezo_core.zo.commits import commits_of

    weights, commits = party.weights, plan.commits
    begin = commits[0].round if commits else plan.round
    checked = max((round_ for round_ in plan.known_digests if round_ >= begin), default=None)
    digest = b""
    for stop in sorted({plan.round, plan.round if checked is None else checked}):
        part = [commit for commit in commits if weights.round < commit.round <= stop]
        if part:
            what = f"replaying rounds {part[0].round} to {part[-1].round}"
            with long_step(what, plan.genesis.trainable_elements, "weights") as step:
                weights.apply(part[0].round, commits_of(part), step.advance)
        with long_step("digesting the weights"):
            digest = weights.digest()
        plan.check(stop, digest)
    return Rebuilt(digest, checked)


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
    connect: Callable[[], CoordinatorClient] | None,
    run_id: str,
) -> None:
    """Set `weights` to those of a snapshot in `folder`; None: download it from the coordinator.

    Raises `SnapshotError` if the snapshot is missing or is not what the journal says.
    """
    from fedmezo_core.zo.snapshot_files import install_snapshot

    if folder is not None or connect is None:
        assert folder is not None
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
