"""Checks of what a worker sends: its hello, and the messages of its open session. They are pure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass

from fedmezo_core.config import NAME_PATTERN, PROTOCOL_VERSION, RunConfig
from fedmezo_core.errors import (
    DivergedError,
    JournalBehindError,
    JournalCompactedError,
    MismatchError,
    NotReadyError,
    ProtocolError,
    SignatureError,
    StaleTicketError,
    VersionError,
    WrongRunError,
)
from fedmezo_core.events import (
    AnswerReceived,
    KeysGiven,
    SumReceived,
    UnableReceived,
    WeightsReported,
)
from fedmezo_core.machines.answers import is_digest_round
from fedmezo_core.machines.divergence import REPLICA_PARTY
from fedmezo_core.records import Genesis, digest64_of
from fedmezo_core.trust.answer_signatures import answer_text, check_signing_key, is_signed
from fedmezo_core.trust.authorisation import Caller, Role
from fedmezo_core.trust.secure_aggregation.masking import SumContext, keys_text, run_digest_of
from fedmezo_core.wire.messages import answer_from_pb, unable_from_pb
from fedmezo_core.wire.sum_messages import sum_received_from_pb
from fedmezo_proto.v1 import coordinator_pb2 as wire

CATCH_UP_ROUNDS_MAX = 512
"""Most commits that a new session sends; a worker further behind reads the journal first. They come
from memory: nothing waits for the disk while a worker joins."""

# An error's sentence travels in a header, whose size is limited. So it quotes only a part of what a
# caller sent.
NAME_CHARS_SHOWN_MAX = 64
VERSIONS_SHOWN_MAX = 8

NONCE_BYTES_MAX = 32
"""Most bytes of the nonce of a call without a stream."""


def choose_version(offered: list[int]) -> int:
    """The newest protocol version that both sides speak; raises `VersionError` if there is none."""
    if PROTOCOL_VERSION in offered:
        return PROTOCOL_VERSION
    spoken = ", ".join(map(str, sorted(offered)[:VERSIONS_SHOWN_MAX])) or "none"
    raise VersionError(
        f"This coordinator speaks fedmezo protocol version {PROTOCOL_VERSION}, the caller "
        f"{spoken}; upgrade the older of the two."
    )


def check_run_id(asked: str, served: str) -> None:
    """Raise `WrongRunError` for the id of another run; an empty id means the run that is served."""
    if asked not in ("", served):
        raise WrongRunError(
            f"Run {asked[:NAME_CHARS_SHOWN_MAX]!r} is not served here; this coordinator serves "
            f"{served!r}. Check the address and the run id."
        )


def check_worker_name(name: str, remedy: str = "set another --name") -> None:
    """Raise `ProtocolError` for a name that no worker may have; `remedy` says what to do."""
    if not re.fullmatch(NAME_PATTERN, name) or name == REPLICA_PARTY:
        raise ProtocolError(
            f"{name[:NAME_CHARS_SHOWN_MAX]!r} is no worker's name. A worker's name has 1 to 64 "
            "characters out of a-z, 0-9 and -, begins with a letter or digit, and is not "
            f"{REPLICA_PARTY!r}; {remedy}."
        )


def check_nonce(request: wire.PollSessionRequest) -> None:
    """Raise `ProtocolError` for a call whose nonce is too long to be repeated."""
    if len(request.nonce) > NONCE_BYTES_MAX:
        raise ProtocolError(
            f"A nonce has at most {NONCE_BYTES_MAX} bytes, not {len(request.nonce)}; make a "
            "shorter one."
        )


def check_hello(
    hello: wire.Hello,
    genesis: Genesis,
    round_: int,
    head_at_hello: bytes,
    begins: int = 0,
    catch_up_rounds: int = CATCH_UP_ROUNDS_MAX,
) -> None:
    """Refuse a worker that would compute other numbers than the run's, and say what differs.

    `round_` is the last committed round. `head_at_hello` is the head at the hello's round, and is
    not used if that round is not committed. `begins` is the round after which the journal has all
    commits, `catch_up_rounds` how many of the last ones a new session can send. Raises a
    `FedMezoError` whose class says what kind of difference it is.
    """
    if hello.protocol_version != PROTOCOL_VERSION:
        choose_version([hello.protocol_version])
    check_run_id(hello.run_id or "(none)", genesis.config.run_id)
    check_worker_name(hello.worker)
    for what, digests in genesis.differences(hello):
        raise MismatchError(
            f"Worker {hello.worker} differs from the run in its {what}: {digests}; load the same "
            f"model files as the coordinator ({genesis.config.model})."
        )
    if hello.recipe != genesis.config.recipe:
        raise MismatchError(
            f"Worker {hello.worker}'s numeric recipe differs from the run's: "
            f"{hello.recipe[:200]!r} instead of {genesis.config.recipe!r}; use the same FedMeZO "
            "version."
        )
    if hello.round > round_:
        raise JournalBehindError(
            f"Worker {hello.worker} has applied round {hello.round}, but this journal ends at "
            f"round {round_}: the journal is older than the worker. Put the newest journal back; "
            "to continue from this one, restart the worker, without its journal_copy."
        )
    if hello.round < begins:
        raise JournalCompactedError(
            f"Worker {hello.worker} is at round {hello.round}, but the journal has only the "
            f"commits after round {begins}; take the newest snapshot first, then join."
        )
    if hello.head != head_at_hello:
        raise DivergedError(
            f"Worker {hello.worker}'s history up to round {hello.round} is not this journal's "
            f"(head {hello.head.hex()[:16]} instead of {head_at_hello.hex()[:16]}); restart the "
            "worker, so that it rebuilds from base and journal."
        )
    if round_ - hello.round > catch_up_rounds:
        raise NotReadyError(
            f"Worker {hello.worker} is {round_ - hello.round} rounds behind, more than "
            f"{catch_up_rounds}; read the journal first, then join."
        )


@dataclass(frozen=True, slots=True)
class Signing:
    """How the answers of one session are signed, and how their signatures are checked."""

    key: bytes
    """The worker's public key, 32 bytes: each answer must be signed with it."""
    config: RunConfig
    genesis_head: bytes
    """Head after the run's genesis, 32 bytes."""
    run_digest: bytes = b""
    """What names the run in the signed keys of a sum, 32 bytes."""


