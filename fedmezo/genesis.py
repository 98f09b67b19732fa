"""The record that begins a run, as an object and as the bytes that every party must hold alike."""

from __future__ import annotations

from fedmezo_core.errors import JournalCorruptError, ProtocolError
from fedmezo_core.journal.codec import decode_record, encode_record
from fedmezo_core.journal.journal import ZERO_HASH, head_after
from fedmezo_core.records import Genesis

GenesisLike = Genesis | bytes
"""A genesis, or its bytes as `encode_genesis` or a journal gives them."""


def encode_genesis(genesis: Genesis) -> bytes:
    """The bytes of a genesis, which begin its run's journal and which a worker must be sent."""
    return encode_record(genesis)


def decode_genesis(genesis: GenesisLike) -> Genesis:
    """The genesis in these bytes, or itself; raises `ProtocolError` for other bytes."""
    if isinstance(genesis, Genesis):
        return genesis
    try:
        record = decode_record(genesis)
    except JournalCorruptError:
        raise ProtocolError(
            f"These {len(genesis)} bytes hold no genesis that this version knows; give the "
            "genesis_bytes of the run's coordinator, or use the same FedMeZO version."
        ) from None
    if not isinstance(record, Genesis):
        raise ProtocolError(
            f"These bytes hold a record of kind {type(record).__name__}, not a genesis; give the "
            "genesis_bytes of the run's coordinator."
        )
    return record


def bytes_of(genesis: GenesisLike) -> bytes:
    """The bytes of a genesis, as they were written if they are given."""
    return encode_genesis(genesis) if isinstance(genesis, Genesis) else genesis


def head_of(genesis: GenesisLike) -> bytes:
    """The head after the genesis (32 bytes), which every worker and every journal begins from."""
    return head_after(ZERO_HASH, bytes_of(genesis))
