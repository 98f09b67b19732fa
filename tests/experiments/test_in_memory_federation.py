"""A federation in one process is a networked run without the network."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.attacks import ATTACKS, Attack
from experiments.in_memory_federation import InMemoryFederation, StalledError, Worker
from experiments.judging import Judge
from fedmezo_core.errors import MeasurementError
from fedmezo_core.events import Measure, Measured, MeasureFailed
from fedmezo_core.journal.codec import decode_record, encode_record
from fedmezo_core.journal.journal import Journal, JournalStore, MemoryStore
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.records import Answered, Committed, Evaluated, Genesis, Opened, Record
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.zo.assignment import open_row_states
from fedmezo_core.zo.data.rows import Example, read_examples
from fedmezo_core.zo.estimator import Estimator
from fedmezo_core.zo.forward.row_states import RowStates, SpooledRows
from fedmezo_core.zo.party import Party, open_party
from tests.integration.support.harness import config_of, entries_of, run_values, served
from tests.integration.support.parties import Workers, save_model

COLUMNS = ("text", "label")


def rows_of(files: list[Path]) -> dict[str, list[Example]]:
    return {f"w{k}": read_examples(path, COLUMNS) for k, path in enumerate(files, start=1)}


def party_of(model: Path, **changes: Any) -> Party:
    return open_party(config_of(**changes), str(model), threads=1)


def records_in(store: MemoryStore | SqliteStore) -> list[Record]:
    return [decode_record(entry.row.body) for entry in Journal(store).load()]


def by_kind(records: list[Record], *kinds: type) -> set[bytes]:
    return {encode_record(record) for record in records if isinstance(record, kinds)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cohort_size_max": 3, "quorum": 3, "digest_every_rounds": 2, "report_losses": True},
        {"probes": 3, "estimator": "one_sided", "distribution": "gaussian", "dtype": "bfloat16"},
        {"lora": {"rank": 2, "alpha": 4.0, "target_modules": ["c_attn"]}, "learning_rate": 1e-2},
        {"seed_policy": "shared", "weighting": "rows", "weight_decay": 1.0},
        {"seed_policy": "pool", "pool_size": 8, "rebase_every_rounds": 2},
        {"personal_rate": "update_distance", "schedule": "cosine", "normalized_step": True},
    ],
    ids=["plain", "not-everyone", "one-sided-bfloat16", "lora", "shared", "pool", "personal"],
)
async def test_it_ends_in_the_head_of_a_networked_run_with_the_same_bytes_of_traffic(
    workers: Workers,
    model_folder: Path,
    data_files: list[Path],
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    party = party_of(model_folder, **{"rounds": 4, "workers_min": 4, **changes})
    await compare(party, None, workers, data_files, tmp_path)


async def test_with_states_of_rows_it_does_so_too(data_files: list[Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_model(model, layers=6)
    workers = Workers(model)
    party = party_of(
        model,
        rounds=4,
        batch_size=12,
        probes=3,
        estimator="one_sided",
        distribution="low_rank_1",
        lora={"rank": 2, "alpha": 4.0, "target_modules": ["h.5.mlp.c_proj"], "freeze_a": True},
    )
    row_states = open_row_states(party, SpooledRows(1 << 20), visits=4, batch_size=12)
    try:
        await compare(party, row_states, workers, data_files, tmp_path)
    finally:
        await workers.end()
    assert row_states is not None
    assert row_states.cut == "base_model.model.transformer.h.5.attn"


@pytest.mark.parametrize("metric", ["error_rate", "one_minus_token_f1"])
async def test_by_an_objective_it_does_so_too(
    metric: str, data_files: list[Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    save_model(model, layers=6)
    workers = Workers(model)
    generates = metric == "one_minus_token_f1"
    task = {
        **run_values()["task"],
        "kind": "instruction" if generates else "classification",
        "response_column": "label",
        "objective": f"fedmezo_core.zo.objectives:{metric}",
        "generated_tokens_max": 3 if generates else 0,
    }
    party = party_of(
        model,
        rounds=4,
        batch_size=12,
        probes=3,
        eps=0.3,
        estimator="one_sided",
        distribution="low_rank_1",
        task=task,
        lora={"rank": 2, "alpha": 4.0, "target_modules": ["h.5.mlp.c_proj"], "freeze_a": True},
    )
    row_states = open_row_states(party, SpooledRows(1 << 20), visits=4, batch_size=12)
    try:
        await compare(party, row_states, workers, data_files, tmp_path)
    finally:
        await workers.end()
    assert row_states is not None
    assert row_states.cut == "base_model.model.transformer.h.5.attn"


async def compare(
    party: Party,
    row_states: RowStates | None,
    workers: Workers,
    data_files: list[Path],
    tmp_path: Path,
) -> None:
    """Run `party` in this process and, from the same genesis, over the network."""
    store = MemoryStore()
    federation = InMemoryFederation(
        party, rows_of(data_files[:4]), store=store, row_states=row_states
    )
    genesis = party.genesis()
    federation.run()

    path = tmp_path / "journal.db"
    async with (
        served(path, genesis) as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        working = [
            workers.start(coordinator.address, f"w{k}", path, objective=party.config.task.objective)
            for k, path in enumerate(data_files[:4], start=1)
        ]
        assert [await worker.outcome() for worker in working] == [None] * 4
        status = await client.get_status()
    networked = entries_of(path)

    assert federation.journal.head == networked[-1].head == status.head
    ours, theirs = records_in(store), [decode_record(entry.row.body) for entry in networked]
    assert len(ours) == len(theirs)
    commits = [encode_record(record) for record in ours if isinstance(record, Committed)]
    assert commits == [encode_record(r) for r in theirs if isinstance(r, Committed)]
    # Over the network answers come in the order in which workers are done: the same set of records.
    for kinds in ((Genesis,), (Opened,), (Answered,)):
        assert by_kind(ours, *kinds) == by_kind(theirs, *kinds)
    assert {d.weights_digest for d in status.digests if d.round == 4} == {party.weights.digest()}
    for counted in status.workers:
        mine = federation.workers[counted.worker]
        assert (mine.bytes_up, mine.bytes_down) == (counted.bytes_up, counted.bytes_down)


def test_it_is_a_function_of_its_arguments_in_any_store(
    model_folder: Path, data_files: list[Path], tmp_path: Path
) -> None:
    chains = []
    stores: tuple[JournalStore, ...] = (MemoryStore(), SqliteStore(tmp_path / "journal.db"))
    for store in stores:
        federation = InMemoryFederation(
            party_of(model_folder), rows_of(data_files[:4]), store=store
        )
        federation.run()
        assert federation.round == 6
        assert sorted(federation.train_losses) == [1, 2, 3, 4, 5, 6]
        assert {len(losses) for losses in federation.train_losses.values()} == {4}
        chains.append(federation.journal.chain)
        assert federation.working_s > 0
    assert chains[0] == chains[1]


def test_evaluations_are_recorded_and_do_not_change_the_run(
    model_folder: Path, data_files: list[Path], heldout_file: Path
) -> None:
    rows = rows_of(data_files[:4])
    plain = InMemoryFederation(party_of(model_folder), rows)
    plain.run()
    party, store = party_of(model_folder), MemoryStore()
    judge = Judge(party, read_examples(heldout_file, COLUMNS), every_rounds=4, curve_rows=4)
    judged = InMemoryFederation(party, rows, judge=judge, store=store)
    judged.run()
    assert judged.journal.head == plain.journal.head
    found = [record for record in records_in(store) if isinstance(record, Evaluated)]
    assert [(record.round, record.rows) for record in found] == [(0, 4), (4, 4), (6, 4)]
    assert [(point.round, point.rows) for point in judge.curve] == [(0, 4), (4, 4), (6, 4)]
    assert [(point.round, point.rows) for point in judge.whole] == [(0, 10), (6, 10)]
    losses = [point.loss for point in judge.curve]
    assert [record.loss for record in found] == pytest.approx(losses)
    assert found[-1].weights_digest == party.weights.digest()


def test_a_rate_that_ruins_the_weights_pauses_the_run(
    model_folder: Path, data_files: list[Path]
) -> None:
    """Nobody reports a loss or evaluates: the zeros tell."""
    ruinous = party_of(model_folder, learning_rate=1e7, train=["h.0.attn"], rounds=30)
    federation = InMemoryFederation(ruinous, rows_of(data_files[:4]))
    with pytest.raises(StalledError, match=r"every projected gradient since round \d is exactly 0"):
        federation.run()
    assert federation.round < 8


class Attacked(InMemoryFederation):
    """In round 3, the last worker gives the largest scalars that are not refused."""

    def _measure(self, worker: Worker, order: Measure) -> Measured | MeasureFailed:
        measured = super()._measure(worker, order)
        if isinstance(measured, MeasureFailed) or (worker.name, order.ticket.round) != ("w4", 3):
            return measured
        huge = tuple(math.copysign(1e4, grad) for grad in measured.scalars.projected_grads)
        return replace(measured, scalars=measured.scalars._replace(projected_grads=huge))


def test_one_huge_answer_ruins_no_run_and_honest_runs_keep_every_bit(
    model_folder: Path, data_files: list[Path], heldout_file: Path
) -> None:
    heldout, rows = read_examples(heldout_file, COLUMNS), rows_of(data_files[:4])

    def run_of(kind: type[InMemoryFederation], factor: float) -> tuple[list[float], bytes]:
        party = party_of(
            model_folder, learning_rate=3e-3, pause_rounds=0, clip_median_factor=factor
        )
        judge = Judge(party, heldout, every_rounds=1, curve_rows=None)
        federation = kind(party, rows, judge=judge)
        federation.run()
        return [point.loss for point in judge.curve], party.weights.digest()

    honest, digest = run_of(InMemoryFederation, 10.0)
    assert run_of(InMemoryFederation, 0.0)[1] == digest
    assert max(honest) < 0.8
    clipped, _ = run_of(Attacked, 10.0)
    assert clipped[:3] == honest[:3]
    assert max(clipped) < 0.8
    unclipped, _ = run_of(Attacked, 0.0)
    assert unclipped[3] > 5


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack != "none"])
def test_attackers_send_something_else_and_honest_workers_what_they_measured(
    model_folder: Path, data_files: list[Path], attack: Attack
) -> None:
    def answers(attackers: int) -> dict[int, Answered]:
        store = MemoryStore()
        party = party_of(model_folder, rounds=1, seed_policy="shared", local_steps=3)
        rows = rows_of(data_files[:4])
        InMemoryFederation(party, rows, store=store, attack=attack, attackers=attackers).run()
        return {r.slot: r for r in records_in(store) if isinstance(r, Answered)}

    honest, found = answers(0), answers(1)
    assert [found[slot] == honest[slot] for slot in range(4)] == [True, True, True, False]
    if attack == "copies":
        assert found[3].projected_grads == found[2].projected_grads
    if attack == "sign turned":
        assert found[3].projected_grads == tuple(-g for g in honest[3].projected_grads)


def test_dozens_of_workers(model_folder: Path, data_files: list[Path]) -> None:
    rows = {f"w{k:02}": read_examples(data_files[k % 5], COLUMNS) for k in range(40)}
    many = {"workers_min": 40, "quorum": 40, "rounds": 2}
    federation = InMemoryFederation(party_of(model_folder, **many), rows)
    federation.run()
    assert federation.round == 2


def test_a_run_that_cannot_go_on_says_why(
    model_folder: Path, data_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = InMemoryFederation(party_of(model_folder), rows_of(data_files[:4]))

    def fail(*_: object) -> None:
        raise MeasurementError("The loss is nan.")

    monkeypatch.setattr(Estimator, "measure", fail)
    with pytest.raises(StalledError, match="Round 1 cannot be closed: The loss is nan"):
        federation.run()
