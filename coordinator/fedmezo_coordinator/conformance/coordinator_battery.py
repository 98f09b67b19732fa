"""Workers that test a coordinator, by honest, repeated and hostile messages.

They have no model. Their projected gradients are made up, and their digests of weights are a hash
of the head, the same for all of them. So the coordinator must not have weights of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo_coordinator.conformance.raw_calls import CallEndedError, RawCoordinator, RawStream
from fedmezo_coordinator.conformance.report import (
    UNKNOWN_FIELD,
    CheckFailedError,
    CheckSkippedError,
    Report,
    require,
)
from fedmezo_core.config import PROTOCOL_VERSION, RunConfig
from fedmezo_core.errors import ConfigError, FedMezoError, ProtocolError
from fedmezo_core.events import Ticket
from fedmezo_core.journal.codec import decode_commit, decode_record
from fedmezo_core.journal.journal import (
    COMMITTED,
    MOVES_HEAD,
    ZERO_HASH,
    chain_after,
    head_after,
)
from fedmezo_core.journal.signed_heads import Witness
from fedmezo_core.machines.aggregate import coefficients_of
from fedmezo_core.machines.answers import is_digest_round
from fedmezo_core.machines.divergence import REPLICA_PARTY
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.records import (
    Answered,
    Genesis,
    digest64_of,
    first_seed_of,
    rounding_seed_of,
)
from fedmezo_core.trust.answer_signatures import AnswerSigner, answer_text, is_signed
from fedmezo_core.trust.authorisation import Role
from fedmezo_core.trust.identity import Identity
from fedmezo_core.wire.messages import answer_from_pb, assigned_from_pb, hello_to_pb
from fedmezo_proto.v1 import coordinator_pb2 as wire

WORKERS_MAX = 64
"""Most workers that a contract may need for a round."""
MISSING = 5
"""Most commits that a worker of the battery lacks."""
ROUNDS_MIN = 4
"""Rounds that the battery takes; one that ends earlier would leave it waiting for assignments."""
PAGE_COMMITS = 4096
"""Records of the largest page."""
MESSAGE_BYTES = 70_000
"""Bytes of a message that is too large."""
EXCHANGES_MAX = 20
"""Exchanges after which what has not come is missing."""
OTHER = b"\x01" * 32
"""A digest that is nobody's."""

_Sequence = Callable[[], Awaitable[None]]
_Found = dict[str | None, wire.SessionResponse]
"""Kind -> the message of that kind in one response."""
_NamedSequence = tuple[str, int, _Sequence]
"""What a check is called, the protocol's section, and what makes it."""


@dataclass(frozen=True, slots=True)
class CoordinatorTest:
    """What a coordinator is tested with."""

    address: str
    tls_ca: Path | None = None
    rounds_max: int = 20
    """A run of at most so many rounds is led to its end."""
    patience_s: float = 20.0
    """Longest wait for anything that the coordinator owes."""
    identities: Sequence[Identity] = ()
    """Members of the coordinator's fleet that the battery speaks as: workers, and perhaps one who
    may read what a worker may not. None: it has no fleet."""

    @property
    def workers(self) -> list[Identity]:
        """The members that are workers, by name."""
        workers = [one for one in self.identities if one.role is Role.WORKER]
        return sorted(workers, key=lambda one: one.name)

    @property
    def reader(self) -> Identity | None:
        """The member that reads journal and status; None: there is no fleet."""
        readers = [one for one in self.identities if one.role is not Role.WORKER]
        return next(iter([*readers, *self.workers]), None)


@dataclass(eq=False)
class Tester:
    """One worker of the battery."""

    name: str
    stream: RawStream
    welcome: wire.Welcome
    assign: wire.Assign | None = None
    commits: list[bytes] = field(default_factory=list)
    """Records of the commits that came in this session."""
    acknowledged: list[wire.Ticket] = field(default_factory=list)
    """Tickets of the acknowledgements that came in this session."""

    async def next(
        self, kind: str, *, but: str = "", more: Sequence[str] = ()
    ) -> wire.SessionResponse:
        """The next message but commits and those of kind `but`; it is `kind`, or one of `more`."""
        while True:
            try:
                message = await self.stream.receive()
            except CallEndedError as error:
                raise CheckFailedError(f"{self.name}'s session ended with {error}") from None
            found = message.WhichOneof("kind")
            if found == "commit":
                self.commits.append(message.commit.record)
                if kind == "commit":
                    return message
                continue
            if found == "ack":
                self.acknowledged.append(message.ack.ticket)
            if found == but:
                continue
            require(
                found == kind or found in more,
                f"{self.name} got {found or 'a message of no kind'} instead of {kind}: "
                f"{' '.join(str(message).split())[:160]}",
            )
            return message

    async def take_work(self, *, but: str = "") -> wire.Assign:
        """The next message but those of kind `but`, which must be an assignment."""
        self.assign = (await self.next("assign", but=but)).assign
        return self.assign

    async def ending(self) -> CallEndedError:
        """How the session ends."""
        try:
            while True:
                await self.stream.receive()
        except CallEndedError as error:
            return error


@dataclass
class History:
    """The journal as it was read."""

    bodies: list[bytes] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    """The head after each round, from 0 on."""
    commits: list[bytes] = field(default_factory=list)

    @property
    def round(self) -> int:
        """Last committed round."""
        return len(self.commits)


def check_can_test(config: RunConfig, members: int | None = None) -> None:
    """Raise `ConfigError` for a contract that the battery has no sequences for.

    `members` is how many workers of the coordinator's fleet it has; None: there is no fleet.
    """
    needed = max(config.workers_min, config.quorum)
    if config.buffer_answers:
        raise ConfigError(
            "The battery for coordinators has no sequences for buffer_answers; use a run without."
        )
    if config.secure_aggregation:
        raise ConfigError(
            "The battery for coordinators has no sequences for secure_aggregation; use a run "
            "without."
        )
    if members is not None and needed > members:
        raise ConfigError(
            f"A round of this run needs {needed} workers, and --state names {members}; name the "
            "folders of more workers, or use a run with a smaller workers_min and quorum."
        )
    if needed > min(WORKERS_MAX, config.cohort_size_max):
        raise ConfigError(
            f"A round of this run needs {needed} workers, and the battery has at most "
            f"{WORKERS_MAX}, all of one cohort; use a run with a smaller workers_min and quorum."
        )


