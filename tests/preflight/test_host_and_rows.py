"""The checks that both programs share: each says what is wrong, and what to do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from fedmezo.preflight import host_checks
from fedmezo.preflight.check_report import (
    Check,
    Outcome,
    Report,
    ReportSettings,
    duration,
    report_program,
    size,
)
from fedmezo.preflight.host_checks import (
    check_certificate,
    check_clock,
    check_folder,
    check_memory,
    check_port,
    model_is_here,
)
from fedmezo.preflight.row_checks import (
    check_labels,
    check_lengths,
    check_repeated,
    examples_of,
)
from fedmezo_core.config import RunConfig
from fedmezo_core.errors import IdentityError
from fedmezo_core.service.host_memory import memory_available
from fedmezo_core.zo.data.encoding import RowEncoder
from fedmezo_core.zo.data.rows import Example
from tests.core.zo.conftest import make_tokenizer
from tests.integration.support.harness import config_of

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def report() -> Report:
    return Report("test")


def only(report: Report) -> Check:
    [check] = report.checks
    return check


@pytest.mark.parametrize(
    ("free", "outcome", "said"),
    [
        (1 << 20, Outcome.FAILURE, "1 MiB free, up to 2 MiB needed; make room"),
        (3 << 20, Outcome.WARNING, "little is left after that, so make room"),
        (5 << 30, Outcome.OK, "5.0 GiB free, up to 2 MiB needed"),
    ],
)
def test_a_disk_without_room_is_told(
    report: Report,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    outcome: Outcome,
    said: str,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(1 << 40, 0, free))
    check_folder(report, "the copy", tmp_path / "not" / "yet", 2 << 20)
    assert only(report).outcome is outcome
    assert said in only(report).said
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    check_folder(report, "the copy", tmp_path / "here", 0)
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    check_folder(report, "the copy", tmp_path / "file" / "inside", 0)
    assert [check.outcome for check in report.checks] == [Outcome.FAILURE] * 2
    assert f"this user may not write to {tmp_path}; change its rights" in report.checks[0].said
    assert f"{tmp_path}/file is a file, not a folder" in report.checks[1].said


def test_a_port_that_is_taken_is_told(report: Report) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        check_port(report, "the coordinator", address)
    assert only(report).outcome is Outcome.FAILURE
    assert f"cannot listen at {address} (Address already in use); end the program" in (
        only(report).said
    )
    report.checks.clear()
    check_port(report, "the coordinator", address)
    assert only(report).outcome is Outcome.OK


def test_memory_that_nearly_runs_out_is_told(report: Report) -> None:
    check_memory(report, "it", 900, 1000)
    check_memory(report, "it", 700, 1000)
    check_memory(report, "it", 700, None)
    assert [check.outcome for check in report.checks] == ["warning", "ok", "ok"]
    assert "900 B of 1000 B that were free; the system may end it" in report.checks[0].said
    available = memory_available()
    assert available is None or available > 0


@pytest.mark.parametrize(
    ("ahead_s", "outcome", "said"),
    [
        (0, Outcome.OK, "agree"),
        (90_000, Outcome.FAILURE, "25.0 h ahead of the coordinator's"),
        (-86_400, Outcome.FAILURE, "24.0 h behind the coordinator's"),
    ],
)
def test_a_clock_that_is_a_day_off_is_told(
    report: Report, ahead_s: float, outcome: Outcome, said: str
) -> None:
    check_clock(report, 1_700_000_000_000, lambda: 1_700_000_000 + ahead_s)
    assert only(report).outcome is outcome
    assert said in only(report).said


def test_an_older_coordinator_says_nothing_of_its_clock(report: Report) -> None:
    check_clock(report, 0)
    assert report.checks == []


def test_a_certificate_of_another_time_is_told(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(address: str, _pem: bytes) -> None:
        raise IdentityError(f"A certificate of {address} is old; set the clock.")

    monkeypatch.setattr(host_checks, "served_certificates", lambda _address: [b"der"])
    monkeypatch.setattr(host_checks, "check_served_time", refuse)
    check_certificate(report, "host:1")
    assert only(report).outcome is Outcome.FAILURE
    assert only(report).said == "A certificate of host:1 is old; set the clock."


def test_what_serves_no_tls_shows_no_certificate(report: Report) -> None:
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def serve() -> None:
            connection, _ = plain.accept()
            connection.close()

        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{plain.getsockname()[1]}"
        check_certificate(report, address)
    assert only(report).outcome is Outcome.WARNING
    assert f"The certificate of {address} could not be read" in only(report).said


def test_a_model_is_here_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_is_here(str(tmp_path))
    assert model_is_here("/a/wrong/path"), "what loads it names the path"
    assert not model_is_here("fedmezo-tests/there-is-no-such-model")


# ------------------------------------------------------------------ rows


def rows_of(*texts: str, label: str = "positive") -> list[Example]:
    return [
        Example({"text": text, "label": label}, "rows.jsonl", number)
        for number, text in enumerate(texts, start=1)
    ]


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return config_of()


def test_labels_of_one_kind_are_told(report: Report, config: RunConfig) -> None:
    both = rows_of(*"abcde") + rows_of(*"fghij", label="negative")
    check_labels(report, "data", both, config)
    check_labels(report, "data", rows_of(*"abcde"), config)
    uneven = rows_of(*map(str, range(19))) + rows_of("z", label="negative")
    check_labels(report, "data", uneven, config)
    check_labels(report, "data", rows_of(*"ab") + rows_of("z", label="a secret"), config)
    assert [check.outcome for check in report.checks] == ["ok", "warning", "warning", "failure"]
    ok, absent, most, strange = (check.said for check in report.checks)
    assert "10 rows, 50 % " in ok
    assert "no row has 'negative', so these rows teach a bias" in absent
    assert "nearly all rows are of one label" in most
    assert "1 row of another label than the run's verbalizers" in strange
    assert "secret" not in strange


def test_fewer_rows_than_a_batch_are_told(report: Report, config: RunConfig) -> None:
    few = rows_of("a") + rows_of("b", label="negative")
    check_labels(report, "data", few, config)
    check_labels(report, "heldout", few, config)
    assert [check.outcome for check in report.checks] == ["warning", "ok"]
    assert "fewer than the run's batch_size = 4" in report.checks[0].said


def test_repeated_rows_and_those_that_are_judged_by_are_told(
    report: Report, config: RunConfig
) -> None:
    check_repeated(report, "data", rows_of(*"abc"), config.task, rows_of("d"))
    check_repeated(report, "data", rows_of(*"aab"), config.task)
    check_repeated(report, "data", rows_of(*"abc"), config.task, rows_of(*"cd"))
    assert [check.outcome for check in report.checks] == ["ok", "warning", "warning"]
    assert "1 row of 3 with the text of an earlier one" in report.checks[1].said
    assert "1 held-out row with the text of a row that is trained on" in report.checks[2].said


@pytest.fixture(scope="module")
def encoder() -> RowEncoder:
    task = config_of().task.model_copy(update={"tokens_max": 24})
    return RowEncoder(task, make_tokenizer(), 384)


def test_rows_that_are_cut_are_told_and_shown(report: Report, encoder: RowEncoder) -> None:
    config = config_of().model_copy(update={"task": encoder.config})
    rows = rows_of("Good.", "Bad " * 30 + "end\x1b[2J", "Fine.")
    dataset = encoder.encode(rows)
    check_lengths(report, "data", dataset, config)
    assert only(report).outcome is Outcome.WARNING
    assert "cut to 24: 1 row (33 %), of which" in only(report).said
    assert only(report).values["longest_before_cut_tokens"] > 24
    shown = examples_of(encoder, make_tokenizer(), rows, dataset)
    assert len(shown) == 2, "the first row is the shortest too"
    assert "Good." in shown[0]
    assert "cut off" not in shown[0]
    kept = encoder.characters_kept(rows[1], dataset.examples[1])
    assert f"cut off text, {len(rows[1].values['text']) - kept:,} characters: " in shown[1]
    assert shown[1].endswith("end\\x1b[2J"), "a row must not command the terminal"
    # What is shown as kept and as cut is the whole row.
    assert rows[1].values["text"][:kept] in shown[1]


def test_rows_that_fit_are_whole(report: Report, encoder: RowEncoder) -> None:
    rows = rows_of("Good.", "Fine.")
    dataset = encoder.encode(rows)
    check_lengths(report, "data", dataset, config_of())
    assert only(report).outcome is Outcome.OK
    assert "none is cut" in only(report).said
    assert encoder.characters_kept(rows[0], dataset.examples[0]) >= len("Good.")


# ------------------------------------------------------------------ the report


def asked_of(*found: str) -> Any:
    async def make(_settings: ReportSettings, report: Report) -> None:
        for name in found:
            getattr(report, name)("check", f"{name} it is", value=float("nan"))
        report.examples = ["a private row"]

    return make


@pytest.mark.parametrize(
    ("found", "flags", "status"),
    [
        (["ok"], [], 0),
        (["ok", "warning"], [], 0),
        (["ok", "warning"], ["--strict"], 1),
        (["failure"], [], 1),
        (["ok"], ["--format", "yaml"], 2),
    ],
)
def test_the_exit_status(
    found: list[str], flags: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_program("test", ReportSettings, asked_of(*found), flags) == status
    said = capsys.readouterr()
    assert "a private row" not in said.out
    if status < 2:
        assert f"{found[-1]:<8} check        {found[-1]} it is" in said.out
    else:
        assert "format = 'yaml' is not allowed" in said.err


def test_rows_are_in_json_only_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    report_program("test", ReportSettings, asked_of("warning"), ["--format=json"])
    values = json.loads(capsys.readouterr().out)
    assert values == {
        "program": "test",
        "failures": 0,
        "warnings": 1,
        "checks": [
            {
                "check": "check",
                "outcome": "warning",
                "said": "warning it is",
                "values": {"value": None},
            }
        ],
    }
    report_program("test", ReportSettings, asked_of("ok"), ["--format=json", "--show-rows"])
    assert json.loads(capsys.readouterr().out)["examples"] == ["a private row"]
    report_program("test", ReportSettings, asked_of("ok"), ["--show-rows"])
    assert "a private row" in capsys.readouterr().out


def test_amounts_are_for_a_person() -> None:
    assert [duration(s) for s in (0.0123, 45, 600, 9000, 400_000)] == [
        "0.012 s",
        "45 s",
        "10 min",
        "2.5 h",
        "5 days",
    ]
    assert [size(count) for count in (5, 2048, 3 << 20, 5 << 30)] == [
        "5 B",
        "2 KiB",
        "3 MiB",
        "5.0 GiB",
    ]
