"""Both machines of a hidden sum against each other: dropouts, refusals, and what nobody learns."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo_core.config import RunConfig, TaskConfig, parse_run
from fedmezo_core.errors import ConfigError, ProtocolError, SecureSumError
from fedmezo_core.events import (
    AskSum,
    KeysGiven,
    KeysWanted,
    MaskedGiven,
    PeersNamed,
    SendSumStep,
    SharesDelivered,
    SharesGiven,
    SharesRevealed,
    StepDown,
    SumAsked,
    SumReceived,
    Ticket,
    UnmaskingWanted,
)
from fedmezo_core.machines.seeds import seeds_of
from fedmezo_core.records import Genesis
from fedmezo_core.trust.secure_aggregation import sum_memory, unmasking
from fedmezo_core.trust.secure_aggregation.fixed_point import quantised
from fedmezo_core.trust.secure_aggregation.masking import (
    MemberSecrets,
    SumContext,
    run_digest_of,
)
from fedmezo_core.trust.secure_aggregation.secure_member import SecureMember
from fedmezo_core.trust.secure_aggregation.sum_collector import STEP_MS, SumCollector
from fedmezo_core.trust.secure_aggregation.sum_memory import SumMemory

BASE: dict[str, Any] = {
    "run_id": "test",
    "model": "none",
    "task": TaskConfig(verbalizers={"no": "no", "yes": "yes"}),
    "local_steps": 3,
    "learning_rate": 0.5,
    "secure_aggregation": True,
}
EPOCH, ROUND = 4, 7
_SMALL = KeysGiven(bytes(32), b"\x01" + bytes(31), b"h" * 32)


def config_of(**values: Any) -> RunConfig:
    return parse_run(BASE | values, "here")


def genesis_of(config: RunConfig) -> Genesis:
    return Genesis(config, b"m" * 32, b"b" * 32, b"t" * 32, 8, 32)


class Federation:
    """One attempt; `lets` says whether a member's reply to a step arrives."""

    def __init__(
        self,
        count: int,
        *,
        attempt: int = 1,
        members: dict[int, SecureMember] | None = None,
        slots: Iterable[int] | None = None,
        keys: dict[int, Ed25519PrivateKey] | None = None,
        memories: Sequence[SumMemory] | None = None,
        **values: Any,
    ) -> None:
        self.config = config_of(cohort_size_max=8, **values)
        self.genesis = genesis_of(self.config)
        self.keys = keys or {}
        self.slots = list(slots if slots is not None else range(count))
        self.members = members or {
            slot: SecureMember(
                self.genesis,
                f"w{slot}",
                self.public_key(slot),
                None if memories is None else memories[slot],
            )
            for slot in self.slots
        }
        self.attempt = attempt
        context = SumContext(run_digest_of(self.genesis), EPOCH, ROUND, attempt, 3)
        named = {slot: f"w{slot}" for slot in self.slots}
        self.collector = SumCollector(self.config, context, named, 0)
        self.seen: list[tuple[AskSum, SendSumStep]] = []
        self.refusals: list[str] = []

    def public_key(self, slot: int) -> bytes:
        key = self.keys.get(slot)
        return b"" if key is None else key.public_key().public_bytes_raw()

    def grads(self, slot: int) -> tuple[float, ...]:
        dice = random.Random(slot)
        return tuple(dice.uniform(-90, 90) for _ in range(3))

    def answer(self, ask: AskSum) -> SendSumStep:
        slot = ask.ticket.slot
        entropy = random.Random(1000 * self.attempt + slot).randbytes(32)
        asked = SumAsked(ask.ticket, ask.attempt, ask.step, entropy)
        sent = self.members[slot].step(asked, self.grads(slot))
        if isinstance(sent.step, KeysGiven) and slot in self.keys:
            signature = self.keys[slot].sign(sent.text_to_sign)
            sent = dataclasses.replace(
                sent, step=dataclasses.replace(sent.step, signature=signature)
            )
        return sent

    def take(self, ask: AskSum, sent: SendSumStep) -> None:
        slot = ask.ticket.slot
        key = self.public_key(slot) if isinstance(sent.step, KeysGiven) else b""
        self.collector.take(SumReceived(f"w{slot}", sent.ticket, sent.attempt, sent.step, key))

    def run(
        self,
        lets: Callable[[int, int], bool] = lambda _step, _slot: True,
        change: Callable[[SendSumStep], SendSumStep] = lambda sent: sent,
        steps: int = 4,
    ) -> SumCollector:
        now_ms = 0
        for number in range(steps):
            for ask in self.collector.asks():
                if not lets(number, ask.ticket.slot):
                    continue
                try:
                    sent = self.answer(ask)
                except SecureSumError as error:
                    self.refusals.append(str(error))
                    self.collector.refused(ask.worker, error.useless_shares_of)
                    continue
                self.seen.append((ask, sent))
                self.take(ask, change(sent))
            now_ms += STEP_MS
            began = self.collector.advance(now_ms)
            if self.collector.failure:
                break
            assert began == (number < 3)
        return self.collector

    def plain_sum(self, slots: Iterable[int]) -> tuple[int, ...]:
        columns = zip(*(quantised(self.grads(s), self.config) for s in slots), strict=True)
        return tuple(map(sum, columns))


