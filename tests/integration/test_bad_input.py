"""What is wrong ends in one sentence that says what to do, and never in a traceback."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.replica.replica import describe
from fedmezo_coordinator.replica.supervisor import describe_base
from fedmezo_core.errors import ConfigError, DataError, FedMezoError, JournalError, ModelError
from fedmezo_core.journal.codec import config_to_pb, decode_record
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.records import Genesis
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_worker import worker_command as worker_cli
from tests.integration.support.harness import (
    Program,
    Programs,
    answered_tickets,
    config_of,
    genesis_of,
    records_of,
    run_values,
    scripted_workers,
    served,
    until,
    write_genesis,
)
from tests.integration.support.parties import Workers, save_model


def only_sentence(program: Program, name: str) -> str:
    """What it said last, which must be its only complaint."""
    lines = program.said.strip().splitlines()
    assert lines[-1].startswith(f"{name}: "), program.said
    assert "Traceback" not in program.said
    return lines[-1]


# ---------------------------------------------------------------- a worker's input


@pytest.fixture(scope="module")
def address(
    tmp_path_factory: pytest.TempPathFactory, tiny_genesis: Callable[..., Genesis]
) -> Iterator[str]:
    """A coordinator that waits for more workers than come."""
    folder = tmp_path_factory.mktemp("coordinator")
    write_genesis(folder / "journal.db", tiny_genesis())
    programs = Programs(folder)
    try:
        _, coordinator = asyncio.run(
            programs.coordinator(folder / "journal.db", run_values(), "--no-replica")
        )
        yield coordinator
    finally:
        programs.end()


Said = Callable[..., str]


@pytest.fixture
def complaint(
    address: str, model_folder: Path, data_files: list[Path], capsys: pytest.CaptureFixture[str]
) -> Said:
    """Runs the worker's command in this process; its one line on standard error."""

    def run(*, status: int = 1, **changes: Any) -> str:
        flags: dict[str, Any] = {
            "coordinator": address,
            "name": "w1",
            "data": data_files[0],
            "model": model_folder,
            "threads": 1,
        }
        arguments = [f"--{k.replace('_', '-')}={v}" for k, v in (flags | changes).items()]
        assert worker_cli.main(arguments) == status
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("fedmezo-worker: ")
        return lines[0]

    return run


