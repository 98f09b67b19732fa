"""A federation in one process: a networked run's machines, codec and journal, with one model.

    federation = InMemoryFederation(party, {"movies": rows, "tweets": rows}, judge=judge)
    federation.run()

The round machine, each worker's session machine, the bytes of every message, the records and what a
worker does with an assignment are the product's own code. What differs from a run over gRPC:

- All workers share one party. They hold equal weights at all times, and a worker's local steps are
  never written into the weights, so one copy serves all; each commit is applied to it once.
- Nothing takes time and nothing is lost. Messages are handled one at a time in the order in which
  they were sent, so that answers come in slot order; no deadline passes and no worker leaves.
- Evaluations are made between two messages, by the same party, and not by a replica process.
- An objective has no deadline.
- The caller decides whether row states are kept, by giving `row_states`; a real worker decides by
  how often its rows come.

So genesis, every `Committed` and with them the head are the same bytes as over gRPC. Other records
differ only in their order: over gRPC, answers come in the order in which workers finish.
"""

from __future__ import annotations

import random
import secrets
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from experiments.attacks import Attack, attacked
from experiments.judging import Judge
from fedmezo_core.errors import FedMezoError, MeasurementError, NumericError
from fedmezo_core.events import (
    ApplyCommit,
    Connected,
    Disconnected,
    Expel,
    Leave,
    Measure,
    Measured,
    MeasureFailed,
    Ready,
    ReplicaEvaluated,
    ReportWeights,
    SendAnswer,
    SendHello,
    SendSumStep,
    SendUnable,
    SessionAction,
    SumAsked,
    Tick,
    WorkerLost,
    WorkerReady,
)
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import COMMITTED, Journal, JournalStore, MemoryStore
from fedmezo_core.machines.roster import Phase
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.machines.session import SessionMachine
from fedmezo_core.records import Committed, Evaluated
from fedmezo_core.trust.secure_aggregation.masking import ENTROPY_BYTES
from fedmezo_core.wire.admission import check_hello
from fedmezo_core.wire.commit_index import CommitIndex
from fedmezo_core.wire.messages import (
    answer_from_pb,
    answer_to_pb,
    commit_to_pb,
    event_from_pb,
    hello_to_pb,
    message_to_pb,
    unable_from_pb,
    unable_to_pb,
)
from fedmezo_core.wire.sum_messages import sum_received_from_pb, sum_step_to_pb
from fedmezo_core.zo.assignment import collate_for, open_batches, open_estimator
from fedmezo_core.zo.commits import commits_of
from fedmezo_core.zo.data.batches import Batches
from fedmezo_core.zo.data.rows import Example
from fedmezo_core.zo.data.task import Batch
from fedmezo_core.zo.forward.row_states import RowStates
from fedmezo_core.zo.objectives import load_objective
from fedmezo_core.zo.party import Party
from fedmezo_core.zo.plain.measurements import Measurement, Measures, Pair, measure_order
from fedmezo_core.zo.privacy.accounting import PrivacyBudget
from fedmezo_core.zo.privacy.private_measurements import PrivateMeasurements
from fedmezo_proto.v1 import coordinator_pb2 as wire


class StalledError(FedMezoError):
    """The run cannot go on: too few workers can measure."""


@dataclass(slots=True)
class Worker:
    """One worker: its batches, its session, and the bytes that a daemon would count for it."""

    name: str
    batches: Batches[Batch]
    private: PrivateMeasurements[Batch] | None
    """What measures in place of the estimator, on samples in place of the batches."""
    machine: SessionMachine
    bytes_up: int = 0
    bytes_down: int = 0


