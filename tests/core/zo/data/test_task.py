"""Prompts, verbalizers, truncation, batches and losses."""

from __future__ import annotations

import functools
import math
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from fedmezo_core.config import COLUMN_USES_MAX, TaskConfig
from fedmezo_core.errors import ConfigError, DataError, MeasurementError, ModelError
from fedmezo_core.zo.data import task as task_module
from fedmezo_core.zo.data.batches import Batches
from fedmezo_core.zo.data.encoding import Dataset
from fedmezo_core.zo.data.held_out import evaluate
from fedmezo_core.zo.data.rows import Example
from fedmezo_core.zo.data.task import Batch, Task, logits_of
from fedmezo_core.zo.party import warn_of_answers_in_prompts
from tests.core.zo.conftest import MODEL_KINDS, SENTENCES

VERBALIZERS = {"negative": " terrible", "positive": " great"}


def _classification(**changes: Any) -> TaskConfig:
    values: dict[str, Any] = {
        "template": "{text} All in all, it was",
        "verbalizers": VERBALIZERS,
        "tokens_max": 64,
    }
    return TaskConfig(**(values | changes))


def _instruction(**changes: Any) -> TaskConfig:
    values: dict[str, Any] = {
        "kind": "instruction",
        "template": "Question: {question}\nAnswer:",
        "tokens_max": 64,
    }
    return TaskConfig(**(values | changes))


def _rows(values: Sequence[dict[str, str]]) -> list[Example]:
    return [
        Example(dict(value), "data.jsonl", number) for number, value in enumerate(values, start=1)
    ]


def _labelled(texts: Sequence[str] = SENTENCES) -> list[Example]:
    labels = ("negative", "positive")
    return _rows([{"text": text, "label": labels[i % 2]} for i, text in enumerate(texts)])


def _answers() -> list[Example]:
    return _rows(
        [
            {"question": s[:25], "response": " " + s[25 : 30 + 8 * i]}
            for i, s in enumerate(SENTENCES)
        ]
    )


