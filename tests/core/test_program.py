"""How a program ends."""

from __future__ import annotations

import pytest

from fedmezo_core.errors import ConfigError, DataError
from fedmezo_core.program import TRACEBACK_VARIABLE, run_program


def ending(error: BaseException | None) -> int:
    def work() -> None:
        if error is not None:
            raise error

    return run_program("fedmezo-test", work)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (None, 0, ""),
        (DataError("No rows."), 1, "fedmezo-test: No rows.\n"),
        (ConfigError("Bad eps."), 2, "fedmezo-test: Bad eps.\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_status_and_sentence(
    capsys: pytest.CaptureFixture[str], error: BaseException | None, status: int, said: str
) -> None:
    assert ending(error) == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [ValueError("first\nsecond"), RuntimeError()])
def test_a_defect_is_one_line_that_asks_for_a_report(
    capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    assert ending(error) == 70
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"unexpected {type(error).__name__}" in said
    assert TRACEBACK_VARIABLE in said


def test_a_developer_can_see_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match="odd"):
        ending(ValueError("odd"))
