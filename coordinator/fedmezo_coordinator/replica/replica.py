"""The replica: the coordinator's own copy of the model, in a separate process.

`describe` loads the base model and prints its digests. `follow` replays the journal, digests the
weights in digest rounds, evaluates them on held-out rows, writes snapshots, and reports all three
to the daemon. The orders are one line of JSON on standard input; end of file on it means that the
daemon is gone. An error is printed as one line `<class>: <sentence>` on standard error.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmezo_coordinator.replica.supervisor import RETRY, USER_ERROR
from fedmezo_core.config import RunConfig
from fedmezo_core.errors import (
    FedMezoError,
    JournalCompactedError,
    SnapshotError,
    UnavailableError,
)
from fedmezo_core.journal.codec import config_from_pb, decode_record
from fedmezo_core.journal.journal import head_after
from fedmezo_core.program import long_step, newest_step, worker_packages
from fedmezo_core.records import Committed, Evaluated
from fedmezo_core.wire.client import CoordinatorClient, RunDescription
from fedmezo_core.wire.reconnecting import Reconnecting
from fedmezo_core.wire.snapshots import Snapshot, file_name
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import journal_pb2 as pb

if TYPE_CHECKING:
    from fedmezo_core.zo.model.loading import SharedBases
    from fedmezo_core.zo.party import Party

log = logging.getLogger("fedmezo.replica")

WAIT_MS = 20_000
"""Longest time that the daemon may hold a read of the journal until there are news."""
COMPLAINT_CHARS_MAX = 512
"""Longest complaint that is sent to the daemon."""
ROUNDS_BEHIND_MAX = 8
"""A replica further behind catches up in one pass and skips the digests on the way."""
TELL_STEP_EVERY_S = 0.5
OVERDUE_S = 30.0
"""Longest time that evaluations may take together which are due at once."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the child process; the only argument is `describe` or `follow`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon, which stops us.
    mode = (sys.argv[1:] if arguments is None else arguments)[0]
    logging.disable(logging.INFO if mode == "describe" else logging.CRITICAL)
    orders = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        if mode == "describe":
            threading.Thread(target=_tell_steps, daemon=True).start()
            _tell(describe(orders))
        else:
            asyncio.run(follow(orders))
    except FedMezoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        is_temporary = isinstance(error, (UnavailableError, JournalCompactedError))
        return RETRY if is_temporary else USER_ERROR
    return 0


def _end_with_parent() -> None:
    # A thread that waits in sys.stdin would break the shutdown of the interpreter.
    while os.read(0, 4096):
        pass
    os._exit(0)


def _tell_steps() -> None:
    """Say again and again how far this process is, in lines of JSON before the answer."""
    while True:
        time.sleep(TELL_STEP_EVERY_S)
        if (step := newest_step()) is not None:
            told = {"what": step.what, "total": step.total, "unit": step.unit, "done": step.done}
            _tell({"step": told})


def _tell(values: dict[str, Any]) -> None:
    sys.stdout.write(f"{json.dumps(values)}\n")  # In one piece: two threads tell.
    sys.stdout.flush()


