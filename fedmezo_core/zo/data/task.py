"""From rows of text to a loss: prompts, verbalizers, responses, batches, evaluation.

Two kinds of task (`TaskConfig.kind`):

- `classification` by verbalizers, as in MeZO (Malladi et al. 2023): the loss is the cross-entropy
  between the first tokens of the verbalizers, at the last position of the prompt. Only that
  position's logits are computed.
- `instruction`: the loss is the mean negative log-likelihood of the response's tokens and the
  end-of-text token, given the prompt; the prompt itself is masked.

Prompts are padded on the left, so that in every row the positions which matter are the last ones.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from fedmezo_core.zo.data.rows import Row
from fedmezo_core.zo.model.modules import computing
from fedmezo_core.zo.model.offload import execution_device
from fedmezo_core.zo.objective import Predictions

_FIELD = re.compile(r"\{([A-Za-z_][A-Za-z0-9_ ]*)\}")
_IGNORED = -100
"""Target of a position that is no part of the loss (torch's own convention)."""
_LOSS_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Logits whose losses are taken at a time: the temporary, as large, stays in the CPU's cache, or is
small beside a GPU's memory while there are few launches."""
_TEXTS_PER_CALL = 1024
_WINDOW_BATCHES = 8
"""Batches whose rows are sorted by length together. More would save little padding (decision 0003)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row as token ids."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    """Instruction: response and end-of-text token. Classification: empty."""
    label: int
    """Classification: index of the class among the verbalizers. Instruction: -1."""
    values: Mapping[str, str] = field(default_factory=dict)
    """The row itself, kept for an objective only."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """The encoded rows of one party."""

    examples: tuple[Example, ...]
    truncated_count: int
    """Rows whose text was cut to fit `tokens_max`."""

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of one forward pass, padded on the left."""

    name: str
    """What a message calls it."""
    input_ids: torch.Tensor
    """int64 [rows, tokens]"""
    attention_mask: torch.Tensor
    """int64 [rows, tokens]: 1 for a token, 0 for padding"""
    position_ids: torch.Tensor
    """int64 [rows, tokens]: from 0 at each row's first token"""
    labels: torch.Tensor
    """int64 [rows]: classes (classification)"""
    targets: torch.Tensor
    """int64 [rows, response tokens]: ends of the rows, -100 where masked (instruction)"""
    examples: tuple[Example, ...]
    """What the rows were made of."""

    def repeated(self, copies: int) -> Batch:
        """This batch `copies` times over, one whole copy after the other."""
        return Batch(
            name=self.name,
            input_ids=self.input_ids.repeat(copies, 1),
            attention_mask=self.attention_mask.repeat(copies, 1),
            position_ids=self.position_ids.repeat(copies, 1),
            labels=self.labels.repeat(copies),
            targets=self.targets.repeat(copies, 1),
            examples=self.examples * copies,
        )

    def continued(self, tokens: torch.Tensor) -> Batch:
        """This batch with one more token at the end of each row: int64 [rows]."""
        return replace(
            self,
            input_ids=torch.cat([self.input_ids, tokens[:, None]], dim=1),
            attention_mask=functional.pad(self.attention_mask, (0, 1), value=1),
            position_ids=torch.cat([self.position_ids, self.position_ids[:, -1:] + 1], dim=1),
        )


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out result of one set of weights."""

    loss: float
    """Mean over rows (classification) or over response tokens (instruction), in nats."""
    accuracy: float
    """Share of rows whose largest verbalizer, or of response tokens whose largest logit, is right."""
    auc: float | None
    """Two classes: chance that a row of the second one scores above a row of the first. It does not
    see a mere bias towards one class, which accuracy does. None otherwise, or if a class is absent."""
    calibrated_accuracy: float | None
    """Two classes: accuracy if every row above the median margin were called the second one. As `auc`
    it does not see a bias, but it is in the units of accuracy. It supposes that half of the rows are of
    either class. None where `auc` is."""
    row_count: int
    target_count: int
    """What `loss` and `accuracy` are means over: rows, or response tokens."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    row_losses: list[float]
    """Sum over each row's targets, in nats."""
    target_count: int
    correct_count: int
    """0 where nobody asked to count."""
    margins: list[float]
    """Two classes: second logit minus first, for each row."""
    class_logits: npt.NDArray[np.float32]
    """[rows, classes]"""


class Task:
    """Encodes rows and computes losses for one `TaskConfig` and tokenizer."""

    def __init__(
        self, config: TaskConfig, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int
    ) -> None:
        """Resolve template and verbalizers; `vocabulary_size` is the model's number of embeddings.

        Raises `ConfigError` for verbalizers that can't be told apart by their first tokens or that
        run into the template's last word, `ModelError` for a tokenizer that doesn't fit.
        """
        self.config = config
        self._tokenizer = tokenizer
        self._vocabulary_size = vocabulary_size
        # Odd items are names of columns.
        self._template = _FIELD.split(config.template)
        self._row_states = self._special_prefix()
        self._labels = {label: index for index, label in enumerate(config.verbalizers)}
        self._eos: int | None = tokenizer.eos_token_id
        if config.kind == "classification":
            self.verbalizer_ids = self._first_tokens()
        else:
            self.verbalizer_ids = ()
            if self._eos is None:
                raise ModelError(
                    "The tokenizer has no end-of-text token, which instruction tuning needs; use a "
                    "model whose tokenizer sets eos_token."
                )

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the data must have, for `read_rows`."""
        return tuple(dict.fromkeys([*self.config.columns(), self.config.answer_column]))

    # ------------------------------------------------------------------ text to tokens

    def encode(self, rows: Sequence[Row]) -> Dataset:
        """Encode `rows`; raises `DataError` for one whose label is unknown or whose prompt is empty.

        A row that is longer than `tokens_max` loses text of its columns, never of the template: all
        its columns are cut to the same number of characters, the largest that fits, keeping their
        beginnings. In instruction tuning the response is cut first, but not below half of
        `tokens_max`; a response that was cut has no end-of-text token.
        """
        if not rows:
            raise DataError("There are no rows; give a data file with at least one.")
        labels = [self._label(row) for row in rows]
        prompts = self._tokens([self._prompt(row) for row in rows])
        responses: list[list[int]] = [[] for _ in rows]
        if self._eos is not None and self.config.kind == "instruction":
            texts = [row.values[self.config.response_column] for row in rows]
            responses = [[*tokens, self._eos] for tokens in self._tokens(texts)]
        examples: list[Example] = []
        truncated_count = 0
        for row, label, tokens, response in zip(rows, labels, prompts, responses, strict=True):
            prompt = [*self._row_states, *tokens]
            if not prompt:
                raise DataError(
                    f"In {row.place} the prompt is empty; fill the row in or remove it."
                )
            if len(prompt) + len(response) > self.config.tokens_max:
                truncated_count += 1
                prompt, response = self._truncated(row, len(prompt), response)
            if max(*prompt, *response, 0) >= self._vocabulary_size:
                raise ModelError(
                    f"The tokenizer turns {row.place} into token {max(*prompt, *response)}, but the "
                    f"model has only {self._vocabulary_size}; use the model's own tokenizer."
                )
            values = row.values if self.config.objective else {}
            examples.append(Example(tuple(prompt), tuple(response), label, values))
        return Dataset(tuple(examples), truncated_count)

    def _prompt(self, row: Row, characters_max: int | None = None) -> str:
        return "".join(
            row.values[part][:characters_max] if index % 2 else part
            for index, part in enumerate(self._template)
        )

    def _label(self, row: Row) -> int:
        if self.config.kind != "classification":
            return -1
        label = row.values[self.config.label_column]
        if label not in self._labels:
            raise DataError(
                f"In {row.place}, label {label!r} is not among the run's labels "
                f"({', '.join(map(repr, self._labels))}); correct the row or add a verbalizer for it."
            )
        return self._labels[label]

    def _truncated(
        self, row: Row, prompt_count: int, response: list[int]
    ) -> tuple[list[int], list[int]]:
        tokens_max = self.config.tokens_max
        response = response[: max(tokens_max - prompt_count, tokens_max // 2)]
        budget = tokens_max - len(response) - len(self._row_states)
        # The largest cut that fits, by bisection: `fits` is always the tokens of `low` characters.
        fits = self._tokens([self._prompt(row, 0)])[0]
        if len(fits) > budget:
            raise ConfigError(
                f"The template alone takes {len(fits) + len(self._row_states)} tokens, too many for "
                f"tokens_max = {tokens_max}; raise tokens_max or shorten the template."
            )
        low, high = 0, max(len(row.values[column]) for column in self.config.columns()) + 1
        while high - low > 1:
            middle = (low + high) // 2
            tokens = self._tokens([self._prompt(row, middle)])[0]
            if len(tokens) <= budget:
                low, fits = middle, tokens
            else:
                high = middle
        return [*self._row_states, *fits], response

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        tokens: list[list[int]] = []
        for start in range(0, len(texts), _TEXTS_PER_CALL):
            encoding = self._tokenizer(
                list(texts[start : start + _TEXTS_PER_CALL]),
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,
            )
            tokens.extend(encoding["input_ids"])
        return tokens

    def _special_prefix(self) -> list[int]:
        """Special tokens that this tokenizer puts before every text, such as <s>."""
        plain = self._tokens(["a"])[0]
        special: list[int] = self._tokenizer("a", verbose=False)["input_ids"]
        for start in range(len(special) - len(plain) + 1):
            if special[start : start + len(plain)] == plain:
                return special[:start]
        return []

    def _first_tokens(self) -> tuple[int, ...]:
        tail = self._template[-1] or "."
        chosen: dict[int, str] = {}
        for word in self.config.verbalizers.values():
            if not word.strip():
                raise ConfigError("A verbalizer is empty; give every label a word.")
            if self._template[-1][-1:].isalnum() and word[0].isascii() and word[0].isalnum():
                raise ConfigError(
                    f"Verbalizer {word!r} would run into the template's last word "
                    f"({tail.split()[-1]!r}); write it with a leading space: {' ' + word!r}."
                )
            # Tokenised behind the template's end: some tokenizers treat the start of a text apart.
            before, whole = self._tokens([tail, tail + word])
            if whole[: len(before)] != before or len(whole) == len(before):
                raise ConfigError(
                    f"Verbalizer {word!r} melts into the end of the template ({tail[-20:]!r}) when it "
                    "is tokenised; take spaces from the template's end and begin the verbalizer with "
                    "one."
                )
            first = whole[len(before)]
            if first in chosen:
                raise ConfigError(
                    f"Verbalizers {chosen[first]!r} and {word!r} begin with the same token "
                    f"({self._tokenizer.decode([first])!r}), so the loss can't tell them apart; "
                    "choose words that begin differently."
                )
            if first >= self._vocabulary_size:
                raise ModelError(
                    f"Verbalizer {word!r} is token {first}, but the model has only "
                    f"{self._vocabulary_size}; use the model's own tokenizer."
                )
            chosen[first] = word
        return tuple(chosen)

    # ------------------------------------------------------------------ tokens to a loss

    def collate(
        self, examples: Sequence[Example], name: str, device: str | torch.device = "cpu"
    ) -> Batch:
        """Pad `examples` on the left into one `Batch` on `device`."""
        rows = len(examples)
        tokens = max(len(example.prompt) + len(example.response) for example in examples)
        response_tokens = max(len(example.response) for example in examples)
        # What a masked position holds doesn't matter; 0 is a token that every vocabulary has.
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
        """Mean loss of `batch` in nats, summed in float64; may be NaN or infinite."""
        return self.losses(model, batch, 1)[0]

    def losses(self, model: nn.Module, batch: Batch, copies: int) -> list[float]:
        """Mean loss of each of the `copies` that a `Batch.repeated` consists of."""
        outcome = self._outcome(model, batch, count_correct=False)
        rows, targets = len(outcome.row_losses) // copies, outcome.target_count // copies
        return [
            sum(outcome.row_losses[copy * rows : (copy + 1) * rows]) / targets
            for copy in range(copies)
        ]

    def evaluate(
        self,
        model: nn.Module,
        dataset: Dataset,
        batch_size: int,
        *,
        before_batch: Callable[[], None] = lambda: None,
        around_batch: Callable[[Batch], AbstractContextManager[None]] | None = None,
    ) -> Evaluation:
        """Loss and accuracy of the model over all of `dataset`, `batch_size` rows at a time.

        Each batch is computed within its `around_batch`, `RowStates.known` say. What `before_batch` raises
        ends it. Raises `MeasurementError` if a loss is NaN or infinite.
        """
        # Rows of like length together, so that little of a batch is padding. The sort is stable.
        order = sorted(
            range(len(dataset)),
            key=lambda index: (
                len(dataset.examples[index].prompt) + len(dataset.examples[index].response)
            ),
        )
        device = execution_device(model)
        outcomes: list[_Outcome] = []
        for start in range(0, len(order), batch_size):
            before_batch()
            examples = [dataset.examples[index] for index in order[start : start + batch_size]]
            batch = self.collate(examples, "evaluation", device)
            with around_batch(batch) if around_batch else nullcontext():
                outcome = self._outcome(model, batch)
            if not math.isfinite(sum(outcome.row_losses)):
                raise MeasurementError(
                    "The held-out loss is NaN or infinite; the weights have diverged, so use a "
                    "smaller learning_rate or eps."
                )
            outcomes.append(outcome)
        target_count = sum(outcome.target_count for outcome in outcomes)
        margins = [margin for outcome in outcomes for margin in outcome.margins]
        labels = [dataset.examples[index].label for index in order]
        auc = _auc(margins, labels) if margins else None
        return Evaluation(
            loss=math.fsum(loss for outcome in outcomes for loss in outcome.row_losses)
            / target_count,
            accuracy=sum(outcome.correct_count for outcome in outcomes) / target_count,
            auc=auc,
            calibrated_accuracy=None if auc is None else _calibrated_accuracy(margins, labels),
            row_count=len(dataset),
            target_count=target_count,
        )

    # ------------------------------------------------------------------ what an objective sees

    def predictions(
        self, model: nn.Module, batch: Batch, copies: int, texts: Sequence[str]
    ) -> list[Predictions]:
        """What `model` makes of each of the `copies` that a `Batch.repeated` consists of.

        `texts` is what it generated for the rows, if anything. Raises `MeasurementError` if what it
        computes is NaN or infinite.
        """
        outcome = self._outcome(model, batch, count_correct=False)
        logits, log_likelihoods = outcome.class_logits, -np.array(outcome.row_losses)
        if not (np.isfinite(logits).all() and np.isfinite(log_likelihoods).all()):
            raise _not_finite(batch)
        is_class = self.config.kind == "classification"
        classes = list(self._labels) if is_class else []
        likeliest = [classes[index] for index in logits.argmax(axis=1)] if classes else []
        answer = self.config.answer_column
        rows = len(batch.examples) // copies
        parts = [slice(copy * rows, (copy + 1) * rows) for copy in range(copies)]
        return [
            Predictions(
                rows=[dict(example.values) for example in batch.examples[part]],
                wanted=[example.values[answer] for example in batch.examples[part]],
                classes=list(classes),
                logits=logits[part],
                predicted=likeliest[part],
                log_likelihoods=log_likelihoods[part],
                texts=list(texts[part]),
            )
            for part in parts
        ]

    def generated(self, batch: Batch, next_tokens: Callable[[Batch], torch.Tensor]) -> list[str]:
        """What is written behind each row's prompt, greedily.

        `next_tokens` gives the token that follows each row: `Task.next_tokens`, at whatever weights.
        A text ends before the end-of-text token, or with `generated_tokens_max` tokens.
        """
        prompts = [replace(example, response=()) for example in batch.examples]
        rows = self.collate(prompts, batch.name, batch.input_ids.device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=batch.input_ids.device)
        columns: list[torch.Tensor] = []
        while len(columns) < self.config.generated_tokens_max and not bool(ended.all()):
            if columns:
                rows = rows.continued(columns[-1])
            # The whole rows again for each token: a cache of keys and values would be faster, but a
            # module that runs once for each point could not tell whose keys are whose.
            columns.append(next_tokens(rows))
            if self._eos is not None:
                ended |= columns[-1] == self._eos
        return [self._text(tokens) for tokens in torch.stack(columns, dim=1).tolist()]

    @torch.inference_mode()
    def next_tokens(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The likeliest token behind each row: int64 [rows].

        Raises `MeasurementError` if a logit is NaN or infinite.
        """
        logits = logits_of(model, batch, 1)[:, -1]
        largest = logits.max(dim=-1)
        if not bool(largest.values.isfinite().all()):
            raise _not_finite(batch)
        return largest.indices

    def _text(self, tokens: Sequence[int]) -> str:
        end = tokens.index(self._eos) if self._eos in tokens else len(tokens)
        text = self._tokenizer.decode(
            list(tokens[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    @torch.inference_mode()
    def _outcome(self, model: nn.Module, batch: Batch, *, count_correct: bool = True) -> _Outcome:
        if self.config.kind == "classification":
            with _head_of_words(model, self.verbalizer_ids):
                logits = logits_of(model, batch, 1)[:, -1, list(self.verbalizer_ids)].double()
            losses = functional.cross_entropy(logits, batch.labels, reduction="none")
            two = len(self.verbalizer_ids) == 2
            return _Outcome(
                row_losses=losses.tolist(),
                target_count=len(batch.labels),
                correct_count=int((logits.argmax(dim=-1) == batch.labels).sum()),
                margins=(logits[:, 1] - logits[:, 0]).tolist() if two else [],
                class_logits=logits.float().cpu().numpy(),
            )
        response_tokens = batch.targets.shape[1]
        # The logits at one position predict the next token.
        logits = logits_of(model, batch, response_tokens + 1)[:, :-1]
        positions_max = max(1, _chunk_elements(logits) // logits.shape[-1])
        row_losses: list[torch.Tensor] = []
        correct_count = 0
        for row, targets in zip(logits, batch.targets, strict=True):
            parts = [
                functional.cross_entropy(
                    part.float(), target, ignore_index=_IGNORED, reduction="none"
                )
                for part, target in zip(
                    row.split(positions_max), targets.split(positions_max), strict=True
                )
            ]
            row_losses.append(torch.cat(parts).double().sum())
            if count_correct:
                correct_count += int((row.argmax(dim=-1) == targets).sum())
        target_count = int((batch.targets != _IGNORED).sum())
        no_logits = np.empty((len(row_losses), 0), dtype=np.float32)
        return _Outcome(
            torch.stack(row_losses).tolist(), target_count, correct_count, [], no_logits
        )


def _not_finite(batch: Batch) -> MeasurementError:
    return MeasurementError(
        f"The model computes NaN or infinity on the batch of {batch.name}; use a smaller eps or "
        "learning_rate, or check this worker's data."
    )


def _chunk_elements(logits: torch.Tensor) -> int:
    return _LOSS_CHUNK_ELEMENTS.get(logits.device.type, _LOSS_CHUNK_ELEMENTS["cpu"])


def logits_of(model: nn.Module, batch: Batch, positions: int) -> torch.Tensor:
    """Logits of the last `positions` positions: [rows, positions, vocabulary], the model's dtype."""
    arguments: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "use_cache": False,
    }
    # peft's wrapper passes on whatever the model inside takes.
    inner = getattr(model, "get_base_model", lambda: model)()
    accepted = inspect.signature(inner.forward).parameters
    if "position_ids" in accepted:
        arguments["position_ids"] = batch.position_ids
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = positions
    logits: torch.Tensor = model(**arguments).logits
    return logits[:, -positions:]


@contextmanager
def _head_of_words(model: nn.Module, words: Sequence[int]) -> Iterator[None]:
    """While open, the model's head computes the logits of `words` alone; all others are 0.

    Behind a part that is known or frozen, all words' logits would be most of the work. A head that is no
    plain `nn.Linear`, or whose weights are perturbed in this pass, computes them all.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()

    def make(_: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        if getattr(original, "__func__", None) is not nn.Linear.forward:
            return original
        return functools.wraps(original)(lambda hidden: _few_logits(head, hidden, list(words)))

    with nullcontext() if head is None else computing(head, make):
        yield


def _few_logits(head: nn.Linear, hidden: torch.Tensor, words: list[int]) -> torch.Tensor:
    bias = None if head.bias is None else head.bias[words]
    logits = hidden.new_zeros((*hidden.shape[:-1], head.out_features))
    logits[..., words] = functional.linear(hidden, head.weight[words], bias)
    return logits


def _auc(margins: Sequence[float], labels: Sequence[int]) -> float | None:
    """Area under the ROC curve by ranks, ties counted half (Mann and Whitney 1947)."""
    scores = np.asarray(margins)
    second = np.asarray(labels) == 1
    count_first, count_second = int((~second).sum()), int(second.sum())
    if not count_first or not count_second:
        return None
    _, groups, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2.0)[groups]
    above = float(ranks[second].sum()) - count_second * (count_second + 1) / 2.0
    return above / (count_first * count_second)


def _calibrated_accuracy(margins: Sequence[float], labels: Sequence[int]) -> float:
    scores = np.asarray(margins)
    return float(np.mean((scores > np.median(scores)) == (np.asarray(labels) == 1)))


class Batches:
    """Which rows a worker measures on: a pure function of run seed, worker, round and step.

    The worker's steps, numbered through all rounds, read its rows in passes; within a pass no row comes
    twice, and each pass has an order of its own. So a restarted worker repeats exactly what it would
    have done. A batch takes rows of like length: each `_WINDOW_BATCHES` batches' worth of shuffled
    rows is sorted by length before it is cut, and then the batches are shuffled. On short texts that
    saves a third of the tokens, which would be padding.
    """

    def __init__(
        self,
        task: Task,
        dataset: Dataset,
        *,
        run_seed: int,
        worker_name: str,
        batch_size: int,
        local_steps: int,
        device: str | torch.device = "cpu",
    ) -> None:
        """`local_steps` is the run's, by which rounds and steps are numbered through.

        A dataset that is smaller than `batch_size` is one batch. What is left over at the end of a pass
        is less than a batch, and other rows each time.
        """
        self._task = task
        self._dataset = dataset
        self._lengths = np.array(
            [len(example.prompt) + len(example.response) for example in dataset.examples]
        )
        self._key = struct.pack("<Q", run_seed) + worker_name.encode()
        self._batch_size = min(batch_size, len(dataset))
        self._local_steps = local_steps
        self._device = device
        self._pass = -1
        self._batches: list[npt.NDArray[np.int64]] = []

    @property
    def row_count(self) -> int:
        """Rows of the worker's data."""
        return len(self._dataset)

    def indices(self, round_: int, step: int) -> list[int]:
        """Rows of the batch of `step` (from 0) in `round_` (from 1)."""
        number, place = divmod(
            (round_ - 1) * self._local_steps + step, len(self._dataset) // self._batch_size
        )
        if number != self._pass:
            self._pass, self._batches = number, self._shuffled(number)
        return [int(index) for index in self._batches[place]]

    def batch(self, round_: int, step: int) -> Batch:
        """The batch of `step` (from 0) in `round_` (from 1)."""
        examples = [self._dataset.examples[index] for index in self.indices(round_, step)]
        return self._task.collate(examples, f"round {round_}, step {step}", self._device)

    def _shuffled(self, number: int) -> list[npt.NDArray[np.int64]]:
        hashed = hashlib.sha256(b"fedmezo batches v1\0" + struct.pack("<Q", number) + self._key)
        # Raw bits, because NumPy keeps those the same for ever, unlike its own permutations.
        bits = np.random.Philox(key=int.from_bytes(hashed.digest()[:16], "little"))
        size, count = self._batch_size, len(self._dataset) // self._batch_size
        order = np.argsort(bits.random_raw(len(self._dataset)), kind="stable")[: size * count]
        batches: list[npt.NDArray[np.int64]] = []
        for first in range(0, len(order), _WINDOW_BATCHES * size):
            window = order[first : first + _WINDOW_BATCHES * size]
            window = window[np.argsort(self._lengths[window], kind="stable")]
            batches += [window[start : start + size] for start in range(0, len(window), size)]
        return [batches[place] for place in np.argsort(bits.random_raw(count), kind="stable")]
