"""Where a journal is: what a URL means, what is shown of it, and which are refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedmezo_coordinator.stores.location import journal_shown, parse_url
from fedmezo_coordinator.stores.opening import open_store
from fedmezo_core.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("journal.db", "journal.db"),
        ("postgresql://anna@db/fed", "postgresql://anna@db/fed?journal=journal"),
        ("postgres://anna:hidden@db:99/fed", "postgres://anna@db:99/fed?journal=journal"),
        (
            "postgresql://anna:hid%40den@db/fed?journal=reviews-2&sslmode=require",
            "postgresql://anna@db/fed?journal=reviews-2",
        ),
        (
            "postgresql:///fed?host=/run/postgresql&user=anna&password=hidden",
            "postgresql:///fed?host=/run/postgresql&journal=journal",
        ),
        (
            "postgresql://anna:hidden@[::1]:5432/fed",
            "postgresql://anna@[::1]:5432/fed?journal=journal",
        ),
    ],
)
def test_a_journal_is_shown_without_its_password(url: str, shown: str) -> None:
    assert journal_shown(url) == shown


def test_the_library_gets_the_url_as_it_was_without_the_journals_name() -> None:
    place = parse_url("postgresql://anna:hid%40den@db/fed?journal=reviews-2&sslmode=require")
    assert place.dsn == "postgresql://anna:hid%40den@db/fed?sslmode=require"
    assert (place.name, place.schema) == ("reviews-2", "fedmezo_reviews_2")


def test_a_password_appears_neither_in_a_places_repr_nor_in_a_cleaned_text() -> None:
    for url in (
        "postgresql://anna:hid%40den@db/fed",
        "postgresql://anna@db/fed?password=hid%40den",
    ):
        place = parse_url(url)
        assert "hid" not in repr(place)
        assert place.clean("refused hid@den for anna") == "refused *** for anna"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://anna:hid/den@db/fed",
        "postgresql://anna:12/hidden@db/fed",
        "postgresql://anna:hid?den@db/fed",
        "postgresql://anna:12?hidden@db/fed",
        "postgresql://anna:hid#den@db/fed",
        "postgresql://anna:hid@den@db/fed",
        "postgresql://anna:[hidden@db/fed",
        "postgresql://anna:hidden@db:port/fed",
    ],
)
def test_a_url_that_cannot_be_read_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="percent-encoded") as caught:
        open_store(url)
    assert "hid" not in str(caught.value).replace("hold", "")
    assert "den" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "A", "a_b", "a" * 49, "x;drop"])
def test_a_journals_name_is_refused_outside_its_range(name: str) -> None:
    with pytest.raises(ConfigError, match="use 1 to 48 of a-z, 0-9 and -"):
        parse_url(f"postgresql://db/fed?journal={name}")
    assert parse_url("postgresql://db/fed?journal=" + "a" * 48).name == "a" * 48


def test_another_kind_of_url_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mysql:// is neither; write postgresql://") as caught:
        open_store("mysql://anna:hidden@db/fed")
    assert "hidden" not in str(caught.value)


def test_a_standby_with_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="standby needs a journal that two machines can reach"):
        open_store(str(tmp_path / "journal.db"), standby=True)
    assert not (tmp_path / "journal.db").exists()


def test_a_missing_driver_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fedmezo_coordinator.stores.postgres", raising=False)
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(
        ConfigError, match=r"needs the package asyncpg; install .*fedmezo\[postgres\]"
    ):
        open_store("postgresql://anna:hidden@db/fed")
