"""Every way in which a power cut can leave the journal, tried on the real store.

A scenario is recorded once (`disk.recording`). Then power is cut after each operation, and what was
not synced is lost, kept, torn or reordered. Each state is written to a folder, opened as the
coordinator would open it, and compared with what had been acknowledged by then.

    python -m tests.faults.crash_states --count 20                # many states
    python -m tests.faults.crash_states --state small/7/120/torn/3    # one again
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Final
from unittest.mock import patch

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo_core.errors import JournalError
from fedmezo_core.journal import sqlite as product
from fedmezo_core.journal.codec import encode_record, encode_records
from fedmezo_core.journal.high_water import HighWaterMark, read_mark
from fedmezo_core.journal.journal import ZERO_HASH, Journal, MemoryStore, Row
from fedmezo_core.journal.sealed import SealedState, StoredState, seal
from fedmezo_core.journal.signed_heads import Signer
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.machines.state_codec import state_to_pb
from fedmezo_core.records import Paused
from tests.faults.disk import (
    RANDOM_MODES,
    Disk,
    Image,
    Mode,
    Op,
    Promise,
    Recorder,
    as_trace,
    page_cache,
    recording,
    replayed,
    written,
)
from tests.integration.support.harness import config_of, genesis_of

DRAWS: Final = 6
"""Random states at each operation, beside all lost and all kept."""
BIG_ROW_BYTES: Final = 300_000
CHECKPOINT_PAGES: Final = 12
"""In scenarios that should checkpoint often."""
NAME: Final = "journal.db"
MARK: Final = f"{NAME}.mark"
SIGNER: Final = Signer(Ed25519PrivateKey.from_private_bytes(bytes(32)))


class NormalStore(SqliteStore):
    """A control: the write-ahead log is not synced at a commit."""

    def _prepare(self) -> None:
        super()._prepare()
        self._db.pragma("synchronous", "NORMAL")


class UnsyncedStore(SqliteStore):
    """A control: nothing is synced."""

    def _prepare(self) -> None:
        super()._prepare()
        self._db.pragma("synchronous", "OFF")


class DroppingFirstStore(SqliteStore):
    """A control: rows are gone before what they came to is there."""

    def drop_before(self, origin: StoredState) -> None:
        self._db.execute("DELETE FROM journal WHERE seqno < ?", (origin.seqno,))
        super().drop_before(origin)


@dataclass(frozen=True)
class Kind:
    """A store, and when its rows are acknowledged."""

    open: Callable[..., SqliteStore] = SqliteStore
    acknowledges_first: bool = False
    marks_first: bool = False
    """Whether the high-water mark moves before the rows are on the disk."""
    caught_in: str = "checkpoints"
    """A scenario that shows it, if it is a control."""


KINDS: Final = {
    "full": Kind(),
    "normal": Kind(NormalStore),
    "off": Kind(UnsyncedStore),
    "early-ack": Kind(acknowledges_first=True),
    "drops-first": Kind(DroppingFirstStore, caught_in="compacted-cut"),
    "marks-first": Kind(marks_first=True),
}
"""The product's, and five controls."""


# ---------------------------------------------------------------- scenarios


@dataclass
class History:
    """Rows that were written, or tried, since a start, after those that were found."""

    rows: list[Row]
    ends: set[int]
    """Counts of rows at which an append ended."""


