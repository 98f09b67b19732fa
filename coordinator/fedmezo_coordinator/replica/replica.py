"""The replica: the coordinator's own copy of the model, in a process of its own.

`describe` loads the base and prints what names it. `follow` replays the journal, digests the weights
in digest rounds, evaluates them on held-out rows, and reports both to the daemon. Orders come as one
JSON line on standard input; its end of file means that the daemon is gone. Errors leave as one line
`<class>: <sentence>` on standard error.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmezo_coordinator.replica.supervisor import RETRY, USER_ERROR
from fedmezo_core.errors import (
    FedMezoError,
    JournalCompactedError,
    ModelError,
    SnapshotError,
    UnavailableError,
)
from fedmezo_core.journal.codec import config_from_pb, decode_record
from fedmezo_core.journal.journal import head_after
from fedmezo_core.records import Committed, Evaluated
from fedmezo_core.wire.backoff import delay_s
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.snapshots import Snapshot, file_name
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import journal_pb2 as pb

WAIT_MS = 20_000
COMPLAINT_CHARS_MAX = 512
"""Longest complaint sent to the daemon."""
LAG_ROUNDS_MAX = 8
"""Further behind than this the replica catches up in one pass instead of digesting every round."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the child process."""
    logging.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon, which then stops us.
    mode = (sys.argv[1:] if arguments is None else arguments)[0]
    orders = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        if mode == "describe":
            print(json.dumps(describe(orders)), flush=True)
        else:
            asyncio.run(follow(orders))
    except FedMezoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        is_temporary = isinstance(error, (UnavailableError, JournalCompactedError))
        return RETRY if is_temporary else USER_ERROR
    return 0


def _end_with_parent() -> None:
    # Not through sys.stdin: a thread that waits in it breaks the interpreter's own end.
    while os.read(0, 4096):
        pass
    os._exit(0)


def describe(orders: dict[str, Any]) -> dict[str, Any]:
    """Load the base and say what names it; also checks the held-out rows."""
    config = config_from_pb(pb.RunConfig.FromString(bytes.fromhex(orders["config"])))
    copy = _Copy(orders, config)
    genesis = copy.party.genesis()
    return {
        "manifest_digest": genesis.manifest_digest.hex(),
        "base_digest": genesis.base_digest.hex(),
        "tokenizer_digest": genesis.tokenizer_digest.hex(),
        "trainable_elements": genesis.trainable_elements,
        "trainable_bytes": genesis.trainable_bytes,
    }


class _Copy:
    """The weights, and the rows to evaluate them on."""

    def __init__(self, orders: dict[str, Any], config: Any) -> None:
        try:
            from fedmezo_core.zo.assignment import open_row_states
            from fedmezo_core.zo.data.rows import read_examples
            from fedmezo_core.zo.forward.row_states import SpooledRows
            from fedmezo_core.zo.model.allocator import keep_freed_memory
            from fedmezo_core.zo.party import open_party
        except ImportError as error:
            raise ModelError(
                f"The package {error.name} is missing; install fedmezo[worker] where the coordinator "
                "keeps its replica."
            ) from None
        keep_freed_memory()
        adapter = orders["adapter"]
        self.party = open_party(
            config,
            orders["model"],
            adapter=None if adapter is None else Path(adapter),
            threads=orders["threads"],
        )
        task = self.party.task
        heldout = orders["heldout"]
        self.heldout = (
            None if heldout is None else task.encode(read_examples(heldout, task.columns))
        )
        self.row_states = None
        if states_max := orders["row_states_max"]:
            self.row_states = open_row_states(
                self.party,
                SpooledRows(states_max),
                visits=config.rounds / orders["evaluate_every_rounds"],
                batch_size=orders["evaluate_batch_size"],
            )

    def apply(self, commits: list[Committed]) -> None:
        from fedmezo_core.zo.party import commits_of

        self.party.weights.apply(commits[0].round, commits_of(commits))

    def take_snapshot(self, folder: Path, snapshot: Snapshot) -> bool:
        """Begin from a snapshot that this replica, or an earlier one, wrote; whether it is still sound."""
        from fedmezo_core.zo.snapshot_files import install_snapshot, sha256_of

        path = folder / file_name(self.party.config.run_id, snapshot.round)
        try:
            # Before a weight is touched.
            if sha256_of(path) != snapshot.file_sha256:
                return False
        except OSError:
            return False
        install_snapshot(path, self.party.weights, snapshot)
        return True

    def snapshot(self, folder: Path, head: bytes, digest: bytes) -> wire.SnapshotReport:
        """Write the weights; a disk that refuses is the report, because the run can do without."""
        from fedmezo_core.zo.snapshot_files import write_snapshot

        party = self.party
        try:
            written = write_snapshot(
                folder, party.weights, run_id=party.config.run_id, head=head, weights_digest=digest
            )
        except SnapshotError as error:
            return wire.SnapshotReport(complaint=str(error)[:COMPLAINT_CHARS_MAX])
        return wire.SnapshotReport(file_sha256=written.file_sha256, file_bytes=written.file_bytes)

    def evaluate(self, digest: bytes, batch_size: int) -> Evaluated | None:
        if self.heldout is None:
            return None
        from fedmezo_core.zo.data.held_out import evaluate

        result = evaluate(
            self.party.task,
            self.party.loaded.model,
            self.heldout,
            batch_size,
            around_batch=None if self.row_states is None else self.row_states.known,
        )
        return Evaluated(
            round=self.party.weights.round,
            loss=result.loss,
            accuracy=result.accuracy,
            rows=result.row_count,
            weights_digest=digest,
            auc=result.auc,
        )


