"""From rows of text to token ids: template, verbalizers, responses, and padded arrays of them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from fedmezo_core.config import TaskConfig
from fedmezo_core.errors import ConfigError, DataError, ModelError
from fedmezo_core.zo.data.prompts import PromptEncoder, TextTokenizer
from fedmezo_core.zo.data.rows import Example, label_form, shown
from fedmezo_core.zo.data.tokenizer_parts import tokenizer_parts

IGNORED: Final = -100
"""Target of a position that is not part of the loss (torch's convention)."""


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One row of data as token ids."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    """Instruction: the response and the end-of-text token. Classification: empty."""
    label: int
    """Classification: index of the row's class among the verbalizers. Instruction: -1."""
    values: Mapping[str, str] = field(default_factory=dict)
    """The row as text, by column; empty unless the task has an objective."""

    @property
    def token_count(self) -> int:
        """Number of tokens of prompt and response together."""
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True, slots=True)
class Dataset:
    """The encoded rows of one party."""

    examples: tuple[EncodedExample, ...]
    truncated_count: int
    """Number of rows whose text was cut to fit `tokens_max`."""
    cut_token_count: int = 0
    """Number of tokens that these rows lost."""
    longest_token_count: int = 0
    """Number of tokens of the longest row before it was cut."""

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """The arrays of one forward pass, padded on the left."""

    input_ids: npt.NDArray[np.int64]
    """Token ids: int64 [rows, tokens]; 0 at padding."""
    attention_mask: npt.NDArray[np.int64]
    """1 for a token, 0 for padding: int64 [rows, tokens]."""
    position_ids: npt.NDArray[np.int64]
    """Positions, from 0 at the first token of each row: int64 [rows, tokens]."""
    labels: npt.NDArray[np.int64]
    """Indices of the right classes, or -1 in instruction tuning: int64 [rows]."""
    targets: npt.NDArray[np.int64]
    """Response tokens at the ends of the rows, -100 elsewhere: int64 [rows, response tokens], with
    no response tokens in classification."""
    examples: tuple[EncodedExample, ...]
    """The examples that the rows hold."""


def padded(examples: Sequence[EncodedExample]) -> PaddedRows:
    """Pad `examples` on the left."""
    rows = len(examples)
    tokens = max(example.token_count for example in examples)
    response_tokens = max(len(example.response) for example in examples)
    # Padding is masked. 0 is a token that every vocabulary has.
    input_ids = np.zeros((rows, tokens), dtype=np.int64)
    attention_mask = np.zeros((rows, tokens), dtype=np.int64)
    position_ids = np.zeros((rows, tokens), dtype=np.int64)
    targets = np.full((rows, response_tokens), IGNORED, dtype=np.int64)
    for index, example in enumerate(examples):
        sequence = example.prompt + example.response
        input_ids[index, tokens - len(sequence) :] = sequence
        attention_mask[index, tokens - len(sequence) :] = 1
        position_ids[index, tokens - len(sequence) :] = np.arange(len(sequence))
        if example.response:
            targets[index, response_tokens - len(example.response) :] = example.response
    labels = np.array([example.label for example in examples], dtype=np.int64)
    return PaddedRows(input_ids, attention_mask, position_ids, labels, targets, tuple(examples))


