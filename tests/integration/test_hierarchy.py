"""Sites: a coordinator, relays as its workers, and their own workers, over real gRPC.

The workers are real but for their models. A flat federation, in which each site is one worker
that answers with the weighted mean of its workers, ends in the same head.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo_coordinator.coordinator_settings import RelaySettings
from fedmezo_coordinator.programs.signature_audit import SignatureAudit
from fedmezo_coordinator.relay_daemon import Relay
from fedmezo_core.errors import (
    FedMezoError,
    JournalBehindError,
    SignatureError,
    UnavailableError,
)
from fedmezo_core.events import Measure, Measured
from fedmezo_core.journal.codec import decode_record
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.party_copy import verified
from fedmezo_core.journal.signed_heads import open_signer
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.machines.aggregate import site_mean
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.records import Committed, Diverged, Genesis, Scalars
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.zo.commits import commits_of as pairs_of
from fedmezo_core.zo.party import open_party
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_worker.engine import Engine
from fedmezo_worker.offers.work import work
from fedmezo_worker.worker_settings import WorkerSettings
from tests.faults.light_worker import LightEngine
from tests.integration.support.harness import (
    PATIENCE_S,
    Programs,
    answer_to,
    config_of,
    genesis_of,
    records_of,
    relayed,
    scripted_workers,
    served,
    until,
    vouched_for,
    write_genesis,
)
from tests.integration.support.parties import Workers
from tests.sim.checker import measure, rows_of

ROUNDS = 6


def genesis_with(**changes: Any) -> Genesis:
    values: dict[str, Any] = {
        "rounds": ROUNDS,
        "local_steps": 3,
        "workers_min": 2,
        "quorum": 2,
        "weighting": "rows",
        "digest_every_rounds": 2,
        "deadline_ms": 60_000,
        # A relay clips a site's answers, which the one worker that stands for the site does not.
        "clip_median_factor": 0.0,
    }
    return genesis_of(config_of(**(values | changes)))


@dataclass
class Working:
    """A worker of the product, with an oracle for an engine."""

    name: str
    engine: LightEngine
    task: asyncio.Task[None]
    copy: Path | None


class LightWorkers:
    """Workers of one test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[Working] = []

    def start(
        self,
        address: str,
        name: str,
        engine: LightEngine | None = None,
        *,
        keeps: bool = True,
        tls_ca: Path | None = None,
    ) -> Working:
        engine = engine or LightEngine()
        copy = self.folder / f"copy-{name}.db" if keeps else None
        settings = WorkerSettings(
            coordinator=address,
            name=name,
            data=Path(__file__),
            journal_copy=copy,
            tls_ca=tls_ca,
        )
        task = asyncio.create_task(work(settings, cast("Engine", engine)))
        working = Working(name, engine, task, copy)
        self.all.append(working)
        return working

    async def finish(self) -> None:
        await asyncio.wait_for(asyncio.gather(*(w.task for w in self.all)), PATIENCE_S)

    async def end(self) -> None:
        for working in self.all:
            working.task.cancel()
        await asyncio.gather(*(w.task for w in self.all), return_exceptions=True)


@pytest.fixture
async def light_workers(tmp_path: Path) -> AsyncIterator[LightWorkers]:
    found = LightWorkers(tmp_path)
    yield found
    await found.end()


class SiteEngine(LightEngine):
    """A whole site as one worker: what its workers would measure, and the weighted mean of it."""

    def __init__(self, workers: Sequence[str], *, weighted: bool = True) -> None:
        super().__init__()
        self._names = workers
        self._weighted = weighted

    async def measure(self, order: Measure) -> Measured:
        whole = await super().measure(order)
        answers = []
        for name in self._names:
            grads, loss = measure(name, order.work.seeds, self.weights)
            rows = rows_of(name) if self._weighted else None
            answers.append(Scalars(grads, loss, None, rows))
        digest64 = whole.scalars.weights_digest64
        return Measured(order.ticket, site_mean(answers)._replace(weights_digest64=digest64))


