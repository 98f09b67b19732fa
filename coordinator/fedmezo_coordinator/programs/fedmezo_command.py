"""`fedmezo`: split data, choose a rate, watch a run, check its journal, export its model."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from fedmezo.auditing import TOLERANCE, audit_of, rounds_in, rounds_text
from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.programs.bars import show_bar
from fedmezo_coordinator.programs.conformance_command import conformance_app
from fedmezo_coordinator.programs.connecting import (
    Coordinator,
    Link,
    State,
    Tls,
    TlsCa,
    link_to,
    user_path,
)
from fedmezo_coordinator.programs.fleet_command import add_to
from fedmezo_coordinator.programs.plain_values import (
    json_line,
    origin_values,
    record_values,
    status_values,
)
from fedmezo_coordinator.programs.rebuilding import plan_of, take_snapshot
from fedmezo_coordinator.programs.signature_audit import SignatureAudit
from fedmezo_coordinator.programs.split_files import SplitOptions, Splitter, split_file, split_view
from fedmezo_coordinator.programs.view import (
    Pace,
    agreement,
    counted,
    run_line,
    run_view,
)
from fedmezo_coordinator.stores.companions import Companions
from fedmezo_coordinator.stores.location import journal_shown, path_beside
from fedmezo_coordinator.stores.opening import open_store
from fedmezo_core import records
from fedmezo_core.errors import ConfigError, DivergedError, JournalCorruptError, StartingError
from fedmezo_core.journal.journal import Journal, MemoryStore, Row
from fedmezo_core.journal.party_copy import verified
from fedmezo_core.journal.sealed import SealedState, StoredState
from fedmezo_core.layered_settings import installed_version, load_settings
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.machines.state_codec import state_of
from fedmezo_core.program import (
    long_step,
    run_program,
    show_steps_with,
    step_log,
    worker_packages,
)
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.reconnecting import Reconnecting
from fedmezo_proto.v1 import coordinator_pb2 as wire

log = logging.getLogger("fedmezo.command")

app = typer.Typer(
    name="fedmezo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
journal_app = typer.Typer(
    help="Read a journal: a file, a database, or the journal of a running coordinator.",
    no_args_is_help=True,
)
app.add_typer(journal_app, name="journal")
app.add_typer(conformance_app, name="conformance")
add_to(app)


JournalArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="JOURNAL",
        help="journal of a stopped coordinator, a file or a postgresql:// URL; "
        "default: read it from --coordinator",
    ),
]
OutputFolder = Annotated[Path, typer.Argument(help="folder to write; must be new or empty")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads")]


def main() -> int:
    """Run `fedmezo`; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    for own in (log, step_log):
        own.setLevel(logging.INFO)
    if sys.stderr.isatty():
        show_steps_with(show_bar)
    return run_program("fedmezo", lambda: app(standalone_mode=True))


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
    as_json: Annotated[bool, typer.Option("--json", help="print the status as JSON")] = False,
) -> None:
    """Show the progress, workers, traffic, digests and evaluations of a run."""
    answer = asyncio.run(_status(link_to(coordinator, tls_ca, tls, state)))
    if as_json:
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
    every_s: Annotated[float, typer.Option(min=0.1, help="seconds between two updates")] = 1.0,
) -> None:
    """Show a run until it is finished and evaluated; Ctrl-C stops the display, not the run."""
    asyncio.run(_watch(link_to(coordinator, tls_ca, tls, state), every_s))


@journal_app.command()
def inspect(
    journal: JournalArgument = None,
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    from_seqno: Annotated[int, typer.Option(min=0, help="first record to print")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object on each line")
    ] = False,
) -> None:
    """Print the journal's records, one on each line."""
    with _opened(journal, lambda: link_to(coordinator, tls_ca, tls, state)) as source:
        origin = source.origin()
        if origin is not None and from_seqno < origin.seqno:
            print(json_line(origin_values(origin)) if as_json else _origin_line(origin))
        for entry, record in verified(source):
            if entry.row.seqno >= from_seqno:
                if as_json:
                    print(json_line(record_values(entry.row, record)))
                else:
                    print(_line(entry.row, record))


