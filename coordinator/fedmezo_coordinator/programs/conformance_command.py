"""`fedmezo conformance`: test a coordinator or a worker against docs/protocol.md."""

from __future__ import annotations

import asyncio
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedmezo_coordinator.conformance.coordinator_battery import (
    CoordinatorBattery,
    CoordinatorTest,
)
from fedmezo_coordinator.conformance.report import Report
from fedmezo_coordinator.conformance.worker_battery import WorkerTest, check_can_lead
from fedmezo_coordinator.conformance.worker_endings import run_worker_battery, starting
from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.programs.connecting import genesis_in, opened_journal
from fedmezo_coordinator.programs.plain_values import finite, json_line
from fedmezo_coordinator.programs.taking_home.start_adapter import fitted_adapter
from fedmezo_core.errors import ConfigError
from fedmezo_core.layered_settings import check_address, load_settings
from fedmezo_core.program import worker_packages
from fedmezo_core.trust.authorisation import Role
from fedmezo_core.wire.enrolment import identity_in

conformance_app = typer.Typer(
    help="Test a coordinator or a worker, in any language, against docs/protocol.md.",
    no_args_is_help=True,
)


class ReportFormat(StrEnum):
    """How a report is printed: each check as it ends, or everything at the end as JSON."""

    TABLE = "table"
    JSON = "json"


Format = Annotated[
    ReportFormat,
    typer.Option("--format", help="table: each check as it ends; json: one line at the end"),
]
PatienceS = Annotated[
    float,
    typer.Option(
        min=0.1, callback=finite, help="longest wait for each thing that must come, in seconds"
    ),
]


@conformance_app.command()
def coordinator(
    address: Annotated[
        str, typer.Argument(metavar="HOST:PORT", help="a coordinator that serves a run for this")
    ],
    tls_ca: Annotated[
        Path | None, typer.Option(help="PEM file of the CA to trust; none: no TLS")
    ] = None,
    state: Annotated[
        list[Path] | None,
        typer.Option(
            help="folder of a member's identity, to test a fleet's coordinator: give it once for "
            "each worker to speak as, and once for an operator or observer, who reads the journal",
        ),
    ] = None,
    rounds_max: Annotated[
        int, typer.Option(min=1, help="a run of at most so many rounds is led to its end")
    ] = 20,
    patience_s: PatienceS = 20.0,
    format_: Format = ReportFormat.TABLE,
) -> None:
    """Take part in a run as several workers, with honest, repeated and hostile messages."""
    identities = [identity_in(folder.expanduser()) for folder in state or ()]
    if identities and tls_ca is not None:
        raise ConfigError(
            "--tls-ca has no meaning with --state, whose identities say what to trust."
        )
    if identities and not any(one.role is Role.WORKER for one in identities):
        raise ConfigError("--state names no worker's folder; give one for each worker to speak as.")
    try:
        test = CoordinatorTest(check_address(address), tls_ca, rounds_max, patience_s, identities)
    except ValueError as error:
        raise ConfigError(f"{address!r} is not allowed: {error}.") from None
    report = _report("coordinator", format_)
    asyncio.run(CoordinatorBattery(test, report).run())
    _print(report, format_)


@conformance_app.command()
def worker(
    config: Annotated[
        Path | None,
        typer.Option(
            help="a coordinator's TOML file: loads its model, to compare digests of weights with it"
        ),
    ] = None,
    journal: Annotated[
        str | None,
        typer.Option(
            help="a journal whose genesis to use, in place of --config: digests and measurements "
            "are then not compared"
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="the worker's rows: its projected gradients are compared with ours"),
    ] = None,
    listen: Annotated[
        str, typer.Option(help="host:port to serve; port 0: the system chooses")
    ] = "127.0.0.1:0",
    start: Annotated[
        str | None,
        typer.Option(
            help="command that starts the worker, with {address} for the address; "
            "default: you start it once"
        ),
    ] = None,
    correlation_min: Annotated[
        float,
        typer.Option(
            min=-1,
            max=1,
            callback=finite,
            help="least correlation of projected gradients with ours",
        ),
    ] = 0.99,
    difference_max: Annotated[
        float,
        typer.Option(
            min=0,
            callback=finite,
            help="greatest difference of a projected gradient from ours, relative to their size",
        ),
    ] = 0.1,
    patience_s: PatienceS = 60.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of our model")] = None,
    format_: Format = ReportFormat.TABLE,
) -> None:
    """Lead a worker through a run with honest, repeated, reordered and hostile messages."""
    if (config is None) == (journal is None):
        raise ConfigError("Give --config or --journal, one of the two.")
    if journal is not None and data is not None:
        raise ConfigError("--data needs --config, whose model measures its rows.")
    report = _report("worker", format_)
    if config is None:
        with opened_journal(journal, None) as source:
            genesis = genesis_in(source)
        test = WorkerTest(genesis, None, patience_s=patience_s)
        check_can_lead(test.genesis.config)
        report.skip("weights and measurements are ours", 8, "only with --config, for its model")
    else:
        settings = load_settings(
            CoordinatorSettings, ["--config", str(config)], program="fedmezo conformance"
        )
        run = settings.run_config(f"[run] in {config}")
        check_can_lead(run)
        with worker_packages("compare weights"):
            from fedmezo_coordinator.conformance.reference import likeness, open_reference
            from fedmezo_core.zo.model.loading import SharedBases
        bases = SharedBases(keeps=True)
        with fitted_adapter(settings, run, threads, bases) as adapter:
            reference = open_reference(
                run, settings.base_model, data, adapter=adapter, threads=threads, bases=bases
            )
        test = WorkerTest(
            reference.genesis, reference, likeness, correlation_min, difference_max, patience_s
        )
        if data is None:
            report.skip("measurements are ours", 7, "only with --data, for its rows")

    def announce(address: str) -> None:
        how = "starting it" if start else "start your worker with this coordinator"
        print(f"{address}: {how}", file=sys.stderr, flush=True)

    begin = None if start is None else starting(start)
    asyncio.run(run_worker_battery(test, report, listen, begin, announce))
    _print(report, format_)


def _report(subject: str, format_: ReportFormat) -> Report:
    """A report that prints each check as it ends, unless it is printed as JSON."""
    if format_ is ReportFormat.JSON:
        return Report(subject)
    console = Console()
    return Report(subject, lambda check: console.print(check.line(), soft_wrap=True))


def _print(report: Report, format_: ReportFormat) -> None:
    """Print what is left of a report; exits with status 1 if a check failed."""
    print(json_line(report.values()) if format_ is ReportFormat.JSON else report.summary())
    if not report.passed:
        raise typer.Exit(1)