@pytest.mark.parametrize("count", [3, 4, 6])
def test_every_choice_of_dropouts_gives_the_exact_sum_or_nothing(count: int) -> None:
    """Each member stays or leaves before one of the steps; few enough: the sum of the others."""
    threshold = config_of(cohort_size_max=count).sum_threshold(count)
    choices = list(itertools.product(range(5), repeat=count))
    for choice in choices if count < 4 else random.Random(1).sample(choices, 100):
        federation = Federation(count)
        collector = federation.run(lambda step, slot, c=choice: step < c[slot])  # type: ignore[misc]
        left = [sum(leaves > step for leaves in choice) for step in range(4)]
        keyed = left[0]
        wanted = max(3, federation.config.sum_threshold(keyed))
        is_whole = left[0] >= 3 and min(left[1:3]) >= wanted
        if is_whole and left[3] >= federation.config.sum_threshold(keyed):
            survivors = [slot for slot in range(count) if choice[slot] > 2]
            assert collector.survivors == tuple(survivors)
            assert collector.sums == federation.plain_sum(survivors)
        else:
            assert collector.sums is None
            assert collector.failure
    assert threshold > count / 2


@pytest.mark.parametrize("percent", [50, 66, 99])
@pytest.mark.parametrize("members", [3, 4, 10, 511, 512])
def test_more_than_half_unmask(percent: int, members: int) -> None:
    threshold = config_of(secure_threshold_percent=percent).sum_threshold(members)
    assert members / 2 < threshold <= members


def test_no_member_reveals_both_secrets_of_anyone() -> None:
    """And what is asked for is one kind of each: so t > n / 2 keeps the other kind unknown."""
    federation = Federation(6)
    federation.run(lambda step, slot: step < 2 or slot != 5)
    revealed = [sent.step for _, sent in federation.seen if isinstance(sent.step, SharesRevealed)]
    assert len(revealed) == 5
    for step in revealed:
        assert [slot for slot, _ in step.shares] == list(range(6))


def ask_of(federation: Federation, slot: int, step: StepDown) -> SendSumStep:
    ticket = Ticket(EPOCH, ROUND, slot)
    return federation.answer(AskSum(f"w{slot}", ticket, federation.attempt, step))


def test_a_step_has_one_reply_and_another_step_of_its_kind_none() -> None:
    federation = Federation(4)
    federation.run()
    for ask, sent in federation.seen:
        again = federation.answer(ask)
        assert again.step == sent.step or isinstance(sent.step, KeysGiven)
    steps = {type(ask.step): ask.step for ask, _ in federation.seen if ask.ticket.slot == 0}
    changed: list[StepDown] = [
        PeersNamed(steps[PeersNamed].peers[:3]),  # type: ignore[union-attr]
        SharesDelivered(steps[SharesDelivered].sealed[:2]),  # type: ignore[union-attr]
        UnmaskingWanted((0, 1, 2)),
    ]
    for step in changed:
        with pytest.raises(SecureSumError, match="was another one"):
            ask_of(federation, 0, step)


def test_a_member_helps_to_unmask_one_sum_a_round() -> None:
    """Two sums of a round with other members could be subtracted."""
    first = Federation(4)
    assert first.run().sums is not None
    second = Federation(3, members=first.members, attempt=2, slots=[0, 1, 2])
    assert second.run().sums is None
    assert all("already" in refusal for refusal in second.refusals)
    assert len(second.refusals) == 3


