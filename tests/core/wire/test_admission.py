"""Who may join: the checks of a hello that need no server."""

from __future__ import annotations

import pytest

from fedmezo_core.config import PROTOCOL_VERSION
from fedmezo_core.errors import NotReadyError, VersionError, WrongRunError
from fedmezo_core.wire.admission import (
    CATCH_UP_ROUNDS_MAX,
    check_hello,
    check_run_id,
    choose_version,
)
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import config_of, genesis_of

GENESIS = genesis_of(config_of())
HEAD = b"h" * 32


def hello(round_: int) -> wire.Hello:
    return wire.Hello(
        protocol_version=PROTOCOL_VERSION,
        run_id=GENESIS.config.run_id,
        worker="w1",
        manifest_digest=GENESIS.manifest_digest,
        base_digest=GENESIS.base_digest,
        tokenizer_digest=GENESIS.tokenizer_digest,
        recipe=GENESIS.config.recipe,
        round=round_,
        head=HEAD,
    )


@pytest.mark.parametrize("behind", [0, 1, CATCH_UP_ROUNDS_MAX])
def test_a_worker_within_reach_is_caught_up_by_its_session(behind: int) -> None:
    check_hello(hello(7), GENESIS, 7 + behind, HEAD)


def test_a_worker_further_behind_reads_the_journal_first() -> None:
    with pytest.raises(NotReadyError, match="Worker w1 is 513 rounds behind, more than 512; read"):
        check_hello(hello(7), GENESIS, 7 + CATCH_UP_ROUNDS_MAX + 1, HEAD)


def test_an_empty_run_id_means_whichever_is_served() -> None:
    check_run_id("", "tiny-run")
    check_run_id("tiny-run", "tiny-run")
    with pytest.raises(WrongRunError):
        check_run_id("tiny", "tiny-run")


def test_what_a_caller_sent_is_shown_in_part() -> None:
    """A status message travels in a header, which is bounded."""
    with pytest.raises(WrongRunError) as caught:
        check_run_id("r" * 100_000, "tiny-run")
    assert len(str(caught.value)) < 300
    with pytest.raises(VersionError) as refused:
        choose_version(list(range(2, 10_000)))
    assert len(str(refused.value)) < 300


def test_the_common_version_is_chosen() -> None:
    assert choose_version([7, PROTOCOL_VERSION]) == PROTOCOL_VERSION
    with pytest.raises(VersionError, match="the caller none"):
        choose_version([])
