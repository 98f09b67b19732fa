"""Many runs in one process: routing, orders, restarts, and the failure of one of them."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedmezo_coordinator.admission.state_folder import make_state
from fedmezo_coordinator.daemon import Daemon
from fedmezo_coordinator.programs import fedmezo_command
from fedmezo_coordinator.runs import many_runs
from fedmezo_core.errors import (
    ConfigError,
    FedMezoError,
    ForbiddenError,
    JournalFullError,
    OneRunError,
    RevokedError,
    RunExistsError,
    StartingError,
    UnavailableError,
    WrongRunError,
)
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.machines.roster import Phase
from fedmezo_core.records import Answered, Paused, Resumed, SignedHead, Stopped
from fedmezo_core.trust.answer_signatures import AnswerSigner
from fedmezo_core.trust.join_string import parse_join_string
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.enrolment import join_fleet
from fedmezo_proto.v1 import admin_pb2, coordinator_pb2, runs_pb2
from tests.coordinator.runs.hosting_runs import Hosting, hosted, settings_toml
from tests.integration.support.harness import (
    ScriptedWorker,
    config_of,
    free_port,
    genesis_of,
    records_of,
    served,
    until,
)

GENESIS = genesis_of(config_of(rounds=2, workers_min=1, quorum=1, local_steps=1))


async def test_each_call_reaches_the_run_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted(tmp_path / "runs", monkeypatch) as at:
        await at.create("one", "two")
        async with at.worker("one") as first, at.worker("two") as second:
            await first.open()
            await second.open()
            assert await first.work_to_the_end() == 3
            async with at.client() as client:
                assert (await client.get_run("two")).genesis.config.run_id == "two"
                assert (await client.get_status("one")).round == 3
                assert (await client.get_status("two")).round == 0
                pages = [page async for page in client.journal_pages("one")]
                assert sum(len(page.entries) for page in pages) > 6
                # One that is over is not meant by an empty name.
                assert (await client.get_status()).config.run_id == "two"
                polled = await client.poll_session(
                    b"", coordinator_pb2.SessionRequest(hello=second.hello(worker="w2"))
                )
                again = await client.poll_session(polled.token, leave=True)
                assert again.token == polled.token
            assert await second.work_to_the_end() == 3
    folder = tmp_path / "runs"
    assert {path.name for path in folder.iterdir() if path.is_dir()} >= {"one", "two"}
    for run_id in ("one", "two"):
        assert folder.joinpath(run_id).stat().st_mode & 0o077 == 0
        answers = [r for r in records_of(folder / run_id / "journal.db") if type(r) is Answered]
        assert len(answers) == 3


async def test_a_call_without_a_name_is_told_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted(tmp_path / "runs", monkeypatch) as at, at.client() as client:
        with pytest.raises(WrongRunError, match="no run is going on here"):
            await client.get_run()
        await at.create("one", "two")
        with pytest.raises(WrongRunError, match=r"Which run: one, two are going on; .* --run-id"):
            await client.get_run()
        with pytest.raises(WrongRunError, match="no run 'three' here: one, two are going on"):
            await client.get_status("three")
        async with at.worker("one") as hand:
            with pytest.raises(WrongRunError, match="no run 'three' here"):
                await hand.open(run_id="three")


async def test_orders_are_on_the_record_and_repeat_without_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted(tmp_path / "runs", monkeypatch) as at, at.client() as client:
        await at.create("one", rounds=50)
        async with at.worker("one") as hand:
            await hand.open()
            assign = await hand.assigned()
            for _ in range(2):
                await client.pause_run("one", "the data are looked at")
            held = await at.in_phase("one", "PAUSED")
            assert held.reason.endswith("machine: the data are looked at")
            await hand.answer(assign)  # It counts, but closes no round.
            await hand.next("ack")
            assert (await at.summary("one")).round == 0
            for _ in range(2):
                await client.resume_run("one", 0.5)
            await hand.next("commit")
            assert (await hand.assigned()).ticket.round == 2
            for _ in range(2):
                await client.stop_run("one")
            assert (await hand.next("finished")).finished.round == 1
        over = await at.summary("one")
        assert (over.phase, over.round) == (runs_pb2.RUN_PHASE_FINISHED, 1)
        for order in (client.pause_run, client.resume_run):
            with pytest.raises(ConfigError, match="finished, so there is nothing to"):
                await order("one")
    found = records_of(tmp_path / "runs" / "one" / "journal.db")
    told = [r for r in found if isinstance(r, Paused | Resumed | Stopped)]
    assert [type(record) for record in told] == [Paused, Resumed, Stopped]
    assert isinstance(told[1], Resumed)
    assert told[1].rate_factor == 0.5


async def test_an_export_of_a_run_ends_with_that_run_s_signed_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted(tmp_path / "runs", monkeypatch) as at:
        await at.create("one", "two")
        async with at.worker("two") as hand:
            await hand.open()
            assert await hand.work_to_the_end() == 3
        for run_id in ("one", "two"):
            file = tmp_path / f"{run_id}.journal"
            said = await asyncio.to_thread(
                CliRunner().invoke,
                fedmezo_command.app,
                f"export {file} --as journal --coordinator {at.address} --run-id {run_id}".split(),
            )
            assert said.exit_code == 0, said.output
            [*_, signed] = [r for r in records_of(file) if isinstance(r, SignedHead)]
            async with at.client() as client:
                run = await client.get_run(run_id)
            assert (signed.round, signed.head) == (run.round, run.round_head)


async def test_a_run_is_created_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosted(tmp_path / "runs", monkeypatch) as at, at.client() as client:
        await at.create("one")
        await at.create("one")
        assert at.described == ["one"]
        other = runs_pb2.CreateRunRequest(settings_toml=settings_toml("one", rounds=4))
        with pytest.raises(RunExistsError, match="another run one here"):
            await client.create_run(other)
        assert len(await client.list_runs()) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model = 'tiny'\n[run", "The text of the run's settings is not valid TOML"),
        ("model = 'tiny'\nlisten = '0.0.0.0:1'", "listen in the run's settings is the coord"),
        ("journal = 'j.db'", "journal in the run's settings is the coordinator's own"),
        ("modell = 'tiny'", "modell"),
        ("model = 'tiny'", "run_id"),
        (settings_toml("../up"), "run_id = '../up' is not allowed"),
        ("heldout = 'rows.jsonl'", "heldout in the run's settings and the file"),
    ],
)
async def test_settings_that_are_no_run(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted(tmp_path / "runs", monkeypatch) as at, at.client() as client:
        with pytest.raises(ConfigError) as caught:
            await client.create_run(runs_pb2.CreateRunRequest(settings_toml=text))
        assert said in str(caught.value)
        assert not await client.list_runs()


async def test_a_run_is_created_while_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted(tmp_path / "runs", monkeypatch) as at, at.client() as client:
        await at.create("one", rounds=30)
        at.loads.clear()
        text = settings_toml("two")
        await client.create_run(runs_pb2.CreateRunRequest(settings_toml=text))

        async def loads() -> bool:
            return "loading tiny" in (await at.summary("two")).reason

        await until(loads, "run two to load its model")
        with pytest.raises(
            StartingError, match="Run two is not served yet: loading tiny to digest"
        ):
            await client.get_run("two")
        async with at.worker("one") as hand:
            await hand.open()
            assert await hand.work_to_the_end() == 30
        assert (await at.summary("two")).phase == runs_pb2.RUN_PHASE_CREATING
        await client.delete_run("two")  # Its model may never be there.
        await client.create_run(runs_pb2.CreateRunRequest(settings_toml=text))
        at.loads.set()
        await at.in_phase("two", "RUNNING")


async def test_a_run_is_deleted_when_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs"
    async with hosted(folder, monkeypatch) as at, at.client() as client:
        await at.create("one", "two")
        with pytest.raises(ConfigError, match="one is not over; end it first"):
            await client.delete_run("one")
        async with at.worker("one") as hand:
            await hand.open()
            await client.stop_run("one")
            await client.delete_run("one")
            assert isinstance(await hand.ended(), WrongRunError)
        with pytest.raises(WrongRunError, match="no run 'one' here"):
            await client.delete_run("one")
        assert [run.run_id for run in await client.list_runs()] == ["two"]
        await at.create("one")  # The name is free again.
    lines = [json.loads(line) for line in (folder / "operations.jsonl").read_text().splitlines()]
    assert [(line["what"], line["run_id"]) for line in lines] == [
        ("create", "one"), ("create", "two"), ("delete", "one"), ("create", "one"),
    ]  # fmt: skip
    assert all(line["by"] and line["at_ms"] for line in lines)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the runs whose disk takes no more."""
    names: set[str] = set()
    append = SqliteStore.append

    def appended(self: SqliteStore, rows: Any) -> None:
        if self._path.parent.name in names:
            raise JournalFullError(f"The disk of {self._path} is full; make room.")
        append(self, rows)

    monkeypatch.setattr(SqliteStore, "append", appended)
    return names


