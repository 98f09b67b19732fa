"""Signatures that are checked in another process: the same verdicts, whatever becomes of it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo_coordinator import signature_checker
from fedmezo_coordinator.signature_checker import MANY, SignatureChecker, Signed

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in range(MANY)]
GOOD: list[Signed] = [
    (key.public_key().public_bytes_raw(), b"text" * n, key.sign(b"text" * n))
    for n, key in enumerate(KEYS)
]
BAD: list[Signed] = [
    (GOOD[0][0], b"another text", GOOD[0][2]),
    (GOOD[1][0], GOOD[0][1], GOOD[0][2]),
    (GOOD[1][0], GOOD[1][1], bytes(64)),
    (GOOD[1][0], GOOD[1][1], b"short"),
]


@pytest.fixture
async def checker(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SignatureChecker]:
    monkeypatch.setattr(signature_checker, "_cores", lambda: 2)
    made = SignatureChecker()
    yield made
    await made.close()


async def started(checker: SignatureChecker) -> asyncio.subprocess.Process:
    await checker.look_at(GOOD)
    starting = checker._starting
    assert starting is not None
    return await starting


def forbid_checks_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_signed(key: bytes, text: bytes, signature: bytes) -> bool:
        raise AssertionError("checked in this process")

    monkeypatch.setattr(signature_checker, "is_signed", is_signed)


async def test_many_are_checked_in_the_other_process(
    checker: SignatureChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await started(checker)
    await checker.look_at([*GOOD, *BAD])
    assert not any(checker.is_signed(*one) for one in BAD)
    forbid_checks_here(monkeypatch)
    assert all(checker.is_signed(*one) for one in GOOD)


async def test_only_the_newest_batch_is_remembered(
    checker: SignatureChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await started(checker)
    await checker.look_at(GOOD)
    await checker.look_at(GOOD[:1])
    forbid_checks_here(monkeypatch)
    with pytest.raises(AssertionError, match="checked in this process"):
        checker.is_signed(*GOOD[0])


async def test_a_few_and_one_core_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, batch in ((2, GOOD[: MANY - 1]), (1, GOOD)):
        monkeypatch.setattr(signature_checker, "_cores", lambda cores=cores: cores)
        checker = SignatureChecker()
        await checker.look_at(batch)
        assert checker._starting is None
        assert all(checker.is_signed(*one) for one in GOOD)
        assert not any(checker.is_signed(*one) for one in BAD)


async def test_a_process_that_dies_changes_no_verdict(
    checker: SignatureChecker, caplog: pytest.LogCaptureFixture
) -> None:
    process = await started(checker)
    process.kill()
    await process.wait()
    for _ in range(2):
        await checker.look_at([*GOOD, *BAD])
        assert all(checker.is_signed(*one) for one in GOOD)
        assert not any(checker.is_signed(*one) for one in BAD)
    assert caplog.text.count("signatures are checked in this process from now on") == 1


async def test_a_process_that_cannot_start_changes_no_verdict(
    checker: SignatureChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    for _ in range(3):
        await checker.look_at(GOOD)
        assert all(checker.is_signed(*one) for one in GOOD)
        await asyncio.sleep(0.05)
    await checker.close()
