"""A relay: one session with the coordinator above, the sessions of its site, a copy of the journal.

Workers are served as by a coordinator. Messages from above enter the same queue, and one task steps
the machine: it writes commits into the copy, sends them down, then sends everything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo_coordinator.coordinator_settings import RelaySettings
from fedmezo_coordinator.serving.loop import Item, ServingLoop
from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_core.errors import (
    ConfigError,
    DivergedError,
    FedMezoError,
    JournalBehindError,
    NotReadyError,
    ProtocolError,
    UnavailableError,
)
from fedmezo_core.events import (
    CommitReceived,
    Connected,
    Disconnected,
    Leave,
    ReportDigest,
    SendAnswer,
    SendHello,
    SendUnable,
    SentAway,
    SessionEvent,
    Vouched,
    Welcomed,
)
from fedmezo_core.journal.journal import ZERO_HASH, Entry, Row, chain_after, head_after
from fedmezo_core.machines.relay import RelayMachine, RelayReady, RelayUp
from fedmezo_core.records import digest64_hex
from fedmezo_core.service.log_lines import log_with
from fedmezo_core.trust.answer_signatures import AnswerSigner
from fedmezo_core.wire.client import CoordinatorClient, RunDescription, SessionStream
from fedmezo_core.wire.history import History
from fedmezo_core.wire.messages import (
    answer_to_pb,
    commits_in,
    event_from_pb,
    hello_to_pb,
    unable_to_pb,
)
from fedmezo_core.wire.reconnecting import Reconnecting
from fedmezo_proto.v1 import coordinator_pb2 as wire

log = logging.getLogger("fedmezo.relay")

LOOK_EVERY_S = 5.0
"""Period in which a relay without enough workers reads the journal above."""
ASKED_AGAIN_MAX = 8
"""Most passes over the journal above to catch up; the session brings what comes later."""

_Above = SessionEvent | Vouched | SentAway


@dataclass(frozen=True, slots=True)
class _FromAbove(Item):
    """Events from above for one step of the loop; `done` says whether the machine took them."""

    events: Sequence[_Above]
    notices: Sequence[wire.CommitNotice]
    """The notice of each commit among the events."""
    is_page: bool
    """Whether they were read from the journal, in which commits have no signatures."""
    done: asyncio.Future[None]


class Relay(ServingLoop[RelayReady]):
    """Serves one site of a run, whose coordinator is above it."""

    _machine: RelayMachine

    def __init__(
        self,
        settings: RelaySettings,
        client: CoordinatorClient,
        session_limit: SessionLimit | None = None,
        signing_key: Ed25519PrivateKey | None = None,
    ) -> None:
        """`client` is connected to the coordinator above; the caller closes it.

        `signing_key` signs what the relay answers there; None: that is not signed.
        """
        self._signing_key = signing_key
        self._signer: AnswerSigner | None = None
        super().__init__(session_limit)
        self._settings = settings
        self._client = client
        wanted = bytes.fromhex(settings.checkpoint_key) if settings.checkpoint_key else None
        self._history = History(settings.journal_copy, wanted, self._writer)
        self._key = b""
        # Round -> its commit as it came, and whether it came in a page; until it is in the copy.
        self._notices: dict[int, tuple[wire.CommitNotice, bool]] = {}
        # The newest round that the coordinator above signed, and its signature.
        self._signed_round = 0
        self._signature = b""
        self._up: asyncio.Queue[RelayUp | None] | None = None
        self._staffed = asyncio.Event()
        self._reconnecting = Reconnecting(log, give_up_after_s=settings.give_up_after_s)

    # ------------------------------------------------------------ start and stop

    async def load(self) -> None:
        """Ask the coordinator above for the run, then open the copy and catch up.

        Raises the error that no retry can help, or `UnavailableError` after `give_up_after_s`.
        """
        while True:
            try:
                description = await self._client.get_run(self._settings.run_id)
                break
            except (UnavailableError, NotReadyError) as error:
                await self._wait_after(error)
        self._reconnecting.reached()
        if description.genesis.config.secure_aggregation:
            raise ConfigError(
                f"Run {description.genesis.config.run_id} has secure_aggregation, and a relay "
                "reads every answer of its site; connect the workers to the coordinator itself."
            )
        self._key = description.checkpoint_key
        body = description.genesis_body
        if self._signing_key is not None:
            self._signer = AnswerSigner(self._signing_key, description.head)
        row = Row(0, body, chain_after(ZERO_HASH, 0, body))
        self._fold(Entry(row, description.head))
        async for page in self._history.open(description):
            for entry in page:
                self._fold(entry)
        assert self._history.journal is not None
        self._pages.journal = self._history.journal
        self._pages.announce()
        round_ = self._index.round
        self._machine = RelayMachine(
            description.genesis,
            round_,
            self._index.head_at(round_),
            workers_min=self._settings.workers_min,
            deadline_share=self._settings.deadline_share,
        )

    async def serve(self) -> None:
        """Run the loop and follow the coordinator above until one of them fails."""
        serving = asyncio.create_task(super().serve())
        following = asyncio.create_task(self._follow())
        try:
            await asyncio.wait({serving, following}, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                following.result()
                log.info("the run is finished; its journal is still served")
            await serving
        finally:
            for task in (serving, following):
                task.cancel()
            await asyncio.gather(serving, following, return_exceptions=True)

    async def close(self) -> None:
        """Close the copy; nothing is served afterwards."""
        await self._pages.close()
        await self._history.close()

    # ------------------------------------------------------------ above

    async def _follow(self) -> None:
        """Keep one session above while there are workers, until the run is finished."""
        waits = False
        while not self._machine.left:
            try:
                await self._catch_up()
                if self._staffed.is_set():
                    waits = False
                    await self._session_above()
                else:
                    if not waits:
                        log.info("%s, so the site does not take part yet", self._machine.reason)
                    waits = True
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._staffed.wait(), LOOK_EVERY_S)
            except (UnavailableError, NotReadyError, JournalBehindError) as error:
                if self._machine.left:
                    log.warning("the coordinator above went away before it took the last digest")
                    return
                await self._wait_after(error)

    async def _wait_after(self, error: FedMezoError) -> None:
        await self._reconnecting.wait_after(error, f"above: {error} Trying again.")

    async def _catch_up(self) -> None:
        """Read the commits that the copy lacks until the coordinator above vouches for it."""
        for _ in range(ASKED_AGAIN_MAX):
            held = self._machine.received_round
            description = await self._client.get_run(self._settings.run_id, held)
            self._check(description, held)
            self._reconnecting.reached()
            if description.needs_snapshot:
                raise ConfigError(
                    f"The journal copy {self._settings.journal_copy} holds round {held}, and the "
                    "journal above no longer has the commits after that; begin from a copy of "
                    "another relay's or worker's journal_copy that reaches further."
                )
            while True:
                page = await self._client.read_journal(
                    run_id=self.genesis.config.run_id,
                    commits_only=True,
                    from_round=self._machine.received_round + 1,
                )
                events = commits_in(page, self.genesis.config, self._machine.received_round)
                if not events:
                    break
                notices = [wire.CommitNotice(record=event.record_bytes) for event in events]
                await self._above(events, notices, is_page=True)
            round_, head = description.round, description.round_head
            if self._machine.received_round == round_ and head:
                await self._vouched(description, page.finished)
            if self._machine.received_round == round_:
                return

    def _check(self, description: RunDescription, held: int) -> None:
        if description.genesis_body != self._genesis_body:
            raise DivergedError(
                f"The coordinator above serves another run {description.genesis.config.run_id} "
                f"than the run {self.genesis.config.run_id} of this relay's copy; find out which "
                "journal is served there, or give the relay another journal_copy."
            )
        if description.round < held:
            raise JournalBehindError(
                f"The coordinator above is at round {description.round}, this relay's copy holds "
                f"round {held}: the journal there went back. Put the newest journal back; to "
                "continue from that one, give the relay another journal_copy."
            )

    async def _vouched(self, description: RunDescription, finished: bool) -> None:
        round_, head = description.round, description.round_head
        welcome = wire.Welcome(
            epoch=description.epoch, round=round_, head=head, signature=description.signature
        )
        self._expect(welcome)
        await self._above([Vouched(description.epoch, round_, head, finished)])
        await self._history.welcomed(welcome, self._machine.round)

    async def _session_above(self) -> None:
        """Keep one session with the coordinator above until it ends."""
        stream = self._client.session()
        self._up = asyncio.Queue()
        sending = asyncio.create_task(self._send_up(stream, self._up))
        try:
            await self._above([Connected()])
            ended: _Above = await self._talk(stream)
        except (UnavailableError, NotReadyError, JournalBehindError):
            self._up = None
            await self._above([Disconnected()])
            raise
        finally:
            self._up = None
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            stream.cancel()
        await self._above([ended])

    async def _talk(self, stream: SessionStream) -> Disconnected | SentAway:
        """Take the messages of a session from above; returns how the session ended."""
        welcomed = False
        while True:
            try:
                message = await stream.receive()
            except DivergedError as error:
                if not welcomed:
                    raise
                # The relay had joined: its history is the run's, but some workers' weights are not.
                log.error("above: %s", error)
                return SentAway(str(error))
            if message is None:
                if self._machine.left or not self._machine.is_staffed:
                    return Disconnected()
                raise UnavailableError("The coordinator above ended the session.")
            self._reconnecting.reached()
            event = event_from_pb(message, self.genesis.config)
            if isinstance(event, Welcomed):
                welcomed = True
                self._expect(message.welcome)
            await self._above([event], [message.commit] if message.HasField("commit") else [])
            if isinstance(event, Welcomed):
                await self._history.welcomed(message.welcome, self._machine.round)
                log.info("joined above at round %d of epoch %d", event.round, event.epoch)

    def _expect(self, welcome: wire.Welcome) -> None:
        """Note the signature of a welcome; the machine may send the commit of its round then."""
        self._history.expect(welcome)
        self._signed_round, self._signature = welcome.round, welcome.signature

    async def _send_up(self, stream: SessionStream, up: asyncio.Queue[RelayUp | None]) -> None:
        with contextlib.suppress(UnavailableError):  # `_talk` gets this error too.
            while (action := await up.get()) is not None:
                match action:
                    case Leave():
                        await stream.end()
                    case _:
                        await stream.send(self._message(action))
            await stream.end()

    def _message(
        self, action: SendHello | SendAnswer | SendUnable | ReportDigest
    ) -> wire.SessionRequest:
        match action:
            case SendHello(round_, head):
                return hello_to_pb(
                    self.genesis, self._settings.name, round_, head, signer=self._signer
                )
            case SendAnswer():
                log.info("round %d answered above", action.ticket.round)
                return answer_to_pb(action, self._signer)
            case SendUnable():
                log.warning("round %d not answered above: %s", action.ticket.round, action.reason)
                return unable_to_pb(action)
            case ReportDigest(round_, digest):
                log.info("finished at round %d, weights %s", round_, digest.hex())
                return wire.SessionRequest(
                    weights_report=wire.WeightsReport(round=round_, weights_digest=digest)
                )

    async def _above(
        self,
        events: Sequence[_Above],
        notices: Sequence[wire.CommitNotice] = (),
        *,
        is_page: bool = False,
    ) -> None:
        """Let the loop step the machine; an event that it refuses ends only this session."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._items.put(_FromAbove(events, notices, is_page, done))
        try:
            await done
        except NotReadyError:
            raise
        except ProtocolError as error:
            raise UnavailableError(str(error)) from None

    # ------------------------------------------------------------ the loop

    def _step_other(self, item: Item) -> list[RelayReady]:
        assert isinstance(item, _FromAbove), "nothing else comes"
        readies: list[RelayReady] = []
        notices = iter(item.notices)
        try:
            for event in item.events:
                readies.append(self._machine.step(event))
                if isinstance(event, CommitReceived):
                    self._notices[event.commit.round] = (next(notices), item.is_page)
        except FedMezoError as error:
            if not item.done.done():
                item.done.set_exception(error)
        if not item.done.done():
            item.done.set_result(None)
        return readies

    async def _flush(self, readies: Sequence[RelayReady]) -> None:
        sent = await self._keep(readies)
        self._take_phase()
        for ready in readies:
            if ready.dismissed:
                for session in self._sessions.values():
                    session.end(UnavailableError(ready.dismissed))
                self._sessions.clear()
            for record in ready.records:
                row, signature = sent[record.round]
                await self._send_commit(row, signature)
            await self._send(ready.messages)
            self._warn(ready.warnings)
            for action in ready.up:
                if self._up is not None:
                    self._up.put_nowait(action)
            for found in ready.diverged:
                log.error(
                    "%s diverged: its weights after round %d have digest %s, most of the site's %s",
                    found.party,
                    found.round,
                    digest64_hex(found.found_digest64),
                    digest64_hex(found.expected_digest64),
                )

    async def _keep(self, readies: Sequence[RelayReady]) -> dict[int, tuple[Row, bytes]]:
        """Write commits into the copy, a page at a time; returns rows and signatures by round."""
        sent: dict[int, tuple[Row, bytes]] = {}
        page: list[bytes] = []
        rounds = [record.round for ready in readies for record in ready.records]
        for round_ in rounds:
            notice, is_page = self._notices.pop(round_)
            if is_page and round_ != self._signed_round:
                page.append(notice.record)
                continue
            self._note_kept(await self._history.add(page), sent)
            page = []
            head = head_after(self._index.head_at(round_ - 1), notice.record)
            signature = self._history.signature_of(notice, round_)
            if signature:
                self._signed_round, self._signature = round_, signature
            entries = await self._history.committed(notice, round_, head)
            self._note_kept(entries, sent, signature)
        self._note_kept(await self._history.add(page), sent)
        if rounds:
            self._pages.announce()
            log_with(round=rounds[-1])
            log.info("round %d committed", rounds[-1])
        return sent

    def _note_kept(
        self,
        entries: Sequence[Entry],
        sent: dict[int, tuple[Row, bytes]],
        signature: bytes = b"",
    ) -> None:
        for entry in entries:
            self._fold(entry)
            sent[self._index.round] = (entry.row, signature)

    async def _after_turn(self) -> None:
        """Begin or stop to take part, as there are enough workers or none."""
        if self._machine.is_staffed:
            self._staffed.set()
        elif self._staffed.is_set():
            self._staffed.clear()
            if self._up is not None:
                self._up.put_nowait(None)

    def _welcome(self, round_: int, head: bytes) -> wire.Welcome:
        if not self._machine.may_welcome or (self._key and self._signed_round != round_):
            raise UnavailableError(
                "This relay has yet to catch up with the coordinator above it; try again in a "
                "moment."
            )
        signature = self._signature if self._signed_round == round_ else b""
        return wire.Welcome(epoch=self._machine.epoch, round=round_, head=head, signature=signature)

    def describe(self, version: int, run_id: str, round_: int = 0) -> wire.GetRunResponse:
        """Describe the run to a caller who holds the weights after `round_`.

        Raises `UnavailableError` for a caller that is ahead of this relay.
        """
        self._check_ahead(round_)
        return super().describe(version, run_id, round_)

    def _check_hello(self, hello: wire.Hello) -> None:
        self._check_ahead(hello.round)
        super()._check_hello(hello)

    def _check_ahead(self, round_: int) -> None:
        """Refuse a caller that is ahead; the coordinator above may be further than this relay."""
        if round_ > self._machine.round:
            raise UnavailableError(
                f"This relay is at round {self._machine.round} and has yet to catch up with the "
                f"caller, which holds round {round_}; try again in a moment."
            )

    @property
    def checkpoint_key(self) -> bytes:
        """Ed25519 public key (32 bytes) that signs the run; empty if nothing is signed."""
        return self._key
