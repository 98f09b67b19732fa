"""What comes before the trained part is computed once for each row, whatever batch it comes in."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import random
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedmezo_core.config import LoraConfig
from fedmezo_core.zo import estimator as estimator_module
from fedmezo_core.zo.data.encoding import Dataset, EncodedExample
from fedmezo_core.zo.data.held_out import evaluate
from fedmezo_core.zo.data.task import Batch, Task
from fedmezo_core.zo.estimator import groups_of
from fedmezo_core.zo.forward import row_states as row_states_module
from fedmezo_core.zo.forward.row_states import RowStates, RowStore, SpooledRows
from fedmezo_core.zo.model.loading import add_adapter
from fedmezo_core.zo.model.manifest import manifest_of
from fedmezo_core.zo.noise import Distribution
from fedmezo_core.zo.objectives import Predictions
from fedmezo_core.zo.plain.entries import Manifest
from tests.core.zo.conftest import MODEL_KINDS
from tests.core.zo.forward.frozen_parts import (
    EPS,
    LOCAL,
    RowsSeen,
    ShapesSeen,
    batch_of,
    estimator_on,
    last_layer,
    losses_of,
    task_of,
)

SEEDS = [99, 7]


class Forgetful:
    """A `RowStore` that keeps nothing."""

    def get(self, key: bytes) -> bytes | None:
        return None

    def put(self, key: bytes, body: bytes) -> None:
        pass


@pytest.fixture(autouse=True)
def small_frozen_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one frozen layer of a tiny model is less than half of it."""
    monkeypatch.setattr(row_states_module, "FROZEN_SHARE_MIN", 0.1)


def _row_states(
    model: nn.Module, manifest: Manifest, task: Task, rows: RowStore | None = None
) -> RowStates:
    return RowStates(model, manifest, task, rows or SpooledRows(1 << 20))


def _part(task: Task, batch: Batch, rows: list[int]) -> Batch:
    return task.collate([batch.examples[row] for row in rows], "a part")


