"""What runs under fault injection: children that append and say what was acknowledged.

    python -m tests.faults.appender

reads folders from its input, one a line. For each it forks a child, says its process number, and
then how it ended. So a child costs no start of Python. It waits for `go` (a named pipe in its
folder), works on `journal.db` beside it, and writes to `said`. After a failure it tries to go on,
as no coordinator should.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from fedmezo_core.errors import JournalError
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal, MemoryStore, Row
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.records import Paused

BATCHES: Final = (1, 1, 3, 1, 2, 1, 1)
"""Rows of each append."""
ENDS: Final = tuple(sum(BATCHES[:count]) for count in range(len(BATCHES) + 1))
"""Counts of rows between appends."""
ROW_BYTES: Final = 2500
CHECKPOINT_PAGES: Final = 8
"""So few that the log is folded into the file between appends, and begun anew."""
NAME: Final = "journal.db"


def records_of(batch: int) -> list[Paused]:
    """The records of an append; of each batch always the same."""
    return [Paused(batch, f"{batch}.{n} " + "x" * ROW_BYTES) for n in range(BATCHES[batch])]


def rows_to_write() -> list[Row]:
    """All rows that a child would write if nothing failed."""
    journal = Journal(MemoryStore())
    for batch in range(len(BATCHES)):
        journal.append(encode_records(records_of(batch)))
    return list(journal.read(0, 1000))


def append_all(folder: Path) -> None:
    """Open, append every batch that is not there, close; a line for whatever returns or fails."""
    said = os.open(folder / "said", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    (folder / "go").read_bytes()
    try:
        journal = Journal(SqliteStore(folder / NAME, checkpoint_pages=CHECKPOINT_PAGES))
        list(journal.load())
    except JournalError:
        os.write(said, b"failed\n")
        return
    for batch in range(ENDS.index(len(journal)), len(BATCHES)):
        try:
            journal.append(encode_records(records_of(batch)))
        except JournalError:
            os.write(said, b"failed\n")
        else:
            os.write(said, b"acknowledged %d\n" % len(journal))
    journal.close()
    os.write(said, b"closed\n")


def serve() -> None:
    """Fork a child for each folder that is named."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            append_all(Path(line.strip()))
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
