"""Keys and masks of one attempt at a sum that hides its terms (Bonawitz et al. 2017).

Every two members agree on a mask (X25519, HKDF-SHA256, then the ChaCha20 keystream), which the one
with the lower slot adds and the other subtracts, so that it is gone in the sum. Each member also
adds a self mask, so that what it sent stays hidden if its pairwise masks become known. Everything
that a member makes up for an attempt comes from one random value of 32 bytes, which serves nothing
else.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedmezo_core.events import KeysGiven, Peer
from fedmezo_core.records import Genesis
from fedmezo_core.trust.secure_aggregation.secret_sharing import (
    SHARE_BYTES,
    random_bytes_needed,
    split,
)

ENTROPY_BYTES = 32
MODULUS = 2**32
SEALED_BYTES = 2 * SHARE_BYTES + 16
"""Size of the two shares that a member encrypts for another, with the tag of the encryption."""

SHARE_HASH_BYTES = 16
"""Size of what is said of one share. Whoever finds another share with that hash has tried 2^128;
who dealt the share could look for two that share a hash, and would be blamed for both."""
SHARE_HASHES_BYTES = 2 * SHARE_HASH_BYTES
"""Size of what a member says of the two shares that it deals to one member."""

_ANY_PRIVATE_KEY = bytes([1]) * 32
_ZERO_NONCE = bytes(12)
"""Each key encrypts one message, so its nonce may be the same for all."""


@dataclass(frozen=True, slots=True)
class SumContext:
    """Which sum this is; every key and mask of it depends on all of this."""

    run_digest: bytes
    """`run_digest_of` the run, 32 bytes."""
    epoch: int
    round: int
    attempt: int
    directions: int
    """Count of the numbers that each member adds."""

    def packed(self) -> bytes:
        """All of it, in bytes: 32, then u32, u64, u32 and u32, little-endian."""
        numbers = (self.epoch, self.round, self.attempt, self.directions)
        return self.run_digest + struct.pack("<IQII", *numbers)


def run_digest_of(genesis: Genesis) -> bytes:
    """SHA-256 (32 bytes) of what names a run: its id, its seed and its model."""
    config = genesis.config
    head = b"fedmezo sum run v1\n" + struct.pack("<Q", config.seed)
    model = genesis.manifest_digest + genesis.base_digest + genesis.tokenizer_digest
    return hashlib.sha256(head + model + config.run_id.encode()).digest()


def keys_text(context: SumContext, slot: int, worker: str, keys: KeysGiven) -> bytes:
    """What a worker signs of its keys for an attempt, in which it has `slot`."""
    name = worker.encode()
    return (
        b"fedmezo sum keys v1\n"
        + context.packed()
        + struct.pack("<IB", slot, len(name))
        + name
        + keys.cipher_key
        + keys.mask_key
        + keys.self_mask_hash
    )


def transcript_of(context: SumContext, peers: Sequence[Peer]) -> bytes:
    """SHA-256 (32 bytes) of all members' names, slots and keys, in the order of the slots.

    Members that were told of different peers agree on no key and on no mask.
    """
    found = hashlib.sha256(b"fedmezo sum peers v1\n" + struct.pack("<I", len(peers)))
    for peer in peers:
        found.update(keys_text(context, peer.slot, peer.worker, peer.keys))
    return found.digest()


def expanded(secret: bytes, info: bytes) -> bytes:
    """32 bytes of HKDF-SHA256 (RFC 5869) without a salt, for one purpose named by `info`."""
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret)


def keystream(key: bytes, count: int) -> bytes:
    """The first `count` bytes of the ChaCha20 keystream of a key; the nonce and counter are 0."""
    encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    return encryptor.update(bytes(count))


def mask_of(key: bytes, directions: int) -> tuple[int, ...]:
    """The mask that a key of 32 bytes gives: its keystream as little-endian u32."""
    return struct.unpack(f"<{directions}I", keystream(key, 4 * directions))


def self_mask_hash_of(self_mask: bytes) -> bytes:
    """What a member publishes of its self mask: SHA-256, 32 bytes."""
    return hashlib.sha256(b"fedmezo sum self mask v1\n" + self_mask).digest()


def share_hash_of(
    share: bytes, transcript: bytes, dealer: int, receiver: int, *, is_of_mask_key: bool
) -> bytes:
    """What slot `dealer` publishes of a share that it deals to slot `receiver`, 16 bytes.

    A share is a random number of 257 bits to whoever lacks it, so its hash tells nothing of it.
    """
    head = b"fedmezo sum share v1\n" + transcript
    place = struct.pack("<II?", dealer, receiver, is_of_mask_key)
    return hashlib.sha256(head + place + share).digest()[:SHARE_HASH_BYTES]


def share_hashes(pair: tuple[bytes, bytes], transcript: bytes, dealer: int, receiver: int) -> bytes:
    """What is published of a share of a mask key, and then of one of a self mask, 32 bytes."""
    of_key, of_mask = pair
    return share_hash_of(of_key, transcript, dealer, receiver, is_of_mask_key=True) + share_hash_of(
        of_mask, transcript, dealer, receiver, is_of_mask_key=False
    )


def public_key_of(private_key: bytes) -> bytes:
    """The X25519 public key (32 bytes) of a private key."""
    return X25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()


def agreed(private_key: bytes, public_key: bytes) -> bytes:
    """The X25519 shared secret (RFC 7748), 32 bytes.

    Raises `ValueError` for a public key of small order, whose secret everyone knows.
    """
    key = X25519PrivateKey.from_private_bytes(private_key)
    return key.exchange(X25519PublicKey.from_public_bytes(public_key))


def is_public_key(public_key: bytes) -> bool:
    """Whether 32 bytes are a key that secrets can be agreed on with: no point of small order."""
    try:
        agreed(_ANY_PRIVATE_KEY, public_key)
    except ValueError:
        return False
    return True


def pair_mask_key(
    private_key: bytes, public_key: bytes, transcript: bytes, a: int, b: int
) -> bytes:
    """The key of the mask between slots `a` and `b`, from one's private and the other's public key.

    Raises `ValueError` as `agreed` does.
    """
    slots = struct.pack("<II", min(a, b), max(a, b))
    secret = agreed(private_key, public_key)
    return expanded(secret, b"fedmezo sum pair mask v1\n" + transcript + slots)


def self_mask_key(self_mask: bytes, transcript: bytes, slot: int) -> bytes:
    """The key of a member's self mask."""
    info = b"fedmezo sum self mask key v1\n" + transcript + struct.pack("<I", slot)
    return expanded(self_mask, info)


