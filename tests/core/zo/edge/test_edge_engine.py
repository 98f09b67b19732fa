"""A worker without torch measures what a torch worker measures, and refuses what does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ConfigError, FedMezoError, MeasurementError, MismatchError
from fedmezo_core.journal.codec import encode_record
from fedmezo_core.records import Committed, SeedRange, digest64_of
from fedmezo_core.zo.assignment import measure, open_batches, open_estimator
from fedmezo_core.zo.commits import commits_of
from fedmezo_core.zo.edge import array_losses, edge_engine
from fedmezo_core.zo.edge.array_losses import EdgeBatch
from fedmezo_core.zo.edge.array_weights import Adapter
from fedmezo_core.zo.edge.base_form import read_form
from fedmezo_core.zo.edge.edge_engine import EdgeEngine
from fedmezo_core.zo.party import Party, open_party
from fedmezo_core.zo.privacy.accounting import PrivacyBudget
from tests.core.zo.edge.conftest import Run, contract, order_of, rows

ROOT = Path(__file__).parents[4]
INSTRUCTION = {"kind": "instruction", "tokens_max": 64}


class TorchLosses:
    """A runtime for tests: the torch model of the run, with the adapter that it is given."""

    def __init__(self, party: Party) -> None:
        self._party = party
        self.passes = 0

    @torch.inference_mode()
    def __call__(self, adapters: Iterable[Adapter], batch: EdgeBatch) -> list[float]:
        model: Any = self._party.loaded.model
        parameters = dict(model.named_parameters())
        losses = []
        for adapter in adapters:
            for name, value in adapter.items():
                parameters[name].copy_(torch.from_numpy(value))
            total = 0.0
            for part in batch.parts:
                self.passes += 1
                padded = part.padded
                ids, mask, positions = map(
                    torch.from_numpy, (padded.input_ids, padded.attention_mask, padded.position_ids)
                )
                logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
                wanted = logits[torch.from_numpy(part.rows), torch.from_numpy(part.columns)]
                total += part.loss_sum(wanted.numpy(), self._party.task.verbalizer_ids)
            losses.append(total / batch.target_count)
        return losses


def _engine(run: Run, **more: Any) -> tuple[EdgeEngine, TorchLosses]:
    other = open_party(run.genesis.config, str(run.party.loaded.folder), threads=1)
    losses = TorchLosses(other)
    return EdgeEngine(
        run.genesis, "w1", read_form(run.form, run.genesis), losses, rows(), threads=1, **more
    ), losses


COMMIT = Committed(1, (SeedRange(9, (0.02, -0.03)),), rounding_seed=1)


@pytest.mark.parametrize("estimator", ["two_sided", "one_sided"])
@pytest.mark.parametrize("task", [None, INSTRUCTION])
@pytest.mark.parametrize("freeze_a", [True, False])
def test_it_answers_what_the_torch_party_answers(
    run_of: Callable[[RunConfig], Run], estimator: str, task: Any, freeze_a: bool
) -> None:
    run = run_of(contract(freeze_a=freeze_a, estimator=estimator, task=task, probes=2))
    config, party = run.genesis.config, run.party
    engine, _ = _engine(run)
    engine.apply([COMMIT])
    party.weights.apply(1, commits_of([COMMIT]))
    assert engine.digest() == party.weights.digest()
    mine = engine.measure(order_of(config))
    dataset = party.encode(Path("d"), rows())
    theirs = measure(
        party,
        open_estimator(party, threads=1),
        open_batches(party, dataset, "w1"),
        order_of(config),
        digest=party.weights.digest,
    )
    assert mine.ticket == theirs.ticket
    assert mine.scalars.weights_digest64 == theirs.scalars.weights_digest64
    assert mine.scalars.rows == theirs.scalars.rows == len(rows())
    np.testing.assert_allclose(
        mine.scalars.projected_grads, theirs.scalars.projected_grads, rtol=1e-2, atol=1e-4
    )
    assert mine.scalars.mean_loss == pytest.approx(theirs.scalars.mean_loss, rel=1e-5)


def test_a_measurement_writes_no_weights_and_repeats_itself(
    run_of: Callable[[RunConfig], Run],
) -> None:
    run = run_of(contract())
    engine, _ = _engine(run)
    before = engine.digest()
    order = order_of(run.genesis.config, want_digest=False)
    first = engine.measure(order)
    assert first.scalars.weights_digest64 is None
    assert engine.measure(order) == first
    assert engine.digest() == before


def test_with_a_privacy_budget_it_says_noise_once(
    run_of: Callable[[RunConfig], Run], tmp_path: Path
) -> None:
    run = run_of(contract(report_losses=False, batch_size=2))
    budget = PrivacyBudget(epsilon=8.0, delta=1e-3, clip=1.0, ledger=tmp_path / "ledger")
    engine, _ = _engine(run, privacy=budget)
    order = order_of(run.genesis.config)
    first = engine.measure(order)
    assert engine.measure(order) == first
    assert (first.scalars.mean_loss, first.scalars.rows) == (0.0, 1)
    other, _ = _engine(run, privacy=replace(budget, ledger=tmp_path / "other"))
    assert other.measure(order).scalars.projected_grads != first.scalars.projected_grads


@pytest.mark.parametrize("task", [None, INSTRUCTION])
def test_parts_of_a_batch_give_the_loss_of_the_whole(
    run_of: Callable[[RunConfig], Run], task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(contract(task=task))
    order = order_of(run.genesis.config)
    engine, losses = _engine(run)
    whole, passes = engine.measure(order), losses.passes
    monkeypatch.setattr(edge_engine, "PASS_TOKENS_MAX", 30)
    in_parts, more = (engine.measure(order), losses.passes - passes)
    assert more > passes
    assert in_parts.scalars.projected_grads == pytest.approx(
        whole.scalars.projected_grads, rel=1e-2, abs=1e-4
    )
    monkeypatch.setattr(edge_engine, "PASS_TOKENS_MAX", 1 << 10)
    monkeypatch.setattr(array_losses, "LOGITS_MAX", 1)
    assert engine.measure(order).scalars.mean_loss == pytest.approx(whole.scalars.mean_loss)


def test_a_loss_that_is_no_number_is_an_error(run_of: Callable[[RunConfig], Run]) -> None:
    run = run_of(contract())
    form = read_form(run.form, run.genesis)

    def broken(adapters: Iterable[Adapter], _batch: EdgeBatch) -> list[float]:
        return [float("nan") for _ in adapters]

    engine = EdgeEngine(run.genesis, "w1", form, broken, rows(), threads=1)
    with pytest.raises(MeasurementError, match=r"The loss at \+eps is nan on the batch of round 2"):
        engine.measure(order_of(run.genesis.config))


def test_rows_longer_than_the_positions_are_refused(run_of: Callable[[RunConfig], Run]) -> None:
    run = run_of(contract())
    form = read_form(run.form, run.genesis)
    object.__setattr__(
        form, "description", form.description.model_copy(update={"positions_max": 8})
    )
    with pytest.raises(ConfigError, match="knows 8 positions; make the rows shorter"):
        EdgeEngine(run.genesis, "w1", form, lambda _a, _b: [], rows())


WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "peft", "accelerate"}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import json
from pathlib import Path
from fedmezo_core.events import Measure, Ticket, Work
from fedmezo_core.journal.codec import decode_record
from fedmezo_core.zo.data.rows import read_rows
from fedmezo_core.zo.edge.base_form import read_form
from fedmezo_core.zo.edge.edge_engine import EdgeEngine
from fedmezo_core.zo.edge import onnx_losses
genesis, commit = (decode_record(Path(p).read_bytes()) for p in sys.argv[1:3])
rows = read_rows(Path(sys.argv[4]), genesis.config.task)
form = read_form(Path(sys.argv[3]), genesis)
def losses(adapters, batch):
    return [float(sum(abs(a).sum() for a in adapter.values())) for adapter in adapters]
engine = EdgeEngine(genesis, "w1", form, losses, rows, threads=1)
engine.apply([commit])
config = genesis.config
seeds = tuple(range(100, 100 + config.local_steps * config.probes))
measured = engine.measure(Measure(Ticket(1, 2, 0), Work(seeds, 1e-2, config.eps, True)))
assert not {"torch", "transformers", "peft", "accelerate"} & sys.modules.keys()
print(json.dumps([engine.digest().hex(), measured.scalars.weights_digest64]))
"""


