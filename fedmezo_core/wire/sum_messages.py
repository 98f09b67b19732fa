"""Conversions between the steps of a sum that hides its terms and their messages.

Decoding is strict: a missing field, or bytes of another length, is a `ProtocolError`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedmezo_core.config import SECURE_COHORT_MAX
from fedmezo_core.errors import ProtocolError
from fedmezo_core.events import (
    SUM_KEY_BYTES,
    AskSum,
    KeysGiven,
    KeysWanted,
    MaskedGiven,
    Peer,
    PeersNamed,
    SendSumStep,
    SharesDelivered,
    SharesGiven,
    SharesRevealed,
    SumAsked,
    SumReceived,
    Ticket,
    UnmaskingWanted,
)
from fedmezo_core.records import SIGNATURE_BYTES
from fedmezo_core.trust.answer_signatures import AnswerSigner
from fedmezo_core.trust.secure_aggregation.masking import SEALED_BYTES, SHARE_HASHES_BYTES
from fedmezo_core.trust.secure_aggregation.secret_sharing import SHARE_BYTES
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import secure_sum_pb2 as pb

NAME_CHARS_MAX = 64


def ask_to_pb(ask: AskSum) -> wire.SessionResponse:
    """What a worker is asked, as a session message."""
    message = pb.SumAsk(step=_step_to_pb(ask.ticket, ask.attempt))
    match ask.step:
        case KeysWanted():
            message.keys_wanted.SetInParent()
        case PeersNamed(peers):
            message.peers_named.peers.extend(map(_peer_to_pb, peers))
        case SharesDelivered(sealed, hashes):
            message.shares_delivered.shares.extend(_shares_to_pb(sealed))
            message.shares_delivered.hashes.extend(hashes)
        case UnmaskingWanted(survivors):
            message.unmasking_wanted.survivors.extend(survivors)
    return wire.SessionResponse(sum_ask=message)


def asked_from_pb(message: pb.SumAsk) -> SumAsked:
    """What a worker is asked, as an event without entropy; raises `ProtocolError`."""
    ticket = _ticket_in(message.step)
    match message.WhichOneof("kind"):
        case "keys_wanted":
            return SumAsked(ticket, message.step.attempt, KeysWanted())
        case "peers_named":
            peers = message.peers_named.peers
            _check_count(peers)
            named = PeersNamed(tuple(map(_peer_from_pb, peers)))
            return SumAsked(ticket, message.step.attempt, named)
        case "shares_delivered":
            sealed = _shares_in(message.shares_delivered.shares, SEALED_BYTES)
            hashes = _hashes_in(message.shares_delivered.hashes, len(sealed), optional=True)
            return SumAsked(ticket, message.step.attempt, SharesDelivered(sealed, hashes))
        case "unmasking_wanted":
            survivors = message.unmasking_wanted.survivors
            _check_count(survivors)
            wanted = UnmaskingWanted(tuple(survivors))
            return SumAsked(ticket, message.step.attempt, wanted)
        case _:
            raise _unknown()


def sum_step_to_pb(action: SendSumStep, signer: AnswerSigner | None = None) -> wire.SessionRequest:
    """A worker's step as a session message; its keys are signed if there is a `signer`."""
    message = pb.SumReply(step=_step_to_pb(action.ticket, action.attempt))
    match action.step:
        case KeysGiven():
            signature = signer.sign_text(action.text_to_sign) if signer else b""
            message.keys_given.CopyFrom(_keys_to_pb(action.step))
            message.keys_given.signature = signature
        case SharesGiven(sealed, hashes):
            message.shares_given.shares.extend(_shares_to_pb(sealed))
            message.shares_given.hashes.extend(hashes)
        case MaskedGiven(values):
            message.masked_given.values.extend(values)
        case SharesRevealed(shares):
            message.shares_revealed.shares.extend(_shares_to_pb(shares))
    return wire.SessionRequest(sum_reply=message)


