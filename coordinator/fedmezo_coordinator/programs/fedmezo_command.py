"""`fedmezo`: split data, choose a rate, watch a run, check its journal, export its model."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console

from fedmezo.auditing import TOLERANCE, audit_of, rounds_in, rounds_text
from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.programs.conformance_command import conformance_app
from fedmezo_coordinator.programs.connecting import (
    Coordinator,
    EveryS,
    JournalArgument,
    JournalOption,
    RunId,
    State,
    Tls,
    TlsCa,
    check_data,
    link_to,
    opened_journal,
    user_path,
)
from fedmezo_coordinator.programs.fleet_command import add_to
from fedmezo_coordinator.programs.home_commands import add_to as add_home_to
from fedmezo_coordinator.programs.plain_values import (
    AsJson,
    Format,
    chosen_format,
    finite,
    json_line,
    origin_values,
    record_values,
    say,
    status_values,
)
from fedmezo_coordinator.programs.preflight.presets_command import presets
from fedmezo_coordinator.programs.run_commands.health_command import add_health_to
from fedmezo_coordinator.programs.run_commands.run_command import run_app
from fedmezo_coordinator.programs.run_commands.watching import status_of, watch_run
from fedmezo_coordinator.programs.signature_audit import SignatureAudit
from fedmezo_coordinator.programs.split_files import (
    SplitOptions,
    Splitter,
    split_file,
    split_values,
    split_view,
)
from fedmezo_coordinator.programs.taking_home.start_adapter import fitted_adapter
from fedmezo_coordinator.programs.view import (
    agreement,
    counted,
    run_view,
)
from fedmezo_coordinator.programs.watching_commands.page_command import page
from fedmezo_coordinator.stores.companions import Companions
from fedmezo_coordinator.stores.location import journal_shown, path_beside
from fedmezo_coordinator.stores.opening import open_store
from fedmezo_core import records
from fedmezo_core.errors import ConfigError, DivergedError, JournalCorruptError
from fedmezo_core.journal.journal import Journal, Row
from fedmezo_core.journal.party_copy import verified
from fedmezo_core.journal.sealed import SealedState
from fedmezo_core.layered_settings import OutputFormat, installed_version, load_settings
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.machines.state_codec import state_of
from fedmezo_core.program import (
    long_step,
    run_program,
    show_steps_on_terminal,
    step_log,
    worker_packages,
)

log = logging.getLogger("fedmezo.command")

app = typer.Typer(
    name="fedmezo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
journal_app = typer.Typer(
    help="Read a journal: a file, a database, or the journal of a running coordinator.",
    no_args_is_help=True,
)
app.add_typer(journal_app, name="journal")
app.add_typer(run_app, name="run")
app.add_typer(conformance_app, name="conformance")
add_to(app)
app.command()(presets)
add_health_to(app)
app.command()(page)
add_home_to(app)


OutputFolder = Annotated[Path, typer.Argument(help="folder to write; must be new or empty")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fedmezo`; returns the exit status.

    `arguments` are those of the command line; None: this process's own.
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    for own in (log, step_log):
        own.setLevel(logging.INFO)
    show_steps_on_terminal()
    return run_program("fedmezo", lambda: _run_command(arguments))


_NO_ARGUMENTS: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""What asks for help where arguments are missing; older versions of click print it themselves."""


def _run_command(arguments: Sequence[str] | None) -> None:
    """Run the command that the arguments name.

    Raises `ConfigError` for arguments that name none, and `SystemExit` with a status that the
    command ends with.
    """
    try:
        status = app(arguments, prog_name="fedmezo", standalone_mode=False)
    except _NO_ARGUMENTS as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except click.UsageError as error:
        raise ConfigError(_usage_sentence(error)) from None
    except click.Abort:
        raise KeyboardInterrupt from None
    if isinstance(status, int) and status:
        raise SystemExit(status)


def _usage_sentence(error: click.UsageError) -> str:
    """What is wrong with the arguments, and where it says what is right."""
    see = f"see {'fedmezo' if error.ctx is None else error.ctx.command_path} --help."
    said = error.format_message().strip()
    if said.endswith("?"):  # Did you mean ...?
        return f"{said} {see.capitalize()}"
    return f"{said.removesuffix('.')}; {see}"


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fedmezo {installed_version()}")
        raise typer.Exit


