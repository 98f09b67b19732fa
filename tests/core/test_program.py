"""How a program ends."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from fedmezo_core import program
from fedmezo_core.errors import ConfigError, DataError
from fedmezo_core.program import (
    TRACEBACK_VARIABLE,
    check_tested,
    current_step,
    long_step,
    run_program,
)

SLACK_S = 3.0
"""What a busy machine may add to a time."""
DAEMON = """
import asyncio, sys, time
from fedmezo_core.program import run_program, stop_signal

async def run():
    stop = stop_signal()
    print("ready", flush=True)
    await stop.wait()
    print("stopping", flush=True)
    time.sleep({stops_in_s})

sys.exit(run_program("daemon", lambda: asyncio.run(run())))
"""
COMMAND = """
import sys, time
from fedmezo_core.program import run_program

def work():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaned", flush=True)

sys.exit(run_program("command", work))
"""
CLEANING = """
import asyncio, sys, time
from fedmezo_core.program import run_program

async def work():
    try:
        print("ready", flush=True)
        await asyncio.sleep(60)
    finally:
        print("cleaning", flush=True)
        time.sleep({cleans_in_s})
        print("cleaned", flush=True)

sys.exit(run_program("command", lambda: asyncio.run(work())))
"""
IMPORTING = """
import pathlib, sys, tempfile
folder = tempfile.mkdtemp()
pathlib.Path(folder, "slow_to_import.py").write_text(
    "import time; print('ready', flush=True); time.sleep(60)"
)
sys.path.insert(0, folder)
from fedmezo_core.program import launch
launch("slow_to_import")
"""


STUCK = """
import asyncio, hashlib, sys
from fedmezo_core.program import run_program, stop_signal

async def run():
    stop = stop_signal()
    # Native code in another thread, for minutes.
    native = asyncio.to_thread(hashlib.pbkdf2_hmac, "sha256", b"a", b"b", 1_000_000_000)
    working = asyncio.create_task(native)
    print("ready", flush=True)
    await stop.wait()
    print("stopping", flush=True)

sys.exit(run_program("daemon", lambda: asyncio.run(run())))
"""

HANDSHAKES = """
import pathlib, sys, tempfile
folder = tempfile.mkdtemp()
pathlib.Path(folder, "strangers_meet.py").write_text('''
import logging
from concurrent import futures
import grpc, trustme

def main():
    server_ca, client_ca = trustme.CA(), trustme.CA()
    shown = server_ca.issue_cert("localhost")
    server = grpc.server(futures.ThreadPoolExecutor(1))
    key, chain = shown.private_key_pem.bytes(), shown.cert_chain_pems[0].bytes()
    roots = server_ca.cert_pem.bytes()
    port = server.add_secure_port(
        "localhost:0", grpc.ssl_server_credentials([(key, chain)], roots, True)
    )
    server.start()
    own = client_ca.issue_cert("client")
    key, chain = own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes()
    for roots in (client_ca.cert_pem.bytes(), server_ca.cert_pem.bytes()):
        credentials = grpc.ssl_channel_credentials(roots, key, chain)
        with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
            try:
                channel.unary_unary("/a/b")(b"", timeout=20)
            except grpc.RpcError as error:
                print(error.code().name)
    logging.getLogger("fedmezo").warning("our own sentence")
    server.stop(None)
''')
sys.path.insert(0, folder)
from fedmezo_core.program import launch
launch("strangers_meet")
"""


def started(code: str) -> subprocess.Popen[str]:
    """A Python process that runs `code`, once it has printed that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_a_daemon_cleanly(number: signal.Signals) -> None:
    process = started(DAEMON.format(stops_in_s=0))
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("stopping\n", "")
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_daemon_at_once(number: signal.Signals) -> None:
    process = started(DAEMON.format(stops_in_s=60))
    process.send_signal(number)
    assert process.stdout is not None
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(number)  # The same one, sent twice.
    time.sleep(1.1)
    assert process.poll() is None
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 128 + number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_daemon_ends_in_time_whatever_it_does(number: signal.Signals) -> None:
    process = started(STUCK)
    begin_s = time.monotonic()
    process.send_signal(number)
    said, complained = process.communicate(timeout=20)
    assert said == "stopping\n"
    assert complained == "The work under way did not end in time, so it was cut off.\n"
    assert process.returncode == 0
    assert 4 <= time.monotonic() - begin_s < 5 + SLACK_S


def test_a_daemon_ends_in_time_if_nobody_reads_its_log_any_more() -> None:
    with started(STUCK) as process:
        assert process.stderr is not None
        process.stderr.close()
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


