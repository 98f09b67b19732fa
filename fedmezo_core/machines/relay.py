"""The relay's machine: a worker of the coordinator above, a coordinator of the workers of its site. Pure.

Its workers measure what it is assigned, all along the same seeds, under the ticket that it was given; the
mean of their answers is its answer. So a site of any size is one stream to the coordinator above, and the
journal there knows nothing of it. Towards that coordinator it is a `SessionMachine`, whose engine is the
site.

Its driver owes, for each `RelayReady`: end all sessions if it says so, then keep and send each `Committed`
among `records` to every worker, then send `messages`, then `up`. Events from above may raise, as
`SessionMachine.step` does, and then nothing has changed.

What is acknowledged to a worker is durable above: the coordinator has acknowledged the mean that it is in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmezo_core.config import COHORT_MAX, COMMIT_PAIRS_MAX, RunConfig
from fedmezo_core.errors import (
    DivergedError,
    EquivocationError,
    ProtocolError,
    StaleTicketError,
    UnknownWorkerError,
)
from fedmezo_core.events import (
    Ack,
    Acknowledged,
    AnswerReceived,
    ApplyCommit,
    Assign,
    Assigned,
    CommitReceived,
    Connected,
    Disconnected,
    Expel,
    Finish,
    FinishedByCoordinator,
    Leave,
    Measure,
    Measured,
    MeasureFailed,
    Ready,
    Refuse,
    RefusedByCoordinator,
    ReportDigest,
    ReportWeights,
    RoundEvent,
    RoundMessage,
    SendAnswer,
    SendHello,
    SendUnable,
    SentAway,
    SessionAction,
    SessionEvent,
    Tick,
    Ticket,
    UnableReceived,
    Vouched,
    WeightsReported,
    Welcomed,
    Work,
    WorkerLost,
    WorkerReady,
)
from fedmezo_core.machines.aggregate import site_mean
from fedmezo_core.machines.answers import ROWS_MAX, checked, content_of
from fedmezo_core.machines.cohort import agreed_digest, choose_cohort
from fedmezo_core.machines.rounds import (
    COMPLAINT_CHARS_MAX,
    RECENT_ROUNDS_MAX,
    WORKERS_SEEN_MAX,
    Phase,
    RoundSummary,
    WorkerView,
)
from fedmezo_core.machines.session import SessionMachine, SessionState
from fedmezo_core.records import Answered, Committed, Genesis, digest64_of

REJOIN_MS = 10_000
"""A worker whose session ended so lately may come back: its answer is waited for."""
REPORT_MS = 60_000
"""How long the site's workers may take to digest the last weights."""

RelayUp = SendHello | SendAnswer | SendUnable | ReportDigest | Leave


@dataclass(slots=True, unsafe_hash=True)
class RelayReady(Ready):
    """What the relay's driver owes, in this order: `dismissed`, `records`, `messages`, `up`."""

    records: tuple[Committed, ...] = ()
    dismissed: str = ""
    """If not empty: end every worker's session with this sentence; they may join again at once."""
    up: tuple[RelayUp, ...] = ()
    """To the coordinator above."""


@dataclass(eq=False, slots=True)
class _SiteRound:
    """One assignment from above, and what the site's workers made of it."""

    given: Ticket
    work: Work
    closes_at_ms: int
    asked: set[str] = field(default_factory=set)
    pending: set[str] = field(default_factory=set)
    """Asked, and neither answered nor unable."""
    answers: dict[str, tuple[Ticket, Answered]] = field(default_factory=dict)
    """Worker -> its answer, and the ticket that it came under."""
    counted: tuple[str, ...] = ()
    """Workers whose answers the mean is made of, once it is."""
    acknowledged: bool = False
    """Whether that mean is durable above."""

    def is_of(self, ticket: Ticket) -> bool:
        """Whether the ticket names this work. A new epoch repeats it under a new ticket."""
        return (self.given.round, self.given.slot) == (ticket.round, ticket.slot)


