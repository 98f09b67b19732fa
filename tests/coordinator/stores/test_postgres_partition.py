"""A coordinator's machine vanishes from the network: two namespaces, and the cable between."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedmezo_coordinator.stores.opening import open_store
from tests.coordinator.stores.postgres_server import ENCODED, running, skip_without_server
from tests.integration.support.harness import environment

skip_without_server()

TAKEOVER_S_MAX = 20.0
"""TCP keepalive ends the session after 11 s without a sign of life, or an unanswered answer after
10 s."""

COORDINATOR = """
import sys, time
from fedmezo_coordinator.stores.opening import open_store
from fedmezo_coordinator.stores import postgres
from fedmezo_core.errors import FencedError
from tests.core.journal.store_conformance import row
postgres.ANSWER_S = 2.0  # it is the server's patience that the test is about
store = open_store(sys.argv[1])
try:
    while True:
        store.append([row(len(store))])
        print(len(store), flush=True)
        time.sleep(0.2)
except FencedError:
    print("fenced", flush=True)
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def cable() -> Iterator[tuple[str, str]]:
    """Two namespaces that reach each other at 10.213.0.1 and 10.213.0.2, and nothing else."""
    here, there = (f"fmz-{os.getpid()}-{end}" for end in "ab")
    try:
        for namespace in (here, there):
            ip("netns", "add", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        ip(
            "-n",
            here,
            "link",
            "add",
            "plug",
            "type",
            "veth",
            "peer",
            "name",
            "plug",
            "netns",
            there,
        )
        for namespace, address in ((here, "10.213.0.1/30"), (there, "10.213.0.2/30")):
            ip("-n", namespace, "address", "add", address, "dev", "plug")
            ip("-n", namespace, "link", "set", "plug", "up")
        yield here, there
    finally:
        for namespace in (here, there):
            subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)


def can_make_namespaces() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        with cable():
            return True
    except subprocess.CalledProcessError:
        return False


@pytest.mark.skipif(not can_make_namespaces(), reason="needs root and network namespaces")
def test_a_coordinator_cut_off_from_the_network_loses_its_journal_and_writes_nothing_after(
    tmp_path: Path,
) -> None:
    with cable() as (here, there), running(netns=here, listen_addresses="*") as server:
        with (server.data / "pg_hba.conf").open("a") as file:
            file.write("host all all 10.213.0.0/30 scram-sha-256\n")
        server.query("SELECT pg_reload_conf()")
        url = f"postgresql://postgres:{ENCODED}@10.213.0.1:{server.port}/postgres?journal=a"
        said = tmp_path / "said"
        with said.open("w") as out:
            cut_off = subprocess.Popen(
                ["ip", "netns", "exec", there, sys.executable, "-c", COORDINATOR, url],
                env=environment(),
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            await_line(said, "5")
            ip("-n", there, "link", "set", "plug", "down")
            began_s = time.monotonic()
            local = (
                f"postgresql://postgres@/postgres?host={server.folder}&port={server.port}&journal=a"
            )
            standby = open_store(local, standby=True)
            took_s = time.monotonic() - began_s
            length = len(standby)
            acknowledged = max(
                int(line) for line in said.read_text().splitlines() if line.isdigit()
            )
            ip("-n", there, "link", "set", "plug", "up")
            await_line(said, "fenced")
            assert length - acknowledged in (0, 1)
            assert len(standby.read(0, 10**6)) == length
            standby.close()
        finally:
            cut_off.kill()
            cut_off.wait()
    assert took_s < TAKEOVER_S_MAX


def await_line(said: Path, line: str) -> None:
    end_s = time.monotonic() + 60
    while line not in said.read_text().splitlines():
        assert time.monotonic() < end_s, said.read_text()
        time.sleep(0.05)
