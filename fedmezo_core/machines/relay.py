"""The relay's machine: a worker of the coordinator above, a coordinator of its site's workers.

The workers of the site measure what the relay is assigned, all along the same seeds and under the
ticket that the relay was given; the mean of their answers is the relay's answer. So a site of any
size is one stream to the coordinator above, and the journal there knows nothing of it. Towards that
coordinator the relay is a `SessionMachine`, whose engine is the site.

The driver owes, for each `RelayReady`: end all sessions if it says so, then keep and send each
`Committed` among `records` to every worker, then send `messages`, then `up`. Events from above may
raise, as `SessionMachine.step` does, and then nothing has changed.

A worker gets its acknowledgement when its answer is durable above, that is when the coordinator has
acknowledged the mean that holds it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from fedmezo_core.config import COHORT_MAX, COMMIT_PAIRS_MAX, RunConfig
from fedmezo_core.errors import (
    DivergedError,
    EquivocationError,
    FedMezoError,
    StaleTicketError,
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
    SendSumStep,
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
from fedmezo_core.machines.aggregate import CLIP_ROUNDS, clipped, is_far_larger, site_answer
from fedmezo_core.machines.answers import ROWS_MAX, checked, content_of
from fedmezo_core.machines.divergence import DigestBoard, agreed_digest, differing
from fedmezo_core.machines.roster import RECENT_ROUNDS_MAX, Phase, Roster, RoundSummary
from fedmezo_core.machines.session import SessionMachine, SessionState
from fedmezo_core.records import Committed, Diverged, Genesis, RoundSlot, Scalars, digest64_of

REJOIN_MS = 10_000
"""How long the site waits for the answer of a worker whose session ended, which may come back."""
REPORT_MS = 60_000
"""How long the site waits for its workers to digest their last weights."""

RelayUp = SendHello | SendAnswer | SendUnable | ReportDigest | Leave


@dataclass(slots=True, unsafe_hash=True)
class RelayReady(Ready):
    """What the relay's driver owes, in this order: `dismissed`, `records`, `messages`, `up`."""

    records: tuple[Committed, ...] = ()
    dismissed: str = ""
    """If not empty: end every worker's session with this sentence; they may join again at once."""
    up: tuple[RelayUp, ...] = ()
    """Messages to the coordinator above."""
    diverged: tuple[Diverged, ...] = ()
    """Workers whose digest of the weights differs from most of the site's; only for the log."""


@dataclass(eq=False, slots=True)
class _SiteRound:
    """One assignment from above, and what the site's workers made of it."""

    given: Ticket
    work: Work
    closes_at_ms: int
    asked: set[str] = field(default_factory=set)
    answers: dict[str, tuple[Ticket, Scalars]] = field(default_factory=dict)
    """Worker -> the ticket that its answer came under, and the answer."""
    counted: tuple[str, ...] = ()
    """Workers whose answers are in the site's mean, sorted; empty until there is a mean."""
    acknowledged: bool = False
    """Whether the mean is durable above."""

    @property
    def assignment(self) -> RoundSlot:
        """What the relay was assigned, and so each of its workers."""
        return RoundSlot(self.given.round, self.given.slot)

    def is_of(self, ticket: Ticket) -> bool:
        """Whether the ticket names this work. A new epoch repeats it under a new ticket."""
        return self.assignment == (ticket.round, ticket.slot)


