"""`fedmezo-worker preflight`: whether this machine and its rows can take part in what is offered.

It asks the coordinator what its runs are, and then does what a worker does up to its first answer,
which goes nowhere: it joins nothing, and changes nothing on the disk.
"""

from __future__ import annotations

import math
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_settings import SettingsConfigDict

from fedmezo.preflight.check_report import Report, ReportSettings, counted, duration, report_program
from fedmezo.preflight.host_checks import (
    check_certificate,
    check_clock,
    check_folder,
    check_memory,
    model_is_here,
)
from fedmezo.preflight.row_checks import (
    check_labels,
    check_lengths,
    check_repeated,
    examples_of,
)
from fedmezo.run_policy import history_bytes
from fedmezo_core.config import NAME_PATTERN, RunConfig
from fedmezo_core.errors import (
    FedMezoError,
    ForbiddenError,
    MismatchError,
    StartingError,
    VersionError,
)
from fedmezo_core.events import Measure, Ticket, Work
from fedmezo_core.machines.rates import schedule_factor
from fedmezo_core.program import worker_packages
from fedmezo_core.records import Genesis, first_seed_of
from fedmezo_core.service.host_memory import memory_available
from fedmezo_core.trust.identity import Identity, load_identity
from fedmezo_core.trust.join_string import parse_join_string
from fedmezo_core.wire.client import CoordinatorClient, RunDescription
from fedmezo_core.wire.enrolment import find_ca, identity_in, members_folder
from fedmezo_core.zo.data.rows import Example, read_rows
from fedmezo_proto.v1 import runs_pb2 as wire
from fedmezo_worker.adapter_files import OfferedFile, adapter_in, downloaded_adapter
from fedmezo_worker.worker_command import as_member, check_paths, computer_opener
from fedmezo_worker.worker_settings import WorkerSettings

DEADLINE_SHARE_MAX = 0.5
"""Share of a round's deadline that a measurement may take before a person is warned."""


