"""Who reads what a run says of single workers, over real mutual TLS and without identities."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.serving.status_report import hide_others
from fedmezo_core.errors import ForbiddenError, SignatureError
from fedmezo_core.journal.codec import decode_record
from fedmezo_core.journal.journal import ZERO_HASH
from fedmezo_core.records import Admitted, Answered, Committed, Genesis
from fedmezo_core.trust.authorisation import Role
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.fleets import ServedFleet, served_fleet
from tests.integration.support.harness import (
    answer_to,
    config_of,
    genesis_of,
    records_of,
    scripted_workers,
    served,
)

ROUNDS = 2


def run_of(readers: str) -> Genesis:
    values: dict[str, Any] = {"rounds": ROUNDS, "workers_min": 2, "quorum": 2}
    return genesis_of(
        config_of(**values, report_losses=False, journal_readers=readers, local_steps=1)
    )


async def finish(at: ServedFleet) -> None:
    """Two members work to the end."""
    first, second = await at.member("w1"), await at.member("w2")
    async with at.worker(first) as one, at.worker(second) as two:
        await one.open()
        await two.open()
        await asyncio.gather(one.work_to_the_end(), two.work_to_the_end())


async def everything_of(client: CoordinatorClient) -> list[type]:
    return [
        type(decode_record(entry.record))
        async for page in client.journal_pages()
        for entry in page.entries
    ]


async def test_in_a_fleet_a_worker_reads_commits_and_its_own_status_alone(tmp_path: Path) -> None:
    async with served_fleet(tmp_path, run_of("observers")) as at:
        await finish(at)
        worker = await at.joined(await at.join_string("w3"), "w3")
        observer = await at.member("watcher", Role.OBSERVER)
        async with at.client(worker) as client:
            page = await client.read_journal(commits_only=True)
            found = [decode_record(entry.record) for entry in page.entries]
            assert [type(record) for record in found] == [Genesis] + [Committed] * ROUNDS
            assert {entry.chain for entry in page.entries} == {ZERO_HASH}
            with pytest.raises(
                ForbiddenError, match=r"use an observer's identity .* own `journal_copy`"
            ):
                await everything_of(client)
            told = str(await client.get_status()) + str(await client.get_run())
            assert "w1" not in told
            assert "w2" not in told
        for identity in (observer, at.operator):
            async with at.client(identity) as client:
                assert {Answered, Admitted} <= set(await everything_of(client))
                assert [w.worker for w in (await client.get_status()).workers] == ["w1", "w2"]


async def test_a_worker_reads_its_own_row_and_no_losses(tmp_path: Path) -> None:
    async with served_fleet(tmp_path, run_of("observers")) as at:
        await finish(at)
        async with at.client(await at.joined(await at.join_string("w4"), "w4")) as client:
            assert not (await client.get_status()).workers
        status = at.daemon.status("")
        assert len(status.recent_rounds) == ROUNDS
        assert not any(summary.HasField("mean_loss") for summary in status.recent_rounds)


SEEN_AS_IT_IS = {
    *("config", "phase", "round", "epoch", "records", "head", "evaluations", "trainable_bytes"),
    *("uptime_ms", "evaluation_due", "loop_lag_p99_ms", "sessions", "sessions_refused"),
}
"""Fields of the status that a worker may see: they say nothing of a single other worker."""
OWN_ALONE = {"workers", "digests", "divergences", "diverged_parties", "excluded"}
"""Fields of the status of which a worker may see its own entries."""
HIDDEN = {"reason", "replica_complaint", "recent_rounds"}
"""What a worker may not see; of `recent_rounds` it may see all but the mean loss."""
OWN_ROW = {
    *("worker", "connected", "rounds_answered", "bytes_up", "bytes_down", "mean_loss"),
    *("answered_after_ms", "diverged", "complaint", "measuring", "learning_rate"),
}
"""What a worker may see of its own row."""
OWN_ROW_HIDDEN = {"relative_size", "agreement", "suspicion"}
"""They compare it with the others, or tell an attacker when it is seen."""


def filled(message: Any, name: str) -> Any:
    """The message with something in each of its fields; texts are `name`."""
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None:
            found = getattr(message, field.name)
            filled(found.add() if field.label == field.LABEL_REPEATED else found, name)
        elif field.label == field.LABEL_REPEATED:
            continue
        elif field.type == field.TYPE_STRING:
            setattr(message, field.name, name)
        elif field.type == field.TYPE_BYTES:
            setattr(message, field.name, b"x")
        elif field.type != field.TYPE_ENUM:
            setattr(message, field.name, 1)
    return message


def names_in(message: Any) -> set[str]:
    return {field.name for field, _ in message.ListFields()}


def test_a_new_field_of_the_status_is_seen_by_workers_only_once_somebody_decides() -> None:
    decided = SEEN_AS_IT_IS | OWN_ALONE | HIDDEN
    assert {f.name for f in wire.GetStatusResponse.DESCRIPTOR.fields} == decided
    row = {f.name for f in wire.WorkerStatus.DESCRIPTOR.fields}
    assert row == OWN_ROW | OWN_ROW_HIDDEN


def test_of_a_whole_status_a_worker_sees_its_own_part() -> None:
    status = filled(wire.GetStatusResponse(phase=wire.PHASE_OPEN), "other")
    own = filled(wire.GetStatusResponse(), "own")
    for field in OWN_ALONE - {"diverged_parties"}:
        getattr(status, field).extend(getattr(own, field))
    status.diverged_parties.extend(["other", "own"])
    whole = wire.GetStatusResponse.FromString(status.SerializeToString())
    assert names_in(whole) == SEEN_AS_IT_IS | OWN_ALONE | HIDDEN
    assert names_in(whole.workers[1]) == OWN_ROW | OWN_ROW_HIDDEN

    hide_others(status, "own")

    for field in SEEN_AS_IT_IS:
        assert getattr(status, field) == getattr(whole, field)
    for field in OWN_ALONE - {"workers", "diverged_parties"}:
        assert list(getattr(status, field)) == list(getattr(own, field))
    assert list(status.diverged_parties) == ["own"]
    assert [names_in(row) for row in status.workers] == [OWN_ROW]
    assert status.reason == "an observer or operator can read why"
    assert not status.replica_complaint
    assert [names_in(summary) for summary in status.recent_rounds] == [{"round", "answers"}]


async def test_a_worker_does_not_read_whom_the_operator_excluded(tmp_path: Path) -> None:
    async with served_fleet(tmp_path, run_of("observers")) as at:
        members = [await at.member(name) for name in ("w1", "w2", "w3")]
        async with contextlib.AsyncExitStack() as stack:
            hands = [await stack.enter_async_context(at.worker(one)) for one in members]
            for hand in hands:
                await hand.open()
            async with at.client(at.operator) as operator:
                await operator.exclude_worker("w3", "its numbers are made up")
                assert [e.worker for e in (await operator.get_status()).excluded] == ["w3"]
            async with at.client(members[0]) as client:
                assert not (await client.get_status()).excluded
            async with at.client(members[2]) as client:
                assert [e.worker for e in (await client.get_status()).excluded] == ["w3"]


async def test_no_message_to_a_worker_names_another(tmp_path: Path) -> None:
    async with served_fleet(tmp_path, run_of("observers")) as at:
        names = ("first-worker", "second-worker")
        members = [await at.member(name) for name in names]
        async with at.worker(members[0]) as one, at.worker(members[1]) as two:
            await one.open()
            await two.open()
            assign = await one.assigned()
            await one.answer(assign)
            await one.answer(assign, projected_grads=[0.25])  # another answer
            await one.next("refused")
            await two.answer(await two.assigned())
            await one.next("commit")
            await one.answer(assign, projected_grads=[0.125])  # too late
            await one.next("refused")
            again = next(m.assign for m in reversed(one.received) if m.HasField("assign"))
            await one.answer(again, projected_grads=[1e9])  # beyond the clip
            await one.next("refused")
            await one.send(answer=answer_to(again))
            error = await one.ended()
            assert type(error) is SignatureError
            for told in (*one.received, error):
                assert "second-worker" not in str(told)
            assert sum(told.HasField("refused") for told in one.received) == 3


async def test_in_a_run_for_everyone_a_worker_reads_everything(tmp_path: Path) -> None:
    async with served_fleet(tmp_path, run_of("everyone")) as at:
        await finish(at)
        worker = await at.member("w3")
        async with at.client(worker) as client:
            assert Answered in await everything_of(client)
            assert [w.worker for w in (await client.get_status()).workers] == ["w1", "w2"]


async def test_without_identities_nobody_is_an_observer(tmp_path: Path) -> None:
    genesis = run_of("observers")
    async with (
        served(tmp_path / "journal.db", genesis) as at,
        scripted_workers(at.address, genesis, "w1", "w2") as hands,
    ):
        for hand in hands:
            await hand.open()
        await asyncio.gather(*(hand.work_to_the_end() for hand in hands))
        with pytest.raises(ForbiddenError):
            await everything_of(hands[0].client)
        assert not (await hands[0].client.get_status()).workers
        assert len((await hands[0].client.read_journal(commits_only=True)).entries) == ROUNDS + 1


def test_a_new_run_of_a_fleet_is_for_observers_unless_it_says_else(tmp_path: Path) -> None:
    run = {"template": "{text}", "verbalizers": {"a": " a", "b": " b"}}
    values: dict[str, Any] = {"model": "m", "run": {"run_id": "r", "task": run}}
    fleet = {**values, "state": tmp_path}
    assert _readers(values) == "everyone"
    assert _readers(fleet) == "observers"
    fleet["run"] = {**values["run"], "journal_readers": "everyone"}
    assert _readers(fleet) == "everyone"


def _readers(values: dict[str, Any]) -> str:
    return CoordinatorSettings.model_validate(values).run_config("here").journal_readers


# ---------------------------------------------------------------- signatures in a fleet


async def test_members_answers_are_signed_with_the_keys_that_they_joined_with(
    tmp_path: Path,
) -> None:
    async with served_fleet(tmp_path, run_of("observers")) as at:
        await finish(at)
    found = records_of(tmp_path / "journal.db")
    answers = [record for record in found if isinstance(record, Answered)]
    assert len(answers) == 2 * ROUNDS
    assert all(len(answer.signature) == 64 for answer in answers)
    assert sorted(r.worker for r in found if isinstance(r, Admitted)) == ["w1", "w2"]


async def test_a_member_with_another_key_or_none_is_told_so(tmp_path: Path) -> None:
    async with served_fleet(tmp_path, run_of("observers")) as at:
        member = await at.member("w1")
        for key in (b"", b"k" * 32):
            async with at.worker(member) as hand:
                with pytest.raises(SignatureError, match="start it with the state folder"):
                    await hand.open(signing_key=key)