@dataclass(frozen=True, slots=True)
class _Stops:
    """At which rounds the replica pauses its replay to digest, and to evaluate."""

    rounds: int
    digest_every: int
    evaluate_every: int
    evaluated: frozenset[int]
    """Rounds that the journal already holds an evaluation of."""
    snapshot_every: int = 0
    """0: never."""
    snapshotted: int = 0
    """Round of the newest snapshot in the journal."""

    def digests(self, round_: int) -> bool:
        return round_ % self.digest_every == 0 or round_ == self.rounds

    def evaluates(self, round_: int) -> bool:
        is_due = round_ % self.evaluate_every == 0 or round_ == self.rounds
        return is_due and round_ not in self.evaluated

    def stops(self, round_: int) -> bool:
        """Whether there is anything to do."""
        return self.digests(round_) or self.evaluates(round_) or self.snapshots(round_)

    def snapshots(self, round_: int) -> bool:
        """At the first digest round from each multiple on: there the workers confirm the weights."""
        return (
            self.snapshot_every > 0
            and self.snapshotted < round_ < self.rounds
            and round_ % self.digest_every == 0
            and round_ % self.snapshot_every < self.digest_every
        )


async def follow(orders: dict[str, Any]) -> None:
    """Follow the journal for as long as the daemon lives, then until the run is finished."""
    secret = bytes.fromhex(orders["secret"])
    run_id = orders["run_id"]
    async with CoordinatorClient(orders["address"]) as client:
        description = await client.get_run(run_id)
        config = description.genesis.config
        copy = _Copy(orders, config)
        copy.party.check_same_base(description.genesis)
        status = await client.get_status(run_id)
        stops = _Stops(
            rounds=config.rounds,
            digest_every=config.digest_every_rounds,
            evaluate_every=orders["evaluate_every_rounds"],
            evaluated=frozenset(e.round for e in status.evaluations),
            snapshot_every=orders["snapshot_every_rounds"],
            snapshotted=0 if description.snapshot is None else description.snapshot.snapshot.round,
        )
        weights = copy.party.weights
        # Commits to apply, each with the head after it.
        waiting: list[tuple[Committed, bytes]] = []
        read_head = head = description.head
        seqno, attempt, evaluated_round = 0, 0, -1
        if description.snapshot is not None:
            newest = description.snapshot.snapshot
            if copy.take_snapshot(Path(orders["snapshots"]), newest):
                read_head = head = newest.head
        if description.needs_snapshot and weights.round == 0:
            raise SnapshotError(
                "The journal does not have the first rounds any more, and the newest snapshot in "
                f"{orders['snapshots']} is not there or damaged; put it back from a copy."
            )

        async def pause() -> None:
            nonlocal evaluated_round
            digest = weights.digest()
            # The digest at once: a vote may wait for it, and an evaluation takes long.
            await client.report_replica(run_id, secret, weights.round, digest, None)
            if stops.snapshots(weights.round) and not any(
                stops.snapshots(commit.round) for commit, _ in waiting
            ):
                written = copy.snapshot(Path(orders["snapshots"]), head, digest)
                await client.report_replica(run_id, secret, weights.round, digest, None, written)
            is_newest = not any(stops.evaluates(commit.round) for commit, _ in waiting)
            if stops.evaluates(weights.round) and is_newest:
                evaluation = copy.evaluate(digest, orders["evaluate_batch_size"])
                await client.report_replica(run_id, secret, weights.round, digest, evaluation)
                evaluated_round = weights.round

        await pause()
        finished = False
        while not finished:
            try:
                page = await client.read_journal(
                    seqno,
                    run_id=run_id,
                    commits_only=True,
                    wait_ms=WAIT_MS,
                    from_round=weights.round + 1 if seqno == 0 else 0,
                    # Nobody asks for the digests of rounds that were over before this process began.
                    from_newest_base=seqno == 0,
                )
                attempt = 0
            except UnavailableError:
                await asyncio.sleep(delay_s(attempt, random.random()))
                attempt += 1
                continue
            seqno, finished = page.next_seqno, page.finished
            read_head = page.head_before or read_head
            for entry in page.entries:
                record = decode_record(entry.record)
                if isinstance(record, Committed):
                    read_head = head_after(read_head, entry.record)
                    waiting.append((record, read_head))
            while waiting:
                count = _next_stop(stops, [commit.round for commit, _ in waiting])
                commits, waiting = waiting[:count], waiting[count:]
                copy.apply([commit for commit, _ in commits])
                head = commits[-1][1]
                if stops.stops(weights.round):
                    await pause()
        if weights.round not in (config.rounds, evaluated_round):
            # The run was stopped early: this was its last round.
            stops = dataclasses.replace(stops, rounds=weights.round)
            await pause()


def _next_stop(stops: _Stops, rounds: list[int]) -> int:
    """How many of the waiting commits to apply in one pass.

    Of several evaluations that are due only the newest is made: one that takes longer than the rounds
    between two must not hold up the digests, or the end of the run. So it is with snapshots.
    """
    hurried = len(rounds) > LAG_ROUNDS_MAX
    evaluated = max((round_ for round_ in rounds if stops.evaluates(round_)), default=None)
    written = max((round_ for round_ in rounds if stops.snapshots(round_)), default=None)
    for count, round_ in enumerate(rounds, start=1):
        if round_ in (evaluated, written) or (stops.digests(round_) and not hurried):
            return count
    return len(rounds)


if __name__ == "__main__":
    sys.exit(main())