@pytest.mark.parametrize("task_kind", ["classification", "instruction"])
@pytest.mark.parametrize("kind", [*MODEL_KINDS, "mamba"])
def test_losses_are_those_of_whole_passes(
    kind: str,
    task_kind: str,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = model_of(kind)
    manifest = manifest_of(model, train=[last_layer(kind)])
    task = task_of(tokenizer, task_kind)
    batch = batch_of(task)
    row_states = _row_states(model, manifest, task)
    begun, whole = (
        estimator_on(model, manifest, task, row_states=each) for each in (row_states, None)
    )
    for rows in ([0, 1, 2, 3], [3, 1], [2]):
        part = _part(task, batch, rows)
        ours, theirs = (
            losses_of(estimator.measure(part, LOCAL, SEEDS, EPS)) for estimator in (begun, whole)
        )
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert len(set(ours)) == 4, "the perturbation shows"
    assert row_states.cut.endswith(last_layer(kind).replace("1", "0")), "all that is frozen"


@pytest.mark.parametrize("task_kind", ["classification", "instruction"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_behind_the_last_attention_only_positions_that_the_loss_reads_are_computed(
    kind: str,
    task_kind: str,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = model_of(kind)
    manifest = manifest_of(model, train=[f"{last_layer(kind)}.mlp"])
    task = task_of(tokenizer, task_kind)
    batch = batch_of(task)
    row_states = _row_states(model, manifest, task)
    begun, whole = (
        estimator_on(model, manifest, task, row_states=each) for each in (row_states, None)
    )
    begun.measure(batch, LOCAL, SEEDS, EPS)
    for rows in ([0, 1, 2, 3], [3, 1]):
        part = _part(task, batch, rows)
        rest, _ = row_states.begun(part)
        assert rest.input_ids.shape == (len(rows), part.targets.shape[1] + 1)
        assert rest.input_ids.shape[1] < part.input_ids.shape[1]
        ours, theirs = (
            losses_of(estimator.measure(part, LOCAL, SEEDS, EPS)) for estimator in (begun, whole)
        )
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert len(set(ours)) == 4, "the perturbation shows"


@pytest.mark.parametrize("distribution", [Distribution.LOW_RANK_1, Distribution.RADEMACHER])
@pytest.mark.parametrize("task_kind", ["classification", "instruction"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_of_many_lengths_are_computed_in_groups_with_little_padding(
    kind: str,
    task_kind: str,
    distribution: Distribution,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimator_module, "FROZEN_SHARE_MIN", 0.1)
    monkeypatch.setattr(estimator_module, "BUILT_SHARE_MAX", 1.0)
    model = model_of(kind)
    [layer] = (each for name, each in model.named_modules() if name.endswith(last_layer(kind)))
    seen = ShapesSeen(layer)
    manifest = manifest_of(model, train=[last_layer(kind)])
    task = task_of(tokenizer, task_kind)
    row_states = _row_states(model, manifest, task)
    grouped, from_states, whole = (
        estimator_on(model, manifest, task, distribution, once=once, row_states=states)
        for once, states in ((True, None), (True, row_states), (False, None))
    )
    drawn = random.Random(5)
    for count in (1, 2, 7, 16):
        examples = [
            EncodedExample(
                tuple(drawn.choices(range(384), k=drawn.randint(1, 48))),
                tuple(drawn.choices(range(384), k=drawn.randint(1, 12)))
                if task_kind == "instruction"
                else (),
                drawn.randint(0, 1) if task_kind == "classification" else -1,
            )
            for _ in range(count)
        ]
        batch = task.collate(examples, "the test")
        theirs = losses_of(whole.measure(batch, LOCAL, SEEDS, EPS))
        for estimator in (grouped, from_states):
            estimator.measure(batch, LOCAL, SEEDS, EPS)
            seen.shapes()
            ours = losses_of(estimator.measure(batch, LOCAL, SEEDS, EPS))
            assert ours == pytest.approx(theirs, rel=1e-5)
            assert ours == losses_of(estimator.measure(batch, LOCAL, SEEDS, EPS))
            # Two measurements of four points.
            tokens, padded = int(batch.attention_mask.sum()), batch.input_ids.numel()
            taken = sum(rows * length for rows, length, _ in seen.shapes())
            assert 8 * tokens <= taken <= 8 * padded
            assert count < 16 or taken < 8 * (1 - estimator_module.SAVED_SHARE_MIN) * padded
        alike = task.collate(examples[:1] * count, "the test")
        seen.shapes()
        grouped.measure(alike, LOCAL, SEEDS, EPS)
        assert {shape[0] % count for shape in seen.shapes()} == {0}, "all rows in each pass"


def test_groups_of_rows_take_the_least_work() -> None:
    drawn = random.Random(3)

    def work(groups: list[list[int]], lengths: list[int]) -> int:
        return sum(
            len(rows) * max(lengths[row] for row in rows) + estimator_module.GROUP_TOKENS
            for rows in groups
        )

    for _ in range(50):
        lengths = [drawn.choice((3, 9, 20, 21, 40, 64)) for _ in range(drawn.randint(1, 9))]
        groups = groups_of(lengths)
        assert sorted(row for rows in groups for row in rows) == list(range(len(lengths)))
        order = sorted(range(len(lengths)), key=lambda row: lengths[row])
        ways = (
            [order[a:b] for a, b in itertools.pairwise([0, *cuts, len(order)])]
            for count in range(len(order))
            for cuts in itertools.combinations(range(1, len(order)), count)
        )
        assert work(groups, lengths) == min(work(way, lengths) for way in ways)


@pytest.mark.parametrize("trained", ["self_attn.q_proj", "self_attn.v_proj"])
def test_a_trained_attention_sees_all_positions(
    trained: str, model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = model_of("llama")
    manifest = manifest_of(model, train=[f"layers.1.{trained}"])
    task = task_of(tokenizer)
    row_states = _row_states(model, manifest, task)
    batch = batch_of(task)
    rest, results = row_states.begun(batch)
    assert results
    assert rest.input_ids.shape == batch.input_ids.shape


@pytest.mark.parametrize("task_kind", ["classification", "instruction"])
@pytest.mark.parametrize(
    ("kind", "trained"),
    [("gpt2", ""), ("llama", ""), ("gemma3", ""), ("mamba", ""), ("llama", ".mlp")],
)
def test_an_objective_sees_what_it_sees_without_states(
    kind: str,
    trained: str,
    task_kind: str,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = model_of(kind)
    manifest = manifest_of(model, train=[last_layer(kind) + trained])
    task = task_of(tokenizer, task_kind, objective="a:b", generated_tokens_max=3)
    row_states = _row_states(model, manifest, task)
    seen: dict[bool, list[Predictions]] = {}
    for with_states in (False, True):
        found = seen.setdefault(with_states, [])

        def objective(predictions: Predictions, found: list[Predictions] = found) -> float:
            found.append(predictions)
            return float(len(found))

        estimator_on(
            model,
            manifest,
            task,
            row_states=row_states if with_states else None,
            objective=objective,
        ).measure(batch_of(task), LOCAL, SEEDS, 0.5)
    assert row_states.cut
    assert len({tuple(each.texts) for each in seen[False]}) > 1, "the points write different texts"
    for ours, theirs in zip(seen[True], seen[False], strict=True):
        assert ours.texts == theirs.texts
        assert ours.logits == pytest.approx(theirs.logits, abs=1e-5)
        assert ours.log_likelihoods == pytest.approx(theirs.log_likelihoods, rel=1e-5)


def test_for_an_objective_the_frozen_part_runs_once_for_a_row_and_what_was_written_after_it(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = model_of("llama")
    frozen = RowsSeen(model.get_submodule("model.layers.0"))
    manifest = manifest_of(model, train=["layers.1"])
    task = task_of(tokenizer, "instruction", objective="a:b", generated_tokens_max=3)
    batch = batch_of(task)
    texts: set[tuple[int, str]] = set()

    def objective(predictions: Predictions) -> float:
        texts.update(enumerate(predictions.texts))
        return 0.0

    def measuring(row_states: RowStates | None) -> list[int]:
        estimator = estimator_on(model, manifest, task, row_states=row_states, objective=objective)
        estimator.measure(batch, LOCAL, SEEDS, 1e-4)
        frozen.taken()
        texts.clear()
        estimator.measure(batch, LOCAL, SEEDS, 1e-4)
        return frozen.taken()

    # Three passes that write a token, and one for the logits, of four points on four rows.
    assert measuring(None) == [4, 4, 4, 4]
    assert len(texts) == 4, "all points wrote the same"
    assert measuring(_row_states(model, manifest, task)) == []


@pytest.mark.parametrize("distribution", [Distribution.RADEMACHER, Distribution.LOW_RANK_1])
def test_a_row_goes_through_the_frozen_part_once_and_alone(
    distribution: Distribution,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = model_of("llama")
    frozen = RowsSeen(model.get_submodule("model.layers.0"))
    trained = RowsSeen(model.get_submodule("model.layers.1"))
    manifest = manifest_of(model, train=["layers.1"])
    task = task_of(tokenizer)
    batch = batch_of(task)
    estimator = estimator_on(
        model, manifest, task, distribution, row_states=_row_states(model, manifest, task)
    )
    estimator.measure(_part(task, batch, [0]), LOCAL, SEEDS, EPS)
    seen = []
    for rows in ([0, 1], [1, 0], [2, 1, 3, 0]):
        frozen.taken(), trained.taken()
        estimator.measure(_part(task, batch, rows), LOCAL, SEEDS, EPS)
        seen.append((frozen.taken(), trained.taken()))
    assert seen == [([1], [8]), ([], [8]), ([1, 1], [16])]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3", "mamba"])
def test_what_is_measured_does_not_depend_on_what_is_kept(
    kind: str, model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Not on the order of batches, and not on how much there is room for."""
    model = model_of(kind)
    manifest = manifest_of(model, train=[last_layer(kind)])
    task = task_of(tokenizer)
    batch = batch_of(task)
    parts = [
        _part(task, batch, list(rows))
        for count in (1, 2, 4)
        for rows in itertools.combinations(range(4), count)
    ]
    found: list[dict[str, Any]] = []
    stores: list[RowStore] = [Forgetful(), *map(SpooledRows, (0, 6000, 1 << 20))]
    for order, store in enumerate(stores):
        row_states = _row_states(model, manifest, task, store)
        estimator = estimator_on(model, manifest, task, row_states=row_states)
        # Which row is looked at first must not matter either.
        shuffled = random.Random(order).sample(parts, len(parts))
        measured = {
            repr(part.input_ids): estimator.measure(part, LOCAL, SEEDS, EPS) for part in shuffled
        }
        found.append(measured)
        assert row_states.cut
    assert found[1:] == found[:1] * 3


class _Skipping(nn.Module):
    """A layer that goes back to the embedding, past the layer before it."""

    def __init__(self, inner: nn.Module, embedding: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.gain = nn.Linear(32, 32).requires_grad_(False)
        self.seen: list[torch.Tensor] = []
        embedding.register_forward_hook(lambda *call: self.seen.append(call[2]))

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner(hidden + self.gain(self.seen.pop()), *args, **kwargs)


def test_a_model_that_reads_an_earlier_state_again_is_computed_whole(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    torch.manual_seed(5)
    model: Any = model_of("llama")
    layers = model.model.layers
    layers[1] = _Skipping(layers[1], model.model.embed_tokens)
    manifest = manifest_of(model, train=["layers.1.inner"])
    task = task_of(tokenizer)
    row_states = _row_states(model, manifest, task)
    begun, whole = (
        estimator_on(model, manifest, task, row_states=each) for each in (row_states, None)
    )
    for _ in range(2):
        assert begun.measure(batch_of(task), LOCAL, SEEDS, EPS) == whole.measure(
            batch_of(task), LOCAL, SEEDS, EPS
        )
    assert row_states.cut == ""


class _Mixing(nn.Module):
    """A layer in which padding is not masked."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner(hidden + hidden.mean(dim=1, keepdim=True), *args, **kwargs)


def test_a_model_whose_rows_depend_on_their_padding_is_computed_whole(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any = model_of("llama")
    model.model.layers[0] = _Mixing(model.model.layers[0])
    manifest = manifest_of(model, train=["layers.1"])
    task = task_of(tokenizer)
    row_states = _row_states(model, manifest, task)
    estimator_on(model, manifest, task, row_states=row_states).measure(
        batch_of(task), [], SEEDS, EPS
    )
    assert not row_states.cut


@pytest.mark.parametrize("train", [["wte"], ["h.0.ln_1"], []])
def test_what_is_trained_first_leaves_nothing_to_know(
    train: list[str], model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = model_of("gpt2")
    manifest = manifest_of(model, train=train)
    task = task_of(tokenizer)
    row_states = _row_states(model, manifest, task)
    begun, whole = (
        estimator_on(model, manifest, task, row_states=each) for each in (row_states, None)
    )
    assert begun.measure(batch_of(task), LOCAL, SEEDS, EPS) == whole.measure(
        batch_of(task), LOCAL, SEEDS, EPS
    )
    assert not row_states.cut


def test_less_than_half_of_a_model_is_left_alone(
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    model = model_of("llama")
    manifest = manifest_of(model, train=["layers.1"])
    task = task_of(tokenizer)
    row_states = _row_states(model, manifest, task)
    estimator_on(model, manifest, task, row_states=row_states).measure(
        batch_of(task), [], SEEDS, EPS
    )
    assert not row_states.cut


def test_an_adapter_on_the_last_layer_of_an_offloaded_model(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    measured = []
    for offloaded in (False, True):
        base: Any = model_of("llama")
        config = LoraConfig(rank=4, alpha=16, target_modules=("layers.1.mlp.up_proj",))
        model = add_adapter(base, config, 5)
        manifest = manifest_of(model, adapters_only=True)
        if offloaded:
            cpu_offload(model, execution_device=torch.device("cpu"))
        task = task_of(tokenizer)
        row_states = _row_states(model, manifest, task)
        estimator = estimator_on(model, manifest, task, row_states=row_states)
        measured.append([estimator.measure(batch_of(task), LOCAL, SEEDS, EPS) for _ in range(2)])
        assert row_states.cut.endswith("layers.1.self_attn")
        assert all(value.is_meta == offloaded for value in model.parameters())
    assert measured[0] == measured[1]


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_bfloat16(
    kind: str, model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = model_of(kind).to(torch.bfloat16)
    manifest = manifest_of(model, train=["layers.1"])
    task = task_of(tokenizer)
    row_states = _row_states(model, manifest, task)
    begun, whole = (
        estimator_on(model, manifest, task, row_states=each) for each in (row_states, None)
    )
    for _ in range(2):
        ours = begun.measure(batch_of(task), LOCAL, SEEDS, EPS)
    assert losses_of(ours) == pytest.approx(
        losses_of(whole.measure(batch_of(task), LOCAL, SEEDS, EPS)), rel=1e-2
    )
    assert row_states.cut


def test_evaluations_begin_behind_what_is_known(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = model_of("qwen2")
    frozen = RowsSeen(model.get_submodule("model.layers.0"))
    manifest = manifest_of(model, train=["layers.1"])
    task = task_of(tokenizer)
    dataset = Dataset(batch_of(task, 7).examples, 0)
    whole = evaluate(task, model, dataset, 3)
    row_states = _row_states(model, manifest, task)
    for _ in range(2):
        frozen.taken()
        found = evaluate(task, model, dataset, 3, around_batch=row_states.known)
        assert dataclasses.asdict(found) == pytest.approx(dataclasses.asdict(whole), rel=1e-5)
    assert frozen.taken() == []
    with torch.inference_mode():
        model(torch.arange(9).view(1, 9))
    assert frozen.taken() == [1], "afterwards the model is as it was"


def test_whoever_waits_can_end_it_between_two_rows(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    class EnoughError(Exception):
        pass

    model = model_of("llama")
    frozen = RowsSeen(model.get_submodule("model.layers.0"))
    manifest = manifest_of(model, train=["layers.1"])
    task = task_of(tokenizer)
    batch = batch_of(task)
    row_states = _row_states(model, manifest, task)
    with row_states.known(_part(task, batch, [0])):
        pass
    calls = 0

    def before_row() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise EnoughError

    frozen.taken()
    with pytest.raises(EnoughError), row_states.known(batch, before_row):
        raise AssertionError("it was ended")
    assert frozen.taken() == [1, 1]
    with row_states.known(batch):
        assert frozen.taken() == [1], "the two that were done are kept"


def test_the_spool_keeps_what_it_has_room_for() -> None:
    spool = SpooledRows(10)
    for key, body in ((b"a", b"12345"), (b"b", b"123456"), (b"c", b"54321"), (b"a", b"!")):
        spool.put(key, body)
    assert [spool.get(key) for key in (b"a", b"b", b"c", b"d")] == [b"12345", None, b"54321", None]


def test_a_full_disk_keeps_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spool = SpooledRows(1 << 20)
    spool.put(b"a", b"12345")

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    spool.put(b"b", b"1")
    spool.put(b"c", b"1")
    assert [spool.get(key) for key in (b"a", b"b", b"c")] == [b"12345", None, None]
    [record] = caplog.records
    assert "No space left on device" in record.getMessage()


def test_without_a_temporary_folder_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(**_: Any) -> Any:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryFile", missing)
    spool = SpooledRows(10)
    spool.put(b"a", b"12345")
    assert spool.get(b"a") is None
    [record] = caplog.records
    assert "No usable temporary directory found" in record.getMessage()
