"""`fedmezo export`, `rebuild`, `generate` and `evaluate`: take a model home, and try it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.programs.connecting import (
    Coordinator,
    JournalOption,
    Link,
    RunId,
    State,
    Tls,
    TlsCa,
    check_data,
    link_to,
    opened_journal,
    signed_head_from,
    user_path,
)
from fedmezo_coordinator.programs.plain_values import Format, say
from fedmezo_coordinator.programs.taking_home.journal_file import (
    adapter_beside,
    copy_adapter,
    signer_of,
    write_journal_file,
)
from fedmezo_coordinator.programs.taking_home.rebuilding import (
    Plan,
    plan_of,
    rebuild_weights,
    take_snapshot,
)
from fedmezo_coordinator.programs.taking_home.start_adapter import start_adapter
from fedmezo_coordinator.programs.view import size_text
from fedmezo_coordinator.stores.location import path_beside
from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ConfigError
from fedmezo_core.layered_settings import OutputFormat, load_settings
from fedmezo_core.program import long_step, worker_packages

if TYPE_CHECKING:
    from fedmezo_core.zo.trying import FinishedModel


class ExportAs(StrEnum):
    """What an export is."""

    MODEL = "model"
    ADAPTER = "adapter"
    GGUF = "gguf"
    JOURNAL = "journal"


StartAdapter = Annotated[
    Path | None,
    typer.Option(
        help="folder of the adapter that the run began from, if any; default: the one beside the "
        "journal, or the coordinator's"
    ),
]
LastRound = Annotated[
    int | None,
    typer.Option("--round", min=0, help="round whose weights to write; default: the last"),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads")]


Finished = Annotated[
    Path,
    typer.Argument(
        metavar="FOLDER", callback=user_path, help="model or adapter that fedmezo export wrote"
    ),
]
AdapterBase = Annotated[
    str,
    typer.Option(
        "--model",
        help="base of an exported adapter: hub name or folder; default: the contract's name",
    ),
]
Contract = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="a coordinator's TOML file that says how rows are written; default: what the export "
        "has kept",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto")]


def add_to(app: typer.Typer) -> None:
    """Add these commands to `fedmezo`."""
    for command in (export, rebuild, generate, evaluate):
        app.command()(command)


def export(
    out: Annotated[
        Path,
        typer.Argument(help="folder to write (new or empty), or with --as journal a new file"),
    ],
    as_: Annotated[
        ExportAs,
        typer.Option(
            "--as",
            help="model: a Hugging Face folder; adapter: the LoRA adapter alone, in peft's layout; "
            "gguf: the adapter for llama.cpp; journal: a small file that rebuilds the model from "
            "its base",
        ),
    ] = ExportAs.MODEL,
    model: Annotated[
        str, typer.Option(help="base model: hub name or folder; default: the name in the journal")
    ] = "",
    adapter: StartAdapter = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="the same as --as adapter")
    ] = False,
    journal: JournalOption = None,
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    run_id: RunId = "",
    round_: LastRound = None,
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
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Rebuild the model from its base and the journal, and write it in the form that --as names.

    If the journal's oldest records were dropped, the model is rebuilt from a snapshot instead.
    """
    if best and round_ is not None:
        raise ConfigError("--best and --round each choose the round; leave one of them out.")
    if adapter_only:
        if as_ not in (ExportAs.MODEL, ExportAs.ADAPTER):
            raise ConfigError(f"--adapter-only is --as adapter, not {as_}; leave it out.")
        as_ = ExportAs.ADAPTER

    def link() -> Link:
        return link_to(coordinator, tls_ca, tls, state, run_id)

    if as_ is ExportAs.JOURNAL:
        _export_journal(out, journal, adapter, link, run_id, round_, best=best, format_=format_)
        return
    with opened_journal(journal, link, run_id) as source:
        plan = plan_of(source, round_, best=best)
    if snapshots is None and journal:
        snapshots = path_beside(journal, ".snapshots")
    client = None if journal else link().client
    with start_adapter(adapter, journal, plan.genesis.config, client) as begins_from:
        _write_rebuilt(
            out, as_, plan, model, begins_from, threads, format_, snapshots=snapshots, link=link
        )