def sum_received_from_pb(worker: str, message: pb.SumReply) -> SumReceived:
    """A worker's step as an event, without the key of its signature; raises `ProtocolError`."""
    ticket, attempt = _ticket_in(message.step), message.step.attempt
    match message.WhichOneof("kind"):
        case "keys_given":
            return SumReceived(worker, ticket, attempt, _keys_from_pb(message.keys_given))
        case "shares_given":
            sealed = _shares_in(message.shares_given.shares, SEALED_BYTES)
            hashes = _hashes_in(message.shares_given.hashes, len(sealed) + 1)
            return SumReceived(worker, ticket, attempt, SharesGiven(sealed, hashes))
        case "masked_given":
            values = tuple(message.masked_given.values)
            return SumReceived(worker, ticket, attempt, MaskedGiven(values))
        case "shares_revealed":
            shares = _shares_in(message.shares_revealed.shares, SHARE_BYTES)
            return SumReceived(worker, ticket, attempt, SharesRevealed(shares))
        case _:
            raise _unknown()


def _unknown() -> ProtocolError:
    return ProtocolError(
        "A step of a sum is of no kind that this version knows; use the same FedMeZO version."
    )


def _step_to_pb(ticket: Ticket, attempt: int) -> pb.SumStep:
    return pb.SumStep(epoch=ticket.epoch, round=ticket.round, slot=ticket.slot, attempt=attempt)


def _ticket_in(message: pb.SumStep) -> Ticket:
    return Ticket(message.epoch, message.round, message.slot)


def _peer_to_pb(peer: Peer) -> pb.SumPeer:
    return pb.SumPeer(
        slot=peer.slot,
        worker=peer.worker,
        keys=_keys_to_pb(peer.keys),
        signing_key=peer.signing_key,
    )


def _peer_from_pb(message: pb.SumPeer) -> Peer:
    _check_bytes(message.signing_key, SUM_KEY_BYTES, "signing key", optional=True)
    if not 0 < len(message.worker) <= NAME_CHARS_MAX or not message.worker.isascii():
        raise ProtocolError("A member of a sum has no worker's name; use the same FedMeZO version.")
    return Peer(message.slot, message.worker, _keys_from_pb(message.keys), message.signing_key)


def _keys_to_pb(keys: KeysGiven) -> pb.KeysGiven:
    return pb.KeysGiven(
        cipher_key=keys.cipher_key,
        mask_key=keys.mask_key,
        self_mask_hash=keys.self_mask_hash,
        signature=keys.signature,
    )


def _keys_from_pb(message: pb.KeysGiven) -> KeysGiven:
    _check_bytes(message.cipher_key, SUM_KEY_BYTES, "cipher key")
    _check_bytes(message.mask_key, SUM_KEY_BYTES, "mask key")
    _check_bytes(message.self_mask_hash, SUM_KEY_BYTES, "hash of a self mask")
    _check_bytes(message.signature, SIGNATURE_BYTES, "signature", optional=True)
    return KeysGiven(
        message.cipher_key, message.mask_key, message.self_mask_hash, message.signature
    )


def _shares_to_pb(shares: Iterable[tuple[int, bytes]]) -> Iterable[pb.SumShare]:
    return (pb.SumShare(slot=slot, share=share) for slot, share in shares)


def _shares_in(messages: Iterable[pb.SumShare], size: int) -> tuple[tuple[int, bytes], ...]:
    found = tuple((one.slot, one.share) for one in messages)
    _check_count(found)
    for _, share in found:
        _check_bytes(share, size, "share")
    return found


def _hashes_in(
    messages: Sequence[bytes], count: int, *, optional: bool = False
) -> tuple[bytes, ...]:
    found = tuple(messages)
    if found and len(found) != count:
        raise ProtocolError(
            f"A step of a sum has {len(found)} hashes of shares, not {count}; use the same FedMeZO "
            "version."
        )
    for one in found:
        _check_bytes(one, SHARE_HASHES_BYTES, "hash of shares", optional=optional)
    return found


def _check_count(found: Iterable[object]) -> None:
    count = sum(1 for _ in found)
    if count > SECURE_COHORT_MAX:
        raise ProtocolError(
            f"A step of a sum names {count} members, more than {SECURE_COHORT_MAX}; use the same "
            "FedMeZO version."
        )


def _check_bytes(value: bytes, size: int, what: str, *, optional: bool = False) -> None:
    if len(value) != size and (value or not optional):
        raise ProtocolError(
            f"A step of a sum has a {what} of {len(value)} bytes, not {size}; use the same FedMeZO "
            "version."
        )
