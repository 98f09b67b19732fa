"""Sealed states: what the first records of a journal come to, as bytes that are written once.

A journal whose oldest records were dropped begins with one, its origin. A coordinator keeps a few
more beside its records, so that a restart folds only the records after the newest. Like a record, a
sealed state is serialized once, and hashed and signed as written. The state in it is opaque here:
`machines.state_codec` reads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from fedmezo_core.errors import DivergedError, JournalCorruptError, ProtocolError
from fedmezo_core.journal.codec import decode_record, digest_in
from fedmezo_core.journal.signed_heads import Signer, Witness
from fedmezo_core.records import Genesis
from fedmezo_proto.v1 import origin_pb2 as pb


@dataclass(frozen=True, slots=True)
class StoredState:
    """A sealed state as a store keeps it."""

    seqno: int
    """Seqno of the first record after it."""

    sealed: bytes
    """The sealed state, exactly as it was first written."""

    digest: bytes
    """SHA-256 over `seqno` and these bytes."""

    @classmethod
    def of(cls, seqno: int, sealed: bytes) -> StoredState:
        """A sealed state with its digest."""
        return cls(seqno, sealed, hashlib.sha256(seqno.to_bytes(8, "little") + sealed).digest())

    @classmethod
    def received(cls, sealed: bytes) -> StoredState:
        """The origin that a coordinator sent; raises `JournalCorruptError` if it is none."""
        try:
            return cls.of(_parsed(sealed).seqno, sealed)
        except ProtocolError as error:
            raise JournalCorruptError(
                f"The origin of the coordinator's journal cannot be used ({error}); read another "
                "copy of the journal, or check that the versions match."
            ) from None


@dataclass(frozen=True, slots=True)
class SealedState:
    """What the records 0 to `seqno` - 1 of a journal come to."""

    seqno: int
    """Seqno of the first record after it."""
    chain: bytes
    """Chain after record `seqno` - 1, 32 bytes."""
    head: bytes
    """Head after record `seqno` - 1, 32 bytes."""
    genesis_body: bytes
    """Record 0 as it was written."""
    state: pb.RunState
    """The folded records."""
    state_version: int = 0
    """The way of folding that made `state`."""
    agreed: Mapping[int, int] = field(default_factory=dict)
    """Round -> first 64 bits of the digest that it agreed to; more rounds than in `state`."""
    key: bytes = b""
    """Public key of the coordinator that signed it; empty if none did."""

    @property
    def genesis(self) -> Genesis:
        """Record 0."""
        genesis = decode_record(self.genesis_body)
        if not isinstance(genesis, Genesis):
            raise ProtocolError("its record 0 is no genesis")
        return genesis

    @property
    def round(self) -> int:
        """The last round that these records commit."""
        return self.state.round


def seal(sealed: SealedState, signer: Signer | None = None) -> StoredState:
    """The bytes of a sealed state, signed if there is a `signer`; `sealed.key` does not count."""
    body = pb.Origin(
        seqno=sealed.seqno,
        chain=sealed.chain,
        head=sealed.head,
        genesis=sealed.genesis_body,
        state=sealed.state,
        state_version=sealed.state_version,
        agreed=[pb.AgreedDigest(round=r, digest64=d) for r, d in sealed.agreed.items()],
    ).SerializeToString(deterministic=True)
    message = pb.SealedOrigin(body=body)
    if signer is not None:
        message.key = signer.public_key
        message.signature = signer.sign_origin(sealed.genesis.config.run_id, sealed.round, body)
    return StoredState.of(sealed.seqno, message.SerializeToString(deterministic=True))


def unseal(stored: StoredState) -> SealedState:
    """A sealed state from its bytes, with digest and signature checked.

    Raises `ProtocolError`, with what is wrong, if they are not what was written.
    """
    if stored != StoredState.of(stored.seqno, stored.sealed):
        raise ProtocolError("its hash does not match")
    sealed = _parsed(stored.sealed)
    if sealed.seqno != stored.seqno:
        raise ProtocolError(f"it says that record {sealed.seqno} follows, not {stored.seqno}")
    return sealed


def _parsed(sealed_bytes: bytes) -> SealedState:
    try:
        message = pb.SealedOrigin.FromString(sealed_bytes)
        body = pb.Origin.FromString(message.body)
        sealed = SealedState(
            seqno=body.seqno,
            chain=digest_in(body.chain, "chain"),
            head=digest_in(body.head, "head"),
            genesis_body=body.genesis,
            state=body.state,
            state_version=body.state_version,
            agreed={one.round: one.digest64 for one in body.agreed},
            key=digest_in(message.key, "key") if message.key else b"",
        )
        if not 1 <= sealed.seqno < 2**63:
            raise ProtocolError(f"record {sealed.seqno} cannot follow")
        run_id = sealed.genesis.config.run_id
    except (DecodeError, JournalCorruptError, ProtocolError) as error:
        raise ProtocolError(f"its {len(sealed_bytes)} bytes cannot be read: {error}") from None
    if sealed.key:
        try:
            witness = Witness(run_id, sealed.key)
            witness.check_origin(sealed.round, message.body, message.signature)
        except DivergedError:
            raise ProtocolError(f"its signature is not of key {sealed.key.hex()}") from None
    return sealed
