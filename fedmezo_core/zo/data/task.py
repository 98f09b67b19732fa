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
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from fedmezo_core.config import TaskConfig
from fedmezo_core.errors import MeasurementError
from fedmezo_core.zo.data.encoding import IGNORED, EncodedExample, RowEncoder, padded
from fedmezo_core.zo.model.modules import computing
from fedmezo_core.zo.objectives import Predictions

_LOSS_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Logits that losses are computed from at a time. The temporary of the same size stays in a CPU's
cache; on a GPU it is small, and there are few launches."""
_SLICE_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Logits of response tokens that exist at a time: 64 MB of float32 on a CPU. The head's weights,
which each slice reads again, then take a small part of its time."""


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
            targets=functional.pad(self.targets, left_of_targets, value=IGNORED),
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


class Task(RowEncoder):
    """Encodes rows and computes losses for one `TaskConfig` and tokenizer."""

    def __init__(
        self, config: TaskConfig, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int
    ) -> None:
        """Resolve template and verbalizers; `vocabulary_size` is the model's number of embeddings.

        Raises `ConfigError` for verbalizers that begin with the same token or that merge with the
        template's last word, `ModelError` for a tokenizer that does not fit the model or the task.
        """
        super().__init__(config, tokenizer, vocabulary_size)
        self._has_small_head: weakref.WeakKeyDictionary[nn.Module, bool] = (
            weakref.WeakKeyDictionary()
        )
        """Whether a model can do with the verbalizers' logits alone, once that is known."""
        self._words_on: dict[torch.device, torch.Tensor] = {}

    # ------------------------------------------------------------------ tokens to a loss

    def collate(
        self, examples: Sequence[EncodedExample], name: str, device: str | torch.device = "cpu"
    ) -> Batch:
        """Pad `examples` on the left into one batch on `device`, which messages call `name`."""
        rows = padded(examples)
        return Batch(
            name=name,
            input_ids=torch.from_numpy(rows.input_ids).to(device),
            attention_mask=torch.from_numpy(rows.attention_mask).to(device),
            position_ids=torch.from_numpy(rows.position_ids).to(device),
            labels=torch.from_numpy(rows.labels).to(device),
            targets=torch.from_numpy(rows.targets).to(device),
            examples=rows.examples,
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

    @torch.inference_mode()
    def row_losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of each row in nats, summed over its targets: float64 [rows].

        Nothing waits for the device unless the head runs in slices (`is_sliced`).
        """
        if self.config.kind == "classification":
            return _class_losses(self._verbalizer_logits(model, batch).double(), batch)
        return _response_losses(model, batch).double().sum(dim=1)

    def scores(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """What the loss of each row depends on, for autograd: float32 [rows, scores].

        They are the verbalizers' logits (classification), or the loss of the row's response in
        nats, summed over its tokens (instruction).
        """
        if self.config.kind == "classification":
            return self._verbalizer_logits(model, batch).float()
        return _response_losses(model, batch).sum(dim=1, keepdim=True)

    def loss_of_scores(
        self, scores: torch.Tensor, batch: Batch, mean_scores: torch.Tensor
    ) -> torch.Tensor:
        """The loss of all rows together, from their `scores`, in nats.

        Of a classification's scores `mean_scores` are subtracted first.
        """
        if self.config.kind == "classification":
            return _class_losses(scores - mean_scores, batch).sum()
        return scores.sum()

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
            target_count=int((batch.targets != IGNORED).sum()),
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
        functional.cross_entropy(part.float(), target, ignore_index=IGNORED, reduction="none")
        for part, target in zip(
            torch.split(logits, positions_max), torch.split(targets, positions_max), strict=True
        )
    ]
    return torch.cat(parts)


def _response_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of each response token, in nats, and 0 elsewhere: float32, shape of the targets."""
    losses = torch.zeros(batch.targets.shape, device=batch.targets.device)
    for places, logits in target_logits(model, batch):
        losses[places] = _token_losses(logits, batch.targets[places])
    return losses


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
    head, decoder = plain_head(model), decoder_of(model)
    device = batch.targets.device
    fits = device.type != "cpu" and _fit_a_slice(model, batch.targets.numel(), device)
    if head is None or decoder is None or fits:
        yield from _by_row(model, batch)
        return
    rows, columns = (batch.targets != IGNORED).nonzero(as_tuple=True)
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
    head = plain_head(model)
    return head is None or tokens * head.out_features <= _slice_elements(device)


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The model's head, if it is a matrix product and nothing has replaced that."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    plain = getattr(head, "_old_forward", getattr(head, "forward", None))
    is_plain = getattr(plain, "__func__", None) is nn.Linear.forward
    return head if isinstance(head, nn.Linear) and is_plain else None


def decoder_of(model: nn.Module) -> nn.Module | None:
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