@pytest.mark.parametrize("run_id", ["test", "again"])
def test_members_made_anew_in_the_same_process_help_to_unmask_no_second_sum(run_id: str) -> None:
    """A coordinator can have sessions, models and runs begun anew; the process does not forget."""
    memories = [SumMemory() for _ in range(4)]
    first = Federation(4, memories=memories)
    assert first.run().sums is not None
    second = Federation(3, attempt=2, memories=memories, run_id=run_id)
    assert second.run().sums is None
    assert all("already" in refusal for refusal in second.refusals)
    assert len(second.refusals) == 3


def test_an_older_round_is_not_unmasked_after_a_newer_one() -> None:
    memory, numbers = SumMemory(), b"n" * 32
    memory.reveal(numbers, ROUND)
    for round_ in (1, ROUND - 1, ROUND):
        assert memory.is_revealed(numbers, round_)
        with pytest.raises(SecureSumError, match="already"):
            memory.reveal(numbers, round_)
    memory.reveal(numbers, ROUND + 1)


def test_a_full_memory_reveals_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """It forgets no round to remember another."""
    monkeypatch.setattr(sum_memory, "NUMBERS_KNOWN_MAX", 1)
    memory = SumMemory()
    memory.reveal(b"n" * 32, 1)
    with pytest.raises(SecureSumError, match="restart it"):
        memory.reveal(b"o" * 32, 1)
    memory.reveal(b"n" * 32, 2)


def test_an_attempt_that_was_not_unmasked_may_be_made_again() -> None:
    first = Federation(4)
    assert first.run(lambda step, slot: step < 2 or slot < 2).sums is None
    second = Federation(3, members=first.members, attempt=2, slots=[0, 1, 2])
    assert second.run().sums == second.plain_sum([0, 1, 2])


def test_an_older_attempt_is_refused() -> None:
    members = Federation(4, attempt=2)
    members.run(lambda step, _slot: step < 1)
    older = Federation(4, members=members.members, attempt=1)
    older.run()
    assert len(older.refusals) == 4
    assert older.collector.sums is None


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (lambda named: PeersNamed(named.peers[:2]), "too few"),
        (lambda named: PeersNamed(named.peers[1:]), "own keys"),
        (lambda named: PeersNamed((*named.peers[:3], named.peers[2])), "twice"),
        (lambda named: PeersNamed(_with_keys(named.peers, 3, named.peers[2].keys)), "same key"),
        (lambda named: PeersNamed(_with_keys(named.peers, 3, _SMALL)), "no one's"),
    ],
)
def test_peers_that_cannot_be_are_refused(
    step: Callable[[PeersNamed], PeersNamed], why: str
) -> None:
    federation = Federation(4)
    federation.run(steps=1)
    named = named_by(federation)
    with pytest.raises(SecureSumError, match=why):
        ask_of(federation, 0, step(named))


def _with_keys(peers: Sequence[Any], slot: int, keys: KeysGiven) -> tuple[Any, ...]:
    return tuple(dataclasses.replace(p, keys=keys) if p.slot == slot else p for p in peers)


def named_by(federation: Federation) -> PeersNamed:
    """The members' keys, as an honest coordinator names them."""
    step = federation.collector.asks()[0].step
    assert isinstance(step, PeersNamed)
    return step


def test_survivors_that_are_too_few_or_without_oneself_are_refused() -> None:
    for survivors, why in [((0, 1), "too few"), ((1, 2, 3), "without this"), ((0, 1, 9), "no mem")]:
        federation = Federation(4)
        federation.run(lambda step, _slot: step < 3)
        with pytest.raises(SecureSumError, match=why):
            ask_of(federation, 0, UnmaskingWanted(survivors))


def test_shares_from_someone_else_are_refused() -> None:
    federation = Federation(4)
    federation.run(steps=2)
    ask = next(a for a in federation.collector.asks() if a.ticket.slot == 0)
    assert isinstance(ask.step, SharesDelivered)
    (one, sealed), (two, other), third = ask.step.sealed
    swapped = SharesDelivered(((one, other), (two, sealed), third))
    with pytest.raises(SecureSumError, match="cannot be decrypted"):
        ask_of(federation, 0, swapped)


def test_steps_out_of_turn_are_refused() -> None:
    federation = Federation(4)
    with pytest.raises(SecureSumError, match="not the one"):
        ask_of(federation, 0, UnmaskingWanted((0, 1, 2)))
    ask_of(federation, 0, KeysWanted())
    with pytest.raises(SecureSumError, match="out of turn"):
        ask_of(federation, 0, UnmaskingWanted((0, 1, 2)))