def commits_of(path: Path) -> list[Committed]:
    """Of a journal or a copy; every hash and signature is checked."""
    store = SqliteStore(path, create=False)
    try:
        return [r for _, r in verified(Journal(store)) if isinstance(r, Committed)]
    finally:
        store.close()


def head_of(path: Path) -> bytes:
    store = SqliteStore(path, create=False)
    try:
        journal = Journal(store)
        for _ in verified(journal):
            pass
        return journal.head
    finally:
        store.close()


def heads_in(folder: Path) -> set[bytes]:
    """Of every journal and copy there."""
    return {head_of(path) for path in folder.glob("*.db")}


async def flat_head(folder: Path, genesis: Genesis, sites: Mapping[str, Sequence[str]]) -> bytes:
    """Where a federation without relays ends, in which each site is one worker."""
    flat = LightWorkers(folder)
    weighted = genesis.config.weighting == "rows"
    async with served(folder / "flat.db", genesis) as coordinator:
        for site, names in sites.items():
            flat.start(coordinator.address, site, SiteEngine(names, weighted=weighted), keeps=False)
        await flat.finish()
    return head_of(folder / "flat.db")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weighting": "uniform", "report_losses": True},
        {"seed_policy": "shared", "probes": 2},
        {"seed_policy": "pool", "pool_size": 7, "pool_sampling": "weighted", "weight_decay": 0.1},
        {"personal_rate": "update_distance", "schedule": "cosine", "estimator": "one_sided"},
        {"normalized_step": True, "probes": 2, "eps_follows_rate": True, "schedule": "linear"},
    ],
    ids=["rows", "uniform", "shared", "pool", "personal", "normalized"],
)
async def test_two_sites_end_where_two_workers_with_their_means_do(
    tmp_path: Path, light_workers: LightWorkers, changes: dict[str, Any]
) -> None:
    genesis = genesis_with(**changes)
    sites = {"site-a": ("w1", "w2"), "site-b": ("w3", "w4")}
    centre = tmp_path / "centre.db"
    signer = open_signer(tmp_path / "centre.key")
    async with served(centre, genesis, signer=signer) as coordinator, AsyncExitStack() as stack:
        for site, names in sites.items():
            relay = await stack.enter_async_context(
                relayed(coordinator.address, tmp_path, site, workers_min=2)
            )
            for name in names:
                light_workers.start(relay.address, name)
        await light_workers.finish()

        async def reported() -> bool:
            return len(coordinator.daemon.status("").digests) == 2

        await until(reported, "the digests that the relays pass up")
        status = coordinator.daemon.status("")
        assert status.phase == wire.PHASE_FINISHED
        assert [w.worker for w in status.workers] == ["site-a", "site-b"]
        assert all(w.rounds_answered == ROUNDS for w in status.workers)
        digests = {d.weights_digest for d in status.digests}
    assert digests == {w.engine.weights for w in light_workers.all}
    assert heads_in(tmp_path) == {await flat_head(tmp_path, genesis, sites)}
    copies = [tmp_path / f"{site}.db" for site in sites] + [
        w.copy for w in light_workers.all if w.copy
    ]
    assert len(copies) == 6
    assert {tuple(commits_of(path)) for path in copies} == {tuple(commits_of(centre))}


async def test_a_relay_signs_its_sites_mean_and_checks_its_workers(
    tmp_path: Path, light_workers: LightWorkers
) -> None:
    genesis, centre = genesis_with(workers_min=1, quorum=1), tmp_path / "centre.db"
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    async with (
        served(centre, genesis) as coordinator,
        relayed(coordinator.address, tmp_path, "site", workers_min=2, signing_key=key) as site,
        scripted_workers(site.address, genesis, "w1") as (hand,),
    ):
        await vouched_for(hand.client)
        await hand.open(signing_key=other.public_key().public_bytes_raw())
        light_workers.start(site.address, "w2")
        await hand.answer(await hand.assigned())
        error = await hand.ended()
        assert type(error) is SignatureError, error
        light_workers.start(site.address, "w3")
        await light_workers.finish()
    machine, audit = RoundMachine(), SignatureAudit(None)
    for entry in Journal(SqliteStore(centre)).load():
        record = decode_record(entry.row.body)
        machine.apply(record)
        audit.take(entry, record, machine.state)
    assert list(audit.lines()) == [
        f"answers: {ROUNDS} signed and checked, 0 unsigned",
        f"  site: {ROUNDS} answers signed with key {key.public_key().public_bytes_raw().hex()}",
    ]