class CoordinatorBattery:
    """Makes all checks of one coordinator that serves a run of its own for this."""

    def __init__(self, test: CoordinatorTest, report: Report) -> None:
        self._test = test
        self._report = report
        self._workers = {one.name: self._connection(one) for one in test.workers}
        self._keys = {one.name: one.keys.signing_key for one in test.workers}
        """Name -> key that a member signs its answers with; empty without a fleet."""
        self._reader = self._connection(test.reader)
        """The connection that reads journal and status."""
        self._coordinator = next(iter(self._workers.values()), self._reader)
        """The first worker's connection."""
        self._genesis: Genesis
        self._run: wire.GetRunResponse
        self._history = History()
        self._testers: dict[str, Tester] = {}
        self._sent: dict[str, tuple[int, tuple[float, ...]]] = {}
        """Name -> slot and projected gradients of each answer to the last round."""
        self._signatures: list[bytes] = []
        """Of the last round's commit, one for each worker."""

    def _connection(self, identity: Identity | None) -> RawCoordinator:
        test = self._test
        return RawCoordinator(test.address, test.tls_ca, test.patience_s, identity)

    @property
    def _config(self) -> RunConfig:
        return self._genesis.config

    async def run(self) -> None:
        """Make all checks."""
        async with contextlib.AsyncExitStack() as connections:
            for connection in (*self._workers.values(), self._reader):
                await connections.enter_async_context(connection)
            if not await self._describes():
                return
            for sequences in (self._before_a_session, self._in_sessions):
                for name, section, sequence in sequences():
                    with self._report.check(name, section):
                        await self._in_time(sequence)
            for tester in self._testers.values():
                tester.stream.cancel()

    async def _in_time(self, sequence: _Sequence) -> None:
        try:
            await sequence()
        except CallEndedError as error:
            raise CheckFailedError(f"a call ended with {error}") from None
        except CheckSkippedError:
            raise
        except FedMezoError as error:
            raise CheckFailedError(str(error)) from None

    async def _describes(self) -> bool:
        """Ask for the run; returns whether there is one to go on with."""
        try:
            self._run = await self._get_run()
            record = decode_record(self._run.genesis)
            if not isinstance(record, Genesis):
                raise ProtocolError("GetRun's genesis is another record")
        except (CallEndedError, FedMezoError) as error:
            self._report.expect("describes its run", 5, False, str(error))
            return False
        self._genesis = record
        check_can_test(record.config, len(self._workers) if self._test.identities else None)
        rounds = record.config.rounds
        left = max(rounds - self._run.round, 0)
        if left < ROUNDS_MIN:
            raise ConfigError(
                f"Run {record.config.run_id} at {self._test.address} has {left} of its {rounds} "
                f"rounds left, and the battery takes {ROUNDS_MIN}; give the coordinator a new "
                f"journal, and a contract with rounds = {ROUNDS_MIN} or more."
            )
        await self._check_no_weights()
        version = self._run.protocol_version
        seen = f"protocol version {version}, epoch {self._run.epoch}"
        sound = version == PROTOCOL_VERSION and self._run.epoch >= 1
        return self._report.expect("describes its run", 5, sound, seen)

    async def _check_no_weights(self) -> None:
        """Raise `ConfigError` if the coordinator compares digests with weights of its own."""
        request = wire.GetStatusRequest()
        try:
            status = await self._reader.call("GetStatus", request, wire.GetStatusResponse)
        except (CallEndedError, CheckFailedError):
            return  # A worker needs no status.
        if any(digest.party == REPLICA_PARTY for digest in status.digests):
            raise ConfigError(
                f"The coordinator at {self._test.address} has weights of its own, and the battery "
                "has no model to make them with; set replica = false there."
            )

    # ------------------------------------------------------------ before a session

    def _before_a_session(self) -> Sequence[_NamedSequence]:
        run_id = self._config.run_id
        invalid = ("INVALID_ARGUMENT", "ProtocolError")

        def refused_run(status: str, reason: str, **fields: Any) -> _Sequence:
            request = wire.GetRunRequest(**({"protocol_versions": [1]} | fields))
            return lambda: self._refused(
                self._coordinator.call("GetRun", request, wire.GetRunResponse), status, reason
            )

        def refused_page(**fields: Any) -> _Sequence:
            return lambda: self._refused(self._page(**fields), *invalid)

        def refused_hello(status: str, reason: str, **fields: Any) -> _Sequence:
            name = self._names[0] if self._keys else "tester-x"
            return lambda: self._refused_first(self._hello(name, **fields), status, reason)

        no_hello = wire.SessionRequest(answer=wire.Answer())
        return (
            (
                "refuses a caller of another version",
                15,
                refused_run("UNIMPLEMENTED", "VersionError", protocol_versions=[99]),
            ),
            (
                "refuses a caller without a version",
                15,
                refused_run("UNIMPLEMENTED", "VersionError", protocol_versions=[]),
            ),
            (
                "refuses to describe another run",
                13,
                refused_run("NOT_FOUND", "WrongRunError", run_id=f"not-{run_id}"[:64]),
            ),
            ("has a sound journal", 5, self._reads_journal),
            ("names the head of its last round", 5, self._names_head),
            ("signs the head of its last round, if it has a key", 5, self._signs_head),
            ("gives pages of one record", 11, self._small_pages),
            ("gives an empty page behind the last commit", 11, self._behind_the_end),
            ("refuses a page of too many records", 11, refused_page(records_max=5000)),
            ("refuses too long a wait", 11, refused_page(wait_ms=60_000)),
            ("refuses a round in a page of all records", 11, refused_page(from_round=1)),
            ("refuses a snapshot that it has not", 11, self._no_snapshot),
            (
                "ends a stream that does not begin with hello",
                10,
                lambda: self._refused_first(no_hello, *invalid),
            ),
            (
                "ends a stream that begins with bytes that are no message",
                10,
                lambda: self._refused_first(b"\xff\xff\xff", *invalid),
            ),
            (
                "refuses a hello of another version",
                15,
                refused_hello("UNIMPLEMENTED", "VersionError", protocol_version=99),
            ),
            (
                "refuses a hello to another run",
                13,
                refused_hello("NOT_FOUND", "WrongRunError", run_id=f"not-{run_id}"[:64]),
            ),
            *(self._of_members() if self._keys else self._of_names(refused_hello)),
            *(
                (
                    f"refuses another {what}",
                    section,
                    refused_hello("FAILED_PRECONDITION", "MismatchError", **{field_: value}),
                )
                for what, section, field_, value in (
                    ("manifest", 4, "manifest_digest", OTHER),
                    ("base", 4, "base_digest", OTHER),
                    ("tokenizer", 6, "tokenizer_digest", OTHER),
                    ("recipe", 5, "recipe", f"{self._config.recipe} new"),
                )
            ),
            (
                "refuses a worker with another history",
                13,
                refused_hello("DATA_LOSS", "DivergedError", head=OTHER),
            ),
            (
                "refuses a worker that holds more rounds than the journal",
                13,
                refused_hello("FAILED_PRECONDITION", "JournalBehindError", round=10**9),
            ),
            ("refuses a poll without hello", 12, self._poll_without_hello),
            ("refuses an unknown token", 12, self._unknown_token),
        )

    @staticmethod
    def _of_names(refused_hello: Callable[..., _Sequence]) -> Sequence[_NamedSequence]:
        """What a name may be, where anybody can take one."""
        invalid = ("INVALID_ARGUMENT", "ProtocolError")
        return (
            ("refuses a bad name", 14, refused_hello(*invalid, worker="Not A Name")),
            ("refuses a name that is too long", 14, refused_hello(*invalid, worker="a" * 65)),
            ("refuses the replica's name", 14, refused_hello(*invalid, worker="replica")),
        )

    def _of_members(self) -> Sequence[_NamedSequence]:
        """What a fleet asks of its members."""
        name = self._names[0]
        another = Ed25519PrivateKey.generate().public_key().public_bytes_raw()

        def refused(key: bytes) -> _Sequence:
            return lambda: self._refused_first(
                self._hello(name, signing_key=key), "PERMISSION_DENIED", "SignatureError"
            )

        stranger = "not-a-member-of-this-fleet"
        return (
            (
                "refuses a member under another name",
                14,
                lambda: self._refused_first(
                    self._hello(stranger), "PERMISSION_DENIED", "ForbiddenError"
                ),
            ),
            ("refuses a hello without the member's key", 7, refused(b"")),
            ("refuses a hello with another key than the member's", 7, refused(another)),
        )

    async def _reads_journal(self) -> None:
        """Read all records, check their chain, and that each may follow those before."""
        history, machine = History(), RoundMachine()
        chain, head, seqno = ZERO_HASH, ZERO_HASH, 0
        while True:
            page = await self._page(from_seqno=seqno)
            if not page.entries:
                break
            for entry in page.entries:
                require(entry.seqno == seqno, f"record {entry.seqno} came instead of {seqno}")
                chain = chain_after(chain, seqno, entry.record)
                require(entry.chain == chain, f"the chain of record {seqno} is another")
                kind = entry.record[:1]
                if kind in MOVES_HEAD:
                    head = head_after(head, entry.record)
                    history.heads.append(head)
                if kind == COMMITTED:
                    history.commits.append(entry.record)
                history.bodies.append(entry.record)
                machine.apply(decode_record(entry.record))
                seqno += 1
            require(page.next_seqno == seqno, f"next_seqno is {page.next_seqno}, not {seqno}")
        require(seqno > 0, "it has no records")
        require(history.bodies[0] == self._run.genesis, "record 0 is not GetRun's genesis")
        self._history = history

    async def _names_head(self) -> None:
        run = await self._get_run()
        await self._reads_journal()
        history = self._history
        require(run.round <= history.round, f"round {run.round} is not in its journal")
        require(run.head == self._head(run.round), f"its head is {run.head.hex()[:16]}")

    async def _signs_head(self) -> None:
        run = await self._get_run()
        require(bool(run.checkpoint_key) == bool(run.signature), "a key or a signature is missing")
        if run.checkpoint_key:
            require(len(run.checkpoint_key) == 32, f"a key of {len(run.checkpoint_key)} bytes")
            witness = Witness(self._config.run_id, run.checkpoint_key)
            witness.check(run.round, run.head, run.signature)

    async def _commits_alone(self) -> None:
        wanted = [self._run.genesis, *self._history.commits][:PAGE_COMMITS]
        page = await self._page(commits_only=True, records_max=PAGE_COMMITS)
        found = [entry.record for entry in page.entries]
        require(found == wanted[: len(found)] and len(found) > 1, "other records came")
        page = await self._page(commits_only=True, from_round=1, records_max=1)
        found = [entry.record for entry in page.entries]
        require(found == wanted[1:2], "from_round 1 does not begin with the first commit")

    async def _small_pages(self) -> None:
        page = await self._page(records_max=1)
        require(len(page.entries) == 1, f"{len(page.entries)} records came")
        require(page.next_seqno == 1, f"next_seqno is {page.next_seqno}")

    async def _behind_the_end(self) -> None:
        page = await self._page(commits_only=True, from_round=self._config.rounds + 1)
        require(not page.entries, f"{len(page.entries)} records came")

    async def _no_snapshot(self) -> None:
        request = wire.ReadSnapshotRequest(round=2**40)
        piece = self._coordinator.first_piece(request)
        await self._refused(piece, "NOT_FOUND", "SnapshotError")

    async def _poll_without_hello(self) -> None:
        request = wire.PollSessionRequest()
        call = self._coordinator.call("PollSession", request, wire.PollSessionResponse)
        await self._refused(call, "INVALID_ARGUMENT", "ProtocolError")

    async def _unknown_token(self) -> None:
        request = wire.PollSessionRequest(token=b"\x01" * 16)
        call = self._coordinator.call("PollSession", request, wire.PollSessionResponse)
        await self._refused(call, "NOT_FOUND", "UnknownWorkerError")

    # ------------------------------------------------------------ in sessions

    def _in_sessions(self) -> Sequence[_NamedSequence]:
        return (
            ("opens a round when enough workers are there", 17, self._opens_a_round),
            ("assigns the seeds of the slot", 3, self._seeds_are_the_slots),
            ("commits a round, with the same bytes for all", 17, self._commits),
            ("has recorded every acknowledged answer", 17, self._has_recorded),
            ("keeps the signatures of its members' answers", 7, self._keeps_signatures),
            ("commits what the contract makes of the answers", 17, self._coefficients),
            ("signs each commit, if it has a key", 5, self._signs_commits),
            ("gives genesis and commits alone", 11, self._commits_alone),
            ("assigns the next round to all workers", 17, self._seeds_are_the_slots),
            ("ends the older session of a name", 10, self._replaces),
            ("repeats an assignment after a reconnection", 10, self._repeats),
            ("ignores fields that it does not know", 15, self._unknown_fields),
            ("refuses answers to tickets that are not open", 13, self._stale_tickets),
            ("refuses projected gradients that the run does not allow", 13, self._bad_scalars),
            ("refuses fields that the contract does not have", 13, self._bad_fields),
            ("ends the session of a worker with another head", 13, self._other_head64),
            ("ends a session whose answers are not signed with its key", 7, self._not_signed),
            ("ends a session at a second hello", 10, self._second_hello),
            ("ends a session at a message of no kind", 10, self._no_kind),
            ("ends a session at a message that is too large", 14, self._too_large),
            ("acknowledges an answer, and the same one again", 10, self._acknowledges),
            ("refuses a second, different answer", 13, self._equivocation),
            ("serves a session without a stream", 12, self._polls),
            ("commits a round of answers from streams and polls", 12, self._commits),
            ("serves exchanges, each with hello and nonce", 12, self._exchanges),
            ("refuses an answer to a committed round", 13, self._late_answer),
            ("sends the commits that a worker lacks", 10, self._sends_missing),
            ("goes on when a worker cannot measure", 10, self._unable),
            ("sends a worker away whose digest differs", 17, self._other_digest),
            ("finishes the run", 17, self._finishes),
        )

    @property
    def _count(self) -> int:
        """Workers of the battery: what a round needs, and one more if the cohort has room."""
        needed = max(self._config.workers_min, self._config.quorum)
        most = len(self._keys) or WORKERS_MAX
        return min(max(needed + 1, 3), self._config.cohort_size_max, most)

    @property
    def _names(self) -> list[str]:
        if self._keys:
            return list(self._keys)[: self._count]
        return [f"tester-{number:02}" for number in range(1, self._count + 1)]

    async def _opens_a_round(self) -> None:
        """The first workers open a round; those that come later wait, or get more slots of it."""
        names, slots = self._names, set()
        for name in names[: self._config.workers_min]:
            await self._join(name)
        for tester in list(self._testers.values()):
            ticket = (await tester.take_work()).ticket
            require(ticket.epoch == tester.welcome.epoch, f"its epoch is {ticket.epoch}")
            require(
                ticket.round == self._history.round + 1,
                f"round {ticket.round} was assigned after round {self._history.round}",
            )
            require(ticket.slot not in slots, f"slot {ticket.slot} was assigned twice")
            slots.add(ticket.slot)
        for name in names[self._config.workers_min :]:
            await self._join(name)

    async def _seeds_are_the_slots(self) -> None:
        config = self._config
        require(bool(self._assigned()), "nothing is assigned")
        for tester in self._assigned():
            ticket = self._ticket_of(tester)
            work = assigned_from_pb(tester.assign or wire.Assign(), config).work
            require(
                len(work.seeds) == config.pairs_per_answer,
                f"{len(work.seeds)} seeds, not {config.pairs_per_answer}",
            )
            wants = is_digest_round(config, ticket.round)
            require(work.want_digest == wants, f"want_digest is {work.want_digest}")
            if config.seed_policy == "pool":
                continue
            slot = 0 if config.seed_policy == "shared" else ticket.slot
            first = first_seed_of(config.seed, ticket.round, slot)
            require(
                list(work.seeds) == list(range(first, first + len(work.seeds))),
                f"slot {ticket.slot} has the first seed {work.seeds[0]:016x}, not {first:016x}",
            )

    async def _replaces(self) -> None:
        older = self._any()
        newer = await self._join(older.name)
        ending = await older.ending()
        self._require_ending(ending, "INVALID_ARGUMENT", "ReplacedError")
        self._same_work(older, await newer.take_work())

    async def _repeats(self) -> None:
        before = self._any()
        before.stream.cancel()
        after = await self._join(before.name)
        self._same_work(before, await after.take_work())

    async def _unknown_fields(self) -> None:
        before = self._any()
        before.stream.cancel()
        after = await self._join(before.name, more=UNKNOWN_FIELD)
        self._same_work(before, await after.take_work())

    async def _stale_tickets(self) -> None:
        tester = self._any()
        later = [] if self._keys else [{"round": 3}]  # Which nobody can sign: its head is unknown.
        for change in ({"epoch": 1000}, {"slot": 4000}, *later):
            answer = self._answer(tester)
            for name, more in change.items():
                setattr(answer.ticket, name, getattr(answer.ticket, name) + more)
            await self._refused_answer(tester, answer, "StaleTicketError")
        others = [other for other in self._assigned() if other is not tester]
        if others:
            await self._refused_answer(tester, self._answer(others[0]), "StaleTicketError")

    async def _bad_scalars(self) -> None:
        tester = self._any()
        beyond = 4 * self._config.projected_grad_abs_max
        for value in (math.nan, math.inf, -math.inf, beyond):
            answer = self._answer(tester)
            answer.projected_grads[0] = value
            await self._refused_answer(tester, answer, "ScalarError")
        for grads in ((), (0.5,) * (self._config.pairs_per_answer + 1)):
            answer = self._answer(tester)
            del answer.projected_grads[:]
            answer.projected_grads.extend(grads)
            await self._refused_answer(tester, answer, "ScalarError")

    async def _bad_fields(self) -> None:
        tester, config = self._any(), self._config
        if not config.report_losses:
            answer = self._answer(tester)
            answer.mean_loss = 0.5
            await self._refused_answer(tester, answer, "ProtocolError")
        answer = self._answer(tester)
        if config.weighting == "rows":
            answer.ClearField("rows")
        else:
            answer.rows = 10
        await self._refused_answer(tester, answer, "ProtocolError")
        if is_digest_round(config, answer.ticket.round):
            answer = self._answer(tester)
            answer.ClearField("weights_digest64")
            await self._refused_answer(tester, answer, "ProtocolError")

    async def _other_head64(self) -> None:
        answer = self._answer(self._any())
        answer.head64 = digest64_of(OTHER)
        await self._ends_with(wire.SessionRequest(answer=answer), "DATA_LOSS", "DivergedError")

    async def _not_signed(self) -> None:
        """A hello names a key, and the answer has no signature, or one of other keys or answers."""
        tester, genesis_head = self._any(), self._head(0)
        key = self._keys.get(tester.name) or Ed25519PrivateKey.generate()
        signer = AnswerSigner(key, genesis_head)
        another = AnswerSigner(Ed25519PrivateKey.generate(), genesis_head)
        answer = self._answer(tester)
        event = answer_from_pb(tester.name, answer)
        head = self._head(event.ticket.round - 1)
        more = event.scalars._replace(
            projected_grads=tuple(grad + 1 for grad in event.scalars.projected_grads)
        )
        refused = ("PERMISSION_DENIED", "SignatureError")
        hello = wire.Hello(signing_key=signer.public_key).SerializeToString()
        for signature in (
            b"",
            another.sign(event.ticket, head, event.scalars),
            signer.sign(event.ticket, head, more),
            signer.sign(event.ticket, OTHER, event.scalars),
        ):
            work = self._any().assign
            again = await self._join(tester.name, more=hello)
            again.assign = work
            self._same_work(again, await again.take_work())
            answer.signature = signature
            await self._ends_with(wire.SessionRequest(answer=answer), *refused)
        # The session has no key now, or that of a member, who signed another answer.
        await self._ends_with(wire.SessionRequest(answer=answer), *refused)

    async def _second_hello(self) -> None:
        hello = self._hello(self._any().name)
        await self._ends_with(hello, "INVALID_ARGUMENT", "ProtocolError")

    async def _no_kind(self) -> None:
        await self._ends_with(wire.SessionRequest(), "INVALID_ARGUMENT", "ProtocolError")

    async def _too_large(self) -> None:
        unable = wire.Unable(ticket=self._ticket_of(self._any()), reason="x" * MESSAGE_BYTES)
        await self._ends_with(wire.SessionRequest(unable=unable), "RESOURCE_EXHAUSTED", None)

    async def _acknowledges(self) -> None:
        if self._count == 1:
            raise CheckSkippedError("a round of one worker is committed at its first answer")
        tester = self._any()
        for _ in range(2):
            await tester.stream.send(self._signed(tester, self._answer(tester)))
            ack = (await tester.next("ack")).ack
            require(ack.ticket == self._ticket_of(tester), "the ack names another ticket")
            head = self._head(ack.ticket.round - 1)
            require(ack.head == head, f"its head is {ack.head.hex()[:16]}, not {head.hex()[:16]}")

    async def _equivocation(self) -> None:
        tester = self._any()
        if self._count == 1:
            raise CheckSkippedError("a round of one worker is committed at its first answer")
        answer = self._answer(tester)
        answer.projected_grads[0] += 1.0
        await self._refused_answer(tester, answer, "EquivocationError")

    async def _polls(self) -> None:
        """One tester goes on in polls, answers there, and comes back in a stream."""
        if self._count < 3:
            raise CheckSkippedError("it needs 3 workers in a round (cohort_size_max)")
        tester = self._last()
        tester.stream.cancel()
        messages = [self._hello(tester.name)]
        connection = self._connection_of(tester.name)
        down: list[wire.SessionResponse] = []
        token = b""
        answered = acknowledged = False
        for _ in range(20):
            request = wire.PollSessionRequest(token=token, messages=messages, wait_ms=1000)
            reply = await connection.call("PollSession", request, wire.PollSessionResponse)
            require(len(reply.token) == 16, f"the token has {len(reply.token)} bytes")
            require(token in (b"", reply.token), "the token changed")
            require(reply.lease_ms > 0, "lease_ms is 0")
            token, messages = reply.token, []
            for message in reply.messages:
                down.append(message)
                kind = message.WhichOneof("kind")
                if kind == "assign":
                    self._same_work(tester, message.assign)
                    messages.append(self._signed(tester, self._answer(tester)))
                    answered = True
                acknowledged |= kind == "ack"
            if acknowledged:
                break
        require(bool(down) and down[0].WhichOneof("kind") == "welcome", "no welcome came first")
        require(answered, "no assignment came")
        require(acknowledged, "no ack came")
        too_long = wire.PollSessionRequest(token=token, wait_ms=60_000)
        call = connection.call("PollSession", too_long, wire.PollSessionResponse)
        await self._refused(call, "INVALID_ARGUMENT", "ProtocolError")
        leave = wire.PollSessionRequest(token=token, leave=True)
        await connection.call("PollSession", leave, wire.PollSessionResponse)
        call = connection.call(
            "PollSession", wire.PollSessionRequest(token=token), wire.PollSessionResponse
        )
        await self._refused(call, "NOT_FOUND", "UnknownWorkerError")
        again = await self._join(tester.name)
        again.assign = tester.assign
        again.acknowledged.append(self._ticket_of(tester))

    async def _exchanges(self) -> None:
        """One tester gets its work in a call, answers in the next, and repeats that one."""
        if self._count < 3:
            raise CheckSkippedError("it needs 3 workers in a round (cohort_size_max)")
        tester = self._last()
        if tester.assign is None:
            await tester.take_work()
        tester.stream.cancel()
        connection = self._connection_of(tester.name)
        round_ = self._history.round
        hello = self._hello(tester.name, round=round_, head=self._head(round_))
        answer = self._signed(tester, self._answer(tester))

        async def exchanged(nonce: bytes, *messages: wire.SessionRequest) -> _Found:
            request = wire.PollSessionRequest(messages=messages, nonce=nonce, wait_ms=1000)
            reply = await connection.call("PollSession", request, wire.PollSessionResponse)
            require(reply.nonce == nonce, f"the nonce of the response is {reply.nonce.hex()}")
            return {message.WhichOneof("kind"): message for message in reply.messages}

        async def until(wanted: str, *messages: wire.SessionRequest) -> tuple[bytes, _Found]:
            # A busy coordinator may send a part of what there is; the next exchange has the rest.
            for number in range(EXCHANGES_MAX):
                nonce = f"{wanted} {number}".encode()
                found = await exchanged(nonce, *messages)
                if wanted in found:
                    return nonce, found
            came = ", ".join(map(str, found)) or "nothing"
            raise CheckFailedError(f"{came} came in {EXCHANGES_MAX} exchanges, no {wanted}")

        _, found = await until("assign", hello)
        self._same_work(tester, found["assign"].assign)
        nonce, _ = await until("ack", hello, answer)
        require("ack" in await exchanged(nonce, hello, answer), "repeated, it brought no ack")
        again = await self._join(tester.name)
        again.assign = tester.assign
        again.acknowledged.append(self._ticket_of(tester))

    async def _commits(self) -> None:
        """Answer for everyone that has not, and take the commit."""
        await self._round()

    async def _has_recorded(self) -> None:
        last = self._history.round
        require(last > 0, "no round is committed")
        records = [decode_record(body) for body in self._history.bodies]
        found = {r.slot: r for r in records if isinstance(r, Answered) and r.round == last}
        for slot, grads in self._sent.values():
            require(slot in found, f"slot {slot} was acknowledged, and is in no record")
            require(tuple(found[slot].projected_grads) == grads, f"slot {slot} has other numbers")

    async def _keeps_signatures(self) -> None:
        """Each answer to the last round is in the journal with its member's signature."""
        if not self._keys:
            raise CheckSkippedError("only with --state, whose members sign their answers")
        last = self._history.round
        require(last > 0, "no round is committed")
        records = [decode_record(body) for body in self._history.bodies]
        found = {r.slot: r for r in records if isinstance(r, Answered) and r.round == last}
        for name, (slot, _) in self._sent.items():
            require(slot in found, f"the answer of {name} is in no record")
            answer = found[slot]
            ticket = Ticket(self._run.epoch, answer.round, answer.slot)
            text = answer_text(self._head(0), ticket, self._head(last - 1), answer.scalars)
            key = self._keys[name].public_key().public_bytes_raw()
            require(
                is_signed(key, text, answer.signature),
                f"the answer of {name} is recorded without its signature",
            )

    async def _coefficients(self) -> None:
        """Fold the journal to just before its last commit, and compute that commit."""
        if self._config.seed_policy != "per_worker":
            raise CheckSkippedError("only for seeds per worker")
        require(self._history.round > 0, "no round is committed")
        machine = RoundMachine()
        for body in self._history.bodies:
            if body == self._history.commits[-1]:
                break
            machine.apply(decode_record(body))
        current = machine.state.open
        if current is None:
            raise CheckFailedError("the round was not open before it was committed")
        shares = machine.state.shares(list(current.counted()))
        wanted = coefficients_of(shares, self._config)
        commit = decode_commit(self._history.commits[-1])
        found = [seed_range.coefficients for seed_range in commit.seed_ranges]
        require(
            [share.seeds[0] for share in shares] == [one.first_seed for one in commit.seed_ranges],
            "its seeds are not those of the answers, by slot",
        )
        require(found == wanted, f"coefficients {found[0][:2]} ..., not {wanted[0][:2]} ...")

    async def _signs_commits(self) -> None:
        if not self._run.checkpoint_key:
            raise CheckSkippedError("it has no key")
        require(bool(self._signatures), "no round is committed")
        witness = Witness(self._config.run_id, self._run.checkpoint_key)
        round_ = self._history.round
        for signature in self._signatures:
            witness.check(round_, self._head(round_), signature)

    async def _late_answer(self) -> None:
        tester = self._any()
        require(tester.name in self._sent, "no round is committed")
        last = self._history.round
        ticket = wire.Ticket(
            epoch=self._ticket_of(tester).epoch, round=last, slot=self._sent[tester.name][0]
        )
        wants = is_digest_round(self._config, last)
        answer = self._answer(tester, wire.Assign(ticket=ticket, want_digest=wants))
        answer.projected_grads[0] += 1.0
        # Of an answer that the commit holds, another one is a second answer.
        await self._refused_answer(tester, answer, "EquivocationError", "StaleTicketError")

    async def _sends_missing(self) -> None:
        tester = self._any()
        tester.stream.cancel()
        round_ = max(0, self._history.round - MISSING)
        again = await self._join(tester.name, round_)
        await again.take_work()
        wanted = self._history.commits[round_:]
        require(
            again.commits == wanted,
            f"{len(again.commits)} commits came after round {round_}, not the {len(wanted)} of the "
            "journal",
        )

    async def _unable(self) -> None:
        tester = await self._spare()
        unable = wire.Unable(ticket=self._ticket_of(tester), reason="A test of `unable`.")
        await tester.stream.send(wire.SessionRequest(unable=unable))
        await self._round(without=tester.name)
        await tester.take_work()

    async def _other_digest(self) -> None:
        """The last tester's digest differs in a digest round; the others' vote decides."""
        tester = await self._spare()
        config, first = self._config, self._ticket_of(tester).round
        last = min(config.rounds, first + self._test.rounds_max - 1)
        if not any(is_digest_round(config, round_) for round_ in range(first, last + 1)):
            raise CheckSkippedError(
                f"digests are compared every {config.digest_every_rounds} rounds only, and not in "
                f"rounds {first} to {last}"
            )
        while not is_digest_round(self._config, self._ticket_of(tester).round):
            await self._round()
        answer = self._answer(tester)
        answer.weights_digest64 ^= 1
        await tester.stream.send(self._signed(tester, answer))
        await self._round(without=tester.name)
        self._require_ending(await tester.ending(), "DATA_LOSS", "DivergedError")
        await self._join(tester.name)

    def _last(self) -> Tester:
        """The last tester by name; the check is skipped if it has no session."""
        name = self._names[-1]
        if name not in self._testers:
            raise CheckSkippedError(
                f"worker {name} has no session, because an earlier check failed"
            )
        return self._testers[name]

    async def _spare(self) -> Tester:
        """The last tester that has not answered, if a round can be committed without it.

        A check before may have answered the assignment of another one.
        """
        if self._count < 3 or self._count <= self._config.quorum:
            raise CheckSkippedError(
                f"it needs 3 workers in a round, and more than the quorum of {self._config.quorum} "
                "(cohort_size_max)"
            )
        tester = self._last()
        for name in sorted(self._testers):
            one = self._testers[name]
            if one.assign is None or one.assign.ticket not in one.acknowledged:
                tester = one
        if tester.assign is None:
            await tester.take_work()
        return tester

    async def _finishes(self) -> None:
        if self._config.rounds > self._test.rounds_max:
            raise CheckSkippedError(
                f"the run has {self._config.rounds} rounds, more than {self._test.rounds_max}"
            )
        while self._history.round < self._config.rounds:
            await self._round()
        last = self._history.round
        for tester in self._testers.values():
            finished = (await tester.next("finished", but="ack")).finished
            require(finished.round == last, f"finished at round {finished.round}, not {last}")
            report = wire.WeightsReport(
                round=last, weights_digest=_weights_digest(self._head(last))
            )
            await tester.stream.send(wire.SessionRequest(weights_report=report))
            await tester.stream.end()
            ending = await tester.ending()
            require(ending.status == "OK", f"the session ended with {ending}")
        again = await self._join(self._names[0])
        require((await again.next("finished")).finished.round == last, "finished differs later")
        page = await self._page(from_seqno=len(self._history.bodies))
        require(page.finished, "ReadJournal does not say that the run is finished")

    # ------------------------------------------------------------ steps of the sequences

    async def _join(self, name: str, round_: int | None = None, more: bytes = b"") -> Tester:
        """Open a session at a round, by default the last one, and take the welcome.

        `more` is added to the hello's bytes.
        """
        if round_ is None:
            round_ = self._history.round
        stream = self._connection_of(name).session()
        head = self._head(round_)
        hello = self._hello(name, round=round_, head=head)
        hello.hello.MergeFromString(more)
        await stream.send(hello)
        tester = Tester(name, stream, wire.Welcome())
        tester.welcome = (await tester.next("welcome")).welcome
        require(not tester.commits, "a commit came before the welcome")
        self._testers[name] = tester
        welcome = tester.welcome
        require(
            welcome.round == self._history.round,
            f"the welcome names round {welcome.round}, and the journal has {self._history.round}",
        )
        require(
            welcome.head == self._head(welcome.round),
            f"the welcome's head is {welcome.head.hex()[:16]}",
        )
        if self._run.checkpoint_key:
            witness = Witness(self._config.run_id, self._run.checkpoint_key)
            witness.check(welcome.round, welcome.head, welcome.signature)
        return tester

    async def _round(self, without: str = "") -> None:
        """Answer for everyone but one, and take the commit and the next assignment."""
        round_ = self._history.round + 1
        require(round_ <= self._config.rounds, "the run has no more rounds")
        self._sent, self._signatures = {}, []
        testers = [tester for name, tester in self._testers.items() if name != without]
        require(bool(testers), "no worker has a session")
        following = [asyncio.create_task(self._follow(tester, round_)) for tester in testers]
        try:
            await asyncio.wait(following, return_when=asyncio.FIRST_EXCEPTION)
            records = {task.result() for task in following if task.done()}
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)
        require(len(records) == 1, "workers got different bytes for one commit")
        await self._reads_journal()
        require(
            self._history.round >= round_ and self._history.commits[round_ - 1] in records,
            "the journal does not have the commit that was sent",
        )
        if without:
            self._testers[without].assign = None
        if round_ == self._config.rounds:
            return
        for tester in testers:
            answered = tester.assign
            ticket = (await tester.take_work(but="ack")).ticket
            require(ticket.round == round_ + 1, f"round {ticket.round} was assigned after {round_}")
            require(
                answered is None or answered.ticket in tester.acknowledged,
                f"{tester.name}'s answer was not acknowledged",
            )

    async def _follow(self, tester: Tester, round_: int) -> bytes:
        """Answer what is assigned in a round, until its commit comes; returns that record."""
        config = self._config
        while True:
            if tester.assign is not None:
                answer = self._answer(tester)
                self._sent[tester.name] = (answer.ticket.slot, tuple(answer.projected_grads))
                if answer.ticket not in tester.acknowledged:
                    await tester.stream.send(self._signed(tester, answer))
            message = await tester.next("commit", but="ack", more=("assign",))
            if message.WhichOneof("kind") == "assign":
                require(tester.assign is None, f"{tester.name} got a second assignment")
                require(
                    message.assign.ticket.round == round_,
                    f"round {message.assign.ticket.round} was assigned to {tester.name} before the "
                    f"commit of round {round_}",
                )
                tester.assign = message.assign
                continue
            commit = decode_commit(message.commit.record)
            require(commit.round == round_, f"round {commit.round} was committed")
            commit.check_within(config)
            require(
                commit.rounding_seed == rounding_seed_of(config.seed, round_),
                f"its rounding seed is {commit.rounding_seed:016x}",
            )
            self._signatures.append(message.commit.signature)
            return message.commit.record

    def _hello(self, name: str, **changes: Any) -> wire.SessionRequest:
        """A hello at the base, or with changes."""
        head = self._head(0) if self._history.heads else OTHER
        key = self._keys.get(name)
        message = hello_to_pb(self._genesis, name, 0, head)
        message.hello.signing_key = b"" if key is None else key.public_key().public_bytes_raw()
        for field_, value in changes.items():
            setattr(message.hello, field_, value)
        return message

    def _answer(self, tester: Tester, to: wire.Assign | None = None) -> wire.Answer:
        """An honest answer of made-up numbers, the same each time; to the newest assignment."""
        assign, config = to or tester.assign, self._config
        if assign is None:
            raise CheckFailedError(f"{tester.name} has no assignment")
        head = self._head(assign.ticket.round - 1)
        seed = hashlib.sha256(f"{tester.name} {assign.ticket.round}".encode()).digest()
        grads = [(seed[n % 32] - 127.5) / 64 for n in range(config.pairs_per_answer)]
        answer = wire.Answer(ticket=assign.ticket, projected_grads=grads)
        if config.report_losses:
            answer.mean_loss = 0.6875
        if config.weighting == "rows":
            answer.rows = 10 + seed[0]
        if assign.want_digest:
            answer.weights_digest64 = digest64_of(_weights_digest(head))
        else:
            answer.head64 = digest64_of(head)
        return answer

    def _signed(self, tester: Tester, answer: wire.Answer) -> wire.SessionRequest:
        """The message of an answer, which a member of a fleet signs."""
        key = self._keys.get(tester.name)
        if key is not None:
            event = answer_from_pb(tester.name, answer)
            signer = AnswerSigner(key, self._head(0))
            head = self._head(event.ticket.round - 1)
            answer.signature = signer.sign(event.ticket, head, event.scalars)
        return wire.SessionRequest(answer=answer)

    def _connection_of(self, name: str) -> RawCoordinator:
        return self._workers.get(name, self._coordinator)

    def _head(self, round_: int) -> bytes:
        """The head after a round of the journal, as it was read last."""
        heads = self._history.heads
        require(round_ < len(heads), f"round {round_} is not in the journal")
        return heads[round_]

    def _assigned(self) -> list[Tester]:
        return [tester for tester in self._testers.values() if tester.assign is not None]

    def _any(self) -> Tester:
        """The first tester, with its assignment."""
        tester = self._testers.get(self._names[0])
        if tester is None:
            raise CheckFailedError("no worker could join")
        return tester

    def _ticket_of(self, tester: Tester) -> wire.Ticket:
        if tester.assign is None:
            raise CheckFailedError(f"{tester.name} has no assignment")
        return tester.assign.ticket

    def _same_work(self, before: Tester, again: wire.Assign) -> None:
        if before.assign is None:
            raise CheckFailedError(f"{before.name} had no assignment")
        for name in ("ticket", "first_seed", "steps", "want_digest", "eps", "learning_rate"):
            first, second = getattr(before.assign, name), getattr(again, name)
            require(first == second, f"{name} is {second} now, and was {first}")

    async def _refused_answer(self, tester: Tester, answer: wire.Answer, *reasons: str) -> None:
        await tester.stream.send(self._signed(tester, answer))
        refused = (await tester.next("refused")).refused
        require(refused.reason in reasons, f"{refused.reason}, not {' or '.join(reasons)}")
        require(refused.ticket == answer.ticket, "the refusal names another ticket")
        require(bool(refused.message), "the refusal has no sentence")

    async def _ends_with(
        self, message: wire.SessionRequest, status: str, reason: str | None
    ) -> None:
        """Send what ends the first tester's session, then let it join again."""
        tester = self._any()
        work = tester.assign
        await tester.stream.send(message)
        ending = await tester.ending()
        again = await self._join(tester.name)
        again.assign = work
        self._same_work(again, await again.take_work())
        self._require_ending(ending, status, reason)

    async def _refused_first(
        self, message: wire.SessionRequest | bytes, status: str, reason: str
    ) -> None:
        """A session must end at its first message."""
        stream = self._coordinator.session()
        try:
            await stream.send(message)
            found = await stream.receive()
            raise CheckFailedError(f"{found.WhichOneof('kind')} came")
        except CallEndedError as error:
            self._require_ending(error, status, reason)
        finally:
            stream.cancel()

    async def _refused(self, call: Awaitable[Any], status: str, reason: str) -> None:
        """A call must end with this error."""
        try:
            await call
        except CallEndedError as error:
            self._require_ending(error, status, reason)
        else:
            raise CheckFailedError("it was answered")

    @staticmethod
    def _require_ending(ending: CallEndedError, status: str, reason: str | None) -> None:
        wanted = f"{status} {reason or ''}".strip()
        same = ending.status == status and reason in (None, ending.reason)
        require(same, f"it ended with {ending}; {wanted} is right")
        require(reason is None or bool(ending.sentence), "the error has no sentence")

    async def _get_run(self) -> wire.GetRunResponse:
        request = wire.GetRunRequest(protocol_versions=[PROTOCOL_VERSION])
        return await self._coordinator.call("GetRun", request, wire.GetRunResponse)

    async def _page(self, **fields: Any) -> wire.ReadJournalResponse:
        request = wire.ReadJournalRequest(**fields)
        return await self._reader.call("ReadJournal", request, wire.ReadJournalResponse)


def _weights_digest(head: bytes) -> bytes:
    """What all testers report as the digest of the weights that a head names."""
    return hashlib.sha256(b"fedmezo conformance\n" + head).digest()
