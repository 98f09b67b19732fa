"""A throwaway PostgreSQL server in a folder of its own, for tests and measurements.

It runs as a user who is not root, since PostgreSQL refuses root, listens on loopback, and wants a
password there.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.free_port import free_port

USER = "postgres"
PASSWORD = "open sesame/@:#"
"""With characters that a URL must encode."""
ENCODED = "open%20sesame%2F%40%3A%23"
PATIENCE_S = 60


def binaries() -> Path | None:
    """The newest folder of `initdb` and `postgres`; None if there is none."""
    found = shutil.which("initdb")
    if found and (Path(found).resolve().parent / "postgres").exists():
        return Path(found).resolve().parent
    versions = [p for p in Path("/usr/lib/postgresql").glob("*/bin") if (p / "initdb").exists()]
    return max(versions, key=lambda p: float(p.parent.name), default=None)


def missing() -> str:
    """One sentence that says why no server can be started here; empty if one can."""
    if binaries() is None:
        return "no PostgreSQL server is installed here; `make test-postgres` installs one"
    if os.geteuid() == 0 and not _has_account():
        return "PostgreSQL does not run as root, and there is no user postgres to run it as"
    return ""


def skip_without_server() -> None:
    """Skip the module that calls it where no server can be started, unless one is asked for."""
    if missing() and os.environ.get("FEDMEZO_TEST_POSTGRES") != "required":
        pytest.skip(missing(), allow_module_level=True)


def _has_account() -> bool:
    with contextlib.suppress(KeyError):
        return bool(pwd.getpwnam("postgres"))
    return False


class Server:
    """One cluster. `stop` and `start` as often as a test likes; `remove` when it is done."""

    def __init__(self, *, netns: str = "", **settings: str) -> None:
        """Make the cluster and start it, with lines for postgresql.conf, maybe in a namespace."""
        self._netns = netns
        found = binaries()
        assert found is not None
        self._bin = found
        # Not in pytest's folder: that is closed to the user who runs the server.
        self.folder = Path(tempfile.mkdtemp(prefix="fedmezo-postgres-"))
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
        self.data = self.folder / "data"
        self.port = free_port()
        secret = self.folder / "password"
        secret.write_text(PASSWORD + "\n")
        self._run(
            "initdb",
            *("-D", str(self.data), "-U", USER, "--no-sync", "-E", "UTF8", "--locale=C"),
            *("--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={secret}"),
        )
        self.configure(
            **{
                "listen_addresses": "127.0.0.1",
                "port": str(self.port),
                "unix_socket_directories": str(self.folder),
                "max_connections": "40",
                **settings,
            }
        )
        self.start()

    def configure(self, **settings: str) -> None:
        """Add settings to postgresql.conf; they count from the next start on."""
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(f"{key} = '{value}'\n" for key, value in settings.items())

    def start(self) -> None:
        """Start the server, and wait until it takes connections."""
        self._ctl("start", "-l", str(self.folder / "log"))

    def stop(self, mode: str = "immediate") -> None:
        """Stop it; `immediate` is a crash, from which the next start recovers."""
        self._ctl("stop", "-m", mode)

    def kill(self) -> None:
        """SIGKILL to the server and all its processes; nobody flushes anything."""
        server = psutil.Process(int((self.data / "postmaster.pid").read_text().split()[0]))
        # Stopped first, so that it cannot start new ones or clean up when its children die.
        server.suspend()
        processes = [server, *server.children()]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, PATIENCE_S)

    def remove(self) -> None:
        """Stop the server and delete its folder."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, journal: str, *, database: str = USER, password: str = ENCODED) -> str:
        """The setting of a journal in this server."""
        return f"postgresql://{USER}:{password}@127.0.0.1:{self.port}/{database}?journal={journal}"

    def query(self, sql: str) -> str:
        """Run statements as the administrator; what they answer."""
        done = self._run(
            *("psql", "-h", str(self.folder), "-p", str(self.port), "-U", USER, "-d", USER),
            *("-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-c", sql),
        )
        return done.strip()

    def end_sessions(self) -> None:
        """pg_terminate_backend for every session but the administrator's."""
        self.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )

    def _ctl(self, *arguments: str) -> None:
        self._run("pg_ctl", "-D", str(self.data), "-w", "-t", str(PATIENCE_S), *arguments)

    def _run(self, program: str, *arguments: str) -> str:
        command = [str(self._bin / program), *arguments]
        if os.geteuid() == 0:
            command = ["runuser", "-u", "postgres", "--", *command]
        if self._netns:
            command = ["ip", "netns", "exec", self._netns, *command]
        # Files, not pipes: the server inherits them and would keep a pipe open.
        with tempfile.TemporaryFile("w+") as said:
            done = subprocess.run(
                command, cwd="/", stdin=subprocess.DEVNULL, stdout=said, stderr=said, check=False
            )
            said.seek(0)
            text = said.read()
        if done.returncode != 0:
            raise subprocess.CalledProcessError(done.returncode, command, text)
        return text


@contextlib.contextmanager
def running(*, netns: str = "", **settings: str) -> Iterator[Server]:
    """A server for as long as the block lasts."""
    server = Server(netns=netns, **settings)
    try:
        yield server
    finally:
        server.remove()