def test_a_daemon_needs_no_standard_error() -> None:
    code = (
        "from fedmezo_core.layered_settings import ProgramSettings\n"
        "from fedmezo_core.program import run_daemon\n"
        "async def run(_settings):\n"
        "    print('it serves')\n"
        "raise SystemExit(run_daemon('daemon', ProgramSettings, run, []))\n"
    )
    closed = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, code]
    process = subprocess.run(closed, stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (process.returncode, process.stdout) == (0, "it serves\n")


def test_a_second_sighup_is_no_haste() -> None:
    process = started(DAEMON.format(stops_in_s=1.5))
    process.send_signal(signal.SIGHUP)
    time.sleep(1.1)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=20)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_a_signal_ends_a_command_that_cleans_up(number: signal.Signals, status: int) -> None:
    process = started(COMMAND)
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("cleaned\n", "")
    assert process.returncode == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_does_not_disturb_the_clean_up_of_a_command(
    number: signal.Signals,
) -> None:
    process = started(CLEANING.format(cleans_in_s=0.5))
    process.send_signal(number)
    assert process.stdout is not None
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(number)  # The same one, sent to the process and to its group.
    assert process.communicate(timeout=20) == ("cleaned\n", "")
    assert process.returncode == 128 + number


def test_a_later_second_signal_ends_a_clean_up_that_hangs() -> None:
    process = started(CLEANING.format(cleans_in_s=60))
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "cleaning\n"
    time.sleep(1.1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_during_imports_ends_without_a_traceback(number: signal.Signals) -> None:
    process = started(IMPORTING)
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == -number  # 128 + number, as a shell shows it


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_that_another_thread_gets_stops_a_daemon(name: str) -> None:
    code = DAEMON.format(stops_in_s=0).replace(
        "    await stop.wait()",
        "    import signal, threading\n"
        "    kill = lambda: signal.pthread_kill(threading.get_ident(), signal.NAME)\n"
        "    threading.Timer(0.2, kill).start()\n"
        "    await stop.wait()",
    )
    code = code.replace("signal.NAME", f"signal.{name}")
    assert started(code).communicate(timeout=10) == ("stopping\n", "")


def test_a_long_step_says_again_and_again_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedmezo.steps")
    monkeypatch.setattr(program, "STEP_LINE_EVERY_S", 0.05)

    def until_told(pattern: str) -> None:
        end_s = time.monotonic() + 20
        while not any(re.fullmatch(pattern, message) for message in caplog.messages):
            assert time.monotonic() < end_s, caplog.messages
            time.sleep(0.01)

    with long_step("reading", 3000, "records") as step:
        until_told(r"reading: 0 of 3,000 records, \d+ s so far")
        step.advance(1200)
        until_told(r"reading: 1,200 of 3,000 records, \d+ s so far")
        assert current_step().startswith("reading: 1,200 of 3,000 records, ")
        with long_step("loading"):
            assert re.fullmatch(r"loading: \d+ s so far", current_step())
    assert current_step() == ""
    told = len(caplog.messages)
    time.sleep(0.1)
    assert len(caplog.messages) == told


def test_a_short_step_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fedmezo.steps")
    with pytest.raises(DataError), long_step("reading", unit="rows"):
        raise DataError("bad.")
    assert not caplog.messages
    assert current_step() == ""


@pytest.mark.parametrize("found", ["1.41.0", "1.42.3", "1.41"])
def test_a_tested_version_of_a_stack_is_taken(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "version", lambda _: found)
    check_tested("flwr", "1.41", "1.43", "flower")


@pytest.mark.parametrize("found", ["1.40.9", "1.43.0", "1.43.0rc1", "2.0"])
def test_another_version_of_a_stack_is_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "version", lambda _: found)
    with pytest.raises(ConfigError, match=rf"flwr {found} was not tested .* >= 1.41, < 1.43"):
        check_tested("flwr", "1.41", "1.43", "flower")


def test_a_missing_stack_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no-such-stack is missing; install fedmezo\[flower\]"):
        check_tested("no-such-stack", "1.41", "1.43", "flower")


def test_handshakes_that_fail_fill_no_log() -> None:
    """The client does not trust the server, then the server does not trust the client."""
    environment = {name: value for name, value in os.environ.items() if "GRPC" not in name}
    done = subprocess.run(
        [sys.executable, "-c", HANDSHAKES],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == ["UNAVAILABLE", "UNAVAILABLE"]
    assert done.stderr == "our own sentence\n"
