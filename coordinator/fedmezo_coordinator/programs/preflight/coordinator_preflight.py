"""`fedmezo-coordinator preflight`: whether a coordinator with these settings can serve its run.

It does what a coordinator does before it serves: it reads the settings, the journal and the rows,
and loads the base in a child process. It listens nowhere, and changes nothing on the disk.
"""

from __future__ import annotations

import logging
import resource
import shutil
import ssl
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic_settings import SettingsConfigDict

from fedmezo.preflight.check_report import (
    Report,
    ReportSettings,
    counted,
    duration,
    report_program,
)
from fedmezo.preflight.host_checks import (
    check_folder,
    check_memory,
    check_port,
    model_is_here,
)
from fedmezo.preflight.row_checks import check_labels, check_repeated
from fedmezo.presets import KEY
from fedmezo.run_policy import history_bytes
from fedmezo_coordinator.admission.state_folder import open_state
from fedmezo_coordinator.coordinator_settings import (
    CoordinatorSettings,
    check_compaction,
    check_same_run,
    factors_stay_random,
    no_loss_is_seen,
)
from fedmezo_coordinator.replica.supervisor import describe_base
from fedmezo_coordinator.serving.hosting import check_listen, enrolment_address
from fedmezo_coordinator.stores.companions import Companions
from fedmezo_coordinator.stores.location import is_url, journal_shown, path_beside
from fedmezo_coordinator.stores.opening import open_store
from fedmezo_core.config import RunConfig, how_to_name_a_copy, is_folder_name
from fedmezo_core.errors import ConfigError, IdentityError, JournalError
from fedmezo_core.folders import is_there
from fedmezo_core.journal.journal import Journal, JournalStore, MemoryStore
from fedmezo_core.journal.party_copy import verified
from fedmezo_core.records import Committed, Genesis
from fedmezo_core.service.host_memory import memory_available
from fedmezo_core.trust.certificates import lifetime_s
from fedmezo_core.zo.data.rows import Example, read_fit_rows, read_rows

SNAPSHOTS_ON_DISK = 3
"""Snapshots that lie in their folder at the same time: two whole ones, and one that is written."""


class CoordinatorPreflightSettings(ReportSettings, CoordinatorSettings):
    """Check whether a coordinator with these settings can serve its run; it serves nobody.

    It takes the coordinator's flags, environment and --config. Its status is 0, 1 if a check
    failed, and 2 for settings that cannot be read.
    """

    model_config = SettingsConfigDict(env_prefix="FEDMEZO_COORDINATOR_")


def main(arguments: Sequence[str]) -> int:
    """Run `fedmezo-coordinator preflight`; returns the exit status."""
    return report_program(
        "fedmezo-coordinator preflight", CoordinatorPreflightSettings, preflight, arguments
    )


async def preflight(settings: CoordinatorSettings, report: Report) -> None:
    """Check everything that can be, each thing as far as those before it allow."""
    _check_serving(settings, report)
    if settings.runs is not None:
        check_folder(report, "the runs", settings.runs, 0)
        return  # The runs in it say themselves what is wrong with them: fedmezo run list.
    if report.failures and _is_there(settings.journal):
        report.warning(
            "journal",
            f"{settings.journal} was not read: the coordinator that has it may be running; end it, "
            "or mend what failed, and run preflight again.",
        )
        return
    genesis = config = None
    failures = report.failures
    with report.failing("journal"):
        genesis = _check_journal(settings, report)
    if report.failures > failures:
        return
    with report.failing("contract"):
        config = _check_contract(settings, report, genesis)
    if config is None:
        return
    if not is_url(settings.journal):
        folder = path_beside(settings.journal, "").parent
        # Answers take about as much as the coefficients of the commits that they become.
        check_folder(report, "the journal", folder, 2 * history_bytes(config))
    if not _check_rows(settings, config, report):
        return
    with report.failing("model"):
        await _check_base(settings, config, genesis, report)


def _is_there(journal: str) -> bool:
    return not is_url(journal) and Path(journal).exists()


def _check_serving(settings: CoordinatorSettings, report: Report) -> None:
    """The ports, and the certificate that is shown there."""
    with report.failing("port"):
        check_listen(settings)
        if not settings.standby:
            check_port(report, "the coordinator", settings.listen)
            if settings.state is not None:
                port = int(settings.listen.rpartition(":")[2])
                check_port(report, "the enrolment", enrolment_address(settings, port))
            for whose, address in (("the page", settings.page), ("probes", settings.health_listen)):
                if address:
                    check_port(report, whose, address)
    certificate = None if settings.tls_files is None else settings.tls_files[0]
    with report.failing("certificate"):
        if settings.state is not None:
            state = open_state(settings.state)
            certificate = certificate or state.server_files[0]
        if settings.tls_files is not None:
            _check_key(*settings.tls_files)
        if certificate is not None:
            _check_validity(report, certificate)


