"""Steps of a hidden sum on the wire: both ways, and nothing of another size."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedmezo_core.config import MESSAGE_BYTES_MAX, SECURE_COHORT_MAX, STEPS_MAX
from fedmezo_core.errors import ProtocolError, SignatureError
from fedmezo_core.events import (
    AskSum,
    KeysGiven,
    KeysWanted,
    MaskedGiven,
    Peer,
    PeersNamed,
    SendSumStep,
    SendUnable,
    SharesDelivered,
    SharesGiven,
    SharesRevealed,
    StepDown,
    StepUp,
    SumAsked,
    SumReceived,
    Ticket,
    UnableReceived,
    UnmaskingWanted,
)
from fedmezo_core.trust.secure_aggregation.masking import SEALED_BYTES, SHARE_HASHES_BYTES
from fedmezo_core.trust.secure_aggregation.secret_sharing import SHARE_BYTES
from fedmezo_core.wire.admission import Signing, event_from_request
from fedmezo_core.wire.messages import event_from_pb, unable_from_pb, unable_to_pb
from fedmezo_core.wire.sum_messages import (
    ask_to_pb,
    asked_from_pb,
    sum_received_from_pb,
    sum_step_to_pb,
)
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import secure_sum_pb2 as pb
from tests.integration.support.harness import config_of

TICKET = Ticket(3, 7, 2)
KEYS = KeysGiven(b"c" * 32, b"m" * 32, b"h" * 32, b"s" * 64)
SEALED = ((0, b"e" * SEALED_BYTES), (5, b"f" * SEALED_BYTES))
SHARE = pb.SumShare(share=b"e" * SEALED_BYTES)
SHARES = ((0, b"e" * SHARE_BYTES), (2, b"f" * SHARE_BYTES))


@pytest.mark.parametrize(
    "step",
    [
        KeysWanted(),
        PeersNamed((Peer(0, "a", KEYS, b"k" * 32), Peer(2, "b", KEYS))),
        SharesDelivered(SEALED),
        SharesDelivered(SEALED, (b"a" * SHARE_HASHES_BYTES, b"")),
        UnmaskingWanted((0, 2, 5)),
    ],
)
def test_what_is_asked_comes_through(step: StepDown) -> None:
    sent = ask_to_pb(AskSum("a", TICKET, 4, step)).SerializeToString()
    event = event_from_pb(wire.SessionResponse.FromString(sent), config_of())
    assert event == SumAsked(TICKET, 4, step)


@pytest.mark.parametrize(
    "step",
    [
        KeysGiven(b"c" * 32, b"m" * 32, b"h" * 32),
        SharesGiven(SEALED),
        SharesGiven(SEALED, (b"a" * SHARE_HASHES_BYTES,) * 3),
        MaskedGiven((0, 2**32 - 1)),
        SharesRevealed(SHARES),
    ],
)
def test_what_is_replied_comes_through(step: StepUp) -> None:
    sent = sum_step_to_pb(SendSumStep(TICKET, 4, step)).SerializeToString()
    message = wire.SessionRequest.FromString(sent)
    event = event_from_request("a", message, 6, lambda _round: b"")
    assert event == SumReceived("a", TICKET, 4, step)


def test_the_largest_steps_fit_into_a_message() -> None:
    sealed = tuple((4095 - n, b"e" * SEALED_BYTES) for n in range(SECURE_COHORT_MAX))
    hashes = (b"h" * SHARE_HASHES_BYTES,) * SECURE_COHORT_MAX
    for step in (SharesGiven(sealed[1:], hashes), MaskedGiven((2**32 - 1,) * STEPS_MAX)):
        sent = sum_step_to_pb(SendSumStep(TICKET, 2**32 - 1, step))
        assert sent.ByteSize() < MESSAGE_BYTES_MAX


def test_whose_shares_are_no_use_comes_through() -> None:
    sent = unable_to_pb(SendUnable(TICKET, "no", (1, 4095)))
    assert unable_from_pb("a", sent.unable) == UnableReceived("a", TICKET, "no", (1, 4095))
    sent.unable.useless_shares_of.extend(range(SECURE_COHORT_MAX))
    assert len(unable_from_pb("a", sent.unable).useless_shares_of) == SECURE_COHORT_MAX


def keys(**changes: bytes) -> pb.SumReply:
    values = {"cipher_key": b"c" * 32, "mask_key": b"m" * 32, "self_mask_hash": b"h" * 32}
    return pb.SumReply(keys_given=pb.KeysGiven(**(values | changes)))


@pytest.mark.parametrize(
    "message",
    [
        pb.SumReply(),
        keys(cipher_key=b"c" * 31),
        keys(mask_key=b""),
        keys(self_mask_hash=b"h" * 33),
        keys(signature=b"s"),
        pb.SumReply(shares_given=pb.SharesGiven(shares=[pb.SumShare(share=b"e" * 81)])),
        pb.SumReply(shares_given=pb.SharesGiven(shares=[SHARE], hashes=[b"h" * 32])),
        pb.SumReply(shares_given=pb.SharesGiven(shares=[SHARE], hashes=[b"h" * 32, b""])),
        pb.SumReply(shares_revealed=pb.SharesRevealed(shares=[pb.SumShare(share=b"e" * 82)])),
        pb.SumReply(
            shares_revealed=pb.SharesRevealed(
                shares=[pb.SumShare(share=b"e" * SHARE_BYTES)] * (SECURE_COHORT_MAX + 1)
            )
        ),
    ],
)
def test_replies_of_another_size_are_refused(message: pb.SumReply) -> None:
    with pytest.raises(ProtocolError):
        sum_received_from_pb("a", message)


def _peers(change: Callable[[pb.SumPeer], None]) -> pb.SumAsk:
    ask = ask_to_pb(AskSum("a", TICKET, 1, PeersNamed((Peer(0, "a", KEYS, b"k" * 32),)))).sum_ask
    change(ask.peers_named.peers[0])
    return ask


@pytest.mark.parametrize(
    "message",
    [
        pb.SumAsk(),
        _peers(lambda peer: peer.ClearField("worker")),
        _peers(lambda peer: setattr(peer, "worker", "w" * 65)),
        _peers(lambda peer: setattr(peer, "worker", "é")),
        _peers(lambda peer: peer.ClearField("keys")),
        _peers(lambda peer: setattr(peer, "signing_key", b"k")),
        pb.SumAsk(unmasking_wanted=pb.UnmaskingWanted(survivors=range(SECURE_COHORT_MAX + 1))),
    ],
)
def test_asks_of_another_size_are_refused(message: pb.SumAsk) -> None:
    with pytest.raises(ProtocolError):
        asked_from_pb(message)


def test_keys_must_be_signed_as_the_hello_said() -> None:
    message = wire.SessionRequest(sum_reply=keys(signature=b"s" * 64))
    with pytest.raises(SignatureError, match="named no signing_key"):
        event_from_request("a", message, 6, lambda _round: b"")
    signing = Signing(b"k" * 32, config_of(), b"g" * 32, b"r" * 32)
    for signature in (b"", b"s" * 64):
        message = wire.SessionRequest(sum_reply=keys(signature=signature))
        with pytest.raises(SignatureError, match="are not signed with key"):
            event_from_request("a", message, 6, lambda _round: b"", signing)
