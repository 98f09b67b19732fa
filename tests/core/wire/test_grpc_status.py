"""Errors survive the wire: every class has a status and comes back as itself."""

from __future__ import annotations

import grpc
import pytest

from fedmezo_core import errors
from fedmezo_core.errors import FedMezoError
from fedmezo_core.wire.grpc_status import BY_REASON, error_from

CLASSES = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, FedMezoError)
]


@pytest.mark.parametrize("kind", CLASSES)
def test_a_class_has_a_grpc_status_and_comes_back_as_itself(kind: type[FedMezoError]) -> None:
    assert kind.status in grpc.StatusCode.__members__
    found = error_from(kind.status, kind.__name__, "a sentence")
    assert type(found) is kind
    assert str(found) == "a sentence"


def test_every_class_of_the_tree_is_known() -> None:
    assert {kind.__name__ for kind in CLASSES} <= set(BY_REASON)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("UNAVAILABLE", errors.UnavailableError),
        ("DEADLINE_EXCEEDED", errors.UnavailableError),
        ("RESOURCE_EXHAUSTED", errors.NotReadyError),
        ("UNIMPLEMENTED", errors.VersionError),
        ("INVALID_ARGUMENT", errors.ProtocolError),
        ("ABORTED", FedMezoError),
    ],
)
def test_a_status_without_a_reason_that_is_known(status: str, kind: type[FedMezoError]) -> None:
    assert type(error_from(status, "", "m")) is kind
    assert type(error_from(status, "OfALaterVersionError", "m")) is kind


@pytest.mark.parametrize(
    ("hint", "seconds"),
    [
        ("", None),
        ("0", 0.0),
        ("1250", 1.25),
        ("-5", None),
        ("soon", None),
        ("9" * 400, None),
        ("9" * 5000, None),
    ],
)
def test_the_time_to_come_back_survives_the_wire(hint: str, seconds: float | None) -> None:
    assert error_from("RESOURCE_EXHAUSTED", "NotReadyError", "full", hint).retry_after_s == seconds
