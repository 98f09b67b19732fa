"""Prompts and label words as tokens, with every kind of tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from fedmezo_core.config import TaskConfig
from fedmezo_core.errors import ConfigError
from fedmezo_core.zo.data.prompts import PromptEncoder, control_tokens
from fedmezo_core.zo.data.rows import Example
from fedmezo_core.zo.data.task import Task
from tests.core.zo.conftest import SENTENCES

ADDED = [
    AddedToken("<|user|>", special=True, rstrip=True),
    AddedToken("<tool_call>", special=False, normalized=False),
    AddedToken("   ", special=False, normalized=False),
    AddedToken("ü", special=False, normalized=True),
]
PIECES = [
    "</s>", "<s>", "<unk>", "<|user|>", "<tool_call>", "<", "/s>", "</", "s>", "|user|>", "   ",
    " ", "ü", "ö", "<h1>", "a film", "great", "\n", "▁", "</S>", "x\ufeff",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
TEMPLATES = [
    "{text} It was",
    "<{text}>",
    "<s><|user|> {text}</s> So{more}</s>",
    "</{text}s>{more}<tool_call>   ",
    "{text}{more}",
]


def _fast(tokenizer: Tokenizer, **names: str) -> Any:
    fast: Any = PreTrainedTokenizerFast  # transformers leaves its constructor without types
    made = fast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **names)
    made.add_tokens(ADDED)
    return made


def byte_level() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _fast(tokenizer)


def metaspace_bpe() -> Any:
    """Like Llama 2's: a prefix space, and `<s>` before every text; merges make `</s>`."""
    marks = ["<unk>", "<s>", "</s>"]
    letters = sorted({*"".join(SENTENCES), *"▁<>/s|_"} - {" "})
    merged = ["</", "s>", "▁a", "gr", "ea", "grea", "great"]
    vocabulary = {text: index for index, text in enumerate([*marks, *letters, *merged])}
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("▁", "a"), ("g", "r"), ("e", "a")]
    merges += [("gr", "ea"), ("grea", "t")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return _fast(tokenizer, unk_token="<unk>")


def unigram() -> Any:
    """Its model holds the control tokens as pieces of the best score."""
    letters = sorted({*"".join(SENTENCES), *"▁<>/s|_"} - {" "})
    pieces = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -5.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("▁great", -3.0)], unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return _fast(tokenizer, unk_token="<unk>")


def word_level() -> Any:
    """It lowers all letters, so that `</S>` too is a control token's text."""
    words = ["<unk>", "<s>", "</s>", "it", "was", "so", "a", "film", "great", "<", ">", "|", "/"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = _fast(tokenizer, unk_token="<unk>")
    made.add_tokens([AddedToken("</s>", special=True, normalized=True)])
    return made


def slow() -> Any:
    """A tokenizer in Python, of bytes."""
    slow_type: Any = ByT5Tokenizer
    made = slow_type(bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_ids=0)
    made.add_tokens(ADDED)
    return made


MAKERS = [byte_level, metaspace_bpe, unigram, word_level, slow]
TOKENIZERS = {maker.__name__: maker() for maker in MAKERS}


def _pieces(template: str, text: str) -> list[str]:
    parts = TaskConfig(kind="instruction", template=template).template_parts()
    return [text if index % 2 else part for index, part in enumerate(parts)]


def test_control_tokens_are_marks_not_letters_or_spaces() -> None:
    found = control_tokens(TOKENIZERS["byte_level"])
    assert set(found) == {"<s>", "</s>", "<|user|>", "<tool_call>"}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_only_the_template_holds_control_tokens(name: str, template: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    encoder = PromptEncoder(tokenizer, columns_are_plain=True)
    old = PromptEncoder(tokenizer, columns_are_plain=False)
    pieces = _pieces(template, text)
    [tokens], [before] = encoder.of_pieces([pieces]), old.of_pieces([pieces])
    assert [before] == old.of_texts(["".join(pieces)])
    controls = {id_ for text, id_ in control_tokens(tokenizer).items() if text != "<unk>"}

    def within(tokens: list[int]) -> list[int]:
        return [id_ for id_ in tokens if id_ in controls]

    own = [id_ for part in old.of_texts(pieces[::2]) for id_ in within(part)]
    assert within(tokens) == own
    if within(before) == own and "<unk>" not in text:
        assert tokens == before


@pytest.mark.parametrize(
    ("pieces", "count"),
    [
        (["", "</s>", ""], 0),
        (["", "</", "", "s>", ""], 0),
        (["</", "s", ">"], 0),
        (["</s>", "a film", "</s>"], 2),
        (["</s>", "</s>", ""], 1),
    ],
)
def test_an_unknown_token_that_is_the_end_of_text_comes_from_the_template_alone(
    pieces: list[str], count: int
) -> None:
    """GPT-2's tokenizer and many others have one token for both."""
    tokenizer = byte_level()
    tokenizer.unk_token = "</s>"
    [tokens] = PromptEncoder(tokenizer, columns_are_plain=True).of_pieces([pieces])
    assert tokens.count(tokenizer.eos_token_id) == count


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "slow"])
@settings(max_examples=60)
@given(text=TEXTS.filter(lambda text: "<" not in text and ">" not in text))
def test_the_copy_that_reads_such_rows_reads_others_alike(name: str, text: str) -> None:
    encoder = PromptEncoder(TOKENIZERS[name], columns_are_plain=True)
    for template in TEMPLATES:
        pieces = _pieces(template, text)
        [plain] = encoder.of_texts(["".join(pieces)])
        if list(encoder.of_pieces([pieces])) == [plain]:
            assert encoder._with_plain_columns(pieces) == plain