def test_a_data_file_that_is_not_there(complaint: Said, tmp_path: Path) -> None:
    assert f"There is no data file or folder {tmp_path}/x.jsonl" in complaint(
        status=2, data=tmp_path / "x.jsonl"
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b"", "has no rows"),
        ("rows.csv", b"text,label\n", "has no rows"),
        ("rows.jsonl", b'{"text": "a"', "is not JSON"),
        ("rows.jsonl", b'\xff\xfe{"text"', "is not UTF-8"),
        ("rows.parquet", b"PAR1 no, it is not", "is not a readable Parquet file"),
        ("rows.docx", b"text", "convert it to one"),
        ("rows.jsonl", b'{"text": "a"}\n', "has no column label; its columns are text"),
        ("rows.jsonl", b'{"label": "positive"}\n', "has no column text; its columns are label"),
        (
            "rows.jsonl",
            b'{"text": "a", "label": "so-so"}\n',
            "label 'so-so' is not among the run's labels ('negative', 'positive')",
        ),
    ],
)
def test_a_data_file_that_cannot_be_used(
    complaint: Said, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    said = complaint(data=path)
    assert words in said
    assert str(path) in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no rows"),
        (b'{"text": "a"}\n', "has no column label; its columns are text"),
        (b'{"text": "a", "label": "so-so"}\n', "label 'so-so' is not among the run's labels"),
    ],
)
def test_held_out_rows_that_cannot_be_used(
    complaint: Said, tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "heldout.jsonl"
    path.write_bytes(content)
    said = complaint(heldout=path)
    assert words in said
    assert str(path) in said
    assert f"There is no data file or folder {tmp_path}/gone.csv" in complaint(
        status=2, heldout=tmp_path / "gone.csv"
    )


def test_evaluations_that_cannot_be_written(
    complaint: Said, tmp_path: Path, data_files: list[Path]
) -> None:
    path = tmp_path / "nowhere" / "evaluations.jsonl"
    said = complaint(heldout=data_files[1], evaluations=path, status=2)
    assert f"evaluations = '{path}' cannot be written (No such file or directory)" in said
    assert "name another file" in said


def test_a_folder_without_data(complaint: Said, tmp_path: Path) -> None:
    assert "put .jsonl, .csv or .parquet files there" in complaint(data=tmp_path)


def test_a_model_folder_that_is_no_model(complaint: Said, tmp_path: Path) -> None:
    assert "is no model folder: it has no config.json" in complaint(model=tmp_path)
    assert "There is no model folder" in complaint(model=tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    assert "no .safetensors file" in complaint(model=tmp_path)


def test_a_checkpoint_that_is_cut_short(
    complaint: Said, model_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"The model in {copy} cannot be loaded" in complaint(model=copy)


def test_other_base_weights_are_refused_by_name(complaint: Said, tmp_path: Path) -> None:
    save_model(tmp_path / "other", change=1e-6)
    assert "The base weights loaded here differ from the run's" in complaint(
        model=tmp_path / "other"
    )


def test_another_architecture_is_refused_by_name(complaint: Said, tmp_path: Path) -> None:
    save_model(tmp_path / "other", layers=2)
    assert "The manifest (the trainable tensors) loaded here differ" in complaint(
        model=tmp_path / "other"
    )


def test_another_tokenizer_is_refused_by_name(
    complaint: Said, model_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    file = copy / "tokenizer.json"
    form = json.loads(file.read_text())
    form["model"]["merges"].pop()
    file.write_text(json.dumps(form))
    assert "The tokenizer (its vocabulary) loaded here differ" in complaint(model=copy)


def test_another_run_is_refused_by_name(complaint: Said) -> None:
    said = complaint(run_id="other-run")
    assert "Run 'other-run' is not served here; this coordinator serves 'tiny-run'" in said


def test_a_coordinator_that_does_not_answer(complaint: Said) -> None:
    said = complaint(coordinator="127.0.0.1:9", give_up_after_s=0)
    assert "No coordinator answers at 127.0.0.1:9" in said
    assert "check the address" in said


def test_a_ca_file_that_is_not_there(complaint: Said, tmp_path: Path) -> None:
    assert "cannot be read" in complaint(tls_ca=tmp_path / "ca.pem", status=2)


def test_a_wrong_flag_costs_no_import_of_torch(programs: Programs) -> None:
    program = programs.start("fedmezo_worker", "--name", "Bad Name", "--data", "x")
    assert asyncio.run(program.wait()) == 2
    assert "name = 'Bad Name' is not allowed" in only_sentence(program, "fedmezo-worker")


async def test_a_loss_that_is_no_number_is_reported_and_the_run_goes_on(
    workers: Workers, data_files: list[Path], tmp_path: Path, tiny_genesis: Callable[..., Genesis]
) -> None:
    genesis = tiny_genesis(eps=1e37, workers_min=1, quorum=1)
    async with served(tmp_path / "journal.db", genesis) as coordinator:
        working = workers.start(coordinator.address, "w1", data_files[0])

        async def complained() -> bool:
            status = coordinator.daemon.status("")
            return bool(status.workers and status.workers[0].complaint)

        await until(complained, "the worker's complaint")
        status = coordinator.daemon.status("")
        assert "is nan on the batch of round 1" in status.workers[0].complaint
        assert status.round == 0
        assert status.workers[0].connected
        assert not working.task.done()


# ---------------------------------------------------------------- what the coordinator loads


@pytest.mark.parametrize(
    ("changes", "run", "kind", "words"),
    [
        ({"model": "{tmp}"}, {}, ModelError, "is no model folder"),
        ({"heldout": "{tmp}/x.csv"}, {}, DataError, "There is no data file or folder"),
        ({"heldout": "{tmp}/odd.jsonl"}, {}, DataError, "label 'odd' is not among"),
        (
            {},
            {"task": {"verbalizers": {"a": " same", "b": " same"}}},
            FedMezoError,
            "begin with the same token",
        ),
        (
            {},
            {"task": {"tokens_max": 65, "verbalizers": {"a": " yes", "b": " no"}}},
            ConfigError,
            "tokens_max = 65 is more than the 64 positions of .*; set tokens_max = 64 or less",
        ),
    ],
    ids=["no model", "no held-out file", "held-out label", "verbalizers", "positions"],
)
def test_what_the_base_is_described_from(
    model_folder: Path,
    tmp_path: Path,
    changes: dict[str, str],
    run: dict[str, Any],
    kind: type[FedMezoError],
    words: str,
) -> None:
    (tmp_path / "odd.jsonl").write_text('{"text": "a", "label": "odd"}\n')
    orders = {
        "config": config_to_pb(config_of(**run)).SerializeToString().hex(),
        "model": str(model_folder),
        "adapter": None,
        "heldout": None,
        "threads": 1,
        "row_states_max": 0,
    }
    with pytest.raises(kind, match=words):
        describe(orders | {k: v.replace("{tmp}", str(tmp_path)) for k, v in changes.items()})


async def test_the_coordinator_warns_of_its_held_out_rows_too(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "heldout.jsonl"
    path.write_text('{"text": "' + "good " * 40 + '", "label": "positive"}\n')
    settings = CoordinatorSettings(
        journal=str(tmp_path / "journal.db"),
        model=str(model_folder),
        heldout=path,
        run=run_values(),
    )
    await describe_base(settings, config_of())
    [said] = [one for one in caplog.records if one.name == "fedmezo.coordinator"]
    assert said.levelno == logging.WARNING
    assert f"{path}: 1 rows, 1 of them cut to 32 tokens" in said.getMessage()


@pytest.mark.parametrize("key", ["heldout", "probe_rows", "adapter_rows", "adapter"])
async def test_a_file_that_is_missing_ends_the_start_before_a_model_is_loaded(
    programs: Programs, tmp_path: Path, key: str
) -> None:
    lora = {"rank": 2, "alpha": 2.0, "target_modules": ["c_fc"], "freeze_a": True}
    run = run_values(lora=lora) if "adapter" in key else run_values()
    if key == "probe_rows":
        del run["learning_rate"]
    program = programs.start(
        *("fedmezo_coordinator", "--config", programs.settings(run), "--model", "not-loaded"),
        *(f"--{key.replace('_', '-')}", tmp_path / "gone", "--journal", tmp_path / "journal.db"),
        *("--listen", "127.0.0.1:0"),
    )
    assert await program.wait() == 2
    said = only_sentence(program, "fedmezo-coordinator")
    assert f"folder {tmp_path}/gone; check {key}." in said
    assert not (tmp_path / "journal.db").exists()


# ---------------------------------------------------------------- the coordinator's journal


HAND_GENESIS = genesis_of(config_of(rounds=3, workers_min=1, quorum=1))
HAND_RUN = run_values(rounds=3, workers_min=1, quorum=1)


@pytest.fixture
async def journal(tmp_path: Path) -> Path:
    """The journal of a finished run without a model."""
    path = tmp_path / "journal.db"
    async with (
        served(path, HAND_GENESIS) as coordinator,
        scripted_workers(coordinator.address, HAND_GENESIS, "w1") as [scripted],
    ):
        await scripted.open()
        await scripted.work_to_the_end()
    return path


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Damage a file."""
    path.write_bytes(change(path.read_bytes()))


def remove(path: Path) -> None:
    path.unlink()


async def refused(
    programs: Programs, journal: Path, run: dict[str, Any], *more: str, status: int = 1
) -> str:
    """A coordinator that does not start; its sentence."""
    settings = programs.settings(run)
    arguments = ("--config", settings, "--journal", journal, "--no-replica")
    listen = () if "--listen" in more else ("--listen", "127.0.0.1:0")
    program = programs.start("fedmezo_coordinator", *arguments, *listen, *more)
    assert await program.wait() == status, program.said
    return only_sentence(program, "fedmezo-coordinator")


async def test_a_second_coordinator_on_the_same_journal(programs: Programs, journal: Path) -> None:
    _, address = await programs.coordinator(journal, HAND_RUN, "--no-replica")
    said = await refused(programs, journal, HAND_RUN)
    assert f"The journal {journal} is open in another process; if that is a command" in said
    listed = programs.start(
        "fedmezo_coordinator.programs.fedmezo_command", "journal", "inspect", str(journal)
    )
    assert await listed.wait() == 1
    assert "give a command of `fedmezo` no file" in only_sentence(listed, "fedmezo")
    async with CoordinatorClient(address) as client:  # The first one is unharmed.
        assert (await client.get_status()).round == 3


async def test_a_port_in_use(programs: Programs, journal: Path, tmp_path: Path) -> None:
    _, address = await programs.coordinator(journal, HAND_RUN, "--no-replica")
    other = tmp_path / "other.db"
    write_genesis(other, HAND_GENESIS)
    said = await refused(programs, other, HAND_RUN, "--listen", address, status=2)
    assert f"Cannot listen on {address}: another process uses the address" in said
    assert "choose another --listen" in said


async def test_the_journal_of_another_run(programs: Programs, journal: Path) -> None:
    said = await refused(programs, journal, HAND_RUN | {"run_id": "other-run"}, status=2)
    assert f"The journal {journal} belongs to a run with run_id = 'tiny-run'" in said
    assert "'other-run'" in said
    said = await refused(programs, journal, HAND_RUN | {"learning_rate": 0.5}, status=2)
    assert "learning_rate = 0.001, the settings say 0.5" in said


async def test_a_truncated_journal(programs: Programs, journal: Path) -> None:
    rewrite(journal, lambda content: content[: len(content) // 2])
    said = await refused(programs, journal, HAND_RUN)
    assert str(journal) in said
    assert "restore" in said.lower()


async def test_a_file_that_is_no_journal(programs: Programs, journal: Path) -> None:
    rewrite(journal, lambda _: b"this is a text file, not a database at all" * 100)
    assert "is not a journal, or its first page is damaged" in await refused(
        programs, journal, HAND_RUN
    )


async def test_one_flipped_byte_in_a_record(programs: Programs, journal: Path) -> None:
    rewrite(journal, lambda content: content.replace(b"tiny-run", b"tiny-rum"))
    said = await refused(programs, journal, HAND_RUN)
    assert "Journal record 0 is not what was written (its hash does not match)" in said
    verified = programs.start(
        "fedmezo_coordinator.programs.fedmezo_command", "journal", "verify", str(journal)
    )
    assert await verified.wait() == 1
    assert "Journal record 0 is not what was written" in only_sentence(verified, "fedmezo")


def test_no_flipped_byte_goes_unnoticed_or_changes_a_record(journal: Path) -> None:
    """A byte that no record is made of may go unnoticed; then every record is as it was."""
    sound, content = records_of(journal), journal.read_bytes()
    for place in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[place] ^= 0x40
        journal.write_bytes(damaged)
        try:
            store = SqliteStore(journal, create=False)
        except JournalError:
            continue
        with closing(store):
            try:
                records = [decode_record(entry.row.body) for entry in Journal(store).load()]
            except JournalError:
                continue
        assert records == sound


async def test_a_journal_that_is_deleted_while_it_is_served(
    programs: Programs, journal: Path
) -> None:
    """A coordinator with nothing to write tells, too; its next start knows what is missing."""
    program, _ = await programs.coordinator(journal, HAND_RUN, "--no-replica")
    remove(journal)
    assert await program.wait() == 1
    said = only_sentence(program, "fedmezo-coordinator")
    assert f"{journal} was deleted, moved or replaced while it was in use" in said
    assert f"its log {journal}-wal is" in await refused(programs, journal, HAND_RUN)
    remove(journal.with_name("journal.db-wal"))
    assert f"{journal}.mark says that it had 12 records" in await refused(
        programs, journal, HAND_RUN
    )


async def test_a_journal_older_than_its_mark(programs: Programs, journal: Path) -> None:
    older = shutil.copy(journal, journal.with_name("older.db"))
    program, _ = await programs.coordinator(journal, HAND_RUN, "--no-replica")
    program.send(signal.SIGTERM)
    assert await program.wait() == 0
    shutil.copy(older, journal)
    said = await refused(programs, journal, HAND_RUN)
    assert f"lacks record 11, which {journal}.mark says was on the disk" in said
    verified = programs.start(
        "fedmezo_coordinator.programs.fedmezo_command", "journal", "verify", str(journal)
    )
    assert await verified.wait() == 1
    assert "lacks record 11" in only_sentence(verified, "fedmezo")


async def test_a_folder_that_is_not_there_or_cannot_be_written(
    programs: Programs, tmp_path: Path
) -> None:
    said = await refused(programs, tmp_path / "nowhere" / "journal.db", HAND_RUN)
    assert "cannot be created" in said
    assert "check that its folder exists and is writable" in said
    with small_disk(tmp_path, "ro,size=64k") as folder:
        said = await refused(programs, folder / "journal.db", HAND_RUN)
    assert "check that its folder exists and is writable" in said


async def test_no_model_is_set(programs: Programs, tmp_path: Path) -> None:
    run = {k: v for k, v in HAND_RUN.items() if k != "model"} | {"model": "tiny"}
    said = await refused(programs, tmp_path / "journal.db", run, status=2)
    assert "model is missing" in said


# ---------------------------------------------------------------- a disk that takes no more


@contextmanager
def small_disk(tmp_path: Path, options: str) -> Iterator[Path]:
    """A file system of its own; skips where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this user may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def grow(folder: Path) -> None:
    """Free some space on a small disk."""
    subprocess.run(["mount", "-o", "remount,size=16m", folder], check=True)


LONG_RUN = {"rounds": 1000, "local_steps": 1000, "workers_min": 1, "quorum": 1}


async def worked_until_it_ended(address: str, genesis: Genesis) -> set[tuple[int, int, int]]:
    """Answer until the coordinator is gone; the tickets that it acknowledged."""
    async with scripted_workers(address, genesis, "w1") as [scripted]:
        await scripted.open()
        with pytest.raises(FedMezoError):
            await scripted.work_to_the_end()
        return scripted.acknowledged


async def test_a_full_disk_ends_the_coordinator_and_loses_nothing_acknowledged(
    programs: Programs, tmp_path: Path
) -> None:
    genesis = genesis_of(config_of(**LONG_RUN))
    with small_disk(tmp_path, "size=256k") as folder:
        journal = folder / "journal.db"
        write_genesis(journal, genesis)
        coordinator, address = await programs.coordinator(
            journal, run_values(**LONG_RUN), "--no-replica"
        )
        acknowledged = await worked_until_it_ended(address, genesis)
        assert await coordinator.wait() == 1
        said = only_sentence(coordinator, "fedmezo-coordinator")
        assert f"The disk that holds {journal} is full" in said
        assert "free some space and start the coordinator again" in said
        grow(folder)
        assert len(acknowledged) > 3
        again, address = await programs.coordinator(journal, run_values(**LONG_RUN), "--no-replica")
        async with CoordinatorClient(address) as client:
            assert (await client.get_status()).epoch == 2
        again.end()
        assert acknowledged <= answered_tickets(journal)


async def test_a_disk_that_fails_ends_the_coordinator_and_loses_nothing_acknowledged(
    programs: Programs, tmp_path: Path
) -> None:
    genesis, journal = genesis_of(config_of(**LONG_RUN)), tmp_path / "journal.db"
    write_genesis(journal, genesis)
    coordinator, address = await programs.coordinator(
        journal, run_values(**LONG_RUN), "--no-replica"
    )
    limits = (128 * 1024, 128 * 1024)
    psutil.Process(coordinator.process.pid).rlimit(psutil.RLIMIT_FSIZE, limits)
    acknowledged = await worked_until_it_ended(address, genesis)
    assert await coordinator.wait() == 1
    said = only_sentence(coordinator, "fedmezo-coordinator")
    assert f"The journal {journal} could not be appended to" in said
    assert "Check the disk and start it again" in said
    assert len(acknowledged) > 3
    assert acknowledged <= answered_tickets(journal)
