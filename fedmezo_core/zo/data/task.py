"""From rows of text to a loss: prompts, verbalizers, responses, losses, predictions.

Two kinds of task (`TaskConfig.kind`):

- `classification` by verbalizers, as in MeZO (Malladi et al. 2023): the loss is the cross-entropy
  over the first tokens in which the verbalizers differ, at the last position of the prompt, which
  ends in the tokens that they share. Only the logits of that position are computed.
- `instruction`: the loss is the mean negative log-likelihood of the response's tokens and the
  end-of-text token, given the prompt.

Prompts are padded on the left, so that the positions that matter are the last ones of every row.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from fedmezo_core.config import TaskConfig
from fedmezo_core.errors import ConfigError, DataError, MeasurementError, ModelError
from fedmezo_core.zo.data.prompts import PromptEncoder
from fedmezo_core.zo.data.rows import Example, label_form, shown
from fedmezo_core.zo.data.tokenizer_parts import tokenizer_parts
from fedmezo_core.zo.model.modules import computing
from fedmezo_core.zo.objectives import Predictions

_IGNORED = -100
"""Target of a position that is not part of the loss (torch's convention)."""
_LOSS_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Logits that losses are computed from at a time. The temporary of the same size stays in a CPU's
cache; on a GPU it is small, and there are few launches."""
_SLICE_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Logits of response tokens that exist at a time: 64 MB of float32 on a CPU. The head's weights,
which each slice reads again, then take a small part of its time."""


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
class Batch:
    """The tensors of one forward pass, padded on the left."""

    name: str
    """What messages call the batch."""
    input_ids: torch.Tensor
    """Token ids: int64 [rows, tokens]; any value at padding."""
    attention_mask: torch.Tensor
    """1 for a token, 0 for padding: int64 [rows, tokens]."""
    position_ids: torch.Tensor
    """Positions, from 0 at the first token of each row: int64 [rows, tokens]."""
    labels: torch.Tensor
    """Indices of the right classes, or -1 in instruction tuning: int64 [rows]."""
    targets: torch.Tensor
    """Response tokens at the ends of the rows, -100 elsewhere: int64 [rows, response tokens], with
    no response tokens in classification."""
    examples: tuple[EncodedExample, ...]
    """The examples that the rows hold."""

    def repeated(self, copies: int) -> Batch:
        """A batch that consists of `copies` of this one, one whole copy after the other."""
        return Batch(
            name=self.name,
            input_ids=self.input_ids.repeat(copies, 1),
            attention_mask=self.attention_mask.repeat(copies, 1),
            position_ids=self.position_ids.repeat(copies, 1),
            labels=self.labels.repeat(copies),
            targets=self.targets.repeat(copies, 1),
            examples=self.examples * copies,
        )

    def padded(self, tokens: int, response_tokens: int) -> Batch:
        """This batch with padding on the left, `tokens` long, its targets `response_tokens`."""
        left = (tokens - self.input_ids.shape[1], 0)
        left_of_targets = (response_tokens - self.targets.shape[1], 0)
        return replace(
            self,
            input_ids=functional.pad(self.input_ids, left),
            attention_mask=functional.pad(self.attention_mask, left),
            position_ids=functional.pad(self.position_ids, left),
            targets=functional.pad(self.targets, left_of_targets, value=_IGNORED),
        )

    def read(self) -> Batch:
        """This batch with only the positions whose logits a loss reads, the last ones of a row."""
        count = self.targets.shape[1] + 1
        return replace(
            self,
            input_ids=self.input_ids[:, -count:],
            attention_mask=self.attention_mask[:, -count:],
            position_ids=self.position_ids[:, -count:],
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a forward pass gives for one batch."""

    row_losses: list[float]
    """The loss of each row, summed over its targets, in nats."""
    target_count: int
    """Rows (classification) or response tokens (instruction)."""
    correct_count: int
    """Targets with the largest logit; not counted in instruction tuning unless asked for."""
    margins: list[float]
    """Two classes: second logit minus first, for each row. Empty otherwise."""
    class_logits: npt.NDArray[np.float32]
    """Logits of the verbalizers: float32 [rows, classes], with 0 classes in instruction tuning."""


class Task:
    """Encodes rows and computes losses for one `TaskConfig` and tokenizer."""

    def __init__(
        self, config: TaskConfig, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int
    ) -> None:
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
        self._has_small_head: weakref.WeakKeyDictionary[nn.Module, bool] = (
            weakref.WeakKeyDictionary()
        )
        """Whether a model can do with the verbalizers' logits alone, once that is known."""
        self._words_on: dict[torch.device, torch.Tensor] = {}
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

    # ------------------------------------------------------------------ text to tokens

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
        budget = tokens_max - len(response) - len(self._prompt([]))
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
        return self._prompt(fits), response

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

    # ------------------------------------------------------------------ tokens to a loss

    def collate(
        self, examples: Sequence[EncodedExample], name: str, device: str | torch.device = "cpu"
    ) -> Batch:
        """Pad `examples` on the left into one batch on `device`, which messages call `name`."""
        rows = len(examples)
        tokens = max(example.token_count for example in examples)
        response_tokens = max(len(example.response) for example in examples)
        # Padding is masked. 0 is a token that every vocabulary has.
        input_ids = np.zeros((rows, tokens), dtype=np.int64)
        attention_mask = np.zeros((rows, tokens), dtype=np.int64)
        position_ids = np.zeros((rows, tokens), dtype=np.int64)
        targets = np.full((rows, response_tokens), _IGNORED, dtype=np.int64)
        for index, example in enumerate(examples):
            sequence = example.prompt + example.response
            input_ids[index, tokens - len(sequence) :] = sequence
            attention_mask[index, tokens - len(sequence) :] = 1
            position_ids[index, tokens - len(sequence) :] = np.arange(len(sequence))
            if example.response:
                targets[index, response_tokens - len(example.response) :] = example.response
        return Batch(
            name=name,
            input_ids=torch.from_numpy(input_ids).to(device),
            attention_mask=torch.from_numpy(attention_mask).to(device),
            position_ids=torch.from_numpy(position_ids).to(device),
            labels=torch.tensor([example.label for example in examples], device=device),
            targets=torch.from_numpy(targets).to(device),
            examples=tuple(examples),
        )

    def loss(self, model: nn.Module, batch: Batch) -> float:
        """The mean loss of `batch` in nats, summed in float64; may be NaN or infinite."""
        return self.losses(model, batch, 1)[0]

    def losses(self, model: nn.Module, batch: Batch, copies: int) -> list[float]:
        """The mean loss, in nats, of each of the `copies` that a `Batch.repeated` consists of."""
        return self.means(self.row_losses(model, batch).tolist(), batch, copies)

    def means(self, row_losses: Sequence[float], batch: Batch, copies: int) -> list[float]:
        """The mean loss of each of the `copies` that `batch` consists of, from `row_losses`."""
        rows = len(row_losses) // copies
        targets = self.target_count(batch.examples[:rows])
        return [
            sum(row_losses[copy * rows : (copy + 1) * rows]) / targets for copy in range(copies)
        ]

    def target_count(self, examples: Sequence[EncodedExample]) -> int:
        """What a mean loss over `examples` is over: rows, or response tokens (instruction)."""
        if self.config.kind == "classification":
            return len(examples)
        return sum(len(example.response) for example in examples)

    @torch.inference_mode()
    def row_losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of each row in nats, summed over its targets: float64 [rows].

        Nothing waits for the device unless the head runs in slices (`is_sliced`).
        """
        if self.config.kind == "classification":
            return _class_losses(self._verbalizer_logits(model, batch).double(), batch)
        losses = torch.zeros(batch.targets.shape, device=batch.targets.device)
        for places, logits in target_logits(model, batch):
            losses[places] = _token_losses(logits, batch.targets[places])
        return losses.double().sum(dim=1)

    def scores(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """What the loss of each row depends on, for autograd: float32 [rows, scores].

        They are the verbalizers' logits less their mean (classification), which no label changes,
        or the loss of the row's response, summed over its tokens (instruction).
        """
        if self.config.kind == "classification":
            logits = self._verbalizer_logits(model, batch).float()
            return logits - logits.mean(dim=1, keepdim=True)
        losses = torch.zeros(batch.targets.shape, device=batch.targets.device)
        for places, logits in target_logits(model, batch):
            losses[places] = _token_losses(logits, batch.targets[places])
        return losses.sum(dim=1, keepdim=True)

    def is_sliced(self, model: nn.Module, batch: Batch, copies: int) -> bool:
        """Whether the response tokens of `copies` of `batch` go through the head in slices."""
        return self.config.kind != "classification" and not _fit_a_slice(
            model, batch.targets.numel() * copies, batch.targets.device
        )

    # ------------------------------------------------------------------ what an objective sees

    def predictions(
        self, model: nn.Module, batch: Batch, copies: int, texts: Sequence[str]
    ) -> list[Predictions]:
        """The predictions for each of the `copies` that a `Batch.repeated` consists of.

        `texts` are the texts that the model generated for the rows, if any. Raises
        `MeasurementError` if a logit or loss is NaN or infinite.
        """
        outcome = self.outcome(model, batch, count_correct=False)
        logits, log_likelihoods = outcome.class_logits, -np.array(outcome.row_losses)
        if not (np.isfinite(logits).all() and np.isfinite(log_likelihoods).all()):
            raise _not_finite(batch)
        is_class = self.config.kind == "classification"
        classes = list(self._labels) if is_class else []
        predicted = [classes[index] for index in logits.argmax(axis=1)] if classes else []
        answer = self.config.answer_column
        rows = len(batch.examples) // copies
        parts = [slice(copy * rows, (copy + 1) * rows) for copy in range(copies)]
        return [
            Predictions(
                rows=[dict(example.values) for example in batch.examples[part]],
                wanted=[
                    classes[example.label] if classes else example.values[answer]
                    for example in batch.examples[part]
                ],
                classes=list(classes),
                logits=logits[part],
                predicted=predicted[part],
                log_likelihoods=log_likelihoods[part],
                texts=list(texts[part]),
            )
            for part in parts
        ]

    def generated(
        self,
        batch: Batch,
        tokens_max: int,
        next_tokens: Callable[[Batch], torch.Tensor],
    ) -> list[str]:
        """Generate a text after each row's prompt, greedily.

        `next_tokens` gives the token that follows each row of a batch, int64 [rows], as
        `Task.next_tokens` does. A text ends before the end-of-text token, or after `tokens_max`
        tokens.
        """
        written: list[list[int]] = [[] for _ in batch.examples]
        going = list(range(len(written)))
        while going and len(written[going[0]]) < tokens_max:
            rows = [
                replace(example, prompt=(*example.prompt, *tokens), response=())
                for example, tokens in zip(batch.examples, written, strict=True)
            ]
            # A row that has ended is no longer computed: another one stands in its place.
            for row in set(range(len(rows))).difference(going):
                rows[row] = rows[going[0]]
            # Each token takes a pass over whole rows. A cache of keys and values would be faster,
            # but a module that runs once for each point could not tell the points' keys apart.
            found = next_tokens(self.collate(rows, batch.name, batch.input_ids.device)).tolist()
            going = [row for row in going if found[row] != self._eos]
            for row in going:
                written[row].append(found[row])
        # A label's word is whole again, though the prompt holds its first tokens.
        return [self._text([*self._after, *tokens]) for tokens in written]

    @torch.inference_mode()
    def next_tokens(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The most likely token after each row of `batch`: int64 [rows].

        Raises `MeasurementError` if a logit is NaN or infinite.
        """
        logits = logits_of(model, batch, 1)[:, -1]
        largest = logits.max(dim=-1)
        if not bool(largest.values.isfinite().all()):
            raise _not_finite(batch)
        return largest.indices

    def _text(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    @torch.inference_mode()
    def outcome(self, model: nn.Module, batch: Batch, *, count_correct: bool = True) -> Outcome:
        """Compute losses and logits of `batch`, which may be NaN or infinite.

        Without `count_correct`, right response tokens are not counted.
        """
        if self.config.kind == "classification":
            logits = self._verbalizer_logits(model, batch).double()
            two = len(self.verbalizer_ids) == 2
            return Outcome(
                row_losses=_class_losses(logits, batch).tolist(),
                target_count=len(batch.labels),
                correct_count=int((logits.argmax(dim=-1) == batch.labels).sum()),
                margins=(logits[:, 1] - logits[:, 0]).tolist() if two else [],
                class_logits=logits.float().cpu().numpy(),
            )
        losses = torch.zeros(batch.targets.shape, device=batch.targets.device)
        correct_count = 0
        for places, logits in target_logits(model, batch):
            targets = batch.targets[places]
            losses[places] = _token_losses(logits, targets)
            if count_correct:
                correct_count += int((logits.argmax(dim=-1) == targets).sum())
        return Outcome(
            row_losses=losses.double().sum(dim=1).tolist(),
            target_count=int((batch.targets != _IGNORED).sum()),
            correct_count=correct_count,
            margins=[],
            class_logits=np.empty((len(losses), 0), dtype=np.float32),
        )

    def _verbalizer_logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Logits of the verbalizers after each row: [rows, verbalizers], in the model's dtype.

        The head computes only those. A model that needs the whole vocabulary after its head fails
        at its first batch; then the others are 0.
        """
        words = self._words(batch.input_ids.device)
        if self._has_small_head.get(model, True):
            try:
                with _head_of_words(model, words, is_small=True):
                    logits = logits_of(model, batch, 1)[:, -1]
            except (RuntimeError, ValueError, IndexError):
                if model in self._has_small_head:
                    raise
                self._has_small_head[model] = False
            else:
                if logits.shape[-1] > len(words):
                    # The head is no plain linear layer, or is perturbed, and computed the whole.
                    return logits[:, words]
                self._has_small_head[model] = True
                return logits
        with _head_of_words(model, words, is_small=False):
            return logits_of(model, batch, 1)[:, -1, words]

    def _words(self, device: torch.device) -> torch.Tensor:
        """The verbalizers' ids on `device`, brought there once."""
        if device not in self._words_on:
            with torch.inference_mode(False):
                self._words_on[device] = torch.tensor(self.verbalizer_ids, device=device)
        return self._words_on[device]


def _class_losses(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    return functional.cross_entropy(logits, batch.labels, reduction="none")


def _token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    positions_max = max(1, _chunk_elements(logits) // logits.shape[-1])
    parts = [
        functional.cross_entropy(part.float(), target, ignore_index=_IGNORED, reduction="none")
        for part, target in zip(
            torch.split(logits, positions_max), torch.split(targets, positions_max), strict=True
        )
    ]
    return torch.cat(parts)


def _not_finite(batch: Batch) -> MeasurementError:
    return MeasurementError(
        f"The model computes NaN or infinity on the batch of {batch.name}; use a smaller eps or "
        "learning_rate, or check this worker's data."
    )


def _chunk_elements(logits: torch.Tensor) -> int:
    return _LOSS_CHUNK_ELEMENTS.get(logits.device.type, _LOSS_CHUNK_ELEMENTS["cpu"])


def logits_of(model: nn.Module, batch: Batch, positions: int) -> torch.Tensor:
    """Logits of the last `positions` positions, in the model's dtype.

    Returns [rows, positions, vocabulary].
    """
    return _logits(model, batch, positions)[:, -positions:]


def _logits(model: nn.Module, batch: Batch, positions: int) -> torch.Tensor:
    """Logits as the model gives them: of the last `positions` positions, or of all."""
    arguments: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "use_cache": False,
    }
    # peft's wrapper accepts any argument and passes it on.
    inner = getattr(model, "get_base_model", lambda: model)()
    accepted = inspect.signature(inner.forward).parameters
    if "position_ids" in accepted:
        arguments["position_ids"] = batch.position_ids
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = positions
    logits: torch.Tensor = model(**arguments).logits
    return logits


Places = tuple[Any, Any]
"""Indices of rows, and of columns, of a batch's targets."""


def target_logits(model: nn.Module, batch: Batch) -> Iterator[tuple[Places, torch.Tensor]]:
    """Logits that predict the response tokens of `batch`, in the model's dtype, part by part.

    Yields places among the batch's targets, and the logits [places, vocabulary] there. The head
    computes only positions that have a target, in slices of bounded size. If the head or the
    decoder cannot be told apart from the rest, or is perturbed in this pass, the logits of all
    positions, padding too, are computed at once, and come row by row. So they do if the model
    cannot do with the logits of a slice, and on a GPU if they fit one: looking for targets would
    wait for the device.
    """
    response_tokens = batch.targets.shape[1]
    head, decoder = _plain_head(model), _decoder(model)
    device = batch.targets.device
    fits = device.type != "cpu" and _fit_a_slice(model, batch.targets.numel(), device)
    if head is None or decoder is None or fits:
        yield from _by_row(model, batch)
        return
    rows, columns = (batch.targets != _IGNORED).nonzero(as_tuple=True)
    length = max(1, _slice_elements(device) // head.out_features)
    results: list[Any] = []
    for places in zip(torch.split(rows, length), torch.split(columns, length), strict=True):
        logits = None
        with computing(decoder, _only_once(results)):
            try:
                with computing(head, _at(places, response_tokens)):
                    logits = _logits(model, batch, response_tokens + 1)
            except (RuntimeError, ValueError, IndexError):
                if not results:
                    raise
            if logits is None or logits.shape[:2] != (1, len(places[0])):
                # The model reshapes its logits, or multiplies by its head's weights itself.
                by_row = list(_by_row(model, batch))
                break
        yield places, logits[0]
    else:
        return
    yield from by_row


def _by_row(model: nn.Module, batch: Batch) -> Iterator[tuple[Places, torch.Tensor]]:
    """Logits as `target_logits` yields them, of all positions, which are computed at once."""
    # The logits at one position predict the next token.
    logits = logits_of(model, batch, batch.targets.shape[1] + 1)[:, :-1]
    yield from (((row, slice(None)), own) for row, own in enumerate(logits))


def _slice_elements(device: torch.device) -> int:
    return _SLICE_ELEMENTS.get(device.type, _SLICE_ELEMENTS["cpu"])


def _fit_a_slice(model: nn.Module, tokens: int, device: torch.device) -> bool:
    """Whether the logits of `tokens` may exist at a time; they do if the head is no plain one."""
    head = _plain_head(model)
    return head is None or tokens * head.out_features <= _slice_elements(device)


def _plain_head(model: nn.Module) -> nn.Linear | None:
    """The model's head, if it is a matrix product and nothing has replaced that."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    plain = getattr(head, "_old_forward", getattr(head, "forward", None))
    is_plain = getattr(plain, "__func__", None) is nn.Linear.forward
    return head if isinstance(head, nn.Linear) and is_plain else None


def _decoder(model: nn.Module) -> nn.Module | None:
    """The part of the model that gives hidden states to the head, if it is a module of its own."""
    inner = getattr(model, "get_base_model", lambda: model)()
    # In transformers 4, `get_decoder` and `base_model` find nothing in some models.
    found = (
        getattr(inner, "get_decoder", lambda: None)(),
        getattr(inner, "model", None),
        getattr(inner, "base_model", None),
    )
    parts = (part for part in found if isinstance(part, nn.Module) and part is not inner)
    return next(parts, None)


def _only_once(results: list[Any]) -> Callable[..., Callable[..., Any]]:
    """For `computing`: a forward that runs unless `results` holds its result already."""

    def make(_: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not results:
                results.append(original(*args, **kwargs))
            return results[0]

        return forward

    return make


def _at(places: Places, response_tokens: int) -> Callable[..., Callable[..., Any]]:
    """For `computing`: a head that computes the logits [1, places, vocabulary] of targets alone.

    What a model does with its logits afterwards treats each of them alike.
    """
    rows, columns = places

    def make(_: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(hidden: torch.Tensor) -> Any:
            # The hidden state at one position predicts the next token.
            positions = columns + (hidden.shape[1] - response_tokens - 1)
            return original(hidden[rows, positions][None])

        return forward

    return make


@contextmanager
def _head_of_words(model: nn.Module, words: torch.Tensor, *, is_small: bool) -> Iterator[None]:
    """While open, the model's head computes only the logits of `words`.

    It gives only those if `is_small`, and otherwise 0 for all others. If few layers are left to
    compute, the logits of the whole vocabulary would be most of the work. A head that is not a
    plain `nn.Linear`, or is perturbed in this pass, computes them all.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()

    def make(_: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        if getattr(original, "__func__", None) is not nn.Linear.forward:
            return original

        def few_logits(hidden: torch.Tensor) -> torch.Tensor:
            bias = None if head.bias is None else head.bias[words]
            few = functional.linear(hidden, head.weight[words], bias)
            if is_small:
                return few
            logits = hidden.new_zeros((*hidden.shape[:-1], head.out_features))
            logits[..., words] = few
            return logits

        return functools.wraps(original)(few_logits)

    with nullcontext() if head is None else computing(head, make):
        yield
