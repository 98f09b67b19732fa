"""The baseline trains the same thing on the same data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.first_order import FedAvg, FirstOrder, differentiable_loss, train
from experiments.judging import Judge
from fedmezo_core.errors import MeasurementError
from fedmezo_core.zo.assignment import open_batches
from fedmezo_core.zo.data.rows import Example, read_examples
from fedmezo_core.zo.forward.row_states import RowStates, SpooledRows
from fedmezo_core.zo.model.manifest import trained_tensors
from fedmezo_core.zo.party import Party, open_party
from tests.integration.support.harness import config_of
from tests.integration.support.parties import save_model

COLUMNS = ("text", "label")
LORA = {"rank": 2, "alpha": 4.0, "target_modules": ["c_attn"]}


def rows_of(files: list[Path]) -> dict[str, list[Example]]:
    return {f"w{k}": read_examples(path, COLUMNS) for k, path in enumerate(files, start=1)}


def party_of(model: Path, **changes: Any) -> Party:
    return open_party(config_of(**changes), str(model), threads=1)


@pytest.mark.parametrize("kind", ["classification", "instruction"])
def test_its_loss_is_the_tasks_loss(model_folder: Path, data_files: list[Path], kind: str) -> None:
    task = {"template": "{text} It was", "tokens_max": 32, "kind": kind}
    task |= (
        {"verbalizers": {"negative": " terrible", "positive": " great"}}
        if kind == "classification"
        else {"response_column": "label"}
    )
    party = party_of(model_folder, task=task)
    dataset = party.task.encode(read_examples(data_files[0], COLUMNS))
    batch = open_batches(party, dataset, "w1").batch(1, 0)
    expected = party.task.loss(party.loaded.model, batch)
    assert float(differentiable_loss(party, batch)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_it_learns_and_changes_nothing_else(
    model_folder: Path, data_files: list[Path], heldout_file: Path, lora: dict[str, Any] | None
) -> None:
    party = party_of(model_folder, lora=lora, rounds=20)
    trained = trained_tensors(party.loaded.model, party.loaded.manifest)
    places = {tensor.data_ptr() for tensor in trained}
    others = [p for p in party.loaded.model.parameters() if p.data_ptr() not in places]
    before = [parameter.clone() for parameter in others]
    judge = Judge(party, read_examples(heldout_file, COLUMNS), every_rounds=20)
    run = FedAvg(party, rows_of(data_files[:2]), FirstOrder(learning_rate=1e-2), judge=judge)
    run.run()
    assert [point.round for point in judge.whole] == [0, 20]
    first, last = (sum(run.train_losses[round_]) / 2 for round_ in (1, 20))
    assert last < first - 0.02
    assert all(torch.equal(a, b) for a, b in zip(others, before, strict=True))
    assert not any(p.requires_grad or p.grad is not None for p in party.loaded.model.parameters())
    shipped = sum(tensor.nbytes for tensor in trained)
    assert run.bytes_up == run.bytes_down == 20 * 2 * shipped
    assert (lora is None) == (not others)


def test_kept_row_states_only_save_time(
    tmp_path: Path, data_files: list[Path], heldout_file: Path
) -> None:
    save_model(tmp_path / "model", layers=4)
    lora = LORA | {"target_modules": ["h.3.mlp.c_proj"]}
    losses = []
    for keeps in (False, True):
        party = party_of(tmp_path / "model", lora=lora, rounds=3, dtype="float32")
        states = RowStates(
            party.loaded.model, party.loaded.manifest, party.task, SpooledRows(1 << 20)
        )
        judge = Judge(party, read_examples(heldout_file, COLUMNS), every_rounds=3)
        FedAvg(
            party,
            rows_of(data_files[:2]),
            FirstOrder(learning_rate=3e-2),
            judge=judge,
            row_states=states if keeps else None,
        ).run()
        losses.append([point.loss for point in judge.whole])
    assert states.cut
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][1] < losses[0][0] - 1e-3


def test_it_computes_only_what_follows_the_kept_states(
    tmp_path: Path, data_files: list[Path]
) -> None:
    """A run that trains the last MLP alone needs one position of a row."""
    save_model(tmp_path / "model", layers=4)
    lora = LORA | {"target_modules": ["h.3.mlp.c_proj"]}
    party = party_of(tmp_path / "model", lora=lora, dtype="float32")
    model = party.loaded.model
    states = RowStates(model, party.loaded.manifest, party.task, SpooledRows(1 << 20))
    dataset = party.task.encode(read_examples(data_files[0], COLUMNS))
    batch = open_batches(party, dataset, "w1").batch(1, 0)
    train(party, FirstOrder(learning_rate=1e-3), [batch], states)
    seen: list[int] = []
    inner: Any = model.get_base_model()  # type: ignore[operator]
    with inner.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["input_ids"].shape[1]), with_kwargs=True
    ):
        train(party, FirstOrder(learning_rate=1e-3), [batch], states)
    assert seen == [1]


def test_workers_count_equally_or_by_their_rows(model_folder: Path, data_files: list[Path]) -> None:
    """A round is the weighted mean of what each worker would have made of the base alone."""
    rows = {
        "w1": read_examples(data_files[0], COLUMNS),
        "w2": read_examples(data_files[1], COLUMNS)[:8],
    }
    first_order = FirstOrder(learning_rate=1e-2)

    def weights(party: Party) -> torch.Tensor:
        tensors = trained_tensors(party.loaded.model, party.loaded.manifest)
        return torch.cat([tensor.detach().flatten() for tensor in tensors]).clone()

    alone = []
    for name, own in rows.items():
        party = party_of(model_folder, rounds=1)
        batches = open_batches(party, party.task.encode(own), name)
        train(party, first_order, [batches.batch(1, step) for step in range(2)])
        alone.append(weights(party))
    for average, shares in (("uniform", (1 / 2, 1 / 2)), ("rows", (24 / 32, 8 / 32))):
        party = party_of(model_folder, rounds=1)
        FedAvg(party, rows, FirstOrder(learning_rate=1e-2, average=average)).run()
        expected = shares[0] * alone[0] + shares[1] * alone[1]
        assert torch.allclose(weights(party), expected, atol=1e-6)
    assert not torch.allclose(alone[0], alone[1], atol=1e-4)


def test_a_run_that_blows_up_says_so(model_folder: Path, data_files: list[Path]) -> None:
    run = FedAvg(party_of(model_folder), rows_of(data_files[:1]), FirstOrder(learning_rate=1e30))
    with pytest.raises(MeasurementError, match="loss is"):
        run.run()
