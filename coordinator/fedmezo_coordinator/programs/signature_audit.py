"""Checks the signature of every answer in a journal, from the journal alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from fedmezo_coordinator.programs.view import counted
from fedmezo_core.config import STALENESS_MAX
from fedmezo_core.errors import ConfigError, JournalCorruptError
from fedmezo_core.events import Ticket
from fedmezo_core.journal.journal import MOVES_HEAD, ZERO_HASH, Entry, head_after
from fedmezo_core.journal.sealed import SealedState
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.records import Admitted, Answered, Genesis, Record
from fedmezo_core.trust.answer_signatures import answer_text, is_signed

HEADS_KEPT = STALENESS_MAX + 2
"""Newest rounds whose heads are kept: those that answers can be measured at."""


class SignatureAudit:
    """Follows a journal's records in order, and checks each answer's signature."""

    def __init__(self, origin: SealedState | None) -> None:
        """`origin` is what stands for the journal's dropped records, if there are any."""
        self._genesis_head = b""
        self._heads: dict[int, bytes] = {}
        self._signed: Counter[Admitted] = Counter()
        self._unsigned = 0
        self._unknown = 0
        self._first_record_is_there = origin is None
        self._has_rounds = False
        if origin is not None:
            self._genesis_head = head_after(ZERO_HASH, origin.genesis_body)
            self._heads[origin.round] = origin.head

    def take(self, entry: Entry, record: Record, state: RunState) -> None:
        """Take the next record, which `state` has folded already.

        Raises `JournalCorruptError` for an answer whose signature is not its worker's for it.
        """
        if isinstance(record, Answered):
            self._take_answer(entry, record, state)
        elif entry.row.kind in MOVES_HEAD:
            if isinstance(record, Genesis):
                self._genesis_head = entry.head
            else:
                self._has_rounds = True
            self._heads[state.round] = entry.head
            self._heads.pop(state.round - HEADS_KEPT, None)

    def _take_answer(self, entry: Entry, record: Answered, state: RunState) -> None:
        if not record.signature:
            self._unsigned += 1
            return
        worker = state.worker_of(record)
        head = self._heads.get(record.round - 1)
        if head is None:
            self._unknown += 1
            return
        key = state.keys.get(worker)
        what = (
            f"Record {entry.row.seqno}, worker {worker}'s answer to round {record.round}, slot "
            f"{record.slot}"
        )
        if key is None:
            raise JournalCorruptError(
                f"{what}, is signed, but no record before it names a key of {worker}; restore the "
                "journal from a copy."
            )
        ticket = Ticket(state.epoch, record.round, record.slot)
        text = answer_text(self._genesis_head, ticket, head, record.scalars)
        if not is_signed(key, text, record.signature):
            raise JournalCorruptError(
                f"{what}, has a signature that is not of {worker}'s key {key.hex()} for it: this "
                "worker did not give this answer. Find out who wrote the journal."
            )
        self._signed[Admitted(worker, key)] += 1

    def lines(self) -> Iterator[str]:
        """What was found: a line about all answers, then one for each worker and key.

        Raises `ConfigError` for rounds without any answer, as in the copies that workers keep.
        """
        self._check()
        line = f"answers: {self._signed.total()} signed and checked, {self._unsigned} unsigned"
        if self._unknown:
            line += (
                f", {self._unknown} signed but not checked, because the record of the head that "
                "they were measured at was dropped"
            )
        yield line
        for one, count in self._by_worker():
            yield f"  {one.worker}: {counted(count, 'answer')} signed with key {one.key.hex()}"

    def values(self) -> dict[str, Any]:
        """The same for programs; raises as `lines` does."""
        self._check()
        return {
            "signed": self._signed.total(),
            "unsigned": self._unsigned,
            "unchecked": self._unknown,
            "workers": [
                {"worker": one.worker, "key": one.key, "answers": count}
                for one, count in self._by_worker()
            ],
        }

    def _by_worker(self) -> list[tuple[Admitted, int]]:
        return sorted(self._signed.items(), key=lambda item: item[0].worker)

    def _check(self) -> None:
        count = self._signed.total() + self._unsigned + self._unknown
        if self._has_rounds and self._first_record_is_there and not count:
            raise ConfigError(
                "The journal holds no answers, as in a worker's own copy; give the coordinator's."
            )
