"""A resident worker and those who ask it, over a real socket; the session is a script."""

from __future__ import annotations

import asyncio
import socket
import stat
import threading
import weakref
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from fedmezo.run_policy import RunPolicy
from fedmezo_core.errors import (
    ConfigError,
    DataError,
    DivergedError,
    FedMezoError,
    MeasurementError,
    MismatchError,
    ModelError,
    PrivacyError,
    UnavailableError,
)
from fedmezo_worker import resident
from fedmezo_worker.resident import ResidentWorker, ask
from tests.integration.support.harness import config_of, genesis_of

held: weakref.WeakSet[Echo] = weakref.WeakSet()


class Echo:
    """A session that says which genesis it is of, and what came; some bytes raise."""

    def __init__(self, genesis: bytes, opened: list[bytes]) -> None:
        if genesis == b"other base":
            raise MismatchError("The base differs.")
        assert not held, "two models have no room"
        held.add(self)
        opened.append(genesis)
        self._genesis = genesis
        self.cut = threading.Event()
        self._itself = self  # as an engine whose estimator calls it

    def exchange(self, down: bytes = b"") -> bytes:
        if down == b"diverged":
            raise DivergedError("The weights differ.")
        if down == b"defect":
            raise KeyError("defect")
        if down == b"measure":
            assert self.cut.wait(60)
        return self._genesis + b" " + down

    def cut_short(self) -> None:
        self.cut.set()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The runs that a session was opened for."""
    held.clear()
    # pytest keeps what is logged, and an error has the frames that held a session.
    monkeypatch.setattr(resident.log, "disabled", True)
    return []


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "worker.sock"


def serving(path: Path, opened: list[bytes]) -> AbstractAsyncContextManager[None]:
    return ResidentWorker("w1", lambda genesis: Echo(genesis, opened)).listening_on(path)


async def asked(path: Path, genesis: bytes, down: bytes, job: str = "job 1") -> tuple[str, bytes]:
    return await asyncio.to_thread(ask, path, job, genesis, down)


async def test_a_run_has_one_session_that_stays(path: Path, opened: list[bytes]) -> None:
    async with serving(path, opened):
        assert await asked(path, b"run", b"") == ("w1", b"run ")
        large = bytes(3_000_000)
        assert await asked(path, b"run", large) == ("w1", b"run " + large)
        assert opened == [b"run"]
        assert await asked(path, b"next", b"x") == ("w1", b"next x")
        assert await asked(path, b"next", b"x", job="job 2") == ("w1", b"next x")
    assert opened == [b"run", b"next", b"next"]
    with pytest.raises(UnavailableError):
        await asked(path, b"run", b"x")


async def test_only_its_user_may_open_the_socket(path: Path, opened: list[bytes]) -> None:
    async with serving(path, opened):
        mode = await asyncio.to_thread(lambda: path.stat().st_mode)
    assert stat.S_IMODE(mode) == 0o600


async def test_whoever_asks_meets_the_worker_s_error(path: Path, opened: list[bytes]) -> None:
    async with serving(path, opened):
        with pytest.raises(MismatchError, match=r"^The base differs.$"):
            await asked(path, b"other base", b"")
        assert await asked(path, b"run", b"x") == ("w1", b"run x")


ROW = "In row 1 of /data/rows.jsonl, label 'hiv-positive' is not among the run's labels."


@pytest.mark.parametrize(
    ("met", "raised", "says"),
    [
        (DataError(ROW), DataError, "DataError"),
        (ModelError("/data/model is no model."), ModelError, "ModelError"),
        (ConfigError("/data/w.toml: name is missing."), ConfigError, "ConfigError"),
        (MeasurementError(ROW), MeasurementError, "MeasurementError"),
        (DivergedError(ROW), DivergedError, "DivergedError"),
        (PrivacyError("/data/ledger is full."), PrivacyError, "PrivacyError"),
        (KeyError(ROW), UnavailableError, "KeyError"),
        (FileNotFoundError(2, "gone", "/data/rows.jsonl"), UnavailableError, "FileNotFoundError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_rows_and_paths_in_an_error_stay_in_the_worker_s_log(
    path: Path,
    met: Exception,
    raised: type[FedMezoError],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def open_session(genesis: bytes) -> Echo:
        raise met

    monkeypatch.setattr(resident.log, "disabled", False)
    async with ResidentWorker("w1", open_session).listening_on(path):
        with pytest.raises(raised) as caught:
            await asked(path, b"run", b"")
    assert type(caught.value) is raised
    assert str(caught.value) == f"Worker w1 cannot serve this run ({says}); its log says why."
    assert str(met) in caplog.text


async def test_the_policy_s_refusal_reaches_whoever_asks(path: Path, opened: list[bytes]) -> None:
    genesis = genesis_of(config_of(batch_size=7))

    def open_session(_: bytes) -> Echo:
        RunPolicy(batch_size_min=8).check(genesis, own_model=True, own_objective=True)
        raise AssertionError

    async with ResidentWorker("w1", open_session).listening_on(path):
        with pytest.raises(ConfigError, match=r"batch_size = 7 is less than the 8"):
            await asked(path, b"run", b"")


async def test_weights_that_diverged_are_rebuilt_from_the_base(
    path: Path, opened: list[bytes]
) -> None:
    async with serving(path, opened):
        await asked(path, b"run", b"")
        with pytest.raises(DivergedError):
            await asked(path, b"run", b"diverged")
        await asked(path, b"run", b"")
    assert opened == [b"run", b"run"]


def test_without_a_worker_the_error_names_the_command_and_the_log_the_socket(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UnavailableError) as raised:
        ask(path, "job 1", b"run", b"")
    assert "fedmezo-worker --serve SOCKET" in str(raised.value)
    assert str(path) not in str(raised.value)
    assert str(path) in caplog.text


def test_a_worker_that_ends_without_a_reply_is_unavailable(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        closing = threading.Thread(target=lambda: listening.accept()[0].close())
        closing.start()
        with pytest.raises(UnavailableError, match="ended before it replied"):
            ask(path, "job 1", b"run", b"")
        closing.join()


async def test_a_socket_that_a_killed_worker_left_is_taken_over(
    path: Path, opened: list[bytes]
) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    async with serving(path, opened):
        assert await asked(path, b"run", b"x") == ("w1", b"run x")


async def test_two_workers_do_not_share_a_socket(path: Path, opened: list[bytes]) -> None:
    async with serving(path, opened):
        with pytest.raises(ConfigError, match="Another worker listens on"):
            async with serving(path, opened):
                pass
        assert await asked(path, b"run", b"x") == ("w1", b"run x")


@pytest.mark.parametrize("name", ["gone/worker.sock", "x" * 200])
async def test_a_path_that_cannot_be_a_socket_is_refused(
    tmp_path: Path, name: str, opened: list[bytes]
) -> None:
    with pytest.raises(ConfigError, match="serve: nothing can listen on"):
        async with serving(tmp_path / name, opened):
            pass


@pytest.mark.parametrize("sent", [b"", b"\xff\xff\xff\xff", b"\x00\x00\x00\x04ab", b"GET / HTTP"])
async def test_bytes_that_are_no_request_harm_nobody(
    path: Path, sent: bytes, opened: list[bytes]
) -> None:
    async with serving(path, opened):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(sent)
        writer.write_eof()
        await reader.read()
        writer.close()
        assert await asked(path, b"run", b"x") == ("w1", b"run x")


async def test_another_version_is_told_so(path: Path, opened: list[bytes]) -> None:
    async with serving(path, opened):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"\0\0\0\7genesis\0\0\0\4down")
        assert b"use the same FedMeZO version" in await reader.read()
        writer.close()
    assert not opened


async def test_a_caller_that_sends_nothing_is_not_waited_for(
    path: Path, opened: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "REQUEST_WITHIN_S", 0.05)
    async with serving(path, opened):
        reader, writer = await asyncio.open_unix_connection(path)
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()


async def test_a_worker_that_is_told_to_end_cuts_its_measurement_short(
    path: Path, opened: list[bytes]
) -> None:
    async with serving(path, opened):
        await asked(path, b"run", b"")
        asking = asyncio.create_task(asked(path, b"run", b"measure"))
        await asyncio.sleep(0.1)
        assert not asking.done()
    with pytest.raises(UnavailableError, match=r"was told to end|ended before it replied"):
        await asking


def test_an_error_of_an_unknown_class_can_be_retried() -> None:
    assert isinstance(resident._error_of("Path", "x"), UnavailableError)
    assert issubclass(type(resident._error_of("FedMezoError", "x")), FedMezoError)