def site_workers_max(config: RunConfig) -> int:
    """Most workers that one assignment is given to: their answers are held until it is answered."""
    return min(COHORT_MAX, max(1, COMMIT_PAIRS_MAX // config.pairs_per_answer))


class RelayMachine:
    """Passes assignments and commits down, and one mean answer up. See the module's text for its use."""

    def __init__(
        self,
        genesis: Genesis,
        round_: int,
        head: bytes,
        *,
        workers_min: int = 1,
        deadline_share: float = 0.8,
    ) -> None:
        """`round_` and `head` are those of the copy that the driver holds.

        `workers_min` workers must be there before the site takes part. `deadline_share` is their part of
        the time that the coordinator above gives.
        """
        self.config = genesis.config
        self._workers_min = workers_min
        self._deadline_share = deadline_share
        self._round = round_
        self._epoch = 0
        self._session = self._session_at(round_, head)
        self._vouched = False
        # Commits from this round on come with a signature, in the session that is open.
        self._signed_from = 0
        # Received without one, and not yet given out.
        self._unsigned: set[int] = set()
        self._now_ms = 0
        self._closes_at_ms = 0
        self._open: _SiteRound | None = None
        # The last one that was answered: its acknowledgement may still come.
        self._answered: _SiteRound | None = None
        self._workers: dict[str, WorkerView] = {}
        self._ready: set[str] = set()
        self._lost_at_ms: dict[str, int] = {}
        self._diverged: set[str] = set()
        self._recent: deque[RoundSummary] = deque(maxlen=RECENT_ROUNDS_MAX)
        self._staffed = False
        # No more rounds follow, as the coordinator above says; and the workers were told so.
        self._over = False
        self._finished = False
        self._left = False
        self._reports: dict[str, bytes] = {}
        self._report_until_ms = 0
        self._dismissed = ""
        self._records: list[Committed] = []
        self._messages: list[RoundMessage] = []
        self._up: list[RelayUp] = []

    # ------------------------------------------------------------ what the driver and the status ask

    @property
    def round(self) -> int:
        """Last commit that was given out: what workers are welcomed at."""
        return self._round

    @property
    def received_round(self) -> int:
        """Last commit received; it may wait for the open assignment to end."""
        return self._session.round

    @property
    def epoch(self) -> int:
        """Newest epoch of the coordinator above that is known; 0 if none is."""
        return self._epoch

    @property
    def may_welcome(self) -> bool:
        """Whether the coordinator above vouches for the head at `round`: without that nobody can join."""
        return self._vouched

    @property
    def is_staffed(self) -> bool:
        """Whether the site should take part: from `workers_min` workers on, until the last one is gone.

        Of a run that is over, one worker is enough to be told so.
        """
        return self._staffed

    @property
    def left(self) -> bool:
        """Whether the run is over and everything is said above."""
        return self._left

    @property
    def phase(self) -> Phase:
        """Where the site is."""
        if self._finished or self._over:
            return Phase.FINISHED
        return Phase.WAITING if self._open is None else Phase.OPEN

    @property
    def reason(self) -> str:
        """Why the site does not take part; empty if it does."""
        if self._staffed or self.phase is Phase.FINISHED:
            return ""
        return f"{len(self._ready)} of {self._workers_min} workers are here"

    @property
    def awaited(self) -> tuple[str, ...]:
        """Workers that have the open assignment and have not answered."""
        return () if self._open is None else tuple(sorted(self._open.pending))

    @property
    def awaits_answers(self) -> bool:
        """Whether there are any."""
        return self._open is not None and bool(self._open.pending)

    @property
    def diverged(self) -> frozenset[str]:
        """Workers whose weights were found to differ and have not agreed since."""
        return frozenset(self._diverged)

    @property
    def workers(self) -> Mapping[str, WorkerView]:
        """Every worker seen, by name; to be read, not changed."""
        return self._workers

    @property
    def recent_rounds(self) -> Sequence[RoundSummary]:
        """The newest assignments that were answered above, oldest first."""
        return self._recent

    # ------------------------------------------------------------ driving it

    def step(
        self, event: RoundEvent | WeightsReported | SessionEvent | Vouched | SentAway
    ) -> RelayReady:
        """Take one event; the driver owes what is returned before it calls again."""
        match event:
            case WorkerReady(worker):
                self._worker_ready(worker)
            case WorkerLost(worker):
                self._worker_lost(worker)
            case AnswerReceived():
                self._or_refuse(event, self._answer)
            case UnableReceived():
                self._or_refuse(event, self._unable)
            case WeightsReported(worker, round_, digest):
                if self._finished and round_ == self._round and worker in self._ready:
                    self._reports[worker] = digest
            case Tick(now_ms):
                self._tick(now_ms)
            case CommitReceived():
                self._commit_received(event)
            case Assigned():
                self._assigned(event)
            case Welcomed():
                self._welcomed(event)
            case Acknowledged():
                self._acknowledged(event)
            case RefusedByCoordinator():
                self._refused(event)
            case Vouched():
                self._vouch(event)
            case SentAway(message):
                self._sent_away(message)
            case Disconnected():
                self._from_above(event)
                self._left |= self._session.state is SessionState.LEFT
            case Connected() | FinishedByCoordinator():
                self._from_above(event)
            case _:
                raise AssertionError(f"no driver of a relay sends {event}")
        self._advance()
        return self._take_ready()

    # ------------------------------------------------------------ from above

    def _session_at(self, round_: int, head: bytes) -> SessionMachine:
        session = SessionMachine(
            round_,
            head,
            report_losses=self.config.report_losses,
            report_rows=self.config.weighting == "rows",
            staleness_max=self.config.staleness_max,
        )
        session.epoch = self._epoch
        return session

    def _from_above(self, event: SessionEvent) -> None:
        self._perform(self._session.step(event))

    def _perform(self, actions: Iterable[SessionAction]) -> None:
        for action in actions:
            match action:
                case ApplyCommit(commit):
                    self._apply(commit)
                case Measure(ticket, work):
                    self._begin(ticket, work)
                case ReportWeights():
                    self._finish()
                case Leave():
                    pass  # once the site's workers have reported
                case _:
                    self._up.append(action)

    def _heard(self, epoch: int) -> None:
        """Workers follow one epoch a session, so in a new one they must join again."""
        if epoch > self._epoch > 0:
            self._dismiss("The coordinator above was started anew; join again.")
        self._epoch = max(self._epoch, epoch)

    def _welcomed(self, event: Welcomed) -> None:
        self._from_above(event)
        self._heard(event.epoch)
        self._signed_from = event.round
        self._vouch_for(event.round)

    def _vouch(self, event: Vouched) -> None:
        if event.round == self._session.round and event.head != self._session.head:
            raise DivergedError(
                f"The coordinator above has another history up to round {event.round} than this relay's "
                f"copy (head {event.head.hex()[:16]} instead of {self._session.head.hex()[:16]}); find out "
                "which journal is served there, or move the copy away."
            )
        self._heard(event.epoch)
        self._over |= event.finished
        if event.round == self._session.round:
            self._vouch_for(event.round)

    def _vouch_for(self, round_: int) -> None:
        """The coordinator above has signed the head after a round; its commit may still wait here."""
        self._unsigned.discard(round_)
        self._vouched |= round_ == self._round

    def _commit_received(self, event: CommitReceived) -> None:
        round_ = event.commit.round
        is_signed = self._session.state is SessionState.ONLINE and round_ >= self._signed_from
        if not is_signed:
            self._unsigned.add(round_)
        try:
            self._from_above(event)
        except (ProtocolError, DivergedError):
            self._unsigned.discard(round_)
            raise

    def _apply(self, commit: Committed) -> None:
        """Give a commit to the site; workers take none without a signature where there is a key."""
        self._round = commit.round
        self._records.append(commit)
        self._vouched = commit.round not in self._unsigned
        self._unsigned.discard(commit.round)
        if not self._vouched:
            self._dismiss("The relay has missed rounds and catches up; join again.")

    def _assigned(self, event: Assigned) -> None:
        self._closes_at_ms = self._now_ms + int(self._deadline_share * event.deadline_ms)
        before = self._open
        self._from_above(event)
        if before is None or self._open is not before:
            return
        if before.is_of(event.ticket) and before.work == event.work:
            # Asked again for want of answers, so those who could not measure may try again.
            before.closes_at_ms = self._closes_at_ms
            silent = before.asked - before.pending - before.answers.keys()
            for worker in sorted(silent & self._ready):
                self._ask(before, worker)
        else:
            self._fail(before, "another assignment has taken its place")

    def _acknowledged(self, event: Acknowledged) -> None:
        self._from_above(event)
        site = self._answered
        if site is None or site.acknowledged or not site.is_of(event.ticket):
            return
        site.acknowledged = True
        for worker in site.counted:
            self._view(worker).rounds_answered += 1
            if worker in self._ready:
                self._messages.append(Ack(worker, site.answers[worker][0]))

    def _refused(self, event: RefusedByCoordinator) -> None:
        self._from_above(event)
        site = self._answered
        if (
            site is None
            or site.acknowledged
            or not site.is_of(event.ticket)
            or event.ticket.epoch != self._epoch
        ):
            return
        self._answered = None
        sentence = f"The site's answer was refused above: {event.message}"
        self._drop(site, event.reason, sentence)

    def _sent_away(self, message: str) -> None:
        """Nobody here knows whose weights are wrong, so all that are here rebuild them."""
        if self._open is not None:
            self._fail(self._open, "the site's weights differ from the run's")
        for worker in sorted(self._ready):
            self._expel(worker, f"Of this site, the coordinator above says: {message}")
        # What is remembered of the wrong weights goes too.
        self._session = self._session_at(self._session.round, self._session.head)
        self._answered = None

    # ------------------------------------------------------------ workers

    def _worker_ready(self, worker: str) -> None:
        view = self._view(worker)
        view.ready, view.complaint = True, ""
        self._ready.add(worker)
        self._lost_at_ms.pop(worker, None)
        site = self._open
        if self._finished:
            self._messages.append(Finish(worker, self._round))
        elif site is not None and worker not in site.answers and self._may_ask(site, worker):
            self._ask(site, worker)

    def _worker_lost(self, worker: str) -> None:
        if worker in self._ready:
            self._ready.remove(worker)
            self._view(worker).ready = False
            self._lost_at_ms[worker] = self._now_ms

    def _dismiss(self, sentence: str) -> None:
        if self._ready:
            self._dismissed = sentence
            self._messages.clear()  # to sessions that are over
        for worker in sorted(self._ready):
            self._worker_lost(worker)

    def _expel(self, worker: str, sentence: str) -> None:
        self._ready.discard(worker)
        self._view(worker).ready = False
        self._diverged.add(worker)
        self._messages.append(Expel(worker, sentence))

    def _or_refuse(
        self, event: AnswerReceived | UnableReceived, take: Callable[[Any], None]
    ) -> None:
        try:
            if event.worker not in self._ready:
                raise UnknownWorkerError(
                    f"Worker {event.worker} has not joined this relay, or was sent away; open a new "
                    "session with hello first."
                )
            take(event)
        except ProtocolError as error:
            # A stale ticket is no fault: an answer and a deadline may cross on the way.
            if not isinstance(error, StaleTicketError) and event.worker in self._ready:
                self._view(event.worker).complaint = str(error)[:COMPLAINT_CHARS_MAX]
            self._messages.append(
                Refuse(event.worker, event.ticket, type(error).__name__, str(error))
            )

    def _answer(self, event: AnswerReceived) -> None:
        worker, ticket = event.worker, event.ticket
        site = self._site_of(event)
        known = site.answers.get(worker)
        if known is None:
            self._check_open(site, event)
            record = checked(event, site.work.learning_rate, self.config)
            site.answers[worker] = (ticket, record)
            site.pending.discard(worker)
            self._view(worker).mean_loss = record.mean_loss
            return
        record = checked(event, site.work.learning_rate, self.config)
        if content_of(record) != content_of(known[1]):
            raise EquivocationError(
                f"Worker {worker} gave a second, different answer to round {ticket.round}; the first one "
                "stands: drop this one."
            )
        if site.acknowledged and worker in site.counted:
            self._messages.append(Ack(worker, ticket))

    def _unable(self, event: UnableReceived) -> None:
        site = self._site_of(event)
        self._check_open(site, event)
        site.pending.discard(event.worker)
        self._view(event.worker).complaint = event.reason[:COMPLAINT_CHARS_MAX]

    def _site_of(self, event: AnswerReceived | UnableReceived) -> _SiteRound:
        for site in (self._open, self._answered):
            if site is not None and site.is_of(event.ticket) and event.worker in site.asked:
                return site
        raise self._stale(event)

    def _check_open(self, site: _SiteRound, event: AnswerReceived | UnableReceived) -> None:
        if site is not self._open or event.ticket.epoch != self._epoch:
            raise self._stale(event)

    def _stale(self, event: AnswerReceived | UnableReceived) -> StaleTicketError:
        ticket = event.ticket
        return StaleTicketError(
            f"Ticket (epoch {ticket.epoch}, round {ticket.round}, slot {ticket.slot}) of worker "
            f"{event.worker} is not open: this is epoch {self._epoch}, the last committed round is "
            f"{self._round}, and the site may have answered without it; drop it and wait for the next "
            "assignment."
        )

    # ------------------------------------------------------------ one assignment

    def _begin(self, ticket: Ticket, work: Work) -> None:
        site = self._open = _SiteRound(ticket, work, self._closes_at_ms)
        most = site_workers_max(self.config)
        for worker in choose_cohort(self.config.seed, ticket.round, self._ready, most):
            self._ask(site, worker)

    def _may_ask(self, site: _SiteRound, worker: str) -> bool:
        return worker in site.asked or len(site.asked) < site_workers_max(self.config)

    def _ask(self, site: _SiteRound, worker: str) -> None:
        site.asked.add(worker)
        site.pending.add(worker)
        self._view(worker).learning_rate = site.work.learning_rate
        ticket = Ticket(self._epoch, site.given.round, site.given.slot)
        left_ms = max(site.closes_at_ms - self._now_ms, 0)
        self._messages.append(Assign(worker, ticket, site.work, left_ms))

    def _advance(self) -> None:
        """Answer above if everyone has answered who can, or the time is over."""
        present = len(self._ready) + len(self._lost_at_ms)
        enough = len(self._ready) >= (1 if self._over else self._workers_min)
        self._staffed = present > 0 if self._staffed else enough
        while (site := self._open) is not None:
            if self._session.measuring_in_vain:
                self._fail(site, "its round was committed without this site")
            # Without any answer the site is as a worker that still measures: a late one counts too.
            elif self._waits_in(site) and (self._now_ms < site.closes_at_ms or not site.answers):
                return
            else:
                self._close(site)
        if self._finished and not self._left:
            self._report()

    def _waits_in(self, site: _SiteRound) -> bool:
        return any(w in self._ready or w in self._lost_at_ms for w in site.pending) or any(
            worker not in site.asked for worker in self._lost_at_ms
        )

    def _close(self, site: _SiteRound) -> None:
        for worker in site.pending & self._ready:
            self._view(
                worker
            ).complaint = f"did not answer round {site.given.round} within the site's time"
        answers, digest64 = self._agreeing(site)
        if not answers:
            unable = "no worker of this site can measure it"
            self._fail(
                site, "the weights of this site's workers differ" if site.answers else unable
            )
            return
        site.counted = tuple(sorted(answers))
        self._open, self._answered = None, site
        mean = site_mean([answers[worker] for worker in site.counted])
        self._recent.append(RoundSummary(site.given.round, mean.mean_loss, len(answers)))
        rows = min(mean.rows, ROWS_MAX)
        measured = Measured(site.given, mean.projected_grads, mean.mean_loss, digest64, rows)
        self._from_above(measured)

    def _agreeing(self, site: _SiteRound) -> tuple[dict[str, Answered], int | None]:
        """The answers of workers whose weights are alike, and the digest of those, if it was asked for.

        The relay has no weights. It goes by more than half of its workers, and sends the others away;
        if there is no such majority nobody can tell, and all of them rebuild their weights.
        """
        answers = {worker: record for worker, (_, record) in site.answers.items()}
        if not site.work.want_digest:
            return answers, None
        agreed = agreed_digest([a.weights_digest64 or 0 for a in answers.values()], None)
        for worker, answer in sorted(answers.items()):
            if answer.weights_digest64 == agreed:
                self._diverged.discard(worker)
                continue
            del answers[worker]
            self._expel(
                worker,
                f"The weights of worker {worker} before round {site.given.round} are not those of the "
                "other workers of its site; restart the worker so that it rebuilds them from the base "
                "and the journal.",
            )
        return answers, agreed

    def _fail(self, site: _SiteRound, reason: str) -> None:
        self._open = None
        counted = [worker for worker in site.answers if worker in self._ready]
        site.counted = tuple(sorted(counted))
        self._drop(
            site,
            StaleTicketError.__name__,
            f"The site did not answer round {site.given.round}: {reason}; drop the answer and wait for "
            "the next assignment.",
        )
        self._from_above(MeasureFailed(site.given, reason))

    def _drop(self, site: _SiteRound, reason: str, sentence: str) -> None:
        """Tell everyone whose answer did not get through."""
        for worker in site.counted:
            if worker in self._ready:
                self._messages.append(Refuse(worker, site.answers[worker][0], reason, sentence))

    # ------------------------------------------------------------ the end

    def _finish(self) -> None:
        self._finished = True
        self._report_until_ms = self._now_ms + REPORT_MS
        self._messages.extend(Finish(worker, self._round) for worker in sorted(self._ready))

    def _report(self) -> None:
        """Say above which weights most workers ended with, once they have said it, or had the time."""
        waits = (self._ready | self._lost_at_ms.keys()) - self._reports.keys()
        if waits and self._now_ms < self._report_until_ms:
            return
        votes = [digest64_of(digest) for digest in self._reports.values()]
        agreed = agreed_digest(votes, None)
        found = {digest64_of(digest): digest for digest in self._reports.values()}
        if agreed is not None:
            self._up.append(ReportDigest(self._round, found[agreed]))
        self._up.append(Leave())
        self._left = True

    # ------------------------------------------------------------ small parts

    def _tick(self, now_ms: int) -> None:
        self._now_ms = max(self._now_ms, now_ms)
        since_ms = self._now_ms - REJOIN_MS
        for worker in [w for w, at_ms in self._lost_at_ms.items() if at_ms <= since_ms]:
            del self._lost_at_ms[worker]

    def _view(self, worker: str) -> WorkerView:
        view = self._workers.get(worker)
        if view is None:
            if len(self._workers) >= WORKERS_SEEN_MAX:
                gone = next((name for name in self._workers if name not in self._ready), None)
                if gone is not None:
                    del self._workers[gone]
                    self._diverged.discard(gone)
            view = self._workers[worker] = WorkerView(worker)
        return view

    def _take_ready(self) -> RelayReady:
        ready = RelayReady(
            tuple(self._records), tuple(self._messages), self._dismissed, tuple(self._up)
        )
        self._records.clear()
        self._messages.clear()
        self._up.clear()
        self._dismissed = ""
        return ready
