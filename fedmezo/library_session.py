"""The worker's side of a run for any transport: bytes in, bytes out; no socket, no clock."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError

from fedmezo.engines import Engine, RestoringEngine, SavingEngine
from fedmezo.genesis import GenesisLike, decode_genesis, head_of
from fedmezo_core.config import RunConfig
from fedmezo_core.errors import (
    ConfigError,
    DivergedError,
    JournalCompactedError,
    MeasurementError,
    NotReadyError,
    ProtocolError,
    SnapshotDamagedError,
    SnapshotError,
    UnavailableError,
)
from fedmezo_core.events import (
    ApplyCommit,
    Connected,
    Disconnected,
    Leave,
    Measure,
    Measured,
    MeasureFailed,
    ReportWeights,
    Restored,
    SendAnswer,
    SendHello,
    SendSumStep,
    SendUnable,
    SessionAction,
    SumAsked,
)
from fedmezo_core.folders import folder_on_a_disk
from fedmezo_core.machines.session import SessionMachine, SessionState
from fedmezo_core.records import Committed
from fedmezo_core.trust.answer_signatures import AnswerSigner
from fedmezo_core.trust.secure_aggregation.masking import ENTROPY_BYTES
from fedmezo_core.trust.secure_aggregation.sum_memory import SumMemory
from fedmezo_core.wire.admission import check_worker_name
from fedmezo_core.wire.messages import (
    answer_to_pb,
    event_from_pb,
    hello_to_pb,
    snapshot_from_pb,
    unable_to_pb,
)
from fedmezo_core.wire.snapshot_pieces import GatheredSnapshot
from fedmezo_core.wire.sum_messages import sum_step_to_pb
from fedmezo_proto.v1 import coordinator_pb2 as wire

if TYPE_CHECKING:
    from fedmezo.torch_engine import Rows

_NONCE_LIFE_BYTES = 8


class Session:
    """A worker's part in one run, from its base to its end, over any transport.

    Over a transport that keeps messages in order, send what `connect` returns, give each message
    that comes to `receive`, and send what that returns, until `finished`. Call `disconnect` when
    the transport breaks, then `connect` again. Over a transport that has only calls, or may lose,
    repeat or reorder messages, use `exchange` alone.

    One thread at a time may use a session, but `measure` may run on another one. After an
    `UnavailableError`, `NotReadyError` or `JournalBehindError` a session may go on: `connect` it
    again, or call `exchange` again, after a while. After any other error it is of no more use.
    """

    def __init__(
        self,
        genesis: GenesisLike,
        worker: str,
        engine: Engine,
        *,
        measure_inline: bool = True,
        signing_key: Ed25519PrivateKey | None = None,
        sum_memory: SumMemory | None = None,
    ) -> None:
        """Take part as `worker` with an engine that holds the base of the run.

        With `measure_inline` the session itself measures, and a call returns when that is done.
        Without it, the caller takes each `order`, and gives what `measure` returns to `complete`.
        With a `signing_key` every answer is signed; keep the key to go on as the same worker.
        Give all sessions of a process the same `sum_memory`, so that a new one reveals nothing of
        what an earlier one has put into a sum with secure aggregation; None: its own.
        Raises `ProtocolError` if the bytes hold no genesis, or `worker` is no worker's name.
        """
        self._genesis = decode_genesis(genesis)
        check_worker_name(worker)
        self.worker = worker
        """The worker's name in the run."""
        self._engine = engine
        self._signer = AnswerSigner(signing_key, head_of(genesis)) if signing_key else None
        self._measure_inline = measure_inline
        self._machine = SessionMachine.of_worker(
            self._genesis,
            head_of(genesis),
            worker,
            b"" if self._signer is None else self._signer.public_key,
            sum_memory,
        )
        self._order: Measure | None = None
        self._unapplied: list[Committed] = []
        self._snapshot: GatheredSnapshot | None = None
        self._has_failed = False
        # What is not known to have arrived, how much of it is in the last exchange, and its bytes.
        self._up_messages: list[wire.SessionRequest] = []
        self._carried = 0
        self._up = b""
        self._up_count = 0
        self._nonce = b""
        self._life = secrets.token_bytes(_NONCE_LIFE_BYTES)
        self._is_idle = False

    @classmethod
    def open(
        cls,
        genesis: GenesisLike,
        worker: str,
        model: str | Path,
        rows: Rows,
        *,
        measure_inline: bool = True,
        signing_key: Ed25519PrivateKey | None = None,
        sum_memory: SumMemory | None = None,
        **settings: Any,
    ) -> Session:
        """A session with a `TorchEngine` of `model` and `rows`; takes and raises what that does."""
        from fedmezo.torch_engine import TorchEngine

        engine = TorchEngine(genesis, worker, model, rows, **settings)
        return cls(
            genesis,
            worker,
            engine,
            measure_inline=measure_inline,
            signing_key=signing_key,
            sum_memory=sum_memory,
        )

    # ------------------------------------------------------------ what it shows

    @property
    def engine(self) -> Engine:
        """What computes for this session."""
        return self._engine

    @property
    def config(self) -> RunConfig:
        """The run's contract."""
        return self._genesis.config

    @property
    def round(self) -> int:
        """Last round whose commit came; 0 before the first."""
        return self._machine.round

    @property
    def head(self) -> bytes:
        """Head after `round` (32 bytes), which names the history that was followed."""
        return self._machine.head

    @property
    def epoch(self) -> int:
        """Newest count of coordinator starts that this session was told; 0 before a welcome."""
        return self._machine.epoch

    @property
    def finished(self) -> bool:
        """Whether the run is over and everything was said, once what was returned is sent."""
        return self._machine.state is SessionState.LEFT

    @property
    def refusal(self) -> str:
        """Why the coordinator refused the newest answer that it refused; empty if it took all."""
        refusal = self._machine.refusal
        return "" if refusal is None else refusal.message

    @property
    def idle(self) -> bool:
        """Whether the last exchange brought nothing new: the next one should wait a little."""
        return self._is_idle

    # ------------------------------------------------------------ weights on a disk

    def save(self, folder: str | Path) -> Path:
        """Write the weights, with the round and head that they are of, into a file in `folder`.

        It is there durably and whole, or not at all. Needs a `SavingEngine`. Raises `NotReadyError`
        while a measurement runs elsewhere, and `SnapshotError` if the disk refuses.
        """
        self._check()
        if self._machine.measuring:
            raise NotReadyError(
                "A measurement has the engine, and commits may wait for it; complete it, then save."
            )
        return self._saving_engine.save(Path(folder).expanduser(), self.head)

    def restore(self, path: str | Path) -> None:
        """Begin from a file that `save` has written, before the first `connect` or `exchange`.

        Raises `SnapshotDamagedError` for a file that is not one of this run and model, after which
        the engine is of no more use, and `ProtocolError` if the session has begun.
        """
        self._check()
        if self.round or self._machine.state is not SessionState.OFFLINE or self._up_count:
            raise ProtocolError("This session has begun; restore the weights before that.")
        self._has_failed = True
        round_, head = self._saving_engine.restore(Path(path).expanduser())
        self._has_failed = False
        if round_:
            self._machine.step(Restored(round_, head))

    @property
    def _saving_engine(self) -> SavingEngine:
        if not isinstance(self._engine, SavingEngine):
            raise ConfigError(
                f"The engine {type(self._engine).__name__} cannot save weights; give it the "
                "methods save and restore, or read the commits anew after a restart."
            )
        return self._engine

    # ------------------------------------------------------------ over messages in order

    def connect(self) -> list[bytes]:
        """Begin anew with the coordinator; returns the messages to send, of which hello is first.

        Nothing is sent once the session has `finished`.
        """
        self._check()
        if self.finished:
            return []
        self.disconnect()
        return _serialized(self._do(self._machine.step(Connected())))

    def receive(self, data: bytes) -> list[bytes]:
        """Take one message of the coordinator; returns the messages to send, in order.

        Raises `UnavailableError` for a message that is not allowed here, `DivergedError` or
        `JournalBehindError` if the coordinator's history is not the one followed so far, and the
        error with which the coordinator ended the session.
        """
        self._check()
        try:
            message = wire.SessionResponse.FromString(data)
        except DecodeError:
            raise UnavailableError(
                f"The coordinator sent {len(data)} bytes that are no message; check what the "
                "transport does to them."
            ) from None
        messages = self._take(message)
        self._apply()
        return _serialized(messages)

    def disconnect(self) -> None:
        """Note that the transport is gone; what was measured is sent after the next `connect`."""
        if self._machine.state not in (SessionState.OFFLINE, SessionState.LEFT):
            self._machine.step(Disconnected())

    # ------------------------------------------------------------ over calls

    def exchange(self, down: bytes = b"") -> bytes:
        """Take what came down, and return what to send up; each is complete in itself.

        `down` is empty before anything has come, or if a reply was lost. A repeated or late `down`
        changes nothing, and what was sent up last is returned again. Raises as `receive`.
        """
        self._check()
        if down and not self.finished:
            self._take_down(down)
        if not self._up:
            self._up_count += 1
            self._nonce = self._life + self._up_count.to_bytes(8, "big")
            hello = self._hello(self._machine.round, self._machine.head)
            self._up = wire.PollSessionRequest(
                nonce=self._nonce, messages=[hello, *self._up_messages]
            ).SerializeToString()
            self._carried = len(self._up_messages)
        return self._up

    def _take_down(self, down: bytes) -> None:
        try:
            response = wire.PollSessionResponse.FromString(down)
        except DecodeError:
            return  # What was sent goes up again, and its reply may come whole.
        if not self._nonce or response.nonce != self._nonce:
            return  # The reply to an earlier one.
        # That what was sent has arrived is now known.
        self._up = b""
        del self._up_messages[: self._carried]
        self._carried = 0
        round_, has_order = self._machine.round, self._machine.measuring
        self.disconnect()
        self._machine.step(Connected())
        try:
            for message in response.messages:
                self._up_messages += self._take(message)
        except BaseException:
            self.disconnect()
            raise
        finally:
            self._apply()
        brought = self._machine.round > round_ or self._up_messages
        self._is_idle = not brought and self._machine.measuring == has_order

    # ------------------------------------------------------------ measuring elsewhere

    @property
    def order(self) -> Measure | None:
        """The assignment to measure now; None if there is none. Only without `measure_inline`."""
        return self._order

    @property
    def in_vain(self) -> bool:
        """Whether what is being measured can no longer count, so that it may be cut short."""
        return self._machine.measuring_in_vain

    def measure(self, order: Measure) -> Measured | MeasureFailed:
        """Let the engine measure `order`, on any thread; the result is for `complete`."""
        try:
            return self._engine.measure(order)
        except MeasurementError as error:
            return MeasureFailed(order.ticket, str(error))

    def cut_short(self) -> None:
        """End the running measurement before its next pass, if the engine has a `cut_short`.

        Any thread may call this. The measurement fails, and so does each later one.
        """
        cut_short = getattr(self._engine, "cut_short", None)
        if cut_short is not None:
            cut_short()

    def complete(self, outcome: Measured | MeasureFailed) -> list[bytes]:
        """Take the result of `measure`; returns the messages to send.

        The next `exchange` carries them by itself. Raises `ProtocolError` for the result of another
        assignment than `order`.
        """
        self._check()
        actions = self._machine.step(outcome)
        self._order = None
        messages = self._do(actions)
        self._apply()
        if messages and self._nonce:
            self._up_messages += messages
            self._up = b""
        return _serialized(messages)

    # ------------------------------------------------------------ what the machine asks for

    def _take(self, message: wire.SessionResponse) -> list[wire.SessionRequest]:
        if self.finished:
            return []  # The coordinator's last words may cross this session's.
        if message.HasField("snapshot"):
            return self._take_piece(message.snapshot)
        try:
            event = event_from_pb(message, self.config)
        except SnapshotError as error:
            self._drop_snapshot()  # Another one may come, or the coordinator's disk be mended.
            raise UnavailableError(
                f"{error} The journal cannot be read instead: it no longer has the commits after "
                f"round {self.round}."
            ) from None
        if isinstance(event, SumAsked):
            event = dataclasses.replace(event, entropy=secrets.token_bytes(ENTROPY_BYTES))
        try:
            actions = self._machine.step(event)
        except ProtocolError as error:
            # The transport lost or mixed up something, and a new hello may mend that.
            raise UnavailableError(str(error)) from None
        return self._do(actions)

    def _take_piece(self, piece: wire.ReadSnapshotResponse) -> list[wire.SessionRequest]:
        """Take a piece of the snapshot to begin from; returns what asks for the next one.

        After the last one, the session begins anew at the snapshot's round.
        """
        if self._machine.measuring:
            raise NotReadyError(
                "The journal lacks commits, so this session must begin from a snapshot, but a "
                "measurement has the engine; complete it, then connect again."
            )
        if not isinstance(self._engine, RestoringEngine):
            raise JournalCompactedError(
                f"The journal no longer has the commits after round {self.round}, and the engine "
                f"{type(self._engine).__name__} cannot take a snapshot; give it the method restore."
            )
        self._apply()
        about = snapshot_from_pb(piece.snapshot)
        if about.round <= self.round:
            raise ProtocolError(
                f"A snapshot of round {about.round} came to a session that holds round "
                f"{self.round}; check which coordinator this worker is connected to."
            )
        gathered = self._snapshot
        try:
            if gathered is None or gathered.snapshot.round != about.round:
                self._drop_snapshot()
                bytes_max = self._genesis.trainable_bytes
                gathered = GatheredSnapshot(about, folder_on_a_disk(), bytes_max)
                self._snapshot = gathered
            else:
                gathered.check_same(about)
                gathered.add(piece.data)
            if gathered.is_whole:
                self._install(gathered)
                return [] if self._nonce else self._do(self._machine.step(Connected()))
        except SnapshotError:
            self._drop_snapshot()
            raise
        wanted = wire.ReadSnapshotRequest(
            run_id=self.config.run_id, round=about.round, offset=gathered.offset
        )
        return [wire.SessionRequest(read_snapshot=wanted)]

    def _install(self, gathered: GatheredSnapshot) -> None:
        """Replace the weights by the gathered snapshot's, and stand at its round and head."""
        assert isinstance(self._engine, RestoringEngine)
        about, path = gathered.snapshot, gathered.path()
        self._has_failed = True
        found = self._engine.restore(path)
        if (*found, self._engine.digest()) != (about.round, about.head, about.weights_digest):
            raise SnapshotDamagedError(
                f"The weights in the snapshot of round {about.round} are not those that the "
                "coordinator says; check the coordinator's disk."
            )
        self._has_failed = False
        self._drop_snapshot()
        self.disconnect()
        self._machine.step(Restored(about.round, about.head))

    def _drop_snapshot(self) -> None:
        if self._snapshot is not None:
            self._snapshot.close()
            self._snapshot = None

    def _hello(self, round_: int, head: bytes) -> wire.SessionRequest:
        form = getattr(self._engine, "base_form", "")
        return hello_to_pb(
            self._genesis, self.worker, round_, head, base_form=form, signer=self._signer
        )

    def _do(self, actions: Sequence[SessionAction]) -> list[wire.SessionRequest]:
        """Do what the machine asks for, in order; returns the messages to send.

        Commits are collected, because an engine applies many at once faster.
        """
        messages: list[wire.SessionRequest] = []
        for action in actions:
            match action:
                case SendHello(round_, head):
                    messages.append(self._hello(round_, head))
                case ApplyCommit(commit):
                    self._unapplied.append(commit)
                case Measure():
                    self._apply()
                    if self._measure_inline:
                        messages += self._do(self._machine.step(self._measured_inline(action)))
                    else:
                        self._order = action
                case SendAnswer():
                    messages.append(answer_to_pb(action, self._signer))
                case SendSumStep():
                    messages.append(sum_step_to_pb(action, self._signer))
                case SendUnable():
                    messages.append(unable_to_pb(action))
                case ReportWeights(round_):
                    self._apply()
                    report = wire.WeightsReport(round=round_, weights_digest=self._engine.digest())
                    messages.append(wire.SessionRequest(weights_report=report))
                case Leave():
                    pass
        return messages

    def _measured_inline(self, order: Measure) -> Measured | MeasureFailed:
        try:
            return self.measure(order)
        except BaseException:
            self._has_failed = True  # The machine waits for a measurement that will never end.
            raise

    def _apply(self) -> None:
        """Apply the commits that were collected."""
        if self._unapplied:
            commits, self._unapplied = self._unapplied, []
            self._has_failed = True
            self._engine.apply(commits)
            self._has_failed = False

    def _check(self) -> None:
        if self._has_failed:
            raise DivergedError(
                f"Worker {self.worker}'s engine failed earlier, so its weights are not known; make "
                "a new engine and a new session."
            )


def _serialized(messages: Sequence[wire.SessionRequest]) -> list[bytes]:
    return [message.SerializeToString() for message in messages]
