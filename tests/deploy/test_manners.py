"""What the programs owe whoever operates them: logs, reloads, exit statuses, no strange callers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fedmezo_core.records import Genesis
from fedmezo_core.wire.client import CoordinatorClient
from tests.integration.support.harness import (
    Programs,
    environment,
    free_port,
    run_values,
    until,
    write_genesis,
)

SPY = """
import os, sys

def note(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        with open(os.environ["SPY"], "a") as file:
            file.write(f"{event} {arguments}\\n")

sys.addaudithook(note)
"""
FEDMEZO = (
    "import sys; sys.argv[0] = 'fedmezo'; "
    "from fedmezo_coordinator.__main__ import fedmezo; fedmezo()"
)
CHANGES = {"rounds": 2, "workers_min": 1, "quorum": 1}
"""A run that one worker can finish."""
PROGRAMS = ("fedmezo_coordinator", "fedmezo_worker", "fedmezo_coordinator.programs.relay_command")


def json_lines(said: str) -> list[dict[str, str | int]]:
    return [json.loads(line) for line in said.splitlines()]


async def test_a_worker_with_a_local_model_reaches_out_to_its_coordinator_alone(
    programs: Programs,
    model_folder: Path,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
) -> None:
    journal, spied = tmp_path / "journal.db", tmp_path / "spied"
    write_genesis(journal, tiny_genesis(**CHANGES))
    (tmp_path / "spy").mkdir()
    (tmp_path / "spy" / "sitecustomize.py").write_text(SPY)
    spied.touch()
    _, address = await programs.coordinator(journal, run_values(**CHANGES), "--no-replica")
    paths = f"{tmp_path / 'spy'}{os.pathsep}{environment()['PYTHONPATH']}"
    worker = programs.start(
        "fedmezo_worker",
        *("--coordinator", address, "--name", "w1", "--data", data_files[0]),
        *("--model", model_folder, "--threads", "1"),
        PYTHONPATH=paths,
        SPY=str(spied),
    )
    seen: set[tuple[str, int]] = set()
    while worker.running:
        try:
            for one in psutil.Process(worker.process.pid).net_connections("inet"):
                if one.raddr:
                    seen.add((one.raddr.ip.removeprefix("::ffff:"), one.raddr.port))
        except psutil.Error:
            break
        await asyncio.sleep(0.005)
    assert await worker.wait() == 0, worker.said
    assert seen == {("127.0.0.1", int(address.rpartition(":")[2]))}
    # gRPC connects below Python; whatever Python itself looks for would be here.
    assert spied.read_text() == ""


async def test_logs_as_json_say_run_round_and_worker(
    programs: Programs,
    model_folder: Path,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
) -> None:
    journal = tmp_path / "journal.db"
    write_genesis(journal, tiny_genesis(**CHANGES))
    coordinator, address = await programs.coordinator(
        journal, run_values(**CHANGES), "--no-replica", "--log-format", "json"
    )
    worker = programs.start(
        "fedmezo_worker",
        *("--coordinator", address, "--name", "w1", "--data", data_files[0]),
        *("--model", model_folder, "--threads", "1"),
        FEDMEZO_WORKER_LOG_FORMAT="json",
    )
    assert await worker.wait() == 0, worker.said
    run_id = run_values()["run_id"]
    measured = [one for one in json_lines(worker.said) if "measured" in str(one["message"])]
    assert [(one["run"], one["round"], one["worker"]) for one in measured] == [
        (run_id, 1, "w1"), (run_id, 2, "w1"),
    ]  # fmt: skip
    committed = [one for one in json_lines(coordinator.said) if "committed" in str(one["message"])]
    assert [(one["run"], one["round"]) for one in committed] == [(run_id, 1), (run_id, 2)]
    came = [one for one in json_lines(coordinator.said) if "joined at" in str(one["message"])]
    assert [(one["run"], one["worker"]) for one in came] == [(run_id, "w1")]
    # An error that ends a program is a line too.
    lost = programs.start(
        "fedmezo_worker",
        *("--coordinator", f"127.0.0.1:{free_port()}", "--name", "w1", "--data", data_files[0]),
        *("--log-format", "json", "--give-up-after-s", "0"),
    )
    assert await lost.wait() == 1
    assert json_lines(lost.said)[-1]["level"] == "error"


async def test_sighup_reloads_what_can_be_reloaded(
    programs: Programs, tmp_path: Path, tiny_genesis: Callable[..., Genesis]
) -> None:
    journal, file = tmp_path / "journal.db", tmp_path / "c.toml"
    write_genesis(journal, tiny_genesis())
    kept = f'journal = "{journal}"\nlisten = "127.0.0.1:0"\nreplica = false\n'
    file.write_text(kept)
    coordinator = programs.start("fedmezo_coordinator", "--config", file)
    found = await coordinator.says(r"is served at (127\.0\.0\.1:\d+)")
    file.write_text(kept + 'log_format = "json"\nsessions_max = 7\n')
    coordinator.send(signal.SIGHUP)
    await coordinator.says(r'"message": "reloaded; these need a restart: sessions_max"')
    file.write_text(kept + 'log_level = "loud"\n')
    coordinator.send(signal.SIGHUP)
    await coordinator.says("nothing is reloaded: .*log_level")
    async with CoordinatorClient(found[1]) as client:
        assert await client.is_served()
    coordinator.send(signal.SIGTERM)
    assert await coordinator.wait() == 0


async def test_systemd_hears_of_a_worker_and_of_a_coordinator(
    programs: Programs, data_files: list[Path], tmp_path: Path, tiny_genesis: Callable[..., Genesis]
) -> None:
    journal = tmp_path / "journal.db"
    write_genesis(journal, tiny_genesis())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        heard = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        coordinator = programs.start(
            "fedmezo_coordinator",
            *("--journal", journal, "--listen", "127.0.0.1:0", "--no-replica"),
            **heard,
        )
        lines: list[str] = []
        while "READY=1" not in lines:
            lines += manager.recv(4096).decode().split("\n")
        assert re.search(r"STATUS=run .* is served at 127\.0\.0\.1:\d+", "\n".join(lines))
        coordinator.send(signal.SIGTERM)
        assert "STOPPING=1" in manager.recv(4096).decode()
        assert await coordinator.wait() == 0
        worker = programs.start(
            "fedmezo_worker",
            *("--coordinator", f"127.0.0.1:{free_port()}", "--name", "w1"),
            *("--data", data_files[0]),
            **heard,
        )
        lines = []
        while "READY=1" not in lines:
            lines += manager.recv(4096).decode().split("\n")
        worker.send(signal.SIGTERM)
        assert await worker.wait() == 0


@pytest.mark.parametrize("program", [*PROGRAMS, "fedmezo"])
def test_every_program_tells_its_version_and_refuses_a_wrong_flag_with_2(program: str) -> None:
    start = ["-c", FEDMEZO] if program == "fedmezo" else ["-m", program]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *start, *arguments], capture_output=True, text=True, env=environment()
        )

    told = run("--version")
    assert told.returncode == 0
    assert re.search(r"^fedmezo\S* \S+$", told.stdout.strip())
    assert run("--no-such-flag").returncode == 2


def test_completion_can_be_had() -> None:
    shown = subprocess.run(
        [sys.executable, "-c", FEDMEZO],
        capture_output=True,
        text=True,
        env=environment(_FEDMEZO_COMPLETE="source_bash"),
    )
    assert "complete" in shown.stdout


async def test_a_worker_of_a_finished_run_ends_with_0(
    programs: Programs,
    model_folder: Path,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
) -> None:
    """So that `Restart=on-failure` does not start it again."""
    journal = tmp_path / "journal.db"
    write_genesis(journal, tiny_genesis(**CHANGES))
    _, address = await programs.coordinator(journal, run_values(**CHANGES), "--no-replica")
    for _ in range(2):
        worker = programs.worker(address, "w1", data_files[0], model_folder)
        assert await worker.wait() == 0, worker.said
    async with CoordinatorClient(address) as client:

        async def left() -> bool:
            return not any(one.connected for one in (await client.get_status()).workers)

        await until(left, "the worker to have left")