@dataclass
class Author:
    """Writes a journal while everything is recorded."""

    kind: Kind
    rng: random.Random
    home: Path
    recorder: Recorder
    histories: list[History] = field(default_factory=lambda: [History([], {0})])
    """One for each start."""
    acknowledged: int = 0
    first_cut: int = 0
    """Operations before this one belong to a past that is not to be cut again."""

    def open(self, checkpoint_pages: int = product.CHECKPOINT_PAGES) -> None:
        """Start the coordinator's part, on whatever lies there."""
        path = self.folder / NAME
        with patch("os.posix_fadvise", self._forget_cache):
            self.store = self.kind.open(path, checkpoint_pages=checkpoint_pages)
        self.journal = Journal(self.store)
        found = _rows_of(self.journal, self.history)
        self.histories.append(History(found, {n for n in self.history.ends if n <= len(found)}))
        self.expected = _journal_of(found)
        self._promise(len(found))
        assert not _behind_mark(self.journal, self.folder)
        self.mark = HighWaterMark(self.folder / MARK, SIGNER)
        self.journal.keep_mark(self.mark)

    @property
    def history(self) -> History:
        """What is being written now."""
        return self.histories[-1]

    @property
    def folder(self) -> Path:
        """Where this life of the coordinator has its journal."""
        folder = self.home / str(self.first_cut)
        folder.mkdir(exist_ok=True)
        return folder

    def append(self, count: int = 1, size: int = 20) -> None:
        """One append of so many rows of about so many random bytes, in hexadecimal."""
        begun = len(self.expected) + count
        if self.kind.acknowledges_first:
            self.acknowledged = begun
        self._promise(begun)
        sizes = [self.rng.randint(9 * size // 10, size) for _ in range(count)]
        texts = [self.rng.randbytes(size).hex() for size in sizes]
        records = [Paused(begun, text) for text in texts]
        # Before the append: what fails may be there all the same.
        self.history.rows += [entry.row for entry in self.expected.append(encode_records(records))]
        self.history.ends.add(begun)
        if self.kind.marks_first:
            self.mark.move(begun, self.expected.chain)
        self.journal.append(encode_records(records))
        self.acknowledged = begun
        self._promise(begun)

    def compact(self) -> None:
        """Drop some of the rows that are there, but not all."""
        seqno = self.rng.randint(self.journal.begins + 1, len(self.journal) - 1)
        self.journal.drop_before(state_at(seqno, self.history.rows[seqno - 1].chain))

    def seal(self) -> None:
        """Seal some of what the rows come to, in place of what was sealed before."""
        count = min(self.rng.randint(1, 3), len(self.journal))
        seqnos = self.rng.sample(range(1, len(self.journal) + 1), count)
        rows = self.history.rows
        self.journal.keep_seals([state_at(n, rows[n - 1].chain) for n in sorted(seqnos)])

    def close(self) -> None:
        """End cleanly."""
        self.journal.close()

    def kill(self) -> None:
        """Undo what happened since some moment, as `kill -9` then would: what was written stays."""
        self._killed_after(self.rng.randint(self.first_cut, len(self.recorder.trace)))

    def kill_now(self) -> None:
        """End without closing."""
        self._killed_after(len(self.recorder.trace))

    def _killed_after(self, count: int) -> None:
        trace = self.recorder.trace[:count]
        self.journal.close()
        self._restart(trace, page_cache(trace))

    def cut_power(self) -> None:
        """The same, but what was not synced may be gone."""
        self.journal.close()
        trace = self.recorder.trace
        disk = replayed(trace[: self.rng.randint(self.first_cut, len(trace))])
        image = disk.crashed(self.rng.choice(RANDOM_MODES), self.rng)
        self._restart([*as_trace(image), disk.promise], image)

    def _restart(self, trace: Sequence[Op], image: Image) -> None:
        self.acknowledged = replayed(trace).promise.acknowledged
        self.recorder.restart(trace)
        self.first_cut = len(trace)
        written(image, self.folder)

    def _forget_cache(self, file: int, _offset: int, _size: int, advice: int) -> None:
        """What the kernel does when it is asked to: what no sync will write any more is gone."""
        assert advice == os.POSIX_FADV_DONTNEED
        path = Path(f"/proc/self/fd/{file}").readlink()
        found = replayed(self.recorder.trace).crashed(Mode.KEPT, self.rng)
        path.write_bytes(found[path.name])

    def _promise(self, begun: int) -> None:
        self.recorder.trace.append(Promise(begun, self.acknowledged, len(self.histories) - 1))


def _creation(author: Author) -> None:
    author.open()
    author.append()
    author.close()


def _small(author: Author) -> None:
    author.open()
    for _ in range(25):
        author.append(author.rng.choice((1, 1, 1, 2, 8)), author.rng.choice((20, 200)))
    author.close()


def _big(author: Author) -> None:
    author.open(checkpoint_pages=100)
    author.append()
    author.append(size=BIG_ROW_BYTES // 2)
    author.append()
    author.close()


def _checkpoints(author: Author) -> None:
    author.open(CHECKPOINT_PAGES)
    for _ in range(20):
        author.append(author.rng.randint(1, 4), author.rng.choice((20, 1000, 6000)))
    author.close()


def _reopened(author: Author) -> None:
    for _ in range(4):
        author.open()
        for _ in range(author.rng.randint(0, 3)):
            author.append(author.rng.randint(1, 3), 400)
        author.close()


def _lives(end: Callable[[Author], None], author: Author) -> None:
    for _ in range(3):
        author.open(CHECKPOINT_PAGES)
        for _ in range(author.rng.randint(1, 8)):
            author.append(author.rng.randint(1, 3), author.rng.choice((20, 3000)))
        end(author)
    author.open(CHECKPOINT_PAGES)
    for _ in range(4):
        author.append(author.rng.randint(1, 3), 2000)
    author.close()


def _failed_sync(end: Callable[[Author], None], author: Author) -> None:
    for _ in range(2):
        author.open(CHECKPOINT_PAGES)
        author.recorder.syncs_until_failure = author.rng.randint(0, 9)
        with suppress(JournalError):
            for _ in range(6):
                author.append(author.rng.randint(1, 3), author.rng.choice((20, 3000)))
        author.recorder.syncs_until_failure = None
        end(author)
    author.open(CHECKPOINT_PAGES)
    for _ in range(4):
        author.append(author.rng.randint(1, 3), 2000)
    author.close()


def _compacted(end: Callable[[Author], None], author: Author) -> None:
    """Origins are larger than a page, so that they can be torn, and alternate with appends."""
    for _ in range(2):
        author.open(CHECKPOINT_PAGES)
        for _ in range(4):
            author.append(author.rng.randint(2, 5), author.rng.choice((20, 3000)))
            author.compact()
        end(author)
    author.open(CHECKPOINT_PAGES)
    author.append(3, 400)
    author.compact()
    author.append(1, 400)
    author.close()


def _sealed(end: Callable[[Author], None], author: Author) -> None:
    """Sealed states are larger than a page, too, and are replaced between appends."""
    for _ in range(2):
        author.open(CHECKPOINT_PAGES)
        for _ in range(4):
            author.append(author.rng.randint(2, 5), author.rng.choice((20, 3000)))
            author.seal()
        end(author)
    author.open(CHECKPOINT_PAGES)
    author.append(3, 400)
    author.close()


def state_at(seqno: int, chain: bytes) -> StoredState:
    """A sealed state of rows that are no run's, as large as one of a run with some workers."""
    genesis = genesis_of(config_of())
    state = RunState(genesis=genesis)
    for worker in range(200):
        state.distances[f"worker-{worker:04d}-of-run-{seqno}"] = seqno / (worker + 1)
    return seal(SealedState(seqno, chain, ZERO_HASH, encode_record(genesis), state_to_pb(state)))


def _rows_of(journal: Journal, history: History) -> list[Row]:
    """All rows that a journal ever had, if the rows left are the history's; else those left."""
    found = [entry.row for entry in journal.load()]
    whole = history.rows[: journal.begins] + found
    return whole if whole == history.rows[: len(journal)] else found


def _journal_of(rows: Sequence[Row]) -> Journal:
    store = MemoryStore()
    store.append(rows)
    journal = Journal(store)
    assert len(list(journal.load())) == len(rows)
    return journal


SCENARIOS: Final[dict[str, Callable[[Author], None]]] = {
    "creation": _creation,
    "small": _small,
    "big": _big,
    "checkpoints": _checkpoints,
    "reopened": _reopened,
    "killed": lambda author: _lives(Author.kill, author),
    "cut-again": lambda author: _lives(Author.cut_power, author),
    "sync-fails": lambda author: _failed_sync(Author.close, author),
    "sync-fails-killed": lambda author: _failed_sync(Author.kill_now, author),
    "compacted": lambda author: _compacted(Author.kill, author),
    "compacted-cut": lambda author: _compacted(Author.cut_power, author),
    "sealed": lambda author: _sealed(Author.kill, author),
    "sealed-cut": lambda author: _sealed(Author.cut_power, author),
}


@dataclass(frozen=True)
class Recording:
    """What a scenario did, and which rows it wrote."""

    trace: Sequence[Op]
    histories: Sequence[History]
    first_cut: int


@lru_cache(maxsize=4)
def recorded(scenario: str, seed: int, kind: str = "full") -> Recording:
    """Run a scenario on a recording disk; the same arguments give the same bytes."""
    trace: list[Op] = []
    with (
        tempfile.TemporaryDirectory(dir=_fast_folder()) as home,
        recording(trace, seed) as recorder,
    ):
        rng = random.Random(f"{scenario}/{seed}")
        author = Author(KINDS[kind], rng, Path(home), recorder)
        SCENARIOS[scenario](author)
        return Recording(trace, author.histories, author.first_cut)


# ---------------------------------------------------------------- states


@dataclass(frozen=True)
class State:
    """One disk after one power cut; its text names it for good."""

    scenario: str
    seed: int
    cut: int
    """Count of operations that had returned."""
    mode: Mode
    draw: int

    @classmethod
    def of(cls, text: str) -> State:
        scenario, seed, cut, mode, draw = text.split("/")
        return cls(scenario, int(seed), int(cut), Mode(mode), int(draw))

    def __str__(self) -> str:
        return f"{self.scenario}/{self.seed}/{self.cut}/{self.mode}/{self.draw}"

    def image(self, disk: Disk) -> Image:
        """The files, given the disk at the cut."""
        return disk.crashed(self.mode, random.Random(str(self)))


def states(scenario: str, seed: int, kind: str = "full") -> Iterator[tuple[State, Disk]]:
    """Every state of a scenario, with the disk at its cut; the next state changes that disk."""
    what = recorded(scenario, seed, kind)
    disk = replayed(what.trace[: what.first_cut])
    for cut in range(what.first_cut, len(what.trace) + 1):
        unsettled = bool(disk.pending or disk.pending_names)
        yield State(scenario, seed, cut, Mode.KEPT, 0), disk
        if unsettled:
            yield State(scenario, seed, cut, Mode.LOST, 0), disk
            for draw in range(DRAWS):
                mode = RANDOM_MODES[(cut + draw) % len(RANDOM_MODES)]
                yield State(scenario, seed, cut, mode, draw), disk
        if cut < len(what.trace):
            disk.apply(what.trace[cut])


def verdict(image: Image, what: Recording, promise: Promise, folder: Path) -> str:
    """What is wrong with a journal that is found so; empty if nothing is."""
    written(image, folder)
    try:
        store = SqliteStore(folder / NAME)
    except JournalError as error:
        return f"refused: {error}"
    try:
        return _verdict_on(store, what, promise, folder)
    except JournalError as error:
        return f"corrupt: {error}"
    finally:
        store.close()


def _behind_mark(journal: Journal, folder: Path) -> str:
    """Whether a start would be refused because rows seem to be missing; empty if not."""
    mark = read_mark(folder / MARK)
    if mark is None or journal.reaches(mark.records, mark.chain):
        return ""
    return f"behind: the mark names {mark.records} rows, {len(journal)} are there"


def _verdict_on(store: SqliteStore, what: Recording, promise: Promise, folder: Path) -> str:
    journal = Journal(store)
    history = what.histories[promise.history]
    found = _rows_of(journal, history)
    if len(found) < promise.acknowledged:
        return f"lost: {promise.acknowledged} rows were acknowledged, {len(found)} are there"
    if found != history.rows[: len(found)]:
        return f"changed: {len(found)} rows are there, not all as they were written"
    if len(found) > promise.begun or len(found) not in history.ends:
        return f"in part: {len(found)} rows are there of {promise}"
    for stored in store.seals():
        if stored != StoredState.of(stored.seqno, stored.sealed):
            return f"changed: the state that was sealed before row {stored.seqno}"
        if stored != state_at(stored.seqno, history.rows[stored.seqno - 1].chain):
            return f"changed: the state before row {stored.seqno} is of other rows"
    behind = _behind_mark(journal, folder)
    if behind:
        return behind
    [entry] = journal.append(encode_records([Paused(1, "after the cut")]))
    if list(store.read(0, len(found) + 2)) != [*found[journal.begins :], entry.row]:
        return "changed: by an append after the cut"
    return ""


@dataclass
class Tally:
    """What came of many states."""

    states: int = 0
    seconds: float = 0.0
    failures: list[tuple[State, str]] = field(default_factory=list)

    def kinds(self) -> Counter[str]:
        """Failures by the first word."""
        return Counter(text.split(":")[0] for _, text in self.failures)


def tried(scenario: str, seed: int, folder: Path, kind: str = "full") -> Tally:
    """Try every state of a scenario."""
    began_s = time.monotonic()
    tally = Tally()
    what = recorded(scenario, seed, kind)
    for state, disk in states(scenario, seed, kind):
        tally.states += 1
        found = verdict(state.image(disk), what, disk.promise, folder)
        if found:
            tally.failures.append((state, found))
    tally.seconds = time.monotonic() - began_s
    return tally


def tried_again(state: State, folder: Path, kind: str = "full") -> str:
    """The verdict on one state by its name."""
    what = recorded(state.scenario, state.seed, kind)
    disk = replayed(what.trace[: state.cut])
    return verdict(state.image(disk), what, disk.promise, folder)


def replay_command(state: State, kind: str = "full") -> str:
    """What to type to see a state again."""
    return f"python -m tests.faults.crash_states --kind {kind} --state {state}"


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for states, in memory where that is possible: the disk here is simulated."""
    with tempfile.TemporaryDirectory(dir=_fast_folder(), prefix="crash-states-") as folder:
        yield Path(folder)


def _fast_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def main() -> int:
    """Returns the process's exit code: 1 if a state broke a promise."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.crash_states")
    parser.add_argument("--kind", choices=KINDS, default="full", help="the store, or a control")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--count", type=int, default=1, help="seeds of every scenario")
    parser.add_argument("--state", type=State.of, help="one state alone, as a failure names it")
    options = parser.parse_args()
    with scratch() as folder:
        if options.state is not None:
            found = tried_again(options.state, folder, options.kind)
            print(f"{options.state}: {found or 'sound'}")
            return int(bool(found))
        failures = 0
        for scenario in SCENARIOS:
            for seed in range(options.seed, options.seed + options.count):
                tally = tried(scenario, seed, folder, options.kind)
                failures += len(tally.failures)
                print(f"{scenario}/{seed}: {tally.states} states, {tally.seconds:.1f} s", end="")
                print(f", {dict(tally.kinds())}" if tally.failures else ", all sound")
                for state, text in tally.failures[:3]:
                    print(f"  {text}\n    {replay_command(state, options.kind)}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