async def test_a_site_is_one_stream_to_the_coordinator_above(
    tmp_path: Path, light_workers: LightWorkers
) -> None:
    genesis = genesis_with()
    async with (
        served(tmp_path / "centre.db", genesis) as coordinator,
        relayed(coordinator.address, tmp_path, "site-a", workers_min=20) as first,
        relayed(coordinator.address, tmp_path, "site-b", workers_min=4) as second,
    ):
        for number in range(24):
            site = first if number < 20 else second
            light_workers.start(site.address, f"w{number}", keeps=False)
        await light_workers.finish()
        assert coordinator.daemon.session_limit.sessions <= 2
        status = coordinator.daemon.status("")
        assert {w.worker for w in status.workers} == {"site-a", "site-b"}
        # What a site sends does not grow with it.
        bytes_up = {w.worker: w.bytes_up for w in status.workers}
        assert abs(bytes_up["site-a"] - bytes_up["site-b"]) < 50
        assert first.relay.status("").phase == wire.PHASE_FINISHED
        assert len(first.relay.status("").workers) == 20
    assert len({w.engine.weights for w in light_workers.all}) == 1


async def test_a_relay_may_be_a_worker_of_a_relay(
    tmp_path: Path, light_workers: LightWorkers
) -> None:
    genesis = genesis_with(workers_min=1, quorum=1)
    centre = tmp_path / "centre.db"
    signer = open_signer(tmp_path / "centre.key")
    async with (
        served(centre, genesis, signer=signer) as coordinator,
        relayed(coordinator.address, tmp_path, "region", workers_min=2) as region,
        relayed(region.address, tmp_path, "site-a", workers_min=2) as site,
    ):
        light_workers.start(site.address, "w1")
        light_workers.start(site.address, "w2")
        light_workers.start(region.address, "w3")
        await light_workers.finish()

        async def reported() -> bool:
            return len(coordinator.daemon.status("").digests) == 1

        await until(reported, "the digest that the relays pass up")
        assert {w.worker for w in coordinator.daemon.status("").workers} == {"region"}
    assert len({w.engine.weights for w in light_workers.all}) == 1
    assert len(heads_in(tmp_path)) == 1


async def test_buffered_rounds_pass_a_relay(tmp_path: Path, light_workers: LightWorkers) -> None:
    genesis = genesis_with(
        workers_min=1, quorum=1, buffer_answers=2, rounds=12, digest_every_rounds=1
    )
    async with (
        served(tmp_path / "centre.db", genesis) as coordinator,
        relayed(coordinator.address, tmp_path, "site-a", workers_min=2) as site,
    ):
        light_workers.start(site.address, "w1")
        light_workers.start(site.address, "w2")
        light_workers.start(coordinator.address, "w3")
        await light_workers.finish()
    assert len({w.engine.weights for w in light_workers.all}) == 1
    assert len(heads_in(tmp_path)) == 1
    assert not [r for r in records_of(tmp_path / "centre.db") if isinstance(r, Diverged)]


async def test_late_workers_read_the_relays_copy(
    tmp_path: Path, light_workers: LightWorkers
) -> None:
    genesis = genesis_with(workers_min=1, quorum=1)
    signer = open_signer(tmp_path / "centre.key")
    async with (
        served(tmp_path / "centre.db", genesis, signer=signer) as coordinator,
        relayed(coordinator.address, tmp_path, "site-a") as site,
    ):
        light_workers.start(site.address, "w1")
        await light_workers.finish()
        light_workers.start(site.address, "w2")
        await light_workers.finish()
    assert len({w.engine.weights for w in light_workers.all}) == 1


