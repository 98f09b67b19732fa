"""The digest of a tokenizer: what counts, what does not, and what a difference is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from fedmezo_core.config import RunConfig, TaskConfig
from fedmezo_core.journal.codec import decode_record, encode_record
from fedmezo_core.records import Genesis
from fedmezo_core.zo.data.task import Task
from fedmezo_core.zo.data.tokenizer_parts import digest_of_parts

WORDS = ["<unk>", "<s>", "</s>", "<|end|>", "it", "was", "so", "a", "film", "good", "bad"]


def _made(*, bos: bool = True, lower: bool = False, words: list[str] = WORDS) -> Any:
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase() if lower else None
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    fast: Any = PreTrainedTokenizerFast  # transformers leaves its constructor without types
    return fast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _parts(tokenizer: Any, **changes: Any) -> tuple[bytes, ...]:
    values = {"kind": "instruction", "template": "{text} It was", "template_version": 3} | changes
    return Task(TaskConfig(**values), tokenizer, 1000).tokenizer_parts()


CLASSES: dict[str, Any] = {"kind": "classification", "verbalizers": {"0": " bad", "1": " good"}}
GENERATES: dict[str, Any] = {"objective": "a:b", "generated_tokens_max": 4}


def _with_pad(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})


def _with_end_as_pad(tokenizer: Any) -> None:
    tokenizer.pad_token = tokenizer.eos_token


def _padding_and_truncating(tokenizer: Any) -> None:
    _with_pad(tokenizer)
    tokenizer.padding_side, tokenizer.truncation_side = "left", "left"
    tokenizer.model_max_length = 7
    tokenizer("it was so", padding="max_length", truncation=True, max_length=2)


def _with_markup(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.name_or_path = "elsewhere"
    tokenizer.add_tokens([AddedToken("<tool_call>"), AddedToken("<|user|>", special=True)])


def _with_another_end(tokenizer: Any) -> None:
    tokenizer.eos_token = "<|end|>"


def _with_another_decoder(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()


def _without_an_ending(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 1)]
    )


@pytest.mark.parametrize(
    "change",
    [_with_pad, _with_end_as_pad, _padding_and_truncating, _with_markup, _without_an_ending],
)
@pytest.mark.parametrize("task", [{}, CLASSES], ids=["instruction", "classification"])
def test_what_cannot_change_a_loss_does_not_count(
    change: Callable[[Any], None], task: dict[str, Any]
) -> None:
    other = _made()
    change(other)
    assert _parts(other, **task) == _parts(_made(), **task)


def _changed(change: Callable[[Any], Any]) -> Any:
    tokenizer = _made()
    change(tokenizer)
    return tokenizer


@pytest.mark.parametrize(
    ("other", "task", "named"),
    [
        (_made(words=[*WORDS, "more"]), {}, "vocabulary"),
        (_made(words=[*WORDS[:-2], "bad", "good"]), {}, "vocabulary"),
        (_made(lower=True), {}, "normalizer"),
        (_made(bos=False), {}, "tokens before a prompt"),
        (_changed(lambda one: one.add_tokens([AddedToken("   ")])), {}, "added tokens"),
        (_changed(_with_another_end), {}, "end-of-text token"),
        (_changed(_with_another_end), CLASSES, ""),
        (_changed(_with_another_end), CLASSES | GENERATES, "end-of-text token"),
        (_changed(_with_another_decoder), {}, ""),
        (_changed(_with_another_decoder), GENERATES, "decoder"),
        (_changed(_with_pad), {"template": "{text} [PAD] was"}, "added tokens"),
        (
            _changed(lambda one: setattr(one.backend_tokenizer, "pre_tokenizer", None)),
            {},
            "pre-tokenizer",
        ),
        (_changed(lambda one: setattr(one, "split_special_tokens", True)), {}, "added tokens"),
    ],
)
def test_what_counts_is_named_by_its_part(other: Any, task: dict[str, Any], named: str) -> None:
    def genesis(tokenizer: Any) -> Genesis:
        config = RunConfig(run_id="x", model="m", task=TaskConfig(template="{t}", **CLASSES))
        parts = _parts(tokenizer, **task)
        digest = digest_of_parts(parts)
        return Genesis(config, b"m" * 32, b"b" * 32, digest, 1, 4, tokenizer_parts=parts)

    ours, theirs = genesis(_made()), genesis(other)
    assert decode_record(encode_record(ours)) == ours
    found = [what for what, _ in ours.differences(theirs, theirs.tokenizer_parts)]
    assert found == ([f"tokenizer (its {named})"] if named else [])
    assert [what for what, _ in ours.differences(theirs)] == (["tokenizer"] if named else [])


def test_a_tokenizer_in_python_has_parts_too() -> None:
    slow: Any = ByT5Tokenizer
    one, other = slow(extra_ids=0), slow(extra_ids=0)
    other.add_tokens([AddedToken("<tool_call>")])
    assert _parts(one) == _parts(other)
    other.add_tokens([AddedToken("  ")])
    assert _parts(one) != _parts(other)


def test_the_digest_keeps_its_definition() -> None:
    """Runs in progress hold it."""
    assert digest_of_parts(_parts(_made())).hex().startswith("6d165921a640bbd0")