def rebuild(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="what fedmezo export --as journal wrote, or another journal"
        ),
    ],
    model: Annotated[str, typer.Option(help="base model: hub name or folder")],
    out: Annotated[Path, typer.Option(help="folder to write; must be new or empty")],
    as_: Annotated[
        ExportAs, typer.Option("--as", help="model, adapter or gguf, as in fedmezo export")
    ] = ExportAs.MODEL,
    adapter: StartAdapter = None,
    round_: LastRound = None,
    threads: Threads = None,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Rebuild a model from its base and a file of its run, with every hash and signature checked.

    The weights must have the digest that the run's own evaluation had.
    """
    if as_ is ExportAs.JOURNAL:
        raise ConfigError("--as journal: the file is a journal already; copy it.")
    with opened_journal(file, None) as source:
        plan = plan_of(source, round_)
    snapshots = path_beside(file, ".snapshots")
    with start_adapter(adapter, file, plan.genesis.config, None) as begins_from:
        _write_rebuilt(out, as_, plan, model, begins_from, threads, format_, snapshots=snapshots)


def generate(
    folder: Finished,
    text: Annotated[
        str,
        typer.Argument(help="the value of the template's column; of several, a JSON object"),
    ],
    raw: Annotated[
        bool, typer.Option("--raw", help="go on from the text itself, without the template")
    ] = False,
    tokens_max: Annotated[
        int, typer.Option(min=1, max=4096, help="most tokens to write, for a run of instructions")
    ] = 128,
    model: AdapterBase = "",
    config: Contract = None,
    device: Device = "cpu",
    threads: Threads = None,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Let an exported model answer a text, through its run's template.

    A classification answers with a class, everything else with the likeliest words.
    """
    finished = _opened(folder, model, config, device, threads)
    from fedmezo_core.zo.trying import row_of

    task = finished.task.config
    values: dict[str, Any]
    if raw:
        answer = finished.continued(text, tokens_max)
        values = {"text": answer}
    elif task.kind == "classification":
        shares = finished.likelihoods(row_of(task, text))
        label = max(shares, key=lambda one: shares[one])
        answer = f"{label} ({', '.join(f'{one} {share:.3f}' for one, share in shares.items())})"
        values = {"label": label, "probabilities": shares}
    else:
        answer = finished.generated(row_of(task, text), tokens_max)
        values = {"text": answer}
    say(format_, answer, values)