async def test_a_relay_that_was_killed_loses_nothing(
    tmp_path: Path, light_workers: LightWorkers
) -> None:
    """Both processes are real; the relay is killed in mid-round, twice, and started again."""
    genesis = genesis_with(rounds=40)
    centre = tmp_path / "centre.db"
    programs = Programs(tmp_path)
    sites = {"site-a": ("w1", "w2"), "site-b": ("w3", "w4")}
    signer = open_signer(tmp_path / "centre.key")

    def relay(name: str, upstream: str, port: int = 0) -> Any:
        return programs.start(
            "fedmezo_coordinator.programs.relay_command",
            *("--upstream", upstream, "--name", name, "--workers-min", "2"),
            *("--listen", f"127.0.0.1:{port}", "--journal-copy", f"{name}.db"),
        )

    try:
        async with served(centre, genesis, signer=signer) as coordinator:
            running = {site: relay(site, coordinator.address) for site in sites}
            addresses = {}
            for site, program in running.items():
                addresses[site] = (await program.says(r"is served at (127\.0\.0\.1:\d+)"))[1]
                for name in sites[site]:
                    light_workers.start(addresses[site], name)
            for kill_at in (8, 20):

                async def has_come(round_: int = kill_at) -> bool:
                    return coordinator.daemon.status("").round >= round_

                await until(has_come, f"round {kill_at}")
                running["site-a"].end()
                port = int(addresses["site-a"].rpartition(":")[2])
                running["site-a"] = relay("site-a", coordinator.address, port)
            await light_workers.finish()
        # Every answer of a site is the mean of both its workers, so nothing acknowledged was lost.
        assert head_of(centre) == await flat_head(tmp_path, genesis, sites)
        for program in running.values():
            program.end()
        assert len(heads_in(tmp_path)) == 1
        assert len({w.engine.weights for w in light_workers.all}) == 1
    finally:
        programs.end()


async def test_a_coordinator_that_starts_anew_finds_its_sites_again(
    tmp_path: Path, light_workers: LightWorkers
) -> None:
    genesis = genesis_with(rounds=30)
    centre = tmp_path / "centre.db"
    sites = {"site-a": ("w1", "w2"), "site-b": ("w3", "w4")}
    signer = open_signer(tmp_path / "centre.key")
    async with AsyncExitStack() as stack:
        async with served(centre, genesis, signer=signer) as coordinator:
            for site, names in sites.items():
                relay = await stack.enter_async_context(
                    relayed(coordinator.address, tmp_path, site, workers_min=2)
                )
                for name in names:
                    light_workers.start(relay.address, name)

            async def has_come() -> bool:
                return coordinator.daemon.status("").round >= 7

            await until(has_come, "round 7")
            address = coordinator.address
        async with served(centre, genesis, signer=signer, listen=address):
            await light_workers.finish()
    assert head_of(centre) == await flat_head(tmp_path, genesis, sites)
    assert len({w.engine.weights for w in light_workers.all}) == 1


class SlowEngine(LightEngine):
    """A worker that is never in time."""

    async def measure(self, order: Measure) -> Measured:
        await asyncio.sleep(2)
        return await super().measure(order)


async def test_a_straggler_costs_its_site_a_share_and_the_run_no_round(
    tmp_path: Path, light_workers: LightWorkers
) -> None:
    genesis = genesis_with(rounds=8, deadline_ms=20_000)
    async with (
        served(tmp_path / "centre.db", genesis) as coordinator,
        relayed(
            coordinator.address, tmp_path, "site-a", workers_min=2, deadline_share=0.01
        ) as first,
        relayed(coordinator.address, tmp_path, "site-b") as second,
    ):
        light_workers.start(first.address, "w1")
        light_workers.start(first.address, "slow", SlowEngine())
        light_workers.start(second.address, "w2")
        await light_workers.finish()
        assert all(r.answers == 2 for r in coordinator.daemon.status("").recent_rounds)
        workers = {w.worker: w for w in first.relay.status("").workers}
        assert workers["w1"].rounds_answered == 8
        assert workers["slow"].rounds_answered < 8
        assert "within the site's time" in workers["slow"].complaint
    assert len({w.engine.weights for w in light_workers.all}) == 1