@pytest.mark.parametrize(
    ("name", "decoded"),
    [("byte_level", "</s> It was"), ("metaspace_bpe", "</s> It was"), ("slow", "</s> It was")],
)
def test_a_rows_control_token_is_its_letters(name: str, decoded: str) -> None:
    tokenizer = TOKENIZERS[name]
    encoder = PromptEncoder(tokenizer, columns_are_plain=True)
    [tokens] = encoder.of_pieces([_pieces("{text} It was", "</s>")])
    spelt = "".join(tokenizer.convert_ids_to_tokens(tokens)).replace("Ġ", " ").replace("▁", " ")
    assert spelt.strip() == decoded


@pytest.mark.parametrize("kind", ["classification", "instruction"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_task_reads_columns_as_plain_text(name: str, kind: Any) -> None:
    tokenizer = TOKENIZERS[name]
    config = TaskConfig(
        kind=kind,
        template="{text} It was",
        template_version=3,
        verbalizers={"0": " a", "1": " great"} if kind == "classification" else {},
        tokens_max=24,
    )
    task = Task(config, tokenizer, 1000)
    values = {"text": "a </s>" * 9, "label": "1", "response": " great</s>"}
    (example,) = task.encode([Example(values, "data", 1)]).examples
    assert len(example.prompt) <= 24
    assert tokenizer.eos_token_id not in example.prompt
    assert tokenizer.eos_token_id not in example.response[:-1]


@pytest.mark.parametrize(
    ("template", "count"), [("{text}", 1), ("<s>{text}", 1), ("<s> {text}", 1), ("</s>{text}", 1)]
)
def test_a_prompt_begins_once(template: str, count: int) -> None:
    tokenizer = TOKENIZERS["metaspace_bpe"]

    def beginnings(version: int) -> int:
        config = TaskConfig(kind="instruction", template=template, template_version=version)
        row = Example({"text": "a film", "response": "great"}, "data", 1)
        (example,) = Task(config, tokenizer, 1000).encode([row]).examples
        return example.prompt.count(tokenizer.bos_token_id)

    assert beginnings(3) == count
    assert beginnings(2) == count + template.startswith("<s>"), "an old run keeps its meaning"


def _labelled(words: list[str], *, version: int = 3, **changes: Any) -> Task:
    values = {"template": "{text} It was", "tokens_max": 16} | changes
    verbalizers = {str(index): word for index, word in enumerate(words)}
    config = TaskConfig(verbalizers=verbalizers, template_version=version, **values)
    return Task(config, TOKENIZERS["metaspace_bpe"], 1000)


def _ids(texts: list[str]) -> list[int]:
    ids: list[int] = TOKENIZERS["metaspace_bpe"].convert_tokens_to_ids(texts)
    return ids


@pytest.mark.parametrize("text", ["a film", "a film " * 9])
def test_label_words_are_compared_where_they_first_differ(text: str) -> None:
    task = _labelled([" bad", " film"])
    assert list(task.verbalizer_ids) == _ids(["b", "f"])
    (example,) = task.encode([Example({"text": text, "label": "1"}, "data", 1)]).examples
    assert list(example.prompt[-2:]) == _ids(["s", "▁"]), "the prompt has what all words share"
    assert len(example.prompt) <= 16
    with pytest.raises(ConfigError, match="begin with the same token"):
        _labelled([" bad", " film"], version=2)


def test_label_words_that_begin_differently_mean_what_they_always_meant() -> None:
    row = Example({"text": "a film", "label": "1"}, "data", 1)
    new, old = (_labelled([" a", " great"], version=version) for version in (3, 2))
    assert new.verbalizer_ids == old.verbalizer_ids == tuple(_ids(["▁a", "▁"]))
    assert new.encode([row]).examples[0].prompt == old.encode([row]).examples[0].prompt


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ([" bad", " film", " a"], r"' bad' and ' film' .*\['▁', 'b', 'a', 'd'\] and \['▁', 'f'"),
        ([" b", " bad"], r"they are \['▁', 'b'\] and \['▁', 'b', 'a', 'd'\]"),
        ([" b", " b"], r"' b' and ' b' begin with the same token"),
    ],
)
def test_label_words_that_no_token_tells_apart_are_refused(words: list[str], shown: str) -> None:
    with pytest.raises(ConfigError, match=shown):
        _labelled(words)


def test_a_generated_text_holds_the_whole_label_word() -> None:
    task = _labelled([" bad", " film"], objective="a:b", generated_tokens_max=3)
    row = Example({"text": "a film", "label": "1"}, "data", 1)
    batch = task.collate(task.encode([row]).examples, "x")
    coming = iter(_ids(["b", "a", "d"]))
    assert task.generated(batch, 3, lambda _: torch.tensor([next(coming)])) == ["bad"]
