"""A run that nobody makes: a journal and a status of any size, to be watched."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

from fedmezo_coordinator.serving.loop_lag import AppendTimes
from fedmezo_core.config import RunConfig, parse_run
from fedmezo_core.journal.codec import config_to_pb, encode_records
from fedmezo_core.journal.journal import Journal, MemoryStore, Row
from fedmezo_core.records import (
    Answered,
    Committed,
    Evaluated,
    Genesis,
    Opened,
    Record,
    Scalars,
    SeedRange,
    Started,
)
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import runs_pb2 as runs

ANSWERS = 4
"""Answers of a round."""
EVALUATED_EVERY = 10
TRAINABLE_BYTES = 1_800_000


def config_of(run_id: str, rounds: int) -> RunConfig:
    """A contract in which nothing is special."""
    task = {
        "template": "{text} It was",
        "verbalizers": {"negative": " terrible", "positive": " great"},
        "tokens_max": 64,
    }
    values = {
        "run_id": run_id,
        "model": "HuggingFaceTB/SmolLM2-135M",
        "rounds": rounds,
        "learning_rate": 0.5,
        "report_losses": True,
        "task": task,
    }
    return parse_run(values, "the made run")


def loss_at(round_: int, rounds: int) -> float:
    """A training loss that falls."""
    return 0.25 + 0.45 * math.exp(-4 * round_ / rounds)


class MadeRun:
    """A `WatchedRun` whose rounds and workers are made up."""

    def __init__(
        self,
        run_id: str = "reviews",
        rounds: int = 100,
        workers: int = 8,
        *,
        planned: int = 0,
        epoch: int = 1,
        seed: int = 1,
    ) -> None:
        """`rounds` of `planned` are committed already; 0 planned: all of them are."""
        self.run_id = run_id
        self.shows_workers = self.is_served = True
        self.run_phase: int = runs.RUN_PHASE_RUNNING
        self.phase_reason = ""
        self.refused_answers: Counter[str] = Counter()
        self.declines: dict[str, str] = {}
        self.append_times = AppendTimes()
        self._random = random.Random(seed)
        self.config = config_of(run_id, max(planned, rounds, 1))
        self._journal = Journal(MemoryStore())
        self.told = wire.GetStatusResponse(
            config=config_to_pb(self.config),
            phase=wire.PHASE_OPEN,
            epoch=epoch,
            trainable_bytes=TRAINABLE_BYTES,
            sessions=workers,
            workers=[self._worker(number) for number in range(workers)],
        )
        one, two, three = (bytes([number]) * 32 for number in range(3))
        genesis = Genesis(
            self.config, one, two, three, TRAINABLE_BYTES // 4, trainable_bytes=TRAINABLE_BYTES
        )
        self.append([genesis, *(Started(number + 1) for number in range(epoch))])
        for _ in range(rounds):
            self._commit()
        self._count_answers(rounds)

    @property
    def records_shown(self) -> int:
        return len(self._journal)

    async def rows_from(self, seqno: int, rows_max: int) -> Sequence[Row]:
        return self._journal.read(seqno, rows_max)

    def status(self) -> wire.GetStatusResponse | None:
        if not self.is_served:
            return None
        copy = wire.GetStatusResponse()
        copy.CopyFrom(self.told)  # As a daemon makes it anew.
        return copy

    def append(self, records: Sequence[Record]) -> None:
        """Add records to the journal."""
        self._journal.append(encode_records(records))
        self.told.records = len(self._journal)

    def commit(self) -> None:
        """Commit one more round, and evaluate it if it is time."""
        self._commit()
        self._count_answers(1)

    def _count_answers(self, rounds: int) -> None:
        for one in self.told.workers:
            one.rounds_answered += rounds
            one.bytes_up += 180 * rounds
            one.bytes_down += 420 * rounds

    def _commit(self) -> None:
        round_, noise = self.told.round + 1, self._random.uniform
        names = tuple(one.worker for one in self.told.workers[:ANSWERS]) or ("gone",)
        loss = loss_at(round_, self.config.rounds)
        answers = [
            Answered(round_, slot, Scalars((noise(-1, 1),), loss + noise(-0.05, 0.05), None))
            for slot in range(len(names))
        ]
        ranges = tuple(SeedRange(slot << 16, (noise(-1, 1),) * 8) for slot in range(len(names)))
        self.append([Opened(round_, 0, names), *answers, Committed(round_, ranges, round_)])
        self.told.round = round_
        self.told.recent_rounds.add(round=round_, mean_loss=loss, answers=len(names))
        del self.told.recent_rounds[:-1000]
        if round_ % EVALUATED_EVERY == 0:
            self._evaluate(round_, loss)

    def _evaluate(self, round_: int, loss: float) -> None:
        accuracy = min(0.5 + 0.45 * (0.7 - loss) / 0.45, 1.0)
        record = Evaluated(round_, loss + 0.03, accuracy, 872, bytes(32))
        self.append([record])
        self.told.evaluations.add(
            round=round_, loss=record.loss, accuracy=accuracy, rows=872, weights_digest=bytes(32)
        )
        del self.told.evaluations[:-1000]

    def _worker(self, number: int) -> wire.WorkerStatus:
        chance = self._random.random
        return wire.WorkerStatus(
            worker=f"device-{number:04}",
            connected=number % 17 != 16,
            measuring=number % 3 == 0,
            mean_loss=0.3 + 0.2 * chance(),
            answered_after_ms=int(900 + 900 * chance()),
            learning_rate=0.5,
            relative_size=0.8 + 0.4 * chance(),
        )