class CountsRows:
    """Measures as another does, and counts the rows that go through the model for it."""

    def __init__(self, measures: Measures[Batch], *, one_sided: bool) -> None:
        """`one_sided`: a measurement takes a pass for each seed and one more, in place of two."""
        self._measures = measures
        self._one_sided = one_sided
        self.rows = 0
        """Rows of all passes so far; a row counts once in each pass that it is in."""

    def measure(
        self, batch: Batch, local: Sequence[Pair], seeds: Sequence[int], eps: float
    ) -> list[Measurement]:
        """What the other measures."""
        passes = len(seeds) + 1 if self._one_sided else 2 * len(seeds)
        self.rows += passes * len(batch.examples)
        return self._measures.measure(batch, local, seeds, eps)


class InMemoryFederation:
    """One run of FedMeZO, from its genesis to its end."""

    def __init__(
        self,
        party: Party,
        rows: Mapping[str, Sequence[Example]],
        *,
        judge: Judge | None = None,
        store: JournalStore | None = None,
        threads: int = 1,
        pass_tokens_max: int | None = None,
        row_states: RowStates | None = None,
        privacy: PrivacyBudget | None = None,
        attack: Attack = "none",
        attackers: int = 0,
    ) -> None:
        """`party` is at its base; `rows` holds each worker's rows by its name.

        With `privacy`, whose `ledger` is the folder of all ledgers, each worker has that budget.
        The last `attackers` workers by name send what `attack` says. They answer after the others.
        Raises as `Task.encode` does, and as `load_objective` does if the task has an objective,
        whose code runs here.
        """
        self.party = party
        self.journal = Journal(MemoryStore() if store is None else store)
        self.train_losses: dict[int, list[float]] = {}
        """Round -> mean loss of each answer over its batches, whether or not it is reported; with
        an objective, its mean score."""
        self.forwards = 0
        """Forward passes of one batch, by all workers."""
        self.working_s = 0.0
        """CPU seconds of all workers' measurements."""
        self.applying_s = 0.0
        """CPU seconds that each worker takes to apply commits and digest its weights."""
        self._judge = judge
        self._attack: Attack = attack
        self._attackers = frozenset(sorted(rows)[len(rows) - attackers :])
        self._rng = random.Random(party.config.seed)
        # What honest workers answered in the round of the first number.
        self._seen: tuple[int, list[tuple[float, ...]]] = (0, [])
        estimator = open_estimator(
            party,
            threads=threads,
            pass_tokens_max=pass_tokens_max,
            objective=load_objective(party.config.task.objective)
            if party.config.task.objective
            else None,
            row_states=row_states,
        )
        one_sided = party.config.estimator == "one_sided"
        self._measures = CountsRows(estimator, one_sided=one_sided)
        self._machine = RoundMachine()
        genesis = party.genesis()
        [entry] = self.journal.append(encode_records([genesis]))
        self._machine.apply(genesis)
        self._index = CommitIndex()
        self._index.fold(entry)
        self.workers: dict[str, Worker] = {}
        for name, own in rows.items():
            dataset = party.task.encode(own)
            private = None
            if privacy is not None:
                budget = replace(privacy, ledger=privacy.ledger / name)
                private = PrivateMeasurements(
                    budget, genesis, self._measures, collate_for(party), dataset
                )
            self.workers[name] = Worker(
                name,
                open_batches(party, dataset, name),
                private,
                SessionMachine.of_worker(genesis, entry.head, name),
            )
        self._joined: list[Worker] = []
        self._up: deque[tuple[Worker, bytes]] = deque()
        self._down: deque[tuple[Worker, bytes]] = deque()
        self._digest: tuple[int, bytes] | None = None

    @property
    def forward_rows(self) -> int:
        """Rows of all passes, by all workers; a row counts once in each pass that it is in."""
        return self._measures.rows

    @property
    def round(self) -> int:
        """Last committed round."""
        return self._machine.round

    @property
    def bytes_up(self) -> int:
        """Bytes of all messages from workers, without hellos."""
        return sum(worker.bytes_up for worker in self.workers.values())

    @property
    def bytes_down(self) -> int:
        """Bytes of all messages to workers."""
        return sum(worker.bytes_down for worker in self.workers.values())

    def run(self) -> None:
        """Do all rounds.

        Raises `StalledError` if the run pauses or no round can close any more, `NumericError` or
        `MeasurementError` if the weights have grown too large to apply a commit or to be judged.
        """
        self._flush(self._machine.start())
        self._judge_if_due()
        for worker in self.workers.values():
            self._act(worker, worker.machine.step(Connected()))
        while self._up or self._down:
            # Answers first: a real coordinator takes them while it still sends to others.
            if self._up:
                worker, message = self._up.popleft()
                self._from_worker(worker, wire.SessionRequest.FromString(message))
            else:
                worker, message = self._down.popleft()
                event = event_from_pb(wire.SessionResponse.FromString(message), self.party.config)
                if isinstance(event, SumAsked):
                    event = replace(event, entropy=secrets.token_bytes(ENTROPY_BYTES))
                self._act(worker, worker.machine.step(event))
        if self._machine.phase is not Phase.FINISHED:
            complaints = [view.complaint for view in self._machine.roster.workers.values()]
            reasons = [self._machine.reason, *complaints, "too few workers are there"]
            reason = next(filter(None, reasons))
            raise StalledError(f"Round {self.round + 1} cannot be closed: {reason}")
        self._judge_if_due(is_last=True)

    # ------------------------------------------------------------ the coordinator

    def _from_worker(self, worker: Worker, message: wire.SessionRequest) -> None:
        """Do what a daemon does with a message; like a daemon, do not count the hello's bytes."""
        kind = message.WhichOneof("kind")
        if kind == "hello":
            genesis = self._machine.genesis
            check_hello(message.hello, genesis, self.round, self._index.head_at(0))
            welcome = wire.Welcome(
                epoch=self._machine.epoch,
                round=self.round,
                head=self._index.head_at(self.round),
            )
            self._send(worker, wire.SessionResponse(welcome=welcome))
            self._joined.append(worker)
            self._flush(self._machine.step(WorkerReady(worker.name)))
            return
        worker.bytes_up += message.ByteSize()
        if kind == "answer":
            self._flush(self._machine.step(answer_from_pb(worker.name, message.answer)))
        elif kind == "unable":
            self._flush(self._machine.step(unable_from_pb(worker.name, message.unable)))
        elif kind == "sum_reply":
            self._flush(self._machine.step(sum_received_from_pb(worker.name, message.sum_reply)))
            while self._machine.is_busy:
                self._flush(self._machine.step(Tick(0)))
        else:
            report = message.weights_report
            assert (report.round, report.weights_digest) == (self.round, self._weights_digest())
            self._joined.remove(worker)
            self._flush(self._machine.step(WorkerLost(worker.name)))
            worker.machine.step(Disconnected())

    def _flush(self, ready: Ready) -> None:
        """Append to the journal, then send: commits first, to everyone."""
        bodies = encode_records(ready.records)
        for entry in self.journal.append(bodies) if bodies else ():
            self._index.fold(entry)
            if entry.row.kind == COMMITTED:
                for worker in self._joined:
                    self._send(worker, commit_to_pb(entry.row))
        for message in ready.messages:
            assert not isinstance(message, Expel), "workers that share weights cannot differ"
            sent = message_to_pb(message, self.party.config, self._index.head_at)
            self._send(self.workers[message.worker], sent)

    def _send(self, worker: Worker, message: wire.SessionResponse) -> None:
        body = message.SerializeToString()
        worker.bytes_down += len(body)
        self._down.append((worker, body))

    def _judge_if_due(self, *, is_last: bool = False) -> None:
        """Record the evaluation that a replica would report."""
        weights = self.party.weights
        found = None if self._judge is None else self._judge.judge(weights.round, is_last=is_last)
        if found is None:
            return
        record = Evaluated(
            round=weights.round,
            loss=found.loss,
            accuracy=found.accuracy,
            rows=found.row_count,
            weights_digest=self._weights_digest(),
            auc=found.auc,
        )
        self._flush(self._machine.step(ReplicaEvaluated(record)))

    # ------------------------------------------------------------ the workers

    def _act(self, worker: Worker, actions: Sequence[SessionAction]) -> None:
        """Do what a worker's machine wants, in order."""
        for action in actions:
            match action:
                case ApplyCommit(commit):
                    self._apply(commit)
                case Measure():
                    self._act(worker, worker.machine.step(self._measure(worker, action)))
                case SendHello(round_, head):
                    hello = hello_to_pb(self._machine.genesis, worker.name, round_, head)
                    self._answer(worker, hello)
                case SendAnswer():
                    self._answer(worker, answer_to_pb(action))
                case SendSumStep():
                    self._answer(worker, sum_step_to_pb(action))
                case SendUnable():
                    self._answer(worker, unable_to_pb(action))
                case ReportWeights(round_):
                    report = wire.WeightsReport(round=round_, weights_digest=self._weights_digest())
                    self._answer(worker, wire.SessionRequest(weights_report=report))
                case Leave():
                    pass

    def _answer(self, worker: Worker, message: wire.SessionRequest) -> None:
        self._up.append((worker, message.SerializeToString()))

    def _apply(self, commit: Committed) -> None:
        """Apply a commit to the shared weights, for the first worker that gets it."""
        weights = self.party.weights
        if commit.round <= weights.round:
            return
        begin = time.process_time()
        weights.apply(commit.round, commits_of([commit]))
        self.applying_s += time.process_time() - begin
        self._judge_if_due()

    def _measure(self, worker: Worker, order: Measure) -> Measured | MeasureFailed:
        weights = self.party.weights
        assert order.ticket.round == weights.round + 1, "the shared weights have moved on"
        begin = time.process_time()
        if order.work.want_digest:
            self._weights_digest()
        digested = time.process_time()
        try:
            measured = self._measured(worker, order)
        except MeasurementError as error:
            return MeasureFailed(order.ticket, str(error))
        finally:
            self.applying_s += digested - begin
            self.working_s += time.process_time() - digested
        assert measured.scalars.mean_loss is not None, (
            "only a relay's workers may keep it to themselves"
        )
        if worker.private is None:
            losses = self.train_losses.setdefault(order.ticket.round, [])
            losses.append(measured.scalars.mean_loss)
        pairs, probes = len(measured.scalars.projected_grads), self.party.config.probes
        two_sided = self.party.config.estimator == "two_sided"
        passes = 2 * pairs if two_sided else pairs + pairs // probes
        self.forwards += passes
        return self._sent(worker, measured)

    def _sent(self, worker: Worker, measured: Measured) -> Measured:
        """What the worker sends of what it measured: if it attacks, something else."""
        round_, grads = measured.ticket.round, measured.scalars.projected_grads
        if self._seen[0] != round_:
            self._seen = (round_, [])
        if worker.name not in self._attackers:
            self._seen[1].append(grads)
            return measured
        false = attacked(self._attack, grads, self._seen[1], self.party.config, self._rng)
        return replace(measured, scalars=measured.scalars._replace(projected_grads=false))

    def _measured(self, worker: Worker, order: Measure) -> Measured:
        digest = self._weights_digest
        if worker.private is None:
            return measure_order(self._measures, worker.batches, order, self.party.config, digest)
        return worker.private.measure_order(order, digest)

    def _weights_digest(self) -> bytes:
        """Digest the shared weights, once per round."""
        weights = self.party.weights
        if self._digest is None or self._digest[0] != weights.round:
            self._digest = (weights.round, weights.digest())
        return self._digest[1]


LOST = (StalledError, NumericError, MeasurementError)
"""Errors that end a run early: that settings do not work is a result, too."""
