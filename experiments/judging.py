"""Judges the global model: every method on the same held-out rows, with the same code."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import starmap
from pathlib import Path

import torch

from fedmezo_core.zo.data.encoding import Dataset
from fedmezo_core.zo.data.held_out import Evaluation, evaluate
from fedmezo_core.zo.data.rows import Example
from fedmezo_core.zo.data.task import Batch
from fedmezo_core.zo.forward.row_states import RowStates
from fedmezo_core.zo.model.offload import execution_device
from fedmezo_core.zo.objectives import token_f1
from fedmezo_core.zo.party import Party


@dataclass(frozen=True, slots=True)
class Point:
    """How the global model does on held-out rows after a round."""

    round: int
    loss: float
    accuracy: float
    calibrated_accuracy: float | None
    auc: float | None
    rows: int
    exact_match: float | None = None
    """Share of rows whose generated text is the right answer, but for white space around both; None
    if no text was generated."""
    token_f1: float | None = None
    """Mean of `objectives.token_f1` over the rows; None if no text was generated."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """How the model does on some rows."""

    evaluation: Evaluation
    exact_match: float | None = None
    token_f1: float | None = None


@dataclass
class Judge:
    """Evaluates a party's model at the base, every `every_rounds` rounds, and at the end.

    All points of a curve come from the same rows, which may be the first few of all rows. The first
    and the last model are judged by all rows, too.
    """

    party: Party
    rows: Sequence[Example]
    every_rounds: int
    batch_size: int = 64
    curve_rows: int | None = None
    """Rows behind each point of the curve; None: all."""
    generated_tokens_max: int = 0
    """Most tokens of the text that the model writes for each row; 0: it writes none."""
    row_states: RowStates | None = None
    kept: Path | None = None
    """Folder for the base's results, which most runs share; None: they are not kept."""
    curve: list[Point] = field(default_factory=list)
    whole: list[Point] = field(default_factory=list)
    """Results on all rows: before the first round and after the last."""
    seconds: float = 0.0
    """CPU seconds spent on judging so far."""

    def __post_init__(self) -> None:
        """Raises as `Task.encode` does."""
        task = self.party.task
        self._all = task.encode(self.rows)
        few = self.curve_rows is not None and self.curve_rows < len(self.rows)
        self._few = task.encode(self.rows[: self.curve_rows]) if few else self._all

    def judge(self, round_: int, *, is_last: bool = False) -> Evaluation | None:
        """Evaluate the model after `round_` if that is due and was not done yet.

        Returns the curve's new point, if there is one. Raises as `held_out.evaluate` does.
        """
        is_end = is_last or round_ in (0, self.party.config.rounds)
        is_due = is_end or round_ % self.every_rounds == 0
        begin = time.process_time()
        found = None
        if is_due and _is_news(round_, self.curve):
            found = self._evaluate(self._few, round_)
            self.curve.append(_point(round_, found))
        if is_end and _is_news(round_, self.whole):
            reused = found if self._few is self._all else None
            self.whole.append(_point(round_, reused or self._evaluate(self._all, round_)))
        self.seconds += time.process_time() - begin
        return None if found is None else found.evaluation

    def _evaluate(self, dataset: Dataset, round_: int) -> Judgement:
        if round_ or self.kept is None:
            return self._evaluated(dataset)
        config = self.party.config
        facts = (
            self.party.base_digest.hex(),
            config.dtype,
            config.task.model_dump_json(),
            self.batch_size,
            self.generated_tokens_max,
            self.row_states is None,
            dataset.examples,
            torch.__version__,
        )
        path = self.kept / f"base-{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}.json"
        if path.exists():
            kept = json.loads(path.read_text())
            return Judgement(**{**kept, "evaluation": Evaluation(**kept["evaluation"])})
        found = self._evaluated(dataset)
        write_whole(path, json.dumps(asdict(found)))
        return found

    def _evaluated(self, dataset: Dataset) -> Judgement:
        found = evaluate(
            self.party.task,
            self.party.loaded.model,
            dataset,
            self.batch_size,
            around_batch=None if self.row_states is None else self.row_states.known,
        )
        if not self.generated_tokens_max:
            return Judgement(found)
        column = self.party.config.task.answer_column
        wanted = [row.values[column] for row in self.rows[: len(dataset)]]
        pairs = list(zip(self._texts(dataset), wanted, strict=True))
        right = sum(text.strip() == answer.strip() for text, answer in pairs)
        return Judgement(found, right / len(pairs), sum(starmap(token_f1, pairs)) / len(pairs))

    def _texts(self, dataset: Dataset) -> list[str]:
        """What the model writes after each row's prompt."""
        task, model = self.party.task, self.party.loaded.model

        def next_tokens(rows: Batch) -> torch.Tensor:
            # Without states of rows: texts change from one evaluation to the next. Other rows stand
            # in for those that have ended; each is computed once.
            kinds = {example.prompt: example for example in rows.examples}
            batch = task.collate(list(kinds.values()), rows.name, rows.input_ids.device)
            found = task.next_tokens(model, batch)
            place = {prompt: number for number, prompt in enumerate(kinds)}
            return found[[place[example.prompt] for example in rows.examples]]

        texts: list[str] = []
        for first in range(0, len(dataset), self.batch_size):
            examples = dataset.examples[first : first + self.batch_size]
            batch = task.collate(examples, "evaluation", execution_device(model))
            texts += task.generated(batch, self.generated_tokens_max, next_tokens)
        return texts


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; text gets a final newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    passing = path.with_suffix(f".{os.getpid()}.part")
    passing.write_bytes(content if isinstance(content, bytes) else f"{content}\n".encode())
    passing.replace(path)


def _is_news(round_: int, points: Sequence[Point]) -> bool:
    return not points or points[-1].round < round_


def _point(round_: int, judged: Judgement) -> Point:
    found = judged.evaluation
    return Point(
        round=round_,
        loss=found.loss,
        accuracy=found.accuracy,
        calibrated_accuracy=found.calibrated_accuracy,
        auc=found.auc,
        rows=found.row_count,
        exact_match=judged.exact_match,
        token_f1=judged.token_f1,
    )
