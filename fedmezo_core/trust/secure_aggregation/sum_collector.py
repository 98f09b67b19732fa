"""The coordinator's part in a sum that hides its terms: no clock, no socket, no entropy.

One attempt has four steps. Members that leave, refuse or are too slow drop out of it; as long as
more than the threshold are left, the rest is summed without them. Before the last step is asked
for, the caller must make durable that it is: a round has one sum or none (decision 0059).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fedmezo_core.config import RunConfig
from fedmezo_core.errors import SecureSumError
from fedmezo_core.events import (
    AskSum,
    KeysGiven,
    KeysWanted,
    MaskedGiven,
    Peer,
    PeersNamed,
    SharesDelivered,
    SharesGiven,
    SharesRevealed,
    StepDown,
    StepUp,
    SumReceived,
    Ticket,
    UnmaskingWanted,
)
from fedmezo_core.trust.secure_aggregation.fixed_point import levels_of
from fedmezo_core.trust.secure_aggregation.masking import (
    MODULUS,
    SumContext,
    is_public_key,
    transcript_of,
)
from fedmezo_core.trust.secure_aggregation.unmasking import Unmasking

STEP_MS = 30_000
"""Time that members have for one step, unless the run's deadline is shorter. No step measures."""

_REPLIES = (KeysGiven, SharesGiven, MaskedGiven, SharesRevealed)
_MASKING = 2
_UNMASKING = 3


