"""Durable rows a second in SQLite and in PostgreSQL, and how long a takeover takes.

A throwaway PostgreSQL server runs on this machine; both stores are on the same disk, and take
turns.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.figures import REPORTS, Figure, show, write
from fedmezo_coordinator.stores.opening import open_store
from fedmezo_coordinator.stores.postgres import STANDBY_LOOK_S
from fedmezo_core.journal.journal import JournalStore, Row
from tests.coordinator.stores.postgres_server import missing, running

REPORT = REPORTS / "stores.json"
BATCHES = (1, 16, 256)
"""Rows a commit; 256 is what the coordinator appends at once at most."""
BODY_BYTES = 148
"""An answer of 30 steps with loss and digest."""
TURNS = 7
TURN_S = 1.0
TAKEOVERS = 7


def rows_from(first: int, count: int) -> list[Row]:
    body = hashlib.shake_256(first.to_bytes(8, "little")).digest(BODY_BYTES)
    return [Row(first + n, body, body[:32]) for n in range(count)]


def commits(store: JournalStore, batch: int) -> list[float]:
    """Seconds of each commit in one turn."""
    taken, end_s = [], time.perf_counter() + TURN_S
    while time.perf_counter() < end_s:
        rows = rows_from(len(store), batch)
        begin_s = time.perf_counter()
        store.append(rows)
        taken.append(time.perf_counter() - begin_s)
    return taken


def appends(stores: dict[str, JournalStore]) -> Iterator[Figure]:
    for batch in BATCHES:
        turns: dict[str, list[list[float]]] = {name: [] for name in stores}
        for _ in range(TURNS):
            for name, store in stores.items():
                turns[name].append(commits(store, batch))
        for name, taken in turns.items():
            rates = [batch * len(turn) / sum(turn) for turn in taken]
            every = sorted(seconds for turn in taken for seconds in turn)
            label = f"{name}, {batch} rows a commit"
            yield Figure(f"{label}: rows", statistics.median(rates), "rows/s")
            yield Figure(f"{label}: commit, median", 1000 * statistics.median(every), "ms")
            yield Figure(f"{label}: commit, p99", 1000 * every[len(every) * 99 // 100], "ms")


def _hold(url: str, held: threading.Event) -> None:
    open_store(url)
    held.set()
    time.sleep(3600)


def takeover_s(url: str, waited_s: float) -> float:
    """From the SIGKILL of the process that holds a journal to a standby that may write.

    The standby has waited for `waited_s` by then: it looks at intervals, so that matters.
    """
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=_hold, args=(url, held), daemon=True)
    holder.start()
    held.wait()
    opened: list[float] = []

    def stand_by() -> None:
        store = open_store(url, standby=True)
        opened.append(time.perf_counter())
        store.close()

    waiting = threading.Thread(target=stand_by)
    waiting.start()
    time.sleep(waited_s)
    killed_s = time.perf_counter()
    holder.kill()
    waiting.join()
    holder.join()
    return opened[0] - killed_s


def measure() -> Sequence[Figure]:
    with tempfile.TemporaryDirectory() as folder, running() as server:
        stores: dict[str, JournalStore] = {
            "SQLite": open_store(str(Path(folder) / "journal.db")),
            "PostgreSQL": open_store(server.url("bench")),
        }
        figures = list(appends(stores))
        for store in stores.values():
            store.close()
        takeovers = [
            takeover_s(server.url(f"t{uuid.uuid4().hex}"), 1 + STANDBY_LOOK_S * n / TAKEOVERS)
            for n in range(TAKEOVERS)
        ]
    figures.append(Figure("takeover after SIGKILL, median", statistics.median(takeovers), "s"))
    figures.append(Figure("takeover after SIGKILL, longest", max(takeovers), "s"))
    return figures


def main() -> None:
    if missing():
        raise SystemExit(f"Nothing is measured: {missing()}.")
    figures = measure()
    show(figures, "journal stores on one machine")
    write(figures, REPORT)


if __name__ == "__main__":
    main()
