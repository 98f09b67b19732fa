"""Adapters whose B is P C: only C is trained, and what is exported is a plain adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmezo_core.config import RunConfig, parse_run
from fedmezo_core.errors import ConfigError, DataError
from fedmezo_core.events import Measure, Ticket, Work
from fedmezo_core.zo.assignment import measure, open_batches, open_estimator
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.data.rows import Example, read_examples
from fedmezo_core.zo.export import export_adapter, export_model, write_adapter
from fedmezo_core.zo.fitting import fit_adapter
from fedmezo_core.zo.model.loading import load_model
from fedmezo_core.zo.model.model_card import ModelCard
from fedmezo_core.zo.model.weight_digest import base_digest
from fedmezo_core.zo.party import Party, open_party
from tests.core.zo.model.test_adapters import _logits_in_peft
from tests.integration.support.parties import write_rows

CARD = ModelCard("m", "a-run")
CLASSES = {"template": "{text} It was", "verbalizers": {"negative": " bad", "positive": " good"}}
ANSWERS = {"kind": "instruction", "template": "{text}", "response_column": "label"}


def _config(lora: dict[str, Any], **values: Any) -> RunConfig:
    adapter = {"rank": 6, "alpha": 3, "target_modules": ["c_fc"], "freeze_a": True} | lora
    run = {"run_id": "factored", "model": "m", "task": CLASSES, "lora": adapter} | values
    return parse_run(run, "here")


@pytest.fixture
def folder(folder_of: Callable[[str], Path]) -> Path:
    return folder_of("gpt2")


@pytest.fixture
def rows(tmp_path: Path) -> list[Example]:
    return read_examples(write_rows(tmp_path / "rows.jsonl", count=40), ("text", "label"))


def _b(party: Party) -> list[Any]:
    model: Any = party.loaded.model
    return [layer.lora_B["default"] for layer in model.modules() if hasattr(layer, "lora_B")]


def _use_twice(party: Party) -> None:
    """Let each module with an adapter run twice in a pass."""

    def twice(once: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda hidden: once(hidden + once(hidden))

    for name, module in party.loaded.model.named_modules():
        if name.endswith(".mlp"):
            module.forward = twice(module.forward)


@pytest.mark.parametrize("is_used_twice", [False, True])
@pytest.mark.parametrize("task", [CLASSES, ANSWERS])
def test_a_and_p_span_the_largest_gradients_of_rows(
    task: dict[str, Any], is_used_twice: bool, folder: Path, rows: list[Example]
) -> None:
    party = open_party(_config({"output_rank": 3}, task=task), str(folder), threads=1)
    if is_used_twice:
        _use_twice(party)
    fit_adapter(party, rows)
    # The same gradients from torch, as those of the modules' own weights.
    plain = open_party(_config({"output_rank": 3}, task=task), str(folder), threads=1)
    if is_used_twice:
        _use_twice(plain)
    model: Any = plain.loaded.model
    weights = [m.base_layer.weight for m in model.modules() if hasattr(m, "lora_B")]
    for weight in weights:
        weight.requires_grad_()
    examples, scored = plain.task.encode(rows).examples, plain.task
    with torch.no_grad():
        whole = scored.collate(examples, "all")
        mean = scored.scores(model, whole).mean(dim=0)
    by_row: list[list[torch.Tensor]] = [[] for _ in weights]
    for example in examples:
        batch = scored.collate([example], "one")
        loss = scored.loss_of_scores(scored.scores(model, batch), batch, mean)
        for n, grad in enumerate(torch.autograd.grad(loss, weights)):
            by_row[n].append(grad.double())  # [inputs, outputs]: GPT-2 keeps its weights so.
    stacked = [torch.stack(gradients) for gradients in by_row]
    sums = [((g @ g.mT).sum(dim=0), (g.mT @ g).sum(dim=0)) for g in stacked]
    for a, b, (of_inputs, of_outputs) in zip(_a(party), _b(party), sums, strict=True):
        p = b.outputs.weight.double()
        if task is ANSWERS:
            p = p / p.norm(dim=0)  # Its columns have weights.
        assert torch.allclose(p.T @ p, torch.eye(3).double(), atol=1e-6)
        directions = torch.linalg.qr(a.weight.double().T).Q
        for found, moments, rank in ((p, of_outputs, 3), (directions, of_inputs, 6)):
            kept = (found.T @ moments @ found).trace()
            most = torch.linalg.eigvalsh(moments)[-rank:].sum()
            assert float(kept / most) == pytest.approx(1, abs=1e-3)
        assert not b.core.weight.any(), "the model computes what it did"


@pytest.mark.parametrize("task", [CLASSES, ANSWERS])
def test_the_order_of_the_rows_changes_no_bit(
    task: dict[str, Any], folder: Path, rows: list[Example]
) -> None:
    fits = []
    for order in (rows, rows[::-1], rows[1::2] + rows[::2]):
        party = open_party(_config({"output_rank": 3}, task=task), str(folder), threads=1)
        fit_adapter(party, order)
        fits.append([*(a.weight for a in _a(party)), *(b.outputs.weight for b in _b(party))])
    for other in fits[1:]:
        assert all(torch.equal(mine, its) for mine, its in zip(fits[0], other, strict=True))


@pytest.mark.parametrize("is_used_twice", [False, True])
@pytest.mark.parametrize("task", [CLASSES, ANSWERS])
def test_a_parameter_of_texts_weighs_as_the_root_of_its_gradient(
    task: dict[str, Any], is_used_twice: bool, folder: Path, rows: list[Example]
) -> None:
    party = open_party(_config({"output_rank": 3}, task=task), str(folder), threads=1)
    if is_used_twice:
        _use_twice(party)
    fit_adapter(party, rows)
    model: Any = party.loaded.model
    examples = party.task.encode(rows).examples
    assert len({example.token_count for example in examples}) > 1, "padding must not count"
    with torch.no_grad():
        mean = party.task.scores(model, party.task.collate(examples, "all")).mean(dim=0)
    seen: list[list[torch.Tensor]] = [[] for _ in _a(party)]
    for layer, inputs in zip(_a(party), seen, strict=True):
        layer.register_forward_hook(lambda *_, into=inputs: into.append(_[2][0].double()))
    cores = [b.core.weight for b in _b(party)]
    for core in cores:
        core.requires_grad_()
    energies = [torch.zeros(3, 6).double() for _ in cores]
    for example in examples:
        batch = party.task.collate([example], "one")
        loss = party.task.loss_of_scores(party.task.scores(model, batch), batch, mean)
        for energy, grad in zip(energies, torch.autograd.grad(loss, cores), strict=True):
            energy += grad.double().square()

    # An input without a weight has unit size over all tokens, and a column of P unit length.
    products, wanted = [], []
    for inputs, b, energy in zip(seen, _b(party), energies, strict=True):
        of_inputs = torch.cat([part.detach() for part in inputs]).square().mean(dim=0).sqrt()
        weights = torch.outer(b.outputs.weight.double().norm(dim=0), of_inputs)
        without = energy / weights.square()
        products.append(weights)
        parts = torch.outer(without.mean(dim=1), without.mean(dim=0))
        wanted.append((parts / without.mean()) ** 0.25)
    weights, roots = torch.stack(products), torch.stack(wanted)
    if task is CLASSES:
        assert torch.allclose(weights, torch.ones(3, 6).double(), atol=1e-3)
        return
    assert float(weights.square().mean()) == pytest.approx(1, rel=1e-4)
    assert torch.allclose(weights, roots / roots.square().mean().sqrt(), rtol=2e-3)


@pytest.mark.parametrize("distribution", ["rademacher", "low_rank_1"])
@pytest.mark.parametrize("estimator", ["one_sided", "two_sided"])
def test_probes_measure_the_losses_at_a_perturbed_c(
    distribution: str, estimator: str, folder: Path, rows: list[Example]
) -> None:
    values = {"distribution": distribution, "estimator": estimator, "probes": 3, "local_steps": 1}
    config = _config({"output_rank": 3}, eps=0.05, batch_size=4, **values)
    party = open_party(config, str(folder), threads=1)
    fit_adapter(party, rows)
    assert [entry.shape for entry in party.loaded.manifest] == [(3, 6)] * len(_b(party))
    batches = open_batches(party, party.task.encode(rows), "one")
    order = Measure(Ticket(1, 1, 0), Work((5, 6, 7), 1e-3, 0.05, want_digest=False))
    measured = measure(
        party, open_estimator(party, threads=1), batches, order, digest=party.weights.digest
    )
    # The same with the weights written out, one point at a time.
    batch = open_batches(party, party.task.encode(rows), "one").batch(1, 0)

    def loss(seed: int, eps: float) -> float:
        other = open_party(config, str(folder), threads=1)
        for mine, theirs in zip(_b(other), _b(party), strict=True):
            mine.outputs.weight.copy_(theirs.outputs.weight)
        for layer, fitted in zip(_a(other), _a(party), strict=True):
            layer.weight.copy_(fitted.weight)
        coefficient = np.array([eps], dtype=np.float32)
        other.weights.apply(1, [Commit(np.array([seed], dtype=np.uint64), coefficient, 1)])
        return other.task.loss(other.loaded.model, batch)

    for seed, found in zip(order.work.seeds, measured.scalars.projected_grads, strict=True):
        below = loss(seed, -0.05) if estimator == "two_sided" else loss(seed, 0.0)
        width = 0.1 if estimator == "two_sided" else 0.05
        assert found == pytest.approx((loss(seed, 0.05) - below) / width, rel=2e-2, abs=1e-5)


def _a(party: Party) -> list[Any]:
    model: Any = party.loaded.model
    return [layer.lora_A["default"] for layer in model.modules() if hasattr(layer, "lora_A")]


def test_a_run_begins_from_the_factors_and_exports_a_plain_adapter(
    folder: Path, rows: list[Example], tmp_path: Path
) -> None:
    config = _config({"output_rank": 3})
    party = open_party(config, str(folder), threads=1)
    drawn = open_party(config, str(folder), threads=1)
    assert party.base_digest == drawn.base_digest, "P comes from the run's seed"
    fit_adapter(party, rows)
    write_adapter(party.loaded, tmp_path / "start", CARD)

    run = open_party(config, str(folder), adapter=tmp_path / "start", threads=1)
    assert run.base_digest == base_digest(party.loaded.model) != drawn.base_digest
    assert run.manifest_digest == drawn.manifest_digest
    seeds, sizes = np.arange(4, dtype=np.uint64), np.full(4, 0.1, dtype=np.float32)
    run.weights.apply(1, [Commit(seeds, sizes, 1)])
    digest = run.weights.digest()
    export_adapter(run.loaded, tmp_path / "end", CARD)
    assert run.weights.digest() == digest
    with torch.inference_mode():
        expected = run.loaded.model(torch.arange(20)[None]).logits
    found = _logits_in_peft(folder, tmp_path / "end", torch.float32)
    assert torch.allclose(found, expected, atol=1e-5)
    export_model(run.loaded, tmp_path / "whole", CARD)
    whole = load_model(str(tmp_path / "whole"))
    with torch.inference_mode():
        assert torch.allclose(whole.model(torch.arange(20)[None]).logits, expected, atol=1e-4)
    with pytest.raises(ConfigError, match="lacks weights for"):
        open_party(config, str(folder), adapter=tmp_path / "end", threads=1)


@pytest.mark.parametrize("output_rank", [None, 3])
def test_experts_are_not_fitted(
    output_rank: int | None, folder_of: Callable[[str], Path], rows: list[Example]
) -> None:
    lora = {"output_rank": output_rank, "target_modules": "all-linear"}
    party = open_party(_config(lora), str(folder_of("mixtral")), threads=1)
    with pytest.raises(ConfigError, match=r"\.mlp\.gate does not see every token of each row"):
        fit_adapter(party, rows)


def test_what_cannot_be_meant_is_refused(folder: Path, rows: list[Example]) -> None:
    with pytest.raises(ConfigError, match="output_rank = 3 trains C alone; set freeze_a = true"):
        _config({"output_rank": 3, "freeze_a": False})
    with pytest.raises(ConfigError, match=r"output_rank = 1000 is more than the \d+ outputs of "):
        open_party(_config({"output_rank": 1000}), str(folder), threads=1)
    many = open_party(_config({"output_rank": 40}), str(folder), threads=1)
    with pytest.raises(DataError, match="lie in fewer than 40 directions; give more different"):
        fit_adapter(many, rows[:2])