def add_masks(values: list[int], mask: Sequence[int], sign: int) -> list[int]:
    """`values` plus or minus a mask, not reduced modulo 2^32."""
    if sign > 0:
        return [value + one for value, one in zip(values, mask, strict=True)]
    return [value - one for value, one in zip(values, mask, strict=True)]


class MemberSecrets:
    """What a member of one attempt keeps to itself."""

    def __init__(self, entropy: bytes) -> None:
        """`entropy`: 32 random bytes that nobody else knows and that serve nothing else."""
        assert len(entropy) == ENTROPY_BYTES

        def of(purpose: str) -> bytes:
            return expanded(entropy, f"fedmezo sum {purpose} v1\n".encode())

        self._cipher_private = of("cipher key")
        self._mask_private = of("mask key")
        self._self_mask = of("self mask")
        self._random_key = of("coefficients")
        self.keys = KeysGiven(
            public_key_of(self._cipher_private),
            public_key_of(self._mask_private),
            self_mask_hash_of(self._self_mask),
        )

    def split(self, threshold: int, points: Sequence[int]) -> list[tuple[bytes, bytes]]:
        """At each point, the share of the mask key and that of the self mask."""
        needed = random_bytes_needed(threshold)
        random = keystream(self._random_key, 2 * needed)
        of_key = split(self._mask_private, threshold, points, random[:needed])
        of_mask = split(self._self_mask, threshold, points, random[needed:])
        return list(zip(of_key, of_mask, strict=True))

    def seal(self, shares: bytes, transcript: bytes, own: int, peer: Peer) -> bytes:
        """Encrypt a pair of shares from slot `own` for a peer; raises `ValueError` as `agreed`."""
        key = self._cipher_key(transcript, own, peer.slot, peer.keys.cipher_key)
        return ChaCha20Poly1305(key).encrypt(_ZERO_NONCE, shares, None)

    def unseal(self, sealed: bytes, transcript: bytes, own: int, peer: Peer) -> bytes | None:
        """Decrypt what a peer sealed for slot `own`; None if it is not that."""
        key = self._cipher_key(transcript, peer.slot, own, peer.keys.cipher_key)
        try:
            shares = ChaCha20Poly1305(key).decrypt(_ZERO_NONCE, sealed, None)
        except InvalidTag:
            return None
        return shares if len(shares) == 2 * SHARE_BYTES else None

    def _cipher_key(self, transcript: bytes, sender: int, receiver: int, public: bytes) -> bytes:
        info = b"fedmezo sum cipher v1\n" + transcript + struct.pack("<II", sender, receiver)
        return expanded(agreed(self._cipher_private, public), info)

    def masked(
        self, values: Sequence[int], transcript: bytes, own: int, peers: Sequence[Peer]
    ) -> tuple[int, ...]:
        """`values` with the self mask and a mask for each of the other `peers`, modulo 2^32."""
        count = len(values)
        key = self_mask_key(self._self_mask, transcript, own)
        total = add_masks(list(values), mask_of(key, count), 1)
        for peer in peers:
            if peer.slot == own:
                continue
            public = peer.keys.mask_key
            key = pair_mask_key(self._mask_private, public, transcript, own, peer.slot)
            total = add_masks(total, mask_of(key, count), 1 if own < peer.slot else -1)
        return tuple(value % MODULUS for value in total)
