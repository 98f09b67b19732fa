"""What RunService takes, offers and refuses: files, offers, declines, and who may order what."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from pathlib import Path

import pytest

from fedmezo_coordinator.runs import hosted_run, uploads
from fedmezo_coordinator.runs.registry import Runs
from fedmezo_coordinator.serving.run_directory import Call
from fedmezo_core.errors import (
    ConfigError,
    FedMezoError,
    ForbiddenError,
    NotReadyError,
    ProtocolError,
    WrongRunError,
)
from fedmezo_core.journal.codec import decode_record
from fedmezo_core.records import Genesis
from fedmezo_core.trust.authorisation import Caller, Role
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import runs_pb2 as wire
from tests.coordinator.runs.hosting_runs import hosted, settings_toml
from tests.integration.support.harness import config_of, genesis_of, served

CONTENT = bytes(range(256)) * 400
"""More than two pieces."""
SHA256 = hashlib.sha256(CONTENT).digest()
LORA = {"lora": {"rank": 2, "alpha": 4.0, "target_modules": ["c_attn"]}}


async def send(client: CoordinatorClient, content: bytes = CONTENT) -> wire.RunFile:
    """Upload bytes as the command does; the file without a name."""
    sha256 = hashlib.sha256(content).digest()
    request = wire.UploadFileRequest(sha256=sha256, file_bytes=len(content))
    while (offset := await client.upload_file(request)) < len(content):
        request.offset = offset
        request.data = content[offset : offset + uploads.PIECE_BYTES_MAX]
    return wire.RunFile(sha256=sha256, file_bytes=len(content))


async def test_an_upload_goes_on_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs"
    first = wire.UploadFileRequest(
        sha256=SHA256, file_bytes=len(CONTENT), data=CONTENT[: uploads.PIECE_BYTES_MAX]
    )
    async with hosted(folder, monkeypatch) as at, at.client() as client:
        for _ in range(2):  # The same piece again changes nothing.
            assert await client.upload_file(first) == uploads.PIECE_BYTES_MAX
    async with hosted(folder, monkeypatch) as at, at.client() as client:
        first.data = b""
        assert await client.upload_file(first) == uploads.PIECE_BYTES_MAX
        await send(client)
        assert await client.upload_file(first) == len(CONTENT)
    [path] = (folder / ".uploads").iterdir()
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o077 == 0
    day_ago_s = time.time() - 2 * uploads.KEPT_S
    os.utime(path, (day_ago_s, day_ago_s))
    async with hosted(folder, monkeypatch):
        async with asyncio.timeout(10):
            while path.exists():  # noqa: ASYNC110 - another thread removes it
                await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"sha256": b"short"}, ProtocolError, "has 32 bytes"),
        ({"file_bytes": 0}, ConfigError, "of 0 bytes cannot be uploaded"),
        ({"file_bytes": 1 << 40}, ConfigError, "cannot be uploaded; it has 1 to 2 GiB"),
        ({"data": b"x" * (uploads.PIECE_BYTES_MAX + 1)}, ProtocolError, "A piece has at most"),
        ({"file_bytes": 3, "data": b"abc"}, ProtocolError, "do not have its digest"),
        ({"file_bytes": 2, "data": b"abc"}, ProtocolError, "do not have its digest"),
        ({"file_bytes": 2 << 30, "data": b"a"}, NotReadyError, "keeps at most"),
    ],
)
def test_a_piece_that_is_refused(
    changes: dict[str, object], kind: type[FedMezoError], said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(uploads, "ALL_BYTES_MAX", 1 << 30)
    values = {"sha256": SHA256, "file_bytes": len(CONTENT), "data": CONTENT[:100]} | changes
    kept = uploads.Uploads(tmp_path / "files")
    with pytest.raises(kind, match=said):
        kept.take(wire.UploadFileRequest(**values))  # type: ignore[arg-type]
    assert not list((tmp_path / "files").glob("*"))


def test_a_disk_that_takes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(uploads, "sync", full)
    kept = uploads.Uploads(tmp_path / "files")
    request = wire.UploadFileRequest(sha256=hashlib.sha256(b"a").digest(), file_bytes=1, data=b"a")
    with pytest.raises(NotReadyError, match="No space left on device"):
        kept.take(request)


async def test_a_run_has_its_files_and_workers_read_its_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs"
    async with hosted(folder, monkeypatch) as at, at.client() as client:
        text = 'adapter = "a"\nheldout = "b.jsonl"\n' + settings_toml("one", **LORA)
        files = [await send(client) for _ in range(3)]
        for file, name in zip(
            files,
            ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "heldout.jsonl"),
            strict=True,
        ):
            file.name = name
        request = wire.CreateRunRequest(settings_toml=text, files=files)
        assert await client.create_run(request) == "one"
        await at.in_phase("one", "RUNNING")
        assert (folder / "one" / "heldout.jsonl").read_bytes() == CONTENT
        [offer] = (await client.offered_runs("w1")).offers
        assert [file.name for file in offer.files] == [file.name for file in files[:2]]
        assert {file.sha256 for file in offer.files} == {SHA256}
        pieces = [p async for p in client.read_run_file("one", offer.files[1].name, 100)]
        assert b"".join(pieces) == CONTENT[100:]
        for name in ("heldout.jsonl", "../one/journal.db", "journal.db.key"):
            with pytest.raises(WrongRunError, match="offers no file"):
                _ = [p async for p in client.read_run_file("one", name)]
        with pytest.raises(ProtocolError, match="begin before its end"):
            _ = [p async for p in client.read_run_file("one", offer.files[0].name, 1 << 40)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("heldout.jsonl", "has not been uploaded"),
        ("../journal.db", "cannot be named"),
        ("adapter/../../x", "cannot be named"),
        ("adapter/.x", "cannot be named"),
        ("journal.db", "cannot be named"),
        ("probe_rows.csv", "heldout in the run's settings and the file"),
    ],
)
async def test_files_that_no_run_can_have(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted(tmp_path / "runs", monkeypatch) as at, at.client() as client:
        text = 'heldout = "rows.jsonl"\n' + settings_toml("one")
        file = wire.RunFile(name=name, sha256=b"s" * 32, file_bytes=3)
        with pytest.raises(ConfigError, match=said):
            await client.create_run(wire.CreateRunRequest(settings_toml=text, files=[file]))
        assert not await client.list_runs()
    assert not list((tmp_path / "runs").glob("one*"))


async def test_offers_change_with_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosted(tmp_path / "runs", monkeypatch) as at, at.client() as client:
        nothing = await client.offered_runs("w1")
        assert nothing.more_may_come
        assert not nothing.offers
        began_s = time.monotonic()
        assert (await client.offered_runs("w1", nothing.revision, 0.3)) == nothing
        assert time.monotonic() - began_s >= 0.3

        waiting = asyncio.create_task(client.offered_runs("w1", nothing.revision, 20))
        await at.create("one")
        known = await asyncio.wait_for(waiting, 10)
        while not known.offers:  # It changed when the run was created, and when it was served.
            known = await client.offered_runs("w1", known.revision, 10)
        genesis = decode_record(known.offers[0].genesis)
        assert isinstance(genesis, Genesis)
        assert genesis.config.run_id == "one"
        unchanged = await client.offered_runs("w1", known.revision, 0.1)
        assert (unchanged.revision, unchanged.more_may_come) == (known.revision, True)
        assert not unchanged.offers
        assert (await client.offered_runs("w1")) == known

        waiting = asyncio.create_task(client.offered_runs("w1", known.revision, 20))
        await asyncio.sleep(0.1)
        await client.stop_run("one")
        assert not (await asyncio.wait_for(waiting, 10)).offers
        with pytest.raises(ProtocolError, match="wait_ms is at most 60000"):
            await client.offered_runs("w1", 0, 61)
        with pytest.raises(ProtocolError, match="is no worker's name"):
            await client.offered_runs("W 1")


async def test_a_coordinator_of_one_run_offers_it_and_no_more(tmp_path: Path) -> None:
    genesis = genesis_of(config_of(rounds=2, workers_min=1, quorum=1, local_steps=1))
    async with served(tmp_path / "j.db", genesis) as at, CoordinatorClient(at.address) as client:
        offers = await client.offered_runs("w1")
        assert [offer.run_id for offer in offers.offers] == ["tiny-run"]
        assert not offers.more_may_come
        await client.stop_run("tiny-run")
        assert not (await client.offered_runs("w1", offers.revision, 10)).offers


async def test_declines_are_kept_in_bounds_until_the_worker_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosted_run, "DECLINES_MAX", 2)
    async with hosted(tmp_path / "runs", monkeypatch) as at, at.client() as client:
        await at.create("one")
        for worker in ("w1", "w2", "w3", "w2"):
            await client.decline_run(worker, "one", f"{worker} has no data set\n\x1b[2J'rows'")
        declined = (await at.summary("one")).declined
        assert [d.worker for d in declined] == ["w3", "w2"]
        assert declined[0].reason == "w3 has no data set [2J'rows'"
        async with at.worker("one", "w2") as hand:
            await hand.open()
            assert [d.worker for d in (await at.summary("one")).declined] == ["w3"]
        # Nor is it said again once the worker is away.
        assert [d.worker for d in (await at.summary("one")).declined] == ["w3"]
        for reason in ("", "x" * 513):
            with pytest.raises(ProtocolError, match="says in 1 to 512 bytes"):
                await client.decline_run("w1", "one", reason)


ORDERS = {
    "UploadFile": wire.UploadFileRequest(),
    "CreateRun": wire.CreateRunRequest(),
    "PauseRun": wire.PauseRunRequest(),
    "ResumeRun": wire.ResumeRunRequest(),
    "StopRun": wire.StopRunRequest(),
    "DeleteRun": wire.DeleteRunRequest(run_id="tiny-run"),
}


@pytest.mark.parametrize("method", ORDERS)
async def test_strangers_on_other_machines_order_nothing(method: str, tmp_path: Path) -> None:
    genesis = genesis_of(config_of())
    async with served(tmp_path / "j.db", genesis) as at:
        service = Runs.of(at.daemon)
        with pytest.raises(ForbiddenError, match="takes orders from its own machine alone"):
            await service.answer(method, ORDERS[method], Call(Caller.ANYONE, "ipv4:10.0.0.7:1"))


async def test_a_worker_speaks_for_itself_alone(tmp_path: Path) -> None:
    async with served(tmp_path / "j.db", genesis_of(config_of())) as at:
        service, call = Runs.of(at.daemon), Call(Caller(Role.WORKER, "w1"), "ipv4:10.0.0.7:1")
        await service.answer("OfferRuns", wire.OfferRunsRequest(worker="w1"), call)
        for method, request in (
            ("OfferRuns", wire.OfferRunsRequest(worker="w2")),
            ("DeclineRun", wire.DeclineRunRequest(worker="w2", reason="no")),
        ):
            with pytest.raises(ForbiddenError, match="may not join a run as 'w2'"):
                await service.answer(method, request, call)


async def test_reasons_are_for_those_who_may_see_every_worker(tmp_path: Path) -> None:
    async with served(tmp_path / "j.db", genesis_of(config_of())) as at:
        service = Runs.of(at.daemon)
        service.find("").decline("w1", "its policy")
        for caller, peer, sees in (
            (Caller.ANYONE, "ipv4:127.0.0.1:1", True),
            (Caller.ANYONE, "ipv4:10.0.0.7:1", False),
            (Caller(Role.OBSERVER, "eye"), "ipv4:10.0.0.7:1", True),
        ):
            listed = await service.answer("ListRuns", wire.ListRunsRequest(), Call(caller, peer))
            assert isinstance(listed, wire.ListRunsResponse)
            assert bool(listed.runs[0].declined) is sees


@pytest.mark.parametrize("readers", ["everyone", "observers"])
async def test_the_list_tells_no_more_than_the_status(readers: str, tmp_path: Path) -> None:
    config = config_of(journal_readers=readers)
    async with served(tmp_path / "j.db", genesis_of(config)) as at:
        service = Runs.of(at.daemon)
        await service.pause(service.find(""), "w1 is a liar")
        for caller in (Caller.ANYONE, Caller(Role.OBSERVER, "eye")):
            call = Call(caller, "ipv4:10.0.0.7:1")
            listed = await service.answer("ListRuns", wire.ListRunsRequest(), call)
            assert isinstance(listed, wire.ListRunsResponse)
            [run] = listed.runs
            assert run.reason == at.daemon.status("", caller).reason
            assert ("liar" in run.reason) is (readers == "everyone" or bool(caller.name))


async def test_an_order_names_who_gave_it(tmp_path: Path) -> None:
    async with served(tmp_path / "j.db", genesis_of(config_of())) as at:
        service, call = Runs.of(at.daemon), Call(Caller(Role.OPERATOR, "ana"), "ipv4:10.0.0.7:1")
        with pytest.raises(ConfigError, match="The reason has 401 characters"):
            await service.answer("PauseRun", wire.PauseRunRequest(reason="x" * 401), call)
        await service.answer("PauseRun", wire.PauseRunRequest(), call)
        assert at.daemon.reason == "operator ana paused it"
        request = wire.StopRunRequest(reason="the data\nare wrong")
        await service.answer("StopRun", request, call)
        assert at.daemon.reason == "operator ana: the data are wrong"