async def test_a_full_disk_ends_one_run_alone(
    full: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted(tmp_path / "runs", monkeypatch) as at, at.client() as client:
        await at.create("one", "two", "three")
        async with at.worker("one") as first, at.worker("two") as second:
            await first.open()
            await second.open()
            full.add("one")
            await first.answer(await first.assigned())
            error = await first.ended()
            assert isinstance(error, UnavailableError)
            assert error.retry_after_s == 30
            failed = await at.in_phase("one", "FAILED")
            assert "is full" in failed.reason
            with pytest.raises(UnavailableError, match="one stands still at its coordinator"):
                await client.get_status("one")
            with pytest.raises(UnavailableError, match="stands still"):
                await client.pause_run("one")
            assert await second.work_to_the_end() == 3
            full.clear()
            await client.resume_run("one")
            await at.in_phase("one", "RUNNING")
        async with at.worker("one") as first:
            await first.open()
            assert await first.work_to_the_end() == 3


async def test_whoever_joins_at_that_moment_hears_of_it(
    full: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted(tmp_path / "runs", monkeypatch) as at, at.client() as client:
        await at.create("one", workers_min=2, quorum=2, cohort_size_max=2)
        full.add("one")
        async with at.worker("one", "w1") as first, at.worker("one", "w2") as second:
            await first.open()

            async def joins() -> FedMezoError:
                try:
                    await second.open()
                except FedMezoError as error:
                    return error
                return await second.ended()

            told = await asyncio.wait_for(
                asyncio.gather(joins(), first.ended(), _told(client.stop_run("one"))), 10
            )
            assert {type(error) for error in told} == {UnavailableError}


async def _told(call: Any) -> FedMezoError:
    try:
        await call
    except FedMezoError as error:
        return error
    raise AssertionError("nothing was refused")


async def test_a_damaged_run_does_not_keep_the_others_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs"
    async with hosted(folder, monkeypatch) as at:
        await at.create("one", "two", "three")
    (folder / "one" / "run.json").write_text("{")
    (folder / "two" / "journal.db").write_bytes(b"not a journal" * 1000)
    async with hosted(folder, monkeypatch) as at, at.client() as client:
        assert "holds no run that can be read" in (await at.in_phase("one", "FAILED")).reason
        assert (await at.in_phase("two", "FAILED")).reason
        await at.in_phase("three", "RUNNING")
        for run_id in ("one", "two"):
            await client.delete_run(run_id)
        assert [run.run_id for run in await client.list_runs()] == ["three"]


async def test_runs_are_restored_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs"
    async with hosted(folder, monkeypatch) as at, at.client() as client:
        await at.create("going", "held", "over")
        await client.pause_run("held")
        await client.stop_run("over")
        at.loads.clear()
        text = settings_toml("new")
        await client.create_run(runs_pb2.CreateRunRequest(settings_toml=text))
        before = [run.run_id for run in await client.list_runs()]
    async with hosted(folder, monkeypatch) as at, at.client() as client:
        assert [run.run_id for run in await client.list_runs()] == before
        assert before == ["new", "over", "held", "going"]
        for run_id, phase in (
            ("going", "RUNNING"), ("held", "PAUSED"), ("over", "FINISHED"), ("new", "RUNNING"),
        ):  # fmt: skip
            await at.in_phase(run_id, phase)
        assert at.described == ["new"]


async def test_one_process_has_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosted(tmp_path / "runs", monkeypatch):
        with pytest.raises(ConfigError, match="Another coordinator serves the runs in"):
            async with hosted(tmp_path / "runs", monkeypatch):
                pass


async def test_a_folder_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is no folder that this can write to"):
        async with hosted(tmp_path / "file", monkeypatch):
            pass


async def test_a_stop_waits_for_nobody_who_waits_for_offers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted(tmp_path / "runs", monkeypatch) as at, at.client() as client:
        known = await client.offered_runs("w1")
        waiting = asyncio.create_task(client.offered_runs("w1", known.revision, 50))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        at.stop.set()
        assert (await asyncio.wait_for(waiting, 1.5)).more_may_come


async def test_what_all_runs_share_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = f"127.0.0.1:{free_port()}"
    async with hosted(tmp_path / "runs", monkeypatch, page=page) as at:
        await at.create("one", "two")
        async with at.worker("one") as first, at.worker("two") as second:
            await first.open()
            await second.open()
            text = await asyncio.to_thread(_read, f"http://{page}/metrics")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert [line for line in lines if line.startswith("fedmezo_sessions")] == [
        "fedmezo_sessions 2.0", "fedmezo_sessions_refused_total 0.0",
    ]  # fmt: skip
    assert len([line for line in lines if line.startswith("fedmezo_event_loop_lag_p99")]) == 1
    assert len([line for line in lines if line.startswith("fedmezo_journal_records{")]) == 2


def _read(url: str) -> str:
    with urllib.request.urlopen(url) as answer:
        return str(answer.read().decode())


async def test_there_is_an_end_to_how_many_there_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many_runs, "RUNS_MAX", 1)
    async with hosted(tmp_path / "runs", monkeypatch) as at:
        await at.create("one")
        with pytest.raises(FedMezoError, match="1 runs are here, the most"):
            await at.create("two")


async def test_a_coordinator_of_one_run_takes_the_orders_to_it(tmp_path: Path) -> None:
    async with served(tmp_path / "j.db", GENESIS) as at:
        hosting = Hosting(at.address, tmp_path)
        async with hosting.client() as client:
            [run] = await client.list_runs()
            assert (run.run_id, run.phase) == ("tiny-run", runs_pb2.RUN_PHASE_RUNNING)
            await client.pause_run("tiny-run")
            assert (await client.get_status()).phase == coordinator_pb2.PHASE_PAUSED
            await client.resume_run("")
            await client.stop_run("tiny-run")
            with pytest.raises(WrongRunError, match="'other' is not served here"):
                await client.stop_run("other")
            for call in (
                client.create_run(runs_pb2.CreateRunRequest(settings_toml="")),
                client.delete_run("tiny-run"),
                client.upload_file(runs_pb2.UploadFileRequest()),
            ):
                with pytest.raises(OneRunError, match="start one with --runs FOLDER"):
                    await call


async def test_a_fleet_has_many_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_state(tmp_path / "state", [], None)
    async with hosted(tmp_path / "runs", monkeypatch, state=tmp_path / "state") as at:
        await at.create("one", "two")
        async with at.client() as client:
            request = admin_pb2.CreateTokensRequest(
                names=["w1"], role=admin_pb2.MEMBER_ROLE_WORKER, uses=1, life_s=600
            )
            [token] = (await client.create_tokens(request)).tokens
            worker = await join_fleet(parse_join_string(token.join_string), tmp_path / "w1", "")
            async with CoordinatorClient(at.address, identity=worker) as theirs:
                hands = []
                for run_id in ("one", "two"):
                    run = await theirs.get_run(run_id)
                    assert run.genesis.config.journal_readers == "observers"
                    signer = AnswerSigner(worker.keys.signing_key, run.head)
                    hands.append(ScriptedWorker(theirs, run.genesis, "w1", run.head, signer=signer))
                    await hands[-1].open()
                for order in (theirs.list_runs(), theirs.pause_run("one")):
                    with pytest.raises(ForbiddenError):
                        await order
                await client.revoke_member("w1")
                assert [type(await hand.ended()) for hand in hands] == [RevokedError] * 2
            await client.pause_run("one")
            assert (await at.summary("one")).reason == "operator operator paused it"


async def test_replicas_wait_for_a_worker_and_for_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    async def keep_replica(_: object, daemon: Daemon, __: str) -> None:
        begun.append(daemon.genesis.config.run_id)
        while daemon.phase is not Phase.FINISHED:  # noqa: ASYNC110 - as the child process does
            await asyncio.sleep(0.01)

    monkeypatch.setattr(many_runs, "keep_replica", keep_replica)
    async with hosted(tmp_path / "runs", monkeypatch, replicas_max=1) as at, at.client() as client:
        await at.create("one", "two", "three")
        async with at.worker("two") as second, at.worker("one") as first:
            assert begun == []
            await second.open()
            await second.assigned()
            await first.open()
            await first.assigned()
            assert begun == ["two"]
            await client.stop_run("two")

            async def both() -> bool:
                return begun == ["two", "one"]

            await until(both, "the second replica to begin")