def evaluate(
    folder: Finished,
    data: Annotated[
        Path,
        typer.Option(
            callback=user_path,
            help="rows like the run's: a JSONL, CSV or Parquet file, or a folder",
        ),
    ],
    batch_size: Annotated[
        int, typer.Option(min=1, help="rows at a time; the coordinator's evaluate_batch_size")
    ] = 32,
    model: AdapterBase = "",
    config: Contract = None,
    device: Device = "cpu",
    threads: Threads = None,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Compute an exported model's loss and accuracy on rows, as the run's coordinator does."""
    check_data(data)
    finished = _opened(folder, model, config, device, threads)
    found = finished.evaluate(data, batch_size)
    auc = "" if found.auc is None else f", AUC {found.auc:.4f}"
    text = (
        f"loss {found.loss:.4f}, accuracy {100 * found.accuracy:.1f} %{auc}, on "
        f"{found.row_count} rows"
    )
    say(format_, text, dataclasses.asdict(found))


# ---------------------------------------------------------------- parts


def _export_journal(
    out: Path,
    journal: str | None,
    adapter: Path | None,
    link: Callable[[], Link],
    run_id: str,
    round_: int | None,
    *,
    best: bool,
    format_: OutputFormat,
) -> None:
    beside = adapter_beside(out)
    # Asked before the journal is fetched, so that its commits are there.
    known_head = None if journal else signed_head_from(link())
    with opened_journal(journal, link, run_id) as source:
        if best:
            round_ = plan_of(source, None, best=True).round
        written = write_journal_file(
            source,
            out,
            round_,
            signer=signer_of(journal) if journal else None,
            known_head=known_head,
        )
    client = None if journal else link().client
    try:
        with start_adapter(adapter, journal, written.run, client) as begins_from:
            has_adapter = begins_from is not None and written.run.lora is not None
            if begins_from is not None and has_adapter:
                copy_adapter(begins_from, beside)
    except BaseException:
        out.expanduser().unlink(missing_ok=True)
        raise
    signed = written.signed
    by = (
        f"signed up to round {signed.round} by {signed.key.hex()}"
        if signed.signature
        else "not signed"
    )
    digest = (
        "without a digest of weights, because nobody has evaluated them"
        if written.evaluated_round is None
        else f"with the digest of the weights after round {written.evaluated_round}"
    )
    start = ""
    if has_adapter:
        start = f"; hand over {beside} with it, the adapter that the run began from"
    elif written.run.lora is not None:
        start = "; if the run began from an adapter, rebuild needs that too (--adapter)"
    say(
        format_,
        f"{out}: the journal up to round {written.round}, {size_text(written.byte_count)}, head "
        f"{written.head.hex()}, {by}, {digest}{start}",
        {
            "out": str(out),
            "as": ExportAs.JOURNAL,
            "run_id": written.run.run_id,
            "round": written.round,
            "head": written.head,
            "bytes": written.byte_count,
            "signed_round": signed.round if signed.signature else None,
            "key": signed.key if signed.signature else None,
            "evaluated_round": written.evaluated_round,
            "adapter": str(beside) if has_adapter else None,
        },
    )


def _write_rebuilt(
    out: Path,
    as_: ExportAs,
    plan: Plan,
    model: str,
    adapter: Path | None,
    threads: int | None,
    format_: OutputFormat,
    *,
    snapshots: Path | None,
    link: Callable[[], Link] | None = None,
) -> None:
    """Rebuild the weights that `plan` leads to, and write them to the folder `out`."""
    genesis = plan.genesis
    if as_ is not ExportAs.MODEL and genesis.config.lora is None:
        raise ConfigError(f"--as {as_}: this run trains no adapter; leave it out.")
    with worker_packages("export"):
        from fedmezo_core.zo.export import export_adapter, export_gguf_adapter, export_model
        from fedmezo_core.zo.model.loading import folder_of_hub_name
        from fedmezo_core.zo.model.model_card import ModelCard
        from fedmezo_core.zo.party import open_party
    source_folder = model or str(folder_of_hub_name(genesis.config.model))
    party = open_party(genesis.config, source_folder, adapter=adapter, threads=threads)
    party.check_same_base(genesis)
    if plan.snapshot is not None:
        client = None if link is None else link().client
        take_snapshot(party.weights, plan.snapshot, snapshots, client, genesis.config.run_id)
    rebuilt = rebuild_weights(plan, party)
    digest = rebuilt.digest
    run = genesis.config
    card = ModelCard(run.model, run.run_id, plan.facts(digest), plan.run_file(digest))
    with long_step(f"writing {out}"):
        match as_:
            case ExportAs.ADAPTER:
                export_adapter(party.loaded, out, card)
            case ExportAs.GGUF:
                assert run.lora is not None
                export_gguf_adapter(party.loaded, out, card, alpha=run.lora.alpha)
            case _:
                export_model(party.loaded, out, card)
    after = f"round {plan.round}"
    if plan.best is not None:
        after += f", the best evaluated one (loss {plan.best.loss:.4f})"
    checked = rebuilt.checked_round
    compared = (
        "; the journal has no digest to compare it with"
        if checked is None
        else f"; the run's own digest after round {checked} is the same"
    )
    what = "model" if as_ is ExportAs.MODEL else "adapter"
    say(
        format_,
        f"{out}: the {what} after {after}, weights digest {digest.hex()}{compared}",
        {
            "out": str(out),
            "as": as_,
            "run_id": run.run_id,
            "round": plan.round,
            "head": plan.head,
            "weights_digest": digest,
            "checked_round": checked,
        },
    )


def _opened(
    folder: Path, model: str, config: Path | None, device: str, threads: int | None
) -> FinishedModel:
    if not folder.is_dir():  # Before what computes is loaded, which takes seconds.
        raise ConfigError(f"There is no folder {folder}; name one that fedmezo export wrote.")
    contract: RunConfig | None = None
    if config is not None:
        settings = load_settings(CoordinatorSettings, ["--config", str(config)], program="fedmezo")
        contract = settings.run_config(f"[run] in {config}", rate_comes_later=True)
    with worker_packages("try a model"):
        from fedmezo_core.zo.trying import open_finished
    return open_finished(folder, base=model, contract=contract, device=device, threads=threads)