class FlippedEngine(LightEngine):
    """A worker whose weights change behind its back, once."""

    def __init__(self, at_round: int) -> None:
        super().__init__()
        self._at_round = at_round

    async def apply(self, commits: Sequence[Committed]) -> None:
        await super().apply(commits)
        if commits and commits[-1].round == self._at_round:
            self.weights = hashlib.sha256(self.weights).digest()


async def test_a_worker_with_other_weights_than_its_site_is_sent_away(
    tmp_path: Path, light_workers: LightWorkers
) -> None:
    genesis = genesis_with(workers_min=1, quorum=1, digest_every_rounds=1, rounds=12)
    async with (
        served(tmp_path / "centre.db", genesis) as coordinator,
        relayed(coordinator.address, tmp_path, "site-a", workers_min=3) as site,
    ):
        sound = [light_workers.start(site.address, name) for name in ("w1", "w2")]
        flipped = light_workers.start(site.address, "w3", FlippedEngine(4))
        with pytest.raises(FedMezoError, match="are not those of the other workers of its site"):
            await asyncio.wait_for(flipped.task, PATIENCE_S)
        await asyncio.gather(*(w.task for w in sound))
        [worker] = [w for w in site.relay.status("").workers if w.worker == "w3"]
        assert worker.diverged
    assert not [r for r in records_of(tmp_path / "centre.db") if isinstance(r, Diverged)]


async def test_a_site_with_other_weights_than_the_run_is_sent_away_and_comes_back(
    tmp_path: Path, light_workers: LightWorkers
) -> None:
    genesis = genesis_with(
        workers_min=3, quorum=3, digest_every_rounds=1, rounds=12, deadline_ms=2000
    )
    centre = tmp_path / "centre.db"
    async with (
        served(centre, genesis) as coordinator,
        relayed(coordinator.address, tmp_path, "site-a") as site,
    ):
        light_workers.start(coordinator.address, "w1")
        light_workers.start(coordinator.address, "w2")
        flipped = light_workers.start(site.address, "w3", FlippedEngine(4))
        with pytest.raises(FedMezoError, match="Of this site, the coordinator above says"):
            await asyncio.wait_for(flipped.task, PATIENCE_S)
        light_workers.all.remove(flipped)
        assert flipped.copy is not None
        flipped.copy.unlink()
        light_workers.start(site.address, "w3")
        await light_workers.finish()
    found = [r for r in records_of(centre) if isinstance(r, Diverged)]
    assert [r.party for r in found] == ["site-a"]
    assert len({w.engine.weights for w in light_workers.all}) == 1


async def test_models_at_two_sites_and_a_late_one_end_in_the_same_weights(
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    model_folder: Path,
    data_files: list[Path],
    workers: Workers,
) -> None:
    genesis = tiny_genesis(rounds=6, workers_min=2, quorum=2, weighting="rows", report_losses=True)
    centre = tmp_path / "centre.db"
    signer = open_signer(tmp_path / "centre.key")
    async with (
        served(centre, genesis, signer=signer) as coordinator,
        relayed(coordinator.address, tmp_path, "site-a", workers_min=2) as first,
        relayed(coordinator.address, tmp_path, "site-b", workers_min=2) as second,
    ):
        started = [
            workers.start(relay.address, f"w{number}", data_files[number])
            for number, relay in enumerate((first, first, second, second))
        ]
        await asyncio.gather(*(w.task for w in started))
        late = workers.start(second.address, "late", data_files[4])
        await late.task
        found = {d.weights_digest for s in (first, second) for d in s.relay.status("").digests}
        assert {d.weights_digest for d in coordinator.daemon.status("").digests} == found
        rounds = coordinator.daemon.status("").recent_rounds
        assert all(r.HasField("mean_loss") and r.answers == 2 for r in rounds)
    party = open_party(genesis.config, str(model_folder), threads=1)
    party.weights.apply(1, pairs_of(commits_of(centre)))
    assert found == {party.weights.digest()}


