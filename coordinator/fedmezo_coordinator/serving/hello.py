"""Whether a worker may join: pure checks of its hello against the run."""

from __future__ import annotations

import re

from fedmezo_core.config import NAME_PATTERN, PROTOCOL_VERSION
from fedmezo_core.errors import (
    DivergedError,
    JournalCompactedError,
    MismatchError,
    NotReadyError,
    ProtocolError,
    VersionError,
    WrongRunError,
)
from fedmezo_core.machines.divergence import REPLICA_PARTY
from fedmezo_core.records import Genesis
from fedmezo_proto.v1 import coordinator_pb2 as wire

CATCH_UP_ROUNDS_MAX = 512
"""Commits sent down a fresh session; a worker further behind reads the journal first."""

# A status message travels in a header, and headers are bounded: what a caller sent is shown in part.
NAME_CHARS_SHOWN_MAX = 64
VERSIONS_SHOWN_MAX = 8


def choose_version(offered: list[int]) -> int:
    """The newest version that both speak."""
    if PROTOCOL_VERSION in offered:
        return PROTOCOL_VERSION
    spoken = ", ".join(map(str, sorted(offered)[:VERSIONS_SHOWN_MAX])) or "none"
    raise VersionError(
        f"This coordinator speaks fedmezo protocol version {PROTOCOL_VERSION}, the caller {spoken}; "
        "upgrade the older of the two."
    )


def check_run_id(asked: str, served: str) -> None:
    """Refuse a caller that means another run; an empty id means whichever is served."""
    if asked not in ("", served):
        raise WrongRunError(
            f"Run {asked[:NAME_CHARS_SHOWN_MAX]!r} is not served here, this coordinator serves {served!r}; "
            "check the address and the run id."
        )


def check_hello(
    hello: wire.Hello, genesis: Genesis, round_: int, head_at_hello: bytes, begins: int = 0
) -> None:
    """Refuse a worker that would not compute this run's numbers, and say what differs.

    `round_` is the last committed round, `head_at_hello` the head at the hello's round (unused when
    that round is not committed), `begins` the round after which the journal has all commits.
    """
    if hello.protocol_version != PROTOCOL_VERSION:
        choose_version([hello.protocol_version])
    check_run_id(hello.run_id or "(none)", genesis.config.run_id)
    if not re.fullmatch(NAME_PATTERN, hello.worker) or hello.worker == REPLICA_PARTY:
        raise ProtocolError(
            "A worker's name has 1 to 64 characters out of a-z, 0-9 and -, begins with a letter or "
            f"digit, and is not {REPLICA_PARTY!r}; set another --name."
        )
    for what, theirs, ours in (
        ("manifest (the trainable tensors)", hello.manifest_digest, genesis.manifest_digest),
        ("base weights", hello.base_digest, genesis.base_digest),
        ("tokenizer", hello.tokenizer_digest, genesis.tokenizer_digest),
    ):
        if theirs != ours:
            raise MismatchError(
                f"Worker {hello.worker}'s {what} differs from the run's: digest {theirs.hex()[:16]} "
                f"instead of {ours.hex()[:16]}; load the same model files as the coordinator "
                f"({genesis.config.model})."
            )
    if hello.recipe != genesis.config.recipe:
        raise MismatchError(
            f"Worker {hello.worker}'s numeric recipe differs from the run's: {hello.recipe[:200]!r} "
            f"instead of {genesis.config.recipe!r}; use the same FedMeZO version."
        )
    if hello.round > round_:
        raise MismatchError(
            f"Worker {hello.worker} has applied round {hello.round}, this journal ends at round "
            f"{round_}: the journal is older than the worker. Put the newest journal back, or start a new run."
        )
    if hello.round < begins:
        raise JournalCompactedError(
            f"Worker {hello.worker} is at round {hello.round}, and the journal has the commits after round "
            f"{begins} only; take the newest snapshot first, then join."
        )
    if hello.head != head_at_hello:
        raise DivergedError(
            f"Worker {hello.worker}'s history up to round {hello.round} is not this journal's "
            f"(head {hello.head.hex()[:16]} instead of {head_at_hello.hex()[:16]}); restart the worker, "
            "so that it rebuilds from base and journal."
        )
    if round_ - hello.round > CATCH_UP_ROUNDS_MAX:
        raise NotReadyError(
            f"Worker {hello.worker} is {round_ - hello.round} rounds behind, more than "
            f"{CATCH_UP_ROUNDS_MAX}; read the journal first, then join."
        )
