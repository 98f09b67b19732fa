"""The battery for coordinators: ours conforms, and each broken one is found out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo_coordinator import daemon
from fedmezo_coordinator.conformance.coordinator_battery import (
    CoordinatorBattery,
    CoordinatorTest,
    check_can_test,
)
from fedmezo_coordinator.conformance.report import CheckFailedError, Report
from fedmezo_coordinator.serving import loop
from fedmezo_core.errors import ConfigError, ProtocolError
from fedmezo_core.events import Assign, Ticket
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.signed_heads import Signer
from fedmezo_core.machines import rounds
from fedmezo_core.machines.seeds import seeds_of
from fedmezo_core.records import Answered, Record
from fedmezo_core.wire import admission
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.messages import message_to_pb
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import (
    PATIENCE_S,
    config_of,
    genesis_of,
    replica_digested,
    served,
)

RUN: dict[str, Any] = {"rounds": 9, "workers_min": 2, "quorum": 2, "digest_every_rounds": 2}
OF_FLEETS = "keeps the signatures of its members' answers"
"""A check that only a fleet's coordinator can pass."""


async def report_on(folder: Path, **changes: Any) -> Report:
    """What the battery says of our daemon, with a contract and whatever a test has broken."""
    config = config_of(**(RUN | changes))
    signer = Signer(Ed25519PrivateKey.generate())
    report = Report("coordinator")
    async with served(folder / "journal.db", genesis_of(config), signer=signer) as coordinator:
        test = CoordinatorTest(coordinator.address, patience_s=PATIENCE_S)
        await CoordinatorBattery(test, report).run()
    return report


async def test_a_run_without_rounds_left_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_run = CoordinatorBattery._get_run

    async def later(battery: CoordinatorBattery) -> wire.GetRunResponse:
        run = await get_run(battery)
        run.round = RUN["rounds"]
        return run

    monkeypatch.setattr(CoordinatorBattery, "_get_run", later)
    with pytest.raises(ConfigError, match="has 0 of its 9 rounds left, and the battery takes 4"):
        await report_on(tmp_path)


async def test_a_run_that_is_too_short_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 3 of its 3 rounds left.* rounds = 4 or more"):
        await report_on(tmp_path, rounds=3)


@pytest.mark.parametrize("digest_every_rounds", [1, 3, 5])
async def test_the_shortest_run_is_led_to_its_end(tmp_path: Path, digest_every_rounds: int) -> None:
    report = await report_on(tmp_path, rounds=4, digest_every_rounds=digest_every_rounds)
    assert not failed(report)
    other_digest = "sends a worker away whose digest differs"
    assert skipped(report) == {OF_FLEETS} | ({other_digest} if digest_every_rounds == 5 else set())


async def test_a_coordinator_that_takes_no_hello_is_reported_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks that need a worker's session are skipped when none could be opened."""

    async def fails(*_: Any, **__: Any) -> None:
        raise CheckFailedError("no welcome")

    monkeypatch.setattr(CoordinatorBattery, "_join", fails)
    report = Report("coordinator")
    async with served(tmp_path / "journal.db", genesis_of(config_of(**RUN))) as coordinator:
        test = CoordinatorTest(coordinator.address, patience_s=0.2)
        await CoordinatorBattery(test, report).run()
    assert failed(report)
    assert any("no session" in check.detail for check in report.checks)


def failed(report: Report) -> dict[str, str]:
    return {check.name: check.detail for check in report.checks if check.outcome == "failed"}


def skipped(report: Report) -> set[str]:
    return {check.name for check in report.checks if check.outcome == "skipped"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"report_losses": True, "weighting": "rows", "normalized_step": True, "probes": 3},
        {"seed_policy": "shared", "weight_decay": 0.1},
        {"seed_policy": "pool", "pool_size": 16, "workers_min": 1, "quorum": 1},
    ],
    ids=["per worker", "rows and losses", "shared", "pool"],
)
async def test_our_coordinator_conforms(changes: dict[str, Any], tmp_path: Path) -> None:
    report = await report_on(tmp_path, **changes)
    assert not failed(report)
    coefficients = "commits what the contract makes of the answers"
    assert skipped(report) == {OF_FLEETS} | ({coefficients} if "seed_policy" in changes else set())
    assert len(report.checks) > 50


async def test_one_worker_is_enough_for_most_checks(tmp_path: Path) -> None:
    report = await report_on(tmp_path, workers_min=1, quorum=1, cohort_size_max=1)
    assert not failed(report)
    assert len(skipped(report)) == 7


# ---------------------------------------------------------------- broken coordinators


