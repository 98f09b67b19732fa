"""What a worker keeps in mind about sums for as long as its process runs, over all its runs."""

from __future__ import annotations

import hashlib
import struct

from fedmezo_core.errors import SecureSumError
from fedmezo_core.records import Genesis

NUMBERS_KNOWN_MAX = 16_384
"""Most seeds, each with a model, that a process takes part in sums for."""
KEYS_KNOWN_MAX = 16_384
"""Most names whose signing keys are remembered."""


def numbers_digest_of(genesis: Genesis, worker: str) -> bytes:
    """SHA-256 (32 bytes) of what decides a worker's directions and batches in each round.

    The run's id is not in it, and the weights are not either: whoever changes a weight by very
    little gets nearly the same numbers.
    """
    head = b"fedmezo sum numbers v1\n" + struct.pack("<Q", genesis.config.seed)
    return hashlib.sha256(head + genesis.manifest_digest + worker.encode()).digest()


class SumMemory:
    """Which rounds a worker has helped to unmask, and which keys other workers sign with.

    It outlives sessions, models and runs. A coordinator that has any of them begun anew does not
    get a second sum, or a plain answer, of numbers that are in a sum already.
    """

    def __init__(self) -> None:
        # Digest of what decides the numbers -> the newest round that was revealed.
        self._revealed: dict[bytes, int] = {}
        self._keys: dict[str, bytes] = {}

    def is_revealed(self, numbers: bytes, round_: int) -> bool:
        """Whether the worker has helped to unmask a sum of `round_`, or of a later round.

        `numbers` is a `numbers_digest_of`.
        """
        return round_ <= self._revealed.get(numbers, 0)

    def reveal(self, numbers: bytes, round_: int) -> None:
        """Note that the worker helps to unmask a sum of `round_`, before it does.

        Raises `SecureSumError` if it must not.
        """
        if self.is_revealed(numbers, round_):
            raise SecureSumError(revealed_sentence(round_))
        if numbers not in self._revealed and len(self._revealed) >= NUMBERS_KNOWN_MAX:
            raise SecureSumError(
                f"this worker took part in sums for {NUMBERS_KNOWN_MAX} seeds and can remember no "
                "more; restart it"
            )
        self._revealed[numbers] = round_

    def key_of(self, worker: str) -> bytes | None:
        """The key that another worker was seen to sign with; None if it was not seen."""
        return self._keys.get(worker)

    def keep_key(self, worker: str, key: bytes) -> None:
        """Remember the key of another worker."""
        self._keys.pop(worker, None)
        self._keys[worker] = key
        if len(self._keys) > KEYS_KNOWN_MAX:
            del self._keys[next(iter(self._keys))]


def revealed_sentence(round_: int) -> str:
    """Why a worker says no more about a round whose sum it has helped to unmask."""
    return (
        f"this worker has helped to unmask a sum of round {round_}, or of a later one, with this "
        "seed and model already; begin another run with another seed"
    )
