"""Repeat a worker's measurements from the journal and its rows, and compare what it had answered.

Everything that a measurement depends on but its rows is in the journal: the weights, the seeds, the
scale and the rate. So whoever has the rows can compute the answer again, bit for bit on the same
machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from fedmezo.engines import Engine
from fedmezo_core.errors import ConfigError, JournalCompactedError
from fedmezo_core.events import Measure, Ticket, Work
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.party_copy import verified
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.machines.seeds import seeds_of
from fedmezo_core.records import Answered, Committed, Genesis

TOLERANCE = 0.1
"""Difference that another device, number of threads or form of the base may make. The conformance
battery allows as much."""
_ROUNDS = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True, slots=True)
class Repeated:
    """One answer of the journal, and what measuring it again gave."""

    answer: Answered
    projected_grads: tuple[float, ...]
    """Float32 values, as the answer's."""
    rows: int
    """Rows of the data that was measured on."""
    weights_digest64: int | None
    """As in an answer; None if that has none."""

    @property
    def difference(self) -> float:
        """Norm of the difference of both, relative to the norm of what was measured again."""
        ours, theirs = self.projected_grads, self.answer.projected_grads
        if ours == theirs:
            return 0.0
        apart = math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)))
        size = math.sqrt(math.fsum(value**2 for value in ours))
        return apart / size if size else math.inf

    def verdict(self, tolerance: float) -> Literal["equal", "close", "differs"]:
        """equal: all bits are. close: another kind of machine could have given this answer."""
        if self._claims_other_data or self.difference > tolerance:
            return "differs"
        return "close" if self.difference else "equal"

    def line(self, tolerance: float) -> str:
        """A sentence for a person."""
        answer = self.answer
        words = {
            "equal": "equal, bit for bit",
            "close": f"close, {self.difference:.2g} of their norm away",
            "differs": f"differs, {self.difference:.2g} of their norm away",
        }[self.verdict(tolerance)]
        if answer.rows not in (None, self.rows):
            words += f"; it claims {answer.rows} rows, the data has {self.rows}"
        if answer.weights_digest64 != self.weights_digest64:
            words += "; it was measured on other weights than the run's"
        count = len(answer.projected_grads)
        return f"round {answer.round}, slot {answer.slot}: {count} projected gradients, {words}"

    @property
    def _claims_other_data(self) -> bool:
        answer = self.answer
        return (
            answer.rows not in (None, self.rows) or answer.weights_digest64 != self.weights_digest64
        )


@dataclass(frozen=True, slots=True)
class Audit:
    """A worker's answers, with what was asked for each, and the commits that lead to each."""

    genesis: Genesis
    commits: tuple[Committed, ...]
    answers: tuple[tuple[Answered, Measure], ...]
    """By round."""

    def repeat(self, engine: Engine) -> Iterator[Repeated]:
        """Measure again with `engine`, which is at the base and holds the worker's rows."""
        done = 0
        for answer, order in self.answers:
            needed = answer.round - 1
            if needed > done:
                engine.apply(self.commits[done:needed])
                done = needed
            scalars = engine.measure(order).scalars
            rows = scalars.rows or 0
            yield Repeated(answer, scalars.projected_grads, rows, scalars.weights_digest64)


def audit_of(journal: Journal, worker: str, rounds: frozenset[int] | None) -> Audit:
    """What `worker` was asked and answered in `rounds`; None: in all of them. Verifies the journal.

    Raises `ConfigError` if it answered in none of them, or only in sums, and
    `JournalCompactedError` if the journal's first records were dropped, without which nothing can
    be repeated.
    """
    if journal.origin() is not None:
        raise JournalCompactedError(
            "The journal's first records were dropped, and an audit needs them all; take a back-up "
            "of the journal from before."
        )
    state = RunState()
    commits: list[Committed] = []
    answers: list[tuple[Answered, Measure]] = []
    workers: set[str] = set()
    for _, record in verified(journal):
        if isinstance(record, Genesis) and record.config.secure_aggregation:
            raise ConfigError(
                f"Run {record.config.run_id} has secure_aggregation, so its journal holds the sums "
                "of answers and no answer that could be measured again; there is nothing to audit."
            )
        if isinstance(record, Answered):
            held = state.held(record.round)
            if held is not None and record.slot < len(held.cohort):
                name = held.cohort[record.slot]
                workers.add(name)
                if name == worker and (rounds is None or record.round in rounds):
                    assert state.genesis is not None
                    config = state.genesis.config
                    work = Work(
                        seeds_of(config, record.round, record.slot, state.pool),
                        held.rates[record.slot],
                        config.eps if held.eps is None else held.eps,
                        want_digest=record.weights_digest64 is not None,
                    )
                    ticket = Ticket(state.epoch, record.round, record.slot)
                    answers.append((record, Measure(ticket, work)))
        elif isinstance(record, Committed):
            commits.append(record)
        state.apply(record)
    if state.genesis is None or not workers:
        raise ConfigError(
            "The journal holds no answers, as in a worker's own copy; give the coordinator's."
        )
    if not answers:
        among = "" if rounds is None else " in the rounds that were named"
        raise ConfigError(
            f"Worker {worker} answered nothing{among}; those who did are "
            f"{', '.join(sorted(workers)[:20])}."
        )
    answers.sort(key=lambda one: (one[0].round, one[0].slot))
    return Audit(state.genesis, tuple(commits), tuple(answers))


def rounds_text(rounds: Iterable[int]) -> str:
    """Rounds as a person writes them, such as `3, 7, 11-13`."""
    spans: list[list[int]] = []
    for round_ in sorted(rounds):
        if spans and round_ == spans[-1][-1] + 1:
            spans[-1][1:] = [round_]
        else:
            spans.append([round_])
    return ", ".join("-".join(map(str, span)) for span in spans)


def rounds_in(text: str) -> frozenset[int] | None:
    """The rounds in a text such as `3,7,11-13`; None for an empty one."""
    if not text:
        return None
    rounds: set[int] = set()
    for part in text.split(","):
        found = _ROUNDS.fullmatch(part.strip())
        first = int(found[1]) if found else 0
        last = int(found[2] or first) if found else 0
        if not 1 <= first <= last <= first + 100_000:
            raise ConfigError(f"--rounds {text} is not allowed: write rounds as in 3,7,11-13.")
        rounds.update(range(first, last + 1))
    return frozenset(rounds)
