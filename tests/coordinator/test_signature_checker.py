"""Signatures that are checked in another process: the same verdicts, whatever becomes of it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo_coordinator import signature_checker
from fedmezo_coordinator.signature_checker import AWAY_MAX, MANY, SignatureChecker, Signed
from tests.integration.support.harness import until

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
    for one in GOOD:
        checker.begin(one)

    async def is_there() -> bool:
        return checker._process is not None

    await until(is_there, "the other process to start")
    assert checker._process is not None
    return checker._process


async def verdicts(checker: SignatureChecker, batch: list[Signed]) -> list[bool]:
    """Each of the batch, settled in order, as the loop does it."""
    checks = [checker.begin(one) for one in batch]
    found = []
    for check in checks:
        await checker.settle(check)
        found.append(checker.is_signed(*check.signed))
    return found


async def test_the_other_process_gives_the_verdicts(
    checker: SignatureChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await started(checker)
    checks = [checker.begin(one) for one in [*GOOD[:4], *BAD[:3], GOOD[4]]]

    def is_signed(key: bytes, text: bytes, signature: bytes) -> bool:
        raise AssertionError("checked in this process")

    monkeypatch.setattr(signature_checker, "is_signed", is_signed)
    for check in checks:
        await checker.settle(check)
    assert [check.good for check in checks] == [True] * 4 + [False] * 3 + [True]
    assert checker.is_signed(*GOOD[4])
    with pytest.raises(AssertionError, match="checked in this process"):
        checker.is_signed(*GOOD[0])  # Only what was settled last is known.


@pytest.mark.parametrize("count", [1, MANY - 1, MANY, 2 * AWAY_MAX])
async def test_verdicts_are_right_however_many_come(checker: SignatureChecker, count: int) -> None:
    await started(checker)
    mixed = [*GOOD, *BAD]
    batch = [mixed[n % len(mixed)] for n in range(count)]
    assert await verdicts(checker, batch) == [one in GOOD for one in batch]


async def test_a_few_and_one_core_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, batch in ((2, [*GOOD[: MANY - 3], BAD[0]]), (1, [*GOOD, *BAD])):
        monkeypatch.setattr(signature_checker, "_cores", lambda cores=cores: cores)
        checker = SignatureChecker()
        assert await verdicts(checker, batch) == [one in GOOD for one in batch]
        assert checker._running is None


async def test_a_process_that_dies_changes_no_verdict(
    checker: SignatureChecker, caplog: pytest.LogCaptureFixture
) -> None:
    process = await started(checker)
    process.kill()
    await process.wait()
    for _ in range(2):
        batch = [*GOOD, *BAD, *GOOD]
        assert await verdicts(checker, batch) == [one in GOOD for one in batch]
    assert caplog.text.count("signatures are checked in this process from now on") == 1


async def test_a_process_that_cannot_start_changes_no_verdict(
    checker: SignatureChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    for _ in range(3):
        assert all(await verdicts(checker, GOOD))
        await asyncio.sleep(0.05)
    await checker.close()
