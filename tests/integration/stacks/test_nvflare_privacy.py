"""What the privacy filter lets leave a site."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply

from fedmezo_nvflare import ScalarPrivacy
from fedmezo_nvflare.site_exchanges import CLIP, UP
from fedmezo_proto.v1 import coordinator_pb2 as wire

LIMIT = 100.0


def request(*grads: float, epoch: int = 1, round_: int = 3, slot: int = 0) -> bytes:
    """What a site sends: its greeting and one answer."""
    ticket = wire.Ticket(epoch=epoch, round=round_, slot=slot)
    answer = wire.Answer(ticket=ticket, projected_grads=grads, mean_loss=0.5, rows=9, head64=7)
    greeting = wire.SessionRequest(hello=wire.Hello(run_id="r", worker="site-1"))
    messages = [greeting, wire.SessionRequest(answer=answer)]
    return wire.PollSessionRequest(messages=messages).SerializeToString()


def filtered(privacy: ScalarPrivacy, up: bytes, limit: float = LIMIT) -> wire.Answer:
    left = privacy.filtered({UP: up, CLIP: limit})
    assert set(left) == {UP}
    greeting, answer = wire.PollSessionRequest.FromString(left[UP]).messages
    assert greeting.hello.worker == "site-1"
    return answer.answer


def test_gradients_are_clipped_and_losses_stay() -> None:
    answer = filtered(ScalarPrivacy(clip=2.0), request(0.5, -7.0, math.inf))
    assert list(answer.projected_grads) == [0.5, -2.0, 2.0]
    assert not answer.HasField("mean_loss")
    # These depend on the journal alone, or the contract asks for them.
    assert (answer.head64, answer.rows, answer.ticket.round) == (7, 9, 3)


def test_noise_has_the_size_that_was_asked_for() -> None:
    answer = filtered(ScalarPrivacy(clip=2.0, noise_multiplier=1.5), request(*[1.0] * 4000))
    assert statistics.mean(answer.projected_grads) == pytest.approx(1.0, abs=0.2)
    assert statistics.stdev(answer.projected_grads) == pytest.approx(3.0, rel=0.05)


def test_an_answer_that_is_sent_again_is_the_same() -> None:
    privacy = ScalarPrivacy(clip=2.0, noise_multiplier=1.0)
    first = filtered(privacy, request(0.5, 1.5))
    # After a restart of the coordinator, the same measurement has a ticket of a later epoch.
    again = filtered(privacy, request(0.5, 1.5, epoch=2))
    assert list(first.projected_grads) == list(again.projected_grads) != [0.5, 1.5]


@pytest.mark.parametrize(
    "other", [request(0.5, 1.5, round_=4), request(0.5, 1.5, slot=1), request(0.5, 1.6)]
)
def test_every_other_answer_has_noise_of_its_own(other: bytes) -> None:
    privacy = ScalarPrivacy(clip=2.0, noise_multiplier=1.0)
    first, second = filtered(privacy, request(0.5, 1.5)), filtered(privacy, other)
    assert first.projected_grads[0] != second.projected_grads[0]
    assert first.projected_grads[1] - second.projected_grads[1] != pytest.approx(-0.1)
    assert filtered(ScalarPrivacy(2.0, 1.0), request(0.5, 1.5)) != first


def test_noise_stays_within_the_contract() -> None:
    answer = filtered(ScalarPrivacy(clip=50.0, noise_multiplier=100.0), request(*[1.0] * 50))
    assert max(map(abs, answer.projected_grads)) == LIMIT


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf])
def test_a_clip_that_cannot_be_meant_is_refused(clip: float) -> None:
    with pytest.raises(ValueError, match="clip is"):
        ScalarPrivacy(clip)


@pytest.mark.parametrize("multiplier", [-0.1, math.nan, math.inf])
def test_noise_that_cannot_be_meant_is_refused(multiplier: float) -> None:
    with pytest.raises(ValueError, match="noise_multiplier is"):
        ScalarPrivacy(1.0, multiplier)


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"weights": [1.0, 2.0]},
        {UP: "text", CLIP: LIMIT},
        {UP: b"\xff\xff", CLIP: LIMIT},
        {UP: request(1.0)},
        {UP: request(1.0), CLIP: math.nan},
        {UP: request(math.nan), CLIP: LIMIT},
    ],
)
def test_what_is_no_reply_of_ours_stays_at_the_site(reply: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="does not leave this site"):
        ScalarPrivacy(1.0).filtered(reply)


def test_what_it_does_not_know_stays_at_the_site() -> None:
    up = request(1.0) + b"\xfa\x07\x06secret"  # a field of a later version
    left = ScalarPrivacy(1.0).filtered({UP: up, CLIP: LIMIT, "weights": [1.0]})
    assert b"secret" not in left[UP]
    assert set(left) == {UP}


def test_as_nvflare_calls_it() -> None:
    privacy, context = ScalarPrivacy(1.0), FLContext()
    reply = DXO(DataKind.WEIGHTS, data={UP: request(5.0), CLIP: LIMIT}).to_shareable()
    reply["weights"] = [1.0]
    passed = privacy.process(reply, context)
    assert "weights" not in passed
    messages = wire.PollSessionRequest.FromString(from_shareable(passed).data[UP]).messages
    assert list(messages[1].answer.projected_grads) == [1.0]
    assert from_shareable(
        privacy.process(DXO(DataKind.WEIGHTS, data={UP: b""}).to_shareable(), context)
    ).data == {UP: b""}


def test_an_error_leaves_the_site_without_what_it_holds() -> None:
    failed = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    failed["weights"] = [1.0]
    passed: Shareable = ScalarPrivacy(1.0).process(failed, FLContext())
    assert passed.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert "weights" not in passed