async def found_by(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a check sees of a broken coordinator; those that come after it are not made."""
    every = CoordinatorBattery._in_sessions

    def some(self: CoordinatorBattery) -> Any:
        sequences = list(every(self))
        names = [sequence[0] for sequence in sequences]
        return sequences[: names.index(name) + 1] if name in names else []

    monkeypatch.setattr(CoordinatorBattery, "_in_sessions", some)
    return failed(await report_on(folder)).get(name, "nothing")


async def test_a_wrong_head_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lying(message: Any, config: Any, head_at: Callable[[int], bytes]) -> Any:
        return message_to_pb(message, config, lambda _: b"\x07" * 32)

    monkeypatch.setattr(loop, "message_to_pb", lying)
    name = "acknowledges an answer, and the same one again"
    assert "its head is 07070707" in await found_by(name, tmp_path, monkeypatch)


async def test_another_refusal_of_a_signature_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ProtocolError("not like this")

    monkeypatch.setattr(admission, "_check_signature", refuse)
    name = "ends a session whose answers are not signed with its key"
    assert "INVALID_ARGUMENT ProtocolError" in await found_by(name, tmp_path, monkeypatch)


async def test_a_commit_that_is_not_sent_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(self: Any, row: Any, signature: bytes) -> None:
        """Tell nobody."""

    monkeypatch.setattr(daemon.Daemon, "_send_commit", silent)
    name = "commits a round, with the same bytes for all"
    seen = await found_by(name, tmp_path, monkeypatch)
    assert "before the commit of round 1" in seen or "a second assignment" in seen


async def test_an_assignment_that_comes_twice_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = loop.ServingLoop._send_one

    def twice(self: Any, message: Any) -> None:
        plain(self, message)
        if isinstance(message, Assign):
            plain(self, message)

    monkeypatch.setattr(loop.ServingLoop, "_send_one", twice)
    name = "commits a round, with the same bytes for all"
    assert "a second assignment" in await found_by(name, tmp_path, monkeypatch)


async def test_seeds_of_another_slot_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        rounds,
        "seeds_of",
        lambda config, round_, slot, pool: seeds_of(config, round_, slot + 1, pool),
    )
    name = "assigns the seeds of the slot"
    assert "has the first seed" in await found_by(name, tmp_path, monkeypatch)


async def test_a_new_ticket_for_old_work_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = loop.ServingLoop._send_one
    count = iter(range(1, 1000))

    def moving(self: Any, message: Any) -> None:
        if isinstance(message, Assign):
            slot = message.ticket.slot + 100 * next(count)
            message = Assign(
                message.worker, Ticket(message.ticket.epoch, message.ticket.round, slot),
                message.work, message.deadline_ms,
            )  # fmt: skip
        plain(self, message)

    monkeypatch.setattr(loop.ServingLoop, "_send_one", moving)
    name = "repeats an assignment after a reconnection"
    assert "ticket is" in await found_by(name, tmp_path, monkeypatch)


async def test_a_hello_that_is_not_checked_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "check_hello", lambda *_: None)
    monkeypatch.setattr(CoordinatorBattery, "_in_sessions", lambda _: [])
    found = failed(await report_on(tmp_path))
    for what in ("another manifest", "another base", "another recipe", "a bad name"):
        assert found[f"refuses {what}"] == "welcome came"


async def test_an_acknowledged_answer_without_a_record_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_numbers(records: Sequence[Record]) -> list[bytes]:
        changed = [
            record._replace(scalars=record.scalars._replace(projected_grads=(0.25, 0.5)))
            if isinstance(record, Answered)
            else record
            for record in records
        ]
        return encode_records(changed)

    monkeypatch.setattr(daemon, "encode_records", other_numbers)
    name = "has recorded every acknowledged answer"
    assert "has other numbers" in await found_by(name, tmp_path, monkeypatch)


async def test_an_answer_that_is_not_checked_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "checked", lambda event, _rate, _config: event.scalars)
    name = "refuses projected gradients that the run does not allow"
    seen = await found_by(name, tmp_path, monkeypatch)
    assert "instead of refused" in seen or "session ended" in seen


async def test_nobody_at_the_address_is_told_of() -> None:
    report = Report("coordinator")
    await CoordinatorBattery(CoordinatorTest("127.0.0.1:9", patience_s=1.0), report).run()
    assert [check.outcome for check in report.checks] == ["failed"]
    assert not report.passed


async def test_a_coordinator_with_weights_of_its_own_is_refused(tmp_path: Path) -> None:
    config = config_of(**RUN)
    async with (
        served(tmp_path / "journal.db", genesis_of(config)) as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        secret = coordinator.daemon.replica_secret
        await client.report_replica(config.run_id, secret, 0, b"d" * 32, None)
        await replica_digested(client, 0)
        battery = CoordinatorBattery(CoordinatorTest(coordinator.address), Report("coordinator"))
        with pytest.raises(ConfigError, match="set replica = false there"):
            await battery.run()


def test_contracts_without_sequences_are_refused() -> None:
    with pytest.raises(ConfigError, match="no sequences for buffer_answers"):
        check_can_test(config_of(buffer_answers=2, quorum=1))
    with pytest.raises(ConfigError, match="needs 100 workers"):
        check_can_test(config_of(workers_min=100, cohort_size_max=100))
