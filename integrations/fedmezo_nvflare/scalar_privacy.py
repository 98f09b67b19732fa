"""A filter on what leaves a site: it clips projected gradients and may add noise to them."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from google.protobuf.message import DecodeError
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply

from fedmezo_nvflare.site_exchanges import CLIP, LEFT, UP
from fedmezo_proto.v1 import coordinator_pb2 as wire

_NORMAL = NormalDist()


class ScalarPrivacy(Filter):
    """Clips each projected gradient to ± `clip`, adds Gaussian noise, and withholds losses.

    The noise has the standard deviation `noise_multiplier` × `clip`. An answer that is sent again
    gets the same noise again: two samples would say more, and the coordinator takes only one
    answer to a ticket. The noised value is cut to the clip of the run's contract. A reply that is
    no FedMeZO reply does not leave the site. docs/integrations.md says what this protects.
    """

    def __init__(self, clip: float, noise_multiplier: float = 0.0) -> None:
        """Raise `ValueError` unless 0 < clip and 0 <= noise_multiplier, both finite."""
        super().__init__()
        if not 0 < clip < math.inf:
            raise ValueError(f"clip is {clip!r}; use a finite number above 0.")
        if not 0 <= noise_multiplier < math.inf:
            raise ValueError(
                f"noise_multiplier is {noise_multiplier!r}; use a finite number, 0 for no noise."
            )
        self.clip = clip
        self.noise_multiplier = noise_multiplier
        self._key = secrets.token_bytes(32)

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """The reply as it may leave the site; raises `ValueError` if it may not."""
        code = shareable.get_return_code()
        if code != ReturnCode.OK:
            return make_reply(code)  # Without whatever else it holds.
        content = from_shareable(shareable).data
        if not isinstance(content, dict):
            raise ValueError("The reply is none of FedMeZO's, so it does not leave this site.")
        return DXO(DataKind.WEIGHTS, data=self.filtered(content)).to_shareable()

    def filtered(self, reply: Mapping[str, Any]) -> dict[str, Any]:
        """What of a site's reply may leave the site; raises `ValueError` if nothing may."""
        if reply.get(LEFT) is True:
            return {LEFT: True}
        up, limit = reply.get(UP), reply.get(CLIP, 0.0)
        if up == b"":
            return {UP: b""}
        if not isinstance(up, bytes) or not isinstance(limit, float) or not 0 < limit < math.inf:
            raise ValueError("The reply is none of FedMeZO's, so it does not leave this site.")
        try:
            request = wire.PollSessionRequest.FromString(up)
        except DecodeError:
            raise ValueError(
                "The reply holds no messages of FedMeZO, so it does not leave this site."
            ) from None
        request.DiscardUnknownFields()
        for message in request.messages:
            if message.WhichOneof("kind") == "answer":
                self._protect(message.answer, limit)
        return {UP: request.SerializeToString()}

    def _protect(self, answer: wire.Answer, limit: float) -> None:
        answer.ClearField("mean_loss")
        grads = list(answer.projected_grads)
        if any(math.isnan(grad) for grad in grads):
            raise ValueError(
                "A projected gradient is not a number, so it does not leave this site."
            )
        clipped = [max(-self.clip, min(self.clip, grad)) for grad in grads]
        if self.noise_multiplier:
            noise = self._noise(answer, len(grads))
            clipped = [grad + sample for grad, sample in zip(clipped, noise, strict=True)]
        answer.projected_grads[:] = [max(-limit, min(limit, grad)) for grad in clipped]

    def _noise(self, answer: wire.Answer, count: int) -> list[float]:
        """Samples that this process alone can repeat: a keyed hash of the answer seeds them.

        The epoch is left out, because it changes when the same answer is asked for again.
        """
        content = wire.Answer(projected_grads=answer.projected_grads).SerializeToString()
        slot = answer.ticket.round.to_bytes(8, "little") + answer.ticket.slot.to_bytes(4, "little")
        stream = hashlib.shake_256(self._key + slot + content).digest(8 * count)
        sigma = self.noise_multiplier * self.clip
        # 53 bits, in the middle of their steps: never 0 or 1.
        uniform = (
            ((int.from_bytes(stream[at : at + 8], "little") >> 11) + 0.5) * 2.0**-53
            for at in range(0, len(stream), 8)
        )
        return [sigma * _NORMAL.inv_cdf(value) for value in uniform]