@journal_app.command()
def verify(
    journal: JournalArgument = None,
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    signatures: Annotated[
        bool, typer.Option("--signatures", help="check the signature of each worker's answer too")
    ] = False,
) -> None:
    """Check the records' hashes, order, meaning and number, and print the journal's head."""
    with _opened(journal, lambda: link_to(coordinator, tls_ca, tls, state)) as source:
        audit = SignatureAudit(source.origin()) if signatures else None
        line = _verified_line(source, audit)
        if journal:
            Companions(journal).check(source)
        print("\n".join([line, *(audit.lines() if audit else ())]))


@journal_app.command()
def restore(
    copy: Annotated[
        str, typer.Argument(help="the journal_copy of a worker or relay, or another journal")
    ],
    journal: Annotated[
        str, typer.Argument(help="journal to write: a new file, or the URL of an empty journal")
    ],
) -> None:
    """Write a coordinator's journal from a copy that is verified first, to continue the run."""
    with _opened(copy, None) as verifying:
        line = _verified_line(verifying)
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
    print(f"{line}\nwrote {journal_shown(journal)}")
    if origin is not None:
        print(
            "its first records were dropped, so workers begin from a snapshot: put the run's "
            f"snapshots into {path_beside(journal, '.snapshots')}"
        )


@app.command()
def export(
    folder: OutputFolder,
    model: Annotated[
        str, typer.Option(help="base model: hub name or folder; default: the name in the journal")
    ] = "",
    adapter: Annotated[
        Path | None, typer.Option(help="folder of the adapter that the run began from, if any")
    ] = None,
    adapter_only: Annotated[
        bool,
        typer.Option("--adapter-only", help="write only the run's LoRA adapter, in peft's layout"),
    ] = False,
    journal: Annotated[
        str | None,
        typer.Option(
            help="journal of a stopped coordinator, a file or a postgresql:// URL; "
            "default: read it from --coordinator"
        ),
    ] = None,
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    round_: Annotated[
        int | None,
        typer.Option("--round", min=0, help="round whose weights to write; default: the last"),
    ] = None,
    best: Annotated[
        bool,
        typer.Option("--best", help="write the weights with the smallest held-out loss"),
    ] = False,
    snapshots: Annotated[
        Path | None,
        typer.Option(
            help="folder of the run's snapshots, needed if the journal's first records were "
            "dropped; default: next to --journal"
        ),
    ] = None,
    threads: Threads = None,
) -> None:
    """Rebuild the model from its base and the journal, and write a Hugging Face folder.

    If the journal's oldest records were dropped, the model is rebuilt from a snapshot instead.
    """
    if best and round_ is not None:
        raise ConfigError("--best and --round each choose the round; leave one of them out.")
    with _opened(journal, lambda: link_to(coordinator, tls_ca, tls, state)) as source:
        plan = plan_of(source, round_, best=best)
    genesis, commits = plan.genesis, plan.commits
    if adapter_only and genesis.config.lora is None:
        raise ConfigError("--adapter-only: this run trains no adapter; leave it out.")
    with worker_packages("export"):
        from fedmezo_core.zo.commits import commits_of
        from fedmezo_core.zo.export import export_adapter, export_model
        from fedmezo_core.zo.model.loading import folder_of_hub_name
        from fedmezo_core.zo.model.model_card import ModelCard
        from fedmezo_core.zo.party import open_party
    source_folder = model or str(folder_of_hub_name(genesis.config.model))
    party = open_party(genesis.config, source_folder, adapter=adapter, threads=threads)
    party.check_same_base(genesis)
    if plan.snapshot is not None:
        take_snapshot(
            party.weights,
            plan.snapshot,
            snapshots or (path_beside(journal, ".snapshots") if journal else None),
            link_to(coordinator, tls_ca, tls, state).client,
            genesis.config.run_id,
        )
    if commits:
        with long_step(
            f"replaying {counted(len(commits), 'commit')}", genesis.trainable_elements, "weights"
        ) as step:
            party.weights.apply(commits[0].round, commits_of(commits), step.advance)
    with long_step("digesting the weights"):
        digest = party.weights.digest()
    plan.check(digest)
    card = ModelCard(genesis.config.model, genesis.config.run_id, plan.facts(digest))
    with long_step(f"writing {folder}"):
        (export_adapter if adapter_only else export_model)(party.loaded, folder, card)
    what = "adapter" if adapter_only else "model"
    after = f"round {party.weights.round}"
    if plan.best is not None:
        after += f", the best evaluated one (loss {plan.best.loss:.4f})"
    print(f"{folder}: the {what} after {after}, weights digest {digest.hex()}")


