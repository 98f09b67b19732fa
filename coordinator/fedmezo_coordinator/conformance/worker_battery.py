"""A coordinator that tests the worker that connects to it, by honest and by hostile sequences."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedmezo_coordinator.conformance.report import (
    UNKNOWN_FIELD,
    CheckFailedError,
    Report,
    require,
)
from fedmezo_coordinator.conformance.scripted_server import Line, ScriptedServer
from fedmezo_core.config import NAME_PATTERN, PROTOCOL_VERSION, RunConfig
from fedmezo_core.errors import (
    ConfigError,
    NotReadyError,
    StartingError,
    UnavailableError,
)
from fedmezo_core.events import Assign, Measure, Ticket, Work
from fedmezo_core.journal.codec import encode_record
from fedmezo_core.journal.journal import ZERO_HASH, chain_after, head_after
from fedmezo_core.machines.aggregate import clip_of, to_binary32
from fedmezo_core.records import (
    Committed,
    Genesis,
    SeedRange,
    digest64_of,
    first_seed_of,
    rounding_seed_of,
)
from fedmezo_core.wire.messages import assign_to_pb, ticket_to_pb
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import journal_pb2

ROUNDS_MIN = 40
"""Rounds that the contract must have, so that the battery does not come to its end."""
DEADLINE_MS = 600_000
CORRELATION = "smallest correlation with our projected gradients"
DIFFERENCE = "greatest difference from our projected gradients, relative to their size"


class Model(Protocol):
    """What the tested worker's weights and measurements are compared with."""

    def apply(self, commit: Committed) -> None:
        """Move the weights on."""

    def digest(self) -> bytes:
        """Digest of the weights, 32 bytes."""

    def measure(self, order: Measure, worker: str) -> Sequence[float] | None:
        """The projected gradients of `worker`; None if its rows are not known."""


@dataclass(frozen=True, slots=True)
class WorkerTest:
    """What a worker is tested with."""

    genesis: Genesis
    model: Model | None
    """None: digests and measurements are not compared with anything."""
    likeness: Callable[[Sequence[float], Sequence[float]], tuple[float, float]] | None = None
    """Correlation and greatest relative difference of two lists of projected gradients."""
    correlation_min: float = 0.99
    difference_max: float = 0.1
    patience_s: float = 60.0
    """Longest wait for anything that the worker owes."""


@dataclass
class Progress:
    """The run as the battery leads it."""

    body: bytes
    """Record 0."""
    epoch: int = 1
    commits: list[bytes] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    """The head after each round, from 0 on."""
    page_commits: int = 1024
    """Most commits in a page."""

    @property
    def round(self) -> int:
        """Last committed round."""
        return len(self.commits)

    def describe(self, request: wire.GetRunRequest) -> wire.GetRunResponse:
        """What `GetRun` says."""
        return wire.GetRunResponse(
            protocol_version=PROTOCOL_VERSION,
            genesis=self.body,
            round=self.round,
            epoch=self.epoch,
            head=self.heads[-1],
            missing=wire.Suffix(bytes=sum(map(len, self.commits[request.round :]))),
        )

    def page(self, request: wire.ReadJournalRequest) -> wire.ReadJournalResponse:
        """A page of the journal, which holds nothing but genesis and commits."""
        bodies = [self.body, *self.commits]
        start = request.from_round or request.from_seqno
        shown = bodies[start : start + self.page_commits]
        chain = ZERO_HASH
        chains = []
        for seqno, body in enumerate(bodies):
            chain = chain_after(chain, seqno, body)
            chains.append(chain)
        return wire.ReadJournalResponse(
            entries=[
                wire.JournalEntry(seqno=seqno, record=body, chain=chains[seqno])
                for seqno, body in enumerate(shown, start=start)
            ],
            next_seqno=start + len(shown),
        )


def check_can_lead(config: RunConfig) -> None:
    """Raise `ConfigError` for a contract that the battery cannot lead a run of."""
    if config.seed_policy == "pool" or config.buffer_answers:
        what = "seed_policy = 'pool'" if config.seed_policy == "pool" else "buffer_answers"
        raise ConfigError(
            f"The battery for workers has no sequences for {what}; use a contract without it."
        )
    if config.rounds < ROUNDS_MIN:
        raise ConfigError(
            f"The contract has {config.rounds} rounds, and the battery takes up to {ROUNDS_MIN}; "
            f"set rounds = {ROUNDS_MIN} or more."
        )