class RowEncoder:
    """Turns rows into token ids for one `TaskConfig` and tokenizer."""

    def __init__(self, config: TaskConfig, tokenizer: TextTokenizer, vocabulary_size: int) -> None:
        """Resolve template and verbalizers; `vocabulary_size` is the model's number of embeddings.

        Raises `ConfigError` for verbalizers that begin with the same token or that merge with the
        template's last word, `ModelError` for a tokenizer that does not fit the model or the task.
        """
        self.config = config
        self._tokenizer = tokenizer
        self._vocabulary_size = vocabulary_size
        self._encoder = PromptEncoder(tokenizer, columns_are_plain=config.columns_are_plain)
        # Odd items are names of columns.
        self._template = config.template_parts()
        self._before = self._tokens_before()
        self._after: list[int] = []
        self._labels = {label: index for index, label in enumerate(config.verbalizers)}
        forms = Counter(map(label_form, self._labels))
        self._label_forms = {
            label_form(label): index
            for label, index in self._labels.items()
            if forms[label_form(label)] == 1
        }
        self._eos: int | None = tokenizer.eos_token_id
        if config.kind == "classification":
            self._after, self.verbalizer_ids = self._scored_tokens()
        else:
            self.verbalizer_ids = ()
            if self._eos is None:
                raise ModelError(
                    "The tokenizer has no end-of-text token, which instruction tuning needs; use a "
                    "model whose tokenizer sets eos_token."
                )

    def tokenizer_parts(self) -> tuple[bytes, ...]:
        """Digests of what of the tokenizer can change a loss of this task."""
        return tokenizer_parts(self._tokenizer, self.config, self._before)

    def encode(self, rows: Sequence[Example]) -> Dataset:
        """Turn `rows` into token ids.

        A row that is longer than `tokens_max` loses text of its columns, never of the template:
        each column keeps its beginning, of the largest number of characters with which the row
        fits. In instruction tuning the response is cut first, but not below half of `tokens_max`;
        then it has no end-of-text token.

        Raises `DataError` for no rows, and for a row with an unknown label or an empty prompt;
        `ConfigError` if the template alone is too long; `ModelError` for a token id that the model
        does not have.
        """
        if not rows:
            raise DataError("There are no rows; give a data file with at least one.")
        labels = [self._label(row) for row in rows]
        # Only some rows at a time are held as they were before they were cut.
        prompts = self._encoder.of_pieces(self._pieces(row) for row in rows)
        responses: Iterator[list[int]] = ([] for _ in rows)
        if self._eos is not None and self.config.kind == "instruction":
            ends, texts = [self._eos], (row.values[self.config.response_column] for row in rows)
            responses = (
                tokens + ends for tokens in self._encoder.of_pieces(("", text) for text in texts)
            )
        examples: list[EncodedExample] = []
        truncated_count = cut_token_count = longest_token_count = 0
        for row, label, tokens, response in zip(rows, labels, prompts, responses, strict=True):
            prompt = self._prompt(tokens)
            if not prompt:
                raise DataError(
                    f"In {row.location} the prompt is empty; fill the row in or remove it."
                )
            token_count = len(prompt) + len(response)
            longest_token_count = max(longest_token_count, token_count)
            if token_count > self.config.tokens_max:
                truncated_count += 1
                prompt, response = self._truncated(row, len(prompt), response)
                cut_token_count += token_count - len(prompt) - len(response)
            if max(*prompt, *response, 0) >= self._vocabulary_size:
                raise ModelError(
                    f"The tokenizer turns {row.location} into token {max(*prompt, *response)}, but "
                    f"the model has only {self._vocabulary_size}; use the model's own tokenizer."
                )
            values = row.values if self.config.objective else {}
            examples.append(EncodedExample(tuple(prompt), tuple(response), label, values))
        return Dataset(tuple(examples), truncated_count, cut_token_count, longest_token_count)

    def _pieces(self, row: Example, characters_max: int | None = None) -> list[str]:
        return [
            row.values[part][:characters_max] if index % 2 else part
            for index, part in enumerate(self._template)
        ]

    def _prompt(self, tokens: Sequence[int]) -> list[int]:
        return [*self._before, *tokens, *self._after]

    def _label(self, row: Example) -> int:
        if self.config.kind != "classification":
            return -1
        label = row.values[self.config.label_column]
        index = self._labels.get(label, self._label_forms.get(label_form(label)))
        if index is None:
            raise DataError(
                f"In {row.location}, label {shown(label)} is not among the run's labels "
                f"({', '.join(map(shown, self._labels))}); correct the row or add a verbalizer for "
                "it."
            )
        return index

    def _truncated(
        self, row: Example, prompt_count: int, response: list[int]
    ) -> tuple[list[int], list[int]]:
        tokens_max = self.config.tokens_max
        response = response[: max(tokens_max - prompt_count, tokens_max // 2)]
        fits, _ = self._prompt_that_fits(row, len(response))
        return self._prompt(fits), response

    def characters_kept(self, row: Example, encoded: EncodedExample) -> int:
        """How many characters at the beginning of each column of `row` its prompt has."""
        return self._prompt_that_fits(row, len(encoded.response))[1]

    def _prompt_that_fits(self, row: Example, response_count: int) -> tuple[list[int], int]:
        """A prompt's tokens beside so many of the response, and each column's characters in it."""
        tokens_max = self.config.tokens_max
        budget = tokens_max - response_count - len(self._prompt([]))
        # The largest cut that fits, by bisection: `fits` is always the tokens of `low` characters.
        [fits] = self._encoder.of_pieces([self._pieces(row, 0)])
        if len(fits) > budget:
            raise ConfigError(
                f"The template alone takes {len(self._prompt(fits))} tokens, too many for "
                f"tokens_max = {tokens_max}; raise tokens_max or shorten the template."
            )
        low, high = 0, max(len(row.values[column]) for column in self.config.columns()) + 1
        while high - low > 1:
            middle = (low + high) // 2
            [tokens] = self._encoder.of_pieces([self._pieces(row, middle)])
            if len(tokens) <= budget:
                low, fits = middle, tokens
            else:
                high = middle
        return fits, low

    def _tokens_before(self) -> list[int]:
        """What goes before every prompt: the tokenizer's own prefix, unless the template has one.

        Old runs put it there in any case.
        """
        prefix, [first] = self._encoder.prefix, self._encoder.of_texts(self._template[:1])
        has_its_own = self.config.columns_are_plain and prefix[:1] == first[:1]
        return [] if has_its_own else prefix

    def _scored_tokens(self) -> tuple[list[int], tuple[int, ...]]:
        """The tokens that all verbalizers begin with, and the one of each that comes next.

        The former end the prompt. In old runs there are none of them.
        """
        words = list(self.config.verbalizers.values())
        tokens = [self._continuation(word) for word in words]
        shared: list[int] = []
        if self.config.columns_are_plain:
            for column in zip(*tokens, strict=False):
                if len(set(column)) > 1:
                    break
                shared.append(column[0])
        # A word may end where the others go on.
        scored = [own[len(shared)] if len(own) > len(shared) else None for own in tokens]
        if None in scored or len(set(scored)) < len(scored):
            one, two = next(
                (one, two)
                for one, two in itertools.combinations(range(len(words)), 2)
                if scored[one] == scored[two] or None in (scored[one], scored[two])
            )
            as_tokens = self._tokenizer.convert_ids_to_tokens
            raise ConfigError(
                f"Verbalizers {words[one]!r} and {words[two]!r} begin with the same token, and "
                f"the loss compares one token of each: they are {as_tokens(tokens[one])} and "
                f"{as_tokens(tokens[two])}; choose words that begin differently."
            )
        ids = [token for token in scored if token is not None]
        for word, token in zip(words, ids, strict=True):
            largest = max([*shared, token])
            if largest >= self._vocabulary_size:
                raise ModelError(
                    f"Verbalizer {word!r} is token {largest}, but the model has only "
                    f"{self._vocabulary_size}; use the model's own tokenizer."
                )
        return shared, tuple(ids)

    def _continuation(self, word: str) -> list[int]:
        """The tokens with which a verbalizer goes on after the template."""
        tail = self._template[-1] or "."
        if not word.strip():
            raise ConfigError("A verbalizer is empty; give every label a word.")
        if self._template[-1][-1:].isalnum() and word[0].isascii() and word[0].isalnum():
            raise ConfigError(
                f"Verbalizer {word!r} would run into the template's last word "
                f"({tail.split()[-1]!r}); write it with a leading space: {' ' + word!r}."
            )
        # Some tokenizers treat the start of a text differently.
        before, whole = self._encoder.of_texts([tail, tail + word])
        if whole[: len(before)] != before or len(whole) == len(before):
            raise ConfigError(
                f"Verbalizer {word!r} melts into the end of the template ({tail[-20:]!r}) when "
                "it is tokenised; take spaces from the template's end and begin the verbalizer "
                "with one."
            )
        return whole[len(before) :]

    def target_count(self, examples: Sequence[EncodedExample]) -> int:
        """What a mean loss over `examples` is over: rows, or response tokens (instruction)."""
        if self.config.kind == "classification":
            return len(examples)
        return sum(len(example.response) for example in examples)