def site_workers_max(config: RunConfig) -> int:
    """Most workers that one assignment is given to, for the relay holds their answers in memory."""
    return min(COHORT_MAX, max(1, COMMIT_PAIRS_MAX // config.pairs_per_answer))


class RelayMachine:
    """Passes assignments and commits down, and one mean answer up; see the module's docstring."""

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

        The site takes part from `workers_min` workers on. Its workers get `deadline_share` of the
        time that the coordinator above gives.
        """
        self.config = genesis.config
        self.roster = Roster("this relay")
        self.digests = DigestBoard()
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
        self._lost_at_ms: dict[str, int] = {}
        self._recent: deque[RoundSummary] = deque(maxlen=RECENT_ROUNDS_MAX)
        self._staffed = False
        # Whether the coordinator above says that no more rounds follow, and the workers know it.
        self._over = False
        self._finished = False
        self._left = False
        self._report_until_ms = 0
        self._dismissed = ""
        self._records: list[Committed] = []
        self._messages: list[RoundMessage] = []
        self._up: list[RelayUp] = []
        self._differing: list[Diverged] = []
        self._warnings: list[str] = []
        self._usual_sizes: deque[float] = deque(maxlen=CLIP_ROUNDS)

    # ------------------------------------------------------------ for the driver and the status

    @property
    def round(self) -> int:
        """Round of the last commit that the workers got: new ones are welcomed at it."""
        return self._round

    @property
    def received_round(self) -> int:
        """Round of the last commit received, which may wait for the open assignment to end."""
        return self._session.round

    @property
    def epoch(self) -> int:
        """Newest known epoch of the coordinator above; 0 if none is known."""
        return self._epoch

    @property
    def may_welcome(self) -> bool:
        """Whether the coordinator above vouches for the head at `round`: then workers can join."""
        return self._vouched

    @property
    def is_staffed(self) -> bool:
        """Whether the site should take part: from `workers_min` workers on, until none is left.

        If the run is over, one worker is enough, so that it learns of the end.
        """
        return self._staffed

    @property
    def left(self) -> bool:
        """Whether the run is over and the coordinator above has got everything."""
        return self._left

    @property
    def phase(self) -> Phase:
        """Where the site is."""
        if self._finished or self._over:
            return Phase.FINISHED
        return Phase.WAITING if self._open is None else Phase.OPEN

    @property
    def is_busy(self) -> bool:
        """A relay computes nothing that takes long."""
        return False

    @property
    def reason(self) -> str:
        """Why the site does not take part; empty if it does."""
        if self._staffed or self.phase is Phase.FINISHED:
            return ""
        return f"{len(self.roster.ready)} of {self._workers_min} workers are here"

    @property
    def diverged(self) -> frozenset[str]:
        """Workers whose weights were found to differ and have not agreed since."""
        views = self.roster.workers.values()
        return frozenset(view.worker for view in views if view.told_diverged)

    @property
    def recent_rounds(self) -> Sequence[RoundSummary]:
        """Summaries of the newest assignments that the site answered, oldest first."""
        return self._recent

    # ------------------------------------------------------------ driving it

    def step(self, event: RoundEvent | SessionEvent | Vouched | SentAway) -> RelayReady:
        """Take one event; the driver owes what is returned before it calls again."""
        match event:
            case WorkerReady(worker):
                self._worker_ready(worker)
            case WorkerLost(worker):
                self._worker_lost(worker)
            case AnswerReceived():
                self._messages.extend(self.roster.take(event, self._answer))
            case UnableReceived():
                self._messages.extend(self.roster.take(event, self._unable))
            case WeightsReported():
                self._differing += self.digests.report(event)
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
                case SendSumStep():
                    raise AssertionError("a relay serves no run with secure aggregation")
                case _:
                    self._up.append(action)

    def _heard(self, epoch: int) -> None:
        """Note the epoch above; a new one ends all sessions, for a session knows one epoch."""
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
                f"The coordinator above has another history up to round {event.round} than this "
                f"relay's copy (head {event.head.hex()[:16]} instead of "
                f"{self._session.head.hex()[:16]}); find out which journal is served there, or "
                "move the copy away."
            )
        self._heard(event.epoch)
        self._over |= event.finished
        if event.round == self._session.round:
            self._vouch_for(event.round)

    def _vouch_for(self, round_: int) -> None:
        """Note that the coordinator above has signed the head after a round."""
        self._unsigned.discard(round_)
        self._vouched |= round_ == self._round

    def _commit_received(self, event: CommitReceived) -> None:
        round_ = event.commit.round
        is_signed = self._session.state is SessionState.ONLINE and round_ >= self._signed_from
        if not is_signed:
            self._unsigned.add(round_)
        try:
            self._from_above(event)
        except FedMezoError:
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
            # Too few answered above, so those who could not measure may try again.
            before.closes_at_ms = self._closes_at_ms
            silent = before.asked - self.roster.assignments.keys() - before.answers.keys()
            for worker in sorted(silent & self.roster.ready):
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
            self.roster.view(worker).rounds_answered += 1
            if worker in self.roster.ready:
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
        for worker in sorted(self.roster.ready):
            sentence = f"Of this site, the coordinator above says: {message}"
            self._messages.append(self.roster.expel(worker, sentence))
        # The session forgets the answers that were measured on the wrong weights.
        self._session = self._session_at(self._session.round, self._session.head)
        self._answered = None

    # ------------------------------------------------------------ workers

    def _worker_ready(self, worker: str) -> None:
        self.roster.join(worker, self.round + 1)
        self._lost_at_ms.pop(worker, None)
        site = self._open
        if self._finished:
            self._messages.append(Finish(worker, self._round))
        elif site is not None and worker not in site.answers and self._may_ask(site, worker):
            self._ask(site, worker)

    def _worker_lost(self, worker: str) -> None:
        if worker in self.roster.ready:
            self.roster.leave(worker)
            self._lost_at_ms[worker] = self._now_ms

    def _dismiss(self, sentence: str) -> None:
        if self.roster.ready:
            self._dismissed = sentence
            self._messages.clear()  # Their sessions are over.
        for worker in sorted(self.roster.ready):
            self._worker_lost(worker)

    def _answer(self, event: AnswerReceived) -> None:
        worker, ticket = event.worker, event.ticket
        site = self._site_of(event)
        known = site.answers.get(worker)
        if known is None:
            self._check_open(site, event)
        scalars = checked(event, site.work.learning_rate, self.config)
        if known is None:
            site.answers[worker] = (ticket, scalars)
            self.roster.answered(worker, site.assignment, scalars.mean_loss)
            return
        if content_of(scalars) != content_of(known[1]):
            raise EquivocationError(
                f"Worker {worker} gave a second, different answer to round {ticket.round}; the "
                "first one stands: drop this one."
            )
        if site.acknowledged and worker in site.counted:
            self._messages.append(Ack(worker, ticket))

    def _unable(self, event: UnableReceived) -> None:
        site = self._site_of(event)
        self._check_open(site, event)
        self.roster.unable(event)

    def _site_of(self, event: AnswerReceived | UnableReceived) -> _SiteRound:
        for site in (self._open, self._answered):
            if site is not None and site.is_of(event.ticket) and event.worker in site.asked:
                return site
        raise self._stale(event)

    def _check_open(self, site: _SiteRound, event: AnswerReceived | UnableReceived) -> None:
        if site is not self._open or event.ticket.epoch != self._epoch:
            raise self._stale(event)

    def _stale(self, event: AnswerReceived | UnableReceived) -> StaleTicketError:
        now = (
            f"this is epoch {self._epoch}, the last committed round is {self._round}, and the site "
            "may have answered without it"
        )
        return self.roster.stale(event, now)

    # ------------------------------------------------------------ one assignment

    def _begin(self, ticket: Ticket, work: Work) -> None:
        site = self._open = _SiteRound(ticket, work, self._closes_at_ms)
        most = site_workers_max(self.config)
        for worker in self.roster.choose(self.config.seed, ticket.round, self.roster.ready, most):
            self._ask(site, worker)

    def _may_ask(self, site: _SiteRound, worker: str) -> bool:
        return worker in site.asked or len(site.asked) < site_workers_max(self.config)

    def _ask(self, site: _SiteRound, worker: str) -> None:
        site.asked.add(worker)
        self.roster.assign(worker, site.assignment, site.work.learning_rate)
        ticket = Ticket(self._epoch, site.given.round, site.given.slot)
        left_ms = max(site.closes_at_ms - self._now_ms, 0)
        self._messages.append(Assign(worker, ticket, site.work, left_ms))

    def _advance(self) -> None:
        """Answer above if everyone who can has answered, or the time is over."""
        present = len(self.roster.ready) + len(self._lost_at_ms)
        enough = len(self.roster.ready) >= (1 if self._over else self._workers_min)
        self._staffed = present > 0 if self._staffed else enough
        while (site := self._open) is not None:
            if self._session.measuring_in_vain:
                self._fail(site, "its round was committed without this site")
            elif self._is_waiting(site):
                return
            else:
                self._close(site)
        if self._finished and not self._left:
            self._report()

    def _is_waiting(self, site: _SiteRound) -> bool:
        """Whether an answer may come that is worth waiting for."""
        # A site without any answer is like a worker that still measures: late answers count.
        if site.answers and self._now_ms >= site.closes_at_ms:
            return False
        workers: Collection[str] = self.roster.assignments
        if site.answers:
            workers = self.roster.waited_for
        lost = self._lost_at_ms
        return not self.roster.ready.isdisjoint(workers) or any(
            worker in self.roster.assignments or worker not in site.asked for worker in lost
        )

    def _close(self, site: _SiteRound) -> None:
        if self._now_ms >= site.closes_at_ms:
            for worker in self.roster.assignments.keys() & self.roster.ready:
                sentence = f"did not answer round {site.given.round} within the site's time"
                self.roster.complain(worker, sentence)
            self.roster.miss(self.roster.assignments)
        answers, digest64 = self._agreeing(site)
        if not answers:
            unable = "no worker of this site can measure it"
            self._fail(
                site, "the weights of this site's workers differ" if site.answers else unable
            )
            return
        site.counted = tuple(sorted(answers))
        self._open, self._answered = None, site
        self.roster.release_all()
        counted = [answers[worker] for worker in site.counted]
        mean = site_answer(self._clipped(site, counted), self.config)
        given = [(w, a.projected_grads) for w, a in zip(site.counted, counted, strict=True)]
        # A site's workers always measure along the same directions.
        if warning := self.roster.compare(site.given.round, given, is_shared=True):
            self._warnings.append(warning)
        self._recent.append(RoundSummary(site.given.round, mean.mean_loss, len(answers)))
        assert mean.rows is not None
        scalars = mean._replace(weights_digest64=digest64, rows=min(mean.rows, ROWS_MAX))
        self._from_above(Measured(site.given, scalars))

    def _clipped(self, site: _SiteRound, answers: list[Scalars]) -> list[Scalars]:
        """The answers of `site.counted`, clipped as the coordinator above clips those of sites."""
        if not self.config.clip_median_factor:
            return answers
        given = [answer.projected_grads for answer in answers]
        taken, size = clipped(given, self._usual_sizes, self.config)
        if size:
            self._usual_sizes.append(size)
        scaled = [
            (worker, before, after)
            for worker, before, after in zip(site.counted, given, taken, strict=True)
            if after is not before and is_far_larger(before, after, self.config)
        ]
        if scaled:
            self._warnings.append(self.roster.clipped(site.given.round, scaled))
        return [a._replace(projected_grads=grads) for a, grads in zip(answers, taken, strict=True)]

    def _agreeing(self, site: _SiteRound) -> tuple[dict[str, Scalars], int | None]:
        """The answers of workers whose weights are alike, and the digest of those, if it is wanted.

        The relay has no weights. It goes by more than half of its workers and sends the others
        away; without such a majority nobody can tell, and all of them rebuild their weights.
        """
        answers = {worker: scalars for worker, (_, scalars) in sorted(site.answers.items())}
        if not site.work.want_digest:
            return answers, None
        found = [(worker, scalars.weights_digest64 or 0) for worker, scalars in answers.items()]
        agreed = agreed_digest([digest64 for _, digest64 in found], None)
        for worker, _ in differing(found, agreed):
            del answers[worker]
            sentence = (
                f"The weights of worker {worker} before round {site.given.round} are not those of "
                "the other workers of its site; restart the worker so that it rebuilds them from "
                "the base and the journal."
            )
            self._messages.append(self.roster.expel(worker, sentence))
        for worker in answers:
            self.roster.view(worker).told_diverged = False
        return answers, agreed

    def _fail(self, site: _SiteRound, reason: str) -> None:
        self._open = None
        self.roster.release_all()
        site.counted = tuple(sorted(site.answers.keys() & self.roster.ready))
        self._drop(
            site,
            StaleTicketError.__name__,
            f"The site did not answer round {site.given.round}: {reason}; drop the answer and wait "
            "for the next assignment.",
        )
        self._from_above(MeasureFailed(site.given, reason))

    def _drop(self, site: _SiteRound, reason: str, sentence: str) -> None:
        """Refuse the answers that the site's mean was, or was to be, made of."""
        for worker in site.counted:
            if worker in self.roster.ready:
                self._messages.append(Refuse(worker, site.answers[worker][0], reason, sentence))

    # ------------------------------------------------------------ the end

    def _finish(self) -> None:
        self._finished = True
        self._report_until_ms = self._now_ms + REPORT_MS
        self._messages.extend(Finish(worker, self._round) for worker in sorted(self.roster.ready))

    def _report(self) -> None:
        """Report above which weights most workers ended with, when all have said or time is up."""
        reports = self.digests.reports_of(self._round)
        waits = (self.roster.ready | self._lost_at_ms.keys()) - reports.keys()
        if waits and self._now_ms < self._report_until_ms:
            return
        found = {digest64_of(digest): digest for digest in reports.values()}
        agreed = agreed_digest([digest64_of(digest) for digest in reports.values()], None)
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

    def _take_ready(self) -> RelayReady:
        ready = RelayReady(
            tuple(self._records),
            tuple(self._messages),
            tuple(self._warnings),
            self._dismissed,
            tuple(self._up),
            tuple(self._differing),
        )
        for owed in (self._records, self._messages, self._warnings, self._up, self._differing):
            owed.clear()
        self._dismissed = ""
        return ready