@app.callback()
def _program(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="show the version and exit"
        ),
    ] = False,
) -> None:
    """Split data, choose a rate, watch a federated run, check its journal, export its model."""


@app.command()
def status(
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    run_id: RunId = "",
    format_: Format = OutputFormat.TEXT,
    as_json: AsJson = False,
) -> None:
    """Show the progress, workers, traffic, digests and evaluations of a run."""
    answer = asyncio.run(status_of(link_to(coordinator, tls_ca, tls, state, run_id)))
    if chosen_format(format_, as_json) is OutputFormat.JSON:
        print(json_line(status_values(answer)))
    else:
        Console().print(run_view(answer))
    if not agreement(answer)[0]:
        raise DivergedError("Not all parties hold the same weights; restart those named above.")


@app.command()
def watch(
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    run_id: RunId = "",
    every_s: EveryS = 1.0,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Show a run until it is finished and evaluated; Ctrl-C stops the display, not the run."""
    asyncio.run(watch_run(link_to(coordinator, tls_ca, tls, state, run_id), every_s, format_))


@journal_app.command()
def inspect(
    journal: JournalArgument = None,
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    run_id: RunId = "",
    from_seqno: Annotated[int, typer.Option(min=0, help="first record to print")] = 0,
    format_: Format = OutputFormat.TEXT,
    as_json: AsJson = False,
) -> None:
    """Print the journal's records, one on each line."""
    format_ = chosen_format(format_, as_json)
    link = partial(link_to, coordinator, tls_ca, tls, state, run_id)
    with opened_journal(journal, link, run_id) as source:
        last = 0
        origin = source.origin()
        if origin is not None and from_seqno < origin.seqno:
            say(format_, _origin_line(origin), origin_values(origin))
        for entry, record in verified(source):
            last = entry.row.seqno
            if last >= from_seqno:
                if format_ is OutputFormat.JSON:
                    print(json_line(record_values(entry.row, record)))
                else:
                    print(_line(entry.row, record))
    if from_seqno > last:
        raise ConfigError(f"--from-seqno {from_seqno} is beyond the journal's last record, {last}.")


@journal_app.command()
def verify(
    journal: JournalArgument = None,
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    run_id: RunId = "",
    signatures: Annotated[
        bool, typer.Option("--signatures", help="check the signature of each worker's answer too")
    ] = False,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Check the records' hashes, order, meaning and number, and print the journal's head."""
    link = partial(link_to, coordinator, tls_ca, tls, state, run_id)
    with opened_journal(journal, link, run_id) as source:
        audit = SignatureAudit(source.origin()) if signatures else None
        found = _verified_run(source, audit)
        if journal:
            Companions(journal).check(source)
        text = "\n".join([found.line(), *(audit.lines() if audit else ())])
        values = found.values() | ({} if audit is None else {"answers": audit.values()})
        say(format_, text, values)


@journal_app.command()
def tensorboard(
    folder: Annotated[Path, typer.Argument(help="TensorBoard's log folder for this run")],
    journal: JournalArgument = None,
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    run_id: RunId = "",
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Write the run's curves as an event file, which TensorBoard shows."""
    from fedmezo_coordinator.web.event_files import write_event_file

    link = partial(link_to, coordinator, tls_ca, tls, state, run_id)
    with opened_journal(journal, link, run_id) as source:
        count = write_event_file(source, folder)
    say(
        format_,
        f"wrote {counted(count, 'value')}; look at them with: tensorboard --logdir {folder}",
        {"out": str(folder), "values": count},
    )


@journal_app.command()
def restore(
    copy: Annotated[
        str, typer.Argument(help="the journal_copy of a worker or relay, or another journal")
    ],
    journal: Annotated[
        str, typer.Argument(help="journal to write: a new file, or the URL of an empty journal")
    ],
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Write a coordinator's journal from a copy that is verified first, to continue the run."""
    with opened_journal(copy, None) as verifying:
        found = _verified_run(verifying)
    source = open_store(copy, read_only=True)
    try:
        target = open_store(journal)
        try:
            if len(target):
                raise ConfigError(
                    f"{journal_shown(journal)} already holds a run; give the name of a new journal."
                )
            origin = source.origin()
            if origin is not None:
                target.drop_before(origin)
            with long_step(f"writing {journal_shown(journal)}", len(source), "records") as step:
                while rows := source.read(len(target), Journal.PAGE_ROWS):
                    target.append(rows)
                    step.done = len(target)
        finally:
            target.close()
    finally:
        source.close()
    lines = [found.line(), f"wrote {journal_shown(journal)}"]
    snapshots = None if origin is None else path_beside(journal, ".snapshots")
    if snapshots is not None:
        lines.append(
            "its first records were dropped, so workers begin from a snapshot: put the run's "
            f"snapshots into {snapshots}"
        )
    values = {"journal": journal_shown(journal), "snapshots": snapshots and str(snapshots)}
    say(format_, "\n".join(lines), found.values() | values)


@app.command()
def adapter(
    folder: OutputFolder,
    config: Annotated[
        Path, typer.Option(help="the coordinator's TOML file; its run must train a LoRA adapter")
    ],
    data: Annotated[
        Path,
        typer.Option(
            callback=user_path,
            help="rows like the workers': a JSONL, CSV or Parquet file, or a folder",
        ),
    ],
    rows_max: Annotated[int, typer.Option(min=1, help="most rows to read")] = 1000,
    threads: Threads = None,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Fit the adapter that a run begins from to texts; see docs/configuration.md."""
    check_data(data)
    settings = load_settings(
        CoordinatorSettings, ["--config", str(config)], program="fedmezo adapter"
    )
    with worker_packages("fit an adapter"):
        from fedmezo_core.zo.fitting import write_fitted_adapter
    run = settings.run_config(f"[run] in {config}", rate_comes_later=True)
    count = write_fitted_adapter(
        run, settings.base_model, data, folder, rows_max=rows_max, threads=threads
    )
    assert run.lora is not None, "there is an adapter"
    say(
        format_,
        f"{folder}: an adapter of rank {run.lora.rank} fitted to {counted(count, 'row')}; set "
        f'adapter = "{folder}" at the coordinator, which gives it to workers',
        {"out": str(folder), "rank": run.lora.rank, "rows": count},
    )


@app.command("export-form")
def export_form(
    folder: OutputFolder,
    config: Annotated[
        Path, typer.Option(help="the coordinator's TOML file; its run must train a LoRA adapter")
    ],
    gguf: Annotated[
        Path | None,
        typer.Option(help="GGUF of the same base, for llama.cpp; default: an ONNX graph is made"),
    ] = None,
    threads: Threads = None,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Write a form of a run's base for workers without torch; see docs/edge.md."""
    settings = load_settings(
        CoordinatorSettings, ["--config", str(config)], program="fedmezo export-form"
    )
    with worker_packages("export a form of a base"):
        from fedmezo_core.zo.edge.edge_export import export_gguf_form, export_onnx_form
        from fedmezo_core.zo.model.loading import SharedBases
        from fedmezo_core.zo.party import open_party
    run = settings.run_config(f"[run] in {config}", rate_comes_later=True)
    bases = SharedBases(keeps=True)
    with fitted_adapter(settings, run, threads, bases) as start:
        model = settings.base_model
        party = open_party(run, model, adapter=start, threads=threads, bases=bases)
    if gguf is None:
        name = export_onnx_form(party, folder)
    else:
        name = export_gguf_form(party, folder, gguf)
    say(
        format_,
        f"{folder}: a form of the base of run {run.run_id}; add it to the contract: "
        f'base_forms = ["{name}"]',
        {"out": str(folder), "run_id": run.run_id, "form": name},
    )


@app.command()
def audit(
    worker: Annotated[str, typer.Option(help="name of the worker whose answers are repeated")],
    data: Annotated[
        Path,
        typer.Option(
            callback=user_path, help="the rows that it measured on, in files as it was given them"
        ),
    ],
    rounds: Annotated[
        str, typer.Option(help="rounds to repeat, as in 3,7,11-13; default: all that it answered")
    ] = "",
    tolerance: Annotated[
        float,
        typer.Option(
            min=0, callback=finite, help="largest difference that another kind of machine may make"
        ),
    ] = TOLERANCE,
    model: Annotated[
        str, typer.Option(help="base model: hub name or folder; default: the name in the journal")
    ] = "",
    adapter: Annotated[
        Path | None, typer.Option(help="folder of the adapter that the run began from, if any")
    ] = None,
    objective: Annotated[
        str, typer.Option(help="the run's objective, if it has one: its code runs here")
    ] = "",
    journal: JournalOption = None,
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    run_id: RunId = "",
    threads: Threads = None,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Measure again what a worker has answered, on its rows, and compare; see docs/operating.md."""
    check_data(data)
    wanted_rounds = rounds_in(rounds)
    link = partial(link_to, coordinator, tls_ca, tls, state, run_id)
    with opened_journal(journal, link, run_id) as source:
        what = audit_of(source, worker, wanted_rounds)
    wanted = what.genesis.config.task.objective
    if wanted and wanted != objective:
        raise ConfigError(
            f"The run scores batches by {wanted}; give --objective {wanted} if you trust that code."
        )
    with worker_packages("audit a worker"):
        from fedmezo import TorchEngine
        from fedmezo_core.zo.model.loading import folder_of_hub_name
        from fedmezo_core.zo.objectives import load_objective
    engine = TorchEngine(
        what.genesis,
        worker,
        model or folder_of_hub_name(what.genesis.config.model),
        data,
        adapter=adapter,
        objective=load_objective(wanted) if wanted else None,
        threads=threads,
        policy=None,
    )
    verdicts = Counter[str]()
    for repeated in what.repeat(engine):
        verdict = repeated.verdict(tolerance)
        answer = {"round": repeated.answer.round, "slot": repeated.answer.slot}
        measured = {"difference": repeated.difference, "verdict": verdict}
        say(format_, repeated.line(tolerance), answer | measured)
        verdicts[verdict] += 1
    found = ", ".join(
        f"{count} {'differ' if verdict == 'differs' and count > 1 else verdict}"
        for verdict, count in sorted(verdicts.items())
    )
    if format_ is OutputFormat.TEXT:
        print(f"{worker}: {counted(verdicts.total(), 'answer')} repeated: {found}")
    if verdicts["differs"]:
        # In 16 bits the difference of two losses is mostly how their sums were rounded.
        also = "" if what.genesis.config.dtype == "float32" else ", and the number of threads,"
        raise DivergedError(
            f"Worker {worker} sent other numbers than these rows give; ask its site, and check "
            f"that the rows, the base and the adapter{also} are those that it had. The answers "
            "of a worker with a privacy budget are noisy and always differ."
        )
    without = (wanted_rounds or frozenset()) - {answer.round for answer, _ in what.answers}
    if without:
        raise ConfigError(
            f"Worker {worker} has no answer in these rounds of --rounds: {rounds_text(without)}; "
            "leave them out."
        )


@app.command()
def probe(
    config: Annotated[Path, typer.Option(help="the coordinator's TOML file")],
    data: Annotated[
        Path,
        typer.Option(
            callback=user_path,
            help="rows like the workers': a JSONL, CSV or Parquet file, or a folder",
        ),
    ],
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="workers of the run; default: the run's workers_min or quorum"),
    ] = None,
    passes: Annotated[
        int | None,
        typer.Option(min=1, help="most forward passes of a batch; default: 5 % of the run's"),
    ] = None,
    format_: Format = OutputFormat.TEXT,
    as_json: AsJson = False,
    threads: Threads = None,
) -> None:
    """Measure which eps and learning rate suit a run, before it begins; see docs/choosing.md."""
    check_data(data)
    settings = load_settings(
        CoordinatorSettings, ["--config", str(config)], program="fedmezo probe"
    )
    run = settings.run_config(f"[run] in {config}", rate_comes_later=True)
    with worker_packages("probe a run"):
        from fedmezo_coordinator.programs.probing_view import (
            probe_run,
            proposal_lines,
            proposal_values,
        )
    result = probe_run(
        settings,
        run,
        data,
        workers=workers or run.workers_expected,
        passes=passes,
        threads=threads,
    )
    lines = "\n".join(proposal_lines(result))
    say(chosen_format(format_, as_json), lines, proposal_values(result))


@app.command()
def privacy(
    ledger: Annotated[Path, typer.Argument(callback=user_path, help="a worker's privacy_ledger")],
    delta: Annotated[
        float, typer.Option(callback=finite, help="the worker's privacy_delta")
    ] = 1e-5,
    format_: Format = OutputFormat.TEXT,
    as_json: AsJson = False,
) -> None:
    """Say how much of their privacy a worker's rows have given away."""
    with worker_packages("keep the account of privacy"):
        from fedmezo_core.zo.privacy.accounting import epsilon_of
        from fedmezo_core.zo.privacy.ledger import read_ledger, steps_in
    if not 0 < delta < 1:
        raise ConfigError(f"--delta {delta:g} is no chance between 0 and 1; give the worker's.")
    entries = read_ledger(ledger)
    runs = {entry.run.partition(":")[0]: entry.round for entry in entries}
    spent = epsilon_of(steps_in(entries), delta)
    lines = [
        f"epsilon {spent:.2f} at delta {delta:g}, for {counted(len(entries), 'measurement')}",
        *(f"  run {run}: up to round {newest}" for run, newest in runs.items()),
    ]
    values = {"epsilon": spent, "delta": delta, "measurements": len(entries)}
    say(
        chosen_format(format_, as_json),
        "\n".join(lines),
        {**values, "newest_rounds": runs},
    )


@app.command()
def split(
    data: Annotated[
        Path,
        typer.Argument(
            callback=user_path,
            help="rows to split: a JSONL, CSV or Parquet file, or a folder of them",
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder to write; must be new or empty")],
    splitter: Annotated[
        Splitter,
        typer.Option(
            help="iid: equal shares at random; dirichlet: uneven shares of each class of --by; "
            "category: whole categories of --by"
        ),
    ] = Splitter.IID,
    workers: Annotated[
        int | None,
        typer.Option(
            help="number of workers; for category the default is the number of categories"
        ),
    ] = None,
    names: Annotated[str, typer.Option(help="names of the workers, separated by commas")] = "",
    by: Annotated[str | None, typer.Option(help="column that holds the class or category")] = None,
    alpha: Annotated[
        float | None,
        typer.Option(callback=finite, help="dirichlet: smaller is more uneven (default 0.5)"),
    ] = None,
    rows_min: Annotated[
        int | None,
        typer.Option(
            help="dirichlet: fewest rows of a worker, filled up from the largest (default 1)"
        ),
    ] = None,
    heldout: Annotated[
        str, typer.Option(help="rows to hold out first: a share below 1, or a number of rows")
    ] = "0.1",
    seed: Annotated[
        int, typer.Option(min=0, help="the same seed and rows give the same files")
    ] = 1,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Split rows into one file for each worker and one of held-out rows, for an experiment."""
    check_data(data)
    options = SplitOptions(
        splitter=splitter,
        workers=workers,
        names=tuple(name.strip() for name in names.split(",")) if names else (),
        by=by,
        alpha=alpha,
        rows_min=rows_min,
        heldout=heldout,
        seed=seed,
    )
    written = split_file(data, out, options)
    if format_ is OutputFormat.TEXT:
        console = Console()
        console.print(split_view(written, console.width))
    say(
        format_,
        f"{out}: {', '.join(part.file_name for part in written.parts)}",
        {"out": str(out), "files": split_values(written), "moved_rows": written.moved_count},
    )


# ---------------------------------------------------------------- parts


@dataclass(frozen=True, slots=True)
class _Verified:
    """A journal that is sound, and what it holds."""

    run_id: str
    record_count: int
    """Records that are there."""
    epoch: int
    round: int
    head: bytes
    origin: SealedState | None
    """What stands for the records that were dropped, if any were."""
    signed: records.SignedHead | None
    """The newest signed head in it, whose signature was checked."""

    def line(self) -> str:
        """A sentence for a person."""
        before = ","
        if self.origin is not None:
            before = (
                f" after {self.origin.seqno} that were dropped, up to round {self.origin.round} "
                f"({_signed_by(self.origin.key)}),"
            )
        line = (
            f"sound: {counted(self.record_count, 'record')}{before} run {self.run_id}, "
            f"{counted(self.epoch, 'coordinator start')}, {counted(self.round, 'round')} "
            f"committed, head {self.head.hex()}"
        )
        if self.signed is not None:
            return (
                f"{line}; signed up to round {self.signed.round} by {self.signed.key.hex()}, "
                "signatures checked"
            )
        if self.origin is not None and self.origin.key:
            return line
        return f"{line}; no signed heads in it, so the coordinator's signature was not checked"

    def values(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "run_id": self.run_id,
            "records": self.record_count,
            "epoch": self.epoch,
            "round": self.round,
            "head": self.head,
            "dropped_round": None if self.origin is None else self.origin.round,
            "signed_round": None if self.signed is None else self.signed.round,
            "key": None if self.signed is None else self.signed.key,
        }


def _verified_run(journal: Journal, audit: SignatureAudit | None = None) -> _Verified:
    """Verify and replay a journal, with its signatures by `audit`."""
    machine, count = RoundMachine(), 0
    signed: records.SignedHead | None = None
    origin = journal.origin()
    if origin is not None:
        machine.restore(state_of(origin))
    for entry, record in verified(journal):
        machine.apply(record)
        if audit is not None:
            audit.take(entry, record, machine.state)
        if isinstance(record, records.SignedHead) and record.signature:
            signed = record
        count += 1
    if len(journal) == 0:
        raise JournalCorruptError("The journal is empty: no run has begun in it.")
    return _Verified(
        run_id=machine.config.run_id,
        record_count=count,
        epoch=machine.epoch,
        round=machine.round,
        head=journal.head,
        origin=origin,
        signed=signed,
    )


def _origin_line(origin: SealedState) -> str:
    return (
        f"{origin.seqno - 1:>8}  {origin.chain.hex()[:12]}  origin     records 0 to "
        f"{origin.seqno - 1}, up to round {origin.round}, were dropped; head "
        f"{origin.head.hex()[:16]}, {_signed_by(origin.key)}"
    )


def _signed_by(key: bytes) -> str:
    return f"signed by {key.hex()}" if key else "not signed"


def _line(row: Row, record: records.Record) -> str:
    match record:
        case records.Genesis(config):
            base = record.base_digest.hex()[:16]
            text = f"genesis    run {config.run_id} on {config.model}, base {base}"
        case records.Started(epoch):
            text = f"started    epoch {epoch}"
        case records.Opened(round_, first_slot, workers):
            text = f"opened     round {round_}, slots from {first_slot}: {', '.join(workers)}"
        case records.Answered(round_, slot):
            grads = record.projected_grads
            text = f"answered   round {round_}, slot {slot}, {len(grads)} projected gradients"
        case records.Committed(round_, runs):
            base = " from the base" if record.from_base else ""
            ages = [round_ - answer.round for answer in record.answers]
            old = f", answers {', '.join(map(str, ages))} rounds old" if ages else ""
            text = f"committed  round {round_}, {len(runs)} runs, {record.pairs} pairs{base}{old}"
        case records.Diverged(round_, party):
            text = f"diverged   {party} after round {round_}"
        case records.Evaluated(round_, loss, accuracy, rows):
            text = (
                f"evaluated  round {round_}: loss {loss:.4f}, accuracy {accuracy:.4f}, {rows} rows"
            )
        case records.Paused(round_, reason):
            text = f"paused     after round {round_}: {reason}"
        case records.Resumed(rate_factor):
            text = f"resumed    learning rates times {rate_factor:g}"
        case records.Excluded(round_, worker, reason):
            text = f"excluded   {worker} after round {round_}: {reason}"
        case records.Readmitted(round_, worker):
            text = f"readmitted {worker} after round {round_}"
        case records.Stopped(round_, reason):
            text = f"stopped    after round {round_}: {reason}"
        case records.SignedHead(epoch, round_, head):
            signed = f"signed by {record.key.hex()[:16]}" if record.signature else "not signed"
            text = f"checkpoint epoch {epoch}, round {round_}, head {head.hex()[:16]}, {signed}"
        case records.Snapshotted(round_):
            text = f"snapshot   of round {round_}: {record.file_bytes} bytes"
        case records.Admitted(worker, key):
            text = f"admitted   {worker} signs with key {key.hex()}"
        case records.Masked(round_, slots):
            text = f"masked     round {round_}, the sum of slots {', '.join(map(str, slots))}"
        case records.Summed(round_, sums):
            text = f"summed     round {round_}, {len(sums)} sums"
    return f"{row.seqno:>8}  {row.chain.hex()[:12]}  {text}"


if __name__ == "__main__":
    sys.exit(main())
