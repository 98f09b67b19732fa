"""An engine without weights: what it measures and digests depends on seeds and commits alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from fedmezo import Measure, Measured, Scalars, digest64_of
from fedmezo_core.journal.codec import encode_record
from fedmezo_core.records import Committed


class LightEngine:
    """Equal histories give equal digests, and equal orders equal measurements."""

    def __init__(self, worker: str) -> None:
        self.worker = worker
        self.round = 0
        self.measured: list[Measure] = []
        self._digest = b"base".ljust(32)

    def apply(self, commits: Sequence[Committed]) -> None:
        for commit in commits:
            assert commit.round == self.round + 1
            self.round = commit.round
            self._digest = hashlib.sha256(self._digest + encode_record(commit)).digest()

    def measure(self, order: Measure) -> Measured:
        assert order.ticket.round == self.round + 1
        self.measured.append(order)
        grads = tuple(self._number(seed) for seed in order.work.seeds)
        digest64 = digest64_of(self._digest) if order.work.want_digest else None
        return Measured(order.ticket, Scalars(grads, 0.5, digest64, rows=8))

    def digest(self) -> bytes:
        return self._digest

    def save(self, folder: Path, head: bytes) -> Path:
        path = folder / f"{self.worker}.json"
        path.write_text(json.dumps([self.round, head.hex(), self._digest.hex()]))
        return path

    def restore(self, path: Path) -> tuple[int, bytes]:
        round_, head, digest = json.loads(path.read_text())
        self.round, self._digest = round_, bytes.fromhex(digest)
        return round_, bytes.fromhex(head)

    def _number(self, seed: int) -> float:
        hashed = hashlib.sha256(f"{self.worker} {seed}".encode()).digest()
        return int.from_bytes(hashed[:2], "little") / 2**16 - 0.5
