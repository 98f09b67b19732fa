"""A worker's part in sums that hide their terms: no clock, no socket, no entropy of its own.

It trusts the coordinator with nothing but the run's progress. It takes a step only if it follows
from the ones before, makes one reply to each, and repeats that reply bit for bit. In one round it
reveals shares at most once, whichever run or session asks (`SumMemory`): so whatever is asked of it
later, no two sums of the round can be subtracted to give what a single worker has measured
(decision 0059).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedmezo_core.errors import ProtocolError, SecureSumError
from fedmezo_core.events import (
    KeysGiven,
    KeysWanted,
    MaskedGiven,
    Peer,
    PeersNamed,
    SendSumStep,
    SharesDelivered,
    SharesGiven,
    SharesRevealed,
    StepDown,
    StepUp,
    SumAsked,
    UnmaskingWanted,
)
from fedmezo_core.records import Genesis, first_seed_of
from fedmezo_core.trust.answer_signatures import is_signed
from fedmezo_core.trust.secure_aggregation.fixed_point import quantised
from fedmezo_core.trust.secure_aggregation.masking import (
    MemberSecrets,
    SumContext,
    is_public_key,
    keys_text,
    run_digest_of,
    share_hashes,
    transcript_of,
)
from fedmezo_core.trust.secure_aggregation.secret_sharing import SHARE_BYTES
from fedmezo_core.trust.secure_aggregation.sum_memory import (
    SumMemory,
    numbers_digest_of,
    revealed_sentence,
)


@dataclass(slots=True)
class _Attempt:
    """What a member knows of one attempt."""

    context: SumContext
    slot: int
    secrets: MemberSecrets
    peers: tuple[Peer, ...] = ()
    transcript: bytes = b""
    threshold: int = 0
    own_shares: tuple[bytes, bytes] = (b"", b"")
    shares: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    """Slot of each member that gave shares -> its shares of its mask key and of its self mask."""
    replies: list[tuple[StepDown, StepUp]] = field(default_factory=list)
    """The steps taken, in order, each with its reply."""


class SecureMember:
    """Answers the steps of one attempt after the other. See the module's text."""

    def __init__(
        self,
        genesis: Genesis,
        worker: str,
        signing_key: bytes = b"",
        memory: SumMemory | None = None,
    ) -> None:
        """`signing_key` is the public key that this worker signs with; empty if it does not.

        `memory` is that of the worker's process; None: this member's own.
        """
        self._config = genesis.config
        self._run_digest = run_digest_of(genesis)
        self._worker = worker
        self._signing_key = signing_key
        self._attempt: _Attempt | None = None
        self._newest = (0, 0)
        self._numbers = numbers_digest_of(genesis, worker)
        self._memory = SumMemory() if memory is None else memory

    def check_seeds(self, round_: int, seeds: Sequence[int]) -> None:
        """Raise `ProtocolError` unless `seeds` are the round's own.

        Along others, sums of two rounds could be compared.
        """
        first = first_seed_of(self._config.seed, round_, 0)
        if list(seeds) != list(range(first, first + self._config.pairs_per_answer)):
            raise ProtocolError(
                f"Round {round_} was assigned along other directions than its own, which a run "
                "with secure_aggregation never does; find out who changed the coordinator."
            )

    def step(self, event: SumAsked, projected_grads: Sequence[float]) -> SendSumStep:
        """Take a step of the sum over the round that `projected_grads` were measured for.

        Returns the reply, and raises `SecureSumError` if this worker takes no part in the attempt,
        or not any more.
        """
        name = (event.ticket.epoch, event.attempt)
        if isinstance(event.step, KeysWanted) and name > self._newest:
            self._newest = name
            self._attempt = self._begin(event)
        attempt = self._attempt
        if (
            attempt is None
            or name != self._newest
            or attempt.context.round != event.ticket.round
            or attempt.slot != event.ticket.slot
        ):
            raise SecureSumError(
                f"attempt {event.attempt} of round {event.ticket.round} is not the one that this "
                "worker takes part in"
            )
        for step, reply in attempt.replies:
            if type(step) is type(event.step):
                if step != event.step:
                    raise SecureSumError("a step of the sum came a second time and was another one")
                return self._sending(event, attempt, reply)
        reply = self._reply(attempt, event.step, projected_grads)
        attempt.replies.append((event.step, reply))
        return self._sending(event, attempt, reply)

    def _sending(self, event: SumAsked, attempt: _Attempt, reply: StepUp) -> SendSumStep:
        text = b""
        if isinstance(reply, KeysGiven):
            text = keys_text(attempt.context, attempt.slot, self._worker, reply)
        return SendSumStep(event.ticket, event.attempt, reply, text)

    # ------------------------------------------------------------ the steps

    def _begin(self, event: SumAsked) -> _Attempt:
        ticket = event.ticket
        context = SumContext(
            self._run_digest,
            ticket.epoch,
            ticket.round,
            event.attempt,
            self._config.pairs_per_answer,
        )
        return _Attempt(context, ticket.slot, MemberSecrets(event.entropy))

    def _reply(self, attempt: _Attempt, step: StepDown, projected_grads: Sequence[float]) -> StepUp:
        if self._memory.is_revealed(self._numbers, attempt.context.round):
            raise SecureSumError(revealed_sentence(attempt.context.round))
        match step, len(attempt.replies):
            case KeysWanted(), 0:
                return attempt.secrets.keys
            case PeersNamed(peers), 1:
                return self._share(attempt, peers)
            case SharesDelivered(sealed, hashes), 2:
                return self._mask(attempt, sealed, hashes, projected_grads)
            case UnmaskingWanted(survivors), 3:
                return self._reveal(attempt, survivors)
        raise SecureSumError(f"{type(step).__name__} came out of turn")

    def _share(self, attempt: _Attempt, peers: tuple[Peer, ...]) -> SharesGiven:
        self._check_peers(attempt, peers)
        attempt.peers = peers
        attempt.transcript = transcript_of(attempt.context, peers)
        attempt.threshold = self._config.sum_threshold(len(peers))
        shares = attempt.secrets.split(attempt.threshold, [peer.slot + 1 for peer in peers])
        sealed: list[tuple[int, bytes]] = []
        hashes: list[bytes] = []
        for peer, pair in zip(peers, shares, strict=True):
            hashes.append(share_hashes(pair, attempt.transcript, attempt.slot, peer.slot))
            if peer.slot == attempt.slot:
                attempt.own_shares = pair
                continue
            text = attempt.secrets.seal(b"".join(pair), attempt.transcript, attempt.slot, peer)
            sealed.append((peer.slot, text))
        return SharesGiven(tuple(sealed), tuple(hashes))

    def _check_peers(self, attempt: _Attempt, peers: tuple[Peer, ...]) -> None:
        config = self._config
        slots = [peer.slot for peer in peers]
        if slots != sorted(set(slots)) or len({peer.worker for peer in peers}) != len(peers):
            raise SecureSumError("a member was named twice")
        self._check_enough(len(peers), config.secure_cohort_min)
        if len(peers) > config.cohort_size_max:
            raise SecureSumError(f"{len(peers)} members could add up to more than 32 bits hold")
        public = {key for peer in peers for key in (peer.keys.cipher_key, peer.keys.mask_key)}
        if len(public) != 2 * len(peers):
            raise SecureSumError("two members have the same key")
        if not all(map(is_public_key, public)):
            raise SecureSumError("a member has a key that is no one's")
        own = [peer for peer in peers if peer.slot == attempt.slot]
        ours = attempt.secrets.keys
        if not own or own[0].worker != self._worker or _public(own[0].keys) != _public(ours):
            raise SecureSumError("this worker's own keys are not among the members'")
        for peer in peers:
            self._check_signature(attempt, peer)

    def _check_signature(self, attempt: _Attempt, peer: Peer) -> None:
        """Refuse keys that are not the named worker's, as far as this worker can know."""
        known = self._memory.key_of(peer.worker)
        if peer.slot == attempt.slot:
            return
        if not peer.signing_key:
            if self._signing_key or known:
                raise SecureSumError(f"worker {peer.worker} did not sign its keys")
            return
        if known is not None and known != peer.signing_key:
            raise SecureSumError(
                f"worker {peer.worker} signs with another key than before; restart this worker if "
                "that one was given a new key"
            )
        text = keys_text(attempt.context, peer.slot, peer.worker, peer.keys)
        if not is_signed(peer.signing_key, text, peer.keys.signature):
            raise SecureSumError(f"the keys of worker {peer.worker} are not signed by its key")
        self._memory.keep_key(peer.worker, peer.signing_key)

    def _mask(
        self,
        attempt: _Attempt,
        sealed: tuple[tuple[int, bytes], ...],
        hashes: tuple[bytes, ...],
        projected_grads: Sequence[float],
    ) -> MaskedGiven:
        by_slot = {peer.slot: peer for peer in attempt.peers if peer.slot != attempt.slot}
        slots = [slot for slot, _ in sealed]
        if slots != sorted(set(slots)) or not by_slot.keys() >= set(slots):
            raise SecureSumError("shares came of who is no member, or twice")
        self._check_enough(len(slots) + 1, attempt.threshold)
        found = {attempt.slot: attempt.own_shares}
        for (slot, text), hashed in zip(sealed, hashes or (b"",) * len(sealed), strict=True):
            both = attempt.secrets.unseal(text, attempt.transcript, attempt.slot, by_slot[slot])
            if both is None:
                continue
            pair = (both[:SHARE_BYTES], both[SHARE_BYTES:])
            if not hashed or hashed == share_hashes(pair, attempt.transcript, slot, attempt.slot):
                found[slot] = pair
        useless = [slot for slot in slots if slot not in found]
        if useless:
            names = ", ".join(by_slot[slot].worker for slot in useless)
            error = SecureSumError(
                f"the shares of worker {names} cannot be decrypted, or are not those that it "
                "announced"
            )
            error.useless_shares_of = tuple(useless)
            raise error
        attempt.shares = found
        givers = [peer for peer in attempt.peers if peer.slot in found]
        values = quantised(projected_grads, self._config)
        return MaskedGiven(attempt.secrets.masked(values, attempt.transcript, attempt.slot, givers))

    def _reveal(self, attempt: _Attempt, survivors: tuple[int, ...]) -> SharesRevealed:
        chosen = set(survivors)
        if list(survivors) != sorted(chosen) or not attempt.shares.keys() >= chosen:
            raise SecureSumError("the sum would be of who is no member, or of one twice")
        if attempt.slot not in chosen:
            raise SecureSumError("the sum would be without this worker")
        self._check_enough(len(chosen), attempt.threshold)
        self._memory.reveal(self._numbers, attempt.context.round)
        return SharesRevealed(
            tuple(
                (slot, of_mask if slot in chosen else of_key)
                for slot, (of_key, of_mask) in sorted(attempt.shares.items())
            )
        )

    def _check_enough(self, count: int, wanted: int) -> None:
        wanted = max(wanted, self._config.secure_cohort_min)
        if count < wanted:
            raise SecureSumError(f"{count} members are too few; at least {wanted} must be in a sum")


def _public(keys: KeysGiven) -> tuple[bytes, bytes, bytes]:
    return keys.cipher_key, keys.mask_key, keys.self_mask_hash
