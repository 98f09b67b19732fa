"""Who may join: the checks of a hello that need no server."""

from __future__ import annotations

import hashlib

import pytest

from fedmezo_core.config import PROTOCOL_VERSION, LoraConfig
from fedmezo_core.errors import MismatchError, NotReadyError, VersionError, WrongRunError
from fedmezo_core.records import Genesis
from fedmezo_core.wire.admission import (
    CATCH_UP_ROUNDS_MAX,
    check_hello,
    check_run_id,
    choose_version,
)
from fedmezo_core.wire.messages import hello_to_pb
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


ONNX = "onnx:" + "ab" * 32


def _admitting(*forms: str) -> Genesis:
    lora = LoraConfig(rank=2, alpha=4, target_modules=("c_attn",))
    return genesis_of(config_of(lora=lora, base_forms=forms))


@pytest.mark.parametrize("form", ["", ONNX, "8-bit"])
def test_a_form_of_the_base_that_the_run_admits_joins(form: str) -> None:
    genesis = _admitting(ONNX, "8-bit")
    check_hello(hello_to_pb(genesis, "w1", 0, HEAD, base_form=form).hello, genesis, 0, HEAD)


@pytest.mark.parametrize("form", [ONNX, "8-bit"])
def test_a_form_that_the_run_does_not_admit_is_refused(form: str) -> None:
    genesis = _admitting("4-bit", "gguf:" + "ab" * 31 + "aa")
    with pytest.raises(MismatchError, match="w1 differs from the run in its base weights: digest"):
        check_hello(hello_to_pb(genesis, "w1", 0, HEAD, base_form=form).hello, genesis, 0, HEAD)


def test_the_digests_of_forms() -> None:
    genesis = _admitting(ONNX)
    assert genesis.form_digest("") == genesis.base_digest
    assert genesis.form_digest(ONNX) == bytes.fromhex("ab" * 32)
    wanted = hashlib.sha256(b"fedmezo base 4-bit\n" + genesis.base_digest).digest()
    assert genesis.form_digest("4-bit") == wanted