class WorkerBattery:
    """Leads one worker through a run, from its first hello to its last digest."""

    def __init__(self, test: WorkerTest, report: Report) -> None:
        self._test = test
        self._report = report
        self._genesis = test.genesis
        self._config = test.genesis.config
        body = encode_record(test.genesis)
        self.progress = Progress(body, heads=[head_after(ZERO_HASH, body)])
        self.server = ScriptedServer(
            lambda request: self.progress.describe(request),
            lambda request: self.progress.page(request),
        )
        self._line: Line | None = None
        self._worker = ""
        self.now = "opens a session with hello"
        """The check that is being made."""

    # ------------------------------------------------------------ the sequences

    async def run(self) -> None:
        """Make all checks of one worker that is started against the server."""
        report = self._report
        if not await self._joins():
            return
        for name, section, sequence in self.sequences():
            self.now = name
            with report.check(name, section):
                await self._in_time(sequence)

    def sequences(self) -> Sequence[tuple[str, int, Callable[[], Awaitable[None]]]]:
        """What follows the first hello: name, section of the page, and the sequence."""
        return (
            ("answers its first assignment", 7, self._first_answer),
            ("applies a commit", 8, self._one_commit),
            ("names the head where no digest is wanted", 7, self._head64),
            ("gives the same answer to a repeated assignment", 7, self._repeats),
            ("measures with an assignment's own rate and eps", 7, self._other_scales),
            ("goes on after a refused message", 13, self._refusals),
            ("applies a commit that comes twice once", 10, self._commit_twice),
            ("follows a commit that overtakes its measurement", 10, self._overtaken),
            ("ignores fields that it does not know, and hashes them", 15, self._unknown_fields),
            ("joins again after a lost connection, and answers", 10, self._lost_connection),
            ("takes the commits that it missed", 11, self._missed_commits),
            ("reads the journal page by page when it is far behind", 11, self._pages),
            ("waits for a coordinator that is starting", 13, self._starting),
            ("does not apply a commit after a gap", 10, self._gap),
            ("does not answer for another epoch", 10, self._other_epoch),
            ("does not answer a round that it cannot measure yet", 10, self._future_round),
            ("does not follow a journal that went back", 10, self._older_journal),
            ("does not answer at an epoch that went back", 10, self._older_epoch),
            ("does not take a second history of a round", 10, self._second_history),
            ("reports its weights at the end, and leaves", 10, self._finish),
        )

    async def _in_time(self, sequence: Callable[[], Awaitable[None]]) -> None:
        try:
            await sequence()
        except TimeoutError:
            raise CheckFailedError(
                f"nothing came for {self._test.patience_s:g} s, or too little"
            ) from None

    async def _joins(self) -> bool:
        """Take the first hello; returns whether there is a worker to go on with."""
        report, genesis = self._report, self._genesis
        try:
            line = await self.next_line()
            hello = await self.hello(line)
        except (TimeoutError, CheckFailedError) as error:
            seen = str(error) or f"no session within {self._test.patience_s:g} s"
            report.expect("opens a session with hello", 10, False, seen)
            return False
        report.expect("opens a session with hello", 10, True)
        asked = self.server.described
        report.expect(
            "asks for the run first, with protocol version 1",
            2,
            bool(asked) and PROTOCOL_VERSION in asked[0].protocol_versions,
            f"GetRun was called {len(asked)} times, first with "
            f"{list(asked[0].protocol_versions) if asked else 'nothing'}",
        )
        wanted: tuple[tuple[str, int, object, object], ...] = (
            ("hello: protocol version", 15, hello.protocol_version, PROTOCOL_VERSION),
            ("hello: run", 10, hello.run_id, self._config.run_id),
            ("hello: manifest digest", 4, hello.manifest_digest, genesis.manifest_digest),
            ("hello: base digest", 4, hello.base_digest, self._base_of(hello)),
            ("hello: tokenizer digest", 6, hello.tokenizer_digest, genesis.tokenizer_digest),
            ("hello: recipe", 5, hello.recipe, self._config.recipe),
            ("hello: round and head of the base", 5, (hello.round, hello.head), self._at(0)),
        )
        for name, section, found, right in wanted:
            report.expect(name, section, found == right, f"{_shown(found)}, not {_shown(right)}")
        is_name = bool(re.fullmatch(NAME_PATTERN, hello.worker)) and hello.worker != "replica"
        report.expect("hello: a worker's name", 14, is_name, repr(hello.worker))
        self._worker = hello.worker
        await self._welcome(line, hello)
        return True

    def _base_of(self, hello: wire.Hello) -> bytes:
        """The digest that a hello must name: its own if that is a form that the run admits."""
        forms = map(self._genesis.form_digest, self._config.base_forms)
        return hello.base_digest if hello.base_digest in forms else self._genesis.base_digest

    async def _first_answer(self) -> None:
        line = await self.online()
        answer = await self.asked(line, wants=True)
        self._ack(line, answer)

    async def _one_commit(self) -> None:
        line = await self.online()
        await self.commit(line)
        self._ack(line, await self.asked(line, wants=True))

    async def _head64(self) -> None:
        line = await self.online()
        self._ack(line, await self.asked(line, wants=False))

    async def _repeats(self) -> None:
        line = await self.online()
        first = await self.asked(line, wants=True)
        again = await self.asked(line, wants=True)
        both = [answer.SerializeToString(deterministic=True) for answer in (first, again)]
        require(both[0] == both[1], "the second answer differs from the first")

    async def _other_scales(self) -> None:
        line = await self.online()
        await self.commit(line)
        config = self._config
        await self.asked(
            line, wants=False, learning_rate=config.learning_rate / 2, eps=2 * config.eps
        )

    async def _refusals(self) -> None:
        line = await self.online()
        ticket = self._ticket()
        for reason in ("StaleTicketError", "EquivocationError", "ScalarError", "AnotherError"):
            line.send(
                wire.SessionResponse(
                    refused=wire.Refused(
                        ticket=ticket_to_pb(ticket), reason=reason, message="A test of refusals."
                    )
                )
            )
        await self.commit(line)
        await self.asked(line, wants=True)

    async def _commit_twice(self) -> None:
        line = await self.online()
        await self.commit(line)
        line.send(self.notice(self.progress.round))
        await self.asked(line, wants=True)

    async def _overtaken(self) -> None:
        line = await self.online()
        await self.commit(line)
        late = self._ticket()
        line.send(self.assignment(wants=True))
        await self.commit(line)
        line.send(self.assignment(wants=True))
        answer = await self._answer(line, self._ticket(), wants=True, ignored=late)
        self._ack(line, answer)

    async def _unknown_fields(self) -> None:
        """A commit and an assignment of a later version; the head is over all of the record."""
        line = await self.online()
        commit = self.made(self.progress.round + 1)
        record = journal_pb2.Record.FromString(encode_record(commit))
        record.committed.MergeFromString(UNKNOWN_FIELD)
        await self._add(commit, record.SerializeToString(deterministic=True), line)
        message = self.assignment(wants=False)
        message.assign.MergeFromString(UNKNOWN_FIELD)
        line.send(message)
        await self._answer(line, self._ticket(), wants=False)
        await self.asked(line, wants=True)

    async def _lost_connection(self) -> None:
        line = await self.online()
        await self.commit(line)
        line.send(self.assignment(wants=True))
        line.end(UnavailableError("The coordinator is stopping; reconnect later."))
        self.progress.epoch += 1
        line = await self.online()
        self._ack(line, await self.asked(line, wants=True))

    async def _missed_commits(self) -> None:
        line = await self.online()
        line.end(UnavailableError("The coordinator is stopping; reconnect later."))
        for _ in range(3):
            await self.commit(None)
        line = await self.online()
        self._ack(line, await self.asked(line, wants=True))

    async def _pages(self) -> None:
        line = await self.online()
        line.end(UnavailableError("The coordinator is stopping; reconnect later."))
        for _ in range(3):
            await self.commit(None)
        self.progress.page_commits = 1
        try:
            for _ in range(8):
                line = await self.next_line()
                hello = await self.hello(line)
                if hello.round == self.progress.round:
                    break
                line.end(NotReadyError("You are too far behind; read the journal first."))
            require(hello.round == self.progress.round, f"it still holds round {hello.round}")
            await self._welcome(line, hello)
            self._ack(line, await self.asked(line, wants=True))
        finally:
            self.progress.page_commits = 1024

    async def _starting(self) -> None:
        line = await self.online()
        starting = StartingError("The coordinator is starting; it answers when that is done.")
        starting.retry_after_s = 0.2
        self.server.refusal = starting
        try:
            line.end(UnavailableError("The coordinator is stopping; reconnect later."))
            async with asyncio.timeout(self._test.patience_s):
                for _ in range(3):
                    await self.server.refusals.get()
        finally:
            self.server.refusal = None
        self._ack(await self.online(), await self.asked(await self.online(), wants=True))

    async def _gap(self) -> None:
        line = await self.online()
        await self.commit(None)
        await self.commit(None)
        line.send(self.notice(self.progress.round))
        await self.ends(line)
        await self.asked(await self.online(), wants=True)

    async def _other_epoch(self) -> None:
        ticket = self._ticket()
        await self._refuses(self.assignment(Ticket(ticket.epoch + 1, ticket.round, 0)))

    async def _future_round(self) -> None:
        ticket = self._ticket()
        await self._refuses(self.assignment(Ticket(ticket.epoch, ticket.round + 1, 0)))

    async def _older_journal(self) -> None:
        line = await self.online()
        await self.commit(line)
        await self.asked(line, wants=True)
        line.end(UnavailableError("The coordinator is stopping; reconnect later."))
        line = await self.next_line()
        hello = await self.hello(line)
        line.send(self.welcome_of(hello.round - 1))
        await self.ends(line)
        await self.asked(await self.online(), wants=True)

    async def _older_epoch(self) -> None:
        line = await self.online()
        self.progress.epoch += 1
        line.end(UnavailableError("The coordinator is stopping; reconnect later."))
        line = await self.online()
        line.end(UnavailableError("The coordinator is stopping; reconnect later."))
        self.progress.epoch -= 1
        line = await self.next_line()
        hello = await self.hello(line)
        line.send(self.welcome_of(hello.round), self.assignment(wants=True))
        await self.ends(line)
        self.progress.epoch += 1
        await self.asked(await self.online(), wants=True)

    async def _second_history(self) -> None:
        line = await self.online()
        await self.commit(line)
        await self.asked(line, wants=True)
        other = self.made(self.progress.round, scale=3.0)
        line.send(wire.SessionResponse(commit=wire.CommitNotice(record=encode_record(other))))
        line.send(self.assignment(wants=True))
        await self.ends(line, ignores_answers=True)
        await self.asked(await self.online(), wants=True)

    async def _finish(self) -> None:
        line = await self.online()
        line.send(wire.SessionResponse(finished=wire.Finished(round=self.progress.round)))
        message = await line.receive(self._test.patience_s)
        require(message is not None, "the session ended without a weights report")
        assert message is not None
        require(message.WhichOneof("kind") == "weights_report", f"{_kind(message)} came")
        found = message.weights_report
        require(found.round == self.progress.round, f"it is of round {found.round}")
        self._check_digest(found.weights_digest)
        require(len(found.weights_digest) == 32, f"it has {len(found.weights_digest)} bytes")
        require(
            await line.receive(self._test.patience_s) is None,
            "a message came after the weights report",
        )
        line.end()

    # ------------------------------------------------------------ steps of the sequences

    async def online(self) -> Line:
        """A session that is welcomed and has every commit: the open one, or a new one."""
        if self._line is not None and not self._line.is_over:
            return self._line
        line = await self.next_line()
        await self._welcome(line, await self.hello(line))
        return line

    async def next_line(self) -> Line:
        """The next session that the worker opens, before its hello."""
        async with asyncio.timeout(self._test.patience_s):
            return await self.server.lines.get()

    async def hello(self, line: Line) -> wire.Hello:
        """The session's first message, which must be a hello at a round of this history."""
        message = await line.receive(self._test.patience_s)
        require(message is not None, "a session ended before its hello")
        assert message is not None
        require(message.WhichOneof("kind") == "hello", f"a session began with {_kind(message)}")
        hello = message.hello
        require(hello.round <= self.progress.round, f"it claims to hold round {hello.round}")
        require(
            hello.head == self.progress.heads[hello.round],
            f"its hello names another head at round {hello.round}: {hello.head.hex()[:16]}",
        )
        if self._worker:
            require(hello.worker == self._worker, f"it calls itself {hello.worker!r} now")
        return hello

    async def _welcome(self, line: Line, hello: wire.Hello) -> None:
        line.send(self.welcome_of(self.progress.round))
        line.send(*(self.notice(n) for n in range(hello.round + 1, self.progress.round + 1)))
        self._line = line

    def welcome_of(self, round_: int) -> wire.SessionResponse:
        """A welcome at a round."""
        head = self.progress.heads[round_]
        return wire.SessionResponse(
            welcome=wire.Welcome(epoch=self.progress.epoch, round=round_, head=head)
        )

    def notice(self, round_: int) -> wire.SessionResponse:
        """The commit of a round."""
        record = self.progress.commits[round_ - 1]
        return wire.SessionResponse(commit=wire.CommitNotice(record=record))

    async def commit(self, line: Line | None) -> None:
        """Commit the next round, and tell a session if one is given."""
        commit = self.made(self.progress.round + 1)
        await self._add(commit, encode_record(commit), line)

    async def _add(self, commit: Committed, body: bytes, line: Line | None) -> None:
        """Add a commit, as these bytes, to the run and to our own weights."""
        self.progress.commits.append(body)
        self.progress.heads.append(head_after(self.progress.heads[-1], body))
        if self._test.model is not None:
            await asyncio.to_thread(self._test.model.apply, commit)
        if line is not None:
            line.send(self.notice(commit.round))

    def made(self, round_: int, scale: float = 1.0) -> Committed:
        """A commit as a coordinator would make it, with coefficients of many sizes."""
        config = self._config
        slots = 1 if config.seed_policy == "shared" else min(config.answers_max, 3)
        ranges = []
        for slot in range(slots):
            first = first_seed_of(config.seed, round_, slot)
            values = [
                to_binary32(scale * _COEFFICIENTS[(round_ + slot + k) % len(_COEFFICIENTS)])
                for k in range(config.pairs_per_answer)
            ]
            ranges.append(SeedRange(first, tuple(values)))
        decay = to_binary32(0.9999) if config.weight_decay else 1.0
        return Committed(round_, tuple(ranges), rounding_seed_of(config.seed, round_), decay)

    def _ticket(self) -> Ticket:
        return Ticket(self.progress.epoch, self.progress.round + 1, 0)

    def _work(self, ticket: Ticket, wants: bool, **scales: float) -> Work:
        config = self._config
        first = first_seed_of(config.seed, ticket.round, ticket.slot)
        return Work(
            tuple(range(first, first + config.pairs_per_answer)),
            scales.get("learning_rate", config.learning_rate),
            scales.get("eps", config.eps),
            wants,
        )

    def assignment(
        self, ticket: Ticket | None = None, *, wants: bool = False, **scales: float
    ) -> wire.SessionResponse:
        """Work for the next round, or for another ticket; `scales` are a learning rate and eps."""
        ticket = ticket or self._ticket()
        work = self._work(ticket, wants, **scales)
        return assign_to_pb(Assign(self._worker, ticket, work, DEADLINE_MS), self._config)

    def _ack(self, line: Line, answer: wire.Answer) -> None:
        head = self.progress.heads[answer.ticket.round - 1]
        line.send(wire.SessionResponse(ack=wire.Ack(ticket=answer.ticket, head=head)))

    async def asked(self, line: Line, *, wants: bool, **scales: float) -> wire.Answer:
        """Assign the next round, and check the answer, also against our own measurement."""
        ticket = self._ticket()
        line.send(self.assignment(ticket, wants=wants, **scales))
        answer = await self._answer(line, ticket, wants=wants)
        await self._compare(Measure(ticket, self._work(ticket, False, **scales)), answer)
        return answer

    async def _answer(
        self, line: Line, ticket: Ticket, *, wants: bool, ignored: Ticket | None = None
    ) -> wire.Answer:
        """The answer to `ticket`, sound in itself; one to `ignored` may come before it."""
        while True:
            message = await line.receive(self._test.patience_s)
            if message is None:
                raise CheckFailedError("the session ended without an answer")
            kind = message.WhichOneof("kind")
            about = message.unable.ticket if kind == "unable" else message.answer.ticket
            if ignored is not None and about == ticket_to_pb(ignored):
                continue
            if kind == "unable":
                raise CheckFailedError(f"it cannot measure: {message.unable.reason}")
            require(kind == "answer", f"{_kind(message)} came")
            break
        answer = message.answer
        require(answer.ticket == ticket_to_pb(ticket), f"it answers another ticket: {_line(about)}")
        self._check_scalars(answer)
        if not wants:
            require(not answer.HasField("weights_digest64"), "it has a digest that nobody wanted")
            head64 = digest64_of(self.progress.heads[ticket.round - 1])
            require(answer.HasField("head64"), "it has neither head64 nor weights_digest64")
            require(answer.head64 == head64, f"head64 is {answer.head64:016x}, not {head64:016x}")
            return answer
        require(answer.HasField("weights_digest64"), "it lacks weights_digest64")
        require(not answer.HasField("head64"), "it has head64 beside weights_digest64")
        if self._test.model is not None:
            digest64 = digest64_of(self._test.model.digest())
            require(
                answer.weights_digest64 == digest64,
                f"weights_digest64 is {answer.weights_digest64:016x}, not {digest64:016x}: its "
                f"weights after round {ticket.round - 1} are not the run's",
            )
        return answer

    def _check_scalars(self, answer: wire.Answer) -> None:
        config, grads = self._config, answer.projected_grads
        require(
            len(grads) == config.pairs_per_answer,
            f"{len(grads)} projected gradients came, not {config.pairs_per_answer}",
        )
        limit = clip_of(config.projected_grad_abs_max)
        bad = [grad for grad in grads if not abs(grad) <= limit]
        require(not bad, f"a projected gradient is {bad[:1]}, and the clip is {limit!r}")
        has_loss = answer.HasField("mean_loss")
        require(has_loss == config.report_losses, f"mean_loss is {'' if has_loss else 'not '}set")
        require(not has_loss or math.isfinite(answer.mean_loss), "mean_loss is not finite")
        has_rows = answer.HasField("rows")
        require(
            has_rows == (config.weighting == "rows"), f"rows is {'' if has_rows else 'not '}set"
        )
        require(not has_rows or answer.rows > 0, "rows is 0")

    def _check_digest(self, digest: bytes) -> None:
        if self._test.model is not None:
            ours = self._test.model.digest()
            require(digest == ours, f"the digest is {digest.hex()[:16]}, not {ours.hex()[:16]}")

    async def _compare(self, order: Measure, answer: wire.Answer) -> None:
        """Compare an answer with our own measurement of the same rows."""
        test = self._test
        if test.model is None or test.likeness is None:
            return
        ours = await asyncio.to_thread(test.model.measure, order, self._worker)
        if ours is None:
            return
        correlation, difference = test.likeness(ours, list(answer.projected_grads))
        figures = self._report.figures
        figures[CORRELATION] = min(correlation, figures.get(CORRELATION, 1.0))
        figures[DIFFERENCE] = max(difference, figures.get(DIFFERENCE, 0.0))
        require(
            correlation >= test.correlation_min and difference <= test.difference_max,
            f"projected gradients correlate {correlation:.5f} with ours (at least "
            f"{test.correlation_min:g}), and differ by up to {difference:.3g} of their usual size "
            f"(at most {test.difference_max:g})",
        )

    async def _refuses(self, message: wire.SessionResponse) -> None:
        """Send what no worker may follow: it must not answer, end the session and join again."""
        line = await self.online()
        line.send(message)
        await self.ends(line)
        await self.asked(await self.online(), wants=True)

    async def ends(self, line: Line, *, ignores_answers: bool = False) -> None:
        """Wait until the worker has ended the session, without an answer."""
        try:
            while (message := await line.receive(self._test.patience_s)) is not None:
                require(ignores_answers, f"{_kind(message)} came instead of the session's end")
        except TimeoutError:
            raise CheckFailedError("it did not end the session") from None
        finally:
            line.end()

    def _at(self, round_: int) -> tuple[int, bytes]:
        return round_, self.progress.heads[round_]


_COEFFICIENTS = (1e-3, -2.5e-3, 0.0, 3e-5, -1e-9, 4e-3, -7e-4)
"""Small beside trained weights, with a 0 that must not be left out."""


def _kind(message: wire.SessionRequest) -> str:
    return f"a message `{message.WhichOneof('kind') or 'of no kind'}`"


def _line(message: object) -> str:
    return " ".join(str(message).split())


def _shown(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()[:16] or "(empty)"
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value))
    return repr(value)
