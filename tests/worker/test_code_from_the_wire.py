"""What comes over the wire is data: in a real run it reaches no import, code, pickle or path.

Both programs run under an audit hook, which Python calls for each import, compilation, unpickling,
process, connection and opened file.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fedmezo_core.records import Genesis
from tests.integration.support.harness import Programs, environment, write_genesis

NAMES = ["antigravity", "turtledemo", "nturl2path", "this", "pydoc_data", "idlelib"]
"""Modules that everybody has and nobody needs; the contract and a worker are called like them."""
RUN = {
    "run_id": "antigravity",
    "model": "turtledemo",
    "rounds": 4,
    "workers_min": 2,
    "quorum": 2,
    "task": {
        "template": "idlelib {text} idlelib",
        "verbalizers": {"negative": " nturl2path", "positive": " pydoc_data"},
        "tokens_max": 32,
    },
}
WATCHED = "tests.integration.support.watched"


def watching(report: Path, *folders: Path) -> dict[str, str]:
    """The environment of a program that may write into `folders` only."""
    return {
        "WATCH_REPORT": str(report),
        "WATCH_FOLDERS": ":".join(map(str, folders)),
        "WATCH_NAMES": ",".join(NAMES),
        "TMPDIR": str(folders[0]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


MISCHIEF = """
import importlib, json, os, pickle, socket, subprocess, sys
json.loads("{}")
eval("1 + 1")
exec("x = 1")
importlib.import_module("this")
pickle.loads(pickle.dumps(os.getcwd))
open("own", "w").close()
open(os.environ["OUTSIDE"], "w").close()
os.path.exists("turtledemo") or os.open("turtledemo", os.O_CREAT)
os.remove(os.environ["OUTSIDE"])
subprocess.run([sys.executable, "-c", ""])
socket.create_connection(("127.0.0.1", int(os.environ["PORT"])))
"""


def test_the_hook_sees_what_it_must_not_see(tmp_path: Path) -> None:
    """The control of the test below."""
    folder = tmp_path / "allowed"
    folder.mkdir()
    (folder / "mischief.py").write_text(MISCHIEF)
    report = tmp_path / "report"
    with socket.create_server(("127.0.0.1", 0)) as server:
        subprocess.run(
            [sys.executable, "-m", WATCHED, "mischief", "json:loads"],
            cwd=folder,
            env=environment(
                **watching(report, folder),
                OUTSIDE=str(tmp_path / "outside"),
                PORT=str(server.getsockname()[1]),
            ),
            stdout=subprocess.DEVNULL,
            check=True,
        )
    seen = [line.split(" at ")[0].partition(" ")[::2] for line in report.read_text().splitlines()]
    begin, *events = [event for event, _ in seen]
    assert begin == "pickle.find_class"
    assert set(events) == {
        *("compile", "exec", "import", "open", "os.remove", "pickle.find_class"),
        *("socket.connect", "socket.getaddrinfo", "subprocess.Popen"),
    }
    opened = " ".join(arguments for event, arguments in seen if event == "open")
    assert "'turtledemo'" in opened
    assert f"'{tmp_path}/outside'" in opened
    assert "'own'" not in opened


@pytest.mark.slow
async def test_a_run_reaches_no_code_and_no_place_that_messages_name(
    programs: Programs,
    tiny_genesis: Callable[..., Genesis],
    model_folder: Path,
    data_files: list[Path],
    tmp_path: Path,
) -> None:
    reports = {name: tmp_path / f"{name}.report" for name in ("coordinator", "worker")}
    write_genesis(tmp_path / "journal.db", tiny_genesis(**RUN))
    coordinator = programs.start(
        WATCHED,
        *("fedmezo_coordinator", "fedmezo_core.wire.admission:check_hello"),
        *("--listen", "127.0.0.1:0", "--journal", tmp_path / "journal.db", "--no-replica"),
        **watching(reports["coordinator"], tmp_path),
    )
    address = (await coordinator.says(r"is served at (127\.0\.0\.1:\d+)"))[1]
    watched = programs.start(
        WATCHED,
        *("fedmezo_worker", "fedmezo_core.journal.codec:decode_record"),
        *("--coordinator", address, "--name", "this", "--data", data_files[0]),
        *("--model", model_folder, "--threads", "1", "--journal-copy", tmp_path / "copy.db"),
        **watching(reports["worker"], tmp_path),
    )
    await watched.says("joined at round")
    connections = psutil.Process(watched.process.pid).net_connections(kind="inet")
    other = programs.worker(address, "w2", data_files[1], model_folder)
    assert [await watched.wait(), await other.wait()] == [0, 0]
    for name, report in reports.items():
        lines = report.read_text().splitlines()
        assert "getcwd" in lines.pop(0), f"the hook of the {name} saw nothing"
        assert lines == [], name
    reached = {f"{c.raddr.ip}:{c.raddr.port}" for c in connections if c.raddr}
    assert {place.removeprefix("::ffff:") for place in reached} == {address}