# ---------------------------------------------------------------- what is refused


async def test_a_copy_of_another_run_is_refused(tmp_path: Path) -> None:
    async with (
        served(tmp_path / "one.db", genesis_with()) as coordinator,
        relayed(coordinator.address, tmp_path, "site-a"),
    ):
        pass
    async with served(tmp_path / "two.db", genesis_with(seed=8)) as coordinator:
        with pytest.raises(FedMezoError, match="The journal copy is of another run"):
            async with relayed(coordinator.address, tmp_path, "site-a"):
                pass


async def test_a_coordinator_above_whose_journal_went_back_is_left_in_time(
    tmp_path: Path, light_workers: LightWorkers
) -> None:
    genesis = genesis_with(workers_min=1, quorum=1)
    async with (
        served(tmp_path / "one.db", genesis) as coordinator,
        relayed(coordinator.address, tmp_path, "site-a") as site,
    ):
        light_workers.start(site.address, "w1", keeps=False)
        await light_workers.finish()
    write_genesis(tmp_path / "old.db", genesis)
    async with (
        served(tmp_path / "old.db", genesis) as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        settings = RelaySettings(
            upstream=coordinator.address,
            name="site-a",
            journal_copy=tmp_path / "site-a.db",
            give_up_after_s=0.3,
        )
        relay = Relay(settings, client)
        await relay.load()
        with pytest.raises(JournalBehindError, match="the journal there went back"):
            await asyncio.wait_for(relay.serve(), PATIENCE_S)
        await relay.close()


async def test_a_relay_without_a_coordinator_waits_and_stops_cleanly(tmp_path: Path) -> None:
    programs = Programs(tmp_path)
    try:
        waiting = programs.start(
            "fedmezo_coordinator.programs.relay_command",
            *("--upstream", "127.0.0.1:9", "--name", "a", "--listen", "127.0.0.1:0"),
        )
        await waiting.says("No coordinator answers at 127.0.0.1:9")
        waiting.send(signal.SIGTERM)
        assert await waiting.wait() == 0
        hasty = programs.start(
            "fedmezo_coordinator.programs.relay_command",
            *("--upstream", "127.0.0.1:9", "--name", "a", "--listen", "127.0.0.1:0"),
            *("--give-up-after-s", "0"),
        )
        assert await hasty.wait() == 1
        assert "fedmezo-relay: No coordinator answers at 127.0.0.1:9" in hasty.said
        async with served(tmp_path / "one.db", genesis_with()) as coordinator:
            relay = programs.start(
                "fedmezo_coordinator.programs.relay_command",
                *("--upstream", coordinator.address, "--name", "a", "--listen", "127.0.0.1:0"),
            )
            await relay.says("run tiny-run is served at")
            relay.send(signal.SIGTERM)
            assert await relay.wait() == 0
    finally:
        programs.end()


async def test_two_relays_of_one_name_are_told_apart(
    tmp_path: Path, light_workers: LightWorkers
) -> None:
    """The second one takes the place of the first, which ends and says why."""
    genesis = genesis_with(rounds=1000, workers_min=1, quorum=1)
    async with (
        served(tmp_path / "one.db", genesis) as coordinator,
        relayed(coordinator.address, tmp_path, "site-a") as first,
        relayed(coordinator.address, tmp_path, "site-a", journal_copy=tmp_path / "b.db") as second,
    ):
        light_workers.start(first.address, "w1", keeps=False)

        async def has_come() -> bool:
            return coordinator.daemon.status("").round >= 3

        await until(has_come, "round 3")
        light_workers.start(second.address, "w2", keeps=False)
        with pytest.raises(FedMezoError, match="Another process has joined as worker site-a"):
            await asyncio.wait_for(first.serving, PATIENCE_S)


async def test_a_relay_speaks_tls_above_and_below(
    tmp_path: Path, light_workers: LightWorkers
) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    pair = ca.issue_cert("127.0.0.1")
    pair.private_key_pem.write_to_path(tmp_path / "key.pem")
    for blob in pair.cert_chain_pems:
        blob.write_to_path(tmp_path / "cert.pem", append=True)
    tls = (tmp_path / "cert.pem", tmp_path / "key.pem")
    files: dict[str, Any] = {"tls_ca": tmp_path / "ca.pem", "tls_cert": tls[0], "tls_key": tls[1]}
    genesis = genesis_with(workers_min=1, quorum=1)
    async with (
        served(tmp_path / "centre.db", genesis, tls=tls) as coordinator,
        relayed(coordinator.address, tmp_path, "site-a", **files) as site,
    ):
        light_workers.start(site.address, "w1", tls_ca=tmp_path / "ca.pem")
        await light_workers.finish()
    assert len(heads_in(tmp_path)) == 1


async def test_a_worker_that_polls_may_work_at_a_relay(tmp_path: Path) -> None:
    genesis = genesis_with(workers_min=1, quorum=1, weighting="uniform", rounds=3)
    async with (
        served(tmp_path / "centre.db", genesis) as coordinator,
        relayed(coordinator.address, tmp_path, "site-a") as site,
        scripted_workers(site.address, genesis, "polling") as [scripted],
    ):
        client = scripted.client
        await vouched_for(client)
        hello = wire.SessionRequest(hello=scripted.hello())
        token = (await client.poll_session(b"", hello)).token
        answers: list[wire.SessionRequest] = []
        acknowledged, finished = [], False
        while not finished:
            down = await client.poll_session(token, *answers, wait_ms=30_000)
            answers = []
            for message in down.messages:
                if message.HasField("assign"):
                    answers.append(wire.SessionRequest(answer=answer_to(message.assign)))
                if message.HasField("ack"):
                    acknowledged.append(message.ack.ticket.round)
                finished |= message.HasField("finished")
        assert acknowledged == [1, 2, 3]


async def test_a_relay_keeps_no_snapshots_and_no_replica(tmp_path: Path) -> None:
    async with (
        served(tmp_path / "one.db", genesis_with()) as coordinator,
        relayed(coordinator.address, tmp_path, "site-a") as site,
        CoordinatorClient(site.address) as client,
    ):
        with pytest.raises(FedMezoError, match="No snapshots are kept here; read the journal"):
            async for _ in client.read_snapshot("tiny-run", 1, 0):
                pass
        with pytest.raises(FedMezoError, match="Only the replica process"):
            await client.report_replica("tiny-run", b"", 0, b"d" * 32, None)


async def test_who_comes_to_a_relay_that_is_not_up_to_date_is_told_to_come_again(
    tmp_path: Path,
) -> None:
    genesis = genesis_with()
    async with (
        served(tmp_path / "one.db", genesis) as coordinator,
        relayed(coordinator.address, tmp_path, "site-a") as site,
        scripted_workers(site.address, genesis, "w1") as [scripted],
    ):
        await vouched_for(scripted.client)
        with pytest.raises(UnavailableError, match="has yet to catch up with the caller"):
            await scripted.open(round=3)
        with pytest.raises(UnavailableError, match="which holds round 5"):
            await scripted.client.get_run("", 5)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--name", "Site A"], "name = 'Site A' is not allowed"),
        (["--name", "replica"], "and not 'replica'"),
        (["--name", "a", "--upstream", "nowhere"], "write it as host:port"),
        (["--name", "a", "--deadline-share", "0"], "deadline_share"),
        (["--name", "a", "--upstream", "127.0.0.1:7466"], "is this relay's own address"),
        (["--name", "a", "--tls-cert", "c.pem"], "tls_cert and tls_key go together"),
        ([], "name is missing"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_sentence(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedmezo_coordinator.programs.relay_command import main

    assert main(flags) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert "\n" not in said
