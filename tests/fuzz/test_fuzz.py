"""The kept inputs, and some hundred changes of each: read, or refused in a sentence."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmezo_coordinator.serving.service import OF_THE_RUN
from fedmezo_core.errors import FedMezoError
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.fuzz.corpus import inputs_of
from tests.fuzz.mutations import mutated
from tests.fuzz.targets import METHODS, TARGETS

CHANGES = 200
FOUND = Path(__file__).parent / "found"
"""Inputs with which a target once failed, in a folder for each target."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A coordinator that refuses hundreds of calls says nothing meanwhile."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def try_one(name: str, data: bytes) -> None:
    """Let a target read an input, which it may refuse."""
    with contextlib.suppress(FedMezoError):
        TARGETS[name].read(data)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_reads_the_kept_inputs_and_changes_of_them(name: str) -> None:
    inputs, rng = inputs_of(name), random.Random(name)
    assert inputs
    for data in inputs:
        try_one(name, data)
    for _ in range(CHANGES):
        try_one(name, mutated(rng, TARGETS[name], rng.choice(inputs), inputs))


@pytest.mark.parametrize("path", sorted(FOUND.glob("*/*")), ids=lambda path: path.parent.name)
def test_what_once_was_found_is_refused(path: Path) -> None:
    try_one(path.parent.name, path.read_bytes())


@pytest.mark.parametrize(
    "name",
    [
        *("records", "seals", "snapshots", "journals", "copies"),
        *("orders", "signed-answers", "members-files", "identities", "ledgers", "tls-files"),
        *("contracts", "run-folders", "worker-settings", "journal-files", "journal-marks"),
        *("signing-keys", "adapters", "exports", "rows"),
    ],
)
def test_the_kept_inputs_are_sound(name: str) -> None:
    for data in inputs_of(name):
        TARGETS[name].read(data)


def test_every_method_with_one_request_is_fuzzed() -> None:
    service = wire.DESCRIPTOR.services_by_name["CoordinatorService"]
    assert {method.name for method in service.methods} | OF_THE_RUN == {*METHODS, "Session"}