def signing_of(
    hello: wire.Hello,
    caller: Caller,
    genesis: Genesis,
    genesis_head: bytes,
) -> Signing | None:
    """How the answers of the session that `hello` opens are signed; None if they are not.

    A member of a fleet signs with the key that it enrolled with. Anyone else may name a key, or
    none. Raises `SignatureError` for another key than the member's.
    """
    if caller.role is Role.WORKER:
        if not caller.signing_key:
            raise SignatureError(
                f"Worker {caller.name} joined this fleet without a signing key, and each answer "
                "must be signed; join again with a new join string."
            )
        if hello.signing_key != caller.signing_key:
            raise SignatureError(
                f"Worker {caller.name} would sign with key {hello.signing_key.hex()[:16] or '-'}, "
                f"but joined with {caller.signing_key.hex()[:16]}; start it with the state folder "
                "that it joined with."
            )
    if not hello.signing_key:
        return None
    check_signing_key(hello.signing_key)
    return Signing(hello.signing_key, genesis.config, genesis_head, run_digest_of(genesis))


def event_from_request(
    worker: str,
    message: wire.SessionRequest,
    round_: int,
    head_at: Callable[[int], bytes],
    signing: Signing | None = None,
    signed: SignedAnswer | None = None,
) -> AnswerReceived | UnableReceived | SumReceived | WeightsReported:
    """A message of a worker's open session as an event for the machine that serves it.

    `round_` is the last committed round; `head_at` gives the head after a round, empty if it is not
    known. `signing` is None in a session whose answers are not signed. `signed` is what
    `signed_answer` has made of this message. Raises the `FedMezoError` with which the session must
    end.
    """
    match message.WhichOneof("kind"):
        case "answer":
            answer = message.answer
            head = head_at(max(answer.ticket.round - 1, 0)) if answer.HasField("head64") else b""
            if head and digest64_of(head) != answer.head64:
                raise DivergedError(
                    f"Worker {worker} measured round {answer.ticket.round} after another history "
                    "than this journal's; restart the worker, so that it rebuilds from base and "
                    "journal."
                )
            event = answer_from_pb(worker, answer) if signed is None else signed.event
            event.signature = answer.signature
            if signing is not None or answer.signature:
                _check_signature(event, signing, head_at, signed)
            return event
        case "unable":
            return unable_from_pb(worker, message.unable)
        case "sum_reply":
            received = sum_received_from_pb(worker, message.sum_reply)
            return _signed_keys(received, signing)
        case "weights_report":
            report = message.weights_report
            if len(report.weights_digest) != 32 or report.round > round_:
                raise ProtocolError(
                    f"A weights report names a committed round (so far {round_}, not "
                    f"{report.round}) and a digest of 32 bytes (not "
                    f"{len(report.weights_digest)}); use the same FedMeZO version."
                )
            return WeightsReported(worker, report.round, report.weights_digest)
        case kind:
            raise ProtocolError(
                f"Message {kind or 'of no known kind'} has no place in an open session; "
                "use the same FedMeZO version."
            )