def _check_key(certificate: Path, key: Path) -> None:
    """Raise `ConfigError` if a certificate and its key cannot be read, or are not a pair."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, lambda: "")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{certificate} and {key} cannot be served with ({error}); name a PEM certificate "
            "chain and its unencrypted key in tls_cert and tls_key."
        ) from None


def _check_validity(report: Report, certificate: Path) -> None:
    try:
        begins, ends = lifetime_s(certificate.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"The certificate {certificate} cannot be read ({error.strerror}); make it anew with "
            "fedmezo-coordinator init, or name another."
        ) from None
    now = time.time()
    first, last, today = (
        time.strftime("%Y-%m-%d", time.gmtime(moment)) for moment in (begins, ends, now)
    )
    if begins <= now <= ends:
        report.ok("certificate", f"{certificate} is valid until {last}", ends_unix_s=ends)
        return
    raise IdentityError(
        f"The certificate {certificate} is valid from {first} to {last}, and this machine's clock "
        f"says {today}; set the clock if it is wrong, else renew the certificate."
    )


def _check_journal(settings: CoordinatorSettings, report: Report) -> Genesis | None:
    """What the journal's run is; None if the journal is new. Raises what is wrong with it."""
    shown = journal_shown(settings.journal)
    companions = Companions(settings.journal, settings.signing_key)
    genesis, rounds = None, 0
    with _read_only(settings.journal) as journal:
        companions.check(journal)
        if not journal.is_empty:
            origin = journal.origin()
            genesis, rounds = (None, 0) if origin is None else (origin.genesis, origin.round)
            for _, record in verified(journal):
                genesis = record if isinstance(record, Genesis) else genesis
                rounds = record.round if isinstance(record, Committed) else rounds
    if genesis is None:
        report.ok("journal", f"{shown} is new or empty: a new run begins")
    else:
        config = genesis.config
        report.ok(
            "journal",
            f"{shown} is whole: run {config.run_id} goes on after round {rounds} of "
            f"{config.rounds}",
            run_id=config.run_id,
            round=rounds,
            rounds=config.rounds,
        )
    return genesis


@contextmanager
def _read_only(journal: str) -> Iterator[Journal]:
    """The journal; of one in a file a copy, because whoever opens a file may change it."""
    if is_url(journal):
        store: JournalStore = open_store(journal, read_only=True)
        try:
            yield Journal(store)
        finally:
            store.close()
        return
    path = Path(journal).expanduser()
    if not path.exists():
        yield Journal(MemoryStore())
        return
    with tempfile.TemporaryDirectory(prefix="fedmezo-") as folder:
        copy = Path(folder) / path.name
        try:
            for end in ("", "-wal"):
                if (part := Path(f"{path}{end}")).exists():
                    shutil.copyfile(part, f"{copy}{end}")
        except OSError as error:
            raise JournalError(
                f"The journal {path} cannot be read ({error.strerror}); check its rights."
            ) from None
        store = open_store(str(copy))
        try:
            yield Journal(store)
        finally:
            store.close()


def _check_contract(
    settings: CoordinatorSettings, report: Report, genesis: Genesis | None
) -> RunConfig:
    """The run's contract; raises `ConfigError` for a wrong one, or another than the journal's."""
    where = "the [run] settings"
    if genesis is None:
        config = settings.run_config(where)
    else:
        config = genesis.config
        check_same_run(journal_shown(settings.journal), config, settings.run, where)
    check_compaction(settings, config)
    preset = settings.run.get(KEY)
    named = f" of preset {preset}" if preset else ""
    report.ok(
        "contract",
        f"run {config.run_id}{named}: {config.rounds} rounds of {config.local_steps} x "
        f"{config.probes} directions on {config.batch_size} rows",
        run_id=config.run_id,
        preset=preset,
    )
    if genesis is None and factors_stay_random(settings, config):
        report.warning(
            "contract",
            "lora.output_rank trains numbers between two factors, which stay random; set "
            "adapter_rows, to which they are fitted, or adapter.",
        )
    if no_loss_is_seen(settings, config):
        report.warning(
            "contract",
            "Nobody reports a loss, so a learning rate that is too large goes unnoticed; set model "
            "and heldout, or report_losses in a new run.",
        )
    return config