# ---------------------------------------------------------------------- losses


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_padding_does_not_change_a_rows_loss(
    kind: str, model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = model_of(kind)
    for config, rows in ((_classification(), _labelled()), (_instruction(), _answers())):
        task = Task(config, tokenizer, 384)
        examples = task.encode(rows).examples
        assert len({len(example.prompt + example.response) for example in examples}) > 1
        together = task.loss(model, task.collate(examples, "all"))
        alone = [task.loss(model, task.collate([example], "one")) for example in examples]
        counts = [len(example.response) or 1 for example in examples]
        mean = sum(one * count for one, count in zip(alone, counts, strict=True)) / sum(counts)
        assert together == pytest.approx(mean, rel=3e-6)


def test_classification_loss_is_cross_entropy_of_first_tokens(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any = model_of("llama")
    task = Task(_classification(), tokenizer, 384)
    ids = [tokenizer(" terrible")["input_ids"][0], tokenizer(" great")["input_ids"][0]]
    assert list(task.verbalizer_ids) == ids
    losses = []
    for row in _labelled():
        prompt = tokenizer(row.values["text"] + " All in all, it was")["input_ids"]
        logits = model(torch.tensor([prompt])).logits[0, -1, ids]
        target = torch.tensor(list(VERBALIZERS).index(row.values["label"]))
        losses.append(float(functional.cross_entropy(logits, target)))
    batch = task.collate(task.encode(_labelled()).examples, "all")
    assert task.loss(model, batch) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("kind", [*MODEL_KINDS, "mamba"])
def test_the_head_computes_the_verbalizers_alone(
    kind: str, model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Unless it is another's: one that is perturbed, say, which then has a forward of its own."""
    model: Any = model_of(kind)
    task = Task(_classification(), tokenizer, 384)
    dataset = task.encode(_labelled())
    head = model.get_output_embeddings()
    seen: list[torch.Tensor] = []
    head.register_forward_hook(lambda *call: seen.append(call[2]))
    few = evaluate(task, model, dataset, 4)
    plain = head.forward
    head.forward = lambda hidden: plain(hidden)
    whole = evaluate(task, model, dataset, 4)
    assert [logits.shape[-1] for logits in seen] == [2, 384]
    assert few.loss == pytest.approx(whole.loss, rel=1e-6)
    assert (few.accuracy, few.auc) == (whole.accuracy, whole.auc)
    assert "forward" in vars(head), "it is given back as it was"


def test_a_model_that_needs_a_whole_vocabulary_gets_one(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    """It adds a bias to its logits, so a head that gives two does not fit it."""
    model: Any = model_of("llama")
    task = Task(_classification(), tokenizer, 384)
    batch = task.collate(task.encode(_labelled()).examples, "all")
    plain, seen = model.forward, []
    bias = torch.linspace(-1.0, 1.0, 384)

    @functools.wraps(plain)
    def biased(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        seen.append(result.logits.shape[-1])
        result.logits = result.logits + bias
        return result

    model.forward = biased
    with torch.inference_mode():
        logits = logits_of(model, batch, 1)[:, -1, list(task.verbalizer_ids)]
    wanted = float(functional.cross_entropy(logits.double(), batch.labels))
    head = model.get_output_embeddings()
    plain_head = head.forward
    head.forward = lambda hidden: plain_head(hidden)
    losses = [task.loss(model, batch)]
    del head.forward
    losses += [task.loss(model, batch) for _ in range(2)]
    assert losses == pytest.approx([wanted] * 3, rel=1e-6)
    assert seen == [384, 384, 2, 384, 384], "the first batch with a plain head shows it"


def test_instruction_loss_is_that_of_the_models_own_labels(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any = model_of("gpt2")
    task = Task(_instruction(), tokenizer, 384)
    for row in _answers():
        prompt = tokenizer(f"Question: {row.values['question']}\nAnswer:")["input_ids"]
        response = [*tokenizer(row.values["response"])["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + response])
        expected = float(model(torch.tensor([prompt + response]), labels=labels).loss)
        batch = task.collate(task.encode([row]).examples, "one")
        assert task.loss(model, batch) == pytest.approx(expected, rel=1e-5)


def test_only_the_last_positions_get_logits(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any = model_of("llama")
    seen: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    for config, rows in ((_classification(), _labelled()), (_instruction(), _answers())):
        task = Task(config, tokenizer, 384)
        task.loss(model, task.collate(task.encode(rows).examples, "all"))
    longest = max(len(example.response) for example in task.encode(_answers()).examples)
    assert seen == [1, longest + 1]


class _Plain(nn.Module):
    """A model that knows neither `logits_to_keep` nor `position_ids`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool
    ) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_models_without_logits_to_keep(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = model_of("llama")
    for config, rows in ((_classification(), _labelled()), (_instruction(), _answers())):
        task = Task(config, tokenizer, 384)
        batch = task.collate(task.encode(rows).examples, "all")
        assert task.loss(_Plain(model), batch) == pytest.approx(task.loss(model, batch), rel=1e-5)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_evaluation_does_not_depend_on_the_batch_size(
    size: int, model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = model_of("qwen2")
    task = Task(_classification(), tokenizer, 384)
    rows = _labelled([sentence[:n] for sentence in SENTENCES for n in (12, 20, 33, 50)])
    dataset = task.encode(rows)
    found = evaluate(task, model, dataset, size)
    margins, correct = [], 0
    for example in dataset.examples:
        logits: Any = model(torch.tensor([example.prompt])).logits[0, -1]
        margin = float(logits[task.verbalizer_ids[1]] - logits[task.verbalizer_ids[0]])
        correct += (margin > 0) == (example.label == 1)
        margins.append((margin, example.label))
    assert found.accuracy == correct / 16
    firsts = [margin for margin, label in margins if label == 0]
    seconds = [margin for margin, label in margins if label == 1]
    above = sum((s > f) + 0.5 * (s == f) for s in seconds for f in firsts)
    assert found.auc == pytest.approx(above / (len(firsts) * len(seconds)))
    ranked = sorted(margins)
    right = sum((place >= 8) == (label == 1) for place, (_, label) in enumerate(ranked))
    assert found.calibrated_accuracy == right / 16
    assert found.loss == pytest.approx(
        task.loss(model, task.collate(dataset.examples, "")), rel=1e-5
    )
    assert (found.row_count, found.target_count) == (16, 16)

    answers = Task(_instruction(), tokenizer, 384)
    encoded = answers.encode(_answers())
    tokens = evaluate(answers, model, encoded, size)
    assert tokens.auc is tokens.calibrated_accuracy is None
    assert tokens.target_count == sum(len(example.response) for example in encoded.examples)
    assert tokens.loss == pytest.approx(
        answers.loss(model, answers.collate(encoded.examples, "")), rel=1e-5
    )


def test_evaluation_of_diverged_weights(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any = model_of("llama")
    model.lm_head.weight.fill_(math.nan)
    task = Task(_classification(), tokenizer, 384)
    with pytest.raises(MeasurementError, match="held-out loss is NaN or infinite"):
        evaluate(task, model, task.encode(_labelled()), 4)


# ---------------------------------------------------------------------- text to tokens


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
    other=st.text(st.sampled_from("ab é"), max_size=200),
    response=st.text(st.sampled_from("cd ü"), max_size=200),
    tokens_max=st.integers(12, 40),
)
def test_truncation_keeps_the_template_and_fits(
    text: str, other: str, response: str, tokens_max: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = _instruction(template="{text} -> {other}!", tokens_max=tokens_max)
    task = Task(config, tokenizer, 384)
    row = _rows([{"text": text, "other": other, "response": response}])
    dataset = task.encode(row)
    example = dataset.examples[0]
    total = len(example.prompt) + len(example.response)
    assert total <= tokens_max
    whole = [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]
    assert list(example.response) == whole[: len(example.response)]
    prompt = str(tokenizer.decode(list(example.prompt)))
    full = f"{text} -> {other}!"
    cut = prompt != full or list(example.response) != whole
    assert dataset.truncated_count == cut
    if cut:
        assert len(tokenizer(full)["input_ids"]) + len(whole) > tokens_max
        assert len(example.response) >= min(len(whole), tokens_max // 2)
        assert any(f"{text[:kept]} -> {other[:kept]}!" == prompt for kept in range(201))
    assert prompt.endswith("!")


def test_rows_are_cut_before_all_of_them_are_held(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "word " * 4000 + "{text}" * COLUMN_USES_MAX
    rows = _labelled(["one " * 30] * 800)
    task = Task(_classification(template=template), tokenizer, 384)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="template alone takes"):
            task.encode(rows)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # All prompts together have 40 MB of text, and several times that in tokens.
    assert peak_bytes < 20_000_000


def test_a_template_that_never_fits(tokenizer: PreTrainedTokenizerBase) -> None:
    task = Task(_classification(template="{text} " + "long " * 30, tokens_max=16), tokenizer, 384)
    with pytest.raises(ConfigError, match=r"template alone takes \d+ tokens.*tokens_max = 16"):
        task.encode(_labelled())


def test_special_tokens_go_before_the_prompt_only(tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers.processors import TemplateProcessing

    from tests.core.zo.conftest import make_tokenizer

    other: Any = make_tokenizer()
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", 0)]
    )
    plain = Task(_classification(), tokenizer, 384).encode(_labelled())
    special = Task(_classification(), other, 384).encode(_labelled())
    for one, two in zip(plain.examples, special.examples, strict=True):
        assert two.prompt == (0, *one.prompt)
    assert (
        Task(_classification(), other, 384).verbalizer_ids
        == Task(_classification(), tokenizer, 384).verbalizer_ids
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"verbalizers": {"a": " great", "b": " great deal"}}, "begin with the same token"),
        ({"verbalizers": {"a": "great", "b": " bad"}}, r"'great' would run into .*'was'.*' great'"),
        ({"verbalizers": {"a": " ", "b": " bad"}}, "verbalizer is empty"),
        (
            {"template": "{text} it was ", "verbalizers": {"a": "great", "b": "terrible"}},
            "melts into the end of the template",
        ),
    ],
)
def test_verbalizers_that_cannot_work(
    changes: dict[str, Any], sentence: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Task(_classification(**changes), tokenizer, 384)


def test_rows_that_cannot_be_used(tokenizer: PreTrainedTokenizerBase) -> None:
    task = Task(_classification(), tokenizer, 384)
    assert task.config.data_columns == ("text", "label")
    rows = _rows([{"text": "a", "label": "negative"}, {"text": "b", "label": "meh"}])
    with pytest.raises(
        DataError, match=r"row 2 of data.jsonl, label 'meh' is not .*\('negative', 'positive'\)"
    ):
        task.encode(rows)
    with pytest.raises(DataError, match="no rows"):
        task.encode([])
    bare = Task(_classification(template="{text}"), tokenizer, 384)
    with pytest.raises(DataError, match=r"row 1 of data\.jsonl the prompt is empty"):
        bare.encode(_labelled([""]))
    small = Task(_classification(), tokenizer, max(task.verbalizer_ids) + 1)
    with pytest.raises(ModelError, match=r"row \d of data.jsonl into token \d+, but the model has"):
        small.encode(_labelled())


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_slices_of_the_head_give_the_losses_of_the_whole(
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    model_of: Callable[..., nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model's own work on its logits, such as a soft cap, is done for each slice."""
    model = model_of(kind)
    task = Task(_instruction(), tokenizer, 384)
    examples = task.encode(_answers()).examples
    batch = task.collate(examples, "b").repeated(2)
    logits = logits_of(model, batch, batch.targets.shape[1] + 1)[:, :-1].double()
    losses = functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100, reduction="none"
    )
    expected = losses.view_as(batch.targets).sum(dim=1).tolist()
    correct = int((logits.argmax(dim=-1) == batch.targets).sum())
    targets = int((batch.targets != -100).sum())
    seen: list[int] = []
    head = model.get_output_embeddings()  # type: ignore[operator]
    with head.register_forward_hook(lambda *call: seen.append(call[2][..., 0].numel())):
        for length in (3, targets):
            monkeypatch.setitem(task_module._SLICE_ELEMENTS, "cpu", length * head.out_features)
            seen.clear()
            outcome = task.outcome(model, batch)
            assert outcome.row_losses == pytest.approx(expected, rel=1e-5)
            assert (outcome.correct_count, outcome.target_count) == (correct, targets)
            # No position without a target is computed, nor more than a slice at a time.
            assert (sum(seen), max(seen)) == (targets, length)


@pytest.mark.parametrize("way", ["reshapes its logits", "multiplies by its head's weights"])
def test_a_model_that_cannot_do_with_a_slice_of_its_logits_gives_the_same_losses(
    way: str, tokenizer: PreTrainedTokenizerBase, model_of: Callable[..., nn.Module]
) -> None:
    model: Any = model_of("llama")
    task = Task(_instruction(), tokenizer, 384)
    batch = task.collate(task.encode(_answers()).examples, "b")
    wanted = task.row_losses(model, batch)
    passes: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if way == "reshapes its logits":
            result = plain(*args, **kwargs)
            result.logits = result.logits.view(*kwargs["input_ids"].shape[:1], -1, 384)
            return result
        hidden = model.model(kwargs["input_ids"], attention_mask=kwargs["attention_mask"])
        return CausalLMOutput(logits=functional.linear(hidden[0], model.lm_head.weight))

    model.forward = forward
    losses = task.row_losses(model, batch)
    assert losses.tolist() == pytest.approx(wanted.tolist(), rel=1e-5)
    assert len(passes) == 1, "what comes before the head is computed once"
    assert not [module for module in model.modules() if "forward" in vars(module)][1:]


# ---------------------------------------------------------------------- batches


def _dataset(task: Task, count: int) -> Dataset:
    return task.encode(_labelled([SENTENCES[i % 4][: 5 + i % 17] for i in range(count)]))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 60),
    size=st.integers(1, 9),
    steps=st.integers(1, 5),
    seed=st.integers(0, 2**64 - 1),
    order=st.randoms(use_true_random=False),
)
def test_batches_are_a_pure_function_and_passes_do_not_repeat_a_row(
    count: int,
    size: int,
    steps: int,
    seed: int,
    order: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    task = Task(_classification(), tokenizer, 384)
    dataset = _dataset(task, count)

    def batches(name: str = "w") -> Batches[Batch]:
        return Batches(
            task.collate,
            dataset,
            run_seed=seed,
            worker_name=name,
            batch_size=size,
            local_steps=steps,
        )

    places = [(1 + number // steps, number % steps) for number in range(40)]
    straight = [batches().indices(*place) for place in places]
    shuffled = list(enumerate(places))
    order.shuffle(shuffled)
    one = batches()
    for number, place in shuffled:
        assert one.indices(*place) == straight[number]
    size = min(size, count)
    in_a_pass = count // size
    for first in range(0, 40 - in_a_pass + 1, in_a_pass):
        rows = [index for batch in straight[first : first + in_a_pass] for index in batch]
        assert len(rows) == len(set(rows)) == in_a_pass * size
    if count > 20 and size < 5:
        other = batches("v")
        assert [other.indices(*place) for place in places] != straight


def test_a_batch_has_rows_of_like_length(tokenizer: PreTrainedTokenizerBase) -> None:
    task = Task(_classification(), tokenizer, 384)
    dataset = _dataset(task, 256)
    batches = Batches(
        task.collate, dataset, run_seed=1, worker_name="w", batch_size=8, local_steps=4
    )
    masks = [batches.batch(1 + n // 4, n % 4).attention_mask for n in range(32)]
    padded = sum(mask.numel() for mask in masks)
    used = sum(int(mask.sum()) for mask in masks)
    assert padded < 1.15 * used
    assert batches.batch(3, 2).name == "round 3, step 2"


def test_a_template_with_any_column_and_braces(tokenizer: PreTrainedTokenizerBase) -> None:
    config = _instruction(template='{{"q": "{größe-neu}"}}', template_version=2)
    task = Task(config, tokenizer, 384)
    (example,) = task.encode(_rows([{"größe-neu": "tall", "response": " yes"}])).examples
    assert tokenizer.decode(list(example.prompt)) == '{"q": "tall"}'


def test_an_answer_in_the_prompt_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_answers_in_prompts(_instruction(template="{question} {response}"))
    assert "names response, the column with the answer" in caplog.text
    caplog.clear()
    warn_of_answers_in_prompts(_instruction())
    assert not caplog.text