# ---------------------------------------------------------------- whose shares are wrong


def revealing_zeros(*slots: int) -> Callable[[SendSumStep], SendSumStep]:
    """These members reveal wrong shares."""

    def lie(sent: SendSumStep) -> SendSumStep:
        if sent.ticket.slot not in slots or not isinstance(sent.step, SharesRevealed):
            return sent
        shares = tuple((dealer, bytes(33)) for dealer, _ in sent.step.shares)
        return dataclasses.replace(sent, step=SharesRevealed(shares))

    return lie


def without_hashes(*slots: int) -> Callable[[SendSumStep], SendSumStep]:
    """These members are of a version that says nothing of the shares that it deals."""

    def older(sent: SendSumStep) -> SendSumStep:
        if sent.ticket.slot not in slots or not isinstance(sent.step, SharesGiven):
            return sent
        return dataclasses.replace(sent, step=SharesGiven(sent.step.sealed))

    return older


@pytest.mark.parametrize("liar", range(5))
@pytest.mark.parametrize("gone", [False, True])
def test_who_reveals_wrong_shares_is_named_and_the_sum_comes_out(liar: int, gone: bool) -> None:
    """Of six members four unmask; for one that dropped out, shares of its mask key are revealed."""
    federation = Federation(6, secure_threshold_percent=50)
    collector = federation.run(
        lambda step, slot: not gone or step < 2 or slot != 5, revealing_zeros(liar)
    )
    assert collector.sums == federation.plain_sum(range(5 if gone else 6))
    assert collector.wrong == {f"w{liar}": "revealed other shares than it was dealt: 6"}


def test_too_many_that_reveal_wrong_shares_leave_no_sum_and_are_named() -> None:
    collector = Federation(4).run(change=revealing_zeros(0, 2))
    assert collector.sums is None
    assert collector.failure == "2 members revealed shares that fit, and it takes 3"
    assert collector.wrong.keys() == {"w0", "w2"}


def test_a_single_wrong_share_is_found_and_names_its_revealer() -> None:
    def lie(sent: SendSumStep) -> SendSumStep:
        if sent.ticket.slot != 2 or not isinstance(sent.step, SharesRevealed):
            return sent
        (first, share), *rest = sent.step.shares
        wrong = bytes([share[0] ^ 1]) + share[1:]
        return dataclasses.replace(sent, step=SharesRevealed(((first, wrong), *rest)))

    federation = Federation(4)
    collector = federation.run(change=lie)
    assert collector.sums == federation.plain_sum(range(4))
    assert collector.wrong == {"w2": "revealed other shares than it was dealt: 1"}


class BadDealer(MemberSecrets):
    """Deals shares of another secret to some points, and says the truth about each share."""

    def __init__(self, entropy: bytes, wrong_points: set[int]) -> None:
        super().__init__(entropy)
        self.wrong_points = wrong_points

    def split(self, threshold: int, points: Sequence[int]) -> list[tuple[bytes, bytes]]:
        right = super().split(threshold, points)
        other = MemberSecrets(b"other" + bytes(27)).split(threshold, points)
        return [
            other[n] if point in self.wrong_points else right[n] for n, point in enumerate(points)
        ]