def describe(orders: dict[str, Any]) -> dict[str, Any]:
    """Load the base model and return its digests and sizes, and what the `rate_rows` say.

    Fits the run's adapter to `adapter_rows` first, if there are any, and checks the held-out rows.
    The base is read once for all of it.
    What is logged meanwhile as a warning is returned too, for the daemon to log.
    """
    config = config_from_pb(pb.RunConfig.FromString(bytes.fromhex(orders["config"])))
    with worker_packages("load a base"):
        from fedmezo_core.zo.model.loading import SharedBases
    bases = SharedBases(keeps=True)
    warnings = _Warnings(logging.WARNING)
    logging.getLogger("fedmezo").addHandler(warnings)
    try:
        if orders.get("adapter_rows") is not None:
            _fit_adapter(orders, config, bases)
        copy = _Copy(orders, config, bases)
        copy.party.check_can_begin()
        genesis = copy.party.genesis()
        measured = _measured(copy.party, orders)
    finally:
        logging.getLogger("fedmezo").removeHandler(warnings)
    return {
        "manifest_digest": genesis.manifest_digest.hex(),
        "base_digest": genesis.base_digest.hex(),
        "tokenizer_digest": genesis.tokenizer_digest.hex(),
        "tokenizer_parts": [part.hex() for part in genesis.tokenizer_parts],
        "trainable_elements": genesis.trainable_elements,
        "trainable_bytes": genesis.trainable_bytes,
        "target_modules": list(genesis.config.lora.target_modules) if genesis.config.lora else [],
        "measured": measured,
        "warnings": warnings.messages,
    }


def _fit_adapter(orders: dict[str, Any], config: RunConfig, bases: SharedBases) -> None:
    """Fit a new run's adapter, in place of one that an earlier attempt has left."""
    with worker_packages("fit an adapter"):
        from fedmezo_core.zo.fitting import write_fitted_adapter
    folder = Path(orders["adapter"])
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    write_fitted_adapter(
        config, orders["model"], orders["adapter_rows"], new, threads=orders["threads"], bases=bases
    )
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def _measured(party: Party, orders: dict[str, Any]) -> dict[str, Any]:
    """The rate and eps that suit the run, by the first of the `rate_rows` that can tell.

    Without values if none can, with the reason; raises that if the orders say `must_measure`.
    """
    from fedmezo_core.zo.data.rows import read_rows
    from fedmezo_core.zo.probing.readings import probe_for_limits, probe_party

    config, why_not = party.config, ""
    workers = config.workers_expected
    costs = {"threads": orders["threads"], "row_states_max": orders["row_states_max"]}
    for path in orders.get("rate_rows", ()):
        try:
            rows = read_rows(path, config.task)
            with long_step(f"measuring the learning rate on {Path(path).name}"):
                if orders["must_measure"]:
                    proposal, _ = probe_party(party, rows, workers, **costs)
                    values = proposal.values(normalized=config.normalized_step)
                else:
                    values = probe_for_limits(party, rows, workers, **costs)
        except FedMezoError as error:
            if orders["must_measure"]:
                raise
            why_not = f"{error}"
        else:
            return {"values": values, "rows": path, "why_not": ""}
    return {"values": {}, "rows": "", "why_not": why_not}


