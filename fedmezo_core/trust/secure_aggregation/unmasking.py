"""How the coordinator takes the masks off a sum, in small steps, and finds whose shares are wrong.

The secrets of an attempt can be checked: a mask key by its public key, a self mask by its hash. The
shares can be too, because who deals one publishes its hash, and who receives one compares the two
before it sends its numbers. So a revealed share with another hash is its revealer's fault, and
shares with the right hashes that give another secret are their dealer's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from fedmezo_core.events import Peer
from fedmezo_core.trust.secure_aggregation.masking import (
    MODULUS,
    SHARE_HASH_BYTES,
    add_masks,
    mask_of,
    pair_mask_key,
    public_key_of,
    self_mask_hash_of,
    self_mask_key,
    share_hash_of,
)
from fedmezo_core.trust.secure_aggregation.secret_sharing import combined_secret, weights_at_zero

MASKS_A_STEP = 32
"""Masks that are taken off before others have their turn; each takes about 0.1 ms."""


class Unmasking:
    """Takes the masks off one sum. Members are named by their slots."""

    def __init__(
        self,
        peers: Sequence[Peer],
        transcript: bytes,
        threshold: int,
        hashes: Mapping[int, Mapping[int, bytes]],
        masked: Mapping[int, Sequence[int]],
        givers: Sequence[int],
    ) -> None:
        """`threshold`: how many right shares give a secret.

        `hashes`: dealer -> receiver -> `share_hashes` of what it was dealt, of those dealers that
        gave any. `masked`: the masked numbers of each member in the sum. `givers`: the members
        that dealt shares, those in the sum among them.
        """
        self._peers = {peer.slot: peer for peer in peers}
        self._transcript = transcript
        self._threshold = threshold
        self._hashes = hashes
        self._masked = masked
        self._givers = givers
        # Revealer -> dealer -> share; of those revealers whose shares are all as they were dealt,
        # as far as that can be told.
        self._revealed: dict[int, dict[int, bytes]] = {}
        self._work: Iterator[None] | None = None
        self.failure = ""
        """Why there is no sum; empty as long as there may be one."""
        self.wrong: dict[int, str] = {}
        """Member -> what it is proven to have done wrong, as the end of a sentence."""
        self.totals: tuple[int, ...] | None = None
        """The sum modulo 2^32 along each direction, once it is known."""

    @property
    def right(self) -> int:
        """How many members have revealed shares that may be right."""
        return len(self._revealed)

    @property
    def is_busy(self) -> bool:
        """Whether the sum was begun and neither is known nor has failed."""
        return self._work is not None and not self.failure and self.totals is None

    def reveal(self, slot: int, shares: Mapping[int, bytes]) -> None:
        """Take what a member reveals: dealer -> share, of the secret that the sum needs."""
        off = [
            dealer for dealer, share in shares.items() if not self._is_as_dealt(dealer, slot, share)
        ]
        if not off:
            self._revealed[slot] = dict(shares)
        elif slot in self._hashes:
            # It knows hashes itself, so it has compared these, and would not have gone on.
            self.wrong[slot] = f"revealed other shares than it was dealt: {len(off)}"

    def work(self) -> None:
        """Take some masks off; begin with that if `threshold` members have revealed theirs."""
        if self._work is None:
            if self.right < self._threshold:
                return
            self._work = self._take_off(dict(sorted(self._revealed.items())[: self._threshold]))
        if self.is_busy:
            for _ in islice(self._work, MASKS_A_STEP):
                pass

    # ------------------------------------------------------------ small parts

    def _is_as_dealt(self, dealer: int, receiver: int, share: bytes) -> bool:
        """Whether a share is what its dealer published; true if that published nothing."""
        if dealer not in self._hashes:
            return True
        both, is_of_mask_key = self._hashes[dealer][receiver], dealer not in self._masked
        expected = both[:SHARE_HASH_BYTES] if is_of_mask_key else both[SHARE_HASH_BYTES:]
        found = share_hash_of(
            share, self._transcript, dealer, receiver, is_of_mask_key=is_of_mask_key
        )
        return found == expected

    def _take_off(self, revealed: Mapping[int, Mapping[int, bytes]]) -> Iterator[None]:
        """Find `totals` or the `failure`; pauses after each mask."""
        weights = weights_at_zero([slot + 1 for slot in revealed])
        totals = [sum(column) for column in zip(*self._masked.values(), strict=True)]
        count = len(totals)
        for giver in self._givers:
            shares = [of_dealer[giver] for of_dealer in revealed.values()]
            secret = combined_secret(shares, weights)
            if secret is None or not self._fits(giver, secret):
                name = self._peers[giver].worker
                self.failure = f"the shares of worker {name} do not fit"
                if giver in self._hashes:
                    self.wrong[giver] = "dealt shares that do not give its secret"
                return
            if giver in self._masked:
                key = self_mask_key(secret, self._transcript, giver)
                totals = add_masks(totals, mask_of(key, count), -1)
                yield
                continue
            for slot in self._masked:
                public = self._peers[slot].keys.mask_key
                key = pair_mask_key(secret, public, self._transcript, giver, slot)
                totals = add_masks(totals, mask_of(key, count), -1 if slot < giver else 1)
                yield
        self.totals = tuple(total % MODULUS for total in totals)

    def _fits(self, giver: int, secret: bytes) -> bool:
        """Whether a secret is the one that its owner has shown the public side of."""
        keys = self._peers[giver].keys
        if giver in self._masked:
            return self_mask_hash_of(secret) == keys.self_mask_hash
        return public_key_of(secret) == keys.mask_key