@app.command()
def adapter(
    folder: OutputFolder,
    config: Annotated[
        Path, typer.Option(help="the coordinator's TOML file; its run must train a LoRA adapter")
    ],
    data: Annotated[
        Path,
        typer.Option(help="rows like the workers': a JSONL, CSV or Parquet file, or a folder"),
    ],
    rows_max: Annotated[int, typer.Option(min=1, help="most rows to read")] = 1000,
    threads: Threads = None,
) -> None:
    """Fit the adapter that a run begins from to texts; see docs/configuration.md."""
    settings = load_settings(
        CoordinatorSettings, ["--config", str(config)], program="fedmezo adapter"
    )
    with worker_packages("fit an adapter"):
        from fedmezo_core.zo.data.rows import read_rows
        from fedmezo_core.zo.export import write_adapter
        from fedmezo_core.zo.fitting import fit_adapter
        from fedmezo_core.zo.model.model_card import ModelCard
        from fedmezo_core.zo.party import open_party
    run = settings.run_config(f"[run] in {config}", rate_comes_later=True)
    if run.lora is None:
        raise ConfigError(
            f"{config} has no [run.lora], so there is no adapter to fit; add that table."
        )
    party = open_party(run, settings.model, threads=threads)
    party.check_can_begin()
    rows = read_rows(data, run.task)[:rows_max]
    fit_adapter(party, rows)
    facts = {"Round": f"0: fitted to {len(rows)} rows, for the run to begin from"}
    write_adapter(party.loaded, folder, ModelCard(run.model, run.run_id, facts))
    print(
        f"{folder}: an adapter of rank {run.lora.rank} fitted to {len(rows)} rows; set adapter = "
        f'"{folder}" at the coordinator and at every worker'
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
) -> None:
    """Write a form of a run's base for workers without torch; see docs/edge.md."""
    settings = load_settings(
        CoordinatorSettings, ["--config", str(config)], program="fedmezo export-form"
    )
    with worker_packages("export a form of a base"):
        from fedmezo_core.zo.edge.edge_export import export_gguf_form, export_onnx_form
        from fedmezo_core.zo.party import open_party
    run = settings.run_config(f"[run] in {config}", rate_comes_later=True)
    party = open_party(run, settings.model, adapter=settings.adapter, threads=threads)
    if gguf is None:
        name = export_onnx_form(party, folder)
    else:
        name = export_gguf_form(party, folder, gguf)
    print(
        f"{folder}: a form of the base of run {run.run_id}; add it to the contract: "
        f'base_forms = ["{name}"]'
    )