class WorkerPreflightSettings(ReportSettings, WorkerSettings):
    """Check whether this machine and its rows can take part in the offered runs; it joins nothing.

    It takes the worker's flags, environment and --config. Its status is 0, 1 if a check failed, and
    2 for settings that cannot be read. Rows are shown on a terminal alone, unless --show-rows.
    """

    model_config = SettingsConfigDict(env_prefix="FEDMEZO_WORKER_")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fedmezo-worker preflight`; returns the exit status.

    `arguments` are those after the word `preflight`; None: this process's own.
    """
    given = sys.argv[2:] if arguments is None else arguments
    return report_program("fedmezo-worker preflight", WorkerPreflightSettings, preflight, given)


async def preflight(settings: WorkerSettings, report: Report) -> None:
    """Check everything that can be, each thing as far as those before it allow."""
    failures = report.failures
    with report.failing("paths"):
        check_paths(settings)
        report.ok("paths", "all files and folders of the settings are there")
    paths_are_there = report.failures == failures
    _check_own_folders(settings, report)
    _check_privacy(settings, report)
    identity = _identity_of(settings, report)
    if identity is not None:
        with report.failing("identity"):
            identity.check_time()
            settings = as_member(settings, identity)
            report.ok("identity", f"member {identity.name}, whose certificate is valid now")
    if settings.is_member and identity is None:
        return  # There is nobody to be, so the coordinator would tell nothing.
    found = await _found_runs(settings, identity, report)
    allowed = 0
    for run in found.runs:
        if found.stays:
            report.begin_section(f"run {run.genesis.config.run_id}")
        try:
            of_run = settings.for_run(run.genesis)
        except FedMezoError as error:
            # A worker that stays serves the others.
            tell = report.warning if found.stays else report.failure
            tell("policy", str(error), error=type(error).__name__)
            continue
        allowed += 1
        report.ok("policy", f"this worker's settings allow run {run.genesis.config.run_id}")
        if of_run.privacy_budget != settings.privacy_budget:
            _check_privacy(of_run, report)
        if paths_are_there:
            await _check_run(of_run, identity, run, report)
    if found.stays and found.runs and not allowed:
        report.begin_section("all runs")
        report.failure(
            "policy",
            "This worker's settings refuse every run that is offered; change what they say of one.",
        )


async def _check_run(
    settings: WorkerSettings, identity: Identity | None, run: _FoundRun, report: Report
) -> None:
    """What depends on the run; `settings` are those for it."""
    failures = report.failures
    with tempfile.TemporaryDirectory(prefix="fedmezo-") as cache:
        with report.failing("adapter"):
            settings = await _with_adapter(settings, identity, run, Path(cache))
        if report.failures > failures:
            return
        if settings.journal_copy is not None:
            needed = history_bytes(run.genesis.config)
            check_folder(report, "the copy of the history", settings.journal_copy.parent, needed)
        failures = report.failures
        rows = _checked_rows(settings, run.genesis.config, report)
        if rows and report.failures == failures:
            _check_computing(settings, run.description, rows, report)


def _check_own_folders(settings: WorkerSettings, report: Report) -> None:
    """What a worker writes besides its copy of the history, which depends on the run."""
    if settings.row_states_max and settings.base_form is None:
        temporary = Path(tempfile.gettempdir())
        check_folder(report, "states of rows", temporary, int(settings.row_states_max))
    for what, path in (
        ("evaluations", settings.evaluations),
        ("the privacy ledger", settings.privacy_ledger),
    ):
        if path is not None:
            check_folder(report, what, path.parent, 0)
    if settings.offload_folder is not None:
        check_folder(report, "offloaded weights", settings.offload_folder, 0)


def _check_privacy(settings: WorkerSettings, report: Report) -> None:
    """Whether the rows may still give something away."""
    budget = settings.privacy_budget
    if budget is None:
        return
    with report.failing("privacy"):
        with worker_packages("keep the account of privacy"):
            from fedmezo_core.zo.privacy.accounting import epsilon_of
            from fedmezo_core.zo.privacy.ledger import read_ledger, steps_in
        entries = read_ledger(budget.ledger) if budget.ledger.exists() else []
        spent = epsilon_of(steps_in(entries), budget.delta)
        said = f"the rows have given away epsilon {spent:.2f} of {budget.epsilon:g}"
        values = {"spent_epsilon": spent, "epsilon": budget.epsilon}
        if spent < budget.epsilon:
            report.ok("privacy", said, **values)
        else:
            report.failure(
                "privacy", f"{said}; use other rows, or raise privacy_epsilon.", **values
            )


def _identity_of(settings: WorkerSettings, report: Report) -> Identity | None:
    """The identity that the worker will show; None if it has none, or has not joined yet."""
    if not settings.is_member:
        return None
    with report.failing("identity"):
        if not settings.join:
            assert settings.state is not None
            return identity_in(settings.state)
        join = parse_join_string(settings.join)
        folder = settings.state or members_folder(settings.join, settings.name)
        kept = load_identity(folder)
        if kept is not None and kept.token_id == join.token_id.hex():
            return kept
        find_ca(join)
        report.warning(
            "identity",
            f"{join.enrol_address} is the coordinator of this join string, and its certificate is "
            "valid now; this machine is no member yet, so the run is not known: start the worker, "
            "which joins and keeps its identity, and then run preflight again.",
        )
    return None


@dataclass(frozen=True, slots=True)
class _FoundRun:
    """A run that this worker may take part in."""

    description: RunDescription
    files: Sequence[OfferedFile]
    """What the coordinator offers for it."""

    @property
    def genesis(self) -> Genesis:
        """Its contract and the base's digests."""
        return self.description.genesis


@dataclass(slots=True)
class _Found:
    """What a coordinator says of its runs."""

    runs: list[_FoundRun] = field(default_factory=list)
    stays: bool = False
    """Whether the worker would serve all that are offered, as others may come."""


async def _found_runs(
    settings: WorkerSettings, identity: Identity | None, report: Report
) -> _Found:
    """The runs that the worker would look at; none if the coordinator says nothing."""
    if settings.tls or settings.tls_ca is not None or identity is not None:
        check_certificate(report, settings.coordinator)
    found = _Found()
    with _answering(report):
        async with _client(settings, identity) as client:
            offers = await _offers(client, settings)
            found.stays = offers.more_may_come and not settings.run_id
            names = [one.run_id for one in offers.offers if re.fullmatch(NAME_PATTERN, one.run_id)]
            if found.stays and not names:
                report.warning(
                    "coordinator",
                    f"{settings.coordinator} offers no run now, so the worker would wait for one; "
                    "run preflight again when fedmezo run list shows one.",
                )
            for run_id in names if found.stays else [settings.run_id]:
                with _answering(report):
                    began_s = time.monotonic()
                    description = await client.get_run(run_id)
                    took_s = time.monotonic() - began_s
                    _check_described(settings, description, took_s, report)
                    if not found.runs:
                        check_clock(report, description.unix_ms)
                    files = [
                        file
                        for one in offers.offers
                        if one.run_id == description.genesis.config.run_id
                        for file in one.files
                    ]
                    found.runs.append(_FoundRun(description, files))
    return found


async def _offers(client: CoordinatorClient, settings: WorkerSettings) -> wire.OfferRunsResponse:
    try:
        return await client.offered_runs(settings.name)
    except (VersionError, ForbiddenError):
        return wire.OfferRunsResponse()  # An older coordinator offers nothing.


def _client(settings: WorkerSettings, identity: Identity | None) -> CoordinatorClient:
    return CoordinatorClient(
        settings.coordinator, settings.tls_ca, tls=settings.tls, identity=identity
    )


@contextmanager
def _answering(report: Report) -> Iterator[None]:
    """Note an error of the coordinator in this block."""
    try:
        yield
    except StartingError as error:
        report.warning("coordinator", f"{error} Run preflight again then.")
    except FedMezoError as error:
        report.failure("coordinator", str(error), error=type(error).__name__)


def _check_described(
    settings: WorkerSettings, description: RunDescription, took_s: float, report: Report
) -> None:
    config = description.genesis.config
    took_ms = 1000 * took_s
    report.ok(
        "coordinator",
        f"{settings.coordinator} answered in {took_ms:.0f} ms: run {config.run_id} of model "
        f"{config.model}, after round {description.round} of {config.rounds}",
        answer_ms=round(took_ms, 1),
        run_id=config.run_id,
        round=description.round,
        rounds=config.rounds,
    )
    key = description.checkpoint_key.hex()
    if settings.checkpoint_key and settings.checkpoint_key != key:
        report.failure(
            "key",
            f"The coordinator signs with key {key or '(none)'}, not with "
            f"{settings.checkpoint_key}; check the address, or the worker's checkpoint_key.",
        )


async def _with_adapter(
    settings: WorkerSettings, identity: Identity | None, run: _FoundRun, cache: Path
) -> WorkerSettings:
    """The settings with the adapter that the coordinator offers, as the worker takes it."""
    config, offered = run.genesis.config, adapter_in(run.files)
    if config.lora is None or not offered:
        return settings
    if settings.adapter is not None or settings.base_form is not None:
        return settings
    async with (
        _client(settings, identity) as client,
        downloaded_adapter(
            client,
            config.run_id,
            offered,
            disk_max_bytes=settings.policy.disk_max,
            give_up_after_s=60.0,
            cache=cache,
        ) as folder,
    ):
        return settings.model_copy(update={"adapter": folder})


def _checked_rows(
    settings: WorkerSettings, config: RunConfig, report: Report
) -> list[Example] | None:
    """The rows, if they can be read."""
    rows, heldout = None, []
    keep_others = bool(config.task.objective)
    with report.failing("rows"):
        rows = read_rows(
            settings.rows, config.task, keep_others=keep_others, names=settings.columns
        )
        check_labels(report, "data", rows, config)
    with report.failing("heldout"):
        if settings.heldout is not None:
            heldout = read_rows(settings.heldout, config.task, names=settings.columns)
            check_labels(report, "heldout", heldout, config)
    if rows:
        check_repeated(report, "data", rows, config.task, heldout)
    return rows


def _check_computing(
    settings: WorkerSettings, description: RunDescription, rows: list[Example], report: Report
) -> None:
    """Load what the worker computes with, look at its rows in tokens, and measure once."""
    genesis, config = description.genesis, description.genesis.config
    # A measurement that counts against a budget would have to be written down.
    public = dict.fromkeys(("privacy_epsilon", "privacy_clip", "privacy_ledger"))
    settings = settings.model_copy(update=public)
    model = settings.model or config.model
    if settings.base_form is None and not model_is_here(model):
        report.warning(
            "model",
            f"{model} is not on this machine: the worker downloads it when it starts; run "
            "preflight again afterwards, or give your copy with --model.",
        )
        return
    engine: Any = None
    free = memory_available()
    began_s = time.monotonic()
    try:
        with worker_packages("work on a run"):
            from fedmezo_core.zo.model.allocator import keep_freed_memory

            keep_freed_memory()
            open_computer = computer_opener(settings)
        engine = open_computer(settings, genesis)
    except MismatchError as error:
        report.failure("base", str(error))
        return
    except FedMezoError as error:
        report.failure("model", str(error), error=type(error).__name__)
        return
    took_s = time.monotonic() - began_s
    report.ok("model", f"loaded in {duration(took_s)}", load_s=round(took_s, 3))
    report.ok("base", "the weights and the tokenizer are those of the run")
    if settings.base_form is None:
        party = engine.party
        dataset = party.task.encode(rows)
        check_lengths(report, "data", dataset, config)
        report.examples += examples_of(party.task, engine.tokenizer, rows, dataset)
    _check_measuring(engine, config, len(rows), description.round, report)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    check_memory(report, "loading and measuring", peak, free)


def _check_measuring(
    engine: Any, config: RunConfig, row_count: int, round_: int, report: Report
) -> None:
    """How long a measurement takes, and with it the rounds that are left."""
    first = first_seed_of(config.seed, 1, 0)
    seeds = tuple(range(first, first + config.pairs_per_answer))
    rate = config.learning_rate * schedule_factor(config, 1)
    order = Measure(Ticket(1, 1, 0), Work(seeds, rate, config.eps, want_digest=False))
    took_s = []
    # The first time, states of new rows may be computed, which are kept.
    for _ in range(2):
        began_s = time.monotonic()
        try:
            engine.measure(order)
        except FedMezoError as error:
            report.failure("measurement", str(error), error=type(error).__name__)
            return
        took_s.append(time.monotonic() - began_s)
    new_s, known_s = took_s
    left = config.rounds - round_
    batches = max(1, row_count // min(config.batch_size, row_count))
    with_new = min(left, math.ceil(batches / config.local_steps))
    run_s = with_new * new_s + (left - with_new) * known_s
    values = {
        "new_rows_s": round(new_s, 4),
        "known_rows_s": round(known_s, 4),
        "rounds_left": left,
        "run_s": round(run_s, 1),
        "deadline_s": config.deadline_ms / 1000,
    }
    said = (
        f"a round takes {duration(new_s)} here with rows that are new, {duration(known_s)} later; "
        f"the {counted(left, 'round')} that are left {duration(run_s)}, without waiting for others"
    )
    deadline_s = config.deadline_ms / 1000
    if new_s > deadline_s:
        report.failure(
            "measurement",
            f"{said}; the run waits {duration(deadline_s)} for an answer, so ask for a larger "
            "deadline_ms, or use a faster device.",
            **values,
        )
    elif new_s > DEADLINE_SHARE_MAX * deadline_s:
        report.warning(
            "measurement",
            f"{said}; the run waits {duration(deadline_s)} for an answer, which leaves little: "
            "ask for a larger deadline_ms, or keep this machine free of other work.",
            **values,
        )
    else:
        report.ok("measurement", said, **values)