def _check_rows(settings: CoordinatorSettings, config: RunConfig, report: Report) -> bool:
    """The rows that the coordinator reads; returns whether they can be read."""
    failures = report.failures
    heldout: list[Example] = []
    for whose in ("heldout", "probe_rows", "adapter_rows"):
        path = getattr(settings, whose)
        if path is None:
            continue
        with report.failing("rows"):
            if whose == "adapter_rows" and not config.fit_reads_answers:
                rows = read_fit_rows(path, config)
                report.ok("rows", f"{whose}: {counted(len(rows), 'row')}", row_count=len(rows))
            else:
                rows = read_rows(path, config.task)
                check_labels(report, whose, rows, config)
            judged = heldout if whose == "adapter_rows" else ()
            check_repeated(report, whose, rows, config.task, judged, "fitted to")
            if whose == "heldout":
                heldout = rows
    if settings.heldout is None and settings.has_replica:
        report.warning(
            "rows",
            "There are no held-out rows, so nobody sees how good the model is; set heldout to rows "
            "that no worker trains on.",
        )
    return report.failures == failures


def _say_who_needs_a_copy(settings: CoordinatorSettings, config: RunConfig, report: Report) -> None:
    """Report that each worker needs a copy of a folder; it loads a model of the hub by itself."""
    if is_folder_name(config.model) and is_there(Path(settings.model).expanduser()):
        report.ok(
            "workers' model",
            f"the run calls it {config.model}; each worker needs a copy: "
            f"{how_to_name_a_copy(config.model)}",
        )


async def _check_base(
    settings: CoordinatorSettings, config: RunConfig, genesis: Genesis | None, report: Report
) -> None:
    """Load the base as a new run does, in a child process; with it goes a probe of the rate."""
    if settings.model and not model_is_here(settings.model):
        report.warning(
            "model",
            f"{settings.model} is not on this machine: the coordinator downloads it when it "
            "starts; run preflight again afterwards.",
        )
        return
    if genesis is not None:
        if not settings.has_replica:
            return
        # The journal has the rate, and the adapter is there.
        known = {
            "probe_rows": None,
            "adapter_rows": None,
            "adapter": settings.begins_from,
            "run": {**settings.run, "learning_rate": config.learning_rate},
        }
        settings = settings.model_copy(update=known)
    free = memory_available()
    began_s = time.monotonic()
    with _warnings_told(report), tempfile.TemporaryDirectory(prefix="fedmezo-") as folder:
        # A fitted adapter goes beside the journal.
        elsewhere = settings.model_copy(update={"journal": str(Path(folder) / "journal.db")})
        described = await describe_base(elsewhere, config)
    took_s = time.monotonic() - began_s
    report.ok(
        "model",
        f"loaded and digested in {duration(took_s)}: {described.trainable_elements:,} trained "
        "elements",
        load_s=round(took_s, 3),
        trained_elements=described.trainable_elements,
        target_modules=list(described.config.lora.target_modules) if described.config.lora else [],
    )
    _say_who_needs_a_copy(settings, config, report)
    if genesis is not None:
        for what, digests in genesis.differences(described, described.tokenizer_parts):
            report.failure(
                "base",
                f"The {what} loaded here differ from the journal's run: {digests}; load the same "
                "files of the model, and the same adapter or none.",
            )
    elif settings.rate_rows:
        rate, eps = described.config.learning_rate, described.config.eps
        report.ok(
            "probe",
            f"the run takes learning_rate = {rate:g} and eps = {eps:g}",
            learning_rate=rate,
            eps=eps,
        )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    check_memory(report, "loading the replica", peak, free)
    if settings.replica_row_states_max and settings.heldout is not None:
        needed = int(settings.replica_row_states_max)
        check_folder(report, "states of rows", Path(tempfile.gettempdir()), needed)
    if settings.snapshot_every_rounds:
        needed = SNAPSHOTS_ON_DISK * described.trainable_bytes
        check_folder(report, "snapshots", settings.snapshots_folder, needed)


@contextmanager
def _warnings_told(report: Report) -> Iterator[None]:
    """While open, what the child warns of becomes warnings of the report."""

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            report.warning("model", record.getMessage())

    told = Told(logging.WARNING)
    told_by = logging.getLogger("fedmezo.coordinator")
    told_by.addHandler(told)
    level = told_by.level
    told_by.setLevel(logging.WARNING)
    propagate, told_by.propagate = told_by.propagate, False
    try:
        yield
    finally:
        told_by.setLevel(level)
        told_by.propagate = propagate
        told_by.removeHandler(told)