def test_no_torch_is_loaded(run_of: Callable[[RunConfig], Run], tmp_path: Path) -> None:
    """In an interpreter that refuses to import torch and what needs it."""
    run = run_of(contract())
    records = {"genesis": encode_record(run.genesis), "commit": encode_record(COMMIT)}
    for name, body in records.items():
        (tmp_path / name).write_bytes(body)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row.values) + "\n" for row in rows()))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *(str(tmp_path / n) for n in records), str(run.form),
         str(data)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"},
    )  # fmt: skip
    digest, digest64 = json.loads(done.stdout)
    run.party.weights.apply(1, commits_of([COMMIT]))
    assert bytes.fromhex(digest) == run.party.weights.digest()
    assert digest64 == digest64_of(bytes.fromhex(digest))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: (folder / "form.json").unlink(), "There is no form of a base in"),
        (lambda folder: (folder / "form.json").write_text("{}"), "are missing"),
        (lambda folder: (folder / "model.gguf").write_bytes(b"other"), "is damaged: its SHA-256"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be read"),
        (
            lambda folder: (folder / "form.json").write_text(
                (folder / "form.json").read_text() + " "
            ),
            "is not one that the run admits",
        ),
    ],
)
def test_a_folder_that_is_damaged_or_another_is_refused(
    run_of: Callable[[RunConfig], Run], change: Callable[[Path], object], sentence: str
) -> None:
    run = run_of(contract())
    change(run.form)
    with pytest.raises(FedMezoError, match=sentence) as raised:
        read_form(run.form, run.genesis)
    # A resident worker lets a `MismatchError` out of its machine.
    assert not (isinstance(raised.value, MismatchError) and str(run.form) in str(raised.value))


def test_a_form_of_another_run_is_refused(run_of: Callable[[RunConfig], Run]) -> None:
    run = run_of(contract())
    other = open_party(
        run.genesis.config.model_copy(update={"seed": 2}), str(run.party.loaded.folder), threads=1
    ).genesis()
    with pytest.raises(MismatchError, match=r"The base weights of the form in .* differ") as raised:
        read_form(run.form, other)
    assert str(run.form) not in str(raised.value)


@pytest.mark.parametrize(
    ("update", "sentence"),
    [
        ({"lora": None, "base_forms": ()}, "serves runs with lora only"),
        (
            {"task": contract().task.model_copy(update={"objective": "a:b"})},
            "a form of the base gives only losses",
        ),
        (
            {"task": contract().task.model_copy(update={"template_version": 2})},
            "needs the whole tokenizer",
        ),
    ],
)
def test_runs_that_need_more_than_losses_are_refused(
    run_of: Callable[[RunConfig], Run], update: Any, sentence: str
) -> None:
    run = run_of(contract())
    genesis = replace(run.genesis, config=run.genesis.config.model_copy(update=update))
    with pytest.raises(ConfigError, match=sentence):
        read_form(run.form, genesis)