@pytest.mark.parametrize("wrong_points", [{1}, {2}, {3, 4}, {1, 2, 3, 4, 5}])
def test_who_deals_shares_that_do_not_belong_together_is_named(
    wrong_points: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No honest member is: each has revealed what it was dealt."""
    federation = Federation(5)
    bad = federation.members[3]
    begin = bad._begin

    def begin_badly(event: SumAsked) -> Any:
        attempt = begin(event)
        attempt.secrets = BadDealer(event.entropy, wrong_points)
        return attempt

    monkeypatch.setattr(bad, "_begin", begin_badly)
    collector = federation.run()
    assert collector.sums is None
    assert collector.failure == "the shares of worker w3 do not fit"
    assert collector.wrong == {"w3": "dealt shares that do not give its secret"}


@pytest.mark.parametrize("what", ["shares", "hashes"])
def test_shares_that_others_cannot_use_name_their_dealer(what: str) -> None:
    """As soon as more say so than may be missing from a sum."""

    def deal_badly(sent: SendSumStep) -> SendSumStep:
        if sent.ticket.slot or not isinstance(sent.step, SharesGiven):
            return sent
        sealed, hashes = sent.step.sealed, sent.step.hashes
        if what == "shares":
            sealed = tuple((slot, bytes(len(text))) for slot, text in sealed)
        else:
            hashes = tuple(bytes(len(hashed)) for hashed in hashes)
        return dataclasses.replace(sent, step=SharesGiven(sealed, hashes))

    collector = Federation(4).run(change=deal_badly)
    assert collector.sums is None
    said = "dealt shares that 3 of the 3 other members say they cannot use"
    assert collector.wrong == {"w0": said}
    assert collector.refusers == {"w1", "w2", "w3"}


def test_one_that_says_it_cannot_use_shares_names_nobody_and_is_left_out() -> None:
    federation = Federation(4)
    federation.run(steps=2)
    collector = federation.collector
    collector.refused("w3", (0, 1, 2, 3, 77))
    for ask in collector.asks():
        federation.take(ask, federation.answer(ask))
    assert collector.advance(0)
    assert collector.wrong == {}
    for ask in collector.asks():
        federation.take(ask, federation.answer(ask))
    collector.advance(0)
    assert collector.sums == federation.plain_sum(range(3))


def test_shares_are_no_use_only_where_they_are_delivered() -> None:
    """Whoever leaves at another step has seen none."""
    federation = Federation(5)
    federation.run(steps=1)
    for worker in ("w1", "w2", "w3"):
        federation.collector.refused(worker, (0,))
    assert federation.collector.wrong == {}


@pytest.mark.parametrize("older", [(0,), (0, 1, 2), (0, 1, 2, 3)])
def test_older_members_take_part_and_nobody_is_blamed_for_them(older: tuple[int, ...]) -> None:
    federation = Federation(4)
    collector = federation.run(change=without_hashes(*older))
    assert collector.sums == federation.plain_sum(range(4))
    assert collector.wrong == {}


def test_an_older_member_that_reveals_wrong_shares_is_not_named() -> None:
    """It does not compare what it was dealt with what was announced, so its dealers may lie."""
    older, lie = without_hashes(1), revealing_zeros(1)
    federation = Federation(4)
    collector = federation.run(change=lambda sent: lie(older(sent)))
    assert collector.sums == federation.plain_sum(range(4))
    assert collector.wrong == {}


def test_wrong_shares_among_older_members_alone_leave_no_sum_and_name_nobody() -> None:
    older, lie = without_hashes(0, 1, 2, 3), revealing_zeros(1)
    collector = Federation(4).run(change=lambda sent: lie(older(sent)))
    assert collector.sums is None
    assert "do not fit" in collector.failure
    assert collector.wrong == {}


def test_hashes_for_other_members_than_there_are_are_refused() -> None:
    federation = Federation(4)
    federation.run(steps=1)
    ask = federation.collector.asks()[0]
    sent = federation.answer(ask)
    assert isinstance(sent.step, SharesGiven)
    step = SharesGiven(sent.step.sealed, sent.step.hashes[1:])
    with pytest.raises(SecureSumError, match="no hashes"):
        federation.take(ask, dataclasses.replace(sent, step=step))


def test_a_member_that_adds_more_than_the_clip_allows_is_noticed() -> None:
    """If the others leave room for it; a sum that is within the bound tells of nobody."""

    def push(sent: SendSumStep) -> SendSumStep:
        if sent.ticket.slot or not isinstance(sent.step, MaskedGiven):
            return sent
        values = tuple((value + 2**31) % 2**32 for value in sent.step.values)
        return dataclasses.replace(sent, step=MaskedGiven(values))

    collector = Federation(4).run(change=push)
    assert collector.sums is None
    assert "more than the clip" in collector.failure


def test_the_collector_takes_no_step_that_does_not_fit() -> None:
    federation = Federation(4)
    ask = federation.collector.asks()[0]
    sent = federation.answer(ask)
    federation.take(ask, sent)
    federation.take(ask, sent)
    assert isinstance(sent.step, KeysGiven)
    other = federation.collector.asks()[0]
    with pytest.raises(SecureSumError, match="another member has its key"):
        federation.take(other, sent := dataclasses.replace(sent, ticket=other.ticket))
    with pytest.raises(SecureSumError, match="not due"):
        federation.take(other, dataclasses.replace(sent, step=MaskedGiven((1, 2, 3))))
    federation.take(other, dataclasses.replace(sent, attempt=2))
    assert federation.collector.asks()[0] == other
    with pytest.raises(SecureSumError, match="no one's"):
        federation.take(other, dataclasses.replace(sent, step=_SMALL))


@pytest.mark.parametrize("gone", [False, True])
def test_the_masks_of_many_are_taken_off_in_small_steps(
    gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unmasking, "MASKS_A_STEP", 2)
    federation = Federation(6)
    collector = federation.run(lambda step, slot: not gone or step < 2 or slot != 5)
    count = 0
    while collector.is_busy:
        assert collector.sums is None
        assert not collector.advance(10 * STEP_MS), "what is computed is not given up"
        collector.work()
        count += 1
    assert count >= (10 if gone else 6) // 2
    assert collector.sums == federation.plain_sum(range(5 if gone else 6))
    assert not collector.failure


# ---------------------------------------------------------------- signatures


def signing_keys(count: int) -> dict[int, Ed25519PrivateKey]:
    return {n: Ed25519PrivateKey.from_private_bytes(bytes([n + 1]) * 32) for n in range(count)}


def test_signed_keys_are_checked_by_every_member() -> None:
    federation = Federation(4, keys=signing_keys(4))
    assert federation.run().sums == federation.plain_sum(range(4))


def test_keys_that_the_coordinator_changed_are_refused() -> None:
    """It cannot put itself between two members that sign."""
    federation = Federation(4, keys=signing_keys(4))
    fake = random.Random(9).randbytes(32)

    def replace_mask_key(sent: SendSumStep) -> SendSumStep:
        if sent.ticket.slot != 3 or not isinstance(sent.step, KeysGiven):
            return sent
        return dataclasses.replace(sent, step=dataclasses.replace(sent.step, mask_key=fake))

    assert federation.run(change=replace_mask_key).sums is None
    assert sum("not signed by its key" in refusal for refusal in federation.refusals) == 3


def test_a_name_keeps_its_key() -> None:
    first = Federation(4, keys=signing_keys(4))
    first.run(lambda step, _slot: step < 2)
    keys = signing_keys(4) | {3: Ed25519PrivateKey.from_private_bytes(b"x" * 32)}
    second = Federation(4, keys=keys, attempt=2, members=dict(first.members))
    second.members[3] = SecureMember(second.genesis, "w3", second.public_key(3))
    assert second.run().sums is None
    assert sum("another key than before" in refusal for refusal in second.refusals) == 3


def test_a_name_keeps_its_key_from_run_to_run() -> None:
    memories = [SumMemory() for _ in range(4)]
    Federation(4, keys=signing_keys(4), memories=memories).run(lambda step, _slot: step < 2)
    keys = signing_keys(4) | {3: Ed25519PrivateKey.from_private_bytes(b"x" * 32)}
    second = Federation(4, keys=keys, memories=memories, run_id="again", seed=2)
    assert second.run().sums is None
    assert sum("another key than before" in refusal for refusal in second.refusals) == 3


# ---------------------------------------------------------------- what contracts allow


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"seed_policy": "per_worker"}, "seed_policy"),
        ({"seed_policy": "pool"}, "seed_policy"),
        ({"aggregation": "median"}, "aggregation"),
        ({"clip_median_factor": 1.0}, "clip_median_factor"),
        ({"report_losses": True}, "report_losses"),
        ({"personal_rate": "random"}, "personal_rate"),
        ({"weighting": "rows"}, "weighting"),
        ({"buffer_answers": 4}, "buffer_answers"),
        ({"quorum": 2}, "quorum"),
        ({"workers_min": 1}, "workers_min"),
        ({"secure_cohort_min": 2}, "secure_cohort_min"),
        ({"secure_threshold_percent": 49}, "secure_threshold_percent"),
        ({"cohort_size_max": 513}, "cohort_size_max"),
    ],
)
def test_what_cannot_work_with_it_is_refused(values: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        config_of(**values)


def test_a_new_run_gets_what_it_needs() -> None:
    config = config_of(secure_cohort_min=5)
    assert (config.seed_policy, config.aggregation) == ("shared", "mean")
    assert (config.clip_median_factor, config.projected_grad_abs_max) == (0.0, 100.0)
    assert (config.workers_min, config.quorum) == (5, 5)
    assert config.recipe.endswith(" secure")


def test_directions_of_another_round_are_refused() -> None:
    federation = Federation(3)
    member, config = federation.members[0], federation.config
    member.check_seeds(ROUND, seeds_of(config, ROUND, 0, None))
    with pytest.raises(ProtocolError, match="other directions"):
        member.check_seeds(ROUND, seeds_of(config, ROUND + 1, 0, None))