class _Warnings(logging.Handler):
    """Keeps the messages that it handles."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


class _Copy:
    """The replica's model, and the held-out rows that it is evaluated on."""

    def __init__(
        self, orders: dict[str, Any], config: Any, bases: SharedBases | None = None
    ) -> None:
        with worker_packages("keep a replica"):
            from fedmezo_core.zo.assignment import open_row_states
            from fedmezo_core.zo.data.rows import read_rows
            from fedmezo_core.zo.forward.row_states import SpooledRows
            from fedmezo_core.zo.model.allocator import keep_freed_memory
            from fedmezo_core.zo.party import open_party
        keep_freed_memory()
        adapter = orders["adapter"]
        self.party = open_party(
            config,
            orders["model"],
            adapter=None if adapter is None else Path(adapter),
            threads=orders["threads"],
            bases=bases,
        )
        heldout = None if orders["heldout"] is None else Path(orders["heldout"])
        self.heldout = (
            None if heldout is None else self.party.encode(heldout, read_rows(heldout, config.task))
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
        from fedmezo_core.zo.commits import commits_of

        self.party.weights.apply(commits[0].round, commits_of(commits))

    def take_snapshot(self, folder: Path, snapshot: Snapshot) -> bool:
        """Take a snapshot's weights from its file; False if that is missing or damaged."""
        from fedmezo_core.zo.plain.snapshot_header import sha256_of
        from fedmezo_core.zo.snapshot_files import install_snapshot

        path = folder / file_name(self.party.config.run_id, snapshot.round)
        try:
            # Checked before any weight changes.
            if sha256_of(path) != snapshot.file_sha256:
                return False
        except OSError:
            return False
        install_snapshot(path, self.party.weights, snapshot)
        return True

    def snapshot(self, folder: Path, head: bytes, digest: bytes) -> wire.SnapshotReport:
        """Write a snapshot; a failure is reported, not raised, because the run does not need it."""
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
    """The rounds after which the replica stops its replay to digest, to evaluate, to write."""

    rounds: int
    digest_every: int
    evaluate_every: int
    evaluated: frozenset[int]
    """Rounds whose evaluation is in the journal already."""
    snapshot_every: int = 0
    """Rounds between two snapshots; 0: none are written."""
    snapshotted: int = 0
    """Round of the newest snapshot in the journal."""

    def digests(self, round_: int) -> bool:
        return round_ % self.digest_every == 0 or round_ == self.rounds

    def evaluates(self, round_: int) -> bool:
        is_due = round_ % self.evaluate_every == 0 or round_ == self.rounds
        return is_due and round_ not in self.evaluated

    def stops(self, round_: int) -> bool:
        """Whether anything is due after this round."""
        return self.digests(round_) or self.evaluates(round_) or self.snapshots(round_)

    def snapshots(self, round_: int) -> bool:
        """Whether a snapshot is due: in the first digest round from each multiple on.

        In digest rounds the workers confirm the weights.
        """
        return (
            self.snapshot_every > 0
            and self.snapshotted < round_ < self.rounds
            and round_ % self.digest_every == 0
            and round_ % self.snapshot_every < self.digest_every
        )

    def next_stop(self, rounds: list[int], evaluation_s: float) -> int:
        """How many of the commits of `rounds` to apply before the replay stops.

        Args:
            rounds: The rounds that wait, in order.
            evaluation_s: How long an evaluation takes.

        If several evaluations are due and would take too long, only the newest is made. Of several
        snapshots only the newest is written. Work that takes longer than the rounds in between must
        not delay the digests or the end of the run.
        """
        is_behind = len(rounds) > ROUNDS_BEHIND_MAX
        written = max(filter(self.snapshots, rounds), default=None)
        for count, round_ in enumerate(rounds, start=1):
            is_made = self.is_made(round_, rounds[count:], evaluation_s)
            if is_made or round_ == written or (self.digests(round_) and not is_behind):
                return count
        return len(rounds)

    def is_made(self, round_: int, waiting: list[int], evaluation_s: float) -> bool:
        """Whether the evaluation after `round_` is made if the rounds of `waiting` follow."""
        later = sum(map(self.evaluates, waiting))
        is_in_time = (later + 1) * evaluation_s <= OVERDUE_S
        return self.evaluates(round_) and (later == 0 or is_in_time)


class _Follower:
    """Replays the journal into a copy of the model and reports to the daemon."""

    def __init__(
        self,
        orders: dict[str, Any],
        client: CoordinatorClient,
        description: RunDescription,
        evaluated: frozenset[int],
    ) -> None:
        """Load the model; `evaluated` are the rounds whose evaluation is in the journal already."""
        config, offer = description.genesis.config, description.snapshot
        self._client = client
        self._run_id = config.run_id
        self._secret = bytes.fromhex(orders["secret"])
        self._batch_size = orders["evaluate_batch_size"]
        self._folder = Path(orders["snapshots"])
        self._stops = _Stops(
            rounds=config.rounds,
            digest_every=config.digest_every_rounds,
            evaluate_every=orders["evaluate_every_rounds"],
            evaluated=evaluated,
            snapshot_every=orders["snapshot_every_rounds"],
            snapshotted=0 if offer is None else offer.snapshot.round,
        )
        self._copy = _Copy(orders, config)
        self._copy.party.check_same_base(description.genesis)
        self._weights = self._copy.party.weights
        self._head = self._head_read = description.head
        """Heads after the commits that were applied, and after those that were read."""
        self._waiting: list[tuple[Committed, bytes]] = []
        """Commits to apply, each with the head after it."""
        self._evaluated_round = -1
        self._evaluation_s = 0.0
        """How long the last evaluation took; the first one does not count."""
        if offer is not None and self._copy.take_snapshot(self._folder, offer.snapshot):
            self._head = self._head_read = offer.snapshot.head
        if description.needs_snapshot and self._weights.round == 0:
            raise SnapshotError(
                "The journal no longer has the first rounds, and the newest snapshot in "
                f"{self._folder} is missing or damaged; put it back from a copy."
            )

    async def run(self) -> None:
        """Replay and report until the run is finished."""
        await self._report()
        seqno, finished = 0, False
        while not finished:
            page = await self._next_page(seqno)
            seqno, finished = page.next_seqno, page.finished
            self._read(page)
            while self._waiting:
                rounds = [commit.round for commit, _ in self._waiting]
                count = self._stops.next_stop(rounds, self._evaluation_s)
                commits, self._waiting = self._waiting[:count], self._waiting[count:]
                self._copy.apply([commit for commit, _ in commits])
                self._head = commits[-1][1]
                if self._stops.stops(self._weights.round):
                    await self._report()
        if self._weights.round not in (self._stops.rounds, self._evaluated_round):
            # The run was stopped early, so this was its last round.
            self._stops = dataclasses.replace(self._stops, rounds=self._weights.round)
            await self._report()

    async def _next_page(self, seqno: int) -> wire.ReadJournalResponse:
        reconnecting = Reconnecting(log)
        while True:
            try:
                return await self._client.read_journal(
                    seqno,
                    run_id=self._run_id,
                    commits_only=True,
                    wait_ms=WAIT_MS,
                    from_round=self._weights.round + 1 if seqno == 0 else 0,
                    # Nobody asks for digests of rounds that ended before this process began.
                    from_newest_base=seqno == 0,
                )
            except UnavailableError as error:
                await reconnecting.wait_after(error)

    def _read(self, page: wire.ReadJournalResponse) -> None:
        self._head_read = page.head_before or self._head_read
        for entry in page.entries:
            record = decode_record(entry.record)
            if isinstance(record, Committed):
                self._head_read = head_after(self._head_read, entry.record)
                self._waiting.append((record, self._head_read))

    async def _report(self) -> None:
        """Report the digest of the weights, and the snapshot and evaluation that are due."""
        round_, digest, stops = self._weights.round, self._weights.digest(), self._stops
        waiting = [commit.round for commit, _ in self._waiting]
        send = partial(self._client.report_replica, self._run_id, self._secret, round_, digest)
        # The digest goes first: a vote may wait for it, and an evaluation takes long.
        await send(None)
        if stops.snapshots(round_) and not any(map(stops.snapshots, waiting)):
            await send(None, self._copy.snapshot(self._folder, self._head, digest))
        if stops.is_made(round_, waiting, self._evaluation_s):
            began_s = time.monotonic()
            await send(self._copy.evaluate(digest, self._batch_size))
            if self._evaluated_round >= 0:
                # The first one computes the states of rows that the later ones keep.
                self._evaluation_s = time.monotonic() - began_s
            self._evaluated_round = round_


async def follow(orders: dict[str, Any]) -> None:
    """Follow the journal until the run is finished, or until the daemon ends this process."""
    async with CoordinatorClient(orders["address"]) as client:
        description = await client.get_run(orders["run_id"])
        status = await client.get_status(orders["run_id"])
        evaluated = frozenset(e.round for e in status.evaluations)
        await _Follower(orders, client, description, evaluated).run()


if __name__ == "__main__":
    sys.exit(main())