class SumCollector:
    """One attempt at the sum of what some workers have measured for a round."""

    def __init__(
        self, config: RunConfig, context: SumContext, members: Mapping[int, str], now_ms: int
    ) -> None:
        """`members`: slot -> worker, at least the run's quorum of them, all ready."""
        self._config = config
        self._context = context
        self._members = dict(sorted(members.items()))
        self._left = dict(self._members)
        self._wanted = max(config.quorum, config.secure_cohort_min)
        self._step = 0
        self._replies: dict[int, StepUp] = {}
        self._signing_keys: dict[int, bytes] = {}
        self._silent: set[str] = set()
        self._ends_at_ms = self._end_after(now_ms)
        self._peers: tuple[Peer, ...] = ()
        self._transcript = b""
        self._shares: dict[int, dict[int, bytes]] = {}
        self._givers: tuple[int, ...] = ()
        self._hashes: dict[int, dict[int, bytes]] = {}
        self._masked: dict[int, tuple[int, ...]] = {}
        self._unmasking: Unmasking | None = None
        # Dealer -> the members that say they cannot use its shares.
        self._refusers: dict[int, set[int]] = {}
        self.failure = ""
        """Why there is no sum; empty as long as there may be one."""
        self.dropped: set[str] = set()
        """Members that dropped out."""
        self.sums: tuple[int, ...] | None = None
        """For each direction the sum of the survivors' integers, once it is known."""

    @property
    def attempt(self) -> int:
        """The attempt's number in this start of the coordinator."""
        return self._context.attempt

    @property
    def members(self) -> frozenset[int]:
        """Slots of the members that have not dropped out."""
        return frozenset(self._left)

    @property
    def survivors(self) -> tuple[int, ...]:
        """Slots that the sum is of, ascending; empty before the last step."""
        return tuple(sorted(self._masked)) if self._step == _UNMASKING else ()

    @property
    def is_busy(self) -> bool:
        """Whether there is something to compute: call `work` until there is not."""
        return self._unmasking is not None and self._unmasking.is_busy and not self.failure

    @property
    def wrong(self) -> dict[str, str]:
        """Member -> what is wrong with its shares, as the end of a sentence.

        It is proven, but for shares that others say they cannot use: then either that member lies,
        or more of the others than may be missing from a sum.
        """
        found = {} if self._unmasking is None else self._unmasking.wrong
        spare = len(self._peers) - max(self._wanted, self._config.sum_threshold(len(self._peers)))
        refused = {
            dealer: f"dealt shares that {len(refusers)} of the {len(self._peers) - 1} other "
            "members say they cannot use"
            for dealer, refusers in self._refusers.items()
            if len(refusers) > max(spare, 1)
        }
        return {self._members[slot]: said for slot, said in sorted((refused | found).items())}

    @property
    def refusers(self) -> frozenset[str]:
        """Members that dropped out because of shares which `wrong` names."""
        wrong = self.wrong
        return frozenset(
            self._members[refuser]
            for dealer, refusers in self._refusers.items()
            if self._members[dealer] in wrong
            for refuser in refusers
        )

    # ------------------------------------------------------------ what happens

    def asks(self, workers: Iterable[str] | None = None) -> tuple[AskSum, ...]:
        """What the members whose reply to this step is missing are asked, or some of them."""
        wanted = None if workers is None else set(workers)
        return tuple(
            AskSum(worker, self._ticket(slot), self.attempt, self._step_for(slot))
            for slot, worker in self._left.items()
            if slot not in self._replies and (wanted is None or worker in wanted)
        )

    def joined(self, worker: str) -> tuple[AskSum, ...]:
        """A member is there again; returns what it is asked."""
        self._silent.discard(worker)
        return self.asks((worker,))

    def lost(self, worker: str) -> None:
        """A member's session ended: nobody waits for its reply, unless it comes back in time."""
        self._silent.add(worker)

    def refused(self, worker: str, useless_shares_of: Sequence[int] = ()) -> None:
        """A member takes no part any more, perhaps because of shares that others have dealt."""
        for slot in [slot for slot, name in self._left.items() if name == worker]:
            if slot not in self._replies:
                self._drop(slot)
                for dealer in useless_shares_of if self._step == _MASKING else ():
                    if dealer in self._givers and dealer != slot:
                        self._refusers.setdefault(dealer, set()).add(slot)

    def take(self, event: SumReceived) -> None:
        """Take a member's reply.

        Raises `SecureSumError` if it is none to this step, and changes nothing then. A repeated
        reply, or one to another attempt, changes nothing.
        """
        slot, step = event.ticket.slot, event.step
        is_now = event.attempt == self.attempt and event.ticket == self._ticket(slot)
        if not is_now or self._left.get(slot) != event.worker:
            return  # It crossed the attempt's end, or the member dropped out.
        if type(step) is not _REPLIES[self._step]:
            if type(step) in _REPLIES[: self._step]:
                return  # A repetition.
            raise self._error(event, "that step is not due")
        if slot in self._replies:
            return
        self._check(slot, event)
        self._replies[slot] = step
        if self._unmasking is not None and isinstance(step, SharesRevealed):
            self._unmasking.reveal(slot, dict(step.shares))
        if event.key:
            self._signing_keys[slot] = event.key

    def advance(self, now_ms: int) -> bool:
        """End the step if nobody is waited for any more; returns whether the next one began.

        `asks` then says what to send. In the last step, `survivors` must be durable before that.
        """
        if self.failure or self.sums is not None:
            return False
        missing = [slot for slot in self._left if slot not in self._replies]
        overdue = now_ms >= self._ends_at_ms
        if self._unmasking is not None:
            self._go_on_unmasking(self._unmasking, overdue, missing)
            return False
        if not overdue and any(self._left[slot] not in self._silent for slot in missing):
            return False
        for slot in missing:
            self._drop(slot)
        wanted = self._wanted
        if self._step:
            wanted = max(wanted, self._config.sum_threshold(len(self._peers)))
        if len(self._left) < wanted:
            self.failure = f"{len(self._left)} members are left, and it takes {wanted}"
            return False
        self._keep_replies()
        self._step += 1
        self._replies = {}
        self._ends_at_ms = self._end_after(now_ms)
        return True

    def work(self) -> None:
        """Compute a little, for some milliseconds, while it `is_busy`."""
        if self._unmasking is not None and self.is_busy:
            self._unmasking.work()
            self._end_unmasking(self._unmasking)

    # ------------------------------------------------------------ small parts

    def _end_after(self, now_ms: int) -> int:
        return now_ms + min(self._config.deadline_ms, STEP_MS)

    def _ticket(self, slot: int) -> Ticket:
        return Ticket(self._context.epoch, self._context.round, slot)

    def _drop(self, slot: int) -> None:
        self.dropped.add(self._left.pop(slot))

    def _error(self, event: SumReceived, why: str) -> SecureSumError:
        return SecureSumError(
            f"Worker {event.worker} took the step {type(event.step).__name__} of attempt "
            f"{event.attempt} at the sum of round {event.ticket.round}, but {why}; drop it."
        )

    def _step_for(self, slot: int) -> StepDown:
        match self._step:
            case 0:
                return KeysWanted()
            case 1:
                return PeersNamed(self._peers)
            case 2:
                sealed = tuple(
                    (dealer, dealt[slot])
                    for dealer, dealt in self._shares.items()
                    if dealer != slot
                )
                nothing, found = {slot: b""}, self._hashes
                hashes = tuple(found.get(dealer, nothing)[slot] for dealer, _ in sealed)
                return SharesDelivered(sealed, hashes if found else ())
            case _:
                return UnmaskingWanted(self.survivors)

    def _check(self, slot: int, event: SumReceived) -> None:
        """Refuse a reply that does not fit the step that was asked for."""
        match event.step:
            case KeysGiven(cipher_key, mask_key):
                others = [keys for keys in self._replies.values() if isinstance(keys, KeysGiven)]
                taken = {key for keys in others for key in (keys.cipher_key, keys.mask_key)}
                if taken & {cipher_key, mask_key} or cipher_key == mask_key:
                    raise self._error(event, "another member has its key")
                if not (is_public_key(cipher_key) and is_public_key(mask_key)):
                    raise self._error(event, "its key is no one's")
            case SharesGiven(sealed, hashes):
                receivers = [peer.slot for peer in self._peers if peer.slot != slot]
                if [receiver for receiver, _ in sealed] != receivers:
                    raise self._error(event, "it has no shares for some member")
                if hashes and len(hashes) != len(self._peers):
                    raise self._error(event, "it has no hashes of some member's shares")
            case MaskedGiven(values):
                if len(values) != self._context.directions:
                    raise self._error(event, f"it holds {len(values)} numbers")
            case SharesRevealed(shares):
                if [giver for giver, _ in shares] != list(self._givers):
                    raise self._error(event, "it reveals no share of some member")

    def _keep_replies(self) -> None:
        replies = dict(sorted(self._replies.items()))
        match self._step:
            case 0:
                self._peers = tuple(
                    Peer(slot, self._members[slot], keys, self._signing_keys.get(slot, b""))
                    for slot, keys in replies.items()
                    if isinstance(keys, KeysGiven)
                )
                self._transcript = transcript_of(self._context, self._peers)
            case 1:
                self._shares = {
                    slot: dict(given.sealed)
                    for slot, given in replies.items()
                    if isinstance(given, SharesGiven)
                }
                self._givers = tuple(self._shares)
                slots = [peer.slot for peer in self._peers]
                self._hashes = {
                    slot: dict(zip(slots, given.hashes, strict=True))
                    for slot, given in replies.items()
                    if isinstance(given, SharesGiven) and given.hashes
                }
            case _:
                self._masked = {
                    slot: masked.values
                    for slot, masked in replies.items()
                    if isinstance(masked, MaskedGiven)
                }
                self._unmasking = Unmasking(
                    self._peers,
                    self._transcript,
                    self._config.sum_threshold(len(self._peers)),
                    self._hashes,
                    self._masked,
                    self._givers,
                )

    # ------------------------------------------------------------ unmasking

    def _go_on_unmasking(self, unmasking: Unmasking, overdue: bool, missing: Sequence[int]) -> None:
        """Begin to take the masks off as soon as that can be; find that it cannot be any more."""
        threshold = self._config.sum_threshold(len(self._peers))
        if unmasking.right >= threshold:
            if not unmasking.is_busy:
                unmasking.work()
                self._end_unmasking(unmasking)
        elif overdue or unmasking.right + len(missing) < threshold:
            self.dropped |= {self._left[slot] for slot in missing}
            self.failure = (
                f"{unmasking.right} members revealed shares that fit, and it takes {threshold}"
            )

    def _end_unmasking(self, unmasking: Unmasking) -> None:
        self.failure = unmasking.failure
        if unmasking.totals is None:
            return
        most = levels_of(self._config) * len(self._masked)
        half = MODULUS // 2
        sums = tuple((total + half) % MODULUS - half for total in unmasking.totals)
        if max(map(abs, sums)) > most:
            self.failure = "a member added more than the clip allows"
            return
        self.sums = sums