def _signed_keys(event: SumReceived, signing: Signing | None) -> SumReceived:
    """The event, with the key that signed the keys in it; raises `SignatureError` for another."""
    keys = event.step
    if not isinstance(keys, KeysGiven):
        return event
    if signing is None:
        if keys.signature:
            raise SignatureError(
                f"Worker {event.worker} signed its keys for a sum, but its hello named no "
                "signing_key; name the key there, or send keys without signatures."
            )
        return event
    ticket = event.ticket
    context = SumContext(
        signing.run_digest,
        ticket.epoch,
        ticket.round,
        event.attempt,
        signing.config.pairs_per_answer,
    )
    text = keys_text(context, ticket.slot, event.worker, keys)
    if not is_signed(signing.key, text, keys.signature):
        raise SignatureError(
            f"The keys of worker {event.worker} for the sum of round {ticket.round} are not signed "
            f"with key {signing.key.hex()[:16]}; find out what lies between worker and coordinator."
        )
    return dataclasses.replace(event, key=signing.key)


def _check_signature(
    event: AnswerReceived,
    signing: Signing | None,
    head_at: Callable[[int], bytes],
    signed: SignedAnswer | None,
) -> None:
    """Note the key that signed an answer; raises `SignatureError` if it is not the session's.

    The signature must be over what the journal will hold of the answer.
    """
    ticket = event.ticket
    if signing is None:
        raise SignatureError(
            f"A signature came with {_named(event)}, but its hello named no signing_key; name the "
            "key there, or send answers without signatures."
        )
    if not event.signature:
        raise SignatureError(
            f"No signature came with {_named(event)}, but it must be signed with key "
            f"{signing.key.hex()[:16]}; use a FedMeZO version that signs."
        )
    head = head_at(ticket.round - 1) if ticket.round else b""
    if not head:
        # The machine may be ahead of what is durable; it never takes an answer that nobody checked.
        raise StaleTicketError(
            f"No work of round {ticket.round} is known here, so {_named(event)} cannot be checked; "
            "drop it and connect again."
        )
    # The head after a round never changes once it is known.
    if signed is None:
        text = _signed_text(event, signing, head)
        signed = SignedAnswer(event, signing.key, text, event.signature)
    if not signed.is_good():
        raise SignatureError(
            f"The signature of {_named(event)} is not of key {signing.key.hex()[:16]} for this "
            f"answer, ticket, run and history (head {head.hex()[:16]}): it was altered on its way, "
            "or made for another one; find out what lies between worker and coordinator."
        )
    event.key = signing.key


def _named(event: AnswerReceived) -> str:
    ticket = event.ticket
    return f"worker {event.worker}'s answer to round {ticket.round}, slot {ticket.slot}"


def _signed_text(event: AnswerReceived, signing: Signing, head: bytes) -> bytes:
    """What must be signed: what the journal will hold of the answer, which `head` is before."""
    scalars = event.scalars
    if scalars.weights_digest64 is not None and not is_digest_round(
        signing.config, event.ticket.round
    ):
        scalars = scalars._replace(weights_digest64=None)
    return answer_text(signing.genesis_head, event.ticket, head, scalars)


@dataclass(slots=True)
class SignedAnswer:
    """An answer whose signature can be checked before its turn comes."""

    event: AnswerReceived
    key: bytes
    text: bytes
    signature: bytes
    good: bool | None = None
    """What a check has found; None: nobody has checked it yet."""
    is_awaited: bool = False
    """Whether another process checks it now, so that `good` will come."""

    def is_good(self) -> bool:
        """Whether `signature` is the key's for `text`; checks it if nobody has done so."""
        if self.good is None:
            self.good = is_signed(self.key, self.text, self.signature)
        return self.good


def signed_answer(
    worker: str, message: wire.SessionRequest, signing: Signing, head_at: Callable[[int], bytes]
) -> SignedAnswer | None:
    """What `event_from_request` will ask about; None for what needs no check, or has none yet."""
    answer = message.answer if message.HasField("answer") else None
    if answer is None or not (signature := answer.signature):
        return None
    event = answer_from_pb(worker, answer)
    round_ = event.ticket.round
    head = head_at(round_ - 1) if round_ else b""
    if not head:
        return None
    return SignedAnswer(event, signing.key, _signed_text(event, signing, head), signature)
