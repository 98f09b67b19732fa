"""What must hold in every simulated run, checked as it happens by someone who knows the truth."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field

from fedmezo_core.config import RunConfig
from fedmezo_core.events import SendAnswer, Ticket
from fedmezo_core.records import (
    Answered,
    Committed,
    Diverged,
    Opened,
    Record,
    Started,
    digest64_of,
    first_seed_of,
    rounding_seed_of,
)

BASE_WEIGHTS = hashlib.sha256(b"base").digest()


class ViolationError(AssertionError):
    """Something that must never happen has happened."""


def weights_after(weights: bytes, commit: Committed) -> bytes:
    """Stands for the weights: 32 bytes that depend on every commit and on their order."""
    return hashlib.sha256(weights + repr(commit).encode()).digest()


def measure(
    worker: str, first_seed: int, pairs: int, weights: bytes
) -> tuple[tuple[float, ...], float]:
    """The oracle: what this worker's data gives along these seeds on these weights."""
    grads = []
    for seed in range(first_seed, first_seed + pairs):
        digest = hashlib.sha256(weights + seed.to_bytes(8, "little") + worker.encode()).digest()
        grads.append(_binary32(int.from_bytes(digest[:4], "little") / 2**28 - 8))
    return tuple(grads), _binary32(abs(grads[0]))


@dataclass
class Checker:
    """Fed everything that becomes durable, is sent by a worker, or is acknowledged to one."""

    config: RunConfig
    weights: list[bytes] = field(default_factory=lambda: [BASE_WEIGHTS])
    """True weights after each committed round."""
    epoch: int = 0
    cohort: list[str] = field(default_factory=list)
    answers: dict[tuple[int, int], Answered] = field(default_factory=dict)
    named: set[tuple[int, str, int]] = field(default_factory=set)
    sent_answers: set[tuple[str, SendAnswer]] = field(default_factory=set)

    @property
    def open_round(self) -> int:
        """The round that is, or will be, open."""
        return len(self.weights)

    def appended(self, record: Record) -> None:
        """A record is durable."""
        match record:
            case Started(epoch):
                self.epoch += 1
                _require(epoch == self.epoch, f"epoch {epoch} follows {self.epoch - 1}")
            case Opened(round_, first_slot, workers):
                _require(round_ == self.open_round, f"round {round_} opened out of turn")
                _require(first_slot == len(self.cohort), f"slots of round {round_} have a gap")
                self.cohort += workers
            case Answered():
                self._answered(record)
            case Committed():
                self._committed(record)
            case Diverged():
                self._diverged(record)
            case _:
                pass

    def forget(self, record: Opened) -> None:
        """The disk lost the newest record."""
        del self.cohort[record.first_slot :]

    def sent(self, worker: str, answer: SendAnswer) -> None:
        """A worker sent an answer."""
        self.sent_answers.add((worker, answer))

    def acknowledged(self, worker: str, ticket: Ticket) -> None:
        """A worker was told that its answer is durable."""
        stored = self.answers.get((ticket.round, ticket.slot))
        _require(
            stored is not None, f"{worker} got an ack for {ticket}, which is not in the journal"
        )
        assert stored is not None
        _require(
            (worker, _answer_of(stored, ticket)) in self.sent_answers,
            f"{worker} got an ack for {ticket}, but the journal holds {stored}",
        )

    def at_end(self, final: dict[str, bytes], flipped: set[str]) -> None:
        """Everyone has left."""
        _require(
            self.open_round == self.config.rounds + 1, f"the run ended in round {self.open_round}"
        )
        for worker, weights in final.items():
            _require(
                (weights == self.weights[-1]) != (worker in flipped),
                f"{worker} ends with other weights than the journal's",
            )

    def _answered(self, record: Answered) -> None:
        what = f"answer to round {record.round}, slot {record.slot}"
        _require(record.round == self.open_round, f"{what} outside its round")
        _require((record.round, record.slot) not in self.answers, f"second {what}")
        self.answers[record.round, record.slot] = record
        if self._is_sound(record):
            worker = self.cohort[record.slot]
            seed = first_seed_of(self.config.seed, record.round, record.slot)
            grads, loss = measure(worker, seed, self.config.pairs_per_answer, self.weights[-1])
            _require(
                record.projected_grads == grads
                and record.mean_loss == (loss if self.config.report_losses else None),
                f"{what} by {worker} was not measured on that slot's seed and that round's weights",
            )

    def _is_sound(self, record: Answered) -> bool:
        truth = digest64_of(self.weights[record.round - 1])
        return record.weights_digest64 in (None, truth)

    def _diverged(self, record: Diverged) -> None:
        truth = digest64_of(self.weights[record.round])
        _require(
            record.expected_digest64 == truth and record.found_digest64 != truth,
            f"{record.party} is honest, but {record} was recorded",
        )
        self.named.add((record.round, record.party, record.found_digest64))

    def _committed(self, record: Committed) -> None:
        round_ = record.round
        _require(round_ == self.open_round, f"commit of round {round_} out of turn")
        answers = [self.answers[key] for key in sorted(self.answers) if key[0] == round_]
        sound = [answer for answer in answers if self._is_sound(answer)]
        for answer in answers:
            key = (round_ - 1, self.cohort[answer.slot], answer.weights_digest64)
            _require(answer in sound or key in self.named, f"{key} was not named by round {round_}")
        sound = sound[: self.config.cohort_size_max]
        _require(len(sound) >= self.config.quorum, f"round {round_} has {len(sound)} answers")
        _require(
            len(record.runs) == len(sound), f"round {round_} commits {len(record.runs)} answers"
        )
        for run, answer in zip(record.runs, sound, strict=True):
            seed = first_seed_of(self.config.seed, round_, answer.slot)
            # The oracle's scalar, not the journaled one: the two were compared when it was appended.
            grads, _ = measure(
                self.cohort[answer.slot], seed, self.config.pairs_per_answer, self.weights[-1]
            )
            divisor = len(sound) * self.config.probes
            wanted = tuple(
                _binary32(-(self.config.learning_rate * grad) / divisor) for grad in grads
            )
            _require(
                (run.first_seed, run.coefficients) == (seed, wanted),
                f"round {round_} commits {run}, the oracle says {wanted} from seed {seed}",
            )
        _require(
            record.rounding_seed == rounding_seed_of(self.config.seed, round_), "rounding seed"
        )
        self.weights.append(weights_after(self.weights[-1], record))
        self.cohort = []


def _answer_of(record: Answered, ticket: Ticket) -> SendAnswer:
    return SendAnswer(ticket, record.projected_grads, record.mean_loss, record.weights_digest64)


def _binary32(value: float) -> float:
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ViolationError(sentence)