@app.command()
def audit(
    worker: Annotated[str, typer.Option(help="name of the worker whose answers are repeated")],
    data: Annotated[
        Path, typer.Option(help="the rows that it measured on, in files as it was given them")
    ],
    rounds: Annotated[
        str, typer.Option(help="rounds to repeat, as in 3,7,11-13; default: all that it answered")
    ] = "",
    tolerance: Annotated[
        float, typer.Option(min=0, help="largest difference that another kind of machine may make")
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
    journal: Annotated[
        str | None,
        typer.Option(
            help="journal of a stopped coordinator, a file or a postgresql:// URL; "
            "default: read it from --coordinator"
        ),
    ] = None,
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    threads: Threads = None,
) -> None:
    """Measure again what a worker has answered, on its rows, and compare; see docs/operating.md."""
    wanted_rounds = rounds_in(rounds)
    with _opened(journal, lambda: link_to(coordinator, tls_ca, tls, state)) as source:
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
        print(repeated.line(tolerance), flush=True)
        verdicts[repeated.verdict(tolerance)] += 1
    found = ", ".join(
        f"{count} {'differ' if verdict == 'differs' and count > 1 else verdict}"
        for verdict, count in sorted(verdicts.items())
    )
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
        typer.Option(help="rows like the workers': a JSONL, CSV or Parquet file, or a folder"),
    ],
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="workers of the run; default: the run's workers_min or quorum"),
    ] = None,
    passes: Annotated[
        int | None,
        typer.Option(min=1, help="most forward passes of a batch; default: 5 % of the run's"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
    threads: Threads = None,
) -> None:
    """Measure which eps and learning rate suit a run, before it begins; see docs/choosing.md."""
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
    print(json_line(proposal_values(result)) if as_json else "\n".join(proposal_lines(result)))


@app.command()
def privacy(
    ledger: Annotated[Path, typer.Argument(callback=user_path, help="a worker's privacy_ledger")],
    delta: Annotated[float, typer.Option(help="the worker's privacy_delta")] = 1e-5,
    as_json: Annotated[bool, typer.Option("--json", help="print the account as JSON")] = False,
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
    if as_json:
        values = {"epsilon": spent, "delta": delta, "measurements": len(entries)}
        print(json_line(values | {"newest_rounds": runs}))
        return
    print(f"epsilon {spent:.2f} at delta {delta:g}, for {counted(len(entries), 'measurement')}")
    for run, newest in runs.items():
        print(f"  run {run}: up to round {newest}")


@app.command()
def split(
    data: Annotated[
        Path,
        typer.Argument(help="rows to split: a JSONL, CSV or Parquet file, or a folder of them"),
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
        typer.Option(help="dirichlet: smaller is more uneven (default 0.5)"),
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
) -> None:
    """Split rows into one file for each worker and one of held-out rows, for an experiment."""
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
    console = Console()
    console.print(split_view(written, console.width))
    print(f"{out}: {', '.join(part.file_name for part in written.parts)}")


# ---------------------------------------------------------------- parts


async def _status(link: Link) -> wire.GetStatusResponse:
    async with link.client() as client:
        return await client.get_status()


async def _watch(link: Link, every_s: float) -> None:
    console = Console()
    async with link.client() as client:
        answer = await _first_status(client)
        pace = Pace()
        shown = ""
        with Live(console=console, auto_refresh=False) as live:
            while True:
                left = pace.seconds_left(answer, time.monotonic())
                if console.is_terminal:
                    live.update(run_view(answer, seconds_left=left), refresh=True)
                elif run_line(answer) != shown:
                    shown = run_line(answer)
                    print(shown, flush=True)
                if answer.phase == wire.PHASE_FINISHED and not answer.evaluation_due:
                    return
                await asyncio.sleep(every_s)
                answer = await client.get_status()


async def _first_status(client: CoordinatorClient) -> wire.GetStatusResponse:
    """The status of a run, once its coordinator has started."""
    reconnecting = Reconnecting(log)
    while True:
        try:
            return await client.get_status()
        except StartingError as error:
            await reconnecting.wait_after(error)


@contextmanager
def _opened(journal: str | None, link: Callable[[], Link] | None) -> Iterator[Journal]:
    """Open a journal, or a copy of the one that a coordinator sends; one of the two is given."""
    if journal:
        store = open_store(journal, read_only=True)
    else:
        assert link is not None
        store = asyncio.run(_fetched(link()))
    try:
        yield Journal(store)
    finally:
        store.close()


def _verified_line(journal: Journal, audit: SignatureAudit | None = None) -> str:
    """Verify and replay a journal, with its signatures by `audit`; returns a line about its run."""
    machine, count, before = RoundMachine(), 0, ""
    signed: records.SignedHead | None = None
    origin = journal.origin()
    if origin is not None:
        machine.restore(state_of(origin))
        before = (
            f" after {origin.seqno} that were dropped, up to round {origin.round} "
            f"({_signed_by(origin.key)}),"
        )
    for entry, record in verified(journal):
        machine.apply(record)
        if audit is not None:
            audit.take(entry, record, machine.state)
        if isinstance(record, records.SignedHead) and record.signature:
            signed = record
        count += 1
    if len(journal) == 0:
        raise JournalCorruptError("The journal is empty: no run has begun in it.")
    line = (
        f"sound: {counted(count, 'record')}{before or ','} run {machine.config.run_id}, "
        f"{counted(machine.epoch, 'coordinator start')}, {counted(machine.round, 'round')} "
        f"committed, head {journal.head.hex()}"
    )
    if signed is None:
        is_signed = origin is not None and origin.key
        if is_signed:
            return line
        return f"{line}; no signed heads in it, so the coordinator's signature was not checked"
    return f"{line}; signed up to round {signed.round} by {signed.key.hex()}, signatures checked"


async def _fetched(link: Link) -> MemoryStore:
    store = MemoryStore()
    async with link.client() as client:
        with long_step(f"fetching the journal of {link.address}", unit="records") as step:
            async for page in client.journal_pages():
                if page.origin:
                    store.drop_before(StoredState.received(page.origin))
                store.append([Row(e.seqno, e.record, e.chain) for e in page.entries])
                step.advance(len(page.entries))
    return store


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
