"""What reads bytes about identities and rights: a fleet's orders, files, signed answers."""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import tempfile
from collections.abc import Awaitable
from functools import cache
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError, Message

from fedmezo_coordinator.admission.fleet import Fleet
from fedmezo_coordinator.admission.members_file import read_members, write_members
from fedmezo_coordinator.admission.state_folder import make_state, open_state
from fedmezo_coordinator.admission.tls_files import TlsFiles
from fedmezo_core.errors import FedMezoError
from fedmezo_core.journal.codec import encode_record
from fedmezo_core.journal.journal import ZERO_HASH, head_after
from fedmezo_core.trust.answer_signatures import AnswerSigner
from fedmezo_core.trust.authorisation import Caller, Role
from fedmezo_core.trust.certificates import key_fingerprint, lifetime_s, public_key_of
from fedmezo_core.trust.identity import load_identity
from fedmezo_core.trust.members import Member, Members, Row, Token
from fedmezo_core.wire.admission import SignedAnswer, Signing, event_from_request, signed_answer
from fedmezo_core.zo.privacy.ledger import Ledger, read_ledger, steps_in
from fedmezo_proto.v1 import admin_pb2
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import config_of, genesis_of

ORDERS: Final[dict[str, type[Message]]] = {
    "enroll": admin_pb2.EnrollRequest,
    "create_tokens": admin_pb2.CreateTokensRequest,
    "list_members": admin_pb2.ListMembersRequest,
    "revoke_member": admin_pb2.RevokeMemberRequest,
    "rotate_member": admin_pb2.RotateMemberRequest,
}
"""A fleet's methods; the first byte of an input is the number of one."""
TOKEN_ID, SECRET = b"i" * 8, b"s" * 16
"""Of the token that lets workers join."""

CONFIG: Final = config_of(workers_min=2, quorum=2, cohort_size_max=2, rounds=100)
GENESIS_HEAD: Final = head_after(ZERO_HASH, encode_record(genesis_of(CONFIG)))
KEY: Final = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
SIGNER: Final = AnswerSigner(KEY, GENESIS_HEAD)


@cache
def folder() -> Path:
    """A folder for this process's files."""
    made = tempfile.TemporaryDirectory(prefix="fedmezo-fuzz-")
    atexit.register(made.cleanup)
    return Path(made.name)


# ---------------------------------------------------------------- a fleet's orders


class _Nowhere:
    """Stands for the members file: this is about what is read, not about the disk."""

    def append(self, _rows: Any) -> None:
        """Take rows."""


class _Orders:
    """A fleet with an operator, a worker, and a token that lets workers join."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        atexit.register(self.loop.close)
        state = folder() / "state"
        make_state(state, ["127.0.0.1"], None)
        self.fleet = Fleet(open_state(state))
        self.fleet.join_address, self.fleet.enrol_port = "coordinator.example:7465", 7466
        self.fleet.close()
        self.fleet._file = _Nowhere()  # type: ignore[assignment]
        secret = hashlib.sha256(SECRET).digest()
        self.rows: list[Row] = [
            *self.fleet.members.rows(),
            Member("w1", Role.WORKER, b"f" * 32, b"k" * 32, TOKEN_ID, enrolled_s=1),
            Token(TOKEN_ID, secret, Role.WORKER, uses_left=3, expires_s=2**40),
        ]
        self.begin()
        operator = self.fleet.members.named("operator")
        self.caller: Caller = self.fleet.members.caller(operator.fingerprint)

    def begin(self) -> None:
        """Have the same members and tokens again."""
        self.fleet.members = Members()
        for row in self.rows:
            self.fleet.members.apply(row)

    def obey(self, method: str, request: Any) -> None:
        """Let the fleet follow an order; a refused one may change nothing."""
        handler = getattr(self.fleet, method)
        arguments = (request,) if method == "enroll" else (request, self.caller)
        try:
            self.loop.run_until_complete(_awaited(handler(*arguments)))
        except FedMezoError:
            assert set(self.fleet.members.rows()) == set(self.rows), "a refused order changed it"
            raise
        if set(self.fleet.members.rows()) != set(self.rows):
            assert method != "list_members"
            self.begin()


async def _awaited(what: Awaitable[Any]) -> None:
    await what


@cache
def _orders() -> _Orders:
    return _Orders()


def read_order(data: bytes) -> None:
    """An order to a fleet, or a request to join it, as its handlers take them."""
    method, kind = list(ORDERS.items())[data[0] % len(ORDERS) if data else 0]
    try:
        request = kind.FromString(data[1:])
    except DecodeError:
        return
    _orders().obey(method, request)


# ---------------------------------------------------------------- files


def read_members_file(data: bytes) -> None:
    """A members file; one that is read says the same when it is written anew."""
    path = folder() / "members.jsonl"
    path.write_bytes(data)
    rows = list(read_members(path).rows())
    write_members(path, rows)
    assert list(read_members(path).rows()) == rows


def read_ledger_file(data: bytes) -> None:
    """A privacy ledger; whoever opens it and whoever shows it find the same steps."""
    path = folder() / "ledger"
    path.write_bytes(data)
    ledger = Ledger(path)
    try:
        assert ledger.spent == steps_in(read_ledger(path))
    finally:
        ledger.close()


def read_tls_files(data: bytes) -> None:
    """A server's certificate and key, here of one file, and what is looked up in a certificate."""
    path = folder() / "server.pem"
    path.write_bytes(data)
    chain = TlsFiles(path, path).material.chain
    key_fingerprint(public_key_of(chain))
    lifetime_s(chain)


def read_identity(data: bytes) -> None:
    """The index of an operator's folder, which names the other files there."""
    _orders()
    own = folder() / "state" / "operator"
    (own / "identity.json").write_bytes(data)
    load_identity(own)


# ---------------------------------------------------------------- signatures


def head_at(round_: int) -> bytes:
    """The head after a round; only three rounds are known."""
    return hashlib.sha256(b"%d" % round_).digest() if round_ <= 3 else b""


def read_signed_answer(data: bytes) -> None:
    """An answer of a session that signs, decoded before its turn and at it: the same verdict."""
    try:
        message = wire.SessionRequest.FromString(data)
    except DecodeError:
        return
    signing = Signing(SIGNER.public_key, CONFIG, GENESIS_HEAD)
    early = signed_answer("w1", message, signing, head_at)

    def outcome(known: SignedAnswer | None) -> str | FedMezoError:
        try:
            return repr(event_from_request("w1", message, 3, head_at, signing, known))
        except FedMezoError as error:
            return error

    first, second = outcome(None), outcome(early)
    assert str(first) == str(second), "decoded early it is another answer"
    if isinstance(second, FedMezoError):
        raise second
