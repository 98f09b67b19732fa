"""Join strings are read as they were written, and any change of one is noticed."""

from __future__ import annotations

import pytest

from fedmezo_core.errors import TokenError
from fedmezo_core.trust.join_string import JoinString, parse_join_string

JOIN = JoinString("fleet.example.org:7465", 7466, b"f" * 32, b"12345678", b"s" * 16)


@pytest.mark.parametrize(
    "join", [JOIN, JoinString("[::1]:1", 65_535, b"", b"\0" * 8, b"\xff" * 16)]
)
def test_a_join_string_says_what_was_put_in(join: JoinString) -> None:
    assert parse_join_string(f"  {join}\n") == join


def test_the_enrolment_service_has_its_own_port() -> None:
    assert JOIN.enrol_address == "fleet.example.org:7466"


def test_every_shorter_or_changed_string_is_refused() -> None:
    text = str(JOIN)
    for end in range(len("fedmezo1:"), len(text)):
        with pytest.raises(TokenError, match="cut off or changed"):
            parse_join_string(text[:end])
    for at in range(len("fedmezo1:"), len(text) - 1):
        with pytest.raises(TokenError):
            parse_join_string(text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :])


@pytest.mark.parametrize("text", ["", "fedmezo2:abc", "http://x", "fedmezo1:é", "fedmezo1:="])
def test_other_strings_are_refused(text: str) -> None:
    with pytest.raises(TokenError):
        parse_join_string(text)


def test_the_secret_is_not_in_what_a_log_would_show() -> None:
    assert "ssss" not in repr(JOIN)
